"""What training and drawing need of a GPU. Most of it can be checked without one: that nothing in a
step waits for the device, and that the network compiles as a whole. The rest is marked `gpu`."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import MNIST
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import checkpoint
import train
from checkpoint import LoadedModel, Progress, TrainState
from config import MODEL_SIZES, Config
from diffusion import Diffusion
from distill import Distillation, student_settings
from model import UNet
from pipeline import Pipeline
from system.machine import compile_network

CPU = torch.device("cpu")
SMALL = {"widths": (8, 8), "embedding_size": 8, "precision": "float32", "batch_size": 32}

# What copies a tensor's value to Python, and so would wait for a GPU
READERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class NothingIsRead(TorchDispatchMode):
    """Fails on operators whose result, or whose shape, depends on values on the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "bincount")

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        # What is float64 are the tables of Diffusion, which stay on the CPU
        reads = name in self.FORBIDDEN and args[0].dtype != torch.float64
        assert not reads, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def student_loss() -> tuple[Config, train.Loss]:
    teacher = Config(**SMALL)
    networks = [UNet(teacher).requires_grad_(False) for _ in range(2)]
    cfg = replace(student_settings(teacher, 4), batch_size=32)
    loaded = LoadedModel("teacher", teacher, *networks, Progress(), CPU, "")
    return cfg, Distillation(cfg, loaded).loss


def usual_loss() -> tuple[Config, train.Loss]:
    cfg = Config(**SMALL)
    return cfg, Diffusion(cfg).loss


@pytest.mark.parametrize("kind", [usual_loss, student_loss])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_training_step_never_waits_for_the_device(monkeypatch, kind, fraction):
    cfg, loss = kind()
    state = TrainState.initial(cfg, CPU)
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(64) % 10

    def step() -> None:
        x_0, y = train.batch(cfg, images, labels, state.progress)
        train.training_step(cfg, loss, state, x_0, y, fraction)

    def only_of_tables(name: str) -> Callable:
        original = getattr(torch.Tensor, name)

        def read(tensor: Tensor, *args: object) -> object:
            assert tensor.dtype == torch.float64, "a value is read from the device"
            return original(tensor, *args)

        return read

    step()  # the first one fills tables
    with monkeypatch.context() as patch, NothingIsRead():
        for name in READERS:
            patch.setattr(torch.Tensor, name, only_of_tables(name))
        step()
    with pytest.raises(AssertionError, match="waits for the device"), NothingIsRead():
        state.totals.sum().item()  # which shows that the check can fail
    assert state.progress.step == 2


@pytest.mark.parametrize("size", [{}, {"attention": True}, MODEL_SIZES["base"]])
def test_the_network_compiles_as_a_whole_and_means_the_same(size):
    """No graph break, forward or backward."""
    cfg = Config(**(size | {"widths": size.get("widths", (8, 16))}))
    network = UNet(cfg)
    torch.nn.init.normal_(network.head.weight, std=0.1)
    whole = copy.deepcopy(network)
    whole.compile(backend="aot_eager", fullgraph=True)  # which raises at a graph break
    x, t, y = torch.randn(2, 1, 28, 28), torch.tensor([1, 700]), torch.tensor([3, 10])
    outputs = [each(x, t, y) for each in (network, whole)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_compiled_network_is_saved_and_loaded_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(
        UNet, "compile", lambda self, mode: torch.nn.Module.compile(self, backend="eager")
    )
    cfg = Config(**SMALL)
    state = TrainState.initial(cfg, CPU)
    compile_network(state.model)
    for parameter in state.ema.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save(tmp_path / "a.pth", cfg, state)
    compiled, plain = (
        checkpoint.load_model(tmp_path / "a.pth", CPU, compiled) for compiled in (True, False)
    )
    drawn = [Pipeline(cfg, each.model).draw(torch.arange(4)) for each in (compiled, plain)]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("budgets", [(), pytest.param(("8s",), marks=pytest.mark.long)])
def test_the_gpu_benchmark_runs_trains_and_reports(run, monkeypatch, tmp_path, budgets):
    """On the CPU, with a tiny network, and "compiled" by the eager backend."""
    monkeypatch.setattr(benchmark, "SECONDS", 0.1)
    monkeypatch.setattr(benchmark, "BUDGETS", budgets)
    monkeypatch.setattr(benchmark, "SAMPLES", 128)
    monkeypatch.setattr(
        UNet, "compile", lambda self, mode: torch.nn.Module.compile(self, backend="eager")
    )
    flags = {"widths": "8,8", "embedding_size": 8, "max_images": 320, "batch_size": 32}
    flags |= {"steps": 2, "sample_batch_size": 8, "data_dir": MNIST, "device": "cpu"}
    result = run("benchmark.py", gpu=True, json=tmp_path / "gpu.json", **flags)
    assert result.code == 0, result
    for word in ("eager", "compiled", *budgets, "TFLOP/s in a bf16 product", "gpu.json"):
        assert word in result.out


@pytest.mark.gpu
def test_a_gpu_trains_resumes_and_draws(run, tmp_path):
    flags = {"widths": "8,8", "embedding_size": 8, "max_images": 640, "batch_size": 32}
    flags |= {"data_dir": MNIST, "output_dir": tmp_path, "steps": 2}
    assert run("train.py", **flags, device="cuda", epochs=2, compile=True).code == 0
    path = tmp_path / "models" / "model_epoch_2.pth"
    here = {"output_dir": tmp_path, "data_dir": MNIST}
    on = {"load_checkpoint_path": path, "continue_training_epochs": 1}
    assert run("train.py", **on, **here, device="cpu").code == 0  # from CUDA to the CPU
    on["load_checkpoint_path"] = tmp_path / "models" / "model_epoch_3.pth"
    assert run("train.py", **on, **here, device="cuda").code == 0  # and back
    for device in ("cuda", "cpu"):
        flags = {"model": path, "digits": "7", "output": tmp_path / f"{device}.npz"}
        assert run("generate.py", **flags, device=device, precision="float32").code == 0
