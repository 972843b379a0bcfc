"""The task of main.py: images to classes."""

from functools import cached_property
from logging import Logger
from pathlib import Path
from typing import Any

from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import EMA
from data import Sample, build_batch_transform, denormalize, holds_out
from data.build import note_on_orientation
from data.sources import describe_counts
from engine.control import Control
from engine.distill import Distillation, Teacher, build_distillation
from engine.evaluate import describe, evaluate
from engine.loss import Criterion, build_criterion
from engine.task import TOP1, Task
from models import prepare_model
from runtime.checkpoint import load_pretrained
from runtime.distributed import World
from runtime.per_image import CORRECT, save_correct


class Classification(Task):
    """Cross-entropy, or what the config has in its place; top-1.

    Args:
        mixup: mixes the images of a batch, if the config asks for it.
        teacher: what the model is to learn from beside the labels, if anything.
    """

    metric = TOP1
    results = ("top1", "top5", "val_loss")

    def __init__(
        self,
        config,
        train_loader: DataLoader,
        eval_loader: DataLoader,
        world: World,
        mixup: Mixup | None = None,
        teacher: Teacher | None = None,
    ):
        super().__init__(config, train_loader, eval_loader, world)
        self.mixup, self.teacher = mixup, teacher
        self.distillation: Distillation | None = None
        self.transform = build_batch_transform(config, mixup, world.device)

    @cached_property
    def criterion(self) -> Criterion:
        """The loss, see `build_criterion`."""
        return build_criterion(
            self.config, lambda: self.train_loader.dataset.source, bool(self.mixup), self.world.device
        )

    def load_pretrained(self, model: nn.Module, path: str, logger: Logger) -> None:
        load_pretrained(model, path, logger, self.classes, EMA[self.config.MODEL.LOAD_EMA])

    def files(self) -> dict[str, str]:
        """The names of the images that are held out of the training data."""
        if not holds_out(self.config):
            return {}
        source = self.eval_loader.dataset.source
        return {"held_out.txt": "".join(f"{source.name(index)}\n" for index in range(len(source)))}

    def place(self, model: nn.Module, logger: Logger) -> None:
        prepare_model(self.config, model, self.world.device)
        self.distillation = build_distillation(
            self.config, model, self.teacher, self.train_loader.dataset, self.world, logger
        )

    def log_data(self, logger: Logger) -> None:
        source = self.train_loader.dataset.source
        logger.info(f"training images per class: {describe_counts(source)}")
        # Reads files, once for all processes.
        if self.world.is_main and (note := note_on_orientation(self.config, source)):
            logger.warning(note)

    def on_device(self, batch: Sample) -> tuple[Tensor, Tensor]:
        images, targets = (x.to(self.world.device, non_blocking=True) for x in (batch.image, batch.target))
        return self.transform(images, targets)

    def loss(
        self, model: nn.Module, images: Tensor, targets: Tensor, batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(images)
        if self.distillation:
            return self.distillation(self.criterion, output, images, targets, batch), {}
        return self.criterion(output, targets), {}

    def picture(self, images: Tensor, targets: Tensor) -> tuple[str, Tensor]:
        return "training images as the model gets them", denormalize(images[:64])

    def evaluate(
        self, model: nn.Module, logger: Logger, control: Control, epoch: int, turn: int = 0
    ) -> tuple[dict[str, Any], Tensor]:
        return evaluate(self.config, model, self.eval_loader, self.world, logger, control, epoch, turn)

    def describe(self, metrics: dict[str, Any]) -> str:
        return describe(metrics)

    def save(self, details: Tensor, epoch: int, folder: Path) -> None:
        """Which images are classified correctly."""
        save_correct(folder / CORRECT, details.cpu().numpy(), epoch)
