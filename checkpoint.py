"""The state of a training run, and the only module that reads or writes checkpoint files.

A file holds tensors and plain values only, so that reading one never runs code. It needs no random
state, because every random number of training is a function of the seed and the progress.
"""

import copy
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from config import Config
from model import UNet
from optimizer import make_optimizers

FORMAT = 4  # format 3 is still read: config.ALIASES fills in the settings that it lacks
PRETRAINED = "pretrained.pth"  # the model in git
DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, OSError)  # what torch.load raises


@dataclass
class Progress:
    """Completed work: whole epochs, images of the current epoch, optimizer steps, seconds."""

    epoch: int = 0
    images: int = 0
    step: int = 0
    seconds: float = 0.0
    budget_from: float = 0.0  # `seconds` when the current time budget began

    @property
    def name(self) -> str:
        """The part of a file's name that tells this progress; never parsed back."""
        return f"epoch_{self.epoch}" + (f"_step_{self.step}" if self.images else "")

    def __str__(self) -> str:
        inside = f" and {self.images:,} images" if self.images else ""
        return f"epoch {self.epoch}{inside} (step {self.step:,})"


@dataclass
class TrainState:
    """Everything that training changes."""

    model: UNet
    ema: UNet  # the running average of the weights, which draws better than the weights do
    guide: UNet | None  # a weaker model for autoguidance: the average early in the run
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    totals: Tensor  # (2,) sums over the current epoch's steps: loss, gradient norm
    epoch_seconds: float = 0.0  # training time of the current epoch

    @classmethod
    def initial(cls, cfg: Config, device: torch.device) -> "TrainState":
        """The state before the first step; the random weights depend on cfg.seed alone."""
        torch.manual_seed(cfg.seed)
        model = UNet(cfg).to(device)
        ema, totals = copy.deepcopy(model).requires_grad_(False), torch.zeros(2, device=device)
        return cls(model, ema, None, make_optimizers(cfg, model), Progress(), totals)

    def start_next_epoch(self) -> None:
        self.progress.epoch, self.progress.images = self.progress.epoch + 1, 0
        self.totals.zero_()
        self.epoch_seconds = 0.0


@dataclass
class LoadedModel:
    """A trained model, ready to draw."""

    path: Path
    cfg: Config  # the settings that it was trained with
    model: UNet  # with the averaged weights
    guide: UNet | None
    progress: Progress
    device: torch.device
    sha256: str  # of the file


def save(path: Path, cfg: Config, state: TrainState) -> None:
    """Write a checkpoint, whole or not at all. Raises ValueError if it cannot be written."""
    contents = {
        "format": FORMAT,
        "config": cfg.to_dict(),
        "progress": asdict(state.progress),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "guide": state.guide.state_dict() if state.guide else None,
        "optimizers": [each.state_dict() for each in state.optimizers],
        "metrics": {"totals": state.totals.tolist(), "seconds": state.epoch_seconds},
    }
    write_tensors(path, contents)


def slim(source: str | Path, target: str | Path) -> None:
    """Write only what drawing needs of a checkpoint, a quarter of its size: the averaged weights
    and the guide in half precision. Raises ValueError as load and save do."""
    contents = load(source)
    kept = {name: contents[name] for name in ("format", "config", "progress")}
    for name in ("ema", "guide"):
        weights = contents[name]
        kept[name] = weights and {key: weight.half() for key, weight in weights.items()}
    write_tensors(Path(target), kept)


def write_tensors(path: Path, contents: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all. Raises what atomic_write raises."""
    buffer = io.BytesIO()  # torch.save itself would hide that a disk is full
    torch.save(contents, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path`: a temporary one beside it, flushed and renamed once it is
    complete, so that `path` is whole or unchanged. Raises ValueError with the path on failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def load(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint: {format, config, progress, ema, guide} and, unless it is slim, {model,
    optimizers, metrics}. Raises ValueError with the path and the reason if it is not one.

    With `mmap`, tensors are read from disk only when they are used: quick for looking at the rest.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint; python generate.py lists the models")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on foreign files
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(contents, dict):
            raise TypeError
        if contents["format"] not in (3, FORMAT):
            raise ValueError(f"format {contents['format']}, but this program reads 3 and {FORMAT}")
        Progress(**contents["progress"])
        Config.from_dict(contents["config"])
        for weights in (contents["ema"], contents["guide"] or {}):
            weights.items()  # raises AttributeError if these are no weights
    except PermissionError:
        raise ValueError(f"{path}: cannot be read; change its permissions") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; train a new model") from None
    except (*DAMAGED, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged, or not a checkpoint; choose another model") from None
    return contents


def restore(path: Path, state: TrainState) -> None:
    """Fill `state` from a checkpoint. The optimizers keep their current settings, such as weight
    decay. Raises ValueError if it does not fit, or was reduced to what drawing needs."""
    contents = load(path)
    if "model" not in contents:
        raise ValueError(f"{path}: reduced to what drawing needs; train another checkpoint")
    _fill(state.model, contents["model"], path)
    _fill(state.ema, contents["ema"], path)
    if contents["guide"] is not None:
        state.guide = copy.deepcopy(state.ema)
        _fill(state.guide, contents["guide"], path)
    for optimizer, saved in zip(state.optimizers, contents["optimizers"], strict=True):
        settings = optimizer.state_dict()["param_groups"]
        _fill(optimizer, {"state": saved["state"], "param_groups": settings}, path)
    state.progress = Progress(**contents["progress"])
    state.totals = torch.tensor(contents["metrics"]["totals"], device=state.totals.device)
    state.epoch_seconds = contents["metrics"]["seconds"]


def load_model(path: str | Path, device: torch.device) -> LoadedModel:
    """The model of a checkpoint, built from the file alone. Raises ValueError as load does."""
    contents = load(path)
    cfg, progress = Config.from_dict(contents["config"]), Progress(**contents["progress"])
    if contents["format"] == 3:  # at that time config.py, not the checkpoint, said how to draw
        usual = Config().select("sampling")
        usual |= {"steps": min(usual["steps"], cfg.timesteps), "clip_x_0": cfg.clip_x_0}
        cfg = replace(cfg, **usual)
    networks = {name: UNet(cfg) for name in ("ema", "guide") if contents[name]}
    for name, network in networks.items():  # without gradients, channels_last is faster on a CPU
        network.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
        _fill(network, contents[name], path)
    ema, guide = networks["ema"], networks.get("guide")
    return LoadedModel(Path(path), cfg, ema, guide, progress, device, sha256(path))


def _fill(target: UNet | torch.optim.Optimizer, state: dict[str, Any], path: str | Path) -> None:
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError):
        raise ValueError(f"{path}: its contents do not fit this U-Net; train a new model") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def list_checkpoints(folder: str | Path, pattern: str = "*.pth") -> list[tuple[Path, Progress]]:
    """The readable checkpoints in a folder, newest last, by completed steps and then by time.
    The pretrained model comes first, so that any other counts as newer."""
    found = []
    for path in sorted(Path(folder).glob(pattern)):
        with suppress(ValueError):  # some other file, or a damaged one
            found.append((path, Progress(**load(path, mmap=True)["progress"])))
    return sorted(
        found, key=lambda item: (item[0].name != PRETRAINED, item[1].step, item[0].stat().st_mtime)
    )
