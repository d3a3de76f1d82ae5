"""generate.py through its flags, and through a real pseudo-terminal."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, assert_one_line, start_script
from PIL import Image

from checkpoint import Progress
from data import LABEL_COUNTS, read_npz


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The results of a small run with two checkpoints; tests read it and do not write."""
    out = tmp_path_factory.mktemp("trained")
    process = start_script("train.py", *TINY, "--epochs", 2, "--save_every", 1, "--output_dir", out)
    assert process.wait() == 0, process.stdout.read()
    return out


@pytest.fixture
def results(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "results"))


def test_flags_ask_nothing_and_stdout_is_the_path_alone(results, run):
    result = run("generate.py", "--digits", "7", "--output_dir", results)
    path = results / "images" / "generated_7_001.png"
    assert result.code == 0
    assert result.out == f"{path}\n"
    assert "model_epoch_2.pth" in result.err
    assert Image.open(path).size == (4 * 30 + 2, 4 * 30 + 2)  # 16 images


def test_no_file_is_ever_overwritten(results, run):
    paths = [run("generate.py", "--digits", "7", "--output_dir", results).out for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(Path(path.strip()).exists() for path in paths)


def test_each_digit_has_its_row(results, run, tmp_path):
    out = tmp_path / "mine.png"
    result = run("generate.py", "--digits", "707", "--count", 3, "--output", out,
                 "--output_dir", results)  # fmt: skip
    assert result.out == f"{out}\n"
    assert Image.open(out).size == (3 * 30 + 2, 3 * 30 + 2)


def test_a_labelled_set_has_mnists_histogram(results, run, tmp_path):
    out = tmp_path / "set.npz"
    flags = ("--digits", "all", "--count", 2000, "--steps", 1, "--guidance", 1)
    result = run("generate.py", *flags, "--output", out, "--output_dir", results)
    assert result.out == f"{out}\n"
    images, labels = read_npz(out)
    assert images.shape == (2000, 1, 28, 28)
    shares = labels.bincount(minlength=10) / 2000
    real = torch.tensor(LABEL_COUNTS) / sum(LABEL_COUNTS)
    assert (shares - real).abs().max() < 0.02
    assert shares[1] > shares[5] + 0.005
    few = tmp_path / "few.npz"
    run("generate.py", "--digits", "31", "--count", 2, "--steps", 1, "--output", few,
        "--output_dir", results)  # fmt: skip
    assert read_npz(few)[1].tolist() == [3, 3, 1, 1]


def test_all_digits_on_one_grid(results, run, tmp_path):
    out = tmp_path / "all.png"
    run("generate.py", "--digits", "all", "--count", 2, "--output", out, "--output_dir", results)
    assert Image.open(out).size == (2 * 30 + 2, 10 * 30 + 2)


def test_the_seed_sets_the_pictures_and_the_count_does_not(results, run, tmp_path):
    def pixels(name: str, *flags: object) -> np.ndarray:
        out = tmp_path / f"{name}.png"
        run("generate.py", "--digits", "3", *flags, "--output", out, "--output_dir", results)
        return np.asarray(Image.open(out)).astype(int)

    four = pixels("four", "--count", 4, "--seed", 5)
    assert (pixels("again", "--count", 4, "--seed", 5) == four).all()
    assert (pixels("other", "--count", 4, "--seed", 6) != four).any()
    one = pixels("one", "--count", 1, "--seed", 5)
    assert abs(one[2:30, 2:30] - four[2:30, 2:30]).max() <= 1  # one grey level of rounding
    for name, flags in (
        ("ddim", ("--sampler", "ddim")), ("steps", ("--steps", 3)), ("w", ("--guidance", 4)),
    ):  # fmt: skip
        assert (pixels(name, "--count", 4, "--seed", 5, *flags) != four).any()


def test_the_model_asked_for_is_used(results, run):
    path = results / "models" / "model_epoch_1.pth"
    result = run("generate.py", "--digits", "7", "--model", path, "--output_dir", results)
    assert result.code == 0
    assert str(path) in result.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--digits", "7x"), ("digits = '7x'", "0 to 9")),
        (("--digits", "7", "--count", 0), ("count = 0", "at least 1")),
        (("--digits", "7", "--steps", 0), ("steps = 0", "at least 1")),
        (("--digits", "7", "--steps", 2000), ("steps = 2000", "timesteps")),
        (("--digits", "7", "--guidance", "much"), ("--guidance", "much")),
        (("--digits", "7", "--sampler", "euler"), ("sampler = 'euler'", "dpmpp")),
        (("--digits", "7", "--model", "none.pth"), ("none.pth", "no such checkpoint")),
        (("--digits", "7", "--model", str(REPO / "README.md")), ("README.md", "not a checkpoint")),
        (("--digits", "7", "--output", "a.jpg"), ("a.jpg", ".png or .npz")),
        (("--digits", "7", "--output", "no/such/a.png"), ("no/such", "make it first")),
        (("--count", "3"), ("--digits",)),
        (("--digit", "3"), ("--digit", "--help")),
    ],
)
def test_bad_input_is_one_line(flags, words, run, results):
    assert_one_line(run("generate.py", "--output_dir", results, *flags), *words)


def test_without_a_model_it_says_how_to_train_one(run, tmp_path):
    assert_one_line(run("generate.py", "--output_dir", tmp_path), "no model", "python train.py")


def test_editing_config_after_training_never_breaks_an_old_model(results, tmp_path):
    """A copy of the program whose defaults are all other than the model's."""
    for path in REPO.glob("*.py"):
        shutil.copy(path, tmp_path)
    config = (tmp_path / "config.py").read_text(encoding="utf-8")
    for old, new in (
        (r"img_size: int = knob\(28", "img_size: int = knob(32"),
        (r'prediction: str = knob\(\s*"v"', 'prediction: str = knob("eps"'),
        (r"blocks: int = knob\(\d", "blocks: int = knob(5"),
    ):
        config, edits = re.subn(old, new, config)
        assert edits == 1, old
    (tmp_path / "config.py").write_text(config, encoding="utf-8")
    pictures = []
    for folder in (REPO, tmp_path):
        out = tmp_path / f"{len(pictures)}.png"
        command = ["--digits", "12", "--count", "2", "--output", out, "--output_dir", results]
        subprocess.run([sys.executable, folder / "generate.py", *command], check=True)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


class Terminal:
    """generate.py behind a pseudo-terminal: type to it, and read what it shows."""

    def __init__(self, *flags: object) -> None:
        self.screen, terminal = pty.openpty()
        self.process = start_script(
            "generate.py", *flags, stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True,
        )  # fmt: skip
        os.close(terminal)

    def read_until(self, text: str, timeout: float = 60) -> str:
        shown, end = "", time.monotonic() + timeout
        while text not in shown:
            ready, _, _ = select.select([self.screen], [], [], end - time.monotonic())
            assert ready, f"waited for {text!r}, saw {shown!r}"
            try:
                shown += os.read(self.screen, 4096).decode(errors="replace")
            except OSError:  # Linux's way to say that the other side is closed
                raise AssertionError(f"ended before {text!r}: {shown!r}") from None
        return shown

    def type(self, text: str, then: str) -> str:
        os.write(self.screen, text.encode())
        return self.read_until(then)

    def exit_code(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.screen)
        return code


def test_a_conversation(results):
    terminal = Terminal("--output_dir", results)
    listing = terminal.read_until("Which model [2]: ")
    first, second = (listing.index(f"model_epoch_{n}.pth") for n in (1, 2))
    assert first < second
    assert "epoch 2 (step 20)" in listing
    assert re.search(r"model_epoch_2\.pth .* 20\d\d-\d\d-\d\d \d\d:\d\d", listing)
    assert "'9' is not a whole number from 1 to 2" in terminal.type("9\n", "[2]: ")
    assert "'x' is not" in terminal.type("x\n", "[2]: ")
    assert "model_epoch_2.pth" in terminal.type("\n", "Digit to draw, 0 to 9: ")
    for wrong in ("12", "x", "-1", ""):
        shown = terminal.type(f"{wrong}\n", "to draw, 0 to 9: ")
        assert "digit" in shown
        assert "How many" not in shown
    terminal.type("4\n", "How many [16]: ")
    for wrong in ("0", "2.5", "many"):
        shown = terminal.type(f"{wrong}\n", "[16]: ")
        assert f"'{wrong}' is not a whole number" in shown
        assert "invalid digit" not in shown
    terminal.type("3\n", "Guidance [")
    assert "'strong' is not a number" in terminal.type("strong\n", "Guidance [")
    assert "generated_4_001.png" in terminal.type("2\n", "Digit to draw, 0 to 9: ")
    terminal.type("4\n", "How many [3]: ")  # the last answers are the defaults now
    terminal.type("\n", "Guidance [2.0]: ")
    assert "generated_4_002.png" in terminal.type("\n", "Digit to draw, 0 to 9: ")
    os.write(terminal.screen, b"q\n")
    assert terminal.exit_code() == 0
    pictures = [results / "images" / f"generated_4_00{n}.png" for n in (1, 2)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@pytest.mark.parametrize(("key", "code"), [(b"\x04", 0), (b"\x03", 130)], ids=["ctrl-d", "ctrl-c"])
def test_leaving(results, key, code):
    terminal = Terminal("--output_dir", results)
    terminal.read_until("Which model")
    if key == b"\x03":  # as the terminal driver would for its foreground process
        terminal.process.send_signal(signal.SIGINT)
    else:
        os.write(terminal.screen, key)
    shown = terminal.read_until("\n")
    assert terminal.exit_code() == code
    assert "Traceback" not in shown


def test_the_listing_orders_numbers_as_numbers(results, run, monkeypatch):
    import checkpoint

    for epoch in (5, 30):
        contents = torch.load(results / "models" / "model_epoch_2.pth", weights_only=True)
        contents["progress"] |= {"epoch": epoch, "step": 10 * epoch}
        torch.save(contents, results / "models" / f"model_epoch_{epoch}.pth")
    os.utime(results / "models" / "model_epoch_30.pth", (1, 1))
    found = checkpoint.list_checkpoints(results / "models")
    assert [progress.epoch for _, progress in found] == [1, 2, 5, 30]
    assert isinstance(found[0][1], Progress)
    assert "model_epoch_30.pth" in run("generate.py", "--digits", "1", "--output_dir", results).err
