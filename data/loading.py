"""Batches from a loader, and what goes wrong with them: loader processes that die, files that cannot be read."""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from logging import Logger

from torch.utils.data import DataLoader
from tqdm import tqdm

from data.dataset import Sample
from runtime.distributed import World
from utils import UserError

MOST_NAMED_FILES = 20  # unreadable files named per epoch and process; all are counted


class LoadingFailed(Exception):
    """A process could not load a batch, or too many files are unreadable; all processes have agreed to stop.

    Attributes:
        error: what to tell the user, on this process.
    """

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class UnreadableFiles:
    """Counts the unreadable images among a loader's batches, and names them in the log.

    Args:
        most: how many are accepted, as a fraction of the data set (`DATA.MAX_UNREADABLE`).
        count: those of this epoch that this process met before it was stopped.
    """

    def __init__(self, loader: DataLoader, most: float, logger: Logger, count: int = 0):
        self.dataset, self.most, self.logger, self.count = loader.dataset, most, logger, count

    def note(self, batch: Sample) -> None:
        """Looks at a batch."""
        if batch.readable.all():
            return
        for index in batch.index[~batch.readable].tolist():
            self.count += 1
            if self.count <= MOST_NAMED_FILES:
                more = "; further ones are only counted" if self.count == MOST_NAMED_FILES else ""
                self.logger.warning(f"cannot be read as an image: {self.dataset.reason(index)}{more}")

    def too_many(self, count: int) -> bool:
        """Whether `count`, over all processes, is more than the config accepts."""
        return count > self.most * len(self.dataset)

    def error(self, count: int, failures: int = 0) -> UserError:
        """Why loading ends on a process that has not failed itself."""
        if failures:
            return UserError("another process could not load its data: its own message says why")
        return UserError(
            f"{count} of {len(self.dataset)} images cannot be read (the log names the first {MOST_NAMED_FILES} of each "
            f"process); accepted: a fraction of DATA.MAX_UNREADABLE {self.most:g}"
        )


def iterate(loader: DataLoader, title: str, world: World, first: int = 0) -> Iterator[Sample]:
    """The loader's batches, with a progress bar on rank 0 if its output is a terminal. The bar begins at `first`."""
    batches = iter(loader)  # when the first batch is asked for, so that the processes agree on a failure
    if threading.current_thread() is threading.main_thread():
        # PyTorch's handler for the death of a loader process raises wherever the program is, perhaps in the middle of
        # an optimizer step. Without it the loader notices too, after waiting for a batch for at most 5 seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    bar = {"desc": title, "total": len(loader), "initial": first, "leave": False, "dynamic_ncols": True}
    yield from tqdm(batches, **bar, disable=not (world.is_main and sys.stdout.isatty()), file=sys.stdout)


def next_batch(batches: Iterator[Sample]) -> tuple[Sample | None, Exception | None]:
    """The next batch, or why there is none."""
    try:
        return next(batches), None
    except Exception as error:  # whatever it is, the other processes must hear of it; the caller raises it
        # "Caught ... in DataLoader worker process" is another case: that worker raised an exception and is alive.
        if re.search(r"DataLoader worker \(pid|Pin memory thread", str(error)):
            return None, UserError(
                f"a loader process has died ({str(error).splitlines()[0]}); often because memory ran out: a smaller "
                "DATA.NUM_WORKERS takes less"
            )
        return None, error
