"""Average precision of random boxes by pycocotools and by faster-coco-eval: do they agree, and how long it takes.

    pip install pycocotools faster-coco-eval
    python benchmarks/coco_eval/measure.py > benchmarks/coco_eval/coco_eval.md

Each case has boxes of random sizes and classes. What is found are the true boxes, moved, some with another class, and
boxes anywhere.
"""

import importlib.metadata
import platform
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench.report import cpu_name
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tables import markdown

from detection.metrics import evaluate

SEEDS = 20
# Images, classes, true boxes and found boxes of an image (means), crowds among the true ones, whether scores are
# rounded to tenths (ties)
CASES = {
    "no crowds": (60, 8, 6, 20, 0.0, False),
    "crowds": (60, 8, 6, 20, 0.2, False),
    "equal scores": (60, 8, 6, 20, 0.2, True),
    "more than 100 found of an image and class": (10, 1, 20, 300, 0.2, True),
    "classes and images without objects": (60, 80, 0.5, 5, 0.2, False),
}
LARGE = (5000, 80, 7, 100, 0.01, False)  # as many images, classes and boxes as COCO's val2017


def boxes(draw: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4), left, top, width, height, of sides from 4 to 300 pixels, in an image of 640 x 480."""
    sides = np.exp(draw.uniform(np.log(4), np.log(300), (count, 2)))
    return np.concatenate([draw.uniform(0, (640, 480), (count, 2)) - sides / 2, sides], axis=1)


def case(
    seed: int, images: int, classes: int, true: float, found: float, crowds: float, rounded: bool
) -> tuple[dict[str, list], dict[str, list]]:
    """Data sets of what is there and what is found, in COCO's layout."""
    draw = np.random.default_rng(seed)
    there, seen = [], []
    for image in range(images):
        own = boxes(draw, draw.poisson(true))
        labels = draw.integers(0, classes, len(own))
        for box, label in zip(own, labels, strict=True):
            entry = {"id": len(there) + 1, "image_id": image, "category_id": int(label), "bbox": box.tolist()}
            outline = draw.uniform(0.4, 1)  # of the box, is the object's
            crowd = int(draw.random() < crowds)
            there.append({**entry, "area": float(box[2] * box[3] * outline), "iscrowd": crowd})
        count = draw.poisson(found)
        moved = own[draw.integers(0, len(own), count // 2)] if len(own) else own
        moved = moved + draw.normal(0, 0.08, moved.shape) * np.tile(moved[:, 2:], 2)
        guesses = np.concatenate([moved, boxes(draw, count - len(moved))])
        guesses[:, 2:] = guesses[:, 2:].clip(1)
        for box in guesses:
            score = float(draw.random())
            label = int(labels[draw.integers(len(labels))] if len(labels) and draw.random() < 0.8 else 0)
            entry = {"id": len(seen) + 1, "image_id": image, "category_id": label, "bbox": box.tolist(), "iscrowd": 0}
            seen.append({**entry, "area": float(box[2] * box[3]), "score": round(score, 1) if rounded else score})
    pictures = [{"id": image, "width": 640, "height": 480} for image in range(images)]
    shared = {"images": pictures, "categories": [{"id": label, "name": str(label)} for label in range(classes)]}
    return {**shared, "annotations": there}, {**shared, "annotations": seen}


def compare(seed: int, *settings) -> tuple[float, float, list[float]]:
    """The largest difference of any precision, that of the first six numbers, and the seconds of each library."""
    results, seconds = [], []
    for library in ((COCO, COCOeval), (FasterCOCO, COCOeval_faster)):
        data = case(seed, *settings)  # anew: they write into it
        started = time.perf_counter()
        results.append(evaluate(*data, *library))
        seconds.append(time.perf_counter() - started)
    (precision, numbers), (other, others) = results
    return np.abs(precision - other).max(), np.abs(np.subtract(numbers[:6], others[:6])).max(), seconds


def main() -> None:
    names = ("pycocotools", "faster-coco-eval", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{cpu_name()}, {versions}, Python {platform.python_version()}, {platform.system()}\n")
    rows = []
    for title, settings, seeds in (
        *((title, settings, SEEDS) for title, settings in CASES.items()),
        ("5,000 images, 80 classes, 100 found of each image", LARGE, 1),
    ):
        found = [compare(seed, *settings) for seed in range(seeds)]
        seconds = np.mean([taken for *_, taken in found], axis=0)
        worst = [f"{max(column):.1e}" for column in list(zip(*found, strict=True))[:2]]
        rows.append((title, seeds, *worst, *(f"{value:.2f}" for value in seconds), f"{seconds[0] / seconds[1]:.1f}"))
    columns = ("random boxes", "seeds", "largest difference of a precision", "of AP", "pycocotools, s")
    print(markdown((*columns, "faster-coco-eval, s", "times as fast"), rows))


if __name__ == "__main__":
    main()
