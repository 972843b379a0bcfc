"""A thread that notices when training no longer advances, and says which process hangs and where."""

import faulthandler
import json
import multiprocessing
import os
import socket
import threading
import time
from datetime import timedelta
from logging import Logger
from typing import NamedTuple

import torch.distributed as dist

from distributed import World


class Mark(NamedTuple):
    """Where a process is. Positions of all processes compare: the smallest is the one that the others wait for."""

    position: tuple[int, ...]
    doing: str


class Watchdog:
    """Inside `with`, ends this process (status 1) when `at` has not been called for `seconds`. Outside, does nothing.

    The message names the process that hangs: the one whose own watchdog is silent (it is stopped, or its machine is
    gone), or else the one that is behind. The stack of this process goes to stderr.

    Args:
        seconds: `TIMEOUT` of the config.
    """

    def __init__(self, world: World | None = None, seconds: float = float("inf"), logger: Logger | None = None):
        self.world, self.seconds, self.logger = world, seconds, logger
        self.interval = min(10.0, seconds / 5)
        self._mark, self._since = Mark((0,), "starting"), time.monotonic()
        self._ended = threading.Event()
        self._pulse = 0
        self._store: dist.Store | None = None

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        if self.world.distributed:
            # A connection of its own: the process group's may be busy waiting, which is when this one is needed.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
            # torchrun keeps its store over restarts.
            self._store = dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self._publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, *position: int, doing: str) -> None:
        """Says that this process has come to `position`, where it is `doing` something that may take a while."""
        self._mark, self._since = Mark(position, doing), time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            self._publish()
            if time.monotonic() - self._since > self.seconds:
                message = self._report()
                if self._ended.is_set() or time.monotonic() - self._since <= self.seconds:
                    continue  # it has moved in the meantime
                self.logger.error(message)
                faulthandler.dump_traceback()
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(1)

    def _publish(self) -> None:
        """Tells the others that this process lives, and where it is."""
        self._pulse += 1
        if self._store is not None:
            content = [self._pulse, *self._mark, socket.gethostname(), os.getpid()]
            try:
                self._store.set(str(self.world.rank), json.dumps(content))
            except RuntimeError:  # the store's process is gone, or hangs: `_report` says so if it matters
                return

    def _read(self) -> list[tuple[int, Mark, str]]:
        """Pulse, mark and name of each process."""
        found = []
        for rank in range(self.world.size):
            if not self._store.check([str(rank)]):
                found.append((0, Mark((-1,), "starting"), f"rank {rank}"))
                continue
            pulse, position, doing, host, process = json.loads(self._store.get(str(rank)))
            found.append((pulse, Mark(tuple(position), doing), f"rank {rank} (process {process} on {host})"))
        return found

    def _report(self) -> str:
        start = f"no progress for {self.seconds:g} seconds (TIMEOUT): "
        end = "; this process exits, the same command goes on from the last checkpoint"
        if self._store is None:
            return f"{start}{self._mark.doing}{end}"
        try:
            before = self._read()
            time.sleep(2.5 * self.interval)
            self._publish()
            now = self._read()
        except RuntimeError as error:
            # Its process is the first to suspect: without torchrun that is rank 0.
            return f"{start}{self._mark.doing}; the processes' store does not answer ({error}){end}"
        silent = [name for (old, *_), (new, _, name) in zip(before, now, strict=True) if old == new]
        if silent:
            return f"{start}{', '.join(silent)} does not respond; this process: {self._mark.doing}{end}"
        last = min(mark.position for _, mark, _ in now)
        behind = [f"{name} hangs: {mark.doing}" for _, mark, name in now if mark.position == last]
        if len(behind) == len(now):
            return f"{start}all processes are at the same point: {self._mark.doing}{end}"
        return f"{start}{', '.join(behind)}; the others wait for it; this process: {self._mark.doing}{end}"
