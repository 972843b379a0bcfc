"""The data set that the loaders read: a source with a transform, and samplers that say which sample comes when.

What is drawn at random for a sample depends on (seed, epoch, index) alone, and the order of the samples on
(seed, epoch): neither on the number of loader processes nor on what ran before.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.arrays import by_class
from data.errors import DataError, UnreadableImage
from data.sources import Source, class_names
from utils import seed_all

# Files tried in place of an unreadable one. If so many in a row cannot be read, the data set is broken.
MOST_REPLACEMENTS = 32

# What asks for a sample: (epoch, index), and, if it comes again in the same epoch, how often it came before: what is
# drawn at random for it is then another draw.
Key = tuple[int, int] | tuple[int, int, int]


class Sample(NamedTuple):
    """One item, and, collated, one batch of them (every field then has a leading dimension N)."""

    image: Tensor  # (3, H, W) uint8, RGB
    target: int
    index: int  # the sample that was asked for
    readable: bool  # False: the file of `index` could not be read


class SourceDataset(Dataset):
    """The samples of a source, for training or evaluation."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> list[str]:
        """Names of the classes in label order, printable; empty if the data has none."""
        return class_names(self.source)

    def name(self, index: int) -> str:
        """What a person would look for to find sample `index`: its path."""
        return self.source.name(index)

    def reason(self, index: int) -> str:
        """The name of a sample that could not be read, and why, by trying again."""
        try:
            self.source.load(index)
        except UnreadableImage as error:
            return str(error)  # it begins with the name
        except OSError as error:
            return f"{self.name(index)}: {error.strerror or error}"
        return f"{self.name(index)}: it can be read now"


class ClassificationDataset(SourceDataset):
    """Samples of a source, transformed.

    In training, an unreadable file is replaced by the next one in the list. In evaluation it comes as a black image,
    which must not be counted as correct. In both cases `readable` is False.

    Items are keyed by what the samplers below give.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Tensor],
        image_size: tuple[int, int],
        seed: int = 0,
        is_train: bool = False,
    ):
        self.source = source
        self.transform = transform
        self.image_size = image_size
        self.seed = seed
        self.is_train = is_train

    def __getitem__(self, key: Key) -> Sample:
        _, index = key[:2]
        if not self.is_train:
            image = self._load(index)
            readable = image is not None
            pixels = self.view(image, index) if readable else torch.zeros(3, *self.image_size, dtype=torch.uint8)
            return Sample(pixels, self._target(index), index, readable)

        candidates = [(index + i) % len(self) for i in range(min(MOST_REPLACEMENTS, len(self)))]
        for chosen in candidates:
            image = self._load(chosen)
            if image is not None:
                break
        else:
            raise DataError(
                f"{self.source.name(index)} and the {len(candidates) - 1} files after it cannot be read as images"
            )
        with random_state_kept():
            seed_all(self.seed, *key, cuda=False)
            image = self.transform(image)
        return Sample(image, self._target(chosen), index, chosen == index)

    def view(self, image: Image.Image, index: int) -> Tensor:
        """Sample `index` as evaluation sees it, (3, H, W) uint8. Subclasses may change it."""
        return self.transform(image)

    def _target(self, index: int) -> int:
        return int(self.source.targets[index])

    def _load(self, index: int) -> Image.Image | None:
        try:
            return self.source.load(index)
        except OSError:
            return None  # `UnreadableFiles` counts and names it, from Sample.readable


class random_state_kept:
    """Restores the generators of Python, NumPy and PyTorch at the end: without loader processes, samples are
    transformed between training steps, which draw from the same generators."""

    def __enter__(self) -> None:
        self.state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def __exit__(self, *exception) -> None:
        random.setstate(self.state[0])
        np.random.set_state(self.state[1])
        torch.set_rng_state(self.state[2])


class TrainSampler(Sampler):
    """A random order of all samples in each epoch, dealt to the processes. Each gets the same number; the remainder is
    left out of the epoch.

    Args:
        sharded: each process draws from samples rank, rank + size, ... only, which it can keep in memory.
    """

    def __init__(self, length: int, rank: int, size: int, seed: int, sharded: bool = False):
        self.length, self.rank, self.size, self.seed, self.sharded = length, rank, size, seed, sharded
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration is epoch `epoch`, without its first `start` samples of this process."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length // self.size

    def __iter__(self) -> Iterator[Key]:
        if self.sharded:
            shard = np.arange(self.rank, self.length, self.size)
            order = np.random.default_rng((self.seed, self.epoch, self.rank)).permutation(shard)
        else:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)[self.rank :: self.size]
        return keys(self.epoch, order[self.start : len(self)])


class BalancedSampler(TrainSampler):
    """As many samples of each class in each epoch, as far as their number divides, in random order. Of a class with
    more samples than that, a random part comes; of one with fewer, all come as often as each other (once more or less).

    Args:
        targets: (N,), the label of each sample.
    """

    def __init__(self, targets: np.ndarray, rank: int, size: int, seed: int, sharded: bool = False):
        super().__init__(len(targets), rank, size, seed, sharded)
        self.targets = targets

    def __iter__(self) -> Iterator[Key]:
        step = slice(None)
        if self.sharded:
            shard, draw = np.arange(self.rank, self.length, self.size), (self.seed, self.epoch, self.rank)
            order, repeats = self._draw(shard, np.random.default_rng(draw))
        else:
            order, repeats = self._draw(np.arange(self.length), np.random.default_rng((self.seed, self.epoch)))
            step = slice(self.rank, None, self.size)
        order, repeats = (values[step][self.start : len(self)] for values in (order, repeats))
        return keys(self.epoch, order, repeats)

    def _draw(self, samples: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As many of the `samples` as there are, balanced, and how often each has come before, in a random order of
        first and later comings: both (N,)."""
        labels, positions = np.unique(self.targets[samples], return_inverse=True)
        of_class = by_class(positions, len(labels))
        quotas = np.full(len(labels), len(samples) // len(labels))
        quotas[draw.permutation(len(labels))[: len(samples) % len(labels)]] += 1
        order, repeats = [], []
        for members, quota in zip(of_class, quotas, strict=True):
            rounds = -(-quota // len(members))
            turns = [draw.permutation(members) for _ in range(rounds)]
            order.append(np.concatenate(turns)[:quota])
            repeats.append(np.repeat(np.arange(rounds), len(members))[:quota])
        mixed = draw.permutation(len(samples))
        return samples[np.concatenate(order)[mixed]], np.concatenate(repeats)[mixed]


class EvalSampler(Sampler):
    """Every sample exactly once over all processes, whatever the remainder: process r gets r, r + size, ..."""

    def __init__(self, length: int, rank: int, size: int):
        self.indices = range(rank, length, size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


def keys(epoch: int, indices: np.ndarray, repeats: np.ndarray | None = None) -> Iterator[Key]:
    """The key of each of the indices, a few of them in memory at a time."""
    for start in range(0, len(indices), 1024):
        part = slice(start, start + 1024)
        if repeats is None:
            yield from ((epoch, index) for index in indices[part].tolist())
        else:
            pairs = zip(indices[part].tolist(), repeats[part].tolist(), strict=True)
            yield from ((epoch, index, repeat) if repeat else (epoch, index) for index, repeat in pairs)
