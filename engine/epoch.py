"""Training for one epoch."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from logging import Logger
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.loading import LoadingFailed, UnreadableFiles, iterate, next_batch
from engine.control import Control, Point
from engine.evaluate import autocast
from engine.finite import FiniteGuard, Step
from engine.state import TrainingState
from engine.task import Task
from models import train_mode
from optimizer import learning_rate
from runtime.distributed import World, all_reduce_sum, sum_on_host
from runtime.signals import Stopped
from utils import UserError, seed_all


def steps_per_epoch(loader: DataLoader, accumulation: int) -> int:
    """Optimizer steps in an epoch. The last may have fewer passes than the others."""
    return math.ceil(len(loader) / accumulation)


def steps_between_checks(config, world: World) -> int:
    """How often to look at a step's numbers: on the CPU there is nothing to wait for."""
    return 1 if world.device.type == "cpu" else config.PRINT_FREQ


@dataclass
class Training:
    """What all epochs of a run share.

    Attributes:
        model: `state.model`, wrapped if there are several processes.
        scheduler: sets the learning rates for the number of a step.
    """

    config: CfgNode
    task: Task
    state: TrainingState
    model: nn.Module
    scheduler: Scheduler
    world: World
    logger: Logger
    control: Control

    @property
    def loader(self) -> DataLoader:
        """The task's, for training."""
        return self.task.train_loader

    @cached_property
    def accumulation(self) -> int:
        """Forward and backward passes per step."""
        return self.config.TRAIN.ACCUMULATION_STEPS

    @cached_property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return steps_per_epoch(self.loader, self.accumulation)

    def passes(self, step: int) -> int:
        """Passes of step number `step` of an epoch."""
        return min(self.accumulation, len(self.loader) - step * self.accumulation)


def train_one_epoch(run: Training) -> dict[str, float]:
    """Trains epoch number `state.epoch` from where `state.progress` says. It keeps that up to date: between two steps,
    the state is one to go on from.

    All randomness is drawn from (seed, epoch, batch, rank). Nothing waits for the device but the log lines, every
    PRINT_FREQ steps; on the CPU each step is checked at once.

    Returns:
        train_loss (mean over all processes and the steps that were not skipped), lr (of the last step),
        images_per_second (all processes), data_wait (0 to 1: the share of this call's time in which this process waited
        for its loader; on a GPU the host runs ahead, so the device waited less), memory_mb (peak), seconds,
        skipped_steps, unreadable_train (images of all processes); and train_NAME of each part of the loss.

    Raises:
        Stopped: a process got a signal; the state is between two steps.
        LoadingFailed: likewise.
        NonFiniteError: too many steps in a row had a loss or gradient that is not finite.
        UserError: BatchNorm gets a single value per channel.
    """
    config, task, state, world, control = run.config, run.task, run.state, run.world, run.control
    train_mode(run.model)
    guard, meter = FiniteGuard(config, state, run.logger), Meter(run)
    unreadable = UnreadableFiles(run.loader, config.DATA.MAX_UNREADABLE, run.logger, state.progress.unreadable)

    for i, batch in agreed_batches(run, guard, meter, unreadable):
        control.at_batch(state.epoch, i, Point.FORWARD)
        seed_all(config.SEED, state.epoch, i, world.rank)
        images, targets = task.on_device(batch)
        if state.epoch == i == 0:
            control.show(images, targets)

        number, passes_done = divmod(i, run.accumulation)
        is_last = passes_done == run.passes(number) - 1
        # Gradients of all processes are averaged once per step, in its last backward pass.
        with contextlib.nullcontext() if is_last or not world.distributed else run.model.no_sync():
            with autocast(world.device, state.amp), single_values_named(config):
                loss, parts = task.loss(run.model, images, targets, batch)
            control.at_batch(state.epoch, i, Point.BACKWARD)
            guard.backward(loss, run.passes(number), batch.index)
        meter.note(parts)
        if not is_last:
            continue

        run.scheduler.step_update(state.epoch * run.steps + number)
        step = guard.step(number)
        if state.ema:
            state.ema.update(state.model, state.epoch * run.steps + number + 1)
        meter.add(step)
        state.progress.step, state.progress.unreadable = number + 1, unreadable.count
        is_logged = (number + 1) % config.PRINT_FREQ == 0 or number + 1 == run.steps
        if is_logged or (number + 1) % steps_between_checks(config, world) == 0:
            guard.check()
        if is_logged:
            meter.log(step)
    return finish_epoch(run, meter, unreadable)


@contextlib.contextmanager
def single_values_named(config: CfgNode) -> Iterator[None]:
    """Inside, what BatchNorm raises about a single value per channel becomes a UserError."""
    try:
        yield
    except ValueError as error:  # PyTorch raises nothing more specific
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE} and the model's last map has a single token: BatchNorm has "
            "nothing to average; accepted: 2 or more (each pass of TRAIN.ACCUMULATION_STEPS is normalised by itself), "
            "or a larger DATA.IMG_SIZE"
        ) from error


def agreed_batches(
    run: Training, guard: FiniteGuard, meter: "Meter", unreadable: UnreadableFiles
) -> Iterator[tuple[int, Any]]:
    """The rest of the epoch's batches with their numbers. Before each, the processes agree, on the host, whether one of
    them must stop, has failed to load, or whether a checkpoint is due, which is then written.

    Raises:
        Stopped, LoadingFailed: see `train_one_epoch`.
    """
    config, state, world, control = run.config, run.state, run.world, run.control
    first = state.progress.step * run.accumulation
    run.loader.sampler.set_epoch(state.epoch, first * config.DATA.BATCH_SIZE)
    batches = iterate(run.loader, f"epoch {state.epoch + 1}", world, first)
    for i in range(first, len(run.loader)):
        control.at_batch(state.epoch, i, Point.LOADING)
        with meter.waiting():
            batch, failure = next_batch(batches)
        control.at_batch(state.epoch, i, Point.AGREEING)
        step, passes_done = divmod(i, run.accumulation)
        between_steps = passes_done == 0
        stop, save, failures, unreadable_files = sum_on_host(
            [
                between_steps and control.stop_requested,
                between_steps and i > first and world.is_main and control.save_due(step),
                failure is not None,
                unreadable.count,
            ],
            world,
        )
        failed = failures or unreadable.too_many(unreadable_files)
        if stop or save or failed:
            guard.check()
            state.progress.seconds = meter.seconds
            if failed:
                guard.abandon()
                raise LoadingFailed(failure or unreadable.error(unreadable_files, failures))
            if stop:
                raise Stopped
            control.at_batch(state.epoch, i, Point.SAVING)
            control.save()
        unreadable.note(batch)
        yield i, batch


def finish_epoch(run: Training, meter: "Meter", unreadable: UnreadableFiles) -> dict[str, float]:
    """Waits for the other processes; gives the epoch's metrics, see `train_one_epoch`."""
    config, state, world = run.config, run.state, run.world
    progress = state.progress
    run.control.after_batches(state.epoch, len(run.loader))
    own_seconds = meter.own_seconds
    progress.seconds = meter.seconds_before + own_seconds
    # The last step's rate, also if a run has gone on after that step.
    run.scheduler.step_update((state.epoch + 1) * run.steps - 1)
    (unreadable_files,) = sum_on_host([unreadable.count], world)
    if unreadable.too_many(unreadable_files):
        raise LoadingFailed(unreadable.error(unreadable_files))
    total, passes, *parts = all_reduce_sum(progress.losses.clone(), world).tolist()
    return {
        "train_loss": total / passes if passes else math.nan,
        "lr": learning_rate(state.optimizer),
        "images_per_second": len(run.loader) * config.DATA.BATCH_SIZE * world.size / progress.seconds,
        "data_wait": meter.waited / own_seconds,
        "memory_mb": peak_memory_mb(world.device),
        "seconds": progress.seconds,
        "skipped_steps": progress.skipped,
        "unreadable_train": unreadable_files,
        **{f"train_{n}": v / passes if passes else math.nan for n, v in zip(progress.parts, parts, strict=True)},
    }


class Meter:
    """Time, losses and log lines of an epoch on this process.

    Attributes:
        seconds_before: of the epoch, before this call.
        waited: seconds spent waiting for the loader in this call.
    """

    def __init__(self, run: Training):
        self.run, progress = run, run.state.progress
        progress.losses = progress.losses.to(run.world.device)
        if run.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.waited = 0.0
        self._parts: list[dict[str, Tensor]] = []  # of the loss, in the passes of the step
        self.seconds_before, self._started = progress.seconds, time.perf_counter()
        self._printed, self._printed_step = self._started, progress.step

    @property
    def own_seconds(self) -> float:
        """Since this call began."""
        return time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """Of the epoch, those before the run was stopped included."""
        return self.seconds_before + self.own_seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for its loader."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    def note(self, parts: dict[str, Tensor]) -> None:
        """Remembers the parts of a pass's loss until `add`."""
        self._parts.append({name: part.detach() for name, part in parts.items()})

    def add(self, step: Step) -> None:
        """Adds the losses of a step, unless it was skipped, without waiting for the device."""
        progress, (parts, self._parts) = self.run.state.progress, (self._parts, [])
        if set(progress.parts) != set(parts[0]):  # the epoch's first step
            progress.parts = sorted(parts[0])  # sums of all processes are added by position
            progress.losses = torch.cat([progress.losses[:2], progress.losses.new_zeros(len(parts[0]))])
        losses = progress.losses
        lists = [step.losses, *([found[name] for found in parts] for name in progress.parts)]
        total, *others = (torch.stack(values).double().sum() for values in lists)
        sums = torch.stack([total, torch.full_like(losses[1], len(step.losses)), *others])
        progress.losses = losses + sums.masked_fill(~step.finite, 0)

    def log(self, step: Step) -> None:
        """A line about the steps since the last one."""
        run, done = self.run, step.number + 1
        config, epoch = run.config, run.state.epoch
        now = time.perf_counter()
        steps, seconds = done - self._printed_step, now - self._printed
        batches = min(done * run.accumulation, len(run.loader)) - self._printed_step * run.accumulation
        self._printed, self._printed_step = now, done
        eta = ((config.TRAIN.EPOCHS - epoch) * run.steps - done) * seconds / steps
        total, passes = run.state.progress.losses[:2].tolist()
        mean = total / passes if passes else math.nan
        speed = config.DATA.BATCH_SIZE * batches * run.world.size / seconds
        run.logger.info(
            f"epoch {epoch + 1}/{config.TRAIN.EPOCHS} step {done}/{run.steps} eta {clock(eta)} lr {step.lr:.3e} "
            f"loss {step.losses[-1].item():.4f} ({mean:.4f}) grad_norm {step.grad_norm.item():.3f} "
            f"{speed:.0f} images/s memory {peak_memory_mb(run.world.device):.0f} MB"
        )


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: what PyTorch allocated on a CUDA device since the epoch began, or this process's resident
    set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
