"""The processes of one run: torchrun starts several, otherwise there is one.

In training, each takes its part of every batch. Their gradients are added up before each step, so
that all hold the same weights, and the first alone writes files. Only the first one prints.
"""

import datetime
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
has_left = False  # whether this process was connected to others and is not any more
in_first = False  # whether this process does what only the first one does
TIMEOUT = datetime.timedelta(hours=2)  # how long the others wait while one draws or evaluates


def is_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def from_torchrun(name: str, default: int) -> int:
    """A number that torchrun tells its processes, or the default where it did not start them."""
    return int(os.environ.get(name, default)) if is_torchrun() else default


def rank() -> int:
    """The number of this process, from 0."""
    return from_torchrun("RANK", 0)


def processes() -> int:
    """How many processes there are, on all machines together."""
    return from_torchrun("WORLD_SIZE", 1)


def is_first_here() -> bool:
    """Whether this is the only process on this computer, or the first of several."""
    return from_torchrun("LOCAL_RANK", 0) == 0


def lost_others(error: Exception) -> bool:
    """Whether an error says that the connection to other processes broke."""
    known = isinstance(error, getattr(dist, "DistError", ()))
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_restart() -> bool:
    """Whether torchrun (--max-restarts) started the processes again after one of them died."""
    return from_torchrun("TORCHELASTIC_RESTART_COUNT", 0) > 0


def run_id() -> str:
    """A name for the run that stays the same when torchrun restarts its processes."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" unless --rdzv-id or --standalone
    return given if given != "none" else f"process {os.getppid()}"


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Connect the processes inside a `with` block; tensors on a CPU always travel by gloo."""
    if processes() == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    group = {"rank": rank(), "world_size": processes(), "store": meeting_point()}
    dist.init_process_group(backend, timeout=TIMEOUT, **group)
    try:
        yield
    finally:
        dist.destroy_process_group()
        global has_left
        has_left = True


def meeting_point() -> "dist.Store | None":
    """Where the processes find one another, if not by torch's own means. After a restart,
    torchrun's store may still hold the addresses of processes that have died (PyTorch's issue
    135712), so the first process opens a new store, and the others try until they reach it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    known = dist.TCPStore(host, port, is_master=False)
    if rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        known.set("port of the first process", str(store.port))
        return store
    while True:  # until torchrun ends it
        with suppress(dist.DistError):
            port = int(known.get("port of the first process"))
            patience = datetime.timedelta(seconds=2)
            return dist.TCPStore(host, port, is_master=False, timeout=patience)


def is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def first_only(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does nothing, and returns None, in all processes but the first."""

    @functools.wraps(work)
    def wrapped(*args: Any, **options: Any) -> Any:
        return work(*args, **options) if rank() == 0 else None

    return wrapped


def from_first(work: Callable[[], T]) -> T:
    """Run `work` in the first process alone and return its result in all. If it raises, the others
    exit."""
    global in_first
    if in_first or not is_joined():
        return work()
    result: list[Any] = [False, None]
    try:
        if rank() == 0:
            in_first = True
            result = [True, work()]
    finally:
        in_first = False
        dist.broadcast_object_list(result)
    if not result[0]:
        raise SystemExit(2)
    return result[1]


def barrier() -> None:
    """Wait until all processes have come here."""
    largest()


def largest(*values: float) -> list[float]:
    """The largest of each value over all processes."""
    if not is_joined():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(parts: list[Tensor]) -> Tensor:
    """The parts (n, ...) of all processes in the order of their ranks, as one tensor on the CPU."""
    everything = [[part.cpu() for part in parts]]
    if is_joined():
        mine, everything = everything[0], [[]] * processes()
        dist.all_gather_object(everything, mine)
    return torch.cat([part for each in everything for part in each])


def my_parts(count: int, parts_each: int = 1) -> list[slice]:
    """This process's parts of `count` items in order, if each process gets `parts_each` parts and
    all parts are as equal as can be."""
    total, first = processes() * parts_each, rank() * parts_each
    edges = [count * part // total for part in range(first, first + parts_each + 1)]
    return [slice(*ends) for ends in itertools.pairwise(edges)]


def add_up(tensors: list[Tensor]) -> None:
    """Add up tensors over all processes, in place, joined into one, so that numbers are always
    added in the same order. PyTorch's DistributedDataParallel changes that order after the first
    step, and a resumed run of three processes would end with other bits."""
    if is_joined():
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, total in zip(
            tensors, together.split([t.numel() for t in tensors]), strict=True
        ):
            tensor.copy_(total.view_as(tensor))
