"""The plots: training curves, quality against network calls and against minutes of training."""

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, and no screen needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from data import written_whole

# Training images a second of other MNIST scripts, measured on two such cores as README names
PEERS = {
    "best-known conditional script": 12,
    "lucidrains, conditional, dim 32": 24,
    "Hugging Face course": 35,
}


def plot_training(metrics: Path, path: Path) -> None:
    """Loss, learning rate and images a second over the optimizer steps of metrics.csv."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.2))
    for axes, name in zip(panels, ("loss", "learning_rate", "images_per_second"), strict=True):
        axes.plot(steps, [float(row[name]) for row in rows], marker=".")
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


def plot_sweep(results: list[dict[str, Any]], best: list[bool], path: Path) -> Path:
    """Quality against network calls, a line for each sampler and guidance."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        k = result["settings"]
        point = (result["sampling"]["calls"], result["samples"]["fd"])
        eta = f", eta {k['eta']:g}" if k["sampler"] != "ddpm" else ""
        where = f"{k['guidance_low']:g} to {k['guidance_high']:g}"
        label = f"{k['sampler']}{eta}, guidance {k['guidance']:g} ({where}), seed {k['seed']}"
        lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    chosen = [r for r, is_best in zip(results, best, strict=True) if is_best]
    axes.scatter([r["sampling"]["calls"] for r in chosen], [r["samples"]["fd"] for r in chosen],
                 s=140, facecolors="none", edgecolors="black", label="best")  # fmt: skip
    axes.axhline(results[0]["real"]["fd"], linestyle="--", color="grey", label="real test images")
    axes.set(xlabel="network calls an image", ylabel="FD-MNIST", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):  # 20, not 2 x 10^1
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
    return path


def plot_quality(results: list[dict[str, Any]], speed: float, path: Path) -> Path:
    """FD-MNIST against minutes of training, and `speed`, in training images a second, beside other
    scripts'. Raises ValueError for results that cannot be compared: of different numbers of images
    or by different judges."""
    if len({(r["images"], r["evaluator"]) for r in results}) != 1:
        raise ValueError("results of different numbers of images or judges; plot those alike")
    figure, (axes, bars) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    for result in results:
        low, high = result["samples"]["fd_interval"]
        fd, minutes = result["samples"]["fd"], result["training"]["minutes"]
        axes.errorbar(minutes, fd, [[fd - low], [high - fd]], fmt="o", capsize=3, color="C0")
    floor = results[0]["real"]["fd"]
    axes.axhline(floor, linestyle="--", color="grey", label="real test images")
    axes.set(xlabel="minutes of training", ylabel="FD-MNIST", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(fontsize=8)
    speeds = PEERS | {"this repo": speed}
    drawn = bars.barh(list(speeds), list(speeds.values()), color=["grey"] * len(PEERS) + ["C0"])
    bars.bar_label(drawn, fmt="{:.0f}", padding=3)
    bars.set(xscale="log", xlim=(1, 10 * speed), xlabel="training images a second")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
    return path
