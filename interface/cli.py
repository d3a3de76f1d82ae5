"""Command lines: settings as flags, flags without effect, which value wins, one-line errors."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from config import MODEL_SIZES, VERSION, Config
from diffusion import Diffusion
from system import distributed
from system.files import first_line
from system.machine import set_up_torch

OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")  # what torch says


class Parser(argparse.ArgumentParser):
    """argparse that takes whole flags only, complains in one line, and has rules between flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=VERSION)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own misses -1e-1
        self.rules: list[tuple[str, Callable[[set[str]], object], str]] = []

    def needs(self, flag: str, *others: str) -> None:
        """`flag` makes sense only together with one of `others`."""
        message = f"{flag} needs {' or '.join(others)}"
        self.rules.append((flag, lambda given: not given & set(others), message))

    def excludes(self, flag: str, *others: str, message: str) -> None:
        """`flag` cannot be combined with any of `others`."""
        self.rules.append((flag, lambda given: given & set(others), message))

    def allows_only(self, flag: str, *others: str) -> None:
        """`flag` cannot be combined with anything but `others`."""
        message = f"{flag} allows only {', '.join(others)}"
        self.rules.append((flag, lambda given: given - {flag, *others}, message))

    def parse_args(self) -> argparse.Namespace:
        """The parsed command line; exits with code 2 and one line if it breaks a rule."""
        args = super().parse_args()
        for action in self._actions:
            if getattr(args, action.dest, None) in ([], ""):  # argparse makes [] of --count=--
                self.error(f"{action.option_strings[0]} is empty; give it a value, or drop it")
        flags = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
        for flag, is_broken, message in self.rules:
            if flag in flags and is_broken(flags):
                self.error(message)
        return args

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def add_settings(parser: Any, names: Collection[str]) -> None:
    """Add a flag for each setting in `names` to a parser or argument group. A flag not given is
    absent from the parsed arguments, unlike one that is given its default."""
    for f in fields(Config):
        if f.name not in names:
            continue
        kind = f.type
        shown = ",".join(map(str, f.default)) if kind is tuple else str(f.default) or "none"
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        options["help"] = f"{f.metadata['help']} (default: {shown})"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = comma_numbers if kind is tuple else kind
            if f.metadata["group"] == "machine":
                options["type"] = os.path.expanduser  # the shell leaves --data_dir=~/x alone
            name = {int: "INT", float: "FLOAT", tuple: "INT,INT"}.get(kind, "TEXT")
            choices = f.metadata.get("choices")
            options["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else name
        parser.add_argument(f"--{f.metadata.get('flag', f.name)}", **options)


def comma_numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers such as 32,64")
    return tuple(int(number) for number in text.split(","))


def expanded_path(text: str) -> Path:
    """A flag's type: a path, with ~ for the home folder."""
    if not text:  # an unset variable
        raise argparse.ArgumentTypeError("is empty; give it a value, or drop it")
    return Path(os.path.expanduser(text))  # which leaves ~ of an unknown user alone


def quote(words: Iterable[object]) -> str:
    """A command to paste into the shell."""
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)([str(w) for w in words])


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user gave as flags."""
    size = MODEL_SIZES.get(getattr(args, "model_size", None), {})
    return size | {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def machine_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given settings that belong to this computer."""
    return {name: given[name] for name in Config.names("machine") if name in given}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The flags that give these settings: the inverse of given_settings."""
    words: list[str] = []
    for f in fields(Config):
        if f.name in settings:
            name, value = f.metadata.get("flag", f.name), settings[f.name]
            if f.type is bool:
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                text = ",".join(map(str, value)) if f.type is tuple else str(value)
                words += [f"--{name}", text]
    return words


# A flag, another setting, and whether the flag has an effect with a value of that one
ONLY_WITH: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("snr_power", "loss_weighting", lambda value: value == "snr_power"),
    ("min_snr_gamma", "loss_weighting", lambda value: value == "min_snr"),
    ("absolute_snr", "prediction", lambda value: value == "x_0"),
    ("guide_label_noise", "guide_fraction", lambda value: value > 0),
    ("eta", "sampler", lambda value: value != "ddpm"),
    ("eta", "steps", lambda value: value > 1),
    ("guidance_low", "guidance", lambda value: value not in (0, 1)),
    ("guidance_high", "guidance", lambda value: value not in (0, 1)),
)


def check_effects(cfg: Config, given: dict[str, Any], strength: float = 1.0) -> None:
    """Raise ValueError for a flag (`given`: settings) that would have no effect; pictures are drawn
    from strength · T on."""
    for f in fields(Config):
        if f.name in given and cfg.is_student and f.metadata.get("not_in_students"):
            reason = "has no effect on a student; drop the flag"
            raise ValueError(f"{f.name} = {given[f.name]!r}: {reason}")
    for name, other, has_effect in ONLY_WITH:
        value = getattr(cfg, other)
        if name in given and not has_effect(value):
            reason = f"has no effect with {other} = {value!r}; drop the flag"
            raise ValueError(f"{name} = {given[name]!r}: {reason}")
    asked = given.keys() & {"guidance", "guidance_low", "guidance_high"}
    if asked and cfg.guidance != 1 and not is_guided(cfg, strength):
        between = f"between guidance_low = {cfg.guidance_low:g} and high = {cfg.guidance_high:g}"
        start = f" from strength {strength:g} on" if strength < 1 else ""
        fault = f"no sampling time{start} (steps = {cfg.steps}) is {between}; change one of them"
        raise ValueError(f"guidance = {cfg.guidance:g}: {fault}")


def is_guided(cfg: Config, strength: float = 1.0) -> bool:
    """Whether guidance acts at any of the sampling times from strength · T on."""
    diffusion = Diffusion(cfg)
    return any(diffusion.guidance_at(t) != 1 for t in diffusion.sampling_times(strength)[:-1])


def settings_for_training(
    trained: Config, given: dict[str, Any], mid_epoch: bool = False
) -> tuple[Config, list[str]]:
    """The settings with which to go on training: flags win over the checkpoint's (`trained`), and
    the checkpoint's over config.py, which only supplies the machine settings.

    Also returns a line for each difference that the user should know of. Raises ValueError for a
    flag that a trained model cannot take, or one that would reorder the images of an epoch under
    way (`mid_epoch`).
    """
    defaults, notes = Config(), []
    fixed, noted = {"model", "student", "classes"}, {"model", "training", "picture"}
    (fixed if trained.is_student else noted).add("sampling")
    cfg = replace(trained, **{**defaults.select("machine"), **given})
    for f in fields(Config):
        name, group = f.name, f.metadata["group"]
        old, new, default = (getattr(each, name) for each in (trained, cfg, defaults))
        if new != old and group in fixed:
            reason = f"the checkpoint was trained with {old!r}; drop the flag, or train a new model"
            raise ValueError(f"{name} = {new!r}: {reason}")
        if new != old and mid_epoch and f.metadata.get("fixed_in_epoch"):
            reason = f"the checkpoint is inside an epoch that began with {old!r}"
            raise ValueError(f"{name} = {new!r}: {reason}; finish it without the flag")
        if group != "machine" and new != old:
            notes.append(f"{name} = {new} (the checkpoint had {old})")
        elif group in noted and name not in given and new != default:
            notes.append(f"{name} = {new}, as in the checkpoint (config.py says {default})")
    return cfg, notes


def settings_for_drawing(
    trained: Config, given: dict[str, Any], recorded: dict[str, Any] | None = None
) -> Config:
    """The settings with which to draw: those `recorded` by a picture win over flags (`given`),
    flags over the model's own (`trained`), and config.py only supplies the machine settings and
    those of a picture, such as the seed. Raises ValueError for settings other than those that a
    student learned, or for flags with which guidance would never act."""
    sets_interval = bool(given.keys() & {"guidance_low", "guidance_high"})
    given = given | (recorded or {})
    if trained.is_student:
        for name, own in trained.select("sampling").items():
            value = given.get(name, own)
            if value != own:
                raise ValueError(f"{name} = {value!r}: a student learned {own!r}; drop the flag")
    cfg = replace(trained, **{**Config().select("machine", "picture"), **given})
    if sets_interval and cfg.guidance_low >= cfg.guidance_high:
        needed = f"below guidance_high = {cfg.guidance_high}, or guidance never acts"
        raise ValueError(f"guidance_low = {cfg.guidance_low}: must be {needed}")
    return cfg


def check_guidance(trained: Config, cfg: Config, has_guide: bool) -> None:
    """Raise ValueError for guidance by the model without a label, if it never learned that."""
    by_label = not has_guide or cfg.guidance == 0
    if cfg.guidance != 1 and by_label and trained.label_dropout == 0:
        reason = "the model cannot draw without a label (label_dropout = 0); set guidance to 1"
        raise ValueError(f"guidance = {cfg.guidance:g}: {reason}")


class Output:
    """A text stream that never ends a run: what cannot be shown, or has no reader left, is dropped.
    Characters that its encoding lacks are shown as escapes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        with suppress(AttributeError, ValueError):  # not a file
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def run_script(name: str, main: Callable[[], int]) -> None:
    """Run a script's main() and exit. A user's mistake becomes one line and exit code 2, training
    that diverged or a bug one line and 1, Ctrl-C 130. TRACEBACK=1 shows where an error arose."""
    set_up_torch()
    nothing = open(os.devnull, "r+")  # noqa: SIM115 (stands in for streams that the shell closed)
    sys.stdin = sys.stdin or nothing
    errors = Output(sys.stderr or nothing)
    is_silent = distributed.rank() > 0  # the first of several processes speaks for all
    out = Output(nothing if is_silent else sys.stdout or nothing)
    with redirect_stdout(out), redirect_stderr(Output(nothing) if is_silent else errors):
        code = exit_code(name, main, errors)
        out.flush()
    if distributed.has_left:
        errors.flush()
        os._exit(code)  # torch's threads sometimes crash where Python ends in its usual way
    sys.exit(code)


def exit_code(name: str, main: Callable[[], int], errors: TextIO) -> int:
    """The exit code of main(), after one line on `errors` if it raised an error."""
    try:
        return main()
    except SystemExit as stop:  # argparse, or the first process, says why
        if stop.code and distributed.rank() > 0:
            time.sleep(1)  # torchrun ends all processes when one ends: let the first speak
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt as interrupt:
        error, line, code = interrupt, "stopped", 130
    except Exception as exception:
        error = exception
        if os.environ.get("TRACEBACK"):
            raise
        kind, line, code = type(error).__name__, first_line(error), 2
        if "MemoryError" in kind or any(words in line for words in OUT_OF_MEMORY):
            reason = line if str(error) else "out of memory"
            line = f"{reason}; choose a smaller --batch_size or --sample_batch_size"
        elif isinstance(error, FloatingPointError):
            code = 1
        elif isinstance(error, ImportError):
            line += "; pip install -r requirement.txt"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"the network cannot be compiled here ({line[:200]}); drop --compile"
        elif distributed.lost_others(error):
            lost = f"lost the connection to another process ({line[:80]})"
            line, code = f"{lost}; start all again, training with --resume", 1
        elif not isinstance(error, (ValueError, OSError)):
            line, code = f"{kind}: {line}; a bug: report it with what TRACEBACK=1 shows", 1
    if distributed.processes() > 1:
        name += f", process {distributed.rank()}"
    if not distributed.is_first_here():
        time.sleep(1)  # the same mistake may be made in all processes: the first ends the others
    print(f"{name}: {line}", file=errors)
    return code
