"""COCO's average precision of boxes, and its file of results."""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from detection.coco import CocoSource
from utils import UserError

MOST_DETECTIONS = 100  # of an image and class, that count: COCO's
# Names of ours, and positions among COCO's twelve numbers
SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5}

# What is found on an image: boxes (n, 4), left, top, right, bottom in pixels of the original; scores and labels, (n,)
Prediction = Mapping[str, Tensor]


class CocoAP:
    """COCO's average precision over all images of a source.

    Images without predictions count: their objects are missed. Predictions that are not finite are left out.

    Attributes:
        found: the predictions so far, by image id: (n, 6) float64, left, top, right, bottom, score, label.
    """

    def __init__(self, source: CocoSource):
        self.source = source
        self._ids = {source.image_id(i) for i in range(len(source))}
        self.found: dict[int, np.ndarray] = {}

    def add(self, image_ids: Iterable[int], predictions: Iterable[Prediction]) -> None:
        """
        Args:
            image_ids: as the annotation file has them. An image that comes again counts once, with what comes last.

        Raises:
            KeyError: an image id that the source does not have.
        """
        for image_id, prediction in zip(image_ids, predictions, strict=True):
            if int(image_id) not in self._ids:
                raise KeyError(image_id)
            self.found[int(image_id)] = _rows(prediction)

    def compute(self) -> dict[str, Any]:
        """AP, the mean over IoU thresholds from 0.5 to 0.95 and over classes; AP50 and AP75, at one threshold; and
        AP_small, AP_medium and AP_large, of objects of less than 32 x 32 pixels, up to 96 x 96, and more; `per_class`,
        the AP of each class by its name. All from 0 to 1; nan where there are no such objects.

        Raises:
            UserError: the library is not installed.
        """
        truth, found = self._datasets()
        precision, summary = evaluate(truth, found, *_library())
        of_class = precision[:, :, :, 0, -1]  # (thresholds, recalls, classes): all areas, MOST_DETECTIONS
        per_class = [_mean(of_class[:, :, label]) for label in range(len(self.source.classes))]
        result = {name: summary[position] for name, position in SUMMARY.items()}
        result = {name: float(value) if value >= 0 else math.nan for name, value in result.items()}
        return {**result, "per_class": dict(zip(self.source.classes, per_class, strict=True))}

    def _datasets(self) -> tuple[dict[str, list], dict[str, list]]:
        """The truth and what was found, in COCO's layout, with labels as the ids of categories. The ids of images are
        the file's: their order decides between equal scores, of which bfloat16 has many."""
        source = self.source
        truth, found, images = [], [], []
        nothing = np.empty((0, 6))
        for index in range(len(source)):
            image_id, (height, width) = source.image_id(index), source.size(index)
            images.append({"id": image_id, "height": height, "width": width})
            columns = (source.boxes(index), source.labels(index), source.areas(index), source.crowd(index))
            for box, label, area, crowd in zip(*(column.tolist() for column in columns), strict=True):
                entry = _entry(image_id, box, label)
                # Numbered from 1: pycocotools takes a match with number 0 for no match.
                truth.append({**entry, "area": area, "iscrowd": int(crowd), "id": len(truth) + 1})
            for *box, score, label in self.found.get(image_id, nothing).tolist():
                entry = _entry(image_id, box, int(label))
                area = entry["bbox"][2] * entry["bbox"][3]
                found.append({**entry, "score": score, "area": area, "iscrowd": 0, "id": len(found) + 1})
        categories = [{"id": label, "name": name} for label, name in enumerate(source.classes)]
        shared = {"images": images, "categories": categories}
        return {**shared, "annotations": truth}, {**shared, "annotations": found}


def evaluate(
    truth: dict[str, list], found: dict[str, list], coco_type: type, evaluation_type: type
) -> tuple[np.ndarray, Sequence[float]]:
    """COCO's evaluation of boxes.

    Args:
        truth, found: data sets in COCO's layout; what was found has scores.
        coco_type, evaluation_type: pycocotools' COCO and COCOeval, or classes like them.

    Returns:
        Precisions (thresholds, recalls, categories, areas, limits), -1 where there are no objects, and the twelve
        numbers of its summary.
    """
    indexed = []
    with contextlib.redirect_stdout(io.StringIO()):
        for dataset in (truth, found):
            coco = coco_type()
            coco.dataset = dataset
            coco.createIndex()
            indexed.append(coco)
        evaluation = evaluation_type(*indexed, "bbox")
        evaluation.params.maxDets = [1, 10, MOST_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.eval["precision"], evaluation.stats


def _library() -> tuple[type, type]:
    """The classes of the faster library that is installed. They agree to 15 digits (benchmarks/coco_eval)."""
    with contextlib.suppress(ImportError):
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(
            f"COCO's average precision cannot be computed ({error}): pip install -r requirements/detection.txt"
        ) from error
    return COCO, COCOeval


def to_results(
    source: CocoSource, image_ids: Iterable[int], predictions: Iterable[Prediction]
) -> list[dict[str, int | float | list[float]]]:
    """What COCO's format of results says of the predictions: image_id, category_id (as the annotation file has them),
    bbox [left, top, width, height] in pixels of the original, score. Ready for `json.dump`; to be written to one file.
    """
    return [
        result_entry(int(image_id), source.category_ids[int(label)], box, score)
        for image_id, prediction in zip(image_ids, predictions, strict=True)
        for *box, score, label in _rows(prediction).tolist()
    ]


def result_entry(image_id: int, category_id: int, box: Sequence[float], score: float) -> dict[str, Any]:
    """An entry of COCO's results.

    Args:
        box: left, top, right, bottom.
    """
    left, top, right, bottom = box
    bbox = [round(number, 3) for number in (left, top, right - left, bottom - top)]
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": round(score, 6)}


def _rows(prediction: Prediction) -> np.ndarray:
    """(n, 6) float64, left, top, right, bottom, score, label; those that are finite."""
    columns = [prediction[name].detach().cpu().double().numpy() for name in ("boxes", "scores", "labels")]
    rows = np.concatenate([columns[0].reshape(-1, 4), columns[1][:, None], columns[2][:, None]], axis=1)
    return rows[np.isfinite(rows).all(axis=1)]


def _entry(image_id: int, box: Sequence[float], label: int) -> dict[str, Any]:
    left, top, right, bottom = box
    return {"image_id": image_id, "category_id": label, "bbox": [left, top, right - left, bottom - top]}


def _mean(precision: np.ndarray) -> float:
    known = precision[precision >= 0]
    return float(known.mean()) if known.size else math.nan
