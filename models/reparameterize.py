"""Strip mixing for inference: what is linear and follows another linear map is folded into it, one function per fold.

`StripMLP.reparameterize` and `timm.utils.reparameterize_model` put `FoldedStripMixing` in place of every
`StripMixingBlock`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import chains
from .backbone import reparameterized
from .ops import PointwiseConv
from .resample import MapSized
from .strip_mlp import CGSMM, StripMixingBlock


@reparameterized.register
@torch.no_grad()
def _(block: StripMixingBlock) -> nn.Module:
    return FoldedStripMixing(copy.deepcopy(block).eval())


def fold_fusion(outer: PointwiseConv, inner: PointwiseConv) -> PointwiseConv:
    """outer([inner(a), b]) as one convolution of [a, b], without biases."""
    middle = inner.out_channels
    weight = outer.weight.flatten(1)  # (C_out, middle + channels of b)
    weight = torch.cat([weight[:, :middle] @ inner.weight.flatten(1), weight[:, middle:]], dim=1)
    folded = PointwiseConv(weight.shape[1], weight.shape[0], bias=False).to(weight)
    folded.weight.copy_(weight[:, :, None, None])
    return folded


def fold_rows(cgsmm: CGSMM, fuse: PointwiseConv, nothing: Tensor) -> nn.Parameter:
    """What `fuse` gives for a u of zeros, (C', H, W): the position table and the biases of the rows and of `fuse`,
    which every image gets alike."""
    rows = cgsmm.strip_h(cgsmm.pos_h(nothing))
    # Without an axis for images: of a single image, inductor would write the sum into a frozen (1, C', H, W)
    # (findings/inductor_writes_into_frozen_weights.sh).
    return nn.Parameter(fuse(torch.cat([rows, nothing], dim=1))[0])


def fold_columns(cgsmm: CGSMM, fuse_all: PointwiseConv, nothing: Tensor) -> nn.Parameter:
    """The same of the columns, after the block's fusion: (C, H, W)."""
    columns = cgsmm.strip_w(cgsmm.pos_w(nothing))
    return nn.Parameter(fuse_all(torch.cat([nothing, columns, nothing], dim=1))[0])


class FoldedStripMixing(MapSized):
    """A `StripMixingBlock` in evaluation mode with fewer operations:

    - both BatchNorms that follow a convolution are folded into it;
    - position tables and the biases of the strips become two maps that are added after the fusions;
    - CGSMM's last fusion and the block's become one.

    Args:
        block: in evaluation mode; its modules are taken over and changed.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, block: StripMixingBlock):
        super().__init__()
        self.norm, self.dwconv, self.act, self.lsmm = block.norm, block.dwconv, block.act, block.lsmm
        self.proj = fuse_conv_bn_eval(block.proj, block.proj_norm)
        cgsmm, self.fuse_all = block.cgsmm, block.fuse
        self.cgsmm = isinstance(cgsmm, CGSMM)
        if not self.cgsmm:
            return
        self.structure = cgsmm.structure
        self.strip_h, self.strip_w = cgsmm.strip_h, cgsmm.strip_w
        self.fuse_h = fuse_conv_bn_eval(cgsmm.fuse_h, cgsmm.norm)
        self.fuse_all = fold_fusion(block.fuse, cgsmm.fuse_w)
        height, width = self.strip_w.bias.shape[1], self.strip_h.bias.shape[1]
        nothing = block.fuse.weight.new_zeros(1, cgsmm.fuse_h.out_channels, height, width)
        nothing = nothing.contiguous(memory_format=torch.channels_last)
        self.map_h = fold_rows(cgsmm, self.fuse_h, nothing)
        self.map_all = fold_columns(cgsmm, self.fuse_all, nothing)
        self.fuse_h.bias = None
        nn.init.zeros_(self.strip_h.bias)
        nn.init.zeros_(self.strip_w.bias)

    def set_map_size(self, size: tuple[int, int]) -> None:
        raise ValueError("the model was reparameterized, which is for one size; call set_input_size before that")

    def forward(self, x: Tensor) -> Tensor:
        x = chains.norm_gelu_depthwise(x, self.norm, self.act, self.dwconv)
        x = chains.pointwise_act(x, self.proj, self.act)
        halves = x.chunk(2, dim=1)
        u, v = halves[0], halves[1]
        if not self.cgsmm:
            return self.fuse_all(torch.cat([u, self.lsmm(v)], dim=1))
        z = self.act(self.fuse_h(torch.cat([self.strip_h(u), u], dim=1)) + self.map_h.to(u.dtype))
        first, second = (u, z) if self.structure == "cascade" else (z, u)
        y = self.fuse_all(torch.cat([first, self.strip_w(second), self.lsmm(v)], dim=1))
        return y + self.map_all.to(y.dtype)
