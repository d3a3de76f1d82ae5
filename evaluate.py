"""Measure samples against MNIST: python evaluate.py judges the newest model. --help lists all."""

import itertools
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import evaluator
from config import SAMPLING, Config, Parser, add_flags, given_flags, run_script
from data import draw_labels, image_grid, load_split, read_npz, to_uint8, written_whole
from diffusion import Diffusion
from metrics import (
    GREY_EDGES,
    agreement_figures,
    feature_figures,
    frechet_figures,
    nearest,
    pixel_figures,
)
from model import pick_device
from plots import plot_quality, plot_sweep

MOST = 10_000  # images at most: as many as the test split has, which sets the floor
SWEPT = (*SAMPLING, "seed")
FLAGS = (*SWEPT, "data_dir", "output_dir", "device", "clip_x_0", "sample_batch_size")


class Judge:
    """The frozen classifier, and the real images that samples are held against."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        cfg = evaluator.as_published(cfg)
        self.net, self.train_moments, self.sha256 = evaluator.load(device)
        self.train_images, self.train_labels = load_split(cfg, train=True, device=device)
        self.test_images, self.test_labels = load_split(cfg, train=False, device=device)
        order = torch.randperm(len(self.train_images), generator=torch.Generator().manual_seed(0))
        some = self.train_images[order[:MOST].to(device)]
        self.some_train_features = evaluator.features_of(self.net, some)
        self._real: dict[int, dict[str, Any]] = {}  # figures of N real test images, once each

    def measure(
        self, images: Tensor, labels: Tensor | None, pairs: Path | None = None
    ) -> dict[str, Any]:
        """Every figure of uint8 images (N, 1, 28, 28) with int64 labels (N,), and under "real" the
        same of N real test images. Writes the ten images closest to a training image, each beside
        it, to `pairs`. Raises ValueError for fewer images than features."""
        N = len(images)
        if N < evaluator.FEATURES:
            raise ValueError(f"{N} images: at least {evaluator.FEATURES} are needed for a distance")
        if N not in self._real:
            order = torch.randperm(MOST, generator=torch.Generator().manual_seed(1))[:N]
            order = order.to(images.device)
            distances, _ = nearest(self.test_images[order], self.train_images)
            self._real[N] = self._figures(self.test_images[order], self.test_labels[order])
            self._real[N] |= {"nearest_median": distances.median().item()}
            self._real[N] |= {"nearest_least": distances.min().item()}
        real = self._real[N]
        figures = self._figures(images, labels)
        figures["fd_over_floor"] = figures["fd"] / real["fd"]
        distances, index = nearest(images, self.train_images)
        figures["nearest_median"] = distances.median().item()
        figures["nearest_over_real"] = figures["nearest_median"] / real["nearest_median"]
        figures["copies"] = int((distances < real["nearest_least"]).sum())
        if pairs:
            closest = distances.argsort()[:10]
            beside = torch.stack([images[closest], self.train_images[index[closest]]], dim=1)
            pairs.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(pairs) as partial:
                image_grid(beside.flatten(0, 1), columns=4).save(partial)
        return {"images": N, "samples": figures, "real": real}

    def _figures(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        features = evaluator.features_of(self.net, images)
        figures = frechet_figures(features, self.train_moments)
        figures |= feature_figures(features, self.some_train_features[: len(features)])
        figures |= {"pixels": pixel_figures(images)}
        if labels is not None:
            figures |= agreement_figures(self.net.classify(features).argmax(dim=1), labels)
        return figures


def train_on_synthetic(judge: Judge, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Test accuracy of the judge's architecture trained on the samples alone and on as many real
    images, over 3 seeds (classification accuracy score, Ravuri & Vinyals 2019)."""
    figures: dict[str, Any] = {"synthetic": [], "real": []}
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(judge.train_images), generator=generator)
        some = order[: len(images)].to(images.device)
        real = judge.train_images[some], judge.train_labels[some]
        for name, (x, y) in (("synthetic", (images, labels)), ("real", real)):
            net = evaluator.fit(x, y, epochs=12, seed=seed)
            figures[name].append(evaluator.accuracy(net, judge.test_images, judge.test_labels))
    figures["gap"] = float(np.mean(figures["real"]) - np.mean(figures["synthetic"]))
    return figures


def sample(
    cfg: Config, path: Path, count: int, device: torch.device
) -> tuple[Tensor, Tensor, dict]:
    """`count` uint8 images with labels as MNIST has them; what training the model and drawing them
    cost."""
    model, guide, trained, progress = checkpoint.load_model(path, device)
    if (trained.img_size, trained.img_channels, trained.num_classes) != (28, 1, 10):
        raise ValueError(f"{path}: draws images of another kind than MNIST's 28 by 28")
    labels = draw_labels(count, cfg.seed).to(device)
    began = time.perf_counter()
    diffusion = Diffusion(trained)
    x_0 = diffusion.sample(model, labels, guide=guide, **cfg.sampling, progress=True)
    images = to_uint8(x_0).cpu().to(device)  # by way of the CPU, so that the clock waits for it
    seconds = time.perf_counter() - began
    calls = diffusion.network_calls(cfg.steps, cfg.guidance, cfg.guidance_low, cfg.guidance_high)
    drawing = {"calls": calls, "seconds": seconds, "images_per_second": count / seconds}
    training = {"minutes": progress.seconds / 60, "steps": progress.step}
    return images, labels, {"sampling": drawing, "training": training}


def report(result: dict[str, Any]) -> str:
    """The figures as a table that a person reads."""
    s, r = result["samples"], result["real"]
    low, high = s["fd_interval"]
    floor_low, floor_high = r["fd_interval"]
    rows = [
        ("", "samples", "real test images"),
        ("FD-MNIST", f"{s['fd']:.4f} ({low:.4f} to {high:.4f})",
         f"{r['fd']:.4f} ({floor_low:.4f} to {floor_high:.4f}), the floor"),
        ("FD over the floor", f"{s['fd_over_floor']:.2f}", "1"),
        ("KID x 1000", f"{1000 * s['kid']:.3f} ± {1000 * s['kid_std']:.3f}",
         f"{1000 * r['kid']:.3f} ± {1000 * r['kid_std']:.3f}"),
        ("precision", f"{s['precision']:.3f}", f"{r['precision']:.3f}"),
        ("recall", f"{s['recall']:.3f}", f"{r['recall']:.3f}"),
        ("black pixels", f"{s['pixels']['black']:.2%}", f"{r['pixels']['black']:.2%}"),
        ("pixel mean, std", f"{s['pixels']['mean']:.1f}, {s['pixels']['std']:.1f}",
         f"{r['pixels']['mean']:.1f}, {r['pixels']['std']:.1f}"),
        *((f"pixels {a} to {b - 1}", f"{x:.2%}", f"{y:.2%}") for (a, b), x, y in zip(
            itertools.pairwise(GREY_EDGES), s["pixels"]["histogram"], r["pixels"]["histogram"],
            strict=True,
        )),
        ("nearest training image", f"{s['nearest_median']:.2f} ({s['nearest_over_real']:.2f} x)",
         f"{r['nearest_median']:.2f}, the median distance"),
        ("closer than any of those", f"{s['copies']}", "0"),
    ]  # fmt: skip
    if "agreement" in s:
        rows.append(("label agreement", f"{s['agreement']:.2%}", f"{r['agreement']:.2%}"))
        for digit in range(10):
            row = (f"  digit {digit}", s["by_digit"][digit], r["by_digit"][digit])
            rows.append((row[0], f"{row[1]:.2%}", f"{row[2]:.2%}"))
        worst = ", ".join(f"{a} read as {b}: {n}" for a, b, n in s["confusions"])
        rows.append(("  worst confusions", worst or "none", ""))
    if "cas" in result:
        cas = result["cas"]
        rows.append(("train on, test on real", f"{np.mean(cas['synthetic']):.2%}",
                     f"{np.mean(cas['real']):.2%}, gap {cas['gap']:.2%}"))  # fmt: skip
    if "sampling" in result:
        cost = result["sampling"]
        rows.append(("sampling", f"{cost['images_per_second']:.0f} images/s",
                     f"{cost['calls']} calls an image, {cost['seconds']:.1f} s"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    table = "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)
    title = f"{result['images']:,} images of {result['source']}, judge {result['evaluator'][:12]}"
    return f"{title}\n{table}"


def evaluate_model(judge: Judge, cfg: Config, path: Path, count: int, cas: bool) -> dict[str, Any]:
    """Sample from a model, measure, write the JSON; a result that is there already is read."""
    model_hash = checkpoint.sha256(path)
    settings = {name: getattr(cfg, name) for name in (*SWEPT, "clip_x_0")} | {"samples": count}
    how = (
        f"{cfg.sampler}-{cfg.steps}-w{cfg.guidance:g}-from{cfg.guidance_low:g}to"
        f"{cfg.guidance_high:g}-eta{cfg.eta:g}-n{count}-s{cfg.seed}"
        f"{'' if cfg.clip_x_0 else '-unclipped'}"
    )
    file = Path(cfg.output_dir, "metrics", f"{path.stem}-{model_hash[:8]}-{how}.json")
    key = {"model": model_hash, "evaluator": judge.sha256, "settings": settings}
    if file.exists():
        try:
            known = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{file}: damaged; delete it") from None
        if all(known.get(k) == v for k, v in key.items()) and ("cas" in known or not cas):
            tqdm.write(f"measured before: {file} (nearest.png stays as it was)")
            return known
    images, labels, cost = sample(cfg, path, count, next(judge.net.parameters()).device)
    pairs = Path(cfg.output_dir, "images", "nearest.png")
    result = {"source": str(path), **key, **cost, **judge.measure(images, labels, pairs)}
    if cas:
        result["cas"] = train_on_synthetic(judge, images, labels)
    write_result(file, result)
    tqdm.write(f"wrote {file}\nwrote {pairs}")
    return result


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all, with the versions and the machine that made it."""
    result["made_by"] = {
        "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as partial:
        partial.write_text(json.dumps(result, indent=1))


def parse_sweep(words: list[str]) -> list[dict[str, Any]]:
    """["steps=4,8", "guidance=1,2"] → every combination; raises ValueError for what is no knob."""
    values: dict[str, list[Any]] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in SWEPT or not text or name in values:
            raise ValueError(
                f"sweep = {word!r}: write steps=4,8; the knobs, once each, are {', '.join(SWEPT)}"
            )
        kind = type(getattr(Config(), name))
        try:
            values[name] = [kind(value) for value in text.split(",")]
        except ValueError:
            raise ValueError(f"sweep = {word!r}: {name} takes {kind.__name__} values") from None
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def pareto_best(results: list[dict[str, Any]]) -> list[bool]:
    """Whether no other result has both a lower FD and no more network calls."""
    points = [(r["sampling"]["calls"], r["samples"]["fd"]) for r in results]
    return [
        not any((c <= calls and f < fd) or (c < calls and f <= fd) for c, f in points)
        for calls, fd in points
    ]


def sweep(judge: Judge, cfg: Config, path: Path, count: int, grid: list[dict[str, Any]]) -> None:
    """Evaluate each setting of the grid that has no result yet; print the table, write the plot."""
    results = [
        evaluate_model(judge, replace(cfg, **each), path, count, cas=False)
        for each in tqdm(grid, desc="sweep", disable=None)
    ]
    best = pareto_best(results)
    print(f"{'':2}{'sampler':8}{'steps':>6}{'guidance':>9}{'from':>6}{'to':>6}{'eta':>5}"
          f"{'calls':>6}{'FD':>9}{'/ floor':>8}"
          f"{'agree':>8}{'prec.':>7}{'recall':>7}{'img/s':>7}")  # fmt: skip
    for result, is_best in zip(results, best, strict=True):
        k, s, cost = result["settings"], result["samples"], result["sampling"]
        print(f"{'*' if is_best else '':2}{k['sampler']:8}{k['steps']:6}{k['guidance']:9g}"
              f"{k['guidance_low']:6g}{k['guidance_high']:6g}{k['eta']:5g}"
              f"{cost['calls']:6}{s['fd']:9.4f}{s['fd_over_floor']:8.2f}"
              f"{s['agreement']:8.2%}{s['precision']:7.3f}{s['recall']:7.3f}"
              f"{cost['images_per_second']:7.0f}")  # fmt: skip
    print("* no other row has both a lower FD and no more network calls")
    print(f"wrote {plot_sweep(results, best, Path(cfg.output_dir, 'images', 'sweep.png'))}")


def plot_files(files: list[Path], path: Path) -> None:
    """Quality against minutes of training, from this script's results of models and one result of
    benchmark.py. Raises ValueError for other files, and when there is not one of the latter."""
    results, speeds = [], []
    for file in files:
        try:
            result = json.loads(file.read_text())
            if "samples" not in result:
                speeds.append(result["training"]["images_per_second"])
            elif "training" in result:
                results.append(result)
            else:
                print(f"{file}: not of a model, left out")
        except (OSError, ValueError, TypeError, KeyError):
            raise ValueError(f"{file}: no result of evaluate.py or benchmark.py") from None
    if not results or len(speeds) != 1:
        raise ValueError("--plot needs results of models and one of benchmark.py --json")
    print(f"wrote {plot_quality(results, speeds[0], path)}")


def main() -> int:
    parser = Parser(prog="evaluate.py", description="Measure samples against MNIST.")
    parser.add_argument("--model", metavar="TEXT", help="path, name, number or newest (default)")
    parser.add_argument("--images", type=Path, metavar="FILE.npz", help="judge these: arr_0, arr_1")
    parser.add_argument("--samples", type=int, default=MOST, metavar="INT", help="how many to draw")
    parser.add_argument("--cas", action="store_true", help="train on the samples, test on MNIST")
    parser.add_argument("--sweep", nargs="+", metavar="KNOB=A,B", help="evaluate every combination")
    parser.add_argument(
        "--plot", nargs="+", type=Path, metavar="FILE.json", help="plot results over training time"
    )
    parser.add_argument("--train_evaluator", action="store_true", help="train the judge anew")
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    cfg = replace(Config(), **given_flags(args))
    if not evaluator.FEATURES <= args.samples <= MOST:
        raise ValueError(f"samples = {args.samples}: choose {evaluator.FEATURES} to {MOST}")
    if args.images and (args.model or args.sweep):
        raise ValueError("--images judges a file; drop --model and --sweep")
    if args.sweep and args.cas:
        raise ValueError("--sweep does not train on samples; drop --cas")
    if args.plot:
        plot_files(args.plot, Path(cfg.output_dir, "images", "quality.png"))
        return 0
    torch.set_flush_denormal(True)  # denormals are slow; before any thread starts
    if args.train_evaluator:
        test_accuracy = evaluator.train_and_save(cfg)
        print(f"wrote {evaluator.PATH}: {test_accuracy:.2%} of the test split read right")
        return 0
    device = pick_device(cfg.device)
    if args.images:
        images, labels = read_npz(args.images)
        result = judge_file(args.images, images, labels, Judge(cfg, device), cfg, args.cas)
    else:
        path = checkpoint.find_model(args.model or "newest", Path(cfg.output_dir, "models"))
        trained = Config.from_dict(checkpoint.load(path, mmap=True)["config"])
        if "clip_x_0" not in given_flags(args):  # the model was trained for one of the two
            cfg = replace(cfg, clip_x_0=trained.clip_x_0)
        diffusion = Diffusion(trained)
        grid = parse_sweep(args.sweep or [])
        for each in grid or [{}]:  # complain now, not after an hour
            diffusion.sampling_times(replace(cfg, **each).steps)
        judge = Judge(cfg, device)
        if args.sweep:
            sweep(judge, cfg, path, args.samples, grid)
            return 0
        result = evaluate_model(judge, cfg, path, args.samples, args.cas)
    print(report(result))
    return 0


def judge_file(
    file: Path, images: Tensor, labels: Tensor | None, judge: Judge, cfg: Config, cas: bool
) -> dict[str, Any]:
    """Measure the images of a file; of more than MOST, a random MOST."""
    device = judge.test_images.device
    if cas and labels is None:
        raise ValueError(f"{file}: --cas needs labels (arr_1)")
    if len(images) > MOST:
        print(f"{file}: {len(images):,} images; a random {MOST:,} of them are judged")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))[:MOST]
        images, labels = images[order], None if labels is None else labels[order]
    images, labels = images.to(device), None if labels is None else labels.to(device)
    result = {"source": str(file), "images_sha256": checkpoint.sha256(file)}
    pairs = Path(cfg.output_dir, "images", "nearest.png")
    result |= {"evaluator": judge.sha256, **judge.measure(images, labels, pairs)}
    if cas:
        result["cas"] = train_on_synthetic(judge, images, labels)
    out = Path(cfg.output_dir, "metrics", f"{file.stem}-{result['images_sha256'][:8]}.json")
    write_result(out, result)
    print(f"wrote {out}\nwrote {pairs}")
    return result


if __name__ == "__main__":
    run_script("evaluate.py", main)
