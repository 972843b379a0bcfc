"""Numbers as options of a command, with their limits. Nothing here imports PyTorch: --help answers at once."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """An argparse type: numbers of that kind from `low` on."""
    return _accept(kind, lambda value: value >= low, f"of {low} or more")


def above(low: float, kind: type = float) -> Callable[[str], Any]:
    """An argparse type: numbers of that kind greater than `low`."""
    return _accept(kind, lambda value: value > low, f"above {low}")


def within(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """An argparse type: numbers of that kind from `low` to `high`."""
    return _accept(kind, lambda value: low <= value <= high, f"from {low} to {high}")


def _accept(kind: type, is_allowed: Callable[[Any], bool], limits: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_allowed(value)):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: {name} {limits}")
        return value

    return parse
