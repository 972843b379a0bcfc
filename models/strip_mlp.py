"""Strip-MLP: Efficient Token Interaction for Vision MLP (Cao et al., ICCV 2023), https://arxiv.org/abs/2307.11458

Read it top to bottom, beside the paper: the strip MLP layer, the cascade group strip mixing module (CGSMM), the local
strip mixing module (LSMM), the strip mixing block that runs each on half of the channels, channel mixing with global
response normalisation (GRN), the block, and the network of four stages with its multi-scale shortcuts. How the layers
are computed on CPUs and GPUs is in `ops.py`.

Feature maps are (N, C, H, W). Each module of a strip mixing block has C' = C / 2 channels. A patch is a group of q of
them, so there are P = C' / q patches. m is the strip width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.layers import ClassifierHead, Mlp, trunc_normal_
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from . import chains, ops
from .backbone import Backbone, check_choice, check_divides, check_multiple, check_odd, merge, reparameterized
from .resample import MapSized


@dataclass(frozen=True)
class StripMixingOptions:
    """How tokens are mixed: what the paper's tables 6 to 9 vary. The defaults are those of the released T* and T.

    Attributes:
        patch_channels: q, the channels of a patch (table 7). The released S and B have 4. -1 stands for all C': one
            patch in every stage, the paper's P = 1, "without the group strip layer".
        strip_width: m, odd (table 6).
        cgsmm_structure: "cascade" or "parallel" (table 8); see `CGSMM`.
        branches: "both", or "cgsmm" or "lsmm" alone (table 9); see `StripMixingBlock`.
        position_tables: whether CGSMM adds its relative position tables.

    Raises:
        ValueError: a value that is not accepted.
    """

    patch_channels: int = 2
    strip_width: int = 3
    cgsmm_structure: str = "cascade"
    branches: str = "both"
    position_tables: bool = True

    def __post_init__(self) -> None:
        check_odd("strip_width", self.strip_width)
        check_choice("cgsmm_structure", self.cgsmm_structure, ("cascade", "parallel"))
        check_choice("branches", self.branches, ("both", "cgsmm", "lsmm"))

    def q(self, dim: int) -> int:
        """Channels of a patch where C' is `dim`; a ValueError if they do not divide."""
        if self.patch_channels == -1:
            return dim
        check_divides("patch_channels", self.patch_channels, "embed_dim / 2", dim, or_else="-1 for all channels")
        return self.patch_channels


class StripMLPLayer(MapSized):
    """Strip MLP layer along one axis: a token takes from all tokens of its row (or column) and of the (m - 1) / 2
    neighbouring ones on each side. The equation is in `mix_strips`.

    Args:
        dim: channels C'.
        length: tokens along the mixed axis, L: W for "row", H for "column".
        axis: "row" or "column".
        q: channels of a patch, which share weights; divides `dim`.
        m: strip width, odd.

    Shape: (N, C', H, W) -> (N, C', H, W).
    """

    # The strip width is counted in tokens at any size of the map: neighbouring rows stay the neighbouring ones.
    map_axes: ClassVar = {"weight": {1: "output", 2: "input"}, "bias": {1: "output"}}

    def __init__(self, dim: int, length: int, axis: str, q: int, m: int):
        super().__init__()
        check_choice("axis", axis, ("row", "column"))
        self.axis, self.q = axis, q
        self.weight = nn.Parameter(torch.empty(dim // q, length, length, m))  # (P, L, L, m)
        self.bias = nn.Parameter(torch.empty(dim // q, length))
        bound = 1 / math.sqrt(length * m)  # PyTorch's default for a convolution: the fan-in is L m
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mix_strips(x, self.weight, self.bias, self.axis, self.q)

    def extra_repr(self) -> str:
        patches, length, _, m = self.weight.shape
        return f"axis={self.axis}, length={length}, patches={patches}, q={self.q}, m={m}"


class RelativePosition(MapSized):
    """Adds pos[c, i, j] = table[(j - i) + r, c] at row i and column j. Differences beyond -r to r, which only maps that
    are not square have, are clipped.

    Shape: (N, C', H, W) -> (N, C', H, W), (H, W) the `size`; `radius` says which of them, "height" or "width", r is.
    """

    map_axes: ClassVar = {"table": {0: "offset"}}

    def __init__(self, dim: int, size: tuple[int, int], radius: str):
        super().__init__()
        check_choice("radius", radius, ("height", "width"))
        self.radius, self.size = radius, size
        self.table = nn.Parameter(torch.empty(self.map_length(size), dim))  # (2 r + 1, C')
        trunc_normal_(self.table, std=0.02)

    def map_length(self, size: tuple[int, int]) -> int:
        return 2 * size[("height", "width").index(self.radius)] + 1

    def set_map_size(self, size: tuple[int, int]) -> None:
        super().set_map_size(size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return ops.add_positions(x, self.table, self.size, self.map_length(self.size) // 2)


class CGSMM(nn.Module):
    """Cascade group strip mixing module (paper figure 2b, tables 7 and 8): strips along rows, then along columns of the
    result, each fused with the module's input.

        z = GELU(BN(fuse_h([strip_h(u + pos_h), u])))
        cascade:   y = fuse_w([u, strip_w(z + pos_w)])
        parallel:  y = fuse_w([z, strip_w(u + pos_w)])

    The paper does not say how its parallel module is wired. Here both strips read the module's input, so neither
    depends on the other. z takes u's place in the last fusion, so that the rows still reach the output. Layers,
    parameters and multiply-adds are those of the cascade.

    Shape: (N, C', H, W) -> (N, C', H, W), (H, W) the `size`.
    """

    def __init__(self, dim: int, size: tuple[int, int], options: StripMixingOptions):
        super().__init__()
        height, width = size
        q, m, tables = options.q(dim), options.strip_width, options.position_tables
        self.structure = options.cgsmm_structure
        self.pos_h = RelativePosition(dim, size, radius="height") if tables else nn.Identity()
        self.strip_h = StripMLPLayer(dim, width, "row", q, m)
        self.fuse_h = ops.PointwiseConv(2 * dim, dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.pos_w = RelativePosition(dim, size, radius="width") if tables else nn.Identity()
        self.strip_w = StripMLPLayer(dim, height, "column", q, m)
        self.fuse_w = ops.PointwiseConv(2 * dim, dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        rows = self.strip_h(self.pos_h(u))
        z = chains.pointwise_norm_gelu(torch.cat([rows, u], dim=1), self.fuse_h, self.norm, self.act)  # 2 C' -> C'
        first, second = (u, z) if self.structure == "cascade" else (z, u)
        columns = self.strip_w(self.pos_w(second))
        return self.fuse_w(torch.cat([first, columns], dim=1))  # 2 C' -> C'


class LSMM(nn.Module):
    """Local strip mixing module (paper figure 2b, table 9): two depthwise strips and the identity, weighted per image
    and channel by a softmax over the three.

        a = DWConv3x7(v);  b = DWConv7x3(v)
        w = softmax(reweight(mean over H, W of (a + b + v)))
        y = w_0 * b + w_1 * a + w_2 * v

    Shape: (N, C', H, W) -> (N, C', H, W), C' even.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv_h = ops.DepthwiseConv(dim, kernel_size=(3, 7))
        self.conv_w = ops.DepthwiseConv(dim, kernel_size=(7, 3))
        self.reweight = Mlp(dim, dim // 2, 3 * dim, act_layer=nn.GELU, use_conv=True)

    def forward(self, v: Tensor) -> Tensor:
        a = self.conv_h(v)
        b = self.conv_w(v)
        g = ops.map_mean(a) + ops.map_mean(b) + ops.map_mean(v)  # (N, C', 1, 1)
        w = ops.softmax_branches(self.reweight(g), 3, v.dtype)  # (3, N, C', 1, 1)
        return torch.addcmul(torch.addcmul(w[0] * b, w[1], a), w[2], v)


class StripMixingBlock(nn.Module):
    """Token mixing (paper figure 2b): a depthwise convolution and a projection, then CGSMM on one half of the channels
    and LSMM on the other.

        y = DWConv3x3(GELU(BN(x)))
        u, v = the halves of GELU(BN(proj(y)))
        out = fuse([CGSMM(u), LSMM(v)])

    The paper does not say what replaces a branch that is taken away (table 9). Here its half passes unchanged, so that
    the other branch and the fusion keep their widths.

    Shape: (N, C, H, W) -> (N, C, H, W), C a multiple of 4, (H, W) the `size`.
    """

    def __init__(self, dim: int, size: tuple[int, int], options: StripMixingOptions):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.dwconv = ops.DepthwiseConv(dim, kernel_size=3)
        self.proj = ops.PointwiseConv(dim, dim)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.cgsmm = CGSMM(dim // 2, size, options) if options.branches != "lsmm" else nn.Identity()
        self.lsmm = LSMM(dim // 2) if options.branches != "cgsmm" else nn.Identity()
        self.fuse = ops.PointwiseConv(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = chains.norm_gelu_depthwise(x, self.norm, self.act, self.dwconv)
        y = chains.pointwise_norm_gelu(y, self.proj, self.proj_norm, self.act)
        halves = y.chunk(2, dim=1)  # twice (N, C', H, W)
        return self.fuse(torch.cat([self.cgsmm(halves[0]), self.lsmm(halves[1])], dim=1))


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2) as a scale, `ops.grn_scale`: GRN(x) = scale * x + bias.

    Shape: (N, C, H, W) -> (N, C, 1, 1).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.grn_scale(x, self.weight)


class ChannelMlp(nn.Module):
    """fc2(GRN(GELU(fc1(x)))), or without GRN. Shape: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, dim: int, hidden: int, grn: bool):
        super().__init__()
        self.fc1 = ops.PointwiseConvLinear(dim, hidden)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(hidden) if grn else None
        self.fc2 = ops.PointwiseConvLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return chains.mlp(x, self.fc1, self.act, self.grn, self.fc2)  # C -> alpha C -> C


class ChannelMixingBlock(nn.Module):
    """Channel mixing (paper figure 2c): DWConv7x7, LayerNorm over channels, and an MLP with GRN.

    Shape: (N, C, H, W) -> (N, C, H, W), with alpha C channels inside the MLP.
    """

    def __init__(self, dim: int, alpha: float, grn: bool):
        super().__init__()
        self.dwconv = ops.DepthwiseConv(dim, kernel_size=7)
        self.norm = ops.LayerNorm2d(dim)
        self.mlp = ChannelMlp(dim, int(alpha * dim), grn)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(self.dwconv(x)))


class StripMLPBlock(nn.Module):
    """One block (paper figure 2a): token mixing and channel mixing, both residual, with stochastic depth.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(
        self, dim: int, size: tuple[int, int], options: StripMixingOptions, alpha: float, grn: bool, drop_path: float
    ):
        super().__init__()
        self.token_mixing = StripMixingBlock(dim, size, options)
        self.channel_mixing = ChannelMixingBlock(dim, alpha, grn)
        self.drop_path = ops.DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))

    def reparameterize(self) -> None:
        """Replaces token mixing by its cheaper form for inference, see `reparameterize.py` (timm's convention)."""
        self.token_mixing = reparameterized(self.token_mixing)


class StripMLP(Backbone):
    """The network (paper figure 2a): four stages of `StripMLPBlock`s at strides p, 2p, 4p and 8p, and the multi-scale
    shortcuts, which carry the merged outputs of stages 1 and 2 to the inputs of stages 3 and 4.

    Args:
        img_size: pixels, or (height, width); multiples of 8 * patch_size. The strip weights depend on it, so the input
            must have this size.
        patch_size: p, pixels per token side.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        embed_dim: C of stage 1, doubled by each later stage. A multiple of 4.
        depths: blocks in each of the four stages.
        alpha: hidden width of channel mixing as a multiple of C.
        multi_scale_shortcuts: without them, a stage's input is the merged output of the one before.
        grn: whether channel mixing has GRN.
        drop_path_rate: stochastic depth, the same in every block as in the released models.
        drop_rate: dropout before the classifier; 0 in the released models.
        global_pool: "avg", or "" for none (timm's convention).
        **token_mixing: the fields of `StripMixingOptions`.

    Raises:
        ValueError: sizes that do not divide, with the nearest ones that do; an option that is not accepted.

    Shape: (N, in_chans, *img_size) -> (N, num_classes).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 2, 6, 2),
        alpha: float = 3,
        multi_scale_shortcuts: bool = True,
        grn: bool = True,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **token_mixing,
    ):
        super().__init__(img_size, patch_size, embed_dim, num_classes)
        options = StripMixingOptions(**token_mixing)
        check_multiple("embed_dim", embed_dim, "4", 4)
        options.q(embed_dim // 2)
        c1, c2, c3, c4 = self.widths

        def block(dim: int, size: tuple[int, int]) -> StripMLPBlock:
            return StripMLPBlock(dim, size, options, alpha, grn, drop_path_rate)

        self.patch_embed = nn.Conv2d(in_chans, c1, kernel_size=patch_size, stride=patch_size, bias=False)
        self.stages = self.build_stages(depths, block)
        self.merging = nn.ModuleList([merge(c1, c2), merge(c2, c3), merge(c3, c4)])
        self.multi_scale_shortcuts = multi_scale_shortcuts
        if multi_scale_shortcuts:
            self.shortcut_2to3 = merge(c2, c3, groups=c2)
            self.shortcut_2to4 = merge(c3, c4, groups=c3)
            self.shortcut_3to4 = merge(c3, c4, groups=c3)
        self.norm = nn.BatchNorm2d(c4)
        self.head = ClassifierHead(c4, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward_stages(self, x: Tensor, last: int = 3) -> list[Tensor]:
        shortcuts = self.multi_scale_shortcuts
        x1 = self.patch_embed(x).contiguous(memory_format=torch.channels_last)  # (N, C, H, W), as all maps from here on
        y1 = self.run_stage(0, x1)
        if last == 0:
            return [y1]
        m2 = self.merging[0](y1)  # (N, 2C, H / 2, W / 2)
        a = self.shortcut_2to3(m2) if shortcuts and last > 1 else None  # (N, 4C, H / 4, W / 4)
        y2 = self.run_stage(1, m2)
        if last == 1:
            return [y1, y2]
        m3 = self.merging[1](y2)  # (N, 4C, H / 4, W / 4)
        b = self.shortcut_2to4(a) + self.shortcut_3to4(m3) if shortcuts and last > 2 else None  # (N, 8C, H / 8, W / 8)
        y3 = self.run_stage(2, m3 + a if shortcuts else m3)
        if last == 2:
            return [y1, y2, y3]
        m4 = self.merging[2](y3)  # (N, 8C, H / 8, W / 8)
        y4 = self.run_stage(3, m4 + b if shortcuts else m4)
        return [y1, y2, y3, y4]

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        take = super().prune_intermediate_layers(*args, **kwargs)
        for name, stages in (("shortcut_2to3", 3), ("shortcut_2to4", 4), ("shortcut_3to4", 4)):
            if self.multi_scale_shortcuts and len(self.stages) < stages:
                setattr(self, name, None)
        return take

    def group_matcher(self, coarse: bool = False) -> dict:
        groups = super().group_matcher(coarse)
        # A shortcut is as deep as the merging into the stage that it leads to.
        groups["blocks"] += [
            (r"^shortcut_2to3", (1, *MATCH_PREV_GROUP)),
            (r"^shortcut_[23]to4", (2, *MATCH_PREV_GROUP)),
        ]
        return groups

    def reparameterize(self) -> "StripMLP":
        """Folds what inference does not need apart, in place, and switches to evaluation mode. The outputs stay the
        same up to rounding; the model can no longer be trained. `timm.utils.reparameterize_model` does it to a copy."""
        for stage in self.stages:
            for block in stage:
                block.reparameterize()
        return self.eval()

    def weight_decay_vectors(self) -> set[str]:
        """Vectors that the released recipe decays all the same: GRN's scale and shift. The released code stores them as
        (1, 1, 1, C), so it does not take them for vectors."""
        return {f"{name}.{p}" for name, _ in self.named_modules() if name.endswith(".grn") for p in ("weight", "bias")}
