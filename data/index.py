"""Long lists kept in files. Listing a million files takes seconds, on network file systems minutes.

A list has "stamps", which say when what it lists was changed last. If they are others now, the file is not used and
made anew.
"""

import hashlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from data.arrays import Strings

FORMAT = "2"
# Fewer samples are listed in less time than it is worth.
FEWEST_SAMPLES = 10_000
# What was changed so shortly before it was listed may be changed again without another time of change.
SETTLED_SECONDS = 2.0

# A named tuple of arrays, `Strings` and lists of strings, with `targets` (samples,), `stamps` (n, 2) and the method
# `is_sound`, which says whether values of those types fit together.
Kept = TypeVar("Kept", bound=Any)


def kept(kind: type[Kept], path: Path, make: Callable[[], Kept], stamps: Callable[[Kept], np.ndarray]) -> Kept:
    """A list from its file, or from `make` if there is none that can be used. A list of at least `FEWEST_SAMPLES` is
    kept: beside `path` if that can be written, else in the user's cache.

    Args:
        path: what is listed.
        stamps: gives the stamps that a list would have now. Raises OSError if something that it lists is gone.
    """
    places = index_paths(path)
    for place in places:
        found = read_index(place, kind)
        if found and _is_current(found, stamps):
            return found
    started = time.time()
    made = make()
    settled = made.stamps.max() < (started - SETTLED_SECONDS) * 1e9
    if len(made.targets) >= FEWEST_SAMPLES and settled:
        for place in places:
            try:
                write_index(place, made)
            except OSError:
                continue  # a place that cannot be written; without any, it is listed at each start
            return read_index(place, kind) or made
    return made


def stamps_of(paths: list[str]) -> np.ndarray:
    """When the content of each path, and when anything about it, was changed last: (paths, 2) int64, nanoseconds. Take
    them before what they are of is read: a change meanwhile then shows. Raises OSError."""
    statuses = map(os.stat, paths)
    return np.array([(status.st_mtime_ns, status.st_ctime_ns) for status in statuses], np.int64).reshape(-1, 2)


def _is_current(found: Kept, stamps: Callable[[Kept], np.ndarray]) -> bool:
    try:
        return np.array_equal(stamps(found), found.stamps)
    except OSError:
        return False


def index_paths(path: Path) -> list[Path]:
    """Where the list of a path may be, in this order: beside it, not in it, where it would change a folder; and in the
    user's cache, named by the real path."""
    real = Path(os.path.realpath(path))
    places = [real.parent / f".{real.name}.index"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # "~" stays where there is no home
        places.append(Path(cache, "strip_mlp", hashlib.sha256(os.fsencode(real)).hexdigest()[:32] + ".index"))
    return places


def write_index(path: Path, value: Kept) -> None:
    """Writes a safetensors file. It is complete before it gets its name. Raises OSError."""
    arrays = {}
    for name, field in value._asdict().items():
        if isinstance(field, np.ndarray):
            arrays[name] = field
        else:
            strings = field if isinstance(field, Strings) else Strings.of(field)
            arrays |= {f"{name}.text": strings.text, f"{name}.ends": strings.ends}
    content = save({name: torch.tensor(array) for name, array in arrays.items()}, {"format": FORMAT})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_index(path: Path, kind: type[Kept]) -> Kept | None:
    """What `write_index` has written; None if there is no such file, or it cannot be used."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                return None
            # Copied. A process that maps a file dies when another machine replaces it on a network file system.
            arrays = {name: file.get_tensor(name).numpy().copy() for name in file.keys()}  # noqa: SIM118
        values = {}
        for name, type_ in kind.__annotations__.items():
            if type_ is np.ndarray:
                values[name] = arrays[name]
                continue
            strings = Strings(arrays[f"{name}.text"], arrays[f"{name}.ends"])
            if not strings.is_sound():
                return None
            values[name] = strings if type_ is Strings else list(strings)
        value = kind(**values)
        return value if value.is_sound() else None
    except Exception:  # damaged, of another kind, not allowed: what it lists is what counts
        return None
