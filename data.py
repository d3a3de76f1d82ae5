"""MNIST as tensors, and the one way from pixels to the model's range and back."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from config import Config


def load_split(cfg: Config, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A whole split: uint8 images (N, 1, img_size, img_size) and int64 labels (N,) on `device`.

    torchvision verifies the .gz files under `data_dir`, unpacks them on first use and downloads
    those that are missing. Raises ValueError with the folder and the remedy where it cannot.
    """
    try:
        from torchvision.datasets import MNIST
        from torchvision.transforms.v2.functional import resize
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"torchvision does not fit torch {torch.__version__} ({_first_line(error)}); "
            "install both from one source: pip install --force-reinstall torch torchvision"
        ) from None
    if cfg.img_channels != 1:
        raise ValueError(f"img_channels = {cfg.img_channels}: MNIST has 1; use --img_channels 1")
    raw = Path(cfg.data_dir) / "MNIST" / "raw"
    try:
        dataset = MNIST(cfg.data_dir, train=train, download=True)
    # torchvision reports bad files and failed downloads in as many ways as these
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, IndexError) as error:
        raise ValueError(
            f"data_dir = {cfg.data_dir!r}: cannot read MNIST from {raw} ({_first_line(error)}); "
            f"delete that folder and run again with a network, or copy the four .gz files back"
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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] → uint8 0…255, rounded; what lies outside is clamped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """uint8 images (N, C, H, W), C 1 or 3, row by row on a grid, `gap` pixels of grey between."""
    N, C, H, W = images.shape
    rows = -(-N // columns)
    grid = torch.full((C, rows * (H + gap) + gap, columns * (W + gap) + gap), 64, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        grid[:, top : top + H, left : left + W] = image
    pixels = grid[0] if C == 1 else grid.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())
