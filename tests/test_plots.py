"""The plots: what is drawn in them, and that they become files."""

import numpy as np
import pytest
from PIL import Image

from config import Config
from evaluation import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be written."""
    found = []
    monkeypatch.setattr(plots, "save", lambda figure, path: found.append(figure))
    return found


# As csv.DictReader reads metrics.csv
ROWS = [
    {"step": "10", "loss": "0.5", "learning_rate": "0.004", "images_per_second": "900.5"},
    {"step": "20", "loss": "0.25", "learning_rate": "0.002", "images_per_second": "950"},
]
ROWS[1] |= {"validation_loss": "0.3"}  # the first is of a version that had none


def results() -> list[dict]:
    """A sweep of two samplers, the second of them not in the order of network calls."""
    points = [("ddim", 4, 2.0), ("ddim", 8, 1.0), ("dpmpp", 8, 0.5), ("dpmpp", 4, 1.5)]
    return [
        {
            "settings": Config(sampler=sampler, guidance=1.0).select("sampling") | {"seed": 3},
            "sampling": {"calls": calls},
            "samples": {"fd": fd},
            "real": {"fd": 0.25},
        }
        for sampler, calls, fd in points
    ]


def test_training_curves_are_drawn_over_the_steps(figures, tmp_path):
    plots.plot_training(ROWS, tmp_path / "training.png")
    drawn = {axes.get_title(): axes.lines[0].get_xydata() for axes in figures[0].axes}
    assert list(drawn) == ["loss", "learning rate", "images per second"]
    np.testing.assert_array_equal(drawn["loss"], [[10, 0.5], [20, 0.25]])
    np.testing.assert_array_equal(drawn["learning rate"], [[10, 0.004], [20, 0.002]])
    np.testing.assert_array_equal(drawn["images per second"], [[10, 900.5], [20, 950]])
    validation = figures[0].axes[0].lines[1]
    np.testing.assert_array_equal(validation.get_xydata(), [[10, np.nan], [20, 0.3]])
    assert [len(axes.lines) for axes in figures[0].axes] == [2, 1, 1]
    assert all(axes.get_ylim()[0] == 0 for axes in figures[0].axes)


def test_a_sweep_has_a_line_for_each_sampler_in_the_order_of_network_calls(figures, tmp_path):
    plots.plot_sweep(results(), [False, False, True, True], tmp_path / "sweep.png")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    (ddim,) = [points for label, points in lines.items() if label.startswith("ddim,")]
    (dpmpp,) = [points for label, points in lines.items() if label.startswith("dpmpp,")]
    np.testing.assert_array_equal(ddim, [[4, 2.0], [8, 1.0]])
    np.testing.assert_array_equal(dpmpp, [[4, 1.5], [8, 0.5]])
    assert set(lines["real test images"][:, 1]) == {0.25}
    (circles,) = axes.collections
    np.testing.assert_array_equal(circles.get_offsets(), [[8, 0.5], [4, 1.5]])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("guidance 1 (0.4 to 0.9), seed 3" in text for text in legend)
    assert {"best", "real test images"} <= set(legend)


def test_results_of_another_guidance_are_another_line(figures, tmp_path):
    more = results()
    more[1]["settings"]["guidance"] = 2.0
    plots.plot_sweep(more, [True] * 4, tmp_path / "sweep.png")
    labels = [line.get_label() for line in figures[0].axes[0].lines]
    assert len([label for label in labels if label.startswith("ddim,")]) == 2


def test_plots_are_written_whole_into_a_new_folder(tmp_path):
    folder = tmp_path / "images"
    plots.plot_training(ROWS[:1], folder / "training.png")
    plots.plot_sweep(results(), [True] * 4, folder / "sweep.png")
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.png", "training.png"]
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width > 300
            assert np.asarray(picture.convert("L")).std() > 1
