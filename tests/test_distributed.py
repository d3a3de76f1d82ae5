"""Several processes train one model: as one process would, whatever happens to one of them."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, Server, as_words, assert_one_line, assert_same, unix
from PIL import Image

import checkpoint
from config import Config
from interface import folder
from system import distributed
from system.machine import check_step

# 33 images are not a multiple of 2 processes
FLAGS = TINY | {
    "widths": "8,8",
    "precision": "float32",
    "batch_size": 33,
    "max_images": 300,
    "epochs": 5,
    "save_every": 2,
}

pytestmark = unix


def torchrun(script: str, flags: dict, *options: str, processes: int = 2) -> subprocess.Popen:
    """Start a script in several processes; stdout and stderr come as one text."""
    how = [f"--nproc_per_node={processes}", *(options or ["--standalone"])]
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(REPO / script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *as_words(flags)], env=environment, **pipes)


def start_processes(server: Server, script: str, flags: dict, count: int = 2) -> list[int]:
    """Start a script in several processes, without torchrun, which takes long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        server.start(script, flags, environment=told | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(count))
    ]


def in_processes(server: Server, script: str, flags: dict, count: int = 2) -> tuple[int, str]:
    """Run a script in several processes. Returns their exit code and all that they said."""
    outcomes = [server.wait(pid) for pid in start_processes(server, script, flags, count)]
    assert len({each.code for each in outcomes}) == 1, outcomes
    return outcomes[0].code, "".join(each.text for each in outcomes)


def finished(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == (code == 0), out
    return out


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def newest(out: Path) -> Path:
    return folder.newest_of_run(out / "models")


def losses(out: Path) -> list[float]:
    with open(out / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found}
    return [pid for pid, command in commands.items() if "train.py" in command]


@pytest.fixture(scope="module")
def pair(server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two processes."""
    out = tmp_path_factory.mktemp("pair")
    code, said = in_processes(server, "train", FLAGS | {"output_dir": out})
    assert code == 0, said
    assert "2 processes (cpu)" in said
    assert said.count("epoch 5: loss") == 1  # only one of them speaks
    return out


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the first of two processes."""
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "LOCAL_RANK": 0}
    for name, value in (told | {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}).items():
        monkeypatch.setenv(name, str(value))


def assert_close(out: Path, reference: Path) -> None:
    """Two runs differ by no more than the order in which they add up."""
    np.testing.assert_allclose(losses(out), losses(reference), rtol=1e-4)
    a, b = (checkpoint.load(newest(each)) for each in (out, reference))
    assert a.keys() == b.keys()
    assert a["progress"]["step"] == b["progress"]["step"] == 45
    one, other = (torch.cat([w.flatten() for w in each["ema"].values()]) for each in (a, b))
    assert (one - other).norm() < 1e-3 * one.norm(), (one - other).norm() / one.norm()
    grids = [
        np.asarray(Image.open(each / "images" / "samples_epoch_5.png")) for each in (out, reference)
    ]
    assert (np.abs(grids[0].astype(int) - grids[1]) > 2).mean() < 0.002


def test_processes_train_as_one(run, pair, tmp_path):
    """45 steps by two processes, by one, and by one that divides each batch into four parts."""
    for name, flags in {"one": {}, "parts": {"accumulate": 4}}.items():
        assert run("train.py", **FLAGS, **flags, output_dir=tmp_path / name).code == 0
        assert_close(tmp_path / name, pair)


def test_sigterm_stops_all_at_one_step_and_one_process_goes_on(run, server, pair, tmp_path):
    pids = start_processes(server, "train", FLAGS | {"output_dir": tmp_path})
    server.wait_for_text(pids[0], r"wrote .*samples_epoch_2\.png")
    os.kill(pids[1], signal.SIGTERM)  # torchrun tells all of them, one after the other
    os.kill(pids[0], signal.SIGTERM)
    outcomes = [server.wait(pid) for pid in pids]
    assert [each.code for each in outcomes] == [143, 143], outcomes
    assert "stopped at epoch" in outcomes[0].text
    assert newest(tmp_path).name != "model_epoch_5.pth"
    again = run("train.py", resume=True, output_dir=tmp_path, data_dir=FLAGS["data_dir"])
    assert "training from epoch" in again.out
    assert "from epoch 0" not in again.out
    assert_close(tmp_path, pair)


def test_two_processes_go_on_where_one_stopped(run, server, tmp_path):
    flags = FLAGS | {"output_dir": tmp_path}
    assert run("train.py", **(flags | {"epochs": 2})).code == 0
    code, said = in_processes(server, "train", flags | {"resume": True, "epochs": 3})
    assert code == 0, said
    assert "training from epoch 2 " in said
    assert len(losses(tmp_path)) == 3


def test_a_run_of_three_processes_resumes_to_the_same_bits(server, tmp_path):
    """Where the order in which three gradients are added could change."""
    flags = FLAGS | {"epochs": 3, "save_every": 1, "output_dir": tmp_path}
    ends = []
    for resume in (False, True):
        more = {"resume": True} if resume else {}
        code, said = in_processes(server, "train", flags | more, count=3)
        assert code == 0, said
        ends.append((checkpoint.load(newest(tmp_path)), losses(tmp_path)))
        newest(tmp_path).unlink()
    for part in ("model", "ema", "optimizers"):
        assert_same(ends[0][0][part], ends[1][0][part])
    assert ends[0][1] == ends[1][1]


def test_a_killed_process_is_started_again(pair, tmp_path):
    """torchrun --max-restarts goes on from the newest checkpoint of the same run, not of an earlier
    one, and ends with the bits of a run that nothing disturbed."""
    (tmp_path / "models").mkdir()
    earlier = tmp_path / "models" / "model_epoch_5.pth"
    earlier.write_bytes(newest(pair).read_bytes())
    process = torchrun(
        "train.py", FLAGS | {"output_dir": tmp_path}, "--standalone", "--max-restarts=1"
    )
    wait_for(tmp_path / "images" / "samples_epoch_2.png", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    out = finished(process)
    assert "training from epoch 2 " in out
    assert "exitcode: -9" in out
    states = [checkpoint.load(newest(each)) for each in (tmp_path, pair)]
    for name in ("model", "ema", "guide", "optimizers"):
        assert_same(states[0][name], states[1][name])
    grid = Path("images", "samples_epoch_5.png")
    assert (tmp_path / grid).read_bytes() == (pair / grid).read_bytes()


def test_a_run_that_dies_before_it_begins_does_not_continue_an_earlier_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.is_restart()
    assert not folder.holds_this_run(str(tmp_path))
    (tmp_path / ".run").write_text("another")
    assert not folder.holds_this_run(str(tmp_path))
    (tmp_path / ".run").write_text(distributed.run_id())
    assert not folder.holds_this_run(str(tmp_path))  # it has not saved anything yet
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model_epoch_1.pth").write_text("")
    assert folder.holds_this_run(str(tmp_path))


def test_a_killed_process_ends_the_run(server, tmp_path):
    pids = start_processes(server, "train", FLAGS | {"output_dir": tmp_path, "epochs": 500})
    server.wait_for_text(pids[0], r"wrote .*samples_epoch_2\.png")
    os.kill(pids[0], signal.SIGKILL)
    outcomes = [server.wait(pid) for pid in pids]
    assert [each.code for each in outcomes] == [-9, 1]
    assert "process 1: lost the connection to another process" in outcomes[1].text


def test_a_budget_is_one_clock(server, tmp_path):
    flags = FLAGS | {"output_dir": tmp_path, "budget": "2.5s"}
    del flags["epochs"]
    code, said = in_processes(server, "train", flags)
    assert code == 0, said
    assert f"wrote {newest(tmp_path)}" in said
    assert 2.5 <= checkpoint.load(newest(tmp_path))["progress"]["seconds"] < 6


def test_a_mistake_is_one_line(server, tmp_path):
    code, out = in_processes(server, "train", FLAGS | {"output_dir": tmp_path / "x", "lr": -1})
    assert code == 2
    message = "train.py, process 0: learning_rate = -1.0: must be greater than 0"
    assert out.count("learning_rate") == out.count(message) == 1
    assert not (tmp_path / "x" / "models").exists()


def test_processes_without_a_gpu_or_an_image_each(run, two_processes, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    reasons = {"cuda": "2 processes on this machine, but 1 GPUs", "cuda:1": "each process a GPU"}
    for device, reason in reasons.items():
        assert_one_line(run("train.py", device=device, output_dir=tmp_path), device, reason)
    with pytest.raises(ValueError, match="batch_size = 1: cannot be divided among 2 parts"):
        check_step(Config(batch_size=1), torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size = 7: cannot be divided among 8 parts"):
        check_step(Config(batch_size=7, accumulate=4), torch.device("cpu"))


def test_a_folder_in_use_ends_all(server, tmp_path):
    with folder.own_folder(str(tmp_path)):
        code, out = in_processes(server, "train", FLAGS | {"output_dir": tmp_path})
    assert code == 2
    assert out.count("is training there; wait for it, or choose another --output_dir") == 1


def test_processes_draw_the_same_images(run, server, pair, tmp_path):
    """An .npz and a folder have the same bytes whether one or two processes draw."""
    flags = {"model": newest(pair), "device": "cpu", "sample_batch_size": 4, "seed": 3, "steps": 2}
    for name, what in {"a.npz": "mnist", "folder/": "7"}.items():
        asked = flags | {"digits": what, "count": 1 if what != "mnist" else 30}
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        for path in (one, two):
            path.parent.mkdir(parents=True, exist_ok=True)
        slash = "/" if name.endswith("/") else ""
        alone = run("generate.py", **asked, output=f"{one}{slash}")
        code, out = in_processes(server, "generate", asked | {"output": f"{two}{slash}"})
        assert code == 0, out
        assert alone.code == 0, alone
        assert len(alone.out.splitlines()) == (asked["count"] if slash else 1)
        for line in alone.out.splitlines():
            other = line.replace(str(tmp_path / "one"), str(tmp_path / "two"))
            assert other in out
            assert Path(line).read_bytes() == Path(other).read_bytes()


@pytest.mark.long
def test_processes_evaluate_the_same_images(run, tmp_path):
    model = REPO / "results" / "models" / "student.pth"
    flags = {"model": model, "samples": 150, "sample_batch_size": 40, "device": "cpu"}
    flags |= {"data_dir": FLAGS["data_dir"]}
    assert run("evaluate.py", **flags, output_dir=tmp_path / "one").code == 0
    finished(torchrun("evaluate.py", flags | {"output_dir": tmp_path / "two"}))
    one, two = (
        json.loads(next((tmp_path / name / "metrics").glob("*.json")).read_text())
        for name in ("one", "two")
    )
    assert one["samples"] == two["samples"]


def test_what_the_first_process_does_may_ask_for_what_the_first_does(monkeypatch):
    """The others wait for one answer, not for two."""
    sent = []
    monkeypatch.setattr(distributed, "is_joined", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", sent.append)
    inner = lambda: distributed.from_first(lambda: 7)  # noqa: E731
    assert distributed.from_first(lambda: inner() + 1) == 8
    assert sent == [[True, 8]]


def test_several_processes_do_not_ask(run, two_processes):
    assert_one_line(run("generate.py"), "--digits")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("parts_each", [1, 4])
def test_parts_cover_all_in_order(monkeypatch, processes, parts_each):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found, sizes = [], []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        for part in distributed.my_parts(100, parts_each):
            found += range(100)[part]
            sizes.append(part.stop - part.start)
    assert found == list(range(100))
    assert len(sizes) == processes * parts_each
    assert max(sizes) - min(sizes) <= 1
