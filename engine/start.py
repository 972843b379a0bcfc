"""Where a run starts: at its own newest checkpoint, or else at --resume, --pretrained, or random weights."""

import math
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any

from torch import nn

from config import find, leaves
from engine.state import TrainingState, lowest_of, no_best, stops_early
from engine.task import TOP1, Metric, Task
from logger import ALL_RANKS
from runtime.checkpoint import CheckpointError, load_weights, other_classes, read_training_state
from runtime.distributed import World, on_main
from runtime.run_folder import RunFolder
from runtime.untrusted import METRICS
from utils import shorten


@dataclass
class Start:
    """The checkpoint that a run goes on from: its content, its path, and whether this run wrote it."""

    content: dict[str, Any] | None = None
    path: Path | None = None
    is_own: bool = False


def is_finished(config, start: Start) -> bool:
    """Whether nothing is left to train."""
    content = start.content
    if not content:
        return False
    epoch = content["epoch"]
    # Another run's best does not say when this one is to stop.
    early = start.is_own and stops_early(config, epoch, content["best"], lowest_of(content))
    return epoch >= config.TRAIN.EPOCHS or early


def find_start(config, folder: RunFolder, world: World, logger: Logger, metric: Metric) -> Start:
    """The checkpoint to go on from, if any.

    Args:
        metric: the task's; a checkpoint with another one is of another task.

    Raises:
        CheckpointError: it cannot be used.
    """
    start = _find_start(config, folder, world, logger)
    if start.content and metric.name not in start.content["best"]:
        theirs = next(name for name in METRICS if name in start.content["best"])
        raise CheckpointError(
            f"{start.path}: is of a run for another task, whose best epoch is by {theirs}; accepted: checkpoints with "
            f"the best {metric.name}, or none in this folder (another --tag)"
        )
    return start


def _find_start(config, folder: RunFolder, world: World, logger: Logger) -> Start:
    content = None

    def newest() -> Path | None:
        nonlocal content
        path, content = folder.newest(logger) or (None, None)
        return path

    if config.TRAIN.AUTO_RESUME:
        # The main process decides: others may look at another moment, or at another disk.
        path = on_main(newest, world)
        if path:
            return Start(content or read_training_state(path), path, is_own=True)
    if config.MODEL.RESUME:
        path = Path(config.MODEL.RESUME)
        return Start(read_training_state(path), path, is_own=path.parent == folder.path)
    return Start()


def load_start(config, model: nn.Module, start: Start, task: Task, logger: Logger) -> None:
    """Loads the weights to start from into the model.

    Raises:
        CheckpointError: they do not fit, or cannot be gone on from with this config.
    """
    if start.content:
        load_weights(model, start.content, start.path, ema=False, same_size=True)
        check_resume(config, start.content, start.path, task.classes)
        log_resume(config, start.content, start.path, logger, task.metric)
    elif config.MODEL.PRETRAINED:
        task.load_pretrained(model, config.MODEL.PRETRAINED, logger)
    elif config.TRAIN.FREEZE != "none" or config.TRAIN.LAYER_DECAY < 1:
        message = "TRAIN.FREEZE or TRAIN.LAYER_DECAY is set, but the weights are random; --pretrained names others"
        logger.warning(message, extra=ALL_RANKS)
    if start.is_own:
        for named in filter(None, (config.MODEL.RESUME, config.MODEL.PRETRAINED)):
            message = f"{named} is not read, because the run goes on from {start.path}"
            logger.warning(f"{message}; to start from it, give a new --tag", extra=ALL_RANKS)


def check_resume(config, content: dict[str, Any], path: Path, classes: list[str]) -> None:
    """Raises CheckpointError if the optimizer, what it trains, or the classes of the data are others than in the
    checkpoint."""
    before = content["config"]
    if before["TRAIN.OPTIMIZER.NAME"] != config.TRAIN.OPTIMIZER.NAME:
        raise CheckpointError(
            f"{path}: has the state of {before['TRAIN.OPTIMIZER.NAME']}, but TRAIN.OPTIMIZER.NAME is "
            f"{config.TRAIN.OPTIMIZER.NAME}; --pretrained {path} with a new --tag starts from its weights alone"
        )
    if other_classes(content, classes):
        raise CheckpointError(
            f"{path}: was trained on classes {shorten(content['classes'])}, but the data has {shorten(classes)}: "
            f"labels have changed their meaning; --pretrained {path} with a new --tag starts from its weights"
        )
    frozen = before.get("TRAIN.FREEZE", "none") != config.TRAIN.FREEZE
    if frozen or (before.get("TRAIN.LAYER_DECAY", 1.0) < 1) != (config.TRAIN.LAYER_DECAY < 1):
        key = "TRAIN.FREEZE" if frozen else "TRAIN.LAYER_DECAY"
        raise CheckpointError(
            f"{path}: {key} was {before.get(key, 'not there')}, is {find(config, key.split('.'))}, for which its "
            f"optimizer state is of no use; --pretrained {path} with a new --tag starts from its weights"
        )


def restore_state(
    state: TrainingState, start: Start, config, task: Task, steps: int, world: World, logger: Logger
) -> None:
    """Takes over optimizer, position and all else from the checkpoint to start from, if any."""
    images = len(task.train_loader.dataset)
    if not start.content:
        return
    state.restore_rest(start.content, start.path, config, images, steps, world, logger)
    if start.is_own:
        state.run = start.content["run"] or state.run
    else:
        # This run's own best
        state.best, state.lowest = no_best(task.metric), {"val_loss": math.inf, "epoch": state.epoch}
    start.content = None  # as large as the model and the optimizer together


def log_resume(config, content: dict[str, Any], path: Path, logger: Logger, metric: Metric = TOP1) -> None:
    """What a run goes on from, and what has changed since."""
    step = content["progress"]["step"]
    done = f"{content['epoch']} epochs{f' and {step} steps' if step else ''} done"
    best = content["best"]
    result = f"best {metric.title} {metric.text(best[metric.name])}" if best["epoch"] else "not evaluated yet"
    logger.info(f"resumed from {path}: {done}, {result}")
    before, now = content["config"], leaves(config)
    # Keys that only newer, or only older, configs have did not change what the run does.
    for key in sorted(set(before) & set(now)):
        if before[key] != now[key] and key not in ("MODEL.RESUME", "MODEL.PRETRAINED", "MODEL.LOAD_EMA"):
            message = f"changed since that checkpoint: {key} was {before[key]!r}, is {now[key]!r}"
            logger.warning(message, extra=ALL_RANKS)
