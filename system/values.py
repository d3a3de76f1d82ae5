"""Single values: what is wrong with one, how it is shown, how a duration or labels are written.
Standard library only."""

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

LARGEST = 1_000_000_000  # of a number that has no limit of its own


def check(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> None:
    """Raise ValueError unless the setting `name` may have this `value`: one of type `kind` within
    its limits (see problem_of), or if that is tuple, one to six whole numbers within them."""
    if kind is tuple and not (isinstance(value, tuple) and 1 <= len(value) <= 6):
        raise ValueError(f"{name} = {shortened(value)}: at least one number, at most 6")
    for each in value if kind is tuple else (value,):
        problem = problem_of(each, int if kind is tuple else kind, limits)
        if problem:
            raise ValueError(f"{name} = {shortened(each)}: {problem}")


def problem_of(value: Any, kind: type, limits: Mapping[str, Any]) -> str:
    """Why `value` does not fit, empty if it does: it should be of type `kind` and within the
    limits `ge`, `gt`, `le`, `multiple_of` (numbers), `choices` or `le`, its length (text)."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"must be of type {kind.__name__}"
    if "choices" in limits and value not in limits["choices"]:
        return f"choose one of {', '.join(map(str, limits['choices']))}"
    if "ge" in limits and value < limits["ge"]:
        return f"must be at least {limits['ge']}"
    if "gt" in limits and value <= limits["gt"]:
        return f"must be greater than {limits['gt']}"
    if kind in (int, float) and value > limits.get("le", LARGEST):
        return f"must be at most {limits.get('le', LARGEST)}"
    if kind is float and not math.isfinite(value):  # after the limits, which no huge int passes
        return "must be a finite number"
    if kind is str and (any(map(is_control, value)) or len(value) > limits.get("le", 999)):
        return f"must be text of at most {limits.get('le', 999)} characters, without control codes"
    if "multiple_of" in limits and value % limits["multiple_of"]:
        return f"must be a multiple of {limits['multiple_of']}"
    return ""


def is_control(character: str) -> bool:
    """Whether a character could take over a terminal or hide what a text says: control codes, line
    separators, lone surrogates, and what reverses the direction of writing."""
    turns = character in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def shortened(value: Any) -> str:
    """A value as it is shown in a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:40]}…{text[-10:]}"


def counted(number: int, thing: str) -> str:
    """ "1 step" or "2 steps"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def parse_duration(text: str) -> float:
    """Seconds in "90s", "10m" or "1.5h". Raises ValueError for anything else, or for zero."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", text.strip(), re.ASCII)
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"budget = {shortened(text)}: write a time such as 90s, 10m or 1.5h")
    return seconds


def parse_labels(text: str, names: list[str], setting: str = "digits") -> list[int]:
    """The labels that a text names: one ("cat"), several with commas ("cat,dog,cat"), or without
    commas if each name is a single character ("707": [7, 0, 7]). Raises ValueError for others."""
    # é may be one character or two, as on a Mac's disk
    text, *names = (unicodedata.normalize("NFC", each) for each in (text, *names))
    if text in names:
        return [names.index(text)]
    parts = [part.strip() for part in text.split(",")] if "," in text else list(text)
    if not parts or not set(parts) <= set(names):
        known = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
        if names == list("0123456789")[: len(names)]:
            known = f"digits 0 to {len(names) - 1}"
        raise ValueError(f"{setting} = {shortened(text)}: use {known}")
    return [names.index(part) for part in parts]
