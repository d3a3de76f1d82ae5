"""Picture files: grids, animations, and PNGs that know how they were made."""

import json
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data import written_whole


def arrange(images: Tensor, digits: str, count: int) -> tuple[Tensor, int]:
    """The pictures of a grid, and its columns: `count` variants of a number (count, C, H, n · W);
    for "all" the images (N, C, H, W), a row for each digit."""
    variants = images.unflatten(0, (count, -1))  # (count, n, C, H, W)
    if digits == "all":
        return variants.transpose(0, 1).flatten(0, 1), count
    return torch.cat(list(variants.unbind(1)), dim=-1), max(1, round((count / len(digits)) ** 0.5))


def save_png(grid: Image.Image, path: Path, known: dict[str, Any]) -> None:
    """Write a PNG with a text chunk for each entry of `known`, its value in JSON."""
    info = PngInfo()
    for name, value in known.items():
        info.add_text(name, json.dumps(value))
    with written_whole(path) as partial:
        grid.save(partial, pnginfo=info)


def read_png(path: Path) -> dict[str, Any]:
    """The text chunks of a PNG that hold JSON; raises ValueError when it is no PNG."""
    known = {}
    try:
        with Image.open(path) as image:
            image.load()  # chunks may also follow the pixels
            chunks = image.text
    except FileNotFoundError:
        raise ValueError(f"{path}: no such picture") from None
    except (OSError, AttributeError, ValueError, EOFError, SyntaxError,
            Image.DecompressionBombError):  # fmt: skip
        raise ValueError(f"{path}: not a PNG that generate.py wrote") from None
    for name, text in chunks.items():
        try:
            known[name] = json.loads(text)
        except ValueError:
            continue  # another program's
    return known


def made_with(device: torch.device) -> str:
    """What a picture's bytes depend on besides its settings and the kind of CPU."""
    return f"torch {torch.__version__}, Pillow {PIL.__version__} on {device.type}"


def save_animation(grids: list[Image.Image], path: Path) -> None:
    """Write a looping .gif or .webp, by the ending of `path`: 1.5 s of change, 1 s of the end."""
    pace = max(20, 1500 // len(grids))  # milliseconds
    options = {"lossless": True} if path.suffix == ".webp" else {}
    with written_whole(path) as partial:
        grids[0].save(
            partial, save_all=True, append_images=grids[1:], loop=0,
            duration=[pace] * (len(grids) - 1) + [1000], **options,
        )  # fmt: skip
