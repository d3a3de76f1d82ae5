"""Random numbers that depend on a key alone."""

import pytest
import torch

from interface.requests import MNIST_COUNTS
from system.randomness import ImageNoise, draw_labels, seeded_generator


def test_the_noise_of_an_image_depends_on_its_number_and_the_seed_alone():
    noise = ImageNoise(7, range(5), (2, 3))
    first, second = noise.draw(), noise.draw()
    assert first.shape == (5, 2, 3)
    assert not torch.equal(first, second)
    last_two = ImageNoise(7, range(3, 5), (2, 3), dtype=torch.float64)
    for expected in (first, second):
        drawn = last_two.draw()
        assert drawn.dtype == torch.float64
        assert torch.equal(drawn.float(), expected[3:])


def test_a_stream_depends_on_its_whole_key():
    def numbers(*key):
        return torch.randn(4, generator=seeded_generator(*key))

    assert torch.equal(numbers(1, 2), numbers(1, 2))
    for key in ((2, 1), (1,), (1, 2, 0), (1, 3)):
        assert not torch.equal(numbers(*key), numbers(1, 2))
    with pytest.raises(ValueError, match="negative"):
        seeded_generator(-1)


@pytest.mark.parametrize("count", [1, 10, 999, 10_000, 60_000])
def test_labels_have_exactly_mnists_proportions(count):
    labels = draw_labels(count, 0, MNIST_COUNTS)
    assert labels.dtype == torch.int64
    assert len(labels) == count
    expected = torch.tensor(MNIST_COUNTS) * count / 60_000
    assert (labels.bincount(minlength=10) - expected).abs().max() < 1


def test_a_single_label_can_be_any_digit_as_often_as_in_mnist():
    labels = [draw_labels(1, seed, MNIST_COUNTS) for seed in range(2000)]
    drawn = torch.cat(labels).bincount(minlength=10)
    expected = torch.tensor(MNIST_COUNTS) * 2000 / 60_000
    assert ((drawn - expected).abs() / expected.sqrt()).max() < 4  # standard deviations


def test_the_order_of_the_labels_depends_on_the_seed():
    labels = draw_labels(60_000, 0, MNIST_COUNTS)
    assert labels[:100].unique().numel() == 10
    assert torch.equal(draw_labels(60_000, 0, MNIST_COUNTS), labels)
    assert not torch.equal(draw_labels(60_000, 1, MNIST_COUNTS), labels)
