"""The diffusion process: noise schedule, training loss, guidance and samplers, for any network.

Time runs over t = 0…T; x_0 is the clean image (alpha_bar[0] = 1) and x_T is almost pure noise.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Generator, Tensor

from config import Config
from system.machine import pick_precision
from system.randomness import ImageNoise

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t (B,), y) -> eps, v or x_0
Denoiser = Callable[[Tensor, int, Tensor], Tensor]  # (x_t, t, y) -> x_0_hat
HUBER_DELTA = 0.02  # 2.5 grey levels: smaller errors count about squared, larger ones unsquared

# Ho et al. 2020: beta is 0 for t = 0, then rises linearly from 1e-4 to 0.02 in 1000 steps
_HO_BETA = np.concatenate([[0.0], np.linspace(1e-4, 0.02, 1000)])


def make_alpha_bar(schedule: str, T: int) -> Tensor:
    """alpha_bar[0…T] in float64, falling strictly from 1 to 4.04e-5. `schedule` is "linear" (Ho et
    al. 2020, section 4; its 1000 steps are interpolated for another T), "cosine" (Nichol & Dhariwal
    2021, eq. 17) or "sigmoid" (Jabri et al. 2022; start -3, end 3, tau 1). The last two would end
    at 0, where x_0 cannot be computed from eps, so they are lifted to the end of "linear"."""
    u = np.arange(T + 1) / T
    if schedule == "linear":
        alpha_bar = np.exp(np.interp(1000 * u, np.arange(1001), np.log1p(-_HO_BETA).cumsum()))
    elif schedule == "cosine":
        s = 0.008
        alpha_bar = (np.cos((u + s) / (1 + s) * np.pi / 2) / np.cos(s / (1 + s) * np.pi / 2)) ** 2
    elif schedule == "sigmoid":
        logistic = 1 / (1 + np.exp(3 - 6 * u))  # from -3 to 3
        alpha_bar = (logistic[-1] - logistic) / (logistic[-1] - logistic[0])
    else:
        raise ValueError(f"schedule = {schedule!r}: no such noise schedule")
    if schedule != "linear":
        alpha_bar = alpha_bar + np.prod(1 - _HO_BETA) * (1 - alpha_bar)
    return torch.from_numpy(alpha_bar)


class Diffusion:
    """The process that `cfg` describes. Its tables are float64, indexed by t = 0…T."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.T = cfg.timesteps
        self.eta = 1.0 if cfg.sampler == "ddpm" else cfg.eta
        self.alpha_bar = make_alpha_bar(cfg.schedule, self.T)
        self.alpha_bar_at = self.alpha_bar.tolist()  # floats, which are constants to torch.export
        self.snr = self.alpha_bar / (1 - self.alpha_bar)  # signal to noise; infinite at t = 0
        self.log_snr_at = self.snr.log().tolist()
        self.loss_weight = self._make_loss_weight()
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _make_loss_weight(self) -> Tensor:
        """Weight of the error of the prediction at t = 0…T; t = 0 is never trained.

        "uniform" is 1 (Ho et al. 2020, eq. 14, if eps is predicted and `timestep_power` is 1). The
        others weight the error of x_0, and are converted to weights of the prediction's error:
        "min_snr" is min(snr, gamma) (Hang et al. 2023), "snr_power" is snr^power, with snr limited
        to 0.01…100. Power 0 weights the error of x_0 evenly, power 1 that of eps.
        """
        cfg, snr = self.cfg, self.snr[1:]
        if cfg.loss_weighting == "snr_power":
            snr = snr.clamp(0.01, 100)
        # The squared error of the prediction over that of x_0
        ratio = {"x_0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[cfg.prediction]
        power, limited = snr**cfg.snr_power, snr.clamp(max=cfg.min_snr_gamma)
        weight = {"uniform": ratio, "min_snr": limited, "snr_power": power}[cfg.loss_weighting]
        return torch.cat([torch.zeros(1), weight / ratio])

    def coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) and the loss weight, each (B, 1, 1, 1), in the
        dtype of x and on its device."""
        key = (x.device, x.dtype)
        if key not in self._tables:
            table = [self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt(), self.loss_weight]
            self._tables[key] = torch.stack(table).to(x.dtype).to(x.device)  # MPS has no float64
        return self._tables[key][:, t, None, None, None].unbind()

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t from x_0 (B, C, H, W) and t int64 (B,). Ho et al. 2020, eq. 4."""
        signal_scale, noise_scale, _ = self.coefficients(t, x_0)
        return signal_scale * x_0 + noise_scale * eps

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict: eps, x_0, or v of Salimans & Ho 2022, section 4."""
        if self.cfg.prediction != "v":
            return x_0 if self.cfg.prediction == "x_0" else eps
        signal_scale, noise_scale, _ = self.coefficients(t, x_0)
        return signal_scale * eps - noise_scale * x_0

    def x_0_from(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0_hat (B, C, H, W) that a prediction for x_t implies; t int64 (B,)."""
        if self.cfg.prediction == "x_0":
            return prediction
        signal_scale, noise_scale, _ = self.coefficients(t, x_t)
        if self.cfg.prediction == "eps":
            return (x_t - noise_scale * prediction) / signal_scale
        return signal_scale * x_t - noise_scale * prediction

    def loss(
        self, model: Model, x_0: Tensor, y: Tensor, generator: Generator, part: slice = slice(None)
    ) -> Tensor:
        """The weighted loss of the prediction (see prediction_loss), a scalar, over a `part` of the
        batch; x_0 (B, C, H, W) in [-1, 1], y int64 (B,).

        Random numbers, from `generator` on x_0's device, are drawn for the whole batch, so that any
        division into parts gives the same loss. t is u^timestep_power · T, rounded up, with u
        evenly spaced over the batch (Kingma et al. 2021, appendix I). Each image loses its label
        with probability `label_dropout` (Ho & Salimans 2022, algorithm 1).
        """
        B, device, cfg = len(x_0), x_0.device, self.cfg
        shift = torch.rand(1, generator=generator, device=device)
        u = (shift + torch.arange(B, device=device) / B) % 1  # (B,) in [0, 1)
        t = 1 + (u**cfg.timestep_power * self.T).long().clamp(max=self.T - 1)
        dropped = torch.rand(B, generator=generator, device=device) < cfg.label_dropout
        y = torch.where(dropped, cfg.null_class, y)
        eps = torch.randn(x_0.shape, generator=generator, device=device)

        x_0, t, y, eps = x_0[part], t[part], y[part], eps[part]
        return self.prediction_loss(model, self.add_noise(x_0, t, eps), t, y, x_0, eps)

    def prediction_loss(
        self, model: Model, x_t: Tensor, t: Tensor, y: Tensor, x_0: Tensor, eps: Tensor
    ) -> Tensor:
        """The loss of the prediction for x_t (B, C, H, W), whose right answer is x_0 and eps; t
        int64 (B,).

        It is a weighted mean squared error. But where a network predicts x_0 and little noise is
        left (snr above `unsquared_snr`), errors count unsquared (pseudo-Huber): the squares of a
        few grey levels are too small to matter, and such errors would remain as faint specks.

        With `clip_loss` a pixel costs nothing where clamping x_0_hat to [-1, 1] gives x_0 exactly.
        With `clip_x_0` the sampler clamps as well, so a black pixel may be predicted as -1 or
        anything below, which is far easier to learn than exactly -1. The best clamped estimate
        stays the same: the mean (unsquared: about the median) of possible x_0 is in [-1, 1].
        """
        prediction = self.predict(model, x_t, t, y)
        cost = (prediction - self.target(x_0, t, eps)).square()  # (B, C, H, W)
        signal_scale, noise_scale, weight = self.coefficients(t, x_0)
        if self.cfg.unsquared_snr and self.cfg.prediction == "x_0":
            little_noise = signal_scale.square() > self.cfg.unsquared_snr * noise_scale.square()
            cost = torch.where(little_noise, (cost + HUBER_DELTA**2).sqrt() - HUBER_DELTA, cost)
        if self.cfg.clip_loss:
            x_0_hat = self.x_0_from(prediction, x_t, t)
            cost = cost.masked_fill(x_0_hat.clamp(-1, 1) == x_0, 0)
        return (weight * cost).mean()

    def predict(self, model: Model, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's eps, v or x_0, in x_t's dtype, computed in the configured precision."""
        bf16 = pick_precision(self.cfg.precision, x_t.device) == "bf16"
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
            # A copy, because a compiled network on a GPU may write its next output over this one
            return model(x_t, t, y).to(x_t.dtype, copy=True)

    def clip(self, x_0_hat: Tensor) -> Tensor:
        """x_0_hat clamped to [-1, 1], if `clip_x_0` says so."""
        return x_0_hat.clamp(-1, 1) if self.cfg.clip_x_0 else x_0_hat

    def denoise(self, model: Model, x: Tensor, t: int, y: Tensor) -> Tensor:
        """One network's x_0_hat for x (B, C, H, W) at time t."""
        batch_t = torch.full_like(y, t)
        return self.clip(self.x_0_from(self.predict(model, x, batch_t, y), x, batch_t))

    def guided(self, model: Model, guide: Model | None = None) -> Denoiser:
        """The denoiser (x_t, t, y) -> x_0_hat that the samplers need, with guidance w:
        worse + w · (x_0_hat - worse), or for w = 0 the model without the label.

        `worse` is the estimate of `guide`, a weaker model (autoguidance, Karras et al. 2024), or if
        there is none the model's own for `null_class` (classifier-free guidance, Ho & Salimans
        2022, eq. 6, whose w is ours minus 1). With `clip_x_0` both estimates are clamped first, as
        a model trained with `clip_loss` needs, and then the result is clamped, too.
        """

        def denoiser(x: Tensor, t: int, y: Tensor) -> Tensor:
            w, null = self.guidance_at(t), torch.full_like(y, self.cfg.null_class)
            if w == 0:
                return self.denoise(model, x, t, null)
            x_0_hat = self.denoise(model, x, t, y)
            if w == 1:
                return x_0_hat
            worse = self.denoise(guide, x, t, y) if guide else self.denoise(model, x, t, null)
            return self.clip(worse + w * (x_0_hat - worse))

        return denoiser

    def guidance_at(self, t: int) -> float:
        """The w in force at time t: `guidance` inside its interval (Kynkäänniemi et al. 2024), else
        1. A guidance of 0, which ignores the label, holds at every time."""
        inside = self.cfg.guidance_low < t / self.T <= self.cfg.guidance_high
        return self.cfg.guidance if inside or self.cfg.guidance == 0 else 1.0

    def network_calls(self) -> int:
        """Network calls per image: one for each time, two where guidance is neither 0 nor 1."""
        return sum(1 if self.guidance_at(t) in (0, 1) else 2 for t in self.sampling_times()[:-1])

    def sampling_times(self, strength: float = 1.0) -> list[int]:
        """`steps` + 1 times from T down to 0, evenly spaced. With a `strength` below 1 they
        begin with strength · T and go on with those below it."""
        steps, first = self.cfg.steps, max(1, round(strength * self.T))
        times = [(self.T * i + steps // 2) // steps for i in range(steps, -1, -1)]  # rounded
        return [first, *(t for t in times if t < first)]

    @torch.no_grad()
    def sample(
        self, denoiser: Denoiser, x: Tensor, y: Tensor, times: list[int], noise: ImageNoise | None
    ) -> Iterator[Tensor]:
        """Yield x (B, C, H, W), the state x_t at the first of the descending `times`, and then the
        states at all the others. `noise` may be None if `self.eta` is 0.

        The samplers are "ddpm" (Ho et al. 2020, eq. 6 and 7) and, with a fraction `eta` of its
        noise, "ddim" (Song et al. 2021, eq. 12) and "dpmpp" (DPM-Solver++ 2M, Lu et al. 2022,
        algorithm 2).
        """
        yield x
        x_0_before = t_before = None
        for t, s in itertools.pairwise(times):
            x_0_hat = estimate = denoiser(x, t, y)
            if self.cfg.sampler == "dpmpp" and t_before and s > 0:  # log_snr at 0 is infinite
                # 2M is `step` on x_0_hat extrapolated by 1 / (2 r) of its last change, where r is
                # the length in log_snr of the previous step over that of this one
                before, now, after = (self.log_snr_at[each] for each in (t_before, t, s))
                change = (after - now) / (now - before) / 2 * (x_0_hat - x_0_before)
                estimate = x_0_hat + change
            x = self.step(x, estimate, t, s, noise)
            yield x
            x_0_before, t_before = x_0_hat, t

    def step(
        self, x: Tensor, x_0_hat: Tensor, t: int, s: int, noise: ImageNoise | None = None
    ) -> Tensor:
        """x_s from x_t and x_0_hat. Song et al. 2021, eq. 12 and 16; with eta = 1 it is the
        posterior q(x_s | x_t, x_0) of Ho et al. 2020, eq. 6 and 7. At s = 0 no noise is added."""
        # Eq. 12 with eps_hat = (x - sqrt(a_t) x_0_hat) / sqrt(1 - a_t); a is alpha_bar
        a_t, a_s = self.alpha_bar_at[t], self.alpha_bar_at[s]
        variance = self.eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        kept = math.sqrt(max(1 - a_s - variance, 0) / (1 - a_t))
        x_s = kept * x + (math.sqrt(a_s) - kept * math.sqrt(a_t)) * x_0_hat
        return x_s + math.sqrt(variance) * noise.draw() if variance > 0 else x_s
