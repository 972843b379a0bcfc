"""The code of docs/segmentation.md, with a small model and small images."""

import re

import pytest
import timm
import torch

import models  # noqa: F401  (registers the variants)
from tests.helpers import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/segmentation.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["smp", "torchvision", "checkpoint"])
def test_the_code_of_the_page(block, tmp_path, monkeypatch):
    if "segmentation_models_pytorch" in block:
        pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    trained = timm.create_model("strip_mlp_pico", num_classes=5, img_size=32)
    torch.save({"model": trained.state_dict()}, tmp_path / "best.pth")
    monkeypatch.chdir(tmp_path)
    code = block.replace("strip_mlp_tiny", "strip_mlp_pico").replace("(256, 320)", "(64, 96)")
    assert code != block
    names: dict = {}
    exec(code, names)
    if "path" in names:
        body = names["network"].encoder.model.model
        trained.set_input_size((64, 96))
        expected = trained.state_dict()
        assert len(body.state_dict()) > 100
        assert all(torch.allclose(value, expected[name]) for name, value in body.state_dict().items())
    else:
        assert names["logits"].shape == (2, 21, 64, 96) and names["loss"].isfinite()
        gradients = {name: p.grad for name, p in names["network"].named_parameters()}
        assert not [name for name, gradient in gradients.items() if gradient is None]
