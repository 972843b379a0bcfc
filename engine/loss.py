"""The loss of training: cross-entropy, smoothed and weighted by class, or binary cross-entropy."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from torch import Tensor, nn

from config import ConfigError
from data.sources import Source
from utils import UserError, printable, shorten

Criterion = Callable[[Tensor, Tensor], Tensor]


def build_criterion(config, source: Callable[[], Source], soft: bool, device: torch.device) -> Criterion:
    """The loss of logits (N, classes) and labels (N,), or soft targets (N, classes), as a scalar.

    Args:
        source: gives the training data; asked for with TRAIN.CLASS_WEIGHTS only.
        soft: whether targets are mixup's, which are smoothed already.

    Raises:
        UserError: TRAIN.CLASS_WEIGHTS are not as many as the classes.
    """
    smoothing = config.MODEL.LABEL_SMOOTHING
    if config.TRAIN.LOSS == "bce":
        return BinaryCrossEntropy(0.0 if soft else smoothing, target_threshold=config.TRAIN.BCE_THRESHOLD or None)
    if config.TRAIN.CLASS_WEIGHTS == "none":
        return nn.CrossEntropyLoss(label_smoothing=0.0 if soft else smoothing)
    weights = torch.tensor(class_weights(config.TRAIN.CLASS_WEIGHTS, source()), dtype=torch.float32, device=device)
    return WeightedCrossEntropy(weights, smoothing)


def check_loss(config) -> None:
    """Raises ConfigError for a threshold that makes every class a right one; `MODEL.NUM_CLASSES` must be known."""
    threshold, wrong = config.TRAIN.BCE_THRESHOLD, config.MODEL.LABEL_SMOOTHING / config.MODEL.NUM_CLASSES
    if config.TRAIN.LOSS == "bce" and 0 < threshold < wrong:
        raise ConfigError(
            f"TRAIN.BCE_THRESHOLD is {threshold:g}, but label smoothing gives wrong classes a target of {wrong:g}, so "
            f"that all would be right; accepted: 0, or {wrong:g} or more"
        )


class BinaryCrossEntropy(TimmBinaryCrossEntropy):
    """timm's, with targets in float32 in mixed precision too."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.float(), targets)


class WeightedCrossEntropy(nn.Module):
    """The mean over the images of the smoothed cross-entropy times the weight of the image's class. An image that is
    mixed of two counts as their parts, each with its weight.

    PyTorch's own has two other rules. It weights each class of a smoothed target: where one class has a hundred times
    the weight of another, smoothing alone would teach the rare one. And it divides by the weights of the batch, unless
    targets are soft: the mean over processes, or over the passes of a step, would not be that of one large batch.

    Args:
        weights: (classes,).
        smoothing: of labels here; of soft targets, what they have been smoothed by.
    """

    def __init__(self, weights: Tensor, smoothing: float):
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, classes), targets (N,) or soft ones (N, classes)."""
        log_p = logits.float().log_softmax(dim=1)
        if targets.ndim == 1:
            parts = F.one_hot(targets, logits.shape[1]).to(log_p.dtype)
        else:
            parts = (targets - self.smoothing / logits.shape[1]) / (1 - self.smoothing)
        weighted = parts * self.weights
        own, even = -(weighted * log_p).sum(dim=1), -log_p.mean(dim=1)
        return ((1 - self.smoothing) * own + self.smoothing * weighted.sum(dim=1) * even).mean()


def class_weights(choice: str, source: Source) -> np.ndarray:
    """The weight of each class, (classes,), such that their mean over the training images is 1.

    Args:
        choice: `TRAIN.CLASS_WEIGHTS`, not "none".

    Raises:
        UserError: a list of another length than the classes.
    """
    counts = np.bincount(source.targets, minlength=len(source.classes))
    if choice == "balanced":
        weights = 1 / np.maximum(counts, 1)  # a class without images needs none
    else:
        weights = np.array([float(weight) for weight in choice.split(",")])
        if len(weights) != len(counts):
            names = shorten([printable(name) for name in source.classes])
            raise UserError(
                f"TRAIN.CLASS_WEIGHTS has {len(weights)} numbers, but the data has {len(counts)} classes ({names}); "
                "accepted: a number for each"
            )
    return weights * counts.sum() / (weights * counts).sum()
