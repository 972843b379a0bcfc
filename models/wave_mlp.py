"""An Image Patch is a Wave: Phase-Aware Vision MLP (Tang et al., CVPR 2022), https://arxiv.org/abs/2111.12294

A peer of Strip-MLP. Read it beside the paper: the wave, of which each token has an amplitude and a phase, mixed along
one axis; the phase-aware token mixing module (PATM); and the network of four stages. Feature maps are (N, C, H, W). No
layer knows the size of the map, so images may have any.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from . import ops
from .backbone import Backbone, by_stage, check_choice, growing_rates, stack_blocks
from .branches import BranchBlock, Reweight, init_truncated_normal, overlapping_embed, overlapping_merge

WINDOW = 7  # tokens that are mixed along an axis
NORMS = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 1)}  # "group": over (C, H, W)


class WaveMixing(nn.Module):
    """Tokens as waves, mixed along one axis.

        theta = ReLU(BN(phase(x)));  z = amplitude(x)
        y = mix([z cos(theta), z sin(theta)])

    The mixing is a convolution of 7 tokens in C groups. As in the released code, output channel o mixes the channels
    2 o and 2 o + 1 of the concatenation: two cosine maps for o < C / 2 and two sine maps above. (The paper's equation
    has the cosine and the sine of one channel.)

    Args:
        dim: channels C.
        axis: "row" or "column".
        depthwise: whether the phase is a depthwise 3 x 3 convolution, and not a linear layer over channels.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, axis: str, depthwise: bool):
        super().__init__()
        check_choice("axis", axis, ("row", "column"))
        phase = ops.DepthwiseConv(dim, kernel_size=3) if depthwise else ops.PointwiseConv(dim, dim)
        self.theta = nn.Sequential(phase, nn.BatchNorm2d(dim), nn.ReLU())
        self.amplitude = ops.PointwiseConv(dim, dim, bias=False)
        kernel_size = (1, WINDOW) if axis == "row" else (WINDOW, 1)
        self.mix = nn.Conv2d(2 * dim, dim, kernel_size, padding="same", groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        theta, z = self.theta(x), self.amplitude(x)
        return self.mix(torch.cat([z * theta.cos(), z * theta.sin()], dim=1))  # 2 C -> C


class PATM(nn.Module):
    """Phase-aware token mixing:

        y = proj(reweight(wave_h(x), wave_w(x), fc_c(x)))

    where wave_h mixes along the width, wave_w along the height, and fc_c, a linear layer without bias, channels.

    Shape: (N, C, H, W) -> (N, C, H, W), C a multiple of 4.
    """

    def __init__(self, dim: int, depthwise: bool):
        super().__init__()
        self.wave_h = WaveMixing(dim, "row", depthwise)
        self.wave_w = WaveMixing(dim, "column", depthwise)
        self.fc_c = ops.PointwiseConv(dim, dim, bias=False)
        self.reweight = Reweight(dim, ops.PointwiseConv)
        self.proj = ops.PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.reweight(self.wave_h(x), self.wave_w(x), self.fc_c(x)))


class WaveMLP(Backbone):
    """The network: four stages of blocks at strides 4, 8, 16 and 32.

    Args:
        img_size: nothing depends on it. It is accepted so that all networks here can be made alike.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        widths: C of each stage, multiples of 4.
        depths: blocks in each of the four stages.
        mlp_ratios: hidden width of the MLP over channels as a multiple of C, by stage.
        norm: "batch", or "group" for GroupNorm of one group.
        norm_between: whether embedding and transitions end in a norm.
        depthwise_phase: whether phases are depthwise convolutions.
        patch_size: pixels per token side of the first stage.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        drop_rate: dropout before the classifier.
        global_pool: "avg", or "" for none (timm's convention).

    Raises:
        ValueError: widths or depths that are not four; a norm that is not accepted.

    Shape: (N, in_chans, H, W) -> (N, num_classes).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        norm: str = "batch",
        norm_between: bool = True,
        depthwise_phase: bool = False,
        patch_size: int = 4,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(None, patch_size, widths, num_classes)
        check_choice("norm", norm, tuple(NORMS))
        mlp_ratios = by_stage("mlp_ratios", mlp_ratios)
        rates = growing_rates(drop_path_rate, depths)
        after = {"norm": NORMS[norm]} if norm_between else {}

        def block(stage: int, _: int) -> BranchBlock:
            mixing = PATM(widths[stage], depthwise_phase)
            return BranchBlock(widths[stage], mixing, mlp_ratios[stage], NORMS[norm], ops.PointwiseConv, next(rates))

        self.patch_embed = overlapping_embed(in_chans, widths[0], patch_size, **after)
        self.stages = stack_blocks(depths, block)
        self.merging = nn.ModuleList(overlapping_merge(a, b, **after) for a, b in pairwise(widths))
        self.norm = NORMS[norm](widths[-1])
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        init_truncated_normal(self, (nn.Linear,))
