"""How far a network's training can be spread over GPUs: a formula, its inputs and its table.

One step takes its computing plus an all-reduce of the gradient. Computing takes as long as the
floating-point operations of a GPU's part of the batch, but never less than launching all kernels.
An all-reduce moves 2 (n - 1) / n times the gradient through each GPU, which is the least possible
(Patarasuk & Yuan 2009), in 2 log2(n) rounds, as trees do.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from config import MODEL_SIZES, Config
from evaluation.results import aligned
from model import UNet

GPUS = (8, 64, 512)
BATCHES = (1024, 8192, 32_768)  # of all GPUs together; MNIST has 60,000 images


@dataclass(frozen=True)
class Cluster:
    """What the formula assumes of the machines. The defaults are round figures for eight H100s a
    machine; only the first two can be measured on a single GPU (benchmark.py --scaling does)."""

    flops: float = 100e12  # that a GPU sustains on these small networks, a tenth of its bf16 peak
    launch: float = 2e-3  # seconds to launch all kernels of a step, however small the batch
    inside: float = 300e9  # bytes/s of each GPU to others of its machine
    between: float = 40e9  # bytes/s of each GPU to other machines
    latency: float = 20e-6  # seconds of each round of an all-reduce
    per_machine: int = 8


@dataclass(frozen=True)
class Cost:
    """What a network costs."""

    parameters: int
    flops: float  # of training on one image: three times those of the forward pass
    activations: float  # bytes kept for the backward pass, for one image in bf16


def cost_of(cfg: Config) -> Cost:
    """Count a network's parameters, and the work and memory of its convolutions and linear layers,
    by running it once."""
    model, operations, numbers = UNet(cfg), [], []

    def count(layer: nn.Module, x: tuple[torch.Tensor], out: torch.Tensor) -> None:
        operations.append(2 * out.numel() * layer.weight[0].numel())
        numbers.append(x[0].numel() + out.numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    one = torch.ones(1, dtype=torch.int64)
    model(torch.zeros(1, cfg.img_channels, cfg.img_size, cfg.img_size), one, one)
    parameters = sum(p.numel() for p in model.parameters())
    # Norms and activations keep about as much again as the layers between them
    return Cost(parameters, 3.0 * sum(operations), 2 * 2.0 * sum(numbers))


def step_seconds(cost: Cost, cluster: Cluster, gpus: int, batch: int) -> float:
    """The time of one training step of `batch` images on `gpus` GPUs."""
    compute = max(cluster.launch, cost.flops * batch / gpus / cluster.flops)
    if gpus == 1:
        return compute
    speed = cluster.inside if gpus <= cluster.per_machine else cluster.between
    gradient = 4 * cost.parameters  # bytes: float32
    rounds = 2 * math.ceil(math.log2(gpus))
    travel = 2 * (gpus - 1) / gpus * gradient / speed + rounds * cluster.latency
    return compute + travel


def efficiency(cost: Cost, cluster: Cluster, gpus: int, batch: int) -> float:
    """The speed of `gpus` GPUs over `gpus` times that of one, for the same batch."""
    one = step_seconds(cost, cluster, 1, batch)
    return one / (gpus * step_seconds(cost, cluster, gpus, batch))


def report(cluster: Cluster) -> str:
    """The costs of the networks, and how well they spread, as a person reads it."""
    networks = {"default": Config()} | {k: replace(Config(), **v) for k, v in MODEL_SIZES.items()}
    costs = {name: cost_of(cfg) for name, cfg in networks.items()}
    memory = "memory(batch 128)", "memory(batch 1024)"
    rows = [("network", "parameters", "GFLOP/image", "gradient", *memory)]
    for name, cost in costs.items():
        # Weights, their gradients and average, and up to two float32 numbers of the optimizer
        memory = [20 * cost.parameters + batch * cost.activations for batch in (128, 1024)]
        shown = [
            f"{cost.parameters:,}",
            f"{cost.flops / 1e9:.2f}",
            f"{cost.parameters * 4e-6:.0f} MB",
        ]
        rows.append((name, *shown, *(f"{bytes_ / 1e9:.2f} GB" for bytes_ in memory)))
    table = [("network", "batch", *(f"{n} GPUs" for n in GPUS), "images/s on 512")]
    for name, cost in costs.items():
        for batch in BATCHES:
            shares = [f"{efficiency(cost, cluster, n, batch):.0%}" for n in GPUS]
            speed = batch / step_seconds(cost, cluster, GPUS[-1], batch)
            table.append((name, f"{batch:,}", *shares, f"{speed:,.0f}"))
    return f"""\
{aligned(rows)}

Efficiency: the speed of n GPUs over n times that of one, by the formula in evaluation/scaling.py,
with {cluster.flops / 1e12:.0f} TFLOP/s, {cluster.launch * 1e3:.1f} ms to launch a step, \
{cluster.inside / 1e9:.0f} GB/s inside and {cluster.between / 1e9:.0f} GB/s
between machines, and {cluster.latency * 1e6:.0f} microseconds a round:

{aligned(table)}"""
