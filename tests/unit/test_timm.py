"""What timm's users expect of its models, and its own tests check of them."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import create_feature_extractor as timm_extractor
from timm.models._manipulate import group_with_matcher
from timm.utils import reparameterize_model
from torchvision.models.feature_extraction import create_feature_extractor

import models  # noqa: F401  (registers them)
from engine.exported import FORMATS, quiet
from runtime.checkpoint import save_checkpoint
from tests.helpers import ROOT, environment

STRIP_MLP = ["strip_mlp_tiny_light", "strip_mlp_tiny", "strip_mlp_small", "strip_mlp_base", "strip_mlp_pico"]
SPARSE_MLP = ["sparse_mlp_tiny", "sparse_mlp_small", "sparse_mlp_base"]
CYCLE_MLP = [f"cycle_mlp_b{size}" for size in range(1, 6)]
VIP = ["vip_s14", "vip_s7", "vip_m7"]
HIRE_MLP = ["hire_mlp_tiny", "hire_mlp_small", "hire_mlp_base", "hire_mlp_large"]
WAVE_MLP = ["wave_mlp_t", "wave_mlp_t_dw", "wave_mlp_s", "wave_mlp_m", "wave_mlp_b"]
ALL = STRIP_MLP + SPARSE_MLP + CYCLE_MLP + VIP + HIRE_MLP + WAVE_MLP
SMALL = ["strip_mlp_tiny", "sparse_mlp_tiny", "cycle_mlp_b1", "vip_s7", "hire_mlp_tiny", "wave_mlp_t_dw"]
FIXED_SIZE = ["strip_mlp_tiny", "sparse_mlp_tiny", "vip_s7"]
SOME = list(dict.fromkeys(STRIP_MLP + SPARSE_MLP + SMALL))  # the others differ in widths and depths
# Of stages with 8, 16, 32 and 64 channels at strides 4, 8, 16 and 32.
BRANCHES = {"widths": (8, 16, 32, 64)}
VIP_BRANCHES = {**BRANCHES, "img_size": 64, "patch_size": 4, "strides": (2, 2, 2), "segments": (4, 4, 4, 4)}
SMALLER = {"embed_dim": 8, "img_size": 64}


def smaller(name: str) -> dict:
    """The arguments of a small model of the same family."""
    family = {"cycle": BRANCHES, "vip": VIP_BRANCHES, "hire": BRANCHES, "wave": BRANCHES}
    return {**family.get(name.partition("_")[0], SMALLER), "depths": (1, 2, 1, 1), "num_classes": 5}


def small(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**smaller(name), **kwargs})


def images(count: int = 2, chans: int = 3, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.randn(count, chans, *size, generator=torch.Generator().manual_seed(1))


def test_all_are_registered():
    families = ("strip_mlp_*", "sparse_mlp_*", "cycle_mlp_*", "vip_*", "hire_mlp_*", "wave_mlp_*")
    assert set(ALL) == {name for family in families for name in timm.list_models(family)}
    for name in ALL:
        assert timm.get_pretrained_cfg(name).architecture == name


@pytest.mark.parametrize("name", SMALL)
def test_device_and_dtype(name):
    """timm's models are made where and in what they are asked for, and a new classifier comes there too."""
    model = small(name, device="meta", dtype=torch.bfloat16)
    model.reset_classifier(0)  # from here on nothing in the head tells where it was
    model.reset_classifier(7)
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert {(value.device.type, value.dtype) for value in floats} == {("meta", torch.bfloat16)}
    assert model.get_classifier().out_features == 7
    assert small(name, in_chans=4, device="meta").in_chans == 4
    with pytest.raises(TypeError, match="not_an_argument"):
        small(name, not_an_argument=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_default_cfg(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        x = torch.empty(1, *model.default_cfg["input_size"])
    cfg, state = model.default_cfg, model.state_dict()
    # What it is at the size that the config says.
    assert model.img_size == (cfg["input_size"][1:] if cfg["fixed_input_size"] else None)
    assert model(x).shape == (1, model.num_classes)
    assert model.forward_features(x).shape == (1, model.num_features, *cfg["pool_size"])
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    assert model.get_classifier().out_features == model.num_classes
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, model.head_hidden_size)
    # Without classifier, then without pooling too.
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, *cfg["pool_size"])
    with torch.device("meta"):
        model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("chans", [1, 3, 6])
def test_in_chans_and_no_classes(name, chans):
    model = small(name, in_chans=chans, num_classes=0).eval()
    features = model(images(chans=chans))
    assert features.shape == (2, model.num_features)
    torch.testing.assert_close(features, model.forward_features(images(chans=chans)).mean(dim=(2, 3)))


def stage_outputs(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the stages really return, by hooks."""
    outputs: list[torch.Tensor] = []
    hooks = [stage.register_forward_hook(lambda m, args, output: outputs.append(output)) for stage in model.stages]
    model(x)
    for hook in hooks:
        hook.remove()
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (3,), (1,), (0,), (0, 2), (-1,), 2])
def test_features_only(name, indices):
    """The maps of the stages with the same weights, from a model that has nothing else."""
    full = small(name).eval()
    features = small(name, features_only=True, out_indices=indices).eval()
    missing, unknown = features.model.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    wanted = range(2, 4) if indices == 2 else [index % 4 for index in indices]
    expected = stage_outputs(full, images())
    outputs = features(images())
    assert len(outputs) == len(wanted)
    for output, stage in zip(outputs, wanted, strict=True):
        assert output.shape == (2, 8 * 2**stage, 64 // (4 * 2**stage), 64 // (4 * 2**stage))
        torch.testing.assert_close(output, expected[stage])
    assert features.feature_info.channels() == [output.shape[1] for output in outputs]
    assert features.feature_info.reduction() == [4 * 2**stage for stage in wanted]
    # Nothing of later stages is left, which would have no gradient.
    assert all(f"stages.{stage}." not in entry for entry in features.state_dict() for stage in range(wanted[-1] + 1, 4))
    assert {"norm.weight", "head.fc.weight"} <= set(unknown)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("last", range(4))
def test_pruned_model_has_no_idle_parameters(name, last):
    features = small(name, features_only=True, out_indices=(last,))
    features(images(4))[0].square().mean().backward()
    assert [entry for entry, p in features.named_parameters() if p.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_forward_intermediates(name):
    model, x = small(name).eval(), images()
    expected, final = stage_outputs(model, x), model.forward_features(x)
    output, maps = model.forward_intermediates(x)
    torch.testing.assert_close([*maps, output], [*expected, final])
    output, maps = model.forward_intermediates(x, indices=[1, 3], norm=True)
    torch.testing.assert_close([*maps, output], [expected[1], final, final])
    maps = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    torch.testing.assert_close(maps, [expected[1], expected[3]])
    output, maps = model.forward_intermediates(x, indices=[0, 1], norm=True, stop_early=True)
    torch.testing.assert_close([*maps, output], [expected[0], expected[1], expected[1]])
    output, maps = model.forward_intermediates(x, indices=[0], stop_early=False)
    torch.testing.assert_close([*maps, output], [expected[0], final])
    with pytest.raises(ValueError, match="output_fmt is 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(name, coarse):
    """Every parameter is in a group by name, and the groups are in the order of the forward pass."""
    with torch.device("meta"):
        model = timm.create_model(name)
    matcher, names = model.group_matcher(coarse), dict(model.named_parameters())
    # timm puts what no expression matches into a last group of its own.
    sentinel = {**names, "nothing like it": None}
    groups = list(group_with_matcher(sentinel.items(), matcher).values())
    assert groups[-1] == ["nothing like it"]
    depth = {entry: number for number, group in enumerate(groups) for entry in group}
    order: list[str] = []
    for module_name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda m, args, n=module_name: order.append(n))
    with torch.device("meta"):
        model.eval()(torch.empty(1, *model.default_cfg["input_size"]))
    # Shortcuts run ahead of the stages that they lead around.
    run = [depth[next(e for e in names if e.startswith(f"{n}."))] for n in order if not n.startswith("shortcut")]
    assert run == sorted(run) and set(depth) == set(sentinel)
    blocks = sum(len(stage) for stage in model.stages)
    assert len(groups) - 1 == (6 if coarse else blocks + 2)
    for shortcut in (n for n in names if n.startswith("shortcut")):
        assert depth[shortcut] == depth[f"merging.{int(shortcut[len('shortcut_2to')]) - 2}.weight"]


@pytest.mark.parametrize("name", SMALL[1:])
def test_gradient_checkpointing(name):
    """Strip-MLP has a test of its own."""
    gradients = []
    for enable in (False, True):
        model = small(name, drop_path_rate=0.0)
        model.set_grad_checkpointing(enable)
        model(images(4)).square().mean().backward()
        gradients.append({entry: p.grad for entry, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_fx_forward(name, monkeypatch):
    """torch.fx.symbolic_trace, which timm's tests check by way of feature extractors, reparameterized too."""
    model, x = small(name).eval(), images()
    for one in (model, reparameterize_model(model)):
        traced = torch.fx.symbolic_trace(one)
        torch.testing.assert_close(traced(x), one(x), rtol=1e-4, atol=1e-6)
        # The forms are chosen when it runs, not when it is traced.
        with monkeypatch.context() as patch:
            patch.setattr("models.ops.on_gpu", lambda x: True)
            torch.testing.assert_close(traced(x), one(x), rtol=1e-4, atol=1e-6)
    if model.img_size is None:
        torch.testing.assert_close(traced(images(size=(48, 80))), one(images(size=(48, 80))))
        return
    with pytest.raises(ValueError, match=r"input of \(32, 64\) pixels"):
        traced(images(size=(32, 64)))


@pytest.mark.parametrize("name", SOME)
def test_fx_backward(name):
    """Gradients of all parameters, those of the model itself; stochastic depth of a model in training included."""
    gradients = []
    for trace in (lambda model: model, torch.fx.symbolic_trace):
        traced = trace(small(name, drop_path_rate=0.1).train())
        torch.manual_seed(2)
        traced(images(4)).square().mean().backward()
        gradients.append({entry: p.grad for entry, p in traced.named_parameters()})
    assert gradients[1].keys() == gradients[0].keys() and None not in gradients[1].values()
    total = sum(gradient.norm() ** 2 for gradient in gradients[0].values()).sqrt().item()
    for entry, gradient in gradients[0].items():  # layers in a row are computed together where there is no trace
        torch.testing.assert_close(gradients[1][entry], gradient, rtol=1e-4, atol=1e-6 * total)


@pytest.mark.parametrize("extractor", [create_feature_extractor, timm_extractor], ids=["torchvision", "timm"])
@pytest.mark.parametrize("name", SMALL)
def test_feature_extractor(name, extractor):
    """Of both libraries, which trace with torch.fx, in both modes."""
    model = small(name)
    features = extractor(model, {"stages.1": "map", "head": "logits"})
    torch.testing.assert_close(features.train()(images(4))["logits"].shape, (4, 5))
    features.eval()
    with torch.no_grad():
        outputs = features(images())
        torch.testing.assert_close(outputs["map"], stage_outputs(model.eval(), images())[1])
        torch.testing.assert_close(outputs["logits"], model(images()))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_trace(name):
    """TorchScript by tracing, for any number of images. Not by scripting: what GPUs recompute in the backward pass are
    functions of Python, and PyTorch has deprecated TorchScript in favour of torch.export."""
    model = small(name).eval()
    traced = torch.jit.trace(model, images(2))
    torch.testing.assert_close(traced(images(5)), model(images(5)))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_export(name):
    """torch.export, for any number of images; reparameterized as timm does it, too."""
    model = small(name, depths=(1, 1, 1, 1)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    for exported in (model, *([reparameterize_model(model)] if hasattr(model, "reparameterize") else [])):
        program = torch.export.export(exported, (images(2),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(images(5)), model(images(5)), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cycle_mlp_b1", "vip_s7", "hire_mlp_tiny", "wave_mlp_t_dw"])
def test_onnx(name, tmp_path):
    """Strip-MLP's is in tests/tools/test_export.py."""
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    model, path = small(name, depths=(1, 1, 1, 1)).eval(), tmp_path / "model.onnx"
    with quiet():
        FORMATS["onnx"].write(model, images(), path, {})
    with torch.no_grad():
        torch.testing.assert_close(FORMATS["onnx"].load(path)(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=SMALL)
def trained(request, tmp_path_factory):
    """A model, and a checkpoint as main.py writes it, of what timm's loader looks at."""
    model = small(request.param).eval()
    path = tmp_path_factory.mktemp("timm") / "best.pth"
    save_checkpoint({"format": 2, "model": model.state_dict(), "epoch": 3, "config": {"TAG": "default"}}, path)
    return request.param, model, path


@torch.no_grad()
def test_checkpoint_path(trained):
    name, model, path = trained
    loaded = small(name, checkpoint_path=str(path)).eval()
    torch.testing.assert_close(loaded(images()), model(images()))


@torch.no_grad()
def test_pretrained_file_of_another_size(trained):
    """timm's way to weights of one's own as `pretrained`: through checkpoint_filter_fn, so at any size, with other
    classes and channels."""
    name, model, path = trained
    overlay = {"file": str(path), "num_classes": 5}
    other_size = {"img_size": (64, 96)} if name in FIXED_SIZE else {}
    loaded = small(name, **other_size, pretrained=True, pretrained_cfg_overlay=overlay)
    model_at_that_size = small(name)
    model_at_that_size.load_state_dict(model.state_dict())
    model_at_that_size.set_input_size((64, 96))
    torch.testing.assert_close(loaded.state_dict(), model_at_that_size.state_dict())
    other = small(name, num_classes=3, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert other(images(chans=1)).shape == (2, 3)
    torch.testing.assert_close(other.stages.state_dict(), model.stages.state_dict())
    embedding = f"{model.default_cfg['first_conv']}.weight"
    weight = model.get_parameter(embedding).sum(dim=1, keepdim=True)
    torch.testing.assert_close(other.get_parameter(embedding), weight)


HUB = """
import functools, sys, torch
folder, checkpoint = sys.argv[1:]
load = functools.partial(torch.hub.load, folder, source="local")
model = load("strip_mlp_pico", checkpoint=checkpoint).eval()
assert model.num_classes == 4, model.num_classes
larger = load("strip_mlp_pico", checkpoint=checkpoint, img_size=64, num_classes=2)
assert larger(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
assert load("sparse_mlp_tiny", img_size=32).num_classes == 1000
x = torch.ones(1, 3, 32, 32)
features = load("strip_mlp_pico", checkpoint=checkpoint, num_classes=0).eval()(x)
torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
pyramid = load("strip_mlp_pico", checkpoint=checkpoint, features_only=True, in_chans=1)
torch.testing.assert_close(pyramid.model.stages[3].state_dict(), model.stages[3].state_dict())
print(model(x).tolist())
try:
    load("strip_mlp_tiny", checkpoint=checkpoint)
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_torch_hub(tmp_path):
    """As a user somewhere else calls it."""
    model = timm.create_model("strip_mlp_pico", num_classes=4)
    save_checkpoint({"model": model.state_dict()}, tmp_path / "best.pth")
    result = subprocess.run(
        [sys.executable, "-c", HUB, str(ROOT), "best.pth"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    logits, message = result.stdout.splitlines()
    with torch.no_grad():
        expected = model.eval()(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(torch.tensor(eval(logits)), expected)
    assert "best.pth: does not fit the model" in message
