"""The classifier two-sample test, on real images and on ones with known faults."""

import pytest
import torch
from conftest import MNIST

from config import Config
from data import load_split
from evaluation.two_sample import VIEWS, coarse, two_sample_test
from system.randomness import seeded_generator

COUNT = 800


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("evaluation.two_sample.LEAST_STEPS", 90)


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, and test images to tell them from."""
    chosen = torch.randperm(10_000, generator=seeded_generator(0))[:COUNT]
    cfg, cpu = Config(data_dir=MNIST), torch.device("cpu")
    train, test = (load_split(cfg, train=kind, device=cpu)[0][chosen] for kind in (True, False))
    return train[..., 4:24, 4:24], test[..., 4:24, 4:24]  # where the digits are, in half the time


def accuracy(view: str, samples: torch.Tensor, real: torch.Tensor) -> float:
    return two_sample_test(VIEWS[view](samples), VIEWS[view](real), seed=1)[0]


def test_what_each_view_shows():
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    images[0, 0, 1, 1], images[0, 0, 3, 3] = 255, 4
    assert VIEWS["exact"](images) is images
    assert coarse(images).shape == (1, 1, 3, 3)
    assert coarse(images)[0, 0].tolist() == [[60, 60, 0], [60, 60, 0], [0, 0, 0]]
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 2, 2)
    assert len(coarse(levels).unique()) == 17


def test_images_of_one_kind_cannot_be_told_apart(real):
    assert accuracy("exact", *real) == pytest.approx(0.5, abs=0.07)  # coarse: see below


def test_a_fault_that_an_eye_sees_is_seen_in_both_views(real):
    train, test = real
    thin = torch.where(train > 127, train, 0)  # no soft edges
    for view in VIEWS:
        assert accuracy(view, thin, test) > 0.95


def test_two_grey_levels_are_told_apart_by_exact_pixels_only(real):
    train, test = real
    white = torch.where(train > 250, 255, train)
    assert accuracy("exact", white, test) > 0.9
    assert accuracy("coarse", white, test) == pytest.approx(0.5, abs=0.07)


def test_the_surest_cases_are_those_with_the_fault(real):
    train, test = real
    mixed = train.clone()
    mixed[::2] = torch.where(train[::2] > 127, train[::2], 0)
    _, logits = two_sample_test(VIEWS["exact"](mixed), VIEWS["exact"](test), seed=1)
    assert logits.isfinite().sum() == COUNT // 2  # the half that was held out
    assert (logits.argsort()[:40] % 2 == 0).all()


def test_the_test_depends_on_its_seed_alone(real, monkeypatch):
    monkeypatch.setattr("evaluation.two_sample.EPOCHS", 2)
    monkeypatch.setattr("evaluation.two_sample.LEAST_STEPS", 0)
    train, test = (VIEWS["exact"](part[:300]) for part in real)
    first, again, other = (two_sample_test(train, test, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
