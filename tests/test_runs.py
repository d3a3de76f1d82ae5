"""The run folder of train.py: what a run decides to do, what it keeps aside, what it logs."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_line, unix

import checkpoint
from checkpoint import Progress, TrainState
from config import Config
from interface import runs
from interface.runs import (
    METRICS,
    Plan,
    describe,
    fraction_done,
    make_plan,
    newest_of_run,
    note_stop_signals,
    read_metrics,
    set_aside,
    write_metrics,
)

CPU = torch.device("cpu")
CFG = Config(widths=(8, 8), embedding_size=8, epochs=4, output_dir="of another computer")
HALFWAY = Progress(epoch=2, step=20, seconds=60.0)
IN_AN_EPOCH = Progress(epoch=2, images=64, step=22, seconds=66.0)


def save(folder: Path, cfg: Config = CFG, progress: Progress = HALFWAY) -> Path:
    """Write a checkpoint of a run where that run would."""
    state = TrainState.initial(cfg, CPU)
    state.progress = progress
    path = folder / "models" / f"model_{progress.name}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, cfg, state)
    return path


def plan_of(folder: Path, resume: bool = False, load: Path | None = None, **given: Any) -> Plan:
    more = given.pop("more_epochs", 0)
    return make_plan({"output_dir": str(folder)} | given, resume, load, more)


# ---- what a run decides to do

START = {  # the flag, and whether the folder holds a checkpoint
    "from scratch": (None, False),
    "--resume, no checkpoint": ("resume", False),
    "--resume": ("resume", True),
    "--load_checkpoint_path": ("load_checkpoint_path", True),
}
LENGTH = {
    "": {},
    "--epochs": {"epochs": 7},
    "--budget": {"budget": "5m"},
    "--continue_training_epochs": {"continue_training_epochs": 3},
}
USUAL = Config().epochs
DECISIONS = [
    # start, length, then what results: action, epochs, budget, goes on, seconds before the budget
    ("from scratch", "", ("train", USUAL, "", False, 0)),
    ("from scratch", "--epochs", ("train", 7, "", False, 0)),
    ("from scratch", "--budget", ("train", USUAL, "5m", False, 0)),
    ("from scratch", "--continue_training_epochs", "refused"),
    ("--resume, no checkpoint", "", ("train", USUAL, "", False, 0)),
    ("--resume, no checkpoint", "--epochs", ("train", 7, "", False, 0)),
    ("--resume, no checkpoint", "--budget", ("train", USUAL, "5m", False, 0)),
    ("--resume, no checkpoint", "--continue_training_epochs", "refused"),
    ("--resume", "", ("train", 4, "", True, 0)),
    ("--resume", "--epochs", ("train", 7, "", True, 0)),
    ("--resume", "--budget", ("train", 4, "5m", True, 0)),
    ("--resume", "--continue_training_epochs", "refused"),
    ("--load_checkpoint_path", "", ("describe", 4, "", True, 0)),
    ("--load_checkpoint_path", "--epochs", "refused"),
    ("--load_checkpoint_path", "--budget", ("train", 4, "5m", True, 60)),
    ("--load_checkpoint_path", "--continue_training_epochs", ("train", 5, "", True, 0)),
]


@pytest.mark.parametrize(("start", "length", "expected"), DECISIONS)
def test_the_flags_and_the_folder_decide_what_a_run_does(tmp_path, run, start, length, expected):
    flag, has_checkpoint = START[start]
    saved = save(tmp_path) if has_checkpoint else None
    if expected == "refused":
        starts = {"resume": True} if flag == "resume" else {flag: saved} if flag else {}
        result = run("train.py", **starts, **LENGTH[length], output_dir=tmp_path)
        assert_one_line(result, length)
        return
    given = dict(LENGTH[length])
    more = given.pop("continue_training_epochs", 0)
    load = saved if flag == "load_checkpoint_path" else None
    plan = plan_of(tmp_path, flag == "resume", load, more_epochs=more, **given)
    goes_on = plan.start == saved and plan.progress.step == 20 if saved else False
    result = (plan.action, plan.cfg.epochs, plan.cfg.budget, goes_on, plan.progress.budget_from)
    assert result == expected
    assert plan.start == saved


@pytest.mark.parametrize(
    ("resume", "length", "expected"),
    [
        (True, {}, ("train", 4, "2m", 0)),
        (True, {"epochs": 7}, ("train", 7, "", 0)),
        (True, {"budget": "5m"}, ("train", 4, "5m", 0)),
        (False, {}, ("describe", 4, "2m", 0)),
        (False, {"budget": "5m"}, ("train", 4, "5m", 60)),
        (False, {"more_epochs": 3}, ("train", 5, "", 0)),
    ],
)
def test_a_run_that_had_a_budget_goes_on(tmp_path, resume, length, expected):
    saved = save(tmp_path, replace(CFG, budget="2m"))
    plan = plan_of(tmp_path, resume, None if resume else saved, **length)
    result = (plan.action, plan.cfg.epochs, plan.cfg.budget, plan.progress.budget_from)
    assert result == expected


@pytest.mark.parametrize(
    ("cfg", "progress", "length", "action"),
    [
        (CFG, Progress(epoch=4, step=40), {}, "finished"),
        (CFG, Progress(epoch=4, step=40), {"epochs": 4}, "finished"),
        (CFG, Progress(epoch=4, step=40), {"epochs": 3}, "finished"),
        (CFG, Progress(epoch=4, step=40), {"epochs": 5}, "train"),
        (CFG, Progress(epoch=4, step=40), {"budget": "1h"}, "train"),
        (CFG, Progress(epoch=3, images=64, step=32), {}, "train"),
        (CFG, HALFWAY, {"epochs": 2}, "finished"),
        (CFG, HALFWAY, {"budget": "60s"}, "finished"),
        (CFG, HALFWAY, {"budget": "61s"}, "train"),
        (replace(CFG, budget="1m"), HALFWAY, {}, "finished"),
        (replace(CFG, budget="1m"), replace(HALFWAY, budget_from=30.0), {}, "train"),
        (replace(CFG, budget="1m"), Progress(epoch=9, step=90, seconds=59), {}, "train"),
    ],
)
def test_a_run_is_finished_by_its_epochs_or_by_its_budget(tmp_path, cfg, progress, length, action):
    saved = save(tmp_path, cfg, progress)
    plan = plan_of(tmp_path, resume=True, **length)
    assert (plan.action, plan.start) == (action, saved)


def test_more_epochs_come_after_the_one_that_was_not_finished(tmp_path):
    saved = save(tmp_path, progress=IN_AN_EPOCH)
    assert plan_of(tmp_path, load=saved, more_epochs=3).cfg.epochs == 6


def test_more_epochs_and_a_new_budget_always_train(tmp_path):
    saved = save(tmp_path, progress=Progress(epoch=4, step=40, seconds=600.0))
    assert plan_of(tmp_path, load=saved, more_epochs=1).action == "train"
    assert plan_of(tmp_path, load=saved, budget="1s").action == "train"


def test_settings_come_from_flags_then_the_checkpoint_and_this_computer_from_config(tmp_path):
    save(tmp_path, replace(CFG, batch_size=64, learning_rate=1e-3, device="cuda"))
    plan = plan_of(tmp_path, resume=True, learning_rate=2e-3, epochs=7)
    assert (plan.cfg.learning_rate, plan.cfg.batch_size) == (2e-3, 64)
    assert (plan.cfg.output_dir, plan.cfg.device) == (str(tmp_path), "auto")
    for note in (
        "epochs = 7 (the checkpoint had 4)",
        "learning_rate = 0.002 (the checkpoint had 0.001)",
        "batch_size = 64, as in the checkpoint (config.py says 128)",
    ):
        assert note in plan.notes


def test_a_run_from_scratch_has_nothing_to_note(tmp_path):
    plan = plan_of(tmp_path, learning_rate=2e-3)
    assert (plan.progress, plan.notes) == (Progress(), [])
    assert plan.cfg == Config(learning_rate=2e-3, output_dir=str(tmp_path))


@pytest.mark.parametrize("how", ["resume", "load"])
@pytest.mark.parametrize(("name", "value"), [("batch_size", 64), ("max_images", 96), ("seed", 1)])
def test_an_epoch_goes_on_with_the_same_images_in_the_same_order(tmp_path, how, name, value):
    saved = save(tmp_path, progress=IN_AN_EPOCH)
    start = {"resume": True} if how == "resume" else {"load": saved, "more_epochs": 1}
    with pytest.raises(ValueError, match=rf"^{name} = {value}: .* inside an epoch") as error:
        plan_of(tmp_path, **start, **{name: value})
    assert str(getattr(CFG, name)) in str(error.value)
    plan = plan_of(tmp_path, **start, **{name: getattr(CFG, name)}, learning_rate=2e-3)
    assert (plan.action, plan.cfg.learning_rate) == ("train", 2e-3)


def test_the_next_epoch_can_have_other_images(tmp_path):
    save(tmp_path)
    cfg = plan_of(tmp_path, resume=True, batch_size=64, max_images=96, seed=1).cfg
    assert (cfg.batch_size, cfg.max_images, cfg.seed) == (64, 96, 1)


def test_flags_that_a_trained_model_cannot_take_are_named(tmp_path):
    saved = save(tmp_path)
    with pytest.raises(ValueError, match=r"widths = \(16, 16\).*trained with \(8, 8\)"):
        plan_of(tmp_path, load=saved, more_epochs=1, widths=(16, 16))


# ---- which checkpoint


def test_the_newest_checkpoint_of_a_run_is_the_one_with_the_most_steps(tmp_path):
    assert newest_of_run(tmp_path / "models") is None
    save(tmp_path, progress=Progress(epoch=30, step=300))
    save(tmp_path, progress=Progress(epoch=5, step=50))  # later in time and in text
    models = tmp_path / "models"
    (models / "model_epoch_30.pth").rename(models / "pretrained.pth")
    assert newest_of_run(models) == models / "model_epoch_5.pth"  # the other is no run's
    last = save(tmp_path, progress=Progress(epoch=5, images=64, step=52))
    (models / "model_epoch_7.pth").write_text("damaged")
    assert newest_of_run(models) == last
    assert plan_of(tmp_path, resume=True).start == last


def test_checkpoints_that_cannot_be_read_are_never_overwritten(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model_epoch_3.pth").write_text("damaged")
    with pytest.raises(ValueError, match=f"^{tmp_path}/models: none of .* can be read"):
        plan_of(tmp_path, resume=True)


@pytest.mark.parametrize("name", ["missing.pth", "damaged.pth"])
def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path, name):
    (tmp_path / "damaged.pth").write_text("damaged")
    with pytest.raises(ValueError, match=name):
        plan_of(tmp_path, load=tmp_path / name, more_epochs=1)


def test_a_description_says_where_a_checkpoint_stands(tmp_path):
    saved = save(tmp_path, progress=IN_AN_EPOCH)
    words = describe(plan_of(tmp_path, load=saved))
    assert f"{saved}: epoch 2 and 64 images (step 22) of 4 epochs planned" in words
    assert f"--load_checkpoint_path {saved} --continue_training_epochs K" in words
    assert words.endswith("--output_dir 'of another computer'")  # a run does not bring it along
    saved = save(tmp_path, replace(CFG, budget="2m"))
    words = describe(plan_of(tmp_path, load=saved))
    assert "epoch 2 (step 20) of a budget of 2m planned, 1.0 min trained" in words
    checkpoint.slim(saved, tmp_path / "slim.pth")
    plan = plan_of(tmp_path, load=tmp_path / "slim.pth")
    assert not plan.trainable
    assert "cannot be trained further" in describe(plan)
    assert "--continue_training_epochs" not in describe(plan)


# ---- how much is done


@pytest.mark.parametrize(
    ("budget", "progress", "fraction"),
    [
        ("", Progress(), 0),
        ("", Progress(epoch=2), 0.5),
        ("", Progress(epoch=2, images=64), 0.55),
        ("", Progress(epoch=5), 1.25),
        ("100s", Progress(epoch=3, images=64, seconds=25.0), 0.25),
        ("100s", Progress(epoch=3, images=64, seconds=25.0, budget_from=20.0), 0.05),
    ],
)
def test_the_fraction_that_is_done_counts_epochs_or_seconds(budget, progress, fraction):
    cfg = replace(CFG, budget=budget)
    assert fraction_done(cfg, progress, images_per_epoch=320) == pytest.approx(fraction)


@unix
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_is_noted_and_a_second_of_any_kind_has_its_usual_effect(first):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signals}
    try:
        noted = note_stop_signals()
        assert noted == []
        os.kill(os.getpid(), getattr(signal, first))
        assert noted == [getattr(signal, first)]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        for signum in (signal.SIGTERM, signal.SIGHUP):
            assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@unix
def test_a_signal_that_nohup_ignores_stays_ignored():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        noted = note_stop_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert noted == []
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ---- metrics.csv


def row(step: int) -> dict[str, Any]:
    """A row of metrics.csv in which every number has several digits."""
    numbers = (step / 10, step, 0.5 / step, 0.001, 1.25, 1234.5, step + 0.25)
    return dict(zip(METRICS, numbers, strict=True))


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in each.items()} for each in rows]


def test_metrics_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_metrics(path) == []
    for rows in ([], [row(10)], [row(10), row(20)]):
        write_metrics(path, rows)
        assert read_metrics(path) == as_text(rows)
        write_metrics(path, read_metrics(path))
        assert read_metrics(path) == as_text(rows)
    assert path.read_text().splitlines()[0] == ",".join(METRICS)
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_columns_of_another_version_are_dropped(tmp_path):
    write_metrics(tmp_path / "metrics.csv", [row(10) | {"mood": "good"}])
    assert read_metrics(tmp_path / "metrics.csv") == as_text([row(10)])


@pytest.mark.parametrize("kept", ["", "2", "2.0,", "2.0,2", "2.0,20", "2.0,20,0.02,0.001,"])
def test_a_row_that_a_power_cut_left_incomplete_is_dropped(tmp_path, kept):
    path = tmp_path / "metrics.csv"
    write_metrics(path, [row(10)])
    with open(path, "a") as file:
        file.write(kept)
    assert read_metrics(path) == as_text([row(10)])


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "metrics.csv").write_text("")
    assert read_metrics(tmp_path / "metrics.csv") == []


# ---- what a run keeps aside


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a run of four epochs that saved every second one."""
    for epoch in (2, 4):
        save(tmp_path, progress=Progress(epoch=epoch, step=10 * epoch))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"samples_epoch_{epoch}.png").write_bytes(b"grid")
    (tmp_path / "images" / "training.png").write_bytes(b"curves")
    (tmp_path / "images" / "generated_7_001.png").write_bytes(b"mine")
    write_metrics(tmp_path / "metrics.csv", [row(step) for step in (10, 20, 30, 40)])
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def aside(folder: Path) -> set[str]:
    (kept,) = (folder / "earlier").iterdir()
    return files(kept)


def test_a_new_run_moves_an_unrelated_one_aside(finished):
    before = files(finished)
    runs.prepare_folders(plan_of(finished), None)
    assert aside(finished) == {
        *(f"model_epoch_{epoch}.pth" for epoch in (2, 4)),
        *(f"samples_epoch_{epoch}.png" for epoch in (2, 4)),
        "metrics.csv",
        "training.png",
    }
    stayed = {name for name in files(finished) if not name.startswith("earlier")}
    assert stayed == {"images/generated_7_001.png"} < before


def test_going_on_keeps_what_led_up_to_the_checkpoint(finished):
    start = finished / "models" / "model_epoch_2.pth"
    plan = plan_of(finished, load=start, more_epochs=1)
    before = start.read_bytes()
    with open(finished / "metrics.csv", "a") as file:
        file.write("5.0,")  # a power cut
    rows = runs.prepare_folders(plan, start)
    kept = {"model_epoch_2.pth", "model_epoch_4.pth", "samples_epoch_4.png"}
    assert aside(finished) == kept | {"metrics.csv", "training.png"}
    assert rows == as_text([row(10), row(20)])
    (folder,) = (finished / "earlier").iterdir()
    assert len(read_metrics(folder / "metrics.csv")) == 4
    assert (folder / "model_epoch_2.pth").read_bytes() == before
    assert start.read_bytes() == before
    assert (finished / "images" / "samples_epoch_2.png").exists()


def test_going_on_as_planned_from_the_newest_checkpoint_keeps_nothing_aside(finished):
    plan = plan_of(finished, resume=True, epochs=4)
    before = files(finished)
    (finished / "models" / ".model_epoch_6.pth.123.partial").write_text("of a save that was killed")
    runs.prepare_folders(plan, None)
    assert files(finished) == before
    assert len(read_metrics(finished / "metrics.csv")) == 4


@pytest.mark.parametrize("kind", ["text", "hand-edited", "not UTF-8", "not finite", "folder"])
def test_figures_that_cannot_be_read_are_set_aside_and_begun_anew(finished, kind, capsys):
    path = finished / "metrics.csv"
    lines = path.read_text().splitlines()
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes(b"\xff" + path.read_bytes())
    elif kind == "text":
        path.write_text("notes\nof mine\nthree lines\n")
    else:
        number = "five" if kind == "hand-edited" else "nan"
        lines[2] = ",".join([number, *lines[2].split(",")[1:]])
        path.write_text("\n".join(lines) + "\n")
    assert runs.prepare_folders(plan_of(finished, resume=True, epochs=4), None) == []
    assert f"{path}: " in capsys.readouterr().out
    assert "metrics.csv" in {each.name for each in (finished / "earlier").glob("*/*")}
    assert not path.exists()
    assert (finished / "models" / "model_epoch_4.pth").exists()


def test_a_renamed_checkpoint_does_not_replace_another_of_its_epoch(finished):
    other = save(finished / "other", progress=Progress(epoch=4, step=15))  # larger batches
    start = other.rename(finished / "models" / "renamed.pth")
    rewritten = finished / "models" / "model_epoch_4.pth"
    before = rewritten.read_bytes()
    runs.prepare_folders(plan_of(finished, load=start, more_epochs=1), rewritten)
    (folder,) = (finished / "earlier").iterdir()
    assert (folder / "model_epoch_4.pth").read_bytes() == before


def test_files_kept_aside_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "2026-01-01_000000")
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        set_aside(tmp_path / "earlier", [tmp_path / "metrics.csv"], [])
    kept = {path.read_text() for path in (tmp_path / "earlier").rglob("metrics.csv")}
    assert kept == {"first", "second"}
    set_aside(tmp_path / "earlier", [tmp_path / "missing.png"], [])
    assert len(list((tmp_path / "earlier").iterdir())) == 2
