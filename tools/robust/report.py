"""The results as tables and as JSON."""

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from figures.mistakes import MOST_CLASSES
from tables import as_csv, markdown

from config import image_size
from data.sources import Source
from engine.evaluate import precision_name, resolve_amp

from .corruptions import CORRUPTIONS, SMALL
from .evaluation import BINS, CLEAN, Score, Subject

VALUES = ("accuracy", "ece", "nll", "confidence")  # of a score
LIBRARIES = ("torch", "torchvision", "timm", "torchmetrics", "scikit-image", "scipy", "numpy", "pillow")


def overview(subjects: Sequence[Subject]) -> str:
    """A Markdown table of accuracies and one of calibration."""
    accuracies, calibration = [], []
    for subject in subjects:
        clean, mean = subject.clean, subject.mean
        accuracies.append((subject.name, *map(percent, (clean.accuracy, mean("accuracy"), subject.relative_drop))))
        errors, confidences = (map(percent, (getattr(clean, v), mean(v))) for v in ("ece", "confidence"))
        calibration.append((subject.name, *errors, f"{clean.nll:.4f}", f"{mean('nll'):.4f}", *confidences))
    titles = ("checkpoint", "clean accuracy, %", "mean accuracy under corruption, %", "relative drop, %")
    pairs = [f"{which} {what}" for what in ("ECE, %", "NLL, nats", "confidence, %") for which in ("clean", "corrupted")]
    return markdown(titles, accuracies) + "\n" + markdown(("checkpoint", *pairs), calibration)


def by_checkpoint(subjects: Sequence[Subject]) -> str:
    """CSV, a line per model; of the corrupted images, means over the corruptions and severities."""
    titles = [f"{which}_{value}" for which in ("clean", "corrupted") for value in VALUES]
    rows = []
    for subject in subjects:
        numbers = [getattr(subject.clean, value) for value in VALUES] + [subject.mean(value) for value in VALUES]
        rows.append((subject.name, subject.model.path, none_if_nan(subject.relative_drop), *numbers))
    return as_csv(("checkpoint", "file", "relative_drop", *titles), rows)


def by_condition(subjects: Sequence[Subject]) -> str:
    """CSV, a line per model, corruption and severity."""
    rows = [
        (subject.name, *condition, *(getattr(score, value) for value in VALUES))
        for subject in subjects
        for condition, score in subject.scores.items()
    ]
    return as_csv(("checkpoint", "corruption", "severity", *VALUES), rows)


def as_markdown(subjects: Sequence[Subject], about: dict[str, Any]) -> str:
    """All tables, with what `describe` gave below the first."""
    first = subjects[0]
    severities = ", ".join(map(str, about["severities"]))
    precisions = ", ".join(dict.fromkeys(each["precision"] for each in about["checkpoints"].values()))
    facts = [
        f"{about['dataset']}: {about['images']} of {about['validation_images']} validation images, seed {about['seed']}"
        + f"; {about['unreadable_images']} cannot be read" * bool(about["unreadable_images"]),
        f"corrupted: mean over {len(about['corruptions'])} corruptions, severities {severities}",
        f"ECE: expected calibration error, {BINS} bins; NLL: negative log-likelihood; confidence: mean probability of "
        "the predicted class",
        f"{about['device']}, {precisions}; " + ", ".join(" ".join(each) for each in about["versions"].items()),
        *(f"{name}: `{each['file']}`, SHA-256 {each['sha256']}" for name, each in about["checkpoints"].items()),
    ]
    text = f"# Robustness and calibration\n\n{overview(subjects)}\n" + "".join(f"- {fact}\n" for fact in facts)
    names = [subject.name for subject in subjects]
    for title, value in (("Accuracy", "accuracy"), ("Expected calibration error", "ece")):
        rows = [("clean", *(percent(getattr(subject.clean, value)) for subject in subjects))]
        rows += [(each, *(percent(s.mean(value, each)) for s in subjects)) for each in first.corruptions]
        text += f"\n## {title} by corruption, %\n\n" + markdown(("corruption", *names), rows)
    classes = first.model.classes
    accuracies = np.stack([subject.class_accuracies for subject in subjects])
    labels, which = range(len(classes)), ""
    if len(classes) > MOST_CLASSES:
        labels = np.argsort(accuracies.mean(axis=0), kind="stable")[:MOST_CLASSES]  # NaN last
        which = f": the {MOST_CLASSES} lowest of {len(classes)}"
    rows = [(classes[label], *map(percent, accuracies[:, label])) for label in labels]
    return text + f"\n## Accuracy by class on the clean images, %{which}\n\n" + markdown(("class", *names), rows)


def describe(subjects: Sequence[Subject], source: Source, asked: int, seed: int, ema: bool | None) -> dict[str, Any]:
    """Settings and versions.

    Args:
        asked: for how many images.
        ema: what --ema asks for.
    """
    first = subjects[0]
    read = int(first.clean.bins[0].sum())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "dataset": first.model.config.DATA.DATASET,
        "data_path": first.model.config.DATA.DATA_PATH,
        "classes": first.model.classes,
        "validation_images": len(source),
        "images": read,
        "unreadable_images": asked - read,
        "seed": seed,
        "severities": sorted({severity for _, severity in first.scores} - {CLEAN[1]}),
        "corruptions": {
            name: {
                "parameter": CORRUPTIONS[name].meaning,
                f"up_to_{SMALL}_pixels": CORRUPTIONS[name].small,
                "larger": CORRUPTIONS[name].large,
            }
            for name in first.corruptions
        },
        "bins": BINS,
        "device": first.model.device.type,
        "versions": {"Python": platform.python_version(), **versions},
        "checkpoints": {subject.name: describe_checkpoint(subject, ema) for subject in subjects},
    }


def describe_checkpoint(subject: Subject, ema: bool | None) -> dict[str, Any]:
    model, config = subject.model, subject.model.config
    return {
        "file": str(model.path),
        "sha256": hashlib.sha256(model.path.read_bytes()).hexdigest(),
        "model": config.MODEL.NAME,
        "weights": "their moving average, if there is one" if ema is not False else "themselves",
        "image_size": list(image_size(config)),
        "batch_size": config.DATA.BATCH_SIZE,
        "precision": precision_name(resolve_amp(config, model.device)),
    }


def as_json(subjects: Sequence[Subject], about: dict[str, Any]) -> str:
    """All results after what `describe` gave. Accuracies, errors and confidences are in percent, `nll` in nats."""
    results = {}
    for subject in subjects:
        results[subject.name] = {
            "mean_accuracy_under_corruption": subject.mean("accuracy"),
            "relative_drop": none_if_nan(subject.relative_drop),
            "clean": score_values(subject.clean),
            "class_accuracies": list(map(none_if_nan, subject.class_accuracies.tolist())),
            "confusion": subject.confusion.tolist(),
            "corruptions": {
                name: {str(s): score_values(score) for (each, s), score in subject.scores.items() if each == name}
                for name in subject.corruptions
            },
        }
    return json.dumps({**about, "results": results}, indent=1, allow_nan=False) + "\n"


def score_values(score: Score) -> dict[str, Any]:
    count, confidence, right = score.bins
    bins: dict[str, list] = {"images": count.astype(int).tolist()}
    with np.errstate(invalid="ignore"):  # bins without images
        for name, total in (("confidence", confidence), ("accuracy", right)):
            bins[name] = list(map(none_if_nan, (100 * total / count).tolist()))
    return {**{value: getattr(score, value) for value in VALUES}, "bins": bins}


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
