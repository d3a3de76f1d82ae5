"""Result files and tables, from results that are made up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import LoadedModel, Progress
from config import Config
from evaluation import results
from system.machine import pick_precision


def metrics(**some) -> dict:
    """Metrics of labelled images, as evaluate.py measures them."""
    pixels = {
        "black": 0.8,
        "mean": 33.3,
        "std": 78.6,
        "histogram": [0.8, 0.05, 0.04, 0.03, 0.07, 0.01],
    }
    found = {"fd": 0.5, "fd_interval": [0.4, 0.6], "kid": 0.001, "kid_std": 0.0002}
    found |= {"precision": 0.91, "recall": 0.82, "nearest_median": 6.5, "pixels": pixels}
    found |= {"agreement": 0.995, "by_digit": [0.99] * 9 + [0.9], "confusions": [[4, 9, 7]]}
    return found | some


def result(calls: int = 19, fd: float = 0.5, **settings) -> dict:
    """A result of a model."""
    cfg = Config(**settings)
    return {
        "source": "model.pth",
        "evaluator": "0123456789abcdef",
        "settings": {**cfg.select("sampling"), "seed": cfg.seed, "samples": 128},
        "images": 128,
        "samples": metrics(fd=fd, fd_over_floor=fd / 0.25, copies=3),
        "real": metrics(fd=0.25, fd_interval=[0.2, 0.3], precision=0.77, agreement=0.999),
        "sampling": {"calls": calls, "seconds": 2.5, "images_per_second": 51.2},
    }


def row(table: str, name: str) -> str:
    """The cells of a row, with single spaces between its words."""
    (line,) = [line for line in table.splitlines() if line.startswith(name)]
    return " ".join(line.removeprefix(name).split())


def test_the_table_has_the_samples_beside_the_real_images():
    shown = results.table(result())
    assert shown.startswith("128 images of model.pth, evaluator 0123456789ab\n")
    assert row(shown, "FD-MNIST") == "0.5000 (0.4000 to 0.6000) 0.2500 (0.2000 to 0.3000)"
    assert row(shown, "FD over the floor") == "2.00 1.00"
    assert row(shown, "KID x 1000") == "1.000 ± 0.200 1.000 ± 0.200"
    assert row(shown, "precision") == "0.910 0.770"
    assert row(shown, "recall") == "0.820 0.820"
    assert row(shown, "black pixels") == "80.00% 80.00%"
    assert row(shown, "pixel mean, std") == "33.3, 78.6 33.3, 78.6"
    assert row(shown, "pixels 1 to 63") == "5.00% 5.00%"
    assert row(shown, "pixels 255 to 255") == "1.00% 1.00%"
    assert row(shown, "nearer to training images than every test image") == "3 0"
    assert row(shown, "label agreement") == "99.50% 99.90%"
    assert row(shown, "  digit 9") == "90.00% 90.00%"
    assert row(shown, "  confusions") == "4 as 9: 7 4 as 9: 7"
    assert row(shown, "sampling") == "51 images/s 19 network calls an image, 2.5 s"


def test_the_table_leaves_out_what_was_not_measured():
    shown = results.table(result())
    assert "CAS" not in shown
    assert "C2ST" not in shown
    score = {"cas": {"synthetic": [0.9, 0.92], "real": [0.97, 0.99]}}
    shown = results.table(result() | score)
    assert row(shown, "CAS: accuracy on test images") == "91.00% 98.00%"
    of_a_file = result()
    del of_a_file["sampling"], of_a_file["settings"]
    for name in ("agreement", "by_digit", "confusions"):
        del of_a_file["samples"][name]
    shown = results.table(of_a_file)
    for words in ("agreement", "digit", "confusions", "sampling", "images/s"):
        assert words not in shown


def test_columns_are_aligned_and_lines_end_without_blanks():
    lines = results.aligned([("a", "b", "c"), ("long", "x", ""), ("", "longer", "z")])
    assert lines.split("\n") == ["a     b       c", "long  x", "      longer  z"]


def test_the_pareto_best_of_a_sweep():
    points = [(4, 2.0), (8, 1.0), (8, 1.5), (16, 1.0), (20, 0.5)]
    found = [result(calls, fd) for calls, fd in points]
    assert results.pareto_best(found) == [True, True, False, False, True]


def test_the_table_of_a_sweep_has_a_line_for_each_result_and_marks_the_best():
    found = [
        result(4, 0.5, steps=4, guidance=1.0),
        result(8, 0.75, steps=8, sampler="ddim", guidance_low=0.25, eta=0.0),
    ]
    head, *rows, note = results.sweep_table(found).splitlines()
    names = "sampler steps guidance from to eta seed calls FD FD/floor agreement precision recall"
    assert head.split() == [*names.split(), "images/s"]
    assert rows[0].split() == [
        *("*", "dpmpp", "4", "1", "0.4", "0.9", "0.3", "0", "4"),
        *("0.5000", "2.00", "99.50%", "0.910", "0.820", "51"),
    ]
    assert rows[1].split()[:8] == ["ddim", "8", "2.8", "0.25", "0.9", "0", "0", "8"]
    assert rows[0].index("dpmpp") == rows[1].index("ddim") == head.index("sampler")
    assert "lower FD" in note


def test_a_sweep_shows_the_eta_that_ddpm_has_whatever_the_setting():
    for sampler, eta in (("ddpm", "1"), ("ddim", "0.3")):
        row = results.sweep_table([result(4, 0.5, sampler=sampler, eta=0.3)]).splitlines()[1]
        assert row.split()[6] == eta


# ---- files


@pytest.fixture
def model(tmp_path) -> LoadedModel:
    path = tmp_path / "model_epoch_1.pth"
    return LoadedModel(path, Config(), None, None, Progress(), torch.device("cpu"), 64 * "0")


OTHERS = {"sampler": "ddim", "steps": 7, "guidance": 1.5, "guidance_low": 0.1}
OTHERS |= {"guidance_high": 0.8, "eta": 0.7, "clip_x_0": False, "seed": 3}


def test_results_of_other_models_or_settings_have_other_files(model, tmp_path):
    assert set(OTHERS) == {*Config.names("sampling"), "seed"}
    files = [results.result_file(model, Config(), 128), results.result_file(model, Config(), 256)]
    for name, value in OTHERS.items():
        files.append(results.result_file(model, Config(**{name: value}), 128))
    other = {"float32": "bf16", "bf16": "float32"}[pick_precision("auto", model.device)]
    files.append(results.result_file(model, Config(precision=other), 128))
    others = replace(model, sha256=64 * "1"), replace(model, path=tmp_path / "other.pth")
    files += [results.result_file(other, Config(), 128) for other in others]
    assert len(set(files)) == len(files)
    assert {file.parent.name for file in files} == {"metrics"}
    elsewhere = results.result_file(model, Config(output_dir="elsewhere"), 128)
    assert (elsewhere.name, elsewhere.parts[0]) == (files[0].name, "elsewhere")


def test_a_written_result_is_read_again_if_it_is_of_the_same_thing(tmp_path):
    file = tmp_path / "metrics" / "a.json"
    identity = {"evaluator": "0123456789abcdef", "settings": result()["settings"]}
    assert results.read_result(file, identity) is None
    results.write_result(file, result())
    known = results.read_result(file, identity)
    made_by = known.pop("made_by")
    assert known == result()
    assert (made_by["torch"], made_by["numpy"]) == (torch.__version__, np.__version__)
    assert set(made_by) == {"torch", "numpy", "python", "machine", "date"}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
    for other in ({"evaluator": "another"}, {"settings": {}}, {"model": "unknown"}):
        assert results.read_result(file, identity | other) is None


def test_a_result_that_lacks_a_metric_of_the_table_is_measured_again(tmp_path):
    incomplete = result()
    del incomplete["real"]["nearest_median"]
    results.write_result(tmp_path / "a.json", incomplete)
    assert results.read_result(tmp_path / "a.json", {"source": "model.pth"}) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_a_damaged_result_is_named(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: damaged; delete it"):
        results.read_result(file, {"model": "m"})


def test_a_result_is_plain_json(tmp_path):
    results.write_result(tmp_path / "a.json", result())
    assert json.loads((tmp_path / "a.json").read_text())["samples"]["fd"] == 0.5


def test_a_result_of_another_evaluator_is_kept_aside(tmp_path, capsys):
    file = tmp_path / "a.json"
    results.write_result(file, result())
    results.write_result(file, result() | {"images": 256})  # of the same: replaced
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    for evaluator in ("fedcba9876543210", "0123456789abcdef", "fedcba9876543210"):
        results.write_result(file, result() | {"evaluator": evaluator})
    kept = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    first, second = "0123456789abcdef", "fedcba9876543210"
    made_by = {name: each["evaluator"] for name, each in kept.items()}
    assert made_by == {
        "a.json": second,
        "a-by-01234567.json": first,
        "a-by-01234567_.json": first,
        "a-by-fedcba98.json": second,
    }
    assert kept["a-by-01234567.json"]["images"] == 256
    assert (
        f"an earlier result is kept in {tmp_path / 'a-by-fedcba98.json'}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("lost", ["sampling", "samples"])
def test_a_models_result_that_no_sweep_could_show_is_measured_again(tmp_path, lost):
    incomplete = result() | {"model": "m"}
    if lost == "sampling":
        del incomplete["sampling"]
    else:
        del incomplete["samples"]["agreement"]
    results.write_result(tmp_path / "a.json", incomplete)
    assert results.read_result(tmp_path / "a.json", {"model": "m"}) is None


def test_unmatched_grey_levels_have_a_result_of_their_own():
    device = torch.device("cpu")
    model = LoadedModel(Path("m.pth"), Config(), None, None, Progress(), device, 64 * "0")
    files = {results.result_file(model, Config(match_levels=on), 128) for on in (True, False)}
    assert len(files) == 2


def test_a_result_with_costly_figures_is_kept_beside_one_without(tmp_path):
    costly = result() | {"cas": {"synthetic": [0.9], "real": [0.99]}}
    results.write_result(tmp_path / "a.json", costly)
    results.write_result(tmp_path / "a.json", result())
    (kept,) = set(tmp_path.iterdir()) - {tmp_path / "a.json"}
    assert results.read_result(kept, {})["cas"] == costly["cas"]


def test_a_result_on_other_test_images_is_kept(tmp_path):
    for digit in "12":
        results.write_result(tmp_path / "a.json", result() | {"test_sha256": 64 * digit})
    assert len(list(tmp_path.iterdir())) == 2


def test_the_table_gives_mean_and_spread_and_names_labels():
    score = {"c2st": {"exact": {"samples": [0.9, 0.8, 0.7], "real": [0.5, 0.5, 0.5]}}}
    shown = row(results.table(result() | score), "C2ST, exact pixels")
    assert shown == "80.00% ± 10.00% 50.00% ± 0.00% (training images)"
    found = metrics(fd_over_floor=2, copies=0, by_digit=[1, 0.5], confusions=[[1, 0, 7]])
    named = result() | {"label_names": ["cat", "dog"], "samples": found, "real": found}
    assert row(results.table(named), "  confusions") == "dog as cat: 7 dog as cat: 7"
    assert row(results.table(named), "  dog") == "50.00% 50.00%"
