"""Random numbers that depend on a key alone, such as (seed, step), and not on earlier ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ImageNoise:
    """Standard normal noise for the images `indices` of a seed, each from a stream of its own.
    Drawn on the CPU in float32, so that a seed means the same noise on every device."""

    def __init__(self, seed: int, indices: range, shape: tuple[int, ...], **options: Any) -> None:
        """`shape` is that of one image; `options` are device and dtype of the noise."""
        self.generators = [seeded_generator(seed, index) for index in indices]
        self.shape, self.options = shape, options

    def uniform(self) -> Tensor:
        """For each image the next number between 0 and 1, (len(indices),)."""
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def draw(self) -> Tensor:
        """The next noise, (len(indices), *shape)."""
        noise = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(noise).to(**self.options)


def seeded_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on `key` alone, say (seed, step); other keys give unrelated
    streams as long as all numbers are below 2^32. Raises ValueError for a negative number."""
    entropy = (len(key), *key)  # the length too, because SeedSequence ignores trailing zeros
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def draw_labels(count: int, seed: int, counts: Sequence[int]) -> Tensor:
    """int64 labels (count,) in random order. Their proportions are those of `counts`, how often a
    data set has each label, to within one image: labels drawn at random would add noise to every
    comparison."""
    rng = np.random.default_rng(seed)
    share = np.array(counts) / sum(counts)
    # Evenly spaced points of the distribution, all shifted by one random number
    points = (np.arange(count) + rng.random()) / count
    labels = np.searchsorted(share.cumsum(), points).clip(max=len(counts) - 1)
    return torch.from_numpy(rng.permutation(labels))
