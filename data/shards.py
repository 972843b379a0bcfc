"""Shards: tar files in WebDataset's layout, https://github.com/webdataset/webdataset.

Files of the same name up to the first dot belong together: an image, and its label as `.cls` (a number in text) or
`.json` (an object with the number as "label" or "cls"). The members are listed once, with the place of each image in
its file, so that any image can be read without those before it.
"""

import hashlib
import json
import os
import re
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.arrays import Strings
from data.errors import DataError, UnreadableImage
from data.index import kept, stamps_of
from data.sources import MOST_CLASSES, MOST_FILE_BYTES, FileSource
from utils import printable, shorten

BLOCK = 512  # of a tar file
MOST_LABEL_BYTES = 2**20
MOST_OPEN_SHARDS = 64
LABELS = (".cls", ".json")
# Written by tools/make_shards.py: what the shards of each split are, also those that are not finished
NOTES = "shards.json"
# "medieval" and "retrieval" are not for validation.
SPLITS = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE),
    "val": re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE),
    "test": re.compile(r"(?<![a-z])test(ing)?(?![a-z])", re.IGNORECASE),
}


class ShardList(NamedTuple):
    """The images of some shards."""

    shards: Strings  # names of the files
    names: Strings  # of the members that are images
    of_shard: np.ndarray  # (N,) int32, in which file each is
    starts: np.ndarray  # (N,) int64, its first byte there
    sizes: np.ndarray  # (N,) int64, bytes
    targets: np.ndarray  # (N,) int32, labels
    stamps: np.ndarray  # (shards, 2) int64, see `stamps_of`

    def is_sound(self) -> bool:
        """Whether the lists, if they come from a file, fit together."""
        count = (len(self.names),)
        rows = ((self.of_shard, np.int32), (self.starts, np.int64), (self.sizes, np.int64), (self.targets, np.int32))
        if not len(self.names) or any((row.shape, row.dtype) != (count, dtype) for row, dtype in rows):
            return False
        if (self.stamps.shape, self.stamps.dtype) != ((len(self.shards), 2), np.int64):
            return False
        if min(row.min() for row, _ in rows) < 0 or self.targets.max() >= MOST_CLASSES:
            return False
        return bool(self.of_shard.max() < len(self.shards)) and not self.shards.contain(b"/")


class ShardSource(FileSource):
    """The images of the shards of one split in a folder (see `find_shards`).

    Args:
        root: the folder. If it has `classes.txt`, a name per line, that names the classes.
        split: "train", "val" or "test".

    Raises:
        DataError: no such shards, one that is missing or damaged, or members that cannot be used.
    """

    def __init__(self, root: Path, split: str):
        super().__init__()
        self._root = root
        paths = find_shards(root, split)

        def stamps_now(found: ShardList) -> np.ndarray:
            # A shard more or less is another count of stamps.
            return stamps_of(paths if list(found.shards) == [path.name for path in paths] else [])

        self._list = kept(ShardList, root / f"{split}.shards", lambda: list_shards(paths), stamps_now)
        self.targets = self._list.targets
        self.classes, self.has_names = _classes(root, int(self.targets.max()) + 1)
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by shard, the one used last at the end

    def read(self, index: int) -> bytes:
        size = int(self._list.sizes[index])
        if size > MOST_FILE_BYTES:
            raise UnreadableImage(f"{self.name(index)}: larger than {MOST_FILE_BYTES} bytes")
        # Without a position of its own, the descriptor may be shared by processes.
        content = os.pread(self._descriptor(int(self._list.of_shard[index])), size, int(self._list.starts[index]))
        if len(content) != size:
            raise UnreadableImage(f"{self.name(index)}: the file has become shorter")
        return content

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MOST_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self._root / self._list.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(shard)
        return self._open[shard]

    def name(self, index: int) -> str:
        shard = self._root / self._list.shards[self._list.of_shard[index]]
        return printable(f"{shard}:{self._list.names[index]}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def find_shards(root: Path, split: str) -> list[Path]:
    """The tar files in a folder whose names have the split as a word, sorted.

    Raises:
        DataError: there are none, one is of both splits, or one that `tools/make_shards.py` has noted is missing.
    """
    shards = sorted(root.glob("*.tar"))
    paths = [path for path in shards if SPLITS[split].search(path.name)]
    if not paths:
        there = [name for name, words in SPLITS.items() if any(words.search(path.name) for path in shards)]
        raise DataError(
            f"{_show(root)}: no shards of {split} in it; accepted: WebDataset's tar files with {split} as a word in "
            f"their names, such as {split}-000000.tar; its splits: {', '.join(there) or 'none'}"
        )
    # "test" may be a word of the data set's own name.
    others = [name for name in SPLITS if name != "test" or split == "test"]
    for path in paths:
        named = [name for name in others if SPLITS[name].search(path.name)]
        if len(named) > 1:
            uses = " or for ".join(
                {"train": "training", "val": "validation", "test": "testing"}[name] for name in named
            )
            raise DataError(f"{_show(path)}: is it for {uses}? accepted: one of them in its name")
    try:
        splits = json.loads((root / NOTES).read_text(encoding="utf-8"))["splits"]
        noted = [name for about in splits.values() for name in about["shards"] if SPLITS[split].search(name)]
        missing = [name for name in noted if not (root / name).is_file()]
    except FileNotFoundError:
        return paths  # of other origin
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{_show(root / NOTES)}: damaged, or not {NOTES} of tools/make_shards.py: {error!r}") from error
    if missing:
        raise DataError(
            f"{_show(root)}: {len(missing)} of the {len(noted)} shards of {split} are missing: {shorten(missing)}; get "
            "them again, or call tools/make_shards.py again, which goes on where it was stopped"
        )
    return paths


def _classes(root: Path, labels: int) -> tuple[list[str], bool]:
    """The names of the classes, and whether the data has them."""
    path = root / "classes.txt"
    if not path.is_file():
        return [str(label) for label in range(labels)], False
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{printable(str(path))}: cannot be read: {error}") from error
    if "" in names:
        raise DataError(f"{printable(str(path))}: line {names.index('') + 1} is empty; accepted: a name in each line")
    if len(names) < labels or len(set(names)) < len(names):
        raise DataError(
            f"{printable(str(path))}: has {len(names)} names, {len(set(names))} of them different; the shards have "
            f"labels up to {labels - 1}; accepted: a name of its own for each label"
        )
    return names, True


def list_shards(paths: list[Path]) -> ShardList:
    """The images of shards, in the order of the files and of the samples in them.

    Raises:
        DataError: a damaged file, an image without a label, a label without an image, two samples of the same name.
    """
    stamps = stamps_of(list(map(str, paths)))  # before they are read
    columns = {"of_shard": "i", "starts": "q", "sizes": "q", "targets": "i", "hashes": "q"}
    rows = {name: array(code) for name, code in columns.items()}

    def all_names() -> Iterator[str]:
        for number, path in enumerate(paths):
            for key, (name, start, size, label) in _samples(path).items():
                hashed = hashlib.blake2b(os.fsencode(key), digest_size=8).digest()
                values = (number, start, size, label, int.from_bytes(hashed, "little", signed=True))
                for column, value in zip(rows.values(), values, strict=True):
                    column.append(value)
                yield name

    names = Strings.of(all_names())
    if not len(names):
        raise DataError(f"{_show(paths[0])} and the other shards of its split have no images")
    found = {name: np.frombuffer(column, np.dtype(column.typecode)) for name, column in rows.items()}
    hashes = found.pop("hashes")
    order = np.argsort(hashes, kind="stable")
    (twice,) = np.nonzero(hashes[order][1:] == hashes[order][:-1])
    if len(twice):
        first, second = (int(order[twice[0] + i]) for i in range(2))
        both = (f"{_show(paths[found['of_shard'][i]])}:{printable(names[i])}" for i in (first, second))
        raise DataError(f"{' and '.join(both)} have the same name; accepted: each sample once")
    shards = Strings.of(path.name for path in paths)
    return ShardList(shards, names, stamps=stamps, **found)


def _samples(path: Path) -> dict[str, tuple[str, int, int, int]]:
    """The samples of a shard by name: member that is the image, its first byte, its size, label."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    with_cls: set[str] = set()
    for member, content in _members(path):
        folder, slash, file = member.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        key, suffix = f"{folder}{slash}{stem}", f".{suffix.lower()}"
        if suffix in IMG_EXTENSIONS:
            if key in images:
                raise DataError(f"{_show(path)}: has two images of {printable(key)}; accepted: each sample once")
            images[key] = (member.name, member.offset_data, member.size)
        elif suffix == ".cls":
            if key in with_cls:
                raise DataError(f"{_show(path)}: has two labels of {printable(key)}; accepted: each sample once")
            with_cls.add(key)
            labels[key] = _cls_label(content)
            if labels[key] is None:
                raise DataError(
                    f"{_show(path)}: {printable(member.name)} has {content[:50]!r}; accepted: a label (0, 1, 2, ...)"
                )
        elif suffix == ".json" and key not in labels and (label := _json_label(content)) is not None:
            labels[key] = label
    for some, others, what in ((images, labels, "label"), (labels, images, "image")):
        lacking = sorted(map(printable, some.keys() - others.keys()))
        if lacking:
            raise DataError(
                f"{_show(path)}: no {what} for {shorten(lacking)}; accepted for each sample: an image, and a .cls file "
                'with a number or a .json file with it as "label" or "cls", of the same name up to the first dot'
            )
    return {key: (*image, labels[key]) for key, image in images.items()}


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """The files in a tar file, and the content of labels.

    Raises:
        DataError: it is damaged or incomplete, or has an image or a label as a link or with holes.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members = []  # which would keep half a kilobyte for each
                if member.size < 0 or member.offset < end:
                    raise DataError(f"{_show(path)}: damaged: {printable(member.name)} has an impossible size or place")
                if not member.isreg() or member.issparse():
                    if member.name.lower().endswith((*IMG_EXTENSIONS, *LABELS)) and not member.isdir():
                        raise DataError(
                            f"{_show(path)}: {printable(member.name)} is a link or has holes; accepted: plain files "
                            "(tar --dereference --hard-dereference, without --sparse)"
                        )
                    end = member.offset_data
                    continue
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                content = b""
                if member.name.lower().endswith(LABELS):
                    content = tar.extractfile(member).read(MOST_LABEL_BYTES)
                yield member, content
            # tarfile takes a file that was cut between two members for a complete one.
            tar.fileobj.seek(end)
            complete = tar.fileobj.read(BLOCK) == bytes(BLOCK)
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        raise DataError(f"{_show(path)}: not a tar file, or damaged: {printable(str(error))}") from error
    if not complete:
        raise DataError(f"{_show(path)}: ends without a tar file's end mark: it is incomplete; get it again")


def _cls_label(content: bytes) -> int | None:
    """The label in a .cls file; None if there is none."""
    text = content.strip()
    return _checked(int(text)) if text.isdigit() and len(text) < 19 else None


def _json_label(content: bytes) -> int | None:
    """The label in a .json file; None if there is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return _checked(value.get("label", value.get("cls"))) if isinstance(value, dict) else None


def _checked(value: Any) -> int | None:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_CLASSES
    return value if known else None


def _show(path: Path) -> str:
    return printable(str(path))
