"""Train the conditional U-Net: python train.py --epochs 30, or --budget 10m."""

import interface  # noqa: F401  (first, so that import errors are one line, too)

# isort: split
import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import Progress, TrainState, load_model
from config import Config
from data import fingerprint, load_split, to_model_range
from diffusion import Diffusion, Model
from distill import Distillation, batch_of_step
from interface.cli import run_script
from interface.flags import train_flags
from interface.models import find_teacher
from interface.plan import Plan, planned
from interface.previews import draw_missing_previews, draw_preview
from interface.runs import Run, record_data
from system import distributed
from system.machine import compile_network, pick_device
from system.randomness import seeded_generator

# Every random number of training depends on (seed, stream, epoch or batch) alone: a resumed run
# draws what an uninterrupted one would have drawn, and previews cannot disturb training.
ORDER_STREAM, NOISE_STREAM, VALIDATION_STREAM, TRIAL_STREAM = 1, 2, 3, 4
LONGEST_WARMUP = 0.1  # of the epochs; with a budget there is no such limit
VALIDATION_IMAGES = 1000  # 0.6 % of an epoch's work; at most a sixtieth of the training images

# (model, x_0, y, generator, part of the batch) -> the mean loss of that part
Loss = Callable[[Model, Tensor, Tensor, torch.Generator, slice], Tensor]


def train(plan: Plan, began: float) -> int:
    """Train as planned; time counts from `began`, a time of perf_counter. Returns the exit code: 0,
    or 128 + the signal that stopped the run. Raises ValueError for settings that do not fit the
    data or the machine, FloatingPointError if training diverges."""
    cfg, device = plan.cfg, pick_device(plan.cfg.device)
    images, labels = load_split(cfg, train=True, device=device)
    count = min(VALIDATION_IMAGES, max(1, len(images) // 60))
    test = load_split(cfg, train=False, device=device)
    held_out = [x[:: max(1, len(x) // count)][:count] for x in test]  # spread: they may be sorted
    state, loss = prepare(plan, fingerprint(images, labels), device)
    run = Run(plan, state, len(images), began)
    if cfg.compile and not run.done:
        compile_model(cfg, loss, state, *batch(cfg, images, labels, state.progress))
    distributed.barrier()  # until all have read what the first one will move aside
    if not run.open():
        return 0

    while not run.done and not run.stopped_by:
        step_began = time.perf_counter()
        x_0, y = batch(cfg, images, labels, state.progress)
        training_step(cfg, loss, state, x_0, y, run.fraction)
        run.update_clock()
        keep_guide(cfg, state, run.fraction)
        run.show_progress()
        state.epoch_seconds += time.perf_counter() - step_began
        epoch_done = run.epoch_done  # which start_next_epoch resets
        if epoch_done or run.done:
            run.log_epoch(validation_loss(cfg, loss, state.ema, *held_out))
        if epoch_done:
            state.start_next_epoch()
        # A run that a signal stops is saved below, without a grid of samples
        if run.save_due(epoch_done) and (run.done or not run.stopped_by):
            run.save_with_levels(images, labels)
            draw_preview(run, state)
            run.draw_curves()
            run.check_signals()

    if run.stopped_by and not run.done:
        if not run.is_saved:
            run.save_with_levels(images, labels)
        run.draw_curves()
        return run.report_stop()
    draw_missing_previews(run)
    run.finish()
    return 0


def prepare(plan: Plan, data: dict[str, Any], device: torch.device) -> tuple[TrainState, Loss]:
    """The state with which training begins, new or from a checkpoint, and the loss. `data` is the
    fingerprint of the training data; a student's teacher is added to it."""
    cfg = plan.cfg
    state, loss = TrainState.initial(cfg, device), Diffusion(cfg).loss
    if plan.start:  # otherwise the run is new
        checkpoint.restore(plan.start, state)
        state.progress = plan.progress  # the same, but for `budget_from` where a budget is new
    # The model whose averaged weights this run begins with
    source = load_model(plan.weights, device) if plan.weights else None
    if cfg.is_student:
        # The SHA-256 of its teacher, where a checkpoint or a reduced model of the student has it
        learned_from = (state.data or (source and source.data) or {}).get("teacher")
        teacher = load_model(find_teacher(cfg, learned_from, exactly=not source), device)
        print(f"training a student of {teacher.path}")
        loss = Distillation(cfg, teacher).loss
        data["teacher"] = teacher.sha256
        source = source or (None if plan.start else teacher)  # a new student begins as its teacher
    if source:
        for network in (state.model, state.ema):
            network.load_state_dict(source.model.state_dict())
    record_data(plan, state, data)
    return state, loss


def compile_model(cfg: Config, loss: Loss, state: TrainState, x_0: Tensor, y: Tensor) -> None:
    """Compile the network and try it, so that it fails before anything is set aside, if it does."""
    compile_network(state.model, graphs=cfg.accumulate == 1)
    generator = seeded_generator(cfg.seed, TRIAL_STREAM, device=x_0.device)
    loss(state.model, x_0, y, generator, distributed.my_parts(len(y), cfg.accumulate)[0]).backward()


def batch(cfg: Config, images: Tensor, labels: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """The x_0 (B, C, H, W) in [-1, 1] and labels (B,) of this step, in the epoch's random order."""
    order = epoch_order(cfg.seed, progress.epoch, len(images), images.device)
    first = batch_of_step(progress.images // cfg.batch_size, cfg) * cfg.batch_size
    index = order[first : first + cfg.batch_size]
    return to_model_range(images[index]), labels[index]


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """The epoch's order of `count` images, int64 (count,); cached for all steps of the epoch."""
    generator = seeded_generator(seed, ORDER_STREAM, epoch)
    return torch.randperm(count, generator=generator).to(device)


def training_step(
    cfg: Config, loss: Loss, state: TrainState, x_0: Tensor, y: Tensor, fraction: float
) -> None:
    """Take one optimizer step on the loss of x_0 (B, C, H, W) in [-1, 1] and labels y int64 (B,).
    `fraction` is how much of the run is done. Updates the weights, their average, the optimizers,
    the totals, and the counts of steps and images.

    The batch is computed in parts, some by each process. For each part the random numbers of the
    whole batch are drawn, so that the parts add up to the same step however many there are."""
    B, progress = len(y), state.progress
    state.model.zero_grad()
    total = torch.zeros((), device=x_0.device)
    random_labels = state.guide is None and cfg.guide_fraction > 0
    in_epoch = progress.images // cfg.batch_size
    # progress.step, except for a student, which meets a batch several times with the same noise
    batch_key = progress.step - in_epoch + batch_of_step(in_epoch, cfg)
    for part in distributed.my_parts(B, cfg.accumulate):
        generator = seeded_generator(cfg.seed, NOISE_STREAM, batch_key, device=x_0.device)
        labels = randomize_labels(y, cfg, generator) if random_labels else y
        value = (part.stop - part.start) / B * loss(state.model, x_0, labels, generator, part)
        value.backward()
        total += value.detach()
    parameters = list(state.model.parameters())
    distributed.add_up([*(p.grad for p in parameters), total])
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
    # From guide_fraction on the rate starts over, even if the warm-up still delays the guide
    making_guide = state.guide is None and fraction < cfg.guide_fraction
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, progress.step, fraction, making_guide)
        optimizer.step()
    progress.step += 1
    progress.images += B
    ema_decay = (1 - 1 / progress.step) ** (ema_gamma(cfg.ema_sigma_rel) + 1)
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), parameters, 1 - ema_decay)
    state.totals += torch.stack([total, grad_norm])


def learning_rate(cfg: Config, step: int, fraction: float, making_guide: bool = False) -> float:
    """A linear warm-up, a linear fall to zero at `guide_fraction`, a jump back to the peak, and a
    second fall to zero at the end of the run. Without a guide there is a single fall."""
    start, end = (0.0, cfg.guide_fraction) if making_guide else (cfg.guide_fraction, 1.0)
    left = min(1.0, max(0.0, (end - fraction) / (end - start)))
    return cfg.learning_rate * warmup(cfg, step, fraction) * left


def warmup(cfg: Config, step: int, fraction: float) -> float:
    """The linear rise from 0 to 1 over `warmup_steps`, or over a tenth of the epochs if that is
    shorter. With a budget, whose time includes start-up, only `warmup_steps` count."""
    part = 0.0 if cfg.budget else fraction / LONGEST_WARMUP
    return min(1.0, max((step + 1) / (cfg.warmup_steps + 1), part))


def randomize_labels(y: Tensor, cfg: Config, generator: torch.Generator) -> Tensor:
    """Labels (B,), each replaced by a random one with probability `guide_label_noise`: a guide
    should make the model's own mistakes, only more of them, and wrong digits are among them."""
    replaced = torch.rand(y.shape, generator=generator, device=y.device) < cfg.guide_label_noise
    drawn = torch.randint(cfg.num_classes, y.shape, generator=generator, device=y.device)
    return torch.where(replaced, drawn, y)


def keep_guide(cfg: Config, state: TrainState, fraction: float) -> None:
    """Keep a copy of the averaged model as the guide, once `guide_fraction` of the run and the
    warm-up are over."""
    is_warm = warmup(cfg, state.progress.step, fraction) >= 1
    if state.guide is None and is_warm and fraction >= cfg.guide_fraction > 0:
        state.guide = copy.deepcopy(state.ema)


@functools.cache
def ema_gamma(sigma_rel: float) -> float:
    """The gamma of the power-function average of relative width `sigma_rel`, whose decay at step k
    is (1 - 1/k)^(gamma + 1). Karras et al. 2024 (EDM2), section 3 and appendix C."""
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


@torch.no_grad()
def validation_loss(cfg: Config, loss: Loss, model: Model, images: Tensor, labels: Tensor) -> float:
    """A model's loss on test images (N, C, H, W), always with the same noise and timesteps: it
    rises when the model overfits. It is only shown; nothing is chosen by it."""
    total = torch.zeros((), device=images.device)
    for first in range(0, len(images), cfg.batch_size):
        part = slice(first, first + cfg.batch_size)
        x_0, y = to_model_range(images[part]), labels[part]
        generator = seeded_generator(cfg.seed, VALIDATION_STREAM, first, device=images.device)
        total += len(y) * loss(model, x_0, y, generator, slice(None))
    return float(total) / len(images)


def main() -> int:
    began = time.perf_counter() - time.process_time()  # about when the process started
    with planned(train_flags()) as plan:
        return train(plan, began) if plan.action == "train" else 0


if __name__ == "__main__":
    run_script("train.py", main)
