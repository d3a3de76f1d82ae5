"""The one owner of the checkpoint file: save, load, list, newest.

A file holds {format, config, progress, model, ema, guide, optimizers, metrics}: tensors and plain
values only, so that reading it runs nothing in it. No random state is among them: train.py derives
every random number from config's seed and progress.
"""

import copy
import hashlib
import os
import pickle
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config
from model import UNet

FORMAT = 3
SHIPPED = "pretrained.pth"


@dataclass
class Progress:
    """Completed work: whole epochs, images of the epoch under way, optimizer steps, seconds."""

    epoch: int = 0
    images: int = 0
    step: int = 0
    seconds: float = 0.0
    budget_from: float = 0.0  # what `seconds` were when the time budget began to count

    @property
    def name(self) -> str:
        """Part of a file's name; never parsed."""
        return f"epoch_{self.epoch}" + (f"_step_{self.step}" if self.images else "")

    def __str__(self) -> str:
        inside = f" and {self.images:,} images" if self.images else ""
        return f"epoch {self.epoch}{inside} (step {self.step:,})"


def save(
    path: Path,
    cfg: Config,
    progress: Progress,
    model: UNet,
    ema: UNet,
    guide: UNet | None,
    optimizers: list[torch.optim.Optimizer],
    metrics: dict[str, Any],
) -> None:
    """Write a checkpoint whole or not at all: to a file beside it, flushed to disk, then renamed.

    Raises ValueError with the path when it cannot be written.
    """
    contents = {
        "format": FORMAT,
        "config": cfg.to_dict(),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "guide": guide.state_dict() if guide else None,
        "optimizers": [each.state_dict() for each in optimizers],
        "metrics": metrics,
    }
    _write(path, contents)


def slim(source: str | Path, target: str | Path) -> None:
    """Write what drawing needs of a checkpoint, a quarter of its size: the averaged weights and the
    guide in half precision, and nothing that training on would need. Raises ValueError as load and
    save do."""
    contents = load(source)
    kept = {k: contents[k] for k in ("format", "config", "progress", "ema", "guide")}
    for name in ("ema", "guide"):
        if kept[name] is not None:
            kept[name] = {k: weight.half() for k, weight in kept[name].items()}
    _write(Path(target), kept)


def _write(path: Path, contents: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be written ({reason}); make room there") from None


def load(path: str | Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> dict:
    """Read a checkpoint; raises ValueError with the path and the reason when it is none.

    With `mmap` tensors are read from disk only when touched: quick for looking at the rest.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; look in results/models, or train one first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign files; ours say enough
            contents = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if not isinstance(contents, dict):
            raise TypeError
        if contents["format"] != FORMAT:
            raise ValueError(
                f"{path}: of format {contents['format']}, this program reads {FORMAT}; train anew"
            )
        Progress(**contents["progress"])
        Config.from_dict(contents["config"])
        for weights in (contents["ema"], contents["guide"] or {}):
            weights.items()
    except PermissionError:
        raise ValueError(f"{path}: may not be read; change its permissions") from None
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError,
            pickle.UnpicklingError):  # fmt: skip
        raise ValueError(
            f"{path}: damaged, or not a checkpoint of this program; choose another model"
        ) from None
    return contents


def restore(
    path: Path, model: UNet, ema: UNet, optimizers: list[torch.optim.Optimizer]
) -> tuple[UNet | None, dict[str, Any]]:
    """Fill in networks and optimizers from a checkpoint, but not the optimizers' settings; returns
    its guide, if it has one yet, and its metrics.

    Raises ValueError when it does not fit them, or is one that cannot be trained on.
    """
    contents = load(path, next(model.parameters()).device)
    try:
        model.load_state_dict(contents["model"])
        ema.load_state_dict(contents["ema"])
        for optimizer, saved in zip(optimizers, contents["optimizers"], strict=True):
            settings = optimizer.state_dict()["param_groups"]  # as asked for now
            optimizer.load_state_dict({"state": saved["state"], "param_groups": settings})
        guide = None
        if contents["guide"] is not None:
            guide = copy.deepcopy(ema)
            guide.load_state_dict(contents["guide"])
        return guide, contents["metrics"]
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}, so it cannot be trained on") from None
    except (RuntimeError, ValueError):
        raise ValueError(f"{path}: its weights do not fit this U-Net; train anew") from None


def load_model(
    path: str | Path, device: torch.device | str
) -> tuple[UNet, UNet | None, Config, Progress]:
    """The averaged network of a checkpoint and its guide, if it has one, built from the file alone,
    ready to sample."""
    contents = load(path, device)
    cfg = Config.from_dict(contents["config"])

    def build(weights: dict[str, torch.Tensor]) -> UNet:
        # In this layout convolutions without a backward pass are up to twice as fast on a CPU
        model = UNet(cfg).to(device, memory_format=torch.channels_last)
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            raise ValueError(f"{path}: its weights do not fit this U-Net; train anew") from None
        return model.requires_grad_(False).eval()

    guide = build(contents["guide"]) if contents["guide"] else None
    return build(contents["ema"]), guide, cfg, Progress(**contents["progress"])


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_checkpoints(folder: str | Path, pattern: str = "*.pth") -> list[tuple[Path, Progress]]:
    """The readable checkpoints of a folder, newest last: by completed steps, then by time; the
    one that came with the repo before all others, so that it stands for what nobody trained yet."""
    found = []
    for path in sorted(Path(folder).glob(pattern)):
        try:
            found.append((path, Progress(**load(path, mmap=True)["progress"])))
        except ValueError:
            continue  # somebody else's file, or one cut short: not ours to offer
    return sorted(
        found, key=lambda item: (item[0].name != SHIPPED, item[1].step, item[0].stat().st_mtime)
    )


def newest(folder: str | Path, pattern: str = "*.pth") -> Path | None:
    """The checkpoint of a folder with the most completed work; None if there is none."""
    found = list_checkpoints(folder, pattern)
    return found[-1][0] if found else None


def list_models(folder: Path) -> list[tuple[Path, Progress]]:
    """The models of a folder, newest last; raises ValueError when there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise ValueError(f"no model in {folder}; train one first: python train.py --budget 10m")
    return found


def find_model(text: str, folder: Path) -> Path:
    """The model that a user means by a path, a name in `folder`, its number there or "newest"."""
    for path in (Path(text), folder / text, folder / f"{text}.pth"):
        if path.is_file():
            return path
    if text == "newest" or text.isdecimal():
        found = [path for path, _ in list_models(folder)]
        number = len(found) if text == "newest" else int(text)
        if 1 <= number <= len(found):
            return found[number - 1]
    return Path(text)  # of which load says that it is none
