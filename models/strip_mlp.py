"""Strip-MLP: Efficient Token Interaction for Vision MLP (Cao et al., ICCV 2023), https://arxiv.org/abs/2307.11458

Read it top to bottom, as the paper does: the strip MLP layer (one axis), the cascade group strip mixing module
(CGSMM: rows, then columns, group-wise), the local strip mixing module (LSMM), the strip mixing block that runs both
on half of the channels each, the channel mixing block, and the network of four stages with multi-scale shortcuts.

Feature maps are (N, C, H, W) in `torch.channels_last` memory format, whatever the images are in. Inside a strip mixing
block, C' = C / 2; a patch is a group of `patch_channels` (q) channels, so that there are P = C' / q patches.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, Mlp, fast_layer_norm, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from .backbone import (
    FEATURE_CFG,
    Backbone,
    MapSized,
    build_stages,
    check_depths,
    check_img_size,
    describe_stages,
    image_cfg,
    merge,
    plain_weights,
    translate,
)

__all__ = [
    "CGSMM",
    "LSMM",
    "ChannelMixingBlock",
    "RelativePosition",
    "StripMLP",
    "StripMLPBlock",
    "StripMLPLayer",
    "StripMixingBlock",
    "checkpoint_filter_fn",
]


CGSMM_STRUCTURES = ("cascade", "parallel")
BRANCHES = ("both", "cgsmm", "lsmm")


def on_gpu(x: Tensor) -> bool:
    """Whether to compute as is best on GPUs. Both ways give the same on any device."""
    return x.is_cuda


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1 x 1 convolution of (N, dim, H, W) with a weight of (out_dim, dim) or (out_dim, dim, 1, 1). In
    `torch.channels_last`, both ways of computing it read and write the maps where they are."""
    if on_gpu(x):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    # oneDNN's convolutions use all of an x86 processor; the matrix products of PyTorch's builds are Intel's, which give
    # half the speed on others.
    return F.conv2d(x, weight.flatten(1)[:, :, None, None], bias)


class PointwiseConv(nn.Conv2d):
    """1 x 1 convolution. Shape: (N, dim, H, W) -> (N, out_dim, H, W)."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True):
        super().__init__(dim, out_dim, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class PointwiseLinear(nn.Linear):
    """Linear layer over the channels of a map. Shape: (N, dim, H, W) -> (N, out_dim, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), under autocast in its dtype. Autocast itself would make input and
    output float32, twice the memory, although the statistics are computed in float32 either way."""

    def forward(self, x: Tensor) -> Tensor:
        # The meta device, which tools/complexity.py runs on, knows no autocast.
        layer_norm = F.layer_norm if x.is_meta else fast_layer_norm
        x = x.permute(0, 2, 3, 1)
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, of which GPUs do not keep the intermediate results for the backward pass: those up to its
    last product, which take a pass over a map each, are computed again there. CPUs are shorter of time than of memory,
    and the compiler chooses for itself."""
    if not on_gpu(tensors[0]) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


class StripMLPLayer(MapSized):
    """Strip MLP layer along one axis: tokens interact with all tokens of their row (or column) and of the
    neighbouring rows (columns) inside a strip (the paper's "Strip MLP layer", with the patches of CGSMM).

    For `axis="row"`, strip width m and r = (m - 1) / 2, with patch p and channel j inside the patch:

        y[n, j, p, i, w'] = bias[p, w'] + sum over d = -r..r and w of weight[p, w', w, d + r] * x[n, j, p, i + d, w]

    where rows outside the map are zero; `axis="column"` is the same with height and width exchanged. A patch has
    its own weights, which its q channels share. The patches interleave: channel j * P + p belongs to patch p.

    Args:
        dim: channels C' of the input.
        length: tokens along the mixed axis (the width for "row", the height for "column").
        axis: "row" or "column", the direction of the strips.
        patch_channels: q, channels that share weights; divides `dim`.
        strip_width: m, odd.

    Shape: (N, C', H, W) -> (N, C', H, W).
    """

    # Neighbouring rows (columns) stay the neighbouring ones: the strip width is counted in tokens at any size.
    map_axes: ClassVar = {"weight": {1: "output", 2: "input"}, "bias": {1: "output"}}

    def __init__(self, dim: int, length: int, axis: str, patch_channels: int = 2, strip_width: int = 3):
        super().__init__()
        if axis not in ("row", "column"):
            raise ValueError(f"axis is {axis!r}; accepted: 'row', 'column'")
        check_strip_width(strip_width)
        if dim % patch_channels:
            raise ValueError(f"patch_channels={patch_channels} does not divide the {dim} channels")
        self.axis = axis
        self.patch_channels = patch_channels
        self.patches = dim // patch_channels
        self.weight = nn.Parameter(torch.empty(self.patches, length, length, strip_width))
        self.bias = nn.Parameter(torch.empty(self.patches, length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's default initialisation of a convolution with this layer's fan-in, length * strip_width."""
        _, _, length, strip_width = self.weight.shape
        bound = 1 / math.sqrt(length * strip_width)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def map_length(self, size: tuple[int, int]) -> int:
        return size[1] if self.axis == "row" else size[0]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # which chooses layouts itself
            x = ChannelsLastGradient.apply(x)
        x = x.unflatten(1, (self.patch_channels, self.patches))  # (N, q, P, H, W)
        # L is the mixed axis, A the one along which the strips lie side by side.
        x = x.permute(0, 2, 4, 1, 3) if self.axis == "row" else x.permute(0, 2, 3, 1, 4)  # (N, P, L, q, A)
        if on_gpu(x):
            y = recomputed(mix_strips_by_matmul, x, self.weight, self.bias)
        else:
            y = mix_strips_by_conv(x, self.weight, self.bias)
        y = y.permute(0, 4, 2, 3, 1) if self.axis == "row" else y.permute(0, 2, 4, 3, 1)  # (N, H, W, q, P)
        return y.flatten(3).permute(0, 3, 1, 2)  # channels_last

    def extra_repr(self) -> str:
        patches, length, _, strip_width = self.weight.shape
        return f"axis={self.axis}, length={length}, patches={patches}, q={self.patch_channels}, m={strip_width}"


class ChannelsLastGradient(torch.autograd.Function):
    """Identity, with a gradient in `torch.channels_last`: the transposed views of a strip layer would hand theirs on in
    a layout in which all that comes before is slow."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


def mix_strips_by_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`StripMLPLayer` as a convolution of (1, m) kernels with one group per patch."""
    y = F.conv2d(
        x.flatten(1, 2),  # (N, P L, q, A)
        weight.flatten(0, 1)[:, :, None],  # (P L, L, 1, m)
        bias.flatten(),
        padding=(0, weight.shape[-1] // 2),
        groups=weight.shape[0],
    )
    return y.unflatten(1, bias.shape)  # (N, P, L, q, A)


def mix_strips_by_matmul(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`StripMLPLayer` as one matrix product per patch, for GPUs, on which convolutions of many small groups crawl."""
    m = weight.shape[-1]
    x = x.permute(1, 2, 0, 3, 4)  # (P, L, N, q, A)
    strips = F.pad(x, (m // 2, m // 2)).unfold(-1, m, 1)  # (P, L, N, q, A, m)
    strips = strips.permute(0, 1, 5, 2, 3, 4).flatten(3).flatten(1, 2)  # (P, L m, N q A)
    y = torch.baddbmm(bias[:, :, None], weight.flatten(2), strips)  # (P, L, N q A)
    return y.unflatten(2, x.shape[2:]).permute(2, 0, 1, 3, 4)  # (N, P, L, q, A)


class RelativePosition(MapSized):
    """Adds a relative position table: position (i, j) of the map gets the table's row (j - i), in each channel its own.

    Args:
        dim: channels C'.
        size: (H, W) of the map.
        radius: "height" or "width", the largest difference r in the table, which has 2 r + 1 rows; differences beyond
            it are clipped to it (this happens only on maps that are not square).

    Shape: (N, C', H, W) -> (N, C', H, W).
    """

    map_axes: ClassVar = {"table": {0: "offset"}}

    def __init__(self, dim: int, size: tuple[int, int], radius: str):
        super().__init__()
        check_choice("radius", radius, ("height", "width"))
        self.radius = radius
        self.table = nn.Parameter(torch.empty(self.map_length(size), dim))
        trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", self.table_index(size), persistent=False)

    def map_length(self, size: tuple[int, int]) -> int:
        return 2 * size[("height", "width").index(self.radius)] + 1

    def table_index(self, size: tuple[int, int]) -> Tensor:
        """Which row of the table each position of the map gets, (H, W)."""
        radius = self.map_length(size) // 2
        difference = torch.arange(size[1])[None, :] - torch.arange(size[0])[:, None]  # j - i
        return difference.clamp(-radius, radius) + radius

    def set_map_size(self, size: tuple[int, int]) -> None:
        super().set_map_size(size)
        self.index = self.table_index(size).to(self.table.device)

    def forward(self, x: Tensor) -> Tensor:
        position = F.embedding(self.index, self.table).permute(2, 0, 1)  # (H, W, C') -> (C', H, W)
        # Under autocast x is half precision and the table is not: a promoted sum would double the traffic.
        return x + position.to(x.dtype)


class CGSMM(nn.Module):
    """Cascade group strip mixing module (paper figure 2b, tables 7 and 8): strips along rows, then along columns of
    the result, each fused with the module's input.

        z = GELU(BN(fuse_h([strip_h(u + pos_h), u])))
        cascade:   y = fuse_w([u, strip_w(z + pos_w)])
        parallel:  y = fuse_w([z, strip_w(u + pos_w)])

    The paper does not say how its parallel module (table 8) is wired. Here both strips read the module's input, so
    that they no longer depend on each other, and z takes u's place in the last fusion, so that the rows still reach
    the output: the same layers, parameters and multiply-adds as the cascade (in Strip-MLP-T* at 224 x 224, 18,243,920
    and 2,518,593,280 either way).

    Args:
        dim: channels C'.
        size: (H, W) of the map.
        patch_channels: q, channels that share strip weights.
        strip_width: m, odd.
        structure: "cascade" or "parallel".
        position_tables: whether to add pos_h and pos_w.

    Shape: (N, C', H, W) -> (N, C', H, W).
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        patch_channels: int = 2,
        strip_width: int = 3,
        structure: str = "cascade",
        position_tables: bool = True,
    ):
        super().__init__()
        check_choice("structure", structure, CGSMM_STRUCTURES)
        height, width = size
        self.structure = structure
        self.pos_h = RelativePosition(dim, size, radius="height") if position_tables else nn.Identity()
        self.strip_h = StripMLPLayer(dim, width, "row", patch_channels, strip_width)
        self.fuse_h = PointwiseConv(2 * dim, dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.pos_w = RelativePosition(dim, size, radius="width") if position_tables else nn.Identity()
        self.strip_w = StripMLPLayer(dim, height, "column", patch_channels, strip_width)
        self.fuse_w = PointwiseConv(2 * dim, dim, bias=False)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the map."""
        return self.strip_w.bias.shape[1], self.strip_h.bias.shape[1]

    def forward(self, u: Tensor) -> Tensor:
        rows = self.strip_h(self.pos_h(u))
        z = self.act(self.norm(self.fuse_h(torch.cat([rows, u], dim=1))))
        if self.structure == "cascade":
            return self.fuse_w(torch.cat([u, self.strip_w(self.pos_w(z))], dim=1))
        return self.fuse_w(torch.cat([z, self.strip_w(self.pos_w(u))], dim=1))


class LSMM(nn.Module):
    """Local strip mixing module (paper figure 2b, table 9): two depthwise strips, 3 x 7 and 7 x 3, and the
    identity, weighted per channel by a softmax over the three branches of their pooled sum.

    Args:
        dim: channels C', even.

    Shape: (N, C', H, W) -> (N, C', H, W).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv_h = nn.Conv2d(dim, dim, kernel_size=(3, 7), padding=(1, 3), groups=dim, bias=False)
        self.conv_w = nn.Conv2d(dim, dim, kernel_size=(7, 3), padding=(3, 1), groups=dim, bias=False)
        self.reweight = Mlp(dim, dim // 2, 3 * dim, act_layer=nn.GELU, use_conv=True)

    def forward(self, v: Tensor) -> Tensor:
        a = self.conv_h(v)
        b = self.conv_w(v)
        pooled = (a + b + v).mean(dim=(2, 3), keepdim=True)  # (N, C', 1, 1)
        weights = self.reweight(pooled)  # (N, 3 C', 1, 1), channel 3 * c + branch
        # Autocast computes a softmax in float32, to which it would promote all three maps.
        weights = weights.unflatten(1, (-1, 3)).softmax(dim=2).to(v.dtype)  # (N, C', 3, 1, 1)
        w_b, w_a, w_v = weights.movedim(2, 0).contiguous()  # each (N, C', 1, 1), dense as the maps are over channels
        return w_b * b + w_a * a + w_v * v


class StripMixingBlock(nn.Module):
    """Token mixing (paper figure 2b): a depthwise convolution and a projection, then CGSMM on the first
    half of the channels and LSMM on the second, fused.

    Args:
        dim: channels C; a multiple of 4.
        size: (H, W) of the map.
        patch_channels: q, channels that share strip weights; divides C / 2. -1: all of them, one patch.
        strip_width: m, odd.
        cgsmm_structure: "cascade" or "parallel", see `CGSMM`.
        branches: "both", or the one that is left, "cgsmm" or "lsmm" (paper table 9). The half of a branch that is
            taken away goes to the fusion as it is, as the paper does not say what replaces it: the other branch and the
            fusion keep their widths. Strip-MLP-T* at 224 x 224 then has 17,411,400 parameters and 2,492,819,200 MACs
            with "cgsmm", 14,817,040 and 2,155,256,320 with "lsmm".
        position_tables: whether CGSMM adds them.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        patch_channels: int = 2,
        strip_width: int = 3,
        cgsmm_structure: str = "cascade",
        branches: str = "both",
        position_tables: bool = True,
    ):
        super().__init__()
        check_choice("branches", branches, BRANCHES)
        check_choice("cgsmm_structure", cgsmm_structure, CGSMM_STRUCTURES)
        half = dim // 2
        q = half if patch_channels == -1 else patch_channels
        self.norm = nn.BatchNorm2d(dim)
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.proj = PointwiseConv(dim, dim)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        cgsmm, lsmm = branches != "lsmm", branches != "cgsmm"
        self.cgsmm = CGSMM(half, size, q, strip_width, cgsmm_structure, position_tables) if cgsmm else nn.Identity()
        self.lsmm = LSMM(half) if lsmm else nn.Identity()
        self.fuse = PointwiseConv(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = recomputed(lambda y: self.dwconv(self.act(y)), self.norm(x))
        x = self.act(self.proj_norm(self.proj(x)))
        u, v = x.chunk(2, dim=1)
        return self.fuse(torch.cat([self.cgsmm(u), self.lsmm(v)], dim=1))

    @torch.no_grad()
    def reparameterized(self) -> "ReparameterizedStripMixing":
        """The same function in evaluation mode, with fewer operations. This block stays as it is."""
        return ReparameterizedStripMixing(self)


class ReparameterizedStripMixing(MapSized):
    """A `StripMixingBlock` in evaluation mode, with what is linear and follows another linear map folded into it:

    - both BatchNorms that follow a convolution;
    - the position tables and the biases of the strips, which every image gets alike: what they become after the fusion
      that follows is a map of its own, added there;
    - CGSMM's last fusion into the block's.

    Args:
        block: what to compute; not changed.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, block: StripMixingBlock):
        super().__init__()
        block = copy.deepcopy(block).eval()
        self.norm, self.dwconv, self.act, self.lsmm = block.norm, block.dwconv, block.act, block.lsmm
        self.proj = fuse_conv_bn_eval(block.proj, block.proj_norm)
        self.cgsmm = isinstance(block.cgsmm, CGSMM)
        if not self.cgsmm:
            self.fuse_all = block.fuse
            return
        cgsmm = block.cgsmm
        self.structure = cgsmm.structure
        half = cgsmm.fuse_h.out_channels
        nothing = block.fuse.weight.new_zeros(1, half, *cgsmm.size).contiguous(memory_format=torch.channels_last)

        self.fuse_h = fuse_conv_bn_eval(cgsmm.fuse_h, cgsmm.norm)
        rows = cgsmm.strip_h(cgsmm.pos_h(nothing))
        self.map_h = nn.Parameter(self.fuse_h(torch.cat([rows, nothing], dim=1)))
        self.fuse_h.bias = None

        # [CGSMM, LSMM] -> C after [first, columns] -> CGSMM: [first, columns, LSMM] -> C
        outer, inner = block.fuse.weight.flatten(1), cgsmm.fuse_w.weight.flatten(1)
        weight = torch.cat([outer[:, :half] @ inner, outer[:, half:]], dim=1)  # (C, 3 C')
        self.fuse_all = PointwiseConv(3 * half, 2 * half, bias=False).to(weight)
        self.fuse_all.weight.copy_(weight[:, :, None, None])
        columns = cgsmm.strip_w(cgsmm.pos_w(nothing))
        self.map_all = nn.Parameter(self.fuse_all(torch.cat([nothing, columns, nothing], dim=1)))

        self.strip_h, self.strip_w = cgsmm.strip_h, cgsmm.strip_w
        nn.init.zeros_(self.strip_h.bias)
        nn.init.zeros_(self.strip_w.bias)

    def set_map_size(self, size: tuple[int, int]) -> None:
        raise ValueError("the model was reparameterized, which is for one size; set_input_size comes before that")

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.act(self.norm(x)))
        x = self.act(self.proj(x))
        u, v = x.chunk(2, dim=1)
        if not self.cgsmm:
            return self.fuse_all(torch.cat([u, self.lsmm(v)], dim=1))
        z = self.act(self.fuse_h(torch.cat([self.strip_h(u), u], dim=1)) + self.map_h.to(u.dtype))
        first, second = (u, z) if self.structure == "cascade" else (z, u)
        y = self.fuse_all(torch.cat([first, self.strip_w(second), self.lsmm(v)], dim=1))
        return y + self.map_all.to(y.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    """Of each channel over the map, in at least float32, except that a sum in bfloat16 on the CPU, which is accumulated
    in float32 too, is rounded once. Shape: (N, dim, H, W) -> (N, dim, 1, 1)."""
    if x.dtype == torch.float16:
        x = x.float()  # squares of 256 and more are beyond it
    squares = (x * x).sum(dim=(2, 3), keepdim=True)
    return squares.to(torch.promote_types(squares.dtype, torch.float32))


class SumOfSquares(torch.autograd.Function):
    """The same with a gradient that takes one pass over the map, the widest of the network, where autograd takes three,
    and that keeps x alone, whatever its dtype."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sum_of_squares(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if x.dtype == torch.float16:
            return (x.float() * (2 * gradient)).half()
        return x * (2 * gradient).to(x.dtype)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, equations 1 to 3) as a scale and a shift per channel:

        gx = L2 norm of x over the map;  nx = gx / (mean of gx over channels + 1e-6)
        GRN(x) = weight * (x * nx) + bias + x = x * (1 + weight * nx) + bias

    so that it takes one pass over the map, the widest of the network, besides that for the norms. Where a linear layer
    follows, the shift can go through it.

    Shape: (N, dim, H, W) -> scale (N, dim, 1, 1) and shift (dim,).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The compiler fuses the gradient by itself.
        squares = sum_of_squares(x) if torch.compiler.is_compiling() else SumOfSquares.apply(x)
        # A channel that is zero everywhere has a norm, but its gradient would be 0 / 0.
        gx = squares.clamp_min(1e-24).sqrt()
        nx = gx / (gx.mean(dim=1, keepdim=True) + 1e-6)
        return 1 + self.weight[:, None, None] * nx, self.bias


class ChannelMlp(nn.Module):
    """MLP over channels with global response normalisation between its two layers. With it, the second layer's weights
    are used, its `forward` is not.

    Args:
        dim: channels C.
        hidden: channels between the layers.
        grn: whether there is the normalisation.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, hidden: int, grn: bool = True):
        super().__init__()
        self.fc1 = PointwiseLinear(dim, hidden)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(hidden) if grn else None
        self.fc2 = PointwiseLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        if self.grn is None:
            return self.fc2(x)
        scale, shift = self.grn(x)
        return recomputed(self.fc2_scaled, x, scale.to(x.dtype), shift)

    def fc2_scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The second layer of x * scale + shift."""
        return pointwise(x * scale, self.fc2.weight, self.fc2.bias + self.fc2.weight @ shift)


class ChannelMixingBlock(nn.Module):
    """Channel mixing (paper figure 2c): a 7 x 7 depthwise convolution, LayerNorm over channels, and an MLP with
    global response normalisation between its two layers (ConvNeXt V2).

    Args:
        dim: channels C.
        alpha: hidden width of the MLP as a multiple of C.
        grn: whether the MLP has the normalisation.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, alpha: float = 3, grn: bool = True):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, bias=False)
        self.norm = LayerNorm2d(dim)
        self.mlp = ChannelMlp(dim, int(alpha * dim), grn)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(self.dwconv(x)))


class StripMLPBlock(nn.Module):
    """One block of the network (paper figure 2a): token mixing and channel mixing, both residual.

    Args: those of `StripMixingBlock` and `ChannelMixingBlock`, and
        drop_path: probability of dropping a residual branch (stochastic depth) per sample.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        alpha: float = 3,
        grn: bool = True,
        drop_path: float = 0.0,
        **token_mixing,
    ):
        super().__init__()
        self.token_mixing = StripMixingBlock(dim, size, **token_mixing)
        self.channel_mixing = ChannelMixingBlock(dim, alpha, grn)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def reparameterize(self) -> None:
        """Replaces token mixing by its faster form for evaluation (timm's convention)."""
        if isinstance(self.token_mixing, StripMixingBlock):
            self.token_mixing = self.token_mixing.reparameterized()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))


class StripMLP(Backbone):
    """The network (paper figure 2a): four stages of `StripMLPBlock`s at strides p, 2p, 4p and
    8p, and shortcuts that carry the merged outputs of stages 1 and 2 to the inputs of stages 3 and 4.

    Args:
        img_size: input height and width in pixels; the strip weights depend on it, so the input must have it.
            A multiple of 8 * patch_size.
        patch_size: p, pixels per token side.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        embed_dim: C, channels of stage 1, doubled by each later stage. A multiple of 4.
        depths: blocks in each of the four stages.
        patch_channels: q, channels that share strip weights; divides C / 2. The released T* and T use 2, S and B 4.
            -1: all channels of a strip module, one patch in every stage (paper table 7, P = 1: "without the group
            strip layer"); T* at 224 x 224 then has 16,484,736 parameters and as many MACs.
        strip_width: m, odd; 3 in all released models (paper table 6).
        alpha: expansion of the channel-mixing MLP.
        cgsmm_structure: "cascade" as released, or "parallel" (paper table 8), see `CGSMM`.
        branches: "both" as released, or "cgsmm" or "lsmm" alone (paper table 9), see `StripMixingBlock`.
        position_tables: whether CGSMM adds its relative position tables (T* without them: 18,132,720 parameters).
        multi_scale_shortcuts: whether there are shortcuts; without them, a stage's input is the merged output of the
            one before (T*: 18,237,520 parameters, 2,518,091,520 MACs).
        grn: whether channel mixing has global response normalisation (T* without it: 18,221,840 parameters).
        drop_path_rate: stochastic depth, the same in every block as in the released models.
        drop_rate: dropout before the classifier; 0 in the released models.
        global_pool: "avg", or "" for none (timm's convention).

    Raises:
        ValueError: sizes that do not divide, with the nearest ones that do.

    Shape: (N, in_chans, img_size, img_size) -> (N, num_classes).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 2, 6, 2),
        patch_channels: int = 2,
        strip_width: int = 3,
        alpha: float = 3,
        cgsmm_structure: str = "cascade",
        branches: str = "both",
        position_tables: bool = True,
        multi_scale_shortcuts: bool = True,
        grn: bool = True,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_geometry(img_size, patch_size, embed_dim, depths, patch_channels, strip_width)

        self.img_size = img_size
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 8 * embed_dim
        self.feature_info = describe_stages(embed_dim, patch_size)
        c1, c2, c3, c4 = (info["num_chs"] for info in self.feature_info)

        self.patch_embed = nn.Conv2d(in_chans, c1, kernel_size=patch_size, stride=patch_size, bias=False)
        block = partial(
            StripMLPBlock,
            alpha=alpha,
            grn=grn,
            drop_path=drop_path_rate,
            patch_channels=patch_channels,
            strip_width=strip_width,
            cgsmm_structure=cgsmm_structure,
            branches=branches,
            position_tables=position_tables,
        )
        self.stages = build_stages(self.feature_info, depths, img_size, block)
        self.merging = nn.ModuleList(merge(c_in, c_out) for c_in, c_out in ((c1, c2), (c2, c3), (c3, c4)))
        self.multi_scale_shortcuts = multi_scale_shortcuts
        if multi_scale_shortcuts:  # between the merged maps: stage 2 -> 3, then on to 4, and stage 3 -> 4
            self.shortcut_2to3 = merge(c2, c3, groups=c2)
            self.shortcut_2to4 = merge(c3, c4, groups=c3)
            self.shortcut_3to4 = merge(c3, c4, groups=c3)
        self.norm = nn.BatchNorm2d(c4)
        self.head = ClassifierHead(c4, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x).contiguous(memory_format=torch.channels_last)  # as all maps are from here on

    def between_stages(self, index: int, x: Tensor, carried: list[Tensor]) -> Tensor:
        """Adds the shortcuts: `x`, the merged output of stage `index` (the paper counts from 1), to the input of the
        next. `carried` holds what goes on to the stage after."""
        if not self.multi_scale_shortcuts:
            return x
        if index == 1:  # (N, 2C, H / 2p, W / 2p)
            if self.shortcut_2to3:
                carried.append(self.shortcut_2to3(x))
            return x
        incoming = carried.pop()
        if index == 2 and self.shortcut_2to4:  # (N, 4C, H / 4p, W / 4p)
            carried.append(self.shortcut_2to4(incoming) + self.shortcut_3to4(x))
        return x + incoming

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.multi_scale_shortcuts and len(self.stages) < 4:
            self.shortcut_2to4 = self.shortcut_3to4 = None
            if len(self.stages) < 3:
                self.shortcut_2to3 = None
        return take

    def reparameterize(self) -> "StripMLP":
        """Folds what can be folded for inference, in place, and switches to evaluation mode: the same outputs up to
        rounding, with fewer operations, but under other names and for no further training. For export too. Given a
        model in evaluation mode, `timm.utils.reparameterize_model(model)` does it to a copy.

        Returns:
            The model itself.
        """
        for stage in self.stages:
            for block in stage:
                block.reparameterize()
        return self.eval()

    def weight_decay_vectors(self) -> set[str]:
        """Vectors that the released recipe decays all the same: GRN's scale and shift, which the released code
        stores as (1, 1, 1, C) and so does not take for vectors."""
        return {f"{name}.{p}" for name, _ in self.named_modules() if name.endswith(".grn") for p in ("weight", "bias")}


def check_strip_width(strip_width: int) -> None:
    """Raises ValueError for a strip width without a centre row."""
    if strip_width < 1 or strip_width % 2 == 0:
        nearest = "1" if strip_width < 1 else f"{strip_width - 1} and {strip_width + 1}"
        raise ValueError(f"strip_width={strip_width} must be odd and positive; nearest that work: {nearest}")


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raises ValueError for a value that is none of the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def check_geometry(
    img_size: tuple[int, int],
    patch_size: int,
    embed_dim: int,
    depths: Sequence[int],
    patch_channels: int,
    strip_width: int,
) -> None:
    """Raises ValueError naming the values that do not fit together and the nearest ones that do."""
    check_strip_width(strip_width)
    check_depths(depths)
    check_img_size(img_size, patch_size)
    if embed_dim < 4 or embed_dim % 4:
        below, above = embed_dim // 4 * 4, (embed_dim // 4 + 1) * 4
        nearest = f"{below} and {above}" if below > 0 else f"{above}"
        raise ValueError(f"embed_dim={embed_dim} must be a multiple of 4; nearest that work: {nearest}")
    half = embed_dim // 2
    if patch_channels != -1 and (patch_channels < 1 or half % patch_channels):
        divisors = [d for d in range(1, half + 1) if half % d == 0]
        below = [d for d in divisors if d < patch_channels][-1:]
        above = [d for d in divisors if d > patch_channels][:1]
        nearest = " and ".join(str(d) for d in below + above)
        raise ValueError(
            f"patch_channels={patch_channels} must divide embed_dim / 2 = {half}; nearest that work: {nearest}; "
            "or -1 for all channels"
        )


# Beginnings of names in the released checkpoints and in ours; the second table is of what follows a block's number.
RELEASED_NAMES = (
    ("merging1.", "merging.0."),
    ("merging2.", "merging.1."),
    ("merging3.", "merging.2."),
    ("conv_s1_28.", "shortcut_2to3."),
    ("conv_s1_14.", "shortcut_2to4."),
    ("conv_s2_14.", "shortcut_3to4."),
    ("head.weight", "head.fc.weight"),
    ("head.bias", "head.fc.bias"),
)
RELEASED_NAMES_IN_BLOCKS = (
    ("token_mixing.dwsc.conv_merge.BN.", "token_mixing.norm."),
    ("token_mixing.dwsc.conv_merge.Conv.", "token_mixing.dwconv."),
    ("token_mixing.smlp_block.mlp.0.", "token_mixing.proj."),
    ("token_mixing.smlp_block.mlp.1.", "token_mixing.proj_norm."),
    ("token_mixing.smlp_block.fuse.", "token_mixing.fuse."),
    ("token_mixing.smlp_block.BN.", "token_mixing.cgsmm.norm."),
    ("token_mixing.smlp_block.proj_", "token_mixing.cgsmm.strip_"),
    ("token_mixing.smlp_block.fuse_", "token_mixing.cgsmm.fuse_"),
    ("token_mixing.smlp_block.relate_pos_h.embeddings_table", "token_mixing.cgsmm.pos_h.table"),
    ("token_mixing.smlp_block.relate_pos_w.embeddings_table", "token_mixing.cgsmm.pos_w.table"),
    ("token_mixing.smlp_block.fc_", "token_mixing.lsmm.conv_"),
    ("token_mixing.smlp_block.reweight.", "token_mixing.lsmm.reweight."),
    ("channel_mixing.conv_77.", "channel_mixing.dwconv."),
    ("channel_mixing.layer_norm.", "channel_mixing.norm."),
    ("channel_mixing.fc", "channel_mixing.mlp.fc"),
    ("channel_mixing.grn.gamma", "channel_mixing.mlp.grn.weight"),
    ("channel_mixing.grn.beta", "channel_mixing.mlp.grn.bias"),
)


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Our state dict for `model` from a released checkpoint's or from our own, of a model for images of whatever size
    (timm's convention).

    Args:
        state_dict: a state dict, bare or under "model"; keys may carry the prefix "module." that
            DistributedDataParallel adds. Keys it does not know are kept, so that loading reports them.
        model: the `StripMLP` to load into; strip weights and position tables are resampled to its image size.

    Returns:
        Names and shapes as `StripMLP.state_dict` has them. A released strip weight (P * L, L, 1, m) becomes
        (P, L, L, m), its bias (P * L) becomes (P, L), GRN's (1, 1, 1, C) becomes (C).
    """
    return model.resample(rename_released(state_dict, model))


def rename_released(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """A released checkpoint's state dict under our names and in our shapes, for images of whatever size."""
    state_dict = plain_weights(state_dict)
    if "merging1.weight" not in state_dict:
        return state_dict

    converted = {}
    for released_name, value in state_dict.items():
        if block := re.match(r"blocks([1-4])\.(\d+)\.", released_name):
            inside = translate(released_name[block.end() :], RELEASED_NAMES_IN_BLOCKS)
            name = f"stages.{int(block[1]) - 1}.{block[2]}.{inside}"
        else:
            name = translate(released_name, RELEASED_NAMES)
        if name.endswith((".strip_h.weight", ".strip_w.weight")):
            value = value.squeeze(2).unflatten(0, (-1, value.shape[1]))
        elif name.endswith((".strip_h.bias", ".strip_w.bias")):
            weight = state_dict.get(released_name.removesuffix("bias") + "weight")
            if weight is not None:  # else loading reports it as missing
                value = value.unflatten(0, (-1, weight.shape[1]))
        elif ".grn." in name:
            value = value.flatten()
        converted[name] = value
    return converted


def released_state_dict(model: StripMLP) -> dict[str, Tensor]:
    """The model's weights as the released code has them: the inverse of `rename_released`. It loads those of the
    released models only; ablations, which lack some of their entries or have others, are not among them."""
    converted = {}
    for our_name, value in model.state_dict().items():
        if block := re.match(r"stages\.(\d)\.(\d+)\.", our_name):
            inside = translate(our_name[block.end() :], RELEASED_NAMES_IN_BLOCKS, back=True)
            name = f"blocks{int(block[1]) + 1}.{block[2]}.{inside}"
        else:
            name = translate(our_name, RELEASED_NAMES, back=True)
        if ".cgsmm.strip_" in our_name:
            value = value.flatten(0, 1)
            value = value[:, :, None] if our_name.endswith("weight") else value
        elif ".grn." in our_name:
            value = value[None, None, None]
        converted[name] = value
    return converted


PAPER = "arXiv:2307.11458"

# No weights to download: the authors publish theirs through a file-sharing site. Load them with checkpoint_filter_fn.
default_cfgs = generate_default_cfgs(
    {
        "strip_mlp_tiny_light": image_cfg(PAPER),
        "strip_mlp_tiny": image_cfg(PAPER),
        "strip_mlp_small": image_cfg(PAPER),
        "strip_mlp_base": image_cfg(PAPER),
        "strip_mlp_pico": image_cfg(PAPER, num_classes=10, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> StripMLP:
    return build_model_with_cfg(
        StripMLP,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(FEATURE_CFG),
        **kwargs,
    )


@register_model
def strip_mlp_tiny_light(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 GMACs, 81.2 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 2, 6, 2), "patch_channels": 2}
    return _create("strip_mlp_tiny_light", pretrained, **{**arguments, **kwargs})


@register_model
def strip_mlp_tiny(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-T: 24.9 M parameters, 3.6 GMACs, 82.2 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 2, 12, 2), "patch_channels": 2}
    return _create("strip_mlp_tiny", pretrained, **{**arguments, **kwargs})


@register_model
def strip_mlp_small(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-S: 42.6 M parameters, 6.8 GMACs, 83.3 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 96, "depths": (2, 2, 18, 2), "patch_channels": 4}
    return _create("strip_mlp_small", pretrained, **{**arguments, **kwargs})


@register_model
def strip_mlp_base(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-B: 57.2 M parameters, 9.2 GMACs, 83.6 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 112, "depths": (2, 2, 18, 2), "patch_channels": 4}
    return _create("strip_mlp_base", pretrained, **{**arguments, **kwargs})


@register_model
def strip_mlp_pico(pretrained: bool = False, **kwargs) -> StripMLP:
    """Not in the paper: under 1 M parameters at 32 x 32, for the digits data set, tests and first steps."""
    arguments = {"img_size": 32, "embed_dim": 24, "depths": (1, 1, 2, 1), "patch_channels": 2}
    return _create("strip_mlp_pico", pretrained, **{**arguments, **kwargs})
