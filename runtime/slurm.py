"""Slurm as a launcher: what `srun` tells each task, as the variables that torchrun sets for its processes."""

import re
import zlib
from collections.abc import Mapping, MutableMapping

from utils import UserError

# Free for users on most systems, below the ports that Linux gives to outgoing connections (32768 and up)
FIRST_PORT, PORTS = 15_000, 15_000


def announce_tasks(environ: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if this process is one of
    several tasks of a job step (`srun`). Variables that are set already stay: a launcher inside the job, or the user,
    decides.

    A process in a batch script or in an interactive shell is no such task, whatever SLURM_NTASKS says: it stays alone.

    Raises:
        UserError: a variable of Slurm's is missing or not as Slurm sets it.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or "WORLD_SIZE" in environ or tasks == "1":
        return
    rank, local_rank, size = (_number(environ, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS"))
    node = _number(environ, "SLURM_NODEID")
    on_nodes = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node >= len(on_nodes):
        raise UserError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE has {len(on_nodes)} nodes")
    # A port for each step of each job, so that two on one machine hardly meet. A job that was requeued has its port
    # again.
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    number = zlib.crc32(f"{job}.{step}".encode())
    found = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": on_nodes[node],
        "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")),
        "MASTER_PORT": FIRST_PORT + number % PORTS,
    }
    for name, value in found.items():
        environ.setdefault(name, str(value))


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether each process of the group is a task of Slurm's, as `announce_tasks` makes it."""
    same = (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "STEP_NUM_TASKS"))
    return all(environ.get(name, "") == environ.get(f"SLURM_{slurm}") for name, slurm in same)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise UserError(
            f"{name} is {value!r} in a job step of {environ['SLURM_STEP_NUM_TASKS']} tasks; accepted: the number that "
            "Slurm sets; without Slurm's variables, start the processes with torchrun"
        )
    return int(value)


def tasks_per_node(value: str) -> list[int]:
    """The tasks of each node, in order, from Slurm's short form: "4(x2),3" is [4, 4, 3].

    Raises:
        UserError: it is none.
    """
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", value):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {value!r}; accepted: a list such as 4(x2),3")
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", value)
    return [int(count) for count, times in pairs for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's short form: "rack[0-1]n[07,09],login" begins with rack0n07.

    Raises:
        UserError: it is none.
    """
    first = re.match(r"(?:[^,\[\]]|\[[\d,-]+\])+(?=,|$)", nodes)
    if not first:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}; accepted: a list such as node[01-04]")
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", first[0])
