"""The picture that generate.py --complete and --edit begin with, and how a PNG records it."""

import base64
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from data import to_model_range, to_uint8
from interface.picture import GAP, without_frame
from other_data import open_picture, to_pixels
from pipeline import FROM_NOISE, Start
from system.files import first_line

KEEP = ("top", "bottom", "left", "right")


def record(start: Start) -> dict[str, Any]:
    """Plain values from which from_record makes it again; none if it is only noise."""
    if start.x_0 is None:
        return {}
    known = None if start.known is None else encoded(np.packbits(start.known.numpy()))
    pixels = to_uint8(start.x_0).numpy()
    return {"original": encoded(pixels), "known": known, "strength": start.strength}


def from_record(record: dict[str, Any], cfg: Config) -> Start:
    """What a PNG's text chunks say of its start. Raises LookupError, TypeError or ValueError for
    what `record` does not write."""
    if "original" not in record:
        return FROM_NOISE
    side = cfg.img_size
    pixels = torch.from_numpy(decoded(record["original"]).reshape(cfg.img_channels, side, side))
    known = None
    if record["known"] is not None:
        bits = np.unpackbits(decoded(record["known"]), count=side**2)
        known = torch.from_numpy(bits.astype(bool).reshape(side, side))
    return Start(to_model_range(pixels), known, checked_strength(record["strength"]))


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint8).copy()


def checked_strength(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"strength = {value}: choose a number above 0 and at most 1")
    return float(value)


def strength_of(args: Namespace) -> float:
    """The strength that the flags ask for: 1 unless a picture is edited."""
    return checked_strength(args.strength) if args.edit else 1.0


def from_flags(args: Namespace, cfg: Config) -> Start:
    """What --complete and --edit, with the flags that belong to them, ask for. Raises ValueError
    for a picture that cannot be read, or a mask that leaves nothing to keep or to draw."""
    if args.edit:
        if cfg.is_student:
            raise ValueError("--edit needs a model that is not a student; try --model pretrained")
        return Start(to_model_range(read(args.edit, cfg)), strength=strength_of(args))
    if args.complete is None:
        return FROM_NOISE
    if args.mask:
        known = read(args.mask, cfg).float().mean(dim=0) > 127
        if known.all() or not known.any():
            raise ValueError(f"{args.mask}: needs white pixels, to keep, and black ones, to draw")
    else:
        known = half_of(cfg.img_size, args.keep)
    return Start(to_model_range(read(args.complete, cfg)), known)


def half_of(side: int, keep: str) -> Tensor:
    """The mask, bool (side, side), of the half that one of KEEP names."""
    first = torch.arange(side) < side // 2
    half = first if keep in ("top", "left") else ~first
    return (half if keep in ("left", "right") else half[:, None]).expand(side, side)


def read(path: Path, cfg: Config) -> Tensor:
    """The pixels of a .png or .jpg in the model's size and colours, uint8 (C, H, W). Raises
    ValueError if it cannot be read, or if it is a grid of several that generate.py drew."""
    if not path.is_file():
        raise ValueError(f"{path}: no such picture")
    try:
        image = open_picture(path)
        is_drawn = image.info.keys() >= {"digits", "count"}  # which provenance.record writes
        size = cfg.img_size + 2 * GAP
        is_single = image.info["count"] == "1" if is_drawn else image.size == (size, size)
        is_tile = image.size == (cfg.img_size, cfg.img_size)  # such as one cut out of a grid
        inside = without_frame(image) if is_single else None
        pixels = to_pixels(inside or image, cfg)
    except Exception as error:  # a damaged file can make Pillow raise anything
        fault = f"cannot be read as a picture ({first_line(error)})"
        raise ValueError(f"{path}: {fault}; save it anew as .png or .jpg") from None
    if is_drawn and not inside and not is_tile:
        raise ValueError(f"{path}: holds several images; draw one with --digits 7 --count 1")
    return pixels
