"""The results of evaluate.py: JSON files, reused while nothing has changed, and tables of them."""

import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import LoadedModel
from config import Config
from evaluation.metrics import GREY_EDGES
from system.files import atomic_write, free_path
from system.machine import pick_precision

Result = dict[str, Any]
JUDGED_BY = ("evaluator", "test_sha256")  # what else a result depends on

# The rows of the table: each shows a metric of the samples and the same of real test images
ROWS = (
    ("FD-MNIST", lambda m: "{:.4f} ({:.4f} to {:.4f})".format(m["fd"], *m["fd_interval"])),
    ("FD over the floor", lambda m: f"{m['fd_over_floor']:.2f}"),
    ("KID x 1000", lambda m: f"{1000 * m['kid']:.3f} ± {1000 * m['kid_std']:.3f}"),
    ("precision", lambda m: f"{m['precision']:.3f}"),
    ("recall", lambda m: f"{m['recall']:.3f}"),
    ("black pixels", lambda m: f"{m['pixels']['black']:.2%}"),
    ("pixel mean, std", lambda m: "{mean:.1f}, {std:.1f}".format(**m["pixels"])),
    *(
        (f"pixels {low} to {high - 1}", lambda m, i=i: f"{m['pixels']['histogram'][i]:.2%}")
        for i, (low, high) in enumerate(itertools.pairwise(GREY_EDGES))
    ),
    ("nearest training image", lambda m: f"{m['nearest_median']:.2f} (median distance)"),
    ("nearer to training images than every test image", lambda m: f"{m['copies']}"),
)

MOST_LABELS = 20  # that have a row each

SWEEP_ROW = (
    "{sampler} {steps} {guidance:g} {guidance_low:g} {guidance_high:g} {eta:g} {seed} {calls} "
    "{fd:.4f} {fd_over_floor:.2f} {agreement:.2%} {precision:.3f} {recall:.3f} "
    "{images_per_second:.0f}"
)


def label_rows(names: list[str]) -> Iterator[tuple[str, Callable[[Result], str]]]:
    """The rows on how labels were read: each label by itself unless there are many."""
    yield "label agreement", lambda m: f"{m['agreement']:.2%}"
    digits = list(map(str, range(len(names))))
    for i, name in enumerate(names[:MOST_LABELS]):
        title = f"  digit {name}" if names == digits else f"  {name}"
        yield title, lambda m, i=i: "" if (x := m["by_digit"][i]) is None else f"{x:.2%}"
    confusion = "{} as {}: {}".format
    yield (
        "  confusions",
        lambda m: ", ".join(confusion(names[a], names[b], n) for a, b, n in m["confusions"]),
    )


def table(result: Result) -> str:
    """A result as a person reads it."""
    samples, real = result["samples"], {"fd_over_floor": 1, "copies": 0, **result["real"]}
    names = result.get("label_names", list("0123456789"))  # older results are of MNIST
    rows = [("", "samples", "real test images")]
    for name, show in (*ROWS, *(label_rows(names) if "agreement" in samples else ())):
        title = name.replace("MNIST", result.get("dataset", "MNIST"))
        rows.append((title, show(samples), show(real)))
    if "cas" in result:
        accuracy = [f"{np.mean(result['cas'][kind]):.2%}" for kind in ("synthetic", "real")]
        rows.append(("CAS: accuracy on test images", *accuracy))
    for view, found in result.get("c2st", {}).items():
        shown = [f"{np.mean(a):.2%} ± {np.std(a, ddof=1):.2%}" for a in found.values()]
        rows.append((f"C2ST, {view} pixels", shown[0], f"{shown[1]} (training images)"))
    if "sampling" in result:
        cost = result["sampling"]
        calls = f"{cost['calls']} network calls an image, {cost['seconds']:.1f} s"
        rows.append(("sampling", f"{cost['images_per_second']:.0f} images/s", calls))
    title = f"{result['images']:,} images of {result['source']}"
    return f"{title}, evaluator {result['evaluator'][:12]}\n{aligned(rows)}"


def sweep_table(results: list[Result]) -> str:
    """A line for each result of a sweep; the best ones have an asterisk."""
    head = "sampler steps guidance from to eta seed calls FD FD/floor agreement precision recall"
    rows = [("", *head.split(), "images/s")]
    for result, is_best in zip(results, pareto_best(results), strict=True):
        line = settings_used(result) | result["samples"] | result["sampling"]
        mark = "*" if is_best else ""
        rows.append((mark, *SWEEP_ROW.format(**line).split()))
    return aligned(rows) + "\n* no other row reaches a lower FD with as few network calls"


def settings_used(result: Result) -> Result:
    """The settings of a result, with the eta that its sampler has: ddpm's is always 1."""
    settings = result["settings"]
    return settings | ({"eta": 1} if settings["sampler"] == "ddpm" else {})


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def pareto_best(results: list[Result]) -> list[bool]:
    """For each result, whether none is better in FD or network calls and no worse in the other."""
    points = [(r["sampling"]["calls"], r["samples"]["fd"]) for r in results]
    return [
        not any((c <= calls and f < fd) or (c < calls and f <= fd) for c, f in points)
        for calls, fd in points
    ]


def result_file(loaded: LoadedModel, cfg: Config, count: int) -> Path:
    """Where the result of `count` images drawn by a model with these settings is kept."""
    name = (
        f"{loaded.path.stem}-{loaded.sha256[:8]}-{cfg.sampler}-{cfg.steps}-w{cfg.guidance:g}"
        f"-from{cfg.guidance_low:g}to{cfg.guidance_high:g}-eta{cfg.eta:g}-n{count}-s{cfg.seed}"
        f"-{pick_precision(cfg.precision, loaded.device)}"
    )
    name += ("" if cfg.clip_x_0 else "-unclipped") + ("" if cfg.match_levels else "-unmatched")
    return Path(cfg.output_dir, "metrics", f"{name}.json")


def read_result(file: Path, identity: Result) -> Result | None:
    """A result that was written before; None if there is none with all entries of `identity` and
    all metrics of the table. Raises ValueError if the file is damaged."""
    if not file.exists():
        return None
    try:
        known = dict(json.loads(file.read_text("utf-8")))
    except PermissionError:
        raise ValueError(f"{file}: cannot be read; change its permissions") from None
    except Exception:  # it may have been edited, or nest deeper than Python can follow
        raise ValueError(f"{file}: damaged; delete it") from None
    try:
        table(known)
        if "model" in identity:
            sweep_table([known])
    except Exception:  # figures of an older version, or edited ones
        return None
    return known if all(known.get(k) == v for k, v in identity.items()) else None


def write_result(file: Path, result: Result) -> None:
    """Write a result, with the versions and the machine that made it."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    versions |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    result["made_by"] = versions | {"machine": machine}
    file.parent.mkdir(parents=True, exist_ok=True)
    _keep_other(file, result)
    with atomic_write(file) as opened:
        opened.write(json.dumps(result, indent=1).encode())


def _keep_other(file: Path, result: Result) -> None:
    """Copy an earlier result that `result` should not replace: another evaluator or other test
    images gave it, or it has costly figures that `result` lacks."""
    if not file.exists():
        return
    known: Result = {}
    with suppress(Exception):  # it may have been edited
        known = dict(json.loads(file.read_text("utf-8")))
    compared, here = ([str(x.get(k, "")) for k in JUDGED_BY] for x in (known, result))
    if compared != here or any(k in known and k not in result for k in ("cas", "c2st")):
        by = "-".join(value[:8] for value in compared if value)
        kept = free_path(file.with_name(f"{file.stem[:200]}-by-{by or 'unknown'}.json"))
        shutil.copy2(file, kept)
        tqdm.write(f"an earlier result is kept in {kept}")
