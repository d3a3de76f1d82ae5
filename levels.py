"""Grey levels: histogram matching, from those that a model draws to those of its training images.

A network tends to predict an average of the images that fit what it sees. So it draws faint halos
around strokes. In MNIST a single grey fills the strokes of an image: 253 in 43 % of the images, 254
in 28 %, 252 in 21 %, 255 in 5 %; in what is drawn it varies. An eye does not notice it; a
classifier does.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import to_model_range
from diffusion import Denoiser, Diffusion
from system.randomness import ImageNoise

FINE = 8  # entries of a curve per grey level
LIGHT = 240  # from here on the levels depend on the white of an image
WHITES = range(250, 256)  # each image's white is the most frequent of these
REDRAWN_PIXELS = 256 * 28 * 28  # of the training images that are noised and drawn again
LEAST_NOISE = 0.2  # they are noised to at least this t / T
COUNTED_PIXELS = 8_000_000  # of the training images: those of 10,000 MNIST images


@dataclass(frozen=True)
class GreyLevels:
    """A curve for each of WHITES, from the levels that a model draws to real ones."""

    share: Tensor  # float32 (6,): the fraction with this white, of the images that have one
    curves: Tensor  # uint8 (6, 255 · FINE + 1): the level for each level drawn

    def __post_init__(self) -> None:
        """Raises ValueError for tensors that are not such curves."""
        shapes = (len(WHITES),), (len(WHITES), 255 * FINE + 1)
        dtypes = self.share.dtype, self.curves.dtype
        fits = (self.share.shape, self.curves.shape) == shapes
        if (
            not fits
            or dtypes != (torch.float32, torch.uint8)
            or not (self.share >= 0).all()
            or not 0.99 < float(self.share.sum()) < 1.01
        ):
            raise ValueError("its curves of grey levels are malformed")

    @classmethod
    @torch.no_grad()
    def of_model(
        cls, diffusion: Diffusion, denoiser: Denoiser, images: Tensor, labels: Tensor
    ) -> "GreyLevels | None":
        """The curves from what this denoiser draws to the training images, uint8 (N, C, H, W).
        Only the last sampling steps decide grey levels, so a few images are noised to where those
        begin and drawn again: originals and copies then differ in little else, and it usually
        takes no longer than a few training steps."""
        number, times = max(1, REDRAWN_PIXELS // images[0].numel()), diffusion.sampling_times()
        few, y = images[:number], labels[:number]
        first = min(t for t in times if t >= LEAST_NOISE * diffusion.T)
        times = [t for t in times if t <= first]
        noise = ImageNoise(diffusion.cfg.seed, range(len(few)), few.shape[1:], device=few.device)
        x = diffusion.add_noise(to_model_range(few), torch.full_like(y, first), noise.draw())
        *_, drawn = diffusion.sample(denoiser, x, y, times, noise)
        return cls.measure(images, few, drawn)

    @classmethod
    def measure(cls, images: Tensor, few: Tensor, drawn: Tensor) -> "GreyLevels | None":
        """The curves for the training images, uint8 (M, C, H, W), of which the first are counted,
        COUNTED_PIXELS in all. None if none of them has a white, or if `drawn` holds NaN.

        Levels are matched by rank. The rank of a level in `drawn`, float (N, C, H, W) in [-1, 1],
        is looked up in `few`, the uint8 images that `drawn` should look like, and from there in
        all `images`, because `few` is a small sample. Below LIGHT all curves are the same; from
        LIGHT on, each is that of the images with its own white."""
        images = images[: max(1, COUNTED_PIXELS // images[0].numel())].cpu().flatten(1)
        counts = torch.stack([(images == white).sum(dim=1) for white in WHITES])  # (6, M)
        white_of = torch.where(counts.sum(dim=0) > 0, counts.argmax(dim=0), -1)  # (M,), -1: none
        if (white_of < 0).all() or drawn.isnan().any():
            return None
        shares = _shares(_codes(drawn), 255 * FINE + 1)
        rank = shares.cumsum() - shares / 2  # of a level, among the pixels drawn: 0 to 1
        few_cdf, cdf = (_shares(x, 256).cumsum() for x in (few, images))
        rank = np.interp(rank, np.r_[0, few_cdf], np.r_[0, cdf])  # among all training pixels
        curves = []
        for i in range(len(WHITES)):
            pixels = images[white_of == i]
            light, cdf_of_white = pixels[pixels >= LIGHT], cdf.copy()
            if len(light):
                below = cdf[LIGHT - 1]
                cdf_of_white[LIGHT:] = below + (1 - below) * _shares(light, 256).cumsum()[LIGHT:]
            curve = np.searchsorted(cdf_of_white, rank.clip(max=cdf_of_white[-1]))
            curve[0] = 0  # what the network drew black stays black
            curves.append(torch.from_numpy(curve.astype(np.uint8)))
        share = torch.bincount(white_of[white_of >= 0], minlength=len(WHITES)).float()
        return cls(share / share.sum(), torch.stack(curves))

    def match(self, x: Tensor, chance: Tensor) -> Tensor:
        """Images x (B, C, H, W) in [-1, 1] with real grey levels, in the same range; `chance` (B,),
        in [0, 1), draws the white of each. NaN, which no curve knows, passes through."""
        curves, up_to = (each.to(x.device) for each in (self.curves, self.share.cumsum(dim=0)))
        white = torch.searchsorted(up_to, chance.to(x.device), right=True).clamp(max=len(up_to) - 1)
        levels = curves[white].gather(1, _codes(x.nan_to_num()).flatten(1))  # (B, C·H·W)
        return torch.where(x.isnan(), x, levels.view(x.shape).to(x.dtype) / 127.5 - 1)

    @classmethod
    def from_dict(cls, tensors: dict[str, Any] | None) -> "GreyLevels | None":
        """The curves of a checkpoint; None for None, as in older ones. Raises ValueError for
        tensors that are not such curves."""
        return cls(**tensors) if tensors else None


def _codes(x: Tensor) -> Tensor:
    """The index in a curve of each value of x in [-1, 1]: int64, 0 to 255 · FINE."""
    return ((x.clamp(-1, 1) + 1) * (127.5 * FINE)).round().long()


def _shares(numbers: Tensor, bins: int) -> np.ndarray:
    """The fraction of whole `numbers` that is 0, 1, … bins - 1: float64 (bins,)."""
    counts = np.bincount(numbers.flatten().cpu().numpy(), minlength=bins)
    return counts / numbers.numel()
