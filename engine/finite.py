"""Losses and gradients that are no numbers: such steps are skipped, counted and named, and end a run if they go on."""

import math
from dataclasses import dataclass
from logging import Logger

import torch
from torch import Tensor, nn

from logger import ALL_RANKS
from utils import UserError

MOST_NAMED_STEPS = 20  # skipped steps named per epoch; all are counted


class NonFiniteError(UserError):
    """Too many steps in a row were skipped."""


def build_scaler(amp: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for float16. For other precisions a scale that is always 1, because a GradScaler also skips steps
    with a non-finite gradient on the device, where nothing has to wait for the host (see `update_scaler`)."""
    if amp == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0)


def update_scaler(scaler: torch.amp.GradScaler, amp: torch.dtype | None) -> None:
    """Next step's scale."""
    scaler.update(None if amp == torch.float16 else 1.0)


def poison(loss: Tensor) -> Tensor:
    """The loss, unchanged in value and gradient if it is finite; otherwise with a gradient of NaN. Averaging gradients
    over processes then tells all of them, also where only one has met the loss."""
    return loss * (1 + 0 * loss.detach())


def training_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What forward passes change (running statistics): the entries of the state dict that are no parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def clip_gradients(parameters: list[nn.Parameter], max_norm: float, scaler: torch.amp.GradScaler) -> Tensor:
    """Clips the gradients, still scaled, by their global norm, and makes all of them NaN if that is not finite: so what
    the scaler skips is what the norm says.

    Args:
        max_norm: 0 for no clipping.

    Returns:
        The norm without the scale, a scalar; NaN if it is not finite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    norm = norm / scaler.scale(torch.ones_like(norm))
    norm = norm.masked_fill(~norm.isfinite(), float("nan"))
    # Clipping multiplies by a quotient of norms, whatever the scale.
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
        """Keeps those of now if the step was `finite` (a bool scalar), else puts the kept ones back."""
        self._kept = [
            torch.where(finite, self._flat(group), kept) for group, kept in zip(self._groups, self._kept, strict=True)
        ]
        self.restore()

    def restore(self) -> None:
        for group, kept in zip(self._groups, self._kept, strict=True):
            parts = kept.split([value.numel() for value in group])
            parts = [part.view_as(value) for part, value in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, parts)


@dataclass
class Step:
    """One optimizer step as the host remembers it until the device's numbers are asked for."""

    number: int  # in the epoch, from 0
    lr: float
    losses: list[Tensor]  # of its passes, scalars
    grad_norm: Tensor  # scalar, NaN if the step was skipped
    samples: list[Tensor]  # of its passes, (N,): indices into the training data


class FiniteGuard:
    """Counts the steps that were not finite, over one epoch, in `state.progress`; names them, and ends a run in which
    too many follow each other."""

    def __init__(self, config, state, logger: Logger):
        self.progress, self.epoch, self.logger = state.progress, state.epoch, logger
        self.most_in_row = config.TRAIN.MAX_SKIPPED_STEPS
        self.precision = str(state.amp or torch.float32).removeprefix("torch.")
        self._pending: list[Step] = []

    def note(self, step: Step) -> None:
        self._pending.append(step)

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
            self._tell(step, norm)

    def _tell(self, step: Step, norm: float) -> None:
        losses = [loss.item() for loss in step.losses]
        loss = next((value for value in losses if not math.isfinite(value)), losses[-1])
        where = f"epoch {self.epoch + 1} step {step.number + 1}"
        numbers = f"loss {loss}, gradient norm {norm}, lr {step.lr:.3e}, {self.precision}"
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
