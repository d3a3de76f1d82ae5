"""What the tests share: tiny settings, and ways to run the scripts."""

import builtins
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # the tests of other files run at the same time
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in scripts

import pytest
import torch
from hypothesis import HealthCheck, settings

import data
from interface.cli import run_script
from system.files import read_idx

usual = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=60, **usual)
settings.register_profile("many", max_examples=1000, **usual)  # --hypothesis-profile many
settings.load_profile("short")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or scripts would ignore it, too

REPO = Path(__file__).resolve().parent.parent
MNIST = str(REPO / "mnist_data")

TINY_MODEL = {"widths": "8", "blocks": 1, "embedding_size": 8}
TINY = TINY_MODEL | {"data_dir": MNIST, "device": "cpu", "max_images": 320, "batch_size": 32}
TINY |= {"steps": 2, "preview_columns": 2, "warmup_steps": 2}


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let a person type these lines."""
    typed = iter(lines)
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(typed))


LONGEST = ("distributed", "train", "generate", "faults", "export", "two_sample", "tour")
LONGEST += ("evaluate", "evaluator", "recorded", "hostile", "gpu", "other_data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: names.get(item.path.stem, 99))  # so that no core waits at the end
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("NOT TESTED, as there is no GPU: whatever is marked gpu")


STOP_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


@dataclass
class Result:
    code: int
    out: str
    err: str


def as_words(flags: dict[str, object]) -> list[str]:
    """{"epochs": 1, "resume": True, "show": False, "sweep": [a, b]}: a command line."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@functools.cache
def read_mnist_once(folder: Path, name: str, dimensions: int) -> torch.Tensor:
    """What read_idx returns for the files in this repository, which no test changes."""
    return read_idx(folder, name, dimensions)


def draw_no_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """In the place of plot_training, which takes a tenth of a second: see test_plots.py."""
    path.write_bytes(b"curves")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Run a script in this process: run("train.py", epochs=1, resume=True), or with words as they
    are typed, run("train.py", "--epochs", 1)."""

    def read(folder: Path, name: str, dimensions: int) -> torch.Tensor:
        reads = read_mnist_once if folder.is_relative_to(MNIST) else read_idx
        return reads(folder, name, dimensions)

    def run_it(script: str, *words: object, **flags: object) -> Result:
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(data, "read_idx", read)
        monkeypatch.setattr("evaluation.plots.plot_training", draw_no_curves)
        monkeypatch.setattr(sys, "argv", [script, *map(str, words), *as_words(flags)])
        handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(script, module.main)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run_it


def run_quietly(script: str, flags: dict[str, object]) -> None:
    """Run a script in this process, for fixtures that live longer than `run`."""
    module = importlib.import_module(script.removesuffix(".py"))
    handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [script, *as_words(flags)])
        assert module.main() == 0, said.getvalue()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


unix = pytest.mark.skipif(os.name == "nt", reason="needs a Unix pseudo-terminal, limit or signal")


def copy_program(target: Path) -> None:
    """Copy the scripts and all that they import, to edit them."""
    for room in ("", "interface/", "evaluation/", "system/"):
        for path in REPO.glob(f"{room}*.py"):
            copy = target / path.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def start_script(script: str, flags: dict[str, object], **options: object) -> subprocess.Popen:
    """Start a script as a process of its own, with its output as text; `options` of Popen."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(REPO / script), *as_words(flags)]
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **(usual | {"env": environment} | options))


@dataclass
class Outcome:
    """What came of a process: a negative code is the signal that ended it."""

    code: int
    text: str
    peak_mb: float
    seen: int  # moments at which a fault could have struck
    open_files: int


class Server:
    """tests/server.py, which runs scripts as processes that need not import torch first."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(REPO / "tests" / "server.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=REPO, **pipes)
        self.folder, self.count, self.logs = folder, 0, {}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        script: str,
        flags: dict[str, Any],
        kind: str = "",
        number: int = 0,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Start a run; `kind` of fault strikes at its `number`-th moment. Returns its process."""
        self.count += 1
        log = str(self.folder / f"log{self.count}")
        request = {"script": script, "words": as_words(flags), "log": log}
        request |= {"environment": environment or {}, "kind": kind, "number": number}
        request["folder"] = str(flags.get("output_dir", self.folder))
        Path(log).touch()
        pid = self.ask(request)["pid"]
        self.logs[pid] = log
        return pid

    def wait_for_text(self, pid: int, pattern: str) -> None:
        """Wait, at most a minute, until the run has written a line that begins with `pattern`."""
        deadline = time.monotonic() + 60
        while not re.search(f"^{pattern}", Path(self.logs[pid]).read_text(), re.MULTILINE):
            assert time.monotonic() < deadline, Path(self.logs[pid]).read_text()
            time.sleep(0.01)

    def wait(self, pid: int) -> Outcome:
        answer, log = self.ask({"wait": pid}), self.logs.pop(pid)
        text, file = Path(log).read_text(), Path(log + ".counts")
        assert "Traceback" not in text, text
        assert "a bug" not in text, text
        counts = json.loads(file.read_text()) if file.exists() else {"seen": 0, "open_files": 0}
        return Outcome(answer["code"], text, answer["peak_mb"], **counts)

    def run(self, *what: Any, **fault: Any) -> Outcome:
        return self.wait(self.start(*what, **fault))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


def assert_one_line(result: Result, *words: str) -> None:
    """The script said what is wrong in one line that has all the words, and exited with 2."""
    assert result.code == 2, result
    assert len(result.err.strip().splitlines()) == 1, result.err
    for word in words:
        assert word in result.err, f"{word!r} not in {result.err!r}"


def assert_same(a: object, b: object, where: str = "") -> None:
    """Two nests of dicts, lists and tensors are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}/{i}")
    else:
        assert a == b, where
