"""How signals stop a run of train.py, and what it shows of its progress."""

import os
import signal
import time

import pytest
import torch
from conftest import unix

from checkpoint import Progress, TrainState
from config import Config
from interface.plan import Plan
from interface.runs import Run, note_stop_signals


@unix
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_is_noted_and_a_second_one_ends_the_process(first):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signals}
    try:
        for signum in signals:  # whatever an earlier test left
            signal.signal(signum, signal.SIG_DFL)
        noted = note_stop_signals()
        assert noted == []
        os.kill(os.getpid(), getattr(signal, first))
        assert noted == [getattr(signal, first)]
        os.kill(os.getpid(), signal.SIGHUP)  # of a terminal that closes: the save goes on
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
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
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        assert noted == [signal.SIGTERM]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def a_run(**settings: object) -> Run:
    """A run that has trained for 90 seconds: an epoch and a half, 15 steps."""
    cfg = Config(widths=(8,), embedding_size=8, dense_size=0, batch_size=32, **settings)
    state = TrainState.initial(cfg, torch.device("cpu"))
    state.progress = Progress(epoch=1, images=160, step=15, seconds=90.0)
    return Run(Plan(cfg, progress=state.progress), state, 320, time.perf_counter())


def test_what_is_left_of_a_run_comes_from_its_speed_or_its_budget():
    assert a_run(epochs=6).time_left() == "4m30s left"
    assert a_run(budget="3m").time_left() == "1m30s left"


def test_the_bar_shows_the_mean_loss_of_the_epoch_so_far():
    run = a_run(epochs=6)
    run.state.totals[:] = torch.tensor([5 * 0.5, 1.0])
    run.show_progress()
    assert run.bar.n == 128  # before this step
    assert run.bar.postfix.startswith("loss 0.5000, ")
    run.close_bar()
