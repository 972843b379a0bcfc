"""What every entry point needs around its work: errors that are the user's to mend, names in messages, reproducible
randomness, and whether another process runs.

It imports neither NumPy nor PyTorch, so that an entry point can answer --help before those are there.
"""

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
    """Runs `main`; a `UserError` becomes one message on stderr and its exit status, Ctrl-C status 130."""
    try:
        main()
    except UserError as error:
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        message = str(error)
        if message.startswith("Caught "):  # in a loader process, whose traceback PyTorch puts before the message
            message = message.rpartition(f"{type(error).__name__}: ")[2].strip()
        print(f"{rank}error: {message}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        # Loader processes are deaf to the SIGTERM with which Python ends those of an error that still holds them.
        children = multiprocessing.active_children()
        if children:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise about each of them
        for child in children:
            child.kill()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); choose another --output"
        ) from error


def printable(name: str) -> str:
    """A file name or a class name for logs and messages: escaped where it has line breaks, control characters, or bytes
    that are no text."""
    return name if name.isprintable() else ascii(name)


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first `most` of some names, printable, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def seed_all(*position: int, cuda: bool = True) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators from a position such as (seed, epoch, step, rank); without
    those of CUDA devices, which take longer, if `cuda` is False.

    Positions that differ give independent streams, so that what is drawn at a position does not depend on what was
    drawn before it: a resumed run draws what an uninterrupted one does.
    """
    import numpy as np
    import torch

    # With its length, because SeedSequence takes (0,) and (0, 0) for the same.
    words = np.random.SeedSequence((len(position), *position)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    (torch.manual_seed if cuda else torch.default_generator.manual_seed)(int(words[2]) << 32 | int(words[3]))


def process_runs(process: int) -> bool:
    """Whether there is a process of that number on this machine, be it stopped."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    try:  # one that has ended keeps its number until its parent asks for its status
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # no Linux
        return True
