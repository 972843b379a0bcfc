"""Stopping on request: signals from people and schedulers are noted, and answered at the end of a step."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

# What a run that was stopped and saved exits with: sysexits.h's EX_TEMPFAIL, "try again later".
EXIT_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher may repeat a signal that its processes got already. Within so many seconds, two signals are one request.
SAME_REQUEST = 1.0


class Stopped(Exception):
    """All processes have agreed to stop because one got a signal."""


class StopRequest:
    """Inside `with`, notes SIGTERM, SIGINT and SIGUSR1 instead of letting them end the process. A second signal ends it
    at once with status 128 + its number, even if Python's main thread is stuck. Use it in the main thread.

    Attributes:
        signal: the name of the signal that came, or None.
        deferred: False at first, while there is nothing to save: a signal then ends the process at once, with
            EXIT_STATUS.
        saving: True while the last checkpoint is being written. Signals do not count as a second request then: a
            launcher sends some when its other processes have ended.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.deferred = self.saving = False

    def __enter__(self) -> "StopRequest":
        # A shell makes background jobs ignore Ctrl-C. They should go on ignoring it.
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        # Python runs signal handlers only once its main thread returns from what it is doing, such as waiting for a
        # process that has ended. The wake-up pipe gets the signal's number at once.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writing)  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def _listen(self, reading: int) -> None:
        first = None
        with open(reading, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                number = received[0]
                if number not in self._before:
                    continue
                name = signal.Signals(number).name
                if not self.deferred:
                    _say(f"{name}: stopped before training began; the same command starts again")
                    os._exit(EXIT_STATUS)
                if first is None:
                    first = time.monotonic()
                    _say(f"{name}: stopping after this step; a second signal exits at once")
                elif not self.saving and time.monotonic() - first >= SAME_REQUEST:
                    _say(f"{name}: a second signal, exiting without saving")
                    os._exit(128 + number)


def _say(message: str) -> None:
    # Not through logging: a stuck main thread may hold its lock. And stderr may be closed (`| tee` and Ctrl-C).
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())


def ignore_signals(*_) -> None:
    """Makes this process ignore them. For loader processes: a signal to the whole group reaches them too, but the step
    that is being finished still needs their batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the pipe that it shares with its parent
