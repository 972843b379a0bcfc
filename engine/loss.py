"""What training makes small."""

from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from torch import Tensor, nn

from config import ConfigError


class BinaryCrossEntropy(TimmBinaryCrossEntropy):
    """timm's, with targets in float32 in mixed precision too."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits.float(), targets)


def build_criterion(config, soft_targets: bool) -> nn.Module:
    """The loss of `config.TRAIN.LOSS`, of logits (N, classes) and targets (N,), or (N, classes) if they are soft.

    Args:
        soft_targets: whether they are mixup's, which are smoothed already.
    """
    smoothing = 0.0 if soft_targets else config.MODEL.LABEL_SMOOTHING
    if config.TRAIN.LOSS == "bce":
        return BinaryCrossEntropy(smoothing, target_threshold=config.TRAIN.BCE_THRESHOLD or None)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def check_loss(config) -> None:
    """Raises ConfigError for a threshold that makes every class a right one; `MODEL.NUM_CLASSES` must be known."""
    threshold, wrong = config.TRAIN.BCE_THRESHOLD, config.MODEL.LABEL_SMOOTHING / config.MODEL.NUM_CLASSES
    if config.TRAIN.LOSS == "bce" and 0 < threshold < wrong:
        raise ConfigError(
            f"TRAIN.BCE_THRESHOLD is {threshold:g}, but label smoothing gives wrong classes a target of {wrong:g}, so "
            f"that all would be right; accepted: 0, or {wrong:g} or more"
        )
