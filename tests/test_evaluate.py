"""evaluate.py with the committed judge, on real images with known faults, and by command line."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MNIST, TINY, Result, assert_one_line, start_script
from PIL import Image

import evaluator
import metrics
from config import Config
from diffusion import Diffusion
from evaluate import Judge, pareto_best, parse_sweep, train_on_synthetic

CPU = torch.device("cpu")
COUNT = 500


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap is tested in test_metrics.py; here it would only take time."""
    monkeypatch.setattr(metrics, "RESAMPLES", 5)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Config(data_dir=MNIST), CPU)


@pytest.fixture(scope="module")
def real(judge) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, drawn at random from those that are not among the judge's reference."""
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))  # as in Judge
    some = order[10_000 : 10_000 + COUNT]
    return judge.train_images[some], judge.train_labels[some]


def measure(judge, images, labels=None) -> dict:
    return judge.measure(images, labels)["samples"]


def test_the_committed_judge_reads_the_test_split(judge):
    right = evaluator.accuracy(judge.net, judge.test_images, judge.test_labels)
    assert right >= 0.996
    assert evaluator.PATH.stat().st_size <= 2 * 2**20
    assert len(judge.sha256) == 64


def test_the_judges_reference_is_the_training_split(judge):
    features = evaluator.features_of(judge.net, judge.train_images[:2000])
    mean, spread = judge.train_moments["mu"], np.sqrt(np.diag(judge.train_moments["sigma"]))
    assert (np.abs(features.mean(dim=0).numpy() - mean) < 6 * spread / 2000**0.5 + 1e-6).all()


def test_training_a_judge_is_deterministic(judge):
    images, labels = judge.train_images[:512], judge.train_labels[:512]
    a, b = (evaluator.fit(images, labels, epochs=1, seed=3) for _ in range(2))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def test_real_images_stand_at_their_floor(judge, real):
    result = judge.measure(*real)
    samples, floor = result["samples"], result["real"]
    assert samples["fd_over_floor"] < 1.3
    assert samples["precision"] == pytest.approx(floor["precision"], abs=0.06)
    assert samples["recall"] == pytest.approx(floor["recall"], abs=0.06)
    assert samples["agreement"] > 0.98
    assert samples["pixels"]["black"] == pytest.approx(floor["pixels"]["black"], abs=0.02)


def test_shuffled_labels_agree_by_chance(judge, real):
    images, labels = real
    shuffled = labels[torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))]
    assert measure(judge, images, shuffled)["agreement"] == pytest.approx(0.1, abs=0.04)


def noisy(images, amount):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 255 * amount * noise).clamp(0, 255).to(torch.uint8)


def blurred(images, amount):
    soft = F.avg_pool2d(images.float(), 5, stride=1, padding=2)
    return ((1 - amount) * images + amount * soft).to(torch.uint8)


@pytest.mark.parametrize("fault", [noisy, blurred])
def test_more_of_a_fault_is_further_from_the_real_images(judge, real, fault):
    images, labels = real
    worse = [measure(judge, fault(images, amount), labels) for amount in (0.0, 0.15, 0.4)]
    distances = [figures["fd"] for figures in worse]
    precisions = [figures["precision"] for figures in worse]
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]
    assert precisions[2] < precisions[0]
    if fault is noisy:
        black = [figures["pixels"]["black"] for figures in worse]
        assert max(black[1:]) < 0.6 < black[0]


def test_swapped_labels_lower_agreement_by_their_share_and_nothing_else(judge, real):
    images, labels = real
    figures = []
    for share in (0.0, 0.2, 0.5):
        swapped = labels.clone()
        swapped[: int(share * COUNT)] = (labels[: int(share * COUNT)] + 1) % 10
        figures.append(measure(judge, images, swapped))
    agreement = [each["agreement"] for each in figures]
    assert agreement[0] - agreement[1] == pytest.approx(0.2, abs=0.02)
    assert agreement[0] - agreement[2] == pytest.approx(0.5, abs=0.03)
    assert len({each["fd"] for each in figures}) == 1


class ClassMeans:
    """A classifier that is trained in no time: the digit whose mean image is nearest."""

    def __init__(self, images, labels, **_):
        self.means = torch.stack([self(images[labels == digit]).mean(dim=0) for digit in range(10)])

    def __call__(self, images):
        return images.float().flatten(1)

    def classify(self, features):
        return -torch.cdist(features, self.means)


def test_training_on_samples_is_held_against_training_on_real_images(judge, real, monkeypatch):
    monkeypatch.setattr(evaluator, "fit", ClassMeans)
    images, labels = real
    as_good = train_on_synthetic(judge, images, labels)
    assert len(as_good["synthetic"]) == len(as_good["real"]) == 3
    assert min(as_good["real"]) > 0.7
    assert as_good["gap"] == pytest.approx(0, abs=0.05)  # other images, as many
    wrong = train_on_synthetic(judge, images, (labels + 1) % 10)
    assert wrong["real"] == as_good["real"]
    assert wrong["gap"] > 0.6


def test_copies_of_training_images_are_found(judge):
    fresh = judge.test_images[:COUNT].clone()
    honest = measure(judge, fresh)["copies"]
    fresh[:10] = judge.train_images[500:510]
    assert measure(judge, fresh)["copies"] >= 10 > honest


def save(path, images, labels=None):
    arrays = [images] if labels is None else [images, labels]
    np.savez(path, *arrays)
    return path


def test_a_file_of_samples_is_judged_with_and_without_labels(judge, real, run, tmp_path):
    images, labels = real[0][:200].numpy(), real[1][:200].numpy()
    for name, file in (
        ("with", save(tmp_path / "with.npz", images[:, 0], labels)),
        ("without", save(tmp_path / "without.npz", images.transpose(0, 2, 3, 1))),
    ):
        result = run("evaluate.py", "--images", file, "--data_dir", MNIST, "--output_dir", tmp_path)
        assert result.code == 0, result
        assert ("label agreement" in result.out) == (name == "with")
        for words in ("FD-MNIST", "the floor", "recall", "black pixels", judge.sha256[:12]):
            assert words in result.out
        written = next(tmp_path.glob(f"metrics/{name}-*.json"))
        figures = json.loads(written.read_text())
        assert figures["evaluator"] == judge.sha256
        assert len(figures["images_sha256"]) == 64
        assert figures["images"] == 200
        assert figures["made_by"]["torch"] == torch.__version__
        assert Image.open(tmp_path / "images" / "nearest.png").size == (4 * 30 + 2, 5 * 30 + 2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", ("no such file",)),
        ("empty", ("not a whole .npz",)),
        ("cut", ("not a whole .npz",)),
        ("flipped", ("not a whole .npz",)),
        ("npy", ("not a whole .npz", "single array")),
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
def test_a_bad_file_is_one_line(run, tmp_path, fault, words):
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
    result = run("evaluate.py", "--images", file, "--data_dir", MNIST, "--output_dir", tmp_path)
    assert_one_line(result, str(file) if fault != "few" else "100", *words)
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--samples", 100), ("samples = 100", "128 to 10000")),
        (("--samples", 20_000), ("samples = 20000", "128 to 10000")),
        (("--model", "none.pth"), ("none.pth", "no such checkpoint")),
        ((), ("no model", "python train.py")),
        (("--images", "a.npz", "--model", "b.pth"), ("--images", "drop --model")),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, flags, words):
    assert_one_line(run("evaluate.py", *flags, "--output_dir", tmp_path), *words)


def test_a_sweeps_grid():
    grid = parse_sweep(["steps=4,8", "sampler=ddim,dpmpp", "guidance=1.5"])
    assert len(grid) == 4
    assert grid[0] == {"steps": 4, "sampler": "ddim", "guidance": 1.5}
    for bad in ("steps", "steps=", "width=3", "steps=4,x"):
        with pytest.raises(ValueError, match="sweep = "):
            parse_sweep([bad])


def test_the_pareto_best_of_a_sweep():
    points = [(4, 2.0), (8, 1.0), (8, 1.5), (16, 1.0), (20, 0.5)]
    results = [{"sampling": {"calls": c}, "samples": {"fd": f}} for c, f in points]
    assert pareto_best(results) == [True, True, False, False, True]


def test_a_sweep_is_printed_plotted_and_resumed(run, tmp_path, monkeypatch):
    guides, sample = [], Diffusion.sample

    def recorded_sample(self, model, y, **settings):
        guides.append(settings["guide"])
        return sample(self, model, y, **settings)

    monkeypatch.setattr(Diffusion, "sample", recorded_sample)
    process = start_script("train.py", *TINY, "--epochs", 1, "--output_dir", tmp_path)
    assert process.wait() == 0, process.stdout.read()

    def sweep(*knobs: str) -> Result:
        return run("evaluate.py", "--samples", 128, "--data_dir", MNIST, "--output_dir", tmp_path,
                   "--device", "cpu", "--sweep", *knobs)  # fmt: skip

    first = sweep("steps=1,2", "guidance=1")
    assert first.code == 0, first
    assert len(guides) == 2
    assert None not in guides
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("metrics/*.json")}
    assert len(files) == 2
    assert Image.open(tmp_path / "images" / "sweep.png").width > 300
    assert_one_line(sweep("steps=1,2000"), "steps = 2000", "1 to 1000")
    for name in ("1", "model_epoch_1", "newest"):  # the same model, as generate.py names it
        named = sweep("steps=1,2", "guidance=1", "--model", name)
        assert named.code == 0, named
    assert len(guides) == 2
    second = sweep("steps=1,2", "guidance=1,2")
    rows = [line for line in second.out.splitlines() if line[2:].startswith("dpmpp ")]
    assert len(rows) == 4
    assert any(row.startswith("*") for row in rows)
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    assert len(list(tmp_path.glob("metrics/*.json"))) == 4

    trained = [json.loads(path.read_text())["training"] for path in files]
    assert all(t["minutes"] > 0 and t["steps"] == 10 for t in trained)
    other, speed = tmp_path / "other.json", tmp_path / "speed.json"
    other.write_text(json.dumps({"source": "somebody's.npz", "samples": {}}))
    speed.write_text(json.dumps({"training": {"images_per_second": 1000}}))

    def plot(*more: object) -> Result:
        return run("evaluate.py", "--output_dir", tmp_path, "--plot", *files, other, *more)

    drawn = plot(speed)
    picture = tmp_path / "images" / "quality.png"
    assert drawn.out.splitlines() == [f"{other}: not of a model, left out", f"wrote {picture}"]
    assert Image.open(picture).width > 300
    assert_one_line(plot(), "one of benchmark.py")
    assert_one_line(plot(speed, speed), "one of benchmark.py")
    other.write_text(json.dumps(json.loads(next(iter(files)).read_text()) | {"images": 200}))
    assert_one_line(plot(speed), "different numbers")
    for damaged in ("{", "[]", "{}"):
        other.write_text(damaged)
        assert_one_line(plot(speed), "other.json", "no result")
