"""Metrics that compare sets of images: pure functions of features, labels or pixels."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 200  # of the bootstrap for an interval
GREY_EDGES = (0, 1, 64, 128, 192, 255, 256)  # of the histogram: black and white are separate


def moments(features: Tensor) -> dict[str, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64."""
    x = features.cpu().double().numpy()  # in this order: Apple's MPS has no float64
    return {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}


def frechet_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """|mean difference|² + trace(C_a + C_b - 2 (C_a C_b)^½), Dowson & Landau 1982."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric  # slow to import

    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def frechet_metrics(features: Tensor, reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """Fréchet distance of features (N, D) to the reference, with a 95 % bootstrap interval. The
    interval is corrected for bias, because resampling alone increases the distance."""
    generator, features = torch.Generator().manual_seed(0), features.cpu()
    fd = frechet_distance(moments(features), reference)
    again = []
    for _ in range(RESAMPLES):
        chosen = torch.randint(len(features), (len(features),), generator=generator)
        again.append(frechet_distance(moments(features[chosen]), reference))
    low, high = np.quantile(again, [0.025, 0.975]) - np.mean(again)
    return {"fd": fd, "fd_interval": [fd + low, fd + high]}


def feature_metrics(features: Tensor, real: Tensor) -> dict[str, float]:
    """KID (Bińkowski et al. 2018), precision and recall (Kynkäänniemi et al. 2019, k = 3) of
    features against those of as many real images, both (N, D)."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    features, real = features.cpu(), real.cpu()
    subset = min(1000, min(len(features), len(real)) // 2)  # subsets of all would have no spread
    kid = kid_features_to_metric(features, real, kid_subset_size=subset, verbose=False)
    prc = prc_features_to_metric(
        features, real, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    mean, std = (kid[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return {"kid": mean, "kid_std": std, "precision": prc["precision"], "recall": prc["recall"]}


def pixel_metrics(images: Tensor) -> dict[str, Any]:
    """Of uint8 images (N, C, H, W): the fraction of exactly black pixels, the mean and standard
    deviation in grey levels, and the fraction of pixels between neighbouring GREY_EDGES."""
    shares = torch.bincount(images.flatten().int(), minlength=256).cpu().double() / images.numel()
    grey = torch.arange(256, dtype=torch.float64)
    mean = (shares * grey).sum()
    histogram = [shares[a:b].sum().item() for a, b in itertools.pairwise(GREY_EDGES)]
    std = (shares * (grey - mean) ** 2).sum().sqrt()
    black = shares[0].item()
    return {"black": black, "mean": mean.item(), "std": std.item(), "histogram": histogram}


def nearest(images: Tensor, others: Tensor, batch_size: int = 200) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,), in grey levels of 0…1, from each image to the nearest of `others`,
    and the index of that one (N,)."""
    b = others.flatten(1).float().div_(255)  # in place, because MNIST takes 188 MB
    b_squared, found = torch.linalg.vector_norm(b, dim=1).square(), []
    for part in images.split(batch_size):
        a = part.flatten(1).float() / 255
        found.append(torch.addmm(b_squared, a, b.T, alpha=-2).argmin(dim=1))
    index = torch.cat(found)
    # |a|² - 2ab + |b|² is inexact for near copies, so the nearest are measured again directly
    gap = images.flatten(1).float() / 255 - others[index].flatten(1).float() / 255
    return gap.square().sum(dim=1).sqrt(), index


def agreement_metrics(answers: Tensor, labels: Tensor, classes: int = 10) -> dict[str, Any]:
    """Fraction of images read as their label, overall and by label (None for one that was not
    drawn), and the worst confusions."""
    table = torch.bincount(labels * classes + answers, minlength=classes**2).view(classes, classes)
    drawn = zip(table.diagonal().tolist(), table.sum(dim=1).tolist(), strict=True)
    wrong = table.clone().fill_diagonal_(0).flatten()
    worst = [divmod(int(i), classes) for i in wrong.argsort(descending=True, stable=True)[:3]]
    return {
        "agreement": (answers == labels).float().mean().item(),
        "by_digit": [right / count if count else None for right, count in drawn],
        "confusions": [[a, b, int(table[a, b])] for a, b in worst if wrong[a * classes + b] > 0],
    }
