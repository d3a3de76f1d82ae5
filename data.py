"""MNIST as tensors, and the one way from pixels to the model's range and back."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import Config

LABEL_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)  # MNIST's train split


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
    if cfg.num_classes != 10:
        raise ValueError(f"num_classes = {cfg.num_classes}: MNIST has 10; use --num_classes 10")
    raw = Path(cfg.data_dir) / "MNIST" / "raw"
    try:
        dataset = MNIST(cfg.data_dir, train=train, download=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"data_dir = {cfg.data_dir!r}: {_first_line(error)}; make it a folder that can be read "
            "and written, or choose another --data_dir"
        ) from None
    # torchvision reports bad files and failed downloads in as many ways as these
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, IndexError) as error:
        raise ValueError(
            f"data_dir = {cfg.data_dir!r}: cannot read MNIST from {raw} ({_first_line(error)}); "
            "delete that folder and run again with a network, or: git checkout mnist_data"
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


def draw_labels(count: int, seed: int) -> Tensor:
    """int64 labels (count,), as frequent as in MNIST's training split."""
    frequency = np.array(LABEL_COUNTS) / sum(LABEL_COUNTS)
    return torch.from_numpy(np.random.default_rng(seed).choice(10, size=count, p=frequency))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` once all is written, or vanishes."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_npz(path: Path, images: Tensor, labels: Tensor) -> None:
    """arr_0 uint8 images (N, H, W) or (N, H, W, C), arr_1 int64 labels: as OpenAI's diffusion
    repositories exchange samples."""
    pixels = images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    with written_whole(path) as partial:
        np.savez_compressed(partial, pixels.cpu().numpy(), labels.cpu().numpy())


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """uint8 images (N, 1, 28, 28) and int64 labels (N,), None if the file has none, of an .npz in
    write_npz's form. Raises ValueError naming the file and what is wrong with it."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            arrays = [file[name] for name in ("arr_0", "arr_1") if name in file.files]
            has_images = "arr_0" in file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "no such file" if not path.exists() else f"not a whole .npz: {_first_line(error)}"
        raise ValueError(f"{path}: {reason}") from None
    if not has_images:
        raise ValueError(f"{path}: no arr_0; save with numpy.savez(file, images, labels)")
    images = arrays[0]
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {images.dtype}; make it uint8, 0 to 255")
    if images.shape[1:] not in ((28, 28), (28, 28, 1)) or not len(images):
        raise ValueError(f"{path}: arr_0 is of shape {images.shape}; make it (N, 28, 28)")
    images = torch.from_numpy(images.reshape(-1, 1, 28, 28))
    if len(arrays) == 1:
        return images, None
    labels = arrays[1]
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"{path}: arr_1 is {labels.dtype} of shape {labels.shape}; make it whole numbers, one "
            f"for each of the {len(images)} images"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{path}: arr_1 has labels beyond 0 to 9")
    return images, torch.from_numpy(labels.astype(np.int64))


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
