"""Counts of parameters, multiply-adds, activations and memory: against PyTorch's counter, against what a real forward
pass keeps, and against the paper."""

import csv
import re
from pathlib import Path

import complexity
import pytest
import timm
import torch
from complexity import Complexity, Count, model_complexity
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  (registers the variants with timm)
from config import load_config
from tests.helpers import ROOT, python

pytestmark = pytest.mark.slow

PEERS = sorted((ROOT / "configs/peers").glob("*.yaml"))
LARGER = ("swin_small", "swin_base", "resnet101", "sparse_mlp_small", "sparse_mlp_base")  # of the same layers
LARGER += ("cycle_mlp_b2", "cycle_mlp_b3", "cycle_mlp_b4", "cycle_mlp_b5", "vip_s14", "vip_m7")
LARGER += ("hire_mlp_small", "hire_mlp_base", "hire_mlp_large")
LARGER += ("wave_mlp_t", "wave_mlp_s", "wave_mlp_m", "wave_mlp_b")


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"),
    [
        ("tiny_light", 18_243_920, 2_518_593_280),
        ("tiny", 24_903_920, 3_648_236_800),
        ("small", 42_568_600, 6_803_134_464),
        ("base", 57_216_480, 9_184_947_968),
    ],
)
def test_variants(variant, parameters, macs):
    config, _ = load_config(ROOT / f"configs/smlp_{variant}_alpha3_patch4_224_imagenet1k.yaml")
    count = model_complexity(config).of()
    assert (count.parameters, count.macs) == (parameters, macs)


@pytest.mark.parametrize("path", [p for p in PEERS if p.stem not in LARGER], ids=lambda path: path.stem)
def test_peers(path):
    """Of every peer: totals as PyTorch counts them, and the rows without the blocks add up to them."""
    config, notes = load_config(path)
    assert notes == []
    counted = model_complexity(config)
    total = counted.of()
    model = counted.model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert total.macs == counter.get_total_flops() // 2 > 1e9
    assert total.parameters == sum(p.numel() for p in model.parameters())

    rows = list(counted.rows())
    assert rows[-1][:2] == ("model", "total")
    stages = {name for kind, name, _ in rows if kind == "stage"}
    parts = Count()
    for kind, name, count in rows[:-1]:
        if kind != "block" or not any(name.startswith(f"{stage}.") for stage in stages):
            parts += count
    assert parts == total
    for stage in stages:
        blocks = Count()
        for kind, name, count in rows:
            if kind == "block" and name.startswith(f"{stage}."):
                blocks += count
        assert blocks.macs == counted.of(stage).macs, stage


@pytest.mark.parametrize(
    ("name", "stages", "blocks", "other"),
    [
        ("strip_mlp_tiny_light", ["stages.0", "stages.3"], ["stages.0.1", "stages.2.5"], ["patch_embed", "merging.2"]),
        ("resnet18", ["layer1", "layer4"], ["layer1.0", "layer4.1"], ["conv1", "bn1", "fc"]),
        ("convnext_atto", ["stages.0", "stages.3"], ["stages.1.downsample", "stages.1.blocks.1"], ["stem"]),
        ("regnety_002", ["s1", "s4"], ["s1.b1", "s4.b7"], ["stem"]),
        ("efficientnet_b0", ["blocks.0", "blocks.3"], ["blocks.1.1", "blocks.3.2"], ["conv_stem", "bn2"]),
        ("vit_tiny_patch16_224", [], ["blocks.0", "blocks.11"], ["(itself)", "patch_embed"]),
        ("mixer_s32_224", [], ["blocks.0", "blocks.7"], ["stem", "norm"]),
    ],
)
def test_stages_and_blocks(name, stages, blocks, other):
    counted = Complexity(timm.create_model(name), (224, 224))
    found = {(kind if kind != "own" else "", name): count for kind, name, count in counted.rows()}
    assert {("stage", stage) for stage in stages} <= found.keys()
    assert {("block", block) for block in blocks} <= found.keys()
    assert {("", part) for part in other} <= found.keys()
    assert [bool(stages)] == list({any(kind == "stage" for kind, _ in found)})
    inside = tuple(f"{stage}." for kind, stage in found if kind == "stage")
    parts = Count()
    for (kind, path), count in found.items():
        if kind != "model" and not (kind == "block" and path.startswith(inside)):
            parts += count
    assert parts == found["model", "total"] == counted.of()


def test_by_hand():
    """A network of two layers whose counts can be told by hand."""

    class Net(nn.Module):
        feature_info = ({"module": "stages.0"},)

        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()))])
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.stages[0](x).mean(dim=(2, 3)))

    counted = Complexity(Net(), (8, 8))
    conv = counted.of("stages.0.0.0")
    assert (conv.parameters, conv.macs, conv.activations) == (3 * 4 * 9 + 4, 64 * 3 * 4 * 9, 64 * 4)
    assert conv.weight_bytes == 4 * conv.parameters
    assert counted.of("stages.0.0.1") == Count(saved_bytes=4 * 64 * 4)  # ReLU keeps its output
    head = counted.of("head")
    assert (head.parameters, head.macs, head.activations, head.saved_bytes) == (25, 20, 5, 4 * 4)
    rows = [(kind, name) for kind, name, _ in counted.rows()]
    expected = [("stage", "stages.0"), ("block", "stages.0.0"), ("", "head")]
    assert rows == [*expected, ("model", "total")]


@pytest.mark.parametrize("name", ["strip_mlp_pico", "resnet18"])
def test_memory_is_what_a_real_pass_keeps(name):
    model = timm.create_model(name).train()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    images = torch.randn(2, 3, 32, 32)
    known.add(images.untyped_storage().data_ptr())
    kept = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        output = model(images)  # holds the graph, and so what it keeps
    counted = Complexity(timm.create_model(name), (32, 32)).of().saved_bytes
    assert output.requires_grad
    # Strips on small maps are counted as convolutions and computed as products, which keep copies of their input.
    assert counted == pytest.approx(sum(kept.values()) / 2, rel=0.06 if name == "strip_mlp_pico" else 0.01)


def test_the_papers_table_1():
    text = complexity.table1()
    published = re.findall(r"\| ([\d.]+(?:x| [k%])) +\| ([^|]+)\|", text)
    assert [figure for figure, _ in published] == ["0.10 k", "62.7x", "0.52 %", "2.01 %"]
    for figure, counted in published:
        assert figure in counted, text
    assert "64.0x (6,272 / 98)" in text  # what 62.7x is without rounding first
    assert "| 16,464" in text


def test_command(tmp_path):
    config = "configs/strip_mlp_pico_digits.yaml"
    result = python(
        "tools/complexity.py", "--cfg", config, "--opts", "TRAIN.USE_CHECKPOINT", "True", "--csv", tmp_path / "t.csv"
    )
    assert "**stages.0**" in result.stdout
    assert re.search(r"\*\*total\*\* +\| 707,608 +\| 2,296,992 ", result.stdout)
    with open(tmp_path / "t.csv") as file:
        rows = {row["module"]: row for row in csv.DictReader(file)}
    assert (rows["total"]["parameters"], rows["total"]["macs"]) == ("707608", "2296992")
    assert int(rows["stages.0"]["saved_bytes"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "missing.yaml"], "missing.yaml: cannot be read"),
        (["--table1", "--csv", "t.csv"], "--opts and --csv go with --cfg"),
        (["--cfg", "configs/strip_mlp_pico_digits.yaml", "--opts", "DATA.IMG_SIZE", "40"], "img_size=40"),
        (["--cfg", "configs/strip_mlp_pico_digits.yaml", "--csv", "missing/folder/t.csv"], "missing/folder/t.csv"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    from utils import run_entry_point

    monkeypatch.setattr("sys.argv", ["complexity.py", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        run_entry_point(complexity.main)
    assert ended.value.code in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_config_without_effect_is_said(monkeypatch, capsys):
    path = Path("configs/peers/resnet50.yaml")
    monkeypatch.setattr("sys.argv", ["complexity.py", "--cfg", str(path), "--opts", "MODEL.STRIP_MLP.STRIP_WIDTH", "5"])
    monkeypatch.chdir(ROOT)
    complexity.main()
    said = capsys.readouterr()
    assert "MODEL.STRIP_MLP.STRIP_WIDTH is 5, which changes nothing, because MODEL.TYPE is timm" in said.err
    assert "25,557,032" in said.out
