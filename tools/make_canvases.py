"""Make images to detect objects in: photographs of clothes, from Fashion-MNIST, on textured backgrounds.

    python tools/make_canvases.py <output>
    python tools/make_canvases.py <output> --train 4000 --val 1000 --size 256 --aspects 0.75 1 1.33

Writes, in COCO's layout, train/ and val/ with images, and annotations/instances_train.json and instances_val.json, into
a new folder. Each canvas has a few items of 10 classes, in random sizes and tints, mirrored or not, which overlap
little. The background is of coloured clouds, noise, and items whose pixels are shuffled. Training canvases have the
60,000 training items only, validation canvases the 10,000 test items. The same options give the same pixels.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import above, at_least

from utils import UserError, parse_first, printable, run_entry_point, shorten, writing_to


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count, add = at_least(1), parser.add_argument
    add("output", type=Path, help="a new folder")
    add("--items", type=Path, metavar="FOLDER", help="with Fashion-MNIST's four IDX files (default: Debian's)")
    add("--train", type=count, default=4000, metavar="N", help="training canvases (4000)")
    add("--val", type=count, default=1000, metavar="N", help="validation canvases (1000)")
    add("--size", type=at_least(32), nargs="+", default=[128, 160], metavar="N", help="side, or height width (128 160)")
    add(
        "--aspects",
        type=above(0),
        nargs="+",
        metavar="X",
        help="ratios of width to height, of which each canvas has one, with as many pixels as --size",
    )
    add("--item-size", type=at_least(8), nargs=2, default=[20, 80], metavar=("MIN", "MAX"), help="longer side (20 80)")
    add("--most", type=count, default=5, metavar="N", help="items on a canvas at most (5)")
    add("--overlap", type=at_least(0, float), default=0.2, metavar="X", help="of the smaller of two boxes (0.2)")
    add("--format", choices=["jpg", "png"], default="jpg", help="(jpg)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="(0)")
    args = parser.parse_args(argv)
    if len(args.size) > 2:
        parser.error(f"argument --size: {len(args.size)} numbers; accepted: one, or height and width")
    args.size = tuple(args.size * 2)[:2]
    if args.item_size[0] > args.item_size[1]:
        parser.error(f"argument --item-size: {args.item_size[0]} {args.item_size[1]}; accepted: two in ascending order")
    if max(args.aspects or [1]) > 4 or min(args.aspects or [1]) < 0.25:
        parser.error("argument --aspects: accepted: ratios from 0.25 to 4")
    if args.overlap > 1:
        parser.error(f"argument --overlap: {args.overlap:g}; accepted: 0 to 1")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

from data.idx import DEBIAN_FASHION_MNIST, find_idx, read_pair

PREFIXES = {"train": "train", "val": "t10k"}  # of the IDX files
INK = 0.25  # a pixel of at least this opacity is part of an item, and of its box
OPAQUE = 60  # grey level, of 255, from which on a pixel hides the background: items have dark parts
SHUFFLED_ITEMS = 4
TRIES = 20  # to find room for an item
JPEG_QUALITY = 92


class Canvas(NamedTuple):
    """An image and what is on it."""

    pixels: np.ndarray  # (H, W, 3) uint8
    boxes: list[list[int]]  # left, top, width, height in pixels
    labels: list[int]


def read_items(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Photographs (N, 28, 28) and their classes (N,), uint8.

    Raises:
        UserError: a file is missing or damaged.
    """
    names = [f"{PREFIXES[split]}-{content}-ubyte" for content in ("images-idx3", "labels-idx1")]
    found = find_idx(folder, names)
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{printable(str(folder))}: lacks {shorten(missing)}, with .gz or without; accepted: the folder of "
            "Fashion-MNIST's four files (--items)"
        )
    return read_pair(*(found[name] for name in names), len(FashionMNIST.classes))


def canvas_sizes(size: tuple[int, int], aspects: Sequence[float] | None) -> list[tuple[int, int]]:
    """Height and width of the canvases."""
    if not aspects:
        return [size]
    pixels = size[0] * size[1]
    return [(round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))) for aspect in aspects]


def draw_canvas(
    rng: np.random.Generator,
    items: np.ndarray,
    targets: np.ndarray,
    size: tuple[int, int],
    item_size: tuple[int, int],
    most: int,
    overlap: float,
) -> Canvas:
    """
    Args:
        items: (N, 28, 28) uint8, of the classes `targets` (N,).
        size: height and width in pixels.
        item_size: least and greatest longer side of an item.
        most: items.
        overlap: how much of the smaller of two boxes the other may cover, 0 to 1.
    """
    image = background(rng, items, size)
    boxes, labels = [], []
    for _ in range(rng.integers(1, most, endpoint=True)):
        index = rng.integers(len(items))
        photograph = items[index][:, ::-1] if rng.random() < 0.5 else items[index]
        item = resized(inked(photograph), min(rng.integers(*item_size, endpoint=True), *size))
        opacity = np.minimum(item / OPAQUE, 1)
        rows, columns = (np.flatnonzero((opacity >= INK).any(axis=axis)) for axis in (1, 0))
        height, width = item.shape
        for _ in range(TRIES):
            top, left = rng.integers(size[0] - height, endpoint=True), rng.integers(size[1] - width, endpoint=True)
            box = [left + columns[0], top + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            if all(covered(box, other) <= overlap for other in boxes):
                break
        else:
            continue
        tint = rng.uniform(0.5, 1, 3)
        part = image[top : top + height, left : left + width]
        part += opacity[..., None] * (item[..., None] / 255 * tint - part)
        boxes.append([int(number) for number in box])
        labels.append(int(targets[index]))
    return Canvas((image * 255).round().astype(np.uint8), boxes, labels)


def background(rng: np.random.Generator, items: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) in [0, 1]: clouds in two scales, items with shuffled pixels, and noise."""
    image = np.zeros((*size, 3))
    for cell, most in ((48, 0.5), (12, 0.2)):
        clouds = rng.uniform(0, most, (max(size[0] // cell, 2), max(size[1] // cell, 2), 3))
        for channel in range(3):
            layer = Image.fromarray(clouds[..., channel].astype(np.float32))
            image[..., channel] += np.asarray(layer.resize(size[::-1], Image.Resampling.BICUBIC))
    for _ in range(SHUFFLED_ITEMS):
        pixels = rng.permutation(items[rng.integers(len(items))].ravel()).reshape(28, 28)
        side = int(rng.integers(16, max(min(size) // 2, 17)))
        patch = resized(pixels, side) / 255
        top, left = (rng.integers(length - side, endpoint=True) for length in size)
        part = image[top : top + side, left : left + side]
        part += rng.uniform(0.3, 0.7) * (patch[..., None] * rng.uniform(0.5, 1, 3) - part)
    image += rng.normal(0, 0.03, (*size, 1))
    return image.clip(0, 1)


def inked(photograph: np.ndarray) -> np.ndarray:
    """Without the black border."""
    rows, columns = (np.flatnonzero((photograph >= INK * OPAQUE).any(axis=axis)) for axis in (1, 0))
    return photograph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else photograph


def resized(grey: np.ndarray, longer: int) -> np.ndarray:
    """Grey levels (h, w) with `longer` pixels on the longer side, float in [0, 255]."""
    scale = longer / max(grey.shape)
    height, width = (max(round(side * scale), 1) for side in grey.shape)
    image = Image.fromarray(np.ascontiguousarray(grey)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float64)


def covered(box: Sequence[int], other: Sequence[int]) -> float:
    """How much of the smaller of two boxes (left, top, width, height) is in both, 0 to 1."""
    sides = [min(box[i] + box[i + 2], other[i] + other[i + 2]) - max(box[i], other[i]) for i in (0, 1)]
    return max(sides[0], 0) * max(sides[1], 0) / min(box[2] * box[3], other[2] * other[3])


def make_split(args: argparse.Namespace, split: str, items: tuple[np.ndarray, np.ndarray]) -> None:
    """Writes the canvases of a split, and their annotations."""
    count, folder = getattr(args, split), args.output / split
    folder.mkdir()
    sizes = canvas_sizes(args.size, args.aspects)
    images, annotations = [], []
    for number in tqdm(range(1, count + 1), split, disable=not sys.stderr.isatty()):
        rng = np.random.default_rng((args.seed, split == "train", number))
        size = sizes[rng.integers(len(sizes))]
        canvas = draw_canvas(rng, *items, size, args.item_size, args.most, args.overlap)
        name = f"{number:06d}.{args.format}"
        Image.fromarray(canvas.pixels).save(
            folder / name, **({"quality": JPEG_QUALITY} if args.format == "jpg" else {})
        )
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for box, label in zip(canvas.boxes, canvas.labels, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box}
            annotations.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label, "name": name} for label, name in enumerate(FashionMNIST.classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = args.output / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    print(f"{printable(str(folder))}: {count} images, {len(annotations)} items")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    items = {split: read_items(args.items or Path(DEBIAN_FASHION_MNIST), split) for split in PREFIXES}
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"{printable(str(args.output))}: is there already, and not empty; accepted: a new folder")
    with writing_to(args.output):
        (args.output / "annotations").mkdir(parents=True)
        for split in PREFIXES:
            make_split(args, split, items[split])


if __name__ == "__main__":
    run_entry_point(main)
