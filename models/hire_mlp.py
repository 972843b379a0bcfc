"""Hire-MLP: Vision MLP via Hierarchical Rearrangement (Guo et al., CVPR 2022), https://arxiv.org/abs/2108.13341

A peer of Strip-MLP. Read it beside the paper: rearranging the tokens of regions into channels, after a cyclic shift
that lets regions communicate; the MLP over a region; the Hire module; and the network of four stages. Feature maps are
(N, C, H, W). No layer knows the size of the map, so images may have any.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn
from torch.fx import wrap

from . import ops
from .backbone import Backbone, by_stage, check_choice, growing_rates, stack_blocks
from .branches import BranchBlock, Reweight, init_truncated_normal, overlapping_embed, overlapping_merge

HEIGHT, WIDTH = 2, 3  # dimensions of (N, C, H, W)


def cyclic(x: Tensor, dim: int, first: int, length: int) -> Tensor:
    """`length` entries of x along a dimension from number `first` on. The last one is followed by the first."""
    pieces, end = [], first + length
    while first < end:
        start = first % x.shape[dim]
        count = min(x.shape[dim] - start, end - first)
        pieces.append(x.narrow(dim, start, count))
        first += count
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]


@wrap
def to_regions(x: Tensor, dim: int, p: int, shift: int) -> Tensor:
    """Cross-region and inner-region rearrangement: a cyclic shift by `shift` tokens along a dimension, and then each p
    tokens along it, a region, are one token of p C channels. Where the regions do not divide the map, it goes on with
    its first tokens.

        column: y[n, c p + k, r, w] = x[n, c, (r p + k - shift) mod H, w]

    Shape: (N, C, H, W) -> (N, p C, ceil(H / p), W) for `dim` HEIGHT; the same with the width for WIDTH.
    """
    regions = -(-x.shape[dim] // p)
    x = cyclic(x, dim, -shift, regions * p).unflatten(dim, (regions, p))
    return x.movedim(dim + 1, 2).flatten(1, 2)  # the token in its region behind the channel


@wrap
def from_regions(y: Tensor, dim: int, p: int, shift: int, length: int) -> Tensor:
    """Restores what `to_regions` rearranged, to a map of `length` tokens along the dimension."""
    y = y.unflatten(1, (-1, p)).movedim(2, dim + 1).flatten(dim, dim + 1)
    return cyclic(y.narrow(dim, 0, length), dim, shift, length)


class RegionMlp(nn.Module):
    """One branch of the Hire module: fc2(ReLU(BN(fc1(x)))) over the channels of the p tokens of a region.

    Args:
        dim: channels C, even.
        axis: "row" or "column", along which regions are p tokens long.
        p: tokens of a region.
        shift: tokens by which the map is shifted before.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, axis: str, p: int, shift: int):
        super().__init__()
        check_choice("axis", axis, ("row", "column"))
        self.dim, self.p, self.shift = HEIGHT if axis == "column" else WIDTH, p, shift
        self.fc1 = ops.PointwiseConv(p * dim, dim // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim // 2)
        self.act = nn.ReLU()
        self.fc2 = ops.PointwiseConv(dim // 2, p * dim)

    def forward(self, x: Tensor) -> Tensor:
        y = to_regions(x, self.dim, self.p, self.shift)  # (N, p C, H / p, W)
        y = self.fc2(self.act(self.norm(self.fc1(y))))  # p C -> C / 2 -> p C
        return from_regions(y, self.dim, self.p, self.shift, x.shape[self.dim])


class HireMixing(nn.Module):
    """Token mixing, the Hire module:

        y = proj(reweight(mlp_h(x), mlp_w(x), mlp_c(x)))

    where mlp_h mixes regions of columns, mlp_w regions of rows, and mlp_c, a linear layer, channels.

    Shape: (N, C, H, W) -> (N, C, H, W), C a multiple of 4.
    """

    def __init__(self, dim: int, p: int, shift: int):
        super().__init__()
        self.mlp_h = RegionMlp(dim, "column", p, shift)
        self.mlp_w = RegionMlp(dim, "row", p, shift)
        self.mlp_c = ops.PointwiseConv(dim, dim)
        self.reweight = Reweight(dim, ops.PointwiseConv)
        self.proj = ops.PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.reweight(self.mlp_h(x), self.mlp_w(x), self.mlp_c(x)))


class HireMLP(Backbone):
    """The network: four stages of blocks at strides 4, 8, 16 and 32. Block b of a stage shifts by (b mod t) e tokens.

    Args:
        img_size: nothing depends on it. It is accepted so that all networks here can be made alike.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        widths: C of each stage, multiples of 4.
        depths: blocks in each of the four stages.
        regions: p, tokens of a region, by stage.
        shift_periods: t, by stage.
        shift_steps: e, by stage.
        mlp_ratio: hidden width of the MLP over channels as a multiple of C.
        patch_size: pixels per token side of the first stage.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        drop_rate: dropout before the classifier.
        global_pool: "avg", or "" for none (timm's convention).

    Raises:
        ValueError: widths or depths that are not four.

    Shape: (N, in_chans, H, W) -> (N, num_classes).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 4, 2),
        regions: Sequence[int] = (4, 3, 3, 2),
        shift_periods: Sequence[int] = (2, 2, 3, 2),
        shift_steps: Sequence[int] = (2, 2, 1, 1),
        mlp_ratio: float = 4,
        patch_size: int = 4,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(None, patch_size, widths, num_classes)
        regions = by_stage("regions", regions)
        shift_periods, shift_steps = by_stage("shift_periods", shift_periods), by_stage("shift_steps", shift_steps)
        rates = growing_rates(drop_path_rate, depths)
        after = {"norm": nn.BatchNorm2d, "act": nn.ReLU}

        def block(stage: int, number: int) -> BranchBlock:
            shift = number % shift_periods[stage] * shift_steps[stage]
            mixing = HireMixing(widths[stage], regions[stage], shift)
            return BranchBlock(widths[stage], mixing, mlp_ratio, nn.BatchNorm2d, ops.PointwiseConv, next(rates))

        self.patch_embed = overlapping_embed(in_chans, widths[0], patch_size, **after)
        self.stages = stack_blocks(depths, block)
        self.merging = nn.ModuleList(overlapping_merge(a, b, **after) for a, b in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        init_truncated_normal(self, (nn.Linear, nn.Conv2d))
