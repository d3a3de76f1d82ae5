"""Which model a user means."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import answers

import checkpoint
from checkpoint import Progress, TrainState
from config import Config
from interface.models import (
    ask_for_model,
    find_model,
    find_teacher,
    list_checkpoints,
    list_models,
)
from interface.plan import make_plan

CFG = Config(widths=(8, 8), embedding_size=8)


def save(path: Path, step: int) -> None:
    state = TrainState.initial(CFG, torch.device("cpu"))
    state.progress = Progress(epoch=step // 10, step=step)
    checkpoint.save(path, CFG, state)


def test_checkpoints_are_listed_by_completed_work_then_by_time_never_by_name(tmp_path):
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "missing") == []
    steps = {"pretrained": 900, "student": 990, "model_epoch_30": 300, "model_epoch_5": 50}
    steps |= {"a_first": 70, "z_second": 70}  # written in this order
    for name, step in steps.items():
        save(tmp_path / f"{name}.pth", step)
    os.utime(tmp_path / "z_second.pth", (1, 1))  # older than its equal
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    found = list_checkpoints(tmp_path)
    names = ["student", "pretrained", "model_epoch_5", "z_second", "a_first", "model_epoch_30"]
    assert [path.stem for path, _ in found] == names
    assert [progress.step for _, progress in found] == [990, 900, 50, 70, 70, 300]
    own = list_checkpoints(tmp_path, "model_epoch_*.pth")
    assert [path.stem for path, _ in own] == ["model_epoch_5", "model_epoch_30"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of models; tests read it and do not write."""
    folder = tmp_path_factory.mktemp("models")
    for name, step in (("pretrained", 900), ("model_epoch_30", 300), ("model_epoch_5", 50)):
        save(folder / f"{name}.pth", step)
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("newest", "model_epoch_30"),
        ("3", "model_epoch_30"),
        ("2", "model_epoch_5"),
        ("1", "pretrained"),
        ("pretrained", "pretrained"),
        ("model_epoch_5.pth", "model_epoch_5"),
    ],
)
def test_a_model_is_found_by_its_name_its_number_or_as_the_newest(models, text, name):
    assert find_model(text, models) == models / f"{name}.pth"


def test_a_model_is_found_by_its_path_first(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(str(models / "pretrained.pth"), tmp_path) == models / "pretrained.pth"
    Path("2").write_text("a file of this name")
    assert find_model("2", models) == Path("2")


@pytest.mark.parametrize("text", ["4", "0", "none.pth", "none", "-1", "", "n" * 290, "9" * 290])
def test_a_model_that_does_not_exist_is_named(models, text):
    with pytest.raises(ValueError, match=f"model = '{text}': no such checkpoint.*{models}"):
        find_model(text, models)


@pytest.mark.parametrize("text", ["n" * 5000, "9" * 5000])
def test_a_name_that_no_file_can_have_is_named_in_short(models, text):
    with pytest.raises(ValueError, match=f"model = '{text[:200]}.*no such checkpoint") as error:
        find_model(text, models)
    assert len(str(error.value)) < 1000


def test_a_folder_without_a_model_says_how_to_train_one(tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    for look_for_it in (list_models, ask_for_model, lambda folder: find_model("newest", folder)):
        with pytest.raises(ValueError, match=r"no model in .*python train\.py"):
            look_for_it(tmp_path)


def test_the_shipped_model_counts_as_the_oldest(models):
    names = [path.stem for path, _ in list_models(models)]
    assert names == ["pretrained", "model_epoch_5", "model_epoch_30"]


def test_a_person_chooses_from_a_numbered_list(models, monkeypatch, capsys):
    answers(monkeypatch, "4", "2")
    assert ask_for_model(models).stem == "model_epoch_5"
    shown = capsys.readouterr().err
    assert re.search(r"  2  model_epoch_5\.pth  epoch 5 \(step 50\)  20\d\d-\d\d-\d\d \d\d:", shown)
    assert "'4' is not a whole number from 1 to 3" in shown
    answers(monkeypatch, "")
    assert ask_for_model(models).stem == "model_epoch_30"


def test_a_teacher_can_be_named_from_any_output_folder(tmp_path):
    plan = make_plan({"teacher": "pretrained", "output_dir": str(tmp_path)})
    assert find_teacher(plan.cfg, None) == Path("results", "models", "pretrained.pth")
    assert plan.cfg.widths == (48, 96)


def test_what_cannot_be_read_is_passed_over_with_a_word(tmp_path, capsys):
    save(tmp_path / "model_epoch_5.pth", 50)
    save(tmp_path / "model_epoch_6.pth", 60)
    os.truncate(tmp_path / "model_epoch_6.pth", 1000)
    assert find_model("newest", tmp_path).stem == "model_epoch_5"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'model_epoch_6.pth'}: ")
