"""Learning-rate schedules per optimizer step, timm's: a linear warm-up, then one of several ways down."""

import math
from typing import Any

import timm
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler, TanhLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from config import ConfigError

# Those that go down to MIN_LR once or several times, over the epochs between warm-up and cooldown.
CYCLIC = ("cosine", "linear", "poly", "tanh")


def lr_scale(config, world_size: int) -> float:
    """What the config's learning rates are multiplied by: the global batch (images per process and pass x processes x
    passes per step) over `TRAIN.LR_REFERENCE_BATCH`."""
    global_batch = config.DATA.BATCH_SIZE * world_size * config.TRAIN.ACCUMULATION_STEPS
    return global_batch / config.TRAIN.LR_REFERENCE_BATCH


def build_scheduler(config, optimizer: torch.optim.Optimizer, steps_per_epoch: int, scale: float) -> Scheduler:
    """A schedule for `scheduler.step_update(step)` with the number of the optimizer step that comes next, from 0: the
    learning rate is a function of that number alone, so there is no state to save. Only "plateau" has some, see
    `PlateauScheduler`.

    The warm-up takes TRAIN.WARMUP_EPOCHS epochs from WARMUP_LR to the optimizer's rate, the decay the rest of
    TRAIN.EPOCHS down to MIN_LR (not with "step" and "constant"). WARMUP_LR and MIN_LR are multiplied by `scale`.

    Raises:
        ConfigError: this version of timm does not have the schedule.
    """
    keys = config.TRAIN.LR_SCHEDULER
    warmup = config.TRAIN.WARMUP_EPOCHS * steps_per_epoch
    decay = config.TRAIN.EPOCHS * steps_per_epoch - warmup
    min_lr = config.TRAIN.MIN_LR * scale
    common = {"warmup_t": warmup, "warmup_lr_init": config.TRAIN.WARMUP_LR * scale, "t_in_epochs": False}
    if keys.NAME == "plateau":
        return PlateauScheduler(optimizer, keys, min_lr, **common)
    if keys.NAME == "wsd":
        try:
            from timm.scheduler import WSDLRScheduler
        except ImportError as error:
            raise ConfigError(
                f"TRAIN.LR_SCHEDULER.NAME is wsd, which timm {timm.__version__} does not have; accepted: a newer timm "
                "(1.0.31 has it), or another schedule"
            ) from error
        down = max(1, round(keys.WSD_DECAY * decay))
        shape = keys.WSD_SHAPE
        return WSDLRScheduler(optimizer, t_initial=decay, decay_t=down, decay_fn=shape, lr_min=min_lr, **common)
    common["warmup_prefix"] = True
    if keys.NAME in ("step", "constant"):
        # A schedule without an end: constant is one that never decays.
        rate = keys.DECAY_RATE if keys.NAME == "step" else 1.0
        return StepLRScheduler(optimizer, decay_t=keys.DECAY_EPOCHS * steps_per_epoch, decay_rate=rate, **common)
    # After the last cycle timm's schedules stay at MIN_LR.
    units = sum(keys.CYCLE_MUL**cycle for cycle in range(keys.CYCLES))
    common |= {
        "t_initial": max(1, math.floor((decay - keys.COOLDOWN_EPOCHS * steps_per_epoch) / units)),
        "lr_min": min_lr,
        "cycle_mul": keys.CYCLE_MUL,
        "cycle_decay": keys.CYCLE_DECAY,
        "cycle_limit": keys.CYCLES,
    }
    if keys.NAME == "tanh":
        return TanhLRScheduler(optimizer, **common)
    if keys.NAME in ("linear", "poly"):
        return PolyLRScheduler(optimizer, power=1.0 if keys.NAME == "linear" else keys.POWER, **common)
    return CosineLRScheduler(optimizer, **common)


class PlateauScheduler(Scheduler):
    """The learning rate times DECAY_RATE whenever PATIENCE evaluations after the warm-up in a row have not been better
    than the best one, by PyTorch's ReduceLROnPlateau. timm's does not save all of its state, and is to be removed.

    Args:
        keys: `TRAIN.LR_SCHEDULER`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        keys,
        lr_min: float,
        warmup_t: int,
        warmup_lr_init: float,
        t_in_epochs: bool,
    ):
        super().__init__(optimizer, "lr", t_in_epochs=t_in_epochs)
        self.metric_name, self.lr_min = keys.METRIC, lr_min
        self.warmup_t, self.warmup_lr_init = warmup_t, warmup_lr_init
        # Its learning rate is what the others are multiplied by.
        self._factor = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self._plateau = ReduceLROnPlateau(
            self._factor,
            mode="min" if keys.METRIC == "val_loss" else "max",
            factor=keys.DECAY_RATE,
            patience=keys.PATIENCE - 1,  # PyTorch's is of the evaluations that do no harm yet
            threshold=keys.THRESHOLD,
            threshold_mode="abs",
            eps=0.0,
        )

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return [
                self.warmup_lr_init + t * (value - self.warmup_lr_init) / self.warmup_t for value in self.base_values
            ]
        factor = self._factor.param_groups[0]["lr"]
        return [max(value * factor, min(self.lr_min, value)) for value in self.base_values]

    def evaluated(self, metrics: dict[str, Any], steps: int) -> None:
        """Takes an evaluation after so many steps of the run into account."""
        if steps > self.warmup_t:
            self._plateau.step(metrics[self.metric_name])

    def state_dict(self) -> dict[str, float]:
        """factor, best, bad_evaluations."""
        plateau = self._plateau
        return {
            "factor": float(self._factor.param_groups[0]["lr"]),
            "best": float(plateau.best),
            "bad_evaluations": plateau.num_bad_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._factor.param_groups[0]["lr"] = state_dict["factor"]
        self._plateau.best, self._plateau.num_bad_epochs = state_dict["best"], state_dict["bad_evaluations"]


def schedule_state(scheduler: Scheduler | None) -> dict[str, float]:
    """What a checkpoint needs of a schedule: nothing, but for "plateau"."""
    return scheduler.state_dict() if isinstance(scheduler, PlateauScheduler) else {}
