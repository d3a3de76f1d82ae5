"""What a run of train.py decides to do."""

from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_line

import checkpoint
import export
from checkpoint import Progress, TrainState
from config import Config
from interface.cli import train_command
from interface.plan import Plan, describe, fraction_done, make_plan

CPU = torch.device("cpu")
CFG = Config(widths=(8, 8), embedding_size=8, epochs=4, output_dir="of another computer")
HALFWAY = Progress(epoch=2, step=20, seconds=60.0)
IN_AN_EPOCH = Progress(epoch=2, images=64, step=22, seconds=66.0)


def save(folder: Path, cfg: Config = CFG, progress: Progress = HALFWAY, grid: bool = True) -> Path:
    """Write a checkpoint of a run, and its grid, where that run would."""
    state = TrainState.initial(cfg, CPU)
    state.progress = progress
    path = folder / "models" / f"model_{progress.name}.pth"
    for each in ("models", "images"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, cfg, state)
    if grid and not progress.images:
        (folder / "images" / f"samples_{progress.name}.png").write_bytes(b"a grid")
    return path


def edit_config(monkeypatch: pytest.MonkeyPatch, **defaults: Any) -> None:
    """Give settings in config.py other defaults, as a user may."""
    edited = [
        (f.name, f.type, field(default=defaults[f.name], metadata=f.metadata))
        for f in fields(Config)
        if f.name in defaults
    ]
    other = make_dataclass("Config", edited, bases=(Config,), frozen=True)
    monkeypatch.setattr("interface.plan.Config", other)


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


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("snr_power", 0.5, {"loss_weighting": "min_snr"}),
        ("min_snr_gamma", 3.0, {}),
        ("unsquared_snr", 5.0, {"prediction": "v"}),
        ("eta", 0.5, {"sampler": "ddpm"}),
        ("eta", 0.5, {"steps": 1}),
        ("guide_label_noise", 0.5, {"guide_fraction": 0.0}),
        ("guidance_low", 0.5, {"guidance": 1.0}),
    ],
)
def test_a_flag_without_effect_is_refused(tmp_path, name, value, others):
    with pytest.raises(ValueError, match=f"{name} = {value}: has no effect with .* drop the flag"):
        plan_of(tmp_path, **{name: value}, **others)
    plan_of(tmp_path, **others)  # the default of the one does not forbid the other


def test_random_labels_for_a_guide_that_is_made_already_are_refused(tmp_path):
    saved = save(tmp_path)
    contents = checkpoint.load(saved)
    assert plan_of(tmp_path, load=saved, more_epochs=1, guide_label_noise=0.5)  # it has no guide
    torch.save(contents | {"guide": contents["ema"]}, saved)
    with pytest.raises(ValueError, match=r"guide_label_noise = 0\.5: has no effect, as the guide"):
        plan_of(tmp_path, load=saved, more_epochs=1, guide_label_noise=0.5)
    same = CFG.guide_label_noise  # as where a whole command line is typed again
    assert plan_of(tmp_path, load=saved, more_epochs=1, guide_label_noise=same)


@pytest.mark.parametrize(
    "flags", [{"guidance_low": 0.9, "guidance_high": 0.4}, {"steps": 1, "guidance": 5.0}]
)
def test_guidance_that_would_never_act_is_refused(tmp_path, flags):
    with pytest.raises(ValueError, match=r"guidance = .*: no sampling time .* is in"):
        plan_of(tmp_path, **flags)


def test_epochs_win_over_a_budget_that_is_the_default(tmp_path, monkeypatch):
    edit_config(monkeypatch, budget="10m")
    assert plan_of(tmp_path).cfg.budget == "10m"
    cfg = plan_of(tmp_path, epochs=3).cfg
    assert (cfg.budget, cfg.epochs) == ("", 3)


def test_a_teacher_that_is_the_default_makes_a_student(tmp_path, monkeypatch):
    teacher = str(save(tmp_path))
    edit_config(monkeypatch, teacher=teacher)
    cfg = plan_of(tmp_path / "new").cfg
    assert (cfg.teacher, cfg.sampler, cfg.steps) == (teacher, "ddim", 4)


# ---- where a checkpoint stands


@pytest.mark.parametrize("name", ["missing.pth", "damaged.pth"])
def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path, name):
    (tmp_path / "damaged.pth").write_text("damaged")
    with pytest.raises(ValueError, match=name):
        plan_of(tmp_path, load=tmp_path / name, more_epochs=1)


def test_a_description_says_where_a_checkpoint_stands(tmp_path):
    saved = save(tmp_path, progress=IN_AN_EPOCH)
    words = describe(plan_of(tmp_path, load=saved))
    assert f"{saved}: epoch 2 and 64 images (step 22), 4 epochs planned" in words
    assert f"--load_checkpoint_path {saved} --continue_training_epochs K" in words
    assert words.endswith(f"--output_dir {tmp_path}")  # the flag, not the checkpoint's
    saved = save(tmp_path, replace(CFG, budget="2m"))
    words = describe(plan_of(tmp_path, load=saved))
    assert "epoch 2 (step 20), a budget of 2m planned, 1.0 min trained" in words
    export.slim(saved, tmp_path / "slim.pth")
    plan = plan_of(tmp_path, load=tmp_path / "slim.pth")
    assert not plan.trainable
    assert "a new run would begin with its weights" in describe(plan)


def test_flags_that_only_training_would_heed_are_refused_with_a_description(tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate = 5.0: .*--continue_training_epochs"):
        plan_of(tmp_path, load=save(tmp_path), learning_rate=5.0)


def test_the_command_to_go_on_starts_as_many_processes(monkeypatch):
    assert train_command(Config(), "--resume") == "python train.py --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    started = "torchrun --standalone --nproc_per_node=2 train.py --resume"
    assert train_command(Config(), "--resume") == started


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


def test_a_new_budget_changes_the_plan_and_resuming_does_not(tmp_path):
    saved = save(tmp_path, replace(CFG, budget="5m"))
    assert plan_of(tmp_path, load=saved, budget="5m").changed
    assert not plan_of(tmp_path, resume=True).changed


def test_a_run_that_begins_with_reduced_weights_is_new(tmp_path):
    reduced = tmp_path / "reduced.pth"
    export.slim(save(tmp_path, progress=IN_AN_EPOCH), reduced)
    cfg = plan_of(tmp_path, load=reduced, budget="5m").cfg
    assert (cfg.budget, cfg.epochs) == ("5m", 1)
    assert plan_of(tmp_path, load=reduced, more_epochs=1, batch_size=64).cfg.batch_size == 64


def test_guidance_that_a_model_would_unlearn_is_refused(tmp_path):
    save(tmp_path, replace(CFG, guide_fraction=0.0))
    with pytest.raises(ValueError, match="set guidance to 1"):
        plan_of(tmp_path, resume=True, label_dropout=0.0)


def test_a_run_that_is_done_but_lacks_a_grid_goes_on(tmp_path):
    save(tmp_path, progress=Progress(epoch=4, step=40), grid=False)
    assert plan_of(tmp_path, resume=True).action == "train"
