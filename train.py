"""Train the conditional U-Net: python train.py --epochs 30, or --budget 10m. --help lists all."""

import copy
import csv
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from checkpoint import Progress
from config import (
    LOCAL,
    Config,
    Parser,
    add_flags,
    given_flags,
    merge,
    parse_digits,
    parse_duration,
    run_script,
)
from data import image_grid, load_split, to_model_range, to_uint8
from diffusion import Diffusion, seeded_generator
from model import UNet, pick_device, pick_precision
from optimizer import make_optimizers

# Every random number of training is a function of (seed, stream, epoch or step): a resumed run
# draws what an uninterrupted one would have drawn, and sampling cannot disturb it.
ORDER_STREAM, NOISE_STREAM = 1, 2

METRICS = ("epoch", "step", "loss", "learning_rate", "grad_norm", "images_per_second", "seconds")


def train(cfg: Config, progress: Progress, start: Path | None, began: float) -> int:
    """Train as `cfg` says from `progress` on, with the weights of the checkpoint `start` if any.

    `began` (a time.perf_counter) is when the run's seconds start to count. Returns the exit code:
    0, or 128 + the signal that stopped the run. Raises ValueError for settings that do not fit the
    data or the machine, FloatingPointError when training diverges.
    """
    device = pick_device(cfg.device)
    dtype = pick_precision(cfg.precision, device)
    images, labels = load_split(cfg, train=True, device=device)
    if cfg.batch_size > len(images):
        raise ValueError(f"batch_size = {cfg.batch_size}: there are only {len(images)} images")
    per_epoch = len(images) - len(images) % cfg.batch_size

    diffusion = Diffusion(cfg)
    diffusion.sampling_times(cfg.steps)  # complains now, not at the first preview
    torch.manual_seed(cfg.seed)
    model = UNet(cfg).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    guide = None  # the worse model for autoguidance, from the end of the run's short first part
    optimizers = make_optimizers(cfg, model)
    totals, epoch_seconds = torch.zeros(2, device=device), 0.0  # of the epoch: loss, grad norm
    if start:
        guide, epoch_metrics = checkpoint.restore(start, model, ema, optimizers)
        totals += torch.tensor(epoch_metrics["totals"], device=device)
        epoch_seconds = epoch_metrics["seconds"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters, averages = list(model.parameters()), list(ema.parameters())
    ema_exponent = ema_gamma(cfg.ema_sigma_rel) + 1
    budget = parse_duration(cfg.budget) if cfg.budget else None
    seconds_before, last_saved = progress.seconds, start
    check_every = 1 if device.type == "cpu" else 50  # reading a loss makes a GPU wait
    stopped = catch_stop_signals()

    def fraction_done() -> float:
        progress.seconds = seconds_before + time.perf_counter() - began
        if budget:
            return (progress.seconds - progress.budget_from) / budget
        return (progress.epoch + progress.images / per_epoch) / cfg.epochs

    def check_finite() -> None:
        if not math.isfinite(float(totals.sum())):
            raise FloatingPointError(
                f"the loss or its gradient is no longer finite at step {progress.step}; last good "
                f"checkpoint: {last_saved or 'none yet'}; try a lower --lr than {cfg.learning_rate}"
            )

    def save() -> Path:
        check_finite()
        path = checkpoint_path(cfg, progress)
        metrics = {"totals": totals.tolist(), "seconds": epoch_seconds}
        checkpoint.save(path, cfg, progress, model, ema, guide, optimizers, metrics)
        tqdm.write(f"wrote {path}")
        return path

    fraction = fraction_done()
    if fraction >= 1 and seconds_before > progress.budget_from:
        print("nothing left to do: starting up took the rest of the budget")
        return 0
    if fraction >= 1:
        raise ValueError(f"budget = {cfg.budget!r}: start-up alone took longer; give it more time")
    as_planned = start is not None and keeps_plan(start, cfg, progress)
    make_room(cfg, start, progress, as_planned)  # only now that nothing can be wrong any more
    size = sum(p.numel() for p in parameters)
    print(f"U-Net of {size:,} parameters on {device}, {str(dtype)[6:]}; {len(images):,} images")
    until = f"for {cfg.budget}" if budget else f"to epoch {cfg.epochs}"
    print(f"training {until} from {progress}; results in {cfg.output_dir}", flush=True)

    if start and not as_planned:  # for --resume, should the run be killed before its next save
        last_saved = save()
    while fraction < 1:
        order = torch.randperm(
            len(images), generator=seeded_generator(cfg.seed, ORDER_STREAM, progress.epoch)
        ).to(device)
        bar = epoch_bar(cfg, progress, per_epoch)
        while progress.images < per_epoch and fraction < 1 and not stopped:
            step_start = time.perf_counter()
            index = order[progress.images : progress.images + cfg.batch_size]
            generator = seeded_generator(cfg.seed, NOISE_STREAM, progress.step, device=device)
            x_0, y = to_model_range(images[index]), labels[index]
            if guide is None and cfg.guide_share > 0:
                y = mishear(y, cfg, generator)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = diffusion.loss(model, x_0, y, generator)
            model.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
            making_guide = guide is None and fraction < cfg.guide_share
            for group in groups:
                group["lr"] = learning_rate(cfg, progress.step, fraction, making_guide)
            for optimizer in optimizers:
                optimizer.step()
            progress.step += 1
            progress.images += cfg.batch_size
            ema_decay = (1 - 1 / progress.step) ** ema_exponent
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - ema_decay)
            totals += torch.stack([loss.detach(), grad_norm])

            epoch_seconds += time.perf_counter() - step_start
            fraction = fraction_done()
            warm = progress.step >= cfg.warmup_steps  # no guide that has not learned anything yet
            if guide is None and warm and fraction >= cfg.guide_share > 0:
                guide = copy.deepcopy(ema)
            if progress.step % check_every == 0 or progress.images == per_epoch:
                check_finite()
                mean_loss = float(totals[0]) * cfg.batch_size / progress.images
                bar.set_postfix_str(f"loss {mean_loss:.4f}, {time_left(cfg, progress, fraction)}")
            bar.update(cfg.batch_size)
        bar.close()

        if progress.images == per_epoch or fraction >= 1:
            epoch = f"{round(progress.epoch + progress.images / per_epoch, 2):g}"
            loss, grad_norm = (totals * cfg.batch_size / progress.images).tolist()
            rate, lr = progress.images / epoch_seconds, groups[0]["lr"]
            append_metrics(cfg, epoch, progress.step, loss, lr, grad_norm, rate, progress.seconds)
            left = time_left(cfg, progress, fraction)
            tqdm.write(f"epoch {epoch}: loss {loss:.4f}, {rate:.0f} images/s, {left}")
        if progress.images == per_epoch:
            progress.epoch, progress.images = progress.epoch + 1, 0
            totals.zero_()
            epoch_seconds = 0.0
        whole_epoch = progress.images == 0
        if fraction >= 1 or stopped or (whole_epoch and progress.epoch % cfg.save_every == 0):
            last_saved = save()
            if not stopped or fraction >= 1:
                save_preview(cfg, diffusion, ema, guide, progress)
            save_curves(cfg)
        if stopped and fraction < 1:
            print(f"stopped at {progress}; to go on: python train.py --resume{local_flags(cfg)}")
            return 128 + stopped[0]
    if guide is None:
        usual = "1.5" if cfg.label_dropout > 0 else "1"
        print(f"no guide in this model, so guidance drops the label: draw with --guidance {usual}")
    return 0


def learning_rate(cfg: Config, step: int, fraction: float, making_guide: bool = False) -> float:
    """A short linear rise, then a linear fall that reaches zero when the guide is made; then from
    the peak again a linear fall that reaches zero when the run ends."""
    start, end = (0.0, cfg.guide_share) if making_guide else (cfg.guide_share, 1.0)
    left = min(1.0, max(0.0, (end - fraction) / (end - start)))
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    return cfg.learning_rate * warmup * left


def mishear(y: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
    """Labels (B,), each with probability `guide_label_noise` replaced by one drawn at random: a
    guide should err as the model itself does, only more often, and that is drawing the wrong
    digit."""
    wrong = torch.rand(y.shape, generator=generator, device=y.device) < cfg.guide_label_noise
    drawn = torch.randint(cfg.num_classes, y.shape, generator=generator, device=y.device)
    return torch.where(wrong, drawn, y)


def ema_gamma(sigma_rel: float) -> float:
    """The exponent gamma of the power-function average whose width is `sigma_rel` of the run so
    far. Karras et al. 2024 (EDM2), section 3 and appendix C: the decay at step k is
    (1 - 1/k)^(gamma + 1), so that the average suits a run of any length."""
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def catch_stop_signals() -> list[int]:
    """From now on the first Ctrl-C or SIGTERM is only noted, in the list returned, so that the
    step under way ends whole; a second one has its usual effect."""
    stopped: list[int] = []

    def note(signum: int, frame: object) -> None:
        stopped.append(signum)
        signal.signal(signum, signal.default_int_handler if signum == 2 else signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return stopped


def save_preview(
    cfg: Config, diffusion: Diffusion, ema: UNet, guide: UNet | None, progress: Progress
) -> None:
    """Write a grid with one row a digit, from the same noise every time, to compare epochs."""
    path = Path(cfg.output_dir, "images", f"samples_{progress.name}.png")
    digits = torch.tensor(parse_digits(cfg.preview_digits, cfg.num_classes))
    y = digits.repeat_interleave(cfg.preview_columns).to(next(ema.parameters()).device)
    x_0 = diffusion.sample(ema, y, guide=guide, **cfg.sampling, progress=True)
    image_grid(to_uint8(x_0), cfg.preview_columns).save(path)
    tqdm.write(f"wrote {path}")


def save_curves(cfg: Config) -> None:
    """Write results/images/training.png from metrics.csv, once that has a row."""
    metrics, path = Path(cfg.output_dir, "metrics.csv"), Path(cfg.output_dir, "images/training.png")
    try:
        from plots import plot_training  # here, because matplotlib would slow every start
    except ImportError as error:  # no reason to lose a run
        tqdm.write(f"{path} not written: {error}; pip install -r requirement.txt")
        return
    if metrics.exists():
        plot_training(metrics, path)
        tqdm.write(f"wrote {path}")


def epoch_bar(cfg: Config, progress: Progress, per_epoch: int) -> tqdm:
    """The progress bar of one epoch; nothing where stderr is not a terminal."""
    of = "" if cfg.budget else f"/{cfg.epochs}"
    return tqdm(
        total=per_epoch, initial=progress.images, desc=f"epoch {progress.epoch + 1}{of}",
        unit=" images", leave=False, disable=None, dynamic_ncols=True,
    )  # fmt: skip


def time_left(cfg: Config, progress: Progress, fraction: float) -> str:
    """What is left of the whole run; without a budget, judged by its average speed so far."""
    if cfg.budget:
        left = progress.budget_from + parse_duration(cfg.budget) - progress.seconds
    else:
        left = progress.seconds * (1 / fraction - 1)
    minutes, seconds = divmod(max(0, round(left)), 60)
    return f"run ends in {minutes}m{seconds:02d}s"


def append_metrics(cfg: Config, *row: object) -> None:
    """Add a row to metrics.csv, in the order of METRICS, with its header if the file is new."""
    path = Path(cfg.output_dir, "metrics.csv")
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(METRICS)
        writer.writerow(row)


def checkpoint_path(cfg: Config, progress: Progress) -> Path:
    """The file of a checkpoint in output_dir."""
    return Path(cfg.output_dir, "models", f"model_{progress.name}.pth")


def keeps_plan(start: Path, cfg: Config, progress: Progress) -> bool:
    """Whether `start` is of this run's folder and holds its plan already."""
    saved = checkpoint.load(start)
    here = {name: getattr(cfg, name) for name in LOCAL}
    plan = replace(Config.from_dict(saved["config"]), **here), saved["progress"]["budget_from"]
    same_file = start.resolve() == checkpoint_path(cfg, progress).resolve()
    return same_file and plan == (cfg, progress.budget_from)


def make_room(cfg: Config, start: Path | None, progress: Progress, as_planned: bool) -> None:
    """Make the output folders, and see that this run overwrites nothing.

    Going on from a checkpoint of this folder, at `progress`, keeps what led up to it; checkpoints
    and rows of metrics.csv past it, or all of an unrelated earlier run, move to output_dir/earlier.
    A checkpoint that is to be written again, because the run does not go on `as_planned`, is copied
    there: pictures name a model by its hash.
    """
    out = Path(cfg.output_dir)
    models, samples, metrics = out / "models", out / "images", out / "metrics.csv"
    models.mkdir(parents=True, exist_ok=True)
    samples.mkdir(exist_ok=True)
    for partial in models.glob(".*.partial"):  # of a save that was killed
        partial.unlink()
    own = start is not None and start.resolve().parent == models.resolve()
    steps = {path: p.step for path, p in checkpoint.list_checkpoints(models)}
    keep = progress.step if own else -1
    past = [p for p in models.glob("model_epoch_*.pth") if steps.get(p, math.inf) > keep]
    kept = {p.stem for p in models.glob("model_epoch_*.pth") if p not in past}
    grids = samples.glob("samples_epoch_*.png")
    past += [p for p in grids if p.stem.replace("samples_", "model_") not in kept]
    copied = [checkpoint_path(cfg, progress)] if own and not as_planned else []
    past += [p for p in copied if p.exists() and p not in past]
    if past or (metrics.exists() and not own):
        earlier = out / "earlier" / time.strftime("%Y-%m-%d_%H%M%S")
        while earlier.exists():
            earlier = earlier.with_name(earlier.name + "_")
        earlier.mkdir(parents=True)
        for path in [*past, metrics, samples / "training.png"]:
            if path.exists():
                shared = path in copied or (own and path == metrics)  # this run's as well
                (shutil.copy2 if shared else shutil.move)(path, earlier / path.name)
        print(f"what this run would overwrite is kept in {earlier}")
    if own and metrics.exists():
        with open(metrics, newline="") as file:  # a power cut may have left half a row
            rows = [r for r in csv.DictReader(file) if (r.get("step") or "").isdecimal()]
            rows = [row for row in rows if int(row["step"]) <= progress.step]
        partial = metrics.with_name(".metrics.csv.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, METRICS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, metrics)


def local_flags(cfg: Config) -> str:
    """The flags of this machine that differ from config.py, which a checkpoint does not bring."""
    given = {name: getattr(cfg, name) for name in LOCAL if getattr(cfg, name) != LOCAL[name]}
    return "".join(f" --{name} {quoted(value)}" for name, value in given.items())


def quoted(text: object) -> str:
    """Ready to be pasted into a shell, be it Windows'."""
    return f'"{text}"' if " " in str(text) else str(text)


def describe(path: Path, saved: dict[str, Any], cfg: Config) -> str:
    """Where the checkpoint `saved` stands and how to go on from it."""
    progress = Progress(**saved["progress"])
    plan = f"a budget of {cfg.budget}" if cfg.budget else f"{cfg.epochs} epochs planned"
    stands = f"{path} stands at {progress}, {plan}, after {progress.seconds / 60:.1f} minutes."
    if "model" not in saved:
        return f"{stands}\nIt was kept for drawing only and cannot be trained on."
    return (
        f"{stands}\nTo train it K epochs more: python train.py "
        f"--load_checkpoint_path {quoted(path)} --continue_training_epochs K{local_flags(cfg)}"
    )


def main() -> int:
    began = time.perf_counter() - time.process_time()  # so that importing torch counts as well
    parser = Parser(prog="train.py", description="Train a class-conditional DDPM on MNIST.")
    parser.add_argument(
        "--resume", action="store_true",
        help="carry the newest checkpoint of output_dir to the end that was planned",
    )  # fmt: skip
    parser.add_argument("--load_checkpoint_path", type=Path, metavar="PATH", help="go on from PATH")
    parser.add_argument(
        "--continue_training_epochs", type=int, default=0, metavar="K",
        help="with --load_checkpoint_path: train K epochs more (default: 0, only describe PATH)",
    )  # fmt: skip
    add_flags(parser)
    args = parser.parse_args()
    given, more = given_flags(args), args.continue_training_epochs
    if more < 0:
        raise ValueError(f"continue_training_epochs = {more}: must be at least 0")
    if more and not args.load_checkpoint_path:
        raise ValueError("--continue_training_epochs needs --load_checkpoint_path PATH")
    if args.resume and args.load_checkpoint_path:
        raise ValueError("--resume finds the checkpoint itself; drop it or --load_checkpoint_path")
    if "epochs" in given and "budget" in given:
        raise ValueError("--budget replaces --epochs; give one of them")
    if args.load_checkpoint_path and "epochs" in given:
        raise ValueError(
            "--epochs is the length of a run from scratch; with --load_checkpoint_path use "
            "--continue_training_epochs"
        )
    if more and "budget" in given:
        raise ValueError("--budget replaces --continue_training_epochs; give one of them")

    torch.set_flush_denormal(True)  # denormals are slow; before any thread starts
    base = replace(Config(), budget="") if "epochs" in given else Config()
    cfg, start, progress = replace(base, **given), args.load_checkpoint_path, Progress()
    if args.resume:
        models = Path(cfg.output_dir, "models")
        start = checkpoint.newest(models, "model_epoch_*.pth")
        if start is None and list(models.glob("model_epoch_*.pth")):
            raise ValueError(f"{models}: none of its checkpoints can be read; mend or move them")
        if start is None:
            print(f"nothing to resume in {models}: starting from scratch")
    if start:
        saved = checkpoint.load(start)
        progress = Progress(**saved["progress"])
        trained = Config.from_dict(saved["config"])
        if more:
            begun = progress.epoch + (progress.images > 0)  # an epoch under way is finished first
            trained = replace(trained, budget="", epochs=begun + more)
        elif args.load_checkpoint_path and "budget" in given:
            progress.budget_from = progress.seconds
        elif args.load_checkpoint_path:
            print(describe(start, saved, trained))
            return 0
        if args.resume and "epochs" in given:
            trained = replace(trained, budget="")
        cfg, notes = merge(trained, given)
        for name in ("batch_size", "max_images", "seed"):  # they set what is left of an epoch
            if progress.images and getattr(cfg, name) != getattr(trained, name):
                raise ValueError(
                    f"{name} = {getattr(cfg, name)}: {start} is inside an epoch, begun with "
                    f"{getattr(trained, name)}; finish it first"
                )
        for note in notes:
            print(note)
        spent = progress.seconds - progress.budget_from
        if spent >= parse_duration(cfg.budget) if cfg.budget else progress.epoch >= cfg.epochs:
            print(f"nothing left to do.\n{describe(start, saved, cfg)}")
            return 0
    return train(cfg, progress, start, began)


if __name__ == "__main__":
    run_script("train.py", main)
