"""Mistakes on the validation data: the worst ones with their images, the confusion matrix, and all predictions."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from sklearn.metrics import confusion_matrix
from tables import as_csv
from tqdm import tqdm

from data import build_eval_loader
from data.sources import Source
from engine import trained
from runtime.distributed import World
from utils import UserError

from .common import WIDTH, pixels, shorten

SUFFIXES = (".png", "_confusion.png", "_predictions.csv")
MOST_CLASSES = 20  # in a confusion matrix that can be read
SHARE = "share of the true class"  # what its colours mean


@dataclass
class Predictions:
    """Of the validation images, a row each.

    Attributes:
        index: in the source.
        readable: whether the image could be read; what follows means nothing where it could not.
        true, predicted: labels.
        p_true, p_predicted: their probabilities.
        loss: cross-entropy.
    """

    index: np.ndarray
    readable: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    p_true: np.ndarray
    p_predicted: np.ndarray
    loss: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """Positions of the mistakes, the highest loss first."""
        wrong = np.flatnonzero(self.readable & (self.true != self.predicted))
        return wrong[np.argsort(-self.loss[wrong], kind="stable")]

    def confusion(self, classes: int) -> np.ndarray:
        """(classes, classes): how many images of a class, by row, were taken for which."""
        true, predicted = self.true[self.readable], self.predicted[self.readable]
        return confusion_matrix(true, predicted, labels=np.arange(classes))


def predict(model: trained.Trained, source: Source) -> Predictions:
    """On all images, as main_eval.py evaluates.

    Raises:
        UserError: what the model gives is not finite.
    """
    world = World(rank=0, local_rank=0, size=1, device=model.device)
    loader = build_eval_loader(model.config, source, world)
    columns = []
    for batch in tqdm(loader, desc="predictions", leave=False, dynamic_ncols=True, disable=None):
        logits = model.logits(batch.image).cpu()
        if not logits.isfinite().all():
            raise UserError(f"{model.path}: the model's outputs are not finite")
        probabilities = logits.softmax(dim=1)
        highest, predicted = probabilities.max(dim=1)
        of_true = probabilities.gather(1, batch.target[:, None])[:, 0]
        loss = F.cross_entropy(logits, batch.target, reduction="none")
        columns.append((batch.index, batch.readable, batch.target, predicted, of_true, highest, loss))
    return Predictions(*(torch.cat(parts).numpy() for parts in zip(*columns, strict=True)))


def most_confused(matrix: np.ndarray, most: int) -> np.ndarray:
    """The labels, in order, of `most` classes: those of the pairs that are taken for each other most often."""
    pairs = np.argsort(-np.triu(matrix + matrix.T, k=1), axis=None, kind="stable")[: most**2]
    labels = np.stack(np.unravel_index(pairs, matrix.shape), axis=1).ravel()
    return np.sort(list(dict.fromkeys(labels.tolist()))[:most])


def draw(args: argparse.Namespace) -> tuple[Figure, Figure, str]:
    if args.data_path:
        args.opts = [*args.opts, "DATA.DATA_PATH", args.data_path]
    model = trained.load_trained(args)
    source = model.validation_source()
    found = predict(model, source)
    images = [pixels(model.transform(source.load(found.index[i]))) for i in found.wrong[: args.count]]
    return (
        draw_mistakes(found, images, source, model.classes),
        draw_confusion(found, model.classes),
        table(found, source, model.classes),
    )


def summary(found: Predictions) -> str:
    """How many mistakes there are, for a title."""
    unreadable = int((~found.readable).sum())
    left_out = f" ({unreadable} that cannot be read left out)" if unreadable else ""
    return f"{len(found.wrong)} of {found.readable.sum()} images wrong{left_out}"


def draw_mistakes(found: Predictions, images: Sequence[np.ndarray], source: Source, classes: Sequence[str]) -> Figure:
    """A grid of the worst mistakes, whose images are given."""
    columns = max(2, min(4, len(images)))  # the title needs the width of two
    rows = max(1, math.ceil(len(images) / columns))
    side = WIDTH / 4
    figure = Figure(figsize=(columns * side, 0.4 + rows * (side + 0.5)), layout="constrained")
    which = f", the {len(images)} of highest loss" if len(images) < len(found.wrong) else ""
    figure.suptitle(summary(found) + which, fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, image, i in zip(panels, images, found.wrong, strict=False):
        axes.imshow(image)
        predicted, true = classes[found.predicted[i]], classes[found.true[i]]
        axes.set_title(
            f"{shorten(source.name(found.index[i]).rpartition('/')[2], 24, keep_end=True)}\n"
            f"predicted {shorten(predicted, 12)}: {found.p_predicted[i]:.2f}\n"
            f"true {shorten(true, 16)}: {found.p_true[i]:.2f}"
        )
    return figure


def draw_confusion(found: Predictions, classes: Sequence[str]) -> Figure:
    size = confusion_size(len(classes))
    figure = Figure(figsize=(size + 1, size + 0.4), layout="constrained")
    image = show_confusion(figure.subplots(), found.confusion(len(classes)), classes, summary(found))
    figure.colorbar(image, shrink=0.6).set_label(SHARE)
    return figure


def confusion_size(classes: int) -> float:
    """Of a panel with a confusion matrix, in inches."""
    return min(WIDTH - 1, 1.2 + 0.32 * min(classes, MOST_CLASSES))


def show_confusion(axes: Axes, matrix: np.ndarray, classes: Sequence[str], title: str) -> AxesImage:
    """Counts (classes, classes), true by predicted class, coloured by their share of the images of the true class. Of
    more than `MOST_CLASSES`, the most confused are shown. Returns what a colour bar needs."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    labels = np.arange(len(classes))
    if len(classes) > MOST_CLASSES:
        labels = most_confused(matrix, MOST_CLASSES)
        shown = matrix[np.ix_(labels, labels)]
        mistakes = shown.sum() - np.trace(shown)
        title += f"\nthe {MOST_CLASSES} most confused of {len(classes)} classes, {mistakes} mistakes among them"
    image = axes.imshow(shares[np.ix_(labels, labels)], cmap="Blues", vmin=0, vmax=1)
    for row, true in enumerate(labels):
        for column, predicted in enumerate(labels):
            if matrix[true, predicted]:
                color = "white" if shares[true, predicted] > 0.5 else "black"
                axes.text(column, row, matrix[true, predicted], ha="center", va="center", color=color)
    names = [shorten(classes[label], 18) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(labels)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    return image


def table(found: Predictions, source: Source, classes: Sequence[str]) -> str:
    titles = ("index", "image", "readable", "true", "predicted", "p_true", "p_predicted", "loss")
    rows = []
    for i in np.argsort(found.index):
        shown = [found.index[i], source.name(found.index[i]), bool(found.readable[i]), classes[found.true[i]]]
        if found.readable[i]:
            numbers = (found.p_true[i], found.p_predicted[i], found.loss[i])
            shown += [classes[found.predicted[i]], *(f"{number:.6g}" for number in numbers)]
        else:
            shown += [None] * 4
        rows.append(shown)
    return as_csv(titles, rows)
