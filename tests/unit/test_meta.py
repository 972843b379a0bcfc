"""Models made on the meta device and then loaded, as transformers, FSDP and loaders of large models do: a checkpoint
has all that they need."""

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401  (registers ours with timm)
from models.small_peers import default_cfgs

# timm's Swin has indices and masks of its own that its checkpoints do not hold.
SMALL = [name for name in (key.partition(".")[0] for key in default_cfgs) if name != "small_swin"]
NAMES = ["strip_mlp_pico", "sparse_mlp_tiny", *SMALL]


def image(name):
    torch.manual_seed(1)
    return torch.randn(2, 3, *[224 if name == "sparse_mlp_tiny" else 32] * 2)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_made_on_the_meta_device_and_loaded(name, how):
    model = timm.create_model(name).eval()
    with torch.device("meta"):
        other = timm.create_model(name).eval()
    if how == "to_empty":
        other.to_empty(device="cpu")
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(-1)  # whatever was in the memory
    assert not any(other.load_state_dict(model.state_dict(), assign=how == "assign"))
    x = image(name)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_kept_outside_the_checkpoint(name):
    model = timm.create_model(name)
    assert {key for key, _ in model.named_buffers()} <= set(model.state_dict())
    plain = [
        (path, key)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
    ]
    assert not plain
