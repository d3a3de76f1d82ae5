"""What the program survives: kills, signals, full disks, two at once, damaged and hostile files.

The normal suite tries a few of each; `python -m pytest -m long` tries hundreds.
"""

import csv
import os
import queue
import random
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MNIST, REPO, TINY, TINY_MODEL, Outcome, Server, as_words, assert_same, unix

import checkpoint
from checkpoint import Progress
from config import Config
from data import load_split
from evaluation import classifier
from interface.folder import newest_of_run
from system.files import MAX_BYTES

pytestmark = unix
CPU = torch.device("cpu")
MAX_REFUSAL_MB = 1200


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict[str, Any]:
    """A run of two short epochs on a hundred real digits, saved twice."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = load_split(Config(data_dir=MNIST, max_images=96), train=True, device=CPU)
    sizes = struct.pack(">4I", 0x803, *images[:, 0].shape), struct.pack(">2I", 0x801, len(labels))
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(sizes[0] + images.numpy().tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(sizes[1] + labels.byte().numpy().tobytes())
    small = {"dense_size": 8, "batch_size": 16, "steps": 1, "warmup_steps": 1, "device": "cpu"}
    preview = {"preview_digits": "01", "preview_columns": 2}
    run = {"epochs": 2, "save_every": 1, "data_dir": raw.parents[1]}
    return TINY_MODEL | small | preview | run


@pytest.fixture(scope="module")
def finished(server, flags, tmp_path_factory) -> Path:
    """The folder of such a run that nothing disturbed."""
    return undisturbed(server, flags, tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture(scope="module")
def finished_over_another(server, flags, finished, tmp_path_factory) -> Path:
    """The folder of a run of another seed that began where `finished` lay."""
    out = tmp_path_factory.mktemp("over_another") / "out"
    shutil.copytree(finished, out)
    return undisturbed(server, flags | {"seed": 1}, out)


def undisturbed(server: Server, flags: dict, out: Path) -> Path:
    outcome = server.run("train", flags | {"output_dir": out})
    assert outcome.code == 0, outcome.text
    (out.parent / "moments").write_text(str(outcome.seen))
    return out


def moments(out: Path) -> int:
    """At how many moments a fault could have struck an undisturbed run."""
    return int((out.parent / "moments").read_text())


def files_in(folder: Path, pattern: str) -> set[bytes]:
    return {path.read_bytes() for path in folder.glob(pattern)}


def figures(folder: Path) -> list[tuple[str, ...]]:
    with open(folder / "metrics.csv", newline="") as file:
        names = ("epoch", "step", "loss", "learning_rate", "grad_norm")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def assert_same_results(out: Path, finished: Path) -> None:
    """Same weights to the last bit, same grids, same figures, and nothing half-written."""
    states = []
    for folder in (out, finished):
        contents = checkpoint.load(folder / "models" / "model_epoch_2.pth")
        for clock in ("seconds", "budget_from"):
            del contents["progress"][clock]
        del contents["metrics"]["seconds"], contents["config"]["output_dir"]
        states.append(contents)
    assert_same(*states)
    for path in (finished / "images").glob("samples_*.png"):
        assert (out / "images" / path.name).read_bytes() == path.read_bytes()
    assert figures(out) == figures(finished)
    assert not list(out.rglob("*.partial"))


def strike(server: Server, flags: dict, finished: Path, out: Path, kind: str, number: int) -> None:
    """A fault strikes a run; after `--resume` its results are those of an undisturbed one. Where it
    struck before the run had moved an earlier one aside, the run is started again instead."""
    flags, begun_with = flags | {"output_dir": out}, files_in(out, "models/*_epoch_*")
    outcome = server.run("train", flags, kind=kind, number=number)
    expected = {"SIGKILL": (-9,), "SIGINT": (130, 0), "SIGTERM": (143, -15, 0)}
    expected |= {"SIGHUP": (129, -1, 0), "full disk": (0, 2)}
    assert outcome.code in expected[kind], (kind, number, outcome)
    begun = not files_in(out, "models/*_epoch_*") & begun_with
    saved = newest_of_run(out / "models") if begun else None
    again = server.run("train", flags | ({"resume": True} if begun else {}))
    assert again.code == 0, (kind, number, again, outcome)
    if saved and saved.name != "model_epoch_2.pth":  # not from scratch, which would end alike
        progress = Progress(**checkpoint.load(saved)["progress"])
        assert f"training from {progress} " in again.text, again
    assert_same_results(out, finished)


KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "full disk")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_a_fault_strikes_resumes_to_the_same_results(
    server, flags, finished, tmp_path, kind
):
    last = moments(finished)
    for number in random.Random(kind).sample(range(1, last + 1), 2):
        strike(server, flags, finished, tmp_path / str(number), kind, number)


@pytest.fixture(scope="module")
def servers(server, tmp_path_factory) -> Iterator[queue.Queue]:
    """Two servers, one for each core."""
    other, free = Server(tmp_path_factory.mktemp("logs")), queue.Queue()
    for each in (server, other):
        free.put(each)
    yield free
    other.close()


def in_parallel(servers: queue.Queue, work: Callable[[Server, int], None], count: int) -> None:
    """Do the work for the numbers 1 to count, with the servers that are free."""

    def with_a_server(number: int) -> None:
        server = servers.get()
        try:
            work(server, number)
        finally:
            servers.put(server)

    with ThreadPoolExecutor(servers.qsize()) as pool:
        list(pool.map(with_a_server, range(1, count + 1)))
    print(f"{count} times")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_moment_of_a_run_can_be_struck(servers, flags, finished, tmp_path, kind):
    def work(server: Server, number: int) -> None:
        strike(server, flags, finished, tmp_path / str(number), kind, number)
        shutil.rmtree(tmp_path / str(number))

    in_parallel(servers, work, moments(finished))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_moment_of_a_run_over_an_earlier_one_can_be_struck(
    servers, flags, finished, finished_over_another, tmp_path, kind
):
    def work(server: Server, number: int) -> None:
        out = tmp_path / str(number)
        shutil.copytree(finished, out)
        strike(server, flags | {"seed": 1}, finished_over_another, out, kind, number)
        assert files_in(out, "earlier/*/*_epoch_*") == files_in(finished, "*/*_epoch_*")
        shutil.rmtree(out)

    in_parallel(servers, work, moments(finished_over_another))


# ---- two at once


def pair_of_runs(server: Server, flags: dict, finished: Path, out: Path, delay: float) -> None:
    flags = flags | {"output_dir": out}
    first = server.start("train", flags)
    time.sleep(delay)
    second = server.start("train", flags | {"resume": True})
    outcomes = [server.wait(pid) for pid in (first, second)]
    codes = sorted(outcome.code for outcome in outcomes)
    assert codes in ([0, 2], [0, 0]), outcomes
    for outcome in outcomes:
        if outcome.code == 2:
            assert "is training there" in outcome.text
            assert len(outcome.text.splitlines()) == 1
    if codes == [0, 0]:  # one after the other
        assert any("nothing left to do" in outcome.text for outcome in outcomes), outcomes
    assert_same_results(out, finished)
    assert not (out / "earlier").exists()
    shutil.rmtree(out)


def pair_of_draws(server: Server, folder: Path) -> None:
    flags = {"digits": 7, "count": 1, "output_dir": folder, "device": "cpu", "steps": 1}
    pids = [server.start("generate", flags | {"seed": seed}) for seed in (1, 2)]
    outcomes = [server.wait(pid) for pid in pids]
    names = {line for each in outcomes for line in each.text.splitlines() if line.endswith(".png")}
    assert len(names) == 2, outcomes
    assert len({Path(name).read_bytes() for name in names}) == 2


@pytest.mark.parametrize("tries", [3, pytest.param(100, marks=pytest.mark.long)])
def test_two_runs_in_one_folder_lose_nothing(server, flags, finished, tmp_path, tries):
    for number in range(tries):
        pair_of_runs(server, flags, finished, tmp_path / "out", delay=0.01 * number)


@pytest.mark.parametrize("tries", [3, pytest.param(100, marks=pytest.mark.long)])
def test_two_draws_at_once_lose_nothing(server, finished, tmp_path, tries):
    shutil.copytree(finished / "models", tmp_path / "models")
    for _ in range(tries):
        pair_of_draws(server, tmp_path)
    assert len(list(tmp_path.glob("images/generated_7_*.png"))) == 2 * tries


# ---- damage


def loaded(path: Path) -> dict | None:
    """What a file holds; None if it is refused."""
    try:
        if path.name != "evaluator.pth":
            return checkpoint.load(path)
        net, reference, _ = classifier.load(CPU, path)
        return dict(net.state_dict()) | {k: torch.from_numpy(v) for k, v in reference.items()}
    except ValueError:
        return None


@pytest.mark.parametrize("tries", [20, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["checkpoint", "shipped model", "evaluator"])
def test_a_flipped_bit_is_seen_or_changes_nothing(finished, tmp_path, kind, tries):
    path = {
        "checkpoint": finished / "models" / "model_epoch_2.pth",
        "shipped model": REPO / "results" / "models" / "pretrained.pth",
        "evaluator": classifier.PATH,
    }[kind]
    whole, copy, chosen = path.read_bytes(), tmp_path / path.name, random.Random(kind)
    expected = loaded(path)
    refused = 0
    for _ in range(tries):
        flipped = bytearray(whole)
        bit = chosen.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(flipped)
        found = loaded(copy)
        if found is None:
            refused += 1
        else:
            assert_same(found, expected)
    assert refused > 0.5 * tries


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "ema", "guide", "optimizers", "totals"])
def test_what_is_not_finite_is_neither_loaded_nor_saved(finished, tmp_path, part, value):
    path = tmp_path / "a.pth"
    contents = checkpoint.load(finished / "models" / "model_epoch_2.pth")
    if part == "optimizers":
        contents[part][0]["state"][0]["average"].view(-1)[3] = value
    elif part == "totals":
        contents["metrics"]["totals"][1] = value
    else:
        contents[part]["head.weight"].view(-1)[3] = value
    torch.save(contents, path)
    with pytest.raises(ValueError, match="finite"):
        checkpoint.load(path)
    cfg = Config.from_dict(contents["config"])
    state = checkpoint.TrainState.initial(cfg, CPU)
    with torch.no_grad():
        next(state.ema.parameters()).view(-1)[0] = value
    with pytest.raises(FloatingPointError, match="finite"):
        checkpoint.save(tmp_path / "b.pth", cfg, state)
    assert not (tmp_path / "b.pth").exists()


def test_resuming_passes_over_a_damaged_checkpoint(server, flags, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    newest = out / "models" / "model_epoch_2.pth"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    outcome = server.run("train", flags | {"output_dir": out, "resume": True})
    assert outcome.code == 0, outcome
    assert f"skipped: {newest}: damaged" in outcome.text
    assert_same_results(out, finished)


def test_one_bad_file_stops_nobody(server, finished, tmp_path):
    shutil.copytree(finished / "models", tmp_path / "models")
    models = tmp_path / "models"
    (models / "a.pth").write_bytes(b"PK\x03\x04 not an archive")
    (models / "b.pth").mkdir()
    (models / "c.pth").symlink_to("nowhere")
    huge = checkpoint.load(models / "model_epoch_2.pth")
    huge["progress"]["step"] = 10**310
    torch.save(huge, models / "d.pth")
    where = {"output_dir": tmp_path, "device": "cpu"}
    drawn = server.run("generate", where | {"digits": 7, "steps": 1})
    assert drawn.code == 0, drawn
    picture = next(line for line in drawn.text.splitlines() if line.endswith(".png"))
    again = server.run("generate", where | {"reproduce": picture})
    assert again.code == 0, again


# ---- hostile files: refused in one line, in little memory, and no program is started


def hostile_checkpoints() -> dict[str, dict[str, Any]]:
    return {
        "many blocks": {"blocks": 10**9},
        "16 blocks": {"blocks": 16, "widths": [1024] * 6, "img_size": 256},
        "timesteps": {"timesteps": 10**9},
        "channels": {"img_channels": 10**6},
        "image size": {"img_size": 2**31},
        "wide": {"widths": [2**40]},
        "deep": {"widths": [8] * 1000},
        "dense": {"dense_size": 10**12},
        "310 digits": {"embedding_size": 10**310},
        "text": {"widths": "8,8"},
        "escape": {"preview_digits": "\x1b]0;owned\x07"},
    }


@pytest.mark.parametrize("name", hostile_checkpoints())
def test_a_checkpoint_that_asks_for_too_much_is_refused(server, finished, tmp_path, name):
    contents = checkpoint.load(finished / "models" / "model_epoch_2.pth")
    contents["config"] |= hostile_checkpoints()[name]
    path = tmp_path / "a.pth"
    torch.save(contents, path)
    for script, words in (
        ("generate", {"model": path, "digits": 7, "output": tmp_path / "a.png"}),
        ("train", {"load_checkpoint_path": path, "continue_training_epochs": 1}),
    ):
        outcome = server.run(script, words | {"output_dir": tmp_path / "out"})
        assert_refused(outcome, str(path))
        assert "\x1b" not in outcome.text


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert len(outcome.text.splitlines()) == 1, outcome.text
    for word in words:
        assert word in outcome.text
    assert outcome.peak_mb < MAX_REFUSAL_MB, outcome


def test_an_archive_that_unpacks_to_too_much_is_refused(server, tmp_path):
    bomb = tmp_path / "bomb.npz"
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 28, 28), np.uint8))
    header["shape"] = (9 * 10**8 // 784, 28, 28)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(10**6))
        archive.getinfo("arr_0.npy").file_size = 9 * 10**8  # as it says, whatever it holds
    assert bomb.stat().st_size < 0.01 * MAX_BYTES
    where = {"output_dir": tmp_path, "data_dir": MNIST}
    assert_refused(server.run("evaluate", where | {"images": bomb}), str(bomb), "MB")
    model = tmp_path / "bomb.pth"
    shutil.copy(bomb, model)
    assert_refused(server.run("generate", {"model": model, "digits": 7}), str(model), "MB")


def test_flags_that_ask_for_too_much_are_refused(server, flags, tmp_path):
    for name, value in (
        ("preview_columns", 3_000_000),
        ("batch_size", 10**12),
        ("img_size", 2_147_483_648),
        ("lr", "1e308"),
        ("budget", "9" * 400 + "h"),
        ("blocks", "9" * 310),
        ("widths", ",".join(["8"] * 1000)),
        ("seed", "9" * 5000),
        ("device", "meta"),
        ("device", "hpu"),
        ("epochs", "nan"),
    ):
        outcome = server.run("train", flags | {"output_dir": tmp_path / "out", name: value})
        assert_refused(outcome, "learning_rate" if name == "lr" else name)
    assert list(tmp_path.iterdir()) == []


def test_a_long_animation_is_thinned(server, tmp_path):
    shutil.copytree(REPO / "results" / "models", tmp_path / "models")
    output = tmp_path / "a.gif"
    flags = {"digits": 7, "count": 2, "sampler": "ddim", "steps": 300, "guidance": 1}
    outcome = server.run("generate", flags | {"output": output, "output_dir": tmp_path})
    assert outcome.code == 0, outcome
    from PIL import Image

    with Image.open(output) as animation:
        assert 70 <= animation.n_frames <= 76
        assert animation.info["duration"] == 20


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\nshowpage\n"


def test_no_file_starts_a_program(run, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    for ending in (".png", ".eps"):
        (tmp_path / f"a{ending}").write_bytes(EPS)
        result = run("generate.py", reproduce=tmp_path / f"a{ending}")
        assert result.code == 2
        assert "not a PNG that generate.py wrote" in result.err
    assert started == []


# ---- what training can do without never ends it


def test_side_outputs_never_end_a_run(run, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no room")

    for name in (
        "interface.folder.write_metrics",
        "interface.previews.save_png",
        "conftest.draw_no_curves",  # which `run` takes for plot_training
    ):
        monkeypatch.setattr(name, fail)
    result = run("train.py", **TINY, epochs=2, save_every=1, output_dir=tmp_path)
    assert result.code == 0, result
    for name in ("metrics.csv", "samples_epoch_1.png", "training.png"):
        assert result.out.count(f"{name} not written: no room") == 1  # of each kind
    assert checkpoint.load(tmp_path / "models" / "model_epoch_2.pth")


NOTEBOOK = "module://matplotlib_inline.backend_inline"
STREAMS = {  # what is wrong with the streams and their surroundings: in the shell, in variables
    "no reader": ("| true", {"PYTHONIOENCODING": "ascii", "MPLBACKEND": NOTEBOOK}),
    "closed": ("<&- >&- 2>&-", {"MPLBACKEND": "unknown"}),
    "ASCII": ("", {"PYTHONIOENCODING": "ascii"}),
}


def test_nothing_that_is_printed_ends_a_run(flags, tmp_path):
    started = {}
    for fault, (redirected, variables) in STREAMS.items():
        out = tmp_path / fault / "汉字"
        words = ["python3", "train.py", *as_words(flags | {"output_dir": out})]
        command = ["bash", "-c", f'set -o pipefail; "$@" {redirected}', "bash", *words]
        command[4] = sys.executable
        environment = os.environ | {"PYTHONUTF8": "1"} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started[out] = subprocess.Popen(command, cwd=REPO, env=environment, **pipes)
    for out, process in started.items():
        text = process.communicate()[0].decode()
        assert process.returncode == 0, text
        assert "Traceback" not in text
        assert checkpoint.load(out / "models" / "model_epoch_2.pth")
        assert (out / "images" / "training.png").exists()


@pytest.mark.long
def test_memory_and_open_files_stay_flat(server, flags, tmp_path):
    flags = flags | {"batch_size": 96}
    short, long = (
        server.run(
            "train", flags | {"epochs": n, "save_every": 50, "output_dir": tmp_path / str(n)}
        )
        for n in (100, 2000)
    )
    assert (short.code, long.code) == (0, 0), long.text[-1000:]
    assert long.peak_mb < 1.05 * short.peak_mb
    assert long.open_files == short.open_files
