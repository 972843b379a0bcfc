"""Layers of Strip-MLP in a row, computed together.

Each function gives what its layers give one after the other, up to rounding.

- In training, what is cheap to make again is not kept for the backward pass: neither the output of a BatchNorm nor that
  of a GELU, only the input of the chain. On CPUs and GPUs alike.
- In inference on a CPU, a BatchNorm is folded into the convolution before it, from the weights that they have at that
  moment, and the GELU is applied while the convolution writes its output.

Layers that someone has replaced (LoRA, quantised weights), hooked into or parametrised are called one by one, and so
are all under torch.compile, exporters and torch.fx, which look for chains themselves.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops
from .depthwise import input_gradient, weight_gradient

CHAINED = (nn.BatchNorm2d, nn.GELU, ops.PointwiseConv, ops.PointwiseConvLinear, ops.DepthwiseConv)


def norm_gelu_depthwise(x: Tensor, norm: nn.BatchNorm2d, act: nn.GELU, conv: ops.DepthwiseConv) -> Tensor:
    """conv(act(norm(x))). Shape: (N, C, H, W) -> (N, C, H, W)."""
    if are_own(norm, act, conv) and trains(x, norm):
        return _NormGELUDepthwise.apply(x, norm.weight, norm.bias, cast(conv.weight, x), *batch_norm(norm))
    x = norm(x)  # SyncBatchNorm, for instance
    if keeps(x) and are_own(act, conv):
        return ops.recompute(lambda y, kernel: ops.depthwise(F.gelu(y), kernel), x, conv.weight)
    return conv(act(x))


def pointwise_norm_gelu(x: Tensor, conv: ops.PointwiseConv, norm: nn.BatchNorm2d, act: nn.GELU) -> Tensor:
    """act(norm(conv(x))). Shape: (N, C, H, W) -> (N, C_out, H, W)."""
    if are_own(norm, act) and trains(x, norm):
        return _NormGELU.apply(conv(x), norm.weight, norm.bias, *batch_norm(norm))
    if are_own(conv, norm, act) and infers(x) and not norm.training and norm.track_running_stats:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        return pointwise_gelu(x, conv.weight.flatten(1) * scale[:, None], shift)
    return act(norm(conv(x)))


def pointwise_act(x: Tensor, conv: ops.PointwiseConv | ops.PointwiseConvLinear, act: nn.GELU) -> Tensor:
    """act(conv(x)). Shape: (N, C, H, W) -> (N, C_out, H, W)."""
    if infers(x) and are_own(conv, act) and conv.bias is not None:
        return pointwise_gelu(x, conv.weight.flatten(1), conv.bias)
    return act(conv(x))


def mlp(
    x: Tensor, fc1: ops.PointwiseConvLinear, act: nn.GELU, grn: nn.Module | None, fc2: ops.PointwiseConvLinear
) -> Tensor:
    """fc2(grn(act(fc1(x)))); grn, a `GlobalResponseNorm`, may be None. Shape: (N, C, H, W) -> (N, C_out, H, W)."""
    if grn is not None and keeps(x) and are_own(act, fc2) and not is_heard(grn):
        hidden = fc1(x)
        hidden = hidden.to(autocast_dtype(hidden))  # unless a layer in the place of fc1 did it
        weight, bias = cast(fc2.weight, hidden), cast(torch.addmv(fc2.bias, fc2.weight, grn.bias), hidden)
        return _GELUScaledPointwise.apply(hidden, grn.weight, weight, bias)
    hidden = pointwise_act(x, fc1, act)
    if grn is None:
        return fc2(hidden)
    return fc2(hidden, scale=grn(hidden), shift=grn.bias)


# When


def keeps(x: Tensor) -> bool:
    """Whether there will be a backward pass, which the functions here can serve."""
    return torch.is_grad_enabled() and is_eager(x)


def trains(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    # One value per channel: the layer itself has a word to say about that.
    is_batch = keeps(x) and x.numel() > x.shape[1]
    return is_batch and norm.training and norm.track_running_stats and norm.momentum is not None


def infers(x: Tensor) -> bool:
    """Whether oneDNN's convolutions with an activation serve: on CPUs, without a backward pass."""
    if torch.is_grad_enabled() or not is_eager(x) or x.device.type != "cpu" or not x.numel():
        return False
    if _get_current_dispatch_mode() is not None:  # what counts operations does not know these
        return False
    dtype = autocast_dtype(x)
    return dtype in (torch.float32, torch.bfloat16) and has_fused_convolution(dtype)


def is_eager(x: Tensor) -> bool:
    # By type: not torch.fx's proxies, nor tensors that stand for several processes' parts.
    is_seen = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(x) in (Tensor, FakeTensor) and not is_seen


@functools.cache
def has_fused_convolution(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operator, which its compiler uses too, and this processor runs it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    x, weight = torch.linspace(-2, 2, 16).view(1, 4, 2, 2), torch.linspace(-1, 1, 12).view(3, 4)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = F.gelu(F.conv2d(x, weight[:, :, None, None], torch.ones(3)))
        try:
            found = _convolution_gelu(*(tensor.to(dtype) for tensor in (x, weight, torch.ones(3))))
        except (RuntimeError, TypeError):  # not in this build, not with these arguments, or not in this dtype
            return False
    return torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05)


def are_own(*layers: nn.Module) -> bool:
    """Whether all layers are what the model was built of, so that nobody misses a call of one of them."""
    return all(
        type(layer) in CHAINED
        and not is_heard(layer)
        and all(p is None or type(p) in (nn.Parameter, FakeTensor) for p in layer._parameters.values())
        for layer in layers
    )


def is_heard(layer: nn.Module) -> bool:
    """Whether something waits for calls of the layer: hooks, or another function in place of its forward pass."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__ or _has_any_global_hook()


# How


def autocast_dtype(x: Tensor) -> torch.dtype:
    """That products with x are computed in."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # which knows no meta device
        return x.dtype
    return torch.get_autocast_dtype(device)


def cast(parameter: Tensor, x: Tensor) -> Tensor:
    """In the dtype that autocast would give it beside x. Autocast does not look into the functions below."""
    return parameter.to(autocast_dtype(x))


def batch_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, float, float]:
    """What `torch.native_batch_norm` takes of a layer in training; counts the batch."""
    norm.num_batches_tracked.add_(1)
    return norm.running_mean, norm.running_var, norm.momentum, norm.eps


def normalised(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    """The output of a BatchNorm once more, from the statistics of its batch."""
    return F.batch_norm(x, mean, inverse_std**-2 - eps, weight, bias, training=False, eps=eps)


def gelu_(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(x, out=x)


def pointwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(pointwise(x, weight, bias)), without a gradient."""
    dtype = autocast_dtype(x)
    return _convolution_gelu(x.to(dtype), weight.to(dtype), bias.to(dtype))


def _convolution_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    arguments = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    return torch.ops.mkldnn._convolution_pointwise(x, weight[:, :, None, None], bias, *arguments, "gelu", [], "none")


class _NormGELU(torch.autograd.Function):
    """GELU(BN(x)) of a batch. Keeps x."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.eps = eps
        return gelu_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        y = normalised(x, weight, bias, mean, inverse_std, ctx.eps)
        return (*_norm_gelu_backward(ctx, gradient, x, y, weight, mean, inverse_std), None, None, None, None)


class _NormGELUDepthwise(torch.autograd.Function):
    """DWConv(GELU(BN(x))) of a batch. Keeps x."""

    @staticmethod
    def forward(ctx, x, weight, bias, kernel, running_mean, running_var, momentum, eps):
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, bias, kernel, mean, inverse_std)
        ctx.eps = eps
        return ops.depthwise(gelu_(y).to(kernel.dtype), kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, kernel, mean, inverse_std = ctx.saved_tensors
        y = normalised(x, weight, bias, mean, inverse_std, ctx.eps)
        activated = F.gelu(y).to(kernel.dtype)
        kernel_gradient = weight_gradient(gradient, activated, kernel) if ctx.needs_input_grad[3] else None
        gradient = input_gradient(gradient, activated, kernel).to(x.dtype)
        of_norm = _norm_gelu_backward(ctx, gradient, x, y, weight, mean, inverse_std)
        return (*of_norm, kernel_gradient, None, None, None, None)


def _norm_gelu_backward(ctx, gradient, x, y, weight, mean, inverse_std) -> tuple[Tensor | None, ...]:
    """The gradients of GELU(BN(x)) for x and for BN's weight and bias, where y is BN(x)."""
    gradient = torch.ops.aten.gelu_backward(gradient, y)
    # The running statistics, which are None here, play no part in training.
    return torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, inverse_std, True, ctx.eps, list(ctx.needs_input_grad[:3])
    )


class _GELUScaledPointwise(torch.autograd.Function):
    """`ops.scaled_pointwise` of GELU(x), scaled by `ops.grn_scale`. Keeps x.

    The widest maps of the network are here, so passes over them count.
    """

    @staticmethod
    def forward(ctx, x, gamma, weight, bias):
        y = F.gelu(x)
        squares = ops.sum_of_squares(y)
        ctx.save_for_backward(x, squares, gamma, weight)
        return ops.pointwise(y.mul_(ops.scale_of(squares, gamma).to(y.dtype)), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, squares, gamma, weight = ctx.saved_tensors
        with torch.enable_grad():  # of what is one number per image and channel
            squares, gamma = squares.detach().requires_grad_(), gamma.detach().requires_grad_()
            scale = ops.scale_of(squares, gamma)
        s = scale.detach().to(x.dtype)
        y = F.gelu(x)
        scaled = y * s
        bias_gradient = gradient.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[3] else None
        weight_gradient = ops.pointwise_weight_gradient(gradient, scaled, weight) if ctx.needs_input_grad[2] else None
        gradient = ops.pointwise_input_gradient(gradient, scaled, weight)
        of_scale = torch.mul(gradient, y, out=scaled).sum(dim=(2, 3), keepdim=True)
        of_squares, of_gamma = torch.autograd.grad(scale, (squares, gamma), of_scale.to(scale.dtype))
        gradient = gradient.mul_(s).add_(ops.gradient_of_squares(y, of_squares))
        return torch.ops.aten.gelu_backward(gradient, x), of_gamma, weight_gradient, bias_gradient
