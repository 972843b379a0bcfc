"""Checkpoints: written so that an interruption leaves the previous one, read without running what is in them.

Ours hold tensors and plain types, which engine/state.py lists. Released Strip-MLP and Swin-style files (a yacs
CfgNode among their values) can be read too.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import pickletools
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from logging import Logger
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from models.backbone import classifiers
from models.released import strip_prefixes, to_our_names
from utils import UserError

# 1: between epochs only; 2: also inside an epoch
FORMAT = 2
# Of the pickle in a checkpoint, which lists its tensors in some 200 bytes each. Pickles of millions of entries would
# take minutes and all memory to read.
MOST_PICKLE_BYTES = 32 * 2**20
# What a tuple may contain in tuples, those that are there more than once counted each time. To hash one, as a key, is
# to go through all of them, on C's stack: a file of 300 bytes can take for ever, one of 200 kB overflow the stack.
MOST_NESTED_TUPLES = 10_000
# What torch.load would call for a file, and a few bytes of a file could fill the memory with.
REFUSED = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode")
# Numbers in dictionaries that are beyond what any run could count to.
LARGEST = 2**63
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool)
_NUMBERS += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# By the names of storages in a pickle.
_ITEM_BYTES = {
    f"{kind}Storage": size
    for size, kinds in (
        (1, ("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")),
        (2, ("Half", "BFloat16", "Short")),
        (4, ("Float", "Int", "QInt32")),
        (8, ("Double", "Long", "ComplexFloat")),
        (16, ("ComplexDouble",)),
    )
    for kind in kinds
}


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
    # By the name, because a converted checkpoint may be written into the folder of a run that is writing its own.
    temporary, link = (folder / f".{paths[-1].name}.{kind}" for kind in ("tmp", "link"))
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
        with contextlib.suppress(OSError):  # not every file system can
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
    """The content of a checkpoint, on the CPU: loaded with `weights_only=True`, or a safetensors file.

    Raises:
        DamagedCheckpointError: cut off, changed, or no checkpoint at all.
        CheckpointError: no such file, or one that is refused: a pickle that asks for anything but tensors and plain
            types, or that is not of an honest size.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        _check_archive(path)
        # Swin-style files carry their config as a yacs node: a dict, so it can be read as one.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = _bare(torch.load(path, map_location="cpu", weights_only=True), {})
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        if asked_for is None:
            raise DamagedCheckpointError(f"{path}: not a checkpoint, or damaged: its pickle cannot be read") from error
        raise CheckpointError(
            f"{path}: refused: it asks for {legible(asked_for[1])}, which could run code; accepted: tensors and plain "
            "types"
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: cannot be read: not enough memory") from error
    except Exception as error:  # what a damaged file makes of PyTorch's reader can be any exception
        # Not the file, but the disk or the machine at this moment: EINVAL comes from seeking in damaged ones.
        passing = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if passing or "can't allocate memory" in str(error):
            raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
        raise DamagedCheckpointError(f"{path}: not a checkpoint, or damaged: {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; accepted: a dictionary")
    return content


def save_safetensors(weights: Mapping[str, Tensor], path: Path, config: Mapping, classes: Sequence[str]) -> None:
    """Writes weights as a safetensors file, whose metadata has the config and the names of the classes as JSON.

    Raises:
        CheckpointError: it cannot be written; what `path` named before is untouched.
    """
    metadata = {name: json.dumps(value) for name, value in (("config", config), ("classes", classes)) if value}
    # Each in memory of its own, as the format asks for.
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


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The weights under "model", and of the metadata what `save_safetensors` writes."""
    with safetensors.safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    known = {name: json.loads(metadata[name]) for name in ("config", "classes") if name in metadata}
    return {"model": weights, **known}


def _check_archive(path: Path) -> None:
    """What torch.load does not look at: checksums (it loads changed tensors without a word), and sizes that a small
    file may claim."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as PyTorch tells
        if not zipped:  # the format before PyTorch 1.6, which begins with five pickles; or no checkpoint
            file.seek(0)
            start = io.BytesIO(file.read(MOST_PICKLE_BYTES))
            for _ in range(5):
                _check_pickle(start, path)
            return
    with zipfile.ZipFile(path) as archive:
        sizes: dict[str, int] = {}
        for entry in archive.infolist():
            name = entry.filename.lower()  # capital or small is the same to PyTorch's reader
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: refused: {legible(name)} in it is compressed; torch.save stores")
            if entry.external_attr & 0x10:  # for which PyTorch's reader reads nothing, and takes what is in the memory
                raise DamagedCheckpointError(f"{path}: damaged: {legible(name)} in it is marked as a folder")
            if name in sizes:  # of which PyTorch's reader and these checks could take different ones
                raise CheckpointError(f"{path}: refused: {legible(name)} is in it twice")
            sizes[name] = entry.file_size
        for name, size in sizes.items():
            if name.endswith(".pkl") and size > MOST_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: refused: its list of contents has {size:,} bytes; accepted: {MOST_PICKLE_BYTES:,}, "
                    "enough for 150,000 tensors"
                )
        for entry in archive.infolist():
            if entry.filename.lower().endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(entry)), path, entry.filename.partition("/")[0], sizes)
        changed = archive.testzip()
    if changed is not None:
        raise DamagedCheckpointError(f"{path}: damaged: {legible(changed)} in it does not match its checksum")


def _check_pickle(file: io.BytesIO, path: Path, folder: str = "", sizes: dict[str, int] | None = None) -> None:
    """Raises CheckpointError for a pickle that asks for nothing forbidden and still must not be unpickled.

    Args:
        file: one pickle is read from it.
        folder: in the archive, of this pickle and its storages.
        sizes: in bytes of what is in the archive. Older versions of PyTorch believe what the pickle says of a storage's
            size, and read the memory behind it.
    """
    # Of each value, how many tuples it is made of, and the value if it is a number, a text or a name; for a tuple, a
    # list of those.
    stack: list[tuple[int, Any]] = []
    marks: list[int] = []
    memo: dict[int, tuple[int, Any]] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, (0, None)))
            continue
        if name == "MARK":
            marks.append(len(stack))
            continue
        # PyTorch takes time that grows with the square of a name's length to say that it refuses it.
        if name == "GLOBAL" and (argument in REFUSED or len(argument) > 200):
            asked_for = legible(argument.replace(" ", "."))
            raise CheckpointError(f"{path}: refused: it asks for {asked_for}; accepted: tensors and plain types")
        taken, start = operation.stack_before, len(stack)
        if pickletools.markobject in taken:
            taken, start = taken[: taken.index(pickletools.markobject)], marks.pop()
        start -= len(taken)
        items = stack[start:]
        del stack[start:]
        if name.startswith("TUPLE"):
            stack.append((1 + sum(tuples for tuples, _ in items), [value for _, value in items]))
            if stack[-1][0] > MOST_NESTED_TUPLES:
                raise CheckpointError(
                    f"{path}: refused: it nests more than {MOST_NESTED_TUPLES:,} tuples; accepted: tensors and plain "
                    "types"
                )
        else:
            stack.extend([(0, argument)] * len(operation.stack_after))
        if name == "BINPERSID" and sizes is not None:
            _, kind, key, _, count = items[-1][1]
            if sizes[f"{folder}/data/{key}".lower()] != count * _ITEM_BYTES[kind.split()[-1]]:
                raise DamagedCheckpointError(
                    f"{path}: not a checkpoint, or damaged: data/{legible(key)} in it has not the size of the "
                    f"{legible(count)} numbers it should hold"
                )


def _bare(value: Any, done: dict[int, Any]) -> Any:
    """The same in dictionaries, lists, tuples and tensors that have no attributes of their own: a file can give an
    OrderedDict or a tensor any, which would hide the methods of that name."""
    if isinstance(value, Tensor):
        return Tensor.detach(value)
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = copy = {}
            copy.update((key, _bare(part, done)) for key, part in dict.items(value))
        elif isinstance(value, list):
            done[id(value)] = copy = []
            copy.extend(_bare(part, done) for part in value)
        else:
            done[id(value)] = tuple(_bare(part, done) for part in value)
    return done[id(value)]


def legible(value: Any) -> str:
    """Something out of a file, for messages: short and printable. What is neither text nor a number could be endless:
    of that, the type."""
    text = str(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if text.isprintable() else ascii(text)


def _reason(error: Exception) -> str:
    """An exception's message, or what there is of it."""
    line = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return line if line.isprintable() else ascii(line)


def find_weights(content: Mapping, path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """The state dict in a checkpoint: under "model" or "state_dict", or the checkpoint itself; without the prefixes
    that DistributedDataParallel and torch.compile add.

    Args:
        ema: whether to take the moving average of the weights ("model_ema", "state_dict_ema") where there is one.
    """
    averages = ("model_ema", "state_dict_ema") if ema else ()
    for key in (*averages, "model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise CheckpointError(f"{path}: holds no weights; its keys: {_some(content)}")
    return strip_prefixes(content)


def _some(names: Iterable) -> str:
    """The first few, for messages."""
    return ", ".join(map(legible, itertools.islice(names, 8)))


@contextlib.contextmanager
def _converting(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Inside, whatever is raised is a CheckpointError: conversions know what files of their kind are like, and no
    others."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{path}: does not fit the model of the config ({type(model).__name__}): its weights cannot be converted: "
            f"{_reason(error)}"
        ) from error


def convert_weights(weights: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The weights of the file `path` under the model's own names, for images of whatever size."""
    with _converting(model, path):
        return to_our_names(weights, model)


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters."""
    modules = classifiers(model)
    prefixes = {name: module for name, module in model.named_modules() if any(module is c for c in modules)}
    return [f"{prefix}.{name}" for prefix, module in prefixes.items() for name, _ in module.named_parameters()]


def other_classes(content: Mapping, classes: Sequence[str]) -> bool:
    """Whether a checkpoint names its classes and these, if there are any, are others, or in another order."""
    theirs = content.get("classes")
    return isinstance(theirs, list) and bool(theirs) and bool(classes) and theirs != list(classes)


def count_classes(model: nn.Module, content: Mapping, path: str | Path, ema: bool = True) -> int:
    """How many classes the classifier in a checkpoint has.

    Args:
        model: of that kind, with a classifier for any number of classes.

    Raises:
        CheckpointError: it has no weights, or no classifier.
    """
    weights = convert_weights(find_weights(content, path, ema), model, path)
    for name in classifier_names(model):
        if name in weights and weights[name].ndim:
            return len(weights[name])
    names = ", ".join(classifier_names(model))
    raise CheckpointError(f"{path}: has no classifier ({names}), which would say how many classes there are")


class Loaded(NamedTuple):
    """How the weights of a checkpoint came into a model.

    Attributes:
        fresh: names of the classifier's parameters, if it is a new one.
        img_size: of the images that the weights were made for, (height, width), if they were resampled.
    """

    fresh: list[str]
    img_size: tuple[int, int] | None

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
    ema: bool = True,
    same_size: bool = False,
    classes: Sequence[str] | None = None,
) -> Loaded:
    """Loads the weights of a checkpoint into the model, all of them, resampled if they are for images of another size.

    Args:
        model: not wrapped.
        content: what `read_checkpoint` gave; released or ours.
        path: for messages.
        new_classifier: whether a classifier for other classes keeps its fresh initialisation: for another number of
            them, or others than `classes`, if the checkpoint names its own.
        ema: see `find_weights`.
        same_size: whether to refuse weights for images of another size.

    Raises:
        CheckpointError: listing the keys that are missing, not known, of another shape, or not finite.
    """
    weights = convert_weights(find_weights(content, path, ema), model, path)
    img_size = None
    if hasattr(model, "resample"):
        with _converting(model, path):
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
    problems = [f"{title}: {_shorten(names)}" for title, names in titled.items() if names]
    if problems:
        raise CheckpointError(
            f"{path}: does not fit the model of the config ({type(model).__name__}, {len(expected)} entries); "
            + "; ".join(problems)
        )
    # Also in the model's precision, which numbers of the file's may be too large for.
    broken = [n for n, v in weights.items() if not all(x.isfinite().all() for x in (v, v.to(expected[n].dtype)))]
    if broken:
        raise CheckpointError(f"{path}: not all of its weights are finite numbers: {_shorten(broken)}")
    model.load_state_dict(weights, strict=not fresh)
    return Loaded(fresh, img_size)


def is_plain(value: Any) -> bool:
    """Whether it is a tensor of real numbers in memory: not sparse, quantised, meta, complex or of bits, none of which
    could be copied into a parameter."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _NUMBERS and not value.is_meta


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(n[:200] if n.isprintable() else ascii(n[:200]) for n in names[:5]) + more


def load_pretrained(model: nn.Module, path: str | Path, logger: Logger, classes: Sequence[str] | None = None) -> None:
    """Loads weights to fine-tune from (`--pretrained`). A classifier for other classes than `classes` starts anew,
    weights for images of another size are resampled; the log says so."""
    loaded = load_weights(model, read_checkpoint(path), path, new_classifier=True, classes=classes)
    for line in (f"pretrained weights from {path}", *loaded.notes(model)):
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
            f"{path}: holds no training state of this project (keys: {_some(content)}); use "
            "--pretrained to fine-tune from its weights, or main_eval.py to evaluate them"
        )
    if type(content["format"]) is not int or content["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: checkpoint format {legible(content['format'])}; this version reads formats 1 to {FORMAT}"
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
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < LARGEST

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
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        require(all(isinstance(v, str | int | float) for v in values), f"config has no plain value of {legible(key)}")
    for key in ("DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS"):
        require(whole(config.get(key), 1), f"config has no {key}")
    name = config.get("TRAIN.OPTIMIZER.NAME")
    require(isinstance(name, str) and name == legible(name), "config has no TRAIN.OPTIMIZER.NAME")
    section("optimizer")
    classes = content.get("classes", [])  # older files do not name them
    require(isinstance(classes, list) and all(isinstance(c, str) for c in classes), "classes are no list of names")
    if scaler := section("scaler"):
        good = all(number(scaler.get(key)) and scaler[key] > 0 for key in ("scale", "growth_factor", "backoff_factor"))
        for key in ("growth_interval", "_growth_tracker"):  # PyTorch counts them in 32 bits
            good = good and whole(scaler.get(key)) and scaler[key] < 2**31
        require(good, "scaler is not a loss scaler's state")
    for key in ("run", "processes", "images"):
        require(key in content, f"it has no {key}")
    require(content["run"] is None or isinstance(content["run"], str), "run is not a name")
    for key in ("processes", "images"):
        require(content[key] is None or whole(content[key], 1), f"{key} is not a number")
    for key in ("step", "skipped", "skipped_in_row"):
        require(whole(progress.get(key)), f"progress has no {key}")
    require(number(progress.get("seconds")), "progress has no seconds")
    require(isinstance(progress.get("trained"), bool), "progress does not say whether the epoch is trained")
    processes = content["processes"] or 1
    arrays = {
        "losses": ((processes, 2), torch.float64),
        "unreadable": ((processes,), torch.int64),
        "buffers": ((processes, -1), torch.float64),
    }
    for key, (shape, dtype) in arrays.items():
        require(key in progress, f"progress has no {key}")
        value = progress[key]
        if key == "buffers" and value is None:
            continue
        fits = is_plain(value) and value.dtype == dtype and value.ndim == len(shape)
        fits = fits and all(n in (-1, m) for n, m in zip(shape, value.shape, strict=True))
        # One number in memory can be shown as any number of them.
        fits = fits and value.nbytes <= value.untyped_storage().nbytes() and bool(value.isfinite().all())
        require(fits, f"progress has no {key} of {processes} processes")
    require(bool((progress["unreadable"] >= 0).all()), "progress has a negative number of unreadable images")
