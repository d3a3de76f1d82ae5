"""evaluate.py by its command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, REPO, TINY, Result, assert_one_line
from PIL import Image
from test_evaluator import ClassMeans, quick_evaluator, real_images, shared_evaluator

import checkpoint
import evaluate
from config import Config
from data import fingerprint, read_mnist
from diffusion import Diffusion
from evaluate import parse_sweep
from evaluation import classifier, metrics, two_sample
from system.files import sha256
from system.machine import pick_precision

CPU = torch.device("cpu")

STUDENT, PRETRAINED = (REPO / "results" / "models" / f"{n}.pth" for n in ("student", "pretrained"))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap is tested in test_metrics.py; here it would only take time."""
    monkeypatch.setattr(metrics, "RESAMPLES", 5)


@pytest.fixture
def ready(monkeypatch) -> None:
    """Let the script take the evaluator that the tests share."""
    monkeypatch.setattr(evaluate, "Evaluator", lambda cfg, device: quick_evaluator())


@pytest.fixture
def real() -> tuple[np.ndarray, np.ndarray]:
    """Some training images (N, 28, 28) and their labels."""
    images, labels = real_images()
    return images[:, 0].numpy(), labels.numpy()


def save(path, images, labels=None):
    arrays = [images] if labels is None else [images, labels]
    np.savez(path, *arrays)
    return path


@pytest.mark.parametrize("labelled", [True, False])
def test_a_file_of_samples_is_measured_with_and_without_labels(
    real, run, tmp_path, request, monkeypatch, labelled
):
    monkeypatch.setattr("evaluation.evaluator.MAX_MEASURED", 1000)
    if not labelled:  # the other time, the script makes an evaluator of its own
        request.getfixturevalue("ready")
    images, labels = real[0][:200], real[1][:200]
    file = tmp_path / "samples.npz"
    save(file, images, labels) if labelled else save(file, images[..., None])
    result = run("evaluate.py", images=file, data_dir=MNIST, output_dir=tmp_path, device="cpu")
    assert result.code == 0, result
    assert ("label agreement" in result.out) == labelled
    sha256 = shared_evaluator().sha256
    for words in ("FD-MNIST", "the floor", "recall", "black pixels", sha256[:12]):
        assert words in result.out
    (written,) = tmp_path.glob("metrics/samples-*.json")
    found = json.loads(written.read_text())
    assert found["evaluator"] == sha256
    assert len(found["images_sha256"]) == 64
    assert found["images"] == 200
    assert found["made_by"]["torch"] == torch.__version__
    assert Image.open(tmp_path / "images" / "nearest.png").size == (4 * 30 + 2, 5 * 30 + 2)


def test_a_random_part_of_a_large_file_is_measured(ready, real, run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_MEASURED", 150)
    file = save(tmp_path / "many.npz", real[0][:200], real[1][:200])
    result = run("evaluate.py", images=file, data_dir=MNIST, output_dir=tmp_path)
    assert result.code == 0, result
    assert "a random 150 of its 200 images" in result.out
    (written,) = tmp_path.glob("metrics/many-*.json")
    assert json.loads(written.read_text())["images"] == 150


def test_cas_trains_on_the_samples_of_a_file_if_it_has_labels(
    ready, real, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(classifier, "fit", ClassMeans)
    images, labels = real[0][:200], real[1][:200]
    flags = {"data_dir": MNIST, "output_dir": tmp_path, "cas": True}
    result = run("evaluate.py", images=save(tmp_path / "with.npz", images, labels), **flags)
    assert result.code == 0, result
    assert "CAS: accuracy on test images" in result.out
    (written,) = tmp_path.glob("metrics/with-*.json")
    assert len(json.loads(written.read_text())["cas"]["synthetic"]) == 3
    without = save(tmp_path / "without.npz", images)
    assert_one_line(run("evaluate.py", images=without, **flags), "without.npz", "arr_1")


def test_c2st_says_how_well_a_network_tells_samples_and_training_images_from_test_images(
    ready, real, run, tmp_path, monkeypatch
):
    def soft_edges(images, answers, seed):  # takes images with grey pixels for real
        return lambda x: ((x > 0) & (x < 128)).flatten(1).float().mean(dim=1) - 0.01

    monkeypatch.setattr(two_sample, "fit", soft_edges)
    file = save(tmp_path / "thin.npz", np.where(real[0] > 127, real[0], 0))
    flags = {"data_dir": MNIST, "output_dir": tmp_path, "device": "cpu", "c2st": True}
    result = run("evaluate.py", images=file, **flags)
    assert result.code == 0, result
    (written,) = tmp_path.glob("metrics/thin-*.json")
    found = json.loads(written.read_text())["c2st"]
    for view in ("coarse", "exact"):
        assert f"C2ST, {view} pixels" in result.out
        assert len(found[view]["samples"]) == len(found[view]["real"]) == 3
    assert np.mean(found["exact"]["samples"]) > 0.98
    assert np.mean(found["exact"]["real"]) == pytest.approx(0.5, abs=0.02)
    shown = f"{np.mean(found['exact']['samples']):.2%}"
    assert shown in next(line for line in result.out.splitlines() if "C2ST, exact" in line)
    assert "(training images)" in result.out
    assert f"wrote {tmp_path / 'images' / 'two_sample.png'}" in result.out
    assert Image.open(tmp_path / "images" / "two_sample.png").size == (10 * 30 + 2, 2 * 30 + 2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", ("no such file",)),
        ("empty", ("not a valid .npz",)),
        ("cut", ("not a valid .npz",)),
        ("flipped", ("not a valid .npz",)),
        ("npy", ("not a valid .npz",)),
        ("no images", ("no arr_0",)),
        ("float", ("float64", "uint8")),
        ("shape", ("(200, 32, 32)", "(N, 28, 28)")),
        ("colour", ("(200, 28, 28, 3)", "(N, 28, 28)")),
        ("few", ("100 images", "at least 128")),
        ("labels", ("arr_1", "200 images")),
        ("float labels", ("arr_1", "float64")),
        ("label 11", ("arr_1", "0 to 9")),
    ],
)
def test_a_bad_file_is_one_line(ready, run, tmp_path, fault, words):
    file = tmp_path / "bad.npz"
    images, labels = np.zeros((200, 28, 28), np.uint8), np.zeros(200, np.int64)
    if fault == "empty":
        file.write_bytes(b"")
    elif fault == "cut":
        save(file, np.random.default_rng(0).integers(0, 255, (200, 28, 28), np.uint8), labels)
        file.write_bytes(file.read_bytes()[:5000])
    elif fault == "flipped":
        np.savez_compressed(file, np.random.default_rng(0).integers(0, 9, (200, 28, 28), np.uint8))
        data = bytearray(file.read_bytes())
        data[3000:3050] = b"\xff" * 50
        file.write_bytes(data)
    elif fault == "npy":
        with open(file, "wb") as plain:
            np.save(plain, images)
    elif fault == "no images":
        np.savez(file, pictures=images)
    elif fault != "missing":
        save(
            file,
            {
                "float": images / 255,
                "shape": np.zeros((200, 32, 32), np.uint8),
                "colour": np.zeros((200, 28, 28, 3), np.uint8),
                "few": images[:100],
            }.get(fault, images),
            {
                "labels": labels[:50],
                "few": labels[:100],
                "float labels": labels / 2,
                "label 11": labels + 11,
            }.get(fault, labels),
        )
    result = run("evaluate.py", images=file, data_dir=MNIST, output_dir=tmp_path)
    assert_one_line(result, str(file) if fault != "few" else "100", *words)
    assert not list(tmp_path.glob("metrics/*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"samples": 100}, ("samples = 100", "128 to 10000")),
        ({"samples": 20_000}, ("samples = 20000", "128 to 10000")),
        ({"model": "none.pth"}, ("none.pth", "no such checkpoint")),
        ({}, ("no model", "python train.py")),
        ({"images": "a.npz", "model": "b.pth"}, ("--images allows only --cas",)),
        ({"images": "a.npz", "steps": 4}, ("--images allows only --cas",)),
        ({"images": "a.npz", "samples": 200}, ("--images allows only --cas",)),
        ({"images": "a.npz", "sweep": "steps=4"}, ("--sweep", "--images")),
        ({"sweep": "steps=4", "cas": True}, ("--sweep", "drop --cas")),
        ({"model": PRETRAINED, "sweep": "steps=4", "steps": 6}, ("steps = 6", "--sweep sets it")),
        (
            {"model": PRETRAINED, "guidance": 1, "guidance_low": 0.2},
            ("guidance_low = 0.2", "no effect with guidance = 1"),
        ),
        (
            {"model": PRETRAINED, "sweep": "steps=4,8", "guidance": 1, "guidance_low": 0.2},
            ("guidance_low = 0.2", "no effect with guidance = 1"),
        ),
        (
            {"model": PRETRAINED, "guidance": 0, "guidance_high": 0.5},
            ("guidance_high = 0.5", "no effect with guidance = 0"),
        ),
        ({"model": PRETRAINED, "sampler": "ddpm", "sweep": "eta=0,1"}, ("eta = 0", "no effect")),
        (
            {"model": PRETRAINED, "guidance": 1, "sweep": "guidance_low=0.1,0.2"},
            ("guidance_low = 0.1", "no effect"),
        ),
        ({"model": STUDENT, "sweep": "steps=2"}, ("steps = 2", "a student learned 4")),
        ({"sweep": "steps=4", "c2st": True}, ("--sweep", "drop --c2st")),
        ({"images": "a.npz", "train_evaluator": True}, ("--train_evaluator", "--images")),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, flags, words):
    assert_one_line(run("evaluate.py", **flags, output_dir=tmp_path), *words)


def test_digits_of_another_size_have_a_classifier_of_their_own(run, tmp_path, monkeypatch):
    few = {train: [each[:256] for each in read_mnist(Config(), train)] for train in (True, False)}
    monkeypatch.setattr("data.read_mnist", lambda cfg, train: few[train])
    monkeypatch.setattr(classifier, "LEAST_STEPS", 10)
    monkeypatch.setattr("evaluation.metrics.RESAMPLES", 3)
    cfg = Config(img_size=16, widths=(8, 8), embedding_size=8, steps=2, max_images=250)
    path = tmp_path / "small.pth"
    checkpoint.save(path, cfg, checkpoint.TrainState.initial(cfg, CPU))
    here = {"data_dir": MNIST, "output_dir": tmp_path, "device": "cpu"}
    result = run("evaluate.py", model=path, samples=200, **here)
    assert result.code == 0, result
    assert "200 images of" in result.out
    assert "training a classifier for these 250 images" in result.out
    [own] = (tmp_path / "evaluators").glob("MNIST-16px-*.pth")
    assert f"evaluator {sha256(own)[:12]}" in result.out
    checkpoint.save(path, replace(cfg, max_images=100), checkpoint.TrainState.initial(cfg, CPU))
    result = run("evaluate.py", model=path, **here)
    assert_one_line(result, "100 training images", "at least 128", "--max_images was 100")


def test_the_denoiser_names_test_images(run, tmp_path):
    found = run(
        "evaluate.py",
        "--classify",
        model=REPO / "results/models/pretrained.pth",
        samples=32,
        output_dir=tmp_path,
    )
    assert found.code == 0, found
    [file] = (tmp_path / "metrics").glob("classify-pretrained-*.json")
    result = json.loads(file.read_text("utf-8"))
    assert result["classify"]["accuracy"] > 0.9  # a tenth by chance
    assert result["classify"]["calls"] == 90
    precision = pick_precision("auto", CPU)
    assert file.stem.endswith(f"-n32-s0-{precision}")
    assert result["settings"] == {"seed": 0, "precision": precision, "sample_batch_size": 128}
    assert result["test_sha256"] == classifier.MNIST_TEST_SHA256


@pytest.mark.parametrize("max_images", [0, 256])
def test_a_model_of_other_images_is_measured_with_a_word(ready, run, tmp_path, max_images):
    """The evaluator here knows a part of MNIST's training images."""
    cfg = Config(widths=(8, 8), embedding_size=8, steps=2, guide_fraction=0, max_images=max_images)
    evaluator, limit = quick_evaluator(), max_images or None
    images, labels = evaluator.train_images[:limit], evaluator.train_labels[:limit]
    state = checkpoint.TrainState.initial(cfg, CPU)
    state.data = fingerprint(images, labels) | {"teacher": "of a student"}
    flags = {"samples": 128, "data_dir": MNIST, "output_dir": tmp_path, "device": "cpu"}
    for name, other in (("same", False), ("other", True)):
        if other:
            state.data["sha256"] = "0" * 64
        checkpoint.save(tmp_path / f"{name}.pth", cfg, state)
        result = run("evaluate.py", model=tmp_path / f"{name}.pth", **flags)
        assert result.code == 0, result
        said = f"{name}.pth was not trained on the images in {MNIST}"
        assert (said in result.out) == other


def test_a_file_is_measured_as_mnist_whatever_config_says(run, tmp_path, real, monkeypatch):
    asked, quick = [], quick_evaluator()
    monkeypatch.setattr(evaluate, "Evaluator", lambda cfg, device: asked.append(cfg) or quick)
    edited = Config(img_size=32, dataset="FashionMNIST")
    monkeypatch.setattr(evaluate, "Config", lambda: edited)
    file = save(tmp_path / "samples.npz", real[0][:200])
    assert run("evaluate.py", images=file, output_dir=tmp_path).code == 0
    assert (asked[0].img_size, asked[0].dataset) == (28, "MNIST")


def test_train_evaluator_writes_a_new_one_and_prints_its_accuracy(run, monkeypatch):
    asked = []
    monkeypatch.setattr(classifier, "train_and_save", lambda cfg: asked.append(cfg) or 0.9975)
    result = run("evaluate.py", train_evaluator=True, data_dir=MNIST)
    assert (result.code, asked[0].data_dir) == (0, MNIST)
    assert result.out == f"wrote {classifier.PATH}: 99.75% of the test split read correctly\n"


# ---- sweeps


def test_a_sweep_is_every_combination_of_the_values():
    grid = parse_sweep(["steps=4,8", "sampler=ddim,dpmpp", "guidance=1.5"])
    assert len(grid) == 4
    assert grid[0] == {"steps": 4, "sampler": "ddim", "guidance": 1.5}
    assert parse_sweep(["seed=1,2"]) == [{"seed": 1}, {"seed": 2}]
    assert parse_sweep([]) == [{}]


@pytest.mark.parametrize(
    "words",
    [["steps"], ["steps="], ["widths=3"], ["clip_x_0=1"], ["steps=4,x"], ["eta=0", "eta=1"]],
)
def test_a_sweep_of_anything_else_is_an_error(words):
    with pytest.raises(ValueError, match=r"sweep = .*each NAME once, of sampler, steps,"):
        parse_sweep(words)


def test_a_sweep_is_printed_plotted_and_resumed(ready, run, tmp_path, monkeypatch):
    guides, guided = [], Diffusion.guided

    def recorded_guided(self, model, guide=None):
        guides.append(guide)
        return guided(self, model, guide)

    assert run("train.py", **TINY, epochs=1, output_dir=tmp_path).code == 0
    monkeypatch.setattr(Diffusion, "guided", recorded_guided)

    def sweep(*values: str, **flags: object) -> Result:
        where = {"data_dir": MNIST, "output_dir": tmp_path, "device": "cpu"}
        return run("evaluate.py", samples=128, sweep=list(values), **where, **flags)

    first = sweep("steps=1,2", "guidance=1")
    assert first.code == 0, first
    assert len(guides) == 2
    assert None not in guides
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("metrics/*.json")}
    assert len(files) == 2
    trained = [json.loads(path.read_text())["training"] for path in files]
    assert all(each["minutes"] > 0 and each["steps"] == 10 for each in trained)
    assert Image.open(tmp_path / "images" / "sweep.png").width > 300
    assert_one_line(sweep("steps=1,2000"), "steps = 2000", "at most timesteps = 1000")
    for name in ("1", "model_epoch_1", "newest"):  # the same model, as generate.py names it
        named = sweep("steps=1,2", "guidance=1", model=name)
        assert named.code == 0, named
    assert sweep("guidance=1").code == 0  # the checkpoint says that steps = 2
    assert len(guides) == 2
    second = sweep("steps=1,2", "guidance=1,2")
    rows = [line for line in second.out.splitlines() if line[2:].lstrip().startswith("dpmpp ")]
    assert len(rows) == 4
    assert any(row.startswith("*") for row in rows)
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    assert len(list(tmp_path.glob("metrics/*.json"))) == 4


def test_a_model_is_measured_once_with_its_own_settings_unless_flags_say_otherwise(
    ready, run, tmp_path, monkeypatch
):
    cfg = Config(widths=(8, 8), embedding_size=8, steps=1, guidance=1.0, eta=0.5)
    path = tmp_path / "mine.pth"
    checkpoint.save(path, cfg, checkpoint.TrainState.initial(cfg, CPU))
    where = {"data_dir": MNIST, "output_dir": tmp_path, "device": "cpu"}
    first = run("evaluate.py", model=path, samples=128, **where)
    assert first.code == 0, first
    (written,) = tmp_path.glob("metrics/mine-*.json")
    found = json.loads(written.read_text())
    assert found["settings"] == cfg.select("sampling") | {
        "seed": 0,
        "samples": 128,
        "labels": "exact",
        "precision": pick_precision("auto", CPU),
        "match_levels": False,  # this model has none
    }
    assert found["model"] == sha256(path)
    assert found["sampling"]["calls"] == 1
    again = run("evaluate.py", model=path, samples=128, **where)
    assert f"read {written}, measured before" in again.out
    assert again.out.splitlines()[1:] == first.out.splitlines()[:-2]  # the same table
    monkeypatch.setattr(classifier, "fit", ClassMeans)
    more = run("evaluate.py", model=path, samples=128, steps=2, cas=True, **where)
    assert more.code == 0, more
    files = list(tmp_path.glob("metrics/mine-*.json"))
    assert len(files) == 2
    (other,) = set(files) - {written}
    assert json.loads(other.read_text())["settings"]["steps"] == 2
    assert len(json.loads(other.read_text())["cas"]["real"]) == 3


def test_what_took_training_is_kept_when_a_file_is_measured_again(
    ready, real, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(classifier, "fit", ClassMeans)
    file = save(tmp_path / "a.npz", real[0][:200], real[1][:200])
    flags = {"images": file, "data_dir": MNIST, "output_dir": tmp_path}
    for more in ({"cas": True}, {}):
        assert run("evaluate.py", **flags, **more).code == 0
    (written,) = tmp_path.glob("metrics/a-*.json")
    assert len(json.loads(written.read_text())["cas"]["real"]) == 3


def test_a_stop_during_the_last_test_loses_no_other_figure(ready, real, run, tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier, "fit", ClassMeans)
    monkeypatch.setattr(two_sample, "two_sample_test", stopped)
    file = save(tmp_path / "a.npz", real[0][:200], real[1][:200])
    flags = {"images": file, "data_dir": MNIST, "output_dir": tmp_path, "cas": True, "c2st": True}
    assert run("evaluate.py", **flags).code == 130
    (written,) = tmp_path.glob("metrics/a-*.json")
    found = json.loads(written.read_text())
    assert found["samples"]["fd"] > 0
    assert len(found["cas"]["real"]) == 3
    assert "c2st" not in found


def test_a_sweep_measures_what_draws_alike_only_once(ready, run, tmp_path):
    cfg = Config(widths=(8, 8), embedding_size=8, steps=1, guidance=1.0)
    path = tmp_path / "mine.pth"
    checkpoint.save(path, cfg, checkpoint.TrainState.initial(cfg, CPU))
    where = {"data_dir": MNIST, "output_dir": tmp_path, "device": "cpu", "samples": 128}
    words = ["steps=2,2", "eta=0,0.5", "sampler=ddpm,ddim"]
    assert run("evaluate.py", model=path, sweep=words, **where).code == 0
    found = [json.loads(file.read_text())["settings"] for file in tmp_path.glob("metrics/*.json")]
    assert sorted(each["sampler"] for each in found) == ["ddim", "ddim", "ddpm"]


def test_a_result_that_cannot_be_written_ends_all_but_a_sweep(ready, run, tmp_path, monkeypatch):
    def fails(file: Path, result: dict) -> None:
        raise ValueError(f"{file}: cannot be written")

    cfg = Config(widths=(8, 8), embedding_size=8, steps=1, guidance=1.0)
    path = tmp_path / "mine.pth"
    checkpoint.save(path, cfg, checkpoint.TrainState.initial(cfg, CPU))
    monkeypatch.setattr("evaluation.results.write_result", fails)
    where = {"data_dir": MNIST, "output_dir": tmp_path, "device": "cpu", "samples": 128}
    swept = run("evaluate.py", model=path, sweep="steps=1,2", **where)
    assert swept.code == 0, swept
    assert "images/s" in swept.out
    assert "cannot be written" in swept.err
    alone = run("evaluate.py", model=path, **where)
    assert alone.code == 2
    assert "FD-MNIST" in alone.out  # which has been measured
    assert "cannot be written" in alone.err
