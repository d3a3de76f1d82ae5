"""The diffusion process: noise schedule, training loss and samplers.

Knows no network: everywhere `model` is any callable `model(x_t, t, y)`. Time runs over
t = 0…T, where t = 0 is the clean image (alpha_bar[0] = 1) and t = T is, nearly, pure noise.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config

Model = Callable[[Tensor, Tensor, Tensor], Tensor]

# Ho et al. 2020: beta rises from 1e-4 to 0.02 in 1000 steps
_HO_BETA = np.concatenate([[0.0], np.linspace(1e-4, 0.02, 1000)])


def make_alpha_bar(schedule: str, T: int) -> Tensor:
    """alpha_bar[0…T], float64: strictly falling from 1 to 4.04e-5.

    "linear": Ho et al. 2020, section 4; for T other than 1000 the same curve at T points, so that
    the last step is always nearly pure noise. "cosine": Nichol & Dhariwal 2021, eq. 17.
    "sigmoid": Jabri et al. 2022, with start -3, end 3, tau 1. The last two would end
    at exactly 0, where eps says nothing about x_0; they are lifted by `floor · (1 - alpha_bar)`.
    """
    u = np.arange(T + 1) / T
    if schedule == "linear":
        alpha_bar = np.exp(np.interp(1000 * u, np.arange(1001), np.log1p(-_HO_BETA).cumsum()))
    elif schedule == "cosine":
        s = 0.008
        alpha_bar = (np.cos((u + s) / (1 + s) * np.pi / 2) / np.cos(s / (1 + s) * np.pi / 2)) ** 2
    elif schedule == "sigmoid":
        start, end = -3, 3
        at = 1 / (1 + np.exp(-np.concatenate([[start, end], start + u * (end - start)])))
        alpha_bar = (at[1] - at[2:]) / (at[1] - at[0])
    else:
        raise ValueError(f"schedule = {schedule!r}: choose one of linear, cosine, sigmoid")
    if schedule != "linear":
        floor = np.prod(1 - _HO_BETA)  # as little signal as Ho's own schedule leaves
        alpha_bar = alpha_bar + floor * (1 - alpha_bar)
    return torch.from_numpy(alpha_bar)


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a function of `key` alone, say (seed, step); other keys give
    unrelated streams, if all numbers are below 2^32. Raises ValueError for a negative number."""
    entropy = (len(key), *key)  # the length too: SeedSequence ignores zeros at the end
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


class ImageNoise:
    """Standard normal noise for the images `first`, `first + 1`, … of a seed, each from a stream
    of its own. Drawn on the CPU in float32, so that a seed means the same noise everywhere."""

    def __init__(
        self,
        seed: int,
        first: int,
        count: int,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.generators = [seeded_generator(seed, first + i) for i in range(count)]
        self.shape, self.device, self.dtype = shape, device, dtype

    def draw(self) -> Tensor:
        """The next (count, *shape) numbers."""
        noise = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(noise).to(self.device, self.dtype)


class Diffusion:
    """The process that `cfg` describes; its tables are float64, of index t = 0…T."""

    def __init__(self, cfg: Config) -> None:
        self.T = cfg.timesteps
        self.prediction = cfg.prediction
        self.null_class = cfg.null_class
        self.label_dropout = cfg.label_dropout
        self.timestep_power = cfg.timestep_power
        self.clip_x_0 = cfg.clip_x_0
        self.image_shape = (cfg.img_channels, cfg.img_size, cfg.img_size)

        self.alpha_bar = make_alpha_bar(cfg.schedule, self.T)
        self.alpha = torch.ones_like(self.alpha_bar)
        self.alpha[1:] = self.alpha_bar[1:] / self.alpha_bar[:-1]
        self.beta = 1 - self.alpha
        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # inf at t = 0
        self.log_snr = self.snr.log()
        self.loss_weight = self._make_loss_weight(cfg)
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _make_loss_weight(self, cfg: Config) -> Tensor:
        """Weight of the squared error of the prediction itself at t = 0…T (t = 0 is not trained).

        "uniform": 1, with a `timestep_power` of 1 Ho et al. 2020, eq. 14. The others are weights of
        the error of x_0, carried over to what the network predicts. "min_snr": min(snr, gamma),
        Hang et al. 2023.
        "snr_power": snr^power, between the error of x_0 (power 0) and that of eps (power 1), as if
        snr ended at 0.01 and 100, between which all but the first and last steps of sampling lie.
        """
        if cfg.loss_weighting == "uniform":
            return torch.ones_like(self.snr)
        if cfg.loss_weighting == "min_snr":
            snr = self.snr[1:]
            weight = snr.clamp(max=cfg.min_snr_gamma)
        else:
            snr = self.snr[1:].clamp(0.01, 100)
            weight = snr**cfg.snr_power
        per_x_0_error = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[self.prediction]
        return torch.cat([torch.zeros(1), weight / per_x_0_error])

    def _at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) and the loss weight, (B, 1, 1, 1), as x is."""
        key = (x.device, x.dtype)
        if key not in self._on_device:
            table = [self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt(), self.loss_weight]
            self._on_device[key] = torch.stack(table).to(x.dtype).to(x.device)
        signal, noise, weight = self._on_device[key][:, t, None, None, None]
        return signal, noise, weight

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t from x_0 (B, C, H, W) and t int64 (B,). Ho et al. 2020, eq. 4."""
        signal, noise, _ = self._at(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict: eps, x_0, or v of Salimans & Ho 2022, section 4."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x_0":
            return x_0
        signal, noise, _ = self._at(t, x_0)
        return signal * eps - noise * x_0

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_0_hat and eps_hat (B, C, H, W) from the network's prediction at x_t, t int64 (B,)."""
        signal, noise, _ = self._at(t, x_t)
        if self.prediction == "eps":
            return (x_t - noise * prediction) / signal, prediction
        if self.prediction == "x_0":
            return prediction, (x_t - signal * prediction) / noise
        return signal * x_t - noise * prediction, noise * x_t + signal * prediction

    def loss(self, model: Model, x_0: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Mean weighted squared error of the prediction, a scalar; x_0 in [-1, 1], y int64 (B,).

        All random numbers come from `generator`, on the device of x_0. Timesteps are u^power · T,
        with u stratified over the batch: one in each B-th of 0…1, shifted together (Kingma et al.
        2021, appendix I); a `timestep_power` below 1 gives more of them to high noise. Each image
        loses its label with probability `label_dropout` (Ho & Salimans 2022, algorithm 1).

        With `clip_x_0` a pixel costs nothing where the clamp of its estimated x_0 gives x_0
        exactly: the sampler clamps as well, so that black has to be black, not any one number.
        What the loss is least at stays the same up to that clamp, because the mean of all x_0
        that fit an x_t never lies beyond [-1, 1].
        """
        B, device = len(x_0), x_0.device
        shift = torch.rand(1, generator=generator, device=device)
        u = (shift + torch.arange(B, device=device) / B) % 1  # (B,) in [0, 1)
        t = 1 + (u**self.timestep_power * self.T).long().clamp(max=self.T - 1)
        dropped = torch.rand(B, generator=generator, device=device) < self.label_dropout
        y = torch.where(dropped, self.null_class, y)
        eps = torch.randn(x_0.shape, generator=generator, device=device)

        x_t = self.add_noise(x_0, t, eps)
        prediction = model(x_t, t, y).float()
        error = (prediction - self.target(x_0, t, eps)).square()  # (B, C, H, W)
        if self.clip_x_0:
            x_0_hat, _ = self.denoise(prediction, x_t, t)
            error = error.masked_fill(x_0_hat.clamp(-1, 1) == x_0, 0)
        return (self._at(t, x_0)[2] * error).mean()

    def sampling_times(self, steps: int) -> list[int]:
        """T = t_0 > t_1 > … > t_steps = 0, even; raises ValueError for steps not in 1…T."""
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps = {steps}: choose 1 to {self.T}, the model's timesteps")
        return [(self.T * i + steps // 2) // steps for i in range(steps, -1, -1)]

    def guidance_at(self, t: int, guidance: float, low: float, high: float) -> float:
        """The w in force at time t: `guidance` where low < t / T <= high, elsewhere 1
        (Kynkäänniemi et al. 2024). A guidance of 0, which ignores the label, holds throughout."""
        return guidance if guidance == 0 or low < t / self.T <= high else 1.0

    def network_calls(
        self, steps: int, guidance: float, guidance_low: float = 0.0, guidance_high: float = 1.0
    ) -> int:
        """Network calls that an image costs: two at a time t whose w is neither 0 nor 1."""
        times = self.sampling_times(steps)[:-1]
        w = [self.guidance_at(t, guidance, guidance_low, guidance_high) for t in times]
        return sum(1 if each in (0, 1) else 2 for each in w)

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        y: Tensor,
        *,
        guide: Model | None = None,
        sampler: str = "dpmpp",
        steps: int = 20,
        guidance: float = 1.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        eta: float = 0.0,
        clip_x_0: bool = True,
        seed: int = 0,
        batch_size: int = 128,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
        return_intermediates: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw an image for each label in y int64 (N,): (N, C, H, W), in [-1, 1] if clipped.

        Image i takes all its noise from a stream of its own, given by (seed, i): up to rounding the
        same picture whatever N, `batch_size` and device.

        `guidance` leads away from `guide`, a worse model that is told the label as well
        (autoguidance, Karras et al. 2024), or without one from `model` itself without the label
        (classifier-free guidance). 1 (plain conditional) and 0 (label ignored) cost one network
        call a step, others two, but only where `guidance_low` < t / T <= `guidance_high`.

        With `progress` a bar is shown where stderr is a terminal. With `return_intermediates` also
        x at every time, from noise to the image: (steps + 1, N, C, H, W).

        sampler: "ddpm" (Ho et al. 2020, eq. 6 and 7), "ddim" (Song et al. 2021, eq. 12) or "dpmpp"
        (DPM-Solver++ 2M, Lu et al. 2022, algorithm 2). The last two put back the share `eta` of
        the noise that ddpm does. Raises ValueError for another name, and for steps not in 1…T.
        """
        if sampler not in ("ddpm", "ddim", "dpmpp"):
            raise ValueError(f"sampler = {sampler!r}: choose one of ddpm, ddim, dpmpp")
        eta = 1.0 if sampler == "ddpm" else eta
        times = self.sampling_times(steps)
        batches = list(zip(y.split(batch_size), range(0, len(y), batch_size), strict=False))
        images, histories = [], []
        with tqdm(
            total=steps * len(batches), desc="sampling", unit="step", leave=False,
            disable=None if progress else True,
        ) as bar:  # fmt: skip
            for y_batch, first in batches:
                noise = ImageNoise(seed, first, len(y_batch), self.image_shape, y.device, dtype)
                x, history = noise.draw(), []
                x_0_before, t_before = None, 0
                for t, s in itertools.pairwise(times):
                    if return_intermediates:
                        history.append(x)
                    w = self.guidance_at(t, guidance, guidance_low, guidance_high)
                    x_0 = self._guided_x_0(model, guide, x, t, y_batch, w, clip_x_0)
                    estimate = x_0
                    if sampler == "dpmpp" and x_0_before is not None and s > 0:
                        estimate = x_0 + self._slope(t_before, t, s) * (x_0 - x_0_before)
                    x = self._step(x, estimate, t, s, eta, noise)
                    x_0_before, t_before = x_0, t
                    bar.update()
                images.append(x)
                if return_intermediates:
                    histories.append(torch.stack([*history, x]))
        sampled = torch.cat(images)
        return (sampled, torch.cat(histories, dim=1)) if return_intermediates else sampled

    def _guided_x_0(
        self, model: Model, guide: Model | None, x: Tensor, t: int, y: Tensor, guidance: float,
        clip_x_0: bool,
    ) -> Tensor:  # fmt: skip
        """x_0_hat at time t with guidance: Karras et al. 2024 (autoguidance), or without a guide Ho
        & Salimans 2022, eq. 6, with their 1 + w written as `guidance`. x_0 and eps are linear in
        each other, so guiding one guides the other."""
        null = torch.full_like(y, self.null_class)
        if guidance == 0:
            return self._x_0(model, x, t, null, clip_x_0)
        x_0 = self._x_0(model, x, t, y, clip_x_0)
        if guidance == 1:
            return x_0
        if guide is None:
            worse = self._x_0(model, x, t, null, clip_x_0)
        else:
            worse = self._x_0(guide, x, t, y, clip_x_0)
        x_0 = worse + guidance * (x_0 - worse)
        return x_0.clamp(-1, 1) if clip_x_0 else x_0

    def _x_0(self, model: Model, x: Tensor, t: int, y: Tensor, clip_x_0: bool) -> Tensor:
        """The network's own estimate; clipped also before guidance mixes two of them, because
        beyond the clamp the loss leaves them to chance."""
        batch_t = torch.full_like(y, t)
        x_0, _ = self.denoise(model(x, batch_t, y).to(x.dtype), x, batch_t)
        return x_0.clamp(-1, 1) if clip_x_0 else x_0

    def _step(
        self, x: Tensor, x_0: Tensor, t: int, s: int, eta: float, noise: ImageNoise
    ) -> Tensor:
        """x_s from x_t and x_0: the noise that x_0 leaves of x_t, of which as much is replaced by
        new noise as `eta` says. Song et al. 2021, eq. 12 and 16; with eta = 1 it is the posterior
        q(x_s | x_t, x_0) of Ho et al. 2020, eq. 6 and 7. At s = 0 no noise is left."""
        a_t, a_s = float(self.alpha_bar[t]), float(self.alpha_bar[s])
        variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        kept = math.sqrt(max(1 - a_s - variance, 0) / (1 - a_t))
        x_s = kept * x + (math.sqrt(a_s) - kept * math.sqrt(a_t)) * x_0
        return x_s + math.sqrt(variance) * noise.draw() if variance > 0 else x_s

    def _slope(self, before: int, t: int, s: int) -> float:
        """How much of the last change of x_0 its mean over the step from t to s is ahead: half, in
        proportion to the steps' lengths in log_snr. DPM-Solver++(2M), Lu et al. 2022, algorithm 2;
        with noise it is the SDE-DPM-Solver++(2M) of the same paper."""
        log_snr = self.log_snr
        return float((log_snr[s] - log_snr[t]) / (log_snr[t] - log_snr[before]) / 2)
