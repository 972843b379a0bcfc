"""Images with boxes drawn on them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from utils import printable

FOUND_COLOR, TRUE_COLOR = "red", "lime"
# Less likely boxes would cover the picture.
SHOWN_SCORE = 0.3


def draw(image: Tensor, objects: dict[str, Tensor], classes: Sequence[str], color: str) -> Tensor:
    """An image (3, H, W), 0 to 1, with boxes and the names of their classes, in a new tensor.

    Args:
        objects: boxes (n, 4) in pixels of the image, labels (n,), and perhaps scores (n,): then those from SHOWN_SCORE
            on, with their scores.
    """
    boxes, labels, scores = objects["boxes"], objects["labels"], objects.get("scores")
    if scores is not None:
        shown = scores >= SHOWN_SCORE
        boxes, labels, scores = boxes[shown], labels[shown], scores[shown]
    # Boxes may have been augmented beyond drawing: reversed corners are an error there.
    good = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
    if not good.any():
        return image.clone()
    names = [printable(classes[label]) for label in labels[good].tolist()]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores[good].tolist(), strict=True)]
    pixels = (image * 255).round().to(torch.uint8)
    return draw_bounding_boxes(pixels, boxes[good], names, colors=color).float() / 255
