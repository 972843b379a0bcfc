"""The process group: one process or many, whoever launched them, on CUDA (NCCL) or CPU (gloo)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from utils import UserError

# How long processes wait for each other: longer than a download or filling a cache takes.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process's place among all of them, and its device."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1


def init_world(device: str, local_rank: int | None = None) -> World:
    """Joins the process group that a launcher announced in the environment; without one, the world is this process.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        local_rank: what an old launcher passed as an argument; LOCAL_RANK in the environment goes first.

    Raises:
        UserError: CUDA asked for and absent, or fewer GPUs than processes on this machine.
    """
    # torchrun and torch.distributed.launch set all of these.
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    gpus = torch.cuda.device_count()
    if device == "cuda" or (device == "auto" and gpus > 0):
        if local_size > gpus:
            raise UserError(
                f"{local_size} process{'es' * (local_size > 1)} on this machine (--nproc_per_node), which has {gpus} "
                f"CUDA devices; accepted: one process per device, or --device cpu"
            )
        torch.cuda.set_device(local_rank)
        where = torch.device("cuda", local_rank)
    else:
        where = torch.device("cpu")

    if size > 1:
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=where if where.type == "cuda" else None)
    return World(rank, local_rank, size, where)


def close_world(world: World) -> None:
    """Leaves the process group."""
    if world.distributed:
        dist.destroy_process_group()


@contextmanager
def main_process_first(world: World) -> Iterator[None]:
    """The main process runs the body while the others wait, then the first process of every other machine, then all:
    for downloads into a folder that the machines may or may not share."""
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for _ in range(turn if world.distributed else 0):
        dist.barrier()
    yield
    for _ in range(2 - turn if world.distributed else 0):
        dist.barrier()


def from_main(value: Any, world: World) -> Any:
    """The main process's value, on all of them."""
    values = [value]
    if world.distributed:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum of a tensor over all processes, in place and returned."""
    if world.distributed:
        dist.all_reduce(values)
    return values
