"""Train the conditional U-Net: python train.py --epochs 30, or --budget 10m."""

import interface  # noqa: F401  (first, so that errors are one line while importing, too)

# isort: split
import copy
import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from checkpoint import Progress, TrainState, load_model
from config import Config, parse_labels
from data import fingerprint, load_split, to_model_range, to_uint8
from diffusion import Diffusion, Model
from distill import Distillation
from interface import folder, runs
from interface.cli import (
    Parser,
    add_model_size,
    add_settings,
    expanded_path,
    given_settings,
    run_script,
)
from interface.picture import image_grid, save_png
from interface.runs import Plan, Run, make_plan
from interface.terminal import sampling_bar
from levels import GreyLevels
from system import distributed
from system.files import first_line, optional
from system.machine import compile_network, pick_device, pick_precision
from system.randomness import ImageNoise, seeded_generator

# Every random number of training is a function of (seed, stream, epoch or step): a resumed run
# draws what an uninterrupted one would have drawn, and previews cannot disturb training.
ORDER_STREAM, NOISE_STREAM, VALIDATION_STREAM = 1, 2, 3
LEVEL_IMAGES, LEVEL_NOISE = 256, 0.2  # redrawn to compare grey levels, from at least this t / T
VALIDATION_IMAGES = 1000  # 0.6 % of an epoch's work; at most a sixtieth of the training images

# (model, x_0, y, generator, part of the batch) -> the mean loss of that part
Loss = Callable[[Model, Tensor, Tensor, torch.Generator, slice], Tensor]


def train(plan: Plan, device: torch.device, began: float) -> int:
    """Train as planned; time counts from `began` (of time.perf_counter). Returns the exit code: 0,
    or 128 + the signal that stopped the run. Raises ValueError for settings that do not fit the
    data or the machine, FloatingPointError if training diverges."""
    cfg = plan.cfg
    images, labels = load_split(cfg, train=True, device=device)
    few = min(VALIDATION_IMAGES, max(1, len(images) // 60))
    unseen = [x[:few] for x in load_split(cfg, train=False, device=device)]
    diffusion, state = Diffusion(cfg), TrainState.initial(cfg, device)
    if plan.start:
        checkpoint.restore(plan.start, state)
        state.progress = plan.progress
    if plan.weights:
        state.start_from(load_model(plan.weights, device))
    loss, data = diffusion.loss, fingerprint(images, labels)
    if cfg.is_student:
        expected = (state.data or {}).get("teacher")
        teacher = load_model(runs.find_teacher(cfg, expected), device)
        print(f"a student of {teacher.path}")
        loss, data["teacher"] = Distillation(cfg, teacher).loss, teacher.sha256
        if not plan.start and not plan.weights:
            state.start_from(teacher)
    runs.check_data(plan, state, data)
    if cfg.compile:
        compile_network(state.model)
    state.network = distributed.data_parallel(state.model)
    run = Run(plan, state, len(images), began)
    if run.done and distributed.from_first(lambda: folder.is_complete(cfg.output_dir)):
        print("nothing left to do: starting up took the rest of the budget")
        return 0
    announce(cfg, state, device, len(images))
    run.open()

    while not run.done and not run.stopped_by:
        step_began = time.perf_counter()
        x_0, y = batch(cfg, images, labels, state.progress)
        training_step(cfg, loss, state, x_0, y, run.fraction)
        state.epoch_seconds += time.perf_counter() - step_began
        run.update_clock()
        keep_guide(cfg, state, run.fraction)
        run.show_progress()
        if run.epoch_done or run.done or run.stopped_by:
            distributed.average(state.totals)  # each process has added the loss of its own part
        if run.epoch_done or run.done:
            run.log_epoch(validation_loss(cfg, loss, state, *unseen))
        if run.epoch_done:
            state.start_next_epoch()
        if run.save_due and (run.done or not run.stopped_by):
            save(run, images, labels)
            draw_preview(run, state)
            run.draw_curves()
            run.heed_signals()

    if run.stopped_by and not run.done:
        save(run, images, labels)
        run.draw_curves()
        print(f"stopped at {state.progress}; to continue: {runs.train_command(cfg, '--resume')}")
        return 128 + run.stopped_by
    finish(run)
    return 0


def announce(cfg: Config, state: TrainState, device: torch.device, images: int) -> None:
    """Say what is trained, on what, and whether this machine could do more."""
    size = sum(parameter.numel() for parameter in state.model.parameters())
    precision, processes = pick_precision(cfg.precision, device), distributed.processes()
    where = f"{device}" if processes == 1 else f"{processes} processes ({device.type})"
    if device.type == "cuda" and processes == 1 < torch.cuda.device_count():
        command = f"torchrun --standalone --nproc_per_node={torch.cuda.device_count()} train.py"
        print(f"this uses one of {torch.cuda.device_count()} GPUs; {command} uses all")
    print(f"U-Net of {size:,} parameters on {where}, {precision}; {images:,} images")


def finish(run: Run) -> None:
    """Make up for what could not be drawn or written before, and say how to draw."""
    cfg = run.cfg
    draw_missing_previews(run)
    run.retry_figures()
    if run.state.guide is None and not cfg.is_student:
        how = "1.5 (classifier-free guidance)" if cfg.label_dropout > 0 else "1 (no guidance)"
        print(f"this model has no guide: draw with --guidance {how}")


def batch(cfg: Config, images: Tensor, labels: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """The next x_0 (B, C, H, W) in [-1, 1] and labels (B,), in the epoch's random order."""
    order = epoch_order(cfg.seed, progress.epoch, len(images), images.device)
    index = order[progress.images : progress.images + cfg.batch_size]
    return to_model_range(images[index]), labels[index]


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """The epoch's order of `count` images, int64 (count,); cached for all steps of the epoch."""
    generator = seeded_generator(seed, ORDER_STREAM, epoch)
    return torch.randperm(count, generator=generator).to(device)


def training_step(
    cfg: Config, loss: Loss, state: TrainState, x_0: Tensor, y: Tensor, fraction: float
) -> None:
    """Take one optimizer step on the loss of x_0 (B, C, H, W) in [-1, 1] and labels y int64 (B,),
    when `fraction` of the run is done. Updates all of `state` but its times and its guide.

    The batch is computed in parts, some by each process. All of them draw the random numbers of
    the whole batch, so that the parts add up to the same step however many there are."""
    B, progress = len(y), state.progress
    state.model.zero_grad()
    total, parts = torch.zeros((), device=x_0.device), distributed.my_parts(B, cfg.accumulate)
    for part in parts:
        generator = seeded_generator(cfg.seed, NOISE_STREAM, progress.step, device=x_0.device)
        labels = y
        if state.guide is None and cfg.guide_fraction > 0:  # also while warm-up delays the guide
            labels = randomize_labels(y, cfg, generator)
        # DistributedDataParallel takes the mean over processes, so that theirs count as one each
        weight = (part.stop - part.start) * distributed.processes() / B
        with distributed.averaging(state.network, part == parts[-1]):
            value = weight * loss(state.network, x_0, labels, generator, part)
            value.backward()
        total += value.detach()
    parameters = list(state.model.parameters())
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
    making_guide = state.guide is None and fraction < cfg.guide_fraction
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, progress.step, fraction, making_guide)
        optimizer.step()
    progress.step += 1
    progress.images += len(x_0)
    ema_decay = (1 - 1 / progress.step) ** (ema_gamma(cfg.ema_sigma_rel) + 1)
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), parameters, 1 - ema_decay)
    state.totals += torch.stack([total, grad_norm])


def learning_rate(cfg: Config, step: int, fraction: float, making_guide: bool = False) -> float:
    """A short linear rise, then a linear fall to zero by the time the guide is made; then a second
    linear fall, from the peak to zero at the end of the run."""
    start, end = (0.0, cfg.guide_fraction) if making_guide else (cfg.guide_fraction, 1.0)
    left = min(1.0, max(0.0, (end - fraction) / (end - start)))
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    return cfg.learning_rate * warmup * left


def randomize_labels(y: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
    """Labels (B,), each replaced by a random one with probability `guide_label_noise`: a guide
    should make the model's own mistakes, only more of them, and wrong digits are one kind."""
    replaced = torch.rand(y.shape, generator=generator, device=y.device) < cfg.guide_label_noise
    drawn = torch.randint(cfg.num_classes, y.shape, generator=generator, device=y.device)
    return torch.where(replaced, drawn, y)


def keep_guide(cfg: Config, state: TrainState, fraction: float) -> None:
    """Keep the average as the guide, once `guide_fraction` of the run and the warm-up are over."""
    warm = state.progress.step >= cfg.warmup_steps
    if state.guide is None and warm and fraction >= cfg.guide_fraction > 0:
        state.guide = copy.deepcopy(state.ema)


@functools.cache
def ema_gamma(sigma_rel: float) -> float:
    """The gamma of the power-function average of relative width `sigma_rel`, whose decay at step k
    is (1 - 1/k)^(gamma + 1). Karras et al. 2024 (EDM2), section 3 and appendix C."""
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


@torch.no_grad()
def validation_loss(
    cfg: Config, loss: Loss, state: TrainState, images: Tensor, labels: Tensor
) -> float:
    """The average's loss on images (N, C, H, W) that it was not trained on, always with the same
    noise and timesteps: it rises when the model begins to learn its training images by heart."""
    total = torch.zeros((), device=images.device)
    for first in range(0, len(images), cfg.batch_size):
        part = slice(first, first + cfg.batch_size)
        x_0, y = to_model_range(images[part]), labels[part]
        generator = seeded_generator(cfg.seed, VALIDATION_STREAM, first, device=images.device)
        total += len(y) * loss(state.ema, x_0, y, generator, slice(None))
    return float(total) / len(images)


def save(run: Run, images: Tensor, labels: Tensor) -> None:
    """Write a checkpoint, with its grey levels as they are now."""
    run.state.levels = measure_levels(run.cfg, run.state, images, labels)
    run.save()


@distributed.first_only
@torch.no_grad()
def measure_levels(
    cfg: Config, state: TrainState, images: Tensor, labels: Tensor
) -> GreyLevels | None:
    """How the grey levels that the average draws differ from real ones. Only the last sampling
    steps decide them, so a few training images are noised and drawn again from there: originals and
    copies then differ in little else, and it usually takes no longer than a few training steps.
    None if it fails."""
    diffusion, few, y = Diffusion(cfg), images[:LEVEL_IMAGES], labels[:LEVEL_IMAGES]
    start = (
        min(t for t in diffusion.sampling_times() if t >= LEVEL_NOISE * diffusion.T) / diffusion.T
    )
    noise = ImageNoise(cfg.seed, range(len(few)), few.shape[1:], device=few.device)
    denoiser = diffusion.guided(state.ema, state.guide)
    try:
        *_, drawn = diffusion.sample(denoiser, y, noise, to_model_range(few), strength=start)
    except (MemoryError, RuntimeError) as error:  # the checkpoint matters more
        tqdm.write(f"grey levels not measured: {first_line(error)}")
        return None
    return GreyLevels.measure(images, few, drawn)


@distributed.first_only
def draw_preview(run: Run, state: TrainState) -> None:
    """Write a grid with a row for each digit, always from the same noise, to compare epochs. A stop
    signal ends it."""
    cfg, path = run.cfg, folder.grid_path(run.cfg.output_dir, state.progress)
    labels = list(range(min(10, cfg.num_classes)))  # which "all" means, as a grid has to be short
    if cfg.preview_digits != "all":
        labels = parse_labels(cfg.preview_digits, cfg.label_names)
    diffusion = Diffusion(cfg, state.levels)
    y = torch.tensor(labels).repeat_interleave(cfg.preview_columns).to(state.totals.device)
    with run.side_output(path), sampling_bar(cfg.steps, diffusion.batches(len(y))) as advance:

        def on_state(x: Tensor) -> None:
            advance(x)
            if run.signals:
                raise InterruptedError("stopped by a signal")

        x_0 = diffusion.draw(diffusion.guided(state.ema, state.guide), y, on_state)
        path.parent.mkdir(exist_ok=True)
        grid = image_grid(to_uint8(x_0), cfg.preview_columns)
        save_png(grid, path)
        tqdm.write(f"wrote {path}")
        if run.board:
            run.board.grid(grid, state.progress.step)


@distributed.first_only
def draw_missing_previews(run: Run) -> None:
    """Draw the previews that a kill or a full disk prevented, from their checkpoints."""
    for path, grid in folder.without_grid(run.cfg.output_dir):
        if not run.signals:
            state = TrainState.initial(run.cfg, run.state.totals.device)
            with run.side_output(grid):
                checkpoint.restore(path, state)
                draw_preview(run, state)


def main() -> int:
    began = time.perf_counter() - time.process_time()  # imports count too, as CPU time
    parser = Parser(prog="train.py", description="Train a class-conditional DDPM.")
    start, length = (parser.add_mutually_exclusive_group() for _ in range(2))
    start.add_argument("--resume", action="store_true", help="continue the newest checkpoint")
    load_help = "train it for --budget or K more epochs; with neither, describe it"
    start.add_argument("--load_checkpoint_path", type=expanded_path, metavar="PATH", help=load_help)
    options = {"type": int, "metavar": "K", "default": 0, "help": "train it for K more epochs"}
    length.add_argument("--continue_training_epochs", **options)
    add_settings(length, Config.names("length"))
    groups = ("machine", "model", "student", "training", "sampling", "picture")
    add_settings(parser, Config.names(*groups))
    add_model_size(parser)
    board_help = "also write figures and grids for TensorBoard"
    parser.add_argument("--tensorboard", action="store_true", help=board_help)
    parser.needs("--continue_training_epochs", "--load_checkpoint_path")
    parser.needs("--student_steps", "--teacher")
    counts_all = "--epochs counts from scratch; give --continue_training_epochs instead"
    parser.excludes("--load_checkpoint_path", "--epochs", message=counts_all)
    args = parser.parse_args()
    more = args.continue_training_epochs
    if more < 0:
        raise ValueError(f"continue_training_epochs = {more}: must be at least 0")

    if args.tensorboard:
        optional("torch.utils.tensorboard")  # before anything is moved aside
    given = given_settings(args)
    if args.load_checkpoint_path and not more and "budget" not in given:
        print(runs.describe(make_plan(given, load=args.load_checkpoint_path)))
        return 0
    here = replace(Config(), **{n: given[n] for n in Config.names("machine") if n in given})
    device, out = pick_device(here.device), here.output_dir
    with distributed.joined(device), ExitStack() as stack:
        distributed.from_first(lambda: stack.enter_context(folder.own_folder(out)))
        start = args.resume, args.load_checkpoint_path, more
        if distributed.is_restart() and distributed.from_first(lambda: folder.holds_this_run(out)):
            start = True, None, 0
        plan = distributed.from_first(lambda: make_plan(given, *start))
        if plan.action == "finished":
            print(f"nothing left to do. {runs.describe(plan)}")
            return 0
        if args.resume and not plan.start:
            print(f"nothing to resume in {plan.cfg.output_dir}: starting from scratch")
        for note in plan.notes:
            print(note)
        plan.tensorboard = args.tensorboard
        return train(plan, device, began)


if __name__ == "__main__":
    run_script("train.py", main)
