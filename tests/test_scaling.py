"""The formula for many GPUs, against values that can be computed by hand."""

import pytest

from config import MODEL_SIZES, Config
from evaluation.scaling import Cluster, Cost, cost_of, efficiency, report, step_seconds
from model import UNet

CLUSTER = Cluster(flops=1e9, launch=1.0, inside=100, between=10, latency=0.5, per_machine=8)
COST = Cost(parameters=25, flops=1e9, activations=1)  # a gradient of 100 bytes, a second an image


def test_one_gpu_computes_and_does_not_communicate():
    assert step_seconds(COST, CLUSTER, gpus=1, batch=64) == 64
    assert efficiency(COST, CLUSTER, gpus=1, batch=64) == 1


def test_a_step_is_never_shorter_than_its_launch():
    free = Cluster(flops=1e9, launch=1.0, inside=1e18, between=1e18, latency=0)
    assert step_seconds(COST, free, gpus=64, batch=8) == pytest.approx(1)


@pytest.mark.parametrize(
    ("gpus", "travel"),
    [
        (2, 2 * (1 / 2) * 100 / 100 + 2 * 0.5),  # one round there and one back, inside a machine
        (8, 2 * (7 / 8) * 100 / 100 + 6 * 0.5),
        (16, 2 * (15 / 16) * 100 / 10 + 8 * 0.5),  # between machines
    ],
)
def test_a_step_waits_for_the_gradients_of_the_others(gpus, travel):
    for batch in (1, 1000):
        found = step_seconds(COST, CLUSTER, gpus, batch=batch * gpus)
        assert found == pytest.approx(batch + travel)


def test_the_costs_are_those_of_the_network():
    cfg = Config(widths=(8, 8), blocks=1, dense_size=0, embedding_size=8)
    cost = cost_of(cfg)
    assert cost.parameters == sum(p.numel() for p in UNet(cfg).parameters())
    # By hand: kernels of 3 x 3 at 14 x 14 and 7 x 7, the two 1 x 1 between them, the bypass,
    # linear layers
    fine, coarse = 14 * 14, 7 * 7
    kernels = fine * (2 * 4 * 8 * 9 + 4 * 8 * 8 * 9) + coarse * (6 * 8 * 8 * 9)
    between = coarse * 2 * 32 * 8
    linear = 2 * 8 * 8 + 5 * 8 * 16
    bypass = fine * 8 * 4
    assert cost.flops == 3 * 2 * (kernels + between + bypass + linear)


def test_the_table_has_each_size_and_more_gpus_are_never_more_efficient(run):
    text = run("benchmark.py", scaling=True, device="cpu").out
    assert text == report(Cluster()) + "\n"
    for name, millions in {"default": 1.3, "small": 1.7, "base": 6.0, "large": 20.1}.items():
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert float(row.split()[1].replace(",", "")) / 1e6 == pytest.approx(millions, abs=0.05)
        cost = cost_of(Config(**MODEL_SIZES.get(name, {})))
        shares = [efficiency(cost, Cluster(), n, 8192) for n in (1, 8, 64, 512)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == 1
