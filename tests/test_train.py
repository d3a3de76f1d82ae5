"""train.py through its command line, on a slice of the real data set."""

import contextlib
import csv
import math
import os
import re
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MNIST,
    TINY,
    TINY_MODEL,
    assert_one_line,
    assert_same,
    start_script,
    unix,
)
from PIL import Image

import checkpoint
import export
import train
from checkpoint import TrainState
from config import Config
from data import load_split, to_model_range
from diffusion import Diffusion
from interface.folder import newest_of_run
from interface.models import list_checkpoints
from interface.runs import Run
from levels import GreyLevels
from pipeline import Pipeline
from system.randomness import seeded_generator

if os.name != "nt":
    import pty
    import termios


def metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def state(path: Path) -> dict:
    """What two runs that are the same must share: all but the clock."""
    contents = checkpoint.load(path)
    for clock in ("seconds", "budget_from"):
        del contents["progress"][clock]
    del contents["metrics"]["seconds"], contents["config"]["output_dir"]
    return contents


def losses(folder: Path) -> list[tuple[str, ...]]:
    names = ("epoch", "step", "loss", "learning_rate", "grad_norm")
    return [tuple(row[name] for name in names) for row in metrics(folder)]


FOUR_EPOCHS = TINY | {"epochs": 4, "save_every": 2}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    """The results of four epochs that nothing interrupted; tests read it and do not write."""
    out = tmp_path_factory.mktemp("whole")
    outcome = server.run("train", FOUR_EPOCHS | {"output_dir": out})
    assert outcome.code == 0, outcome
    (out / "output.txt").write_text(outcome.text)
    return out


def test_a_run_writes_models_grids_and_metrics_and_names_them(whole):
    output = (whole / "output.txt").read_text()
    for epoch in (2, 4):
        assert f"wrote {whole / 'models' / f'model_epoch_{epoch}.pth'}" in output
        assert f"wrote {whole / 'images' / f'samples_epoch_{epoch}.png'}" in output
        grid = np.asarray(Image.open(whole / "images" / f"samples_epoch_{epoch}.png"))
        assert grid.shape == (10 * 30 + 2, 2 * 30 + 2)  # a row a digit, 2 columns
    names = [p.name for p in whole.glob("models/*")]
    assert sorted(names) == ["model_epoch_2.pth", "model_epoch_4.pth"]
    assert f"wrote {whole / 'images' / 'training.png'}" in output
    assert Image.open(whole / "images" / "training.png").width > 300
    rows = metrics(whole)
    assert [float(r["epoch"]) for r in rows] == [1, 2, 3, 4]
    assert [int(r["step"]) for r in rows] == [10, 20, 30, 40]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert all(float(r["images_per_second"]) > 0 and float(r["grad_norm"]) > 0 for r in rows)
    seconds = [float(r["seconds"]) for r in rows]
    assert seconds == sorted(seconds)


def test_resuming_from_an_epochs_end_gives_the_same_bits(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "model_epoch_4.pth").unlink()
    result = run("train.py", **TINY, epochs=4, resume=True, output_dir=tmp_path)
    assert result.code == 0
    assert_same(
        state(tmp_path / "models/model_epoch_4.pth"), state(whole / "models/model_epoch_4.pth")
    )
    assert losses(tmp_path) == losses(whole)
    for file in ("images/samples_epoch_4.png", "models/model_epoch_2.pth"):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()
    assert not list(tmp_path.glob("earlier/*/*.pth"))


LONG = TINY | {"max_images": 960, "epochs": 2, "save_every": 1}  # 30 steps an epoch


@unix
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_an_interrupted_run_resumes_to_the_same_bits(whole, server, tmp_path, run, name, code):
    """The signals inside the third epoch, with the step that is under way; the kill before it."""
    flags = FOUR_EPOCHS | {"output_dir": tmp_path}
    stopped = server.run("train", flags, kind=f"{name} at step", number=25)
    assert stopped.code == code, stopped
    newest = newest_of_run(tmp_path / "models")
    began = "epoch 2 (step 20)"
    if name != "SIGKILL":
        began = "epoch 2 and 160 images (step 25)"
        assert f"wrote {newest}" in stopped.text
        going_on = stopped.text[stopped.text.index("python train.py --resume") :]
        assert f"--output_dir {tmp_path}" in going_on
        assert "--device cpu" in going_on  # a checkpoint does not bring it along
    result = run("train.py", **flags, resume=True)
    assert result.code == 0, result
    assert f"training from {began} " in result.out
    last = "models/model_epoch_4.pth"
    assert_same(state(tmp_path / last), state(whole / last))
    assert losses(tmp_path) == losses(whole)


def test_resume_with_nothing_to_resume_starts_from_scratch_and_says_so(whole, tmp_path, run):
    result = run("train.py", **FOUR_EPOCHS, resume=True, output_dir=tmp_path)
    assert result.code == 0
    assert "starting from scratch" in result.out
    assert_same(
        state(tmp_path / "models/model_epoch_4.pth"), state(whole / "models/model_epoch_4.pth")
    )


def test_resume_after_the_end_has_nothing_to_do(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = run("train.py", resume=True, output_dir=tmp_path)
    assert result.code == 0
    assert "nothing left to do" in result.out
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_budget_that_starting_up_would_overrun_is_done(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "models" / "model_epoch_4.pth"
    contents = checkpoint.load(path)
    contents["config"]["budget"], contents["progress"]["seconds"] = "10m", 599.99
    torch.save(contents, path)
    before = path.read_bytes()
    result = run("train.py", **TINY, resume=True, output_dir=tmp_path)
    assert result.code == 0, result
    assert "nothing left to do" in result.out
    assert path.read_bytes() == before


def test_resuming_with_more_epochs_extends_the_plan(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    result = run("train.py", **TINY, resume=True, epochs=5, output_dir=tmp_path)
    assert result.code == 0
    assert "epochs = 5 (the checkpoint had 4)" in result.out
    assert newest_of_run(tmp_path / "models").name == "model_epoch_5.pth"


def test_a_checkpoint_alone_is_described_and_not_trained(whole, run):
    path = whole / "models" / "model_epoch_2.pth"
    result = run("train.py", load_checkpoint_path=path)
    assert result.code == 0
    going_on = ("--continue_training_epochs K", f"--output_dir {whole}", "--device cpu")
    for words in ("epoch 2", "step 20", "4 epochs planned", *going_on):
        assert words in result.out
    assert "training from" not in result.out
    assert_one_line(run("train.py", load_checkpoint_path=path, tensorboard=True), "--tensorboard")


def test_what_to_type_next_bears_a_folder_with_a_space(run, tmp_path):
    folder = tmp_path / "my runs"
    assert run("train.py", **TINY, epochs=1, output_dir=folder).code == 0
    path = folder / "models" / "model_epoch_1.pth"
    result = run("train.py", load_checkpoint_path=path, output_dir=folder)
    command = result.out[result.out.index("python train.py") :].replace("epochs K", "epochs 1")
    assert run(*shlex.split(command)[1:], **TINY).code == 0
    assert (folder / "models" / "model_epoch_2.pth").exists()


def test_training_more_epochs_numbers_on_and_keeps_the_rest_aside(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    models = tmp_path / "models"
    settings = {"lr": 0.001, "weight_decay": 0.3, "muon_momentum": 0.8, "output_dir": tmp_path}
    start = {"load_checkpoint_path": models / "model_epoch_2.pth", "continue_training_epochs": 3}
    result = run("train.py", **TINY, **start, **settings)
    assert result.code == 0
    had = Config().learning_rate
    assert f"learning_rate = 0.001 (the checkpoint had {had})" in result.out
    muon, adamw = checkpoint.load(models / "model_epoch_5.pth")["optimizers"]
    assert muon["param_groups"][0]["momentum"] == 0.8
    assert muon["param_groups"][0]["weight_decay"] == 0.3
    assert adamw["param_groups"][0]["weight_decay"] == 0.3
    names = ["model_epoch_2.pth", "model_epoch_4.pth", "model_epoch_5.pth"]
    assert [p.name for p, _ in list_checkpoints(models)] == names
    assert [float(r["epoch"]) for r in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert all(float(r["learning_rate"]) <= 0.001 for r in metrics(tmp_path)[2:])
    moved = next((tmp_path / "earlier").iterdir())
    assert {p.name for p in moved.iterdir()} == {
        "metrics.csv",
        "model_epoch_2.pth",
        "model_epoch_4.pth",
        "samples_epoch_4.png",
        "training.png",
    }
    for name in ("model_epoch_2.pth", "model_epoch_4.pth"):  # the first is rewritten with its plan
        assert (moved / name).read_bytes() == (whole / "models" / name).read_bytes()


def test_a_second_run_from_scratch_overwrites_nothing(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "images" / "generated_4_001.png").write_bytes(b"mine")
    result = run("train.py", **TINY, epochs=1, output_dir=tmp_path)
    assert result.code == 0
    moved = next((tmp_path / "earlier").iterdir())
    assert f"kept in {moved}" in result.out
    assert {p.name for p in moved.iterdir()} == {
        "metrics.csv",
        "model_epoch_2.pth",
        "model_epoch_4.pth",
        "samples_epoch_2.png",
        "samples_epoch_4.png",
        "training.png",
    }
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model_epoch_1.pth"]
    assert len(metrics(tmp_path)) == 1
    assert (tmp_path / "images" / "generated_4_001.png").read_bytes() == b"mine"


def test_sampling_never_disturbs_training(whole, tmp_path, run):
    often = TINY | {"epochs": 4, "save_every": 1, "preview_digits": "12", "sampler": "ddpm"}
    assert run("train.py", **often, output_dir=tmp_path).code == 0
    last = "models/model_epoch_4.pth"
    assert_same(state(tmp_path / last)["model"], state(whole / last)["model"])
    assert Image.open(tmp_path / "images/samples_epoch_1.png").height == 2 * 30 + 2


@unix
def test_a_budget_ends_the_run_in_time_with_the_learning_rate_at_zero(server, tmp_path):
    began = time.perf_counter()
    flags = TINY | {"max_images": 0, "budget": "3s", "output_dir": tmp_path}
    outcome = server.run("train", flags)
    assert outcome.code == 0, outcome
    assert 3 < time.perf_counter() - began < 10  # the last grid and curves come after the 3 s
    rows = metrics(tmp_path)
    assert float(rows[-1]["learning_rate"]) < 0.05 * Config().learning_rate
    assert 2.9 < float(rows[-1]["seconds"]) < 5
    grid = newest_of_run(tmp_path / "models").stem.replace("model", "samples")
    assert (tmp_path / "images" / f"{grid}.png").exists()
    assert "for a budget of 3s" in outcome.text


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(
    whole, tmp_path, run
):
    path = whole / "models" / "model_epoch_2.pth"
    flags = TINY | {"load_checkpoint_path": path, "continue_training_epochs": 2}
    flags |= {"lr": 1e9, "warmup_steps": 0, "output_dir": tmp_path}
    result = run("train.py", **flags)
    assert result.code == 1
    message = result.err.strip().splitlines()[-1]
    assert re.search(r"no longer finite at step 2[2-9]", message)
    assert str(tmp_path / "models" / "model_epoch_2.pth") in message
    assert "--lr" in message
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model_epoch_2.pth"]


def test_a_network_that_cannot_be_compiled_sets_nothing_aside(run, tmp_path, monkeypatch):
    assert run("train.py", **TINY, epochs=1, output_dir=tmp_path).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def fail(*_: object) -> None:
        raise ValueError("no compiler here")

    monkeypatch.setattr(
        "train.compile_network", lambda network, graphs: network.register_forward_hook(fail)
    )
    result = run("train.py", **TINY, epochs=1, compile=True, output_dir=tmp_path)
    assert_one_line(result, "no compiler here")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_figures_that_are_not_finite_are_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.validation_loss", lambda *_: math.inf)
    result = run("train.py", **TINY, epochs=1, output_dir=tmp_path)
    assert result.code == 1
    assert "no longer finite at step 10; last good checkpoint: none yet" in result.err
    assert not (tmp_path / "metrics.csv").exists()


@unix
@pytest.mark.parametrize("kind", ["models removed", "removed", "moved", "replaced"])
def test_a_folder_that_changes_during_a_run_costs_no_weights(run, tmp_path, monkeypatch, kind):
    out, other = tmp_path / "out", tmp_path / "other"
    for name in ("models/model_epoch_1.pth", "metrics.csv", ".lock", ".owner"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("theirs")
    log_epoch = Run.log_epoch

    def disturb(self: Run, validation: float) -> None:
        if self.state.progress.epoch == 0:
            if kind == "models removed":
                shutil.rmtree(out / "models")
            elif kind == "removed":
                shutil.rmtree(out)
            else:
                out.rename(tmp_path / "moved")
            if kind == "replaced":
                shutil.copytree(other, out)
        log_epoch(self, validation)

    monkeypatch.setattr(Run, "log_epoch", disturb)
    result = run("train.py", **TINY, epochs=2, save_every=1, output_dir=out)
    if kind == "models removed":
        assert result.code == 0, result
        assert (out / "models" / "model_epoch_2.pth").exists()
        return
    assert result.code == 2, result
    assert f"output_dir = '{out}': was moved, removed or replaced during the run" in result.err
    (saved,) = tmp_path.glob("out_*/models/model_epoch_1.pth")
    command = shlex.split(result.err.strip().splitlines()[-1].partition("to continue: ")[2])
    assert command[:2] == ["python", "train.py"]
    assert metrics(saved.parents[1])[0]["epoch"] == "1"
    if kind != "moved":
        found = [path for path in out.rglob("*") if path.is_file()]
        assert len(found) == (4 if kind == "replaced" else 0)
        assert all(path.read_text() == "theirs" for path in found)
        return
    monkeypatch.undo()
    assert run("train.py", *command[2:]).code == 0
    assert saved.with_name("model_epoch_2.pth").exists()
    assert [row["epoch"] for row in metrics(saved.parents[1])] == ["1", "2"]


@unix
def test_a_budget_from_a_checkpoint_counts_from_there(whole, server, tmp_path):
    path = whole / "models" / "model_epoch_4.pth"
    flags = TINY | {"load_checkpoint_path": path, "budget": "5s", "output_dir": tmp_path}
    outcome = server.run("train", flags)
    assert outcome.code == 0, outcome
    first, last = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert float(first["learning_rate"]) > float(last["learning_rate"])
    newest = newest_of_run(tmp_path / "models")
    progress = checkpoint.load(newest)["progress"]
    assert progress["budget_from"] == checkpoint.load(path)["progress"]["seconds"]
    assert progress["step"] > 40


@unix
def test_a_continuation_killed_before_its_first_save_keeps_its_plan(whole, server, tmp_path, run):
    path = whole / "models" / "model_epoch_4.pth"
    flags = TINY | {"max_images": 6400, "load_checkpoint_path": path}
    flags |= {"continue_training_epochs": 1, "output_dir": tmp_path}
    process = server.start("train", flags)
    server.wait_for_text(process, "wrote")  # its plan, before any step
    os.kill(process, signal.SIGKILL)
    server.wait(process)
    result = run("train.py", **TINY, resume=True, output_dir=tmp_path)
    assert result.code == 0, result
    assert newest_of_run(tmp_path / "models").name == "model_epoch_5.pth"


def test_metrics_cut_short_by_a_power_cut_do_not_stop_a_resume(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "model_epoch_4.pth").unlink()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("5,")
    assert run("train.py", **TINY, resume=True, output_dir=tmp_path).code == 0
    assert losses(tmp_path) == losses(whole)


def test_checkpoints_that_cannot_be_read_stop_a_resume(run, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model_epoch_3.pth").write_text("damaged")
    result = run("train.py", **TINY, resume=True, output_dir=tmp_path)
    assert_one_line(result, str(tmp_path / "models"), "can be read")


def test_a_checkpoint_for_sampling_alone_begins_a_new_run(whole, run, tmp_path):
    whole_file, path = whole / "models" / "model_epoch_4.pth", tmp_path / "small.pth"
    export.slim(whole_file, path)
    assert path.stat().st_size < 0.4 * whole_file.stat().st_size
    start = {"load_checkpoint_path": path, "continue_training_epochs": 1}
    assert (
        "a new run would begin with its weights" in run("train.py", load_checkpoint_path=path).out
    )
    result = run("train.py", **TINY, **start, output_dir=tmp_path, lr=1e-9)
    assert "training from epoch 0 (step 0) to epoch 1" in result.out
    begun, ended = (
        checkpoint.load(each)["ema"] for each in (path, newest_of_run(tmp_path / "models"))
    )
    for name, weight in ended.items():
        torch.testing.assert_close(weight, begun[name].float(), rtol=0, atol=1e-5)
    assert run("generate.py", digits=1, model=path, output_dir=tmp_path).code == 0
    begun = newest_of_run(tmp_path / "models")
    begun.unlink()
    export.slim(whole_file, begun)
    result = run("train.py", resume=True, epochs=9, output_dir=tmp_path, data_dir=MNIST)
    assert_one_line(result, "holds only what drawing needs")  # a resumed run does not begin anew


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"load_checkpoint_path": "nowhere.pth"}, ("nowhere.pth", "no such checkpoint")),
        ({"continue_training_epochs": 2}, ("--continue_training_epochs needs --load_checkpoint",)),
        ({"continue_training_epochs": -2}, ("--continue_training_epochs needs --load_checkpoint",)),
        (
            {"load_checkpoint_path": "a.pth", "continue_training_epochs": -2},
            ("continue_training_epochs = -2", "at least 0"),
        ),
        (
            {"resume": True, "load_checkpoint_path": "a.pth"},
            ("--load_checkpoint_path: not allowed with argument --resume",),
        ),
        ({"load_checkpoint_path": "a.pth", "epochs": 3}, ("--continue_training_epochs",)),
        ({"epochs": 3, "budget": "10m"}, ("--budget: not allowed with argument --epochs",)),
        (
            {"load_checkpoint_path": "a.pth", "continue_training_epochs": 1, "budget": "10m"},
            ("--budget: not allowed with argument --continue_training_epochs",),
        ),
        ({"budget": "10"}, ("budget = '10'", "10m")),
        (
            {"batch_size": 61_000, "widths": 8, "patch_size": 4},
            ("batch_size = 61000", "at most 60000"),
        ),
        ({"device": "gpu"}, ("device = 'gpu'", "auto")),
        ({"timesteps": 10}, (f"steps = {Config().steps}", "at most timesteps = 10")),
        ({"budget": "0.1s"}, ("budget = '0.1s'", "start-up alone takes longer")),
    ],
    ids=str,
)
def test_bad_input_is_one_line(flags, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run("train.py", data_dir=MNIST, **flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_flags_that_a_trained_model_cannot_take(whole, run):
    path = whole / "models" / "model_epoch_2.pth"
    flags = {"load_checkpoint_path": path, "continue_training_epochs": 1, "widths": "16,16"}
    result = run("train.py", **flags)
    assert_one_line(result, "widths = (16, 16)", "trained with (8,)")


def test_an_output_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("train.py", **TINY, epochs=1, output_dir=tmp_path / "file")
    assert_one_line(result, str(tmp_path / "file"))


def test_one_batch_is_overfitted():
    cfg = Config(widths=(16, 32), embedding_size=32, label_dropout=0.0, guide_fraction=0.0)
    cfg = replace(cfg, warmup_steps=0, precision="float32", steps=20, guidance=1.0)
    diffusion, y = Diffusion(cfg), torch.arange(8)
    state = TrainState.initial(cfg, torch.device("cpu"))
    pixels = torch.randint(0, 256, (8, 1, 7, 7), generator=seeded_generator(0), dtype=torch.uint8)
    x_0 = to_model_range(pixels.repeat_interleave(4, 2).repeat_interleave(4, 3))
    losses = []
    for _ in range(80):
        # Each image several times, so that a step sees it at several timesteps
        state.totals.zero_()
        train.training_step(cfg, diffusion.loss, state, x_0.repeat(4, 1, 1, 1), y.repeat(4), 0.0)
        losses.append(float(state.totals[0]))
    assert losses[-1] < 0.02 * losses[0]
    drawn = Pipeline(cfg, state.model.eval()).draw(y)
    nearest = (drawn[:, None] - x_0[None]).square().mean(dim=(2, 3, 4)).argmin(dim=1)
    assert torch.equal(nearest, y)  # each label now draws its own image


def test_a_step_counts_itself_its_images_its_loss_and_its_gradient():
    cfg = Config(widths=(8, 8), embedding_size=8, warmup_steps=3, learning_rate=1.0, grad_clip=0.1)
    state = TrainState.initial(cfg, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    x_0 = torch.rand(4, 1, 28, 28)
    train.training_step(cfg, Diffusion(cfg).loss, state, x_0, torch.arange(4), 0.0)
    assert (state.progress.step, state.progress.images, state.progress.epoch) == (1, 4, 0)
    assert (state.totals > 0).all()
    rates = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
    assert rates == [0.25, 0.25]  # the first of the steps that lead up to the peak
    after = dict(state.model.state_dict())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert_same(dict(state.ema.state_dict()), after)  # the average over the one step so far
    assert state.guide is None


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    cfg = Config(batch_size=32, seed=3)
    images = torch.arange(96, dtype=torch.uint8)[:, None, None, None].expand(96, 1, 4, 4)
    labels = torch.arange(96)
    orders = []
    for seed, epoch in ((3, 0), (3, 1), (4, 0), (3, 0)):
        order = []
        for first in (0, 32, 64):
            progress = checkpoint.Progress(epoch=epoch, images=first)
            x_0, y = train.batch(replace(cfg, seed=seed), images, labels, progress)
            assert torch.equal(x_0, to_model_range(images[y]))
            order += y.tolist()
        assert sorted(order) == list(range(96))
        orders.append(order)
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


def test_the_learning_rate_rises_then_falls_to_zero():
    cfg = Config(learning_rate=1.0, warmup_steps=9)
    rates = [train.learning_rate(cfg, step, 0.0) for step in (0, 4, 9, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert train.learning_rate(cfg, 500, 0.325) == pytest.approx(0.75)
    assert train.learning_rate(cfg, 1000, 1.0) == 0


def test_the_learning_rate_reaches_zero_for_the_guide_and_starts_again_from_its_peak():
    cfg = Config(learning_rate=1.0, warmup_steps=0, guide_fraction=0.2)
    fractions = (0.0, 0.1, 0.2, 0.4, 1.0)
    making = [train.learning_rate(cfg, 500, f, making_guide=True) for f in fractions]
    assert making == pytest.approx([1, 0.5, 0, 0, 0])
    after = [train.learning_rate(cfg, 500, f) for f in fractions]
    assert after == pytest.approx([1, 1, 1, 0.75, 0])


def test_as_many_labels_are_randomized_as_asked():
    y = torch.arange(10_000) % 10
    noisy = train.randomize_labels(y, Config(guide_label_noise=0.3), seeded_generator(0))
    assert (noisy != y).float().mean().item() == pytest.approx(0.3 * 9 / 10, abs=0.015)
    assert noisy.bincount(minlength=10).min() > 900
    none = train.randomize_labels(y, Config(guide_label_noise=0.0), seeded_generator(0))
    assert torch.equal(none, y)


def test_labels_are_randomized_until_the_guide_is_made_and_the_guide_draws_the_preview(
    run, tmp_path, monkeypatch
):
    seen, networks = [], []
    loss, guided = Diffusion.loss, Diffusion.guided

    def recorded_loss(self, model, x_0, y, *rest):
        if torch.is_grad_enabled():  # in training, not for the validation loss
            seen.append(y)
        return loss(self, model, x_0, y, *rest)

    def recorded_guided(self, model, guide=None):
        networks.extend([model, guide])
        return guided(self, model, guide)

    monkeypatch.setattr(Diffusion, "loss", recorded_loss)
    monkeypatch.setattr(Diffusion, "guided", recorded_guided)
    flags = TINY | {"epochs": 1, "guide_fraction": 0.5, "guide_label_noise": 1}
    assert run("train.py", **flags, output_dir=tmp_path).code == 0
    labels = load_split(Config(data_dir=MNIST, max_images=320), True, torch.device("cpu"))[1]
    order = torch.randperm(320, generator=seeded_generator(0, train.ORDER_STREAM, 0))
    right = [(a == b).float().mean() for a, b in zip(seen, labels[order].split(32), strict=True)]
    assert torch.stack(right[:5]).mean() < 0.25
    assert right[5:] == [1.0] * 5
    saved = checkpoint.load(tmp_path / "models/model_epoch_1.pth")
    for network, name in zip(networks[-2:], ("ema", "guide"), strict=True):
        assert_same(dict(network.state_dict()), dict(saved[name]))
        # An average that tracked gradients would keep every step's weights in memory
        assert not any(p.requires_grad for p in network.parameters())


def test_a_run_shorter_than_its_warm_up_makes_its_guide_in_time(run, tmp_path):
    """As one on a few dozen pictures of the user's: a tenth of it is warm-up, not all of it."""
    flags = TINY | {"epochs": 2, "warmup_steps": 100, "output_dir": tmp_path}
    result = run("train.py", **flags)
    assert "--guidance" not in result.out
    cfg = Config.from_dict(checkpoint.load(tmp_path / "models/model_epoch_2.pth")["config"])
    warm = [train.warmup(cfg, step, step / 20) for step in range(20)]  # 320 images, 32 a step
    assert warm == [1 / 101, 0.5, *[1.0] * 18]
    in_a_budget = train.warmup(replace(cfg, budget="1m"), 9, 0.9)  # starting up counts in it
    assert in_a_budget == 10 / 101


def test_a_run_without_a_guide_says_how_to_draw(run, tmp_path):
    flags = TINY | {"epochs": 1, "guide_fraction": 0, "output_dir": tmp_path}
    assert "--guidance 1.5 " in run("train.py", **flags).out  # 2.8 is for models with a guide
    result = run("train.py", **flags, label_dropout=0)
    assert_one_line(result, "guidance = 2.8", "label_dropout = 0", "set guidance to 1")
    result = run("train.py", **flags, label_dropout=0, guidance=1)
    assert "--guidance 1 " in result.out  # it never learned to do without the label
    drawn = run("generate.py", digits=1, count=1, output_dir=tmp_path, guidance=2)
    assert_one_line(drawn, "guidance = 2", "cannot draw without a label", "set guidance to 1")


def test_the_guide_is_the_average_at_its_fraction_of_the_run(whole, run, tmp_path):
    contents = [checkpoint.load(whole / f"models/model_epoch_{epoch}.pth") for epoch in (2, 4)]
    assert_same(contents[0]["guide"], contents[1]["guide"])  # made after 0.4 epochs, and kept
    assert not torch.equal(contents[1]["guide"]["stem.weight"], contents[1]["ema"]["stem.weight"])

    flags = TINY | {"epochs": 4, "save_every": 1, "output_dir": tmp_path}
    assert run("train.py", **flags, guide_fraction=0.5).code == 0
    paths = [tmp_path / f"models/model_epoch_{epoch}.pth" for epoch in (1, 2, 3, 4)]
    first, second, _, last = map(checkpoint.load, paths)
    assert first["guide"] is None
    assert_same(second["guide"], second["ema"])
    assert_same(last["guide"], second["ema"])
    for path in paths[1:]:  # the same again, resumed from before the guide
        path.unlink()
    straight = last["guide"], last["model"]
    assert run("train.py", **flags, guide_fraction=0.5, resume=True).code == 0
    last = checkpoint.load(paths[-1])
    assert_same((last["guide"], last["model"]), straight)

    assert run("train.py", **flags, guide_fraction=0).code == 0
    assert checkpoint.load(paths[-1])["guide"] is None
    drawn = run("generate.py", digits=3, count=2, output_dir=tmp_path)
    assert drawn.code == 0  # guidance then drops the label


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.20])
def test_the_width_of_the_weight_average_is_the_asked_fraction_of_any_run(sigma_rel):
    exponent = train.ema_gamma(sigma_rel) + 1
    for steps in (500, 4000):
        weights = np.zeros(steps)
        for k in range(1, steps + 1):
            decay = (1 - 1 / k) ** exponent
            weights *= decay
            weights[k - 1] = 1 - decay
        at = np.arange(1, steps + 1)
        mean = (weights * at).sum()
        width = math.sqrt((weights * (at - mean) ** 2).sum())
        assert weights.sum() == pytest.approx(1)
        assert width / steps == pytest.approx(sigma_rel, rel=0.03)


def shown_in_a_terminal(flags: dict[str, object], stop_at: bytes = b"") -> tuple[int, str]:
    """The exit code and all that a terminal of 100 columns is sent by train.py, which gets a
    SIGINT as soon as it has shown `stop_at`."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    streams = dict.fromkeys(("stdout", "stderr", "stdin"), terminal)
    process = start_script("train.py", flags, **streams)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
        while chunk := os.read(screen, 4096):
            shown += chunk
            if stop_at and stop_at in shown:
                process.send_signal(signal.SIGINT)
                stop_at = b""
    return process.wait(), shown.decode()


@unix
def test_the_progress_bar_shows_loss_speed_and_time_left(tmp_path):
    code, text = shown_in_a_terminal(LONG | {"epochs": 1, "output_dir": tmp_path})
    assert code == 0, text
    assert re.search(r"epoch 1/1: +\d+%.*images/s, loss 0\.\d+, 0m\d\ds left", text), text


@unix
def test_a_stop_clears_the_progress_bar_before_it_says_how_to_continue(tmp_path):
    code, text = shown_in_a_terminal(LONG | {"output_dir": tmp_path}, stop_at=b"loss 0.")
    assert code == 130, text
    said = text[text.index("wrote ") :]
    assert "epoch 1/2" not in said  # no bar is drawn again below the message
    assert re.search(r"[\r\n]stopped at epoch 0 and", said), said


def test_other_data_is_noticed_and_refused_inside_an_epoch(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "models" / "model_epoch_4.pth").unlink()
    fewer = TINY | {"max_images": 256, "output_dir": tmp_path}
    result = run("train.py", **fewer, resume=True)
    assert result.code == 0
    assert "was trained on other data than these 256 images; continuing with these" in result.out
    contents = checkpoint.load(tmp_path / "models" / "model_epoch_4.pth")
    assert contents["data"]["images"] == 256
    contents["progress"] |= {"images": 64, "step": 40}
    contents["config"]["epochs"] = 6
    contents["data"]["sha256"] = "that of other images"
    for path in (tmp_path / "models").iterdir():
        path.unlink()
    torch.save(contents, tmp_path / "models" / "model_epoch_4_step_40.pth")
    assert_one_line(run("train.py", **fewer, resume=True), "other data", "--data_dir")
    del contents["data"]  # as older checkpoints are: what is certain is refused, too
    contents["progress"]["images"] = 288
    torch.save(contents, tmp_path / "models" / "model_epoch_4_step_40.pth")
    assert_one_line(run("train.py", **fewer, resume=True), "more than 256 images")


def test_until_there_is_a_guide_grids_are_drawn_without_guidance(run, tmp_path):
    flags = TINY | {"epochs": 3, "save_every": 1, "guide_fraction": 0.5, "steps": 6}
    for guidance in (1, 3):
        out = tmp_path / str(guidance)
        assert run("train.py", **flags, guidance=guidance, output_dir=out).code == 0
    same = [
        len({(tmp_path / out / "images" / f"samples_epoch_{n}.png").read_bytes() for out in "13"})
        for n in (1, 2, 3)
    ]
    assert same == [1, 2, 2]


@unix
def test_a_stop_while_a_grid_is_drawn_saves_no_second_time(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_preview", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = run("train.py", **TINY, epochs=2, save_every=1, output_dir=tmp_path)
    assert result.code == 130
    assert "stopped at epoch 1 (step 10)" in result.out
    assert result.out.count(f"wrote {tmp_path / 'models' / 'model_epoch_1.pth'}") == 1


# ---- students


STUDENT = {name: value for name, value in TINY.items() if name not in (*TINY_MODEL, "steps")}


def test_a_student_learns_draws_in_few_calls_and_resumes_to_the_same_bits(whole, tmp_path, run):
    teacher, out = whole / "models" / "model_epoch_4.pth", tmp_path / "student"
    flags = STUDENT | {"teacher": teacher, "student_steps": 2, "epochs": 2, "save_every": 1}
    result = run("train.py", **flags, output_dir=out)
    assert result.code == 0, result
    cfg = Config.from_dict(checkpoint.load(out / "models" / "model_epoch_2.pth")["config"])
    assert (cfg.sampler, cfg.steps, cfg.guidance, cfg.eta) == ("ddim", 2, 1.0, 0.0)
    assert cfg.widths == (8,)
    shutil.copytree(out, tmp_path / "again")
    (tmp_path / "again" / "models" / "model_epoch_2.pth").unlink()
    result = run("train.py", **flags, output_dir=tmp_path / "again", resume=True)
    assert result.code == 0, result
    ends = [each / "models" / "model_epoch_2.pth" for each in (out, tmp_path / "again")]
    assert_same(*map(state, ends))
    shipped = out / "models" / "student.pth"
    shutil.move(ends[0], shipped)
    ends[1].unlink()
    (out / "models" / "model_epoch_1.pth").unlink()
    shutil.copy(teacher, out / "models" / "pretrained.pth")
    drawn = run("generate.py", digits=7, count=1, fast=True, output_dir=out)
    assert f"{shipped}: ddim, eta 0, 2 steps, guidance 1" in drawn.err
    shutil.copy(teacher, out / "models" / "mine.pth")
    drawn = run("generate.py", digits=7, count=1, fast=True, output_dir=out)
    assert "mine.pth: dpmpp, eta 0.3, 5 steps, guidance 4.2" in drawn.err


def test_a_student_begins_as_its_teacher(whole, tmp_path, run):
    teacher = whole / "models" / "model_epoch_4.pth"
    flags = STUDENT | {"teacher": teacher, "epochs": 1, "lr": 1e-12, "weight_decay": 0}
    assert run("train.py", **flags, output_dir=tmp_path).code == 0
    ends = (teacher, tmp_path / "models" / "model_epoch_1.pth")
    ours, theirs = (checkpoint.load(end)["ema"] for end in ends)
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], atol=1e-6), name


def test_a_teacher_that_its_students_run_moves_aside_is_found_again(whole, tmp_path, run):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    flags = STUDENT | {"teacher": "newest", "output_dir": tmp_path}
    assert run("train.py", **flags, epochs=1).code == 0
    assert [path.name for path in tmp_path.glob("models/*")] == ["model_epoch_1.pth"]
    assert run("train.py", **flags, epochs=2, resume=True).code == 0
    shutil.rmtree(tmp_path / "earlier")
    result = run("train.py", **flags, epochs=3, resume=True)
    assert_one_line(result, "teacher = 'newest'", "learned from", "put it into")


def test_a_reduced_student_goes_on_with_its_own_teacher_or_says_what_is_wrong(whole, tmp_path, run):
    teacher = Path(shutil.copy(whole / "models" / "model_epoch_4.pth", tmp_path / "teacher.pth"))
    out, small, old = tmp_path / "out", tmp_path / "small.pth", tmp_path / "old.pth"
    flags = STUDENT | {"output_dir": out}
    assert run("train.py", **flags, teacher=teacher, epochs=1).code == 0
    export.slim(out / "models" / "model_epoch_1.pth", small)
    torch.save(checkpoint.load(small) | {"data": None}, old)  # as earlier versions wrote them
    teacher.rename(out / "models" / "model_of_old.pth")
    go_on = flags | {"continue_training_epochs": 1}
    result = run("train.py", **go_on, load_checkpoint_path=old)
    assert_one_line(result, "teacher = 'teacher'", "no such model")
    shutil.copy(small, out / "models" / "teacher.pth")  # a student of as many calls
    result = run("train.py", **go_on, load_checkpoint_path=old)
    assert_one_line(result, "draws in 4 steps", "restore this student's own teacher")
    found = out / "models" / "model_of_old.pth"
    result = run("train.py", **go_on, load_checkpoint_path=small)
    assert result.code == 0, result
    assert f"training a student of {found}" in result.out
    export.slim(found, out / "models" / "smaller.pth")  # on another computer, where both were sent
    os.replace(out / "models" / "smaller.pth", out / "models" / "teacher.pth")
    found.unlink()
    result = run("train.py", **go_on, load_checkpoint_path=small)
    assert result.code == 0, result
    assert f"training a student of {out / 'models' / 'teacher.pth'}" in result.out


def test_a_teacher_in_the_usual_folder_is_found_again_from_another(
    whole, tmp_path, run, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "results")
    flags = STUDENT | {"teacher": "newest", "output_dir": "student"}
    assert run("train.py", **flags, epochs=1).code == 0  # which is the newest there from now on
    assert run("train.py", **flags, epochs=2, resume=True).code == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"teacher": "nothing"}, ("teacher = 'nothing'", "no such model")),
        ({"widths": "8,16"}, ("widths = (8, 16)", "a student of this teacher has (8,)")),
        ({"student_steps": 3}, ("student_steps = 3", "choose 1 or 2 or 4 or 8")),
        ({"guidance": 2}, ("guidance = 2.0", "a student of this teacher has 1.0")),
        ({"clip_x_0": False}, ("clip_x_0 = False", "a student of this teacher has True")),
        ({"batch_size": 3}, ("batch_size = 3", "at least 4")),
        ({"label_dropout": 0.5}, ("label_dropout = 0.5", "has no effect on a student")),
    ],
)
def test_flags_that_a_student_cannot_have_are_refused(whole, tmp_path, run, flags, words):
    teacher = {"teacher": whole / "models" / "model_epoch_4.pth"}
    result = run("train.py", **STUDENT | teacher | flags, epochs=1, output_dir=tmp_path / "out")
    assert_one_line(result, *words)


def test_a_student_keeps_its_teacher_and_its_number_of_steps(whole, tmp_path, run):
    flags = STUDENT | {"teacher": whole / "models" / "model_epoch_4.pth", "output_dir": tmp_path}
    assert run("train.py", **flags, epochs=1).code == 0
    other = flags | {"teacher": whole / "models" / "model_epoch_2.pth"}
    assert_one_line(run("train.py", **other, epochs=2, resume=True), "teacher", "drop the flag")
    del flags["teacher"]
    result = run("train.py", **flags, epochs=2, resume=True, guide_label_noise=0.9)
    assert_one_line(result, "guide_label_noise = 0.9", "has no effect on a student")
    result = run("train.py", **flags, epochs=2, resume=True, steps=2)
    assert_one_line(result, "steps = 2", "trained with 4", "drop the flag")
    model = tmp_path / "models" / "model_epoch_1.pth"
    result = run("generate.py", model=model, digits=7, guidance=2, output=tmp_path / "7.png")
    assert_one_line(result, "guidance = 2.0", "a student learned 1.0", "drop the flag")


def test_the_validation_loss_is_that_of_the_average_on_fixed_test_images(run, tmp_path):
    """Recomputed from the checkpoint and the data; the same for a run of other seeds of noise."""
    assert run("train.py", **TINY, epochs=1, output_dir=tmp_path, seed=4).code == 0
    written = float(metrics(tmp_path)[0]["validation_loss"])
    loaded = checkpoint.load_model(newest_of_run(tmp_path / "models"), torch.device("cpu"))
    images, labels = load_split(loaded.cfg, train=False, device=torch.device("cpu"))
    spread = slice(None, 5 * 2000, 2000)  # as many as a sixtieth of 320 training images
    x_0, y = to_model_range(images[spread]), labels[spread]
    generator = seeded_generator(4, train.VALIDATION_STREAM, 0)
    with torch.no_grad():
        expected = Diffusion(loaded.cfg).loss(loaded.model, x_0, y, generator)
    assert written == pytest.approx(float(expected), rel=1e-4)


def test_a_log_without_validation_losses_is_continued(run, tmp_path):
    """As older versions wrote it."""
    assert run("train.py", **TINY, epochs=1, output_dir=tmp_path, save_every=1).code == 0
    file = tmp_path / "metrics.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("".join(",".join(row[:3] + row[4:]) + "\n" for row in rows))
    assert run("train.py", **TINY, epochs=2, output_dir=tmp_path, resume=True).code == 0
    first, second = metrics(tmp_path)
    assert first["validation_loss"] == ""
    assert float(second["validation_loss"]) > 0
    assert (tmp_path / "images" / "training.png").exists()


def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(run, tmp_path, monkeypatch):
    save, saved = checkpoint.save, []

    def fails_later(path: Path, *rest: object) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise ValueError(f"{path}: cannot be written (the disk is full); free some space")
        save(path, *rest)

    monkeypatch.setattr(checkpoint, "save", fails_later)
    result = run("train.py", **TINY, epochs=3, save_every=1, output_dir=tmp_path)
    assert_one_line(result, str(saved[1]), "disk is full", f"last good checkpoint: {saved[0]}")


@unix
def test_a_signal_ends_a_preview_and_resuming_draws_it(run, tmp_path, monkeypatch):
    class Bar:
        def __enter__(self):
            return lambda number, x: os.kill(os.getpid(), signal.SIGINT) if number == 1 else None

        def __exit__(self, *error: object) -> None:
            pass

    flags = TINY | {"epochs": 2, "save_every": 1, "output_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr("interface.previews.sampling_bar", lambda *_: Bar())
        result = run("train.py", **flags)
    assert result.code == 130, result
    assert "stopped by a signal" in result.out
    grid = tmp_path / "images" / "samples_epoch_1.png"
    assert not grid.exists()
    result = run("train.py", **flags, resume=True)
    assert "training from epoch 1 " in result.out
    assert grid.exists()


def test_a_file_under_a_name_that_a_run_comes_to_use_is_kept_aside(run, tmp_path):
    """A copy of epoch 1 that is called model_epoch_2.pth, and its grid."""
    flags = TINY | {"save_every": 1, "output_dir": tmp_path}
    assert run("train.py", **flags, epochs=1).code == 0
    kept = {}
    for folder, name in (("models", "model_epoch_{}.pth"), ("images", "samples_epoch_{}.png")):
        start, copy = (tmp_path / folder / name.format(epoch) for epoch in (1, 2))
        kept[copy] = Path(shutil.copy(start, copy)).read_bytes()
    flags |= {"load_checkpoint_path": tmp_path / "models" / "model_epoch_1.pth"}
    result = run("train.py", **flags, continue_training_epochs=1)
    assert result.code == 0, result
    for path, before in kept.items():
        assert path.read_bytes() != before
        [aside] = tmp_path.glob(f"earlier/*/{path.name}")
        assert aside.read_bytes() == before
        assert f"is kept in {aside.parent}" in result.out


def test_the_grid_of_another_runs_checkpoint_is_drawn_as_that_run_would(run, tmp_path):
    flags = TINY | {"epochs": 2, "save_every": 2}
    assert run("train.py", **flags, output_dir=tmp_path / "a").code == 0
    other = flags | {
        "epochs": 1,
        "prediction": "eps",
        "widths": "16,16",
        "seed": 5,
        "save_every": 1,
    }
    assert run("train.py", **other, output_dir=tmp_path / "b").code == 0
    shutil.copy(tmp_path / "b" / "models" / "model_epoch_1.pth", tmp_path / "a" / "models")
    again = flags | {"resume": True, "output_dir": tmp_path / "a"}
    assert run("train.py", **again).code == 0
    drawn, theirs = (tmp_path / each / "images" / "samples_epoch_1.png" for each in "ab")
    assert drawn.read_bytes() == theirs.read_bytes()
    assert "nothing left to do" in run("train.py", **again).out


def test_the_validation_loss_is_the_mean_of_all_images_each_batch_with_its_own_noise():
    seeds = []

    def loss(model: object, x_0: torch.Tensor, y: torch.Tensor, generator, part) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return y.float().mean()

    images, labels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10)
    found = train.validation_loss(Config(batch_size=4), loss, None, images, labels)
    assert found == pytest.approx(4.5)
    assert len(set(seeds)) == 3


def test_the_logged_loss_and_speed_count_whole_batches_only(run, tmp_path, monkeypatch):
    def quarter(self, model: torch.nn.Module, *rest: object) -> torch.Tensor:
        return 0.25 + 0 * sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(Diffusion, "loss", quarter)
    flags = TINY | {"max_images": 300, "batch_size": 33, "output_dir": tmp_path}
    assert run("train.py", **flags, epochs=1).code == 0
    [row] = metrics(tmp_path)
    assert float(row["loss"]) == pytest.approx(0.25)
    assert row["epoch"] == "1"
    assert float(row["images_per_second"]) * float(row["seconds"]) > 297


def test_a_run_that_goes_on_in_another_folder_is_saved_there_at_once(whole, run, tmp_path):
    start = {"load_checkpoint_path": whole / "models" / "model_epoch_4.pth"}
    flags = TINY | start | {"continue_training_epochs": 1, "save_every": 1}
    assert run("train.py", **flags, output_dir=tmp_path).code == 0
    names = [path.name for path in sorted(tmp_path.glob("models/*"))]
    assert names == ["model_epoch_4.pth", "model_epoch_5.pth"]


def test_levels_and_grids_are_those_of_the_average_and_its_guide(run, tmp_path, monkeypatch):
    pairs, guided = [], Diffusion.guided

    def recorded(self, model: torch.nn.Module, guide: torch.nn.Module | None = None):
        pairs.append((model, guide))
        return guided(self, model, guide)

    monkeypatch.setattr(Diffusion, "guided", recorded)
    assert run("train.py", **TINY, epochs=1, output_dir=tmp_path).code == 0
    saved = checkpoint.load(tmp_path / "models" / "model_epoch_1.pth")
    assert len(pairs) == 2  # for the grey levels, and for the grid
    for model, guide in pairs:
        assert_same(dict(model.state_dict()), dict(saved["ema"]))
        assert_same(dict(guide.state_dict()), dict(saved["guide"]))


def test_levels_that_cannot_be_measured_are_not_those_of_an_earlier_save(
    run, tmp_path, monkeypatch
):
    of_model, calls = GreyLevels.of_model, []

    def once(*args: object) -> GreyLevels:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory")
        return of_model(*args)

    monkeypatch.setattr(GreyLevels, "of_model", once)
    assert run("train.py", **TINY, epochs=2, save_every=1, output_dir=tmp_path).code == 0
    paths = [tmp_path / "models" / f"model_epoch_{epoch}.pth" for epoch in (1, 2)]
    assert [checkpoint.load(path)["levels"] is not None for path in paths] == [True, False]
