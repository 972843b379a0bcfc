"""Timing steps side by side: in turn, in an order that rotates, so that what disturbs the machine disturbs them all."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from tqdm import tqdm

from bench.contenders import Step
from bench.options import FEWEST_ROUNDS

WIDE = 0.15  # of the median: quartiles further apart say that something else was at work
SHORTEST = 0.05  # seconds that a timing should last, so that the clock and the wait for the device do not show


@dataclass
class Timing:
    """Of one step.

    Attributes:
        first: seconds of the very first call, with compilation.
        iterations: calls per timing.
        seconds: per call, one number per round.
        problem: why there are no numbers, or empty.
    """

    first: float = 0.0
    iterations: int = 1
    seconds: list[float] = field(default_factory=list)
    problem: str = ""


@dataclass
class Quartiles:
    """Median and spread of a list of numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Quartiles":
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def remark(self) -> str:
        """What to hold against the median, if they are far apart."""
        spread = (self.high - self.low) / self.median
        return f"unsteady: quartiles {100 * spread:.0f} % apart" if spread > WIDE else ""


class OtherLoad:
    """The share of the processors' time that is not this process's, nor its children's, since the last look."""

    def __init__(self) -> None:
        self.before = self._times()

    def look(self) -> float:
        """From 0 to 1."""
        now = self._times()
        total, busy, own = (b - a for a, b in zip(self.before, now, strict=True))
        self.before = now
        return max(0.0, min(1.0, (busy - own) / total)) if total > 0 else 0.0

    @staticmethod
    def _times() -> tuple[float, float, float]:
        """Seconds in all, busy, and busy for this process and its children."""
        times, own = psutil.cpu_times(), 0.0
        this = psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                own += sum(process.cpu_times()[:4])  # user, system, and both of children that have ended
        # A guest's time is part of "user" too.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return total, total - times.idle - getattr(times, "iowait", 0.0), own


def describe(error: Exception) -> str:
    """An error in a table's cell."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def seconds_per_call(step: Step, iterations: int) -> float:
    step.synchronize()
    started = time.perf_counter()
    step.repeat(iterations)
    return (time.perf_counter() - started) / iterations


def warm_up(step: Step, rounds: int) -> Timing:
    """Runs a step once, then `rounds` times, and finds how many calls a timing needs.

    Raises:
        Exception: whatever the step raises.
    """
    timing = Timing(first=seconds_per_call(step, 1))
    seconds = min((seconds_per_call(step, 1) for _ in range(rounds)), default=timing.first)
    timing.iterations = max(1, min(1000, math.ceil(SHORTEST / seconds)))
    return timing


def rotated(labels: Sequence[str], number: int) -> list[str]:
    """The order of a round: each goes first in its turn."""
    first = number % len(labels)
    return [*labels[first:], *labels[:first]]


def interleave(
    steps: dict[str, Step],
    timings: Mapping[str, Timing],
    rounds: int,
    budget: float,
    on_round: Callable[[list[str]], None] = lambda order: None,
) -> None:
    """Times every step once per round, and appends to its timing.

    A step that runs out of memory is taken out of `steps`; its timing says so.

    Args:
        rounds: the most; fewer where `budget` seconds are over, but at least 3.
        on_round: told the order of each round.
    """
    deadline = time.perf_counter() + budget
    for number in tqdm(range(rounds), desc="rounds", leave=False, dynamic_ncols=True, disable=None):
        if not steps or (number >= FEWEST_ROUNDS and time.perf_counter() > deadline):
            return
        order = rotated(list(steps), number)
        on_round(order)
        for label in order:
            timing = timings[label]
            try:
                timing.seconds.append(seconds_per_call(steps[label], timing.iterations))
            except RuntimeError as error:  # out of memory, mostly
                timing.problem = describe(error)
            if timing.problem:  # only now is the error gone, whose traceback holds tensors
                timing.seconds.clear()
                del steps[label]
                torch.cuda.empty_cache()


def ratio(of: Sequence[float], to: Sequence[float]) -> Quartiles:
    """How many times as fast, from the seconds of the same rounds."""
    return Quartiles.of([reference / own for own, reference in zip(of, to, strict=True)])
