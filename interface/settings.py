"""Settings from flags and from models: which value wins, and which flags have no effect."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from config import Config
from diffusion import Diffusion

# (flag, another setting, whether the flag has an effect with a given value of that setting)
ONLY_WITH: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("snr_power", "loss_weighting", lambda value: value == "snr_power"),
    ("min_snr_gamma", "loss_weighting", lambda value: value == "min_snr"),
    ("unsquared_snr", "prediction", lambda value: value == "x_0"),
    ("guide_label_noise", "guide_fraction", lambda value: value > 0),
    ("eta", "sampler", lambda value: value != "ddpm"),
    ("eta", "steps", lambda value: value > 1),
    ("guidance_low", "guidance", lambda value: value not in (0, 1)),
    ("guidance_high", "guidance", lambda value: value not in (0, 1)),
)


def check_effects(cfg: Config, given: dict[str, Any], strength: float = 1.0) -> None:
    """Raise ValueError for a setting `given` as a flag that would have no effect. With a `strength`
    below 1, drawing begins at strength · T."""
    for f in fields(Config):
        if f.name in given and cfg.is_student and f.metadata.get("not_in_students"):
            reason = "has no effect on a student; drop the flag"
            raise ValueError(f"{f.name} = {given[f.name]!r}: {reason}")
    for name, other, has_effect in ONLY_WITH:
        value = getattr(cfg, other)
        if name in given and not has_effect(value):
            reason = f"has no effect with {other} = {value!r}; drop the flag"
            raise ValueError(f"{name} = {given[name]!r}: {reason}")
    asked = given.keys() & {"guidance", "guidance_low", "guidance_high"}
    if asked and cfg.guidance != 1 and not is_guided(cfg, strength):
        between = f"in guidance_low = {cfg.guidance_low:g} to guidance_high = {cfg.guidance_high:g}"
        start = f" up to strength {strength:g}" if strength < 1 else ""
        fault = f"no sampling time{start} (steps = {cfg.steps}) is {between}; change one of them"
        raise ValueError(f"guidance = {cfg.guidance:g}: {fault}")


def is_guided(cfg: Config, strength: float = 1.0) -> bool:
    """Whether guidance acts at any of the sampling times up to strength · T."""
    diffusion = Diffusion(cfg)
    return any(diffusion.guidance_at(t) != 1 for t in diffusion.sampling_times(strength)[:-1])


def settings_for_training(
    trained: Config, given: dict[str, Any], mid_epoch: bool = False
) -> tuple[Config, list[str]]:
    """The settings with which to go on training: flags win over the checkpoint's (`trained`), and
    the checkpoint's over config.py, which only supplies the machine settings.

    Also returns a line for each difference that the user should know of. Raises ValueError for a
    flag that a trained model cannot take, or one that would reorder the images of an epoch under
    way (`mid_epoch`).
    """
    defaults, notes = Config(), []
    fixed, noted = {"model", "student", "classes"}, {"model", "training", "picture"}
    (fixed if trained.is_student else noted).add("sampling")
    cfg = replace(trained, **defaults.select("machine") | given)
    for f in fields(Config):
        name, group = f.name, f.metadata["group"]
        old, new, default = (getattr(each, name) for each in (trained, cfg, defaults))
        if new != old and group in fixed:
            reason = f"the checkpoint was trained with {old!r}; drop the flag, or train a new model"
            raise ValueError(f"{name} = {new!r}: {reason}")
        if new != old and mid_epoch and f.metadata.get("fixed_in_epoch"):
            reason = f"the checkpoint is inside an epoch that began with {old!r}"
            raise ValueError(f"{name} = {new!r}: {reason}; finish it without the flag")
        if group != "machine" and new != old:
            notes.append(f"{name} = {new} (the checkpoint had {old})")
        elif group in noted and name not in given and new != default:
            notes.append(f"{name} = {new}, as in the checkpoint (config.py says {default})")
    return cfg, notes


def settings_for_drawing(
    trained: Config, given: dict[str, Any], recorded: dict[str, Any] | None = None
) -> Config:
    """The settings with which to draw: those `recorded` by a picture win over flags (`given`),
    flags over the model's own (`trained`), and config.py only supplies the machine settings and
    those of a picture, such as the seed. Raises ValueError for settings other than those that a
    student learned, or for flags that leave no room for guidance."""
    sets_interval = bool(given.keys() & {"guidance_low", "guidance_high"})
    given = given | (recorded or {})
    if trained.is_student:
        for name, own in trained.select("sampling").items():
            value = given.get(name, own)
            if value != own:
                raise ValueError(f"{name} = {value!r}: a student learned {own!r}; drop the flag")
    cfg = replace(trained, **Config().select("machine", "picture") | given)
    if sets_interval and cfg.guidance_low >= cfg.guidance_high:
        needed = f"below guidance_high = {cfg.guidance_high}, or guidance never acts"
        raise ValueError(f"guidance_low = {cfg.guidance_low}: must be {needed}")
    return cfg


def check_guidance(trained: Config, cfg: Config, has_guide: bool) -> None:
    """Raise ValueError if guidance needs an estimate without the label, which the model never
    learned."""
    needs_unlabelled = not has_guide or cfg.guidance == 0
    if cfg.guidance != 1 and needs_unlabelled and trained.label_dropout == 0:
        reason = "the model cannot draw without a label (label_dropout = 0); set guidance to 1"
        raise ValueError(f"guidance = {cfg.guidance:g}: {reason}")
