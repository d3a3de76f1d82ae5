"""The run folder of train.py: who owns it, where its files are, what a new run keeps of it."""

import csv
import errno
import io
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

import checkpoint
from checkpoint import Progress
from interface.models import list_checkpoints, skipped_line
from system import distributed
from system.files import atomic_write, cannot_write, first_line, free_path, make_folder, printable

CHECKPOINTS = "model_epoch_*.pth"
VALIDATION = "validation_loss"  # which older versions did not measure
METRICS = ("epoch", "step", "loss", VALIDATION, "learning_rate", "grad_norm")
METRICS += ("images_per_second", "seconds")
_locks: dict[str, tuple[int, int] | None] = {}  # of this process's own folders


@contextmanager
def own_folder(output_dir: str) -> Iterator[None]:
    """Keep other runs out of a folder inside a `with` block; the lock dies with the process. Raises
    ValueError if another run is there, or if the folder cannot be made."""
    out = Path(output_dir)
    lock, owner = FileLock(out / ".lock", timeout=0), out / ".owner"
    new: list[Path] = []
    try:
        new += [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        _locks[output_dir] = _identity(out)
        with suppress(OSError):  # it only tells others who is here
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
    except Timeout:
        who = "a process"
        with suppress(OSError):  # it has not said yet who it is
            who = printable(owner.read_text("utf-8", "replace")[:100])
        fault = f"{who} is training there; wait for it, or choose another --output_dir"
        raise ValueError(f"output_dir = {output_dir!r}: {fault}") from None
    except OSError as error:
        _remove(new)
        raise ValueError(f"output_dir = {output_dir!r}: {cannot_write(error)}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if is_ours(output_dir):
                owner.unlink(missing_ok=True)
                is_empty = os.listdir(out) == [".lock"]
                if out in new and is_empty:  # a start that failed leaves nothing
                    if os.name == "nt":
                        lock.release()  # deletes the file, which Windows does not while it is open
                    else:
                        Path(out, ".lock").unlink()
                    _remove(new)
        lock.release()
        del _locks[output_dir]


def _remove(new: list[Path]) -> None:
    """Remove empty folders, the innermost first."""
    with suppress(OSError):
        for folder in new:
            folder.rmdir()


def is_ours(output_dir: str) -> bool:
    """Whether a folder that own_folder has locked is still there: it may have been moved, and
    another one put in its place."""
    return output_dir not in _locks or _locks[output_dir] == _identity(Path(output_dir))


def spare_folder(output_dir: str) -> str:
    """A free name for a folder in the place of one that is no longer ours: beside it, or if nothing
    can be written there, among the temporary files."""
    out = Path(output_dir)
    name = f"{out.name}_{time.strftime('%Y-%m-%d_%H%M%S')}"
    parents = [p for p in (out.parent, Path(tempfile.gettempdir())) if os.access(p, os.W_OK)]
    return str(free_path((parents or [out.parent])[0] / name))


def _identity(out: Path) -> tuple[int, int] | None:
    """What the lock of a folder is known by, whatever it is called; None if there is none."""
    with suppress(OSError):
        lock = os.stat(out / ".lock")
        return lock.st_dev, lock.st_ino
    return None


def checkpoint_path(output_dir: str, progress: Progress) -> Path:
    return Path(output_dir, "models", f"model_{progress.name}.pth")


def grid_path(output_dir: str, progress: Progress) -> Path:
    """Where the samples of a checkpoint belong."""
    return Path(output_dir, "images", f"samples_{progress.name}.png")


def without_grid(output_dir: str) -> list[tuple[Path, Path]]:
    """The checkpoints of whole epochs whose grid of samples a kill or a full disk prevented, each
    with the place of the grid."""
    found = list_checkpoints(Path(output_dir, "models"), CHECKPOINTS)
    pairs = [(path, grid_path(output_dir, now)) for path, now in found if now.images == 0]
    return [(path, grid) for path, grid in pairs if not grid.exists()]


def curves_are_old(output_dir: str) -> bool:
    """Whether training.png does not show all of metrics.csv."""
    paths = Path(output_dir, "images", "training.png"), Path(output_dir, "metrics.csv")
    curves, metrics = (path.stat().st_mtime_ns if path.exists() else 0 for path in paths)
    return curves < metrics


def leftovers(output_dir: str) -> list[Path]:
    """Temporary files of a run that was killed."""
    kinds = "models/.model_epoch_ models/.file images/.samples_epoch_ images/.training.png"
    kinds += " images/.file .metrics"
    out = Path(output_dir)
    return [path for kind in kinds.split() for path in out.glob(f"{kind}*.partial")]


def is_complete(output_dir: str) -> bool:
    """Whether no grid is missing, the curves are up to date, and no temporary file is left."""
    return not (without_grid(output_dir) or curves_are_old(output_dir) or leftovers(output_dir))


def newest_of_run(models: Path) -> Path | None:
    """The newest whole checkpoint of the run in a folder, or else the newest reduced one, or None.
    Says why it skips others. Raises ValueError if none can be read."""
    reduced = None
    for path, _ in reversed(list_checkpoints(models, CHECKPOINTS, complain=print)):
        try:
            if "model" in checkpoint.load(path):
                return path
            print(f"skipped: {path}: holds only what drawing needs")
            reduced = reduced or path
        except ValueError as error:
            print(skipped_line(error))
    if not reduced and any(models.glob(CHECKPOINTS)):
        raise ValueError(f"{models}: none of its checkpoints can be read; move them elsewhere")
    return reduced


def holds_this_run(output_dir: str) -> bool:
    """Whether a folder has a checkpoint of this run, from before torchrun restarted it."""
    path = Path(output_dir, ".run")
    same = path.exists() and path.read_text("utf-8", "replace") == distributed.run_id()
    return same and any(Path(output_dir, "models").glob(CHECKPOINTS))


def prepare_folders(
    output_dir: str, start: Path | None, progress: Progress, rewritten: Path | None
) -> list[dict[str, Any]]:
    """Make the output folders, and see that a run from the checkpoint `start` at `progress`
    overwrites nothing. Returns the rows of metrics.csv that still hold. Raises ValueError if a
    folder cannot be written.

    A run that continues a checkpoint of this folder keeps what led up to it. Whatever comes after
    that point, or all files of an unrelated earlier run, moves to output_dir/earlier. A checkpoint
    that will be `rewritten` with a new plan is copied there, as pictures name a model by its hash.
    """
    out = Path(output_dir)
    try:
        for folder in ("models", "images"):
            make_folder(Path(out, folder))
        for path in leftovers(output_dir):
            path.unlink(missing_ok=True)  # generate.py may just have removed its own
        moved, copied, rows = what_to_set_aside(out, start, progress, rewritten)
        set_aside(out / "earlier", moved, copied)
        if distributed.is_torchrun():
            Path(out, ".run").write_text(distributed.run_id(), "utf-8")
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {cannot_write(error)}") from None
    return rows


def what_to_set_aside(
    out: Path, start: Path | None, progress: Progress, rewritten: Path | None
) -> tuple[list[Path], list[Path], list[dict[str, Any]]]:
    """The files to move and those to copy to output_dir/earlier, and the rows that still hold."""
    models, images, metrics = out / "models", out / "images", out / "metrics.csv"
    files = [*models.glob(CHECKPOINTS), *images.glob("samples_epoch_*.png")]
    curves = images / "training.png"
    if not start or not is_in(start, models):
        return [*files, metrics, curves, out / "tensorboard"], [], []
    listed = list_checkpoints(models, CHECKPOINTS)
    # What to keep, as "epoch_5" of model_epoch_5.pth and samples_epoch_5.png
    names = {path.stem.partition("_")[2] for path, now in listed if now.step <= progress.step}
    moved = [path for path in files if path.stem.partition("_")[2] not in names]
    copied = [rewritten] if rewritten and rewritten not in moved else []
    try:
        rows = read_metrics(metrics)
        is_edited = metrics.exists() and metrics.read_bytes() != csv_text(rows).encode()
    except (OSError, ValueError) as error:
        print(f"{metrics}: {first_line(error)}; it is set aside, and a new one begun")
        return [*moved, metrics, curves], copied, []
    begun = progress.epoch + (progress.images > 0)
    is_before = [int(x["step"]) <= progress.step and float(x["epoch"]) <= begun for x in rows]
    kept_rows = [row for row, kept in zip(rows, is_before, strict=True) if kept]
    if moved or copied or kept_rows != rows:
        moved, copied = [*moved, curves], [*copied, metrics]
    elif is_edited:  # by hand, say with a column of notes, or by an older version
        copied = [metrics]
    return moved, copied, kept_rows


def is_in(start: Path, models: Path) -> bool:
    """Whether a checkpoint is in this folder, be it as a link, or linked from elsewhere."""
    paths = start.parent.resolve() / start.name, start.resolve()
    return any(path.parent == models.resolve() and path.match(CHECKPOINTS) for path in paths)


def make_way(path: Path) -> None:
    """Set aside what is at `path`, models/NAME or images/NAME of a run folder."""
    set_aside(path.parent.parent / "earlier", [path], [])


def set_aside(earlier: Path, moved: list[Path], copied: list[Path]) -> None:
    """Move and copy those files that exist into a new folder of `earlier`, named after the time."""
    copies, moves = ([path for path in paths if path.exists()] for paths in (copied, moved))
    if not copies and not moves:
        return
    folder = free_path(earlier / time.strftime("%Y-%m-%d_%H%M%S"))
    folder.mkdir(parents=True)
    done: list[Path] = []
    try:
        for path in copies:  # first, as a full disk may prevent it
            partial = folder / f".{path.name}.partial"
            os.replace(shutil.copy2(path, partial), folder / path.name)
        for path in moves:
            if path.is_symlink() and path.is_file():  # a relative link would lead nowhere
                shutil.copy2(path, folder / path.name)
                path.unlink()
            else:
                shutil.move(path, folder / path.name)
            done.append(path)
    except OSError as error:  # such as a file that another program has open on Windows
        for path in done:
            shutil.move(folder / path.name, path)
        shutil.rmtree(folder)
        full = error.errno == errno.ENOSPC
        where = str(folder) if full else error.filename
        raise OSError(error.errno, error.strerror, where) from None
    tqdm.write(f"what this run would overwrite is kept in {folder}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv, without a last one whose end is torn off; none if the file is
    missing. Raises ValueError if it is not what write_metrics writes."""
    text = path.read_text("utf-8-sig") if path.exists() else ""
    with suppress(KeyError, TypeError, ValueError, csv.Error):
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        steps = [int(row["step"]) for row in rows]
        expected = [(row, n) for row in rows for n in METRICS if n != VALIDATION or row.get(n)]
        figures = [float(row[name]) for row, name in expected]
        if min(steps, default=0) >= 0 and all(map(math.isfinite, figures)):
            return rows
    raise ValueError("it does not hold rows of figures")


def csv_text(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, METRICS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.write(csv_text(rows).encode())
