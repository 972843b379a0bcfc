"""Logging: coloured lines on the console of rank 0, one plain file per rank. Callers pass the logger on."""

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from termcolor import colored
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from trackers import Trackers

_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Console(logging.Handler):
    """Writes above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # File names may have characters that the console's encoding lacks.
            encoding = sys.stdout.encoding or "utf-8"
            text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)  # logging's way: reported on stderr, the program goes on


class _ColorFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = colored(self.formatTime(record, "%H:%M:%S"), "green")
        message = record.getMessage()
        if record.levelno in _COLORS:
            message = colored(f"{record.levelname.lower()}: {message}", _COLORS[record.levelno])
        return f"{time} {message}"


# For the `extra` of a record.
FILE_ONLY = {"file_only": True}  # not on any console
ALL_RANKS = {"all_ranks": True}  # a warning that every rank gives: on the console of rank 0 alone


def create_logger(name: str, rank: int = 0, folder: Path | None = None) -> logging.Logger:
    """A logger with a console on rank 0 (on the others, for warnings only) and, given a folder, the file
    `log_rank<rank>.txt` in it, appended to.

    Colours only where the console is a terminal (NO_COLOR and FORCE_COLOR are respected).
    """
    logger = logging.getLogger(f"{name}.rank{rank}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:  # the name was used before in this process (tests, notebooks): start anew
        logger.removeHandler(handler)
        handler.close()
    if rank == 0:
        console = _Console()
        console.setFormatter(_ColorFormatter())
        console.addFilter(lambda record: not hasattr(record, "file_only"))
        logger.addHandler(console)
    else:
        alarm = logging.StreamHandler()  # a warning that only this rank gives must be seen
        alarm.setLevel(logging.WARNING)
        alarm.addFilter(lambda record: not hasattr(record, "file_only") and not hasattr(record, "all_ranks"))
        alarm.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s: %(message)s"))
        logger.addHandler(alarm)
    if folder is not None:
        file = logging.FileHandler(folder / f"log_rank{rank}.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    return logger


def json_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with None for NaN and infinity, which JSON lacks (the loss if no image could be read)."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


class MetricsLog:
    """One JSON object per epoch in `<folder>/metrics.jsonl`, and the same for the trackers.

    Args:
        folder: the run's folder.
        done: epochs that are done. Lines of later epochs are removed: a run that was killed before it could save its
            checkpoint leaves them, and those epochs are trained again.
        trackers: names of `trackers.TRACKERS`.
        run, config: of the run, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        done: int,
        logger: logging.Logger,
        trackers: Sequence[str] = ("tensorboard",),
        run: str = "",
        config: dict[str, Any] | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if self._epoch(line) <= done]
            if len(kept) < len(lines):
                dropped = len(lines) - len(kept)
                logger.info(f"{self.path}: {dropped} lines about epochs after {done}, which are trained again, removed")
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                temporary.replace(self.path)
        self._trackers = Trackers(trackers, folder, done, run, config or {}, logger)

    def _epoch(self, line: str) -> float:
        try:
            return json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            return float("inf")  # cut off in the middle

    def write(self, metrics: dict[str, Any]) -> None:
        """Adds one epoch."""
        metrics = json_numbers(metrics)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as the checkpoint that follows is
        self._trackers.call("write", metrics)

    def write_images(self, title: str, images: Tensor) -> None:
        """Shows the first 64 of images (N, 3, H, W), 0 to 1."""
        self._trackers.call("write_images", title, make_grid(images[:64], nrow=8, pad_value=1.0))

    def write_histograms(self, title: str, weights: dict[str, Tensor], epoch: int) -> None:
        """Shows the distribution of each weight's values."""
        self._trackers.call("write_histograms", title, weights, epoch)

    def write_hparams(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        """A run's config and final metrics, for tables that compare runs, such as TensorBoard's."""
        self._trackers.call("write_result", config, metrics)

    def close(self) -> None:
        self._trackers.call("close")
