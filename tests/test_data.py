import gzip
import math
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import MNIST, assert_one_line

import other_data
from config import Config
from data import fingerprint, load_split, to_model_range, to_uint8
from interface.requests import MNIST_COUNTS

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


def test_the_real_data_set_is_read_without_a_network(copied, offline):
    images, labels = load_split(Config(data_dir=str(copied.parents[1])), True, CPU)
    assert images.shape == (60_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert labels.bincount().tolist() == list(MNIST_COUNTS)
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert len(load_split(Config(data_dir=str(copied.parents[1])), False, CPU)[0]) == 10_000
    assert sorted(path.suffix for path in copied.iterdir()) == [".gz"] * 4


def test_images_are_resized_and_only_the_first_are_taken_if_asked():
    images, labels = load_split(Config(data_dir=MNIST, img_size=32, max_images=50), True, CPU)
    assert images.shape == (50, 1, 32, 32)
    assert images.dtype == torch.uint8
    assert len(labels) == 50
    assert images.float().mean().item() == pytest.approx(35, abs=5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("img_channels", 3, "img_channels = 3: MNIST has 1"), ("num_classes", 9, "the model knows")],
)
def test_mnist_has_one_channel_and_ten_digits(name, value, message):
    cfg = Config(data_dir=MNIST, preview_digits="0", **{name: value})
    with pytest.raises(ValueError, match=message):
        load_split(cfg, True, CPU)


def idx(*shape: int, fill: int = 1) -> bytes:
    """A file in MNIST's format."""
    return struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape) + bytes(
        [fill] * math.prod(shape)
    )


BAD_DATA = {  # what is done to the packed training images, and what the message says
    "cut": (lambda packed: packed[:1000], "delete it"),
    "flipped": (lambda packed: packed[:9000] + b"?" + packed[9001:], "delete it"),
    "text": (lambda packed: gzip.compress(b"something else"), "delete it"),
    "labels": (lambda packed: gzip.compress(idx(60_000)), "no array of 3 dimensions"),
    "few": (lambda packed: gzip.compress(idx(100, 28, 28)), "100 train images but 60000 labels"),
    "none": (lambda packed: gzip.compress(idx(0, 28, 28)), "its shape is [0, 28, 28]"),
    "short": (lambda packed: gzip.compress(idx(60_000, 28, 28)[:-1]), "it should hold 47040000"),
    "long": (lambda packed: gzip.compress(idx(60_000, 28, 28) + b"1"), "it should hold 47040000"),
    "huge": (lambda packed: gzip.compress(struct.pack(">4I", 0x803, *[2**31] * 3)), "shape"),
}


@pytest.mark.parametrize("damage", BAD_DATA)
def test_damaged_data_is_one_line_with_the_file_and_the_remedy(copied, offline, run, damage):
    packed = copied / "train-images-idx3-ubyte.gz"
    change, words = BAD_DATA[damage]
    packed.write_bytes(change(packed.read_bytes()))
    out = copied.parents[2] / "out"
    result = run("train.py", epochs=1, data_dir=copied.parents[1], output_dir=out)
    assert_one_line(result, str(copied), words)
    assert not (out / "models").exists()


def test_an_unpacked_file_comes_before_its_packed_one_and_is_never_written(copied):
    unpacked = copied / "t10k-images-idx3-ubyte"
    unpacked.write_bytes(idx(10_000, 28, 28, fill=7))
    cfg = Config(data_dir=str(copied.parents[1]))
    assert load_split(cfg, train=False, device=CPU)[0].unique().tolist() == [7]
    assert unpacked.read_bytes() == idx(10_000, 28, 28, fill=7)
    os.truncate(unpacked, 1000)
    with pytest.raises(ValueError, match=r"ubyte: cannot be read .*; delete it"):
        load_split(cfg, train=False, device=CPU)
    unpacked.unlink()  # as the message says
    assert load_split(cfg, train=False, device=CPU)[0].float().mean() > 30


def test_a_label_that_is_no_digit_is_refused(copied):
    labels = bytearray(idx(10_000))
    labels[5000] = 10  # would be trained as "no label"
    (copied / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match="labels up to 10, but the model knows digits 0 to 9"):
        load_split(Config(data_dir=str(copied.parents[1])), train=False, device=CPU)


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_data_that_is_missing_and_cannot_be_downloaded_leaves_nothing(tmp_path, offline, run, kind):
    data_dir = tmp_path / "data"
    if kind == "file":
        data_dir.write_text("no folder")
    result = run("train.py", epochs=1, data_dir=data_dir, output_dir=tmp_path / "out")
    words = "another --data_dir" if kind == "file" else "git checkout mnist_data"
    assert_one_line(result, str(data_dir), words)
    assert list(data_dir.rglob("*")) == []


def test_images_of_another_size_are_resized_with_a_word(capsys):
    load_split(Config(data_dir=MNIST, img_size=32, max_images=50), True, CPU)
    assert "resizing images of 28 x 28 pixels to 32" in capsys.readouterr().out
    load_split(Config(data_dir=MNIST, max_images=50), True, CPU)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"img_size = 256: .* 60,000 training images; choose at"):
        load_split(Config(data_dir=MNIST, img_size=256), True, CPU)


def test_the_remedy_for_too_many_pixels_is_one(monkeypatch, capsys):
    monkeypatch.setattr(other_data, "MAX_BYTES", 1_000_000)
    for train, count in ((False, 10_000), (True, 60_000)):
        with pytest.raises(ValueError, match=f"img_size = 32: .* {count:,} t") as refused:
            load_split(Config(data_dir=MNIST, img_size=32), train, CPU)
        assert ("--max_images" in str(refused.value)) == train  # which leaves test images alone
        smaller = int(str(refused.value).partition("choose at most ")[2].split(",")[0])
        assert count * smaller**2 <= 1_000_000 < count * (smaller + 1) ** 2
    few = int(str(refused.value).partition("--max_images ")[2])
    assert len(load_split(Config(data_dir=MNIST, img_size=32, max_images=few), True, CPU)[0]) == few


def test_what_is_trained_on_is_told_apart():
    images, labels = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([1, 2, 3])
    found = fingerprint(images, labels)
    assert (found["images"], found["shape"]) == (3, [1, 4, 4])
    assert found == fingerprint(images.clone(), labels.clone())
    assert found != fingerprint(images, labels.flip(0))
    assert found != fingerprint(images + 1, labels)


def test_a_torchvision_that_does_not_fit_is_one_line(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2.functional", None)
    flags = {"max_images": 500, "img_size": 32, "epochs": 1, "output_dir": tmp_path}
    result = run("train.py", data_dir=MNIST, **flags)
    assert_one_line(result, "torchvision", "pip install")


def test_pixels_survive_the_conversion_to_the_models_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)


def test_values_outside_the_range_are_clamped_and_the_rest_rounded():
    x = torch.tensor([-7.0, -1.001, 1.001, 7.0, (99.6 / 127.5) - 1, (99.4 / 127.5) - 1])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 100, 99]


def test_nan_never_passes_for_black():
    with pytest.raises(ValueError, match="not a number"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    assert to_uint8(torch.tensor([float("-inf"), float("inf")])).tolist() == [0, 255]
