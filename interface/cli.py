"""Command lines: settings as flags, rules between flags, errors as one line."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from config import MODEL_SIZES, VERSION, Config
from system import distributed
from system.files import first_line, printable
from system.machine import set_up_torch
from system.values import is_control

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
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists every flag)\n")


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
    if any(map(is_control, text)):
        raise argparse.ArgumentTypeError(f"{text!r} has control characters; rename it")
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


def train_command(cfg: Config, *flags: object) -> str:
    """The command that trains with `flags`, and with the settings of this computer that differ from
    config.py, which a run never takes from a checkpoint."""
    defaults, program = Config().select("machine"), ["python"]
    changed = {n: v for n, v in cfg.select("machine").items() if v != defaults[n]}
    if (here := distributed.from_torchrun("LOCAL_WORLD_SIZE", 1)) > 1:
        program = ["torchrun", "--standalone", f"--nproc_per_node={here}"]
    return quote([*program, "train.py", *flags, *as_flags(changed)])


class Output:
    """A text stream whose errors never end a run: what cannot be shown, or has no reader left, is
    dropped. Characters that its encoding lacks are shown as escapes."""

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
    with open(os.devnull, "r+") as devnull:  # stands in for streams that the shell closed
        sys.stdin = sys.stdin or devnull
        errors = Output(sys.stderr or devnull)
        is_silent = distributed.rank() > 0  # the first of several processes speaks for all
        out = Output(devnull if is_silent else sys.stdout or devnull)
        with redirect_stdout(out), redirect_stderr(Output(devnull) if is_silent else errors):
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
    except KeyboardInterrupt:
        line, code = "stopped", 130
    except Exception as error:
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
