"""generate.py through its flags, and through a real pseudo-terminal."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    TINY,
    Result,
    assert_one_line,
    copy_program,
    run_quietly,
    start_script,
    unix,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import checkpoint
from config import Config
from diffusion import Diffusion
from evaluation import classifier
from interface import provenance
from interface.models import list_checkpoints
from interface.picture import read_npz, save_png
from interface.requests import FAST, MNIST_COUNTS
from model import UNet
from system import files

if os.name != "nt":
    import pty
    import resource


OWN = {"steps": 3, "guidance": 1.5, "eta": 0.6}  # sampling settings that the model brings along


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The results of a small run with two checkpoints; tests read it and do not write."""
    out = tmp_path_factory.mktemp("trained")
    flags = TINY | OWN | {"epochs": 2, "save_every": 1, "output_dir": out}
    run_quietly("train.py", flags)
    return out


@pytest.fixture
def results(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "results"))


@pytest.fixture
def draw(run, results):
    """Run generate.py with these flags on the small run's results."""

    def draw_it(**flags: object) -> Result:
        return run("generate.py", output_dir=results, **flags)

    return draw_it


@pytest.fixture
def pixels(draw, tmp_path):
    """The pixels of the PNG that these flags draw."""

    def draw_it(**flags: object) -> np.ndarray:
        result = draw(**flags, output=tmp_path / "pixels.png")
        assert result.code == 0, result
        return np.asarray(Image.open(tmp_path / "pixels.png")).astype(int)

    return draw_it


def test_flags_ask_nothing_and_stdout_is_the_path_alone(results, draw):
    result = draw(digits=7)
    path = results / "images" / "generated_7_001.png"
    assert result.code == 0
    assert result.out == f"{path}\n"
    assert "model_epoch_2.pth" in result.err
    assert Image.open(path).size == (4 * 30 + 2, 4 * 30 + 2)  # 16 images


def test_no_file_is_ever_overwritten(draw):
    paths = [draw(digits=7).out for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(Path(path.strip()).exists() for path in paths)


def test_a_number_is_written_as_one_picture_in_each_variant(draw, pixels, tmp_path):
    out = tmp_path / "mine.png"
    assert draw(digits=707, count=3, seed=3, output=out).out == f"{out}\n"
    assert Image.open(out).size == (3 * 28 + 4, 3 * 30 + 2)  # three digits with nothing between
    number = np.asarray(Image.open(out)).astype(int)[2:30, 2:86]
    first = pixels(digits=7, count=1, seed=3)[2:30, 2:30]
    assert abs(number[:, :28] - first).max() <= 1


def test_a_set_has_the_labels_that_were_asked_for(draw, tmp_path):
    out, quick = tmp_path / "set.npz", {"steps": 1, "guidance": 1}
    asked = {("31", 2): [3, 1, 3, 1], ("all", 2): list(range(10)) * 2}
    for (digits, count), expected in asked.items():
        assert draw(digits=digits, count=count, output=out, **quick).out == f"{out}\n"
        images, labels = read_npz(out)
        assert images.shape == (len(expected), 1, 28, 28)
        assert labels.tolist() == expected


def test_a_set_as_in_mnist_has_its_histogram(draw, tmp_path):
    out = tmp_path / "set.npz"
    result = draw(digits="mnist", count=2000, steps=1, guidance=1, output=out)
    assert result.out == f"{out}\n"
    images, labels = read_npz(out)
    assert images.shape == (2000, 1, 28, 28)
    fractions = labels.bincount(minlength=10) / 2000
    real = torch.tensor(MNIST_COUNTS) / sum(MNIST_COUNTS)
    assert (fractions - real).abs().max() < 0.02
    assert fractions[1] > fractions[5] + 0.005


def test_all_digits_have_a_row_each_on_one_grid(pixels):
    two, three, number = (
        pixels(digits=digits, count=count)
        for digits, count in (("all", 2), ("all", 3), ("0123456789", 2))
    )
    assert two.shape == (10 * 30 + 2, 2 * 30 + 2)
    assert abs(three[:, :60] - two[:, :60]).max() <= 1  # more of them changes none
    for digit in range(10):  # the same pictures as the number 0123456789, lying on its side
        tile = two[2 + 30 * digit :][:28, 2:30]
        assert (tile == number[2:30, 2 + 28 * digit :][:, :28]).all()


def test_a_grid_as_in_mnist_shows_what_the_set_holds(draw, pixels, tmp_path):
    grid = pixels(digits="mnist", count=9, seed=4)
    assert grid.shape == (3 * 30 + 2, 3 * 30 + 2)
    draw(digits="mnist", count=9, seed=4, output=tmp_path / "set.npz")
    images = read_npz(tmp_path / "set.npz")[0][:, 0].numpy()
    for i, image in enumerate(images):
        assert (grid[2 + i // 3 * 30 :, 2 + i % 3 * 30 :][:28, :28] == image).all()


@pytest.mark.parametrize(("threads", "taken"), [(3, 3), (-5, 1), (10**9, 1024), ("x", None)])
def test_a_picture_is_drawn_again_with_as_many_threads(draw, monkeypatch, threads, taken):
    made, asked = Path(draw(digits=7, count=1).out.strip()), []
    with Image.open(made) as image:
        text = image.text | {"threads": json.dumps(threads)}
        info = PngInfo()
        for name, value in text.items():
            info.add_text(name, value)
        image.save(made, pnginfo=info)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    draw(reproduce=made)
    assert asked == ([taken] if taken else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_picture_is_drawn_again_on_the_device_that_drew_it(run, results, draw):
    made = Path(draw(digits=7, count=1).out.strip())
    with Image.open(made) as image:
        info = PngInfo()
        for name, value in image.text.items():
            info.add_text(name, value.replace(" on cpu", " on cuda"))
        image.save(made, pnginfo=info)
    result = run("generate.py", reproduce=made, output_dir=results)
    assert_one_line(result, "device = 'cuda'", "not usable here")


def test_a_compiled_picture_is_drawn_again_by_a_compiled_network(draw, monkeypatch):
    compiled = []

    def compile_eagerly(network: UNet, mode: str | None) -> None:
        compiled.append(network)
        torch.nn.Module.compile(network, backend="eager")

    monkeypatch.setattr(UNet, "compile", compile_eagerly)
    made = Path(draw(digits=7, count=1, compile=True).out.strip())
    assert provenance.read(made)["made with"].endswith(", compiled")
    before = len(compiled)
    assert draw(reproduce=made).code == 0
    assert len(compiled) == 2 * before > 0


def test_what_a_picture_costs():
    assert Diffusion(Config()).network_calls() == 19
    assert Diffusion(Config(**FAST)).network_calls() == 6


def test_the_guide_of_the_model_matters_where_guidance_does(results, pixels):
    def with_guidance(w: float) -> np.ndarray:
        return pixels(digits=3, guidance=w)

    before = {w: with_guidance(w) for w in (1, 2)}
    path = results / "models" / "model_epoch_2.pth"
    contents = checkpoint.load(path)
    contents["guide"] = {name: torch.zeros_like(w) for name, w in contents["guide"].items()}
    torch.save(contents, path)
    assert (with_guidance(1) == before[1]).all()
    assert (with_guidance(2) != before[2]).any()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"guidance": 5, "steps": 1}, ("guidance = 5", "no sampling time (steps = 1) is in")),
        ({"guidance": 5, "guidance_low": 0.86}, ("guidance = 5", "guidance_low = 0.86")),
        ({"sampler": "ddpm", "eta": 0}, ("eta = 0.0", "no effect with sampler = 'ddpm'")),
    ],
)
def test_a_flag_without_effect_is_refused(results, draw, flags, words):
    assert_one_line(draw(digits=7, count=1, **flags), *words)


def test_what_fast_sets_is_no_flag_of_the_users(draw):
    assert draw(digits=7, count=1, fast=True, sampler="ddpm").code == 0  # which has no use for eta
    assert draw(digits=7, count=1, fast=True, steps=2).code == 0  # too few for guidance to act


def test_grey_levels_that_a_model_lacks_are_not_promised(results, draw):
    path = results / "models" / "model_epoch_2.pth"
    torch.save(checkpoint.load(path) | {"levels": None}, path)
    assert draw(digits=7, count=1).code == 0
    assert_one_line(draw(digits=7, count=1, match_levels=True), "match_levels", "no grey levels")


def test_the_seed_sets_the_pictures_and_the_count_does_not(pixels):
    usual = {"digits": 3, "count": 4, "seed": 5}
    four = pixels(**usual)
    assert (pixels(**usual) == four).all()
    one = pixels(**(usual | {"count": 1}))
    assert abs(one[2:30, 2:30] - four[2:30, 2:30]).max() <= 1  # one grey level of rounding
    for change in ({"seed": 6}, {"sampler": "ddim"}, {"steps": 4}, {"guidance": 4}, {"eta": 0}):
        assert (pixels(**(usual | change)) != four).any(), change


def test_the_models_own_sampling_settings_are_the_defaults(draw, pixels, tmp_path):
    drawn = pixels(digits=7, count=2)
    usual = Config().select("sampling")
    recorded = provenance.read(tmp_path / "pixels.png")
    assert {name: recorded[name] for name in usual} == usual | OWN
    assert (pixels(digits=7, count=2, **OWN) == drawn).all()
    for change in OWN:  # each of them matters, so that the test would see one that is not used
        assert (pixels(digits=7, count=2, **{change: usual[change]}) != drawn).any(), change
    words = draw(digits=7).err
    assert "3 steps" in words
    assert "guidance 1.5" in words
    draw(digits=7, fast=True, eta=0.2, output=tmp_path / "fast.png")  # a flag wins over --fast
    recorded = provenance.read(tmp_path / "fast.png")
    assert {name: recorded[name] for name in usual} == usual | OWN | FAST | {"eta": 0.2}


def test_the_model_asked_for_is_used(results, draw):
    path = results / "models" / "model_epoch_1.pth"
    result = draw(digits=7, model=path)
    assert result.code == 0
    assert str(path) in result.err


def test_fast_leaves_the_guidance_of_a_model_without_a_guide_alone(run, tmp_path):
    flags = TINY | {"epochs": 1, "guide_fraction": 0, "guidance": 1.5, "timesteps": 4, "steps": 4}
    assert run("train.py", **flags, output_dir=tmp_path).code == 0
    drawn = run("generate.py", digits=7, fast=True, output_dir=tmp_path)
    assert "eta 0.3, 4 steps, guidance 1.5" in drawn.err, drawn


def test_a_picture_is_never_replaced_by_its_completion(draw, tmp_path):
    out = tmp_path / "half.png"
    assert draw(digits=7, count=1, output=out).code == 0
    before = out.read_bytes()
    for flags in ({"complete": out}, {"edit": out}):
        assert_one_line(draw(digits=7, output=out, **flags), str(out), "choose another name")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"digits": "7x"}, ("digits = '7x'", "0 to 9")),
        ({"digits": ""}, ("--digits is empty",)),
        ({"digits": 7, "complete": "~no.png"}, ("~no.png", "no such picture")),
        ({"digits": 7, "count": 0}, ("count = 0", "at least 1")),
        ({"digits": 7, "count": 10**12}, ("count = 1000000000000", "at most 100,000")),
        (
            {"digits": "mnist", "count": 100_001, "output": "a.npz"},
            ("count = 100001", "at most 100,000"),
        ),
        ({"digits": "all", "count": 10_001}, ("count = 10001", "at most 100,000")),
        ({"digits": 7, "count": 600, "output": "a.gif"}, ("count = 600", "at most 500")),
        ({"digits": 77, "seed": 2**32 - 1, "output": "many/"}, ("seed = ", "at most")),
        ({"digits": 7, "steps": 0}, ("steps = 0", "at least 1")),
        ({"digits": 7, "steps": 2000}, ("steps = 2000", "at most timesteps = 1000")),
        ({"digits": 7, "guidance": "much"}, ("--guidance", "much")),
        ({"digits": 7, "sampler": "euler"}, ("sampler = 'euler'", "dpmpp")),
        ({"digits": 7, "model": "none.pth"}, ("none.pth", "no such checkpoint")),
        ({"digits": 7, "model": REPO / "README.md"}, ("README.md", "not a checkpoint")),
        ({"digits": 7, "model": 9}, ("9", "no such checkpoint")),
        ({"digits": 7, "output": "a.jpg"}, ("a.jpg", ".npz, .gif, .webp, or / (a folder)")),
        ({"digits": 7, "output": "no/such/a.png"}, ("no/such", "make it first")),
        ({"digits": 7, "output": "no/such/folder/"}, ("no/such", "make it first")),
        ({"count": 3}, ("--count needs --digits",)),
        ({"output": "a.png"}, ("--output needs --digits or --reproduce",)),
        ({"reproduce": "none.png"}, ("none.png", "no such picture")),
        ({"reproduce": REPO / "README.md"}, ("README.md", "not a PNG that generate.py")),
        ({"reproduce": "a.png", "seed": 1}, ("--reproduce allows only",)),
        ({"reproduce": "a.png", "fast": True}, ("--reproduce allows only",)),
        ({"reproduce": "a.png", "model": 1}, ("--reproduce allows only",)),
        ({"reproduce": "a.png", "digits": 7}, ("--digits: not allowed with argument --reproduce",)),
        ({"digit": 3}, ("--digit", "--help")),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags, words, draw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(draw(**flags), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_without_a_model_it_says_how_to_train_one(run, tmp_path):
    assert_one_line(run("generate.py", output_dir=tmp_path), "no model", "python train.py")


def test_editing_config_after_training_never_breaks_an_old_model(results, draw, tmp_path):
    """A copy of the program whose defaults are all other than the model's draws the same bytes."""
    copy = tmp_path / "copy"
    copy_program(copy)
    config = (copy / "config.py").read_text(encoding="utf-8")
    for old, new in (
        ("img_size: int = model(28", "img_size: int = model(32"),
        ('prediction: str = model("x_0"', 'prediction: str = model("eps"'),
        ("blocks: int = model(1", "blocks: int = model(5"),
        ("timesteps: int = model(1000", "timesteps: int = model(2000"),
        ("guidance: float = sampling(2.8", "guidance: float = sampling(1.0"),
        ("steps: int = sampling(13", "steps: int = sampling(1"),
    ):
        assert config.count(old) == 1, old
        config = config.replace(old, new)
    (copy / "config.py").write_text(config, encoding="utf-8")
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    flags = {"digits": 12, "count": 2}
    assert draw(**flags, output=ours).code == 0
    process = start_script(copy / "generate.py", flags | {"output": theirs, "output_dir": results})
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert theirs.read_bytes() == ours.read_bytes()


class Terminal:
    """generate.py behind a pseudo-terminal: type to it, and read what it shows."""

    def __init__(self, **flags: object) -> None:
        self.screen, terminal = pty.openpty()
        capable = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        capable |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        options = {"start_new_session": True, "env": capable}
        self.process = start_script("generate.py", flags, **streams, **options)
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
    terminal = Terminal(output_dir=results)
    listing = terminal.read_until("Which model [2]: ")
    first, second = (listing.index(f"model_epoch_{n}.pth") for n in (1, 2))
    assert first < second
    assert "epoch 2 (step 20)" in listing
    assert re.search(r"model_epoch_2\.pth .* 20\d\d-\d\d-\d\d \d\d:\d\d", listing)
    assert "'9' is not a whole number from 1 to 2" in terminal.type("9\n", "[2]: ")
    assert "'x' is not" in terminal.type("x\n", "[2]: ")
    assert "model_epoch_2.pth" in terminal.type("\n", "Digits to draw, such as 7, 2026 or all: ")
    assert "2026" in terminal.type("?\n", "2026 or all: ")
    for wrong in ("1x", "x", "-1", ""):
        shown = terminal.type(f"{wrong}\n", "2026 or all: ")
        assert "digit" in shown
        assert "How many" not in shown
    terminal.type("4\n", "How many [16]: ")
    for wrong in ("0", "2.5", "many"):
        shown = terminal.type(f"{wrong}\n", "[16]: ")
        assert f"'{wrong}' is not a whole number" in shown
        assert "invalid digit" not in shown
    terminal.type("3\n", "Guidance [1.5]: ")
    assert "'strong' is not a number" in terminal.type("strong\n", "Guidance [1.5]: ")
    assert "generated_4_001.png" in terminal.type("2\n", "Digits to draw, such as 7, 2026 or all: ")
    terminal.type("4\n", "How many [3]: ")  # the last answers are the defaults now
    terminal.type("\n", "Guidance [2.0]: ")
    assert "generated_4_002.png" in terminal.type("\n", "Digits to draw, such as 7, 2026 or all: ")
    terminal.type("2026\n", "How many [3]: ")
    terminal.type("1\n", "Guidance [2.0]: ")
    assert "generated_2026_001.png" in terminal.type(
        "\n", "Digits to draw, such as 7, 2026 or all: "
    )
    os.write(terminal.screen, b"q\n")
    assert terminal.exit_code() == 0
    pictures = [results / "images" / f"generated_4_00{n}.png" for n in (1, 2)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@unix
@pytest.mark.parametrize(("key", "code"), [(b"\x04", 0), (b"\x03", 130)], ids=["ctrl-d", "ctrl-c"])
def test_leaving(results, key, code):
    terminal = Terminal(output_dir=results)
    terminal.read_until("Which model [2]: ")
    time.sleep(0.5)  # until it reads, because a signal in between would wait for the next key
    if key == b"\x03":  # as the terminal driver would for its foreground process
        terminal.process.send_signal(signal.SIGINT)
    else:
        os.write(terminal.screen, key)
    shown = terminal.read_until("\n")
    assert terminal.exit_code() == code
    assert "Traceback" not in shown


def test_without_answers_it_says_how_to_ask_for_digits(results):
    command = ["generate.py", {"output_dir": results}]
    process = start_script(*command, stdin=subprocess.DEVNULL)
    text = process.communicate()[0]
    assert process.returncode == 0
    assert "no more answers on stdin; --digits draws without asking" in text


def test_the_newest_model_is_the_one_with_the_most_steps(results, draw):
    for epoch in (5, 30):
        contents = checkpoint.load(results / "models" / "model_epoch_2.pth")
        contents["progress"] |= {"epoch": epoch, "step": 10 * epoch}
        torch.save(contents, results / "models" / f"model_epoch_{epoch}.pth")
    os.utime(results / "models" / "model_epoch_30.pth", (1, 1))
    found = list_checkpoints(results / "models")
    assert [progress.epoch for _, progress in found] == [1, 2, 5, 30]
    assert "model_epoch_30.pth" in draw(digits=1).err


PICTURES = {
    "7": {},
    "2026": {"count": 3, "seed": 12},
    "all": {"count": 2, "guidance": 2.5},
    "mnist": {"count": 5, "seed": 3},
    "31": {"sampler": "ddim", "eta": 0.7, "steps": 3, "seed": 2**31},
    "5": {"sampler": "ddpm", "steps": 5, "guidance_low": 0.3, "clip_x_0": False},
    "4": {"fast": True, "count": 5, "sample_batch_size": 2, "model": 1},
    "8": {"precision": "float32"},
    "6": {"precision": "bf16"},
}


@pytest.mark.parametrize("digits", PICTURES)
def test_a_picture_is_reproduced_byte_for_byte(draw, digits):
    made = Path(draw(digits=digits, **PICTURES[digits]).out.strip())
    again = draw(reproduce=made)
    assert again.code == 0, again
    assert again.out.strip() != str(made)
    assert Path(again.out.strip()).read_bytes() == made.read_bytes()
    assert "the same bytes" in again.err


def test_a_picture_carries_what_it_was_drawn_with_in_a_fixed_order(results, draw):
    made = Path(draw(digits="026", count=2, seed=9).out.strip())
    recorded = provenance.read(made)
    assert list(recorded) == list(Image.open(made).text)
    settings = ("sampler", "steps", "guidance", "guidance_low", "guidance_high", "eta")
    rest = ("precision", "seed", "clip_x_0", "match_levels", "sample_batch_size")
    start = ("model", "digits", "count", "version")
    assert list(recorded) == [*start, *settings, *rest, "made with", "threads"]
    model = results / "models" / "model_epoch_2.pth"
    assert recorded["model"] == files.sha256(model)
    assert [recorded[name] for name in start[1:]] == ["026", 2, "1.0"]
    assert [recorded[name] for name in settings] == ["dpmpp", 3, 1.5, 0.4, 0.9, 0.6]
    assert recorded["precision"] in ("float32", "bf16")  # not auto, which differs by computer
    assert [recorded[name] for name in rest[1:]] == [9, True, True, 128]
    assert f"torch {torch.__version__}" in recorded["made with"]


def test_a_picture_is_never_replaced_by_its_reproduction(draw, tmp_path):
    made = Path(draw(digits=7).out.strip())
    before = made.read_bytes()
    assert_one_line(draw(reproduce=made, output=made), "is the picture itself")
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe.png")
        result = draw(reproduce=made, output=tmp_path / "pipe.png")
        assert_one_line(result, "pipe.png", "a device or a pipe")
    assert made.read_bytes() == before


def test_a_reproduction_can_go_to_another_file(draw, tmp_path):
    made = Path(draw(digits=7).out.strip())
    assert draw(reproduce=made, output=tmp_path / "again.png").out == f"{tmp_path / 'again.png'}\n"
    assert (tmp_path / "again.png").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("output", ["a.gif", "a.npz", "many/"])
def test_a_reproduction_is_a_png(draw, tmp_path, output):
    made = Path(draw(digits=7, count=1).out.strip())
    before = set(tmp_path.rglob("*"))
    assert_one_line(draw(reproduce=made, output=f"{tmp_path}/{output}"), output.strip("/"))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"digits": 7},
        {"count": "3"},
        {"count": 3.0},
        {"count": 0},
        {"seed": -1},
        {"steps": "x"},
        {"model": 3},
    ],
    ids=str,
)
def test_an_edited_picture_is_refused_in_one_line(draw, tmp_path, change):
    made = Path(draw(digits=7, count=3).out.strip())
    known = provenance.read(made) | {"comment": "hello"} | change
    if not change:
        del known["seed"]
    edited = tmp_path / "edited.png"
    save_png(Image.open(made), edited, known)
    assert_one_line(draw(reproduce=edited), str(edited))


def test_a_device_that_does_not_exist_is_not_blamed_on_the_picture(draw):
    made = Path(draw(digits=7, count=1).out.strip())
    assert_one_line(draw(reproduce=made, device="gpu"), "device = 'gpu'", "auto")


def test_reproducing_without_the_model_names_it(results, draw):
    made = Path(draw(digits=7).out.strip())
    model = provenance.read(made)["model"]
    aside = results / "earlier" / "2026-01-01_000000"
    aside.mkdir(parents=True)
    for path in (results / "models").glob("*.pth"):
        path.rename(aside / path.name)
    assert draw(reproduce=made).code == 0  # a new run moves an earlier run's models there
    shutil.rmtree(aside)
    assert_one_line(draw(reproduce=made), str(made), model, "is not in")


def test_a_reproduction_that_differs_says_so_and_is_not_written(draw):
    made = Path(draw(digits=7).out.strip())
    made.write_bytes(made.read_bytes() + b"more")
    before = set(made.parent.iterdir())
    result = draw(reproduce=made)
    assert (result.code, result.out) == (2, "")
    assert set(made.parent.iterdir()) == before
    words = rf"bytes differ from those of {re.escape(str(made))}.*torch .*Pillow"
    assert re.search(words, result.err.splitlines()[-1])


def test_a_reproduction_that_differs_leaves_an_existing_file_alone(draw, tmp_path):
    made = Path(draw(digits=7).out.strip())
    other, output = tmp_path / "other.png", tmp_path / "again.png"
    with Image.open(made) as image:
        save_png(image, other, provenance.read(made) | {"seed": 5})
    output.write_text("precious")
    result = draw(reproduce=other, output=output)
    assert_one_line(result, f"{output}: not written: the bytes differ from those of {other}")
    assert result.out == ""
    assert output.read_text() == "precious"
    assert draw(reproduce=made, output=output).code == 0
    assert output.read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 10**19}, "not a PNG that generate.py wrote"),
        ({"count": 10**9}, "not a PNG that generate.py wrote"),
        ({"version": "9.9", "sampler": "new"}, "its record has version '9.9', not 1.0"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused_at_once(draw, tmp_path, change, words):
    made, edited = Path(draw(digits=7, count=1).out.strip()), tmp_path / "edited.png"
    with Image.open(made) as image:
        save_png(image, edited, provenance.read(made) | change)
    assert_one_line(draw(reproduce=edited), str(edited), words)


def test_a_wrong_flag_is_not_blamed_on_the_picture(draw, run):
    made = Path(draw(digits=7, count=1).out.strip())
    result = run("generate.py", reproduce=made, output_dir="a\nb")
    assert_one_line(result, "output_dir = 'a\\nb'", "control")


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_animation_runs_from_noise_to_the_digits(draw, pixels, tmp_path, ending):
    out = tmp_path / f"moving.{ending}"
    flags = {"digits": 26, "count": 4, "steps": 7, "seed": 1}
    assert draw(**flags, output=out).out == f"{out}\n"
    still = pixels(**flags)
    with Image.open(out) as moving:
        assert moving.n_frames == 7 + 1
        assert moving.size == still.shape[::-1] == (1 * 58 + 2, 4 * 30 + 2)
        assert moving.info["loop"] == 0
        seconds, frames = 0.0, []
        for frame in range(moving.n_frames):
            moving.seek(frame)
            frames.append(np.asarray(moving.convert("L")).astype(int))
            seconds += moving.info["duration"] / 1000
    assert 2 <= seconds <= 3
    assert abs(frames[-1] - still).max() <= 2  # a GIF's palette lacks some greys
    assert frames[0].std() > 50  # noise


def test_an_animation_of_several_batches_moves_all_images_at_once(draw, tmp_path):
    frames = []
    for batch in (2, 128):
        out = tmp_path / f"{batch}.webp"
        draw(digits=26, count=2, steps=3, sample_batch_size=batch, output=out)
        with Image.open(out) as moving:
            for frame in range(moving.n_frames):
                moving.seek(frame)
                frames.append(np.asarray(moving.convert("L")).astype(int))
    assert len(frames) == 2 * (3 + 1)
    for in_batches, at_once in zip(frames[:4], frames[4:], strict=True):
        assert abs(in_batches - at_once).max() <= 1


def test_a_folder_takes_one_png_an_image(draw, tmp_path):
    flags = {"digits": 72, "count": 2, "seed": 11}
    result = draw(**flags, output=f"{tmp_path}/many/")
    names = ["7_seed11.png", "2_seed12.png", "7_seed13.png", "2_seed14.png"]
    assert result.out.split() == [str(tmp_path / "many" / name) for name in names]
    one = tmp_path / "one.png"
    draw(digits=2, count=1, seed=12, output=one)
    assert one.read_bytes() == (tmp_path / "many" / names[1]).read_bytes()

    before = {path: path.read_bytes() for path in (tmp_path / "many").iterdir()}
    (tmp_path / "many" / names[0]).unlink()
    again = draw(**flags, output=tmp_path / "many")  # now a folder by itself
    assert_one_line(again, names[1], "exists already")
    assert len(list((tmp_path / "many").iterdir())) == len(before) - 1


def test_a_folder_that_cannot_be_written_is_one_line(draw, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", Path("/proc/self")):
        result = draw(digits=7, count=1, output=f"{folder}/")
        assert result.code == 2
        assert result.out == ""
        assert "generate.py: " in result.err.splitlines()[-1]
        assert str(folder) in result.err.splitlines()[-1]


@unix
@pytest.mark.parametrize("kind", ["a.png", "a.gif", "a.npz", "many/"])
def test_a_full_disk_is_one_line_and_leaves_nothing(draw, tmp_path, kind):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))  # no file may grow beyond 100 bytes
    try:
        result = draw(digits=7, count=4, output=f"{tmp_path}/out_{kind}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert_one_line(result, "File too large")
    assert result.out == ""
    assert [path for path in tmp_path.rglob("*out_*") if path.is_file()] == []


@unix
def test_digits_appear_in_the_terminal_and_nowhere_else(results, draw):
    terminal = Terminal(digits=7, count=2, output_dir=results)
    assert "▀" in terminal.read_until("generated_7_001.png")
    assert terminal.exit_code() == 0
    terminal = Terminal(digits=7, show=False, output_dir=results)
    assert "▀" not in terminal.read_until("generated_7_002.png")
    assert terminal.exit_code() == 0
    result = draw(digits=7)  # whose output goes to files
    assert result.out == f"{results / 'images' / 'generated_7_003.png'}\n"
    assert [line.split()[0] for line in result.err.splitlines()] == ["16"]


def test_the_shipped_model_stands_in_until_one_is_trained(results, draw):
    models = results / "models"
    shutil.copy(models / "model_epoch_2.pth", models / "pretrained.pth")
    flags = {"digits": 7, "count": 1, "steps": 1}
    assert "model_epoch_2.pth" in draw(**flags).err
    for name in ("pretrained", "pretrained.pth", "1", models / "pretrained.pth"):
        assert "pretrained.pth" in draw(**flags, model=name).err
    assert "model_epoch_2.pth" in draw(**flags, model="newest").err
    for model in models.glob("model_*.pth"):
        model.unlink()
    assert "pretrained.pth" in draw(**flags).err


def test_the_model_that_comes_along_draws_what_it_is_asked(run, tmp_path):
    shipped, drawn = REPO / "results" / "models" / "pretrained.pth", tmp_path / "a.npz"
    assert shipped.stat().st_size <= 8e6
    flags = {"digits": "all", "count": 10, "model": shipped, "device": "cpu", "output": drawn}
    assert run("generate.py", **flags).code == 0
    images, labels = read_npz(drawn)
    net, _, _ = classifier.load(torch.device("cpu"))
    assert classifier.accuracy(net, images, labels) >= 0.97


@pytest.mark.parametrize("name", ["pretrained", "student"])
def test_a_picture_from_before_levels_were_matched_has_the_same_bytes(run, tmp_path, name):
    made, again = tmp_path / "made.png", tmp_path / "again.png"
    flags = {"digits": 31, "count": 1, "model": name, "device": "cpu", "match_levels": False}
    assert run("generate.py", **flags, output=made).code == 0
    recorded = provenance.read(made)
    assert recorded.pop("match_levels") is False
    with Image.open(made) as image:
        save_png(image, made, recorded)
    drawn = run("generate.py", reproduce=made, output=again)
    assert drawn.code == 0, drawn
    assert made.read_bytes() == again.read_bytes()


def test_matched_levels_are_drawn_again_too(run, tmp_path):
    made, again = tmp_path / "made.png", tmp_path / "again.png"
    pictures = {}
    for matched in (True, False):
        flags = {"digits": 31, "count": 1, "model": "student", "match_levels": matched}
        assert run("generate.py", **flags, device="cpu", output=made).code == 0
        pictures[matched] = np.asarray(Image.open(made)).astype(int)
        assert run("generate.py", reproduce=made, output=again).code == 0
    change = np.abs(pictures[True] - pictures[False])
    assert 0 < change.mean() < 3  # grey levels: nothing that an eye would see
