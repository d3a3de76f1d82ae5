"""A run of train.py: what it will do, its clock, when it saves and logs, how signals stop it."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import checkpoint
from checkpoint import Progress, TrainState
from config import Config
from distill import student_settings
from interface import folder
from interface.board import Board
from interface.cli import as_flags, check_effects, machine_settings, quote, settings_for_training
from interface.requests import find_model, model_with_hash
from other_data import with_classes
from system import distributed
from system.files import first_line, sha256
from system.machine import pick_precision
from system.values import parse_duration


@dataclass
class Plan:
    """What a run of train.py will do."""

    cfg: Config
    action: str = "train"  # or "describe" the checkpoint `start`, or "finished": nothing is left
    start: Path | None = None  # the checkpoint to go on from
    progress: Progress = field(default_factory=Progress)  # where it stands
    trainable: bool = True  # whether `start` has what training needs
    changed: bool = False  # whether the settings or the budget are not those of `start`
    notes: list[str] = field(default_factory=list)  # what the user should know of the settings
    weights: Path | None = None  # the model whose weights a new run begins with
    tensorboard: bool = False  # whether to write event files too


def only_describes(given: dict[str, Any], load: Path | None, more_epochs: int) -> bool:
    """Whether the flags only ask how far the checkpoint `load` has come. Raises ValueError if there
    are flags beside it that only training uses."""
    if load is None or more_epochs or given.keys() & {"epochs", "budget"}:
        return False
    for name in given.keys() - set(Config.names("machine")):
        needed = "to train on, add --continue_training_epochs or --budget"
        raise ValueError(f"{name} = {given[name]!r}: {needed}")
    return True


def make_plan(
    given: dict[str, Any], resume: bool = False, load: Path | None = None, more_epochs: int = 0
) -> Plan:
    """Decide what to do from the flags (`given`: settings) and from what the run folder holds.
    Raises ValueError if a checkpoint cannot be read, or for flags that do not fit it."""
    if resume:
        load = folder.newest_of_run(Path(given.get("output_dir", Config().output_dir), "models"))
    if not load:
        cfg = student_of(given) if given.get("teacher") else with_classes(Config(), given)
        check_effects(cfg, given)
        if cfg.guidance != 1 and cfg.guide_fraction == cfg.label_dropout == 0:
            needs = "needs --guide_fraction or --label_dropout above 0; or else use --guidance 1"
            raise ValueError(f"guidance = {cfg.guidance}: {needs}")
        return Plan(cfg)
    saved = checkpoint.load(load, only_look=resume)  # newest_of_run has just checked that one
    trained, progress = Config.from_dict(saved["config"]), Progress(**saved["progress"])
    plan = Plan(trained, "train", load, progress, trainable="model" in saved)
    if not resume and only_describes(given, load, more_epochs):
        plan.action, plan.cfg = "describe", replace(trained, **machine_settings(given))
        return plan

    cfg = trained
    if "epochs" in given:
        cfg = replace(trained, budget="")
    elif more_epochs:
        begun = progress.epoch + (progress.images > 0)  # the current epoch is finished first
        cfg = replace(trained, budget="", epochs=begun + more_epochs)
    elif "budget" in given and not resume:
        progress.budget_from, plan.changed = progress.seconds, True  # a new budget, from here on

    known, later = dict(given), {}
    new_labels = "dataset" in given and not (resume and given["dataset"] == trained.dataset)
    if new_labels and "preview_digits" in given:  # which can only be checked with them
        later["preview_digits"] = known.pop("preview_digits")
    inside = plan.trainable and progress.images > 0
    plan.cfg, plan.notes = settings_for_training(cfg, known, mid_epoch=inside)
    check_effects(plan.cfg, given)
    if new_labels:
        plan.cfg = with_classes(plan.cfg, later)
        if plan.cfg.num_classes != trained.num_classes:
            fit = f"has {plan.cfg.num_classes} labels, the model {trained.num_classes}"
            raise ValueError(f"dataset = {given['dataset']!r}: {fit}; train a new one")
    plan.changed |= replace(trained, **plan.cfg.select("machine")) != plan.cfg
    # How many images an epoch has is not known yet, so that only whole epochs count
    done = fraction_done(plan.cfg, progress, images_per_epoch=math.inf) >= 1
    if done and folder.is_complete(plan.cfg.output_dir):
        plan.action = "finished"
    if not plan.trainable and not resume:  # a new run, which begins with these weights
        plan.weights, plan.start, plan.progress = load, None, Progress()
        plan.cfg = replace(plan.cfg, epochs=max(1, more_epochs))
    return plan


def student_of(given: dict[str, Any]) -> Config:
    """The settings of a student of the model `given["teacher"]`. Raises ValueError if there is no
    such model, or for a setting that this student cannot have."""
    file = named_teacher(given["teacher"], given.get("output_dir", Config().output_dir))
    teacher = Config.from_dict(checkpoint.load(file)["config"])
    cfg = student_settings(teacher, given.get("student_steps", Config().student_steps))
    for name in Config.names("model", "sampling"):
        if name in given and given[name] != getattr(cfg, name):
            fixed = f"a student of this teacher has {getattr(cfg, name)!r}"
            raise ValueError(f"{name} = {given[name]!r}: {fixed}; drop the flag")
    return replace(cfg, **given)


def named_teacher(text: str, output_dir: str | Path) -> Path:
    """The model that `--teacher` means: in the folder of the student's run, or else in the default
    one, where pretrained.pth is. Raises ValueError if there is none."""
    for out in (output_dir, Config().output_dir):
        with suppress(ValueError):
            return find_model(text, Path(out, "models"))
    raise ValueError(f"teacher = {text!r}: no such model; give a checkpoint's path, or train one")


def find_teacher(cfg: Config, expected: str | None) -> Path:
    """The file of a student's teacher. A run that continues needs the file with the `expected`
    SHA-256: by now its name may mean another one, such as "newest", or it may lie among the earlier
    runs. Raises ValueError if it is not there."""
    if expected is None:
        return named_teacher(cfg.teacher, cfg.output_dir)
    with suppress(ValueError):
        path = named_teacher(cfg.teacher, cfg.output_dir)
        if sha256(path) == expected:
            return path
    for out in (cfg.output_dir, Config().output_dir):
        if path := model_with_hash(expected, Path(out)):
            return path
    lost = f"no file has the SHA-256 of what this student learned from, {expected[:12]}…"
    raise ValueError(f"teacher = {cfg.teacher!r}: {lost}; put it into {cfg.output_dir}/models")


def fraction_done(cfg: Config, progress: Progress, images_per_epoch: float) -> float:
    """How much of the whole run is done: 1 or a little more at its end."""
    if cfg.budget:
        return (progress.seconds - progress.budget_from) / parse_duration(cfg.budget)
    return (progress.epoch + progress.images / images_per_epoch) / cfg.epochs


def describe(plan: Plan) -> str:
    """Where the plan's checkpoint stands, and how to go on from it."""
    cfg, progress = plan.cfg, plan.progress
    epochs = "1 epoch" if cfg.epochs == 1 else f"{cfg.epochs} epochs"
    length = f"a budget of {cfg.budget}" if cfg.budget else epochs
    stands = f"{plan.start}: {progress}, {length} planned, {progress.seconds / 60:.1f} min trained."
    if not plan.trainable:
        stands += "\nIt holds only what drawing needs: a new run would begin with its weights."
    flags = ("--load_checkpoint_path", plan.start, "--continue_training_epochs", "K")
    return f"{stands}\nTo train it for K more epochs: {train_command(cfg, *flags)}"


def check_data(plan: Plan, state: TrainState, data: dict[str, Any]) -> None:
    """Record the training data in `state`, and say so if it changed. Raises ValueError if that was
    inside an epoch, because the epoch's order is that of the old data."""
    if state.data is not None and state.data != data:
        what = f"{plan.start} was trained on other data than these {data['images']:,} images"
        if plan.progress.images:
            remedy = "give it the same --data_dir and --max_images, or resume from an epoch's end"
            raise ValueError(f"{what} and is inside an epoch; {remedy}")
        print(f"{what}; continuing with these")
    state.data = data


def train_command(cfg: Config, *flags: object) -> str:
    """The command that trains with `flags`, and with the settings of this computer that differ from
    config.py, which a run never takes from a checkpoint."""
    defaults, program = Config().select("machine"), ["python"]
    changed = {n: v for n, v in cfg.select("machine").items() if v != defaults[n]}
    if (here := distributed.from_torchrun("LOCAL_WORLD_SIZE", 1)) > 1:
        program = ["torchrun", "--standalone", f"--nproc_per_node={here}"]
    return quote([*program, "train.py", *flags, *as_flags(changed)])


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
        """Stop if any process has received a signal."""
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
        """Whether to save now, at the end of an epoch or of the run."""
        return self.done or (epoch_done and self.state.progress.epoch % self.cfg.save_every == 0)

    @property
    def is_saved(self) -> bool:
        """Whether the last checkpoint written is that of this moment."""
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

    def open(self) -> None:
        """Make the folders, keep earlier results aside, and say what will be done. A new plan is
        saved at once, so that --resume knows it even if the run is killed before its next save."""
        self.announce()
        cfg, start, progress = self.cfg, self.plan.start, self.state.progress
        path = folder.checkpoint_path(cfg.output_dir, progress)
        saves_plan = start is not None and (self.plan.changed or start.resolve() != path.resolve())
        rewritten = path if saves_plan else None
        self.rows = distributed.from_first(
            lambda: folder.prepare_folders(cfg.output_dir, start, progress.step, rewritten)
        )
        self.write_rows()
        until = f"until {cfg.budget} are spent" if cfg.budget else f"to epoch {cfg.epochs}"
        print(f"training from {progress} {until}; results in {cfg.output_dir}", flush=True)
        if saves_plan:
            self.save()
        if self.plan.tensorboard and distributed.rank() == 0:
            with self.side_output(Path(cfg.output_dir, "tensorboard")):
                self.board = Board(cfg, progress.step)
        self.signals = note_stop_signals()

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
        """Add the epoch, or the part of it that was trained, to metrics.csv and print it."""
        self.close_bar()
        state, progress = self.state, self.state.progress
        loss, grad_norm = (state.totals * self.cfg.batch_size / progress.images).tolist()
        epoch = f"{round(progress.epoch + progress.images / self.images_per_epoch, 2):g}"
        rate, lr = progress.images / state.epoch_seconds, state.optimizers[0].param_groups[0]["lr"]
        row = (epoch, progress.step, loss, validation, lr, grad_norm, rate, progress.seconds)
        self.rows.append(dict(zip(folder.METRICS, row, strict=True)))
        self.write_rows()
        if self.board:
            with self.side_output(Path(self.cfg.output_dir, "tensorboard")):
                self.board.row(self.rows[-1])
        losses = f"loss {loss:.4f}, validation {validation:.4f}"
        tqdm.write(f"epoch {epoch}: {losses}, {rate:.0f} images/s, {self.time_left()}")

    @distributed.first_only
    def write_rows(self) -> None:
        path = Path(self.cfg.output_dir, "metrics.csv")
        if self.rows:
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
        path = folder.checkpoint_path(self.cfg.output_dir, self.state.progress)
        try:
            checkpoint.save(path, self.cfg, self.state)
        except ValueError as error:
            raise ValueError(f"{error}; last good checkpoint: {self.last_saved}") from None
        except FloatingPointError as error:
            raise self.diverged(str(error)) from None
        self.last_saved = path
        tqdm.write(f"wrote {path}")

    @contextmanager
    def side_output(self, what: Path | str) -> Iterator[None]:
        """Write a file that training can do without: if that fails, whatever the reason, say so
        once for its kind, and go on."""
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
        if not self.rows:
            return
        with self.side_output(path):
            from evaluation.plots import plot_training  # here, because matplotlib is slow to import

            plot_training(self.rows, path)
            tqdm.write(f"wrote {path}")

    @distributed.first_only
    def finish(self) -> None:
        """Write metrics.csv and its curves if that failed before, and say how to draw."""
        if "metrics" in self.warned:
            self.write_rows()
        if folder.curves_are_old(self.cfg.output_dir):
            self.draw_curves()
        if self.state.guide is None and not self.cfg.is_student:
            classifier_free = "1.5 (classifier-free guidance)"
            how = classifier_free if self.cfg.label_dropout > 0 else "1 (no guidance)"
            short = ", as the run ended within its warm-up" if self.cfg.guide_fraction > 0 else ""
            print(f"this model has no guide{short}: draw with --guidance {how}")

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
