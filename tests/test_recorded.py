"""Short runs and drawings give what they gave when tests/recorded.json was written.

On the machine that wrote it they must be equal to the last bit. Elsewhere their means must agree.
The tolerances are 5 to 10 times what another instruction set (plain or SSE 4.1 instead of AVX2) or
one thread instead of two changed, and less than what a factor of 1.01 in a formula changed.
"""

import functools
import json
import sys
from typing import Any

import pytest
import record

import data

RECORDED = json.loads(record.RECORDED.read_text())
SAME_MACHINE = record.machine() == RECORDED["machine"]
WEIGHTS = {"rel": 5e-5}  # means of weights, averages and optimizer states after up to 20 steps
GRIDS = {"abs": 0.25}  # mean grey levels, 0…255, of the grids that such small networks draw
DRAWINGS = {"abs": 0.01}  # of what the pretrained model draws: ten pixels in 1,000 by one level


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict[str, Any]:
    """What the program gives on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)  # record.py sets it for each script
        patch.setattr("evaluation.plots.plot_training", lambda rows, path: None)  # only takes time
        patch.setattr(data, "read_idx", functools.cache(data.read_idx))  # no file here changes
        return record.all_records(tmp_path_factory.mktemp("recorded"))


def assert_recorded(now: dict[str, Any], then: dict[str, Any], tolerance: dict[str, float]) -> None:
    if SAME_MACHINE:
        assert now["sha256"] == then["sha256"]
    assert now["means"] == pytest.approx(then["means"], **tolerance)


def test_the_record_has_what_was_run_and_nothing_else(now):
    for kind in ("training", "drawing"):
        assert now[kind].keys() == RECORDED[kind].keys()


@pytest.mark.parametrize("name", RECORDED["training"])
def test_a_short_run_ends_with_the_recorded_weights(now, name):
    then = RECORDED["training"][name]["checkpoint"]
    assert_recorded(now["training"][name]["checkpoint"], then, WEIGHTS)


@pytest.mark.parametrize("name", RECORDED["training"])
def test_a_short_run_draws_the_recorded_grids(now, name):
    then = RECORDED["training"][name]["grids"]
    assert_recorded(now["training"][name]["grids"], then, GRIDS)


@pytest.mark.parametrize("name", RECORDED["drawing"])
def test_the_pretrained_model_draws_the_recorded_pictures(now, name):
    assert_recorded(now["drawing"][name], RECORDED["drawing"][name], DRAWINGS)


def test_a_run_that_was_stopped_and_resumed_is_the_same_as_an_uninterrupted_one(now):
    runs = now["training"]
    assert runs["resumed"] == runs["fresh"]
    assert runs["stopped"]["checkpoint"] != runs["fresh"]["checkpoint"]
