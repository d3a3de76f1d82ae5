"""The run folder of train.py: what a run will do, what it keeps, and what it logs."""

import csv
import io
import math
import shlex
import shutil
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import checkpoint
from checkpoint import Progress, TrainState, atomic_write
from config import Config, parse_duration
from interface.cli import settings_for_training

METRICS = ("epoch", "step", "loss", "learning_rate", "grad_norm", "images_per_second", "seconds")


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


def make_plan(
    given: dict[str, Any], resume: bool = False, load: Path | None = None, more_epochs: int = 0
) -> Plan:
    """Decide what to do from the flags (`given`: settings) and from what the run folder holds.
    Raises ValueError if a checkpoint cannot be read, or for flags that do not fit it."""
    if resume:
        load = newest_of_run(Path(given.get("output_dir", Config().output_dir), "models"))
    saved = checkpoint.load(load) if load else {"config": {}, "progress": {}}
    trained = cfg = Config.from_dict(saved["config"])
    progress = Progress(**saved["progress"])
    plan = Plan(trained, "train", load, progress, "model" in saved)

    if "epochs" in given:
        cfg = replace(trained, budget="")
    elif more_epochs:
        begun = progress.epoch + (progress.images > 0)  # the current epoch is finished first
        cfg = replace(trained, budget="", epochs=begun + more_epochs)
    elif "budget" in given and load and not resume:
        progress.budget_from, plan.changed = progress.seconds, True  # a new budget, from here on
    elif load and not resume:
        plan.action = "describe"

    if not load:
        plan.cfg = replace(cfg, **given)
    elif plan.action == "train":
        plan.cfg, plan.notes = settings_for_training(cfg, given, progress.images > 0)
        plan.changed |= replace(trained, **plan.cfg.select("machine")) != plan.cfg
        if fraction_done(plan.cfg, progress, images_per_epoch=math.inf) >= 1:
            plan.action = "finished"
    return plan


def newest_of_run(models: Path) -> Path | None:
    """The newest checkpoint of the run in a folder; None if it has none. Raises ValueError if it
    has some but none can be read."""
    found = checkpoint.list_checkpoints(models, "model_epoch_*.pth")
    if not found and list(models.glob("model_epoch_*.pth")):
        raise ValueError(f"{models}: none of its checkpoints can be read; repair or move them")
    return found[-1][0] if found else None


def fraction_done(cfg: Config, progress: Progress, images_per_epoch: float) -> float:
    """How much of the whole run is done: 1 or a little more at its end."""
    if cfg.budget:
        return (progress.seconds - progress.budget_from) / parse_duration(cfg.budget)
    return (progress.epoch + progress.images / images_per_epoch) / cfg.epochs


def describe(plan: Plan) -> str:
    """Where the plan's checkpoint stands, and how to go on from it."""
    cfg, progress = plan.cfg, plan.progress
    length = f"of a budget of {cfg.budget}" if cfg.budget else f"of {cfg.epochs} epochs"
    minutes = progress.seconds / 60
    stands = f"{plan.start}: {progress} {length} planned, {minutes:.1f} min trained."
    if not plan.trainable:
        return f"{stands}\nIt was reduced to what drawing needs and cannot be trained further."
    command = f"python train.py --load_checkpoint_path {shlex.quote(str(plan.start))}"
    more = f"--continue_training_epochs K{machine_flags(cfg)}"
    return f"{stands}\nTo train it for K more epochs: {command} {more}"


def machine_flags(cfg: Config) -> str:
    """The flags for this computer that differ from config.py: a checkpoint does not carry them."""
    usual = Config().select("machine")
    changed = {n: v for n, v in cfg.select("machine").items() if v != usual[n]}
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in changed.items())


class Run:
    """A run under way: its clock, log and checkpoints."""

    def __init__(self, plan: Plan, state: TrainState, images: int, began: float) -> None:
        """`began` (of time.perf_counter) is when the run's time starts to count. Raises ValueError
        if a batch is larger than the data set or a new budget is already spent."""
        self.plan, self.cfg, self.state, self.last_saved = plan, plan.cfg, state, plan.start
        if self.cfg.batch_size > images:
            raise ValueError(
                f"batch_size = {self.cfg.batch_size}: choose at most {images} (images)"
            )
        self.images_per_epoch = images - images % self.cfg.batch_size
        self.bar: tqdm | None = None
        # Reading the loss makes the CPU wait for a GPU, so that is done seldom
        self.log_every = 1 if state.totals.device.type == "cpu" else 50
        spent = state.progress.seconds - state.progress.budget_from
        self.began = began - state.progress.seconds
        self.update_clock()
        if self.done and spent == 0:
            fault = "start-up alone takes longer; give more time"
            raise ValueError(f"budget = {self.cfg.budget!r}: {fault}")

    def update_clock(self) -> None:
        self.state.progress.seconds = time.perf_counter() - self.began

    @property
    def fraction(self) -> float:
        """The part of the whole run that is done, 0 to 1."""
        return fraction_done(self.cfg, self.state.progress, self.images_per_epoch)

    @property
    def done(self) -> bool:
        return self.fraction >= 1

    @property
    def epoch_done(self) -> bool:
        return self.state.progress.images == self.images_per_epoch

    @property
    def save_due(self) -> bool:
        progress = self.state.progress
        return self.done or (progress.images == 0 and progress.epoch % self.cfg.save_every == 0)

    def open(self) -> None:
        """Make the folders, keep earlier results aside, and say what will be done. A new plan is
        saved at once, so that --resume knows it even if the run is killed before its next save."""
        cfg, start, progress = self.cfg, self.plan.start, self.state.progress
        path = checkpoint_path(cfg, progress)
        saves_plan = start is not None and (self.plan.changed or start.resolve() != path.resolve())
        prepare_folders(self.plan, path if saves_plan else None)
        until = f"until {cfg.budget} are spent" if cfg.budget else f"to epoch {cfg.epochs}"
        print(f"training from {progress} {until}; results in {cfg.output_dir}", flush=True)
        if saves_plan:
            self.save()

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
        self.check_finite()
        loss = float(self.state.totals[0]) * cfg.batch_size / progress.images
        self.bar.set_postfix_str(f"loss {loss:.4f}, {self.time_left()}")
        self.bar.update(progress.images - self.bar.n)

    def log_epoch(self) -> None:
        """Add the epoch, or the part of it that was trained, to metrics.csv and print it."""
        self.close_bar()
        state, progress = self.state, self.state.progress
        loss, grad_norm = (state.totals * self.cfg.batch_size / progress.images).tolist()
        epoch = f"{round(progress.epoch + progress.images / self.images_per_epoch, 2):g}"
        rate, lr = progress.images / state.epoch_seconds, state.optimizers[0].param_groups[0]["lr"]
        row = (epoch, progress.step, loss, lr, grad_norm, rate, progress.seconds)
        path = Path(self.cfg.output_dir, "metrics.csv")
        write_metrics(path, [*read_metrics(path), dict(zip(METRICS, row, strict=True))])
        tqdm.write(f"epoch {epoch}: loss {loss:.4f}, {rate:.0f} images/s, {self.time_left()}")

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def save(self) -> None:
        self.check_finite()
        self.close_bar()  # still open where a signal stops the run inside an epoch
        self.last_saved = checkpoint_path(self.cfg, self.state.progress)
        checkpoint.save(self.last_saved, self.cfg, self.state)
        tqdm.write(f"wrote {self.last_saved}")

    def draw_curves(self) -> None:
        """Plot metrics.csv, once it has a row, as images/training.png."""
        path = Path(self.cfg.output_dir, "images", "training.png")
        rows = read_metrics(Path(self.cfg.output_dir, "metrics.csv"))
        try:
            from evaluation.plots import plot_training  # here, because matplotlib is slow to import
        except ImportError as error:  # no reason to lose a run
            tqdm.write(f"{path} not written: {error}; pip install -r requirement.txt")
            rows = []
        if rows:
            plot_training(rows, path)
            tqdm.write(f"wrote {path}")

    def check_finite(self) -> None:
        if not math.isfinite(float(self.state.totals.sum())):
            self.close_bar()
            step = self.state.progress.step
            fault = f"the loss or its gradient is no longer finite at step {step}"
            good = f"last good checkpoint: {self.last_saved or 'none yet'}"
            remedy = f"try a lower --lr than {self.cfg.learning_rate}"
            raise FloatingPointError(f"{fault}; {good}; {remedy}")

    def time_left(self) -> str:
        """What is left of the whole run; without a budget, from its average speed so far."""
        whole = self.state.progress.seconds / self.fraction
        if self.cfg.budget:
            whole = parse_duration(self.cfg.budget)
        minutes, seconds = divmod(max(0, round(whole * (1 - self.fraction))), 60)
        return f"{minutes}m{seconds:02d}s left"


def note_stop_signals() -> list[int]:
    """From now on the first Ctrl-C or SIGTERM is only appended to the returned list, so that the
    current step can finish; a second one has its usual effect."""
    noted: list[int] = []
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def note(signum: int, frame: object) -> None:
        noted.append(signum)
        signal.signal(signum, usual[signum])

    for signum in usual:
        signal.signal(signum, note)
    return noted


def checkpoint_path(cfg: Config, progress: Progress) -> Path:
    return Path(cfg.output_dir, "models", f"model_{progress.name}.pth")


def prepare_folders(plan: Plan, rewritten: Path | None) -> None:
    """Make the output folders, and see that this run overwrites nothing.

    A run that continues a checkpoint of this folder keeps what led up to it. Whatever comes after
    that point, or all files of an unrelated earlier run, moves to output_dir/earlier. A checkpoint
    that will be `rewritten` with a new plan is copied there, as pictures name a model by its hash.
    """
    out = Path(plan.cfg.output_dir)
    models, images, metrics = out / "models", out / "images", out / "metrics.csv"
    models.mkdir(parents=True, exist_ok=True)
    images.mkdir(exist_ok=True)
    for partial in models.glob(".*.partial"):  # of a save that was killed
        partial.unlink()
    files = [*models.glob("model_epoch_*.pth"), *images.glob("samples_epoch_*.png")]
    curves = images / "training.png"
    if plan.start is None or plan.start.resolve().parent != models.resolve():
        set_aside(out / "earlier", [*files, metrics, curves], copied=[])
        return
    names = {  # of the checkpoints that are kept: model_<name>.pth, with samples_<name>.png
        path.stem.removeprefix("model_")
        for path, progress in checkpoint.list_checkpoints(models, "model_epoch_*.pth")
        if progress.step <= plan.progress.step
    }
    moved = [path for path in files if path.stem.partition("_")[2] not in names]
    copied = [rewritten] if rewritten and rewritten not in moved else []
    rows = read_metrics(metrics)
    kept_rows = [row for row in rows if int(row["step"]) <= plan.progress.step]
    if moved or copied or kept_rows != rows:
        set_aside(out / "earlier", [*moved, curves], [*copied, metrics])
    if rows:
        write_metrics(metrics, kept_rows)


def set_aside(earlier: Path, moved: list[Path], copied: list[Path]) -> None:
    """Move and copy those files that exist into a new folder of `earlier`, named after the time."""
    transfers = [(shutil.move, path) for path in moved if path.exists()]
    transfers += [(shutil.copy2, path) for path in copied if path.exists()]
    if not transfers:
        return
    folder = earlier / time.strftime("%Y-%m-%d_%H%M%S")
    while folder.exists():
        folder = folder.with_name(folder.name + "_")
    folder.mkdir(parents=True)
    for transfer, path in transfers:
        transfer(path, folder / path.name)
    print(f"what this run would overwrite is kept in {folder}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows of metrics.csv, leaving out a torn one; none if the file is missing."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    whole = [row for row in rows if all(row.get(name) for name in METRICS)]
    return [row for row in whole if row["step"].isdecimal()]


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, METRICS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
