"""Distillation: the loss of a student, which draws in a few network calls what its teacher draws in
many. Progressive distillation (Salimans & Ho 2022), with all halvings at once.

Without added noise, a sampler is a function that takes x_t to x_s. The way from T to 0 is divided
into `student_steps` segments, and the student learns to cross each of them in a single step that
ends where its guided teacher ends after several. It starts from its teacher's weights, needs no
guidance, and can be a teacher in turn.
"""

import itertools
import math
from dataclasses import replace

import torch
from torch import Generator, Tensor

from checkpoint import LoadedModel
from config import Config
from diffusion import Diffusion, Model

TEACHER_STEPS = 16  # of a teacher that is not itself a student
REPEATS = 3  # steps that use each batch, as making a teacher's examples costs more than training
KEPT_IMAGES = 4096  # images whose examples are kept until each has served REPEATS times
KEPT_BYTES = 500_000_000  # their limit where images are large; `recent` may hold twice as much
ROUNDING = 1e-3  # a goal this close to black or white is meant to be exactly that
BELOW_ANY_SNR = 1e-6  # as unsquared_snr: errors count unsquared at every t


def student_settings(teacher: Config, student_steps: int) -> Config:
    """The settings of a student: its teacher's network, default training, and sampling in
    `student_steps` steps of ddim. Raises ValueError unless those divide the teacher's steps and are
    fewer.

    If it predicts x_0, its errors count unsquared at any noise, which blurs less: there is one
    right answer for each x_t, not a mean of many."""
    steps = teacher_settings(teacher).steps
    possible = [str(n) for n in range(1, steps) if steps % n == 0]
    if not possible:
        raise ValueError("teacher: draws in a single step already; choose another")
    if str(student_steps) not in possible:
        choices = f"with this teacher, choose {' or '.join(possible)}"
        raise ValueError(f"student_steps = {student_steps}: {choices}")
    drawing = {"sampler": "ddim", "steps": student_steps, "eta": 0.0, "guidance": 1.0}
    own = {
        "student_steps": student_steps,
        "guide_fraction": 0.0,
        "clip_x_0": teacher.clip_x_0,
        "clip_loss": teacher.clip_x_0,  # which relies on that clamp
        "dataset": teacher.dataset,
        "preview_digits": teacher.preview_digits,
        "unsquared_snr": BELOW_ANY_SNR,
    }
    return replace(Config(), **teacher.select("model", "classes") | drawing | own)


def teacher_settings(cfg: Config) -> Config:
    """How a teacher draws for its student: without added noise, in steps that divide into segments.
    Its `guidance_high` is at least config.py's, as without added noise more digits come out wrong
    if guidance begins at a lower t."""
    if cfg.is_student:
        return cfg
    if cfg.timesteps < TEACHER_STEPS:
        needs = f"needs at least {TEACHER_STEPS}; choose another"
        raise ValueError(f"teacher: has {cfg.timesteps} timesteps, but {needs}")
    high = max(cfg.guidance_high, Config().guidance_high)
    return replace(cfg, sampler="dpmpp", steps=TEACHER_STEPS, eta=0.0, guidance_high=high)


def kept_images(cfg: Config) -> int:
    """How many images a group of batches has (see batch_of_step): fewer if they are large."""
    example = 12 * cfg.img_channels * cfg.img_size**2  # bytes of x_t, x_0 and eps
    return min(KEPT_IMAGES, KEPT_BYTES // example)


def batch_of_step(step: int, cfg: Config) -> int:
    """Which batch of its epoch a `step` takes, both counted from 0. A student goes through a group
    of batches (32, if a batch has 128 images) REPEATS times before it moves on to the next, so that
    a long epoch sees about a third of the images. Otherwise each step takes the next batch."""
    if not cfg.is_student:
        return step
    in_turn = max(1, kept_images(cfg) // cfg.batch_size)
    return step // (REPEATS * in_turn) * in_turn + step % in_turn


class Distillation:
    """The loss of the student that `cfg` describes. Raises ValueError if a batch is too small, or
    if the teacher cannot teach it."""

    def __init__(self, cfg: Config, teacher: LoadedModel) -> None:
        if cfg.batch_size < cfg.steps:
            raise ValueError(f"batch_size = {cfg.batch_size}: choose at least {cfg.steps} (steps)")
        steps = teacher_settings(teacher.cfg).steps
        if steps <= cfg.steps or steps % cfg.steps:
            wrong = f"draws in {steps} steps, not a larger multiple of {cfg.steps}"
            raise ValueError(f"{teacher.path}: {wrong}; restore this student's own teacher")
        drawing = replace(teacher_settings(teacher.cfg), precision=cfg.precision)
        self.student, self.teacher = Diffusion(cfg), Diffusion(drawing)
        self.denoiser = self.teacher.guided(teacher.model, teacher.guide)
        self.segments = list(itertools.pairwise(self.student.sampling_times()))
        self.starts = torch.tensor([t for t, _ in self.segments], device=teacher.device)
        self.recent: dict[tuple[int | None, ...], tuple[Tensor, ...]] = {}  # examples, see `loss`

    def loss(
        self, model: Model, x_0: Tensor, y: Tensor, generator: Generator, part: slice = slice(None)
    ) -> Tensor:
        """The weighted loss (see Diffusion.prediction_loss) of a `part` of the batch, a scalar. The
        target is the x_0_hat with which one step goes from x_t to where the teacher arrives. x_0
        (B, C, H, W), in [-1, 1], are training images, y int64 (B,) their labels.

        The batch is divided among the segments, in order, and each image is noised to the start of
        its segment. Noise from `generator` is drawn for the whole batch. Examples are kept under
        the generator's seed, so the same seed must always come with the same batch.
        """
        key = generator.initial_seed(), part.start, part.stop
        if key not in self.recent:
            limit = 2 * kept_images(self.student.cfg)
            if sum(len(x_t) for x_t, *_ in self.recent.values()) >= limit:
                del self.recent[next(iter(self.recent))]  # the oldest; validation adds some, too
            self.recent[key] = self.examples(x_0, y, generator, part)
        return self.student.prediction_loss(model, *self.recent[key])

    def examples(
        self, x_0: Tensor, y: Tensor, generator: Generator, part: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x_t, t, y, and the right answer, x_0 and eps, for a part of the batch."""
        B, K = len(y), len(self.segments)
        t = self.starts[torch.arange(B, device=x_0.device) * K // B][part]
        eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        x_0, y, eps = x_0[part], y[part], eps[part]
        x_t = self.student.add_noise(x_0, t, eps)
        numbers = [i * K // B for i in range(B)][part]  # not from t: that would wait for a GPU
        sizes = [numbers.count(k) for k in range(K)]
        pieces = zip(x_t.split(sizes), y.split(sizes), self.segments, strict=True)
        goals = torch.cat([self.goal(x, labels, *ends) for x, labels, ends in pieces if len(x)])
        signal_scale, noise_scale, _ = self.student.coefficients(t, x_t)
        return x_t, t, y, goals, (x_t - signal_scale * goals) / noise_scale

    @torch.no_grad()
    def goal(self, x_t: Tensor, y: Tensor, t: int, s: int) -> Tensor:
        """The x_0_hat with which one step of the student takes x_t (B, C, H, W) to where the
        teacher, starting at x_t, gets by time s."""
        times = [each for each in self.teacher.sampling_times() if s <= each <= t]
        *_, x_s = self.teacher.sample(self.denoiser, x_t, y, times, None)
        goal = x_0_between(self.student, x_t, x_s, t, s)
        # clip_loss asks whether a pixel is exactly black or white
        return torch.where((goal.abs() - 1).abs() < ROUNDING, goal.sign(), goal)


def x_0_between(diffusion: Diffusion, x_t: Tensor, x_s: Tensor, t: int, s: int) -> Tensor:
    """The x_0_hat with which `Diffusion.step` goes from x_t to x_s if it adds no noise."""
    a_t, a_s = diffusion.alpha_bar_at[t], diffusion.alpha_bar_at[s]
    kept = math.sqrt((1 - a_s) / (1 - a_t))
    return (x_s - kept * x_t) / (math.sqrt(a_s) - kept * math.sqrt(a_t))
