"""CycleMLP and the other peers of three branches against the reference numbers of the released code, and their loading
of released checkpoints."""

import itertools
import json
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from complexity import Complexity
from torchvision.ops import deform_conv2d

from models.cycle_mlp import cycle
from models.hire_mlp import from_regions, to_regions
from models.released import checkpoint_filter_fn, to_our_names, to_released_names
from models.resample import interpolation
from models.vision_permutator import SegmentLinear
from runtime.checkpoint import CheckpointError, load_weights
from tests.helpers import ROOT
from tests.reference import fill

REFERENCES = ["cycle_mlp_b1_64", "vip_s14_224", "hire_mlp_tiny_96", "wave_mlp_t_64"]
# Parameters with 1000 classes, and multiply-adds at 224 x 224.
SIZES = {
    "cycle_mlp_b1": (15_155_400, None),
    "cycle_mlp_b2": (26_802_504, None),
    "cycle_mlp_b3": (38_385_720, None),
    "vip_s14": (29_892_904, 6_855_613_440),
    "vip_s7": (25_114_984, 6_901_767_168),
    "hire_mlp_tiny": (18_041_672, 2_144_002_048),
    "hire_mlp_small": (33_113_848, 4_231_090_176),
    "wave_mlp_t": (17_193_160, 2_461_515_776),
    "wave_mlp_t_dw": (15_286_472, 2_163_068_928),
    "wave_mlp_s": (30_708_040, 4_522_033_152),
    "wave_mlp_m": (44_056_632, 7_872_221_184),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def reference(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The numbers, and the released checkpoint that they were made with."""
    data = json.loads((ROOT / f"tests/reference/{name}.json").read_text())
    return data, {entry: torch.as_tensor(fill.weight(entry, tuple(shape))) for entry, shape in data["state_dict"]}


def created(data: dict, **kwargs) -> torch.nn.Module:
    if data["variant"].startswith("vip"):
        kwargs["img_size"] = data["img_size"]
    return timm.create_model(data["variant"], num_classes=data["num_classes"], **kwargs)


@pytest.mark.parametrize("name", REFERENCES)
def test_released_model(name):
    """Logits, and the gradients of one step with the released weights."""
    data, released = reference(name)
    dtype = getattr(torch, data["eval"].get("precision", "float32"))
    model = created(data).to(dtype)
    load_weights(model, {"model": released}, "released.pth")
    model.eval()
    with torch.no_grad():
        logits = model(torch.as_tensor(fill.images(data["eval"]["batch"], data["img_size"])).to(dtype))
    torch.testing.assert_close(logits, torch.tensor(data["eval"]["logits"], dtype=dtype), rtol=0, atol=1e-4)

    batch = data["train"]["batch"]
    images = torch.as_tensor(fill.images(batch, data["img_size"])).to(dtype)
    loss = F.cross_entropy(model.train()(images), torch.as_tensor(fill.labels(batch, data["num_classes"])))
    assert loss.item() == pytest.approx(data["train"]["loss"], rel=1e-3)
    loss.backward()
    # The conversion keeps the order.
    ours = dict(zip(released, to_our_names(released, model), strict=True))
    for entry, norm in data["train"]["grad_norms"].items():
        # Biases before a BatchNorm have no gradient but rounding errors.
        assert model.get_parameter(ours[entry]).grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-5), entry


@pytest.mark.parametrize("name", REFERENCES)
def test_released_checkpoint(name):
    data, released = reference(name)
    model = created(data)
    assert sum(parameter.numel() for parameter in model.parameters()) == data["num_params"]
    converted = checkpoint_filter_fn({"model": {f"module.{entry}": value for entry, value in released.items()}}, model)
    assert {n: v.shape for n, v in converted.items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert list(checkpoint_filter_fn(model.state_dict(), model)) == list(model.state_dict())  # ours stays as it is
    model.load_state_dict(converted)
    back = to_released_names(model)
    torch.testing.assert_close(back, released)
    first = [entry for entry in released if entry.startswith("network.0.0.") and not entry.endswith("tracked")]
    for entry in first:
        with pytest.raises(CheckpointError, match=r"missing"):
            load_weights(model, {n: v for n, v in released.items() if n != entry}, "released.pth")


def test_offsets_of_released_cycle_mlp_are_dropped():
    data, released = reference("cycle_mlp_b1_64")
    offsets = {
        f"network.{stage}.0.attn.sfc_{axis}.offset": torch.zeros(1, 2, 1, 1) for stage in (0, 6) for axis in "hw"
    }
    load_weights(created(data), {**released, **offsets}, "released.pth")
    with pytest.raises(CheckpointError, match=r"network\.7\.0"):
        load_weights(created(data), {**released, "network.7.0.norm1.weight": torch.zeros(1)}, "released.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, macs = SIZES[name]
    count = Complexity(model, (224, 224)).of()
    assert count.parameters == parameters
    assert macs in (None, count.macs)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("form", ["conv", "select"])
@pytest.mark.parametrize("size", [(5, 4), (1, 1)])
def test_cycle_is_a_deformable_convolution(axis, form, size):
    """With the offsets of the paper's equation: in pairs of (down, right), one pair per channel."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, *size, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, 7, 1, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    offsets = torch.zeros(2, 14, *size, dtype=torch.float64)
    for channel in range(7):
        offsets[:, 2 * channel + (axis == "row")] = (channel + 1) % 3 - 1
    expected = deform_conv2d(x, offsets, weight, bias)
    found = F.conv2d(cycle(x, axis, form), weight, bias)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("length", "p", "shift"), [(7, 4, 2), (6, 3, 0), (1, 3, 1), (2, 2, 1)])
def test_regions(dim, length, p, shift):
    """By the equation, on maps that the regions do not divide, and smaller than one region; and back."""
    x = torch.randn(2, 3, *((length, 5) if dim == 2 else (5, length)))
    y = to_regions(x, dim, p, shift)
    assert y.shape[1] == 3 * p and y.shape[dim] == -(-length // p)
    for channel, k, region in itertools.product(range(3), range(p), range(y.shape[dim])):
        expected = x[:, channel].select(dim - 1, (region * p + k - shift) % length)
        assert torch.equal(y[:, channel * p + k].select(dim - 1, region), expected)
    assert torch.equal(from_regions(y, dim, p, shift, length), x)


@torch.no_grad()
@pytest.mark.parametrize(("axis", "dim", "size"), [("column", 2, (4, 5)), ("row", 3, (5, 4))])
def test_segments(axis, dim, size):
    """By the equation; and a layer for a larger map gives the enlarged output for the enlarged input."""
    layer = SegmentLinear(axis, size, channels=3).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    equation = "vdhc,nschw->nsdvw" if axis == "column" else "vdwc,nschw->nsdhv"
    expected = torch.einsum(equation, layer.weight, x.unflatten(1, (2, 3))).flatten(1, 2)
    torch.testing.assert_close(layer(x), expected)

    def enlarge(y):
        return torch.tensordot(y, interpolation(4, 7), dims=([dim], [1])).movedim(-1, dim)

    layer.set_map_size((7, 5) if axis == "column" else (5, 7))
    torch.testing.assert_close(layer(enlarge(x)), enlarge(expected))


@torch.no_grad()
def test_vision_permutator_of_another_size():
    """Released weights are resampled, each axis by itself."""
    _, released = reference("vip_s14_224")
    model = timm.create_model("vip_s14", img_size=(112, 280), num_classes=10)
    assert load_weights(model, released, "released.pth").img_size == (224, 224)
    mixing = model.stages[0][0].token_mixing
    assert (mixing.mlp_h.weight.shape, mixing.mlp_w.weight.shape) == ((8, 24, 8, 24), (20, 24, 20, 24))
    assert model(torch.zeros(1, 3, 112, 280)).shape == (1, 10)
    model.set_input_size(224)
    assert to_released_names(model)["network.0.0.attn.mlp_w.weight"].shape == (384, 384)
    with pytest.raises(ValueError, match=r"img_size=100 must be .* = 14; nearest that work: 98 and 112"):
        model.set_input_size(100)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cycle_mlp_b1", "hire_mlp_tiny", "wave_mlp_t", "wave_mlp_s"])
def test_any_size(name):
    """Of one network, whatever it was told; an image gets the same logits in any batch."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, widths=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_classes=5).eval()
    assert model.img_size is None
    model.set_input_size(96)  # nothing to do
    for size in ((16, 16), (33, 70)):
        images = torch.randn(3, 3, *size)
        logits = model(images)
        assert logits.shape == (3, 5) and logits.isfinite().all()
        torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


def test_stochastic_depth_grows_over_all_blocks():
    model = timm.create_model("hire_mlp_tiny", widths=(8, 8, 8, 8), drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.3 * block / 9 for block in range(10)])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cycle_mlp_b1", {"widths": (8, 8, 8)}, r"widths=\(8, 8, 8\) must be four"),
        ("wave_mlp_t", {"norm": "layer"}, "norm is 'layer'; accepted: 'batch', 'group'"),
        ("hire_mlp_tiny", {"depths": (1, 0, 1, 1)}, r"depths=\(1, 0, 1, 1\)"),
        ("vip_s7", {"segments": (32, 16, 16, 15)}, "widths=384 must be a multiple of segments = 15"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        timm.create_model(name, **arguments)
