"""The process group: one process or many, whoever launched them, on CUDA (NCCL) or CPU (gloo)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils import UserError


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
        dist.init_process_group(backend, device_id=where if where.type == "cuda" else None)
    return World(rank, local_rank, size, where)


def close_world(world: World) -> None:
    """Leaves the process group."""
    if world.distributed:
        dist.destroy_process_group()


@contextmanager
def main_process_first(world: World) -> Iterator[None]:
    """The main process runs the body while the others wait, then they run it: for downloads into a shared folder."""
    if world.distributed and not world.is_main:
        dist.barrier()
    yield
    if world.distributed and world.is_main:
        dist.barrier()


def all_reduce_sum(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum of a tensor over all processes, in place and returned."""
    if world.distributed:
        dist.all_reduce(values)
    return values
