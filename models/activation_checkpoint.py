"""Activation checkpointing that leaves the running statistics of BatchNorm alone.

`torch.utils.checkpoint` runs a block's forward a second time in the backward pass, which would update the running mean
and variance of its BatchNorms twice per step and so change what the model predicts at evaluation.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Runs `blocks` on x, keeping only each block's input for the backward pass. Same shapes as `blocks(x)`."""
    for block in blocks:
        if torch.compiler.is_compiling():
            # The compiler recomputes inside its own graph, which updates buffers once.
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = checkpoint(
                block, x, use_reentrant=False, context_fn=lambda b=block: (nullcontext(), frozen_running_stats(b))
            )
    return x


@contextmanager
def frozen_running_stats(module: nn.Module):
    """Inside, BatchNorms of `module` in training mode normalise by the batch but do not change their buffers."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    # Turning running statistics off would not do: BatchNorm would then save fewer tensors for the backward pass than in
    # the first forward pass, which checkpointing reports as an error.
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
