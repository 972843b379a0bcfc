"""A network of PyTorch's own layers, for tools that know layers by their type: what counts multiply-adds, quantises or
prunes. It computes the same, more slowly.
"""

import copy
from functools import singledispatch

import torch
from torch import Tensor, nn

from .ops import DepthwiseConv, PointwiseConv, PointwiseConvLinear
from .strip_mlp import StripMLPLayer
from .vision_permutator import SegmentLinear


def plain(model: nn.Module) -> nn.Module:
    """A copy in which `nn.Conv2d` computes every product of a map with weights: the 1 x 1, depthwise and strip
    convolutions of Strip-MLP, and the linear layers of Sparse MLP and of the other peers. The classifier stays an
    `nn.Linear`. In evaluation mode, BatchNorms become a scale and a shift.

    The copy has other names in its state dict, and works at one image size. Reparameterize before, not after.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        layer = plain_layer(module)
        if layer is not module and not name.startswith("head."):
            model.set_submodule(name, layer.train(module.training))
    return model


@singledispatch
def plain_layer(module: nn.Module) -> nn.Module:
    """What computes the same as a layer by an `nn.Conv2d`; any other module itself."""
    return module


@plain_layer.register(PointwiseConv)
@plain_layer.register(DepthwiseConv)
def _(module: nn.Conv2d) -> nn.Module:
    return conv(module.weight, module.bias, groups=module.groups)


@plain_layer.register
def _(module: nn.Linear) -> nn.Module:
    return LastAxisConv(module)


@plain_layer.register
def _(module: PointwiseConvLinear) -> nn.Module:
    return ScaledConv(module)


@plain_layer.register
def _(module: StripMLPLayer) -> nn.Module:
    return StripConv(module)


@plain_layer.register
def _(module: SegmentLinear) -> nn.Module:
    return SegmentConv(module)


@plain_layer.register
def _(module: nn.BatchNorm2d) -> nn.Module:
    return module if module.training else ChannelAffine(module)


def conv(weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Conv2d:
    """A convolution with a weight (C_out, C / groups, odd height, odd width) and a bias (C_out,), with zeros around the
    map, so that it keeps its size."""
    channels, out_channels, sides = groups * weight.shape[1], weight.shape[0], weight.shape[2:]
    # Not padding="same", of which PyTorch's quantiser knows nothing.
    padding = tuple(side // 2 for side in sides)
    layer = nn.Conv2d(channels, out_channels, sides, padding=padding, groups=groups, bias=bias is not None)
    layer = layer.to(weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class ChannelAffine(nn.Module):
    """A BatchNorm in evaluation mode. PyTorch's quantiser (pt2e) would fold it into the patch merging before it, whose
    output the shortcuts and the residual connection use without it."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.scale = nn.Parameter(scale.detach()[:, None, None])
        self.shift = nn.Parameter((norm.bias - norm.running_mean * scale).detach()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class LastAxisConv(nn.Module):
    """A linear layer over the last axis of four."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.conv = conv(linear.weight[:, :, None, None], linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


class ScaledConv(nn.Module):
    """`PointwiseConvLinear`."""

    def __init__(self, linear: PointwiseConvLinear):
        super().__init__()
        self.conv = conv(linear.weight[:, :, None, None], linear.bias)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return self.conv(x if scale is None else scale.to(x.dtype) * x + shift[:, None, None])


class StripConv(nn.Module):
    """`StripMLPLayer`: the tokens of the mixed axis are channels, and the patches groups (see `ops.mix_strips`)."""

    def __init__(self, layer: StripMLPLayer):
        super().__init__()
        patches = layer.weight.shape[0]
        weight = layer.weight.flatten(0, 1)[:, :, None]  # (P L, L, 1, m)
        self.conv = conv(weight, layer.bias.flatten(), groups=patches)
        self.axis, self.q = layer.axis, layer.q

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.q, -1))  # (N, q, P, H, W)
        x = x.permute(0, 2, 4, 1, 3) if self.axis == "row" else x.permute(0, 2, 3, 1, 4)  # (N, P, L, q, A)
        y = self.conv(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        y = y.permute(0, 3, 1, 4, 2) if self.axis == "row" else y.permute(0, 3, 1, 2, 4)  # (N, q, P, H, W)
        return y.flatten(1, 2)


class SegmentConv(nn.Module):
    """`SegmentLinear`: the tokens of the mixed axis and the channels of a segment are channels."""

    def __init__(self, layer: SegmentLinear):
        super().__init__()
        self.conv = conv(layer.weight.flatten(2).flatten(0, 1)[:, :, None, None], None)  # (L S, L S, 1, 1)
        self.axis, self.channels = layer.axis, layer.channels

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.channels))  # (N, g, S, H, W)
        x = x.permute(0, 4, 2, 1, 3) if self.axis == "row" else x.permute(0, 3, 2, 1, 4)  # (N, L, S, g, A)
        y = self.conv(x.flatten(1, 2)).unflatten(1, (-1, self.channels))
        y = y.permute(0, 3, 2, 4, 1) if self.axis == "row" else y.permute(0, 3, 2, 1, 4)  # (N, g, S, H, W)
        return y.flatten(1, 2)
