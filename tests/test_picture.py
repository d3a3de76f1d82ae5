"""Picture files: how digits lie on a grid, and what a PNG tells."""

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from picture import arrange, read_png, save_animation, save_png


def images(count: int) -> torch.Tensor:
    """Pictures (count, 1, 4, 4) that are their number all over."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 4, 4)


def test_a_variant_of_a_number_is_one_picture():
    tiles, columns = arrange(images(6), "707", 2)
    assert tiles.shape == (2, 1, 4, 12)
    assert tiles[1, 0, 0].tolist() == [3] * 4 + [4] * 4 + [5] * 4
    assert columns == 1
    assert arrange(images(16), "7", 16)[1] == 4


def test_all_has_a_row_for_each_digit():
    tiles, columns = arrange(images(20), "all", 2)
    assert columns == 2
    assert tiles[:, 0, 0, 0].tolist() == [i + 10 * j for i in range(10) for j in range(2)]


def test_a_png_tells_what_it_was_told_and_skips_other_programs_text(tmp_path):
    known = {"seed": 2**62, "digits": "007", "guidance": 1.5, "clip_x_0": True}
    save_png(Image.new("L", (4, 4)), tmp_path / "a.png", known)
    assert read_png(tmp_path / "a.png") == known
    info = PngInfo()
    info.add_text("Comment", "made by hand")
    info.add_text("seed", "3")
    Image.new("L", (4, 4)).save(tmp_path / "b.png", pnginfo=info)
    assert read_png(tmp_path / "b.png") == {"seed": 3}


@pytest.mark.parametrize("name", ["none.png", "text.png", "cut.png", "a.gif"])
def test_what_is_no_png(tmp_path, name):
    (tmp_path / "text.png").write_text("hello")
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        read_png(tmp_path / name)


def test_an_animation_takes_two_to_three_seconds(tmp_path):
    for count in (2, 6, 51):
        save_animation([Image.new("L", (8, 8), 5 * i) for i in range(count)], tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as moving:
            assert moving.n_frames == count
            seconds = 0.0
            for frame in range(count):
                moving.seek(frame)
                seconds += moving.info["duration"] / 1000
        assert 1.7 <= seconds <= 3
