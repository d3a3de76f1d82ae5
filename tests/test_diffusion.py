"""The process against closed forms: a Gaussian data set has an exact denoiser and exact paths."""

import itertools

import numpy as np
import pytest
import torch

from config import Config
from diffusion import Diffusion, make_alpha_bar
from pipeline import Pipeline
from system.randomness import ImageNoise, seeded_generator

SCHEDULES = ("linear", "cosine", "sigmoid")
PREDICTIONS = ("eps", "v", "x_0")
SAMPLERS = ("ddpm", "ddim", "dpmpp")
FLOOR = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))  # alpha_bar_T of Ho et al. 2020

# Without guidance and without added noise, unless a test asks for them
PLAIN = {"img_size": 8, "guidance": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "eta": 0.0}
PLAIN |= {"unsquared_snr": 0.0}


def diffusion(**settings) -> Diffusion:
    steps = min(20, settings.get("timesteps", 1000))
    return Diffusion(Config(**(PLAIN | {"steps": steps} | settings)))


class GaussianData:
    """The perfect model of a data set in which every pixel of class y is N(mean[y], std²).

    x_t is then N(sqrt(alpha_bar) mean, alpha_bar std² + 1 - alpha_bar), and the deterministic
    samplers' path keeps (x_t - its mean) / its std constant.
    """

    def __init__(self, process: Diffusion, std: float = 0.5) -> None:
        self.process, self.std = process, std
        self.mean = torch.linspace(-0.6, 0.9, process.cfg.null_class + 1, dtype=torch.float64)
        self.calls: list[int] = []

    def moments(self, t: torch.Tensor, y: torch.Tensor):
        a = self.process.alpha_bar[t][:, None, None, None]
        return a, a.sqrt() * self.mean[y][:, None, None, None], a * self.std**2 + 1 - a

    def __call__(self, x_t, t, y):
        self.calls.append(len(x_t))
        a, mean_t, variance_t = self.moments(t, y)
        mean = self.mean[y][:, None, None, None]
        x_0 = mean + a.sqrt() * self.std**2 / variance_t * (x_t - mean_t)
        return predicted(self.process, x_0, x_t, t).to(x_t.dtype)

    def path_end(self, x_T, y):
        """Where the probability flow takes x_T."""
        _, mean_T, variance_T = self.moments(torch.full_like(y, self.process.T), y)
        return self.mean[y][:, None, None, None] + self.std * (x_T - mean_T) / variance_T.sqrt()


def predicted(process: Diffusion, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor):
    """What a network that takes x_0 for the clean image predicts, which depends on `prediction`."""
    a = process.alpha_bar[t][:, None, None, None]
    eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    v = a.sqrt() * eps - (1 - a).sqrt() * x_0
    return {"eps": eps, "v": v, "x_0": x_0}[process.cfg.prediction]


def path(process: Diffusion, model, y: torch.Tensor, guide=None) -> torch.Tensor:
    """All states from noise to image, (steps + 1, N, C, H, W), in float64."""
    size = process.cfg.img_size
    noise = ImageNoise(process.cfg.seed, range(len(y)), (1, size, size), dtype=torch.float64)
    times, denoiser = process.sampling_times(), process.guided(model, guide)
    return torch.stack(list(process.sample(denoiser, noise.draw(), y, times, noise)))


def draw(process: Diffusion, model, y: torch.Tensor, guide=None) -> torch.Tensor:
    return Pipeline(process.cfg, model, guide).draw(y)


# ---- schedules


def test_linear_is_hos_schedule():
    beta = np.linspace(1e-4, 0.02, 1000)
    expected = np.concatenate([[1.0], np.cumprod(1 - beta)])
    process = diffusion(schedule="linear")
    np.testing.assert_allclose(process.alpha_bar, expected, rtol=1e-12)
    alpha = process.alpha_bar[1:] / process.alpha_bar[:-1]
    np.testing.assert_allclose(alpha, 1 - beta, rtol=1e-12)


@pytest.mark.parametrize("T", [2, 10, 400, 4000])
def test_linear_of_another_length_follows_the_same_curve_to_the_same_noise(T):
    coarse, fine = make_alpha_bar("linear", T), make_alpha_bar("linear", 1000)
    assert coarse[-1].item() == pytest.approx(FLOOR, rel=1e-9)
    assert coarse[T // 2].item() == pytest.approx(fine[500].item(), rel=1e-9)


@pytest.mark.parametrize("T", [1000, 250])
def test_cosine_and_sigmoid_against_their_papers(T):
    u = np.arange(T + 1) / T
    cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine /= cosine[0]
    logistic = 1 / (1 + np.exp(3 - 6 * u))  # from -3 to 3
    sigmoid = (logistic[-1] - logistic) / (logistic[-1] - logistic[0])
    for name, expected in (("cosine", cosine), ("sigmoid", sigmoid)):
        alpha_bar = make_alpha_bar(name, T).numpy()
        np.testing.assert_allclose(alpha_bar, expected, atol=1.01 * FLOOR)
        assert alpha_bar[-1] == pytest.approx(FLOOR, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [2, 7, 1000, 4000])
def test_every_schedule_falls_from_clean_to_nearly_pure_noise_in_float64(schedule, T):
    process = diffusion(schedule=schedule, timesteps=T)
    assert process.alpha_bar.dtype == torch.float64
    assert process.alpha_bar.shape == (T + 1,)
    assert process.alpha_bar[0] == 1
    assert (process.alpha_bar.diff() < 0).all()
    assert 0 < process.alpha_bar[T] < 5e-5
    beta = 1 - process.alpha_bar[1:] / process.alpha_bar[:-1]
    assert ((beta > 0) & (beta < 1)).all()
    log_snr = torch.tensor(process.log_snr_at[1:], dtype=torch.float64)
    torch.testing.assert_close(log_snr.sigmoid(), process.alpha_bar[1:])


# ---- forward process, predictions, loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_x_0_comes_back_from_x_t_and_the_prediction(prediction, schedule):
    process = diffusion(prediction=prediction, schedule=schedule)
    t = torch.tensor([1, 2, 500, 999, 1000])
    x_0, eps = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    x_t = process.add_noise(x_0, t, eps)
    a = process.alpha_bar[t][:, None, None, None]
    torch.testing.assert_close(x_t, a.sqrt() * x_0 + (1 - a).sqrt() * eps)
    target = process.target(x_0, t, eps)
    torch.testing.assert_close(target, predicted(process, x_0, x_t, t))
    torch.testing.assert_close(process.x_0_from(target, x_t, t), x_0)


def test_v_is_defined_as_in_its_paper():
    process = diffusion(prediction="v")
    t = torch.tensor([1, 300, 1000])
    x_0, eps = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    a = process.alpha_bar[t][:, None, None, None]
    expected = a.sqrt() * eps - (1 - a).sqrt() * x_0
    torch.testing.assert_close(process.target(x_0, t, eps), expected)


def off_by(process: Diffusion, x_0: torch.Tensor, error: float):
    """A model that knows x_0 and misses it by `error` in every pixel."""

    def model(x_t, t, y):
        return predicted(process, x_0.double() + error, x_t, t)

    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_the_error_of_x_0_alike_for_every_prediction(prediction):
    process = diffusion(
        prediction=prediction, loss_weighting="min_snr", min_snr_gamma=5.0, timestep_power=1.0
    )
    x_0 = torch.rand(1000, 1, 8, 8) * 2 - 1  # 1000 images: each of the T timesteps once
    y = torch.zeros(1000, dtype=torch.int64)
    loss = process.loss(off_by(process, x_0, 0.1), x_0, y, seeded_generator(0))
    expected = 0.1**2 * process.snr[1:].clamp(max=5).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_snr_power_weights_between_the_errors_of_x_0_and_eps(prediction, power):
    process = diffusion(
        prediction=prediction, loss_weighting="snr_power", snr_power=power, timestep_power=1.0
    )
    x_0, y = torch.rand(1000, 1, 8, 8) * 2 - 1, torch.zeros(1000, dtype=torch.int64)
    loss = process.loss(off_by(process, x_0, 0.1), x_0, y, seeded_generator(0))
    snr = process.snr[1:]
    own_error = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[prediction] * 0.1**2
    kept = snr.clamp(0.01, 100)
    weight = kept**power / {"x_0": 1, "eps": kept, "v": kept + 1}[prediction]
    assert process.loss_weight.max() <= 100
    expected = (weight * own_error).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize("error", [0.001, 0.1])
def test_where_little_noise_is_left_the_error_of_x_0_counts_unsquared(error):
    process = diffusion(unsquared_snr=10.0, snr_power=0.0, timestep_power=1.0)
    x_0, y = torch.rand(1000, 1, 8, 8) * 2 - 1, torch.zeros(1000, dtype=torch.int64)
    loss = process.loss(off_by(process, x_0, error), x_0, y, seeded_generator(0))
    near = (process.snr[1:] > 10).double().mean()
    unsquared = (error**2 + 0.02**2) ** 0.5 - 0.02  # about `error` if it is large
    assert loss.item() == pytest.approx(float(near * unsquared + (1 - near) * error**2), rel=2e-3)


def test_uniform_loss_is_the_plain_squared_error():
    process = diffusion(prediction="eps", loss_weighting="uniform")
    x_0, y = torch.rand(256, 1, 8, 8) * 2 - 1, torch.zeros(256, dtype=torch.int64)
    perfect = process.loss(off_by(process, x_0, 0.0), x_0, y, seeded_generator(0))
    assert perfect.item() == pytest.approx(0, abs=1e-6)
    silent = process.loss(lambda x, t, y: torch.zeros_like(x), x_0, y, seeded_generator(0))
    assert silent.item() == pytest.approx(1, abs=0.05)  # the mean of eps²


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("error", "free"), [(-0.3, -1.0), (0.3, 1.0)])
def test_an_estimate_that_clamping_makes_exact_costs_nothing(prediction, error, free):
    y = torch.zeros(1, dtype=torch.int64)
    for grey in (-1.0, 1.0, 0.5):
        x_0 = torch.full((1, 1, 8, 8), grey)
        losses = []
        for clip in (True, False):
            process = diffusion(prediction=prediction, clip_loss=clip)
            model = off_by(process, x_0, error)
            losses.append(process.loss(model, x_0, y, seeded_generator(0)).item())
        assert losses[1] > 0
        assert losses[0] == (0 if grey == free else losses[1])


def record_calls(process: Diffusion, y: torch.Tensor, seed: int = 0):
    seen = {}

    def model(x_t, t, labels):
        seen.update(x_t=x_t, t=t, y=labels)
        return torch.zeros_like(x_t)

    process.loss(model, torch.zeros(len(y), 1, 8, 8), y, seeded_generator(seed))
    return seen


@pytest.mark.parametrize("power", [0.7, 1.0])
@pytest.mark.parametrize("B", [1, 10, 128])
def test_timesteps_are_stratified_over_the_batch(B, power):
    process = diffusion(timestep_power=power)
    for seed in range(20):
        t = record_calls(process, torch.zeros(B, dtype=torch.int64), seed)["t"]
        assert ((t >= 1) & (t <= process.T)).all()
        u = ((t.sort().values - 0.5) / process.T) ** (1 / power)
        assert ((u * B).floor() - torch.arange(B)).abs().max() <= 1


def test_a_low_timestep_power_trains_more_of_the_high_noise():
    y = torch.zeros(1000, dtype=torch.int64)
    t = record_calls(diffusion(timestep_power=0.5), y)["t"]
    assert (t > 500).float().mean().item() == pytest.approx(0.75, abs=0.01)  # u > 1/4


def test_label_dropout_hits_images_not_batches_at_its_rate():
    process = diffusion(label_dropout=0.1)
    y = torch.arange(5000) % 10
    seen = record_calls(process, y)["y"]
    dropped = seen == process.cfg.null_class
    assert torch.equal(seen[~dropped], y[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.015)
    for rate, count in ((0.0, 0), (1.0, 5000)):
        seen = record_calls(diffusion(label_dropout=rate), y)["y"]
        assert (seen == process.cfg.null_class).sum() == count


def test_the_loss_draws_from_its_generator_alone():
    process, y = diffusion(), torch.zeros(16, dtype=torch.int64)
    state = torch.get_rng_state()
    a, b, c = (record_calls(process, y, seed)["x_t"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_clip_loss_and_clip_x_0_act_independently():
    """The one decides what the loss forgives, the other whether the samplers clamp."""
    x_0, y = torch.full((4, 1, 8, 8), -1.0), torch.zeros(4, dtype=torch.int64)
    for clip_loss, clip_x_0 in itertools.product((True, False), repeat=2):
        process = diffusion(clip_loss=clip_loss, clip_x_0=clip_x_0)
        model = off_by(process, x_0, -0.3)
        assert (process.loss(model, x_0, y, seeded_generator(0)) == 0) == clip_loss
        assert torch.equal(draw(process, model, y), x_0 if clip_x_0 else x_0 - 0.3)


# ---- samplers


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 49, 50])
def test_sampling_times_fall_from_T_to_0_in_even_steps(steps):
    times = diffusion(timesteps=50, steps=steps).sampling_times()
    gaps = -np.diff(times)
    assert (times[0], times[-1], len(times)) == (50, 0, steps + 1)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def path_error(process: Diffusion) -> float:
    """Root mean square distance from the exact end of the probability flow."""
    model, y = GaussianData(process), torch.arange(4)
    states = path(process, model, y)
    return (states[-1] - model.path_end(states[0], y)).square().mean().sqrt().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_the_error_falls_with_steps_at_the_samplers_order(sampler, order, prediction):
    settings = {"prediction": prediction, "sampler": sampler, "clip_x_0": False}
    counts = [10, 20, 40, 80, 160]
    errors = [path_error(diffusion(**settings, timesteps=3200, steps=n)) for n in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.3)
    assert errors[-1] < (0.01 if order == 1 else 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("dpmpp", 0), ("dpmpp", 0.5), ("dpmpp", 1)],
)
def test_the_gaussians_mean_and_variance_are_recovered(sampler, eta, schedule):
    settings = {"sampler": sampler, "eta": eta, "steps": 200, "clip_x_0": False}
    process = diffusion(**settings, schedule=schedule, img_size=64)
    model = GaussianData(process)
    x_0 = path(process, model, torch.arange(10))[-1]
    for digit, pixels in enumerate(x_0):
        assert pixels.mean().item() == pytest.approx(model.mean[digit].item(), abs=0.035)
        assert pixels.std().item() == pytest.approx(model.std, abs=0.025)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_number_of_steps_gives_finite_clamped_images(sampler, steps, prediction):
    process = diffusion(timesteps=30, prediction=prediction, sampler=sampler, steps=steps)
    x_0 = draw(process, GaussianData(process), torch.arange(3))
    assert x_0.shape == (3, 1, 8, 8)
    assert x_0.dtype == torch.float32
    assert torch.isfinite(x_0).all()
    assert x_0.abs().max() <= 1


def test_ddim_with_eta_1_is_ddpm():
    def drawn(**settings):
        process = diffusion(steps=50, **settings)
        return draw(process, GaussianData(process), torch.arange(4))

    ddpm = drawn(sampler="ddpm")
    assert torch.equal(drawn(sampler="ddim", eta=1.0), ddpm)
    assert not torch.allclose(drawn(sampler="ddim", eta=0.0), ddpm)


def test_dpmpp_with_noise_is_still_second_order():
    y, off = torch.full((8,), 3), {}
    for sampler in ("ddpm", "dpmpp"):
        process = diffusion(img_size=64, sampler=sampler, eta=1.0, steps=50, clip_x_0=False)
        model = GaussianData(process)
        x_0 = path(process, model, y)[-1]
        off[sampler] = abs(x_0.std().item() - model.std)  # known to 0.002 from 32,768 pixels
    assert off["dpmpp"] < off["ddpm"] / 5, off


def test_a_ddpm_step_is_hos_posterior():
    settings = {"sampler": "ddpm", "steps": 1000, "clip_x_0": False}
    process, y = diffusion(schedule="linear", **settings), torch.arange(2)
    model = GaussianData(process)
    states = path(process, model, y)
    noise = ImageNoise(0, range(2), (1, 8, 8), dtype=torch.float64)
    assert torch.equal(noise.draw(), states[0])
    for step in range(3):
        t = 1000 - step
        a, a_before = process.alpha_bar[t], process.alpha_bar[t - 1]
        beta = 1 - a / a_before
        batch_t = torch.full((2,), t)
        x_0_hat = process.x_0_from(model(states[step], batch_t, y), states[step], batch_t)
        mean = a_before.sqrt() * beta / (1 - a) * x_0_hat
        mean += (a / a_before).sqrt() * (1 - a_before) / (1 - a) * states[step]  # eq. 7
        variance = (1 - a_before) / (1 - a) * beta
        torch.testing.assert_close(states[step + 1], mean + variance.sqrt() * noise.draw())


def test_no_noise_is_added_at_the_last_step():
    process, y = diffusion(timesteps=20, sampler="ddpm", clip_x_0=False), torch.arange(2)
    model, t = GaussianData(process), torch.ones_like(y)
    before, x_0 = path(process, model, y)[-2:]
    torch.testing.assert_close(x_0, process.x_0_from(model(before, t, y), before, t))


def test_the_first_step_of_dpmpp_is_ddim():
    first = {}
    for sampler in ("ddim", "dpmpp"):
        process = diffusion(sampler=sampler, steps=10)
        first[sampler] = path(process, GaussianData(process), torch.arange(3))[1:3]
    torch.testing.assert_close(first["ddim"][0], first["dpmpp"][0])
    assert not torch.allclose(first["ddim"][1], first["dpmpp"][1])


def test_the_clamp_keeps_x_0_and_eps_consistent():
    process, y = diffusion(sampler="ddim"), torch.tensor([9])  # mean 0.75: many estimates exceed 1
    model = GaussianData(process, std=1.0)
    states = path(process, model, y)
    exceeding = 0
    for i, (t, s) in enumerate(itertools.pairwise(process.sampling_times())):
        batch_t = torch.full((1,), t)
        free = process.x_0_from(model(states[i], batch_t, y), states[i], batch_t)
        exceeding += (free.abs() > 1).sum().item()
        a_t, a_s = process.alpha_bar[t], process.alpha_bar[s]
        eps = (states[i] - a_t.sqrt() * free.clamp(-1, 1)) / (1 - a_t).sqrt()
        expected = a_s.sqrt() * free.clamp(-1, 1) + (1 - a_s).sqrt() * eps
        torch.testing.assert_close(states[i + 1], expected)
    assert exceeding > 100


# ---- guidance


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_mixes_estimates_that_are_clamped_already(prediction):
    """Both estimates mean black, so guidance must not take their difference for a direction."""
    for steps in (1, 4):
        process = diffusion(prediction=prediction, guidance=1.5, steps=steps)
        null = process.cfg.null_class

        def darker_than_black(x_t, t, y, process=process, null=null):
            x_0 = torch.where(y == null, -5.0, -1.1)[:, None, None, None].expand_as(x_t)
            return predicted(process, x_0.double(), x_t, t)

        x_0 = path(process, darker_than_black, torch.tensor([0]))[-1]
        torch.testing.assert_close(x_0, torch.full_like(x_0, -1.0))


def test_the_guided_estimate_is_clamped_too():
    x_T = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=seeded_generator(0))
    guided = {}
    for clip in (True, False):
        process = diffusion(guidance=3.0, clip_x_0=clip)
        guided[clip] = process.guided(GaussianData(process))(x_T, 1000, torch.arange(3))
    assert guided[False].abs().max() > 2
    torch.testing.assert_close(guided[True], guided[False].clamp(-1, 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_costs_a_second_call_only_where_it_must(sampler):
    y, sampled, cost = torch.arange(3), {}, {}
    for w in (0.0, 1.0, 2.0):
        process = diffusion(sampler=sampler, steps=5, clip_x_0=False, guidance=w)
        model = GaussianData(process)
        sampled[w] = draw(process, model, y)
        cost[w] = list(model.calls)
        if w == 1:
            unlabelled = draw(process, model, torch.full_like(y, process.cfg.null_class))
    assert cost == {0.0: [3] * 5, 1.0: [3] * 5, 2.0: [3] * 10}
    assert torch.equal(sampled[0.0], unlabelled)
    # All classes share one std, so each path is linear in its class mean, and guidance with it
    torch.testing.assert_close(sampled[2.0], 2 * sampled[1.0] - sampled[0.0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_leads_away_from_the_guide(sampler):
    y, sampled = torch.arange(3), {}
    for w in (0.0, 1.0, 2.0):
        process = diffusion(sampler=sampler, steps=5, clip_x_0=False, guidance=w)
        model, guide = GaussianData(process), GaussianData(process)
        guide.mean = guide.mean - 0.1  # errs by as much for every label
        sampled[w] = draw(process, model, y, guide)
        assert model.calls == [3] * 5
        assert guide.calls == ([3] * 5 if w == 2 else [])
        if w == 1:
            weaker = draw(process, guide, y)
            unlabelled = draw(process, model, torch.full_like(y, process.cfg.null_class))
    torch.testing.assert_close(sampled[2.0], 2 * sampled[1.0] - weaker)
    assert torch.equal(sampled[0.0], unlabelled)  # w = 0 ignores the label, with or without a guide


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_acts_and_costs_only_within_its_interval(sampler):
    y = torch.arange(3)  # times 1000, 800, 600, 400, 200

    def guided_path(w, low=0.0, high=1.0):
        limits = {"guidance": w, "guidance_low": low, "guidance_high": high}
        process = diffusion(sampler=sampler, steps=5, clip_x_0=False, **limits)
        model = GaussianData(process)
        states = path(process, model, y)
        assert sum(model.calls) == 3 * process.network_calls()
        return states, process.network_calls()

    plain = guided_path(1.0)[0]
    assert guided_path(2.0)[1] == 10
    middle, calls = guided_path(2.0, 0.2, 0.8)
    assert calls == 8
    assert torch.equal(middle[:2], plain[:2])  # not yet at t = 1000
    assert not torch.allclose(middle[2], plain[2])
    nowhere, calls = guided_path(2.0, 0.5, 0.5)
    assert calls == 5
    assert torch.equal(nowhere, plain)
    # A guidance of 0 ignores the label everywhere
    assert torch.equal(guided_path(0.0, 0.2, 0.8)[0], guided_path(0.0)[0])


def test_sampling_times_are_rounded_and_an_edit_begins_at_its_own():
    times = [1000, 923, 846, 769, 692, 615, 538, 462, 385, 308, 231, 154, 77, 0]
    assert diffusion(steps=13).sampling_times() == times
    assert diffusion().sampling_times(0.3456)[0] == 346
    assert diffusion().sampling_times(1e-4) == [1, 0]
