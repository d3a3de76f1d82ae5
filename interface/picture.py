"""Picture files: grids, PNGs that can be reproduced, animations, and .npz sets of images."""

import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from system.files import atomic_write, check_sizes, first_line

ANIMATIONS = (".gif", ".webp")
ENDINGS = (".png", ".npz", *ANIMATIONS)  # generate.write writes each; most_images limits it
MAX_FRAMES = 76  # of an animation: 1.5 s at 20 ms each
MAX_IMAGES = 100_000
MAX_PIXELS = 170_000_000  # of a PNG
OPENED_PIXELS = 179_000_000  # Pillow opens no larger picture
MAX_ANIMATED = 500  # images
LONGEST = 16_000  # side of an animation in pixels, as WebP has 16,383 at most
GAP, GREY = 2, 64  # width and level of the frame around each image of a grid


def most_images(img_size: int, ending: str = ".png") -> int:
    """How many images of img_size pixels a file with this ending, or a folder, can hold."""
    side = img_size + GAP
    if ending in ANIMATIONS:
        return min(MAX_ANIMATED, LONGEST // side)
    return min(MAX_IMAGES, MAX_PIXELS // side**2) if ending == ".png" else MAX_IMAGES


def image_grid(images: Tensor, columns: int, gap: int = GAP) -> Image.Image:
    """uint8 images (N, C, H, W), C 1 or 3, row by row, with `gap` grey pixels around each."""
    N, C, H, W = images.shape
    rows = -(-N // columns)
    grid = torch.full(
        (C, rows * (H + gap) + gap, columns * (W + gap) + gap), GREY, dtype=torch.uint8
    )
    for i, image in enumerate(images.cpu()):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        grid[:, top : top + H, left : left + W] = image
    pixels = grid[0] if C == 1 else grid.permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def without_frame(grid: Image.Image) -> Image.Image | None:
    """The only image in an image_grid; None if it is not square or lacks a grey frame as wide."""
    box = (GAP, GAP, grid.width - GAP, grid.height - GAP)
    if grid.width != grid.height or grid.width <= 2 * GAP:
        return None
    frame, inside = grid.convert("L"), grid.crop(box)
    frame.paste(GREY, box)
    edge = inside.convert("L")
    edge.paste(GREY, (1, 1, edge.width - 1, edge.height - 1))  # grey too if it has been enlarged
    is_framed = frame.getextrema() == (GREY, GREY) != edge.getextrema()
    return inside if is_framed else None


def name_rows(grid: Image.Image, names: list[str], gap: int = GAP) -> Image.Image:
    """An image_grid with the name of each row on its left, except for names with characters that
    Pillow's own font lacks."""
    height = (grid.height - gap) // len(names)
    font = ImageFont.load_default(size=min(12, height - gap))
    shown = [name[:30] if name.isascii() else "" for name in names]
    margin = 2 * gap + math.ceil(max(font.getlength(name) for name in shown))
    page = Image.new(grid.mode, (margin + grid.width, grid.height), "#404040")
    page.paste(grid, (margin, 0))
    for row, name in enumerate(shown):
        middle = (gap, gap + row * height + (height - gap) // 2)
        ImageDraw.Draw(page).text(middle, name, "white", font, anchor="lm")
    return page


def arrange(images: Tensor, digits: str, count: int) -> tuple[Tensor, int]:
    """The tiles of a grid and its number of columns, from images (N, C, H, W) in drawing order.

    A number such as "2026" becomes one tile (C, H, 4 · W) for each of its `count` variants; for
    "all" each digit has a row of `count` tiles; for "mnist" every image is a tile.
    """
    if digits == "mnist":
        return images, max(1, round(count**0.5))
    variants = images.unflatten(0, (count, -1))  # (count, n, C, H, W)
    if digits == "all":
        return variants.transpose(0, 1).flatten(0, 1), count
    columns = max(1, round((count / variants.shape[1]) ** 0.5))
    return torch.cat(list(variants.unbind(1)), dim=-1), columns


def save_png(grid: Image.Image, path: Path, provenance: Mapping[str, Any] = {}) -> None:
    """Write a PNG with a text chunk, in JSON, for each entry of `provenance`. Raises ValueError."""
    with atomic_write(path) as file:
        file.write(encode_png(grid, provenance))


def encode_png(grid: Image.Image, provenance: Mapping[str, Any]) -> bytes:
    """What save_png writes."""
    info, encoded = PngInfo(), io.BytesIO()
    for name, value in provenance.items():
        info.add_text(name, json.dumps(value))
    grid.save(encoded, "PNG", pnginfo=info)
    return encoded.getvalue()


def save_animation(grids: list[Image.Image], path: Path) -> None:
    """Write a looping .gif or .webp: 1.5 s of grids, at least 20 ms each, and the last for 1 s."""
    pace = max(20, 1500 // len(grids))  # milliseconds
    options: dict[str, Any] = {"loop": 0, "duration": [pace] * (len(grids) - 1) + [1000]}
    if path.suffix == ".webp":
        options["lossless"] = True
    with atomic_write(path) as file:
        kind = path.suffix[1:].upper()
        grids[0].save(file, kind, save_all=True, append_images=grids[1:], **options)


def write_npz(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write uint8 images (N, C, H, W) as arr_0 (N, H, W) or (N, H, W, C), and int64 labels (N,) as
    arr_1: the format in which OpenAI's diffusion repositories exchange samples."""
    pixels = images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    with atomic_write(path) as file:
        np.savez_compressed(file, pixels.cpu().numpy(), labels.cpu().numpy())


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """uint8 images (N, 1, 28, 28) and int64 labels (N,), None if there are none, of a file in
    write_npz's format. Raises ValueError naming the file and what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            check_sizes(archive.infolist())
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1") if name in file.files}
    except Exception as error:  # a damaged or hostile file can make numpy raise almost anything
        raise ValueError(f"{path}: not a valid .npz: {first_line(error)}") from None
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    for name, found in arrays.items():
        if not isinstance(found, np.ndarray):  # numpy returns the bytes of what is not a .npy file
            raise ValueError(f"{path}: not a valid .npz: {name} is not an array")
    if images is None:
        raise ValueError(f"{path}: no arr_0; save with numpy.savez(file, images, labels)")
    fits = images.dtype == np.uint8 and images.shape[1:] in ((28, 28), (28, 28, 1))
    if not fits or not len(images):
        found = f"arr_0 is of shape {images.shape} and {images.dtype}"
        raise ValueError(f"{path}: {found}; make it uint8 of shape (N, 28, 28)")
    images = torch.from_numpy(images.reshape(-1, 1, 28, 28))
    if labels is None:
        return images, None
    fits = labels.dtype.kind in "iu" and labels.shape == (len(images),)
    if not fits or labels.min() < 0 or labels.max() > 9:
        found = f"arr_1 is {labels.dtype} of shape {labels.shape}; allowed are 0 to 9"
        raise ValueError(f"{path}: {found}, one for each of the {len(images)} images")
    return images, torch.from_numpy(labels.astype(np.int64))
