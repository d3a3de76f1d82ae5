import time

import pytest
import torch

from config import Config
from system.machine import bf16_is_faster, check_step, pick_device, pick_precision


def test_auto_takes_apples_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = []
    monkeypatch.setattr(torch, "ones", lambda *_, device: asked.append(device) or torch.tensor([1]))
    pick_device("auto")
    assert asked == ["mps"]
    assert pick_precision("auto", torch.device("mps")) == "float32"


def test_auto_takes_cuda_if_available_and_an_unusable_device_is_an_error():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device = '{name}'"):
            pick_device(name)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("slower", [torch.float32, torch.bfloat16])
def test_auto_precision_takes_bf16_only_where_the_cpu_multiplies_it_faster(
    monkeypatch, native, slower
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    def matmul(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert native, "a CPU that emulates bf16 must not be measured"
        if x.dtype == slower:
            time.sleep(0.02)
        return x  # not the product, which emulated bf16 would take long for

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    bf16_is_faster.cache_clear()
    cpu = torch.device("cpu")
    expected = "bf16" if native and slower == torch.float32 else "float32"
    assert pick_precision("auto", cpu) == expected
    assert pick_precision("float32", cpu) == "float32"
    assert pick_precision("bf16", cpu) == "bf16"
    bf16_is_faster.cache_clear()


def test_a_step_that_needs_too_much_memory_is_refused():
    gpu = torch.device("cuda")
    check_step(Config(batch_size=4096), gpu)
    with pytest.raises(ValueError, match=r"batch_size = 65536: a step needs \d+ GB; at most 64"):
        check_step(Config(batch_size=65_536, widths=(256, 256)), gpu)


def test_a_step_that_needs_more_memory_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 500_000}.get)
    check_step(Config(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"batch_size = 4096: a step needs \d GB; at most 2"):
        check_step(Config(batch_size=4096), torch.device("cpu"))


def test_a_device_that_does_not_compute_is_refused():
    for name in ("meta", "hpu", "cuda:99", "no such device"):
        with pytest.raises(ValueError, match=f"device = '{name}': not usable here .*; try auto"):
            pick_device(name)
