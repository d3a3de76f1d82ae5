"""The process against closed forms: a Gaussian data set has an exact denoiser and exact paths."""

import itertools

import numpy as np
import pytest
import torch

from config import Config
from diffusion import Diffusion, ImageNoise, make_alpha_bar, seeded_generator

SCHEDULES = ("linear", "cosine", "sigmoid")
PREDICTIONS = ("eps", "v", "x_0")
SAMPLERS = ("ddpm", "ddim", "dpmpp")
FLOOR = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))  # alpha_bar_T of Ho et al. 2020


def diffusion(**settings) -> Diffusion:
    return Diffusion(Config(**({"img_size": 8, "steps": 1} | settings)))


class GaussianData:
    """Every pixel of class y is N(mean[y], std²): its best prediction is known exactly.

    x_t is then N(sqrt(alpha_bar) mean, alpha_bar std² + 1 - alpha_bar), and the deterministic
    samplers' path keeps (x_t - its mean) / its std constant.
    """

    def __init__(self, process: Diffusion, std: float = 0.5) -> None:
        self.process, self.std = process, std
        self.mean = torch.linspace(-0.6, 0.9, process.null_class + 1, dtype=torch.float64)
        self.calls: list[int] = []

    def moments(self, t: torch.Tensor, y: torch.Tensor):
        a = self.process.alpha_bar[t][:, None, None, None]
        return a, a.sqrt() * self.mean[y][:, None, None, None], a * self.std**2 + 1 - a

    def __call__(self, x_t, t, y):
        self.calls.append(len(x_t))
        a, mean_t, variance_t = self.moments(t, y)
        mean = self.mean[y][:, None, None, None]
        x_0 = mean + a.sqrt() * self.std**2 / variance_t * (x_t - mean_t)
        eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x_0
        return {"eps": eps, "v": v, "x_0": x_0}[self.process.prediction].to(x_t.dtype)

    def path_end(self, x_T, y):
        """Where the probability flow takes x_T."""
        _, mean_T, variance_T = self.moments(torch.full_like(y, self.process.T), y)
        return self.mean[y][:, None, None, None] + self.std * (x_T - mean_T) / variance_T.sqrt()


# ---- schedules


def test_linear_is_hos_schedule():
    beta = np.linspace(1e-4, 0.02, 1000)
    expected = np.concatenate([[1.0], np.cumprod(1 - beta)])
    process = diffusion(schedule="linear")
    np.testing.assert_allclose(process.alpha_bar, expected, rtol=1e-12)
    np.testing.assert_allclose(process.beta[1:], beta, rtol=1e-9)
    np.testing.assert_allclose(process.alpha[1:], 1 - beta, rtol=1e-12)


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
    logistic = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    sigmoid = (logistic(3) - logistic(-3 + 6 * u)) / (logistic(3) - logistic(-3))
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
    assert ((process.beta[1:] > 0) & (process.beta[1:] < 1)).all()
    torch.testing.assert_close(process.log_snr[1:].sigmoid(), process.alpha_bar[1:])


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="schedule = 'quadratic'"):
        make_alpha_bar("quadratic", 10)


# ---- forward process, predictions, loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_x_0_and_eps_come_back_from_x_t_and_the_prediction(prediction, schedule):
    process = diffusion(prediction=prediction, schedule=schedule)
    t = torch.tensor([1, 2, 500, 999, 1000])
    x_0, eps = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    x_t = process.add_noise(x_0, t, eps)
    a = process.alpha_bar[t][:, None, None, None]
    torch.testing.assert_close(x_t, a.sqrt() * x_0 + (1 - a).sqrt() * eps)
    x_0_hat, eps_hat = process.denoise(process.target(x_0, t, eps), x_t, t)
    torch.testing.assert_close(x_0_hat, x_0)
    torch.testing.assert_close(eps_hat, eps)


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
        a = process.alpha_bar[t][:, None, None, None]
        wrong = x_0.double() + error
        eps = (x_t - a.sqrt() * wrong) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * wrong
        return {"eps": eps, "v": v, "x_0": wrong}[process.prediction]

    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x_0_alike_for_every_prediction(prediction):
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
def test_snr_power_weighs_between_the_errors_of_x_0_and_eps(prediction, power):
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


def test_uniform_loss_is_the_plain_squared_error():
    process = diffusion(prediction="eps", loss_weighting="uniform")
    x_0, y = torch.rand(256, 1, 8, 8) * 2 - 1, torch.zeros(256, dtype=torch.int64)
    perfect = process.loss(off_by(process, x_0, 0.0), x_0, y, seeded_generator(0))
    assert perfect.item() == pytest.approx(0, abs=1e-6)
    silent = process.loss(lambda x, t, y: torch.zeros_like(x), x_0, y, seeded_generator(0))
    assert silent.item() == pytest.approx(1, abs=0.05)  # the mean of eps²


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("error", "free"), [(-0.3, -1.0), (0.3, 1.0)])
def test_an_estimate_that_the_sampler_clamps_onto_x_0_costs_nothing(prediction, error, free):
    y = torch.zeros(1, dtype=torch.int64)
    for grey in (-1.0, 1.0, 0.5):
        x_0 = torch.full((1, 1, 8, 8), grey)
        losses = []
        for clip in (True, False):
            process = diffusion(prediction=prediction, clip_x_0=clip)
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
    dropped = seen == process.null_class
    assert torch.equal(seen[~dropped], y[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.015)
    for rate, count in ((0.0, 0), (1.0, 5000)):
        seen = record_calls(diffusion(label_dropout=rate), y)["y"]
        assert (seen == process.null_class).sum() == count


def test_the_loss_draws_from_its_generator_alone():
    process, y = diffusion(), torch.zeros(16, dtype=torch.int64)
    state = torch.get_rng_state()
    a, b, c = (record_calls(process, y, seed)["x_t"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


# ---- samplers


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 49, 50])
def test_sampling_times_fall_from_T_to_0_in_even_steps(steps):
    times = diffusion(timesteps=50).sampling_times(steps)
    gaps = -np.diff(times)
    assert (times[0], times[-1], len(times)) == (50, 0, steps + 1)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [0, 51, -1])
def test_steps_out_of_range(steps):
    process = diffusion(timesteps=50)
    with pytest.raises(ValueError, match=f"steps = {steps}"):
        process.sample(GaussianData(process), torch.zeros(1, dtype=torch.int64), steps=steps)


def test_an_unknown_sampler():
    process = diffusion()
    with pytest.raises(ValueError, match="sampler = 'euler'"):
        process.sample(GaussianData(process), torch.zeros(1, dtype=torch.int64), sampler="euler")


def path_error(process: Diffusion, sampler: str, steps: int) -> float:
    """Root mean square distance from the exact end of the probability flow."""
    model, y = GaussianData(process), torch.arange(4)
    x_0, path = process.sample(
        model, y, sampler=sampler, steps=steps, clip_x_0=False, dtype=torch.float64,
        return_intermediates=True,
    )  # fmt: skip
    return (x_0 - model.path_end(path[0], y)).square().mean().sqrt().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_the_error_falls_with_steps_at_the_samplers_order(sampler, order, prediction):
    process = diffusion(prediction=prediction, timesteps=3200)
    counts = [10, 20, 40, 80, 160]
    errors = [path_error(process, sampler, steps) for steps in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.3)
    assert errors[-1] < (0.01 if order == 1 else 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("dpmpp", 0), ("dpmpp", 0.5), ("dpmpp", 1)],
)
def test_the_gaussians_mean_and_variance_are_recovered(sampler, eta, schedule):
    process = diffusion(schedule=schedule, img_size=16)
    model, y = GaussianData(process), torch.arange(10).repeat_interleave(16)
    x_0 = process.sample(
        model, y, sampler=sampler, eta=eta, steps=200, clip_x_0=False, dtype=torch.float64,
        batch_size=160,
    )  # fmt: skip
    for digit in range(10):
        pixels = x_0[y == digit]
        assert pixels.mean().item() == pytest.approx(model.mean[digit].item(), abs=0.035)
        assert pixels.std().item() == pytest.approx(model.std, abs=0.025)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_number_of_steps_gives_finite_clipped_images(sampler, steps, prediction):
    process = diffusion(timesteps=30, prediction=prediction)
    x_0 = process.sample(GaussianData(process), torch.arange(3), sampler=sampler, steps=steps)
    assert x_0.shape == (3, 1, 8, 8)
    assert torch.isfinite(x_0).all()
    assert x_0.abs().max() <= 1


def test_ddim_with_eta_1_is_ddpm():
    process, y = diffusion(), torch.arange(4)
    model = GaussianData(process)
    ddpm = process.sample(model, y, sampler="ddpm", steps=50)
    assert torch.equal(process.sample(model, y, sampler="ddim", eta=1.0, steps=50), ddpm)
    assert not torch.allclose(process.sample(model, y, sampler="ddim", steps=50), ddpm)


def test_noise_put_back_leaves_dpmpp_second_order():
    process, y = diffusion(img_size=64), torch.full((8,), 3)
    model, off = GaussianData(process), {}
    for sampler in ("ddpm", "dpmpp"):
        x_0 = process.sample(
            model, y, sampler=sampler, eta=1.0, steps=50, clip_x_0=False, dtype=torch.float64
        )
        off[sampler] = abs(x_0.std().item() - model.std)  # 32,768 pixels tell it to 0.002
    assert off["dpmpp"] < off["ddpm"] / 5, off


def test_a_ddpm_step_is_hos_posterior():
    process, y = diffusion(schedule="linear"), torch.arange(2)
    model = GaussianData(process)
    x_0, path = process.sample(
        model, y, sampler="ddpm", steps=1000, clip_x_0=False, dtype=torch.float64,
        return_intermediates=True,
    )  # fmt: skip
    assert torch.equal(path[-1], x_0)
    noise = ImageNoise(0, 0, 2, (1, 8, 8), torch.device("cpu"), torch.float64)
    assert torch.equal(noise.draw(), path[0])
    for step in range(3):
        t = 1000 - step
        a, a_before = process.alpha_bar[t], process.alpha_bar[t - 1]
        beta = 1 - a / a_before
        batch_t = torch.full((2,), t)
        x_0_hat = process.denoise(model(path[step], batch_t, y), path[step], batch_t)[0]
        mean = a_before.sqrt() * beta / (1 - a) * x_0_hat
        mean += (a / a_before).sqrt() * (1 - a_before) / (1 - a) * path[step]  # eq. 7
        variance = (1 - a_before) / (1 - a) * beta
        torch.testing.assert_close(path[step + 1], mean + variance.sqrt() * noise.draw())


def test_no_noise_is_added_at_the_last_step():
    process, y = diffusion(timesteps=20), torch.arange(2)
    model = GaussianData(process)
    x_0, path = process.sample(
        model, y, sampler="ddpm", steps=20, clip_x_0=False, return_intermediates=True
    )
    t = torch.ones_like(y)
    torch.testing.assert_close(x_0, process.denoise(model(path[-2], t, y), path[-2], t)[0])


def test_the_first_step_of_dpmpp_is_ddim():
    process, y = diffusion(), torch.arange(3)
    first = {}
    for sampler in ("ddim", "dpmpp"):
        settings = {"sampler": sampler, "steps": 10, "dtype": torch.float64}
        path = process.sample(GaussianData(process), y, **settings, return_intermediates=True)[1]
        first[sampler] = path[1], path[2]
    torch.testing.assert_close(first["ddim"][0], first["dpmpp"][0])
    assert not torch.allclose(first["ddim"][1], first["dpmpp"][1])


def test_the_clamp_keeps_x_0_and_eps_consistent():
    process, y = diffusion(), torch.tensor([9])  # mean 0.75: many estimates lie beyond 1
    model = GaussianData(process, std=1.0)
    path = process.sample(
        model, y, sampler="ddim", steps=20, dtype=torch.float64, return_intermediates=True
    )[1]
    times = process.sampling_times(20)
    beyond = 0
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        batch_t = torch.full((1,), t)
        free = process.denoise(model(path[i], batch_t, y), path[i], batch_t)[0]
        beyond += (free.abs() > 1).sum().item()
        a_t, a_s = process.alpha_bar[t], process.alpha_bar[s]
        eps = (path[i] - a_t.sqrt() * free.clamp(-1, 1)) / (1 - a_t).sqrt()
        expected = a_s.sqrt() * free.clamp(-1, 1) + (1 - a_s).sqrt() * eps
        torch.testing.assert_close(path[i + 1], expected)
    assert beyond > 100


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_mixes_estimates_that_are_clamped_already(prediction):
    process, y = diffusion(prediction=prediction), torch.tensor([0])
    null = process.null_class

    def beyond_black(x_t, t, y):  # how far is left to chance; both mean black
        x_0 = torch.where(y == null, -5.0, -1.1)[:, None, None, None].expand_as(x_t).double()
        a = process.alpha_bar[t][:, None, None, None]
        eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x_0
        return {"eps": eps, "v": v, "x_0": x_0}[prediction]

    for steps in (1, 4):
        x_0 = process.sample(beyond_black, y, steps=steps, guidance=1.5, dtype=torch.float64)
        torch.testing.assert_close(x_0, torch.full_like(x_0, -1.0))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_costs_a_second_call_only_where_it_must(sampler):
    process, y = diffusion(), torch.arange(3)
    null = torch.full_like(y, process.null_class)
    sampled, cost = {}, {}
    for w in (0.0, 1.0, 2.0):
        model = GaussianData(process)
        settings = {"sampler": sampler, "steps": 5, "clip_x_0": False}
        sampled[w] = process.sample(model, y, guidance=w, **settings)
        cost[w] = list(model.calls)
        if w == 1:
            ignored = process.sample(model, null, guidance=1.0, **settings)
    assert cost == {0.0: [3] * 5, 1.0: [3] * 5, 2.0: [3] * 10}
    assert torch.equal(sampled[0.0], ignored)  # w = 0 is the null class
    # All classes share one std, so each path is linear in its class mean, and guidance with it
    torch.testing.assert_close(sampled[2.0], 2 * sampled[1.0] - sampled[0.0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_leads_away_from_the_guide(sampler):
    process, y = diffusion(), torch.arange(3)
    guide = GaussianData(process)
    guide.mean = guide.mean - 0.1  # errs by as much for every label
    sampled = {}
    for w in (0.0, 1.0, 2.0):
        model, guide.calls = GaussianData(process), []
        settings = {"sampler": sampler, "steps": 5, "clip_x_0": False, "guidance": w}
        sampled[w] = process.sample(model, y, guide=guide, **settings)
        assert model.calls == [3] * 5
        assert guide.calls == ([3] * 5 if w == 2 else [])
    settings["guidance"] = 1.0
    weak = process.sample(guide, y, **settings)
    torch.testing.assert_close(sampled[2.0], 2 * sampled[1.0] - weak)
    null = process.sample(model, torch.full_like(y, process.null_class), **settings)
    assert torch.equal(sampled[0.0], null)  # w = 0 ignores the label, guide or not


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_acts_and_costs_only_within_its_interval(sampler):
    process, y = diffusion(), torch.arange(3)  # times 1000, 800, 600, 400, 200
    settings = {"sampler": sampler, "steps": 5, "clip_x_0": False, "return_intermediates": True}
    paths = {}
    for interval, twice in (((0.0, 1.0), 5), ((0.2, 0.8), 3), ((0.5, 0.5), 0)):
        model, (low, high) = GaussianData(process), interval
        limits = {"guidance": 2.0, "guidance_low": low, "guidance_high": high}
        paths[interval] = process.sample(model, y, **settings, **limits)[1]
        assert sum(model.calls) == 3 * (5 + twice) == 3 * process.network_calls(5, *limits.values())
    plain = process.sample(GaussianData(process), y, **settings, guidance=1.0)[1]
    assert torch.equal(paths[0.5, 0.5], plain)
    middle = paths[0.2, 0.8]
    assert torch.equal(middle[:2], plain[:2])  # not yet at t = 1000
    assert not torch.allclose(middle[2], plain[2])
    null = process.sample(
        GaussianData(process), y, **settings, guidance=0, guidance_low=0.2, guidance_high=0.8
    )[1]
    nothing = process.sample(GaussianData(process), y, **settings, guidance=0)[1]
    assert torch.equal(null, nothing)  # a guidance of 0 is the null class throughout


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_in_any_batch(sampler):
    process, y = diffusion(), torch.arange(5)
    settings = {"sampler": sampler, "steps": 4, "seed": 3}
    whole = process.sample(GaussianData(process), y, **settings)
    for batch_size in (1, 2, 4):
        parts = process.sample(GaussianData(process), y, **settings, batch_size=batch_size)
        assert torch.equal(parts, whole)
    assert torch.equal(process.sample(GaussianData(process), y[:2], **settings), whole[:2])
    other = process.sample(GaussianData(process), y, **(settings | {"seed": 4}))
    assert not torch.allclose(other, whole)
    assert not torch.allclose(whole[0] - whole[0].mean(), whole[1] - whole[1].mean())


def test_sampling_leaves_the_global_random_state_alone():
    process = diffusion()
    state = torch.get_rng_state()
    process.sample(GaussianData(process), torch.arange(2), sampler="ddpm", steps=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_intermediates_run_from_the_noise_to_the_image():
    process, y = diffusion(), torch.arange(5)
    x_0, path = process.sample(
        GaussianData(process), y, steps=4, batch_size=2, return_intermediates=True
    )
    assert path.shape == (5, 5, 1, 8, 8)
    assert torch.equal(path[-1], x_0)
    noise = ImageNoise(0, 0, 5, (1, 8, 8), torch.device("cpu"), torch.float32).draw()
    assert torch.equal(path[0], noise)


def test_streams_are_set_by_their_whole_key():
    draw = lambda *key: torch.randn(4, generator=seeded_generator(*key))  # noqa: E731
    assert torch.equal(draw(1, 2), draw(1, 2))
    for key in ((2, 1), (1,), (1, 2, 0), (1, 3)):
        assert not torch.equal(draw(*key), draw(1, 2))
