"""Record what short runs and drawings give, so that a change of the program cannot change them
unseen: python tests/record.py writes recorded.json, which test_recorded.py compares with. Run it
with OMP_NUM_THREADS=1, as the tests run.

Each record has the SHA-256 of the exact bytes, which hold on one kind of machine alone, and a few
numbers that every machine must reach within rounding.
"""

import hashlib
import importlib
import json
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageSequence

TESTS = Path(__file__).resolve().parent
RECORDED = TESTS / "recorded.json"

TINY = (
    "--widths 8,8 --embedding_size 8 --device cpu --precision float32 --max_images 320 "
    "--batch_size 32 --steps 2 --preview_columns 2 --warmup_steps 2 --save_every 1 "
)
TRAINING = {
    "fresh": "--epochs 2",
    "without a guide": "--epochs 2 --guide_fraction 0",
    "a late guide": "--epochs 2 --guide_fraction 0.5 --guide_label_noise 1 --label_dropout 0.5",
    "as Ho et al.": "--epochs 1 --schedule linear --prediction eps --loss_weighting uniform "
    "--timestep_power 1 --no-clip_loss --no-clip_x_0",
    "v, min-SNR, sigmoid": "--epochs 1 --prediction v --loss_weighting min_snr --schedule sigmoid",
    "optimizer settings": "--epochs 1 --lr 0.001 --muon_momentum 0.8 --adam_beta1 0.8 "
    "--adam_beta2 0.9 --weight_decay 0.3 --grad_clip 0.1 --ema_sigma_rel 0.2",
    "network settings": "--epochs 1 --widths 8,8,16 --img_size 32 --patch_size 1 --blocks 2 "
    "--attention --dense_size 0 --timesteps 50 --seed 3",
    "without a bypass": "--epochs 1 --no-bypass",
    "samplers of the preview": "--epochs 1 --sampler ddpm --steps 3 --preview_digits 12",
}
DRAWING = {
    "default": "--digits 7 --count 3",
    "ddpm": "--digits 7 --count 2 --sampler ddpm",
    "ddim": "--digits 7 --count 2 --sampler ddim --eta 0 --steps 6",
    "ddim with noise": "--digits 31 --count 1 --sampler ddim --eta 0.7 --seed 2147483648",
    "dpmpp without noise": "--digits 7 --count 2 --eta 0 --steps 8",
    "guidance 0": "--digits 7 --count 2 --guidance 0",
    "guidance 1": "--digits 7 --count 2 --guidance 1",
    "guidance everywhere": "--digits 7 --count 2 --guidance_low 0 --guidance_high 1",
    "not clamped": "--digits 5 --count 2 --steps 5 --no-clip_x_0",
    "fast": "--digits 4 --count 5 --fast --sample_batch_size 2",
    "a number": "--digits 2026 --count 2 --seed 3",
    "all digits": "--digits all --count 2 --fast",
    "labels as in MNIST": "--digits mnist --count 20 --fast --output {folder}/set.npz",
    "animation": "--digits 26 --count 2 --steps 5 --output {folder}/moving.gif",
    "completed": "--digits 7 --count 2 --complete {folder}/../seven.png --keep left",
    "edited": "--digits 7 --count 2 --edit {folder}/../seven.png --strength 0.6",
    "folder": "--digits 72 --count 2 --seed 11 --fast --output {folder}/many/",
}


def machine() -> dict[str, str]:
    """What exact bytes depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.findall(r"^(?:model name|flags)\s*: (.*)$", info.read_text(), re.MULTILINE)
        cpu = hashlib.sha256("".join(found[:2]).encode()).hexdigest()[:16]
    libraries = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    return libraries | {"cpu": cpu, "threads": str(torch.get_num_threads())}


def record(arrays: Iterable[np.ndarray]) -> dict[str, Any]:
    """The SHA-256 of all arrays, and the mean absolute value of each."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    means = [float(np.abs(array.astype(np.float64)).mean()) for array in arrays]
    return {"sha256": digest, "means": means}


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in a nest of dicts and lists, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for branch in branches for tensor in tensors(branch)]


def record_checkpoint(path: Path) -> dict[str, Any]:
    """Weights, average, guide, optimizer state and running totals of a checkpoint."""
    saved = torch.load(path, weights_only=True)
    parts = ("model", "ema", "guide", "optimizers")
    flat = [
        torch.cat([t.flatten().float() for t in tensors(saved[name])] or [torch.zeros(1)])
        for name in parts
    ]
    progress = [saved["progress"][name] for name in ("epoch", "images", "step")]
    return record(
        [*(each.numpy() for each in flat), np.array(progress), np.array(saved["metrics"]["totals"])]
    )


def record_pictures(paths: list[Path]) -> dict[str, Any]:
    """Pixels of picture files, of every frame where they move, or of an .npz."""
    arrays: list[np.ndarray] = []
    for path in paths:
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays += [file["arr_0"], file["arr_1"]]
        else:
            with Image.open(path) as image:
                arrays += [
                    np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)
                ]
    return record(arrays)


def run(script: str, flags: str, folder: Path) -> str:
    """Run a script's main() in this process; returns what it printed on stdout."""
    module = importlib.import_module(script)
    torch.set_flush_denormal(True)  # as run_script does
    flags = (
        "--no-match_levels "
        + ("--unsquared_snr 0 " if script == "train" and "prediction" not in flags else "")
        + flags
    )
    sys.argv = [f"{script}.py", *flags.format(folder=folder).split()]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryFile("w+") as out:
        with redirect_stdout(out):
            module.main()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        out.seek(0)
        return out.read()


def train(flags: str, folder: Path, data_dir: str) -> dict[str, Any]:
    """Train in `folder` and record its newest checkpoint and every grid."""
    run("train", f"{TINY} {flags} --data_dir {data_dir} --output_dir {folder}", folder)
    last = max(folder.glob("models/*.pth"), key=lambda path: path.stat().st_mtime_ns)
    grids = sorted(folder.glob("images/samples_*.png"))
    return {"checkpoint": record_checkpoint(last), "grids": record_pictures(grids)}


def stopped_in_an_epoch(flags: str, folder: Path, data_dir: str) -> dict[str, Any]:
    """Train, but with a Ctrl-C at the fifteenth step."""
    from diffusion import Diffusion

    loss, calls = Diffusion.loss, []

    def counted(*args: Any) -> torch.Tensor:
        calls.extend([None] * torch.is_grad_enabled())  # not those of the validation
        if len(calls) == 15 and torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)

    Diffusion.loss = counted
    try:
        return train(flags, folder, data_dir)
    finally:
        Diffusion.loss = loss


def training_records(folder: Path, data_dir: str) -> dict[str, Any]:
    """A record for each of TRAINING, for a continued run and for one that was stopped."""
    records = {
        name: train(flags, folder / name.replace(" ", "_"), data_dir)
        for name, flags in TRAINING.items()
    }
    start = folder / "fresh" / "models" / "model_epoch_1.pth"
    more = f"--load_checkpoint_path {start} --continue_training_epochs 1 --lr 0.002"
    records["continued"] = train(more, folder / "continued", data_dir)
    stopped = folder / "stopped"
    records["stopped"] = stopped_in_an_epoch("--epochs 2", stopped, data_dir)
    records["resumed"] = train("--epochs 2 --resume", stopped, data_dir)
    return records


def drawing_records(folder: Path, model: Path) -> dict[str, Any]:
    """A record for each of DRAWING, drawn by `model`."""
    records = {}
    rows, columns = np.mgrid[:28, :28]
    stroke = np.where((abs(rows - 6) < 2) | (abs(rows + columns - 27) < 2), 253, 0)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stroke.astype(np.uint8)).save(folder / "seven.png")
    for name, flags in DRAWING.items():
        where = folder / name.replace(" ", "_")
        where.mkdir(parents=True)
        flags += f" --model {model} --device cpu --precision float32 --no-show"
        flags += f" --output_dir {where}"
        written = run("generate", flags, where).split()
        records[name] = record_pictures([Path(path) for path in written])
    return records


def all_records(folder: Path) -> dict[str, Any]:
    """Every record, made in `folder`."""
    repo = TESTS.parent
    return {
        "machine": machine(),
        "training": training_records(folder / "training", str(repo / "mnist_data")),
        "drawing": drawing_records(folder / "drawing", repo / "results/models/pretrained.pth"),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))
    with tempfile.TemporaryDirectory() as scratch:
        records = all_records(Path(os.environ.get("KEEP", scratch)))
        Path(os.environ.get("RECORD_TO", RECORDED)).write_text(json.dumps(records, indent=1))
