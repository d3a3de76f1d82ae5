"""Export a model: python export.py digits.onnx, digits.safetensors, or digits.pth (small)."""

import interface  # noqa: F401  (first, so that import errors are one line, too)

# isort: split
import contextlib
import io
import logging
import timeit
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from checkpoint import LoadedModel, load_model
from config import Config
from diffusion import Diffusion
from interface import cli, models, requests
from interface.flags import export_flags
from interface.folder import CHECKPOINTS
from interface.settings import settings_for_drawing
from system.files import (
    atomic_write,
    check_writable,
    first_line,
    optional,
    write_safetensors,
    write_tensors,
)
from system.randomness import seeded_generator

TO_DRAW_WITH = ("format", "config", "progress", "ema", "guide", "levels", "data")
OPSET = 20  # of ONNX; onnxruntime has known it since 2023
LARGEST_ERROR = 1e-4  # of the exported graph, in the range [-1, 1]
TRIED = (1, 5)  # batch sizes


class Sampler(nn.Module):
    """The whole sampler as a network: noise (B, draws, C, H, W) and labels y, int64 (B,), become
    pictures (B, C, H, W) in [-1, 1], as the model draws them before their grey levels are matched.
    """

    def __init__(self, loaded: LoadedModel, cfg: Config) -> None:
        super().__init__()
        self.model, self.guide = loaded.model, loaded.guide
        self.diffusion = Diffusion(cfg)
        adds_noise = self.diffusion.eta > 0
        self.draws = cfg.steps if adds_noise else 1  # at the start, and in all steps but the last

    def forward(self, noise: Tensor, y: Tensor) -> Tensor:
        denoiser = self.diffusion.guided(self.model, self.guide)
        given, times = GivenNoise(noise), self.diffusion.sampling_times()
        *_, x_0 = self.diffusion.sample(denoiser, given.draw(), y, times, given)
        return x_0

    def example(self, B: int) -> dict[str, Tensor]:
        """Inputs for B pictures."""
        cfg, generator = self.diffusion.cfg, seeded_generator(0, B)
        shape = (B, self.draws, cfg.img_channels, cfg.img_size, cfg.img_size)
        y = torch.arange(B) % cfg.num_classes
        return {"noise": torch.randn(shape, generator=generator), "y": y}


class Network(nn.Module):
    """The network alone: x_t (B, C, H, W), timesteps t and labels y, int64 (B,), become its
    prediction (B, C, H, W)."""

    def __init__(self, loaded: LoadedModel, cfg: Config) -> None:
        super().__init__()
        self.model, self.cfg = loaded.model, cfg

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x_t, t, y)

    def example(self, B: int) -> dict[str, Tensor]:
        """Inputs for B pictures."""
        cfg, generator = self.cfg, seeded_generator(0, B)
        x_t = torch.randn(B, cfg.img_channels, cfg.img_size, cfg.img_size, generator=generator)
        t = 1 + torch.arange(B) * 99 % cfg.timesteps
        return {"x_t": x_t, "t": t, "y": torch.arange(B) % cfg.num_classes}


class GivenNoise:
    """Noise (B, draws, C, H, W) in place of system.randomness.ImageNoise."""

    def __init__(self, noise: Tensor) -> None:
        self.draws = iter(noise.unbind(dim=1))

    def draw(self) -> Tensor:
        return next(self.draws)


@torch.no_grad()
def export_onnx(module: Sampler | Network, path: Path) -> None:
    """Write a graph that takes batches of any size, and compare it with torch. Raises ValueError if
    its results differ, or if a package is missing."""
    optional("onnx"), optional("onnxscript")
    runtime = optional("onnxruntime")
    module.eval()
    inputs = module.example(B=2)
    batch = torch.export.Dim("batch", min=1, max=4096)
    dynamic = {name: {0: batch} for name in inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        names = {"input_names": list(inputs)}
        names["output_names"] = ["picture" if isinstance(module, Sampler) else "prediction"]
        how = {"dynamic_shapes": dynamic, "opset_version": OPSET, "dynamo": True}
        try:
            program = torch.onnx.export(module, kwargs=inputs, **names, **how)
        except Exception as error:  # it has many kinds of its own
            reason = f"torch {torch.__version__} cannot export it ({first_line(error)})"
            raise ValueError(f"{path}: {reason}; update torch, onnx and onnxscript") from None
    graph = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for B in TRIED:
        inputs = module.example(B)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        found = torch.from_numpy(session.run(None, arrays)[0])
        error = float((found - module(**inputs)).abs().max())
        if not error <= LARGEST_ERROR:
            raise ValueError(f"{path}: differs from torch by {error:g}, not written; update onnx")
    with atomic_write(path, replace=False) as file:
        file.write(graph)
    inputs = module.example(B=1)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    ours, theirs = (
        1000 * min(timeit.repeat(work, number=1, repeat=20))
        for work in (lambda: module(**inputs), lambda: session.run(None, arrays))
    )
    shapes = ", ".join(f"{name} {('batch', *x.shape[1:])}" for name, x in inputs.items())
    print(f"takes {shapes}".replace("'", "").replace(",)", ")"))
    print(f"one picture: {theirs:.1f} ms by onnxruntime, {ours:.1f} ms by torch; error {error:.1g}")


def slim(source: Path, target: Path) -> None:
    """Write only what drawing needs of a checkpoint: as .safetensors in full precision, otherwise
    in half precision, a quarter of the size. Raises ValueError if that fails."""
    contents = checkpoint.load(source)
    kept = {name: contents.get(name) for name in TO_DRAW_WITH}
    kept["config"] |= Config().select("machine")  # nothing of this computer
    if teacher := kept["config"].get("teacher"):
        kept["config"]["teacher"] = Path(teacher).stem
    if target.suffix == ".safetensors":
        write_safetensors(target, kept, replace=False)
        return
    for name in ("ema", "guide"):
        weights = kept[name]
        kept[name] = weights and {key: weight.half() for key, weight in weights.items()}
    write_tensors(target, kept, replace=False)


def main() -> int:
    args = export_flags()
    path, given = args.output, cli.given_settings(args)
    taken = f"{path}: exists already; choose another name"
    if path.exists():  # it could be a model that pictures or training need
        raise ValueError(taken)
    if path.match(CHECKPOINTS):
        reason = "is a name of train.py's own checkpoints, which --resume goes on with"
        raise ValueError(f"{path}: {reason}; choose another")
    check_writable(path)
    file = models.find_model(
        args.model, Path(given.get("output_dir", Config().output_dir), "models")
    )
    try:
        if path.suffix != ".onnx":
            slim(file, path)
        else:
            loaded = load_model(file, torch.device("cpu"))
            cfg = replace(settings_for_drawing(loaded.cfg, given), precision="float32")
            if not args.network:  # which needs no guidance
                requests.check_flags(loaded, cfg, given)
            export_onnx((Network if args.network else Sampler)(loaded, cfg), path)
    except FileExistsError:  # since it was looked for
        raise ValueError(taken) from None
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB), exported from {file}")
    return 0


if __name__ == "__main__":
    cli.run_script("export.py", main)
