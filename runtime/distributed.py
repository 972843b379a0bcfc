"""The process group: one process or many, under any launcher, on CUDA (NCCL) or the CPU (gloo)."""

import inspect
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from runtime.slurm import announce_tasks, is_task
from utils import UserError

# How long processes wait for each other at least. Downloading data or filling a cache takes less.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process's place among all of them, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # for tensors on the CPU; None: the default group
    attempt: str = ""  # a name for this start of the job, if there are several processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1


def init_world(device: str, local_rank: int | None = None, timeout: timedelta = TIMEOUT) -> World:
    """Joins the process group that a launcher (torchrun, or Slurm's srun) announced in the environment; without one,
    the world is this process.

    Args:
        device: "auto" (CUDA if there is a device), "cpu" or "cuda".
        local_rank: what an old launcher passed as an argument; LOCAL_RANK in the environment takes precedence.
        timeout: how long processes wait for each other.

    Raises:
        UserError: CUDA asked for and absent, or fewer GPUs than processes on this machine.
    """
    announce_tasks(os.environ)
    # torchrun and torch.distributed.launch set all of these.
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    gpus = torch.cuda.device_count()
    if device == "cuda" or (device == "auto" and gpus > 0):
        own = gpus == 1 and is_task(os.environ)  # srun --gpus-per-task 1 shows a task its own GPU only
        if local_size > gpus and not own:
            raise UserError(
                f"{local_size} process{'es' * (local_size > 1)} on this machine (--nproc_per_node), which has {gpus} "
                f"CUDA devices; accepted: one process per device, or --device cpu"
            )
        where = torch.device("cuda", 0 if own else local_rank)
        torch.cuda.set_device(where)
    else:
        where = torch.device("cpu")

    host_group, attempt = None, ""
    if size > 1:
        # torchrun keeps its store over restarts. Without a prefix for each start (PyTorch 2.15 has none), a process may
        # find the addresses of processes that were killed, and fail or wait for them.
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        attempt = _agree_on_attempt(store, rank, size, timeout)
        store = dist.PrefixStore(attempt, store)
        keys = {"store": store, "rank": rank, "world_size": size, "timeout": timeout}
        if where.type == "cuda":
            dist.init_process_group("nccl", **keys, device_id=where)
            host_group = dist.new_group(backend="gloo", timeout=timeout)
        else:
            dist.init_process_group("gloo", **keys)
    return World(rank, local_rank, size, where, host_group, attempt)


def _agree_on_attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name for this start of the job. Rank 0 draws it and tells the others, through a store that still has the keys
    of earlier starts. (torchrun counts restarts per machine, not per job.)

    Raises:
        UserError: a process does not come.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"attempt/{rank}", question)
        attempt = store.get(f"attempt/{question}").decode()  # waits
        store.set(f"attempt/{attempt}/{rank}", "")
        return attempt
    attempt, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    for other in range(1, size):
        while not store.check([f"attempt/{attempt}/{other}"]):
            if time.monotonic() > deadline:
                raise UserError(f"rank {other} of {size} processes has not come within {timeout}")
            if store.check([f"attempt/{other}"]):  # perhaps still the question of a process that was killed
                store.set(f"attempt/{store.get(f'attempt/{other}').decode()}", attempt)
            time.sleep(0.01)
    return attempt


def close_world(world: World) -> None:
    """Leaves the process group."""
    if world.distributed:
        # Gloo's threads need the interpreter to release their last tensors. PyTorch 2.6 holds it while it waits for the
        # threads to end, and so can wait for ever.
        time.sleep(0.1)
        dist.destroy_process_group()


@contextmanager
def main_process_first(world: World) -> Iterator[None]:
    """The main process runs the body first, then the first process of every other machine, then all others: for
    downloads into a folder that the machines may or may not share. If the body raises an exception, the others still
    get their turn, and may say more."""
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for _ in range(turn if world.distributed else 0):
        dist.barrier()
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    for _ in range(2 - turn if world.distributed else 0):
        dist.barrier()
    if failure:
        raise failure


def from_main(value: Any, world: World) -> Any:
    """The main process's value, on all of them."""
    values = [value]
    if world.distributed:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Any, world: World) -> list[Any]:
    """The values of all processes, by rank, on all of them. The device is not involved."""
    values = [value]
    if world.distributed:
        values = [None] * world.size
        dist.all_gather_object(values, value, group=world.host_group)
    return values


def on_main(function: Callable[[], Any], world: World) -> Any:
    """What `function` returns on the main process, on all of them. If it raises a UserError there, all raise one: a
    launcher ends the others as soon as one process has ended, so none may go on alone."""
    value = failure = None
    if world.is_main:
        try:
            value = function()
        except UserError as error:
            failure = error
    value, message = from_main((value, failure and str(failure)), world)
    if message:
        raise failure or UserError(message)
    return value


def sum_on_host(values: Sequence[int], world: World) -> list[int]:
    """Sums of whole numbers over all processes, for what their Python code has to agree on. The device is not
    involved."""
    if not world.distributed:
        return list(map(int, values))
    sums = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(sums, group=world.host_group)
    return sums.tolist()


def gather_rows(row: torch.Tensor, world: World) -> torch.Tensor:
    """The tensors of all processes, each of shape (n,), as (processes, n) on the CPU of every one."""
    rows = [torch.empty_like(row) for _ in range(world.size)]
    if world.distributed:
        dist.all_gather(rows, row)
    else:
        rows = [row]
    return torch.stack(rows).cpu()


def all_reduce_sum(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum of a tensor over all processes, in place and returned."""
    if world.distributed:
        dist.all_reduce(values)
    return values


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Inside, what the backends raise when another process has ended becomes a UserError."""
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing more specific
        found = re.search(r"connection (closed|reset|refused)[^.\n]*|broken pipe", str(error), re.IGNORECASE)
        if found is None or not ("gloo/transport" in str(error) or isinstance(error, dist.DistError)):
            raise
        raise UserError(
            f"lost the connection to another process ({found[0]}), which has ended: its own message says why; the same "
            "command goes on from the last checkpoint"
        ) from error


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The model as training calls it: under DistributedDataParallel if there are several processes, else itself.

    All processes start with rank 0's weights and running statistics. Afterwards each has running statistics of its own.
    """
    if not world.distributed:
        return model
    on_cpu = world.device.type == "cpu"
    # Running statistics are averaged once per epoch instead of being sent from rank 0 at each step. The argument that
    # says so changed its name in PyTorch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(
        model,
        device_ids=None if on_cpu else [world.device],
        gradient_as_bucket_view=True,
        # All parameters are used, unless the model says otherwise. But while it looks for unused ones, it does not
        # rearrange its buckets after the first step. From three processes on, the place in a bucket decides the order
        # in which gradients are summed, so that a resumed run would differ in the last bit. On GPUs sums are not
        # reproducible anyway: save the time.
        find_unused_parameters=on_cpu or getattr(model, "has_unused_parameters", False),
        **no_broadcast,
    )
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    # Gradients of depthwise kernels, and the compiler's of 1 x 1 kernels, have other strides in dimensions of one
    # element, where strides mean nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return wrapped
