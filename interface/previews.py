"""The grids of samples that show how training goes."""

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from checkpoint import TrainState
from config import Config
from data import to_uint8
from interface import folder
from interface.picture import image_grid, name_rows, save_png
from interface.runs import Run
from interface.terminal import sampling_bar
from pipeline import Pipeline
from system import distributed
from system.values import parse_labels


@distributed.first_only
def draw_preview(run: Run, state: TrainState, cfg: Config | None = None) -> None:
    """Write a grid with a row for each label, always from the same noise, to compare epochs, by the
    run's settings or other ones. A stop signal ends it."""
    cfg = cfg or run.cfg
    path = folder.grid_path(run.cfg.output_dir, state.progress)
    if state.guide is None and cfg.guide_fraction > 0 and cfg.guidance > 1:
        cfg = replace(cfg, guidance=1.0)  # the setting is for a guide, and there is none yet
    labels = list(range(min(10, cfg.num_classes)))  # what "all" means here, to keep the grid short
    if cfg.preview_digits != "all":
        labels = parse_labels(cfg.preview_digits, cfg.label_names)
    pipeline = Pipeline(cfg, state.ema, state.guide, state.levels)
    y = torch.tensor(labels).repeat_interleave(cfg.preview_columns).to(state.totals.device)
    with run.side_output(path), sampling_bar(cfg.steps, pipeline.batch_count(len(y))) as advance:

        def on_state(number: int, x: Tensor) -> None:
            advance(number, x)
            if run.signals:
                raise InterruptedError("stopped by a signal")

        x_0 = pipeline.draw(y, on_state)
        path.parent.mkdir(exist_ok=True)
        grid = image_grid(to_uint8(x_0), cfg.preview_columns)
        if cfg.class_names:
            grid = name_rows(grid, [cfg.label_names[label] for label in labels])
        run.make_way(path)
        save_png(grid, path)
        tqdm.write(f"wrote {path}")
        if run.board:
            run.board.grid(grid, state.progress.step)


@distributed.first_only
def draw_missing_previews(run: Run) -> None:
    """Draw the grids that a kill or a full disk prevented, from their checkpoints, with their
    settings: one can have been copied here from another run."""
    for path, grid in folder.without_grid(run.cfg.output_dir):
        if not run.signals:
            with run.side_output(grid):
                theirs = Config.from_dict(checkpoint.load(path, only_look=True)["config"])
                cfg = replace(theirs, **run.cfg.select("machine"))
                state = TrainState.initial(cfg, run.state.totals.device)
                checkpoint.restore(path, state)
                draw_preview(run, state, cfg)
