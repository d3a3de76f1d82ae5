"""Draw images batch by batch: from noise alone, or from a picture to edit or to complete."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from diffusion import Denoiser, Diffusion, Model
from levels import GreyLevels
from system.randomness import ImageNoise


@dataclass(frozen=True)
class Start:
    """What drawing starts from: by default noise alone, else a picture x_0 too."""

    x_0: Tensor | None = None  # (C, H, W) in [-1, 1]
    known: Tensor | None = None  # bool (H, W): pixels of x_0 to keep exactly; None: x_0 is edited
    strength: float = 1.0  # editing begins with x_0 noised to strength · T

    def to(self, device: torch.device) -> "Start":
        """The same on another device."""
        x_0, known = (each if each is None else each.to(device) for each in (self.x_0, self.known))
        return Start(x_0, known, self.strength)


FROM_NOISE = Start()


class Pipeline:
    """A trained model with all it needs to draw as `cfg` says: the diffusion process, its guide,
    and the grey levels that its images get if `match_levels` is on."""

    def __init__(
        self,
        cfg: Config,
        model: Model,
        guide: Model | None = None,
        levels: GreyLevels | None = None,
    ) -> None:
        self.cfg, self.diffusion = cfg, Diffusion(cfg)
        self.denoiser = self.diffusion.guided(model, guide)
        self.levels = levels if cfg.match_levels else None

    def states(self, y: Tensor, noise: ImageNoise, start: Start = FROM_NOISE) -> Iterator[Tensor]:
        """Yield every state x_t (B, C, H, W) on the way from noise to images of the labels y int64
        (B,). An edit (SDEdit, Meng et al. 2022) begins with x_0 noised. A completion begins with
        noise, unless its strength is below 1, and every estimate of the image contains the known
        part of x_0."""
        times, denoiser = self.diffusion.sampling_times(start.strength), self.denoiser
        x = noise.draw()  # x_T, or the noise to add to x_0
        if start.known is not None:
            denoiser = keep_known(denoiser, start.x_0, start.known)
        if start.x_0 is not None and (start.known is None or start.strength < 1):
            t = torch.full_like(y, times[0])
            x = self.diffusion.add_noise(start.x_0.expand_as(x), t, x)
        states = self.diffusion.sample(denoiser, x, y, times, noise)
        for t, state in zip(times, states, strict=True):
            if t == 0 and self.levels:
                state = self.levels.match(state, noise.uniform())
                if start.known is not None:
                    state = torch.where(start.known, start.x_0, state)
            yield state

    def draw(
        self,
        y: Tensor,
        on_state: Callable[[int, Tensor], object] = lambda number, x: None,
        batches: slice = slice(None),
        start: Start = FROM_NOISE,
    ) -> Tensor:
        """Draw an image for each label in y int64 (N,), or only those of some `batches`, all from
        the same `start`: (N, C, H, W), within [-1, 1] if `clip_x_0`.

        Image i is the same picture, up to rounding, for any N, batch size and device. Every state
        of every batch, with its number, is passed to `on_state`.
        """
        cfg = self.cfg
        shape = (cfg.img_channels, cfg.img_size, cfg.img_size)
        images = [torch.empty(0, *shape, device=y.device)]  # for a process without a batch
        for first in range(0, len(y), cfg.sample_batch_size)[batches]:
            batch = y[first : first + cfg.sample_batch_size]
            noise = ImageNoise(cfg.seed, range(first, first + len(batch)), shape, device=y.device)
            for number, x in enumerate(self.states(batch, noise, start)):
                on_state(number, x)
            images.append(x)
        return torch.cat(images)

    def batch_count(self, count: int) -> int:
        """How many batches it takes to draw `count` images."""
        return -(-count // self.cfg.sample_batch_size)


def keep_known(denoiser: Denoiser, x_0: Tensor, known: Tensor) -> Denoiser:
    """A denoiser that knows a part of the image: x_0 (C, H, W) where `known` (H, W). RePaint
    (Lugmayr et al. 2022) puts the known part into x_t instead, noised, and repeats steps."""
    return lambda x, t, y: torch.where(known, x_0, denoiser(x, t, y))
