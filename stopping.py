"""Stopping on request: the signals that people and schedulers send, noted and answered at the end of a step."""

import os
import signal
import time
from types import FrameType

# What a run that was stopped and saved exits with: sysexits.h's EX_TEMPFAIL, "try again later".
EXIT_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher may pass on what its processes got themselves: within so many seconds, two signals are one request.
SAME_REQUEST = 1.0


class Stopped(Exception):
    """All processes have agreed to stop because one got a signal."""


class StopRequest:
    """Inside `with`, notes SIGTERM, SIGINT and SIGUSR1 instead of letting them end the process; a second one ends it at
    once with status 128 + its number. To be used in the main thread.

    Attributes:
        signal: name of the signal that came; None as long as none has.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0
        self._process = os.getpid()

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child forked with this handler: its parent decides
            return
        name = signal.Signals(number).name
        if self.signal is None:
            self.signal, self._since = name, time.monotonic()
            # Not through logging, whose lock the code that was interrupted may hold.
            os.write(2, f"{name}: stopping after this step; a second signal exits at once\n".encode())
        elif time.monotonic() - self._since >= SAME_REQUEST:
            os.write(2, f"{name}: a second signal, exiting without saving\n".encode())
            os._exit(128 + number)


def ignore_signals(*_) -> None:
    """Makes this process deaf to them: for loader processes, which a signal to the whole group reaches too, and whose
    batches the step that is being finished still needs."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
