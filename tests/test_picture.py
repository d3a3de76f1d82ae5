"""Picture files: how digits lie on a grid, animations and sets of images."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from interface.picture import (
    arrange,
    image_grid,
    most_images,
    name_rows,
    read_npz,
    save_animation,
    save_png,
    write_npz,
)


def images(count: int) -> torch.Tensor:
    """Pictures (count, 1, 4, 4) that are their number all over."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 4, 4)


def test_the_grid_holds_each_image_in_its_place():
    tiles = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 6) * 40
    grid = np.array(image_grid(tiles, columns=3, gap=2))
    assert grid.shape == (2 * 4 + 3 * 2, 3 * 6 + 4 * 2)
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        assert (grid[top : top + 4, left : left + 6] == (i + 1) * 40).all()
        grid[top : top + 4, left : left + 6] = 64
    assert (grid == 64).all()  # the gaps and the empty sixth place


def test_a_grid_of_colour_images_is_in_colour():
    red = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    red[:, 0] = 200
    grid = image_grid(red, columns=2)
    assert grid.mode == "RGB"
    assert grid.getpixel((3, 3)) == (200, 0, 0)


def test_names_stand_beside_their_rows():
    grid = image_grid(images(4), columns=2)
    named = name_rows(grid, ["cat", "七"])
    margin = named.width - grid.width
    assert named.crop((margin, 0, *named.size)).tobytes() == grid.tobytes()
    rows = np.array(named)[:, :margin]
    assert (rows[:8] > 64).any()  # letters
    assert (rows[8:] == 64).all()  # none that the font lacks


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


def test_a_set_as_in_mnist_keeps_its_order_on_a_square_grid():
    tiles, columns = arrange(images(10), "mnist", 10)
    assert torch.equal(tiles, images(10))
    assert columns == 3


def test_a_png_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing.*a\.png: cannot be written"):
        save_png(Image.new("L", (4, 4)), tmp_path / "missing" / "a.png", {})


@pytest.mark.parametrize("ending", ["gif", "webp"])
@pytest.mark.parametrize("count", [2, 6, 51])
def test_an_animation_loops_for_two_to_three_seconds_and_rests_on_its_last_frame(
    tmp_path, ending, count
):
    path = tmp_path / f"a.{ending}"
    save_animation([Image.new("L", (8, 8), 5 * i) for i in range(count)], path)
    with Image.open(path) as moving:
        assert moving.n_frames == count
        assert moving.info["loop"] == 0
        seconds, greys = [], []
        for frame in range(count):
            moving.seek(frame)
            moving.load()
            seconds.append(moving.info["duration"] / 1000)
            greys.append(moving.convert("L").getpixel((4, 4)))
    assert 1.7 <= sum(seconds) <= 3
    assert seconds[-1] == 1
    assert greys == [5 * i for i in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_of_images_is_in_the_layout_of_openais_repositories(tmp_path, channels):
    pixels = torch.randint(0, 256, (5, channels, 28, 28), dtype=torch.uint8)
    write_npz(tmp_path / "set.npz", pixels, torch.arange(5))
    with np.load(tmp_path / "set.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        last = pixels[:, 0] if channels == 1 else pixels.permute(0, 2, 3, 1)
        assert (file["arr_0"] == last.numpy()).all()
        assert (file["arr_0"].dtype, file["arr_1"].dtype) == (np.uint8, np.int64)


def test_a_set_of_images_comes_back(tmp_path):
    pixels = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    write_npz(tmp_path / "set.npz", pixels, torch.arange(5))
    images, labels = read_npz(tmp_path / "set.npz")
    assert torch.equal(images, pixels)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "plain.npz", pixels.permute(0, 2, 3, 1).numpy())
    images, labels = read_npz(tmp_path / "plain.npz")
    assert torch.equal(images, pixels)
    assert labels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((2, 28, 28), np.uint8)}, "no arr_0"),
        ({"arr_0": np.zeros((2, 28, 28))}, "float64; make it uint8"),
        ({"arr_0": np.zeros((2, 32, 32), np.uint8)}, "(2, 32, 32)"),
        ({"arr_0": np.zeros((2, 28, 28, 3), np.uint8)}, "(2, 28, 28, 3)"),
        ({"arr_0": np.zeros((0, 28, 28), np.uint8)}, "(0, 28, 28)"),
        ({"arr_1": np.zeros(3, int)}, "each of the 2 images"),
        ({"arr_1": np.zeros(2)}, "arr_1 is float64"),
        ({"arr_1": np.array([1, 10])}, "allowed are 0 to 9"),
        ({"arr_1": np.array([-1, 9])}, "allowed are 0 to 9"),
    ],
)
def test_a_set_of_images_that_does_not_fit_is_named(tmp_path, arrays, words):
    path = tmp_path / "bad.npz"
    pixels = {} if "pictures" in arrays else {"arr_0": np.zeros((2, 28, 28), np.uint8)}
    np.savez(path, **(pixels | arrays))
    with pytest.raises(ValueError, match=r"bad\.npz") as error:
        read_npz(path)
    assert words in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "flipped", "one array"])
def test_what_is_not_a_set_of_images_is_named(tmp_path, kind):
    path = tmp_path / "bad.npz"
    noise = np.random.default_rng(0).integers(0, 9, (20, 28, 28), np.uint8)
    np.savez_compressed(path, noise)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(whole[:2000])
    elif kind == "flipped":
        path.write_bytes(whole[:3000] + b"\xff" * 50 + whole[3050:])
    else:
        with open(path, "wb") as file:
            np.save(file, noise)
    reason = "no such file" if kind == "missing" else "not a valid"
    with pytest.raises(ValueError, match=rf"bad\.npz: {reason}"):
        read_npz(path)


@pytest.mark.parametrize("name", ["arr_0", "arr_1"])
def test_a_member_that_is_no_array_is_named(tmp_path, name):
    path = tmp_path / "raw.npz"
    np.savez(path, np.zeros((2, 28, 28), np.uint8))
    with zipfile.ZipFile(path, "w" if name == "arr_0" else "a") as archive:
        archive.writestr(name, b"hello")
    with pytest.raises(ValueError, match=rf"raw\.npz: not a valid \.npz: {name} is not an array"):
        read_npz(path)


def test_animations_hold_what_a_webp_can():
    assert most_images(256, ".webp") == most_images(256, ".gif") == 16_000 // 258


def test_names_beside_rows_make_room_for_the_longest_up_to_a_limit():
    grid = image_grid(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), 1)
    names = ("d", "dog", "dog with hat", "d" * 30, "d" * 31)
    widths = [name_rows(grid, [name]).width for name in names]
    assert widths[0] < widths[1] < widths[2] < widths[3] == widths[4]
