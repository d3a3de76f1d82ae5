"""TensorBoard: the figures and sample grids of a run, as train.py --tensorboard writes them."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config import Config
from system.files import optional

FIGURES = ("loss", "validation_loss", "learning_rate", "grad_norm", "images_per_second")


class Board:
    """The event files of one run, in output_dir/tensorboard."""

    def __init__(self, cfg: Config, step: int) -> None:
        """Continues from `step`, and hides what was written for later ones. Raises ValueError if
        the package is missing."""
        folder = Path(cfg.output_dir, "tensorboard")
        self.writer = optional("torch.utils.tensorboard").SummaryWriter(folder, purge_step=step + 1)
        usual = threading.excepthook

        def quietly(fault: threading.ExceptHookArgs) -> None:
            if type(fault.thread).__name__ != "_AsyncWriterThread":  # raised where it is used, too
                usual(fault)

        threading.excepthook = quietly
        rows = "\n".join(f"| {name} | {value} |" for name, value in cfg.to_dict().items())
        self.writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", step)
        print(f"tensorboard --logdir {folder} shows this run")

    def row(self, row: dict[str, Any]) -> None:
        """Add a row of metrics.csv."""
        for name in FIGURES:
            self.writer.add_scalar(name, row[name], row["step"])
        self.writer.flush()

    def grid(self, picture: Image.Image, step: int) -> None:
        """Add a grid of samples, drawn after `step` steps."""
        pixels = np.atleast_3d(np.asarray(picture))  # (H, W, 1) or (H, W, 3)
        self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()
