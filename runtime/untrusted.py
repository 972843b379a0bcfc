"""Reading files that nobody vouches for: checkpoints from strangers, and those that a crash or a bad disk has damaged.

What is promised of `read_file` and the other readers here, of `check_training_state` and of `check_optimizer_state`:

- No code of the file runs. `torch.load` is called with `weights_only=True`; a pickle that asks for anything but tensors
  and plain types is refused.
- Time and memory are bounded by the size of the file: claims of sizes that it does not have, compressed entries and
  deep nesting are refused before anything is unpickled.
- What changed since it was written is noticed, by the zip file's checksums.
- What comes back are dictionaries, lists, tuples, tensors, numbers and text without attributes of their own. After the
  checks, a training state has the types, shapes and ranges that going on from it relies on.
- Everything else is a `CheckpointError`, with the file's name and in printable characters.
"""

import contextlib
import errno
import io
import itertools
import json
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from torch import Tensor

from utils import UserError

# Size of the pickle in a checkpoint, which takes some 200 bytes per tensor. A pickle of millions of entries would take
# minutes and all memory to read.
MOST_PICKLE_BYTES = 32 * 2**20
# How many tuples a tuple may contain, repeated ones counted each time. Hashing it, as a key, visits all of them,
# recursively: nesting can make a small file take for ever, or overflow the stack.
MOST_NESTED_TUPLES = 10_000
# torch.load would call these, and a few bytes could fill the memory with them.
REFUSED = ("builtins bytearray", "__builtin__ bytearray", "_codecs encode")
# Numbers from here on are beyond what any run could count to.
LARGEST = 2**63
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool)
_NUMBERS += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# What tasks call the accuracy that decides on the best epoch.
METRICS = ("top1", "AP")
# Bytes per element, by the names of storages in a pickle.
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
    """A file that is cut off, changed, or no checkpoint at all."""


# Read as dictionaries, which they are: the configs of Swin-style files, the options of timm's train.py and others, and
# Lightning's hyperparameters. An argparse.Namespace comes back empty, since `_bare` drops attributes.
_DICTIONARIES = (
    "yacs.config.CfgNode",
    "argparse.Namespace",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a checkpoint in one file, on the CPU: loaded with `weights_only=True`, or a safetensors file.

    Raises:
        DamagedCheckpointError: cut off, changed, or no checkpoint at all.
        CheckpointError: no such file, or a file that is refused (see the module's docstring).
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    with refusals(path):
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with open(path, "rb") as file:
            content = _load(file, path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; accepted: a dictionary")
    return content


def read_part(data: bytes, path: Path) -> Any:
    """What `torch.save` wrote into a part of the file `path`: see `read_file`."""
    with refusals(path):
        return _load(io.BytesIO(data), path)


def read_records(path: Path) -> Any:
    """The content of a pickle that describes the files of `torch.distributed.checkpoint`, where each object is a
    `Record`. None of the classes that it names is used.

    Raises:
        CheckpointError: as of `read_file`; a pickle that names anything else.
    """
    with refusals(path):
        with open(path, "rb") as file:
            data = file.read(MOST_PICKLE_BYTES + 1)
        if len(data) > MOST_PICKLE_BYTES:
            raise CheckpointError(f"{path}: refused: it is longer than {MOST_PICKLE_BYTES:,} bytes")
        _check_pickle(io.BytesIO(data), path)
        return _RecordUnpickler(io.BytesIO(data)).load()


class Record:
    """An object of a class that is not to be trusted: what its pickle says of it.

    Attributes:
        state: its attributes by name, or whatever its class would have made of itself.
    """

    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """The attribute of that name, or None."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def _size(numbers: Iterable = ()) -> tuple:
    return tuple(numbers)


class _RecordUnpickler(pickle.Unpickler):
    """The standard library's way to restrict a pickle: every name in it is looked up here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return _size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        described = module.startswith("torch.distributed.") or (module, name) == ("torch.serialization", "_get_layout")
        # Of an enum, some versions of Python store a call of getattr. A record does not make it.
        if described or module in ("pathlib", "pathlib._local") or (module, name) == ("builtins", "getattr"):
            return Record
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Inside, every exception becomes a `CheckpointError` that names the file `path`."""
    try:
        yield
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
    except Exception as error:  # PyTorch's reader can raise any exception on a damaged file
        # Perhaps the disk or the machine is at fault and not the file. EINVAL comes from seeking in a damaged one.
        passing = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if passing or "can't allocate memory" in str(error):
            raise CheckpointError(f"{path}: cannot be read: {reason_of(error)}") from error
        raise DamagedCheckpointError(f"{path}: not a checkpoint, or damaged: {reason_of(error)}") from error


def _load(file: IO[bytes], path: Path) -> Any:
    _check_archive(file, path)
    file.seek(0)
    with torch.serialization.safe_globals([(OrderedDict, name) for name in _DICTIONARIES]):
        return _bare(torch.load(file, map_location="cpu", weights_only=True), {})


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The weights under "model", and of the metadata what `save_safetensors` writes."""
    with safetensors.safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    known = {name: json.loads(metadata[name]) for name in ("config", "classes") if name in metadata}
    return {"model": weights, **known}


def _check_archive(file: IO[bytes], path: Path) -> None:
    """Checks what torch.load does not: checksums (it loads changed tensors silently), and sizes that a small file may
    claim."""
    zipped = file.read(4) == b"PK\x03\x04"  # as PyTorch tells
    file.seek(0)
    if not zipped:  # the format before PyTorch 1.6, which begins with five pickles; or no checkpoint
        start = io.BytesIO(file.read(MOST_PICKLE_BYTES))
        for _ in range(5):
            _check_pickle(start, path)
        return
    with zipfile.ZipFile(file) as archive:
        if any(name.lower().endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path}: is a TorchScript program; accepted: weights, as torch.save stores them")
        sizes: dict[str, int] = {}
        for entry in archive.infolist():
            name = entry.filename.lower()  # PyTorch's reader ignores case
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: refused: {legible(name)} in it is compressed; torch.save stores")
            if entry.external_attr & 0x10:  # PyTorch's reader would read nothing and return uninitialised memory
                raise DamagedCheckpointError(f"{path}: damaged: {legible(name)} in it is marked as a folder")
            if name in sizes:  # PyTorch's reader and these checks might look at different ones
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
    """Raises CheckpointError for a pickle that must not be unpickled although torch.load would accept it.

    Args:
        file: one pickle is read from it.
        folder: in the archive, of this pickle and its storages.
        sizes: in bytes, of the archive's entries. Older versions of PyTorch believe the pickle about the size of a
            storage, and read beyond the entry's end.
    """
    # For each value: how many tuples it is made of, and the value itself if it is a number, text or a name. For a
    # tuple, a list of those.
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
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
            continue
        if name == "MARK":
            marks.append(len(stack))
            continue
        # PyTorch's message about a refused name takes time quadratic in its length.
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
    """The same in dictionaries, lists, tuples and tensors without attributes of their own. A file can give an
    OrderedDict or a tensor attributes, which would hide methods of the same name."""
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
    """Something from a file, for messages: short and printable. If it is neither text nor a number, its type: printing
    it might never end."""
    text = str(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if text.isprintable() else ascii(text)


def reason_of(error: Exception) -> str:
    """The first line of an exception's message, or its type."""
    line = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return line if line.isprintable() else ascii(line)


def some_keys(names: Iterable) -> str:
    """The first few keys of a dictionary from a file, for messages."""
    return ", ".join(map(legible, itertools.islice(names, 8)))


def is_plain(value: Any) -> bool:
    """Whether it is a tensor of real numbers in memory, which can be copied into a parameter: not sparse, quantised,
    meta, complex or of bits."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _NUMBERS and not value.is_meta


def check_training_state(content: Mapping, path: str | Path) -> None:
    """Raises CheckpointError for content that `TrainingState.capture` cannot have written."""

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
    accuracies = [best[name] for name in METRICS if name in best]
    good = len(accuracies) == 1 and number(accuracies[0], -1) and whole(best.get("epoch"))
    require(good, "best is not an accuracy and an epoch")
    # Not finite after a bad epoch; older files have none
    require(isinstance(best.get("val_loss", 0.0), float), "best has a val_loss that is no number")
    if "lowest" in content:  # older files have none
        lowest = section("lowest")
        good = isinstance(lowest.get("val_loss"), float) and whole(lowest.get("epoch"))
        require(good, "lowest is not a loss and an epoch")
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
    if "scheduler" in content and (schedule := section("scheduler")):  # older files have none
        good = number(schedule.get("factor")) and schedule["factor"] <= 1 and isinstance(schedule.get("best"), float)
        require(good and whole(schedule.get("bad_evaluations")), "scheduler is not a schedule's state")
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
    parts = progress.get("parts", [])  # older files have none
    require(isinstance(parts, list) and all(isinstance(name, str) for name in parts), "progress has no names of losses")
    arrays = {
        "losses": ((processes, 2 + len(parts)), torch.float64),
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
        # An expanded tensor: a few bytes can claim to be any number of elements.
        fits = fits and value.nbytes <= value.untyped_storage().nbytes() and bool(value.isfinite().all())
        require(fits, f"progress has no {key} of {processes} processes")
    require(bool((progress["unreadable"] >= 0).all()), "progress has a negative number of unreadable images")


def check_optimizer_state(
    state: Mapping,
    optimizer: torch.optim.Optimizer,
    moment_names: Sequence[str] | None,
    like: Mapping | None = None,
) -> None:
    """Raises ValueError for a saved state that does not fit the optimizer's parameters. PyTorch's load_state_dict takes
    any, and the first step then fails, broadcasts the moments, or gives NaN.

    Args:
        moment_names: what the optimizer remembers of every parameter, in the parameter's shape.
        like: in place of those, a state dict of such an optimizer after a step.
    """
    saved = state.get("param_groups")
    if not isinstance(saved, list) or not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved):
        raise ValueError("no optimizer state: param_groups is not a list of groups")
    counts, expected = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if counts != expected:
        raise ValueError(f"its optimizer state is for groups of {counts} parameters, not {expected}")
    numbers = [number for group in saved for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = state.get("state")
    whole = isinstance(moments, dict) and all(type(number) is int for number in (*numbers, *moments))
    if not whole or numbers != list(range(len(parameters))) or not set(moments) <= set(numbers):
        raise ValueError("no optimizer state: its parameters are not numbered in order")
    if like:
        _check_counters(saved, like["param_groups"])
    for number, values in moments.items():
        if not isinstance(values, dict):
            raise ValueError(f"the optimizer state of parameter {number} is not a dictionary")
        if not values:
            continue  # a parameter that had no gradient yet
        if like:
            _check_values(values, like["state"][number], number)
            continue
        adam = isinstance(optimizer, torch.optim.AdamW)
        if adam and not _is_step(values.get("step")):
            raise ValueError(f"its optimizer state has no number of steps of parameter {number}")
        for name in moment_names:
            value, parameter = values.get(name), parameters[number]
            if value is None and not adam:
                continue  # without momentum
            if not _is_moment(value, parameter) or (name == "exp_avg_sq" and bool((value < 0).any())):
                raise ValueError(
                    f"its optimizer state has as {name} of parameter {number} no tensor of finite numbers of "
                    f"shape {tuple(parameter.shape)}"
                )


def _check_counters(groups: Sequence[Mapping], like: Sequence[Mapping]) -> None:
    """Raises ValueError unless all that is a number in the groups of `like` is one in the saved groups."""
    for group, expected in zip(groups, like, strict=True):
        for name, value in expected.items():
            is_number = type(value) in (int, float)
            is_count = isinstance(value, Tensor) and value.ndim == 0
            found = group.get(name)
            if (is_number and not _is_number(found)) or (is_count and not (is_plain(found) and _is_step(found))):
                raise ValueError(f"its optimizer state has no {name} of a group of parameters")


def _check_values(values: Mapping, like: Mapping, number: int) -> None:
    """Raises ValueError unless `values` has the entries of `like` in the same types and shapes, of finite numbers."""
    if set(values) != set(like):
        raise ValueError(
            f"its optimizer state of parameter {number} has {some_keys(values)}; accepted: {some_keys(like)}"
        )
    for name, expected in like.items():
        value = values[name]
        if isinstance(expected, Tensor):
            good = _is_moment(value, expected)
            good = good and not (name in ("exp_avg_sq", "step") and bool((value < 0).any()))
        elif isinstance(expected, bool):
            good = value is expected
        else:
            good = type(value) is type(expected) and _is_number(value)
        if not good:
            raise ValueError(
                f"its optimizer state has as {name} of parameter {number} nothing that can be gone on from"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_step(value: Any) -> bool:
    number = value.item() if is_plain(value) and value.ndim == 0 else value
    return isinstance(number, int | float) and 0 <= number < LARGEST


def _is_moment(value: Any, parameter: torch.Tensor) -> bool:
    """Whether it can be a moment of the parameter: finite in its precision, and each element in memory of its own,
    because the optimizer writes to it."""
    if not is_plain(value) or value.shape != parameter.shape:
        return False
    shared = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return not shared and all(bool(x.isfinite().all()) for x in (value, value.to(parameter.dtype)))
