"""The committed classifier, and how one is trained, written and read."""

import numpy as np
import pytest
import torch
from conftest import MNIST, assert_same

from config import Config
from data import fingerprint, load_split
from evaluation import classifier
from evaluation.metrics import moments

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def committed() -> tuple[classifier.Classifier, dict[str, np.ndarray], str]:
    return classifier.load(CPU)


@pytest.fixture(scope="module")
def some_real() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 2000 training images and their labels."""
    return load_split(Config(data_dir=MNIST, max_images=2000), True, CPU)


def test_the_committed_classifier_reads_the_test_split(committed):
    images, labels = load_split(Config(data_dir=MNIST), False, CPU)
    assert classifier.accuracy(committed[0], images, labels) >= 0.996
    assert classifier.PATH.stat().st_size <= 2 * 2**20
    assert len(committed[2]) == 64


def test_the_committed_reference_is_the_training_split(committed, some_real):
    net, reference, _ = committed
    features = classifier.features_of(net, some_real[0])
    mean, spread = reference["mu"], np.sqrt(np.diag(reference["sigma"]))
    assert (np.abs(features.mean(dim=0).numpy() - mean) < 6 * spread / 2000**0.5 + 1e-6).all()


def test_accuracy_is_the_fraction_of_images_read_as_their_label(committed, some_real):
    images, labels = (each[:200] for each in some_real)
    answers = committed[0].classify(classifier.features_of(committed[0], images)).argmax(dim=1)
    labels = torch.where(torch.arange(200) < 150, answers, (answers + 1) % 10)
    assert classifier.accuracy(committed[0], images, labels) == pytest.approx(0.75)


def test_training_a_classifier_is_deterministic(some_real, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    images, labels = (each[:512] for each in some_real)
    first, again, other = (
        dict(classifier.fit(images, labels, seed=seed).named_parameters()) for seed in (3, 3, 4)
    )
    assert_same(first, again)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_classifier_is_trained_on_the_complete_split_written_and_read_again(
    some_real, tmp_path, monkeypatch
):
    images, labels = (each[:256] for each in some_real)
    asked = []

    def small_split(cfg, train, device):
        asked.append((cfg.img_size, cfg.max_images, train))
        return images, labels

    monkeypatch.setattr(classifier, "load_split", small_split)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    path = tmp_path / "new" / "evaluator.pth"
    with pytest.raises(ValueError, match="data_dir = 'digits': is not MNIST"):
        classifier.train_and_save(Config(data_dir="digits"), path)
    assert not path.exists()
    asked.clear()
    monkeypatch.setattr(classifier, "MNIST_SHA256", fingerprint(images, labels)["sha256"])
    accuracy = classifier.train_and_save(Config(img_size=32, max_images=5), path)
    assert asked == [(28, 0, True), (28, 0, False)]
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    net, reference, sha256 = classifier.load(CPU, path)
    assert len(sha256) == 64
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert classifier.accuracy(net, images, labels) == accuracy
    expected = moments(classifier.features_of(net, images))
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(reference[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "no evaluator; make it: python evaluate.py --train_evaluator"),
        ("text", "damaged, or not an evaluator .*; delete it"),
        ("other weights", "not an evaluator; delete it"),
    ],
)
def test_a_file_that_is_no_classifier_is_named(tmp_path, damage, words):
    path = tmp_path / "evaluator.pth"
    if damage == "text":
        path.write_text("hello")
    elif damage == "other weights":
        torch.save({"net": {"head.weight": torch.zeros(3)}, "train_moments": {}}, path)
    with pytest.raises(ValueError, match=rf"evaluator\.pth: .*{words}") as error:
        classifier.load(CPU, path)
    assert len(str(error.value).splitlines()) == 1
