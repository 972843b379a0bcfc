"""Models made on the meta device and then loaded, as transformers, FSDP and loaders of large models do: a checkpoint
has all that they need."""

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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


@torch.no_grad()
def test_transformers_classifier_after_save_and_load(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="strip_mlp_pico", num_labels=10)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    x = image("strip_mlp_pico")
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)


@torch.no_grad()
def test_transformers_detector_after_save_and_load(tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(backbone="strip_mlp_pico", out_indices=[3])
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_queries=4, num_labels=3, **sizes
    )
    model = transformers.DetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    x = image("strip_mlp_pico")
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(loaded(x)[name], model(x)[name], rtol=0, atol=0)


@torch.no_grad()
def test_fsdp2():
    model = timm.create_model("strip_mlp_pico").eval()
    with torch.device("meta"):
        sharded = timm.create_model("strip_mlp_pico").eval()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for stage in sharded.stages:
            fully_shard(stage, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device="cpu")
        set_model_state_dict(sharded, model.state_dict(), options=StateDictOptions(full_state_dict=True))
        x = image("strip_mlp_pico")
        torch.testing.assert_close(sharded(x), model(x), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()
