"""Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition (Hou et al., 2021),
https://arxiv.org/abs/2106.12368

A peer of Strip-MLP. Read it beside the paper: the linear layer over the tokens of a column (row) and the channels of a
segment, the "weighted permute-MLP" of two of them and a linear layer over channels, and the network. Feature maps are
(N, C, H, W).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from torch import Tensor, nn

from . import ops
from .backbone import Backbone, by_stage, check_multiple, growing_rates, stack_blocks
from .branches import BranchBlock, Reweight, StridedConv, init_truncated_normal
from .resample import MapSized


class SegmentLinear(MapSized):
    """A linear layer over all tokens of a column (row) and all channels of a segment. All columns (rows) and all
    segments share it.

        column: y[n, s S + d, v, w] = sum over c, h of weight[v, d, h, c] x[n, s S + c, h, w]
        row:    the same along the width

    The paper's linear layer is C x C. The map must then have as many rows and columns as there are segments, g: with H
    = g, a column of H tokens of S = C / g channels has C numbers. Here the weight has a side of H S, which is C there,
    and other maps are possible.

    Args:
        axis: "row" or "column".
        size: (H, W) of the map.
        channels: S, of a segment.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    map_axes: ClassVar = {"weight": {0: "output", 2: "input"}}

    def __init__(self, axis: str, size: tuple[int, int], channels: int):
        super().__init__()
        self.axis, self.channels = axis, channels
        length = self.map_length(size)
        self.weight = nn.Parameter(torch.empty(length, channels, length, channels))  # (L, S, L, S)
        init_truncated_normal(self, (SegmentLinear,))

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 1, 3, 4, 2) if self.axis == "row" else (0, 1, 4, 3, 2)
        back = (0, 1, 4, 2, 3) if self.axis == "row" else (0, 1, 4, 3, 2)
        x = x.unflatten(1, (-1, self.channels)).permute(order)  # (N, g, A, L, S), A the other axis
        y = F.linear(x.flatten(3), self.weight.flatten(2).flatten(0, 1))
        return y.unflatten(3, (-1, self.channels)).permute(back).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, length={self.weight.shape[0]}, channels={self.channels}"


class PermuteMlp(nn.Module):
    """Token mixing, the "weighted permute-MLP":

        y = proj(reweight(mlp_h(x), mlp_w(x), mlp_c(x)))

    where mlp_h mixes columns, mlp_w rows, and mlp_c channels. None of the three has a bias.

    Args:
        dim: channels C, a multiple of 4 and of `segments`.
        size: (H, W) of the map.
        segments: g.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, size: tuple[int, int], segments: int):
        super().__init__()
        check_multiple("widths", dim, "segments", segments)
        self.mlp_h = SegmentLinear("column", size, dim // segments)
        self.mlp_w = SegmentLinear("row", size, dim // segments)
        self.mlp_c = ops.PointwiseConvLinear(dim, dim, bias=False)
        self.reweight = Reweight(dim, ops.PointwiseConvLinear)
        self.proj = ops.PointwiseConvLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.reweight(self.mlp_h(x), self.mlp_w(x), self.mlp_c(x)))


class VisionPermutator(Backbone):
    """The network: four stages of blocks. They keep the tokens of the embedding, or nearly so: a transition halves
    height and width (2 x 2), changes the width alone (1 x 1), or is not there.

    Args:
        img_size: pixels, or (height, width); multiples of the last stage's patch size. The input must have this size.
        patch_size: p, pixels per token side of the first stage.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        widths: C of each stage, multiples of 4 and of its segments.
        depths: blocks in each of the four stages.
        segments: g of each stage; in the paper the rows, and the columns, of its map.
        strides: of the three transitions, 1 or 2.
        mlp_ratio: hidden width of the MLP over channels as a multiple of C.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        drop_rate: dropout before the classifier.
        global_pool: "avg", or "" for none (timm's convention).

    Raises:
        ValueError: sizes that do not divide, with the nearest that do; widths or depths that are not four.

    Shape: (N, in_chans, *img_size) -> (N, num_classes).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (384, 384, 384, 384),
        depths: Sequence[int] = (4, 3, 8, 3),
        segments: Sequence[int] = (16, 16, 16, 16),
        strides: Sequence[int] = (1, 1, 1),
        mlp_ratio: float = 3,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        if len(strides) != 3:
            raise ValueError(f"strides={tuple(strides)} must be three numbers, one per transition")
        segments = by_stage("segments", segments)
        super().__init__(img_size, list(accumulate(strides, mul, initial=patch_size)), widths, num_classes)
        rates = growing_rates(drop_path_rate, depths)

        def block(stage: int, _: int) -> BranchBlock:
            mixing = PermuteMlp(widths[stage], self.map_size(stage), segments[stage])
            return BranchBlock(widths[stage], mixing, mlp_ratio, ops.LayerNorm2d, ops.PointwiseConvLinear, next(rates))

        def transition(dim: int, out_dim: int, stride: int) -> nn.Module:
            return nn.Identity() if dim == out_dim and stride == 1 else StridedConv(dim, out_dim, stride, stride)

        self.patch_embed = StridedConv(in_chans, widths[0], patch_size, patch_size)
        self.stages = stack_blocks(depths, block)
        self.merging = nn.ModuleList(transition(*pair, s) for pair, s in zip(pairwise(widths), strides, strict=True))
        self.norm = ops.LayerNorm2d(widths[-1])
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        init_truncated_normal(self, (nn.Linear,))
