"""The images of a folder with one folder per class."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.arrays import Strings
from data.errors import DataError
from data.index import kept, stamps_of
from utils import printable, shorten


class Listing(NamedTuple):
    """The images of a folder with one folder per class."""

    classes: list[str]  # in label order
    paths: Strings  # below the folder, with "/"
    targets: np.ndarray  # (N,) int32, the label of each
    folders: Strings  # all that were looked into, below the folder; the first is "", the folder itself
    stamps: np.ndarray  # (folders, 2) int64, see `stamps_of`

    def is_sound(self) -> bool:
        """Whether the lists, if they come from a file, fit together and all paths are below the folder."""
        if (self.targets.dtype, self.stamps.dtype) != (np.int32, np.int64):
            return False
        if self.targets.shape != (len(self.paths),) or self.stamps.shape != (len(self.folders), 2):
            return False
        # In the order of the classes, each with at least one image
        steps = np.diff(self.targets)
        if self.targets[0] != 0 or self.targets[-1] != len(self.classes) - 1 or not np.isin(steps, (0, 1)).all():
            return False
        return not (self.paths.contain(b"../") or self.folders.contain(b"../"))


def list_folder(root: Path) -> Listing:
    """`list_classes`, from a file if no folder was changed since (see `kept`).

    Raises:
        DataError: see `list_classes`.
    """

    def stamps_now(listing: Listing) -> np.ndarray:
        return stamps_of([os.path.join(root, folder) for folder in listing.folders])

    return kept(Listing, root, lambda: list_classes(root), stamps_now)


def list_classes(root: Path) -> Listing:
    """One folder per class, in alphabetical order: the same images in the same order as torchvision's ImageFolder.

    Raises:
        DataError: no such folder, no class folders, a class folder without images, or a folder reached twice by links.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; accepted: a folder with one folder of images per class")
    classes = sorted(name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name)))
    if not classes:
        raise DataError(f"{root}: has no class folders; accepted: one folder of images per class")
    found = {os.path.realpath(root): str(root)}
    counts = np.zeros(len(classes), np.int64)
    above = len(os.path.join(root, ""))

    def all_paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            for path in find_images(os.path.join(root, name), found):
                counts[label] += 1
                yield path[above:]

    paths = Strings.of(all_paths())
    empty = [classes[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise DataError(
            f"{root}: no images in {shorten(empty)}; accepted in every class folder: {', '.join(IMG_EXTENSIONS)}"
        )
    _, *below = found.values()
    folders = Strings.of(["", *(folder[above:] for folder in below)])
    targets = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    stamps = stamps_of([os.path.join(root, folder) for folder in folders])
    return Listing(classes, paths, targets, folders, stamps)


def find_images(top: str | Path, found: dict[str, str] | None = None) -> list[str]:
    """Paths of the files with an image's extension in a folder and below it, in torchvision's order: folders sorted,
    and the files of each sorted.

    Args:
        found: see `_walk`.

    Raises:
        DataError: links lead to the same folder twice.
    """
    folders = sorted(_walk(os.fspath(top), {} if found is None else found))
    return [os.path.join(folder, file) for folder, files in folders for file in sorted(files) if _is_image(file)]


def _walk(top: str, found: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """`top` and the folders below it, with the names of their files. Links are followed.

    Args:
        found: the folders met so far by their real paths; added to.

    Raises:
        DataError: a link leads to a folder met before, or to one that contains it, which would never end.
    """
    for folder, _, files in os.walk(top, followlinks=True):
        # Made absolute first: the parent of "." or "images/" cannot be read off the path.
        real, outer = os.path.realpath(folder), os.path.realpath(os.path.dirname(os.path.abspath(folder)))
        other = found.setdefault(real, folder)
        if other != folder:
            both = f"{printable(other)} and {printable(folder)}"
            raise DataError(f"{both} are the same folder through links: its images would count twice")
        if os.path.commonpath([real, outer]) == real:
            raise DataError(f"{printable(folder)} is a link to a folder that contains it")
        yield folder, files


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)
