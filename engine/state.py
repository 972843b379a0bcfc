"""What a run needs to go on as if it had not stopped: in memory, and as the content of a checkpoint."""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from config import leaves
from engine.task import TOP1, Metric
from logger import ALL_RANKS
from lr_scheduler import schedule_state
from optimizer import MOMENTS, ScheduleFreeAverage, expected_state, load_optimizer_state
from runtime.checkpoint import FORMAT, CheckpointError, load_weights
from runtime.distributed import World, gather_rows
from runtime.untrusted import check_optimizer_state


def training_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What forward passes change (running statistics): the entries of the state dict that are not parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def _zeros(parts: int = 0) -> Tensor:
    return torch.zeros(2 + parts, dtype=torch.float64)


@dataclass
class Progress:
    """Where an epoch stands after `step` optimizer steps."""

    step: int = 0
    trained: bool = False  # all steps are done and statistics averaged over the processes: evaluation is next
    skipped: int = 0  # of the steps, because they were not finite
    skipped_in_row: int = 0
    seconds: float = 0.0
    parts: list[str] = field(default_factory=list)  # names of the losses that the loss is the sum of, if any
    # Of this process only:
    # (2 + parts,) float64: sum of the loss over the passes of steps not skipped, their number, and sums of the parts
    losses: Tensor = field(default_factory=_zeros)
    unreadable: int = 0  # images


def is_better(metrics: dict[str, Any], best: dict[str, Any], metric: Metric = TOP1) -> bool:
    """Whether an epoch is better than the best one so far: a higher `metric`, or the same and a lower loss."""
    if metrics[metric.name] != best[metric.name]:
        return metrics[metric.name] > best[metric.name]
    before = best.get("val_loss", math.inf)
    return metrics.get("val_loss", math.nan) < (math.inf if math.isnan(before) else before)


def no_best(metric: Metric) -> dict[str, Any]:
    """`TrainingState.best` before the first evaluation."""
    return {metric.name: -1.0, "epoch": 0}


def lowest_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """`TrainingState.lowest` of a checkpoint. Older ones lack it: from there on it is looked for anew."""
    return dict(content.get("lowest", {"val_loss": math.inf, "epoch": content["epoch"]}))


def stops_early(config, epoch: int, best: dict[str, Any], lowest: dict[str, Any]) -> bool:
    """Whether a run with TRAIN.PATIENCE ends after `epoch` epochs.

    Args:
        best, lowest: see `TrainingState`.
    """
    if not config.TRAIN.PATIENCE or epoch % config.TEST.INTERVAL:  # the last epoch of a run is one that is evaluated
        return False
    since = (best if config.TRAIN.PATIENCE_METRIC == "top1" else lowest)["epoch"]
    return epoch - since >= config.TRAIN.PATIENCE


@dataclass
class TrainingState:
    """What changes in training. Learning rates and everything random depend on the position alone.

    Attributes:
        model: not wrapped.
        amp: dtype of mixed precision, None for full precision.
        classes: their names, for use of the checkpoint without the data.
        ema: moving average of the model's weights and statistics, if any; a schedule-free optimizer's average.
        run: identifies the run that writes the checkpoints, over restarts.
        epoch: epochs done, which is the number of the current one, from 0.
        best: {"top1": percent, "epoch": after which, "val_loss": then}; older checkpoints have no loss. Another task
            has its metric in place of top1, and perhaps no loss.
        lowest: {"val_loss": the lowest, "epoch": after which}.
        scheduler: if it has a state to go on from.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp: torch.dtype | None = None
    classes: list[str] = field(default_factory=list)
    ema: ModelEmaV3 | ScheduleFreeAverage | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    epoch: int = 0
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] = field(default_factory=lambda: no_best(TOP1))
    lowest: dict[str, Any] = field(default_factory=lambda: {"val_loss": math.inf, "epoch": 0})
    scheduler: Scheduler | None = None

    def capture(self, config, images: int, world: World) -> dict[str, Any]:
        """The content of a checkpoint. All processes must call it: what differs between them is gathered.

        Args:
            images: in the training data, to notice when it has changed.
        """
        progress = self.progress
        states = {"model": self.model.state_dict()}
        if self.ema:
            states["model_ema"] = self.ema.module.state_dict()
        own = [*progress.losses.tolist(), progress.unreadable]
        ranks = gather_rows(torch.tensor(own, dtype=torch.float64, device=world.device), world)
        buffers = None
        if world.distributed and progress.step > 0 and not progress.trained:
            # Inside an epoch each process has running statistics of its own. Whoever evaluates the checkpoint gets the
            # mean.
            mine = self._statistics()
            if mine:
                buffers = gather_rows(torch.cat([value.flatten().double() for value in mine.values()]), world)
                for (state, name), value in _split(buffers.mean(dim=0), mine).items():
                    states[state] = {**states[state], name: value}
        return {
            "format": FORMAT,
            "run": self.run,
            **states,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.amp == torch.float16 else {},
            "scheduler": schedule_state(self.scheduler),
            "epoch": self.epoch,
            "progress": {
                "step": progress.step,
                "trained": progress.trained,
                "skipped": progress.skipped,
                "skipped_in_row": progress.skipped_in_row,
                "seconds": progress.seconds,
                "parts": list(progress.parts),
                "losses": ranks[:, :-1],  # (processes, 2 + parts)
                "unreadable": ranks[:, -1].long(),  # (processes,)
                "buffers": buffers,  # (processes, elements)
            },
            "best": dict(self.best),
            "lowest": dict(self.lowest),
            "config": leaves(config),
            "classes": list(self.classes),
            "processes": world.size,
            "images": images,
        }

    def _statistics(self) -> dict[tuple[str, str], Tensor]:
        """Running statistics, of the model and of its moving average, by key in the checkpoint and name."""
        models = {"model": self.model} | ({"model_ema": self.ema.module} if self.ema else {})
        return {(key, name): v for key, model in models.items() for name, v in training_buffers(model).items()}

    def restore_rest(
        self, content: dict[str, Any], path: Path, config, images: int, steps: int, world: World, logger: Logger
    ) -> None:
        """Takes over everything but the weights from a checkpoint. (`load_weights` has put those into the model.)

        Args:
            content: what `read_training_state` gave for `path`.
            images: in the training data now.
            steps: optimizer steps per epoch now.

        Raises:
            CheckpointError: the optimizer's state or the running statistics are not those of this model.
        """
        moments = MOMENTS.get(type(self.optimizer))
        like = None if moments else expected_state(config, self.model)
        try:
            check_optimizer_state(content["optimizer"], self.optimizer, moments, like)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        load_optimizer_state(self.optimizer, content["optimizer"])
        if self.ema and "model_ema" in content:
            load_weights(self.ema.module, content, path, same_size=True)
        if content["scaler"] and self.amp == torch.float16:
            self.scaler.load_state_dict(content["scaler"])
        saved_schedule = content.get("scheduler")  # older checkpoints have none
        if saved_schedule and schedule_state(self.scheduler):
            self.scheduler.load_state_dict(saved_schedule)
        self.epoch, self.best, self.lowest = content["epoch"], dict(content["best"]), lowest_of(content)
        processes = content["processes"] or world.size  # format 1 does not say
        self._restore_progress(content, path, processes, world)
        if content["images"] not in (None, images):
            logger.warning(
                f"the training data had {content['images']} images, has {images}: the samples come in another order",
                extra=ALL_RANKS,
            )
        before = global_batch(content["config"], processes)
        now = global_batch(leaves(config), world.size)
        done = content["progress"]["step"] * before // now
        self.progress.step = steps if self.progress.trained else min(done, steps)
        if before != now:
            logger.warning(
                f"the global batch was {before} images ({processes} processes), is {now} ({world.size}): "
                "the learning rates change with it, and the run will not end as it would have",
                extra=ALL_RANKS,
            )

    def _restore_progress(self, content: dict[str, Any], path: Path, processes: int, world: World) -> None:
        """All but the number of steps, which depends on the batch size."""
        saved = content["progress"]
        parts = list(saved.get("parts", []))  # older checkpoints have none
        progress = self.progress = Progress(
            parts=parts,
            losses=_zeros(len(parts)),
            trained=saved["trained"],
            skipped=saved["skipped"],
            skipped_in_row=saved["skipped_in_row"],
            seconds=saved["seconds"],
        )
        if processes == world.size and len(saved["losses"]) == processes:
            progress.losses = saved["losses"][world.rank].clone()
            progress.unreadable = int(saved["unreadable"][world.rank])
            if saved["buffers"] is not None:
                self._restore_statistics(content, path, saved["buffers"][world.rank])
        elif world.is_main:  # another number of processes: one of them counts for all
            progress.losses = saved["losses"].sum(dim=0)
            progress.unreadable = int(saved["unreadable"].sum())
        progress.losses = progress.losses.to(world.device)

    def _restore_statistics(self, content: dict[str, Any], path: Path, row: Tensor) -> None:
        """This process's own running statistics, from one vector."""
        # Those of the moving average follow the model's, if that run had one.
        sections = [key for key in ("model", "model_ema") if key in content]
        own, mine = training_buffers(self.model), self._statistics()
        like = {(key, name): value for key in sections for name, value in own.items()}
        elements = sum(value.numel() for value in like.values())
        if len(row) != elements:
            raise CheckpointError(f"{path}: has {len(row)} running statistics, but the model {elements}")
        for key, value in _split(row, like).items():
            if not value.isfinite().all():  # in the model's precision
                raise CheckpointError(f"{path}: the running statistics {key[1]} are not finite numbers")
            if key in mine:
                mine[key].copy_(value)


def global_batch(values: dict[str, Any], processes: int) -> int:
    """Images per optimizer step over all processes; `values` are a config's leaves."""
    return values["DATA.BATCH_SIZE"] * values["TRAIN.ACCUMULATION_STEPS"] * processes


def _split(row: Tensor, like: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """The inverse of concatenating `like`'s values."""
    parts = row.split([value.numel() for value in like.values()])
    return {n: part.view_as(value).to(value.dtype) for (n, value), part in zip(like.items(), parts, strict=True)}
