"""How signals stop a run of train.py."""

import os
import signal

import pytest
from conftest import unix

from interface.runs import note_stop_signals


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
