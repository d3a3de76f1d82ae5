"""train.py --tensorboard: what TensorBoard reads back of a run."""

import errno
import threading

import pytest
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from interface.board import FIGURES
from interface.folder import read_metrics


def events(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_figures_grids_and_settings_are_written_and_a_resumed_run_goes_on(run, tmp_path):
    flags = TINY | {"output_dir": tmp_path, "save_every": 1, "tensorboard": True}
    assert run("train.py", **flags, epochs=1).code == 0
    resumed = run("train.py", "--resume", "--tensorboard", epochs=2, output_dir=tmp_path)
    assert resumed.code == 0, resumed
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'} shows this run" in resumed.out
    found, rows = events(tmp_path / "tensorboard"), read_metrics(tmp_path / "metrics.csv")
    assert set(found.Tags()["scalars"]) == set(FIGURES)
    for name in FIGURES:
        written = {event.step: event.value for event in found.Scalars(name)}
        assert written == pytest.approx({int(row["step"]): float(row[name]) for row in rows})
    assert [image.step for image in found.Images("samples")] == [10, 20]
    assert found.Tags()["tensors"] == ["settings/text_summary"]


def test_a_new_run_sets_the_old_events_aside(run, tmp_path):
    flags = TINY | {"output_dir": tmp_path, "tensorboard": True, "epochs": 1}
    for _ in range(2):
        assert run("train.py", **flags).code == 0
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(list(tmp_path.glob("earlier/*/tensorboard/*"))) == 1


def test_without_the_flag_nothing_is_written(run, tmp_path):
    assert run("train.py", **TINY, output_dir=tmp_path, epochs=1).code == 0
    assert not (tmp_path / "tensorboard").exists()


def test_a_missing_package_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    refused = run("train.py", **TINY, output_dir=tmp_path, epochs=1, tensorboard=True)
    assert refused.code == 2
    assert "pip install -r requirement-extra.txt" in refused.err


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_board_that_cannot_be_written_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restored afterwards

    def no_space(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", no_space)
    result = run("train.py", **TINY, epochs=2, output_dir=tmp_path, tensorboard=True)
    assert result.code == 0, result
    assert result.out.count("tensorboard not written: ") == 1
    assert "Traceback" not in result.err
