"""generate.py through its flags, and through a real pseudo-terminal."""

import os
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
from conftest import REPO, TINY, assert_one_line, start_script, unix
from PIL import Image

import checkpoint
import evaluator
import generate
from checkpoint import Progress
from config import FAST, Config
from data import LABEL_COUNTS, read_npz
from diffusion import Diffusion
from picture import read_png, save_png

if os.name != "nt":
    import pty
    import resource


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


def test_a_number_is_written_as_one_picture_in_each_variant(results, run, tmp_path):
    out = tmp_path / "mine.png"
    flags = ("--output", out, "--output_dir", results, "--seed", 3)
    result = run("generate.py", "--digits", "707", "--count", 3, *flags)
    assert result.out == f"{out}\n"
    assert Image.open(out).size == (3 * 28 + 4, 3 * 30 + 2)  # three digits with nothing between
    number = np.asarray(Image.open(out)).astype(int)[2:30, 2:86]
    run("generate.py", "--digits", "7", "--count", 1, *flags)
    first = np.asarray(Image.open(out)).astype(int)[2:30, 2:30]
    assert abs(number[:, :28] - first).max() <= 1


def test_a_labelled_set_can_have_as_many_images_as_any_file(results, run, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "MOST", 20)
    out = tmp_path / "set.npz"
    flags = ("--digits", "all", "--steps", 1, "--guidance", 1, "--output_dir", results)
    assert run("generate.py", *flags, "--count", 20, "--output", out).code == 0
    assert len(read_npz(out)[0]) == 20


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
    assert read_npz(few)[1].tolist() == [3, 1, 3, 1]


def test_all_digits_have_a_row_each_on_one_grid(results, run, tmp_path):
    grids = {}
    for digits, count in (("all", 2), ("all", 3), ("0123456789", 2)):
        out = tmp_path / "all.png"
        run("generate.py", "--digits", digits, "--count", count, "--output", out,
            "--output_dir", results)  # fmt: skip
        grids[digits, count] = np.asarray(Image.open(out)).astype(int)
    two, three, rows = grids.values()
    assert two.shape == (10 * 30 + 2, 2 * 30 + 2)
    assert abs(three[:, :60] - two[:, :60]).max() <= 1  # more of them changes none
    for digit in range(10):  # the same pictures as the number 0123456789, lying on its side
        tile = two[2 + 30 * digit :][:28, 2:30]
        assert (tile == rows[2:30, 2 + 28 * digit :][:, :28]).all()


def test_what_a_picture_costs():
    default, process = Config().sampling, Diffusion(Config())
    limits = ("steps", "guidance", "guidance_low", "guidance_high")
    assert process.network_calls(**{k: default[k] for k in limits}) == 19
    fast = default | FAST
    assert process.network_calls(**{k: fast[k] for k in limits}) == 6


def test_the_guide_of_the_model_matters_where_guidance_does(results, run, tmp_path):
    def draw(guidance: float) -> bytes:
        flags = ("--guidance", guidance, "--guidance_high", 1, "--output", tmp_path / "a.png")
        assert run("generate.py", "--digits", "3", *flags, "--output_dir", results).code == 0
        return np.asarray(Image.open(tmp_path / "a.png")).tobytes()

    before = {w: draw(w) for w in (1, 2)}
    path = results / "models" / "model_epoch_2.pth"
    contents = checkpoint.load(path)
    contents["guide"] = {name: torch.zeros_like(w) for name, w in contents["guide"].items()}
    torch.save(contents, path)
    assert draw(1) == before[1]
    assert draw(2) != before[2]


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
        (("--digits", "7", "--count", 10**12), ("count = 1000000000000", "100,000 images")),
        (
            ("--digits", "all", "--count", 100_001, "--output", "a.npz"),
            ("count = 100001", "100,000"),
        ),
        (("--digits", "all", "--count", 10_001), ("count = 10001", "100,000 images")),
        (("--digits", "7", "--count", 600, "--output", "a.gif"), ("count = 600", "500 images")),
        (("--digits", "77", "--seed", 2**32 - 1, "--output", "many/"), ("seed = ", "at most")),
        (("--reproduce", "a.png", "--output", "a.gif"), ("a.gif", "writes a .png")),
        (("--digits", "7", "--steps", 0), ("steps = 0", "at least 1")),
        (("--digits", "7", "--steps", 2000), ("steps = 2000", "timesteps")),
        (("--digits", "7", "--guidance", "much"), ("--guidance", "much")),
        (("--digits", "7", "--sampler", "euler"), ("sampler = 'euler'", "dpmpp")),
        (("--digits", "7", "--model", "none.pth"), ("none.pth", "no such checkpoint")),
        (("--digits", "7", "--model", str(REPO / "README.md")), ("README.md", "not a checkpoint")),
        (("--digits", "7", "--output", "a.jpg"), ("a.jpg", ".npz, or / (a folder)")),
        (("--digits", "7", "--output", "no/such/a.png"), ("no/such", "make it first")),
        (("--count", "3"), ("--digits",)),
        (("--digits", "7", "--output", "no/such/folder/"), ("no/such", "make it first")),
        (("--digits", "7", "--model", "9"), ("9", "no such checkpoint")),
        (("--reproduce", "none.png"), ("none.png", "no such picture")),
        (("--reproduce", str(REPO / "README.md")), ("README.md", "not a PNG that generate.py")),
        (("--reproduce", "a.png", "--seed", "1"), ("--reproduce", "drop the other flags")),
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
        (r'prediction: str = knob\(\s*"x_0"', 'prediction: str = knob("eps"'),
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
        capable = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        capable |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        self.process = start_script(
            "generate.py", *flags, stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, env=capable,
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


@unix
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
    assert "2026" in terminal.type("?\n", "to draw, 0 to 9: ")
    for wrong in ("1x", "x", "-1", ""):
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
    terminal.type("2026\n", "How many [3]: ")
    terminal.type("1\n", "Guidance [2.0]: ")
    assert "generated_2026_001.png" in terminal.type("\n", "Digit to draw, 0 to 9: ")
    os.write(terminal.screen, b"q\n")
    assert terminal.exit_code() == 0
    pictures = [results / "images" / f"generated_4_00{n}.png" for n in (1, 2)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@unix
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


SETTINGS = (
    ("--digits", "7"),
    ("--digits", "2026", "--count", 3, "--seed", 12),
    ("--digits", "all", "--count", 2, "--guidance", 2.5),
    ("--digits", "31", "--sampler", "ddim", "--eta", 0.7, "--steps", 3, "--seed", 2**31),
    ("--digits", "5", "--sampler", "ddpm", "--steps", 5, "--guidance_low", 0.3, "--no-clip_x_0"),
    ("--digits", "4", "--fast", "--count", 5, "--sample_batch_size", 2, "--model", 1),
)


@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: flags[1])
def test_a_picture_is_reproduced_byte_for_byte(results, run, flags):
    made = Path(run("generate.py", *flags, "--output_dir", results).out.strip())
    again = run("generate.py", "--reproduce", made, "--output_dir", results)
    assert again.code == 0, again
    assert again.out.strip() != str(made)
    assert Path(again.out.strip()).read_bytes() == made.read_bytes()
    assert "the same bytes" in again.err


def test_a_picture_is_never_replaced_by_its_reproduction(results, run):
    made = Path(run("generate.py", "--digits", "7", "--output_dir", results).out.strip())
    before = made.read_bytes()
    flags = ("--reproduce", made, "--output", made, "--output_dir", results)
    assert_one_line(run("generate.py", *flags), "is the picture itself")
    assert made.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{}, {"digits": 7}, {"count": "3"}, {"count": 0}, {"seed": -1}, {"steps": "x"}, {"model": 3}],
    ids=str,
)
def test_an_edited_picture_is_refused_in_one_line(results, run, tmp_path, change):
    made = Path(run("generate.py", "--digits", "7", "--output_dir", results).out.strip())
    known = read_png(made) | {"comment": "hello"} | change
    if not change:
        del known["seed"]
    edited = tmp_path / "edited.png"
    save_png(Image.open(made), edited, known)
    result = run("generate.py", "--reproduce", edited, "--output_dir", results)
    assert_one_line(result, str(edited))


def test_reproducing_without_the_model_names_it(results, run):
    made = Path(run("generate.py", "--digits", "7", "--output_dir", results).out.strip())
    text = Image.open(made).text
    assert {"model", "seed", "digits", "sampler", "steps", "guidance", "version"} <= text.keys()
    aside = results / "earlier" / "2026-01-01_000000"
    aside.mkdir(parents=True)
    for model in (results / "models").glob("*.pth"):
        model.rename(aside / model.name)
    again = ("generate.py", "--reproduce", made, "--output_dir", results)
    assert run(*again).code == 0  # a new run moves an earlier run's models there
    shutil.rmtree(aside)
    assert_one_line(run(*again), str(made), text["model"].strip('"'), "is not in")


def test_a_reproduction_that_differs_says_so(results, run, tmp_path):
    made = Path(run("generate.py", "--digits", "7", "--output_dir", results).out.strip())
    made.write_bytes(made.read_bytes() + b"more")
    result = run("generate.py", "--reproduce", made, "--output_dir", results)
    assert result.code == 2
    assert re.search(
        rf"not the same bytes as {re.escape(str(made))}.*torch .*Pillow",
        result.err.splitlines()[-1],
    )


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_animation_runs_from_noise_to_the_digits(results, run, tmp_path, ending):
    out, still = tmp_path / f"moving.{ending}", tmp_path / "still.png"
    flags = ("--digits", "26", "--count", 4, "--steps", 7, "--seed", 1, "--output_dir", results)
    assert run("generate.py", *flags, "--output", out).out == f"{out}\n"
    run("generate.py", *flags, "--output", still)
    with Image.open(out) as moving:
        assert moving.n_frames == 7 + 1
        assert moving.size == Image.open(still).size == (1 * 58 + 2, 4 * 30 + 2)
        assert moving.info["loop"] == 0
        seconds, frames = 0.0, []
        for frame in range(moving.n_frames):
            moving.seek(frame)
            frames.append(np.asarray(moving.convert("L")).astype(int))
            seconds += moving.info["duration"] / 1000
    assert 2 <= seconds <= 3
    assert abs(frames[-1] - np.asarray(Image.open(still)).astype(int)).max() <= 1
    assert frames[0].std() > 50  # noise


def test_a_folder_takes_one_png_an_image(results, run, tmp_path):
    flags = ("--digits", "72", "--count", 2, "--seed", 11, "--output_dir", results)
    result = run("generate.py", *flags, "--output", f"{tmp_path}/many/")
    names = ["7_seed11.png", "2_seed12.png", "7_seed13.png", "2_seed14.png"]
    assert result.out.split() == [str(tmp_path / "many" / name) for name in names]
    one = tmp_path / "one.png"
    run("generate.py", "--digits", 2, "--count", 1, "--seed", 12, "--output", one,
        "--output_dir", results)  # fmt: skip
    assert one.read_bytes() == (tmp_path / "many" / names[1]).read_bytes()

    before = {path: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    (tmp_path / "many" / names[0]).unlink()
    again = run("generate.py", *flags, "--output", tmp_path / "many")  # now a folder by itself
    assert_one_line(again, names[1], "exists already")
    assert len(list((tmp_path / "many").iterdir())) == len(before) - 1


def test_a_folder_that_cannot_be_written_is_one_line(results, run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    flags = ("--digits", "7", "--count", 1, "--output_dir", results)
    for folder in (tmp_path / "file", Path("/proc/self")):
        result = run("generate.py", *flags, "--output", f"{folder}/")
        assert result.code == 2
        assert result.out == ""
        assert "generate.py: " in result.err.splitlines()[-1]
        assert str(folder) in result.err.splitlines()[-1]


@unix
@pytest.mark.parametrize("kind", ["a.png", "a.gif", "a.npz", "many/"])
def test_a_full_disk_is_one_line_and_leaves_nothing(results, tmp_path, kind):
    def full() -> None:  # no file may grow beyond 100 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    flags = ("--digits", "7", "--count", 4, "--output_dir", results)
    process = start_script("generate.py", *flags, "--output", f"{tmp_path}/out_{kind}",
                           stderr=subprocess.PIPE, preexec_fn=full)  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert out == ""
    assert "File too large" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [path for path in tmp_path.rglob("*out_*") if path.is_file()] == []


@unix
def test_digits_appear_in_the_terminal_and_nowhere_else(results):
    terminal = Terminal("--digits", "7", "--count", 2, "--output_dir", results)
    assert "▀" in terminal.read_until("generated_7_001.png")
    assert terminal.exit_code() == 0
    terminal = Terminal("--digits", "7", "--no-show", "--output_dir", results)
    assert "▀" not in terminal.read_until("generated_7_002.png")
    assert terminal.exit_code() == 0
    process = start_script("generate.py", "--digits", "7", "--output_dir", results)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert [line.split()[0] for line in lines] == [
        "16",
        str(results / "images/generated_7_003.png"),
    ]


def test_the_shipped_model_stands_in_until_one_is_trained(results, run, tmp_path):
    models = results / "models"
    shutil.copy(models / "model_epoch_2.pth", models / "pretrained.pth")
    flags = ("generate.py", "--digits", "7", "--count", 1, "--steps", 1, "--output_dir", results)
    assert "model_epoch_2.pth" in run(*flags).err
    for name in ("pretrained", "pretrained.pth", "1", models / "pretrained.pth"):
        assert "pretrained.pth" in run(*flags, "--model", name).err
    assert "model_epoch_2.pth" in run(*flags, "--model", "newest").err
    for model in models.glob("model_*.pth"):
        model.unlink()
    assert "pretrained.pth" in run(*flags).err


def test_the_model_that_comes_along_draws_what_it_is_asked(run, tmp_path):
    shipped, drawn = REPO / "results" / "models" / "pretrained.pth", tmp_path / "a.npz"
    assert shipped.stat().st_size <= 8e6
    flags = ("--model", shipped, "--device", "cpu", "--output", drawn)
    assert run("generate.py", "--digits", "0123456789", "--count", 10, *flags).code == 0
    images, labels = read_npz(drawn)
    judge, _, _ = evaluator.load(torch.device("cpu"))
    assert evaluator.accuracy(judge, images, labels) >= 0.97
