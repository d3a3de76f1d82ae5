"""Distillation against closed forms: of Gaussian data, the flow and so the student are known."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from test_diffusion import GaussianData

import distill
import train
from checkpoint import LoadedModel, Progress, TrainState
from config import Config
from data import load_split
from diffusion import Diffusion
from distill import (
    Distillation,
    batch_of_step,
    student_settings,
    teacher_settings,
    x_0_between,
)
from model import UNet
from pipeline import Pipeline
from system.randomness import seeded_generator

CPU = torch.device("cpu")
PLAIN = {"img_size": 8, "guidance": 1.0, "clip_loss": False, "clip_x_0": False}
TEACHER = Config(**PLAIN)
MEAN, STD = torch.linspace(-0.6, 0.9, 11, dtype=torch.float64), 0.5  # of GaussianData


def distillation(student_steps: int, teacher: Config = TEACHER) -> Distillation:
    model = GaussianData(Diffusion(teacher), STD)
    loaded = LoadedModel(Path("teacher"), teacher, model, None, Progress(), CPU, "")
    return Distillation(student_settings(teacher, student_steps), loaded)


def flow(process: Diffusion, x_t: torch.Tensor, y: torch.Tensor, t: int, u: int) -> torch.Tensor:
    """Where the probability flow of the Gaussian data takes x_t by time u."""
    mean = MEAN[y][:, None, None, None]
    (m_t, s_t), (m_u, s_u) = (
        (a.sqrt() * mean, (a * STD**2 + 1 - a).sqrt())
        for a in (process.alpha_bar[t], process.alpha_bar[u])
    )
    return m_u + s_u / s_t * (x_t - m_t)


class ExactStudent:
    """Goes in one step where the flow goes, from the start of each segment."""

    def __init__(self, process: Diffusion) -> None:
        self.process, self.ends = process, dict(itertools.pairwise(process.sampling_times()))

    def __call__(self, x_t, t, y):
        out = torch.empty_like(x_t)
        for start in t.unique().tolist():
            some, u = t == start, self.ends[start]
            x_u = flow(self.process, x_t[some].double(), y[some], start, u)
            out[some] = x_0_between(self.process, x_t[some].double(), x_u, start, u).to(x_t.dtype)
        return out


def some_noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=seeded_generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("student_steps", [1, 2, 4])
def test_the_goal_of_a_segment_is_where_the_flow_goes(student_steps, monkeypatch):
    monkeypatch.setattr(distill, "TEACHER_STEPS", 256)
    loss, y = distillation(student_steps), torch.arange(10)
    assert len(loss.segments) == student_steps
    for t, u in loss.segments:
        x_t = some_noise(10, seed=t)
        x_u = loss.student.step(x_t, loss.goal(x_t, y, t, u), t, u)
        assert torch.allclose(x_u, flow(loss.student, x_t, y, t, u), atol=2e-3)


@pytest.mark.parametrize("student_steps", [1, 2, 4])
def test_the_loss_is_least_for_the_exact_student(student_steps):
    loss, y = distillation(student_steps), torch.arange(64) % 10
    x_0 = MEAN[y][:, None, None, None].float() + STD * some_noise(64).float()
    exact = ExactStudent(loss.student)

    def value(model) -> float:
        return loss.loss(model, x_0, y, seeded_generator(3)).item()

    best = value(exact)
    assert best < 2e-3  # 16 steps of the teacher are almost exact
    for change in (-0.1, 0.1):
        assert value(lambda *x, change=change: exact(*x) + change) > best + 0.003
    teacher = loss.denoiser  # a student as it begins
    assert value(lambda x, t, y: torch.cat([teacher(*each) for each in per_time(x, t, y)])) > best


def per_time(x, t, y):
    return [(x[t == each], int(each), y[t == each]) for each in t.unique().flip(0)]


@pytest.mark.parametrize("student_steps", [1, 2, 4])
def test_an_exact_student_draws_the_data_in_as_many_calls(student_steps):
    loss, y = distillation(student_steps), torch.full((2000,), 3)
    x_0 = Pipeline(loss.student.cfg, ExactStudent(loss.student)).draw(y).double()
    assert loss.student.network_calls() == student_steps
    assert x_0.mean().item() == pytest.approx(MEAN[3].item(), abs=0.01)
    assert x_0.std().item() == pytest.approx(STD, abs=0.01)


def test_every_segment_gets_its_part_of_a_batch():
    loss, seen = distillation(4), []

    def model(x, t, y):
        seen.append(t)
        return x

    loss.loss(model, torch.zeros(10, 1, 8, 8), torch.arange(10), seeded_generator(0))
    assert seen[0].tolist() == [1000] * 3 + [750] * 2 + [500] * 3 + [250] * 2


def test_what_a_teacher_leaves_black_costs_a_student_nothing_however_black():
    cfg = Config(img_size=8, guidance=1.0)
    black = LoadedModel(Path("teacher"), cfg, lambda x, t, y: x * 0 - 3, None, Progress(), CPU, "")
    loss = Distillation(student_settings(cfg, 4), black)
    x_0, y = torch.full((8, 1, 8, 8), -1.0), torch.arange(8)
    for black_enough in (-1.0, -2.0):
        model = lambda x, t, y, v=black_enough: torch.full_like(x, v)  # noqa: E731
        assert loss.loss(model, x_0, y, seeded_generator(0)).item() == 0
    assert loss.loss(lambda x, t, y: x * 0 - 0.9, x_0, y, seeded_generator(0)).item() > 0.001


@pytest.mark.parametrize("error", [0.001, 0.1])
def test_at_any_noise_a_students_error_counts_unsquared(error):
    loss, y = distillation(4), torch.arange(64) % 10
    goals = [
        loss.goal(x, labels, *ends)
        for x, labels, ends in zip(batch_of(loss), y.split(16), loss.segments, strict=True)
    ]
    off = torch.cat(goals) + error
    x_0 = MEAN[y][:, None, None, None].float().expand(64, 1, 8, 8)
    value = loss.loss(lambda x, t, y: off, x_0, y, seeded_generator(3))
    weight = loss.student.loss_weight[[t for t, _ in loss.segments]].mean()
    unsquared = (error**2 + 0.02**2) ** 0.5 - 0.02
    assert value.item() == pytest.approx(float(weight) * unsquared, rel=2e-3)


def batch_of(loss: Distillation) -> tuple[torch.Tensor, ...]:
    """The noisy images that the loss of 64 images draws from seeded_generator(3), by segment."""
    y = torch.arange(64) % 10
    x_0 = MEAN[y][:, None, None, None].float().expand(64, 1, 8, 8)
    eps = torch.randn(64, 1, 8, 8, generator=seeded_generator(3))
    return loss.student.add_noise(x_0, loss.starts.repeat_interleave(16), eps).split(16)


def test_batches_are_seen_three_times_in_turn():
    numbers = [batch_of_step(step, Config(teacher="a")) for step in range(100)]
    assert numbers[:96] == 3 * list(range(32))
    assert numbers[96:] == [32, 33, 34, 35]
    large = Config(teacher="a", batch_size=10_000)
    assert [batch_of_step(step, large) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [batch_of_step(step, Config()) for step in range(7)] == list(range(7))  # no student


def test_a_batch_seen_again_needs_no_teacher_and_is_what_a_resumed_run_would_make(monkeypatch):
    monkeypatch.setattr(distill, "KEPT_IMAGES", 16)
    small = {"widths": (8, 8), "embedding_size": 8, "dense_size": 0, "guidance": 1.0}
    network = UNet(Config(**small)).requires_grad_(False)
    torch.nn.init.normal_(network.head.weight, std=0.1)
    cfg = replace(student_settings(Config(**small), 2), teacher="a teacher", batch_size=8)
    images, labels = load_split(Config(max_images=80), train=True, device=CPU)
    weights, calls = [], []
    for is_resumed_at_each_step in (False, True):
        seen: list[int] = []
        counted = lambda x, t, y, seen=seen: seen.append(len(x)) or network(x, t, y)  # noqa: E731
        teacher = LoadedModel(Path("teacher"), Config(**small), counted, None, Progress(), CPU, "")
        state, loss = TrainState.initial(cfg, CPU), Distillation(cfg, teacher)
        for _ in range(7):  # batches 0 1 0 1 0 1 2
            if is_resumed_at_each_step:
                loss = Distillation(cfg, teacher)
            x_0, y = train.batch(cfg, images, labels, state.progress)
            train.training_step(cfg, loss.loss, state, x_0, y, fraction=0.0)
        weights.append(dict(state.model.state_dict()))
        calls.append(len(seen))
    assert_same(*weights)
    assert calls[0] * 7 == calls[1] * 3


def test_a_teachers_guidance_begins_no_later_than_usual():
    for high, used in ((0.8, 0.9), (0.9, 0.9), (1.0, 1.0)):
        assert teacher_settings(Config(guidance_high=high)).guidance_high == used


def test_a_student_has_its_teachers_network_and_its_own_sampling():
    teacher = Config(widths=(16, 24), schedule="sigmoid", prediction="v", batch_size=16, seed=7)
    cfg = student_settings(teacher, 2)
    assert (cfg.widths, cfg.schedule, cfg.prediction) == ((16, 24), "sigmoid", "v")
    assert (cfg.sampler, cfg.steps, cfg.eta, cfg.guidance) == ("ddim", 2, 0.0, 1.0)
    assert cfg.guide_fraction == 0
    assert (cfg.clip_x_0, cfg.clip_loss) == (True, True)
    cfg = student_settings(Config(clip_x_0=False, clip_loss=False), 2)
    assert (cfg.clip_x_0, cfg.clip_loss) == (False, False)
    assert (cfg.batch_size, cfg.seed) == (Config().batch_size, Config().seed)


def test_a_student_can_be_a_teacher_and_then_draws_in_its_own_steps():
    first = student_settings(TEACHER, 4)
    first = Config.from_dict(first.to_dict() | {"teacher": "pretrained"})
    loss = distillation(1, first)
    assert loss.teacher.sampling_times() == [1000, 750, 500, 250, 0]
    assert loss.teacher.cfg.sampler == "ddim"


def test_a_teacher_of_one_step_or_too_few_timesteps_is_refused():
    single = Config.from_dict(student_settings(TEACHER, 1).to_dict() | {"teacher": "pretrained"})
    with pytest.raises(ValueError, match="a single step already"):
        student_settings(single, 1)
    with pytest.raises(ValueError, match="8 timesteps, but needs at least 16"):
        student_settings(Config(timesteps=8, steps=8), 1)


@pytest.mark.parametrize("student_steps", [3, 5, 16, 32])
def test_a_number_of_steps_that_does_not_fit_the_teachers_is_refused(student_steps):
    with pytest.raises(
        ValueError, match=f"student_steps = {student_steps}: .* choose 1 or 2 or 4 or 8"
    ):
        student_settings(TEACHER, student_steps)


def test_examples_of_large_images_are_kept_within_bounds(monkeypatch):
    """And batches are repeated while their examples are kept."""
    loss = distillation(4)
    monkeypatch.setattr("distill.KEPT_BYTES", 3 * 4 * 8 * 8 * 20)  # 20 images
    x_0, y = torch.zeros(8, 1, 8, 8), torch.arange(8)
    cfg = replace(loss.student.cfg, batch_size=8, teacher="a")
    numbers = [batch_of_step(step, cfg) for step in range(60)]
    assert numbers[:9] == [0, 1, 0, 1, 0, 1, 2, 3, 2]
    taught, examples = [], loss.examples
    monkeypatch.setattr(loss, "examples", lambda *a: taught.append(1) or examples(*a))
    for number in numbers:
        loss.loss(ExactStudent(loss.student), x_0, y, seeded_generator(number))
        assert sum(len(x_t) for x_t, *_ in loss.recent.values()) <= 40
    assert len(taught) == len(set(numbers)) == 20


@pytest.mark.parametrize("clamps", [True, False])
def test_a_student_forgives_what_its_sampler_clamps(clamps):
    cfg = student_settings(Config(clip_x_0=clamps, clip_loss=not clamps), 2)
    assert (cfg.clip_x_0, cfg.clip_loss) == (clamps, clamps)


def test_a_student_has_its_teachers_labels():
    own = {"dataset": "folder", "num_classes": 2, "class_names": "cat/dog", "preview_digits": "dog"}
    cfg = student_settings(Config(**own), 2)
    assert {name: getattr(cfg, name) for name in own} == own


def gaussian_teacher(cfg: Config, guide: object = None) -> LoadedModel:
    model = GaussianData(Diffusion(cfg))
    return LoadedModel(Path("t"), cfg, model, guide, Progress(), torch.device("cpu"), "")


def test_a_teacher_computes_in_its_students_precision():
    cfg = Config(img_size=8, precision="float32")
    student = replace(student_settings(cfg, 2), precision="bf16")
    assert Distillation(student, gaussian_teacher(cfg)).teacher.cfg.precision == "bf16"


def test_a_teacher_is_guided_by_its_guide():
    cfg = Config(img_size=8, guidance=2.0, clip_x_0=False)
    exact, calls = GaussianData(Diffusion(cfg)), []

    def guide(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return exact(x, t, y)

    loss = Distillation(student_settings(cfg, 4), gaussian_teacher(cfg, guide))
    loss.goal(some_noise(3), torch.arange(3), *loss.segments[1])
    assert calls


def test_parts_of_a_batch_add_up_to_its_loss():
    whole, parts = distillation(4), distillation(4)
    y = torch.arange(64) % 10
    x_0 = MEAN[y][:, None, None, None].float() + STD * some_noise(64).float()
    exact = ExactStudent(whole.student)

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return exact(x, t, y) + 0.1 * y[:, None, None, None]

    expected = whole.loss(model, x_0, y, seeded_generator(3))
    found = sum(
        (part.stop - part.start) / 64 * parts.loss(model, x_0, y, seeded_generator(3), part)
        for part in (slice(0, 20), slice(20, 64))
    )
    torch.testing.assert_close(found, expected)
