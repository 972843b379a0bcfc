"""Checkpoints that are several files, or one file of several: what `read_checkpoint` takes.

- a file, by `untrusted.py`;
- a folder of `torch.distributed.checkpoint`, which FSDP writes, with its `.metadata`;
- safetensors shards with their index, `model.safetensors.index.json`;
- a folder of timm's or a Hugging Face hub's, `model.safetensors` and `config.json`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.untrusted import (
    MOST_PICKLE_BYTES,
    CheckpointError,
    DamagedCheckpointError,
    Record,
    is_plain,
    legible,
    read_file,
    read_part,
    read_records,
    refusals,
)

DISTRIBUTED, INDEX, WEIGHTS, DESCRIPTION = (
    ".metadata",
    "model.safetensors.index.json",
    "model.safetensors",
    "config.json",
)
ACCEPTED = f"a file (.pth, .safetensors), or a folder with {WEIGHTS}, {INDEX} or {DISTRIBUTED} (torch.distributed's)"
OTHERS = {
    ".npz": "of NumPy",
    ".h5": "of Keras",
    ".msgpack": "of Flax",
    ".onnx": "of ONNX",
    ".pt2": "of torch.export",
    ".gguf": "of llama.cpp",
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. No code of it runs: see `untrusted.py`.

    Of a safetensors file beside timm's `config.json`, that is there too: under "timm", as a dictionary, and the names
    of the classes under "classes".

    Raises:
        DamagedCheckpointError: cut off, changed, or no checkpoint at all.
        CheckpointError: nothing there, or something that is refused or of another kind.
    """
    path = Path(path)
    if path.name == DISTRIBUTED:
        return _read_distributed(path.parent)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.is_dir():
        if (path / DISTRIBUTED).is_file():
            return _read_distributed(path)
        if (path / WEIGHTS).is_file():
            return _with_description(read_file(path / WEIGHTS), path)
        if (path / INDEX).is_file():
            return _read_shards(path / INDEX)
        raise CheckpointError(f"{path}: is a folder without a checkpoint that can be read{_seen(path)}")
    if path.suffix in OTHERS:
        raise CheckpointError(f"{path}: is a file {OTHERS[path.suffix]}; accepted: {ACCEPTED}")
    if path.suffix == ".distcp":
        raise CheckpointError(f"{path}: is a part of a checkpoint; accepted: its folder, {path.parent}")
    shard = re.search(r"-\d+-of-(\d+)\.safetensors$", path.name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(f"{path}: is one of {int(shard[1])} shards; accepted: their index, {path.parent / INDEX}")
    content = read_file(path)
    return _with_description(content, path.parent) if path.suffix == ".safetensors" else content


def _seen(folder: Path) -> str:
    """What somebody may have meant who named the folder."""
    if (folder / "zero_to_fp32.py").is_file():
        return "; it is DeepSpeed's: its zero_to_fp32.py writes the weights as a file that can"
    named = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
    )
    if named:
        return f"; accepted: one of its files, such as {folder / named[0]}"
    return f"; accepted: {ACCEPTED}"


def _with_description(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Adds timm's `config.json`, if it is there and the file does not know its config itself."""
    if "config" in content or not (folder / DESCRIPTION).is_file():
        return content
    try:
        description = _read_json(folder / DESCRIPTION)
    except CheckpointError:
        return content  # whatever it is, it does not describe these weights
    if not isinstance(description.get("architecture"), str):
        return content
    known = {"timm": description}
    inner = description.get("pretrained_cfg")
    labels = description.get("label_names") or (inner.get("label_names") if isinstance(inner, Mapping) else None)
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        known["classes"] = labels
    return {**known, **content}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with refusals(path):
        if path.stat().st_size > MOST_PICKLE_BYTES:
            raise CheckpointError(f"{path}: refused: it is longer than {MOST_PICKLE_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"{path}: holds a {type(content).__name__}; accepted: a dictionary")
    return content


def _read_shards(index: Path) -> dict[str, Any]:
    """The weights of all shards that the index names."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: is no index of shards: it has no weight_map from names to files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        _check_name(name, index)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the shard {legible(name)}; accepted: .safetensors")
        shard = read_file(index.parent / name)["model"]
        expected = [key for key, place in places.items() if place == name]
        lacking = [key for key in expected if key not in shard]
        if lacking:
            raise DamagedCheckpointError(
                f"{index.parent / name}: has no {legible(lacking[0])}, which {index.name} says"
            )
        weights |= {key: shard[key] for key in expected}
    return _with_description({"model": weights}, index.parent)


def _check_name(name: str, where: Path) -> None:
    """Raises CheckpointError for a file that is not in the folder itself."""
    if name != Path(name).name or "\\" in name:
        raise CheckpointError(f"{where}: refused: it names {legible(name)}; accepted: files in its own folder")


def _read_distributed(folder: Path) -> dict[str, Any]:
    """The tensors of a folder of `torch.distributed.checkpoint`, whole and in nested dictionaries, without optimizers.

    PyTorch's own reader (`dcp_to_torch_save`) unpickles the description and all that are not tensors without limits, so
    that they could run code. Here neither is done.
    """
    description = folder / DISTRIBUTED
    if not description.is_file():
        raise CheckpointError(f"{description}: no such file")
    records = read_records(description)
    with refusals(description):
        tensors, paths, places = records.get("state_dict_metadata"), records.get("planner_data") or {}, {}
        for index, place in records.get("storage_data").items():
            places[index.get("fqn"), tuple(index.get("offset") or ())] = place
        names = {place.get("relative_path") for place in places.values()}
        for name in names:
            _check_name(name, description)
        available = sum((folder / name).stat().st_size for name in names)
        content: dict[str, Any] = {}
        for name, tensor in tensors.items():
            path = [str(part) for part in paths.get(name, (name,))]
            if not isinstance(tensor.get("properties"), Record) or path[0].startswith("optim"):
                continue
            size = tensor.get("size")
            value = torch.empty(size, dtype=tensor.get("properties").state[0], device="meta")
            chunks = [(c.get("offsets"), c.get("sizes")) for c in tensor.get("chunks")]
            stored = [places.get((name, offsets)) or places[name, ()] for offsets, _ in chunks]
            # Each byte of the files is used once.
            available -= max(value.nbytes, sum(place.get("length") for place in stored))
            covered = sum(torch.Size(sizes).numel() for _, sizes in chunks)
            if available < 0 or covered != value.numel() or any(place.get("length") < 0 for place in stored):
                raise DamagedCheckpointError(f"{description}: does not fit the files beside it: {legible(name)}")
            value = torch.zeros_like(value, device="cpu")
            for (offsets, sizes), place in zip(chunks, stored, strict=True):
                part = _read_chunk(folder, place)
                where = tuple(slice(start, start + count) for start, count in zip(offsets, sizes, strict=True))
                if part.shape != sizes or value[where].shape != sizes:
                    raise DamagedCheckpointError(f"{description}: {legible(name)} has not the size that it says")
                value[where] = part
            inner = content
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value
    return content


def _read_chunk(folder: Path, place: Record) -> Tensor:
    name = place.get("relative_path")
    if place.get("transform_descriptors"):
        raise CheckpointError(f"{folder / name}: is compressed or encrypted, which is not read")
    with open(folder / name, "rb") as file:
        file.seek(place.get("offset"))
        part = read_part(file.read(place.get("length")), folder / name)
    if not is_plain(part):
        raise DamagedCheckpointError(f"{folder / name}: holds no plain tensor")
    return part
