"""The evaluator with the committed classifier, on real images and on ones with known faults."""

import copy
import functools
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MNIST

from config import Config
from evaluation import classifier, metrics
from evaluation.evaluator import Evaluator

COUNT = 500


@functools.cache
def shared_evaluator() -> Evaluator:
    """The evaluator of all tests, because making one takes seconds; it compares with no more
    training images than a test has samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.evaluator.MAX_MEASURED", 1000)
        return Evaluator(Config(data_dir=MNIST), torch.device("cpu"))


@functools.cache
def quick_evaluator() -> Evaluator:
    """The same, but it looks for near training images among fewer, which takes half the time."""
    quick = copy.copy(shared_evaluator())
    quick.train_images, quick.train_labels = quick.train_images[:3000], quick.train_labels[:3000]
    quick._real = {}
    return quick


@functools.cache
def real_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Random training images that are not among those with which the evaluator compares."""
    evaluator = shared_evaluator()
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))  # as in Evaluator
    some = order[10_000 : 10_000 + COUNT]
    return evaluator.train_images[some], evaluator.train_labels[some]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap is tested in test_metrics.py; here it would only take time."""
    monkeypatch.setattr(metrics, "RESAMPLES", 5)


@pytest.fixture
def evaluator() -> Evaluator:
    return shared_evaluator()


@pytest.fixture
def real() -> tuple[torch.Tensor, torch.Tensor]:
    return real_images()


def measure(evaluator, images, labels=None) -> dict:
    return evaluator.measure(images, labels)[0]["samples"]


def test_real_images_are_at_the_floor(evaluator, real):
    result, _ = evaluator.measure(*real)
    samples, floor = result["samples"], result["real"]
    assert samples["fd_over_floor"] < 1.3
    assert samples["precision"] == pytest.approx(floor["precision"], abs=0.06)
    assert samples["recall"] == pytest.approx(floor["recall"], abs=0.06)
    assert samples["agreement"] > 0.98
    assert samples["pixels"]["black"] == pytest.approx(floor["pixels"]["black"], abs=0.02)


def test_shuffled_labels_agree_by_chance(real):
    (images, labels), evaluator = real, quick_evaluator()
    shuffled = labels[torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))]
    assert measure(evaluator, images, shuffled)["agreement"] == pytest.approx(0.1, abs=0.04)


def noisy(images, amount):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 255 * amount * noise).clamp(0, 255).to(torch.uint8)


def blurred(images, amount):
    soft = F.avg_pool2d(images.float(), 5, stride=1, padding=2)
    return ((1 - amount) * images + amount * soft).to(torch.uint8)


@pytest.mark.parametrize("fault", [noisy, blurred])
def test_more_of_a_fault_is_farther_from_the_real_images(real, fault):
    (images, labels), evaluator = real, quick_evaluator()
    worse = [measure(evaluator, fault(images, amount), labels) for amount in (0.0, 0.15, 0.4)]
    distances = [found["fd"] for found in worse]
    precisions = [found["precision"] for found in worse]
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]
    assert precisions[2] < precisions[0]
    if fault is noisy:
        black = [found["pixels"]["black"] for found in worse]
        assert max(black[1:]) < 0.6 < black[0]


def test_wrong_labels_lower_agreement_by_their_fraction_and_nothing_else(real):
    (images, labels), evaluator = real, quick_evaluator()
    found = []
    for fraction in (0.0, 0.2, 0.5):
        wrong = labels.clone()
        wrong[: int(fraction * COUNT)] = (labels[: int(fraction * COUNT)] + 1) % 10
        found.append(measure(evaluator, images, wrong))
    agreement = [each["agreement"] for each in found]
    assert agreement[0] - agreement[1] == pytest.approx(0.2, abs=0.02)
    assert agreement[0] - agreement[2] == pytest.approx(0.5, abs=0.03)
    assert len({each["fd"] for each in found}) == 1


class ClassMeans:
    """A classifier that is trained in no time: the digit whose mean image is nearest."""

    def __init__(self, images, labels, **_):
        self.means = torch.stack([self(images[labels == digit]).mean(dim=0) for digit in range(10)])

    def __call__(self, images):
        return images.float().flatten(1)

    def classify(self, features):
        return -torch.cdist(features, self.means)


def test_training_on_samples_is_compared_with_training_on_real_images(evaluator, real, monkeypatch):
    trained_on = []

    def recorded_fit(images, labels, **options):
        trained_on.append(len(images))
        return ClassMeans(images, labels)

    monkeypatch.setattr(classifier, "fit", recorded_fit)
    images, labels = real
    as_good = evaluator.accuracy_score(images, labels)
    assert len(as_good["synthetic"]) == len(as_good["real"]) == 3
    assert min(as_good["real"]) > 0.7
    assert as_good["gap"] == pytest.approx(0, abs=0.05)
    assert trained_on == [COUNT] * 6  # as many real images as samples
    wrong = evaluator.accuracy_score(images, (labels + 1) % 10)
    assert wrong["real"] == as_good["real"]
    assert wrong["gap"] > 0.6


def test_copies_of_training_images_are_found_and_shown_in_pairs(evaluator):
    fresh = evaluator.test_images[:COUNT].clone()
    honest = measure(evaluator, fresh)["copies"]
    fresh[:15] = evaluator.train_images[500:515]
    fresh[10:15, 0, 14, 14] ^= 32  # almost copies
    result, pairs = evaluator.measure(fresh, None)
    assert result["samples"]["copies"] >= 15 > honest
    assert pairs.shape == (20, 1, 28, 28)
    assert torch.equal(pairs[::2], pairs[1::2])  # the copies are closest of all
    assert torch.equal(pairs[::2].sort(dim=0).values, fresh[:10].sort(dim=0).values)


def test_too_few_images_are_an_error(evaluator, real):
    with pytest.raises(ValueError, match=r"127 images: .* at least 128"):
        evaluator.measure(real[0][:127], None)


def test_more_images_than_there_are_real_ones_to_compare_are_refused(evaluator, real, monkeypatch):
    monkeypatch.setattr(evaluator, "test_images", evaluator.test_images[:300])
    with pytest.raises(ValueError, match="500 images: measure at most 300, as there are 300 test"):
        evaluator.measure(*real)


def test_other_digits_in_mnists_format_have_a_classifier_of_their_own(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 150), ("t10k", 200)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        head = struct.pack(">4I", 0x0803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        head = struct.pack(">2I", 0x0801, count)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    asked = []

    def own_classifier(cfg, train, test):
        asked.append((len(train[0]), len(test[0])))
        return classifier.PATH

    monkeypatch.setattr(classifier, "own_classifier", own_classifier)
    cfg = Config(data_dir=str(tmp_path))
    own = Evaluator(cfg, torch.device("cpu"))
    assert asked == [(150, 200)]
    assert own.real_count == 150  # more samples could not be compared with as many
    before = own.identity(10_000)["test_sha256"]
    changed = bytearray((raw / "t10k-images-idx3-ubyte").read_bytes())
    changed[-1] ^= 1
    (raw / "t10k-images-idx3-ubyte").write_bytes(changed)
    assert Evaluator(cfg, torch.device("cpu")).identity(10_000)["test_sha256"] != before


def test_what_a_result_depends_on(evaluator):
    assert list(evaluator.identity(10_000)) == list(evaluator.identity(5000)) == ["evaluator"]
    assert evaluator.identity(4999)["recipe"] == 2  # which older results of few images lack
