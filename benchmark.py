"""Measure this machine's speed: python benchmark.py --json speed.json. Takes about a minute.

--gpu measures eager and compiled training and three short runs, --scaling estimates many GPUs.
"""

import interface  # noqa: F401  (first, so that import errors are one line, too)

# isort: split
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import train
from checkpoint import TrainState
from config import Config
from data import load_split
from diffusion import Diffusion
from evaluation import scaling
from evaluation.evaluator import MAX_MEASURED
from evaluation.results import aligned
from interface.cli import as_flags, given_settings, run_script
from interface.flags import benchmark_flags
from interface.settings import check_effects, check_guidance
from model import UNet, without_weights
from pipeline import Pipeline
from system.files import atomic_write, check_writable
from system.machine import compile_network, pick_device, pick_precision

SECONDS = 25.0  # for training; each of the other measurements takes a fraction of it
CALLS = (1, 4, 8, 20, 50)
BUDGETS = ("15s", "60s", "240s")  # of the training runs of --gpu
SAMPLES = MAX_MEASURED  # that are drawn to judge each of them
PARTS = ("data", "forward", "backward", "optimizer", "average")


class Training:
    """Takes train.py's own training steps, and times their parts: "data" ends when the network is
    called, "forward" when it returns, "backward", which includes the loss and gradient clipping,
    when the first optimizer starts, "optimizer" when the last one is done."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device, self.marks = cfg, device, []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.images, self.labels = load_split(cfg, train=True, device=device)
        if cfg.batch_size > len(self.images):
            raise ValueError(f"batch_size = {cfg.batch_size}: choose at most {len(self.images)}")
        self.state, loss = TrainState.initial(cfg, device), Diffusion(cfg).loss
        self.loss = lambda model, *rest: loss(self.timed, *rest)
        if cfg.compile:
            compile_network(self.state.model)
        self.state.optimizers[0].register_step_pre_hook(self.mark)
        self.state.optimizers[-1].register_step_post_hook(self.mark)

    def mark(self, *_: object) -> None:
        self.marks.append(clock(self.device))

    def timed(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network, between two marks."""
        self.mark()
        prediction = self.state.model(x_t, t, y)
        self.mark()
        return prediction

    def step(self) -> list[float]:
        """Take a step; returns the seconds of each of PARTS."""
        if self.state.progress.images + self.cfg.batch_size > len(self.images):
            self.state.start_next_epoch()
        self.marks = [clock(self.device)]
        x_0, y = train.batch(self.cfg, self.images, self.labels, self.state.progress)
        train.training_step(self.cfg, self.loss, self.state, x_0, y, fraction=0.5)
        self.mark()
        return [end - start for start, end in itertools.pairwise(self.marks)]

    def measure(self) -> dict[str, Any]:
        """Images per second, where the time goes, and how that compares with the convolutions."""
        for _ in range(2):
            self.step()  # warm up
        memory = peak_memory(self.device)
        # Steps and bare convolutions take turns, because the speed of a machine drifts
        bare = convolutions(self.state.model, self.cfg, self.device)
        steps, alone = [], [[] for _ in bare]
        began = clock(self.device)
        while len(steps) < 3 or clock(self.device) - began < SECONDS:
            steps += [self.step() for _ in range(4)]
            for taken, (_, both_ways) in zip(alone, bare, strict=True):
                both_ways()  # warm up
                taken.append(seconds_of(both_ways, self.device))
        total, flops = statistics.median(map(sum, steps)), sum(flops for flops, _ in bare)
        convolving = sum(map(statistics.median, alone))
        parts = (1000 * statistics.median(column) for column in zip(*steps, strict=True))
        return {
            "images_per_second": self.cfg.batch_size / total,
            "milliseconds": dict(zip(PARTS, parts, strict=True)),
            "tera_flops": flops / total / 1e12,
            "convolutions_alone_tera_flops": flops / convolving / 1e12,
            "share_of_convolution_peak": convolving / total,
            "peak_memory_bytes": memory,
        }


def clock(device: torch.device) -> float:
    """The time, once the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    began = clock(device)
    work()
    return clock(device) - began


def convolutions(
    model: UNet, cfg: Config, device: torch.device
) -> list[tuple[float, Callable[[], None]]]:
    """Each convolution of the network by itself: its floating-point operations, and a function that
    runs it forward and backward with the batch size and precision of training. The rest of a step
    goes into linear layers, norms, activations, casts, the loss and the optimizers."""
    inputs: list[tuple[nn.Conv2d, torch.Size]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, x, _: inputs.append((layer, x[0].shape)))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    x_t = torch.zeros(cfg.batch_size, cfg.img_channels, cfg.img_size, cfg.img_size, device=device)
    y = torch.zeros(cfg.batch_size, dtype=torch.int64, device=device)
    with torch.no_grad():
        model(x_t, torch.ones_like(y), y)
    for hook in hooks:
        hook.remove()

    bf16, bare = pick_precision(cfg.precision, device) == "bf16", []
    dtype = torch.bfloat16 if bf16 else torch.float32
    for layer, shape in inputs:
        layer = copy.deepcopy(layer).to(dtype)
        inner = bool(bare)  # the first convolution needs no gradient of x
        x = torch.randn(shape, device=device, dtype=dtype, requires_grad=inner)
        gradient = torch.randn_like(layer(x))

        def both_ways(layer=layer, x=x, gradient=gradient) -> None:
            layer(x).backward(gradient)
            layer.weight.grad = layer.bias.grad = x.grad = None

        forward = 2 * gradient.numel() * layer.weight[0].numel()
        bare.append(((3 if inner else 2) * forward, both_ways))
    return bare


def measure_sampling(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Images per second for several numbers of network calls, and seconds for a single image."""
    bf16 = pick_precision(cfg.precision, device) == "bf16"
    layout = torch.contiguous_format if bf16 else torch.channels_last  # as load_model does
    model = UNet(cfg).to(device, memory_format=layout).requires_grad_(False).eval()
    if cfg.compile:
        compile_network(model)
    y = torch.arange(cfg.sample_batch_size, device=device) % cfg.num_classes

    def seconds(cfg: Config, count: int) -> float:
        pipeline, taken = Pipeline(cfg, model), []
        while len(taken) < 4 or sum(taken) < 0.06 * SECONDS:
            taken.append(seconds_of(lambda: pipeline.draw(y[:count]), device))
        return statistics.median(taken[1:])  # the first one warms up

    plain = {n: replace(cfg, steps=n, guidance=1.0) for n in CALLS if n <= cfg.timesteps}
    speed = {calls: len(y) / seconds(settings, len(y)) for calls, settings in plain.items()}
    one = {"one_image_seconds": seconds(cfg, 1), "one_image_calls": Diffusion(cfg).network_calls()}
    return {"images_per_second_at_calls": speed} | one


def peak_memory(device: torch.device) -> int | None:
    """The largest memory use so far, in bytes, of the GPU or else of this process; None on Windows,
    which has no `resource`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matrix_rate(device: torch.device, size: int = 8192) -> float:
    """Floating-point operations per second of a large product of matrices in bf16."""
    x = torch.ones(size if device.type == "cuda" else 512, dtype=torch.bfloat16, device=device)
    x = x.expand(len(x), len(x)).contiguous()
    taken = [seconds_of(lambda: x @ x, device) for _ in range(10)]
    return 2 * len(x) ** 3 / min(taken)


def measure_gpu(cfg: Config, device: torch.device, given: dict[str, Any]) -> dict[str, Any]:
    """Training and sampling speed, eager and compiled, and what training runs of BUDGETS reach.
    The first compiled step includes the compilation."""
    found: dict[str, Any] = {"matrix_flops": matrix_rate(device)}
    for name, compiles in {"eager": False, "compiled": True}.items():
        training = Training(replace(cfg, compile=compiles), device)
        first = seconds_of(training.step, device)
        found[name] = {"first_step_seconds": first} | training.measure()
        guided = measure_guided(replace(cfg, compile=compiles), device)
        found[name]["sampled_images_per_second"] = guided
    with tempfile.TemporaryDirectory() as out:
        found["runs"] = [trained_for(budget, given, Path(out, budget)) for budget in BUDGETS]
    return found


def report_gpu(found: dict[str, Any]) -> str:
    """What measure_gpu found, as a person reads it."""
    rows = [("", "images/s of training", "of the card's bf16 rate", "memory", "first step, s")]
    rows[0] += ("images/s drawn",)
    for name in ("eager", "compiled"):
        part = found[name]
        share = part["tera_flops"] * 1e12 / found["matrix_flops"]
        memory = f"{(part['peak_memory_bytes'] or 0) / 1e9:.2f} GB"
        first, drawn = part["first_step_seconds"], part["sampled_images_per_second"]
        speed = part["images_per_second"]
        rows.append(
            (name, f"{speed:,.0f}", f"{share:.1%}", memory, f"{first:.1f}", f"{drawn:,.0f}")
        )
    runs = [("budget", "steps", "FD/floor", "agreement", "precision", "recall", "evaluate.py, s")]
    for run in found["runs"]:
        quality = f"{run['fd_over_floor']:.2f} {run['agreement']:.2%} {run['precision']:.3f}"
        shown = f"{quality} {run['recall']:.3f} {run['evaluate.py_seconds']:.0f}"
        runs.append((run["budget"], f"{run['steps']:,}", *shown.split()))
    rate = f"{found['matrix_flops'] / 1e12:.1f} TFLOP/s in a bf16 product of matrices"
    return f"{rate}\n\n{aligned(rows)}\n\n{aligned(runs)}"


def measure_guided(cfg: Config, device: torch.device) -> float:
    """Images per second with the sampling settings of `cfg`, with a guide."""
    networks = [UNet(cfg).to(device).requires_grad_(False).eval() for _ in range(2)]
    if cfg.compile:
        for network in networks:
            compile_network(network)
    pipeline = Pipeline(cfg, *networks)
    y = torch.arange(cfg.sample_batch_size, device=device) % cfg.num_classes
    taken = [seconds_of(lambda: pipeline.draw(y), device) for _ in range(4)]
    return len(y) / min(taken[1:])  # the first one warms up


def trained_for(budget: str, given: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train with the given settings for a time and evaluate, by the scripts; their figures."""
    here = {name: given[name] for name in ("data_dir", "device") if name in given}
    words = {
        "train.py": as_flags(given | {"budget": budget, "output_dir": str(out)}),
        "evaluate.py": [*as_flags(here | {"output_dir": str(out)}), "--samples", str(SAMPLES)],
    }
    seconds = {}
    for script, flags in words.items():
        began, path = time.perf_counter(), Path(__file__).with_name(script)
        if subprocess.run([sys.executable, path, *flags]).returncode:
            raise ValueError(f"{script} failed (budget = {budget}); see its message above")
        seconds[f"{script}_seconds"] = time.perf_counter() - began
    [file] = Path(out, "metrics").glob("*.json")
    measured = json.loads(file.read_text("utf-8"))
    kept = ("fd", "fd_over_floor", "agreement", "precision", "recall")
    quality = {name: measured["samples"][name] for name in kept}
    return {"budget": budget, "steps": measured["training"]["steps"]} | seconds | quality


def report(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    training, sampling = result["training"], result["sampling"]
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in training["milliseconds"].items())
    speeds = ", ".join(f"{n}: {s:.0f}" for n, s in sampling["images_per_second_at_calls"].items())
    memory = training["peak_memory_bytes"]
    return f"""\
{result["machine"]}, torch {result["torch"]}, {result["precision"]}, batch {result["batch_size"]}
U-Net            {result["parameters"]:,} parameters
training         {training["images_per_second"]:.0f} images/s, {training["tera_flops"]:.3f} TFLOP/s
                 {training["share_of_convolution_peak"]:.0%} of the time goes into convolutions
a step, in ms    {parts}
peak memory      {f"{memory / 1e9:.2f} GB in training" if memory else "unknown"}
sampling         images/s by network calls per image: {speeds}
one image        {sampling["one_image_seconds"]:.3f} s, {sampling["one_image_calls"]} calls"""


def measured_cluster(cfg: Config, device: torch.device) -> scaling.Cluster:
    """What evaluation/scaling.py assumes of a GPU, measured on this one: the time of a step of a
    small and of a large batch."""
    many = min(8192, len(load_split(cfg, train=True, device=device)[0]))
    small, large = (
        Training(replace(cfg, batch_size=size), device).measure() for size in (32, many)
    )
    flops = scaling.cost_of(cfg).flops * large["images_per_second"]
    return scaling.Cluster(flops=flops, launch=32 / small["images_per_second"])


def main() -> int:
    args = benchmark_flags()
    given = given_settings(args)
    cfg = replace(Config(), teacher="", **given)
    check_effects(cfg, given)
    if args.json:
        check_writable(args.json)
    device = pick_device(cfg.device)
    on_gpu = device.type == "cuda"
    if args.gpu:
        check_guidance(cfg, cfg, has_guide=cfg.guide_fraction > 0)
        if 0 < cfg.max_images < SAMPLES:
            needs = f"--gpu needs at least {SAMPLES} training images; choose more"
            raise ValueError(f"max_images = {cfg.max_images}: {needs}")
        if not on_gpu and cfg.device == "auto":
            remedy = f"drop --gpu, or add --device {device.type}"
            raise ValueError(f"device = 'auto': there is no CUDA GPU; {remedy}")
    if args.scaling:
        if not on_gpu and "data_dir" in given:
            raise ValueError(f"data_dir = {cfg.data_dir!r}: has no effect without a GPU; drop it")
        print(scaling.report(measured_cluster(cfg, device) if on_gpu else scaling.Cluster()))
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result = {
        "machine": f"{name}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "precision": pick_precision(cfg.precision, device),
        "batch_size": cfg.batch_size,
        "parameters": sum(p.numel() for p in without_weights(cfg).parameters()),
    }
    if args.gpu:
        result["gpu"] = measure_gpu(cfg, device, given)
        print(f"{result['machine']}, torch {result['torch']}, batch {cfg.batch_size}")
        print(report_gpu(result["gpu"]))
    else:
        result["training"] = Training(cfg, device).measure()
        result["sampling"] = measure_sampling(cfg, device)
        print(report(result))
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(result, indent=1).encode())
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    run_script("benchmark.py", main)
