"""Readers of other data sets, and the names of their labels: MNIST's relatives, by torchvision, and
a folder of your own pictures. Also how any picture becomes pixels of a model's size."""

import math
import string
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from config import Config
from system import distributed
from system.files import MAX_BYTES, first_line, from_torchvision, printable
from system.values import counted, is_control, shortened

PICTURES = (".png", ".jpg", ".jpeg")
OTHER_PICTURES = {".avif", ".bmp", ".gif", ".heic", ".jfif", ".pgm", ".ppm", ".tif", ".tiff"}
OTHER_PICTURES |= {".webp"}
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
MAX_CLASSES = 1000


def check_labels(cfg: Config) -> None:
    """Raise ValueError unless a data set, MNIST too, has the settings' channels and labels."""
    if cfg.dataset != "folder" and cfg.img_channels != 1:
        raise ValueError(f"img_channels = {cfg.img_channels}: {cfg.dataset} has 1; drop the flag")
    names = class_names(cfg)
    if names != cfg.label_names:
        found, known, differing = (
            shortened("/".join(each))
            for each in (names, cfg.label_names, sorted(set(names) ^ set(cfg.label_names)))
        )
        remedy = "give it the data that it was trained on, or train a new model"
        where = f"dataset = {cfg.dataset!r}, {cfg.data_dir}"
        differ = f"labels {found}, but the model knows {known}"
        if "…" in found + known:  # where the difference may be
            differ += f", different in {differing}"
        raise ValueError(f"{where}: {differ}; {remedy}")


def class_names(cfg: Config) -> list[str]:
    """The names of the data set's labels; of a folder, those of its subfolders in order. Raises
    ValueError if these cannot be labels, or if output_dir would be one."""
    if cfg.dataset == "folder":
        root = Path(cfg.data_dir)
        found = sorted(p.name for p in root.glob("*") if p.is_dir() and not p.name.startswith("."))
        if not 1 <= len(found) <= MAX_CLASSES:
            needs = f"needs one for each label, 1 to {MAX_CLASSES}; choose another folder"
            raise ValueError(f"data_dir = {cfg.data_dir!r}: has {len(found)} subfolders, {needs}")
        written_alike = [unicodedata.normalize("NFC", name) for name in found]
        if len(set(written_alike)) < len(found):
            raise ValueError(f"{root}: two labels differ only in their Unicode form; rename one")
        out = Path(cfg.output_dir).resolve()
        if out == root.resolve() or (out.parent == root.resolve() and out.name[0] != "."):
            inside = f"is in data_dir = {cfg.data_dir!r}, whose folders are labels"
            raise ValueError(f"output_dir = {cfg.output_dir!r}: {inside}; choose another")
        for name in found:
            if any(map(is_control, name)):
                raise ValueError(f"{str(root / name)!r}: has control characters; rename the folder")
            if name in ("all", "mnist") or "," in name or name != name.strip():
                rule = "a label cannot be all or mnist, or have commas or outer spaces"
                raise ValueError(f"{root / name}: {rule}; rename the folder")
        return found
    if cfg.dataset in ("FashionMNIST", "KMNIST"):
        kind = getattr(from_torchvision("datasets"), cfg.dataset)
        return [name.replace("/", " or ") for name in kind.classes]
    return list(string.ascii_lowercase if cfg.dataset == "EMNIST-letters" else string.digits)


def with_classes(cfg: Config, given: dict[str, Any]) -> Config:
    """`cfg` with the settings that are `given`, and with the number and the names of its data set's
    labels."""
    defaults = Config()
    shown = given.get("preview_digits", cfg.preview_digits)
    cfg = replace(cfg, **given | {"preview_digits": "all"})  # until the labels are known
    names, own = class_names(cfg), defaults.select("classes")
    if names != defaults.label_names:
        own = {"num_classes": len(names), "class_names": "/".join(names)}
        shown = "all" if shown == defaults.preview_digits else shown
    return replace(replace(cfg, **own), preview_digits=shown)


def read_by_torchvision(cfg: Config, train: bool) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, H, W) and int64 labels (N,) from torchvision, which downloads what is
    missing. Raises ValueError if that fails."""
    name, _, split = cfg.dataset.partition("-")
    options = {"split": split} if split else {}
    try:
        kind = getattr(from_torchvision("datasets"), name)
        options["train"] = train
        # Several processes must not download at once; "and None", as data sets are large to send
        distributed.from_first(lambda: kind(cfg.data_dir, download=True, **options) and None)
        data = kind(cfg.data_dir, **options)
    except Exception as error:  # of damaged files it can raise almost anything
        where = Path(cfg.data_dir, name)
        remedy = f"go online, put its files there, or delete {where} if they are damaged"
        raise ValueError(f"{cfg.dataset}: {where}: {first_line(error)}; {remedy}") from None
    images, labels = data.data, torch.as_tensor(data.targets)
    if name == "QMNIST":
        labels = labels[:, 0]  # the other columns say who wrote it
    elif name == "EMNIST":
        images, labels = images.transpose(1, 2), labels - int(split == "letters")  # 1 to 26
    return images[:, None].contiguous(), labels.long().contiguous()


def read_folder(cfg: Config, train: bool, *, quiet: bool = False) -> tuple[Tensor, Tensor]:
    """The pictures of data_dir/LABEL/, cropped to squares and resized. Every tenth picture of a
    label is set aside for testing, beginning with its second. Prints what cannot be read. Returns
    uint8 images (N, C, img_size, img_size) and int64 labels (N,)."""
    files = pictures_in(cfg, quiet=quiet or not train)
    images, labels, unread = [], [], []
    seen = [0] * cfg.num_classes
    for path, label in tqdm(files, desc="reading pictures", leave=False, disable=None):
        try:
            if not path.is_file():  # reading from a pipe would not end
                raise ValueError("not a file")
            pixels = to_pixels(open_picture(path), cfg)
        except Exception as error:  # a damaged file can make Pillow raise anything
            unread.append(f"{printable(str(path))} ({first_line(error)})")
            continue
        seen[label] += 1
        if (seen[label] % 10 == 2) != train:
            images.append(pixels)
            labels.append(label)
        if len(images) * pixels.numel() > MAX_BYTES:
            raise ValueError(f"{cfg.data_dir}: too many pictures; choose a smaller --img_size")
    if unread and train and not quiet:
        print(f"left out {len(unread)} of {len(files)} pictures, which cannot be read:")
        print(*unread[:5], *(["…"] if len(unread) > 5 else []), sep="\n")
    if train and 0 in seen:
        empty = Path(cfg.data_dir, class_names(cfg)[seen.index(0)])
        remedy = "add some, or choose another --data_dir"
        if any(path.is_dir() and path.name[0] != "." for path in empty.iterdir()):
            remedy = "move those of its folders up, or give the --data_dir whose folders are labels"
        raise ValueError(f"{empty}: no .png or .jpg that can be read; {remedy}")
    if not images:
        print(f"{cfg.data_dir}: too few pictures to set any aside; testing on training ones")
        return read_folder(cfg, train=True, quiet=True)
    # Shuffled, so that the first `max_images` have all labels
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return torch.stack(images)[order], torch.tensor(labels)[order]


def pictures_in(cfg: Config, *, quiet: bool) -> list[tuple[Path, int]]:
    """The pictures of data_dir/LABEL/, each with the number of its label. Says what else looks as
    if it should be trained on, unless `quiet`. Hidden files do not count."""
    root = Path(cfg.data_dir)
    found = [
        (path, label)
        for label, name in enumerate(class_names(cfg))
        for path in sorted((root / name).iterdir())
        if path.name[0] != "."
    ]
    files = [(path, label) for path, label in found if path.suffix.lower() in PICTURES]
    if not quiet:
        others = [path for path, _ in found if path.suffix.lower() not in PICTURES]
        inside = [path for path in others if path.is_dir()]
        kinds = {path.suffix.lower() for path in others} & OTHER_PICTURES
        loose = [path for path in root.glob("[!.]*") if path.suffix.lower() in PICTURES]
        if kinds:
            which = ", ".join(sorted(kinds))
            print(f"left out all {which} in {root}: make them .png or .jpg to train on them")
        if inside:
            first = printable(str(inside[0]))
            print(f"left out {counted(len(inside), 'folder')} inside labels, such as {first}")
        if loose:
            print(f"left out {counted(len(loose), 'picture')} without a label, in {root} itself")
    return files


def resize(images: Tensor, cfg: Config, train: bool) -> Tensor:
    """The images of a split, uint8 (N, C, H, W), in the settings' size. Raises ValueError if they
    would be too large for memory."""
    if len(images) * cfg.img_size**2 > MAX_BYTES:
        split = f"{len(images):,} {'training' if train else 'test'} images"
        remedy = f"choose at most {math.isqrt(MAX_BYTES // len(images))}"
        if train:
            remedy += f", or --max_images {MAX_BYTES // cfg.img_size**2}"
        raise ValueError(f"img_size = {cfg.img_size}: too large for {split}; {remedy}")
    print(f"resizing images of {images.shape[3]} x {images.shape[2]} pixels to {cfg.img_size}")
    resized = from_torchvision("transforms.v2.functional").resize
    size = [cfg.img_size, cfg.img_size]
    return torch.cat([resized(part, size) for part in images.split(4096)])


def open_picture(path: Path) -> Image.Image:
    """A .png or .jpg, rotated as its EXIF says, black where it is transparent. Whatever Pillow
    raises passes through."""
    # These formats alone: for others, Pillow may start programs such as Ghostscript
    with (
        warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
        Image.open(path, formats=["PNG", "JPEG"]) as file,
    ):
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
    return image


def to_pixels(image: Image.Image, cfg: Config) -> Tensor:
    """A picture cropped to a square and resized: uint8 (C, img_size, img_size)."""
    fitted = ImageOps.fit(image.convert(MODES[cfg.img_channels]), (cfg.img_size, cfg.img_size))
    pixels = torch.from_numpy(np.array(fitted))  # (H, W) or (H, W, 3)
    return pixels.view(cfg.img_size, cfg.img_size, -1).permute(2, 0, 1).contiguous()
