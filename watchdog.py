"""A thread that notices when training no longer advances, and says which process hangs and where."""

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

from distributed import World

# The process group does not always notice that another process has ended: gloo may wait for it for ever.
ORPHAN_SECONDS = 60.0


class Mark(NamedTuple):
    """Where a process is. Positions of all processes compare: the smallest is the one that the others wait for."""

    position: tuple[int, ...]
    doing: str


@dataclass
class Peer:
    """What is known of a process.

    Attributes:
        pulse: grows as long as its watchdog lives.
        since: when the pulse was seen to grow.
    """

    name: str
    mark: Mark = field(default_factory=lambda: Mark((-1,), "starting"))
    pulse: int = 0
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """Inside `with`, ends this process (status 1) when `at` has not been called for `seconds`, or for `ORPHAN_SECONDS`
    after the processes' store has gone, and with it rank 0 or torchrun. Outside, does nothing.

    The message names the process that hangs: the one whose own watchdog is silent (it is stopped, or its machine is
    gone), or else the one that is behind. The stack of this process goes to stderr.

    Args:
        seconds: `TIMEOUT` of the config.
    """

    def __init__(self, world: World | None = None, seconds: float = float("inf"), logger: Logger | None = None):
        self.world, self.seconds, self.logger = world, seconds, logger
        self.interval = min(10.0, seconds / 10)
        self._mark, self._since = Mark((0,), "starting"), time.monotonic()
        self._ended = threading.Event()
        self._peers: list[Peer] = []
        self._answered = 0.0  # when the store last did
        self._store_lost = float("inf")  # when the store's process had ended

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.world.distributed:
            self._peers = [Peer(f"rank {rank}") for rank in range(self.world.size)]
            # On its own, because the store may hang: without torchrun it is in rank 0's process.
            self._threads.append(threading.Thread(target=self._talk, name="watchdog's store", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def at(self, *position: int, doing: str) -> None:
        """Says that this process has come to `position`, where it is `doing` something that may take a while."""
        self._mark, self._since = Mark(position, doing), time.monotonic()

    def _idle(self) -> float:
        return time.monotonic() - self._since

    def _watch(self) -> None:
        waited, since, looked = 0.0, self._since, time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if self._since != since:
                waited, since = 0.0, self._since
            # A process that was stopped and goes on (Ctrl-Z and fg) has not waited all that time.
            waited += min(now - looked, 2 * self.interval)
            looked = now
            if waited > self.seconds:
                self._give_up(f"no progress for {self.seconds:g} seconds (TIMEOUT): {self._reason()}")
            elif min(waited, now - self._store_lost) > ORPHAN_SECONDS:
                self._give_up(
                    f"no progress for {ORPHAN_SECONDS:g} seconds since the processes' store, which is rank 0's if not "
                    f"torchrun's, has gone; here: {self._mark.doing}"
                )

    def _give_up(self, reason: str) -> None:
        """Says why, and ends this process whatever happens: the console may be what hangs."""
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
        """Tells the other processes where this one is; listens to them once it may have to judge."""
        # A connection of its own: the process group's may be busy waiting, which is when this one is needed.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        pulse = 0
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
            store = dist.PrefixStore(f"{self.world.attempt}/watchdog", store)
            while not self._ended.is_set():
                pulse += 1
                content = [pulse, *self._mark, f"process {os.getpid()} on {socket.gethostname()}"]
                store.set(str(self.world.rank), json.dumps(content))
                if self._idle() > self.seconds / 2:
                    self._listen(store)
                self._ended.wait(self.interval)
        except RuntimeError as error:  # most often its process has gone, which the process group should notice too
            if isinstance(error, dist.DistNetworkError):  # and not a store that is merely slow
                self._store_lost = time.monotonic()
            self.logger.info(f"the watchdog has lost the processes' store: {str(error).splitlines()[0]}")

    def _listen(self, store: dist.Store) -> None:
        for rank, peer in enumerate(self._peers):
            if store.check([str(rank)]):
                pulse, position, doing, process = json.loads(store.get(str(rank)))
                if pulse != peer.pulse:
                    peer.pulse, peer.since = pulse, time.monotonic()
                peer.mark, peer.name = Mark(tuple(position), doing), f"rank {rank} ({process})"
        self._answered = time.monotonic()

    def _reason(self) -> str:
        """What hangs, as far as this process can know."""
        here, now = self._mark.doing, time.monotonic()
        if not self._peers:
            return here
        if now - self._answered > 3 * self.interval:
            return f"the processes' store, which is rank 0's if not torchrun's, does not answer; here: {here}"
        silent = [peer.name for peer in self._peers if now - peer.since > 3 * self.interval]
        if silent:
            return f"{', '.join(silent)} does not respond; here: {here}"
        last = min(peer.mark.position for peer in self._peers)
        behind = [peer for peer in self._peers if peer.mark.position == last]
        if len(behind) == len(self._peers):
            return f"all processes are at the same point: {here}"
        return f"{', '.join(f'{peer.name} hangs: {peer.mark.doing}' for peer in behind)}; here: {here}"
