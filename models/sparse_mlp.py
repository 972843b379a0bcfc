"""Sparse MLP for Image Recognition: Is Self-Attention Really Necessary? (Tang et al., AAAI 2022),
https://arxiv.org/abs/2109.05422

The baseline that the Strip-MLP paper compares with most (its tables 1 and 2). The network has Strip-MLP's skeleton
without the multi-scale shortcuts; its tokens interact along their row and their column with weights that all rows
(columns) and all channels share. Feature maps are (N, C, H, W).
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from timm.layers import ClassifierHead, DropPath, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

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

__all__ = ["SparseMLP", "SparseMLPBlock", "TokenMixing", "checkpoint_filter_fn"]


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

    def map_length(self, size: tuple[int, int]) -> int:
        return size[1] if self.axis == "row" else size[0]

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
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
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
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_depths(depths)
        check_img_size(img_size, patch_size)

        self.img_size = img_size
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 8 * embed_dim
        self.feature_info = describe_stages(embed_dim, patch_size)
        widths = [info["num_chs"] for info in self.feature_info]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), dtype=torch.float64, device="cpu").tolist())

        self.patch_embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.stages = build_stages(
            self.feature_info,
            depths,
            img_size,
            lambda dim, size: SparseMLPBlock(dim, size, alpha, next(rates)),
        )
        self.merging = nn.ModuleList(merge(c_in, c_out) for c_in, c_out in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)


# Beginnings of names in the released checkpoints, whose numbers of blocks are left out, and in ours, whose stages are;
# "proh_w" is theirs.
RELEASED_NAMES = (
    ("to_patch_embedding.0.0.", "patch_embed."),
    ("to_patch_embedding.1.0.", "merging.0."),
    ("to_patch_embedding.2.0.", "merging.1."),
    ("to_patch_embedding.3.0.", "merging.2."),
    ("batch_norm.", "norm."),
    ("mlp_head.0.", "head.fc."),
    ("token_mix.0.conv_merge.BN.", "token_mixing.norm1."),
    ("token_mix.0.conv_merge.Conv.", "token_mixing.dwconv."),
    ("token_mix.1.BN.", "token_mixing.norm2."),
    ("token_mix.1.proj_h.", "token_mixing.mix_w."),
    ("token_mix.1.proh_w.", "token_mixing.mix_h."),
    ("token_mix.1.fuse.", "token_mixing.proj."),
    ("channel_mix.1.", "channel_mixing.norm."),
    ("channel_mix.2.net.0.", "channel_mixing.mlp.fc1."),
    ("channel_mix.2.net.3.", "channel_mixing.mlp.fc2."),
)


def checkpoint_filter_fn(state_dict: Mapping, model: SparseMLP) -> dict[str, Tensor]:
    """Our state dict for `model` from a released checkpoint's or from our own, of a model for images of whatever size
    (timm's convention).

    Args:
        state_dict: a state dict, bare or under "model"; keys may carry the prefix "module." that
            DistributedDataParallel adds. Keys it does not know are kept, so that loading reports them.
        model: the `SparseMLP` to load into; its depths say which stage a block of the released model belongs to, and
            its image size what the mixing weights are resampled to.

    Returns:
        Names and shapes as `SparseMLP.state_dict` has them. Released mixing weights (L, L, 1, 1) become (L, L).
    """
    return model.resample(rename_released(state_dict, model))


def rename_released(state_dict: Mapping, model: SparseMLP) -> dict[str, Tensor]:
    """A released checkpoint's state dict under our names and in our shapes, for images of whatever size."""
    state_dict = plain_weights(state_dict)
    # As our own files named it at first.
    state_dict = {name.replace("token_mixing.fuse.", "token_mixing.proj."): v for name, v in state_dict.items()}
    if "to_patch_embedding.0.0.weight" not in state_dict:
        return state_dict
    blocks = block_names(model)
    converted = {}
    for released_name, value in state_dict.items():
        block = re.match(r"(token_mix|channel_mix)\.(\d+)\.", released_name)
        if block and int(block[2]) < len(blocks):
            inside = translate(f"{block[1]}.{released_name[block.end() :]}", RELEASED_NAMES)
            name = f"{blocks[int(block[2])]}.{inside}"
        else:
            name = translate(released_name, RELEASED_NAMES)
        if name.endswith((".mix_w.weight", ".mix_h.weight")):
            value = value.flatten(1)
        converted[name] = value
    return converted


def released_state_dict(model: SparseMLP) -> dict[str, Tensor]:
    """The model's weights as the released code has them: the inverse of `rename_released`."""
    blocks = block_names(model)
    converted = {}
    for our_name, value in model.state_dict().items():
        block = re.match(r"stages\.\d\.\d+", our_name)
        name = translate(our_name[block.end() + 1 :] if block else our_name, RELEASED_NAMES, back=True)
        if block:
            kind, rest = name.split(".", 1)
            name = f"{kind}.{blocks.index(block[0])}.{rest}"
        if our_name.endswith((".mix_w.weight", ".mix_h.weight")):
            value = value[:, :, None, None]
        converted[name] = value
    return converted


def block_names(model: SparseMLP) -> list[str]:
    """Of all stages, in order: the released code numbers the blocks through."""
    return [f"stages.{stage}.{block}" for stage, blocks in enumerate(model.stages) for block in range(len(blocks))]


PAPER = "arXiv:2109.05422"

# No weights to download here either: load the released files with checkpoint_filter_fn.
default_cfgs = generate_default_cfgs({f"sparse_mlp_{size}": image_cfg(PAPER) for size in ("tiny", "small", "base")})


def _create(variant: str, pretrained: bool, **kwargs) -> SparseMLP:
    return build_model_with_cfg(
        SparseMLP,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(FEATURE_CFG),
        **kwargs,
    )


@register_model
def sparse_mlp_tiny(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-T: 24.1 M parameters, 5.0 GMACs, 81.9 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 8, 14, 2), "drop_path_rate": 0.0}
    return _create("sparse_mlp_tiny", pretrained, **{**arguments, **kwargs})


@register_model
def sparse_mlp_small(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-S: 48.6 M parameters, 10.3 GMACs, 83.1 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 96, "depths": (2, 10, 24, 2), "drop_path_rate": 0.2}
    return _create("sparse_mlp_small", pretrained, **{**arguments, **kwargs})


@register_model
def sparse_mlp_base(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-B: 65.9 M parameters, 14.0 GMACs, 83.4 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 112, "depths": (2, 10, 24, 2), "drop_path_rate": 0.3}
    return _create("sparse_mlp_base", pretrained, **{**arguments, **kwargs})
