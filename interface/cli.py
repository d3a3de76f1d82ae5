"""Command lines: flags made from settings, rules between flags, which value wins, errors."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from config import Config


class Parser(argparse.ArgumentParser):
    """argparse that takes whole flags only, complains in one line, and has rules between flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.rules: list[tuple[str, Callable[[set[str]], object], str]] = []

    def needs(self, flag: str, *others: str) -> None:
        """`flag` makes sense only together with one of `others`."""
        message = f"{flag} needs {' or '.join(others)}"
        self.rules.append((flag, lambda given: not given & set(others), message))

    def excludes(self, flag: str, *others: str, message: str) -> None:
        """`flag` cannot be combined with any of `others`."""
        self.rules.append((flag, lambda given: given & set(others), message))

    def allows_only(self, flag: str, *others: str, message: str) -> None:
        """`flag` cannot be combined with anything but `others`."""
        self.rules.append((flag, lambda given: given - {flag, *others}, message))

    def parse_args(self) -> argparse.Namespace:
        """The parsed command line; exits with code 2 and one line if it breaks a rule."""
        args = super().parse_args()
        given = {word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")}
        for flag, is_broken, message in self.rules:
            if flag in given and is_broken(given):
                self.error(message)
        return args

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def add_settings(parser: Any, names: Iterable[str]) -> None:
    """Add a flag for each setting in `names` to a parser or argument group. A flag that is not
    given leaves no trace in the parsed arguments, which tells it from one given its default."""
    for f in fields(Config):
        if f.name not in names:
            continue
        kind = type(f.default)
        shown = ",".join(map(str, f.default)) if kind is tuple else f.default
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
        options["help"] = f"{f.metadata['help']} (default: {shown!s})"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = comma_numbers if kind is tuple else kind
            name = {int: "INT", float: "FLOAT", tuple: "INT,INT"}.get(kind, "TEXT")
            choices = f.metadata.get("choices")
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else name
        parser.add_argument(f"--{f.metadata.get('flag', f.name)}", **options)


def comma_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user gave as flags."""
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def settings_for_training(
    trained: Config, given: dict[str, Any], mid_epoch: bool = False
) -> tuple[Config, list[str]]:
    """The settings with which to go on training: flags win over the checkpoint's (`trained`), and
    the checkpoint's over config.py, which only says what belongs to this computer.

    Also returns a line for each difference that the user should know of. Raises ValueError for a
    flag that a trained model cannot take, or one that would reorder the images of an epoch under
    way (`mid_epoch`).
    """
    here, notes = Config(), []
    cfg = replace(trained, **{**here.select("machine"), **given})
    for f in fields(Config):
        name, group = f.name, f.metadata["group"]
        old, new, default = (getattr(each, name) for each in (trained, cfg, here))
        if new != old and group == "model":
            had = f"the checkpoint was trained with {old!r}; drop the flag, or train a new model"
            raise ValueError(f"{name} = {new!r}: {had}")
        if new != old and mid_epoch and f.metadata.get("fixed_in_epoch"):
            had = f"the checkpoint is inside an epoch that began with {old!r}; finish that first"
            raise ValueError(f"{name} = {new!r}: {had}")
        if group != "machine" and new != old:
            notes.append(f"{name} = {new} (the checkpoint had {old})")
        elif group not in ("machine", "length") and name not in given and new != default:
            notes.append(f"{name} = {new}, as in the checkpoint (config.py says {default})")
    return cfg, notes


def settings_for_drawing(trained: Config, given: dict[str, Any]) -> Config:
    """The settings with which to draw: flags win over the model's own (`trained`). config.py only
    says what belongs to this computer and what each picture has of its own, such as the seed."""
    return replace(trained, **{**Config().select("machine", "picture"), **given})


def run_script(name: str, main: Callable[[], int]) -> None:
    """Run a script's main() and exit. A user's mistake becomes one line and exit code 2, training
    that diverged one line and 1, Ctrl-C 130. TRACEBACK=1 in the environment shows the traceback."""
    try:
        sys.exit(main())
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except (RuntimeError, MemoryError) as error:
        reason = (str(error) or "out of memory").splitlines()[0]
        kind = type(error).__name__  # torch has an OutOfMemoryError of its own
        if "MemoryError" not in kind and "allocate memory" not in reason:
            raise
        print(f"{name}: {reason}; use a smaller batch size or count", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(130)
