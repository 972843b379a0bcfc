"""Checkpoints: writing them so that an interruption leaves the previous one, and loading their weights into models.
`folders.py` and `untrusted.py` read them, `weights.py` finds the weights in them.

Ours hold tensors and plain types; `engine/state.py` lists them. Released Strip-MLP and Swin-style files load too.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from logging import Logger
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from models.backbone import classifiers
from runtime.folders import read_checkpoint
from runtime.untrusted import (
    CheckpointError,
    DamagedCheckpointError,
    check_training_state,
    is_plain,
    legible,
    some_keys,
)
from runtime.weights import converting, find_weights
from utils import printable, shorten

__all__ = [
    "FORMAT",
    "CheckpointError",
    "DamagedCheckpointError",
    "Loaded",
    "classifier_names",
    "count_classes",
    "find_weights",
    "load_pretrained",
    "load_weights",
    "named_classes",
    "other_classes",
    "read_checkpoint",
    "read_training_state",
    "save_checkpoint",
    "save_safetensors",
]

# 1: between epochs only; 2: also inside an epoch
FORMAT = 2


def save_checkpoint(state: dict[str, Any], *paths: Path, previous: Path | None = None) -> None:
    """Writes `state` once and gives it each of the paths' names, in order, replacing what they named before.

    The file is complete and on the disk before it gets a name. The paths are in one folder; if the file system has hard
    links, the file is stored once.

    Args:
        previous: a name for what the last of the paths named before.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission); what the paths named before is untouched.
    """
    folder = paths[0].parent
    # Named after the checkpoint: a converted one may be written into the folder of a run that is writing its own.
    temporary, link = (folder / f".{paths[-1].name}.{kind}" for kind in ("tmp", "link"))
    try:
        # A file left by a killed run may be a hard link to its best.pth: do not truncate it.
        temporary.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        names = [(temporary, path) for path in paths[:-1]]
        if previous is not None and paths[-1].exists():
            names.append((paths[-1], previous))
        for source, path in names:
            link.unlink(missing_ok=True)
            try:
                os.link(source, link)
            except OSError:  # no hard links here (some network file systems)
                shutil.copyfile(source, link)
                _sync(link)
            os.replace(link, path)
        os.replace(temporary, paths[-1])
        with contextlib.suppress(OSError):  # not every file system can
            _sync(folder)  # the new names themselves
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        for leftover in (temporary, link):
            with contextlib.suppress(OSError):  # not even the folder exists
                leftover.unlink()
        raise CheckpointError(f"{paths[-1]}: cannot be written: {error}; the one before is untouched") from error


def _sync(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_safetensors(weights: Mapping[str, Tensor], path: Path, config: Mapping, classes: Sequence[str]) -> None:
    """Writes weights as a safetensors file with the config and the names of the classes, as JSON, in its metadata.

    Raises:
        CheckpointError: it cannot be written; what `path` named before is untouched.
    """
    metadata = {name: json.dumps(value) for name, value in (("config", config), ("classes", classes)) if value}
    # The format asks that no two share memory.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata or None))
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters."""
    modules = classifiers(model)
    prefixes = {name: module for name, module in model.named_modules() if any(module is c for c in modules)}
    return [f"{prefix}.{name}" for prefix, module in prefixes.items() for name, _ in module.named_parameters()]


def named_classes(content: Mapping, count: int = 0) -> list[str]:
    """Names of the classes in label order, printable, as a checkpoint has them; empty if it does not name them.

    Args:
        count: how many there must be; 0: any number.
    """
    names = content.get("classes")
    if isinstance(names, list) and len(names) in (count or len(names),) and all(isinstance(n, str) for n in names):
        return [printable(name) for name in names]
    return []


def other_classes(content: Mapping, classes: Sequence[str]) -> bool:
    """Whether a checkpoint names its classes, and they differ from these in names or order. If either side has no
    names, they do not differ."""
    theirs = content.get("classes")
    return isinstance(theirs, list) and bool(theirs) and bool(classes) and theirs != list(classes)


def count_classes(model: nn.Module, content: Mapping, path: str | Path, ema: bool | None = None) -> int:
    """How many classes the classifier in a checkpoint has.

    Args:
        model: of that kind, with a classifier for any number of classes.
        ema: see `find_weights`.

    Raises:
        CheckpointError: it has no weights, or no classifier.
    """
    weights = find_weights(content, path, ema, model).weights
    for name in classifier_names(model):
        if name in weights and weights[name].ndim:
            return len(weights[name])
    names = ", ".join(classifier_names(model))
    raise CheckpointError(f"{path}: has no classifier ({names}), which would say how many classes there are")


class Loaded(NamedTuple):
    """What loading weights into a model changed.

    Attributes:
        fresh: names of the classifier's parameters, if it keeps its new initialisation.
        img_size: the (height, width) that the weights were made for, if they were resampled.
        taken: which weights of the checkpoint, for the log.
    """

    fresh: list[str]
    img_size: tuple[int, int] | None
    taken: str

    def notes(self, model: nn.Module) -> list[str]:
        """For the log."""
        notes = []
        if self.img_size:
            sizes = " to ".join(f"{height} x {width}" for height, width in (self.img_size, model.img_size))
            notes.append(f"what depends on the size of the images is resampled from {sizes} pixels")
        if self.fresh:
            classes = model.get_parameter(self.fresh[0]).shape[0]
            names = ", ".join(self.fresh)
            notes.append(f"the classifier ({names}) is for other classes there: a new one for {classes} classes")
        return notes


def load_weights(
    model: nn.Module,
    content: Mapping,
    path: str | Path,
    new_classifier: bool = False,
    ema: bool | None = None,
    same_size: bool = False,
    classes: Sequence[str] | None = None,
) -> Loaded:
    """Loads the weights of a checkpoint into the model, all of them, resampled if they are for images of another size.

    Args:
        model: not wrapped.
        content: what `read_checkpoint` gave; released or ours.
        path: for messages.
        new_classifier: whether the classifier keeps its new initialisation if the checkpoint's is for another number of
            classes, or names others than `classes`.
        ema: see `find_weights`.
        same_size: whether to refuse weights for images of another size.

    Raises:
        CheckpointError: listing the keys that are missing, not known, of another shape, or not finite.
    """
    weights, taken = find_weights(content, path, ema, model)
    img_size = None
    if hasattr(model, "resample"):
        with converting(model, path):
            size = model.input_size_of(weights)
            img_size = size if size != model.img_size else None
            weights = weights if same_size else model.resample(weights)
    expected = model.state_dict()
    head = classifier_names(model)
    fresh = []
    is_other = classes is not None and other_classes(content, classes)
    is_other |= any(n in weights and weights[n].shape != expected[n].shape for n in head)
    if new_classifier and is_other:
        fresh = head
        weights = {name: value for name, value in weights.items() if name not in head}

    reshaped = [n for n, v in weights.items() if n in expected and v.shape != expected[n].shape]
    classes_alone = all(weights[n].ndim and weights[n].shape[1:] == expected[n].shape[1:] for n in reshaped)
    if reshaped and set(reshaped) <= set(head) and classes_alone:
        file_classes, classes = (d[reshaped[0]].shape[0] for d in (weights, expected))
        raise CheckpointError(
            f"{path}: made for {file_classes} classes, but the model has {classes} (MODEL.NUM_CLASSES, or the data's "
            f"count); use data with {file_classes} classes, or --pretrained {path} in training to fine-tune"
        )
    missing = [name for name in expected if name not in weights and name not in fresh]
    unknown = [name for name in weights if name not in expected]
    shapes = [f"{n} {tuple(weights[n].shape)}, not {tuple(expected[n].shape)}" for n in reshaped]
    kinds = [n for n, v in weights.items() if not is_plain(v)]
    if img_size and same_size:
        raise CheckpointError(
            f"{path}: made for images of {img_size[0]} x {img_size[1]} pixels, but DATA.IMG_SIZE is {model.img_size}: "
            f"a run goes on at its own size; --pretrained {path} with a new --tag starts from its weights"
        )
    titled = {"missing": missing, "not in the model": unknown, "other shape": shapes, "no plain numbers": kinds}
    problems = [f"{title}: {shorten(names)}" for title, names in titled.items() if names]
    if problems:
        raise CheckpointError(
            f"{path}: does not fit the model of the config ({type(model).__name__}, {len(expected)} entries); "
            + "; ".join(problems)
        )
    # In the model's precision too: it may overflow there.
    broken = [n for n, v in weights.items() if not all(x.isfinite().all() for x in (v, v.to(expected[n].dtype)))]
    if broken:
        raise CheckpointError(f"{path}: not all of its weights are finite numbers: {shorten(broken)}")
    model.load_state_dict(weights, strict=not fresh)
    return Loaded(fresh, img_size, taken)


def load_pretrained(
    model: nn.Module,
    path: str | Path,
    logger: Logger,
    classes: Sequence[str] | None = None,
    ema: bool | None = None,
) -> None:
    """Loads weights to fine-tune from (`--pretrained`). A classifier for other classes than `classes` starts anew, and
    weights for another image size are resampled; the log says so."""
    loaded = load_weights(model, read_checkpoint(path), path, new_classifier=True, ema=ema, classes=classes)
    for line in (f"pretrained weights from {path}: {loaded.taken}", *loaded.notes(model)):
        logger.info(line)


def read_training_state(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours to continue training from, with the keys that `TrainingState.capture` writes.

    Raises:
        CheckpointError: it cannot be read, holds weights only, has a format this version does not know, or lacks
            something.
    """
    content = read_checkpoint(path)
    if "format" not in content or "optimizer" not in content:
        raise CheckpointError(
            f"{path}: holds no training state of this project (keys: {some_keys(content)}); use "
            "--pretrained to fine-tune from its weights, or main_eval.py to evaluate them"
        )
    if type(content["format"]) is not int or content["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: checkpoint format {legible(content['format'])}; this version reads formats 1 to {FORMAT}"
        )
    if content["format"] == 1:
        content = _from_format_1(content)
    check_training_state(content, path)
    return content


def _from_format_1(content: Mapping) -> dict[str, Any]:
    """Format 1 was written between epochs only, and did not identify the run or note its processes."""
    progress = {"step": 0, "trained": False, "skipped": 0, "skipped_in_row": 0, "seconds": 0.0, "buffers": None}
    ranks = {"losses": torch.zeros(1, 2, dtype=torch.float64), "unreadable": torch.zeros(1, dtype=torch.int64)}
    return {"run": None, "processes": None, "images": None, **content, "progress": {**progress, **ranks}}
