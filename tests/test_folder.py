"""The run folder of train.py: its owner, the newest checkpoint, metrics.csv, what is kept aside."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import unix
from test_plan import IN_AN_EPOCH, plan_of, save

import export
from checkpoint import Progress
from config import Config
from interface import folder as run_folder
from interface.folder import (
    METRICS,
    newest_of_run,
    own_folder,
    read_metrics,
    set_aside,
    without_grid,
    write_metrics,
)
from interface.models import list_checkpoints
from interface.plan import Plan


def prepare(plan: Plan, rewritten: Path | None = None) -> list[dict[str, Any]]:
    out = plan.cfg.output_dir
    return run_folder.prepare_folders(out, plan.start, plan.progress, rewritten)


# ---- who owns it


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    out = tmp_path / "new" / "folder"
    with own_folder(str(out)):
        message = r"process \d+ on .* is training there; wait for it"
        with pytest.raises(ValueError, match=message), own_folder(str(out)):
            pass
        (out / "metrics.csv").write_text("kept")
    with own_folder(str(out)):  # it is free again
        assert (out / "metrics.csv").read_text() == "kept"


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path):
    def fail() -> None:
        with own_folder(str(tmp_path / "out")):
            raise ValueError("no such data")

    with pytest.raises(ValueError, match="no such data"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_no_folder_above_either(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="bad"), own_folder(str(tmp_path / "a" / "b" / "out")):
        raise ValueError("bad")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


@unix
def test_a_folder_that_was_moved_or_replaced_is_no_longer_ours(tmp_path):
    out = tmp_path / "out"
    with own_folder(str(out)):
        assert run_folder.is_ours(str(out))
        out.rename(tmp_path / "moved")
        assert not run_folder.is_ours(str(out))
        with own_folder(str(tmp_path / "other")):
            pass
        out.mkdir()
        theirs = [out / ".lock", out / ".owner"]
        for path in theirs:
            path.touch()
        assert not run_folder.is_ours(str(out))
    assert all(path.exists() for path in theirs)
    assert run_folder.is_ours(str(tmp_path / "never locked"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"output_dir = .*file.*cannot be written"):
        own_folder(str(tmp_path / "file")).__enter__()


def test_a_folder_of_models_that_cannot_be_written_is_named_at_once(tmp_path, monkeypatch):
    def refuse(path: Path, *mode: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, who may do all
    with pytest.raises(ValueError, match=r"models.*cannot be written \(Permission denied\)"):
        prepare(Plan(Config(output_dir=str(tmp_path))))


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


# ---- metrics.csv


def row(step: int) -> dict[str, Any]:
    """A row of metrics.csv in which every number has several digits."""
    numbers = (step / 10, step, 0.5 / step, 0.6 / step, 0.001, 1.25, 1234.5, step + 0.25)
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


def test_a_byte_order_mark_as_spreadsheets_write_it_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "metrics.csv"
    write_metrics(path, [row(10)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
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
    prepare(plan_of(finished))
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
    rows = prepare(plan, start)
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
    prepare(plan)
    assert files(finished) == before
    assert len(read_metrics(finished / "metrics.csv")) == 4


@pytest.mark.parametrize(
    "kind", ["text", "hand-edited", "last row", "not UTF-8", "not finite", "a quote", "folder"]
)
def test_figures_that_cannot_be_read_are_set_aside_and_begun_anew(finished, kind, capsys):
    path = finished / "metrics.csv"
    lines = path.read_text().splitlines()
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes(b"\xff" + path.read_bytes())
    elif kind == "a quote":  # opens a field that is longer than csv allows
        path.write_text(lines[0] + '\n"' + "1,2,3\n" * 50_000)
    elif kind == "last row":
        path.write_text("\n".join([*lines[:-1], "x" + lines[-1]]) + "\n")
    elif kind == "text":
        path.write_text("notes\nof mine\nthree lines\n")
    else:
        number = "five" if kind == "hand-edited" else "nan"
        lines[2] = ",".join([number, *lines[2].split(",")[1:]])
        path.write_text("\n".join(lines) + "\n")
    assert prepare(plan_of(finished, resume=True, epochs=4)) == []
    assert f"{path}: " in capsys.readouterr().out
    assert "metrics.csv" in {each.name for each in (finished / "earlier").glob("*/*")}
    assert not path.exists()
    assert (finished / "models" / "model_epoch_4.pth").exists()


@pytest.mark.parametrize("end", ["\n", ""])  # without one, the last row counts as torn off
def test_columns_that_a_person_added_are_kept_aside(finished, end):
    path = finished / "metrics.csv"
    lines = path.read_text().splitlines()
    edited = "\n".join([lines[0] + ",note", *(line + ",good" for line in lines[1:])]) + end
    path.write_text(edited)
    rows = prepare(plan_of(finished, resume=True, epochs=4))
    assert len(rows) == len(lines) - (1 if end else 2)
    assert "metrics.csv" in aside(finished)
    (folder,) = (finished / "earlier").iterdir()
    assert (folder / "metrics.csv").read_text() == edited


@unix
def test_a_checkpoint_that_is_a_link_belongs_to_the_run(finished):
    path, store = finished / "models" / "model_epoch_4.pth", finished / "store.pth"
    path.rename(store)
    path.symlink_to(Path("..", "store.pth"))
    before = files(finished)
    prepare(plan_of(finished, resume=True, epochs=6))
    assert files(finished) == before


def test_a_renamed_checkpoint_does_not_replace_another_of_its_epoch(finished):
    other = save(finished / "other", progress=Progress(epoch=4, step=15))  # larger batches
    start = other.rename(finished / "models" / "renamed.pth")
    rewritten = finished / "models" / "model_epoch_4.pth"
    before = rewritten.read_bytes()
    prepare(plan_of(finished, load=start, more_epochs=1), rewritten)
    (folder,) = (finished / "earlier").iterdir()
    assert (folder / "model_epoch_4.pth").read_bytes() == before


def test_another_runs_checkpoint_with_fewer_steps_but_more_epochs_waits_for_its_turn(finished):
    other = save(finished / "other", progress=Progress(epoch=6, step=12))  # larger batches
    theirs = other.rename(finished / "models" / other.name).read_bytes()
    start = finished / "models" / "model_epoch_4.pth"
    with open(finished / "metrics.csv", "a") as file:
        file.write(
            ",".join({"epoch": "6", "step": "12"}.get(name, "1.0") for name in METRICS) + "\n"
        )
    rows = prepare(plan_of(finished, load=start, more_epochs=4), start)
    assert rows == as_text([row(step) for step in (10, 20, 30, 40)])
    path = finished / "models" / other.name
    assert path.read_bytes() == theirs  # this run may end before it comes to that epoch
    run_folder.make_way(path)
    [kept] = finished.glob(f"earlier/*/{other.name}")
    assert kept.read_bytes() == theirs
    assert not path.exists()


def test_files_that_export_is_writing_are_left_alone(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / ".small.pth.1-ab.partial").write_text("of export.py")
    (models / ".model_epoch_6.pth.1-ab.partial").write_text("of a killed run")
    prepare(plan_of(tmp_path))
    assert [path.name for path in models.iterdir()] == [".small.pth.1-ab.partial"]


def test_files_kept_aside_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "2026-01-01_000000")
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        set_aside(tmp_path / "earlier", [tmp_path / "metrics.csv"], [])
    kept = {path.read_text() for path in (tmp_path / "earlier").rglob("metrics.csv")}
    assert kept == {"first", "second"}
    set_aside(tmp_path / "earlier", [tmp_path / "missing.png"], [])
    assert len(list((tmp_path / "earlier").iterdir())) == 2


def test_going_on_from_a_checkpoint_under_another_name_is_an_unrelated_run(finished):
    best = finished / "models" / "best.pth"
    shutil.copy(finished / "models" / "model_epoch_2.pth", best)
    prepare(plan_of(finished, load=best, more_epochs=1))
    assert list((finished / "models").iterdir()) == [best]
    assert not (finished / "metrics.csv").exists()


def test_a_disk_that_is_full_while_copying_moves_nothing(tmp_path, monkeypatch):
    def fails(source: Path, target: Path) -> None:
        Path(target).write_text("a part")
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    for name in ("newer.pth", "metrics.csv"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("shutil.copy2", fails)
    with pytest.raises(OSError, match="No space") as error:
        set_aside(tmp_path / "earlier", [tmp_path / "newer.pth"], [tmp_path / "metrics.csv"])
    assert Path(error.value.filename).parent == tmp_path / "earlier"
    assert (tmp_path / "newer.pth").read_text() == "newer.pth"
    assert list((tmp_path / "earlier").iterdir()) == []


def test_a_file_that_cannot_be_moved_leaves_all_where_they_were(tmp_path, monkeypatch):
    """As on Windows, where another program has it open."""
    move = shutil.move

    def moves(source: Path, target: Path) -> None:
        if Path(source).name == "metrics.csv":
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(source))
        move(source, target)

    paths = [tmp_path / name for name in ("a.pth", "metrics.csv", "b.png")]
    for path in paths:
        path.write_text(path.name)
    monkeypatch.setattr("shutil.move", moves)
    with pytest.raises(OSError, match="cannot access") as error:
        set_aside(tmp_path / "earlier", paths, [])
    assert error.value.filename == str(paths[1])
    assert [path.read_text() for path in paths] == [path.name for path in paths]
    assert list((tmp_path / "earlier").iterdir()) == []


def test_a_run_goes_on_from_a_whole_checkpoint_not_a_reduced_one(tmp_path):
    models = tmp_path / "models"
    whole = save(tmp_path, progress=Progress(2, 0, 20))
    export.slim(whole, models / "model_epoch_2_small.pth")
    assert newest_of_run(models) == whole
    assert list_checkpoints(models)[-1][0] == whole
    export.slim(whole, models / "model_epoch_3.pth")
    whole.unlink()
    assert newest_of_run(models).name in ("model_epoch_2_small.pth", "model_epoch_3.pth")


def test_checkpoints_of_whole_epochs_that_have_no_grid_are_found(finished):
    assert without_grid(str(finished)) == []
    (finished / "images" / "samples_epoch_2.png").unlink()
    save(finished, progress=IN_AN_EPOCH, grid=False)
    grid = finished / "images" / "samples_epoch_2.png"
    assert without_grid(str(finished)) == [(finished / "models" / "model_epoch_2.pth", grid)]
