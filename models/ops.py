"""How the layers of Strip-MLP are computed.

Each function is one equation, which its docstring gives as an einsum. Where there is more than one way to compute it,
the function takes the one that suits the device and the size of its input; `form` names one instead. All forms give the
same result up to rounding, on any device.

Maps are (N, C, H, W). They stay in `torch.channels_last` throughout: every form reads and writes them in place there.

What looks at its input's device or size is `wrap`ped: torch.fx takes it as one operation, which chooses when it runs.
"""

from collections.abc import Callable

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import drop_path, fast_layer_norm
from torch import Tensor, nn
from torch.fx import wrap
from torch.utils.checkpoint import checkpoint

from .depthwise import depthwise_conv2d

# On CPUs, maps of at most so many tokens, and strips along axes of at most so many, are faster as matrix products than
# as oneDNN's convolutions. docs/speed.md has the times.
SMALL_MAP, SHORT_AXIS = 16, 4


def on_gpu(x: Tensor) -> bool:
    """Whether to take the forms that suit a GPU."""
    return x.is_cuda


def by_size(x: Tensor) -> bool:
    """Whether the form may depend on the size of x. On the meta device, where multiply-adds are counted, the layer's
    own count is wanted. Compilers and exporters choose for themselves. torch.jit.trace would warn of every size that is
    looked at."""
    return not (x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing())


@wrap
def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, form: str | None = None) -> Tensor:
    """1 x 1 convolution.

        y = einsum("oc,nchw->nohw", weight, x) + bias

    Args:
        x: (N, C, H, W).
        weight: (C_out, C), or (C_out, C, 1, 1) as convolutions store it.
        bias: (C_out,).
        form: "linear", the default on GPUs and for maps of at most `SMALL_MAP` tokens, where convolutions have a high
            fixed cost; or "conv", the default elsewhere: on x86 processors oneDNN's convolutions are about twice as
            fast as the matrix products of PyTorch's builds unless the processor is Intel's.
    """
    if (form or pointwise_form(x)) == "linear":
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    # A convolution's weight as it is, for what looks for it in an exported graph.
    return F.conv2d(x, weight if weight.ndim == 4 else weight[:, :, None, None], bias, dilation=pointwise_dilation(x))


def pointwise_form(x: Tensor) -> str:
    """The default form of `pointwise` for its input."""
    small = by_size(x) and x.shape[-2] * x.shape[-1] <= SMALL_MAP
    return "linear" if on_gpu(x) or small else "conv"


def pointwise_dilation(x: Tensor) -> int:
    """Nothing for kernels of one pixel, but with one thread PyTorch leaves oneDNN for a slow product of its own where
    1 x 1 convolutions of fewer than 16 images have no dilation."""
    return 2 if by_size(x) and x.device.type == "cpu" else 1


def pointwise_input_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `pointwise` for x."""
    if pointwise_form(x) == "linear":
        return (gradient.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2)
    return _pointwise_backward(gradient, x, weight, [True, False, False])[0]


def pointwise_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `pointwise` for its weight."""
    if pointwise_form(x) == "linear":
        rows, columns = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (gradient, x))
        return (rows.T @ columns).view_as(weight)
    return _pointwise_backward(gradient, x, weight, [False, True, False])[1].view_as(weight)


def _pointwise_backward(gradient: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
    kernel, dilation = weight if weight.ndim == 4 else weight[:, :, None, None], [pointwise_dilation(x)] * 2
    return torch.ops.aten.convolution_backward(
        gradient, x, kernel, None, [1, 1], [0, 0], dilation, False, [0, 0], 1, mask
    )


class PointwiseConv(nn.Conv2d):
    """`pointwise` with the parameters of a convolution. Shape: (N, dim, H, W) -> (N, out_dim, H, W)."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True):
        super().__init__(dim, out_dim, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class PointwiseConvLinear(nn.Linear):
    """`pointwise` with the parameters of a linear layer. Shape: (N, dim, H, W) -> (N, out_dim, H, W).

    With a scale (N, dim, 1, 1) and a shift (dim,), of scale * x + shift: `scaled_pointwise`.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if scale is None:
            return pointwise(x, self.weight, self.bias)
        return scaled_pointwise(x, scale, shift, self.weight, self.bias)


class DepthwiseConv(nn.Conv2d):
    """`depthwise` with the parameters of a convolution. Shape: (N, dim, H, W) -> (N, dim, H, W)."""

    def __init__(self, dim: int, kernel_size: int | tuple[int, int]):
        super().__init__(dim, dim, kernel_size, padding="same", groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight)


@wrap
def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution with zeros around the map.

    On maps smaller than the kernel, as in the last stages of small images, only what meets the map is computed.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, odd height, odd width).
    """
    if by_size(x):
        weight = reachable(reachable(weight, -2, x.shape[-2]), -1, x.shape[-1])
    return depthwise_conv2d(x, weight)


def reachable(weight: Tensor, axis: int, length: int) -> Tensor:
    """The entries of an odd kernel along an axis that meet tokens on a map of `length` tokens: those at most
    length - 1 from its centre. All others meet zeros."""
    reach = weight.shape[axis] // 2
    kept = min(reach, length - 1)
    return weight.narrow(axis, reach - kept, 2 * kept + 1) if kept < reach else weight


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W).

    Under autocast it stays in autocast's dtype. Autocast itself would make its input and output float32, twice the
    memory. The statistics are computed in float32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_2d(x, self.normalized_shape, self.weight, self.bias, self.eps)


@wrap
def layer_norm_2d(x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` over the channels of (N, C, H, W)."""
    # timm's function asks autocast about the device, which fails on the meta device.
    layer_norm = F.layer_norm if x.is_meta else fast_layer_norm
    return layer_norm(x.permute(0, 2, 3, 1), normalized_shape, weight, bias, eps).permute(0, 3, 1, 2)


wrap("drop_path")  # it builds a shape from the number of dimensions


class DropPath(timm.layers.DropPath):
    """timm's, for torch.fx too."""

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


def recompute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`. On GPUs its intermediate results are not kept for the backward pass but computed again
    there: use it for cheap elementwise steps before a product. On CPUs they are kept, where `chains.py` does not do
    without them, and the compiler decides for itself."""
    if not on_gpu(tensors[0]) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


# Strips


@wrap
def mix_strips(x: Tensor, weight: Tensor, bias: Tensor, axis: str, q: int, form: str | None = None) -> Tensor:
    """The strip MLP layer. Every token of a row takes from all tokens of its own row and of the (m - 1) / 2 rows above
    and below it; the same for columns.

        strips[n, j, p, i, w, d] = x[n, j * P + p, i + d - (m - 1) / 2, w], zero outside the map
        row:    y = einsum("pvwd,njpiwd->njpiv", weight, strips) + bias
        column: the same with height and width exchanged

    Patch p holds the channels p, P + p, 2 P + p, ... (interleaved). They share its weights.

    Args:
        x: (N, q P, H, W).
        weight: (P, L, L, m): patch, output token, input token, offset. L is W for rows, H for columns.
        bias: (P, L).
        axis: "row" or "column".
        q: channels of a patch.
        form: "matmul", one matrix product per patch, the default on GPUs, which are slow at convolutions of many small
            groups, and along at most `SHORT_AXIS` tokens, for the same reason; or "conv", a convolution with one group
            per patch, the default elsewhere.
    """
    short = False
    if by_size(x):
        short = bias.shape[1] <= SHORT_AXIS
        weight = reachable(weight, -1, x.shape[-2 if axis == "row" else -1])
    mix = {"matmul": _mix_by_matmul, "conv": _mix_by_conv}[form or ("matmul" if on_gpu(x) or short else "conv")]
    if not torch.compiler.is_compiling():  # it chooses the layout of gradients itself
        x = ChannelsLastGradient.apply(x)
    x = x.unflatten(1, (q, -1))  # (N, q, P, H, W)
    # L is the mixed axis, A the one along which the strips lie side by side.
    x = x.permute(0, 2, 4, 1, 3) if axis == "row" else x.permute(0, 2, 3, 1, 4)  # (N, P, L, q, A)
    y = recompute(mix, x, weight, bias)
    y = y.permute(0, 4, 2, 3, 1) if axis == "row" else y.permute(0, 2, 4, 3, 1)  # (N, H, W, q, P)
    return y.flatten(3).permute(0, 3, 1, 2)  # channels_last


def _mix_by_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Kernels of (1, m) slide over (q, A), with the tokens of the mixed axis as channels."""
    y = F.conv2d(
        x.flatten(1, 2),  # (N, P L, q, A)
        weight.flatten(0, 1)[:, :, None],  # (P L, L, 1, m)
        bias.flatten(),
        padding=(0, weight.shape[-1] // 2),
        groups=weight.shape[0],
    )
    return y.unflatten(1, bias.shape)  # (N, P, L, q, A)


def _mix_by_matmul(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(P, L, L m) x (P, L m, N q A)."""
    m = weight.shape[-1]
    x = x.permute(1, 2, 0, 3, 4)  # (P, L, N, q, A)
    strips = F.pad(x, (m // 2, m // 2)).unfold(-1, m, 1)  # (P, L, N, q, A, m)
    strips = strips.permute(0, 1, 5, 2, 3, 4).flatten(3).flatten(1, 2)  # (P, L m, N q A)
    y = torch.baddbmm(bias[:, :, None], weight.flatten(2), strips)  # (P, L, N q A)
    return y.unflatten(2, x.shape[2:]).permute(2, 0, 1, 3, 4)  # (N, P, L, q, A)


class ChannelsLastGradient(torch.autograd.Function):
    """The identity, with a gradient in `torch.channels_last`. The transposed views in `mix_strips` would pass their
    own layout on, and everything before the layer would be slow in it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous(memory_format=torch.channels_last)


@wrap
def add_positions(x: Tensor, table: Tensor, size: tuple[int, int], r: int) -> Tensor:
    """y[n, c, i, j] = x[n, c, i, j] + table[clamp(j - i, -r, r) + r, c], in the dtype of x.

    Args:
        x: (N, C, H, W).
        table: (2 r + 1, C).
        size: (H, W).
    """
    height, width = size
    # A row of the table for each j - i that the map has, from 1 - H to W - 1. Row i of the map is the window of W of
    # them that begins at -i. (A tensor of indices would be state, which models that are made on the meta device and
    # loaded from a checkpoint lose.)
    below, above = max(height - 1 - r, 0), max(width - 1 - r, 0)
    rows = table[max(r + 1 - height, 0) : r + width]
    if below or above:
        rows = torch.cat([rows[:1].expand(below, -1), rows, rows[-1:].expand(above, -1)])
    windows = rows.unfold(0, width, 1)  # (H, C, W), the last row of the map first
    positions = windows.permute(0, 2, 1).flip(0).permute(2, 0, 1)  # (C, H, W), in channels_last as x is
    # Under autocast x is half precision and the table is not: the sum would be promoted to float32.
    return x + positions.to(x.dtype)


@wrap
def map_mean(x: Tensor) -> Tensor:
    """Mean over the map. Shape: (N, C, H, W) -> (N, C, 1, 1)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # where Tensor.mean takes three times as long
        return x.sum(dim=(2, 3), keepdim=True) / (x.shape[-2] * x.shape[-1])
    return x.mean(dim=(2, 3), keepdim=True)


@wrap
def softmax_branches(logits: Tensor, branches: int, dtype: torch.dtype) -> Tensor:
    """Softmax over branches, per image and channel, in `dtype`. Shape: (N, branches C, 1, 1), where branch b of channel
    c is at c * branches + b, -> (branches, N, C, 1, 1)."""
    # Autocast computes the softmax in float32, to which it would then promote the maps that are multiplied by it.
    weights = logits.unflatten(1, (-1, branches)).softmax(dim=2).to(dtype)  # (N, C, branches, 1, 1)
    return weights.movedim(2, 0).contiguous()  # dense over the channels, as the maps are


# Global response normalisation and the 1 x 1 convolution that follows it. The map between them is the widest of the
# network, so passes over it are saved: the normalisation is a scale per channel and image, and a shift per channel.


@wrap
def scaled_pointwise(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1 x 1 convolution of a map that is scaled and shifted.

        y = einsum("oc,nchw->nohw", weight, scale * x + shift) + bias

    The shift goes through the convolution: bias + weight @ shift. On GPUs the scaled map is recomputed in the backward
    pass.

    Args:
        x: (N, C, H, W).
        scale: (N, C, 1, 1).
        shift: (C,).
        weight: (C_out, C).
        bias: (C_out,).
    """
    return recompute(_scaled_pointwise, x, scale.to(x.dtype), shift, weight, bias)


def _scaled_pointwise(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not `weight @ shift`, which fvcore cannot count.
    return pointwise(x * scale, weight, torch.addmv(bias, weight, shift))


@wrap
def grn_scale(x: Tensor, gamma: Tensor) -> Tensor:
    """The scale of global response normalisation (ConvNeXt V2, equations 1 to 3): GRN(x) = scale * x + beta.

        gx = sqrt(einsum("nchw,nchw->nc", x, x));  nx = gx / (mean of gx over c + 1e-6)
        scale = 1 + gamma * nx

    Args:
        x: (N, C, H, W).
        gamma: (C,).

    Returns:
        (N, C, 1, 1).
    """
    # The compiler fuses the gradient by itself.
    squares = sum_of_squares(x) if torch.compiler.is_compiling() else SumOfSquares.apply(x)
    return scale_of(squares, gamma)


def scale_of(squares: Tensor, gamma: Tensor) -> Tensor:
    """`grn_scale` from the sums of squares, (N, C, 1, 1)."""
    # A channel that is zero everywhere has a norm, but its gradient would be 0 / 0.
    gx = squares.clamp_min(1e-24).sqrt()
    nx = gx / (gx.mean(dim=1, keepdim=True) + 1e-6)
    return 1 + gamma[:, None, None] * nx


def sum_of_squares(x: Tensor) -> Tensor:
    """einsum("nchw,nchw->nc", x, x) as (N, C, 1, 1), in at least float32. On the CPU a bfloat16 sum is accumulated in
    float32 but rounded to bfloat16 once at the end."""
    if x.dtype == torch.float16:
        x = x.float()  # float16 ends at 65,504: the square of 256 is beyond it
    squares = (x * x).sum(dim=(2, 3), keepdim=True)
    return squares.to(torch.promote_types(squares.dtype, torch.float32))


def gradient_of_squares(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of `sum_of_squares` for x, in the dtype of x."""
    if x.dtype == torch.float16:
        return (x.float() * (2 * gradient)).half()
    return x * (2 * gradient).to(x.dtype)


class SumOfSquares(torch.autograd.Function):
    """`sum_of_squares` with a cheaper gradient: one pass over the map where autograd takes three, and only x is kept,
    in its own dtype."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sum_of_squares(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient_of_squares(x, gradient)
