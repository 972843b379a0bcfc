"""Depthwise convolution with a weight gradient that is fast on CPUs.

oneDNN has a fast weight gradient for kernels of at most 3 columns, however many rows. 3 x 7 takes 6 to 15 times as long
as 7 x 3. Here the gradient of a wide kernel is made of narrow ones. docs/speed.md has the times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FAST_COLUMNS = 3
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has but the latter


def depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution with zeros around the map.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, odd height, odd width).

    Returns:
        (N, C, H, W).
    """
    needs_help = x.device.type == "cpu" and weight.shape[-1] > FAST_COLUMNS and weight.requires_grad
    if not needs_help or not torch.is_grad_enabled() or is_exporting() or torch.jit.is_tracing():
        return F.conv2d(x, weight, padding=same_padding(weight), groups=len(weight))
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # autocast does not look into the backward pass
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    return _WideDepthwise.apply(x, weight)


class _WideDepthwise(torch.autograd.Function):
    """`depthwise_conv2d` with the gradients below. Keeps what a convolution keeps: x and the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=same_padding(weight), groups=len(weight))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            input_gradient(gradient, x, weight) if needs_x else None,
            weight_gradient(gradient, x, weight) if needs_weight else None,
        )


def same_padding(weight: Tensor) -> list[int]:
    """That keeps the size of the map, for odd kernels."""
    return [weight.shape[-2] // 2, weight.shape[-1] // 2]


def input_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a depthwise convolution for its input (N, C, H, W)."""
    return _backward(gradient, x, weight, same_padding(weight), [True, False, False])[0]


def weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a depthwise convolution for its weight (C, 1, odd height, odd width).

    Args:
        gradient: of the output, (N, C, H, W).
        x: the input, (N, C, H, W).
    """
    height, width = weight.shape[-2:]
    if x.device.type != "cpu" or width <= FAST_COLUMNS:
        return _narrow_gradient(gradient, x, weight, same_padding(weight))
    if height <= FAST_COLUMNS:  # the same convolution, lying on its side
        gradient, x = (t.transpose(2, 3).contiguous(memory_format=torch.channels_last) for t in (gradient, x))
        return _narrow_gradient(gradient, x, weight.mT, [width // 2, height // 2]).mT
    # A few columns of the kernel at a time. Column c meets the map moved by c columns, with zeros around it.
    slices = -(-width // FAST_COLUMNS)
    x = F.pad(x, (width // 2, width // 2 + slices * FAST_COLUMNS - width))
    seen = gradient.shape[-1] + FAST_COLUMNS - 1
    narrow = weight[..., :FAST_COLUMNS]  # for its shape alone
    columns = [
        _narrow_gradient(gradient, x.narrow(-1, column, seen), narrow, [height // 2, 0])
        for column in range(0, width, FAST_COLUMNS)
    ]
    return torch.cat(columns, dim=-1)[..., :width]


def _narrow_gradient(gradient: Tensor, x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    return _backward(gradient, x, weight, padding, [False, True, False])[1]


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, padding: list[int], mask: list[bool]):
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], len(weight), mask
    )
