"""Slurm's variables, as srun of Slurm 22.05 and 23.11 sets them for a task."""

import os

import pytest

from data import build
from runtime.slurm import FIRST_PORT, PORTS, announce_tasks, first_host, tasks_per_node
from utils import UserError

# srun --nodes 3 --ntasks 5, the fourth task, which is the second of the second node
TASK = {
    **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
    **{"SLURM_STEP_NODELIST": "gpu[08-09,11]", "SLURM_NODELIST": "gpu[01-16]"},
}


def announced(**changes):
    """What is set beside Slurm's variables; None takes one away."""
    environ = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    before = dict(environ)
    announce_tasks(environ)
    assert environ.items() >= before.items()
    return {name: value for name, value in environ.items() if name not in before}


def test_task_of_a_step():
    found = announced()
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        **{"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu08"},
    }
    assert FIRST_PORT <= port < FIRST_PORT + PORTS
    assert announced(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")["MASTER_PORT"] == str(port)
    others = {announced(SLURM_STEP_ID="3")["MASTER_PORT"], announced(SLURM_JOB_ID="4712")["MASTER_PORT"]}
    assert len({str(port), *others}) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},  # a process of torchrun's in the task
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_ID": None, "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},  # a shell of salloc's
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks 1
    ],
)
def test_process_that_is_no_task(changes):
    assert announced(**changes) == {}


def test_what_is_set_stays():
    found = announced(MASTER_PORT="29999", MASTER_ADDR="10.0.0.1")
    assert "MASTER_PORT" not in found and found["RANK"] == "3"


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"])
@pytest.mark.parametrize("value", [None, "", "many", "-1"])
def test_missing_number(name, value):
    with pytest.raises(UserError, match=f"{name} is .*torchrun"):
        announced(**{name: value})


def test_node_that_the_step_does_not_have():
    with pytest.raises(UserError, match="SLURM_NODEID is 3, but SLURM_STEP_TASKS_PER_NODE has 3 nodes"):
        announced(SLURM_NODEID="3")
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE is ''"):
        announced(SLURM_STEP_TASKS_PER_NODE=None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node7.cluster.example", "node7.cluster.example"),
        ("node[01-04]", "node01"),
        ("node[3,5-9]-ib,login", "node3-ib"),
        ("a1,b[2-3]", "a1"),
        ("rack[0-1]n[07,09],login", "rack0n07"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "[", "]", "node[01"])
def test_no_host(nodes):
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        first_host(nodes)


@pytest.mark.parametrize(("value", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x1)", [1, 2])])
def test_tasks_per_node(value, counts):
    assert tasks_per_node(value) == counts


@pytest.mark.parametrize("value", ["", "x", "2(x", "2,,3"])
def test_no_tasks_per_node(value):
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
        tasks_per_node(value)


@pytest.mark.parametrize(("allowed", "per_task", "cores"), [(16, "4", 4), (2, "12", 2), (16, None, 8), (16, "", 8)])
def test_cores_of_a_task(allowed, per_task, cores, monkeypatch):
    """What --cpus-per-task says, but not more than the process may use; without it, this task's share."""
    environ = {**TASK, **({} if per_task is None else {"SLURM_CPUS_PER_TASK": per_task})}
    announce_tasks(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    if per_task is None:
        monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    assert build._cores() == cores
