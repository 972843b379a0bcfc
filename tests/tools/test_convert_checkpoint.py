"""tools/convert_checkpoint.py, as a user runs it."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import models
from config import get_default_config, leaves
from models.released import checkpoint_filter_fn, to_released_names
from runtime.checkpoint import find_weights, read_checkpoint, save_checkpoint
from tests.helpers import ROOT, python
from tests.reference import fill

pytestmark = pytest.mark.slow

TOOL = "tools/convert_checkpoint.py"
DATA = {
    name: json.loads((ROOT / f"tests/reference/{name}.json").read_text())
    for name in ("strip_mlp_tiny_light_64", "sparse_mlp_tiny_64")
}


def pico_checkpoint(path: Path, **content) -> dict[str, torch.Tensor]:
    """A run's checkpoint of a small model; its weights."""
    config = get_default_config()
    config.DATA.IMG_SIZE = 32
    config.MODEL.NUM_CLASSES = 3
    config.MODEL.STRIP_MLP.EMBED_DIM = 8
    config.MODEL.STRIP_MLP.LAYERS = [1, 1, 1, 1]
    config.MODEL.STRIP_MLP.PATCH_CHANNELS = 2
    torch.manual_seed(0)
    model = models.build_model(config)
    save_checkpoint(
        {
            "format": 2,
            "model": model.state_dict(),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(100_000)}}},
            "config": leaves(config),
            "classes": ["ape", "bee", "cow"],
            **content,
        },
        path,
    )
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_stripped(tmp_path, suffix):
    """What is left is the weights, the config and the classes, and it converts again to the same bytes."""
    weights = pico_checkpoint(tmp_path / "best.pth")
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))
    result = python(TOOL, tmp_path / "best.pth", first)
    content = read_checkpoint(first)
    assert set(content) == {"model", "config", "classes"} and content["classes"] == ["ape", "bee", "cow"]
    assert content["config"]["MODEL.STRIP_MLP.EMBED_DIM"] == 8
    torch.testing.assert_close(find_weights(content, first).weights, weights, rtol=0, atol=0)
    assert first.stat().st_size < (tmp_path / "best.pth").stat().st_size - 300_000
    checksum = hashlib.sha256(first.read_bytes()).hexdigest()
    assert result.stdout.splitlines()[-1] == f"{checksum}  {first}"
    assert "3 classes" in result.stdout and "32 x 32" in result.stdout
    python(TOOL, first, second)
    assert find_weights(read_checkpoint(second), second).weights.keys() == weights.keys()
    if suffix == ".safetensors":
        torch.testing.assert_close(load_file(second), weights, rtol=0, atol=0)


def released(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(fill.weight(key, tuple(shape))) for key, shape in DATA[name]["state_dict"]}


@pytest.mark.parametrize("name", ["strip_mlp_tiny_light_64", "sparse_mlp_tiny_64"])
def test_released_names_both_ways(name):
    """Every entry of the released files, and nothing else, comes back as it was."""
    data, weights = DATA[name], released(name)
    model = timm.create_model(name.removesuffix("_64"), img_size=64, num_classes=data["num_classes"])
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    back = to_released_names(model)
    assert {key: list(value.shape) for key, value in back.items()} == dict(data["state_dict"])
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_released_to_ours_and_back(tmp_path):
    weights = released("strip_mlp_tiny_light_64")
    torch.save({"model": weights, "epoch": 299}, tmp_path / "released.pth")
    cfg = ROOT / "configs/smlp_tiny_light_alpha3_patch4_224_imagenet1k.yaml"
    python(TOOL, tmp_path / "released.pth", tmp_path / "ours.safetensors", "--cfg", cfg, "--opts", "DATA.IMG_SIZE", 64)
    ours = read_checkpoint(tmp_path / "ours.safetensors")
    assert "classes" not in ours  # the file does not name them
    python(TOOL, tmp_path / "ours.safetensors", tmp_path / "back.pth", "--to", "released")
    back = read_checkpoint(tmp_path / "back.pth")
    assert set(back) == {"model"}
    torch.testing.assert_close(back["model"], weights, rtol=0, atol=0)


def test_names_are_not_made_up(tmp_path):
    """What is not known is not written: training would take it for the names of other classes."""
    pico_checkpoint(tmp_path / "best.pth", classes=None)
    python(TOOL, tmp_path / "best.pth", tmp_path / "out.pth")
    assert "classes" not in read_checkpoint(tmp_path / "out.pth")
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    python(TOOL, tmp_path / "best.pth", tmp_path / "named.pth", "--classes", tmp_path / "names.txt")
    assert read_checkpoint(tmp_path / "named.pth")["classes"] == ["x", "y", "z"]


@pytest.mark.parametrize("opts", [("PATCH_CHANNELS", 2), ("CGSMM_STRUCTURE", "parallel")])
def test_ablations_are_no_released_models(tmp_path, opts):
    """The released code would take the weights for those of another function."""
    pico_checkpoint(tmp_path / "best.pth")  # PATCH_CHANNELS 2, where the released rule says 4
    rest = ("--opts", f"MODEL.STRIP_MLP.{opts[0]}", opts[1])
    result = python(TOOL, tmp_path / "best.pth", tmp_path / "out.pth", "--to", "released", *rest, ok=False)
    assert "no released model with MODEL.STRIP_MLP" in result.stderr and f"{opts[0]} {opts[1]}" in result.stderr
    assert not (tmp_path / "out.pth").exists()


def test_nothing_is_overwritten(tmp_path):
    pico_checkpoint(tmp_path / "best.pth")
    (tmp_path / "out.pth").write_text("mine")
    result = python(TOOL, tmp_path / "best.pth", tmp_path / "out.pth", ok=False)
    assert result.returncode == 1 and "is there already" in result.stderr
    assert (tmp_path / "out.pth").read_text() == "mine"
    python(TOOL, tmp_path / "best.pth", tmp_path / "out.pth", "--force")
    assert read_checkpoint(tmp_path / "out.pth")["classes"] == ["ape", "bee", "cow"]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["best.pth", "out.bin"], 2, "accepted: a name that ends in .pth or .safetensors"),
        (["gone.pth", "out.pth"], 1, "no such checkpoint file"),
        (["bare.pth", "out.pth"], 1, "does not say which model its weights are for"),
        (["best.pth", "nowhere/out.pth"], 1, "cannot be written"),
        (["best.pth", "nowhere/out.safetensors"], 1, "cannot be written"),
        (["text.safetensors", "out.pth"], 1, "text.safetensors: not a checkpoint, or damaged"),
    ],
)
def test_errors(tmp_path, arguments, status, message):
    weights = pico_checkpoint(tmp_path / "best.pth")
    save_checkpoint(weights, tmp_path / "bare.pth")
    (tmp_path / "text.safetensors").write_text("no safetensors at all")
    result = python(ROOT / TOOL, *arguments, cwd=tmp_path, ok=False)
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.pth").exists()
