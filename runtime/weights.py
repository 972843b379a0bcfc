"""Finding the weights in a checkpoint: in ours, released ones, and those of timm's train.py, DeiT, Lightning and
others, who store them under other keys and with other names."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.released import strip_prefixes, to_our_names
from runtime.untrusted import CheckpointError, legible, reason_of, some_keys
from utils import shorten

# Lightning's WeightAveraging stores the average as "state_dict", and the weights under this key.
LIGHTNING_WEIGHTS = "current_model_state"
# Where weights are, the first of these that is there; and one level further down, as in {"ema": {"module": ...}}.
KEYS = (LIGHTNING_WEIGHTS, "model", "state_dict", "model_state_dict", "module", "net", "network", "params", "weights")
INSIDE = ("module", "model", "state_dict", "model_state_dict", "shadow", "params")
# A key is of a moving average of the weights if one of its words is.
AVERAGES = {"ema", "swa", "average", "averaged", "avg"}
# How many beginnings of names are tried: each is a conversion.
MOST_PREFIXES = 20


class Found(NamedTuple):
    """Weights of a checkpoint, and which of it they are, for the log: 'state_dict_ema, the moving average (also there:
    state_dict)'."""

    weights: dict[str, Tensor]
    taken: str


def find_weights(content: Mapping, path: str | Path, ema: bool | None = None, model: nn.Module | None = None) -> Found:
    """The state dict in a checkpoint: under one of several keys, or the checkpoint itself; without what wrappers and
    trainers put before the names.

    Args:
        content: what `read_checkpoint` gave.
        path: for messages.
        ema: True: the moving average of the weights; False: the weights themselves; None: the average if there is one.
        model: what they are for. They come back under its names (see `released.to_our_names`), for images of whatever
            size, and without a beginning that all of its names have in the checkpoint, such as Lightning's "model.".

    Raises:
        CheckpointError: no weights, several that it cannot choose from, or none of the kind that `ema` asks for.
    """
    state_dicts = _state_dicts(content)
    averages = [key for key in state_dicts if _is_average(key, content)]
    plain = sorted(set(state_dicts) - set(averages), key=_rank)
    unread = [key for key in content if _is_average(key, content) and not any(a.startswith(key) for a in averages)]
    unread = [key for key in unread if isinstance(content[key], Mapping | list | tuple) and content[key]]
    if averages and ema is not False:
        key, said = averages[0], ", the moving average"
    elif plain and (_rank(plain[0]) < len(KEYS) or len(plain) == 1):
        key, said = plain[0], ""
    elif plain:
        raise CheckpointError(
            f"{path}: holds several weights: {shorten(plain)}; accepted: one of them, under the key {KEYS[0]}"
        )
    elif averages:
        raise CheckpointError(f"{path}: holds a moving average of weights alone ({averages[0]}); accepted: --ema")
    else:
        raise CheckpointError(f"{path}: holds no weights; its keys: {some_keys(_innermost(content))}")
    weights = strip_prefixes(state_dicts[key])
    weights.pop("n_averaged", None)  # of PyTorch's AveragedModel
    averaged = key in averages
    others = [legible(other) for other in (*averages, *plain) if other != key]
    notes = [f"also there: {shorten(others)}"] if others else []
    notes += [f"{legible(other)} holds no state dict and is not read" for other in unread]
    if model is not None:
        # Of names with a beginning, those of the average can be beside those of the weights.
        weights, prefix, rest = _fit(weights, model, path, ema if not averaged else None)
        if prefix:
            averaged = averaged or _has_average(prefix)
            notes.append(f"its names begin with {legible(prefix)}")
        if prefix and rest:
            notes.append(f"not taken: {shorten(rest)}")
        if ema and not averaged:
            raise CheckpointError(
                f"{path}: --ema, but it holds no moving average of the weights; its keys: {some_keys(content)}"
            )
    more = f" ({'; '.join(notes)})" if notes else ""
    return Found(weights, f"{legible(key) or 'the file itself'}{said}{more}")


def _state_dicts(content: Mapping) -> dict[str, Mapping]:
    """The state dicts in a checkpoint by their keys, with a dot where one is inside another; "" for itself."""
    found = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Mapping):
            continue
        if _is_state_dict(value):
            found[key] = value
        elif key in KEYS or _has_average(key):
            found |= {f"{key}.{inner}": value[inner] for inner in INSIDE if _is_state_dict(value.get(inner))}
    if _is_state_dict(content):
        found[""] = content
    return found


def _rank(key: str) -> int:
    """Where a key stands in KEYS, or after all of them."""
    first = key.partition(".")[0]
    return KEYS.index(first) if first in KEYS else len(KEYS)


def _innermost(content: Mapping) -> Mapping:
    """What the first of the known keys holds, or the checkpoint itself."""
    return next((content[key] for key in KEYS if isinstance(content.get(key), Mapping)), content)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _has_average(name: str) -> bool:
    return bool(AVERAGES & set(re.split(r"[^a-z]+", name[:200].lower())))


def _is_average(key: Any, content: Mapping) -> bool:
    if key == "state_dict" and LIGHTNING_WEIGHTS in content:
        return True
    return isinstance(key, str) and _has_average(key)


@contextlib.contextmanager
def converting(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Inside, every exception becomes a CheckpointError: conversions expect files of their own kind."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{path}: does not fit the model of the config ({type(model).__name__}): its weights cannot be converted: "
            f"{reason_of(error)}"
        ) from error


def _fit(
    weights: dict[str, Tensor], model: nn.Module, path: str | Path, ema: bool | None
) -> tuple[dict[str, Tensor], str, list[str]]:
    """The weights under the model's names, the beginning that they had, and the names that did not have it."""
    expected = model.state_dict().keys()
    failed, converted = None, weights
    try:
        with converting(model, path):
            converted = to_our_names(weights, model)
    except CheckpointError as error:
        failed = error
    if not failed and expected & converted.keys():
        return converted, "", []
    fitting: dict[str, tuple[int, dict[str, Tensor]]] = {}
    for prefix in _prefixes(weights):
        inside = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        with contextlib.suppress(CheckpointError), converting(model, path):
            inside = to_our_names(strip_prefixes(inside), model)
            fitting[prefix] = len(expected & inside.keys()), inside
    most = max((count for count, _ in fitting.values()), default=0)
    if not most:
        if failed:
            raise failed
        return converted, "", []  # loading lists what does not fit
    best = [prefix for prefix, (count, _) in fitting.items() if 2 * count > most]
    best = [prefix for prefix in best if not any(prefix != other and prefix.startswith(other) for other in best)]
    averages = [prefix for prefix in best if _has_average(prefix)]
    wanted = averages if averages and ema is not False else [prefix for prefix in best if prefix not in averages]
    if len(wanted) != 1:
        raise CheckpointError(
            f"{path}: holds weights of several models, whose names begin with {shorten(sorted(best))}; accepted: one "
            "of them, or beside it a moving average whose name says so (ema)"
        )
    prefix = wanted[0]
    return fitting[prefix][1], prefix, [name for name in weights if not name.startswith(prefix)]


def _prefixes(weights: Mapping[str, Tensor]) -> list[str]:
    """Beginnings of names, up to three parts long, the most frequent first."""
    counts: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".", 3)
        counts.update(".".join(parts[:length]) + "." for length in range(1, len(parts)))
    return [prefix for prefix, _ in counts.most_common(MOST_PREFIXES)]
