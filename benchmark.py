"""Measure this machine's speed: python benchmark.py --json speed.json. Takes under two minutes."""

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, Parser, add_flags, given_flags, run_script
from data import load_split, to_model_range, written_whole
from diffusion import Diffusion, seeded_generator
from model import UNet, pick_device, pick_precision
from optimizer import make_optimizers

FLAGS = (
    "data_dir", "device", "precision", "batch_size", "patch_size", "widths", "blocks", "attention",
    "embedding_size", "dense_size", "sampler", "sample_batch_size", "seed",
)  # fmt: skip
SECONDS = 25.0  # for training; each of the other measurements takes a fraction of it
CALLS = (1, 4, 8, 20, 50)
PARTS = ("data", "forward", "backward", "optimizer", "average")


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes."""
    began = clock(device)
    work()
    return clock(device) - began


def training(cfg: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Images a second of training steps as train.py takes them, and where the time goes."""
    images, labels = load_split(cfg, train=True, device=device)
    if cfg.batch_size > len(images):
        raise ValueError(f"batch_size = {cfg.batch_size}: there are only {len(images)} images")
    diffusion, model = Diffusion(cfg), UNet(cfg).to(device)
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizers = make_optimizers(cfg, model)
    order = torch.randperm(len(images)).to(device)

    def step(number: int, mark: Callable[[], None] = lambda: None) -> None:
        mark()
        index = order.roll(-number * cfg.batch_size)[: cfg.batch_size]
        x_0, y = to_model_range(images[index]), labels[index]
        generator = seeded_generator(cfg.seed, number, device=device)
        mark()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = diffusion.loss(model, x_0, y, generator)
        mark()
        model.zero_grad()
        loss.backward()
        mark()
        nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        mark()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 0.01)
        mark()

    numbers = itertools.count()
    for _ in range(2):
        step(next(numbers))
    memory = peak_memory(device)

    # In turn, because a machine's speed drifts: some steps, one in its parts, the convolutions
    bare = convolutions(model, cfg, device, dtype)
    totals: list[float] = []
    marked: list[list[float]] = []
    alone: list[list[float]] = [[] for _ in bare]
    began = clock(device)
    while len(totals) < 3 or clock(device) - began < SECONDS:
        totals.append(seconds_of(lambda: [step(next(numbers)) for _ in range(4)], device) / 4)
        marked.append([])
        step(next(numbers), lambda: marked[-1].append(clock(device)))
        for taken, (_, both_ways) in zip(alone, bare, strict=True):
            both_ways()  # warm
            taken.append(seconds_of(both_ways, device))
    total, flops = statistics.median(totals), sum(operations for operations, _ in bare)
    convolving = sum(map(statistics.median, alone))
    parts = {
        part: statistics.median(m[i + 1] - m[i] for m in marked) for i, part in enumerate(PARTS)
    }
    return {
        "images_per_second": cfg.batch_size / total,
        "milliseconds": {part: 1000 * taken for part, taken in parts.items()},
        "tera_flops": flops / total / 1e12,
        "convolutions_alone_tera_flops": flops / convolving / 1e12,
        "share_of_convolution_peak": convolving / total,
        "peak_memory_bytes": memory,
    }


def convolutions(
    model: UNet, cfg: Config, device: torch.device, dtype: torch.dtype
) -> list[tuple[float, Callable[[], None]]]:
    """The network's own convolutions, each bare: its floating-point operations, and what runs it
    forward and backward at the batch size and in the precision of training. What a step takes
    beyond them is norms, activations, casts, loss and optimizer."""
    shapes: list[tuple[torch.Size, nn.Conv2d]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, x, _: shapes.append((x[0].shape, layer)))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    size = (cfg.batch_size, cfg.img_channels, cfg.img_size, cfg.img_size)
    ones = torch.ones(cfg.batch_size, dtype=torch.int64, device=device)
    with torch.no_grad():
        model(torch.zeros(size, device=device), ones, ones * 0)
    for hook in hooks:
        hook.remove()

    bare = []
    for number, (shape, layer) in enumerate(shapes):
        x = torch.randn(shape, device=device, dtype=dtype, requires_grad=number > 0)
        weight = layer.weight.detach().to(dtype).requires_grad_()
        bias = layer.bias.detach().to(dtype).requires_grad_()
        gradient = torch.randn_like(F.conv2d(x, weight, bias, padding=layer.padding))

        def both_ways(x=x, weight=weight, bias=bias, gradient=gradient, layer=layer) -> None:
            F.conv2d(x, weight, bias, padding=layer.padding).backward(gradient)
            x.grad = weight.grad = bias.grad = None

        operations = (3 if number > 0 else 2) * 2 * gradient.numel() * weight[0].numel()
        bare.append((operations, both_ways))
    return bare


def sampling(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Images a second at so many network calls an image, and seconds for one image alone."""
    diffusion = Diffusion(cfg)
    model = UNet(cfg).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    y = torch.arange(cfg.sample_batch_size, device=device) % cfg.num_classes

    def draw(count: int, **settings: Any) -> float:
        settings = cfg.sampling | settings
        taken: list[float] = []
        while len(taken) < 4 or sum(taken) < 0.06 * SECONDS:
            taken.append(seconds_of(lambda: diffusion.sample(model, y[:count], **settings), device))
        return statistics.median(taken[1:])  # the first one warms up

    speed = {
        calls: len(y) / draw(len(y), steps=min(calls, cfg.timesteps), guidance=1.0)
        for calls in CALLS
    }
    return {"images_per_second_at_calls": speed, "one_image_seconds": draw(1)}


def peak_memory(device: torch.device) -> int | None:
    """Largest memory in use so far, in bytes: the device's on CUDA, else the process's, which
    Windows does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def report(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    train, draw = result["training"], result["sampling"]
    memory = train["peak_memory_bytes"]
    held = f"{memory / 1e9:.2f} GB in training" if memory else "unknown"
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in train["milliseconds"].items())
    speeds = ", ".join(f"{n}: {s:.0f}" for n, s in draw["images_per_second_at_calls"].items())
    return "\n".join(
        (
            f"{result['machine']}, torch {result['torch']}, {result['precision']}, "
            f"batch {result['batch_size']}, U-Net of {result['parameters']:,} parameters",
            f"training         {train['images_per_second']:.0f} images/s, {train['tera_flops']:.3f}"
            f" TFLOP/s: {train['share_of_convolution_peak']:.0%} of its convolutions alone",
            f"a step, in ms    {parts}",
            f"peak memory      {held}",
            f"sampling         images/s at so many network calls each: {speeds}",
            f"one image        {draw['one_image_seconds']:.3f} s at the default settings",
        )
    )


def main() -> int:
    parser = Parser(prog="benchmark.py", description="Measure training and sampling speed.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add_flags(parser, FLAGS)
    args = parser.parse_args()
    cfg = replace(Config(), **given_flags(args))
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"json = '{args.json}': no folder {args.json.parent}; make it first")
    torch.set_flush_denormal(True)  # denormals are slow; before any thread starts
    device = pick_device(cfg.device)
    dtype = pick_precision(cfg.precision, device)
    torch.manual_seed(cfg.seed)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result = {
        "machine": f"{name}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "precision": str(dtype)[6:],
        "batch_size": cfg.batch_size,
        "parameters": sum(p.numel() for p in UNet(cfg).parameters()),
        "training": training(cfg, device, dtype),
        "sampling": sampling(cfg, device),
    }
    print(report(result))
    if args.json:
        with written_whole(args.json) as partial:
            partial.write_text(json.dumps(result, indent=1))
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    run_script("benchmark.py", main)
