"""What a person sees in a terminal: questions, messages, progress, digits made of characters."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

with suppress(ImportError):
    import readline  # noqa: F401  gives input() arrow keys and a history, where available

ASCII = " .:-=+*#%@"  # from black to white
RESET = "\x1b[0m"

HELP = """  {one}  draws this alone
  {some}  draws these side by side, in as many variants as you ask for
  {all}  draws every label
  {question}  shows this help; {end} ends; Enter takes the answer in brackets
Guidance 1 draws what the model learned; larger values draw clearer, less varied pictures."""


def log(message: str) -> None:
    """Print a message on stderr: generate.py keeps stdout for the paths of written files."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def sampling_bar(steps: int, batches: int) -> Iterator[Callable[[int, Tensor], object]]:
    """A progress bar for Pipeline.draw, as its `on_state`; shows nothing without a terminal."""
    with tqdm(
        total=batches * (steps + 1), desc="sampling", unit="step", leave=False, disable=None
    ) as bar:
        yield lambda number, x: bar.update()


def help_on(names: Sequence[str]) -> str:
    """What "?" shows where these labels can be drawn."""
    one, some = "7", "2026"
    if not set(one + some) <= set(names):
        one, mark = names[0], "" if max(map(len, names)) == 1 else ","
        some = mark.join((*names[:2], names[0]))
    shown = {"one": one, "some": some, "all": "all", "question": "?"}
    width = max(map(len, shown.values()))
    padded = {key: f"{text:<{width}}" for key, text in shown.items()}
    return HELP.format(**padded, end=" or ".join(quit_words(names)))


def quit_words(names: Sequence[str]) -> list[str]:
    """What ends a session where these labels can be drawn."""
    return [word for word in ("q", "quit") if word not in names] or ["Ctrl-D"]


def ask(
    question: str,
    default: Any,
    parse: Callable[[str], Any],
    names: Sequence[str] = tuple("0123456789"),
) -> Any:
    """Ask until `parse` accepts the answer; Enter takes the default, and ? shows what can be drawn:
    `names`. Raises EOFError for "q" or "quit". Without a default the answer is a label: if one of
    them is called q, quit or ?, it can be drawn."""
    prompt = f"{question}: " if default is None else f"{question} [{default}]: "
    labels = names if default is None else ()
    while True:
        if sys.stdin.isatty() and sys.stdout.isatty():  # input() prompts on stdout
            answer = input(prompt).strip()
        else:
            print(prompt, end="", file=sys.stderr, flush=True)
            try:
                answer = input().strip()
            except EOFError:
                raise EOFError("no more answers on stdin; --digits draws without asking") from None
            except UnicodeDecodeError:
                raise ValueError(f"answers on stdin must be in {sys.stdin.encoding}") from None
        if answer.lower() in ("q", "quit") and answer not in labels:
            raise EOFError
        if answer == "?" and answer not in labels:
            log(help_on(names))
        elif not answer and default is not None:
            return default
        else:
            try:
                return parse(answer)
            except ValueError as error:
                log(f"  {error}")


def whole_number(largest: int) -> Callable[[str], int]:
    """A parser of whole numbers from 1 to `largest`."""

    def parse(text: str) -> int:
        # int() refuses thousands of digits in words of its own
        if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= largest:
            raise ValueError(f"{text!r} is not a whole number from 1 to {largest}")
        return int(text)

    return parse


def has_colour(stream: TextIO) -> bool:
    """Whether `stream` can show half blocks in shades of grey: it is a UTF-8 terminal with
    colours, and the user has not set NO_COLOR (no-color.org)."""
    term = "xterm" if "WT_SESSION" in os.environ else os.environ.get("TERM", "dumb")
    utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
    return stream.isatty() and utf8 and term != "dumb" and not os.environ.get("NO_COLOR")


def show(tiles: Tensor, stream: TextIO | None = None) -> None:
    """Print uint8 pictures (N, C, H, W), on stderr if no stream is given, as many side by side as
    fit: at full size if all of them fit on the screen, otherwise smaller, and at most two screens
    of them."""
    stream = stream or sys.stderr
    colour = has_colour(stream)
    wide, high = 0, 0
    with suppress(OSError, ValueError):  # not a terminal
        wide, high = os.get_terminal_size(stream.fileno())
    size = shutil.get_terminal_size((wide or 80, high or 24))  # COLUMNS and LINES come first
    grey = tiles.float().mean(dim=1, keepdim=True).cpu()  # (N, 1, H, W)
    N, _, H, W = grey.shape
    for shrink in (1, 2, 3, 4):
        width, height = -(-W // shrink), -(-H // (2 * shrink))  # two pixels a character
        columns = max(1, size.columns // width)
        rows = -(-N // columns)
        if width <= size.columns and (shrink > 1 or rows * height <= size.lines - 4):
            break  # the largest size that fits is the most readable
    if width > size.columns:
        print(f"({size.columns} columns wide: too narrow for the picture's {width})", file=stream)
        return
    shown = min(N, columns * max(1, 2 * size.lines // height))
    small = F.avg_pool2d(grey[:shown], shrink, ceil_mode=True)[:, 0].round().int()
    if small.shape[1] % 2:  # a character holds two rows
        small = F.pad(small, (0, 0, 0, 1))
    for row in small.split(columns):
        for line in torch.cat(list(row), dim=1).view(-1, 2, width * len(row)):
            top, bottom = line.tolist()
            print((half_blocks if colour else ascii_line)(top, bottom), file=stream)
    if shown < N:
        print(f"({N - shown} more in the file)", file=stream)
    stream.flush()


def half_blocks(top: list[int], bottom: list[int]) -> str:
    """Two rows of pixels, 0…255, as half blocks: the upper pixel is the foreground colour, the
    lower one the background."""
    line, before = "", None
    for pair in zip(map(grey_of_256, top), map(grey_of_256, bottom), strict=True):
        if pair != before:
            line += f"\x1b[38;5;{pair[0]};48;5;{pair[1]}m"
        line, before = line + "▀", pair
    return line + RESET


def grey_of_256(value: int) -> int:
    """The nearest grey of the 256-colour palette: 16 is black, 231 white, 232… are 8, 18, … 238."""
    between = 232 + min(23, max(0, round((value - 8) / 10)))
    return 16 if value < 4 else 231 if value > 246 else between


def ascii_line(top: list[int], bottom: list[int]) -> str:
    """Two rows of pixels, 0…255, as plain characters."""
    means = ((a + b) / 2 for a, b in zip(top, bottom, strict=True))
    return "".join(ASCII[round(mean / 255 * (len(ASCII) - 1))] for mean in means).rstrip()
