"""What a user asks to draw, by flags or by answers."""

import os
import secrets
from argparse import ArgumentTypeError, Namespace
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import LoadedModel
from config import Config
from interface import original
from interface.picture import ANIMATIONS, ENDINGS, MAX_FRAMES, OPENED_PIXELS, most_images
from interface.settings import check_effects, check_guidance, is_guided
from interface.terminal import ask, log, quit_words, whole_number
from pipeline import FROM_NOISE, Start
from system.files import check_writable, make_folder
from system.randomness import draw_labels
from system.values import counted, is_control, parse_labels, shortened

# How --fast draws with a model that has a guide: in 6 network calls, not 19
FAST = {"steps": 5, "eta": 0.3, "guidance": 4.2, "guidance_low": 0.5, "guidance_high": 0.7}
# How often each digit occurs in MNIST's training split
MNIST_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
TAKEN = "exists already; choose another folder or --seed"


def fast_settings(loaded: LoadedModel) -> dict[str, Any]:
    """How --fast draws: a model with a guide as FAST says, one without in as many steps but with
    its own guidance; for a student it changes nothing."""
    if loaded.cfg.is_student:
        return {}
    steps = {"steps": min(FAST["steps"], loaded.cfg.timesteps)}
    return FAST | steps if loaded.guide else steps


def check_flags(
    loaded: LoadedModel, cfg: Config, given: dict[str, Any], strength: float = 1.0
) -> None:
    """Raise ValueError if a flag (`given`: settings) would have no effect on what is drawn, or if
    the model lacks what guidance needs. With a `strength` below 1, drawing begins at strength · T.
    """
    check_effects(cfg, given, strength)
    check_guidance(loaded.cfg, cfg, has_guide=loaded.guide is not None)
    if given.get("match_levels") and not loaded.levels:
        raise ValueError(f"match_levels = True: {loaded.path} has no grey levels; drop the flag")


@dataclass
class Request:
    """One file to write: `count` variants of `digits`, which is a number such as 2026 or names of
    labels, "all" (every label) or "mnist" (`count` digits in total, in MNIST's proportions).

    Raises ValueError if it cannot be drawn, and TypeError if `digits` is not text.
    """

    digits: str
    count: int
    cfg: Config
    output: Path
    if_taken: str = "replace"  # if `output` exists: "replace", "renumber" or "refuse"
    start: Start = FROM_NOISE  # with the picture to complete or to edit, if there is one
    reproduces: Path | None = None  # the picture that is drawn again
    recorded: Collection[str] | None = None  # the names in a PNG that is drawn again

    def __post_init__(self) -> None:
        if type(self.digits) is not str:  # in a stranger's picture
            raise TypeError
        names, mnist = self.cfg.label_names, self.digits == "mnist"
        if mnist and names != list("0123456789"):
            raise ValueError("digits = 'mnist': this model was not trained on MNIST; use all")
        each = 1 if mnist else len(labels_named(self.digits, names))  # images of a variant
        if self.start.x_0 is not None and each != 1:
            raise ValueError(f"digits = {shortened(self.digits)}: name the one label to draw")
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"count = {shortened(self.count)}: must be a whole number, at least 1")
        images = self.count * each
        largest = most_images(self.cfg.img_size, self.output.suffix)
        if self.reproduces:  # older versions allowed more
            largest = OPENED_PIXELS // self.cfg.img_size**2
        if images > largest:
            most = f"{largest:,} in {self.output.suffix or 'a folder'}"
            asked = f"{images:,}" if images < 10**15 else "too many"
            raise ValueError(f"count = {shortened(self.count)}: {asked} images; at most {most}")

    def rename(self) -> None:
        """Take another name, as the output exists. Raises ValueError if the user chose it."""
        if self.if_taken != "renumber":
            raise ValueError(f"{self.output}: {TAKEN}")
        self.output = free_name(self.cfg, self.digits)

    @property
    def how(self) -> str:
        """The settings that matter most, in words."""
        cfg = self.cfg
        eta = "" if cfg.sampler == "ddpm" else f", eta {cfg.eta:g}"
        acts = cfg.guidance == 1 or is_guided(cfg, self.start.strength)
        guidance = f"guidance {cfg.guidance:g}" + ("" if acts else " (at no time)")
        return f"{cfg.sampler}{eta}, {counted(cfg.steps, 'step')}, {guidance}, seed {cfg.seed}"

    @property
    def row_names(self) -> list[str]:
        """The names beside the rows of a grid of all labels, unless they are digits. Pictures of
        earlier versions had none."""
        earlier = self.recorded is not None and "row names" not in self.recorded
        named = self.digits == "all" and self.cfg.class_names and not earlier
        return self.cfg.label_names if named else []

    @property
    def animated(self) -> bool:
        return self.output.suffix in ANIMATIONS

    def kept_states(self, steps: int) -> list[int]:
        """Which of the states 0…steps to keep: of an animation at most MAX_FRAMES, evenly spaced;
        otherwise the last."""
        if not self.animated:
            return [steps]
        last = min(steps, MAX_FRAMES - 1)
        return [round(i * steps / last) for i in range(last + 1)]

    @property
    def labels(self) -> Tensor:
        """The label of each image, int64 (N,)."""
        if self.digits == "mnist":
            return draw_labels(self.count, self.cfg.seed, MNIST_COUNTS)
        return torch.tensor(labels_named(self.digits, self.cfg.label_names) * self.count)


def labels_named(digits: str, names: list[str]) -> list[int]:
    """The labels of one variant of `digits`, each by its number; every label for "all"."""
    return list(range(len(names))) if digits == "all" else parse_labels(digits, names)


def usual_count(digits: str, cfg: Config) -> int:
    """How many variants to draw by default: about 16 images, or for "all" 16 of each label; fewer
    if a file cannot hold as many."""
    if digits == "mnist":
        return 16
    each = len(labels_named(digits, cfg.label_names))
    return max(1, min(16 if digits == "all" else 16 // each, most_images(cfg.img_size) // each))


def free_name(cfg: Config, digits: str) -> Path:
    """A file name in output_dir/images that is not taken. Raises ValueError if that folder cannot
    be written."""
    folder = Path(cfg.output_dir, "images")
    make_folder(folder)
    number = 1
    while os.path.lexists(path := folder / f"generated_{digits[:20]}_{number:03d}.png"):
        number += 1
    return path


def is_folder(output: str | None) -> bool:
    return bool(output) and (output.endswith(("/", os.sep)) or Path(output).is_dir())


def output_name(text: str) -> str:
    """A name that --output accepts. Raises ArgumentTypeError for another."""
    text = os.path.expanduser(text)
    if any(map(is_control, text)):
        raise ArgumentTypeError(f"{text!r} has control characters; choose another name")
    if not is_folder(text) and Path(text).suffix not in ENDINGS:
        raise ArgumentTypeError(f"{text!r} must end in {', '.join(ENDINGS)}, or / (a folder)")
    if not Path(text).parent.is_dir():
        raise ArgumentTypeError(f"{text!r}: no folder {Path(text).parent}; make it first")
    return text


def requests_from_flags(args: Namespace, cfg: Config) -> list[Request]:
    """What --digits, --count and --output ask for: one file, or for a folder one for each image.
    Image i of a folder has seed `seed + i`. Raises ValueError if one of its files exists."""
    usual = usual_count(args.digits, cfg)
    count = usual if args.count is None else args.count
    output = Path(args.output) if args.output else free_name(cfg, args.digits)
    if_taken, picture = "replace" if args.output else "renumber", original.from_flags(args, cfg)
    whole = Request(args.digits, count, cfg, output, if_taken, picture)
    if not is_folder(args.output):
        check_writable(output)
        for used in filter(None, (args.complete, args.edit, args.mask)):
            if output.exists() and output.samefile(used):
                raise ValueError(f"{output}: is the picture to start from; choose another name")
        return [whole]
    requests = []
    for seed, label in enumerate(whole.labels.tolist(), cfg.seed):
        name = cfg.label_names[label]
        path = output / f"{name[:50]}_seed{seed}.png"  # names of files must be short
        requests.append(Request(name, 1, replace(cfg, seed=seed), path, "refuse", picture))
        if os.path.lexists(path):  # also a link to what is not there
            raise ValueError(f"{path}: {TAKEN}")
    make_folder(output)
    return requests


def requests_from_answers(cfg: Config, seed: int | None, loaded: LoadedModel) -> Iterator[Request]:
    """Ask what to draw, again and again; without `seed` every picture gets a random one."""
    count = None

    def digits_or_all(text: str) -> str:
        if text != "all":
            labels = parse_labels(text, cfg.label_names)
            if len(labels) > 20:
                raise ValueError(f"{text!r} is too long: 20 labels at most")
        return text

    def guidance_value(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number such as 1 or 1.5") from None
        check_guidance(loaded.cfg, replace(cfg, guidance=value), loaded.guide is not None)
        return value

    question, names = "Digits to draw, such as 7, 2026 or all", cfg.label_names
    if cfg.class_names:
        some = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        question = f"What to draw: {some}, several with commas, or all"
    log(("" if "?" in names else "? for help, ") + f"{quit_words(names)[0]} to quit.")
    while True:
        digits = ask(question, None, digits_or_all, names)
        most = most_images(cfg.img_size) // len(labels_named(digits, names))
        usual = min(count or usual_count(digits, cfg), most)
        count = ask("How many", usual, whole_number(most), names)
        guidance = cfg.guidance
        if not cfg.is_student:
            guidance = ask("Guidance", guidance, guidance_value, names)
        picture_seed = secrets.randbelow(2**31) if seed is None else seed
        cfg = replace(cfg, guidance=guidance, seed=picture_seed)
        yield Request(digits, count, cfg, free_name(cfg, digits), "renumber")
