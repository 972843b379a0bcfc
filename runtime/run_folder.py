"""A run's folder: who may write there, which checkpoint to go on from, which ones to keep."""

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

from runtime.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    legible,
    read_checkpoint,
    read_training_state,
    save_checkpoint,
)
from runtime.distributed import World, from_all, from_main, on_main
from utils import UserError, process_runs, writing_to

LOCK = "run.lock"
# How long a machine may take to see what another one has written to a shared disk: NFS remembers for up to a minute
# that a file was not there.
SHARED_WITHIN = 60.0
_EPOCH = re.compile(r"ckpt_epoch_(\d+)\.pth")


class RunFolder:
    """OUTPUT/MODEL.NAME/TAG.

    Args:
        lock: held by the main process.
    """

    def __init__(self, config, lock: "Lock | None" = None):
        self.path = run_path(config)
        self._lock = lock
        self._foreign: set[Path] = set()  # checkpoints of epochs that another run wrote
        self.last, self.previous = self.path / "last.pth", self.path / "previous.pth"
        self._keep = config.KEEP_CHECKPOINTS
        self._seconds, self._steps = 60 * config.SAVE_MINUTES, config.SAVE_STEPS
        self._saved = time.monotonic()

    def checkpoints(self) -> list[Path]:
        """The checkpoints in the folder, in the order in which a run goes on from them: last.pth, the one before it,
        then the others, the newest file first."""
        others = [path for path in (*(path for _, path in self._epochs()), self.path / "best.pth") if path.is_file()]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return [path for path in (self.last, self.previous) if path.is_file()] + others

    @property
    def notes(self) -> list[str]:
        """About the lock, for the log."""
        return self._lock.notes if self._lock else []

    def _epochs(self) -> list[tuple[int, Path]]:
        found = ((_EPOCH.fullmatch(path.name), path) for path in self.path.iterdir())
        return [(int(match[1]), path) for match, path in found if match]

    def newest(self, logger: Logger) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, path and content; None in a new folder. Damaged ones before it are renamed,
        with a warning, once an intact one is found.

        Raises:
            CheckpointError: all are damaged, or an intact one cannot be used.
        """
        damaged: dict[Path, DamagedCheckpointError] = {}
        for path in self.checkpoints():
            try:
                content = read_training_state(path)
            except DamagedCheckpointError as error:
                damaged[path] = error
                continue
            for bad, error in damaged.items():
                names = (bad.with_name(f"{bad.stem}_damaged{n}{bad.suffix}") for n in itertools.count(1))
                aside = next(name for name in names if not name.exists())
                with writing_to(self.path):
                    bad.rename(aside)
                logger.warning(f"{error}; skipped and renamed {aside.name}")
            if damaged:
                logger.warning(f"going on from {path}, which is older")
            elif path != self.last:
                logger.warning(f"{self.last} is gone; going on from {path}")
            return path, content
        if damaged:
            names = ", ".join(path.name for path in damaged)
            raise CheckpointError(
                f"{self.path}: all checkpoints are damaged ({names}); restore one as last.pth from a backup, or start "
                f"anew with another --tag. The first: {next(iter(damaged.values()))}"
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
        """Writes last.pth, also under `names`. What was last.pth becomes previous.pth. Then deletes this run's
        checkpoints of epochs, except the KEEP_CHECKPOINTS latest.

        Raises:
            UserError: it cannot be written, or another run has taken the folder over.
        """
        if self._lock:
            self._lock.check()
        save_checkpoint(content, *(self.path / name for name in names), self.last, previous=self.previous)
        self._saved = time.monotonic()
        if self._keep and any(_EPOCH.fullmatch(name) for name in names):
            candidates = [path for _, path in sorted(self._epochs()) if path not in self._foreign]
            self._foreign |= {path for path in candidates if _written_by(path) != content["run"]}
            with writing_to(self.path):
                for path in [path for path in candidates if path not in self._foreign][: -self._keep]:
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
    """The run's folder, made if it is not there. Inside `with`, no other run may use it.

    Raises:
        UserError: it cannot be written, another process trains there, or a machine of this run has another disk there.
    """
    folder, lock = run_path(config), None

    def take() -> None:
        nonlocal lock
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(Lock(folder / LOCK))

    with contextlib.ExitStack() as stack:
        on_main(take, world)
        _check_shared(folder, lock, world)
        yield RunFolder(config, lock)


def _check_shared(folder: Path, lock: "Lock | None", world: World) -> None:
    """Raises a UserError on all processes if a machine does not see the lock that the main process holds: it would have
    no checkpoint to go on from."""
    holder = from_main(lock and lock.holder, world)
    problem = ""
    if world.local_rank == 0 and not world.is_main and not _sees(folder / LOCK, holder):
        problem = (
            f"{folder.absolute()} on {socket.gethostname()} (rank {world.rank}) is not the folder of that name on "
            f"{holder['host']} (rank 0); accepted for OUTPUT: a folder on a disk that all machines of the run share"
        )
    if problem := next(filter(None, from_all(problem, world)), None):
        raise UserError(problem)


def _sees(path: Path, holder: dict[str, Any]) -> bool:
    """Whether a lock file comes to name that holder within SHARED_WITHIN seconds."""
    deadline = time.monotonic() + SHARED_WITHIN
    while True:
        # Opened anew each time, when NFS asks its server.
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="backslashreplace") as file:
            if _read_lock(file) == holder:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


class Lock:
    """Inside `with`, holds a lock that the system releases when this process ends, however it ends. The file says who
    holds it. If someone else does, `with` raises a UserError with the host and the process.

    filelock's lock (flock) would not do: forked loader processes that outlive a killed run would keep holding it.

    Attributes:
        notes: for the log: that a killed run left its lock behind.
        holder: what the file says: host, process, and since when.
    """

    def __init__(self, path: Path):
        self.path, self.notes = path, []
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        self.holder = {"host": socket.gethostname(), "process": os.getpid(), "since": since}

    def __enter__(self) -> "Lock":
        # Opened only once: the system releases a process's lock as soon as it closes the file anywhere.
        self._file = open(self.path, "a+", encoding="utf-8", errors="backslashreplace")
        try:
            self._acquire()
        except BaseException:
            self._file.close()
            raise
        return self

    def _acquire(self) -> None:
        supported = True
        try:
            # The lock belongs to the process, not to the open file: forked loader processes do not hold it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _in_use(self.path, _read_lock(self._file), "") from error
        except OSError:  # a file system without locks
            supported = False
        holder = _read_lock(self._file)
        if holder and not supported and (holder["host"] != self.holder["host"] or _other_runs(holder["process"])):
            hint = f"; if it has ended, delete {self.path} (this file system has no locks that would tell)"
            raise _in_use(self.path, holder, hint)
        if holder:
            self.notes.append(
                f"process {holder['process']} on {holder['host']} was training here and was killed; going on"
            )
        self._file.truncate(0)
        self._file.write(json.dumps(self.holder) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # for other machines: NFS would keep it here

    def check(self) -> None:
        """Raises UserError if someone else has taken the lock: on some shared disks other machines do not see it."""
        holder = _read_lock(self._file)
        if holder and holder != self.holder:
            raise _in_use(self.path, holder, "; this run stops without writing there")

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # the disk is full or gone; the lock is released all the same
            if _read_lock(self._file) == self.holder:
                self._file.truncate(0)
        self._file.close()


def _read_lock(file) -> dict[str, Any] | None:
    """Who wrote the lock file; None if it is empty."""
    file.seek(0)
    text = file.read(1000)
    if not text.strip():
        return None
    try:
        content = json.loads(text)
        process = int(content["process"])
        if not 0 <= process < 2**31:
            raise ValueError
        return {"host": legible(content["host"]), "process": process, "since": legible(content["since"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {"host": "an unknown host", "process": 0, "since": "an unknown time"}


def _in_use(path: Path, holder: dict[str, Any] | None, hint: str) -> UserError:
    holder = holder or {"host": "an unknown host", "process": 0, "since": "just now"}
    return UserError(
        f"{path.parent}: process {holder['process']} on {holder['host']} has been training there since "
        f"{holder['since']}; choose another --tag, or wait for it to end{hint}"
    )


def _other_runs(process: int) -> bool:
    """Whether it is a process of this machine, other than this one."""
    return process != os.getpid() and process_runs(process)
