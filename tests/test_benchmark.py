"""benchmark.py by its command line, on a tiny network."""

import json

import pytest
from conftest import MNIST, TINY_MODEL, assert_one_line

import benchmark

FLAGS = (*TINY_MODEL, "--data_dir", MNIST, "--device", "cpu", "--batch_size", 16)


def test_the_figures_are_printed_written_and_agree(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.2)
    file = tmp_path / "speed.json"
    result = run("benchmark.py", *FLAGS, "--sample_batch_size", 4, "--json", file)
    assert result.code == 0, result
    figures = json.loads(file.read_text())
    train, draw = figures["training"], figures["sampling"]
    for text in (f"{train['images_per_second']:.0f} images/s", "peak memory", f"wrote {file}"):
        assert text in result.out
    assert list(train["milliseconds"]) == ["data", "forward", "backward", "optimizer", "average"]
    assert min(train["milliseconds"].values()) > 0
    alone = train["convolutions_alone_tera_flops"]
    assert train["share_of_convolution_peak"] == pytest.approx(train["tera_flops"] / alone)
    speed = draw["images_per_second_at_calls"]
    assert list(speed) == ["1", "4", "8", "20", "50"]
    assert speed["1"] > 5 * speed["50"]
    assert 0 < draw["one_image_seconds"] < 5
    assert 1e8 < train["peak_memory_bytes"] < 2e10


def test_the_operations_are_those_of_the_convolutions():
    import torch

    from config import Config
    from model import UNet

    cfg = Config(widths=(8, 16), embedding_size=8, batch_size=2)
    bare = benchmark.convolutions(UNet(cfg), cfg, torch.device("cpu"), torch.float32)
    pixels = {14: 14 * 14, 7: 7 * 7}
    forward = 2 * 2 * (
        pixels[14] * (4 * 8 * 9)  # stem
        + pixels[14] * 2 * (2 * 8 * 8 * 9)  # a block down, one up
        + pixels[7] * (4 * 8 * 16 + 16 * 4 * 8)  # shrink, grow
        + pixels[7] * 3 * (2 * 16 * 16 * 9)  # a block down, the middle, one up
        + pixels[14] * (8 * 4 * 9)  # head
    )  # fmt: skip
    stem = 2 * 2 * pixels[14] * (4 * 8 * 9)
    assert sum(operations for operations, _ in bare) == 3 * forward - stem  # no gradient of x_t
    for _, both_ways in bare:
        both_ways()


def test_bad_input_is_one_line(run, tmp_path):
    assert_one_line(run("benchmark.py", "--json", tmp_path / "no" / "a.json"), "make it first")
    assert_one_line(run("benchmark.py", "--batch_size", 0), "batch_size = 0", "at least 1")
    assert_one_line(run("benchmark.py", *FLAGS, "--batch_size", 70_000), "60000 images")
