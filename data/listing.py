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
        DataError: no such folder, no class folders, a class folder without images, a folder that cannot be listed, or
            links that lead to the same folder twice, or nowhere.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; accepted: a folder with one folder of images per class")
    found = {os.path.realpath(root): str(root)}
    stamps: dict[str, tuple[int, int]] = {}
    classes, _ = _scan(str(root), stamps)
    if not classes:
        raise DataError(f"{root}: has no class folders; accepted: one folder of images per class")
    counts = np.zeros(len(classes), np.int64)
    above = len(os.path.join(root, ""))

    def all_paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            for path in find_images(os.path.join(root, name), found, stamps):
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
    return Listing(classes, paths, targets, folders, np.array([stamps[folder] for folder in found.values()], np.int64))


def find_images(
    top: str | Path, found: dict[str, str] | None = None, stamps: dict[str, tuple[int, int]] | None = None
) -> list[str]:
    """Paths of the files with an image's extension in a folder and below it, in torchvision's order: folders sorted,
    and the files of each sorted.

    Args:
        found, stamps: see `_walk`.

    Raises:
        DataError: a folder cannot be listed, or links lead to the same folder twice, or nowhere.
    """
    walked = _walk(os.fspath(top), {} if found is None else found, stamps)
    return [os.path.join(folder, file) for folder, files in sorted(walked) for file in files if _is_image(file)]


def _walk(
    top: str, found: dict[str, str], stamps: dict[str, tuple[int, int]] | None
) -> Iterator[tuple[str, list[str]]]:
    """`top` and the folders below it, with the names of their files, sorted. Links are followed.

    Args:
        found: the folders met so far by their real paths; added to.
        stamps: see `_scan`.

    Raises:
        DataError: a link leads to a folder met before, or to one that contains it, which would never end; see `_scan`.
    """
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        # Made absolute first: the parent of "." or "images/" cannot be read off the path.
        real, outer = os.path.realpath(folder), os.path.realpath(os.path.dirname(os.path.abspath(folder)))
        other = found.setdefault(real, folder)
        if other != folder:
            both = f"{printable(other)} and {printable(folder)}"
            raise DataError(f"{both} are the same folder through links: its images would count twice")
        if os.path.commonpath([real, outer]) == real:
            raise DataError(f"{printable(folder)} is a link to a folder that contains it")
        folders, files = _scan(folder, stamps)
        yield folder, files
        waiting += [os.path.join(folder, name) for name in reversed(folders)]


def _scan(folder: str, stamps: dict[str, tuple[int, int]] | None) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, sorted. Links are followed.

    Args:
        stamps: by folder, when it was changed last; added to. They are read before its content is: what is changed
            meanwhile has another time than the one that is kept. None if it does not matter, nor does a link that
            leads nowhere.

    Raises:
        DataError: it cannot be listed, or a link leads nowhere: what it stands for would be missing in silence.
    """
    folders, files = [], []
    try:
        ((mtime, ctime),) = stamps_of([folder]).tolist()
        if stamps is not None:
            stamps[folder] = (mtime, ctime)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.name)
                    continue
                files.append(entry.name)
                # An image that is gone is counted as unreadable later. Hidden links are editors' locks.
                matters = stamps is not None and not _is_image(entry.name) and not entry.name.startswith(".")
                if matters and entry.is_symlink() and not os.path.exists(entry.path):
                    raise DataError(
                        f"{printable(entry.path)}: a link to {printable(os.readlink(entry.path))}, which is not there; "
                        "accepted: links to folders and files that are there"
                    )
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be listed: {error.strerror}") from error
    return sorted(folders), sorted(files)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)
