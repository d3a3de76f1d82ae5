"""Completing and editing pictures: by the command line, and against what must come out exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, assert_one_line
from PIL import Image

from config import Config
from data import load_split, to_model_range, to_uint8
from interface import original
from interface.picture import image_grid, without_frame
from interface.provenance import read
from pipeline import FROM_NOISE, Start
from system.randomness import seeded_generator

MODEL = {"model": REPO / "results" / "models" / "pretrained.pth", "device": "cpu", "count": 4}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """A real 7 of the test split."""
    images, labels = load_split(Config(data_dir=str(REPO / "mnist_data")), False, CPU)
    path = tmp_path_factory.mktemp("original") / "seven.png"
    Image.fromarray(images[labels == 7][0, 0].numpy()).save(path)
    return path


def tiles(path: Path) -> np.ndarray:
    """The images of a grid of 2 x 2, uint8 (4, 28, 28)."""
    grid = np.asarray(Image.open(path))
    return np.stack([grid[r : r + 28, c : c + 28] for r in (2, 32) for c in (2, 32)])


@pytest.mark.parametrize(
    ("half", "kept"),
    [
        ("top", np.s_[:14]),
        ("bottom", np.s_[14:]),
        ("left", np.s_[:, :14]),
        ("right", np.s_[:, 14:]),
    ],
)
def test_the_kept_half_is_exactly_that_of_the_picture(run, tmp_path, seven, half, kept):
    out = tmp_path / "completed.png"
    assert run("generate.py", **MODEL, digits=7, complete=seven, keep=half, output=out).code == 0
    original, drawn = np.asarray(Image.open(seven)), tiles(out)
    rest = np.ones((28, 28), bool)
    rest[kept] = False
    for image in drawn:
        assert np.array_equal(image[kept], original[kept])
        assert not np.array_equal(image[rest], original[rest])
    assert len({image.tobytes() for image in drawn}) == 4  # every completion is another


def test_a_mask_says_what_is_kept(run, tmp_path, seven):
    mask = np.zeros((28, 28), np.uint8)
    mask[::2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = MODEL | {"digits": 7, "complete": seven, "mask": tmp_path / "mask.png"}
    assert run("generate.py", **flags, output=tmp_path / "out.png").code == 0
    original = np.asarray(Image.open(seven))
    for image in tiles(tmp_path / "out.png"):
        assert np.array_equal(image[::2], original[::2])
        # every second row is enough to tell the others
        assert np.abs(image.astype(int) - original)[original > 200].mean() < 60


def test_an_edited_picture_is_nearer_to_the_original_the_weaker_the_noise(run, tmp_path, seven):
    original, distance = np.asarray(Image.open(seven)).astype(int), {}
    for strength in (0.05, 0.4, 1.0):
        out = tmp_path / f"{strength}.png"
        flags = MODEL | {"digits": 7, "edit": seven, "strength": strength}
        assert run("generate.py", **flags, output=out).code == 0
        distance[strength] = np.abs(tiles(out) - original).mean()
    assert distance[0.05] < distance[0.4] < distance[1.0]
    assert distance[0.05] < 3


@pytest.mark.parametrize("kind", [{"complete": None, "keep": "left"}, {"edit": None}])
def test_it_can_be_drawn_again_without_the_original_file(run, tmp_path, seven, kind):
    copy = tmp_path / "copy.png"
    copy.write_bytes(seven.read_bytes())
    flags = {name: value or copy for name, value in kind.items()}
    first = tmp_path / "first.png"
    assert run("generate.py", **MODEL, digits=7, **flags, output=first).code == 0
    copy.unlink()
    again = run("generate.py", reproduce=first, output=tmp_path / "again.png")
    assert again.code == 0, again
    assert first.read_bytes() == (tmp_path / "again.png").read_bytes()


def test_a_record_holds_the_original():
    known = torch.rand(28, 28, generator=seeded_generator(1)) > 0.5
    pixels = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=seeded_generator(2))
    start = Start(to_model_range(pixels), known, 0.3)
    again = original.from_record(original.record(start), Config())
    assert torch.equal(again.x_0, start.x_0)
    assert torch.equal(again.known, known)
    assert again.strength == 0.3
    assert original.from_record({}, Config()) == FROM_NOISE
    assert again.x_0.abs().max() <= 1


def test_a_picture_that_generate_drew_is_taken_without_its_frame(run, tmp_path, seven):
    framed, grid = tmp_path / "framed.png", tmp_path / "grid.png"
    one = MODEL | {"count": 1}
    assert run("generate.py", **one, digits=7, complete=seven, output=framed).code == 0
    for begin in ({"complete": framed}, {"edit": framed}):
        out = tmp_path / "again.png"
        assert run("generate.py", **one, digits=7, **begin, output=out).code == 0
        start = original.from_record(read(out), Config())
        assert np.array_equal(to_uint8(start.x_0)[0], np.asarray(Image.open(framed))[2:30, 2:30])
    assert run("generate.py", **MODEL, digits=7, output=grid).code == 0
    assert run("generate.py", **one, digits=26, output=tmp_path / "grid.png").code == 0
    for begin in ({"complete": grid}, {"complete": framed, "mask": grid}, {"edit": grid}):
        result = run("generate.py", **one, digits=7, **begin)
        assert_one_line(result, "grid.png: holds several images", "--count 1")


def test_bad_originals_are_one_line(run, tmp_path, seven):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    for flags, *words in (
        ({"complete": tmp_path / "none.png"}, "none.png", "no such picture"),
        ({"complete": tmp_path / "text.png"}, "text.png", "cannot be read as a picture"),
        ({"complete": seven, "mask": tmp_path / "black.png"}, "black.png", "white pixels"),
        ({"edit": seven, "strength": 0}, "strength = 0.0"),
        ({"edit": seven, "strength": "nan"}, "strength = nan"),
        (
            {"edit": seven, "strength": 0.3, "guidance": 5},
            "no sampling time up to strength 0.3 (steps = 13)",
        ),
        ({"edit": seven, "digits": 26}, "digits = '26'", "name the one label"),
        ({"edit": seven, "model": "student"}, "not a student"),
        ({"keep": "left"}, "--keep needs --complete"),
        ({"mask": seven}, "--mask needs --complete"),
        ({"strength": 0.5}, "--strength needs --edit"),
        ({"edit": seven, "complete": seven}, "not allowed with"),
    ):
        asked = MODEL | {"digits": 7, "output": tmp_path / "out.png"} | flags
        assert_one_line(run("generate.py", **asked), *words)
    assert_one_line(run("generate.py", complete=seven), "--complete needs --digits")
    assert not (tmp_path / "out.png").exists()


def test_only_a_frame_as_wide_as_that_of_a_grid_is_left_out():
    image = Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28))
    grid = image_grid(torch.from_numpy(np.array(image))[None, None], columns=1)
    assert np.array_equal(np.asarray(without_frame(grid)), np.asarray(image))
    assert without_frame(grid.resize((128, 128), Image.Resampling.NEAREST)) is None  # enlarged
    assert without_frame(image) is None
    assert without_frame(image_grid(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), 2)) is None
