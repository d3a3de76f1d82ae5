"""What a PNG says of how it was drawn, and how it is drawn again from that."""

import json
import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image

from checkpoint import LoadedModel, load_model
from config import Config
from interface import original
from interface.models import model_with_hash
from interface.picture import encode_png
from interface.requests import Request, free_name
from interface.settings import settings_for_drawing
from system.files import atomic_write, check_writable
from system.machine import pick_device, pick_precision
from system.values import shortened

VERSION = "1.0"  # of a PNG's text chunks
COMPILED = ", compiled"
MOST_THREADS = 1024


def record(loaded: LoadedModel, request: Request) -> dict[str, Any]:
    """The entries of a PNG's text chunks: all that --reproduce needs to draw it again."""
    what = {"model": loaded.sha256, "digits": request.digits, "count": request.count}
    if request.digits == "mnist":
        what["labels"] = "exact"  # older versions drew them at random
    how = {"version": VERSION} | request.cfg.select("sampling", "picture")
    how["precision"] = pick_precision(request.cfg.precision, loaded.device)  # not "auto"
    start = original.record(request.start)
    if request.row_names:
        start["row names"] = True
    where = made_with(loaded.device) + (COMPILED if request.cfg.compile else "")
    all_ = what | how | start | {"made with": where, "threads": torch.get_num_threads()}
    return {k: v for k, v in all_.items() if request.recorded is None or k in request.recorded}


def save(grid: Image.Image, loaded: LoadedModel, request: Request) -> None:
    """Write a request's grid as a PNG with its record. Raises ValueError, and writes nothing, if it
    should reproduce a picture but differs."""
    encoded, may_replace = encode_png(grid, record(loaded, request)), request.if_taken == "replace"
    if (picture := request.reproduces) and encoded != picture.read_bytes():
        said, here = shortened(read(picture).get("made with")), made_with(loaded.device)
        differ = f"the bytes differ from those of {picture}, made with {said}; here: {here}"
        raise ValueError(f"{request.output}: not written: {differ}")
    while True:
        try:
            with atomic_write(request.output, replace=may_replace) as file:
                file.write(encoded)
            return
        except FileExistsError:  # another process was faster
            request.rename()


def made_with(device: torch.device) -> str:
    """What a picture's bytes depend on besides its settings and the kind of CPU."""
    return f"torch {torch.__version__}, Pillow {PIL.__version__} on {device.type}"


def read(path: Path) -> dict[str, Any]:
    """The text chunks of a PNG that hold JSON. Raises ValueError if none names a model."""
    if not path.is_file():
        raise ValueError(f"{path}: no such picture")
    provenance = {}
    with suppress(Exception):  # a damaged or hostile file can make Pillow and json raise anything
        # PNG alone: for other formats, Pillow may start programs such as Ghostscript. Its warnings
        # of large pictures are left out
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG"]) as image:
            image.load()  # chunks may also follow the pixels
            for name, text in image.text.items():
                with suppress(ValueError):  # a chunk of another program
                    provenance[name] = json.loads(text)
        if "model" in provenance:
            return provenance
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: cannot be read; change its permissions")
    raise ValueError(f"{path}: not a PNG that generate.py wrote")


def request_from_picture(
    provenance: dict[str, Any], picture: Path, trained: Config, given: dict[str, Any]
) -> Request:
    """The request that a PNG's text chunks record, with this computer's settings as `given`.
    Raises ValueError if they are not those that `record` names."""
    if provenance.get("digits") == "mnist" and provenance.get("labels") != "exact":
        reason = "an older version drew its labels at random, which this one does not"
        raise ValueError(f"{picture}: {reason}; draw a new one")
    recorded = set(provenance)
    try:
        # Older pictures record neither, because all were drawn like this
        provenance = {"precision": "float32", "match_levels": False} | provenance
        known = {name: provenance[name] for name in Config.names("sampling", "picture")}
        cfg = settings_for_drawing(trained, given, known)
        start = original.from_record(provenance, cfg)
        what = provenance["digits"], provenance["count"]
        return Request(*what, cfg, picture, start=start, reproduces=picture, recorded=recorded)
    except (LookupError, TypeError, ValueError):
        if (version := provenance.get("version", VERSION)) != VERSION:
            other = f"its record has version {shortened(version)}, not {VERSION}"
            raise ValueError(f"{picture}: {other}; use the program that drew it") from None
        raise ValueError(f"{picture}: not a PNG that generate.py wrote") from None


def request_again(
    picture: Path, output: str | None, given: dict[str, Any]
) -> tuple[LoadedModel, Request]:
    """What to draw, and with which model, so that a picture comes out again: on a device such as it
    was drawn on, unless one is `given`. Raises ValueError if it records nothing, or if its model is
    neither among the models nor among those of earlier runs."""
    replace(Config(), **given)  # so that a wrong flag is not taken for a wrong picture
    recorded = read(picture)
    made, compiled, _ = str(recorded.get("made with")).partition(COMPILED)
    where = made.rpartition(" on ")[2]
    usual = where if where in ("cuda", "mps") else "cpu"  # each rounds differently
    here = {"output_dir": Config().output_dir, "device": usual} | given
    device = pick_device(here["device"])
    file = model_with_hash(recorded["model"], Path(here["output_dir"]))
    if file is None:
        lacks = f"its model, SHA-256 {shortened(recorded['model'])}, is not in {here['output_dir']}"
        remedy = "copy it there, or try --output_dir; git's history has models shipped earlier"
        raise ValueError(f"{picture}: {lacks}; {remedy}")
    loaded = replace(load_model(file, device, bool(compiled)), sha256=recorded["model"])
    if "threads" in recorded and type(recorded["threads"]) is int:
        torch.set_num_threads(min(max(1, recorded["threads"]), MOST_THREADS))
    request = request_from_picture(
        recorded, picture, loaded.cfg, here | {"compile": bool(compiled)}
    )
    name = f"{request.digits[:14]}_again"
    request.output = Path(output) if output else free_name(request.cfg, name)
    request.if_taken = "replace" if output else "renumber"
    check_writable(request.output)
    if request.output.exists() and request.output.samefile(picture):
        raise ValueError(f"output = '{output}': this is the picture itself; choose another name")
    return loaded, request
