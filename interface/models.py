"""Which model a user means: by a path, a name, a number, a SHA-256, or as "newest", which is the
last of list_checkpoints."""

import functools
import os
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from checkpoint import PRETRAINED, STUDENT, LoadedModel, Progress, load
from config import Config
from data import fingerprint
from interface.terminal import ask, log, whole_number
from system.files import first_line, printable, sha256


def list_checkpoints(
    folder: str | Path, pattern: str = "*.pth", complain: Callable[[str], None] = lambda line: None
) -> list[tuple[Path, Progress]]:
    """The readable checkpoints in a folder, the most trained last: ordered by completed steps, then
    reduced files before whole ones, then by time. The models in git come first. Other files
    are reported to `complain`, a line each."""
    found = []
    for path in sorted(Path(folder).glob(pattern)):
        try:
            contents = load(path, only_look=True)
            progress, trainable = Progress(**contents["progress"]), "model" in contents
            rank = {STUDENT: 0, PRETRAINED: 1}.get(path.name, 2)
            key = rank, progress.step, trainable, path.stat().st_mtime
            found.append((key, path, progress))
        except (ValueError, OSError) as error:  # some other file, or damaged, or just deleted
            complain(skipped_line(error))
    return [(path, progress) for _, path, progress in sorted(found, key=lambda item: item[0])]


@functools.cache
def log_once(line: str) -> None:
    log(line)


def skipped_line(error: Exception) -> str:
    """A line on a checkpoint that is not used, without the remedy in its error."""
    return f"skipped: {first_line(error).rpartition(';')[0] or first_line(error)}"


def list_models(folder: Path) -> list[tuple[Path, Progress]]:
    """What list_checkpoints finds in a folder; says which files cannot be read. Raises ValueError
    if there is no model."""
    found = list_checkpoints(folder, complain=log_once)
    if not found:
        raise ValueError(f"no model in {folder}; train one first: python train.py --budget 10m")
    return found


def find_model(text: str, folder: Path) -> Path:
    """The model that a user means by a path, a name in `folder`, its number in the list of models
    there, or "newest": the last of that list. Raises ValueError if there is none."""
    for path in (Path(os.path.expanduser(text)), folder / text, folder / f"{text}.pth"):
        if os.path.isfile(path):  # False also for a name that is too long
            return path
    if text == "newest" or (text.isdecimal() and len(text) < 10):
        found = list_models(folder)
        number = len(found) if text == "newest" else int(text)
        if 1 <= number <= len(found):
            return found[number - 1][0]
    raise ValueError(
        f"model = {text!r:.300}: no such checkpoint; look in {folder}, or train one first"
    )


def model_with_hash(expected: str, output_dir: Path) -> Path | None:
    """The model with a SHA-256, among those of a run folder and of its earlier runs."""
    for path in (*output_dir.glob("models/*"), *output_dir.glob("earlier/*/*")):
        with suppress(OSError):  # one that cannot be read
            is_model = path.suffix in (".pth", ".safetensors") and path.is_file()
            if is_model and sha256(path) == expected:
                return path
    return None


def fits_data(loaded: LoadedModel, images: Tensor, labels: Tensor) -> bool:
    """Whether a model was trained on these images and labels, or on the first ones of them. True
    where its file does not say, as older ones do not."""
    if not loaded.data:
        return True
    limit = loaded.cfg.max_images or len(images)
    expected = fingerprint(images[:limit], labels[:limit])
    return expected == {name: loaded.data.get(name) for name in expected}


def ask_for_model(folder: Path) -> Path:
    """List the models in a folder and ask for one; Enter takes the last."""
    found = list_models(folder)
    log(f"Models in {folder}:")
    for number, (path, progress) in enumerate(found, 1):
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        log(f"  {number}  {printable(path.name)}  {progress}  {date}")
    return found[ask("Which model", len(found), whole_number(len(found))) - 1][0]


def model_from_flags(args: Namespace, folder: Path) -> Path:
    """The model that the flags name, the one that --fast takes, or the answer to a question."""
    if args.digits is None and not args.model:
        return ask_for_model(folder)
    file = find_model(args.model or "newest", folder)
    its_student = file.with_name(STUDENT)
    if args.fast and not args.model and file.name == PRETRAINED and its_student.is_file():
        return its_student
    return file


def named_teacher(text: str, output_dir: str | Path) -> Path:
    """The model that `--teacher` means: in the folder of the student's run, or else in the default
    one, where pretrained.pth is. Raises ValueError if there is none."""
    for out in (output_dir, Config().output_dir):
        with suppress(ValueError):
            return find_model(text, Path(out, "models"))
    raise ValueError(f"teacher = {text!r}: no such model; give a checkpoint's path, or train one")


def find_teacher(cfg: Config, expected: str | None, exactly: bool = True) -> Path:
    """The file of a student's teacher. A run that continues needs the file with the `expected`
    SHA-256: its name, such as "newest", may by now mean another one, or it may lie among the
    earlier runs. Where it is missing, the name decides, or if `exactly` ValueError is raised."""
    if expected is None:
        return named_teacher(cfg.teacher, cfg.output_dir)
    with suppress(ValueError):
        path = named_teacher(cfg.teacher, cfg.output_dir)
        if sha256(path) == expected:
            return path
    for out in (cfg.output_dir, Config().output_dir):
        if path := model_with_hash(expected, Path(out)):
            return path
    if not exactly:
        return named_teacher(cfg.teacher, cfg.output_dir)
    lost = f"no file has the SHA-256 of what this student learned from, {expected[:12]}…"
    raise ValueError(f"teacher = {cfg.teacher!r}: {lost}; put it into {cfg.output_dir}/models")
