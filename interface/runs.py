"""A run of train.py under way: its clock, when it saves and logs, how signals stop it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from checkpoint import TrainState
from diffusion import Diffusion
from interface import folder
from interface.board import Board
from interface.cli import train_command
from interface.plan import Plan, fraction_done
from levels import GreyLevels
from system import distributed
from system.files import cannot_write, first_line, make_folder
from system.machine import pick_precision
from system.values import parse_duration


class Run:
    """A run under way: its clock, log and checkpoints. All processes agree on the time and on when
    to stop; the first one alone logs and writes."""

    def __init__(self, plan: Plan, state: TrainState, images: int, began: float) -> None:
        """`began` (of time.perf_counter) is when the run's time starts to count. Raises ValueError
        if a batch is larger than the data set or a new budget is already spent."""
        self.plan, self.cfg, self.state, self.last_saved = plan, plan.cfg, state, plan.start
        self.images = images
        if self.cfg.batch_size > images:
            raise ValueError(
                f"batch_size = {self.cfg.batch_size}: choose at most {images} (images)"
            )
        self.images_per_epoch = images - images % self.cfg.batch_size
        if state.progress.images >= self.images_per_epoch:
            inside = f"is inside an epoch of more than {images:,} images"
            raise ValueError(f"{plan.start}: {inside}; give it the data that it was trained on")
        self.bar: tqdm | None = None
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        self.board: Board | None = None
        self.warned: set[str] = set()  # kinds of files that could not be written
        self.own_files: set[Path] = set()  # checkpoints and grids that this run may write over
        self.signals: list[int] = []  # that this process has received
        self.stopped_by = 0  # the signal by which all processes stop
        # Reading the loss makes the CPU wait for a GPU, so that is done seldom
        self.log_every = 1 if state.totals.device.type == "cpu" else 50
        budget_is_new = state.progress.seconds == state.progress.budget_from
        self.began = began - state.progress.seconds
        self.update_clock()
        if self.done and budget_is_new:
            fault = "start-up alone takes longer; give more time"
            raise ValueError(f"budget = {self.cfg.budget!r}: {fault}")

    def update_clock(self) -> None:
        """Take the first process's time, and check whether a signal asks to stop."""
        seconds = time.perf_counter() - self.began if distributed.rank() == 0 else 0.0
        self.state.progress.seconds, stop = distributed.largest(
            seconds, max(self.signals, default=0)
        )
        self.stopped_by = int(stop)

    def check_signals(self) -> None:
        """Note whether any process has received a signal to stop."""
        [stop] = distributed.largest(max(self.signals, default=0))
        self.stopped_by = int(stop)

    @property
    def fraction(self) -> float:
        """How much of the whole run is done, 0 to just over 1."""
        return fraction_done(self.cfg, self.state.progress, self.images_per_epoch)

    @property
    def done(self) -> bool:
        return self.fraction >= 1

    @property
    def epoch_done(self) -> bool:
        return self.state.progress.images >= self.images_per_epoch

    def save_due(self, epoch_done: bool) -> bool:
        """Whether to save now; called after each step."""
        return self.done or (epoch_done and self.state.progress.epoch % self.cfg.save_every == 0)

    @property
    def is_saved(self) -> bool:
        """Whether the last checkpoint, written or resumed from, holds the present state."""
        return self.last_saved == folder.checkpoint_path(self.cfg.output_dir, self.state.progress)

    def announce(self) -> None:
        """Say what is trained, on what, and whether this machine could do more."""
        device, processes = self.state.totals.device, distributed.processes()
        size = sum(parameter.numel() for parameter in self.state.model.parameters())
        where = f"{device}" if processes == 1 else f"{processes} processes ({device.type})"
        if device.type == "cuda" and processes == 1 < torch.cuda.device_count():
            command = f"torchrun --standalone --nproc_per_node={torch.cuda.device_count()} train.py"
            print(f"this uses one of {torch.cuda.device_count()} GPUs; {command} uses all")
        precision = pick_precision(self.cfg.precision, device)
        print(f"U-Net of {size:,} parameters on {where}, {precision}; {self.images:,} images")

    def open(self) -> bool:
        """Make the folders, set earlier results aside, and say what will be done. A run that goes
        on with another plan, or in another folder, is saved at once: --resume must know of it even
        if the run is killed before its next save. Returns whether anything is left to do."""
        out = self.cfg.output_dir
        if self.done and distributed.from_first(lambda: folder.is_complete(out)):
            print("nothing left to do: starting up took the rest of the budget")
            return False
        self.announce()
        cfg, start, progress = self.cfg, self.plan.start, self.state.progress
        path = folder.checkpoint_path(cfg.output_dir, progress)
        saves_plan = start is not None and (self.plan.changed or start.resolve() != path.resolve())
        rewritten = path if saves_plan else None
        self.rows = distributed.from_first(
            lambda: folder.prepare_folders(cfg.output_dir, start, progress, rewritten)
        )
        self.own_files.add(path)  # it is this run's, or has been copied
        self.write_rows()
        until = f"for a budget of {cfg.budget}" if cfg.budget else f"to epoch {cfg.epochs}"
        print(f"training from {progress} {until}; output folder: {cfg.output_dir}", flush=True)
        if saves_plan:
            self.save()
        if self.plan.tensorboard and distributed.rank() == 0:
            with self.side_output(Path(cfg.output_dir, "tensorboard")):
                self.board = Board(cfg, progress.step)
        self.signals = note_stop_signals()
        return True

    @distributed.first_only
    def show_progress(self) -> None:
        """Show the running loss on the progress bar, if it is time to. Raises FloatingPointError
        if the loss is no longer finite."""
        cfg, progress = self.cfg, self.state.progress
        if self.bar is None:
            before = progress.images - cfg.batch_size  # not 0 if the run resumes inside an epoch
            title = f"epoch {progress.epoch + 1}" + ("" if cfg.budget else f"/{cfg.epochs}")
            look = {"unit": " images", "leave": False, "disable": None, "dynamic_ncols": True}
            self.bar = tqdm(desc=title, total=self.images_per_epoch, initial=before, **look)
        if progress.step % self.log_every and not self.epoch_done:
            return
        if not math.isfinite(float(self.state.totals.sum())):
            raise self.diverged("the loss or its gradient is no longer finite")
        loss = float(self.state.totals[0]) * cfg.batch_size / progress.images
        validation = self.rows[-1].get(folder.VALIDATION) if self.rows else None
        seen = f", validation {float(validation):.4f}" if validation else ""
        self.bar.set_postfix_str(f"loss {loss:.4f}{seen}, {self.time_left()}")
        self.bar.update(progress.images - self.bar.n)

    @distributed.first_only
    def log_epoch(self, validation: float) -> None:
        """Add the epoch, or the part of it that was trained, to metrics.csv and print it. Raises
        FloatingPointError for figures that are not finite."""
        self.close_bar()
        state, progress = self.state, self.state.progress
        loss, grad_norm = (state.totals * self.cfg.batch_size / progress.images).tolist()
        epoch = f"{round(progress.epoch + progress.images / self.images_per_epoch, 2):g}"
        rate, lr = progress.images / state.epoch_seconds, state.optimizers[0].param_groups[0]["lr"]
        if not all(map(math.isfinite, (loss, grad_norm, validation))):
            raise self.diverged("the loss is no longer finite")
        row = (epoch, progress.step, loss, validation, lr, grad_norm, rate, progress.seconds)
        self.rows.append(dict(zip(folder.METRICS, row, strict=True)))
        self.write_rows()
        if self.board:
            with self.side_output(Path(self.cfg.output_dir, "tensorboard")):
                self.board.row(self.rows[-1])
        losses = f"loss {loss:.4f}, validation {validation:.4f}"
        tqdm.write(f"epoch {epoch}: {losses}, {rate:.0f} images/s, {self.time_left()}")

    @distributed.first_only
    def write_rows(self, elsewhere: str = "") -> None:
        path = Path(elsewhere or self.cfg.output_dir, "metrics.csv")
        if self.rows and (elsewhere or folder.is_ours(self.cfg.output_dir)):
            with self.side_output(path):
                folder.write_metrics(path, self.rows)

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    @distributed.first_only
    def save(self) -> None:
        """Write a checkpoint. Raises ValueError if it fails, FloatingPointError if training did."""
        self.close_bar()  # still open where a signal stops the run inside an epoch
        out = self.cfg.output_dir
        is_ours = folder.is_ours(out)
        try:
            safe = out if is_ours else folder.spare_folder(out)
            path = folder.checkpoint_path(safe, self.state.progress)
            make_folder(path.parent)  # it may have been removed
            self.make_way(path)
            checkpoint.save(path, self.cfg, self.state)
        except ValueError as error:
            good = f"last good checkpoint: {self.last_saved or 'none yet'}"
            raise ValueError(f"{error}; {good}") from None
        except FloatingPointError as error:
            raise self.diverged(str(error)) from None
        self.last_saved = path
        tqdm.write(f"wrote {path}")
        if not is_ours:
            self.write_rows(safe)
            fault = "was moved, removed or replaced during the run, which stops here"
            raise ValueError(f"output_dir = {out!r}: {fault}; {self.to_continue(safe)}")

    def make_way(self, path: Path) -> None:
        """Before a file is written: set aside one of that name which is not of this run, such as
        another run's checkpoint that was copied here. Raises ValueError if that fails."""
        if path not in self.own_files:
            try:
                folder.make_way(path)
            except OSError as error:
                raise ValueError(f"{path}: {cannot_write(error)}") from None
        self.own_files.add(path)

    @distributed.first_only
    def save_with_levels(self, images: Tensor, labels: Tensor) -> None:
        """Measure the grey levels of the averaged model, and write a checkpoint with them."""
        diffusion, state = Diffusion(self.cfg), self.state
        denoiser = diffusion.guided(state.ema, state.guide)
        state.levels = None
        with self.side_output("a checkpoint's grey levels"):  # which it can do without
            state.levels = GreyLevels.of_model(diffusion, denoiser, images, labels)
        self.save()

    @contextmanager
    def side_output(self, what: Path | str) -> Iterator[None]:
        """For output that training can do without: if it fails, whatever the reason, say so once
        for each kind, and go on."""
        try:
            yield
        except Exception as error:
            kind = Path(what).stem.partition("_")[0]
            if kind not in self.warned:
                tqdm.write(f"{what} not written: {first_line(error)}")
            self.warned.add(kind)

    @distributed.first_only
    def draw_curves(self) -> None:
        """Plot the rows of metrics.csv, if there is one, as images/training.png."""
        path = Path(self.cfg.output_dir, "images", "training.png")
        if not self.rows or not folder.is_ours(self.cfg.output_dir):
            return
        with self.side_output(path):
            from evaluation.plots import plot_training  # here, because matplotlib is slow to import

            plot_training(self.rows, path)
            tqdm.write(f"wrote {path}")

    @distributed.first_only
    def finish(self) -> None:
        """Write metrics.csv and its curves if that failed before, and say how to draw if the model
        has no guide."""
        if "metrics" in self.warned:  # the kind of metrics.csv
            self.write_rows()
        if folder.curves_are_old(self.cfg.output_dir):
            self.draw_curves()
        if self.state.guide is None and not self.cfg.is_student:
            classifier_free = "1.5 (classifier-free guidance)"
            how = classifier_free if self.cfg.label_dropout > 0 else "1 (no guidance)"
            short = ", as the run ended within its warm-up" if self.cfg.guide_fraction > 0 else ""
            print(f"this model has no guide{short}: draw with --guidance {how}")

    def report_stop(self) -> int:
        """Say how to continue a run that a signal stopped. Returns the exit code, 128 + signal."""
        print(f"stopped at {self.state.progress}; {self.to_continue(self.cfg.output_dir)}")
        return 128 + self.stopped_by

    def to_continue(self, output_dir: str) -> str:
        """How to go on with the run from its last checkpoint in a folder."""
        flags = ["--resume"] + (["--tensorboard"] if self.plan.tensorboard else [])
        command = train_command(replace(self.cfg, output_dir=output_dir), *flags)
        return f"to continue: {command}"

    def diverged(self, fault: str) -> FloatingPointError:
        self.close_bar()
        good = f"last good checkpoint: {self.last_saved or 'none yet'}"
        remedy = f"try a lower --lr than {self.cfg.learning_rate}"
        return FloatingPointError(f"{fault} at step {self.state.progress.step}; {good}; {remedy}")

    def time_left(self) -> str:
        """What is left of the whole run; without a budget, from its average speed so far."""
        whole = self.state.progress.seconds / self.fraction
        if self.cfg.budget:
            whole = parse_duration(self.cfg.budget)
        minutes, seconds = divmod(max(0, round(whole * (1 - self.fraction))), 60)
        return f"{minutes}m{seconds:02d}s left"


def record_data(plan: Plan, state: TrainState, data: dict[str, Any]) -> None:
    """Record the training data in `state`, and say so if it changed. Raises ValueError if that was
    inside an epoch, because the epoch's order is that of the old data."""
    if state.data is not None and state.data != data:
        what = f"{plan.start} was trained on other data than these {data['images']:,} images"
        if plan.progress.images:
            remedy = "give it the same --data_dir and --max_images, or resume from an epoch's end"
            raise ValueError(f"{what} and is inside an epoch; {remedy}")
        print(f"{what}; continuing with these")
    state.data = data


def note_stop_signals() -> list[int]:
    """From now on the first Ctrl-C, SIGTERM or SIGHUP is only appended to the returned list, so
    that the current step can finish. A second Ctrl-C or SIGTERM ends the process at once; SIGHUP
    does not, because a terminal that closes may send it twice, or after SIGTERM. Under torchrun
    all later signals are ignored, as it repeats the first one to its processes; it kills them
    itself if they take too long."""
    noted: list[int] = []
    after = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):  # not on Windows
        after[signal.SIGHUP] = signal.SIG_IGN
    after = {s: h for s, h in after.items() if signal.getsignal(s) != signal.SIG_IGN}  # as by nohup

    def note(signum: int, frame: object) -> None:
        noted.append(signum)
        for each, handler in after.items():
            signal.signal(each, signal.SIG_IGN if distributed.is_torchrun() else handler)

    for signum in after:
        signal.signal(signum, note)
    return noted
