"""benchmark.py by its command line, and what it measures, on a tiny network."""

import json
import time

import pytest
import torch
from conftest import MNIST, TINY_MODEL, assert_one_line, assert_same

import benchmark
import checkpoint
import diffusion
import model
import optimizer
import train
from config import Config
from data import load_split
from model import UNet

CPU = torch.device("cpu")
FLAGS = TINY_MODEL | {"data_dir": MNIST, "device": "cpu", "batch_size": 16}
CFG = Config(
    widths=(8, 8),
    embedding_size=8,
    data_dir=MNIST,
    batch_size=16,
    max_images=40,
    precision="float32",
)


def test_the_measurements_are_printed_written_and_agree(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.2)
    file = tmp_path / "speed.json"
    result = run("benchmark.py", **FLAGS, sample_batch_size=4, json=file)
    assert result.code == 0, result
    measured = json.loads(file.read_text())
    training, sampling = measured["training"], measured["sampling"]
    for text in (f"{training['images_per_second']:.0f} images/s", "peak memory", f"wrote {file}"):
        assert text in result.out
    parts = training["milliseconds"]
    assert list(parts) == ["data", "forward", "backward", "optimizer", "average"]
    assert min(parts.values()) > 0
    step = 1000 * measured["batch_size"] / training["images_per_second"]
    assert sum(parts.values()) == pytest.approx(step, rel=0.5)  # medians, of a busy machine
    alone = training["convolutions_alone_tera_flops"]
    assert training["share_of_convolution_peak"] == pytest.approx(training["tera_flops"] / alone)
    speed = sampling["images_per_second_at_calls"]
    assert list(speed) == ["1", "4", "8", "20", "50"]
    assert speed["1"] > 5 * speed["50"]
    assert 0 < sampling["one_image_seconds"] < 5
    assert 1e8 < training["peak_memory_bytes"] < 2e10


def test_only_calls_that_there_can_be_are_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    compiled = []
    monkeypatch.setattr(benchmark, "compile_network", lambda network, **_: compiled.append(network))
    flags = FLAGS | {"timesteps": 20, "steps": 6, "guidance_low": 0, "sample_batch_size": 2}
    result = run("benchmark.py", "--compile", **flags, json=tmp_path / "a.json")
    assert result.code == 0, result
    sampling = json.loads((tmp_path / "a.json").read_text())["sampling"]
    assert list(sampling["images_per_second_at_calls"]) == ["1", "4", "8", "20"]
    assert sampling["one_image_calls"] == 11  # of six, the first is above guidance_high
    assert "11 calls" in result.out
    assert len(compiled) == 2  # for training and for sampling


def test_a_measured_step_does_to_a_model_what_a_step_of_train_does():
    measured = benchmark.Training(CFG, CPU)
    images, labels = load_split(CFG, train=True, device=CPU)
    state, process = checkpoint.TrainState.initial(CFG, CPU), diffusion.Diffusion(CFG)
    for _ in range(2):
        measured.step()
        x_0, y = train.batch(CFG, images, labels, state.progress)
        train.training_step(CFG, process.loss, state, x_0, y, fraction=0.5)
    assert_same(dict(measured.state.model.state_dict()), dict(state.model.state_dict()))
    assert_same(dict(measured.state.ema.state_dict()), dict(state.ema.state_dict()))
    assert measured.state.progress == state.progress
    measured.step()  # 40 images are two whole batches, so this one begins the next epoch
    assert (measured.state.progress.epoch, measured.state.progress.images) == (1, 16)


def test_only_steps_of_train_are_measured(monkeypatch):
    batches = []

    def no_step(cfg, process, state, x_0, y, fraction):
        batches.append(x_0.shape)

    monkeypatch.setattr(train, "training_step", no_step)
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    measured = benchmark.Training(CFG, CPU)
    before = {name: weight.clone() for name, weight in measured.state.model.state_dict().items()}
    taken = measured.step()
    assert batches == [(16, 1, 28, 28)]
    assert len(taken) == 1  # no hook noted a part, because nothing ran
    assert_same(dict(measured.state.model.state_dict()), before)


PART_OF = {  # what runs in each part of a step
    "data": (diffusion.Diffusion, "add_noise"),
    "forward": (model, "timestep_features"),
    "backward": (torch.nn.utils, "clip_grad_norm_"),
    "optimizer": (optimizer, "orthogonalize"),
    "average": (torch, "_foreach_lerp_"),
}


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_time_is_counted_in_the_part_that_takes_it_and_the_parts_add_up(part, monkeypatch):
    measured = benchmark.Training(CFG, CPU)
    measured.step()
    uncounted = []

    def quickest() -> dict[str, float]:
        """The least time of each part in three steps, which other programs disturb least."""
        steps = []
        for _ in range(3):
            began = time.perf_counter()
            steps.append(measured.step())
            uncounted.append(time.perf_counter() - began - sum(steps[-1]))
        return dict(zip(benchmark.PARTS, map(min, zip(*steps, strict=True)), strict=True))

    usual = quickest()
    owner, name = PART_OF[part]
    work = getattr(owner, name)

    def slow_work(*args, **options):
        time.sleep(0.1)
        return work(*args, **options)

    monkeypatch.setattr(owner, name, slow_work)
    slower = quickest()
    for each in benchmark.PARTS:
        added = slower[each] - usual[each]
        assert (added > 0.08) == (each == part), (each, usual, slower)
    assert 0 <= min(uncounted) < 0.02


def test_the_operations_are_those_of_the_convolutions():
    cfg = Config(widths=(8, 16), embedding_size=8, batch_size=2, precision="float32")
    bare = benchmark.convolutions(UNet(cfg), cfg, CPU)
    fine, coarse = 14 * 14, 7 * 7  # pixels
    stem = fine * (4 * 8 * 9)
    fine_blocks = fine * 2 * (2 * 8 * 8 * 9)  # one down, one up
    shrink_and_grow = coarse * (4 * 8 * 16 + 16 * 4 * 8)
    coarse_blocks = coarse * 3 * (2 * 16 * 16 * 9)  # one down, the middle, one up
    head = fine * (8 * 4 * 9 + 8 * 4)  # with the bypass
    forward = stem + fine_blocks + shrink_and_grow + coarse_blocks + head
    expected = 2 * 2 * (3 * forward - stem)  # two images; no gradient of x_t
    assert sum(operations for operations, _ in bare) == expected
    for _, both_ways in bare:
        both_ways()


def test_bad_input_is_one_line(run, tmp_path):
    assert_one_line(run("benchmark.py", json=tmp_path / "no" / "a.json"), "make it first")
    assert_one_line(run("benchmark.py", json=tmp_path / "a.pth"), "a.pth", "ends in .json")
    assert_one_line(run("benchmark.py", batch_size=0), "batch_size = 0", "at least 1")
    large = {"widths": "1024,1024", "blocks": 16}
    assert_one_line(run("benchmark.py", **large), "parameters", "at most 40,000,000")
    assert_one_line(run("benchmark.py", gpu=True, device="cpu", max_images=500), "max_images = 500")
    unguided = {"gpu": True, "device": "cpu", "guide_fraction": 0, "label_dropout": 0}
    assert_one_line(run("benchmark.py", **unguided), "guidance = 2.8")
    if not torch.cuda.is_available():
        assert_one_line(run("benchmark.py", gpu=True), "there is no CUDA GPU; drop --gpu")
        flags = {"scaling": True, "data_dir": "nowhere"}
        assert_one_line(run("benchmark.py", **flags), "data_dir = 'nowhere': has no effect")
    flags = FLAGS | {"batch_size": 61_000}
    assert_one_line(run("benchmark.py", **flags), "batch_size = 61000", "60000")
