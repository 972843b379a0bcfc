"""Where labelled images come from: folders, zip files, arrays. A source lists samples and loads one as a PIL image."""

import contextlib
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.arrays import Strings
from data.decoding import Decoder
from data.errors import DataError, UnreadableImage
from data.listing import list_folder
from utils import printable, shorten

# A file or zip member that is larger, or claims to be, is not read into memory.
MOST_FILE_BYTES = 2**28
# The largest label in a zip file's listing decides how many classes there are.
MOST_CLASSES = 1_000_000


# What people call the images to validate on, in the order in which they are looked for
VALIDATION = ("val", "validation", "valid", "dev", "test")


class Source(ABC):
    """A list of labelled images.

    Attributes:
        classes: class names, in label order.
        targets: (N,) int32, the label of each sample, an index into `classes`.
        has_names: False if the data does not name its classes, so that `classes` are numbers.
        in_memory: whether `images` gives all of them at once.
        notes: what was left out of the data, for the log.
    """

    classes: list[str]
    targets: np.ndarray
    has_names = True
    in_memory = False
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Sample `index` as an RGB image. Raises OSError if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where to find sample `index`: its path, in printable characters."""

    def truth(self) -> tuple[np.ndarray, ...]:
        """What is known of all samples, to compare copies of the data."""
        return (self.targets,)

    def images(self) -> np.ndarray:
        """All images, (N, H, W) grey or (N, H, W, 3) RGB, uint8. Only if `in_memory`."""
        raise NotImplementedError

    @abstractmethod
    def cache(self, indices: Iterable[int]) -> None:
        """Keeps the samples `indices` in memory, undecoded."""

    def decode_with(self, decoder: Decoder) -> None:  # noqa: B027
        """Has image files decoded so. Sources of arrays have none."""

    def some_files(self) -> Iterator[bytes]:
        """Up to 1,000 of the encoded files, spread over the samples; none if there are no files."""
        return iter(())


class FileSource(Source):
    """A source of encoded files, which `read` gives as bytes."""

    def __init__(self) -> None:
        self._cached: dict[int, bytes] = {}
        self._decoder = Decoder()

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of sample `index`. Raises OSError."""

    def cache(self, indices: Iterable[int]) -> None:
        for index in indices:
            try:
                self._cached[index] = self.read(index)
            except OSError:
                continue  # `load` will fail again, and report it

    def load(self, index: int) -> Image.Image:
        encoded = self._cached.get(index)
        return self._decoder(self.read(index) if encoded is None else encoded, self.name(index))

    def decode_with(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def some_files(self) -> Iterator[bytes]:
        for index in range(0, len(self), max(len(self) // 1000, 1)):
            with contextlib.suppress(OSError):  # `load` will fail too, and be reported
                yield self.read(index)


class FolderSource(FileSource):
    """A folder with one folder per class, as `list_classes` lists it.

    Raises:
        DataError: see there.
    """

    def __init__(self, root: Path):
        super().__init__()
        self._root = os.path.join(root, "")
        listing = list_folder(root)
        self.classes, self._paths, self.targets = listing.classes, listing.paths, listing.targets
        self.notes = listing.notes

    def read(self, index: int) -> bytes:
        return read_file(self._root + self._paths[index])

    def name(self, index: int) -> str:
        return printable(self._root + self._paths[index])


class ZipSource(FileSource):
    """Images in a zip file, listed in a text file with a line `path<tab>label` per image.

    Raises:
        DataError: a file that is missing or damaged, or a line that cannot be used.
    """

    def __init__(self, archive: Path, listing: Path):
        super().__init__()
        self._archive = archive
        self._zip: zipfile.ZipFile | None = None
        self._opened_by = 0  # process id
        for path in (archive, listing):
            if not path.is_file():
                raise DataError(f"{path}: no such file; --zip needs {archive.name} and {listing.name} in one folder")
        members, targets = [], []
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{listing}: not UTF-8 text: {error}") from error
        for number, line in enumerate(lines, 1):
            member, _, label = line.rpartition("\t")
            if not member or not label.isdecimal() or len(label) > 18 or int(label) >= MOST_CLASSES:
                raise DataError(f"{listing}, line {number}: {line[:200]!r}; accepted: path, tab, label (0, 1, 2, ...)")
            members.append(member)
            targets.append(int(label))
        if not targets:
            raise DataError(f"{listing}: lists no images")
        try:
            with zipfile.ZipFile(archive) as file:
                missing = sorted(set(members) - set(file.namelist()))
        except Exception as error:  # zipfile can raise anything on damaged and hostile archives
            raise DataError(f"{archive}: not a zip file, or damaged: {printable(str(error))}") from error
        if missing:
            raise DataError(f"{archive}: lacks {shorten(missing)}, which {listing.name} lists")
        self._members, self.targets = Strings.of(members), np.array(targets, np.int32)
        self.classes = [str(label) for label in range(max(targets) + 1)]
        self.has_names = False

    def read(self, index: int) -> bytes:
        try:
            # Each loader process opens the archive itself: they must not share a file offset.
            if self._opened_by != os.getpid():
                self._zip, self._opened_by = zipfile.ZipFile(self._archive), os.getpid()
            member = self._zip.getinfo(self._members[index])
            if member.file_size > MOST_FILE_BYTES:
                raise UnreadableImage(f"{self.name(index)}: larger than {MOST_FILE_BYTES} bytes")
            # Python decompresses more than it is asked for if the method is bzip2 or LZMA.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnreadableImage(f"{self.name(index)}: neither stored nor deflated")
            with self._zip.open(member) as file:
                return file.read(member.file_size)  # without a size, it would be decompressed whole, whatever its size
        except Exception as error:  # damaged, encrypted, of an unknown kind, changed since
            raise UnreadableImage(f"{self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        return printable(f"{self._archive}:{self._members[index]}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_opened_by": 0}


class ArraySource(Source):
    """Images in memory, uint8, (N, H, W) grey or (N, H, W, 3) RGB."""

    in_memory = True

    def __init__(self, images: np.ndarray, targets: Sequence[int], classes: Sequence[str], title: str):
        self._images = images
        self._title = title
        self.targets = np.asarray(targets, np.int32)
        self.classes = list(classes)

    def images(self) -> np.ndarray:
        return self._images

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"

    def cache(self, indices: Iterable[int]) -> None:
        """Nothing to do: it is all in memory."""


class SubsetSource(Source):
    """Some samples of a source, of some of its classes.

    Args:
        indices: which samples; all of them are of the `classes`.
        classes: their names in the new label order.
        labels: the new label of each of the source's classes; by default the one of the same name.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], classes: Sequence[str], labels: Sequence[int] | None = None
    ):
        self._source, self._indices, self.notes = source, np.asarray(indices, np.int64), source.notes
        self.classes, self.has_names, self.in_memory = list(classes), source.has_names, source.in_memory
        if labels is None:
            new = {name: label for label, name in enumerate(classes)}
            labels = [new.get(name, -1) for name in source.classes]
        self.targets = np.array(labels, np.int32)[source.targets[self._indices]]

    def images(self) -> np.ndarray:
        return self._source.images()[self._indices]

    def load(self, index: int) -> Image.Image:
        return self._source.load(self._indices[index])

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def cache(self, indices: Iterable[int]) -> None:
        self._source.cache(self._indices[index] for index in indices)

    def decode_with(self, decoder: Decoder) -> None:
        self._source.decode_with(decoder)

    def some_files(self) -> Iterator[bytes]:
        return self._source.some_files()


def read_file(path: str) -> bytes:
    """An image file, still encoded. Raises OSError."""
    status = os.stat(path)
    # A pipe would block, a device never end.
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_FILE_BYTES:
        raise UnreadableImage(f"{printable(path)}: no regular file of at most {MOST_FILE_BYTES} bytes")
    with open(path, "rb") as file:
        return file.read()


def describe_counts(source: Source) -> str:
    """How many samples of each class there are, for people."""
    return list_counts(source.classes, np.bincount(source.targets, minlength=len(source.classes)))


def list_counts(classes: Sequence[str], counts: np.ndarray, most: int = 10) -> str:
    """How often there is each class, for people; of more than `most` classes the smallest and largest.

    Args:
        counts: (classes,).
    """
    order = np.argsort(counts, kind="stable")

    def listed(labels: Iterable[int]) -> str:
        return ", ".join(f"{printable(classes[label][:200])} {counts[label]}" for label in labels)

    if len(counts) <= most:
        return listed(range(len(counts)))
    if counts.min() == counts.max():
        return f"{counts[0]} of each of {len(counts)} classes"
    half = most // 2
    return f"fewest {listed(order[:half])}; most {listed(order[::-1][:half])}; median {np.median(counts):g}"


def class_names(source: Source) -> list[str]:
    """Names of the classes in label order, printable, as a checkpoint has them; empty if the data has none."""
    return [printable(name) for name in source.classes] if source.has_names else []
