"""Write annotations in COCO's layout for images that have YOLO's text files or Pascal VOC's XML files.

    python tools/to_coco.py yolo <data.yaml>
    python tools/to_coco.py voc <folder> --output <new-folder>

Writes annotations/instances_train.json, instances_val.json and, if there are such images, instances_test.json into the
folder of the data, from which main_detect.py --data-path reads them. Images stay where they are. With --output, all of
it goes to a new folder, where the images are links. Nothing is overwritten. What was unusual is counted and printed.

yolo: a data.yaml with names and with train, val and perhaps test, each a folder, a list of folders, or a .txt file of
images. The labels of images/a.jpg are in labels/a.txt: class, centre, width and height as fractions of the image, or
class and the corners of a polygon, whose box is taken.

voc: Annotations/ and JPEGImages/ with ImageSets/Main/train.txt and val.txt; or train/ and val/ (or valid/) with an XML
file beside each image. Objects that are "difficult" become crowds (iscrowd), which are neither learned nor counted.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, printable, run_entry_point, shorten, writing_to


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("format", choices=["yolo", "voc"])
    add("data", type=Path, help="yolo: data.yaml, or the folder with it; voc: the folder")
    add("--output", type=Path, metavar="FOLDER", help="a new folder (default: the folder of the data)")
    add(
        "--first-pixel",
        type=int,
        choices=[0, 1],
        default=1,
        help="voc: 1, pixels are counted from 1, and the last one is in the box, as the format says (the default); 0, "
        "corners are measured from 0, as some tools write them",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_first(parse_args)

from torchvision.datasets.folder import IMG_EXTENSIONS

from config import read_yaml
from data.decoding import shown_size
from data.errors import UnreadableImage
from data.listing import find_images

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
MOST_LABEL_BYTES = 2**26
# Numbers in text files are rounded.
BEYOND = 1e-3


class Split:
    """The images and boxes of one split.

    Args:
        root: what file names are relative to.

    Attributes:
        counts: what was unusual, and how often.
    """

    def __init__(self, root: Path):
        self.root, self.images, self.annotations = root, [], []
        self.counts: Counter[str] = Counter()

    def add_image(self, path: str, noted: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Height and width of an image, which is added; None if it cannot be read, which is counted.

        Args:
            noted: the size that its boxes are in, if that is known.
        """
        name = os.path.relpath(os.path.abspath(path), os.path.abspath(self.root)).replace(os.sep, "/")
        if name.startswith("../"):
            raise UserError(f"{printable(path)}: is not in {_show(self.root)}; accepted: images in that folder")
        try:
            height, width = shown_size(path, noted)
        except UnreadableImage:
            self.counts["images cannot be read and are left out"] += 1
            return None
        self.images.append({"id": len(self.images) + 1, "file_name": name, "width": width, "height": height})
        return height, width

    def add_box(self, label: int, corners: Sequence[float], area: float | None = None, crowd: bool = False) -> None:
        """A box of the image that was added last.

        Args:
            corners: left, top, right, bottom in pixels.
            area: of the object; by default that of its box.
        """
        left, top, right, bottom = corners
        if right <= left or bottom <= top:
            self.counts["boxes have no area and are left out"] += 1
            return
        box = [round(number, 3) for number in (left, top, right - left, bottom - top)]
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": self.images[-1]["id"],
                "category_id": label + 1,
                "bbox": box,
                "area": round(box[2] * box[3] if area is None else area, 3),
                "iscrowd": int(crowd),
            }
        )


def read_yolo(path: Path) -> tuple[Path, list[str], dict[str, Split]]:
    """The folder of the data, the names of the classes, and the splits of a data.yaml.

    Raises:
        UserError: something is missing, or is not in that format.
    """
    file = path / "data.yaml" if path.is_dir() else path
    content = read_yaml(file)
    names = content.get("names")
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise UserError(
            f"{_show(file)}: names is {str(names)[:200]!r}; accepted: a list of names, or a mapping 0: name"
        )
    names = [str(name) for name in names]
    root = file.parent / str(content.get("path") or "")
    root = root if root.is_dir() else file.parent
    splits = {}
    for split, keys in SPLITS.items():
        places = next((content[key] for key in keys if content.get(key)), None)
        if places is None:
            continue
        try:
            images = list(yolo_images(file, root, split, places))
        except UserError as error:
            if split != "test":
                raise
            print(f"left out: {error}", file=sys.stderr)  # tools name a test split that they have not made
            continue
        splits[split] = Split(root)
        for image in images:
            read_yolo_labels(splits[split], image, names)
    return root, names, splits


def yolo_images(file: Path, root: Path, split: str, places: Any) -> Iterator[str]:
    """The paths of a split's images."""
    for place in places if isinstance(places, list) else [places]:
        if not isinstance(place, str):
            raise UserError(f"{_show(file)}: {split} is {str(place)[:200]!r}; accepted: folders or .txt files")
        # Roboflow writes ../train/images for train/images.
        tried = [root / place, root / place.removeprefix("../")]
        found = next((path for path in tried if path.exists()), None)
        if found is None:
            raise UserError(f"{_show(file)}: {split} is {printable(place)}, but there is no {_show(tried[0])}")
        if found.is_dir():
            yield from find_images(found)
            continue
        for line in read_limited(found).decode("utf-8", "replace").splitlines():
            if line.strip():
                yield os.path.normpath(root / line.strip())


def read_yolo_labels(split: Split, image: str, names: list[str]) -> None:
    """Adds an image and the boxes of its text file."""
    size = split.add_image(image)
    if size is None:
        return
    parts = os.path.splitext(image)[0].split(os.sep)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    path = Path(os.sep.join(parts) + ".txt")
    if not path.is_file():
        split.counts["images have no text file, and count as images of nothing"] += 1
        return
    lines = read_limited(path).decode("utf-8", "replace").splitlines()
    unique = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if repeated := sum(bool(line.strip()) for line in lines) - len(unique):
        split.counts["lines are there twice, and count once"] += repeated
    height, width = size
    for line in unique:
        label, numbers = yolo_line(path, line, names)
        if len(numbers) == 4:
            x, y, w, h = numbers
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            area = None
        else:
            xs, ys = numbers[::2], numbers[1::2]
            corners = (min(xs), min(ys), max(xs), max(ys))
            following = (*range(1, len(xs)), 0)
            twice = sum(xs[i] * ys[j] - xs[j] * ys[i] for i, j in enumerate(following))
            area = abs(twice) / 2 * width * height
            split.counts["polygons are read as their boxes"] += 1
        clipped = [min(max(number, 0.0), 1.0) for number in corners]
        split.add_box(label, [number * side for number, side in zip(clipped, (width, height) * 2, strict=True)], area)


def yolo_line(path: Path, line: str, names: list[str]) -> tuple[int, list[float]]:
    """The class of a line, and its numbers: four of a box, or at least six of a polygon."""
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        label, numbers = math.nan, []
    if not (0 <= label < len(names) and label == int(label)):
        raise UserError(f"{_show(path)}: {line[:100]!r}; accepted: a class from 0 to {len(names) - 1}, then numbers")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise UserError(
            f"{_show(path)}: {line[:100]!r} has {len(numbers)} numbers after the class; accepted: 4 (centre, width, "
            "height), or x and y of 3 points or more"
        )
    if not all(-BEYOND <= number <= 1 + BEYOND for number in numbers):
        raise UserError(f"{_show(path)}: {line[:100]!r}; accepted: fractions of the image's width and height, 0 to 1")
    return int(label), numbers


def read_voc(root: Path, first: int) -> tuple[Path, list[str], dict[str, Split]]:
    """The folder, the names of the classes in alphabetical order, and the splits.

    Args:
        first: the number of the first pixel, see --first-pixel.

    Raises:
        UserError: something is missing, or is not in that format.
    """
    files = voc_files(root)
    documents = {
        split: [(path, parse_xml(path)) for path in paths] for split, paths in files.items()
    }  # small: a megabyte for a thousand
    names = sorted(
        {_text(item, "name", path) for found in documents.values() for path, d in found for item in _objects(d)}
    )
    if not names:
        raise UserError(f"{_show(root)}: its XML files have no object; accepted: some with a name and a bndbox")
    labels = {name: label for label, name in enumerate(names)}
    splits = {}
    for name, found in documents.items():
        splits[name] = split = Split(root)
        for path, document in found:
            read_voc_objects(split, path, document, labels, first)
    return root, names, splits


def voc_files(root: Path) -> dict[str, list[Path]]:
    """The XML files of each split."""
    files = {}
    for split, names in SPLITS.items():
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if listed.is_file():
            lines = read_limited(listed).decode("utf-8", "replace").splitlines()
            files[split] = [root / "Annotations" / f"{line.split()[0]}.xml" for line in lines if line.strip()]
        elif folder is not None:
            files[split] = sorted(folder.rglob("*.xml"))
    if not files.get("train"):
        raise UserError(
            f"{_show(root)}: no training images; accepted: Annotations/, JPEGImages/ and ImageSets/Main/train.txt and "
            "val.txt, or train/ and val/ with an XML file beside each image"
        )
    return files


def parse_xml(path: Path) -> Element:
    """The root of an XML file that nobody vouches for: entities could make it as large as they like, or read other
    files, so that a document type, which would declare them, is refused.

    Raises:
        UserError: it is missing, no XML, or has a document type.
    """

    def refuse(*_: object) -> None:
        raise UserError(f"{_show(path)}: refused: it has a document type (DOCTYPE); accepted: XML without one")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(read_limited(path), True)
        return builder.close()
    except expat.ExpatError as error:
        raise UserError(f"{_show(path)}: not XML, or damaged: {error}") from error


def read_voc_objects(split: Split, path: Path, document: Element, labels: dict[str, int], first: int) -> None:
    """Adds an image and the objects of its XML file."""
    image = voc_image(path, document)
    if image is None:
        split.counts["XML files have no image and are left out"] += 1
        return
    sides = [(document.findtext(f"size/{name}") or "").strip() for name in ("height", "width")]
    noted = tuple(int(side) if side.isdecimal() and len(side) < 9 else 0 for side in sides)
    size = split.add_image(image, noted if min(noted) else None)
    if size is None:
        return
    if size != noted:
        split.counts["XML files do not say the size of their image, which the image does"] += 1
    for item in _objects(document):
        box = item.find("bndbox")
        if box is None:
            split.counts["objects have no bndbox and are left out"] += 1
            continue
        left, top, right, bottom = (_number(box, name, path) for name in ("xmin", "ymin", "xmax", "ymax"))
        if first == 1:
            if left < 1 or top < 1:
                split.counts["boxes begin before pixel 1: are they measured from 0 (--first-pixel 0)?"] += 1
            left, top = left - 1, top - 1  # the last pixel belongs to the box: its far side is its number
        difficult = (item.findtext("difficult") or "0").strip() not in ("0", "")
        if difficult:
            split.counts["objects are difficult, and become crowds (iscrowd)"] += 1
        split.add_box(labels[_text(item, "name", path)], (left, top, right, bottom), crowd=difficult)


def voc_image(path: Path, document: Element) -> str | None:
    """The image of an XML file: of the same name, beside it or in JPEGImages/, else the one that it names."""
    folders = [path.parent, *(path.parent.parent / name for name in ("JPEGImages", "images"))]
    named = (document.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    names = [path.stem + suffix for s in IMG_EXTENSIONS for suffix in (s, s.upper())] + [named] * bool(named)
    return next((str(folder / name) for name in names for folder in folders if (folder / name).is_file()), None)


def _objects(document: Element) -> list[Element]:
    """Not their parts, which are objects inside them."""
    return document.findall("object")


def _text(item: Element, name: str, path: Path) -> str:
    text = (item.findtext(name) or "").strip()
    if not text:
        raise UserError(f"{_show(path)}: an object has no {name}; accepted: one for each")
    return text


def _number(box: Element, name: str, path: Path) -> float:
    text = (box.findtext(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        raise UserError(f"{_show(path)}: {name} is {text[:100]!r}; accepted: a number of pixels")
    return value


def read_limited(path: Path) -> bytes:
    """A file of labels or names. Raises UserError if it cannot be read, or is too large to be one."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_LABEL_BYTES + 1)
    except OSError as error:
        raise UserError(f"{_show(path)}: cannot be read: {error.strerror}") from error
    if len(content) > MOST_LABEL_BYTES:
        raise UserError(
            f"{_show(path)}: has more than {MOST_LABEL_BYTES:,} bytes; accepted: labels of an image, or names"
        )
    return content


def write(root: Path, names: list[str], splits: dict[str, Split], output: Path | None) -> None:
    """Writes the annotations, and links to the images if they go to another folder.

    Raises:
        UserError: a file is there already, or cannot be written.
    """
    target = output or root
    files = {split: target / "annotations" / f"instances_{split}.json" for split in splits}
    for file in files.values():
        if file.exists():
            raise UserError(f"{_show(file)}: is there already; move it away, or give another --output")
    if output and output.exists() and any(output.iterdir()):
        raise UserError(f"--output {_show(output)}: is not empty; accepted: a new folder")
    categories = [{"id": label, "name": name} for label, name in enumerate(names, start=1)]
    with writing_to(target):
        (target / "annotations").mkdir(parents=True, exist_ok=True)
        for split, content in splits.items():
            for image in content.images if output else []:
                link = target / image["file_name"]
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((root / image["file_name"]).absolute())
            lists = {"images": content.images, "annotations": content.annotations, "categories": categories}
            with open(files[split], "x", encoding="utf-8") as file:
                json.dump(lists, file)
            print(
                f"{_show(files[split])}: {len(content.images)} images, {len(content.annotations)} boxes, "
                f"{len(names)} categories"
            )
            for note, count in content.counts.items():
                print(f"  {count} {note}")


def _show(path: Path) -> str:
    return printable(str(path))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.data.exists():
        raise UserError(f"{_show(args.data)}: no such file or folder")
    root, names, splits = read_yolo(args.data) if args.format == "yolo" else read_voc(args.data, args.first_pixel)
    if not splits or any(not split.images for split in splits.values()):
        empty = [name for name in ("train", "val") if name not in splits or not splits[name].images]
        raise UserError(f"{_show(args.data)}: no images for {shorten(empty or list(splits))}")
    write(root, names, splits, args.output)
    if "val" not in splits:
        print("note: there is no validation split, which main_detect.py needs", file=sys.stderr)


if __name__ == "__main__":
    run_entry_point(main)
