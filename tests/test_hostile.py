"""Whatever is typed or stored is taken, or refused in one line: no traceback, no hang.

Property tests: hypothesis makes up flags, answers, stored settings and damaged files; with
`--hypothesis-profile many` it makes up more than 10,000.
"""

import contextlib
import importlib
import io
import json
import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import checkpoint
from checkpoint import TrainState
from config import Config
from evaluation import results
from interface import provenance, terminal
from interface.cli import Parser, add_settings, given_settings, run_script
from interface.folder import read_metrics
from interface.models import list_checkpoints
from interface.picture import read_npz, save_png
from interface.provenance import request_from_picture
from interface.requests import Request, requests_from_answers
from system.files import read_idx
from system.values import parse_duration, parse_labels

CFG = Config(widths=(8,), embedding_size=8, dense_size=8)
ALL = list(Config.__dataclass_fields__)

odd_text = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["9" * 310, "-" + "9" * 310, "9" * 5000, "1e308", "nan", "-inf", "--", "", "٣"]
    ),
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**310, -(10**310), 2**63]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=10)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """Hypothesis needs them; run_script switches them off."""
    torch.set_flush_denormal(False)


def one_line(error: BaseException) -> None:
    text = str(error)
    assert text
    assert text.isprintable(), text
    assert len(text) < 3000


@given(name=st.sampled_from(ALL), text=odd_text)
def test_any_flag_with_any_value(name, text):
    parser = Parser(prog="test.py")
    add_settings(parser, ALL)
    flag = f"--{Config.__dataclass_fields__[name].metadata.get('flag', name)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["test.py", f"{flag}={text}"])
        patch.setattr(parser, "exit", refuse)
        try:
            Config(**given_settings(parser.parse_args()))
        except ValueError as error:
            one_line(error)
        except Refused:
            pass


class Refused(Exception):
    pass


def refuse(code: int = 0, message: str = "") -> None:
    assert code in (0, 2)
    assert len(message.splitlines()) == 1
    raise Refused


@given(stored=st.dictionaries(st.sampled_from(ALL), values, max_size=4))
def test_any_stored_settings(stored):
    try:
        Config.from_dict(CFG.to_dict() | stored)
    except ValueError as error:
        one_line(error)


@given(text=odd_text)
def test_any_duration_and_any_digits(text):
    for parse in (parse_duration, lambda text: parse_labels(text, Config().label_names)):
        try:
            parse(text)
        except ValueError as error:
            one_line(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.pth"
    checkpoint.save(path, CFG, TrainState.initial(CFG, torch.device("cpu")))
    return path


ENTRIES = ("format", "config", "progress", "model", "ema", "guide", "optimizers", "metrics", "data")


@pytest.fixture(scope="module")
def contents(whole) -> dict[str, Any]:
    return torch.load(whole, weights_only=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Where a damaged checkpoint goes, which lies alone in its folder."""
    return tmp_path_factory.mktemp("other") / "b.pth"


@given(entry=st.sampled_from(ENTRIES), value=values)
def test_any_entry_of_a_checkpoint(contents, other, entry, value):
    torch.save(contents | {entry: value}, other)
    loads_or_says_why(other)


@given(name=st.sampled_from(ALL), value=values)
def test_any_stored_setting_of_a_checkpoint(contents, other, name, value):
    torch.save(contents | {"config": contents["config"] | {name: value}}, other)
    loads_or_says_why(other)


@given(name=st.sampled_from(["epoch", "images", "step", "seconds", "budget_from"]), value=values)
def test_any_progress_of_a_checkpoint(contents, other, name, value):
    torch.save(contents | {"progress": contents["progress"] | {name: value}}, other)
    loads_or_says_why(other)


def loads_or_says_why(path: Path) -> None:
    try:
        checkpoint.load_model(path, torch.device("cpu"))
    except ValueError as error:
        one_line(error)
    list_checkpoints(path.parent)


def damaged(whole: bytes, chosen: random.Random) -> bytes:
    """A part of the file cut off, overwritten, or repeated."""
    begin, end = sorted(chosen.randrange(len(whole)) for _ in range(2))
    kind = chosen.randrange(4)
    if kind == 0:
        return whole[:begin]
    if kind == 1:
        return whole[:begin] + chosen.randbytes(min(64, end - begin)) + whole[begin + 64 :]
    if kind == 2:
        return whole[:end] + whole[begin:]
    return chosen.randbytes(200)


@given(seed=st.integers(0, 10**9))
def test_any_damage_to_a_checkpoint(whole, other, seed):
    other.write_bytes(damaged(whole.read_bytes(), random.Random(seed)))
    loads_or_says_why(other)


@given(seed=st.integers(0, 10**9))
def test_any_damage_to_other_files(tmp_path_factory, seed):
    folder, chosen = tmp_path_factory.mktemp("damaged"), random.Random(seed)
    np.savez(folder / "a.npz", np.zeros((200, 28, 28), np.uint8), np.zeros(200, np.int64))
    save_png(Image.new("L", (9, 9)), folder / "a.png", {"model": "a", "digits": "7", "count": 1})
    (folder / "a.csv").write_text("epoch,step,loss\n1,10,0.5\n2,20,0.4\n")
    (folder / "a.json").write_text(json.dumps({"samples": {"fd": 1}, "real": {}}))
    (folder / "a").write_bytes((0x803).to_bytes(4) + bytes([0, 0, 0, 2] * 3) + bytes(8))
    readers = {
        "a.npz": read_npz,
        "a.png": provenance.read,
        "a.csv": read_metrics,
        "a.json": lambda path: results.read_result(path, {}),
        "a": lambda path: read_idx(path.parent, path.name, dimensions=3),
    }
    for name, read in readers.items():
        path = folder / name
        path.write_bytes(damaged(path.read_bytes(), chosen))
        try:
            read(path)
        except ValueError as error:
            one_line(error)


CHUNKS = ("model", "digits", "count", *Config.names("sampling", "picture"))


@given(name=st.sampled_from(CHUNKS), value=values)
def test_any_chunk_of_a_picture(tmp_path_factory, name, value):
    chunks: dict[str, Any] = {"model": "a", "digits": "7", "count": 1}
    chunks |= CFG.select("sampling", "picture") | {name: value}
    path = tmp_path_factory.mktemp("picture") / "a.png"
    save_png(Image.new("L", (9, 9)), path, chunks)
    try:
        assert isinstance(request_from_picture(provenance.read(path), path, CFG, {}), Request)
    except ValueError as error:
        one_line(error)


@given(answers=st.lists(odd_text, max_size=6))
def test_any_answers(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("answers")
    cfg = Config(output_dir=str(folder))
    waiting = iter([answer.splitlines()[0] if answer.strip() else "" for answer in answers])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "input", lambda *_: next(waiting, "q"), raising=False)
        patch.setattr(sys, "stderr", sys.__stderr__)
        try:
            for request in requests_from_answers(cfg, 0, Namespace(cfg=cfg, guide=None)):
                assert isinstance(request, Request)
        except EOFError:
            pass


FLAGS = {  # none of which can start any work, because the model is missing
    "train.py": ("--load_checkpoint_path", "--continue_training_epochs", "--widths", "--lr"),
    "generate.py": ("--count", "--digits", "--output", "--reproduce", "--guidance"),
    "evaluate.py": ("--images", "--sweep", "--samples", "--steps"),
}
MISSING = {"train.py": "--load_checkpoint_path=no.pth"}


@pytest.mark.parametrize("script", FLAGS)
@given(flags=st.lists(st.tuples(st.integers(0, 4), odd_text), max_size=3))
def test_any_command_line(run_quietly, script, flags):
    names = FLAGS[script]
    words = [f"{names[number % len(names)]}={text}" for number, text in flags]
    code, text = run_quietly(script, [*words, MISSING.get(script, "--model=no.pth")])
    assert code == 2
    assert len(text.strip().splitlines()) == 1, text


@pytest.fixture(scope="module")
def run_quietly():
    def run_it(script: str, words: list[str]) -> tuple[int, str]:
        module, text = importlib.import_module(script.removesuffix(".py")), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(text):
            patch.setattr(sys, "argv", [script, *words])
            patch.chdir(REPO)
            with pytest.raises(SystemExit) as stop:
                run_script(script, module.main)
        torch.set_flush_denormal(False)  # which hypothesis needs for its floats
        return int(stop.value.code or 0), text.getvalue()

    return run_it
