"""Every knob of the program: its default, its help line and its check, once.

Edit a default here or pass the flag of the same name to a script; both are checked alike.
Standard library only.
"""

import argparse
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


def knob(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    shapes_model: bool = False,
    local: bool = False,
    flag: str = "",
) -> Any:
    """One field of Config. `shapes_model`: a trained model cannot change it; `local`: it belongs
    to this machine, so a checkpoint never brings it along; `flag`: its flag if not its name."""
    metadata = {"help": help, "least": least, "above": above, "most": most, "choices": choices}
    metadata |= {"shapes_model": shapes_model, "local": local, "flag": flag}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All settings; raises ValueError naming the field, its value and the remedy."""

    # Where things are
    data_dir: str = knob("mnist_data", "folder that holds MNIST", local=True)
    output_dir: str = knob("results", "folder for models, images and metrics", local=True)
    device: str = knob("auto", "auto (CUDA if there, else CPU) or any torch device", local=True)

    # Images
    img_size: int = knob(28, "image side in pixels; a multiple of 4", least=4, shapes_model=True)
    img_channels: int = knob(1, "colour channels of an image", least=1, shapes_model=True)
    num_classes: int = knob(10, "number of labels", least=1, most=10, shapes_model=True)
    max_images: int = knob(0, "train on only the first N images (0: all)", least=0)

    # U-Net
    patch_size: int = knob(
        2, "side of the space-to-depth stem's patches (1: no stem)", least=1, shapes_model=True
    )
    widths: tuple[int, ...] = knob(
        (32, 64), "channels of each level, finest first; each level halves the side", least=8,
        shapes_model=True,
    )  # fmt: skip
    blocks: int = knob(1, "residual blocks a level, down and up", least=1, shapes_model=True)
    dense_size: int = knob(
        128, "hidden units of the dense layer that sees the whole image at the coarsest level "
        "(0: none)", least=0, shapes_model=True,
    )  # fmt: skip
    attention: bool = knob(False, "self-attention at the coarsest level", shapes_model=True)
    embedding_size: int = knob(
        128, "size of the time and label embedding; even", least=2, shapes_model=True
    )

    # Diffusion
    timesteps: int = knob(1000, "number of timesteps T", least=2, shapes_model=True)
    schedule: str = knob(
        "cosine", "noise schedule", choices=("linear", "cosine", "sigmoid"), shapes_model=True
    )
    prediction: str = knob(
        "x_0", "what the network predicts", choices=("eps", "v", "x_0"), shapes_model=True
    )
    loss_weighting: str = knob(
        "snr_power", "weight of a timestep in the loss", choices=("uniform", "min_snr", "snr_power")
    )
    snr_power: float = knob(
        0.25, "with snr_power: the error of x_0 counts snr to this power (0: its own, 1: eps's)",
        least=0, most=1,
    )  # fmt: skip
    min_snr_gamma: float = knob(5.0, "ceiling of the min-SNR weight", above=0)
    timestep_power: float = knob(
        0.7, "timesteps are trained at u^power · T for even u (1: evenly; less: more high noise)",
        above=0,
    )  # fmt: skip
    label_dropout: float = knob(0.1, "share of images trained without label", least=0, most=1)

    # Training
    epochs: int = knob(30, "epochs of a run from scratch", least=1)
    budget: str = knob("", "train for this long instead of --epochs: 90s, 10m, 1.5h")
    batch_size: int = knob(128, "images a training step", least=1)
    learning_rate: float = knob(4e-3, "peak learning rate", above=0, flag="lr")
    warmup_steps: int = knob(100, "steps in which the learning rate rises to its peak", least=0)
    adam_beta1: float = knob(0.9, "AdamW's decay of the mean gradient", least=0, most=0.9999)
    adam_beta2: float = knob(0.99, "AdamW's decay of the squared gradient", least=0, most=0.9999)
    muon_momentum: float = knob(0.95, "Muon's decay of the mean gradient", least=0, most=0.9999)
    weight_decay: float = knob(0.01, "weight decay of both optimizers", least=0)
    grad_clip: float = knob(1.0, "largest gradient norm of a step", above=0)
    ema_sigma_rel: float = knob(
        0.10, "width of the weight average, as a share of the run so far", above=0, most=0.28
    )
    guide_share: float = knob(
        0.1, "share of the run after which the model so far is kept as the guide, the worse model "
        "that guidance leads away from; not before the warm-up ends (0: none; guidance drops the "
        "label)",
        least=0, most=0.5, shapes_model=True,
    )  # fmt: skip
    guide_label_noise: float = knob(
        0.3, "share of images whose label is drawn at random until the guide is made",
        least=0, most=1,
    )  # fmt: skip
    precision: str = knob(
        "auto", "auto: bf16 where the hardware has it", choices=("auto", "float32", "bf16")
    )
    seed: int = knob(0, "seed of weights, data order, noise and samples", least=0, most=2**32 - 1)
    save_every: int = knob(5, "epochs between checkpoints with their sample grid", least=1)

    # Sampling
    sampler: str = knob("dpmpp", "sampler", choices=("ddpm", "ddim", "dpmpp"))
    steps: int = knob(13, "sampling steps, 1 to timesteps", least=1)
    guidance: float = knob(2.8, "guidance w (1: plain conditional; more: clearer; 7: all alike)")
    guidance_low: float = knob(
        0.4, "guidance acts only where t / timesteps is above this", least=0, most=1
    )
    guidance_high: float = knob(
        0.9, "guidance acts only where t / timesteps is at most this", least=0, most=1
    )
    eta: float = knob(
        0.3, "noise that ddim and dpmpp put back (0: none, 1: as ddpm)", least=0, most=1
    )
    clip_x_0: bool = knob(
        True, "clamp each estimate of x_0 to [-1, 1]; the loss then forgives what lies beyond"
    )
    sample_batch_size: int = knob(128, "images sampled at a time", least=1)
    preview_digits: str = knob("0123456789", "digits of the sample grid, one row each")
    preview_columns: int = knob(10, "samples of each digit in the grid", least=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            problem = _problem(f, value)
            if problem:
                raise ValueError(f"{f.name} = {value!r}: {problem}")
        if self.budget:
            parse_duration(self.budget)
        side = self.patch_size * 2 ** (len(self.widths) - 1)
        for name, value, divisor in (
            ("img_size", self.img_size, 4),
            ("img_size", self.img_size, side),
            ("embedding_size", self.embedding_size, 2),
            *(("widths", width, 8) for width in self.widths),
        ):
            if value % divisor:
                raise ValueError(f"{name} = {value}: must be a multiple of {divisor}")
        parse_digits(self.preview_digits, self.num_classes, "preview_digits")

    @property
    def null_class(self) -> int:
        """The label that means "no label"."""
        return self.num_classes

    @property
    def sampling(self) -> dict[str, Any]:
        """What Diffusion.sample takes from the settings."""
        names = (*SAMPLING, "seed", "clip_x_0")
        return {k: getattr(self, k) for k in names} | {"batch_size": self.sample_batch_size}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of to_dict; a field that is missing takes its default, an unknown one is
        dropped, so that adding or removing a knob never breaks an old checkpoint."""
        names = {f.name for f in fields(cls)}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        return cls(**known)


# What belongs to this machine, with its defaults
LOCAL = {f.name: f.default for f in fields(Config) if f.metadata["local"]}

# What generate.py --fast changes: near the best that was tried with 6 network calls an image
FAST = {"steps": 5, "eta": 0.3, "guidance": 4.2, "guidance_low": 0.5, "guidance_high": 0.7}

SAMPLING = ("sampler", "steps", "guidance", "guidance_low", "guidance_high", "eta")


def _problem(f: Any, value: Any) -> str:
    """Why `value` does not fit the field, with the remedy; empty when it does."""
    meta = f.metadata
    kind = type(f.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        return f"must be of type {kind.__name__}"
    if meta["choices"] and value not in meta["choices"]:
        return f"choose one of {', '.join(meta['choices'])}"
    if kind is tuple and not value:
        return "needs at least one number"
    for number in value if kind is tuple else (value,) if kind in (int, float) else ():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            return "must be a finite number"
        if meta["least"] is not None and number < meta["least"]:
            return f"must be at least {meta['least']}"
        if meta["above"] is not None and number <= meta["above"]:
            return f"must be above {meta['above']}"
        if meta["most"] is not None and number > meta["most"]:
            return f"must be at most {meta['most']}"
    return ""


def parse_duration(text: str) -> float:
    """Seconds in "90s", "10m" or "1.5h"; raises ValueError for anything else or for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"budget = {text!r}: write a time such as 90s, 10m or 1.5h")
    return seconds


def parse_digits(text: str, num_classes: int = 10, name: str = "digits") -> list[int]:
    """The labels in a string of digits ("707" → [7, 0, 7]); raises ValueError for other text."""
    if not text or not all(c in "0123456789" and int(c) < num_classes for c in text):
        raise ValueError(f"{name} = {text!r}: use the digits 0 to {num_classes - 1}")
    return [int(c) for c in text]


class Parser(argparse.ArgumentParser):
    """argparse that takes whole flags only, and complains in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def _comma_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def add_flags(parser: argparse.ArgumentParser, names: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of Config (or for `names` alone); one not given leaves no trace
    in the parsed arguments, so that what the user asked for can be told from a default."""
    for f in fields(Config):
        if names and f.name not in names:
            continue
        kind = type(f.default)
        shown = ",".join(map(str, f.default)) if kind is tuple else f.default
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        options["help"] = f"{f.metadata['help']} (default: {shown!s})"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _comma_numbers if kind is tuple else kind
            options["metavar"] = {int: "INT", float: "FLOAT", tuple: "INT,INT"}.get(kind, "TEXT")
            if f.metadata["choices"]:
                options["metavar"] = "{" + ",".join(f.metadata["choices"]) + "}"
        parser.add_argument(f"--{f.metadata['flag'] or f.name}", **options)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that the user gave as flags."""
    names = {f.name for f in fields(Config)}
    return {k: v for k, v in vars(args).items() if k in names}


def merge(base: Config, given: dict[str, Any]) -> tuple[Config, list[str]]:
    """Settings for going on from a checkpoint made with `base`.

    Flags in `given` win over the checkpoint, the checkpoint over config.py; only what belongs to
    this machine (folders, device) comes from config.py. Returns the settings and one line for
    each difference that the user should know. Raises ValueError for a flag that a trained model
    cannot take.
    """
    here, local, notes = Config(), {}, []
    for f in fields(Config):
        old, default = getattr(base, f.name), getattr(here, f.name)
        if f.name in given:
            if given[f.name] != old and f.metadata["shapes_model"]:
                raise ValueError(
                    f"{f.name} = {given[f.name]!r}: the checkpoint was trained with {old!r}; "
                    "drop the flag, or train anew with it"
                )
            if given[f.name] != old and not f.metadata["local"]:
                notes.append(f"{f.name} = {given[f.name]} (the checkpoint had {old})")
        elif f.metadata["local"]:
            local[f.name] = default
        elif default != old and f.name not in ("epochs", "budget"):  # the plan is told apart
            notes.append(f"{f.name} = {old}, as in the checkpoint (config.py says {default})")
    return replace(base, **local, **given), notes


def run_script(name: str, main: Any) -> None:
    """Run a script's main(); a user's mistake becomes one line and exit code 2, training
    that diverged one line and 1, Ctrl-C 130. With TRACEBACK=1 in the environment it stays a
    traceback, for whoever changes the code."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except (RuntimeError, MemoryError) as error:
        reason = (str(error) or "out of memory").splitlines()[0]
        kind = type(error).__name__  # OutOfMemoryError is torch's, which this file cannot import
        if "MemoryError" not in kind and "allocate memory" not in reason:
            raise
        print(f"{name}: {reason}; use a smaller batch size or count", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(130)
