"""MNIST as tensors, and the one way from pixels to the model's range and back."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import Config

# How often each digit occurs in MNIST's training split
LABEL_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)


def load_split(cfg: Config, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A whole split: uint8 images (N, 1, img_size, img_size) and int64 labels (N,) on `device`.

    torchvision verifies the .gz files in `data_dir`, unpacks them on first use and downloads
    missing ones. Raises ValueError with the folder and the remedy where it cannot.
    """
    if cfg.img_channels != 1:
        raise ValueError(f"img_channels = {cfg.img_channels}: MNIST has 1; use --img_channels 1")
    if cfg.num_classes != 10:
        raise ValueError(f"num_classes = {cfg.num_classes}: MNIST has 10; use --num_classes 10")
    try:
        from torchvision.datasets import MNIST
        from torchvision.transforms.v2.functional import resize
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"torchvision does not fit torch {torch.__version__} ({first_line(error)}); "
            "install both from one source: pip install --force-reinstall torch torchvision"
        ) from None
    raw = Path(cfg.data_dir, "MNIST", "raw")
    try:
        dataset = MNIST(cfg.data_dir, train=train, download=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        remedy = "make it a folder that can be read and written, or choose another --data_dir"
        raise ValueError(f"data_dir = {cfg.data_dir!r}: {first_line(error)}; {remedy}") from None
    # What torchvision raises for damaged files and failed downloads
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, IndexError) as error:
        raise ValueError(
            f"data_dir = {cfg.data_dir!r}: cannot read MNIST from {raw} ({first_line(error)}); "
            "delete that folder and run again online, or: git checkout mnist_data"
        ) from None
    images, labels = dataset.data[:, None], dataset.targets  # (N, 1, 28, 28), (N,)
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{raw}: {len(images)} images but {len(labels)} labels; delete the folder")
    if train and cfg.max_images:
        images, labels = images[: cfg.max_images], labels[: cfg.max_images]
    if cfg.img_size != images.shape[-1]:
        size = [cfg.img_size, cfg.img_size]
        images = torch.cat([resize(part, size) for part in images.split(4096)])
    return images.to(device), labels.to(device)


def first_line(error: Exception) -> str:
    """An error's message, shortened to one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0…255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8 0…255, rounded; values outside are clamped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def draw_labels(count: int, seed: int) -> Tensor:
    """Random int64 labels (count,) in the proportions of MNIST's training split."""
    frequency = np.array(LABEL_COUNTS) / sum(LABEL_COUNTS)
    return torch.from_numpy(np.random.default_rng(seed).choice(10, size=count, p=frequency))
