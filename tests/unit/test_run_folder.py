"""The lock of a run's folder, and what the watchdog says, in cases that take special file systems or many processes."""

import errno
import fcntl
import json
import os
import socket

import pytest
import torch

from config import get_default_config
from runtime import run_folder
from runtime.distributed import World
from runtime.run_folder import open_run_folder
from runtime.watchdog import Mark, Peer, Watchdog
from utils import UserError

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    config = get_default_config()
    config.OUTPUT = str(tmp_path)
    return config


@pytest.fixture
def lock(config):
    with open_run_folder(config, ALONE) as folder:
        return folder.path / run_folder.LOCK


def hold(lock, **holder) -> None:
    lock.write_text(json.dumps({"host": socket.gethostname(), "process": 1, "since": "yesterday", **holder}))


def test_lock_says_who_holds_it_and_is_empty_afterwards(config):
    with open_run_folder(config, ALONE) as folder:
        content = json.loads((folder.path / run_folder.LOCK).read_text())
        assert (content["host"], content["process"]) == (socket.gethostname(), os.getpid())
        assert folder.notes == []
    assert (folder.path / run_folder.LOCK).read_text() == ""


def test_lock_file_of_a_run_that_was_killed(config, lock):
    hold(lock, host="elsewhere", process=77)
    with open_run_folder(config, ALONE) as folder:
        assert folder.notes == ["process 77 on elsewhere was training here and was killed; going on"]


@pytest.mark.parametrize("content", ["x", "{}", "[1]", '{"host": 1, "process": "a"}', "null\n", "\0" * 20])
def test_lock_file_with_something_else_in_it(config, lock, content):
    lock.write_text(content)
    with open_run_folder(config, ALONE) as folder:
        assert "an unknown host" in folder.notes[0]


class TestWithoutLocks:
    """On a file system that has none, what the file says has to do."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        def lockf(file, flags):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", lockf)

    def test_free(self, config):
        with open_run_folder(config, ALONE) as folder:
            assert folder.notes == []

    @pytest.mark.parametrize("holder", [{"host": "elsewhere", "process": 77}, {"process": os.getppid()}])
    def test_held(self, config, lock, holder):
        hold(lock, **holder)
        with pytest.raises(UserError) as error, open_run_folder(config, ALONE):
            pass
        for part in (f"process {holder['process']} on", "since yesterday", f"delete {lock}"):
            assert part in str(error.value)
        assert json.loads(lock.read_text())["process"] == holder["process"]

    @pytest.mark.parametrize("whose", ["nobody", "mine"])
    def test_stale(self, config, lock, whose):
        """A process that is no more; or its number, which this process got."""
        process = os.getpid() if whose == "mine" else 2**22 + 1
        hold(lock, process=process)
        with open_run_folder(config, ALONE) as folder:
            assert f"process {process} on" in folder.notes[0]


def watchdog(*peers: Peer) -> Watchdog:
    found = Watchdog(World(0, 0, len(peers), torch.device("cpu")), 100.0)
    found._peers, found._answered = list(peers), found._since
    found.at(*peers[0].mark.position, doing=peers[0].mark.doing)
    return found


def test_watchdog_names_the_process_that_is_behind():
    waiting = Mark((3, 0, 8, 1), "waiting for the others in epoch 4 batch 9")
    loading = Mark((3, 0, 8, 0), "waiting for the data of epoch 4 batch 9")
    reason = watchdog(*(Peer(f"rank {i}", loading if i in (1, 3) else waiting) for i in range(4)))._reason()
    assert reason == f"rank 1 hangs: {loading.doing}, rank 3 hangs: {loading.doing}; here: {waiting.doing}"


def test_watchdog_names_the_process_that_is_silent():
    mark = Mark((3, 0, 8, 1), "x")
    silent = Peer("rank 2 (process 7 on there)", mark)
    silent.silent = 1000
    assert (
        watchdog(Peer("rank 0", mark), Peer("rank 1", mark), silent)
        ._reason()
        .startswith(f"{silent.name} does not respond")
    )


def test_watchdog_where_all_are_at_one_point():
    mark = Mark((3, 0, 8, 4), "the backward pass of epoch 4 batch 9")
    assert (
        watchdog(Peer("rank 0", mark), Peer("rank 1", mark))._reason()
        == f"all processes are at the same point: {mark.doing}"
    )
