import gzip
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import MNIST, assert_one_line

from config import Config
from data import LABEL_COUNTS, draw_labels, load_split, to_model_range, to_uint8

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
    assert labels.bincount().tolist() == list(LABEL_COUNTS)
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert len(load_split(Config(data_dir=str(copied.parents[1])), False, CPU)[0]) == 10_000


def test_images_are_resized_and_only_the_first_are_taken_if_asked():
    images, labels = load_split(Config(data_dir=MNIST, img_size=32, max_images=50), True, CPU)
    assert images.shape == (50, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert len(labels) == 50
    assert images.float().mean().item() == pytest.approx(35, abs=5)


@pytest.mark.parametrize(("name", "value"), [("img_channels", 3), ("num_classes", 9)])
def test_mnist_has_one_channel_and_ten_digits(name, value):
    cfg = Config(data_dir=MNIST, preview_digits="0", **{name: value})
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        load_split(cfg, True, CPU)


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
    result = run("train.py", data_dir=data_dir, output_dir=out)
    remedy = "another --data_dir" if damage == "file" else "delete that folder"
    assert_one_line(result, str(data_dir), remedy)


def test_a_torchvision_that_does_not_fit_is_one_line(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    result = run("train.py", data_dir=MNIST, output_dir=tmp_path)
    assert_one_line(result, "torchvision", "pip install")


def test_pixels_survive_the_conversion_to_the_models_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)


def test_values_outside_the_range_are_clamped_and_the_rest_rounded():
    x = torch.tensor([-7.0, -1.001, 1.001, 7.0, (99.6 / 127.5) - 1, (99.4 / 127.5) - 1])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 100, 99]


def test_random_labels_are_as_frequent_as_in_mnist_and_depend_on_the_seed():
    labels = draw_labels(60_000, seed=0)
    assert labels.dtype == torch.int64
    expected = torch.tensor(LABEL_COUNTS)
    off = (labels.bincount() - expected).abs() / expected.sqrt()
    assert off.max() < 4  # standard deviations
    assert torch.equal(draw_labels(60_000, seed=0), labels)
    assert not torch.equal(draw_labels(60_000, seed=1), labels)
