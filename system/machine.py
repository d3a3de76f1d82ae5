"""What this computer can do: memory, the device and number type to compute with, compilation, how
large a batch may be, and how to keep torch from work that is not needed."""

import ctypes
import functools
import os
import platform
import time
from contextlib import suppress

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from config import Config
from system import distributed
from system.files import first_line

MAX_STEP_BYTES = 64_000_000_000  # also where the computer has more


def set_up_torch() -> None:
    """What a script does first, so that torch computes fast and as asked."""
    keep_freed_memory()
    torch.set_flush_denormal(True)  # denormals are slow; to be set before any thread starts
    torch.backends.cudnn.allow_tf32 = False  # float32 means just that; bf16 is there for speed


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step. By default it returns it to the system, and
    each step faults thousands of pages in again. On a virtual machine, keeping it makes training
    1.3 times as fast, and drawing 1.6 times."""
    if platform.libc_ver()[0] == "glibc":
        with suppress(AttributeError, OSError):
            trim_threshold, top_pad, mmap_max = -1, -2, -4  # from glibc's malloc.h
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(mmap_max, 0)  # large blocks come from the heap too …
            mallopt(trim_threshold, 2**31 - 1)  # … which keeps them
            mallopt(top_pad, 64 << 20)


def check_step(cfg: Config, device: torch.device) -> None:
    """Raise ValueError if a batch cannot be divided among the processes, or if a training step of
    one of them needs more than MAX_STEP_BYTES or, on a CPU, more than this computer's memory. Only
    activations are counted."""
    sides = [cfg.img_size // (cfg.patch_size * 2**level) for level in range(len(cfg.widths))]
    numbers = sum(w * side**2 for w, side in zip(cfg.widths, sides, strict=True))
    parts = distributed.processes() * cfg.accumulate
    if parts > cfg.batch_size:
        limit = f"cannot be divided among {parts} parts; choose a larger one"
        raise ValueError(f"batch_size = {cfg.batch_size}: {limit}")
    at_once = -(-cfg.batch_size // parts)
    step = at_once * (2 * cfg.blocks + 1) * 8 * 4 * numbers  # 8 float32 tensors per block
    most = MAX_STEP_BYTES
    if device.type == "cpu":
        with suppress(AttributeError, OSError, ValueError):  # Windows does not tell
            most = min(most, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if step > most:
        limit = f"a step needs {step / 1e9:.0f} GB; at most {most / 1e9:.0f}"
        remedy = "choose a smaller one, or a larger --accumulate"
        raise ValueError(f"batch_size = {cfg.batch_size}: {limit}; {remedy}")


class SkipInitialization(TorchFunctionMode):
    """A `with` block in which weights stay as they are allocated. On the meta device there is
    nothing to initialize, but torch would import its compiler for it, which takes over a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") != "torch.nn.init":
            return func(*args, **(kwargs or {}))
        return None


def compile_network(network: nn.Module, *, graphs: bool = True) -> None:
    """Compile a network when it is first called. On a GPU it becomes CUDA `graphs`; pass False if
    gradients of several calls are added up, as each replay overwrites those of the last."""
    on_gpu = next(network.parameters()).device.type == "cuda"
    network.compile(mode="reduce-overhead" if on_gpu and graphs else None)


def pick_device(name: str) -> torch.device:
    """The torch device for Config.device; if torchrun started several processes, each has a GPU of
    its own. Raises ValueError if the device cannot be used here."""
    remedy = "try cpu" if name == "auto" else "try auto"
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cpu":
        return torch.device("cpu")
    if distributed.processes() > 1 and name.startswith("cuda"):
        here, GPUs = distributed.from_torchrun("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
        if name != "cuda":
            raise ValueError(f"device = {name!r}: torchrun gives each process a GPU; use cuda")
        if here > GPUs:
            reason = f"{here} processes on this machine, but {GPUs} GPUs"
            raise ValueError(f"device = 'cuda': {reason}; start fewer, or use --device cpu")
        name = f"cuda:{distributed.from_torchrun('LOCAL_RANK', 0)}"
    return usable_device(name, remedy)


def usable_device(name: str, remedy: str = "try cpu") -> torch.device:
    """The device of this name. Raises ValueError if it cannot be used here."""
    try:
        one = torch.ones(1, device=name)
        if one.item() == 1:  # raises on "meta"
            return one.device
        reason = "it computes wrongly"
    except Exception as error:  # a device whose package is missing can raise anything
        reason = first_line(error)
    raise ValueError(f"device = {name!r}: not usable here ({reason}); {remedy}")


def pick_precision(name: str, device: torch.device) -> str:
    """The network's number type, "float32" or "bf16"; its weights stay in float32. "auto" takes
    bf16 on a GPU where it is native, and on a CPU where it is faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and bf16_is_faster()
    return "bf16" if pays else "float32"


@functools.cache
def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices faster in bf16. Having the instructions is not enough:
    AMD's run at twice the speed of float32, Intel's without AMX at half of it. A CPU that lacks
    them, and so is hundreds of times slower, is not measured."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    if not any(getattr(torch.cpu, probe, lambda: False)() for probe in probes):
        return False
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    taken: list[list[float]] = [[], []]
    for _ in range(10):  # in turn, and only the shortest counts, because other programs disturb
        for x, times in zip(matrices, taken, strict=True):
            began = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - began)
    return min(taken[0]) < 0.8 * min(taken[1])  # a near-tie must not change on resuming
