"""The figures."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from compare_runs import COLORS
from figures.common import WIDTH, shorten
from figures.mistakes import SHARE, confusion_size, show_confusion
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .evaluation import BINS, CLEAN, Subject


def styles(subjects: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """How each model's line is drawn."""
    for i, subject in enumerate(subjects):
        line = ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        yield {"color": COLORS[i % len(COLORS)], "linestyle": line, "label": shorten(subject.name, 40, keep_end=True)}


def draw_accuracy(subjects: Sequence[Subject]) -> Figure:
    """Accuracy by severity: a panel per corruption, a line per model. Severity 0 is clean."""
    names = subjects[0].corruptions
    columns = min(5, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4, 2.3 * columns), 0.9 + 1.9 * rows + 0.2 * len(subjects)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in panels[len(names) :]:
        axes.remove()
    for i, (axes, name) in enumerate(zip(panels, names, strict=False)):
        severities = [0, *(severity for each, severity in subjects[0].scores if each == name)]
        for subject, style in zip(subjects, styles(subjects), strict=True):
            conditions = [CLEAN, *((name, severity) for severity in severities[1:])]
            values = [subject.scores[condition].accuracy for condition in conditions]
            axes.plot(severities, values, marker="o", markersize=3, linewidth=1.4, **style)
        axes.set_title(name.replace("_", " "))
        axes.set_xticks(severities, ["clean", *map(str, severities[1:])])
        axes.grid(alpha=0.3)
        if i % columns == 0:
            axes.set_ylabel("accuracy, %")
        if i + columns >= len(names):
            axes.set_xlabel("severity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left")
    return figure


def draw_calibration(subjects: Sequence[Subject]) -> Figure:
    """For each model a reliability diagram, and below it how many images have which confidence."""
    columns = min(4, len(subjects))
    blocks = math.ceil(len(subjects) / columns)
    figure = Figure(figsize=(max(4.8, 2.8 * columns), 0.5 + 4.2 * blocks), layout="constrained")
    panels = figure.subplots(2 * blocks, columns, squeeze=False, sharey="row", height_ratios=[2.4, 1] * blocks)
    for i in range(blocks * columns):
        upper, lower = panels[2 * (i // columns), i % columns], panels[2 * (i // columns) + 1, i % columns]
        if i < len(subjects):
            show_reliability(upper, lower, subjects[i])
        else:
            upper.remove()
            lower.remove()
    for upper, lower in zip(panels[::2, 0], panels[1::2, 0], strict=True):
        upper.set_ylabel("accuracy, %")
        lower.set_ylabel("images, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def show_reliability(upper: Axes, lower: Axes, subject: Subject) -> None:
    """A model's reliability diagram (DeGroot & Fienberg 1983) and histogram of confidences: clean images as bars,
    corrupted ones, all together, as a line."""
    edges = np.linspace(0, 100, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    clean, corrupted = subject.clean, sum(score.bins for score in subject.corrupted())
    shown = clean.bins[0] > 0
    bars = {"width": 100 / BINS, "color": COLORS[3], "edgecolor": "white", "linewidth": 0.4}
    line = {"color": COLORS[4], "linewidth": 1.4}
    upper.plot([0, 100], [0, 100], color="0.4", linestyle="--", linewidth=1, label="accuracy = confidence")
    upper.bar(centres[shown], 100 * clean.bins[2, shown] / clean.bins[0, shown], label="clean", **bars)
    shown = corrupted[0] > 0
    means = 100 * corrupted[1:, shown] / corrupted[0, shown]
    upper.plot(*means, marker="o", markersize=3, label="corrupted", **line)
    lower.bar(centres, 100 * clean.bins[0] / clean.bins[0].sum(), **bars)
    lower.stairs(100 * corrupted[0] / corrupted[0].sum(), edges, **line)
    errors = f"ECE: clean {clean.ece:.1f} %, corrupted {subject.mean('ece'):.1f} %"
    upper.set_title(f"{shorten(subject.name, 34, keep_end=True)}\n{errors}")
    for axes in (upper, lower):
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(alpha=0.3)
    upper.set_ylim(0, 100)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("confidence, %")


def draw_confusion(subjects: Sequence[Subject]) -> Figure:
    """The confusion matrix of each model on the clean images."""
    classes = subjects[0].model.classes
    size = confusion_size(len(classes))
    columns = min(len(subjects), max(1, int(2 * WIDTH / size)))
    rows = math.ceil(len(subjects) / columns)
    figure = Figure(figsize=(columns * size + 1, rows * (size + 0.4)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(subjects) :]:
        axes.remove()
    for axes, subject in zip(panels, subjects, strict=False):
        clean = subject.clean
        title = f"{shorten(subject.name, 34, keep_end=True)}: {clean.accuracy:.2f} %"
        image = show_confusion(axes, subject.confusion, classes, title)
    figure.colorbar(image, ax=panels[: len(subjects)].tolist(), shrink=0.6, aspect=25).set_label(SHARE)
    return figure
