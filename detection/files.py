"""Finding objects in image files, for people and for programs: text, JSON, CSV, pictures, COCO's results."""

import colorsys
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset

from data.decoding import Decoder
from data.sources import read_file
from detection.evaluate import Objects
from detection.metrics import result_entry
from detection.trained import Preparation, Prepared, TrainedDetector
from runtime.signals import ignore_signals
from utils import UserError, printable, writing_to

CSV_HEADER = ("file", "rank", "class", "index", "score", "left", "top", "right", "bottom")


@dataclass
class Found:
    """What is in an image file.

    Attributes:
        objects: class, label, score and box of each, the best first. Boxes are left, top, right and bottom, in pixels.
        error: why the file cannot be read.
    """

    path: str
    objects: Sequence[tuple[str, int, float, list[float]]] = ()
    error: str = ""

    def at_least(self, score: float, most: int | None = None) -> "Found":
        """The same without less likely objects, and with at most so many."""
        return Found(self.path, [found for found in self.objects if found[2] >= score][:most], self.error)


class Annotations:
    """Numbers of images and classes in a file of COCO's format, and the sizes of images.

    Args:
        classes: of the detector, in label order.

    Raises:
        UserError: it cannot be read, or lacks a class.
    """

    def __init__(self, path: Path, classes: Sequence[str]):
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            images = content["images"]
            categories = {printable(c["name"].strip()): c["id"] for c in content["categories"]}
            self.images = {i["file_name"]: (i["id"], (i["height"], i["width"])) for i in images}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--annotations {path}: cannot be read as COCO's annotations: {error!r}") from error
        missing = [name for name in classes if name not in categories]
        if missing:
            raise UserError(
                f"--annotations {path}: has no category {missing[0]!r}, which the detector finds; its "
                f"categories: {', '.join(categories)}"
            )
        self.category_ids = [categories[name] for name in classes]

    def of(self, path: str) -> tuple[int, tuple[int, int]]:
        """Number, and height and width, of the image whose name the path ends in. Raises UserError if there is none."""
        parts = PurePath(path).parts
        for start in range(len(parts)):
            image = self.images.get("/".join(parts[start:]))
            if image:
                return image
        raise UserError(f"{printable(path)}: is not among the images of --annotations {self.path}")


class PreparedFiles(Dataset):
    """Image files: (path, prepared, "") or, of one that cannot be read, (path, None, reason)."""

    def __init__(self, paths: Sequence[str], sizes: Sequence[Any], prepare: Preparation, decoder: Decoder):
        self.paths, self.sizes, self.prepare, self.decoder = paths, sizes, prepare, decoder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Prepared | None, str]:
        path = self.paths[index]
        try:
            return path, self.prepare(self.decoder(read_file(path), printable(path), self.sizes[index])), ""
        except OSError as error:
            return path, None, f"{printable(path)}: {error.strerror}" if error.strerror else str(error)


def find(
    detector: TrainedDetector, paths: Sequence[str], sizes: Sequence[Any], batch_size: int = 16, workers: int = 0
) -> Iterator[Found]:
    """What is in each image file, in order.

    Args:
        sizes: (height, width) that someone has noted for each, see `Decoder`; or None.
    """
    dataset = PreparedFiles(paths, sizes, detector.prepare, detector.decoder)
    options = {"num_workers": workers, "worker_init_fn": ignore_signals}
    for batch in DataLoader(dataset, batch_size, collate_fn=list, **options):
        results = iter(detector.find([prepared for _, prepared, _ in batch if prepared is not None]))
        for path, prepared, error in batch:
            yield Found(path, error=error) if prepared is None else Found(path, listed(next(results), detector.classes))


def listed(objects: Objects, classes: Sequence[str]) -> list[tuple[str, int, float, list[float]]]:
    columns = (objects[name].tolist() for name in ("labels", "scores", "boxes"))
    return [(classes[label], label, score, box) for label, score, box in zip(*columns, strict=True)]


def as_text(found: Found) -> str:
    """A line: the path, then each object, by tabs."""
    if found.error:
        return ""
    objects = (f"{name} {score:.4f} {','.join(f'{x:.1f}' for x in box)}" for name, _, score, box in found.objects)
    return "\t".join([printable(found.path), *objects]) + "\n"


def as_json(found: Found) -> str:
    """A line: an object."""
    if found.error:
        return json.dumps({"file": found.path, "error": found.error}) + "\n"
    objects = [
        {"class": name, "index": label, "score": round(score, 6), "box": [round(x, 3) for x in box]}
        for name, label, score, box in found.objects
    ]
    return json.dumps({"file": found.path, "objects": objects}) + "\n"


def as_rows(found: Found) -> list[tuple]:
    """Of CSV, with the columns of `CSV_HEADER`."""
    return [
        (printable(found.path), rank, name, label, f"{score:.6f}", *(f"{x:.1f}" for x in box))
        for rank, (name, label, score, box) in enumerate(found.objects, 1)
    ]


def as_coco(found: Found, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Entries of COCO's results, with the name of the file beside its number."""
    return [
        {**result_entry(image_id, category_ids[label], box, score), "file_name": found.path}
        for _, label, score, box in found.objects
    ]


def prepare_folder(folder: Path) -> None:
    """Makes a folder for pictures. Raises UserError if it has files already."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--draw {folder}: is not empty; choose a new folder")


def save_picture(found: Found, folder: Path, decoder: Decoder, size: Any) -> None:
    """Writes the image with its boxes, as <its name>.jpg or, if that is taken, <its name>_2.jpg and so on.

    Args:
        size: see `find`.
    """
    image = drawn(decoder(read_file(found.path), printable(found.path), size), found)
    stem, number = PurePath(found.path).stem, 1
    path = folder / f"{stem}.jpg"
    while path.exists():
        number += 1
        path = folder / f"{stem}_{number}.jpg"
    with writing_to(folder):
        image.save(path, quality=92)


def drawn(image: Image.Image, found: Found) -> Image.Image:
    """The image, RGB, with boxes and names in a colour of each class; it is changed."""
    pen = ImageDraw.Draw(image)
    line = max(round(max(image.size) / 400), 1)
    font = ImageFont.load_default(size=max(round(max(image.size) / 50), 10))
    for name, label, score, (left, top, right, bottom) in reversed(found.objects):  # the best on top
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.7, 1.0))
        pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=line)
        text = f"{printable(name)} {score:.2f}"
        place = pen.textbbox((left, top), text, font=font)
        up = min(place[3] - top, top)  # above the box, if there is room
        pen.rectangle((place[0], place[1] - up, place[2], place[3] - up), fill=colour)
        pen.text((left, top - up), text, fill="black", font=font)
    return image
