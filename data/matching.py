"""Which of a model's classes each class of the data is. Matched by name: the same label may mean another class."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.data import ImageNetInfo

from data.build import build_class_folders, build_split
from data.errors import DataError
from data.sources import MOST_FILE_BYTES, Source, SubsetSource, class_names
from runtime.distributed import World
from utils import printable, shorten

# Of EVAL_SETS, those whose class folders are WordNet ids. The folders of the others are numbers.
WORDNET = ("imagenet-r", "imagenet-a", "imagenet-sketch")
# ImageNet's validation images are numbered from 1, and the labels of ReaL are in their order.
IMAGE_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class EvalSet(NamedTuple):
    """Images to evaluate a model on that has other classes than they have.

    Attributes:
        source: their classes in the order of the model's labels.
        columns: the model's label of each class of the source; logits of others are left out. None: all of the model's
            classes, in its order.
        accepted: (images, N) int64, the labels that are right for each image, filled up with -1; None: the target is.
        notes: what was left out, for the log.
        left_out: images that have no label.
    """

    source: Source
    columns: list[int] | None
    accepted: np.ndarray | None = None
    notes: Sequence[str] = ()
    left_out: int = 0


def match_classes(config, data: EvalSet, known: Sequence[str], path: Path) -> EvalSet:
    """The data with its classes in a model's order, if it has no others than the model.

    Args:
        known: names of the model's classes, printable; empty if nobody names them.
        path: of its checkpoint, for messages.

    Raises:
        DataError: folders that are named by numbers are in the order of text, which is not that of the numbers, or
            their numbers are not the names of the model's classes.
    """
    source = data.source
    names = class_names(source)
    if not names or names == list(known):
        return data
    if known and set(names) <= set(known):
        labels = {name: label for label, name in enumerate(known)}
        matched = SubsetSource(source, np.arange(len(source)), known, [labels[name] for name in names])
        what = f"{len(names)} of the {len(known)} classes" if len(names) < len(known) else "the classes"
        note = f"the data has {what} of {path}" + ("" if len(names) < len(known) else ", in another order")
        return data._replace(source=matched, notes=[*data.notes, f"{note}; they are matched by name"])
    # Digits, MNIST and their like are no folders: they name their classes themselves. DATA.CLASSES gives the order.
    if source.in_memory or config.DATA.CLASSES != "all" or not all(name.isdecimal() for name in names):
        return data
    numbers = list(map(int, names))
    in_order = numbers == sorted(numbers)
    if known:
        raise DataError(
            f"{config.DATA.DATA_PATH}: its classes are named by numbers ({shorten(names)}), but those of {path} are "
            f"{shorten(known)}: nothing says which is which; {_WAYS}"
        )
    if not in_order:
        first = next(label for label, (a, b) in enumerate(zip(numbers, sorted(numbers), strict=True)) if a != b)
        raise DataError(
            f"{config.DATA.DATA_PATH}: its classes are named by numbers and sorted as text, so that {names[first]} "
            f"would be label {first}; {path} does not name its classes, so nothing says whether it means that; {_WAYS}"
        )
    return data


_WAYS = (
    "if the numbers are the model's labels, give --eval-set numbered; if they are ImageNet's, --eval-set imagenet-v2; "
    "if the model was trained in another order, DATA.CLASSES with a file that names them in that order"
)


def build_eval_set(
    config, world: World, kind: str, known: Sequence[str], count: int, path: Path, labels: Path | None = None
) -> EvalSet:
    """The images of one of `config.EVAL_SETS` for a model.

    Args:
        known: names of the model's classes, printable; empty if nobody names them, which of 1,000 means ImageNet's.
        count: of the model's classes.
        path: of its checkpoint, for messages.
        labels: of imagenet-real: the file of the labels.

    Raises:
        DataError: the data or the labels cannot be used, or no class is one of the model's.
    """
    if kind == "imagenet-real":
        return _relabelled(config, world, _imagenet_labels(known, count, path), labels)
    if config.DATA.DATASET not in ("imagenet", "imagenet-1k") or config.DATA.ZIP_MODE:
        raise DataError(f"--eval-set {kind} is a folder of class folders; accepted: DATA.DATASET imagenet, no --zip")
    source, folder = build_class_folders(config, world), config.DATA.DATA_PATH
    label_of = _label_of_names(kind, source.classes, folder, known, count, path)
    return _subset(source, label_of, list(known) or [str(label) for label in range(count)], folder, path)


def _label_of_names(
    kind: str, names: Sequence[str], folder: str, known: Sequence[str], count: int, path: Path
) -> list[int]:
    """The model's label of each class folder, -1 if it has no such class."""
    if kind in WORDNET:
        labels = _imagenet_labels(known, count, path)
        strange = [name for name in names if name not in labels and not re.fullmatch(r"n\d{8}", name)]
        if strange:
            raise DataError(
                f"{folder}: has the folders {shorten(strange)}; --eval-set {kind} has WordNet ids such as n01440764"
            )
        return [labels.get(name, -1) for name in names]
    most = count if kind == "numbered" else 1000
    strange = [name for name in names if not re.fullmatch(r"[0-9]{1,9}", name) or int(name) >= most]
    if strange:
        raise DataError(
            f"{folder}: has the folders {shorten(strange)}; --eval-set {kind} has numbers, 0 to {most - 1}, "
            + ("the labels of the model" if kind == "numbered" else "the classes of ImageNet-1K by WordNet id")
        )
    numbers = list(map(int, names))
    twice = [name for name, number in zip(names, numbers, strict=True) if numbers.count(number) > 1]
    if twice:
        raise DataError(f"{folder}: {shorten(twice)} are the same number; accepted: a folder for each class")
    if kind == "numbered":
        return numbers
    labels, ids = _imagenet_labels(known, count, path), ImageNetInfo("imagenet-1k").label_names()
    return [labels.get(ids[number], -1) for number in numbers]


def _imagenet_labels(known: Sequence[str], count: int, path: Path) -> Mapping[str, int]:
    """The model's label of each WordNet id."""
    ids = ImageNetInfo("imagenet-1k").label_names()
    if not known and count == len(ids):
        return {name: label for label, name in enumerate(ids)}
    if not set(known) & set(ids):
        has = f"its classes are {shorten(known)}" if known else f"it does not name its {count} classes"
        raise DataError(
            f"{path}: {has}; accepted for ImageNet's test sets: classes with WordNet ids such as n01440764, or "
            "ImageNet-1K's 1,000 without names"
        )
    return {name: label for label, name in enumerate(known)}


def _subset(source: Source, label_of: list[int], names: list[str], folder: str, path: Path) -> EvalSet:
    """The images of the classes that the model has, and its labels."""
    columns = sorted(set(label_of) - {-1})
    if not columns:
        raise DataError(f"{folder}: {path} has none of its classes: {shorten(source.classes)}")
    position = {label: index for index, label in enumerate(columns)} | {-1: -1}
    new = np.array([position[label] for label in label_of], np.int32)
    kept = np.flatnonzero(new[source.targets] >= 0)
    subset = SubsetSource(source, kept, [names[label] for label in columns], new)
    left_out, notes = len(source) - len(kept), list(source.notes)
    if left_out:
        unknown = [name for name, label in zip(source.classes, label_of, strict=True) if label < 0]
        notes.append(
            f"{folder}: {left_out} images of {len(unknown)} classes that the model does not have are left out: "
            f"{shorten(unknown)}"
        )
    return EvalSet(subset, columns, None, notes, left_out)


def _relabelled(config, world: World, labels: Mapping[str, int], file: Path | None) -> EvalSet:
    """ImageNet's validation images with the labels of a file of ReaL's format: a list with, for each image, a list of
    the labels that are right. https://arxiv.org/abs/2006.07159"""
    if file is None:
        raise DataError("--eval-set imagenet-real needs its labels: give --real-labels real.json")
    lists = read_real_labels(file)
    source = build_split(config, world, "val")
    ids = ImageNetInfo("imagenet-1k").label_names()
    accepted: list[list[int]] = []
    for index in range(len(source)):
        found = IMAGE_NUMBER.findall(source.name(index))
        if not found or not 0 < int(found[-1]) <= len(lists):
            raise DataError(
                f"{source.name(index)}: is none of the {len(lists)} images that {printable(str(file))} has labels for; "
                "accepted: ImageNet's own file names, ILSVRC2012_val_00000001.JPEG and so on"
            )
        named = [labels.get(ids[label], -1) for label in lists[int(found[-1]) - 1]]
        accepted.append([label for label in named if label >= 0])
    kept = np.array([index for index, right in enumerate(accepted) if right], np.int64)
    if not len(kept):
        raise DataError(f"{printable(str(file))}: has no label that the model knows for any of {len(source)} images")
    most = max(map(len, accepted))
    padded = np.array([accepted[index] + [-1] * (most - len(accepted[index])) for index in kept], np.int64)
    left_out, notes = len(source) - len(kept), list(source.notes)
    if left_out:
        notes.append(f"{printable(str(file))}: {left_out} of {len(source)} images have no label and are left out")
    return EvalSet(SubsetSource(source, kept, source.classes), None, padded, notes, left_out)


def read_real_labels(file: Path) -> list[list[int]]:
    """The labels of each image of ImageNet's validation set, 0 to 999, some of them empty.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    name = printable(str(file))
    try:
        if file.stat().st_size > MOST_FILE_BYTES:
            raise DataError(f"{name}: larger than {MOST_FILE_BYTES} bytes")
        lists = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: cannot be read as JSON: {error}") from error
    if not isinstance(lists, list) or not lists:
        raise DataError(f"{name}: accepted: a list with a list of labels for each image")
    for index, labels in enumerate(lists):
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 1000 for label in labels):
            raise DataError(
                f"{name}: image {index + 1} has {str(labels)[:100]!r}; accepted: a list of labels, 0 to 999"
            )
    return lists
