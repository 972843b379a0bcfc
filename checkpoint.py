"""Checkpoints: written so that an interruption leaves the previous one, read without running what is in them.

Ours hold tensors and plain types under the keys format, model, optimizer, scaler, epoch (epochs done), best and
config. Released Strip-MLP and Swin-style files (a yacs CfgNode among their values) can be read too.
"""

import contextlib
import os
import pickle
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Mapping
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import UserError

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or used with this model."""


def save_checkpoint(state: dict[str, Any], *paths: Path) -> None:
    """Writes `state` once and gives it each of the paths' names, in order, replacing what they named before.

    The file is complete and on the disk before it gets a name; the paths share a folder and, where the file system
    has hard links, the space.

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
        for path in paths[:-1]:
            link.unlink(missing_ok=True)
            try:
                os.link(temporary, link)
            except OSError:  # no hard links here (some network file systems)
                shutil.copyfile(temporary, link)
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
        CheckpointError: no such file, damaged, or a pickle that asks for anything but tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        # Swin-style files carry their config as a yacs node: a dict, so it can be read as one.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        if asked_for is None:
            raise CheckpointError(f"{path}: not a checkpoint, or damaged: its pickle cannot be read") from error
        raise CheckpointError(
            f"{path}: refused: it asks for {asked_for[1]}, which could run code; accepted: tensors and plain types"
        ) from error
    except Exception as error:  # what a damaged file makes of PyTorch's reader can be any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; accepted: a dictionary")
    return content


def find_weights(content: Mapping, path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under "model" or "state_dict", or the checkpoint itself; without the prefixes
    that DistributedDataParallel and torch.compile add."""
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no weights; its keys: {', '.join(map(str, list(content)[:8]))}")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in content.items()}


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
        CheckpointError: listing the keys that are missing, not known, or of another shape.
    """
    weights = convert_weights(find_weights(content, path), model)
    expected = model.state_dict()
    head = classifier_names(model)
    fresh = []
    if new_classifier and any(n in weights and weights[n].shape != expected[n].shape for n in head):
        fresh = head
        weights = {name: value for name, value in weights.items() if name not in head}

    problems = []
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
    for title, names in (("missing", missing), ("not in the model", unknown), ("other shape", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{title}: {', '.join(names[:5])}{more}")
    if problems:
        raise CheckpointError(
            f"{path}: does not fit the model of the config ({type(model).__name__}, {len(expected)} entries); "
            + "; ".join(problems)
        )
    model.load_state_dict(weights, strict=not fresh)
    return fresh


def load_pretrained(model: nn.Module, path: str | Path, logger: Logger) -> None:
    """Loads weights to fine-tune from (`--pretrained`). A classifier of another size starts anew; the log says so."""
    fresh = load_weights(model, read_checkpoint(path), path, new_classifier=True)
    logger.info(f"pretrained weights from {path}")
    if fresh:
        classes = model.get_parameter(fresh[0]).shape[0]
        logger.info(f"the classifier ({', '.join(fresh)}) has another size there: a new one for {classes} classes")


def read_training_state(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours to continue training from.

    Raises:
        CheckpointError: it cannot be read, holds weights only, or has a format this version does not know.
    """
    content = read_checkpoint(path)
    if "format" not in content or "optimizer" not in content:
        raise CheckpointError(
            f"{path}: holds no training state of this project (keys: {', '.join(map(str, list(content)[:8]))}); use "
            "--pretrained to fine-tune from its weights, or main_eval.py to evaluate them"
        )
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {content['format']!r}; this version reads format {FORMAT}")
    return content
