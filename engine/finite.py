"""Losses and gradients that are not finite: such steps are skipped, counted and named, and end a run if they go on."""

import math
from dataclasses import dataclass
from logging import Logger

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from engine.state import TrainingState, training_buffers
from logger import ALL_RANKS
from models.backbone import classifiers
from optimizer import learning_rate
from utils import UserError

MOST_NAMED_STEPS = 20  # skipped steps named per epoch; all are counted


class NonFiniteError(UserError):
    """Too many steps in a row were skipped."""


def build_scaler(amp: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for float16. For other precisions the scale is always 1 (see `update_scaler`): a GradScaler also
    skips steps with a gradient that is not finite, on the device, without waiting for the host."""
    if amp == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0)


def update_scaler(scaler: torch.amp.GradScaler, amp: torch.dtype | None) -> None:
    """Next step's scale."""
    scaler.update(None if amp == torch.float16 else 1.0)


def poison(loss: Tensor) -> Tensor:
    """The loss. If it is finite, value and gradient are unchanged. If not, its gradient is NaN: averaging gradients
    over the processes then tells all of them, even if only one has met it."""
    return loss * (1 + 0 * loss.detach())


def clip_gradients(parameters: list[nn.Parameter], max_norm: float, scaler: torch.amp.GradScaler) -> Tensor:
    """Clips the gradients, still scaled, by their global norm. If that is not finite, all of them become NaN, so that
    the scaler skips exactly the steps whose norm is not finite.

    Args:
        max_norm: 0 for no clipping.

    Returns:
        The norm without the scale, a scalar; NaN if it is not finite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = norm / scaler.scale(torch.ones_like(norm))
    norm = norm.masked_fill(~norm.isfinite(), float("nan"))
    # Clipping multiplies by a quotient of norms, so the scale does not matter.
    nn.utils.clip_grads_with_norm_(parameters, max_norm or float("inf"), norm)
    return norm


class Statistics:
    """Keeps a model's running statistics as they were after the last finite step, without waiting for the device."""

    def __init__(self, model: nn.Module):
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for value in training_buffers(model).values():
            by_dtype.setdefault(value.dtype, []).append(value)
        self._groups = list(by_dtype.values())
        self._kept = [self._flat(group) for group in self._groups]

    @staticmethod
    def _flat(group: list[Tensor]) -> Tensor:
        return torch.cat([value.flatten() for value in group])

    def keep_if(self, finite: Tensor) -> None:
        """Keeps the present ones if the step was `finite` (a bool scalar), else puts the kept ones back."""
        self._kept = [
            torch.where(finite, self._flat(group), kept) for group, kept in zip(self._groups, self._kept, strict=True)
        ]
        self.restore()

    def restore(self) -> None:
        """Puts the kept ones back."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            parts = kept.split([value.numel() for value in group])
            parts = [part.view_as(value) for part, value in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, parts)


@dataclass
class Step:
    """One optimizer step as the host remembers it until it looks at the device's numbers."""

    number: int  # in the epoch, from 0
    lr: float
    losses: list[Tensor]  # of its passes, scalars
    grad_norm: Tensor  # scalar, NaN if the step was skipped
    samples: list[Tensor]  # of its passes, (N,): indices into the training data

    @property
    def finite(self) -> Tensor:
        """Whether it was taken, a bool scalar on the device."""
        return self.grad_norm.isfinite()


class FiniteGuard:
    """Takes the optimizer steps of one epoch: loss check, clipping, loss scaling, and skipping what is not finite.

    A step that is skipped leaves no trace in weights, optimizer or running statistics. It is counted in `progress` and
    named in the log. Nothing waits for the device except `check`.
    """

    def __init__(self, config, state: TrainingState, logger: Logger):
        self.optimizer, self.scaler, self.amp = state.optimizer, state.scaler, state.amp
        self.progress, self.epoch, self.logger = state.progress, state.epoch, logger
        self.clip_mode, self.clip = config.TRAIN.CLIP_MODE, config.TRAIN.CLIP_GRAD
        self.most_in_row = config.TRAIN.MAX_SKIPPED_STEPS
        self._parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        self._adaptive: list[nn.Parameter] = []
        if self.clip_mode == "agc":
            head = {id(p) for module in classifiers(state.model) for p in module.parameters()}
            self._adaptive = [p for p in self._parameters if id(p) not in head]  # as in timm
        self._statistics = Statistics(state.model)
        self._losses: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._pending: list[Step] = []

    def backward(self, loss: Tensor, passes: int, samples: Tensor) -> None:
        """The backward pass of one of the `passes` of a step; `samples` (N,) are its indices, for messages."""
        self.scaler.scale(poison(loss) / passes).backward()
        self._losses.append(loss.detach())
        self._samples.append(samples)

    def step(self, number: int) -> Step:
        """The optimizer step number `number` of the epoch, from the gradients of the passes since the last one."""
        max_norm = self.clip if self.clip_mode == "norm" else 0.0
        grad_norm = clip_gradients(self._parameters, max_norm, self.scaler)
        self.scaler.unscale_(self.optimizer)
        if self.clip and self.clip_mode == "value":
            nn.utils.clip_grad_value_(self._parameters, self.clip)
        if self.clip and self.clip_mode == "agc":
            adaptive_clip_grad(self._adaptive, self.clip)
        self.scaler.step(self.optimizer)  # not if a gradient is not finite
        update_scaler(self.scaler, self.amp)
        self.optimizer.zero_grad(set_to_none=True)
        step = Step(number, learning_rate(self.optimizer), self._losses, grad_norm, self._samples)
        self._losses, self._samples = [], []
        self._statistics.keep_if(step.finite)
        self._pending.append(step)
        return step

    def abandon(self) -> None:
        """Undoes the passes of a step that will not be taken."""
        self._statistics.restore()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self) -> None:
        """Waits for the device and looks at the steps since the last call.

        Raises:
            NonFiniteError: on all processes alike, because they share the gradient.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        norms = torch.stack([step.grad_norm for step in steps]).tolist()
        for step, norm in zip(steps, norms, strict=True):
            if math.isfinite(norm):
                self.progress.skipped_in_row = 0
                continue
            self.progress.skipped += 1
            self.progress.skipped_in_row += 1
            self._report(step, norm)

    def _report(self, step: Step, norm: float) -> None:
        losses = [loss.item() for loss in step.losses]
        loss = next((value for value in losses if not math.isfinite(value)), losses[-1])
        where = f"epoch {self.epoch + 1} step {step.number + 1}"
        precision = str(self.amp or torch.float32).removeprefix("torch.")
        numbers = f"loss {loss}, gradient norm {norm}, lr {step.lr:.3e}, {precision}"
        samples = " ".join(str(i) for indices in step.samples for i in indices.tolist())
        if self.progress.skipped_in_row > self.most_in_row:
            raise NonFiniteError(
                f"{where}: {numbers}; it is step {self.progress.skipped_in_row} in a row that is not finite, accepted: "
                f"TRAIN.MAX_SKIPPED_STEPS {self.most_in_row}. Training stopped; none of these steps changed the "
                "weights, or the last checkpoint; a lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or --amp "
                f"off, may help. Samples of this process's batch: {samples}"
            )
        if self.progress.skipped > MOST_NAMED_STEPS:
            return
        last = self.progress.skipped == MOST_NAMED_STEPS
        more = "; further ones in this epoch are only counted" if last else ""
        if math.isfinite(loss):  # float16's loss scale was too high, or another process has met the loss
            self.logger.warning(f"{where} skipped: {numbers}{more}", extra=ALL_RANKS)
        else:
            self.logger.warning(f"{where} skipped: {numbers}; samples of the batch: {samples}{more}")
