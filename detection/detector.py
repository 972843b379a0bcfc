"""One interface for the detectors of several libraries."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from .backbone import BucketedBackbone

Target = dict[str, Tensor]

# How the names of a backbone's parameters begin, in a detector (see `BucketedBackbone`)
BODIES = r"backbone\.(?:body\.model|sized\.\d+)\."


class HandedOver(nn.Module):
    """In place of a library's backbone: the maps that `Detector` has computed, once. So the backbone can be computed in
    mixed precision and what follows in float32."""

    maps: list[Tensor] | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, self.maps = self.maps, None
        return maps


class Detector(nn.Module, ABC):
    """A detector of a library behind one interface.

    In training mode it takes images and their targets, and gives losses by name; their sum is the loss, and the names
    are the same in each step. In evaluation mode it takes images, and gives what it finds in each.

    Args:
        backbone: gives the maps, which `given` hands over to the library's detector.
        has_unused_parameters: of that detector.

    Attributes:
        has_unused_parameters: whether a step can leave parameters without gradients, which DistributedDataParallel must
            know: those for images of another size, or for boxes where a batch has none.

    Shape: images (N, 3, H, W), normalised, of one of the backbone's sizes. Targets: for each image `boxes` (n, 4),
    which are left, top, right and bottom in pixels of the image, `labels` (n,) from 0, and perhaps `iscrowd` (n,). What
    is found: for each image `boxes` (n, 4), `scores` (n,), best first, and `labels` (n,).
    """

    def __init__(self, backbone: BucketedBackbone, has_unused_parameters: bool = False):
        super().__init__()
        self.backbone = backbone
        self.given = HandedOver()
        self.has_unused_parameters = has_unused_parameters or len(backbone.sized) > 0

    def forward(self, images: Tensor, targets: Sequence[Target] | None = None) -> dict[str, Tensor] | list[Target]:
        self.given.maps = self.backbone(images)
        if not self.training:
            return self.find(images)
        return self.losses(images, [learnable(target) for target in targets])

    @abstractmethod
    def losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Losses by name."""

    @abstractmethod
    def find(self, images: Tensor) -> list[Target]:
        """What it finds in each image."""

    # What the training scripts ask a network for (timm's conventions)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """What is new for each task: all but the backbone. TRAIN.FREEZE backbone leaves it."""
        return tuple(module for name, module in self.named_children() if name != "backbone")

    def no_weight_decay(self) -> set[str]:
        """Of the backbone, what it says itself."""
        return self._said_by_the_backbone("no_weight_decay")

    def weight_decay_vectors(self) -> set[str]:
        """Of the backbone, what it says itself."""
        return self._said_by_the_backbone("weight_decay_vectors")

    def _said_by_the_backbone(self, method: str) -> set[str]:
        names = getattr(self.backbone.body.model, method, set)()
        return {f"backbone.body.model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict:
        """The backbone's layers, for all sizes of images. What is not among them comes after the last."""
        found = self.backbone.body.model.group_matcher(coarse=coarse)
        return {
            layer: in_bodies(pattern)
            if isinstance(pattern, str)
            else [(in_bodies(inner), order) for inner, order in pattern or ()]
            for layer, pattern in found.items()
        }

    @property
    def compiled_part(self) -> nn.Module:
        """The backbone. The rest depends on how many boxes there are."""
        return self.backbone


def in_bodies(pattern: str) -> str:
    """A regular expression for the beginning of names in a backbone, as one for names in a detector."""
    without_start = re.sub(r"(^|\|)\^", r"\1", pattern)  # of each alternative
    return f"^{BODIES}(?:{without_start})"


def learnable(target: Target) -> Target:
    """A target without crowds, which no detector learns from, and without boxes of no area, which a crop may leave."""
    boxes = target["boxes"]
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if "iscrowd" in target:
        kept &= ~target["iscrowd"].bool()
    return {"boxes": boxes[kept], "labels": target["labels"][kept]}
