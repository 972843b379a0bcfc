"""Training for one epoch, evaluation, throughput: what the entry points share."""

import contextlib
import math
import resource
import sys
import time
from logging import Logger

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from distributed import World, all_reduce_sum
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


def steps_per_epoch(loader: DataLoader, accumulation: int) -> int:
    """Optimizer steps in an epoch; the last may be of fewer passes."""
    return math.ceil(len(loader) / accumulation)


def train_one_epoch(
    config,
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler,
    scaler: torch.amp.GradScaler,
    mixup: Mixup | None,
    epoch: int,
    world: World,
    logger: Logger,
) -> dict[str, float]:
    """Trains for epoch number `epoch` (from 0).

    Nothing waits for the device but the log lines, every PRINT_FREQ steps. All randomness is drawn from (seed, epoch,
    batch, rank).

    Returns:
        train_loss (mean over all processes), lr (of the last step), images_per_second (all processes), memory_mb
        (peak), seconds, unreadable_train (images of all processes).

    Raises:
        UserError: the loss is not finite.
    """
    model.train()
    loader.sampler.set_epoch(epoch)
    # Mixup's soft targets are smoothed already.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.MODEL.LABEL_SMOOTHING)
    amp = resolve_amp(config, world.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    max_norm = config.TRAIN.CLIP_GRAD or float("inf")
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    steps = steps_per_epoch(loader, accumulation)
    unreadable = UnreadableFiles(loader, logger)
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss, batches
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    started = printed = time.perf_counter()
    printed_step = printed_batch = 0
    for i, batch in enumerate(progress_bar(loader, f"epoch {epoch + 1}", world)):
        seed_all(config.SEED, epoch, i, world.rank)
        unreadable.note(batch)
        images = batch.image.to(world.device, non_blocking=True)
        targets = batch.target.to(world.device, non_blocking=True)
        if mixup:
            images, targets = mixup(images, targets)

        step = i // accumulation
        passes = min(accumulation, len(loader) - step * accumulation)  # of this step: the last may have fewer
        is_update = i == step * accumulation + passes - 1
        # Gradients of all processes are averaged once per step, in its last backward pass.
        with contextlib.nullcontext() if is_update or not world.distributed else model.no_sync():
            with autocast(world.device, amp):
                loss = criterion(model(images), targets)
            scaler.scale(loss / passes).backward()
        totals += torch.stack([loss.detach().double(), torch.ones_like(totals[1])])
        if not is_update:
            continue

        scheduler.step_update(epoch * steps + step)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        if (step + 1) % config.PRINT_FREQ == 0 or step + 1 == steps:
            value = loss.item()  # waits for the device
            lr = optimizer.param_groups[0]["lr"]
            norm = grad_norm.item()
            # Loss scaling meets infinite gradients as a matter of course and skips the step; otherwise the weights
            # are ruined already.
            if not math.isfinite(value) or not (scaler.is_enabled() or math.isfinite(norm)):
                raise not_finite(value, norm, config, epoch, step, lr)
            now = time.perf_counter()
            per_step = (now - printed) / (step + 1 - printed_step)
            eta = ((config.TRAIN.EPOCHS - epoch) * steps - step - 1) * per_step
            speed = config.DATA.BATCH_SIZE * (i + 1 - printed_batch) * world.size / (now - printed)
            printed, printed_step, printed_batch = now, step + 1, i + 1
            logger.info(
                f"epoch {epoch + 1}/{config.TRAIN.EPOCHS} step {step + 1}/{steps} eta {clock(eta)} lr {lr:.3e} "
                f"loss {value:.4f} ({(totals[0] / totals[1]).item():.4f}) grad_norm {norm:.3f} "
                f"{speed:.0f} images/s memory {peak_memory_mb(world.device):.0f} MB"
            )

    all_reduce_sum(totals, world)
    train_loss = (totals[0] / totals[1]).item()
    seconds = time.perf_counter() - started
    lr = optimizer.param_groups[0]["lr"]
    if not math.isfinite(train_loss):
        raise not_finite(train_loss, grad_norm.item(), config, epoch, steps - 1, lr)
    return {
        "train_loss": train_loss,
        "lr": lr,
        "images_per_second": len(loader) * config.DATA.BATCH_SIZE * world.size / seconds,
        "memory_mb": peak_memory_mb(world.device),
        "seconds": seconds,
        "unreadable_train": unreadable.total(world),
    }


@torch.inference_mode()
def evaluate(config, model: nn.Module, loader: DataLoader, world: World, logger: Logger) -> dict[str, float]:
    """Accuracy and loss over the images of all processes, each counted once.

    Args:
        model: not wrapped: processes may have different numbers of batches, so nothing in it may wait for the others.

    Returns:
        top1 and top5 in percent (an unreadable image counts as wrong), val_loss (mean cross-entropy of the readable
        images), images, unreadable_val, val_seconds, val_images_per_second (all processes).
    """
    model.eval()
    amp = resolve_amp(config, world.device)
    unreadable = UnreadableFiles(loader, logger)
    totals = torch.zeros(5, dtype=torch.float64, device=world.device)  # images, readable, loss, top-1, top-5
    started = time.perf_counter()
    for batch in progress_bar(loader, "evaluation", world):
        unreadable.note(batch)
        images = batch.image.to(world.device, non_blocking=True)
        targets = batch.target.to(world.device, non_blocking=True)
        readable = batch.readable.to(world.device, non_blocking=True)
        with autocast(world.device, amp):
            logits = model(images)
        logits = logits.float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        # NaN sorts as the largest number: a broken model must not score.
        hits &= (readable & logits.isfinite().all(dim=1))[:, None]
        batch_totals = (torch.ones_like(losses), readable, losses.where(readable, 0), hits[:, 0], hits.any(dim=1))
        totals += torch.stack([values.double().sum() for values in batch_totals])
    all_reduce_sum(totals, world)
    images, readable, loss, top1, top5 = totals.tolist()
    seconds = time.perf_counter() - started
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "val_loss": loss / readable if readable else math.nan,
        "images": int(images),
        "unreadable_val": unreadable.total(world),
        "val_seconds": seconds,
        "val_images_per_second": images / seconds,
    }


@torch.inference_mode()
def throughput(config, model: nn.Module, images: torch.Tensor, world: World) -> float:
    """Images per second of the model alone in evaluation, on this process, for one batch (N, 3, S, S) over and over:
    the median of 30 passes, or of as many as fit into 20 seconds (at least 3)."""
    model.eval()
    amp = resolve_amp(config, world.device)
    images = images.to(world.device)
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

    def __init__(self, loader: DataLoader, logger: Logger):
        self.source, self.logger, self.count = loader.dataset.source, logger, 0

    def note(self, batch) -> None:
        if batch.readable.all():
            return
        for index in batch.index[~batch.readable].tolist():
            self.count += 1
            if self.count <= MOST_NAMED_FILES:
                more = "; further ones are only counted" if self.count == MOST_NAMED_FILES else ""
                self.logger.warning(f"cannot be read as an image: {self.source.name(index)}{more}")

    def total(self, world: World) -> int:
        """Over all processes."""
        return int(all_reduce_sum(torch.tensor(self.count, device=world.device), world).item())


def progress_bar(loader: DataLoader, title: str, world: World):
    """The loader with a bar on rank 0 where a person is watching."""
    hidden = not (world.is_main and sys.stdout.isatty())
    return tqdm(loader, desc=title, leave=False, disable=hidden, file=sys.stdout, dynamic_ncols=True)


def not_finite(loss: float, grad_norm: float, config, epoch: int, step: int, lr: float) -> UserError:
    """The error for a loss or gradient that is no number: weights that would be saved next may be ruined."""
    return UserError(
        f"the loss is {loss} in epoch {epoch + 1}, step {step + 1} (gradient norm {grad_norm}, lr {lr:.3e}, "
        f"AMP {config.AMP}); training stopped, the checkpoints of the epochs before are untouched; a lower "
        "TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or --amp off, may help"
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
