"""Figures that compare sets of images, each a pure function of features or pixels."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 200  # of the bootstrap behind an interval
GREY_EDGES = (0, 1, 64, 128, 192, 255, 256)  # of the histogram; exact black and white apart


def moments(features: Tensor) -> dict[str, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    x = features.double().cpu().numpy()
    return {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}


def frechet_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """|mean difference|² + trace(C_a + C_b - 2 (C_a C_b)^½), Dowson & Landau 1982."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric  # not on import: it is slow

    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def frechet_figures(features: Tensor, reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """FD to the training split, with a 95 % interval by bootstrap over the images, centred on the
    figure itself because resampling alone pushes it up."""
    generator = torch.Generator().manual_seed(0)
    fd = frechet_distance(moments(features), reference)
    again = []
    for _ in range(RESAMPLES):
        chosen = torch.randint(len(features), (len(features),), generator=generator)
        again.append(frechet_distance(moments(features.cpu()[chosen]), reference))
    low, high = np.quantile(again, [0.025, 0.975]) - np.mean(again)
    return {"fd": fd, "fd_interval": [fd + low, fd + high]}


def feature_figures(features: Tensor, real: Tensor) -> dict[str, float]:
    """KID (Binkowski et al. 2018), precision and recall (Kynkaanniemi et al. 2019, k = 3) of
    features against as many of real images, both (N, 128)."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    features, real = features.cpu(), real.cpu()
    subset = min(1000, len(features))
    kid = kid_features_to_metric(features, real, kid_subset_size=subset, verbose=False)
    prc = prc_features_to_metric(
        features, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return {
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }


def pixel_figures(images: Tensor) -> dict[str, Any]:
    """Share of exactly black pixels, mean and standard deviation (of 0…255), and the share of
    pixels from each of GREY_EDGES up to the next."""
    counts = torch.bincount(images.flatten().int(), minlength=256).cpu().double() / images.numel()
    grey = torch.arange(256, dtype=torch.float64)
    mean = (counts * grey).sum()
    histogram = [counts[a:b].sum().item() for a, b in itertools.pairwise(GREY_EDGES)]
    std = (counts * (grey - mean) ** 2).sum().sqrt()
    return {
        "black": counts[0].item(), "mean": mean.item(), "std": std.item(), "histogram": histogram
    }  # fmt: skip


def nearest(images: Tensor, others: Tensor, batch_size: int = 200) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,), grey levels 0…1, from each image to the nearest of `others`, and
    which it is (N,)."""
    b = others.flatten(1).float().div_(255)  # 188 MB of MNIST: no second copy
    b_squared, which = torch.linalg.vector_norm(b, dim=1).square(), []
    for part in images.split(batch_size):
        a = part.flatten(1).float() / 255
        which.append(torch.addmm(b_squared, a, b.T, alpha=-2).argmin(dim=1))
    index = torch.cat(which)
    # |a|² - 2ab + |b|² cancels badly for near copies: measure the winners again, directly
    gap = images.flatten(1).float() / 255 - others[index].flatten(1).float() / 255
    return gap.square().sum(dim=1).sqrt(), index


def agreement_figures(answers: Tensor, labels: Tensor) -> dict[str, Any]:
    """Share of images read as their label, in all and by digit, and the worst confusions."""
    table = torch.bincount(labels * 10 + answers, minlength=100).view(10, 10)
    wrong = table.clone().fill_diagonal_(0).flatten()
    worst = [divmod(int(i), 10) for i in wrong.argsort(descending=True, stable=True)[:3]]
    return {
        "agreement": (answers == labels).float().mean().item(),
        "by_digit": (table.diagonal() / table.sum(dim=1).clamp(min=1)).tolist(),
        "confusions": [[a, b, int(table[a, b])] for a, b in worst if table[a, b] > 0],
    }
