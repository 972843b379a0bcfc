"""The task of main_detect.py: images to boxes of objects."""

from logging import Logger
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import EMA, ConfigError, detection_sizes, find, get_default_config
from data import build_normalize, denormalize
from data.sources import class_names, list_counts
from detection.dataset import DetectionBatch
from detection.evaluate import SUMMARY, Details, describe, evaluate
from detection.models import load_backbone
from detection.pictures import FOUND_COLOR, TRUE_COLOR, draw
from engine.control import Control
from engine.task import Metric, Task
from logger import MetricsLog
from models import prepare_model
from runtime.checkpoint import load_weights, read_checkpoint
from runtime.distributed import World

AP = Metric("AP", "AP", "{:.3f}")
SHOWN_TRAINING_IMAGES = 16

# Keys of classification that have no meaning here, and would be missed if they silently had none.
NOT_FOR_DETECTION = (
    "DATA.VAL_FRACTION",
    "DATA.FOLDS",
    "DATA.SAMPLER",
    "DATA.CLASSES",
    "DATA.IMAGES_PER_CLASS",
    "DATA.ZIP_MODE",
    "TRAIN.CLASS_WEIGHTS",
    "TRAIN.LOSS",
    "TRAIN.DISTILLATION.TYPE",
)


def check_detection(config) -> None:
    """Raises ConfigError for keys that are for classification alone, or do not go together."""
    default = get_default_config()
    for key in NOT_FOR_DETECTION:
        value, accepted = (find(c, key.split(".")) for c in (config, default))
        if value != accepted:
            raise ConfigError(f"{key} is {value}, which is for classification; accepted for detection: {accepted}")
    if config.TRAIN.COMPILE and len(sizes := detection_sizes(config)) > 1:
        raise ConfigError(
            f"TRAIN.COMPILE is True, which is for images of one size, but DETECTION.SIZES has {len(sizes)}; accepted: "
            "False"
        )
    watched = {"TRAIN.PATIENCE_METRIC": config.TRAIN.PATIENCE, "TRAIN.LR_SCHEDULER.METRIC": True}
    for key, is_used in watched.items():
        if is_used and find(config, key.split(".")) == "val_loss":
            raise ConfigError(f"{key} is val_loss, which detection does not have; accepted: top1, which stands for AP")


class Detection(Task):
    """The sum of the detector's losses; COCO's average precision."""

    metric = AP
    results = SUMMARY

    def __init__(self, config, train_loader: DataLoader, eval_loader: DataLoader, world: World):
        super().__init__(config, train_loader, eval_loader, world)
        self.normalize = build_normalize(config, world.device)

    @property
    def classes(self) -> list[str]:
        return class_names(self.train_loader.dataset.source)

    def load_pretrained(self, model: nn.Module, path: str, logger: Logger) -> None:
        """A detector of this project, or else a classifier for the backbone."""
        ema = EMA[self.config.MODEL.LOAD_EMA]
        content = read_checkpoint(path)
        if is_detector(content):
            loaded = load_weights(model, content, path, new_classifier=True, ema=ema, classes=self.classes)
            notes = [f"pretrained weights from {path}: {loaded.taken}"]
            if loaded.fresh:
                notes.append("it has other classes, or another head: all but the backbone starts anew")
        else:
            notes = load_backbone(model, path, self.config, ema)
        for note in notes:
            logger.info(note)

    def place(self, model: nn.Module, logger: Logger) -> None:
        prepare_model(self.config, model, self.world.device)

    def log_data(self, logger: Logger) -> None:
        source = self.train_loader.dataset.source
        logger.info(f"training boxes per class: {list_counts(source.classes, source.counts())}")

    def on_device(self, batch: DetectionBatch) -> tuple[Tensor, list[dict[str, Tensor]]]:
        device = self.world.device
        images = self.normalize(batch.image.to(device, non_blocking=True))
        return images, [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in batch.target]

    def loss(
        self, model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]], batch: DetectionBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses = {name if "loss" in name else f"{name}_loss": value for name, value in model(images, targets).items()}
        return torch.stack([value.float() for value in losses.values()]).sum(), losses

    def picture(self, images: Tensor, targets: list[dict[str, Tensor]]) -> tuple[str, Tensor]:
        shown = [
            draw(image, {name: value.cpu() for name, value in target.items()}, self.classes, TRUE_COLOR)
            for image, target in zip(denormalize(images[:SHOWN_TRAINING_IMAGES]), targets, strict=False)
        ]
        return "training images as the model gets them", torch.stack(shown)

    def evaluate(
        self, model: nn.Module, logger: Logger, control: Control, epoch: int, turn: int = 0
    ) -> tuple[dict[str, Any], Details]:
        return evaluate(self.config, model, self.eval_loader, self.world, logger, control, epoch, turn)

    def describe(self, metrics: dict[str, Any]) -> str:
        return describe(metrics)

    def show(self, details: Details, epoch: int, metrics_log: MetricsLog) -> None:
        """Some validation images with the boxes that are there, green, and those that are found, red."""
        if details.shown is None:
            return
        drawn = [
            draw(draw(image, true, self.classes, TRUE_COLOR), found, self.classes, FOUND_COLOR)
            for image, found, true in zip(*details.shown, strict=True)
        ]
        metrics_log.write_images("validation images: true boxes green, found red", torch.stack(drawn), epoch)


def is_detector(content: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a run of main_detect.py."""
    best = content.get("best")
    return isinstance(best, dict) and AP.name in best
