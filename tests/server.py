"""Runs the scripts as processes of their own, on request with a fault at a chosen moment: a kill,
a signal, or a disk that is full.

The scripts are imported once, and every run is a fork of this process, because importing and first
use take longer than a small run does. Requests are lines of JSON on stdin, answers on stdout.
"""

import errno
import functools
import json
import os
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import torch

import benchmark
import data
import evaluate
import generate
import train
from interface.cli import run_script

SCRIPTS = {"train": train, "generate": generate, "evaluate": evaluate, "benchmark": benchmark}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "shutil.copyfile"}


class Fault:
    """Does something just before the `number`-th moment of a run: a training step, or a change to a
    file in `folder`. Python tells an audit hook of the latter; what the hook raises, the call does.
    With a kind such as "SIGINT at step", only steps count.
    """

    def __init__(self, kind: str, number: int, folder: str) -> None:
        self.kind, self.number, self.folder, self.seen = kind, number, folder, 0
        self.steps = 0
        sys.addaudithook(self.hook)
        step = train.training_step

        def counted(*args: object, **options: object) -> None:
            self.moment()
            self.steps += 1
            if self.kind.endswith(" at step") and self.steps == self.number:
                os.kill(os.getpid(), getattr(signal, self.kind.split()[0]))
            step(*args, **options)

        train.training_step = counted

    def hook(self, event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and any(self.folder in str(each) for each in args[:2]):
            self.moment(str(args[0]))

    def moment(self, path: str | None = None) -> None:
        self.seen += 1
        if self.seen != self.number or self.kind.endswith(" at step"):
            return
        if self.kind != "full disk":
            os.kill(os.getpid(), getattr(signal, self.kind))
        elif path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def run(request: dict) -> None:
    """A run in a fork of this process; never returns."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(request["environment"])
    script = request["script"]
    sys.argv = [f"{script}.py", *request["words"]]
    fault = Fault(request["kind"], request["number"], request["folder"])
    code = 1
    try:
        run_script(f"{script}.py", SCRIPTS[script].main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        counts = {"seen": fault.seen, "open_files": len(os.listdir("/dev/fd"))}
        Path(request["log"] + ".counts").write_text(json.dumps(counts))
        os._exit(code)


def warm_up() -> None:
    """Use everything once. With one thread, because a fork does not take over others."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        small = "--max_images 32 --batch_size 32 --epochs 1 --widths 8,8 --device cpu"
        data_dir = Path(__file__).resolve().parent.parent / "mnist_data"
        words = [*small.split(), "--output_dir", folder, "--data_dir", str(data_dir)]
        sys.argv = ["train.py", *words]
        with redirect_stdout(nothing), redirect_stderr(nothing), suppress(SystemExit):
            run_script("train.py", train.main)


def remember_mnist() -> None:
    """Read the files of this repository once, for all forks."""
    read, mnist = data.read_idx, str(Path(__file__).resolve().parent.parent / "mnist_data")
    once = functools.cache(read)
    data.read_idx = lambda folder, name, dimensions: (
        once if str(folder).startswith(mnist) else read
    )(folder, name, dimensions)


remember_mnist()
warm_up()
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        _, status, usage = os.wait4(request["wait"], 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "peak_mb": usage.ru_maxrss / 1024}
    else:
        pid = os.fork()
        if pid == 0:
            run(request)
        answer = {"pid": pid}
    print(json.dumps(answer), flush=True)
