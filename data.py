"""Data sets as tensors, and how pixels become numbers in the model's range and back."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import other_data
from config import Config
from system.files import MAX_BYTES, from_torchvision, read_idx

# How often each digit occurs in MNIST's training split
LABEL_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)


def load_split(cfg: Config, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A whole split: uint8 images (N, C, img_size, img_size) and int64 labels (N,) on `device`.

    MNIST's files that are missing in `data_dir` are downloaded. Raises ValueError with the folder
    and the remedy where that fails, or where the files do not hold what the settings say.
    """
    other_data.check_kind(cfg)
    read = {"MNIST": read_mnist, "folder": other_data.read_folder}
    images, labels = read.get(cfg.dataset, other_data.read_by_torchvision)(cfg, train)
    if train and cfg.max_images:
        images, labels = images[: cfg.max_images], labels[: cfg.max_images]
    size = [cfg.img_size, cfg.img_size]
    if list(images.shape[2:]) != size:
        if len(images) * cfg.img_size**2 > MAX_BYTES:
            split = f"{len(images):,} {'training' if train else 'test'} images"
            remedy = f"choose at most {math.isqrt(MAX_BYTES // len(images))}"
            if train:
                remedy += f", or --max_images {MAX_BYTES // cfg.img_size**2}"
            raise ValueError(f"img_size = {cfg.img_size}: too large for {split}; {remedy}")
        print(f"resizing images of {images.shape[3]} x {images.shape[2]} pixels to {cfg.img_size}")
        resize = from_torchvision("transforms.v2.functional").resize
        images = torch.cat([resize(part, size) for part in images.split(4096)])
    return images.to(device), labels.to(device)


def read_mnist(cfg: Config, train: bool) -> tuple[Tensor, Tensor]:
    folder, name = Path(cfg.data_dir, "MNIST", "raw"), "train" if train else "t10k"
    images = read_idx(folder, f"{name}-images-idx3-ubyte", dimensions=3)[:, None]  # (N, 1, H, W)
    labels = read_idx(folder, f"{name}-labels-idx1-ubyte", dimensions=1).long()  # (N,)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {name} images but {len(labels)} labels")
    if labels.max() >= cfg.num_classes:
        digits = f"digits 0 to {cfg.num_classes - 1}"
        raise ValueError(f"{folder}: {name} labels up to {labels.max()}, but {digits} are known")
    return images, labels


def fingerprint(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What a checkpoint remembers of its training data: number, shape and a hash."""
    content = hashlib.sha256(images.cpu().numpy())
    content.update(labels.cpu().numpy())
    shape = list(images.shape[1:])
    return {"images": len(images), "shape": shape, "sha256": content.hexdigest()}


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0…255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8 0…255, rounded; values outside are clamped. Raises ValueError for
    NaN, which would pass for black."""
    if x.isnan().any():
        raise ValueError("the network's output is not a number; draw with another checkpoint")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_labels(count: int, seed: int, counts: Sequence[int] = LABEL_COUNTS) -> Tensor:
    """int64 labels (count,) in random order, in the proportions of `counts` (usually MNIST's) to
    within one image: frequencies drawn at random would add noise to every comparison."""
    rng = np.random.default_rng(seed)
    share = np.array(counts) / sum(counts)
    # Evenly spaced points of the distribution, all shifted by one random number
    points = (np.arange(count) + rng.random()) / count
    labels = np.searchsorted(share.cumsum(), points).clip(max=len(counts) - 1)
    return torch.from_numpy(rng.permutation(labels))
