"""Checkpoints: written so that an interruption leaves the previous one, read without running what is in them.

Ours hold tensors and plain types, which training_state.py lists. Released Strip-MLP and Swin-style files (a yacs
CfgNode among their values) can be read too.
"""

import contextlib
import itertools
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import UserError

# 1: between epochs only; 2: also inside an epoch
FORMAT = 2
# Of the pickle in a checkpoint, which lists its tensors in some 200 bytes each. Pickles of millions of entries would
# take minutes and all memory to read.
MOST_PICKLE_BYTES = 32 * 2**20


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used with this model."""


class DamagedCheckpointError(CheckpointError):
    """A file that was a checkpoint, perhaps, and is none now."""


def save_checkpoint(state: dict[str, Any], *paths: Path, previous: Path | None = None) -> None:
    """Writes `state` once and gives it each of the paths' names, in order, replacing what they named before.

    The file is complete and on the disk before it gets a name; the paths share a folder and, where the file system
    has hard links, the space.

    Args:
        previous: a name for what the last of the paths named before.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission); what the paths named before is untouched.
    """
    folder = paths[0].parent
    temporary, link = folder / ".checkpoint.tmp", folder / ".checkpoint.link"
    try:
        # What a killed run left may be a second name of its best.pth: a new file, not a truncated one.
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
        _sync(folder)  # the new names themselves
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        for leftover in (temporary, link):
            with contextlib.suppress(OSError):  # a folder that is none: nothing was left in it
                leftover.unlink()
        raise CheckpointError(f"{paths[-1]}: cannot be written: {error}; the one before is untouched") from error


def _sync(path: Path) -> None:
    """Waits until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, loaded with `weights_only=True`.

    Raises:
        DamagedCheckpointError: cut off, changed, or no checkpoint at all.
        CheckpointError: no such file, or one that is refused: a pickle that asks for anything but tensors and plain
            types, or that is not of an honest size.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        _check_archive(path)
        # Swin-style files carry their config as a yacs node: a dict, so it can be read as one.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        if asked_for is None:
            raise DamagedCheckpointError(f"{path}: not a checkpoint, or damaged: its pickle cannot be read") from error
        raise CheckpointError(
            f"{path}: refused: it asks for {asked_for[1]}, which could run code; accepted: tensors and plain types"
        ) from error
    except Exception as error:  # what a damaged file makes of PyTorch's reader can be any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpointError(f"{path}: not a checkpoint, or damaged: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; accepted: a dictionary")
    return content


def _check_archive(path: Path) -> None:
    """What torch.load does not look at: checksums (it loads changed tensors without a word), and sizes that a small
    file may claim."""
    if not zipfile.is_zipfile(path):
        return  # the format before PyTorch 1.6, or no checkpoint
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: refused: {entry.filename} in it is compressed; torch.save stores")
            if entry.filename.endswith(".pkl") and entry.file_size > MOST_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: refused: its list of contents has {entry.file_size:,} bytes; accepted: "
                    f"{MOST_PICKLE_BYTES:,}, enough for 150,000 tensors"
                )
        changed = archive.testzip()
    if changed is not None:
        raise DamagedCheckpointError(f"{path}: damaged: {changed} in it does not match its checksum")


def find_weights(content: Mapping, path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under "model" or "state_dict", or the checkpoint itself; without the prefixes
    that DistributedDataParallel and torch.compile add."""
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no weights; its keys: {_some(content)}")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in content.items()}


def _some(names: Iterable) -> str:
    """The first few, for messages."""
    return ", ".join(str(name)[:80] for name in itertools.islice(names, 8))


def convert_weights(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under the model's own names: the `checkpoint_filter_fn` beside the model's class, timm's convention,
    knows the released ones."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return convert(weights, model) if convert else weights


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters."""
    classifier = model.get_classifier()
    prefix = next((name for name, module in model.named_modules() if module is classifier), None)
    return [] if prefix is None else [f"{prefix}.{name}" for name, _ in classifier.named_parameters()]


def load_weights(model: nn.Module, content: Mapping, path: str | Path, new_classifier: bool = False) -> list[str]:
    """Loads the weights of a checkpoint into the model, all of them.

    Args:
        model: not wrapped.
        content: what `read_checkpoint` gave; released or ours.
        path: for messages.
        new_classifier: a classifier of another size keeps its fresh initialisation.

    Returns:
        Names of the parameters that were not loaded for that reason.

    Raises:
        CheckpointError: listing the keys that are missing, not known, of another shape, or not finite.
    """
    weights = convert_weights(find_weights(content, path), model)
    expected = model.state_dict()
    head = classifier_names(model)
    fresh = []
    if new_classifier and any(n in weights and weights[n].shape != expected[n].shape for n in head):
        fresh = head
        weights = {name: value for name, value in weights.items() if name not in head}

    reshaped = [n for n, v in weights.items() if n in expected and v.shape != expected[n].shape]
    if reshaped and set(reshaped) <= set(head):
        file_classes, classes = (d[reshaped[0]].shape[0] for d in (weights, expected))
        raise CheckpointError(
            f"{path}: made for {file_classes} classes, but the model has {classes} (MODEL.NUM_CLASSES, or the data's "
            f"count); use data with {file_classes} classes, or --pretrained {path} in training to fine-tune"
        )
    missing = [name for name in expected if name not in weights and name not in fresh]
    unknown = [name for name in weights if name not in expected]
    shapes = [f"{n} {tuple(weights[n].shape)}, not {tuple(expected[n].shape)}" for n in reshaped]
    kinds = [n for n, v in weights.items() if not is_plain(v)]
    titled = {"missing": missing, "not in the model": unknown, "other shape": shapes, "no plain numbers": kinds}
    problems = [f"{title}: {_shorten(names)}" for title, names in titled.items() if names]
    if problems:
        raise CheckpointError(
            f"{path}: does not fit the model of the config ({type(model).__name__}, {len(expected)} entries); "
            + "; ".join(problems)
        )
    broken = [n for n, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: not all of its weights are finite numbers: {_shorten(broken)}")
    model.load_state_dict(weights, strict=not fresh)
    return fresh


def is_plain(value: Any) -> bool:
    """Whether it is a tensor of real numbers in memory: not sparse, quantised, meta or complex, none of which could be
    copied into a parameter."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_complex() or value.is_quantized or value.is_meta)


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:200] for name in names[:5]) + more


def load_pretrained(model: nn.Module, path: str | Path, logger: Logger) -> None:
    """Loads weights to fine-tune from (`--pretrained`). A classifier of another size starts anew; the log says so."""
    fresh = load_weights(model, read_checkpoint(path), path, new_classifier=True)
    logger.info(f"pretrained weights from {path}")
    if fresh:
        classes = model.get_parameter(fresh[0]).shape[0]
        logger.info(f"the classifier ({', '.join(fresh)}) has another size there: a new one for {classes} classes")


def read_training_state(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours to continue training from, with the keys that `TrainingState.capture` writes.

    Raises:
        CheckpointError: it cannot be read, holds weights only, has a format this version does not know, or lacks
            something.
    """
    content = read_checkpoint(path)
    if "format" not in content or "optimizer" not in content:
        raise CheckpointError(
            f"{path}: holds no training state of this project (keys: {_some(content)}); use "
            "--pretrained to fine-tune from its weights, or main_eval.py to evaluate them"
        )
    if content["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: checkpoint format {str(content['format'])[:80]}; this version reads formats 1 to {FORMAT}"
        )
    if content["format"] == 1:
        content = _from_format_1(content)
    _check_training_state(content, path)
    return content


def _from_format_1(content: Mapping) -> dict[str, Any]:
    """Written between epochs, before runs had an identity and noted their processes."""
    progress = {"step": 0, "trained": False, "skipped": 0, "skipped_in_row": 0, "seconds": 0.0, "buffers": None}
    ranks = {"losses": torch.zeros(1, 2, dtype=torch.float64), "unreadable": torch.zeros(1, dtype=torch.int64)}
    return {"run": None, "processes": None, "images": None, **content, "progress": {**progress, **ranks}}


def _check_training_state(content: Mapping, path: str | Path) -> None:
    """Raises CheckpointError for what `TrainingState` could not take over."""

    def number(value: Any, low: float = 0) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < float("inf")

    def whole(value: Any, low: int = 0) -> bool:
        return isinstance(value, int) and number(value, low)

    def require(good: bool, what: str) -> None:
        if not good:
            raise CheckpointError(f"{path}: is no training state that can be used: {what}")

    def section(name: str) -> Mapping:
        require(isinstance(content.get(name), Mapping), f"{name} is not a dictionary")
        return content[name]

    require(whole(content.get("epoch")), "epoch is not a whole number of epochs done")
    best, config, progress = section("best"), section("config"), section("progress")
    require(number(best.get("top1"), -1) and whole(best.get("epoch")), "best is not an accuracy and an epoch")
    require(all(isinstance(key, str) for key in config), "config has keys that are no text")
    for key in ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS"):
        require(whole(config.get(key), 1), f"config has no {key}")
    require(isinstance(config.get("TRAIN.OPTIMIZER.NAME"), str), "config has no TRAIN.OPTIMIZER.NAME")
    section("optimizer")
    scaler = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    if section("scaler"):
        require(all(number(content["scaler"].get(key)) for key in scaler), "scaler is not a loss scaler's state")
    require(content.get("run") is None or isinstance(content["run"], str), "run is not a name")
    for key in ("processes", "images"):
        require(content.get(key) is None or whole(content[key], 1), f"{key} is not a number")
    for key in ("step", "skipped", "skipped_in_row"):
        require(whole(progress.get(key)), f"progress has no {key}")
    require(number(progress.get("seconds")), "progress has no seconds")
    require(isinstance(progress.get("trained"), bool), "progress does not say whether the epoch is trained")
    processes = content["processes"] or 1
    for key, shape in (("losses", (processes, 2)), ("unreadable", (processes,)), ("buffers", (processes, -1))):
        value = progress.get(key)
        if key == "buffers" and value is None:
            continue
        fits = is_plain(value) and value.ndim == len(shape)
        fits = fits and all(n in (-1, m) for n, m in zip(shape, value.shape, strict=True))
        require(fits and bool(value.isfinite().all()), f"progress has no {key} of {processes} processes")
