"""For torch.hub: model = torch.hub.load(".", "mnist_diffusion", source="local")."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


@contextmanager
def modules_of_this_folder() -> Iterator[None]:
    """A `with` block that imports the modules beside this file, although a user may have others of
    the same names, such as model.py. Those are back afterwards."""
    names = {path.stem for path in HERE.iterdir()} - {"hubconf"}

    def taken_out() -> dict[str, object]:
        found = [name for name in sys.modules if name.partition(".")[0] in names]
        return {name: sys.modules.pop(name) for name in found}

    before, sys.path[:0] = taken_out(), [str(HERE)]
    try:
        yield
    finally:
        taken_out()
        sys.modules.update(before)
        sys.path.remove(str(HERE))


with modules_of_this_folder():
    from checkpoint import PRETRAINED, STUDENT, LoadedModel, load_model
    from config import Config
    from data import to_uint8
    from interface.requests import labels_named
    from interface.settings import check_guidance, settings_for_drawing
    from pipeline import Pipeline
    from system.machine import usable_device

dependencies = ["torch", "numpy", "PIL", "tqdm"]  # which torch.hub looks for


class Sampler(torch.nn.Module):
    """A trained model that draws: `model.sample("2026")`. Its `network` and, if it has one, its
    `guide` are UNets, `cfg` holds its settings, and `levels` its grey levels."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.cfg, self.levels = loaded.cfg, loaded.levels
        self.network, self.guide = loaded.model, loaded.guide

    def sample(self, digits: str, **settings: object) -> torch.Tensor:
        """Draw uint8 images (N, C, H, W), one for each digit of "2026", for each name of "cat,dog",
        or for each label ("all"). `settings` are those of config.py, such as seed, steps or
        guidance. Raises ValueError for unknown labels, and for settings that this model cannot
        have, TypeError if `digits` is not text."""
        possible = Config.names("sampling", "picture")
        if wrong := sorted(set(settings) - set(possible)):
            raise ValueError(f"{', '.join(wrong)}: no setting for drawing; choose from {possible}")
        cfg = settings_for_drawing(self.cfg, settings)
        check_guidance(self.cfg, cfg, has_guide=self.guide is not None)
        if settings.get("match_levels") and not self.levels:
            raise ValueError("match_levels = True: this model has no grey levels; leave it out")
        if not isinstance(digits, str):
            raise TypeError(f"digits = {digits!r}: must be text, such as '2026'")
        labels = labels_named(digits, cfg.label_names)
        y = torch.tensor(labels, device=next(self.network.parameters()).device)
        return to_uint8(Pipeline(cfg, self.network, self.guide, self.levels).draw(y))


def mnist_diffusion(path: str = PRETRAINED, device: str = "cpu") -> Sampler:
    """The model "pretrained", its "student", or the checkpoint at `path`, on `device`. Raises
    ValueError if it cannot be loaded."""
    name = f"{str(path).removesuffix('.pth')}.pth"
    file = HERE / "results" / "models" / name if name in (PRETRAINED, STUDENT) else path
    return Sampler(load_model(file, usable_device(device)))


def mnist_diffusion_student(device: str = "cpu") -> Sampler:
    """The pretrained model's student, which draws in four network calls."""
    return mnist_diffusion(STUDENT, device)
