"""MNIST and the data sets made like it, which come as IDX files: FashionMNIST, KMNIST, EMNIST."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from torchvision import datasets

from data.errors import DataError
from data.sources import ArraySource, Source
from runtime.distributed import World, main_process_first
from utils import printable, shorten

IDX_DATASETS = ("FashionMNIST", "MNIST", "KMNIST", "EMNIST")
# A header can claim to be followed by any number of bytes. The largest file of these data sets has 547 million.
MOST_IDX_BYTES = 2**30
# Two zeros, the type (8: unsigned bytes), the number of dimensions
IDX_MAGIC = {"images": bytes((0, 0, 8, 3)), "labels": bytes((0, 0, 8, 1))}
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


def idx_sources(config, world: World, train: bool, val: bool) -> dict[bool, Source]:
    """The splits asked for; True: training. Pixels, labels and class names are torchvision's.

    Files are read where they are: in DATA.DATA_PATH, or below it where torchvision puts them. If they are in neither,
    torchvision downloads them.

    Raises:
        DataError: files are missing and cannot be downloaded, damaged, or do not belong together.
    """
    splits = [is_train for is_train, wanted in ((True, train), (False, val)) if wanted]
    with main_process_first(world):
        found = _find_or_download(config, splits)
    name, split = config.DATA.DATASET, config.DATA.EMNIST_SPLIT
    dataset = getattr(datasets, name)
    classes = dataset.classes_split_dict[split] if name == "EMNIST" else dataset.classes
    title = f"{name} {split}" if name == "EMNIST" else name
    sources = {}
    for is_train in splits:
        images, labels = read_pair(*(found[file] for file in _file_names(config, is_train)), len(classes))
        sources[is_train] = ArraySource(images, labels, classes, f"{title} {'train' if is_train else 'test'}")
    return sources


def read_pair(images: Path, labels: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) and labels (N,), both uint8.

    Raises:
        DataError: a file cannot be read, or they do not belong together, or a label is `classes` or more.
    """
    pixels, targets = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(targets):
        raise DataError(
            f"{_show(images)} has {len(pixels)} images, but {_show(labels)} has {len(targets)} labels; "
            "accepted: one label per image"
        )
    if targets.max() >= classes:
        index = int(np.argmax(targets >= classes))
        raise DataError(f"{_show(labels)}: label {index} is {targets[index]}; accepted: 0 to {classes - 1}")
    return pixels, targets


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped if its name ends in .gz; read-only. The format is described at
    https://yann.lecun.com/exdb/mnist: four bytes that say type and number of dimensions, the sizes as big-endian 32-bit
    numbers, the content.

    Args:
        dimensions: 3 for images (N, H, W), 1 for labels (N,).

    Raises:
        DataError: it cannot be read, is no such file, or has another length than it says.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            shape = _read_header(path, file.read(4 * (1 + dimensions)), dimensions)
            size = math.prod(shape)
            content = file.read(size + 1)  # not all of it: a gzipped file can become a thousand times as long
    except gzip.BadGzipFile as error:
        raise DataError(
            f"{_show(path)}: not a gzip file, or damaged: {error}; without .gz it is read as it is"
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{_show(path)}: the gzip file is damaged or incomplete: {error}; get it again") from error
    except OSError as error:
        raise DataError(f"{_show(path)}: cannot be read: {error.strerror or error}") from error
    if len(content) != size:
        than = "more bytes than" if len(content) > size else f"{len(content)} bytes after its header instead of"
        raise DataError(f"{_show(path)}: has {than} the {size} that its header says; get it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_header(path: Path, header: bytes, dimensions: int) -> list[int]:
    """The sizes that a header says."""
    what, other = ("images", "labels") if dimensions == 3 else ("labels", "images")
    magic, expected, swapped = header[:4], IDX_MAGIC[what], IDX_MAGIC[other]
    if magic == swapped:
        raise DataError(f"{_show(path)}: holds {other}, not {what}; it looks swapped with the file of the {other}")
    if magic != expected:
        raise DataError(
            f"{_show(path)}: starts with the bytes {magic.hex(' ') or '(none)'}; accepted: {expected.hex(' ')}, an IDX "
            f"file of {what}"
        )
    if len(header) < 4 * (1 + dimensions):
        raise DataError(f"{_show(path)}: ends within its header; get it again")
    shape = np.frombuffer(header, ">u4", offset=4).tolist()
    if not 0 < math.prod(shape) <= MOST_IDX_BYTES:
        sizes = " x ".join(map(str, shape))
        raise DataError(f"{_show(path)}: its header says {sizes} bytes; accepted: 1 to {MOST_IDX_BYTES} in all")
    return shape


def _find_or_download(config, splits: list[bool]) -> dict[str, Path]:
    """Paths of the files of the `splits`, by their names without .gz."""
    name = config.DATA.DATASET
    if not config.DATA.DATA_PATH:
        raise DataError(f"DATA.DATA_PATH is empty; give --data-path, the folder with {name}, or to download it into")
    root = Path(config.DATA.DATA_PATH)
    raw = root / name / "raw"  # torchvision's layout
    wanted = [file for is_train in splits for file in _file_names(config, is_train)]
    for folder in (root, raw):
        if len(found := find_idx(folder, wanted)) == len(wanted):
            return found
    by_hand = f"put {', '.join(wanted)}, each with .gz or without, into {_show(root)} yourself"
    if name == "FashionMNIST":
        by_hand += f"; Debian's package dataset-fashion-mnist has them in {DEBIAN_FASHION_MNIST}"
    # In torchvision's own folder it would be a download that was interrupted, which goes on below.
    some = find_idx(root, [file for is_train in (True, False) for file in _file_names(config, is_train)])
    if some:
        missing = [file for file in wanted if file not in find_idx(root, wanted)]
        raise DataError(f"{_show(root)}: has {shorten(list(some))}, but lacks {shorten(missing)}; {by_hand}")
    # EMNIST's files are looked for split by split before a download, so the split to ask for is one that lacks some.
    is_train = splits[0] if len(find_idx(raw, _file_names(config, splits[0]))) < 2 else splits[-1]
    options = {"split": config.DATA.EMNIST_SPLIT} if name == "EMNIST" else {}
    found, reason = {}, f"torchvision takes {_show(root / name / 'processed')} for the data; move that folder away"
    try:
        getattr(datasets, name)(str(root), train=is_train, download=True, **options)
        found = find_idx(raw, wanted)
    except Exception as error:  # no network, no permission, no space; whatever reading an old version's files raises
        reason = " ".join(str(error).split())[:1000]
    if len(found) < len(wanted):
        raise DataError(
            f"{name} is not in {_show(root)} and cannot be downloaded into it ({printable(reason)}); {by_hand}"
        )
    return found


def _file_names(config, is_train: bool) -> tuple[str, str]:
    """Names of a split's images and labels, without .gz."""
    if config.DATA.DATASET == "EMNIST":
        prefix = f"emnist-{config.DATA.EMNIST_SPLIT}-{'train' if is_train else 'test'}"
    else:
        prefix = "train" if is_train else "t10k"
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def find_idx(folder: Path, names: list[str] | tuple[str, ...]) -> dict[str, Path]:
    """The IDX files that are in a folder, by their names without .gz."""
    paths = {name: (folder / name, folder / f"{name}.gz") for name in names}
    there = {name: [path for path in both if os.path.isfile(path)] for name, both in paths.items()}
    return {name: found[0] for name, found in there.items() if found}


def _show(path: Path) -> str:
    return printable(str(path))
