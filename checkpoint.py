"""The state of a training run and a model to draw with, and the file that both are read from.

A file holds tensors and plain values only, so that reading one never runs code. It needs no random
state, because every random number of training is a function of the seed and the progress.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config
from levels import GreyLevels
from model import UNet, without_weights
from optimizer import STATES, make_optimizers, split_parameters
from system.files import first_line, read_safetensors, read_tensors, sha256, write_tensors
from system.machine import check_step, compile_network, pick_precision

FORMAT = 4  # format 3 is still read: see config.ALIASES and BEFORE, and load_model
STUDENT, PRETRAINED = "student.pth", "pretrained.pth"  # the models in git


@dataclass
class Progress:
    """Completed work: whole epochs, images of the current epoch, optimizer steps, seconds."""

    epoch: int = 0
    images: int = 0
    step: int = 0
    seconds: float = 0.0
    budget_from: float = 0.0  # `seconds` when the current time budget began

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) not in (int, f.type) or not 0 <= value < 2**53:  # NaN fails, too
                raise ValueError(f"{f.name} = {value!r}: not a valid count")

    @property
    def name(self) -> str:
        """What files are named by; never parsed back."""
        return f"epoch_{self.epoch}" + (f"_step_{self.step}" if self.images else "")

    def __str__(self) -> str:
        inside = f" and {self.images:,} images" if self.images else ""
        return f"epoch {self.epoch}{inside} (step {self.step:,})"


@dataclass
class TrainState:
    """Everything that training changes."""

    model: UNet
    ema: UNet  # the running average of the weights, which draws better than the weights do
    guide: UNet | None  # a weaker model for autoguidance: `ema` early in the run
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    totals: Tensor  # (2,) sums over the current epoch's steps: loss, gradient norm
    epoch_seconds: float = 0.0  # training time of the current epoch
    levels: GreyLevels | None = None  # give samples of `ema` real grey levels
    data: dict[str, Any] | None = None  # data.fingerprint, and a student's teacher

    @classmethod
    def initial(cls, cfg: Config, device: torch.device) -> "TrainState":
        """The state before the first step; the random weights depend on cfg.seed alone. Raises
        ValueError for a network or a batch that does not fit."""
        without_weights(cfg)  # raises if it is too large
        check_step(cfg, device)
        torch.manual_seed(cfg.seed)
        model = UNet(cfg).to(device)
        ema = copy.deepcopy(model).requires_grad_(False)
        totals = torch.zeros(2, device=device)
        return cls(model, ema, None, make_optimizers(cfg, model), Progress(), totals)

    def start_next_epoch(self) -> None:
        self.progress.epoch += 1
        self.progress.images = 0
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
    levels: GreyLevels | None = None  # older files have none
    data: dict[str, Any] | None = None  # what it was trained on; missing in older files


def save(path: Path, cfg: Config, state: TrainState) -> None:
    """Write a checkpoint, whole or not at all. Raises ValueError if it cannot be written, and
    FloatingPointError if a number in it is not finite: that must not pass for a good state."""
    contents = {
        "format": FORMAT,
        "config": cfg.to_dict(),
        "progress": asdict(state.progress),
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "guide": state.guide.state_dict() if state.guide else None,
        "levels": state.levels and asdict(state.levels),
        "optimizers": [each.state_dict() for each in state.optimizers],
        "metrics": {"totals": state.totals.tolist(), "seconds": state.epoch_seconds},
        "data": state.data,
    }
    try:
        _check_tensors(contents, state.model)
    except ValueError as error:
        raise FloatingPointError(str(error)) from None
    write_tensors(path, contents)


def load(path: str | Path, *, only_look: bool = False) -> dict[str, Any]:
    """Read a checkpoint: {format, config, progress, ema, guide, levels, data} (older ones lack the
    last two) and, unless export.slim reduced it, {model, optimizers, metrics}. Raises ValueError
    with the path and the reason if it is damaged or not a checkpoint, or if a tensor is not finite
    or does not fit the settings. With `only_look`, tensors are not checked, nor read from a .pth.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; python generate.py lists the models")
    if path.suffix == ".safetensors":
        contents = read_safetensors(path)
    else:
        contents = read_tensors(path, "a checkpoint", only_look=only_look)
    try:
        contents = {"guide": None} | contents  # safetensors of version 1.2 leave it out
        if contents["format"] not in (3, FORMAT):
            raise ValueError(f"format {contents['format']}, but this program reads 3 and {FORMAT}")
        Progress(**contents["progress"])  # checks it
        data = contents.get("data") or {}
        if not isinstance(data.get("teacher", ""), str):  # the SHA-256 of a student's teacher
            raise TypeError
        json.dumps(data)  # raises TypeError unless it holds plain values
        cfg = Config.from_dict(contents["config"])
        if not only_look:
            _check_tensors(contents, without_weights(cfg))
            GreyLevels.from_dict(contents.get("levels"))
    except ValueError as error:
        raise ValueError(f"{path}: {first_line(error)}; choose another, or train one") from None
    except Exception:  # a file of another program or of a stranger can hold anything
        raise ValueError(f"{path}: not a checkpoint of this program; choose another") from None
    return contents


def _check_tensors(contents: dict[str, Any], network: UNet) -> None:
    """Raise ValueError unless weights and optimizer states fit `network`, and they and the metrics
    are finite."""
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name in ("ema", "guide", "model"):
        if name == "ema" or contents.get(name) is not None:
            _check(contents[name], expected, f"{name}: weights")
    if "model" in contents:
        if len(contents["optimizers"]) != len(STATES):
            raise ValueError(f"optimizers: there must be {len(STATES)}")
        for parameters, saved, keys in zip(
            split_parameters(network), contents["optimizers"], STATES, strict=True
        ):
            for index, state in saved["state"].items():
                shapes = {key: () if key == "step" else parameters[index].shape for key in keys}
                _check(state, shapes, "optimizers: tensors")
        totals, seconds = contents["metrics"]["totals"], contents["metrics"]["seconds"]
        if len(totals) != 2 or not all(map(math.isfinite, (*totals, seconds))):
            raise ValueError("metrics: not two finite totals and a finite time")


def _check(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], what: str) -> None:
    if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        raise ValueError(f"{what} that do not fit this U-Net")
    for tensor in tensors.values():
        if tensor.dtype not in (torch.float32, torch.float16) or not tensor.abs().max().isfinite():
            raise ValueError(f"{what} that are not finite float32 or float16 numbers")


def restore(path: Path, state: TrainState) -> None:
    """Fill `state` from a checkpoint. The optimizers keep their current settings, such as weight
    decay. Raises ValueError as load does, or if the file was reduced to what drawing needs."""
    contents = load(path)
    if "model" not in contents:
        raise ValueError(f"{path}: holds only what drawing needs; choose another checkpoint")
    state.model.load_state_dict(contents["model"])
    state.ema.load_state_dict(contents["ema"])
    if contents["guide"] is not None:
        state.guide = copy.deepcopy(state.ema)
        state.guide.load_state_dict(contents["guide"])
    for optimizer, saved in zip(state.optimizers, contents["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
    state.progress = Progress(**contents["progress"])
    state.totals = state.totals.new_tensor(contents["metrics"]["totals"])
    state.epoch_seconds = contents["metrics"]["seconds"]
    state.levels = GreyLevels.from_dict(contents.get("levels"))
    state.data = contents.get("data")


def load_model(path: str | Path, device: torch.device, compiled: bool = False) -> LoadedModel:
    """The model of a checkpoint, ready to draw. Raises ValueError as load does."""
    path, contents = Path(path), load(path)
    cfg, progress = Config.from_dict(contents["config"]), Progress(**contents["progress"])
    if contents["format"] == 3:  # at that time config.py, not the checkpoint, said how to draw
        defaults = Config().select("sampling")
        defaults |= {"steps": min(defaults["steps"], cfg.timesteps), "clip_x_0": cfg.clip_x_0}
        cfg = replace(cfg, **defaults)
    # Without gradients, channels_last is as fast or faster in float32, and slower in bf16
    bf16 = pick_precision("auto", device) == "bf16"
    layout = torch.contiguous_format if bf16 else torch.channels_last
    ema = UNet(cfg).to(device, memory_format=layout).requires_grad_(False).eval()
    guide = copy.deepcopy(ema) if contents["guide"] else None
    for name, network in (("ema", ema), ("guide", guide)):
        if network:
            network.load_state_dict(contents[name])
            if compiled:
                compile_network(network)
    levels, data = GreyLevels.from_dict(contents.get("levels")), contents.get("data")
    return LoadedModel(path, cfg, ema, guide, progress, device, sha256(path), levels, data)
