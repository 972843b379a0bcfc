"""Results per class: precision, recall, F1, and which class is taken for which."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import UserError, write_keeping_old

MOST_CONFUSED = 1000  # classes in a table of all pairs; of ImageNet-21K it would have half a billion cells
NOTHING = "(nothing)"  # what an unreadable image is taken for


@dataclass
class Report:
    """Numbers of an evaluation, from 0 to 1 but for `balanced_accuracy`.

    Attributes:
        classes: their names in label order.
        precision, recall, f1: (classes,); 0 where a class is never predicted, or has no images.
        images: (classes,) int, of each class.
        balanced_accuracy: the mean recall of the classes that have images, in percent.
        confusion: images by true and predicted class, (classes, classes + 1); the last column counts images that
            are taken for nothing. None with more than MOST_CONFUSED classes.
        text: scikit-learn's report.
    """

    classes: list[str]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    images: np.ndarray
    balanced_accuracy: float
    confusion: np.ndarray | None
    text: str

    @classmethod
    def of(cls, targets: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> "Report":
        """From targets and predictions, both (images,) labels; -1: predicted as nothing."""
        # A second to import, for this alone
        from sklearn.metrics import classification_report, confusion_matrix, precision_recall_fscore_support

        labels = np.arange(len(classes))
        values = precision_recall_fscore_support(targets, predicted, labels=labels, zero_division=0)
        text = classification_report(
            targets, predicted, labels=labels, target_names=list(classes), digits=4, zero_division=0
        )
        confusion = None
        if len(classes) <= MOST_CONFUSED:
            confusion = confusion_matrix(targets, predicted, labels=[*labels, -1])[:-1]
        balanced = 100 * float(values[1][values[3] > 0].mean())
        return cls(list(classes), *values, balanced, confusion, text)

    def write(self, path: Path) -> None:
        """Writes one file, of the kind that its suffix says, or a folder with report.txt, report.json, classes.csv and
        confusion.csv. Different files that are there are kept, as `write_keeping_old` says.

        Raises:
            UserError: it cannot be written.
        """
        if path.suffix and not path.is_dir():
            kinds = {".txt": self.as_text, ".json": self.as_json, ".csv": self.as_csv}
            files = {path: kinds[path.suffix]()}
        else:
            files = {path / "report.txt": self.as_text(), path / "report.json": self.as_json()}
            files[path / "classes.csv"] = self.as_csv()
            if self.confusion is not None:
                files[path / "confusion.csv"] = self.confusion_as_csv()
        try:
            for file, content in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_keeping_old(file, content)
        except OSError as error:
            raise UserError(f"--report {path}: cannot be written: {error.strerror}") from error

    def as_text(self) -> str:
        """For people: scikit-learn's report, and the pairs of classes that are confused most."""
        lines = [self.text, f"balanced accuracy {self.balanced_accuracy:.3f} %"]
        if self.confusion is not None:
            pairs = [f"{images:8d}  {true} taken for {other}" for true, other, images in self.mistakes()[:20]]
            lines += ["", "images confused most:", *(pairs or ["    none"])]
        return "\n".join(lines) + "\n"

    def mistakes(self) -> list[tuple[str, str, int]]:
        """True class, predicted class and images of every pair that is confused, the most frequent first."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        rows, columns = np.nonzero(wrong)
        order = np.argsort(-wrong[rows, columns], kind="stable")
        names = [*self.classes, NOTHING]
        return [
            (names[row], names[column], int(wrong[row, column]))
            for row, column in zip(rows[order], columns[order], strict=True)
        ]

    def as_json(self) -> str:
        """All numbers."""
        present = self.images > 0
        shares = self.images / self.images.sum()
        averages = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        content = {
            "balanced_accuracy": self.balanced_accuracy,
            "macro": {name: float(values[present].mean()) for name, values in averages.items()},
            "weighted": {name: float((values * shares).sum()) for name, values in averages.items()},
            "classes": self.rows(),
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }
        return json.dumps(content, indent=1) + "\n"

    def as_csv(self) -> str:
        """A line per class."""
        rows = self.rows()
        return _csv([list(rows[0]), *(list(row.values()) for row in rows)])

    def rows(self) -> list[dict[str, Any]]:
        """Of each class: class, precision, recall, f1, images."""
        columns = (self.precision.tolist(), self.recall.tolist(), self.f1.tolist(), self.images.tolist())
        names = ("class", "precision", "recall", "f1", "images")
        return [dict(zip(names, row, strict=True)) for row in zip(self.classes, *columns, strict=True)]

    def confusion_as_csv(self) -> str:
        """A line per true class, a column per predicted one."""
        header = ["true \\ predicted", *self.classes, NOTHING]
        rows = zip(self.classes, self.confusion.tolist(), strict=True)
        return _csv([header, *([name, *counts] for name, counts in rows)])


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
