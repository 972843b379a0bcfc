"""The images of a folder with one folder per class."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.arrays import Strings
from data.errors import DataError
from data.index import kept, stamps_of
from utils import printable, shorten

MOST_NOTE = 10_000  # characters
# Of images that torchvision's ImageFolder does not take. A list of ours: what Pillow knows depends on its version.
OTHER_IMAGES = {
    f".{kind}"
    for kind in (
        *("apng", "avif", "gif", "heic", "heif", "ico", "j2k", "jfif", "jp2", "jpc", "jpe", "jpf", "jpx", "jxl"),
        *("mpo", "pbm", "pfm", "pnm", "tga"),
    )
}


class Listing(NamedTuple):
    """The images of a folder with one folder per class."""

    classes: list[str]  # in label order
    paths: Strings  # below the folder, with "/"
    targets: np.ndarray  # (N,) int32, the label of each
    folders: Strings  # all that were looked into, below the folder; the first is "", the folder itself
    stamps: np.ndarray  # (folders, 2) int64, see `stamps_of`
    notes: list[str]  # what was left out, for the log

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
        if not all(note.isprintable() and len(note) < MOST_NOTE for note in self.notes):
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
    """One folder per class, in alphabetical order: the same images in the same order as torchvision's ImageFolder, but
    without what is hidden (see `is_hidden`).

    Raises:
        DataError: no such folder, no class folders, a class folder without images, a folder that cannot be listed, or
            links that lead to the same folder twice, or nowhere.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; accepted: a folder with one folder of images per class")
    tree = _Tree(root)
    classes, files = tree.scan(str(root))
    if not classes:
        unlabelled = "; tools/predict.py classifies images without labels" if any(map(_is_image, files)) else ""
        raise DataError(f"{root}: has no class folders; accepted: one folder of images per class{unlabelled}")
    counts = np.zeros(len(classes), np.int64)
    above = len(os.path.join(root, ""))

    def all_paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            for path in tree.images(os.path.join(root, name)):
                counts[label] += 1
                yield path[above:]

    paths = Strings.of(all_paths())
    empty = [classes[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise DataError(
            f"{root}: no images in {shorten(empty)}; accepted in every class folder: {', '.join(IMG_EXTENSIONS)}"
        )
    folders = Strings.of(folder[above:] for folder in tree.stamps)
    targets = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    stamps = np.array(list(tree.stamps.values()), np.int64)
    return Listing(classes, paths, targets, folders, stamps, tree.notes())


def find_images(top: str | Path) -> list[str]:
    """Paths of the files with an image's extension in a folder and below it, in torchvision's order: folders sorted,
    and the files of each sorted. Without what is hidden (see `is_hidden`), and links that lead nowhere.

    Raises:
        DataError: a folder cannot be listed, or links lead to the same folder twice.
    """
    return _Tree().images(os.fspath(top))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: notebooks' copies (.ipynb_checkpoints), .git, what macOS
    (.DS_Store, ._a.jpg, __MACOSX), Windows (Thumbs.db) and network storage (@eaDir) leave behind."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


class _Tree:
    """Looks into folders, and remembers what it has seen. Links are followed.

    Args:
        root: the folder that all are in, where the list is kept and has to be complete. None if that does not matter.

    Attributes:
        stamps: when each folder was changed last, in the order in which they were met. They are read before the
            folder's content is: what is changed meanwhile has another time than the one that is kept.
    """

    def __init__(self, root: Path | None = None):
        self._root = root
        self._found = {} if root is None else {os.path.realpath(root): str(root)}
        self.stamps: dict[str, tuple[int, int]] = {}
        self._hidden, self._first_hidden, self._first_other = 0, "", ""
        self._suffixes: Counter[str] = Counter()

    def images(self, top: str) -> list[str]:
        """Of a folder and those below it, in torchvision's order."""
        return [
            os.path.join(folder, file) for folder, files in sorted(self._walk(top)) for file in files if _is_image(file)
        ]

    def _walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
        """`top` and the folders below it, with the names of their files, sorted.

        Raises:
            DataError: a link leads to a folder met before, or to one that contains it, which would never end; see
                `scan`.
        """
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            # Made absolute first: the parent of "." or "images/" cannot be read off the path.
            real, outer = os.path.realpath(folder), os.path.realpath(os.path.dirname(os.path.abspath(folder)))
            other = self._found.setdefault(real, folder)
            if other != folder:
                both = f"{printable(other)} and {printable(folder)}"
                raise DataError(f"{both} are the same folder through links: its images would count twice")
            if os.path.commonpath([real, outer]) == real:
                raise DataError(f"{printable(folder)} is a link to a folder that contains it")
            folders, files = self.scan(folder)
            yield folder, files
            waiting += [os.path.join(folder, name) for name in reversed(folders)]

    def scan(self, folder: str) -> tuple[list[str], list[str]]:
        """The names of the folders and of the files in a folder, sorted.

        Raises:
            DataError: it cannot be listed, or a link leads nowhere: what it stands for would be missing in silence.
        """
        folders, files = [], []
        try:
            ((mtime, ctime),) = stamps_of([folder]).tolist()
            self.stamps[folder] = (mtime, ctime)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        self._hidden += 1
                        self._first_hidden = min(filter(None, (self._first_hidden, entry.path)))
                    elif _is_dir(entry):
                        folders.append(entry.name)
                    else:
                        files.append(entry.name)
                        if not _is_image(entry.name):
                            self._leave_out(entry)
        except OSError as error:
            raise DataError(f"{printable(folder)}: cannot be listed: {error.strerror}") from error
        return sorted(folders), sorted(files)

    def _leave_out(self, entry: os.DirEntry) -> None:
        # An image that is gone is counted as unreadable later.
        if self._root and entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(
                f"{printable(entry.path)}: a link to {printable(os.readlink(entry.path))}, which is not there; "
                "accepted: links to folders and files that are there"
            )
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in OTHER_IMAGES:
            self._suffixes[suffix] += 1
            self._first_other = min(filter(None, (self._first_other, entry.path)))

    def notes(self) -> list[str]:
        """What was left out, if it may surprise."""
        notes = []
        if self._hidden:
            notes.append(
                f"{printable(str(self._root))}: {self._hidden} hidden files and folders are left out, such as "
                f"{printable(self._first_hidden)}"
            )
        if self._suffixes:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self._suffixes.items()))
            notes.append(
                f"{printable(str(self._root))}: images of other kinds are left out: {kinds}, such as "
                f"{printable(self._first_other)}; accepted: {', '.join(IMG_EXTENSIONS)}"
            )
        return [note for note in notes if len(note) < MOST_NOTE]


def _is_dir(entry: os.DirEntry) -> bool:
    """False for a link that leads to itself, or to where this user may not go."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)
