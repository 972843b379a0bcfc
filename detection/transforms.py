"""Images with boxes: brought to one size, and augmented by torchvision's transforms.

All of them move pixels and boxes along the axes only, so that boxes stay boxes. What is random is drawn from PyTorch's
generator, which the data set seeds for each image.
"""

import math
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data.transforms import whole_image_interpolation

# What is beside an image is 0 once it is normalised.
FILL = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]
# A smaller image is not cropped, and a box that is smaller after augmentation is left out.
SMALLEST_CROP, SMALLEST_BOX = 16, 1.0  # pixels


class Marked(NamedTuple):
    """An image with its boxes."""

    image: Tensor  # (3, H, W) uint8, a tv_tensors.Image
    boxes: Tensor  # (n, 4) float32, left, top, right, bottom in its pixels, a tv_tensors.BoundingBoxes
    labels: Tensor  # (n,) int64


def mark(image: Image.Image, boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Marked:
    """
    Args:
        image: RGB.
        boxes: (n, 4) in pixels of an image of (height, width) `size`, which may be larger or smaller than this one.
    """
    scale = torch.tensor([image.width / size[1], image.height / size[0]] * 2, dtype=torch.float32)
    pixels = tv_tensors.Image(F.pil_to_tensor(image))
    return Marked(pixels, _boxes(boxes * scale, (image.height, image.width)), labels)


def _boxes(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)


class Fit:
    """Brings images to a size.

    Args:
        keeps_ratio: whether to keep the aspect ratio, and to fill what is left at the right or at the bottom.
    """

    def __init__(self, keeps_ratio: bool, interpolation: InterpolationMode):
        self.keeps_ratio, self.interpolation = keeps_ratio, interpolation

    def inner(self, size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of `size` gets, within the `target` size."""
        if not self.keeps_ratio:
            return target
        scale = min(side / own for side, own in zip(target, size, strict=True))
        height, width = (min(max(round(own * scale), 1), side) for side, own in zip(target, size, strict=True))
        return height, width

    def __call__(self, marked: Marked, target: tuple[int, int]) -> Marked:
        size = F.get_size(marked.image)
        return self.place(marked, self.inner((size[0], size[1]), target), target)

    def place(
        self, marked: Marked, inner: tuple[int, int], target: tuple[int, int], offset: tuple[int, int] = (0, 0)
    ) -> Marked:
        """The image resized to (height, width) `inner`, on a canvas of size `target`.

        Args:
            offset: of its top and left on the canvas; less than 0, and it is cut off.
        """
        image, boxes = (self._resize(part, inner) for part in marked[:2])
        top, left = offset
        # What is cut off first, so that nothing larger than the canvas is made.
        cut = [max(-top, 0), max(-left, 0)]
        height, width = (min(side - c, whole) for side, c, whole in zip(inner, cut, target, strict=True))
        if (height, width) != inner:
            image, boxes = (F.crop(part, *cut, height, width) for part in (image, boxes))
        top, left = max(top, 0), max(left, 0)
        if (height, width) != target:
            borders = [left, top, target[1] - left - width, target[0] - top - height]
            image, boxes = (F.pad(part, borders, fill=FILL) for part in (image, boxes))
        return Marked(image, boxes, marked.labels)

    def _resize(self, part: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(F.get_size(part)) == size:
            return part
        return F.resize(part, list(size), self.interpolation, antialias=True)

    def geometry(self, size: tuple[int, int], target: tuple[int, int]) -> Tensor:
        """(4,) float32: scale_x, scale_y, offset_x, offset_y, by which pixels of an image of `size` become those of its
        place in the `target`: there = here * scale + offset."""
        height, width = self.inner(size, target)
        return torch.tensor([width / size[1], height / size[0], 0, 0], dtype=torch.float32)


class Augment:
    """Training: an image at random, brought to a size. The keys of DETECTION say how often and how much.

    Boxes of which less than a pixel is left are left out.
    """

    def __init__(self, config, fit: Fit):
        keys, self.fit = config.DETECTION, fit
        self.flip, self.crop, self.jitter = keys.FLIP, keys.CROP, tuple(keys.SCALE_JITTER)
        self.iou_crop = v2.RandomIoUCrop()
        self.distort = v2.RandomPhotometricDistort(p=0.5)  # of each of its parts
        self.photometric = keys.PHOTOMETRIC

    def __call__(self, marked: Marked, target: tuple[int, int]) -> Marked:
        if _happens(self.crop) and len(marked.boxes) and min(F.get_size(marked.image)) >= SMALLEST_CROP:
            marked = sanitize(Marked(*self.iou_crop(marked.image, marked.boxes), marked.labels))
        return sanitize(self.colours(self.flipped(self._jitter(marked, target))))

    def flipped(self, marked: Marked) -> Marked:
        if not _happens(self.flip):
            return marked
        return Marked(*map(F.horizontal_flip, marked[:2]), marked.labels)

    def colours(self, marked: Marked) -> Marked:
        if not _happens(self.photometric):
            return marked
        return marked._replace(image=self.distort(marked.image))

    def _jitter(self, marked: Marked, target: tuple[int, int]) -> Marked:
        """The image scaled by a random factor, at a random place, on a canvas of the target size."""
        low, high = map(math.log, self.jitter)
        factor = math.exp(low + (high - low) * float(torch.rand(())))
        height, width = F.get_size(marked.image)
        inner = tuple(max(round(side * factor), 1) for side in self.fit.inner((height, width), target))
        offset = [_between(0, whole - side) for side, whole in zip(inner, target, strict=True)]
        return self.fit.place(marked, inner, target, offset)


def mosaic(parts: list[Marked | None], target: tuple[int, int], fit: Fit) -> Marked:
    """Four images in one, each brought to a rectangle of it, which meet at a random point. None leaves its rectangle
    empty."""
    height, width = target
    # Not near the border, where images would become too small.
    down, right = (_between(round(0.3 * side), round(0.7 * side)) for side in target)
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    boxes, labels = [torch.empty(0, 4)], [torch.empty(0, dtype=torch.int64)]
    for part, (top, left) in zip(parts, ((0, 0), (0, right), (down, 0), (down, right)), strict=True):
        size = (height - down if top else down), (width - right if left else right)
        if part is None or 0 in size:
            continue
        placed = fit(part, size)
        canvas[:, top : top + size[0], left : left + size[1]] = placed.image
        boxes.append(placed.boxes.as_subclass(Tensor) + torch.tensor([left, top, left, top]))
        labels.append(part.labels)
    return Marked(tv_tensors.Image(canvas), _boxes(torch.cat(boxes), target), torch.cat(labels))


def sanitize(marked: Marked) -> Marked:
    """Without the boxes that are empty or smaller than SMALLEST_BOX pixels."""
    if not len(marked.boxes):
        return marked
    boxes = F.clamp_bounding_boxes(marked.boxes)
    sides = boxes.as_subclass(Tensor)[:, 2:] - boxes.as_subclass(Tensor)[:, :2]
    keep = (sides >= SMALLEST_BOX).all(dim=1)
    return Marked(marked.image, tv_tensors.wrap(boxes[keep], like=marked.boxes), marked.labels[keep])


def build_fit(config) -> Fit:
    """What DETECTION.FIT and DATA.INTERPOLATION say."""
    return Fit(config.DETECTION.FIT == "pad", str_to_interp_mode(whole_image_interpolation(config)))


def _happens(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def _between(low: int, high: int) -> int:
    """A random whole number between two, both included, in either order."""
    low, high = min(low, high), max(low, high)
    return int(torch.randint(low, high + 1, ()))
