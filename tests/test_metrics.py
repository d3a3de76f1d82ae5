"""The metrics against closed forms, independent computations and planted faults."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation.metrics import (
    agreement_metrics,
    feature_metrics,
    frechet_distance,
    frechet_metrics,
    moments,
    nearest,
    pixel_metrics,
)


def gaussian(mean: float, std: float, count: int = 4000, size: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, size, generator=generator)


def test_the_distance_of_a_set_to_itself_is_zero():
    x = gaussian(1, 2)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_two_gaussians_is_their_closed_form():
    """For spherical Gaussians: D (m_1 - m_2)² + D (s_1 - s_2)²."""
    sigma = np.eye(12)
    a = {"mu": np.full(12, 0.5), "sigma": 4 * sigma}
    b = {"mu": np.full(12, -1.0), "sigma": 0.25 * sigma}
    assert frechet_distance(a, b) == pytest.approx(12 * (1.5**2 + 1.5**2))
    drawn = frechet_distance(moments(gaussian(0.5, 2)), moments(gaussian(-1, 0.5, seed=1)))
    assert drawn == pytest.approx(12 * (1.5**2 + 1.5**2), rel=0.03)


def test_the_distance_against_scipys_matrix_square_root():
    generator = torch.Generator().manual_seed(0)
    mix_a, mix_b = torch.randn(2, 12, 12, generator=generator)
    a, b = moments(gaussian(0, 1) @ mix_a), moments(gaussian(0.3, 1, seed=1) @ mix_b)
    root = scipy.linalg.sqrtm(a["sigma"] @ b["sigma"]).real
    gap = a["mu"] - b["mu"]
    expected = gap @ gap + np.trace(a["sigma"] + b["sigma"] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_the_interval_contains_the_distance_and_narrows_with_more_images():
    reference = moments(gaussian(0, 1, count=20_000, seed=9))
    widths = []
    for count in (500, 4000):
        found = frechet_metrics(gaussian(0.3, 1, count=count), reference)
        low, high = found["fd_interval"]
        assert low < found["fd"] < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_precision_and_recall_distinguish_two_faults():
    real = gaussian(0, 1, count=500)
    same = feature_metrics(gaussian(0, 1, count=500, seed=1), real)
    narrow = feature_metrics(gaussian(0, 0.5, count=500, seed=1), real)
    far = feature_metrics(gaussian(6, 1, count=500, seed=1), real)
    assert narrow["precision"] > same["precision"]
    assert narrow["recall"] < 0.5 * same["recall"]
    assert far["precision"] == far["recall"] == 0
    assert abs(same["kid"]) < 0.01 < narrow["kid"] < far["kid"]


@pytest.mark.parametrize("count", [400, 1000])
def test_the_spread_of_kid_is_not_that_of_one_subset(count):
    a, b = (gaussian(0, 1, count=count, seed=seed) for seed in (1, 2))
    assert feature_metrics(a, b)["kid_std"] > 1e-5


def test_pixel_metrics_by_hand():
    images = torch.tensor([0, 0, 10, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    found = pixel_metrics(images)
    assert found["black"] == 0.5
    assert found["mean"] == 66.25
    assert found["std"] == pytest.approx(np.std([0, 0, 10, 255]))
    assert found["histogram"] == [0.5, 0.25, 0, 0, 0, 0.25]


def test_nearest_against_every_pair():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (7, 1, 5, 5), generator=generator, dtype=torch.uint8)
    b = torch.randint(0, 256, (30, 1, 5, 5), generator=generator, dtype=torch.uint8)
    b[11] = a[3]
    pairs = torch.cdist(a.flatten(1).double() / 255, b.flatten(1).double() / 255)
    distances, index = nearest(a, b, batch_size=4)
    torch.testing.assert_close(distances.double(), pairs.min(dim=1).values, rtol=0, atol=1e-5)
    assert torch.equal(index, pairs.argmin(dim=1))
    assert distances[3] == 0


def test_agreement_by_hand():
    labels = torch.tensor([3, 3, 3, 3, 8, 8, 1])
    answers = torch.tensor([3, 5, 5, 8, 8, 8, 1])
    found = agreement_metrics(answers, labels)
    assert found["agreement"] == pytest.approx(4 / 7)
    assert found["by_digit"][3] == 0.25
    assert found["by_digit"][8] == found["by_digit"][1] == 1
    assert found["confusions"] == [[3, 5, 2], [3, 8, 1]]


def test_a_digit_that_was_not_drawn_has_no_agreement():
    found = agreement_metrics(torch.tensor([7, 1]), torch.tensor([7, 7]))
    assert found["by_digit"] == [None] * 7 + [0.5, None, None]


def test_few_real_images_are_compared_in_small_subsets():
    features = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert feature_metrics(features, features[:200])["precision"] == pytest.approx(1, abs=0.1)


def test_without_mistakes_there_are_no_confusions():
    labels = torch.arange(3).repeat(5)
    assert agreement_metrics(labels, labels, classes=3)["confusions"] == []


def test_the_interval_is_as_wide_as_other_draws_are_spread():
    reference = moments(gaussian(0, 1, count=20_000, seed=9))
    others = [gaussian(0.3, 1, count=500, seed=seed) for seed in range(40)]
    spread = np.std([frechet_distance(moments(each), reference) for each in others])
    found = frechet_metrics(gaussian(0.3, 1, count=500), reference)
    low, high = found["fd_interval"]
    assert low < found["fd"] < high
    assert 2.8 < (high - low) / spread < 5.2  # 3.9 for 95 % of a normal distribution


def test_the_interval_is_around_the_distance_where_few_images_bias_it():
    reference = moments(gaussian(0, 1, count=20_000, size=40, seed=9))
    found = frechet_metrics(gaussian(0, 1, count=150, size=40), reference)
    assert found["fd_interval"][0] < found["fd"] < found["fd_interval"][1]


def test_precision_and_recall_reach_to_the_third_neighbour():
    real, drawn = gaussian(0, 1, count=300, size=4), gaussian(0.5, 0.8, count=300, size=4, seed=1)

    def covered(a: torch.Tensor, b: torch.Tensor) -> float:
        radius = torch.cdist(b, b).kthvalue(4, dim=1).values  # the first is itself
        return float((torch.cdist(a, b) <= radius).any(dim=1).float().mean())

    found = feature_metrics(drawn, real)
    assert found["precision"] == pytest.approx(covered(drawn, real), abs=0.004)
    assert found["recall"] == pytest.approx(covered(real, drawn), abs=0.004)


def test_far_sets_have_a_kid_that_hardly_varies():
    far = feature_metrics(gaussian(6, 1, count=500, seed=1), gaussian(0, 1, count=500))
    assert 0 < far["kid_std"] < 0.1 * far["kid"]


def test_the_three_most_frequent_confusions_come_first():
    answers = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 3, 4])
    found = agreement_metrics(answers, torch.zeros(10, dtype=torch.long))
    assert found["confusions"] == [[0, 1, 4], [0, 2, 3], [0, 3, 2]]


def test_grey_bands_include_their_first_level():
    levels = torch.tensor([0, 1, 63, 64, 127, 128, 191, 192, 254, 255], dtype=torch.uint8)
    found = pixel_metrics(levels.view(10, 1, 1, 1))["histogram"]
    assert found == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
