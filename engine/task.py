"""What a run trains a model to do: all in which classification and detection differ. `fit.py` and `epoch.py` do the
rest, alike for both."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from logging import Logger
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import DataLoader

from engine.control import Control
from logger import MetricsLog
from runtime.distributed import World


class Metric(NamedTuple):
    """What decides which epoch is the best: the higher, the better."""

    name: str  # in metrics.jsonl and in checkpoints
    title: str  # for people
    form: str  # of its value, for people

    def text(self, value: float) -> str:
        return self.form.format(value)


TOP1 = Metric("top1", "top-1", "{:.3f} %")


class Task(ABC):
    """A task with its data.

    Args:
        train_loader: batches with the fields image, target, index and readable of `data.Sample`.
        eval_loader: likewise; together they hold every validation image exactly once over all processes.

    Attributes:
        metric: decides which epoch is that of best.pth.
        results: the metrics that `evaluate` gives of the weights. With a moving average, those are the average's; those
            of the weights themselves are NAME_raw.
    """

    metric: Metric
    results: Sequence[str]

    def __init__(self, config, train_loader: DataLoader, eval_loader: DataLoader, world: World):
        self.config, self.world = config, world
        self.train_loader, self.eval_loader = train_loader, eval_loader

    @property
    def classes(self) -> list[str]:
        """Their names in label order."""
        return self.train_loader.dataset.classes

    # The run

    @abstractmethod
    def load_pretrained(self, model: nn.Module, path: str, logger: Logger) -> None:
        """Loads the weights of `MODEL.PRETRAINED` into the model."""

    def files(self) -> dict[str, str]:
        """Texts for the run's folder, by file name."""
        return {}

    @abstractmethod
    def place(self, model: nn.Module, logger: Logger) -> None:
        """Moves the model to the device, in place, as training and evaluation call it. Called by all processes, before
        there is an optimizer."""

    def log_data(self, logger: Logger) -> None:  # noqa: B027
        """What there is to know about the data before training."""

    # Training

    @abstractmethod
    def on_device(self, batch: Any) -> tuple[Tensor, Any]:
        """A training batch on the device: images (N, 3, H, W) as the model gets them, and targets."""

    @abstractmethod
    def loss(self, model: nn.Module, images: Tensor, targets: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the parts that it is the sum of, if it has any: scalars by name, the same names in
        each step.

        Args:
            model: wrapped if there are several processes.
            images, targets: what `on_device` gives for the batch.
        """

    @abstractmethod
    def picture(self, images: Tensor, targets: Any) -> tuple[str, Tensor]:
        """A title, and training images as people look at them: (n, 3, H, W), 0 to 1, on the CPU."""

    # Evaluation

    @abstractmethod
    def evaluate(
        self, model: nn.Module, logger: Logger, control: Control, epoch: int, turn: int = 0
    ) -> tuple[dict[str, Any], Any]:
        """Evaluates the model, which is not wrapped, on the validation images of all processes.

        Args:
            epoch, turn: see `Control.at_evaluation`.

        Returns:
            The metrics, numbers by name, the same on all processes, among them the task's `metric`, `results` and
            unreadable_val; and what `save` and `show` make something of.

        Raises:
            Stopped, LoadingFailed: see `engine.evaluate.each_batch`.
        """

    @abstractmethod
    def describe(self, metrics: dict[str, Any]) -> str:
        """The metrics of an evaluation as a line for people."""

    def save(self, details: Any, epoch: int, folder: Path) -> None:  # noqa: B027
        """Called by the main process after each evaluation, before the checkpoint: writes files about it.

        Args:
            details: of `evaluate`.
            epoch: how many are done.
        """

    def show(self, details: Any, epoch: int, metrics_log: MetricsLog) -> None:  # noqa: B027
        """Likewise, with each kept checkpoint that follows an evaluation: shows pictures of it."""
