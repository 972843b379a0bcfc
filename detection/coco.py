"""Images with boxes in COCO's layout (Lin et al., 2014), also as labelling tools export it.

The format: https://cocodataset.org/#format-data, "Object Detection". What else is accepted, counted or refused is in
docs/detection_data.md.
"""

import json
import os
import re
import stat
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.arrays import Strings
from data.decoding import shown_size
from data.errors import DataError, UnreadableImage
from data.sources import FileSource, read_file
from utils import printable, shorten

# Objects365 has 2.5 GB.
MOST_JSON_BYTES = 2**33
MOST_SIDE = 2**20  # pixels
MOST_CATEGORIES = 100_000
# A box that reaches farther out of its image than that is counted: tools round.
PIXELS_BEYOND = 1.0
# What is read of a file. The rest, polygons above all, is dropped while the file is parsed: it would be most of it.
_KEPT = {"images", "annotations", "categories", "id", "name", "supercategory", "file_name", "width", "height"}
_KEPT |= {"image_id", "category_id", "bbox", "area", "iscrowd"}

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}
ROBOFLOW = "_annotations.coco.json"


class CocoSource(FileSource):
    """The images and boxes of one annotation file.

    Args:
        images_folder: what file names are relative to.
        annotation_file: JSON.
        categories: the names of the classes in label order, if they are known already: those of training. By default
            the classes are the file's own, in the order of their ids.
        content: of the file, if it has been read.

    Attributes:
        classes: names, in label order.
        category_ids: the id in the file of each class. A class that the file does not have gets an id that is free.
        has_names: True.
        notes: what was unusual and how often, for the log.

    Raises:
        DataError: the file cannot be read, is not in COCO's layout, or does not belong to the folder.
    """

    def __init__(
        self,
        images_folder: str | Path,
        annotation_file: str | Path,
        categories: Sequence[str] | None = None,
        content: "Content | None" = None,
    ):
        super().__init__()
        self._root, self.file = os.path.join(images_folder, ""), Path(annotation_file)
        self.notes: list[str] = []
        content = content or _read_json(self.file)
        labels = self._number(content, categories)
        positions = self._take_images(content.images)
        self._take_boxes(content.annotations, positions, labels)

    def __len__(self) -> int:
        return len(self._ids)

    def path(self, index: int) -> str:
        return self._root + self._paths[index]

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def load(self, index: int) -> Image.Image:
        """Image `index`, RGB, turned as its boxes are; it may be larger or smaller than `size(index)`, in the same
        proportions. Raises OSError if it cannot be read, or is not of that shape."""
        encoded = self._cached.get(index)
        return self._decoder(self.read(index) if encoded is None else encoded, self.name(index), self.size(index))

    def image_id(self, index: int) -> int:
        return int(self._ids[index])

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index` as the file says: the pixels that boxes are in."""
        height, width = self._sizes[index].tolist()
        return height, width

    def sizes(self) -> np.ndarray:
        """(N, 2) int32, height and width of all images."""
        return self._sizes

    def boxes(self, index: int) -> np.ndarray:
        """(n, 4) float32: left, top, right and bottom of each box in pixels, within the image."""
        return self._boxes[self._of(index)]

    def labels(self, index: int) -> np.ndarray:
        """(n,) int32, indices into `classes`."""
        return self._labels[self._of(index)]

    def crowd(self, index: int) -> np.ndarray:
        """(n,) bool: whether a box is around many objects, not each marked. Such boxes are neither learned nor counted
        as missed."""
        return self._crowd[self._of(index)]

    def areas(self, index: int) -> np.ndarray:
        """(n,) float32, pixels of each object: of its outline, if the file says so, otherwise of its box."""
        return self._areas[self._of(index)]

    def truth(self) -> tuple[np.ndarray, ...]:
        # Sizes too, which an image file may say: they decide how many batches of each size there are.
        return self._ids, self._sizes, self._starts, self._labels, self._boxes, self._crowd

    def counts(self) -> np.ndarray:
        """(classes,) boxes of each class, crowds left out."""
        return np.bincount(self._labels[~self._crowd], minlength=len(self.classes))

    def _of(self, index: int) -> slice:
        """Where the boxes of image `index` are."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return slice(self._starts[index], self._starts[index + 1])

    def _note(self, text: str) -> None:
        self.notes.append(f"{_show(self.file)}: {text}")

    def _number(self, content: "Content", classes: Sequence[str] | None) -> dict[int, int]:
        """Sets `classes` and `category_ids`. The label of each category."""
        names = _categories(content.categories, self.file)
        used = {a["category_id"] for a in content.annotations if isinstance(a, dict) and _is_id(a.get("category_id"))}
        if unknown := sorted(used - set(names)):
            raise DataError(
                f"{_show(self.file)}: annotations are of category {_ids(unknown)}, which categories lacks; accepted: "
                f"{_ids(names)}"
            )
        # Roboflow puts a category above all others, which no box has.
        above = {c["supercategory"] for c in content.categories if isinstance(c.get("supercategory"), str)}
        roots = [c["id"] for c in content.categories if c.get("supercategory") == "none" and c["name"] in above]
        if len(roots) == 1 and roots[0] not in used and len(names) > 1:
            self._note(f"the category {_quote(names.pop(roots[0]))}, above all others, has no box and is left out")
        ids_of: dict[str, list[int]] = {}
        for i, name in names.items():
            ids_of.setdefault(name, []).append(i)
        for name, ids in ids_of.items():
            idle = [i for i in ids if i not in used]
            if len(ids) == 1:
                continue
            if len(ids) - len(idle) > 1:
                raise DataError(
                    f"{_show(self.file)}: the categories {_ids(ids)} are all called {_quote(name)}; accepted: a name "
                    "for each"
                )
            for i in idle[: len(ids) - 1]:
                del names[i]
            self._note(f"of {len(ids)} categories called {_quote(name)}, those without a box are left out")
        if classes is None:
            self.classes, self.category_ids = list(names.values()), list(names)
        else:
            self._match(names, used, classes)
        if idle := [name for i, name in names.items() if i not in used]:
            self._note(f"{len(idle)} categories have no box: {shorten(idle)}")
        number = {name: label for label, name in enumerate(self.classes)}
        return {i: number[name] for i, name in names.items() if name in number}

    def _match(self, names: dict[int, str], used: set[int], classes: Sequence[str]) -> None:
        """Classes that are given, not this file's."""
        ids, own = {name: i for i, name in names.items()}, set(classes)
        if others := [name for name in ids if name not in own and ids[name] in used]:
            raise DataError(
                f"{_show(self.file)}: has boxes of {len(others)} categories that training does not have: "
                f"{shorten(others)}; accepted: {shorten(list(classes), 20)}"
            )
        if others := [name for name in ids if name not in own]:
            self._note(f"{len(others)} categories without a box, which training does not have, are left out")
        if lacking := [name for name in classes if name not in ids]:
            self._note(f"lacks {len(lacking)} of the {len(classes)} categories of training: {shorten(lacking)}")
        free = iter(range(max(names, default=0) + 1, 2**63))
        self.classes, self.category_ids = list(classes), [ids[name] if name in ids else next(free) for name in classes]

    def _take_images(self, images: list) -> dict[int, int]:
        """Sets what is known of the images. The position of each image id."""
        if not images:
            raise DataError(f"{_show(self.file)}: lists no images")
        positions: dict[int, int] = {}
        names, sizes, file = [], np.zeros((len(images), 2), np.int32), _show(self.file)
        for position, image in enumerate(images):
            where = f"{file}: images[{position}]"
            entry = _mapping(image, where)
            image_id = _id(entry, "id", where)
            if positions.setdefault(image_id, position) != position:
                raise DataError(f"{where}: has the id {image_id} of another image; accepted: an id for each")
            names.append(_file_name(entry, where))
            sizes[position] = _size(entry, where)
        self._ids, self._sizes = np.fromiter(positions, np.int64, len(positions)), sizes
        self._paths = Strings.of(self._find(names))
        unknown = [int(i) for i in np.flatnonzero(sizes.min(axis=1) == 0)]
        for index in unknown:
            try:
                sizes[index] = shown_size(self.path(index))
            except UnreadableImage:
                sizes[index] = 1  # it counts as unreadable when it is loaded
        if unknown:
            self._note(f"{len(unknown)} images have no width and height there; the image files say them")
        return positions

    def _find(self, names: list[str]) -> list[str]:
        """Where each file is below the folder of images."""
        there = _Present(self._root)
        found = [there.find(name) for name in names]
        paths = [path or _plain(name) for path, name in zip(found, names, strict=True)]
        missing = [name for path, name in zip(found, names, strict=True) if path is None]
        if len(missing) == len(names):
            raise DataError(
                f"{_show(self.file)}: none of its {len(names)} images is in {_show(self._root)}, such as "
                f"{printable(missing[0])}; accepted: file names relative to that folder"
            )
        first: dict[str, str] = {}
        for path, name in zip(paths, names, strict=True):
            if path in first:
                raise DataError(
                    f"{_show(self.file)}: two of its images, {printable(first[path])} and {printable(name)}, are the "
                    f"same file {printable(self._root + path)}; accepted: a file for each, in folders as the names say"
                )
            first[path] = name
        if missing:
            self._note(
                f"{len(missing)} of its {len(names)} images are not there, such as {printable(missing[0])}; they count "
                "as unreadable (DATA.MAX_UNREADABLE)"
            )
        moved = [name for path, name in zip(found, names, strict=True) if path not in (None, name, _plain(name))]
        if moved:
            self._note(
                f"{len(moved)} file names are of other folders, such as {printable(moved[0])}; found in this one"
            )
        return paths

    def _take_boxes(self, annotations: list, positions: dict[int, int], labels: dict[int, int]) -> None:
        """Sets what is known of the boxes, sorted by image."""
        image, label, crowd = array("q"), array("q"), array("b")
        boxes, areas = array("d"), array("d")
        strangers = boxless = 0
        file = _show(self.file)
        for number, annotation in enumerate(annotations):
            where = f"{file}: annotations[{number}]"
            entry = _mapping(annotation, where)
            position = positions.get(_id(entry, "image_id", where))
            if position is None:
                strangers += 1
                continue
            category = _id(entry, "category_id", where)
            box = entry.get("bbox")
            if box is None or box == []:
                boxless += 1
                continue
            if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
                raise DataError(
                    f"{where}: bbox is {_brief(box)}; accepted: four numbers, [left, top, width, height] in pixels"
                )
            flag = entry.get("iscrowd") or 0
            if flag not in (0, 1):
                raise DataError(f"{where}: iscrowd is {_brief(flag)}; accepted: 0 or 1")
            area = entry.get("area")
            image.append(position)
            label.append(labels[category])
            crowd.append(int(flag))
            boxes.extend(box)
            areas.append(area if _is_number(area) and area > 0 else 0)
        if strangers:
            self._note(f"{strangers} annotations are of images that it does not list; they are left out")
        if boxless:
            self._note(f"{boxless} annotations have no box (bbox); they are left out")
        self._sort(np.array(image), np.array(label), np.array(crowd), np.array(boxes).reshape(-1, 4), np.array(areas))

    def _sort(self, image: np.ndarray, label: np.ndarray, crowd: np.ndarray, boxes: np.ndarray, area: np.ndarray):
        """
        Args:
            boxes: (n, 4), left, top, width, height, in no order; the others (n,).
        """
        sizes = self._sizes[image.astype(int)]  # height, width
        if len(boxes) and boxes.max() <= 1 and sizes.min() > 16:
            raise DataError(
                f"{_show(self.file)}: no box has a coordinate of more than 1: they seem to be fractions of the image; "
                "accepted: [left, top, width, height] in pixels"
            )
        has_area = (boxes[:, 2:] > 0).all(axis=1)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        limits = np.tile(sizes[:, ::-1], 2)
        clipped = np.clip(corners, 0, limits).astype(np.float32)
        inside = has_area & (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        beyond = inside & (np.maximum(corners - limits, -corners).max(axis=1, initial=0) > PIXELS_BEYOND)
        if count := int((~has_area).sum()):
            self._note(f"{count} boxes have no area (width or height is 0 or less); they are left out")
        if count := int((has_area & ~inside).sum()):
            self._note(f"{count} boxes are outside their image; they are left out")
        if count := int(beyond.sum()):
            hint = "; is it [left, top, width, height]?" if count > len(boxes) / 10 else ""
            self._note(f"{count} boxes of {len(boxes)} reach out of their image and are cut at its border{hint}")
        order = np.flatnonzero(inside)
        order = order[np.argsort(image[order], kind="stable")]
        self._boxes, self._labels = clipped[order], label[order].astype(np.int32)
        self._crowd = crowd[order].astype(bool)
        sides = self._boxes[:, 2:] - self._boxes[:, :2]
        self._areas = np.where(area[order] > 0, area[order], sides.prod(axis=1)).astype(np.float32)
        per_image = np.bincount(image[order].astype(int), minlength=len(self))
        self._starts = np.concatenate([[0], np.cumsum(per_image)])
        if self._crowd.all():  # also if there is none
            what = "only crowds (iscrowd)" if len(order) else "no box"
            raise DataError(f"{_show(self.file)}: has {what} in its images; accepted: annotations with bbox")
        if empty := int((per_image == 0).sum()):
            self._note(f"{empty} of {len(self)} images have no box; they are used, as images of nothing")
        if crowds := int(self._crowd.sum()):
            self._note(f"{crowds} boxes are crowds (iscrowd), which are neither learned nor counted as missed")


class Splits(NamedTuple):
    """Training and validation images with the same classes."""

    train: CocoSource
    val: CocoSource


def read_splits(config) -> Splits:
    """The images and boxes in `DATA.DATA_PATH`: training's classes are validation's too, by name.

    Raises:
        DataError: files are missing, cannot be read, or do not belong together.
    """
    train = read_split(config, "train")
    return Splits(train, read_split(config, "val", train.classes))


def read_split(config, split: str, categories: Sequence[str] | None = None) -> CocoSource:
    """
    Args:
        split: "train" or "val".
        categories: see `CocoSource`.

    Raises:
        DataError: see `read_splits`.
    """
    if not config.DATA.DATA_PATH:
        raise DataError("DATA.DATA_PATH is empty; give --data-path, a folder in COCO's layout")
    root = Path(config.DATA.DATA_PATH)
    if not root.is_dir():
        raise DataError(f"{_show(root)}: no such folder (DATA.DATA_PATH or --data-path)")
    file, name = _annotation_file(root, split)
    content = _read_json(file)
    return CocoSource(_images_folder(root, file, name, content), file, categories, content)


def _annotation_file(root: Path, split: str) -> tuple[Path, str]:
    """The annotation file of a split, and what the file calls the split."""
    folder = root / "annotations"
    try:
        there = sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{_show(folder)}: cannot be listed: {error.strerror}") from error
    for name in SPLITS[split]:
        found = [file for file in there if re.fullmatch(rf"instances_{name}(\d{{4}})?\.json", file)]
        if len(found) > 1:
            raise DataError(f"{_show(folder)}: has {shorten(found)}; accepted: one of them")
        if found:
            return folder / found[0], found[0][len("instances_") : -len(".json")]
        if (root / name / ROBOFLOW).is_file():
            return root / name / ROBOFLOW, name
    seen = f"; that folder has {shorten(there)}" if there else ""
    raise DataError(
        f"{_show(root)}: no annotations/instances_{split}.json in it{seen}; accepted: annotations/instances_train.json "
        f"and instances_val.json, with a year or without, or {ROBOFLOW} in train/ and valid/. tools/to_coco.py writes "
        "that layout from YOLO's and Pascal VOC's files"
    )


def _images_folder(root: Path, annotations: Path, name: str, content: "Content") -> Path:
    """Where the images of an annotation file are: the first of the usual folders that has some of them."""
    if annotations.name == ROBOFLOW:
        return annotations.parent
    plain = name.rstrip("0123456789")
    names = list(dict.fromkeys((name, plain, f"images/{name}", f"images/{plain}", "images", ".")))
    chosen = {int(i) for i in np.linspace(0, len(content.images) - 1, 50)} if content.images else set()
    wheres = {i: f"{_show(annotations)}: images[{i}]" for i in sorted(chosen)}
    some = [_file_name(_mapping(content.images[i], where), where) for i, where in wheres.items()]
    folders = [root / name for name in names if (root / name).is_dir()]
    present = [_Present(os.path.join(folder, "")) for folder in folders]
    for whole in (True, False):
        for folder, there in zip(folders, present, strict=True):
            if any(there.find(name, whole) for name in some):
                return folder
    first = f", such as {printable(some[0])}" if some else ""
    raise DataError(
        f"{_show(root)}: none of the images of {_show(annotations)} is there{first}; looked in "
        f"{', '.join(f'{name}/' for name in names[:-1])}"
    )


class _Present:
    """Which files are in a folder and those below it. Each folder is listed once, when it is asked for: on a network,
    asking for each file would take minutes.

    Args:
        root: ends with a slash.
    """

    def __init__(self, root: str):
        self._root = root
        self._names: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        folder, _, file = path.rpartition("/")
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(self._root + folder))
            except OSError:
                self._names[folder] = set()
        names = self._names[folder]
        # Where upper and lower case are the same, a listing alone does not say.
        return file in names or bool(names and os.path.exists(self._root + path))

    def find(self, name: str, whole: bool = False) -> str | None:
        """The path of a file that has the name, or, unless the name counts as a `whole`, its last parts: files may have
        been moved since, from the disk of whoever marked them. None if there is none."""
        if "\\" in name and self.has(name):
            return name
        parts = _plain(name).split("/")
        for start in range(1 if whole else len(parts)):
            if self.has(path := "/".join(parts[start:])):
                return path
        return None


def _plain(name: str) -> str:
    """A file name with "/", relative, without "." in it."""
    name = re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/"))
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class Content(NamedTuple):
    """The lists of an annotation file, whose entries are not checked."""

    images: list
    annotations: list
    categories: list


_LAYOUT = "an object with images, annotations and categories (COCO's layout)"


def _read_json(path: Path) -> Content:
    """
    Raises:
        DataError: it cannot be read, or has not the three lists.
    """

    def keep(pairs: dict[str, Any]) -> dict[str, Any]:
        for name in pairs.keys() - _KEPT:
            del pairs[name]
        return pairs

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_JSON_BYTES:
            raise DataError(f"{_show(path)}: no regular file of at most {MOST_JSON_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=keep)
    except OSError as error:
        raise DataError(f"{_show(path)}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, numbers of too many digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error)[:300])
        raise DataError(f"{_show(path)}: not JSON, or damaged: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{_show(path)}: holds a {type(content).__name__}; accepted: {_LAYOUT}")
    for name in Content._fields:
        if not isinstance(found := content.get(name), list):
            what = "no" if found is None else f"a {type(found).__name__} as"
            raise DataError(f"{_show(path)}: has {what} {name}; accepted: {_LAYOUT}")
    return Content(*(content[name] for name in Content._fields))


def _categories(listed: list, path: Path) -> dict[int, str]:
    """The names by id, in the order of the ids."""
    if not 0 < len(listed) <= MOST_CATEGORIES:
        raise DataError(f"{_show(path)}: has {len(listed)} categories; accepted: 1 to {MOST_CATEGORIES}")
    names = {}
    for number, category in enumerate(listed):
        where = f"{_show(path)}: categories[{number}]"
        entry = _mapping(category, where)
        category_id, name = _id(entry, "id", where), entry.get("name")
        if category_id in names:
            raise DataError(f"{where}: has the id {category_id} of another category; accepted: an id for each")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: name is {_brief(name)}; accepted: text")
        names[category_id] = printable(name.strip())  # as checkpoints have it, whose names are looked for here
    return dict(sorted(names.items()))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_brief(value)}; accepted: an object")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _id(entry: dict[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if not _is_id(value):
        raise DataError(f"{where}: {name} is {_brief(value)}; accepted: a whole number")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # nan is not


def _file_name(entry: dict[str, Any], where: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not _plain(name) or len(name) > 4096 or not _is_path(name):
        raise DataError(f"{where}: file_name is {_brief(name)}; accepted: a path")
    if ".." in _plain(name).split("/"):
        raise DataError(f"{where}: file_name is {_brief(name)}, which leads out of the folder; accepted: one in it")
    return name


def _is_path(name: str) -> bool:
    """Whether the system takes it."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _size(entry: dict[str, Any], where: str) -> tuple[int, int]:
    """Height and width; 0 if the file does not say them."""
    size = entry.get("height") or 0, entry.get("width") or 0
    if not all(_is_number(side) and 0 <= side <= MOST_SIDE and side == int(side) for side in size):
        raise DataError(
            f"{where}: height and width are {_brief(entry.get('height'))} and {_brief(entry.get('width'))}; accepted: "
            f"whole numbers of pixels, 1 to {MOST_SIDE}"
        )
    return int(size[0]), int(size[1])


def _ids(ids: Iterable[int]) -> str:
    return shorten([str(i) for i in sorted(ids)], 10)


def _quote(name: str) -> str:
    return printable(name[:200])


def _brief(value: Any) -> str:
    """A value of a JSON file, for messages."""
    if isinstance(value, dict | list) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _show(path: str | Path) -> str:
    return printable(str(path))
