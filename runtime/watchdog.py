"""A thread that notices when training no longer advances, and reports which process hangs and where."""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from logging import Logger
from typing import NamedTuple

import torch.distributed as dist

from runtime.distributed import World
from utils import process_runs

# The process group does not always notice that another process has ended: gloo may wait for it for ever.
ORPHAN_SECONDS = 60.0


class Mark(NamedTuple):
    """Where a process is. Positions of processes compare: the others wait for the one with the smallest."""

    position: tuple[int, ...]
    doing: str


@dataclass
class Peer:
    """What is known of a process.

    Attributes:
        pulse: a number that grows as long as its watchdog lives.
        silent: seconds of listening in which the pulse has not grown.
        process, host: where it runs.
        left: whether it has left its `with` without an error.
    """

    name: str
    mark: Mark = field(default_factory=lambda: Mark((-1,), "starting"))
    pulse: int = 0
    silent: float = 0.0
    process: int = 0
    host: str = ""
    left: bool = False

    def killed(self) -> bool:
        """Whether it has ended without leaving. On another machine nobody can tell. A stopped process has not ended."""
        # It must be silent too: machines may share a name, and containers have their own process ids.
        silent = self.silent > ORPHAN_SECONDS and not self.left
        return silent and self.host == socket.gethostname() and not process_runs(self.process)


class Watchdog:
    """Inside `with`, ends this process (status 1) if `at` has not been called

    - for `seconds`, or
    - for `ORPHAN_SECONDS` since the processes' store was lost, and with it rank 0 or torchrun, or
    - for `ORPHAN_SECONDS` while another process of this machine is silent and no longer exists.

    Outside, it does nothing.

    The message names the process that hangs. That is one whose watchdog is silent (it is stopped, or its machine is
    gone), or else the one that is behind. The stack of this process goes to stderr.

    Args:
        seconds: `TIMEOUT` of the config.
    """

    def __init__(self, world: World | None = None, seconds: float = float("inf"), logger: Logger | None = None):
        self.world, self.seconds, self.logger = world, seconds, logger
        self.interval = min(10.0, seconds / 10)
        self._mark, self._since = Mark((0,), "starting"), time.monotonic()
        self._ended, self._left = threading.Event(), False
        self._peers: list[Peer] = []
        self._answered = 0.0  # when the store last did
        self._store_lost = float("inf")  # when the store's process had ended

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.world.distributed:
            self._peers = [Peer(f"rank {rank}") for rank in range(self.world.size)]
            # A thread of its own, because the store may hang: without torchrun, rank 0's process serves it.
            self._threads.append(threading.Thread(target=self._talk, name="watchdog's store", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._left = exception[0] is None  # the others must not wait for one that fails
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def at(self, *position: int, doing: str) -> None:
        """Notes that this process has come to `position` and is `doing` something that may take a while."""
        self._mark, self._since = Mark(position, doing), time.monotonic()

    def _idle(self) -> float:
        return time.monotonic() - self._since

    def _watch(self) -> None:
        waited, since, looked = 0.0, self._since, time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if self._since != since:
                waited, since = 0.0, self._since
            # Time in which this process was stopped (Ctrl-Z, then fg) does not count.
            waited += min(now - looked, 2 * self.interval)
            looked = now
            if waited > self.seconds:
                self._give_up(f"no progress for {self.seconds:g} seconds (TIMEOUT): {self._reason()}")
            elif min(waited, now - self._store_lost) > ORPHAN_SECONDS:
                self._give_up(
                    f"no progress for {ORPHAN_SECONDS:g} seconds since the processes' store (torchrun's, or else rank "
                    f"0's) was lost; here: {self._mark.doing}"
                )
            elif waited > ORPHAN_SECONDS and (killed := [peer.name for peer in self._peers if peer.killed()]):
                self._give_up(
                    f"no progress for {ORPHAN_SECONDS:g} seconds, and {', '.join(killed)} has ended; here: "
                    f"{self._mark.doing}"
                )

    def _give_up(self, reason: str) -> None:
        """Logs why, and ends this process whatever happens: even the console may hang."""
        try:
            with contextlib.suppress(Exception):  # no stderr
                faulthandler.dump_traceback_later(20, exit=True)
            self.logger.error(f"{reason}; this process exits, the same command goes on from the last checkpoint")
            for child in multiprocessing.active_children():
                child.kill()
            faulthandler.dump_traceback()
        finally:
            os._exit(1)

    def _talk(self) -> None:
        """Tells the other processes where this one is. Listens to them once it has waited for long."""
        # A connection of its own: the process group's may be busy waiting just when this one is needed.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        pulse = 0
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            store = dist.PrefixStore(f"{self.world.attempt}/watchdog", store)
            ended = False
            while not ended:
                ended = self._ended.is_set()  # the others are told once more
                pulse += 1
                content = [pulse, *self._mark, os.getpid(), socket.gethostname(), self._left]
                store.set(str(self.world.rank), json.dumps(content))
                if self._idle() > min(self.seconds, ORPHAN_SECONDS) / 2:
                    self._listen(store)
                self._ended.wait(self.interval)
        except RuntimeError as error:  # usually its process has ended, which the process group should notice too
            if isinstance(error, dist.DistNetworkError):  # a store that is merely slow raises something else
                self._store_lost = time.monotonic()
            if not self._ended.is_set():
                self.logger.info(f"the watchdog has lost the processes' store: {str(error).splitlines()[0]}")

    def _listen(self, store: dist.Store) -> None:
        # Time in which this process was stopped (Ctrl-Z, then fg) does not count here either.
        listened = min(time.monotonic() - self._answered, 2 * self.interval)
        for rank, peer in enumerate(self._peers):
            before = peer.pulse
            if store.check([str(rank)]):
                peer.pulse, position, doing, peer.process, peer.host, peer.left = json.loads(store.get(str(rank)))
                peer.mark = Mark(tuple(position), doing)
                peer.name = f"rank {rank} (process {peer.process} on {peer.host})"
            peer.silent = peer.silent + listened if peer.pulse == before else 0.0
        self._answered = time.monotonic()

    def _reason(self) -> str:
        """What hangs, as far as this process can tell."""
        here, now = self._mark.doing, time.monotonic()
        if not self._peers:
            return here
        if now - self._answered > 3 * self.interval:
            return f"the processes' store (torchrun's, or else rank 0's) does not answer; here: {here}"
        peers = [peer for peer in self._peers if not peer.left]
        silent = [peer.name for peer in peers if peer.silent > 3 * self.interval]
        if silent:
            return f"{', '.join(silent)} does not respond; here: {here}"
        last = min(peer.mark.position for peer in peers)
        behind = [peer for peer in peers if peer.mark.position == last]
        if len(behind) == len(peers):
            return f"all processes are at the same point: {here}"
        return f"{', '.join(f'{peer.name} hangs: {peer.mark.doing}' for peer in behind)}; here: {here}"
