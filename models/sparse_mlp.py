"""Sparse MLP for Image Recognition: Is Self-Attention Really Necessary? (Tang et al., AAAI 2022),
https://arxiv.org/abs/2109.05422

The baseline that the Strip-MLP paper compares with most (its tables 1 and 2). The network has Strip-MLP's skeleton
without the multi-scale shortcuts; its tokens interact along their row and their column with weights that all rows
(columns) and all channels share. Feature maps are (N, C, H, W).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from timm.layers import ClassifierHead, Mlp
from torch import Tensor, nn

from .backbone import Backbone, growing_rates, merge
from .ops import DepthwiseConv, DropPath
from .resample import MapSized


class TokenLinear(MapSized, nn.Linear):
    """Linear layer over the tokens of a row or of a column.

    Args:
        axis: "row" or "column".
        size: (H, W) of the map.

    Shape: (..., L) -> (..., L), with W for L in a row, H in a column.
    """

    map_axes: ClassVar = {"weight": {0: "output", 1: "input"}, "bias": {0: "output"}}

    def __init__(self, axis: str, size: tuple[int, int]):
        self.axis = axis
        length = self.map_length(size)
        super().__init__(length, length)

    def set_map_size(self, size: tuple[int, int]) -> None:
        super().set_map_size(size)
        self.in_features = self.out_features = self.map_length(size)


class TokenMixing(nn.Module):
    """Token mixing (paper section 3.2, "sMLP block"), after a depthwise convolution:

        y = GELU(BN(DWConv3x3(GELU(BN(x)))))
        out = proj([y, mix_w(y), mix_h(y)])

    where mix_w is a linear layer over each row and mix_h one over each column.

    Args:
        dim: channels C.
        size: (H, W) of the map.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, size: tuple[int, int]):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.dwconv = DepthwiseConv(dim, kernel_size=3)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.mix_w = TokenLinear("row", size)
        self.mix_h = TokenLinear("column", size)
        # Not "fuse", the paper's word, which timm's reparameterize_model takes for a method.
        self.proj = nn.Conv2d(3 * dim, dim, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.act(self.norm1(x)))
        x = self.act(self.norm2(x))
        columns = self.mix_h(x.transpose(2, 3)).transpose(2, 3)
        return self.proj(torch.cat([x, self.mix_w(x), columns], dim=1))


class ChannelMixing(nn.Module):
    """Channel mixing: LayerNorm over channels and an MLP.

    Args:
        dim: channels C.
        alpha: hidden width of the MLP as a multiple of C.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, alpha: float = 3):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(alpha * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (N, H, W, C) inside


class SparseMLPBlock(nn.Module):
    """Token mixing and channel mixing, both residual.

    Args:
        dim: channels C.
        size: (H, W) of the map.
        alpha: hidden width of the channel mixing as a multiple of C.
        drop_path: probability of dropping a residual branch (stochastic depth) per sample.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, size: tuple[int, int], alpha: float = 3, drop_path: float = 0.0):
        super().__init__()
        self.token_mixing = TokenMixing(dim, size)
        self.channel_mixing = ChannelMixing(dim, alpha)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))


class SparseMLP(Backbone):
    """sMLPNet: four stages of `SparseMLPBlock`s at strides p, 2p, 4p and 8p.

    Args:
        img_size: input height and width in pixels; the mixing weights depend on it, so the input must have it.
            A multiple of 8 * patch_size.
        patch_size: p, pixels per token side.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        embed_dim: C, channels of stage 1, doubled by each later stage.
        depths: blocks in each of the four stages.
        alpha: expansion of the channel-mixing MLP.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        drop_rate: dropout before the classifier.
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
        depths: Sequence[int] = (2, 8, 14, 2),
        alpha: float = 3,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(img_size, patch_size, embed_dim, num_classes)
        rates = growing_rates(drop_path_rate, depths)

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.stages = self.build_stages(depths, lambda dim, size: SparseMLPBlock(dim, size, alpha, next(rates)))
        self.merging = nn.ModuleList(merge(c_in, c_out) for c_in, c_out in pairwise(self.widths))
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
