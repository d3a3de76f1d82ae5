"""Measure samples against real images: python evaluate.py measures the newest model."""

import interface  # noqa: F401  (first, so that import errors are one line, too)

# isort: split
import itertools
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import LoadedModel, load_model
from config import Config
from data import fingerprint, load_split, to_uint8
from evaluation import classifier, denoiser, plots, results
from evaluation.evaluator import MAX_MEASURED, Evaluator, shuffled
from evaluation.results import Result
from interface import cli, models, requests
from interface.flags import evaluate_flags
from interface.picture import image_grid, read_npz, save_png
from interface.settings import check_guidance, settings_for_drawing
from interface.terminal import sampling_bar
from pipeline import Pipeline
from system import distributed
from system.files import first_line, make_folder, sha256
from system.machine import pick_device, pick_precision
from system.randomness import draw_labels


def sample(
    loaded: LoadedModel, cfg: Config, count: int, label_counts: list[int]
) -> tuple[Tensor, Tensor, Result]:
    """Draw `count` uint8 images with labels in the proportions of `label_counts`, each process some
    batches of them. Returns the images, their labels, and what training and sampling
    have cost."""
    labels = draw_labels(count, cfg.seed, label_counts).to(loaded.device)
    pipeline = Pipeline(cfg, loaded.model, loaded.guide, loaded.levels)
    batches = range(pipeline.batch_count(count))
    [mine] = distributed.my_parts(len(batches))
    began = time.perf_counter()
    with sampling_bar(cfg.steps, len(batches[mine])) as on_state:
        x_0 = pipeline.draw(labels, on_state, mine)
    images = distributed.gather([to_uint8(x_0)])  # which waits until a GPU is done
    seconds = time.perf_counter() - began
    cost = {"calls": pipeline.diffusion.network_calls(), "seconds": seconds}
    cost["images_per_second"] = count / seconds
    trained = {"minutes": loaded.progress.seconds / 60, "steps": loaded.progress.step}
    return images.to(loaded.device), labels, {"sampling": cost, "training": trained}


def evaluate_model(
    evaluator: Evaluator | None, loaded: LoadedModel, cfg: Config, args: Namespace
) -> Result | None:
    """Draw images with a model, measure them and write the result, unless it is there already. All
    processes draw; the first, which alone has an evaluator, does the rest."""
    file = results.result_file(loaded, cfg, args.samples)
    settings = {**cfg.select("sampling"), "seed": cfg.seed, "samples": args.samples}
    settings["labels"] = "exact"  # older results had random ones
    settings["precision"] = pick_precision(cfg.precision, loaded.device)
    settings["match_levels"] = cfg.match_levels and loaded.levels is not None
    identity = {"model": loaded.sha256, "settings": settings}
    if evaluator:
        identity |= evaluator.identity(args.samples)
    known = distributed.from_first(lambda: results.read_result(file, identity))
    if known and all(name in known for name in ("cas", "c2st") if getattr(args, name)):
        tqdm.write(f"read {file}, measured before; the pictures in images/ are left as they are")
        if not args.sweep:
            print(results.table(known))
        return known
    distributed.from_first(lambda: make_folders(cfg.output_dir))
    counts = distributed.from_first(lambda: evaluator and evaluator.label_counts)
    images, labels, cost = sample(loaded, cfg, args.samples, counts)
    if evaluator is None:
        return None
    result = {"source": str(loaded.path), **identity, **cost, **costly_metrics(known)}
    return measure(evaluator, result, images, labels, file, args)


def evaluate_file(args: Namespace, cfg: Config) -> Result:
    """Measure the images of an .npz, at most MAX_MEASURED of them, and write the result."""
    images, labels = read_npz(args.images)  # first, as making an evaluator takes seconds
    if len(images) < classifier.FEATURES:
        least = f"metrics need at least {classifier.FEATURES}; add some"
        raise ValueError(f"{args.images}: {len(images)} images; {least}")
    if args.cas and labels is None:
        raise ValueError(f"{args.images}: --cas needs labels (arr_1); add them or drop --cas")
    if len(images) > MAX_MEASURED:
        print(f"{args.images}: measuring a random {MAX_MEASURED:,} of its {len(images):,} images")
        index = shuffled(len(images), seed=2)[:MAX_MEASURED]
        images, labels = images[index], None if labels is None else labels[index]
    evaluator = Evaluator(classifier.full_mnist(cfg), pick_device(cfg.device))
    make_folders(cfg.output_dir)
    images = images.to(evaluator.device)
    labels = None if labels is None else labels.to(evaluator.device)
    identity = {"images_sha256": sha256(args.images), **evaluator.identity(len(images))}
    result = {"source": str(args.images)} | identity
    name = f"{args.images.stem}-{result['images_sha256'][:8]}.json"
    file = Path(cfg.output_dir, "metrics", name)
    result |= costly_metrics(results.read_result(file, identity))
    return measure(evaluator, result, images, labels, file, args)


def costly_metrics(known: Result | None) -> Result:
    """Metrics of an earlier result for which networks were trained: too costly to lose."""
    return {name: known[name] for name in ("cas", "c2st") if known and name in known}


def make_folders(output_dir: str) -> None:
    """Make the folders of the results before the work for them is done."""
    for folder in ("metrics", "images"):
        make_folder(Path(output_dir, folder))


def measure(
    evaluator: Evaluator,
    result: Result,
    images: Tensor,
    labels: Tensor | None,
    file: Path,
    args: Namespace,
) -> Result:
    """Add the metrics of the images to a result, and write it and its pictures."""
    measured, pairs = evaluator.measure(images, labels)
    result |= measured
    pictures = {"nearest.png": image_grid(pairs, columns=4)}
    # Ctrl-C may end these two, whose networks train for minutes: write what there is before each
    if args.cas:
        write(result, pictures, file, must=False)
        result["cas"] = evaluator.accuracy_score(images, labels)
    if args.c2st:
        write(result, pictures, file, must=False)
        result["c2st"], most_obvious = evaluator.two_sample_test(images)
        pictures["two_sample.png"] = image_grid(most_obvious, columns=10)
    if not args.sweep:
        print(results.table(result))
    write(result, pictures, file, must=not args.sweep)  # a sweep's table comes at its end
    return result


def write(result: Result, pictures: dict[str, Image.Image], file: Path, must: bool) -> None:
    """Write a result and its pictures. If that fails, raise what it raises if it `must` succeed,
    and otherwise only say so."""
    try:
        results.write_result(file, result)
        tqdm.write(f"wrote {file}")
        for name, grid in pictures.items():
            picture = file.parent.parent / "images" / name
            save_png(grid, picture)
            tqdm.write(f"wrote {picture}")
    except (OSError, ValueError) as error:
        if must:
            raise
        tqdm.write(first_line(error), file=sys.stderr)


def parse_sweep(words: list[str]) -> list[dict[str, Any]]:
    """Every combination that words such as steps=4,8 ask for. Raises ValueError for other words."""
    kinds = {f.name: f.type for f in fields(Config)}
    names = [name for name in (*Config.names("sampling"), "seed") if kinds[name] is not bool]
    values: dict[str, list[Any]] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            if name not in names or name in values:
                raise ValueError
            values[name] = list(dict.fromkeys(map(kinds[name], text.split(","))))
        except ValueError:
            raise ValueError(
                f"sweep = {word!r}: write NAME=A,B, each NAME once, of {', '.join(names)}"
            ) from None
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def as_drawn(cfg: Config) -> Config:
    """The settings without differences that no image shows: in ddpm's eta, and in the interval of a
    guidance that is the same at every time."""
    cfg = replace(cfg, eta=1.0) if cfg.sampler == "ddpm" else cfg
    return replace(cfg, guidance_low=0.0, guidance_high=1.0) if cfg.guidance in (0, 1) else cfg


def sweep(
    evaluator: Evaluator | None, loaded: LoadedModel, configs: list[Config], args: Namespace
) -> None:
    """Evaluate each of `configs` that has no result yet; print the table and write the plot."""
    bar = tqdm(configs, desc="sweep", disable=None)
    found = [evaluate_model(evaluator, loaded, each, args) for each in bar]
    if evaluator is None:
        return
    print(results.sweep_table(found))
    picture = Path(configs[0].output_dir, "images", "sweep.png")
    plots.plot_sweep(found, results.pareto_best(found), picture)
    print(f"wrote {picture}")


def classify(loaded: LoadedModel, cfg: Config, count: int) -> None:
    """Have the denoiser itself name what test images show, and say how well it does."""
    if cfg.is_student:
        raise ValueError(f"{loaded.path}: a student knows few noise levels; choose its teacher")
    if cfg.num_classes == 1:
        raise ValueError(f"{loaded.path}: has one label, nothing to tell apart; choose another")
    make_folders(cfg.output_dir)
    images, labels = load_split(cfg, train=False, device=loaded.device)
    some = shuffled(len(images), cfg.seed)[:count].to(loaded.device)
    found = denoiser.classify(replace(loaded, cfg=cfg), images[some], labels[some])
    precision = pick_precision(cfg.precision, loaded.device)
    how = {"seed": cfg.seed, "precision": precision, "sample_batch_size": cfg.sample_batch_size}
    tests = {"test_sha256": fingerprint(images, labels)["sha256"]}
    result = {"model": loaded.sha256, "settings": how, **tests, "classify": found}
    print(
        f"the denoiser of {loaded.path} names the right label for {found['accuracy']:.2%} of "
        f"{found['images']:,} test images, with {found['calls']} network calls an image, in "
        f"{found['seconds']:.0f} s"
    )
    name = f"classify-{loaded.path.stem}-{loaded.sha256[:8]}-n{found['images']}-s{cfg.seed}"
    file = Path(cfg.output_dir, "metrics", f"{name}-{precision}.json")
    results.write_result(file, result)
    print(f"wrote {file}")


def evaluate_chosen_model(
    args: Namespace, given: dict[str, Any], cfg: Config, device: torch.device
) -> None:
    """Evaluate the model that --model names, or the newest."""
    folder = Path(cfg.output_dir, "models")
    file = distributed.from_first(lambda: models.find_model(args.model or "newest", folder))
    loaded = load_model(file, device, cfg.compile)
    cfg = settings_for_drawing(loaded.cfg, given)
    swept = parse_sweep(args.sweep or [])  # [{}] if there is none
    for name in given.keys() & swept[0].keys():
        raise ValueError(f"{name} = {given[name]!r}: --sweep sets it, too; drop one of them")
    configs = [settings_for_drawing(loaded.cfg, given | each) for each in swept]
    if args.classify:
        classify(loaded, cfg, args.samples or 1000)
        return
    for each in configs:
        check_guidance(loaded.cfg, each, has_guide=loaded.guide is not None)
    for name in [*given, *swept[0]]:
        faults = []
        for each, values in zip(configs, swept, strict=True):
            try:
                requests.check_flags(loaded, each, {name: (given | values)[name]})
            except ValueError as fault:
                faults.append(fault)
        if len(faults) == len(configs):  # an effect in a part of a sweep is enough
            raise faults[0]
    only: list[Evaluator] = []  # stays empty in all processes but the first
    distributed.from_first(lambda: only.append(Evaluator(cfg, device)))
    evaluator = only[0] if only else None
    if evaluator and not models.fits_data(loaded, evaluator.train_images, evaluator.train_labels):
        print(f"{loaded.path} was not trained on the images in {cfg.data_dir}")
    real = distributed.from_first(lambda: evaluator and evaluator.real_count)
    args.samples = args.samples or min(real, MAX_MEASURED)
    if args.samples > real:
        raise ValueError(f"samples = {args.samples}: choose at most {real} (the smaller split)")
    if args.sweep:
        different: dict[Config, Config] = {}
        for each in configs:
            different.setdefault(as_drawn(each), each)
        sweep(evaluator, loaded, list(different.values()), args)
    else:
        evaluate_model(evaluator, loaded, cfg, args)


def main() -> int:
    args = evaluate_flags()
    least = 1 if args.classify else classifier.FEATURES
    if args.samples is not None and not least <= args.samples <= MAX_MEASURED:
        raise ValueError(f"samples = {args.samples}: choose {least} to {MAX_MEASURED}")
    given = cli.given_settings(args)
    cfg = replace(Config(), **cli.machine_settings(given))
    draws = not (args.train_evaluator or args.images or args.classify)
    if distributed.rank() > 0 and not draws:  # these need only one process
        return 0
    if args.train_evaluator:
        accuracy = classifier.train_and_save(cfg)
        print(f"wrote {classifier.PATH}: {accuracy:.2%} of the test split read correctly")
    elif args.images:
        evaluate_file(args, cfg)
    else:
        device = pick_device(cfg.device)
        with nullcontext() if args.classify else distributed.joined(device):
            evaluate_chosen_model(args, given, cfg, device)
    return 0


if __name__ == "__main__":
    cli.run_script("evaluate.py", main)
