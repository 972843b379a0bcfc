"""The detector that a config describes: one of a library's, on a backbone of ours."""

from pathlib import Path

from models.build import ModelError

from .backbone import build_backbone, load_classifier
from .detector import Detector
from .torchvision_models import BACKGROUND_CLASSES, TorchvisionDetector


def build_detector(config, num_classes: int) -> Detector:
    """The detector `DETECTION.DETECTOR` on the network of `config.MODEL`, on the CPU, with new weights.

    Args:
        num_classes: without a background.

    Raises:
        ModelError: it cannot be built from these values; the message names them.
        UserError: its library is not installed.
    """
    name = config.DETECTION.DETECTOR
    backbone = build_backbone(config)
    if name in BACKGROUND_CLASSES:
        return TorchvisionDetector(backbone, name, config.DETECTION, num_classes)
    from .transformers_models import TransformersDetector  # takes seconds, and is an extra

    try:
        return TransformersDetector(backbone, name, config.DETECTION, num_classes)
    except ValueError as error:
        raise ModelError(f"the detector of the config cannot be built: {error}") from error


def load_backbone(detector: Detector, path: str | Path, config, ema: bool | None = None) -> list[str]:
    """Starts the detector's backbone from a classifier's checkpoint; see `backbone.load_classifier`."""
    return load_classifier(detector.backbone, path, config, ema)
