"""For torch.hub: model = torch.hub.load(".", "mnist_diffusion", source="local")."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # the modules lie beside this file

# isort: split
from checkpoint import PRETRAINED, STUDENT, LoadedModel, load_model
from config import Config
from data import to_uint8
from diffusion import Diffusion
from interface.cli import settings_for_drawing
from system.values import parse_labels

dependencies = ["torch", "numpy", "PIL", "tqdm"]  # which torch.hub looks for


class Sampler(torch.nn.Module):
    """A trained model that draws: `model.sample("2026")`. Its `network` and, if it has one, its
    `guide` are UNets, `cfg` holds its settings, and `levels` its grey levels."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.cfg, self.levels = loaded.cfg, loaded.levels
        self.network, self.guide = loaded.model, loaded.guide

    def sample(self, digits: str, **settings: object) -> torch.Tensor:
        """Draw uint8 images (N, C, H, W), one for each digit of "2026", or for each name of
        "cat,dog". `settings` are those of config.py, such as seed, steps or guidance. Raises
        ValueError for unknown labels, and for settings that this model cannot have."""
        possible = Config.names("sampling", "picture")
        if wrong := sorted(set(settings) - set(possible)):
            raise ValueError(f"{', '.join(wrong)}: no setting for drawing; choose from {possible}")
        cfg = settings_for_drawing(self.cfg, settings)
        labels = parse_labels(digits, cfg.label_names)
        y = torch.tensor(labels, device=next(self.network.parameters()).device)
        diffusion = Diffusion(cfg, self.levels)
        return to_uint8(diffusion.draw(diffusion.guided(self.network, self.guide), y))


def mnist_diffusion(path: str = PRETRAINED, device: str = "cpu") -> Sampler:
    """The pretrained model, or the one in the checkpoint at `path`."""
    shipped = Path(__file__).parent / "results" / "models" / path
    return Sampler(load_model(shipped if shipped.is_file() else path, torch.device(device)))


def mnist_diffusion_student(device: str = "cpu") -> Sampler:
    """Its student, which draws in four network calls."""
    return mnist_diffusion(STUDENT, device)
