"""Evaluation, throughput, and the precision that models are run in."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from config import EMA
from data import (
    Sample,
    Sources,
    build_eval_loader,
    build_normalize,
    build_sources,
    build_split,
    with_class_count,
)
from data.loading import LoadingFailed, UnreadableFiles, iterate, next_batch
from data.matching import EvalSet, build_eval_set, match_classes
from engine.control import Control
from engine.inference import build_engine
from engine.report import Report
from logger import ALL_RANKS, create_logger
from models import build_model, prepare_model
from runtime.checkpoint import (
    CheckpointError,
    count_classes,
    load_weights,
    named_classes,
    other_classes,
    read_checkpoint,
)
from runtime.distributed import World, all_reduce_sum, on_main, sum_on_host
from runtime.run_folder import run_path
from runtime.signals import Stopped
from utils import printable


def resolve_amp(config, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision that `config.AMP` asks for on this device; None for full precision."""
    if config.AMP in ("bfloat16", "float16"):
        return getattr(torch, config.AMP)
    if config.AMP == "off" or (config.AMP == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def precision_name(amp: torch.dtype | None) -> str:
    """ "float32", "bfloat16" or "float16"."""
    return str(amp or torch.float32).removeprefix("torch.")


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """Mixed precision of dtype `amp`, or none."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


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
    score: "Score | None" = None,
) -> tuple[dict[str, float], Tensor]:
    """Accuracy and loss over the images of all processes, each counted once.

    Args:
        model: not wrapped: processes may have different numbers of batches, so nothing in it may wait for the others.
        control: None for an evaluation that nothing interrupts.
        epoch, turn: the epoch of training, from 0, and which evaluation after it this is, for the watchdog.
        score: counts the images of this process; by default all classes of the model count.

    Returns:
        The metrics: top1 and top5 in percent (an unreadable image counts as wrong), val_loss (mean cross-entropy of the
        readable images), images, unreadable_val, val_seconds, val_images_per_second (all processes).
        And which images top1 counts: (images,) uint8 on the device, 1 or 0, in the order of the data set.

    Raises:
        Stopped, LoadingFailed: see `each_batch`.
    """
    model.eval()
    score = score or Score(config, model, len(loader.dataset), world)
    started = time.perf_counter()
    unreadable_files = each_batch(config, loader, score.add, world, logger, control or Control(), epoch, turn)
    images, readable, loss, top1, top5 = all_reduce_sum(score.totals, world).tolist()
    correct = all_reduce_sum(score.correct, world)  # each image is one process's
    seconds = time.perf_counter() - started
    metrics = {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "val_loss": loss / readable if readable else math.nan,
        "images": int(images),
        "unreadable_val": unreadable_files,
        "val_seconds": seconds,
        "val_images_per_second": images / seconds,
    }
    return metrics, correct


def each_batch(
    config,
    loader: DataLoader,
    add: Callable[[Any], None],
    world: World,
    logger: Logger,
    control: Control,
    epoch: int,
    turn: int,
) -> int:
    """Calls `add` with each batch of an evaluation that this process has. All processes come back together.

    Args:
        epoch, turn: see `evaluate`.

    Returns:
        Files of all processes that are unreadable.

    Raises:
        Stopped: a process got a signal.
        LoadingFailed: a process could not load a batch, or too many files are unreadable.
    """
    failure = None
    unreadable = UnreadableFiles(loader, config.DATA.MAX_UNREADABLE, logger)
    batches = iterate(loader, "evaluation", world)
    for i in range(len(loader)):
        control.at_evaluation(epoch, turn, i)
        batch, failure = next_batch(batches)
        if failure is not None or control.stop_requested:
            break
        unreadable.note(batch)
        add(batch)
    control.after_evaluation(epoch, turn)
    stop, failures, unreadable_files = sum_on_host(
        [control.stop_requested, failure is not None, unreadable.count], world
    )
    if failures or unreadable.too_many(unreadable_files):
        raise LoadingFailed(failure or unreadable.error(unreadable_files, failures))
    if stop:
        raise Stopped
    return unreadable_files


class Score:
    """Sums over the batches of this process.

    Args:
        images: in the data set.
        columns: the model's labels that count, in the order of the data's; None: all of them.
        accepted: (images, N), the labels that are right for each image, filled up with -1; the loss is then against
            equal parts of them. None: the target is.

    Attributes:
        totals: (5,) float64 on the device: images, readable ones, loss, top-1 hits, top-5 hits.
        correct: (images,) uint8 on the device: the top-1 hits in the order of the data set. Images of other processes
            are 0.
        predicted: (images,) int32 on the device: the label of the highest logit, in the order of the data set; -1 of
            images that are unreadable or have logits that are not finite. Images of other processes are 0.
    """

    def __init__(
        self,
        config,
        model: nn.Module,
        images: int,
        world: World,
        columns: Sequence[int] | None = None,
        accepted: np.ndarray | None = None,
    ):
        self.config, self.model, self.device = config, model, world.device
        self.amp, self.normalize = resolve_amp(config, world.device), build_normalize(config, world.device)
        self.totals = torch.zeros(5, dtype=torch.float64, device=world.device)
        self.correct = torch.zeros(images, dtype=torch.uint8, device=world.device)
        self.predicted = torch.zeros(images, dtype=torch.int32, device=world.device)
        self.columns = None if columns is None else torch.tensor(columns, device=world.device)
        self.accepted = None if accepted is None else torch.tensor(accepted, device=world.device)

    def add(self, batch: Sample) -> None:
        """Predicts a batch and counts what is right."""
        images = self.normalize(batch.image.to(self.device, non_blocking=True))
        targets = batch.target.to(self.device, non_blocking=True)
        readable = batch.readable.to(self.device, non_blocking=True)
        with autocast(self.device, self.amp):
            logits = predict(self.config, self.model, images)
        logits = logits.float()
        if self.columns is not None:
            logits = logits[:, self.columns]
        index = batch.index.to(self.device, non_blocking=True)
        best = logits.topk(min(5, logits.shape[1])).indices
        if self.accepted is None:
            losses = F.cross_entropy(logits, targets, reduction="none")
            hits = best == targets[:, None]
        else:
            labels = self.accepted[index]
            given = labels >= 0
            losses = -logits.log_softmax(dim=1).gather(1, labels.clamp(min=0))
            losses = losses.masked_fill(~given, 0).sum(dim=1) / given.sum(dim=1)
            hits = (best[:, :, None] == labels[:, None, :]).any(dim=2)
        # NaN sorts as the largest number: a broken model must not score.
        good = readable & logits.isfinite().all(dim=1)
        hits &= good[:, None]
        losses = losses.masked_fill(~readable, 0)
        sums = (torch.ones_like(losses), readable, losses, hits[:, 0], hits.any(dim=1))
        self.totals += torch.stack([values.double().sum() for values in sums])
        self.correct[index] = hits[:, 0].byte()
        self.predicted[index] = best[:, 0].int().masked_fill(~good, -1)


def predict(config, model: nn.Module, images: Tensor) -> Any:
    """What the model gives for each of the images: logits (N, classes), or a list. For a compiled model, a last batch
    that is smaller than the others is filled up with zeros: it would be compiled again for another size."""
    missing = config.DATA.BATCH_SIZE - len(images)
    if not config.TRAIN.COMPILE or missing <= 0:
        return model(images)
    return model(F.pad(images, (0, 0) * (images.ndim - 1) + (0, missing)))[: len(images)]


def describe(metrics: dict[str, float]) -> str:
    """The result of `evaluate` as a line for people."""
    unreadable = metrics["unreadable_val"]
    remark = f", of which {unreadable} unreadable and counted as wrong" if unreadable else ""
    return (
        f"top-1 {metrics['top1']:.3f} % top-5 {metrics['top5']:.3f} % loss {metrics['val_loss']:.4f} "
        f"on {metrics['images']} images{remark}, {metrics['val_images_per_second']:.0f} images/s"
    )


@torch.inference_mode()
def throughput(config, model: nn.Module, images: Tensor, world: World) -> float:
    """Images per second of the model alone in evaluation, on this process, for one batch (N, 3, S, S) over and over:
    the median of 30 passes, or of as many as fit into 20 seconds (at least 3)."""
    model.eval()
    amp = resolve_amp(config, world.device)
    images = build_normalize(config, world.device)(images.to(world.device))
    seconds = []
    warmup, deadline = (10 if world.device.type == "cuda" else 1), time.perf_counter() + 20
    for i in range(warmup + 30):
        started = time.perf_counter()
        with autocast(world.device, amp):
            model(images)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - started)
        if len(seconds) >= 3 and time.perf_counter() > deadline:
            break
    return len(images) / sorted(seconds)[len(seconds) // 2]


@dataclass
class EvalOptions:
    """What to evaluate on, and what to write about it; by default the validation images, and nothing.

    Attributes:
        split: "train", "val" or "test"; "": the validation images as training takes them.
        eval_set: one of `config.EVAL_SETS`, or "".
        real_labels: the file of ImageNet's ReaL labels, for that set.
        report: a file or a folder for results per class, see `engine.report`.
        engine: what computes the model, see `engine.inference`; "auto" is "torch" where its throughput is measured.
    """

    split: str = ""
    eval_set: str = ""
    real_labels: Path | None = None
    report: Path | None = None
    engine: str = "torch"


def evaluate_run(
    config,
    notes: list[str],
    world: World,
    checkpoint: str | None = None,
    measure_throughput: bool = False,
    options: EvalOptions | None = None,
) -> dict[str, Any]:
    """Evaluates the file `checkpoint`, or else the run that the config names; or measures the model's throughput.

    Returns:
        The result, for JSON: model, amp, processes, and what `evaluate` or `throughput` gives; with `options`, also
        split, or eval_set and the images left_out of it, and balanced_accuracy (percent), if there is a report.

    Raises:
        UserError: the data, the model or the checkpoint cannot be used.
    """
    options = options or EvalOptions()
    logger = create_logger("eval", world.rank)
    for note in notes:
        logger.warning(note, extra=ALL_RANKS)
    amp = precision_name(resolve_amp(config, world.device))
    logger.info(f"torch {torch.__version__}, timm {timm.__version__}, {world.size} x {world.device.type}, {amp}")
    about = {"model": config.MODEL.NAME, "amp": amp, "processes": world.size}

    sources = None if options.eval_set else plain_sources(config, world, options.split)
    path = None if measure_throughput else find_checkpoint(config, checkpoint)
    content = {} if measure_throughput else read_checkpoint(path)
    if sources:
        data = EvalSet(sources.val, None, None, sources.notes)
        if not measure_throughput:
            data = match_classes(config, data, named_classes(content), path)
        config = with_class_count(config, data.source)
    else:
        config = with_classes_of(config, content, path, EMA[config.MODEL.LOAD_EMA])
        count = config.MODEL.NUM_CLASSES
        data = build_eval_set(
            config, world, options.eval_set, named_classes(content, count), count, path, options.real_labels
        )
    for note in data.notes:
        logger.warning(note, extra=ALL_RANKS)
    loader = build_eval_loader(config, data.source, world)
    model = build_model(config)

    if measure_throughput:
        engine = "torch" if options.engine == "auto" else options.engine
        model = with_engine(config, model, loader, world, logger, engine)
        images = next(iter(loader)).image
        speed = throughput(config, model, images, world)
        logger.info(f"throughput {speed:.1f} images/s per process at batch {len(images)}, {amp}")
        return {**about, "images_per_second": speed, "batch": len(images)}

    loaded = load_weights(model, content, path, ema=EMA[config.MODEL.LOAD_EMA])
    for line in (f"weights from {path}: {loaded.taken}", *loaded.notes(model)):
        logger.info(line)
    if sources and other_classes(content, loader.dataset.classes):
        message = f"{path} was trained on classes of other names than the data has: the accuracy may mean nothing"
        logger.warning(message, extra=ALL_RANKS)
    model = with_engine(config, model, loader, world, logger, options.engine)
    score = Score(config, model, len(loader.dataset), world, data.columns, data.accepted)
    try:
        metrics, _ = evaluate(config, model, loader, world, logger, score=score)
    except LoadingFailed as failed:
        raise failed.error from failed
    logger.info(describe(metrics))
    result = {**about, "checkpoint": str(path), **metrics}
    if options.split:
        result["split"] = options.split
    if options.eval_set:
        result |= {"eval_set": options.eval_set, "left_out": data.left_out, "classes": len(data.source.classes)}
    if options.report:
        predicted = all_reduce_sum(score.predicted, world).cpu().numpy()  # each image is one process's
        names = [printable(name) for name in data.source.classes]
        report = Report.of(np.asarray(data.source.targets), predicted, names)
        on_main(lambda: report.write(options.report), world)
        result["balanced_accuracy"] = report.balanced_accuracy
        logger.info(f"balanced accuracy {report.balanced_accuracy:.3f} %; results per class are in {options.report}")
    return result


def with_engine(config, model: nn.Module, loader: DataLoader, world: World, logger: Logger, name: str) -> nn.Module:
    """The model, prepared and moved to the device, or the engine of that name in its place."""
    prepare_model(config, model, world.device)
    amp, batch = resolve_amp(config, world.device), config.DATA.BATCH_SIZE
    return build_engine(name, model.eval(), config, world.device, amp, len(loader) * batch, batch, logger.info)


def plain_sources(config, world: World, split: str) -> Sources:
    """The images of a split, or else the validation images, as `val`."""
    return Sources(None, build_split(config, world, split)) if split else build_sources(config, world, train=False)


def with_classes_of(config, content: Mapping, path: Path, ema: bool | None) -> CfgNode:
    """The config with MODEL.NUM_CLASSES, if it leaves that open, as in the classifier of a checkpoint; frozen.

    Raises:
        CheckpointError: it has none.
    """
    config = config.clone()
    config.defrost()
    if not config.MODEL.NUM_CLASSES:
        config.MODEL.NUM_CLASSES = 1
        with torch.device("meta"):
            model = build_model(config)
        config.MODEL.NUM_CLASSES = count_classes(model, content, path, ema)
    config.freeze()
    return config


def find_checkpoint(config, named: str | None) -> Path:
    """The file to evaluate: the one named on the command line, or else the best, or last, of the run that the config
    names, or else the one in the config (in a finished run's config.yaml, that is the file it started from)."""
    folder = run_path(config)
    own = [folder / name for name in ("best.pth", "last.pth", "previous.pth") if (folder / name).is_file()]
    for path in (named, *own, config.MODEL.RESUME, config.MODEL.PRETRAINED):
        if path:
            return Path(path)
    raise CheckpointError(f"{folder}: no best.pth or last.pth there; train first, or name a file with --resume")
