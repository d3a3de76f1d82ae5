"""What a run of train.py will do, decided from its flags and from what the run folder holds."""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import checkpoint
from checkpoint import Progress
from config import Config
from distill import student_settings
from interface import folder
from interface.cli import given_settings, machine_settings, train_command
from interface.models import named_teacher
from interface.settings import check_effects, check_guidance, settings_for_training
from other_data import with_classes
from system import distributed
from system.machine import pick_device
from system.values import counted, parse_duration

ONLY_TRAINING = "only affects training; add --continue_training_epochs or --budget"


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


@contextmanager
def planned(args: Namespace) -> Iterator[Plan]:
    """The plan that train.py's flags ask for; says so if there is nothing to train. During the
    `with` block all processes are connected and the run folder is locked for this run, unless the
    plan only describes a checkpoint."""
    given, more = given_settings(args), args.continue_training_epochs
    resume, load = args.resume, args.load_checkpoint_path
    if only_describes(given, load, more):
        if args.tensorboard:
            raise ValueError(f"--tensorboard {ONLY_TRAINING}")
        plan = make_plan(given, load=load)
        print(describe(plan))
        yield plan
        return
    machine = replace(Config(), **machine_settings(given))
    out = machine.output_dir
    with distributed.joined(pick_device(machine.device)), ExitStack() as stack:
        # The first process locks the folder
        distributed.from_first(lambda: stack.enter_context(folder.own_folder(out)))
        if distributed.is_restart() and distributed.from_first(lambda: folder.holds_this_run(out)):
            resume, load, more = True, None, 0
        plan = distributed.from_first(lambda: make_plan(given, resume, load, more))
        if resume and not plan.start:
            print(f"nothing to resume in {out}: starting from scratch")
        if plan.action == "finished":
            print(f"nothing left to do. {describe(plan)}")
        else:
            for note in plan.notes:
                print(note)
        plan.tensorboard = args.tensorboard
        yield plan


def only_describes(given: dict[str, Any], load: Path | None, more_epochs: int) -> bool:
    """Whether the flags only ask how far the checkpoint `load` has come. Raises ValueError if there
    are flags beside it that only training uses."""
    if load is None or more_epochs or given.keys() & {"epochs", "budget"}:
        return False
    for name in given.keys() - set(Config.names("machine")):
        raise ValueError(f"{name} = {given[name]!r}: {ONLY_TRAINING}")
    return True


def make_plan(
    given: dict[str, Any], resume: bool = False, load: Path | None = None, more_epochs: int = 0
) -> Plan:
    """Decide what to do from the settings `given` as flags, and from what the run folder holds.
    Raises ValueError if a checkpoint cannot be read, or for flags that do not fit it."""
    if resume:
        load = folder.newest_of_run(Path(given.get("output_dir", Config().output_dir), "models"))
    return plan_to_continue(load, given, resume, more_epochs) if load else plan_from_scratch(given)


def plan_from_scratch(given: dict[str, Any]) -> Plan:
    """The plan of a new run."""
    if "epochs" in given:  # wins over a budget in config.py
        given = {"budget": ""} | given
    teacher = given.get("teacher", Config().teacher)
    cfg = student_of(teacher, given) if teacher else with_classes(Config(), given)
    check_effects(cfg, given)
    check_guidance(cfg, cfg, has_guide=cfg.guide_fraction > 0)
    return Plan(cfg)


def plan_to_continue(load: Path, given: dict[str, Any], resume: bool, more_epochs: int) -> Plan:
    """How to go on from the checkpoint `load`, begin anew with its weights, or describe it."""
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

    at_once, later = dict(given), {}
    labels_may_change = "dataset" in given and not (resume and given["dataset"] == trained.dataset)
    if labels_may_change and "preview_digits" in given:  # checked below, once the labels are known
        later["preview_digits"] = at_once.pop("preview_digits")
    inside = plan.trainable and progress.images > 0
    plan.cfg, plan.notes = settings_for_training(cfg, at_once, mid_epoch=inside)
    check_effects(plan.cfg, given)
    has_guide = plan.trainable and saved["guide"]
    if has_guide and plan.cfg.guide_label_noise != trained.guide_label_noise:
        value = f"guide_label_noise = {plan.cfg.guide_label_noise!r}"
        raise ValueError(f"{value}: has no effect, as the guide is already made; drop the flag")
    if given.keys() & {"guidance", "label_dropout"}:
        check_guidance(plan.cfg, plan.cfg, has_guide=plan.cfg.guide_fraction > 0)
    if labels_may_change:
        plan.cfg = with_classes(plan.cfg, later)
        if plan.cfg.num_classes != trained.num_classes:
            fit = f"has {plan.cfg.num_classes} labels, the model {trained.num_classes}"
            raise ValueError(f"dataset = {given['dataset']!r}: {fit}; train a new one")
    plan.changed |= replace(trained, **plan.cfg.select("machine")) != plan.cfg
    # How many images an epoch has is not known yet: only whole epochs count
    done = fraction_done(plan.cfg, progress, images_per_epoch=math.inf) >= 1
    if done and folder.is_complete(plan.cfg.output_dir):
        plan.action = "finished"
    if not plan.trainable and not resume:  # a new run, which begins with these weights
        plan.weights, plan.start, plan.progress = load, None, Progress()
        plan.cfg = replace(plan.cfg, epochs=max(1, more_epochs))
    return plan


def student_of(teacher_name: str, given: dict[str, Any]) -> Config:
    """The settings of a student of a model. Raises ValueError if there is no such model, or for a
    setting that this student cannot have."""
    file = named_teacher(teacher_name, given.get("output_dir", Config().output_dir))
    teacher = Config.from_dict(checkpoint.load(file)["config"])
    cfg = student_settings(teacher, given.get("student_steps", Config().student_steps))
    for name in Config.names("model", "sampling"):
        if name in given and given[name] != getattr(cfg, name):
            fixed = f"a student of this teacher has {getattr(cfg, name)!r}"
            raise ValueError(f"{name} = {given[name]!r}: {fixed}; drop the flag")
    return replace(cfg, **given | {"teacher": teacher_name})


def fraction_done(cfg: Config, progress: Progress, images_per_epoch: float) -> float:
    """How much of the epochs, or of the current budget, is done: 1 or a little more at the end."""
    if cfg.budget:
        return (progress.seconds - progress.budget_from) / parse_duration(cfg.budget)
    return (progress.epoch + progress.images / images_per_epoch) / cfg.epochs


def describe(plan: Plan) -> str:
    """Where the plan's checkpoint stands, and how to go on from it."""
    cfg, progress = plan.cfg, plan.progress
    length = f"a budget of {cfg.budget}" if cfg.budget else counted(cfg.epochs, "epoch")
    stands = f"{plan.start}: {progress}, {length} planned, {progress.seconds / 60:.1f} min trained."
    if not plan.trainable:
        stands += "\nIt holds only what drawing needs: a new run would begin with its weights."
    flags = ("--load_checkpoint_path", plan.start, "--continue_training_epochs", "K")
    return f"{stands}\nTo train it for K more epochs: {train_command(cfg, *flags)}"
