"""What detectors are given: batches of images of one size, with boxes.

As in `data.dataset`, what is drawn at random for an image depends on (seed, epoch, index) alone, and the order of the
batches on (seed, epoch).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from config import detection_sizes
from data.build import build_loader
from data.dataset import MOST_REPLACEMENTS, SourceDataset, random_state_kept
from data.decoding import build_decoder
from data.errors import DataError
from detection.coco import CocoSource
from detection.transforms import Augment, Marked, build_fit, mark, mosaic, sanitize
from runtime.distributed import World
from utils import seed_all

Target = dict[str, Tensor]


class DetectionBatch(NamedTuple):
    """Images of one size.

    `target` has for each of them: `boxes` (n, 4) float32, left, top, right, bottom in pixels of the image as it is
    here; `labels` (n,) int64; `iscrowd` (n,) bool; `area` (n,) float32, pixels of the object as it is here. Training
    has no crowds. In evaluation also `geometry` (4,) float32: scale_x, scale_y, offset_x, offset_y, by which pixels of
    the original become those of the image: here = original * scale + offset (see `to_original`).
    """

    image: Tensor  # (N, 3, H, W) uint8, RGB
    target: list[Target]
    index: Tensor  # (N,) int64, the images that were asked for
    readable: Tensor  # (N,) bool. False: the file of `index` could not be read


class BatchKey(NamedTuple):
    """What asks for a batch."""

    epoch: int
    size: tuple[int, int]  # height and width that its images are brought to
    indices: Sequence[int]


class DetectionDataset(SourceDataset):
    """Whole batches of a source, by the keys that the samplers below give.

    In training, an unreadable image is replaced by the next one in the list. In evaluation it comes as a black image.
    In both cases `readable` is False.
    """

    source: CocoSource

    def __init__(self, config, source: CocoSource, is_train: bool):
        self.source, self.is_train, self.seed = source, is_train, config.SEED
        self.fit = build_fit(config)
        self.augment = Augment(config, self.fit)
        self.mosaic = config.DETECTION.MOSAIC

    def __getitem__(self, key: BatchKey) -> DetectionBatch:
        items = [(self.training if self.is_train else self.evaluation)(index, key) for index in key.indices]
        images, targets, readable = zip(*items, strict=True)
        indices = torch.tensor(key.indices, dtype=torch.int64)
        return DetectionBatch(torch.stack(images), packed(targets), indices, torch.tensor(readable))

    def evaluation(self, index: int, key: BatchKey) -> tuple[Tensor, Target, bool]:
        """Image `index` as evaluation sees it: (3, H, W) uint8; its target; whether it can be read."""
        source = self.source
        size, target = source.size(index), key.size
        geometry = self.fit.geometry(size, target)
        boxes = torch.from_numpy(source.boxes(index)) * geometry[[0, 1, 0, 1]] + geometry[[2, 3, 2, 3]]
        truth = {
            "boxes": boxes,
            "labels": torch.from_numpy(source.labels(index)).long(),
            "iscrowd": torch.from_numpy(source.crowd(index)),
            "area": torch.from_numpy(source.areas(index)) * geometry[0] * geometry[1],
            "geometry": geometry,
        }
        marked = self._load(index)
        if marked is None:
            return torch.zeros(3, *target, dtype=torch.uint8), truth, False
        # By the size that the boxes are in: the file may be larger or smaller.
        placed = self.fit.place(marked, self.fit.inner(size, target), target)
        return placed.image.as_subclass(Tensor), truth, True

    def training(self, index: int, key: BatchKey) -> tuple[Tensor, Target, bool]:
        """The same, augmented."""
        candidates = [(index + i) % len(self) for i in range(min(MOST_REPLACEMENTS, len(self)))]
        for chosen in candidates:
            marked = self._load(chosen)
            if marked is not None:
                break
        else:
            raise DataError(
                f"{self.source.name(index)} and the {len(candidates) - 1} files after it cannot be read as images"
            )
        with random_state_kept():
            seed_all(self.seed, key.epoch, index, cuda=False)
            if self.mosaic and float(torch.rand(())) < self.mosaic:
                others = torch.randint(len(self), (3,)).tolist()
                parts = [marked, *(self._load(other) for other in others)]
                whole = [
                    None if part is None else self.augment.flipped(part)
                    for part in (parts[i] for i in torch.randperm(4).tolist())
                ]
                marked = sanitize(self.augment.colours(mosaic(whole, key.size, self.fit)))
            else:
                marked = self.augment(marked, key.size)
        boxes = marked.boxes.as_subclass(Tensor)
        target = {
            "boxes": boxes,
            "labels": marked.labels,
            "iscrowd": torch.zeros(len(boxes), dtype=torch.bool),
            "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        }
        return marked.image.as_subclass(Tensor), target, chosen == index

    def _load(self, index: int) -> Marked | None:
        """Image `index` without its crowds; None if it cannot be read."""
        try:
            image = self.source.load(index)
        except OSError:
            return None  # `UnreadableFiles` counts and names it, from DetectionBatch.readable
        single = ~self.source.crowd(index)
        boxes, labels = (torch.from_numpy(part(index)[single]) for part in (self.source.boxes, self.source.labels))
        return mark(image, boxes, labels.long(), self.source.size(index))


def packed(targets: Sequence[Target]) -> list[Target]:
    """The same, with one piece of memory for all tensors of a name. Loader processes share each piece as an open file,
    of which a process may have a thousand."""
    packed: list[Target] = [{} for _ in targets]
    for name in targets[0]:
        values = [target[name] for target in targets]
        for target, value in zip(packed, torch.cat(values).split(list(map(len, values))), strict=True):
            target[name] = value
    return packed


def to_original(boxes: Tensor, geometry: Tensor) -> Tensor:
    """Boxes (n, 4) in pixels of an image that a detector was given, in those of the original. Either may be on any
    device."""
    geometry = geometry.to(boxes)
    return (boxes - geometry[[2, 3, 2, 3]]) / geometry[[0, 1, 0, 1]]


def nearest_sizes(images: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """(N, len(sizes)), the positions of `sizes` for each image, that of the nearest aspect ratio first; of several, the
    one whose area is nearest to the image's.

    Args:
        images: (N, 2), height and width.
    """
    own, offered = np.log(np.asarray(images, float)), np.log(np.asarray(sizes, float))
    shape = np.abs((own[:, :1] - own[:, 1:]) - (offered[:, 0] - offered[:, 1]))
    area = np.abs(own.sum(axis=1, keepdims=True) - offered.sum(axis=1))
    return np.lexsort((area, shape.round(6)), axis=1)


def whole_batches(images: np.ndarray, sizes: Sequence[tuple[int, int]], batch: int) -> np.ndarray:
    """(N,), the position in `sizes` of the size for each image, of which none has fewer than `batch` images: from sizes
    with fewer, all go to the next nearest that has enough.

    Args:
        images: (N, 2), height and width, N at least `batch`.
    """
    nearest = nearest_sizes(images, sizes)
    open_sizes = np.ones(len(sizes), bool)
    while True:
        # Of each image, the first size in its order that is still open
        chosen = nearest[np.arange(len(images)), open_sizes[nearest].argmax(axis=1)]
        counts = np.bincount(chosen, minlength=len(sizes))
        small = np.flatnonzero(open_sizes & (counts < batch))
        if not len(small):
            return chosen
        open_sizes[small[np.argmin(counts[small])]] = False


class BucketSampler(Sampler[BatchKey]):
    """Training: batches of images of one size. Each epoch has a random order of all images of each size, cut into
    batches for all processes, and a random order of these. At each step, all processes have the same size. What does
    not fill a step is left out of the epoch, other images in each.

    Args:
        of_size: the images of each size, at least batch * world size or none.
        batch: images of a process and step.
    """

    def __init__(
        self,
        of_size: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.of_size, self.sizes, self.batch, self.seed = of_size, sizes, batch, seed
        self.rank, self.step = rank, batch * world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration is epoch `epoch`, without its first `start` images of this process, a whole number of
        batches."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of an epoch."""
        return sum(len(images) // self.step for images in self.of_size)

    def __iter__(self) -> Iterator[BatchKey]:
        draw = np.random.default_rng((self.seed, self.epoch))
        steps = []
        for size, images in zip(self.sizes, self.of_size, strict=True):
            count = len(images) // self.step
            order = draw.permutation(images)[: count * self.step]
            steps += [(size, part) for part in order.reshape(count, self.step)]
        first, own = self.start // self.batch, slice(self.rank * self.batch, (self.rank + 1) * self.batch)
        for position in draw.permutation(len(steps))[first:]:
            size, images = steps[position]
            yield BatchKey(self.epoch, size, images[own].tolist())


class BucketEvalSampler(Sampler[BatchKey]):
    """Evaluation: every image exactly once over all processes, in batches of one size of at most `batch`."""

    def __init__(
        self, of_size: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], batch: int, rank: int, world_size: int
    ):
        self.sizes, self.batch = sizes, batch
        # The remainders of the sizes go to different processes.
        starts = np.cumsum([0, *map(len, of_size)])
        self.of_size = [
            images[(rank - start) % world_size :: world_size]
            for start, images in zip(starts[:-1], of_size, strict=True)
        ]

    def __len__(self) -> int:
        return sum(-(-len(images) // self.batch) for images in self.of_size)

    def __iter__(self) -> Iterator[BatchKey]:
        for size, images in zip(self.sizes, self.of_size, strict=True):
            for start in range(0, len(images), self.batch):
                yield BatchKey(0, size, images[start : start + self.batch].tolist())


def build_train_loader(config, source: CocoSource, world: World) -> DataLoader:
    """Batches of DATA.BATCH_SIZE images for this process, as many for each.

    Raises:
        DataError: there are fewer images than one step takes.
    """
    sizes, step = detection_sizes(config), config.DATA.BATCH_SIZE * world.size
    if len(source) < step:
        raise DataError(
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}, but the training data has {len(source)} images for "
            f"{world.size} process{'es' * (world.size > 1)}; accepted: at most {len(source) // world.size}"
        )
    of_size = by_size(whole_batches(source.sizes(), sizes, step), len(sizes))
    sampler = BucketSampler(of_size, sizes, config.DATA.BATCH_SIZE, world.rank, world.size, config.SEED)
    return _loader(config, source, sampler, world, is_train=True)


def build_eval_loader(config, source: CocoSource, world: World) -> DataLoader:
    """Batches of at most DATA.BATCH_SIZE images that together hold every image once over all processes."""
    sizes = detection_sizes(config)
    of_size = by_size(nearest_sizes(source.sizes(), sizes)[:, 0], len(sizes))
    sampler = BucketEvalSampler(of_size, sizes, config.DATA.BATCH_SIZE, world.rank, world.size)
    return _loader(config, source, sampler, world, is_train=False)


def by_size(positions: np.ndarray, sizes: int) -> list[np.ndarray]:
    """The images of each of so many sizes, ascending.

    Args:
        positions: (N,), the position of each image's size.
    """
    return [np.flatnonzero(positions == size) for size in range(sizes)]


def _loader(config, source: CocoSource, sampler: Sampler, world: World, is_train: bool) -> DataLoader:
    source.decode_with(build_decoder(config))
    if config.DATA.CACHE_MODE == "part":
        raise DataError("DATA.CACHE_MODE is part; accepted for detection: no, full")
    if config.DATA.CACHE_MODE == "full":
        source.cache(range(len(source)))
    return build_loader(config, DetectionDataset(config, source, is_train), sampler, world, whole_batches=True)
