"""Data sets as tensors, and how pixels become numbers in the model's range and back."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import other_data
from config import Config
from system.files import read_idx


def load_split(cfg: Config, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A split: uint8 images (N, C, img_size, img_size) and int64 labels (N,) on `device`; of the
    training split, the first `max_images`.

    Files that are missing in `data_dir` are downloaded, except for a folder. Raises ValueError with
    the folder and the remedy where that fails, or where the files do not fit the settings.
    """
    other_data.check_labels(cfg)
    read = {"MNIST": read_mnist, "folder": other_data.read_folder}
    images, labels = read.get(cfg.dataset, other_data.read_by_torchvision)(cfg, train)
    if train and cfg.max_images:
        images, labels = images[: cfg.max_images], labels[: cfg.max_images]
    if images.shape[2:] != (cfg.img_size, cfg.img_size):
        images = other_data.resize(images, cfg, train)
    return images.to(device), labels.to(device)


def read_mnist(cfg: Config, train: bool) -> tuple[Tensor, Tensor]:
    """A split of MNIST's own files: uint8 images (N, 1, H, W) and int64 labels (N,)."""
    name = "train" if train else "t10k"
    folder = Path(cfg.data_dir, "MNIST", "raw")
    images = read_idx(folder, f"{name}-images-idx3-ubyte", dimensions=3)[:, None]  # (N, 1, H, W)
    labels = read_idx(folder, f"{name}-labels-idx1-ubyte", dimensions=1).long()  # (N,)
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {name} images but {len(labels)} labels")
    if labels.max() >= cfg.num_classes:
        known = f"the model knows digits 0 to {cfg.num_classes - 1}"
        raise ValueError(f"{folder}: {name} labels up to {labels.max()}, but {known}")
    return images, labels


def fingerprint(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What a checkpoint remembers of its training data: number, shape and a hash."""
    content = hashlib.sha256(images.cpu().numpy())
    content.update(labels.cpu().numpy())
    return {"images": len(images), "shape": [*images.shape[1:]], "sha256": content.hexdigest()}


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0…255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8 0…255, rounded; values outside are clamped. Raises ValueError for
    NaN, which would pass for black."""
    if x.isnan().any():
        raise ValueError("the network's output is not a number; draw with another checkpoint")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
