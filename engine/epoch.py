"""Training for one epoch, evaluation, throughput: what the entry points share."""

import contextlib
import math
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from logging import Logger

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Sample, build_batch_transform, build_normalize
from engine.finite import FiniteGuard, Statistics, Step, clip_gradients, poison, update_scaler
from engine.state import TrainingState
from models import train_mode
from optimizer import learning_rate
from runtime.distributed import World, all_reduce_sum, sum_on_host
from runtime.signals import Stopped, StopRequest
from runtime.watchdog import Watchdog
from utils import UserError, seed_all

MOST_NAMED_FILES = 20  # unreadable files named per epoch and process; all are counted


def resolve_amp(config, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision that `config.AMP` asks for on this device; None for full precision."""
    if config.AMP in ("bfloat16", "float16"):
        return getattr(torch, config.AMP)
    if config.AMP == "off" or (config.AMP == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def autocast(device: torch.device, amp: torch.dtype | None) -> torch.autocast:
    """Mixed precision of dtype `amp`, or none."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def steps_between_checks(config, world: World) -> int:
    """How often a step's numbers are looked at."""
    return 1 if world.device.type == "cpu" else config.PRINT_FREQ


def steps_per_epoch(loader: DataLoader, accumulation: int) -> int:
    """Optimizer steps in an epoch; the last may be of fewer passes."""
    return math.ceil(len(loader) / accumulation)


class LoadingFailed(Exception):
    """A process could not load a batch, or too many files are unreadable; all processes have agreed to stop.

    Attributes:
        error: what to tell the user, on this process.
    """

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


@dataclass
class Control:
    """What may interrupt training and evaluation, and who is told where they are. By default, nothing and no one."""

    request: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog = field(default_factory=Watchdog)
    # Whether a checkpoint is due after so many steps of the epoch; asked on the main process.
    save_due: Callable[[int], bool] = lambda step: False
    # Writes one; called by all processes.
    save: Callable[[], None] = lambda: None
    # Is shown the first batch of a run as the model gets it, (N, 3, H, W).
    show: Callable[[torch.Tensor], None] = lambda images: None


def train_one_epoch(
    config,
    state: TrainingState,
    model: nn.Module,
    loader: DataLoader,
    scheduler: Scheduler,
    mixup: Mixup | None,
    world: World,
    logger: Logger,
    control: Control,
) -> dict[str, float]:
    """Trains epoch number `state.epoch` from where `state.progress` says, which it keeps up to date: between two steps,
    the state is one to go on from.

    All randomness is drawn from (seed, epoch, batch, rank). Before each batch the processes agree, on the host, whether
    to go on. Nothing waits for the device but the log lines, every PRINT_FREQ steps; on the CPU, where there is nothing
    to wait for, each step is checked at once.

    Args:
        model: `state.model`, wrapped if there are several processes.

    Returns:
        train_loss (mean over all processes and the steps that were not skipped), lr (of the last step),
        images_per_second (all processes), data_wait (0 to 1: the share of the time since the epoch began, or was gone
        on with, in which this process waited for its loader; a GPU, ahead of which its host runs, waited less),
        memory_mb (peak), seconds, skipped_steps, unreadable_train (images of all processes).

    Raises:
        Stopped: a process got a signal; the state is between two steps.
        LoadingFailed: likewise.
        NonFiniteError: too many steps in a row had a loss or gradient that is not finite.
    """
    train_mode(model)
    optimizer, scaler, progress, epoch = state.optimizer, state.scaler, state.progress, state.epoch
    # Mixup's soft targets are smoothed already.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.MODEL.LABEL_SMOOTHING)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    steps = steps_per_epoch(loader, accumulation)
    unreadable = UnreadableFiles(config, loader, logger, progress.unreadable)
    transform = build_batch_transform(config, mixup, world.device)
    guard, statistics = FiniteGuard(config, state, logger), Statistics(state.model)
    check_every = steps_between_checks(config, world)
    progress.losses = progress.losses.to(world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    started = printed = time.perf_counter()
    seconds_before, waited = progress.seconds, 0.0
    first = printed_batch = progress.step * accumulation
    printed_step = progress.step
    loader.sampler.set_epoch(epoch, first * config.DATA.BATCH_SIZE)
    batches = iterate(loader, f"epoch {epoch + 1}", world, first)
    for i in range(first, len(loader)):
        step, passes_done = divmod(i, accumulation)
        where = f"epoch {epoch + 1} batch {i + 1}"
        control.watchdog.at(epoch, 0, i, 0, doing=f"waiting for the data of {where}")
        asked = time.perf_counter()
        batch, failure = next_batch(batches)
        waited += time.perf_counter() - asked
        control.watchdog.at(epoch, 0, i, 1, doing=f"agreeing with the other processes before {where}")
        between_steps = passes_done == 0
        stop, save, failures, unreadable_files = sum_on_host(
            [
                between_steps and control.request.signal is not None,
                between_steps and i > first and world.is_main and control.save_due(step),
                failure is not None,
                unreadable.count,
            ],
            world,
        )
        if stop or save or failures or unreadable.too_many(unreadable_files):
            guard.check()
            progress.seconds = seconds_before + time.perf_counter() - started
            if failures or unreadable.too_many(unreadable_files):
                # Passes of a step that will not be must leave nothing.
                statistics.restore()
                optimizer.zero_grad(set_to_none=True)
                raise LoadingFailed(failure or unreadable.error(unreadable_files, failures))
            if stop:
                raise Stopped
            control.watchdog.at(epoch, 0, i, 2, doing=f"writing a checkpoint before {where}")
            control.save()

        control.watchdog.at(epoch, 0, i, 3, doing=f"the forward pass of {where}")
        seed_all(config.SEED, epoch, i, world.rank)
        unreadable.note(batch)
        images = batch.image.to(world.device, non_blocking=True)
        targets = batch.target.to(world.device, non_blocking=True)
        images, targets = transform(images, targets)
        if epoch == i == 0:
            control.show(images)

        if between_steps:
            losses, samples = [], []
        passes = min(accumulation, len(loader) - step * accumulation)  # of this step: the last may have fewer
        is_update = passes_done == passes - 1
        # Gradients of all processes are averaged once per step, in its last backward pass.
        with contextlib.nullcontext() if is_update or not world.distributed else model.no_sync():
            with autocast(world.device, state.amp):
                loss = criterion(model(images), targets)
            control.watchdog.at(epoch, 0, i, 4, doing=f"the backward pass of {where}")
            scaler.scale(poison(loss) / passes).backward()
        losses.append(loss.detach())
        samples.append(batch.index)
        if not is_update:
            continue

        scheduler.step_update(epoch * steps + step)
        lr = learning_rate(optimizer)
        grad_norm = clip_gradients(parameters, config.TRAIN.CLIP_GRAD, scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)  # not if a gradient is not finite
        update_scaler(scaler, state.amp)
        optimizer.zero_grad(set_to_none=True)

        finite = grad_norm.isfinite()
        statistics.keep_if(finite)
        if state.ema:
            state.ema.update(state.model, epoch * steps + step + 1)
        sums = torch.stack([torch.stack(losses).double().sum(), torch.full_like(progress.losses[1], passes)])
        progress.losses = progress.losses + sums.masked_fill(~finite, 0)
        progress.step, progress.unreadable = step + 1, unreadable.count
        guard.note(Step(step, lr, losses, grad_norm, samples))
        is_logged = (step + 1) % config.PRINT_FREQ == 0 or step + 1 == steps
        if is_logged or (step + 1) % check_every == 0:
            guard.check()
        if is_logged:
            now = time.perf_counter()
            per_step = (now - printed) / (step + 1 - printed_step)
            eta = ((config.TRAIN.EPOCHS - epoch) * steps - step - 1) * per_step
            speed = config.DATA.BATCH_SIZE * (i + 1 - printed_batch) * world.size / (now - printed)
            printed, printed_step, printed_batch = now, step + 1, i + 1
            mean = (progress.losses[0] / progress.losses[1]).item()
            logger.info(
                f"epoch {epoch + 1}/{config.TRAIN.EPOCHS} step {step + 1}/{steps} eta {clock(eta)} lr {lr:.3e} "
                f"loss {loss.item():.4f} ({mean:.4f}) grad_norm {grad_norm.item():.3f} "
                f"{speed:.0f} images/s memory {peak_memory_mb(world.device):.0f} MB"
            )

    control.watchdog.at(epoch, 0, len(loader), doing=f"waiting for the other processes after epoch {epoch + 1}")
    seconds = time.perf_counter() - started
    progress.seconds = seconds_before + seconds
    scheduler.step_update((epoch + 1) * steps - 1)  # the last step's rate, also if a run has gone on after that step
    (unreadable_files,) = sum_on_host([unreadable.count], world)
    if unreadable.too_many(unreadable_files):
        raise LoadingFailed(unreadable.error(unreadable_files))
    total, passes = all_reduce_sum(progress.losses.clone(), world).tolist()
    return {
        "train_loss": total / passes if passes else math.nan,
        "lr": learning_rate(optimizer),
        "images_per_second": len(loader) * config.DATA.BATCH_SIZE * world.size / progress.seconds,
        "data_wait": waited / seconds,
        "memory_mb": peak_memory_mb(world.device),
        "seconds": progress.seconds,
        "skipped_steps": progress.skipped,
        "unreadable_train": unreadable_files,
    }


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
) -> dict[str, float]:
    """Accuracy and loss over the images of all processes, each counted once.

    Args:
        model: not wrapped: processes may have different numbers of batches, so nothing in it may wait for the others.
        control: none for an evaluation that nothing interrupts.
        epoch, turn: of training, from 0, and of the evaluations after it, for the watchdog.

    Returns:
        top1 and top5 in percent (an unreadable image counts as wrong), val_loss (mean cross-entropy of the readable
        images), images, unreadable_val, val_seconds, val_images_per_second (all processes).

    Raises:
        Stopped: a process got a signal.
        LoadingFailed: a process could not load a batch, or too many files are unreadable.
    """
    model.eval()
    control = control or Control()
    amp = resolve_amp(config, world.device)
    unreadable, normalize = UnreadableFiles(config, loader, logger), build_normalize(config, world.device)
    totals = torch.zeros(5, dtype=torch.float64, device=world.device)  # images, readable, loss, top-1, top-5
    started = time.perf_counter()
    failure = None
    batches = iterate(loader, "evaluation", world)
    for i in range(len(loader)):
        control.watchdog.at(epoch, 1, turn, 0, i, doing=f"evaluation batch {i + 1}")
        batch, failure = next_batch(batches)
        if failure is not None or control.request.signal is not None:
            break
        unreadable.note(batch)
        images = normalize(batch.image.to(world.device, non_blocking=True))
        targets = batch.target.to(world.device, non_blocking=True)
        readable = batch.readable.to(world.device, non_blocking=True)
        with autocast(world.device, amp):
            logits = predict(config, model, images)
        logits = logits.float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        # NaN sorts as the largest number: a broken model must not score.
        hits &= (readable & logits.isfinite().all(dim=1))[:, None]
        losses = losses.masked_fill(~readable, 0)
        batch_totals = (torch.ones_like(losses), readable, losses, hits[:, 0], hits.any(dim=1))
        totals += torch.stack([values.double().sum() for values in batch_totals])
    control.watchdog.at(epoch, 1, turn, 1, doing="waiting for the other processes after the evaluation")
    stop, failures, unreadable_files = sum_on_host(
        [control.request.signal is not None, failure is not None, unreadable.count], world
    )
    if failures or unreadable.too_many(unreadable_files):
        raise LoadingFailed(failure or unreadable.error(unreadable_files, failures))
    if stop:
        raise Stopped
    all_reduce_sum(totals, world)
    images, readable, loss, top1, top5 = totals.tolist()
    seconds = time.perf_counter() - started
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "val_loss": loss / readable if readable else math.nan,
        "images": int(images),
        "unreadable_val": unreadable_files,
        "val_seconds": seconds,
        "val_images_per_second": images / seconds,
    }


def predict(config, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) of a batch that may be the last one and smaller than the others: for a compiled model, which
    would be compiled anew for it, it is filled up with zeros."""
    missing = config.DATA.BATCH_SIZE - len(images)
    if not config.TRAIN.COMPILE or missing <= 0:
        return model(images)
    return model(F.pad(images, (0, 0) * (images.ndim - 1) + (0, missing)))[: len(images)]


@torch.inference_mode()
def throughput(config, model: nn.Module, images: torch.Tensor, world: World) -> float:
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


class UnreadableFiles:
    """Counts the unreadable images that a loader met, and names them in the log."""

    def __init__(self, config, loader: DataLoader, logger: Logger, count: int = 0):
        self.source, self.logger, self.count = loader.dataset.source, logger, count
        self.images, self.most = len(loader.dataset), config.DATA.MAX_UNREADABLE

    def note(self, batch: Sample) -> None:
        if batch.readable.all():
            return
        for index in batch.index[~batch.readable].tolist():
            self.count += 1
            if self.count <= MOST_NAMED_FILES:
                more = "; further ones are only counted" if self.count == MOST_NAMED_FILES else ""
                self.logger.warning(f"cannot be read as an image: {self.source.name(index)}{more}")

    def too_many(self, count: int) -> bool:
        """Whether `count`, of all processes, is more than the config accepts."""
        return count > self.most * self.images

    def error(self, count: int, failures: int = 0) -> UserError:
        """Why loading ends on a process that has not failed itself."""
        if failures:
            return UserError("another process could not load its data: its own message says why")
        return UserError(
            f"{count} of {self.images} images cannot be read (the log names the first {MOST_NAMED_FILES} of each "
            f"process); accepted: a fraction of DATA.MAX_UNREADABLE {self.most:g}"
        )


def iterate(loader: DataLoader, title: str, world: World, first: int = 0) -> Iterator[Sample]:
    """The loader's batches, with a bar on rank 0 where a person is watching; the bar begins at batch `first`."""
    batches = iter(loader)  # at the first batch, where a failure is agreed on
    if threading.current_thread() is threading.main_thread():
        # PyTorch's handler for the death of a loader process raises wherever the program is, in the middle of an
        # optimizer step for one. Without it the loader notices too, within 5 seconds of waiting for a batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    bar = {"desc": title, "total": len(loader), "initial": first, "leave": False, "dynamic_ncols": True}
    yield from tqdm(batches, **bar, disable=not (world.is_main and sys.stdout.isatty()), file=sys.stdout)


def next_batch(batches: Iterator[Sample]) -> tuple[Sample | None, Exception | None]:
    """The next batch, or why there is none."""
    try:
        return next(batches), None
    except Exception as error:  # whatever it is, the other processes must hear of it; it is raised by the caller
        # Not "Caught ... in DataLoader worker process": that one has raised something and lives.
        if re.search(r"DataLoader worker \(pid|Pin memory thread", str(error)):
            return None, UserError(
                f"a loader process has died ({str(error).splitlines()[0]}); often because memory ran out: a smaller "
                "DATA.NUM_WORKERS takes less"
            )
        return None, error


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
