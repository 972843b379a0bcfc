"""Learning-rate schedules per optimizer step, timm's: a linear warm-up, then cosine, linear or step decay."""

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler


def lr_scale(config, world_size: int) -> float:
    """What the config's learning rates are multiplied by: the global batch (images per process and pass x processes x
    passes per step) over `TRAIN.LR_REFERENCE_BATCH`."""
    global_batch = config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS
    return global_batch / config.TRAIN.LR_REFERENCE_BATCH


def build_scheduler(config, optimizer: torch.optim.Optimizer, steps_per_epoch: int, scale: float) -> Scheduler:
    """A schedule for `scheduler.step_update(step)` with the number of the optimizer step that comes next, from 0: the
    learning rate is a function of that number alone, so there is no state to save.

    The warm-up takes TRAIN.WARMUP_EPOCHS epochs from WARMUP_LR to the optimizer's rate, the decay the rest of
    TRAIN.EPOCHS down to MIN_LR (not with "step"). WARMUP_LR and MIN_LR are multiplied by `scale`.
    """
    warmup = config.TRAIN.WARMUP_EPOCHS * steps_per_epoch
    total = config.TRAIN.EPOCHS * steps_per_epoch
    common = {
        "warmup_t": warmup,
        "warmup_lr_init": config.TRAIN.WARMUP_LR * scale,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    min_lr = config.TRAIN.MIN_LR * scale
    name = config.TRAIN.LR_SCHEDULER.NAME
    if name == "step":
        decay = config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch
        return StepLRScheduler(optimizer, decay_t=decay, decay_rate=config.TRAIN.LR_SCHEDULER.DECAY_RATE, **common)
    if name == "linear":
        return PolyLRScheduler(optimizer, t_initial=total - warmup, power=1.0, lr_min=min_lr, **common)
    return CosineLRScheduler(optimizer, t_initial=total - warmup, lr_min=min_lr, **common)
