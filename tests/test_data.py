import gzip
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, assert_one_line

from config import Config
from data import image_grid, load_split, to_model_range, to_uint8

CPU = torch.device("cpu")


@pytest.fixture
def offline(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens: refused at once


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the packed data set: (data_dir)/MNIST/raw/*.gz."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in Path(MNIST, "MNIST", "raw").glob("*.gz"):
        shutil.copy(path, raw)
    return raw


def test_the_real_data_set_unpacks_without_a_network(copied, offline):
    images, labels = load_split(Config(data_dir=str(copied.parents[1])), True, CPU)
    assert images.shape == (60_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert labels.bincount()[[1, 5]].tolist() == [6742, 5421]
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert len(load_split(Config(data_dir=str(copied.parents[1])), False, CPU)[0]) == 10_000


def test_other_sizes_and_fewer_images():
    images, labels = load_split(Config(data_dir=MNIST, img_size=32, max_images=50), True, CPU)
    assert images.shape == (50, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert len(labels) == 50
    assert images.float().mean().item() == pytest.approx(35, abs=5)


def test_more_channels_than_mnist_has():
    with pytest.raises(ValueError, match="img_channels = 3"):
        load_split(Config(data_dir=MNIST, img_channels=3), True, CPU)


@pytest.mark.parametrize("damage", ["cut", "other", "unpacked", "file", "empty"])
def test_bad_data_is_one_line_with_the_folder_and_the_remedy(copied, offline, run, damage):
    data_dir = copied.parents[1]
    packed = copied / "train-images-idx3-ubyte.gz"
    if damage == "cut":
        os.truncate(packed, 1000)
    elif damage == "other":
        packed.write_bytes(gzip.compress(b"something else"))
    elif damage == "unpacked":
        load_split(Config(data_dir=str(data_dir)), True, CPU)
        os.truncate(copied / "train-images-idx3-ubyte", 1000)
    elif damage == "file":
        data_dir = packed
    else:
        shutil.rmtree(copied)
    out = data_dir.parent / "out" if damage != "file" else copied / "out"
    result = run("train.py", "--data_dir", data_dir, "--output_dir", out)
    remedy = "another --data_dir" if damage == "file" else "delete that folder"
    assert_one_line(result, str(data_dir), remedy)


def test_a_torchvision_that_does_not_fit_is_one_line(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    result = run("train.py", "--data_dir", MNIST, "--output_dir", tmp_path)
    assert_one_line(result, "torchvision", "pip install")


def test_pixels_survive_the_way_to_the_models_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)


def test_what_lies_outside_the_range_is_clamped_and_the_rest_rounded():
    x = torch.tensor([-7.0, -1.001, 1.001, 7.0, (99.6 / 127.5) - 1, (99.4 / 127.5) - 1])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 100, 99]


def test_the_grid_holds_each_image_in_its_place():
    images = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 6) * 40
    grid = np.asarray(image_grid(images, columns=3, gap=2))
    assert grid.shape == (2 * 4 + 3 * 2, 3 * 6 + 4 * 2)
    for i in range(5):
        top, left = 2 + i // 3 * 6, 2 + i % 3 * 8
        assert (grid[top : top + 4, left : left + 6] == (i + 1) * 40).all()
    assert image_grid(images.expand(5, 3, 4, 6), columns=5).mode == "RGB"
