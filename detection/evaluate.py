"""Evaluation of a detector by COCO's average precision (AP)."""

import math
import time
from logging import Logger
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config import EMA
from data import Sources, build_normalize, denormalize, with_class_count
from data.build import check_same_data
from data.loading import LoadingFailed
from detection.coco import CocoSource, read_split
from detection.dataset import DetectionBatch, build_eval_loader, to_original
from detection.metrics import CocoAP
from detection.models import build_detector
from engine.control import Control
from engine.evaluate import autocast, each_batch, find_checkpoint, precision_name, predict, resolve_amp
from logger import ALL_RANKS, create_logger
from models import prepare_model
from runtime.checkpoint import load_weights, named_classes, read_checkpoint
from runtime.distributed import World, from_all, on_main
from utils import printable

# COCO's summary. Small: up to 32 x 32 pixels, large: from 96 x 96 on.
SUMMARY = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
SHOWN_IMAGES = 8

# What is found in an image, or is there: boxes (n, 4), labels (n,), and scores (n,) of what is found.
Objects = dict[str, Tensor]


class Shown(NamedTuple):
    """Some validation images for people to look at.

    Attributes:
        images: (N, 3, H, W), 0 to 1.
        found, true: for each image, in its pixels.
    """

    images: Tensor
    found: list[Objects]
    true: list[Objects]


class Details(NamedTuple):
    """What an evaluation knows beside its metrics, on the main process. On the others there is nothing in it.

    Attributes:
        found: by image id, in the pixels of the original image.
        shown: None if there is no image.
    """

    found: dict[int, Objects]
    shown: Shown | None


@torch.inference_mode()
def evaluate(
    config,
    model: nn.Module,
    loader: DataLoader,
    world: World,
    logger: Logger,
    control: Control | None = None,
    epoch: int = 0,
    turn: int = 0,
) -> tuple[dict[str, Any], Details]:
    """Average precision over the images of all processes, each counted once.

    Args:
        model: not wrapped.
        control, epoch, turn: see `engine.evaluate.evaluate`.

    Returns:
        The metrics, the same on all processes: those of `SUMMARY`, 0 to 1 (NaN where there is no such object); AP/NAME
        of each class; images, unreadable_val (in which nothing is found), val_seconds, val_images_per_second.

    Raises:
        Stopped, LoadingFailed: see `each_batch`.
    """
    model.eval()
    finder = Finder(config, model, loader, world)
    started = time.perf_counter()
    unreadable = each_batch(config, loader, finder.add, world, logger, control or Control(), epoch, turn)
    source = loader.dataset.source
    found = {image: objects for part in from_all(finder.found, world) for image, objects in part.items()}

    def score() -> dict[str, float]:
        metric = CocoAP(source)
        metric.add(list(found), list(found.values()))
        scores = metric.compute()
        per_class = {f"AP/{printable(name)}": value for name, value in scores["per_class"].items()}
        return {name: float(scores[name]) for name in SUMMARY} | per_class

    scores = on_main(score, world)
    seconds = time.perf_counter() - started
    counts = {"images": len(source), "unreadable_val": unreadable}
    speed = {"val_seconds": seconds, "val_images_per_second": len(source) / seconds}
    return {**scores, **counts, **speed}, Details(found if world.is_main else {}, finder.shown)


class Finder:
    """Finds objects in the batches of this process.

    Attributes:
        found: by image id, in the pixels of the original image, on the CPU. Nothing in images that are unreadable.
        shown: the first images, on the main process.
    """

    def __init__(self, config, model: nn.Module, loader: DataLoader, world: World):
        self.config, self.model, self.source, self.world = config, model, loader.dataset.source, world
        self.amp, self.normalize = resolve_amp(config, world.device), build_normalize(config, world.device)
        self.found: dict[int, Objects] = {}
        self.shown: Shown | None = None

    def add(self, batch: DetectionBatch) -> None:
        """Finds the objects of a batch."""
        images = self.normalize(batch.image.to(self.world.device, non_blocking=True))
        with autocast(self.world.device, self.amp):
            found = predict(self.config, self.model, images)
        found = [finite({name: value.cpu() for name, value in objects.items()}) for objects in found]
        for index, readable, target, objects in zip(
            batch.index.tolist(), batch.readable.tolist(), batch.target, found, strict=True
        ):
            kept = objects if readable else {name: value[:0] for name, value in objects.items()}
            self.found[self.source.image_id(index)] = in_original(kept, target["geometry"], self.source.size(index))
        if self.shown is None and self.world.is_main:
            some = slice(SHOWN_IMAGES)
            self.shown = Shown(denormalize(images[some]), found[some], batch.target[some])


def finite(objects: Objects) -> Objects:
    """Without boxes or scores that are not numbers: a broken model must not score."""
    good = objects["boxes"].isfinite().all(dim=1) & objects["scores"].isfinite()
    return {
        "boxes": objects["boxes"][good].float(),
        "scores": objects["scores"][good].float(),
        "labels": objects["labels"][good],
    }


def in_original(objects: Objects, geometry: Tensor, size: tuple[int, int]) -> Objects:
    """What was found in an image as the model got it, in pixels of the original. What is outside of that, in the
    padding, is left out.

    Args:
        geometry: see `DetectionBatch`.
        size: height and width of the original.
    """
    height, width = size
    boxes = to_original(objects["boxes"], geometry).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([width, height, width, height], dtype=boxes.dtype))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {"boxes": boxes[inside], "scores": objects["scores"][inside], "labels": objects["labels"][inside]}


def describe(metrics: dict[str, Any]) -> str:
    """The result of `evaluate` as a line for people."""
    values = {name: "-" if math.isnan(metrics[name]) else f"{metrics[name]:.3f}" for name in SUMMARY}
    unreadable = metrics["unreadable_val"]
    remark = f", of which {unreadable} unreadable and counted as empty" if unreadable else ""
    return (
        f"AP {values['AP']} (AP50 {values['AP50']}, AP75 {values['AP75']}; small {values['AP_small']}, medium "
        f"{values['AP_medium']}, large {values['AP_large']}) on {metrics['images']} images{remark}, "
        f"{metrics['val_images_per_second']:.0f} images/s"
    )


def per_class(metrics: dict[str, Any]) -> dict[str, float]:
    """The AP of each class, the best first; NaN, where there is no object of that class, last."""
    found = {name.removeprefix("AP/"): value for name, value in metrics.items() if name.startswith("AP/")}
    return dict(sorted(found.items(), key=lambda item: (math.isnan(item[1]), -item[1])))


def evaluate_run(
    config, notes: list[str], world: World, checkpoint: str | None = None
) -> tuple[dict[str, Any], CocoSource, Details]:
    """Evaluates the file `checkpoint`, or else the run that the config names, on the validation images.

    Returns:
        The result, for JSON: model, detector, amp, processes, checkpoint, and the metrics of `evaluate`, with the AP of
        the classes as per_class; the images; and the details of `evaluate`.

    Raises:
        UserError: the data, the model or the checkpoint cannot be used.
    """
    logger = create_logger("eval", world.rank)
    path = find_checkpoint(config, checkpoint)
    content = read_checkpoint(path)
    classes = named_classes(content)
    source = read_split(config, "val", classes or None)
    for note in (*notes, *source.notes):
        logger.warning(note, extra=ALL_RANKS)
    amp = precision_name(resolve_amp(config, world.device))
    logger.info(f"torch {torch.__version__}, timm {timm.__version__}, {world.size} x {world.device.type}, {amp}")
    check_same_data(config, Sources(None, source), world)
    config = with_class_count(config, source)
    loader = build_eval_loader(config, source, world)
    model = build_detector(config, config.MODEL.NUM_CLASSES)
    loaded = load_weights(model, content, path, ema=EMA[config.MODEL.LOAD_EMA])
    logger.info(f"weights from {path}: {loaded.taken}")
    prepare_model(config, model, world.device)
    try:
        metrics, details = evaluate(config, model, loader, world, logger)
    except LoadingFailed as failed:
        raise failed.error from failed
    for name, value in per_class(metrics).items():
        logger.info(f"AP {'-' if math.isnan(value) else f'{value:.3f}'} {name}")
    logger.info(describe(metrics))
    about = {"model": config.MODEL.NAME, "detector": config.DETECTION.DETECTOR, "amp": amp, "processes": world.size}
    plain = {name: value for name, value in metrics.items() if not name.startswith("AP/")}
    return {**about, "checkpoint": str(path), **plain, "per_class": per_class(metrics)}, source, details
