"""The plots: training curves, and quality against network calls."""

import gc
import itertools
import math
import os
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # plots go to files; a notebook's backend may be missing here

# isort: split
from matplotlib.figure import Figure  # not pyplot, which wants a display and keeps every figure
from matplotlib.ticker import LogLocator

from evaluation.results import settings_used
from system.files import atomic_write

gc.freeze()  # modules stay: `save` need not search them, which takes a hundred times as long


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Earlier figures are full of cycles, which left to themselves take 40 MB in a long run
    gc.collect()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def plot_training(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, learning rate and images per second of metrics.csv over the optimizer steps."""
    steps = [int(row["step"]) for row in rows]
    figure = Figure(figsize=(12, 3.2))
    # Margins of a layout engine would look the same, and need half the time of the whole plot
    margins = {"left": 0.055, "right": 0.98, "bottom": 0.15, "top": 0.9, "wspace": 0.22}
    panels = figure.subplots(1, 3, gridspec_kw=margins)
    for axes, name in zip(panels, ("loss", "learning_rate", "images_per_second"), strict=True):
        axes.plot(steps, [float(row[name]) for row in rows], marker=".", label="training")
        unseen = [float(row.get("validation_loss") or "nan") for row in rows]
        if name == "loss" and not all(map(math.isnan, unseen)):
            axes.plot(steps, unseen, marker=".", label="validation")
            axes.legend()
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.locator_params("x", nbins=6)
    save(figure, path)


def plot_sweep(results: list[dict[str, Any]], best: list[bool], path: Path) -> None:
    """Plot quality against network calls, a line for each choice of the other settings."""
    figure = Figure(figsize=(7, 4.5))
    margins = {"left": 0.13, "right": 0.98, "bottom": 0.11, "top": 0.98}
    axes = figure.subplots(gridspec_kw=margins)
    lines: dict[str, list[tuple[int, float]]] = {}
    data_set = results[0].get("dataset", "MNIST")
    points = [(result["sampling"]["calls"], result["samples"]["fd"]) for result in results]
    for result, point in zip(results, points, strict=True):
        label = (
            "{sampler}, eta {eta:g}, guidance {guidance:g} ({guidance_low:g} to {guidance_high:g}),"
            " seed {seed}"
        )
        lines.setdefault(label.format(**settings_used(result)), []).append(point)
    for label, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", label=label)
    calls, fd = zip(*itertools.compress(points, best), strict=True)
    axes.scatter(calls, fd, s=140, facecolors="none", edgecolors="black", label="best")
    axes.axhline(results[0]["real"]["fd"], linestyle="--", color="grey", label="real test images")
    axes.set(xlabel="network calls per image", ylabel=f"FD-{data_set}", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend(fontsize=8)
    save(figure, path)
