"""What CycleMLP, Vision Permutator, Hire-MLP and Wave-MLP share: blocks whose token mixing weighs three branches, and
the convolutions before and between the stages. Feature maps are (N, C, H, W).
"""

from collections.abc import Callable

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from . import ops

# Makes a 1 x 1 convolution of `dim` to `out_dim` channels: a linear layer over channels. They differ in the shape of
# the weight, which is that of the released checkpoints.
Pointwise = type[ops.PointwiseConvLinear] | type[ops.PointwiseConv]
Norm = Callable[[int], nn.Module]  # makes one of so many channels


class StridedConv(nn.Module):
    """Embedding of patches, and a transition between stages: a convolution with bias, and what may follow it.

    Shape: (N, dim, H, W) -> (N, out_dim, ...), in `torch.channels_last`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        norm: Norm = nn.Identity,
        act: Callable[[], nn.Module] = nn.Identity,
    ):
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size, stride, padding)
        self.norm = norm(out_dim)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).contiguous(memory_format=torch.channels_last)
        return self.act(self.norm(x))


def overlapping_embed(in_chans: int, dim: int, patch_size: int, **after) -> StridedConv:
    """Embedding of patches that overlap: a 7 x 7 convolution of stride 4 for the patch size 4 of the papers, 2 p - 1 by
    p in general. Shape: (N, in_chans, H, W) -> (N, dim, H / p, W / p)."""
    return StridedConv(in_chans, dim, 2 * patch_size - 1, patch_size, patch_size // 2, **after)


def overlapping_merge(dim: int, out_dim: int, **after) -> StridedConv:
    """Transition that halves height and width: a 3 x 3 convolution of stride 2."""
    return StridedConv(dim, out_dim, kernel_size=3, stride=2, padding=1, **after)


class PointwiseMlp(nn.Module):
    """fc2(GELU(fc1(x))) over channels. Shape: (N, dim, H, W) -> (N, out_dim, H, W)."""

    def __init__(self, dim: int, hidden: int, out_dim: int, pointwise: Pointwise):
        super().__init__()
        self.fc1 = pointwise(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = pointwise(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Reweight(PointwiseMlp):
    """The sum of three branches, weighted per image and channel by a softmax over them (Vision Permutator's "weighted
    permute-MLP", after split attention).

        s = mean over H, W of (h + w + c)
        a = softmax(fc2(GELU(fc1(s)))),  fc1: C -> C / 4, fc2: C / 4 -> 3 C, branch b of channel j at 3 j + b
        y = a_0 * h + a_1 * w + a_2 * c

    Shape: three of (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, dim: int, pointwise: Pointwise):
        super().__init__(dim, dim // 4, 3 * dim, pointwise)

    def forward(self, h: Tensor, w: Tensor, c: Tensor) -> Tensor:
        s = (h + w + c).mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        a = ops.softmax_branches(super().forward(s), 3, h.dtype)  # (3, N, C, 1, 1)
        return a[0] * h + a[1] * w + a[2] * c


class BranchBlock(nn.Module):
    """Token mixing and an MLP over channels, both residual, with stochastic depth.

        x = x + DropPath(token_mixing(norm1(x)))
        x = x + DropPath(mlp(norm2(x)))

    Args:
        dim: channels C.
        token_mixing: (N, C, H, W) -> (N, C, H, W).
        mlp_ratio: hidden width of the MLP as a multiple of C.
        drop_path: probability of dropping a residual branch per sample.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(
        self, dim: int, token_mixing: nn.Module, mlp_ratio: float, norm: Norm, pointwise: Pointwise, drop_path: float
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.token_mixing = token_mixing
        self.norm2 = norm(dim)
        self.mlp = PointwiseMlp(dim, int(mlp_ratio * dim), dim, pointwise)
        self.drop_path = ops.DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixing(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_truncated_normal(network: nn.Module, layers: tuple[type[nn.Module], ...]) -> None:
    """Truncated normal weights of standard deviation 0.02, and biases of zero, in the layers of these types. All others
    keep PyTorch's defaults."""
    for module in network.modules():
        if isinstance(module, layers):
            trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
