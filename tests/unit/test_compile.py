from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401  (registers the variants)
from models.compile import allow_graphs, compile_model, repeated_blocks


@pytest.mark.parametrize(
    ("name", "block", "count"),
    [
        ("strip_mlp_pico", "StripMLPBlock", 5),
        ("swin_tiny_patch4_window7_224", "SwinTransformerBlock", 12),
        ("convnext_tiny", "ConvNeXtBlock", 18),
        ("resnet50", "Bottleneck", 16),  # of which the first of a stage is unlike the others
        ("vip_s7", "BranchBlock", 18),
    ],
)
def test_repeated_blocks(name, block, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [type(module).__name__ for module in repeated_blocks(model)] == [block] * count


def test_unit():
    """Blocks alone are compiled, or the model; a model without repeated blocks as a whole."""

    def compiled(model: nn.Module, unit: str) -> list[str]:
        compile_model(model, unit, backend="eager")
        return [name for name, module in model.named_modules() if module._compiled_call_impl is not None]

    def block(dim: int) -> nn.Module:
        return nn.Sequential(nn.ModuleDict({"act": nn.Linear(dim, dim)}))[0]

    def model(*dims: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Sequential(*(block(dim) for dim in dims)))

    assert compiled(model(4, 4, 8), "blocks") == ["1.0", "1.1", "1.2"]
    assert compiled(model(4, 4, 8), "model") == [""]
    assert compiled(model(4, 8), "blocks") == [""]


@pytest.mark.parametrize("name", ["recompile_limit", "cache_size_limit"])
def test_graphs_of_a_function(name, monkeypatch):
    """Under the name that this version of PyTorch has for their number."""
    config = SimpleNamespace(**{name: 8})
    monkeypatch.setattr(torch._dynamo, "config", config)
    allow_graphs(20)
    allow_graphs(10)
    assert vars(config) == {name: 20}
