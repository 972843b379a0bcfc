"""Chains of layers give what their layers give, keep less, and leave alone what is not theirs."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import chains, ops
from models.activation_checkpoint import checkpoint_blocks
from models.depthwise import depthwise_conv2d
from models.strip_mlp import GlobalResponseNorm, StripMixingOptions, StripMLPBlock

DIM, HIDDEN, SIDE = 6, 10, 9


class Chain(nn.Module):
    """All chains, with weights that are nowhere zero or one."""

    def __init__(self, grn: bool = True, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.dwconv = nn.BatchNorm2d(DIM), ops.DepthwiseConv(DIM, 3)
        self.proj, self.norm2 = ops.PointwiseConv(DIM, DIM, bias=bias), nn.BatchNorm2d(DIM)
        self.fc1, self.fc2 = ops.PointwiseConvLinear(DIM, HIDDEN), ops.PointwiseConvLinear(HIDDEN, DIM)
        self.act, self.grn = nn.GELU(), GlobalResponseNorm(HIDDEN) if grn else None
        with torch.no_grad():
            for value in self.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.rand_like(value), alpha=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = chains.norm_gelu_depthwise(x, self.norm1, self.act, self.dwconv)
        x = chains.pointwise_norm_gelu(x, self.proj, self.norm2, self.act)
        return chains.mlp(x, self.fc1, self.act, self.grn, self.fc2)

    def one_by_one(self, x: Tensor) -> Tensor:
        x = self.dwconv(F.gelu(self.norm1(x)))
        x = F.gelu(self.norm2(self.proj(x)))
        x = F.gelu(self.fc1(x))
        if self.grn is not None:
            x = x * (1 + self.grn.weight[:, None, None] * norms(x)) + self.grn.bias[:, None, None]
        return self.fc2(x)


def norms(x: Tensor) -> Tensor:
    """Of each channel, relative to their mean (ConvNeXt V2, equations 1 and 2)."""
    gx = x.norm(dim=(2, 3), keepdim=True)
    return gx / (gx.mean(dim=1, keepdim=True) + 1e-6)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(3, DIM, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return x.to(dtype, memory_format=torch.channels_last)


def train(chain: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = forward(x)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in chain.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **dict(chain.named_buffers())}


@pytest.mark.parametrize("grn", [True, False])
@pytest.mark.parametrize("rows", [SIDE, 3])  # small maps have another form of 1 x 1 convolutions
def test_training(grn, rows):
    chain, other = Chain(grn).double(), Chain(grn).double()
    x = images()[:, :, :rows, :4]
    found, expected = train(chain, chain, x), train(other, other.one_by_one, x)
    assert all(value is not None for value in found.values())
    assert found["norm1.num_batches_tracked"] == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    chain, other = Chain(), Chain()
    with torch.autocast("cpu", dtype):
        found, expected = (
            train(c, forward, images(torch.float32)) for c, forward in ((chain, chain), (other, other.one_by_one))
        )
    assert found["y"].dtype == expected["y"].dtype == dtype
    del found["proj.bias"]  # in truth zero: BatchNorm takes it away
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 0.03, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_inference(dtype, bias, monkeypatch):
    chain = Chain(bias=bias).to(dtype).eval()
    x = images(dtype)
    is_fused = dtype == torch.float32 and chains.has_fused_convolution(dtype)
    fused, calls = chains._convolution_gelu, []
    monkeypatch.setattr(chains, "_convolution_gelu", lambda *args: calls.append(args) or fused(*args))
    with torch.inference_mode():
        torch.testing.assert_close(chain(x), chain.one_by_one(x), rtol=1e-5, atol=1e-5)
        # The projection and fc1, where this processor has the operator
        assert len(calls) == (2 if is_fused else 0)
        chain.norm2.running_var *= 4  # folded from what it is now
        torch.testing.assert_close(chain(x), chain.one_by_one(x), rtol=1e-5, atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(chain(x), chain.one_by_one(x), rtol=0.05, atol=0.05)
    assert chain(x).requires_grad  # evaluation with a gradient goes another way


def test_statistics_of_the_batch_in_inference():
    """BatchNorm in training mode is not folded."""
    chain = Chain()
    with torch.no_grad():
        found, expected = (train_mode(images(torch.float32)) for train_mode in (chain, chain.one_by_one))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_listeners_hear_every_layer(training):
    chain, heard = Chain().train(training), []
    layers = dict(chain.named_children())
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: heard.append(name))
    with torch.set_grad_enabled(training):
        chain(images(torch.float32))
    assert set(heard) == set(layers)


class LowRank(nn.Module):
    """As in LoRA: the layer, and something that is learnt beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, *args, **kwargs) -> Tensor:
        return self.layer(*args, **kwargs) + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_replaced_layers_are_called(training, name):
    chain = Chain(grn=False).train(training)
    x = images(torch.float32)
    with torch.set_grad_enabled(training):
        before = chain(x)
        setattr(chain, name, LowRank(getattr(chain, name)))
        after = chain(x)
    assert (after - before).abs().max() > 0.1


def test_every_product_is_counted():
    """By what looks at operations, which does not know oneDNN's own."""
    model = timm.create_model("strip_mlp_pico", img_size=224).eval()  # no kernel reaches beyond its map
    counts = []
    for device in "cpu", "meta":
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.to(device)(torch.empty(1, 3, 224, 224, device=device))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0

    class Names(TorchDispatchMode):  # without the hooks of PyTorch's counter
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    with torch.no_grad(), Names():
        Chain().eval()(images(torch.float32))
    assert "aten::gelu" in names and not any(name.startswith("mkldnn::") for name in names)


def test_one_value_per_channel():
    """BatchNorm's own error, and statistics that are still numbers."""
    chain = Chain()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        chain(images(torch.float32)[:1, :, :1, :1])
    assert chain.norm1.running_var.isfinite().all()


def test_second_derivatives_are_refused():
    x = images().requires_grad_()
    gradient = torch.autograd.grad(Chain().double()(x).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_float32_from_a_replaced_layer():
    chain = Chain()
    chain.fc1 = nn.Sequential(chain.fc1, Float32())
    with torch.autocast("cpu", torch.bfloat16):
        chain(images(torch.float32)).sum().backward()
    assert chain.fc1[0].weight.grad.isfinite().all()


class Float32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_cumulative_statistics_and_checkpointing():
    """BatchNorm's momentum=None, which the chains leave to the layer, in both passes."""
    results = []
    for checkpointed in False, True:
        block = StripMLPBlock(8, (4, 4), StripMixingOptions(), alpha=3, grn=True, drop_path=0.0)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        torch.manual_seed(0)
        nn.init.normal_(block.channel_mixing.mlp.fc2.weight)
        x = torch.randn(3, 8, 4, 4).requires_grad_()
        block.load_state_dict(results[0][0] if results else block.state_dict())
        before = {name: value.clone() for name, value in block.state_dict().items()}
        y = checkpoint_blocks(nn.Sequential(block), x) if checkpointed else block(x)
        y.square().sum().backward()
        results.append((before, x.grad, dict(block.named_buffers())))
    torch.testing.assert_close(results[1][1:], results[0][1:])


def test_what_is_kept():
    """By a block, in maps of C channels. docs/speed.md names them."""
    block = StripMLPBlock(24, (8, 8), StripMixingOptions(), alpha=3, grn=True, drop_path=0.0)
    x = torch.randn(5, 24, 8, 8).to(memory_format=torch.channels_last)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel() // 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x.requires_grad_())
    # 25.5 if each layer keeps what it needs.
    assert sum(kept.values()) / x.nbytes <= 15.5
    y.sum().backward()


@pytest.mark.parametrize("kernel", [(3, 7), (7, 7), (5, 5), (7, 3), (1, 9)])
def test_wide_depthwise_gradients(kernel):
    x = images().requires_grad_()
    weight = torch.randn(DIM, 1, *kernel, dtype=torch.float64, requires_grad=True)
    padding = [side // 2 for side in kernel]
    gradient = torch.randn_like(x)
    found = torch.autograd.grad(depthwise_conv2d(x, weight), (x, weight), gradient)
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=padding, groups=DIM), (x, weight), gradient)
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x.float(), weight.float())
    assert y.dtype == torch.bfloat16
    rough = torch.autograd.grad(y, weight, gradient.bfloat16())[0]
    assert (rough - expected[1]).norm() < 0.02 * expected[1].norm()
