"""What may interrupt training and evaluation, and who is told how far they are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor

from runtime.signals import StopRequest
from runtime.watchdog import Watchdog


class Phase(IntEnum):
    """Parts of an epoch, in order."""

    STARTING = -1  # the checkpoint after the epoch before
    TRAINING = 0
    EVALUATION = 1
    STOPPING = 2


class Point(IntEnum):
    """Parts of a training batch, in order."""

    LOADING = 0
    AGREEING = 1
    SAVING = 2
    FORWARD = 3
    BACKWARD = 4


DOING = {
    Point.LOADING: "waiting for the data of",
    Point.AGREEING: "agreeing with the other processes before",
    Point.SAVING: "writing a checkpoint before",
    Point.FORWARD: "the forward pass of",
    Point.BACKWARD: "the backward pass of",
}


@dataclass
class Control:
    """By default nothing interrupts, and no one is told.

    Epochs, batches and turns count from 0 here, and from 1 in messages.
    """

    request: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog = field(default_factory=Watchdog)
    # Whether a checkpoint is due after so many steps of the epoch; asked on the main process.
    save_due: Callable[[int], bool] = lambda step: False
    # Writes one; called by all processes.
    save: Callable[[], None] = lambda: None
    # Is shown the first batch of a run as the model gets it: images (N, 3, H, W) and targets.
    show: Callable[[Tensor, Any], None] = lambda images, targets: None

    @property
    def stop_requested(self) -> bool:
        """Whether this process got a signal to stop."""
        return self.request.signal is not None

    def at_batch(self, epoch: int, batch: int, point: Point) -> None:
        """Training has come to `point` of a batch."""
        doing = f"{DOING[point]} epoch {epoch + 1} batch {batch + 1}"
        self.watchdog.at(epoch, Phase.TRAINING, batch, point, doing=doing)

    def after_batches(self, epoch: int, batches: int) -> None:
        """This process has trained all batches of an epoch."""
        doing = f"waiting for the other processes after epoch {epoch + 1}"
        self.watchdog.at(epoch, Phase.TRAINING, batches, doing=doing)

    def at_evaluation(self, epoch: int, turn: int, batch: int) -> None:
        """The evaluation number `turn` after an epoch has come to a batch."""
        self.watchdog.at(epoch, Phase.EVALUATION, turn, 0, batch, doing=f"evaluation batch {batch + 1}")

    def after_evaluation(self, epoch: int, turn: int) -> None:
        """This process has evaluated all its batches."""
        doing = "waiting for the other processes after the evaluation"
        self.watchdog.at(epoch, Phase.EVALUATION, turn, 1, doing=doing)

    def at_checkpoint_after(self, epoch: int) -> None:
        """The checkpoint after `epoch` epochs is about to be written."""
        self.watchdog.at(epoch, Phase.STARTING, doing=f"writing the checkpoint after epoch {epoch}")

    def at_last_checkpoint(self, epoch: int) -> None:
        """The run stops in an epoch, and its last checkpoint is about to be written."""
        self.watchdog.at(epoch, Phase.STOPPING, doing="writing the last checkpoint")
