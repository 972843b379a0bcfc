"""CycleMLP: A MLP-like Architecture for Dense Prediction (Chen et al., ICLR 2022), https://arxiv.org/abs/2107.10224

A peer of Strip-MLP. Read it beside the paper: the cycle fully-connected layer, the block's token mixing of two of them
and a linear layer, and the network of four stages. Feature maps are (N, C, H, W). No layer knows the size of the map,
so images may have any.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from torch import Tensor, nn
from torch.fx import wrap

from . import ops
from .backbone import Backbone, by_stage, growing_rates, stack_blocks
from .branches import BranchBlock, Reweight, init_truncated_normal, overlapping_embed, overlapping_merge


@wrap
def cycle(x: Tensor, axis: str, form: str | None = None) -> Tensor:
    """Channel i of each token from the token that is ((i + 1) mod 3) - 1 further along the axis; zero outside the map.

        row:    y[n, i, h, w] = x[n, i, h, w + ((i + 1) mod 3) - 1]
        column: the same along the height

    Args:
        x: (N, C, H, W).
        axis: "row" or "column".
        form: "conv", a depthwise convolution with kernels of a one and two zeros, the default on CPUs; or "select",
            which picks each channel from shifted maps: the default for GPUs, where convolutions may round, for
            compilers, which make one pass of it, and on the meta device, where multiply-adds are counted, because it
            has none.
    """
    step = (torch.arange(x.shape[1], device=x.device) + 1) % 3  # 1 more than the channel's step
    convolve = not (ops.on_gpu(x) or x.is_meta or torch.compiler.is_compiling())
    if (form or ("conv" if convolve else "select")) == "conv":
        kernels = F.one_hot(step, 3).to(x.dtype)  # (C, 3)
        kernels = kernels[:, None, None] if axis == "row" else kernels[:, None, :, None]
        return F.conv2d(x, kernels, padding=(0, 1) if axis == "row" else (1, 0), groups=x.shape[1])
    before, after = ((n, -n, 0, 0) if axis == "row" else (0, 0, n, -n) for n in (1, -1))
    step = step[:, None, None]
    return torch.where(step == 1, x, torch.where(step == 2, F.pad(x, after), F.pad(x, before)))


class CycleMixing(nn.Module):
    """Token mixing: two cycle fully-connected layers and a linear layer.

        h = sfc_h(cycle(x, along the width));  w = sfc_w(cycle(x, along the height));  c = mlp_c(x)
        y = proj(reweight(h, w, c))

    where all are linear layers over channels, `mlp_c` without bias. The released code computes sfc_h and sfc_w by
    deformable convolutions with fixed offsets.

    Shape: (N, C, H, W) -> (N, C, H, W), C a multiple of 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.sfc_h = ops.PointwiseConv(dim, dim)
        self.sfc_w = ops.PointwiseConv(dim, dim)
        self.mlp_c = ops.PointwiseConvLinear(dim, dim, bias=False)
        self.reweight = Reweight(dim, ops.PointwiseConvLinear)
        self.proj = ops.PointwiseConvLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.sfc_h(cycle(x, "row"))
        w = self.sfc_w(cycle(x, "column"))
        return self.proj(self.reweight(h, w, self.mlp_c(x)))


class CycleMLP(Backbone):
    """The network: four stages of blocks at strides 4, 8, 16 and 32.

    Args:
        img_size: nothing depends on it. It is accepted so that all networks here can be made alike.
        in_chans: input channels.
        num_classes: outputs; 0 leaves the classifier out.
        widths: C of each stage, multiples of 4.
        depths: blocks in each of the four stages.
        mlp_ratios: hidden width of the MLP over channels as a multiple of C, by stage.
        patch_size: p, pixels per token side of the first stage.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        drop_rate: dropout before the classifier.
        global_pool: "avg", or "" for none (timm's convention).

    Raises:
        ValueError: widths, depths or ratios that are not four.

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
        patch_size: int = 4,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(None, patch_size, widths, num_classes)
        mlp_ratios = by_stage("mlp_ratios", mlp_ratios)
        rates = growing_rates(drop_path_rate, depths)

        def block(stage: int, _: int) -> BranchBlock:
            dim, ratio = widths[stage], mlp_ratios[stage]
            return BranchBlock(dim, CycleMixing(dim), ratio, ops.LayerNorm2d, ops.PointwiseConvLinear, next(rates))

        self.patch_embed = overlapping_embed(in_chans, widths[0], patch_size)
        self.stages = stack_blocks(depths, block)
        self.merging = nn.ModuleList(overlapping_merge(a, b) for a, b in pairwise(widths))
        self.norm = ops.LayerNorm2d(widths[-1])
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        init_truncated_normal(self, (nn.Linear, ops.PointwiseConv))
