"""What every entry point needs around its work: errors that are the user's to mend, names in messages, reproducible
randomness, and whether another process runs.

It imports neither NumPy nor PyTorch, so that an entry point can answer --help before those are there.
"""

import importlib.util
import itertools
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend (a path, a value, a file): shown as one message without a traceback.

    The message names the bad value, where it came from and what is accepted.
    """

    exit_status = 1


def run_entry_point(main: Callable[[], None]) -> None:
    """Runs `main`. A `UserError` becomes one message on stderr and its exit status; Ctrl-C becomes status 130."""
    try:
        main()
    except UserError as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        message = str(error)
        if message.startswith("Caught "):  # in a loader process: PyTorch puts its traceback before the message
            message = message.rpartition(f"{type(error).__name__}: ")[2].strip()
        print(f"{rank}error: {message}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        # Loader processes ignore the SIGTERM with which Python would end them.
        children = multiprocessing.active_children()
        if children:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise for each of them
        for child in children:
            child.kill()


def write_keeping_old(path: Path, text: str) -> None:
    """Writes a file, without losing a different one that is there: that is renamed to `<name>_old<n>`."""
    if path.exists() and path.read_bytes() != text.encode():
        names = (path.with_name(f"{path.stem}_old{n}{path.suffix}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))
    path.write_text(text, encoding="utf-8")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); choose another --output"
        ) from error


def parse_first(parse: Callable[[], object], *modules: str, extra: str = "") -> None:
    """For the top of an entry point: answers --help and wrong options before PyTorch is imported, which takes seconds.

    If one of the `modules` is not installed, it ends the program with the command that installs them,
    requirements/<extra>.txt.
    """
    parse()
    require(*modules, extra=extra)


def require(*modules: str, extra: str) -> None:
    """Ends the program, with status 1, if one of the `modules` is not installed. See `parse_first`."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: needs {', '.join(missing)}: pip install -r requirements/{extra}.txt")


def printable(name: str) -> str:
    """A file name or a class name for logs and messages: escaped where it has line breaks, control characters, or bytes
    that are no text."""
    return name if name.isprintable() else ascii(name)


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first `most` of some names, and how many more there are. Each is printable, and cut after 200 characters:
    names can come from files that nobody vouches for."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name[:200]) for name in names[:most]) + more


def seed_all(*position: int, cuda: bool = True) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators from a position such as (seed, epoch, step, rank).

    Different positions give independent streams. What is drawn at a position does not depend on what was drawn before
    it, so a resumed run draws what an uninterrupted one does.

    Args:
        cuda: whether to seed those of CUDA devices too, which takes longer.
    """
    import numpy as np
    import torch

    # The length is part of it: SeedSequence does not distinguish (0,) and (0, 0).
    words = np.random.SeedSequence((len(position), *position)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    (torch.manual_seed if cuda else torch.default_generator.manual_seed)(int(words[2]) << 32 | int(words[3]))


def process_runs(process: int) -> bool:
    """Whether a process of that number exists on this machine, even if it is stopped."""
    import psutil

    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # someone else's
        return True
