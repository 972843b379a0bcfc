"""A run's folder: one run at a time in it, its checkpoints, which of them to go on from and which to keep."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from logging import Logger
from pathlib import Path
from typing import Any

from checkpoint import CheckpointError, DamagedCheckpointError, read_checkpoint, read_training_state, save_checkpoint
from distributed import World, from_main
from utils import UserError, writing_to

LOCK = "run.lock"
_EPOCH = re.compile(r"ckpt_epoch_(\d+)\.pth")


class RunFolder:
    """OUTPUT/MODEL.NAME/TAG.

    Args:
        notes: about the lock, for the log.
    """

    def __init__(self, config, notes: list[str]):
        self.path = run_path(config)
        self.notes = notes
        self.last, self.previous = self.path / "last.pth", self.path / "previous.pth"
        self._keep = config.KEEP_CHECKPOINTS
        self._seconds, self._steps = 60 * config.SAVE_MINUTES, config.SAVE_STEPS
        self._saved = time.monotonic()

    def checkpoints(self) -> list[Path]:
        """Those of a run that are there, the order in which it goes on from them first: last.pth, the one before it,
        those of epochs from the latest, best.pth."""
        epochs = sorted(self._epochs(), reverse=True)
        named = [self.last, self.previous, *(path for _, path in epochs), self.path / "best.pth"]
        return [path for path in named if path.is_file()]

    def _epochs(self) -> list[tuple[int, Path]]:
        found = ((_EPOCH.fullmatch(path.name), path) for path in self.path.iterdir())
        return [(int(match[1]), path) for match, path in found if match]

    def newest(self, logger: Logger) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from; damaged ones before it are renamed, with a warning. None in a new folder.

        Raises:
            CheckpointError: all are damaged, or one is whole and cannot be used.
        """
        damaged = []
        for path in self.checkpoints():
            try:
                content = read_training_state(path)
            except DamagedCheckpointError as error:
                aside = next(
                    new
                    for n in itertools.count(1)
                    if not (new := path.with_name(f"{path.stem}_damaged{n}{path.suffix}")).exists()
                )
                with writing_to(self.path):
                    path.rename(aside)
                damaged.append(aside.name)
                logger.warning(f"{error}; skipped and renamed {aside.name}")
                continue
            if damaged:
                logger.warning(f"going on from {path}, which is older")
            elif path != self.last:
                logger.warning(f"{self.last} is gone; going on from {path}")
            return path, content
        if damaged:
            raise CheckpointError(
                f"{self.path}: all checkpoints are damaged ({', '.join(damaged)}); restore one as last.pth from a "
                "backup, or start anew with another --tag"
            )
        return None

    def refuse_overwriting(self) -> None:
        """Raises UserError where a run that begins anew would replace checkpoints."""
        if self.checkpoints():
            raise UserError(
                f"{self.path}: holds a run already, which TRAIN.AUTO_RESUME False would overwrite; choose another "
                "--tag, or continue it with TRAIN.AUTO_RESUME True"
            )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due inside an epoch, after `step` optimizer steps."""
        by_step = self._steps and step and step % self._steps == 0
        return bool(by_step or (self._seconds and time.monotonic() - self._saved >= self._seconds))

    def save(self, content: dict[str, Any], names: tuple[str, ...] = ()) -> None:
        """Writes last.pth, also under `names`; what was last.pth becomes previous.pth. Then deletes checkpoints of
        epochs beyond the KEEP_CHECKPOINTS latest, of those that this run wrote."""
        save_checkpoint(content, *(self.path / name for name in names), self.last, previous=self.previous)
        self._saved = time.monotonic()
        if self._keep and any(_EPOCH.fullmatch(name) for name in names):
            for _, path in sorted(self._epochs())[: -self._keep]:
                if _written_by(path) == content["run"]:
                    path.unlink()


def run_path(config) -> Path:
    """OUTPUT/MODEL.NAME/TAG."""
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def _written_by(path: Path) -> str | None:
    try:
        return read_checkpoint(path).get("run")
    except CheckpointError:
        return None


@contextmanager
def open_run_folder(config, world: World) -> Iterator[RunFolder]:
    """The run's folder, made if need be, and this run's alone inside `with`.

    Raises:
        UserError: it cannot be written, or another process trains there.
    """
    with contextlib.ExitStack() as stack:
        notes, failure = [], None
        if world.is_main:
            try:
                folder = run_path(config)
                with writing_to(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    notes = stack.enter_context(_lock(folder / LOCK))
            except UserError as error:
                failure = error
        message = from_main(failure and str(failure), world)
        if message:
            raise failure or UserError(message)
        with writing_to(run_path(config)):
            run_path(config).mkdir(parents=True, exist_ok=True)  # on other machines, which may not share the disk
        yield RunFolder(config, notes)


@contextmanager
def _lock(path: Path) -> Iterator[list[str]]:
    """Holds a lock that the system releases when this process ends, however it ends; the file says who holds it.

    Yields:
        Notes for the log: a lock that a run which was killed left behind.

    Raises:
        UserError: naming the host and the process that hold it.
    """
    me = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with open(path, "a+", encoding="utf-8") as file:
        supported = True
        try:
            # Of the process, not of the open file: loader processes that outlive a killed run do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _in_use(path, _read_lock(file), "") from error
        except OSError:  # a file system without locks
            supported = False
        holder, notes = _read_lock(file), []
        if holder and not supported and (holder["host"] != me["host"] or _runs(holder["process"])):
            hint = f"; if it has ended, delete {path} (this file system has no locks that would tell)"
            raise _in_use(path, holder, hint)
        if holder:
            notes = [f"process {holder['process']} on {holder['host']} was training here and was killed; going on"]
        file.truncate(0)
        file.write(json.dumps(me) + "\n")
        file.flush()
        try:
            yield notes
        finally:
            file.truncate(0)


def _read_lock(file) -> dict[str, Any] | None:
    """Who wrote the lock file; None if it is empty."""
    file.seek(0)
    text = file.read()
    if not text.strip():
        return None
    try:
        content = json.loads(text)
        return {"host": str(content["host"]), "process": int(content["process"]), "since": str(content["since"])}
    except (ValueError, KeyError, TypeError):
        return {"host": "an unknown host", "process": 0, "since": "an unknown time"}


def _in_use(path: Path, holder: dict[str, Any] | None, hint: str) -> UserError:
    holder = holder or {"host": "an unknown host", "process": 0, "since": "just now"}
    return UserError(
        f"{path.parent}: process {holder['process']} on {holder['host']} has been training there since "
        f"{holder['since']}; choose another --tag, or wait for it to end{hint}"
    )


def _runs(process: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return process != os.getpid()
