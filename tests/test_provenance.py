"""What a PNG tells of how it was drawn, and what it asks for when it is drawn again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from config import Config
from interface.picture import save_png
from interface.provenance import made_with, read, request_from_picture

CFG = Config(widths=(8, 8), embedding_size=8)


def test_a_png_tells_what_it_was_told_and_other_programs_text_is_skipped(tmp_path):
    known = {"seed": 2**62, "digits": "007", "guidance": 1.5, "clip_x_0": True}
    known |= {"model": "é"}
    save_png(Image.new("L", (4, 4)), tmp_path / "a.png", known)
    assert list(read(tmp_path / "a.png").items()) == list(known.items())
    info = PngInfo()
    info.add_text("Comment", "made by hand")
    info.add_text("model", '"abc"')
    info.add_text("seed", "3")
    Image.new("L", (4, 4)).save(tmp_path / "b.png", pnginfo=info)
    assert read(tmp_path / "b.png") == {"model": "abc", "seed": 3}


@pytest.mark.parametrize("name", ["none.png", "text.png", "cut.png", "plain.png", "a.gif"])
def test_what_is_not_a_png_is_named(tmp_path, name):
    (tmp_path / "text.png").write_text("hello")
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")  # names no model
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


def test_a_picture_says_what_its_bytes_depend_on():
    words = made_with(torch.device("cpu"))
    assert f"torch {torch.__version__}" in words
    assert "Pillow" in words
    assert words.endswith("on cpu")


def recorded(cfg: Config) -> dict[str, object]:
    return {"digits": "31", "count": 2} | cfg.select("sampling", "picture")


def test_a_picture_asks_for_itself_with_this_computers_settings(tmp_path):
    drawn = replace(CFG, sampler="ddim", steps=5, guidance=1.5, seed=7, sample_batch_size=3)
    here = {"output_dir": str(tmp_path), "device": "cpu"}
    request = request_from_picture(recorded(drawn), tmp_path / "a.png", CFG, here)
    assert (request.digits, request.count) == ("31", 2)
    assert request.cfg == replace(drawn, **here)


def test_a_picture_from_before_the_precision_was_recorded_is_drawn_in_float32():
    known = recorded(CFG)
    del known["precision"]
    assert request_from_picture(known, Path("a.png"), CFG, {}).cfg.precision == "float32"


@pytest.mark.parametrize("digits", [7, {"7": 1}, [","], ["7"], None])
def test_digits_that_are_no_text_are_no_request(digits):
    with pytest.raises(ValueError, match=r"a\.png: not a PNG that generate\.py wrote"):
        request_from_picture(recorded(CFG) | {"digits": digits}, Path("a.png"), CFG, {})


@pytest.mark.parametrize("name", ["digits", "count", "seed", "clip_x_0", "sampler"])
def test_a_picture_that_lacks_a_setting_asks_for_nothing(name):
    known = recorded(CFG)
    del known[name]
    with pytest.raises(ValueError, match=r"a\.png: not a PNG that generate\.py wrote"):
        request_from_picture(known, Path("a.png"), CFG, {})


def test_exact_labels_are_drawn_again_and_random_ones_refused():
    known = {"digits": "mnist", "count": 2} | Config().select("sampling", "picture")
    with pytest.raises(ValueError, match="drew its labels at random"):
        request_from_picture(known, Path("a.png"), Config(), {})
    exact = known | {"labels": "exact"}
    assert request_from_picture(exact, Path("a.png"), Config(), {}).digits == "mnist"
