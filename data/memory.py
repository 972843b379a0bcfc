"""Small images in memory, transformed a batch at a time: decoding, resizing and a call per image would take longer than
a small model's training step."""

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import Resize

from config import image_size
from data.dataset import Key, Sample, SourceDataset
from data.sources import Source
from data.transforms import SMALL_IMAGE, draws_per_image, largest_shift, whole_image_interpolation


def suits_batches(config, source: Source, is_train: bool) -> bool:
    """Whether `InMemoryDataset` gives what `build_transform` would: the images are in memory, IMG_SIZE is at most 32,
    and training draws nothing for an image but shift and flip."""
    small = max(image_size(config)) <= SMALL_IMAGE
    return small and source.in_memory and not (is_train and draws_per_image(config))


class InMemoryDataset(SourceDataset):
    """All images of a source, resized once, as one tensor. Gives whole batches: `__getitems__` is what PyTorch's loader
    calls if a data set has it.

    In training, images are shifted by up to AUG.SHIFT of their size, with black at the border, and flipped, as in
    `build_transform`. What is drawn for a sample depends on (seed, epoch, index) alone.

    Attributes:
        images: (N, 1 or 3, H, W) uint8.
    """

    def __init__(self, config, source: Source, is_train: bool):
        self.source, self.is_train = source, is_train
        self.seed, self.hflip, self.most = config.SEED, config.AUG.HFLIP, largest_shift(config)
        self.images = resize(source.images(), image_size(config), whole_image_interpolation(config))
        self.targets = torch.tensor(source.targets, dtype=torch.int64)
        self._drawn_for = -1  # epoch

    def __getitem__(self, key: Key) -> Sample:
        return Sample(*(values[0] for values in self.__getitems__([key])))

    def __getitems__(self, keys: list[Key]) -> Sample:
        """A batch of samples with these keys, all of one epoch."""
        indices = torch.tensor([key[1] for key in keys])
        images = self.images[indices]
        if self.is_train:
            images = self._augment(images, keys)
        images = images.expand(-1, 3, -1, -1).contiguous()
        return Sample(images, self.targets[indices], indices, torch.ones(len(keys), dtype=torch.bool))

    def _draw(self, draw: np.random.Generator, count: int) -> tuple[list[Tensor], Tensor]:
        """Shifts, down and right, and flips of so many samples."""
        shifts = [torch.from_numpy(draw.integers(-m, m, count, endpoint=True)) for m in self.most]
        return shifts, torch.from_numpy(draw.random(count) < self.hflip)

    def _augment(self, images: Tensor, keys: list[Key]) -> Tensor:
        (height, width), most, epoch = images.shape[-2:], self.most, keys[0][0]
        if self._drawn_for != epoch:
            # The spawn key keeps this apart from the order of the samples, which is drawn from (seed, epoch) too.
            draw = np.random.default_rng(np.random.SeedSequence((self.seed, epoch), spawn_key=(1,)))
            self._shifts, self._flips = self._draw(draw, len(self))
            self._drawn_for = epoch
        indices = torch.tensor([key[1] for key in keys])
        (down, right), flip = (shift[indices] for shift in self._shifts), self._flips[indices]
        for position, key in enumerate(keys):
            if len(key) > 2:  # the sample comes again
                draw = np.random.default_rng(np.random.SeedSequence((self.seed, *key), spawn_key=(1,)))
                (down[position], right[position]), flip[position] = self._draw(draw, 1)
        rows = torch.arange(height) + down[:, None]  # (N, H), of the padded image less its border
        columns = torch.arange(width) + right[:, None]
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        padded = torch.nn.functional.pad(images, (most[1], most[1], most[0], most[0]))
        first = torch.arange(len(images))[:, None, None]
        # Indexed as (N, H, W, C), so that the channels stay together.
        moved = padded.permute(0, 2, 3, 1)[first, (rows + most[0])[:, :, None], (columns + most[1])[:, None, :]]
        return moved.permute(0, 3, 1, 2)


def resize(images: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """Images (N, H, W) or (N, H, W, 3) as (N, 1 or 3, *size), by Pillow, as the other data sets."""
    method = Resize(size, interpolation=str_to_interp_mode(interpolation))
    resized = np.empty((len(images), *size, *images.shape[3:]), np.uint8)
    for index, image in enumerate(images):
        resized[index] = image if image.shape[:2] == size else method(Image.fromarray(image))
    tensor = torch.from_numpy(resized)
    return tensor[:, None] if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2)


def collated(batch: Sample) -> Sample:
    """The batch itself: what `InMemoryDataset`, and any data set of whole batches, gives is one already."""
    return batch
