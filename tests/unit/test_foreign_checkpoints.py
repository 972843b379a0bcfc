"""Checkpoints as other programs write them: where the weights are found, and what is said of it."""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import hubconf
import models
from runtime.checkpoint import CheckpointError, DamagedCheckpointError, load_weights, read_checkpoint

SMALL = {"embed_dim": 8, "depths": (1, 1, 1, 1), "img_size": 32, "num_classes": 3}


def build(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("strip_mlp_pico", **SMALL)


@pytest.fixture(scope="module")
def weights():
    return build(1).state_dict()


@pytest.fixture(scope="module")
def average():
    return build(2).state_dict()


def put(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def assert_loads(content, expected: dict, taken: str, ema: bool | None = None, path="x.pth") -> None:
    model = build()
    assert load_weights(model, content, path, ema=ema).taken == taken
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def timm_file(path: Path, weights: dict, average: dict) -> Path:
    """As timm's train.py writes them."""
    args = argparse.Namespace(model="strip_mlp_pico", opt_betas=[0.9, 0.999], amp=False, experiment="")
    content = {"epoch": 9, "arch": "strip_mlp_pico", "state_dict": weights, "optimizer": {"state": {}}, "version": 2}
    torch.save({**content, "args": args, "state_dict_ema": average, "metric": 81.2}, path)
    return path


def test_timm_train_py(tmp_path, weights, average):
    content = read_checkpoint(timm_file(tmp_path / "last.pth.tar", weights, average))
    said = "state_dict_ema, the moving average (also there: state_dict)"
    for ema, expected, taken in (
        (None, average, said),
        (True, average, said),
        (False, weights, "state_dict (also there: state_dict_ema)"),
    ):
        assert_loads(content, expected, taken, ema)


def test_namespace_is_a_dictionary_while_reading_only(tmp_path, weights):
    path = timm_file(tmp_path / "a.pth", weights, weights)
    assert read_checkpoint(path)["args"] == {}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda w, a: {"model": w, "model_ema": a}, "model_ema, the moving average (also there: model)"),
        (
            lambda w, a: {"model": w, "ema": {"module": put("module.", a), "updates": 7}},
            "ema.module, the moving average (also there: model)",
        ),
        (lambda w, a: {"params": w, "params_ema": a}, "params_ema, the moving average (also there: params)"),
        (
            lambda w, a: {"model": w, "swa": {"n_averaged": torch.tensor(4), **put("module.", a)}},
            "swa, the moving average (also there: model)",
        ),
        (  # Lightning's WeightAveraging
            lambda w, a: {"state_dict": put("net.", a), "current_model_state": put("net.", w), "averaging_state": {}},
            "state_dict, the moving average (also there: current_model_state; its names begin with net.)",
        ),
        (  # a Lightning module that has both as its own modules
            lambda w, a: {"state_dict": {**put("model.", w), **put("ema_model.module.", a)}},
            "state_dict (its names begin with ema_model.; not taken: ",
        ),
    ],
    ids=["deit", "nested", "basicsr", "swa", "lightning", "lightning names"],
)
def test_averages(weights, average, wrap, taken):
    content = wrap(weights, average)
    for ema, expected in ((None, average), (True, average), (False, weights)):
        model = build()
        said = load_weights(model, content, "x.pth", ema=ema).taken
        assert ema is False or said.startswith(taken)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_average_that_cannot_be_taken_is_named(weights):
    content = {"state_dict": weights, "ema": {"shadow_params": list(weights.values()), "decay": 0.9}}
    assert_loads(content, weights, "state_dict (ema holds no state dict and is not read)")
    with pytest.raises(CheckpointError, match=r"x\.pth: --ema, but it holds no moving average .* state_dict, ema"):
        load_weights(build(), content, "x.pth", ema=True)
    with pytest.raises(CheckpointError, match=r"average of weights alone \(model_ema\); accepted: --ema"):
        load_weights(build(), {"model_ema": weights}, "x.pth", ema=False)


@pytest.mark.parametrize("prefix", ["model.", "student.backbone.", "model.module.", "model._orig_mod.", "encoder.a.b."])
def test_lightning(weights, prefix):
    content = {"state_dict": {**put(prefix, weights), "criterion.weight": torch.ones(3)}, "hyper_parameters": {}}
    model = build()
    taken = load_weights(model, content, "x.ckpt").taken
    assert "its names begin with " in taken and "not taken: criterion.weight" in taken
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_prefix_of_released_names_and_of_a_timm_model():
    released = models.released.to_released_names(build(1))
    assert_loads({"state_dict": put("net.", released)}, build(1).state_dict(), "state_dict (its names begin with net.)")
    torch.manual_seed(1)
    theirs, ours = (timm.create_model("test_vit", num_classes=3) for _ in range(2))
    load_weights(ours, put("model.", theirs.state_dict()), "x.pth")
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_fsdp_names(weights):
    wrapped = {
        f"_fsdp_wrapped_module.{k.replace('stages.', 'stages._fsdp_wrapped_module.')}": v for k, v in weights.items()
    }
    assert_loads({"model": wrapped}, weights, "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda w: {"state_dict": {**put("student.", w), **put("teacher.", w)}}, "begin with student., teacher."),
        (lambda w: {"generator": w, "critic": w}, "holds several weights: "),
        (lambda w: {"state_dict": put("model.", {"a.b": torch.ones(1)})}, "does not fit the model"),
    ],
)
def test_what_cannot_be_chosen(weights, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_weights(build(), content(weights), "x.pth")


# Folders


@pytest.fixture(scope="module")
def distributed(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("dcp") / "step_100"
    optimizer = {"state": {"0": {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]}
    dcp.save({"model": weights, "optimizer": optimizer, "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("name", ["", ".metadata"])
def test_distributed_checkpoint(distributed, weights, name):
    content = read_checkpoint(distributed / name)
    assert set(content) == {"model"}
    assert_loads(content, weights, "model", path=distributed)


def test_distributed_checkpoint_in_several_pieces(tmp_path, monkeypatch):
    """Of two processes, which hold halves: their description and files as PyTorch writes them."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    value, storage, chunks = torch.arange(12.0).reshape(4, 3), {}, []
    for rank, part in enumerate(value.split(2)):
        path = tmp_path / f"__{rank}_0.distcp"
        torch.save(part.clone(), path)
        offset = torch.Size([2 * rank, 0])
        chunks.append(ChunkStorageMetadata(offset, part.shape))
        storage[MetadataIndex("net.weight", offset)] = filesystem._StorageInfo(path.name, 0, path.stat().st_size)
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), value.shape, chunks)
    description = Metadata({"net.weight": tensor}, storage_data=storage)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
    assert torch.equal(read_checkpoint(tmp_path)["net.weight"], value)

    (tmp_path / "__1_0.distcp").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"No such file.*__1_0\.distcp"):
        read_checkpoint(tmp_path)
    for index, place in storage.items():
        storage[index] = filesystem._StorageInfo(f"../{place.relative_path}", 0, place.length)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
    with pytest.raises(CheckpointError, match="accepted: files in its own folder"):
        read_checkpoint(tmp_path)
    tensor.size = torch.Size([2**40, 3])  # a few bytes that ask for 13 TB
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"net.weight": tensor}, storage_data={})))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_description_that_would_run_code(distributed, tmp_path, monkeypatch):
    """PyTorch's own reader runs it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(distributed, "copy")
    Path("copy/.metadata").write_bytes(pickle.dumps({"state_dict_metadata": Attack()}))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: it asks for .*mkdir, which could run code"):
        read_checkpoint("copy")
    assert not Path("ran").exists()


def test_shards(tmp_path, weights):
    names = sorted(weights)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        save_file({name: weights[name].contiguous() for name in half}, tmp_path / file)
    places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (tmp_path, index):
        assert_loads(read_checkpoint(path), weights, "model", path=path)
    with pytest.raises(CheckpointError, match=r"is one of 2 shards; accepted: their index, .*index\.json"):
        read_checkpoint(tmp_path / files[0])
    index.write_text(json.dumps({"weight_map": {**places, "surplus": files[0]}}))
    with pytest.raises(DamagedCheckpointError, match=r"00001-of-00002\.safetensors: has no surplus, which"):
        read_checkpoint(index)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="accepted: files in its own folder"):
        read_checkpoint(index)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match="is no index of shards"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    ("file", "named", "message"),
    [
        (
            "best.pth",
            "",
            "folder without a checkpoint that can be read; accepted: one of its files, such as .*best.pth",
        ),
        ("zero_to_fp32.py", "", "DeepSpeed's: its zero_to_fp32.py writes"),
        ("a.txt", "", "folder without a checkpoint that can be read; accepted: a file"),
        ("a.npz", "a.npz", "is a file of NumPy; accepted: a file"),
        ("__0_0.distcp", "__0_0.distcp", "is a part of a checkpoint; accepted: its folder"),
    ],
)
def test_what_cannot_be_read(tmp_path, file, named, message):
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / named)


def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "a.pt")


def test_torch_hub(tmp_path, weights, average, caplog):
    path = timm_file(tmp_path / "a.pth", weights, average)
    sizes = {key: SMALL[key] for key in ("embed_dim", "depths")}
    with caplog.at_level("INFO", logger="hubconf"):
        model = hubconf.strip_mlp_pico(checkpoint=path, ema=False, **sizes)
    assert f"{path}: state_dict (also there: state_dict_ema)" in caplog.text
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
