"""Peak memory of a step: what it holds at its peak, weights and moments included. Measured on its device, and counted
from the tensors that PyTorch's operations make, on shapes alone."""

import itertools
import os
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.contenders import MEMORY_FORMATS, Contender, Step, adamw, random_batch

BLOCK = 512  # bytes, to whole multiples of which PyTorch's CUDA allocator rounds up


def measured_peak(step: Step) -> int | None:
    """Bytes that a step holds at its peak, if it has been run before: what PyTorch's allocator gave out, without what
    libraries keep from the first call on. None if CUDA graphs run it, because they allocate nothing."""
    if step.uses_cuda_graphs:
        return None
    if step.device.type == "cuda":
        step.synchronize()
        others = torch.cuda.memory_allocated(step.device) - step.held_bytes()
        torch.cuda.reset_peak_memory_stats(step.device)
        step()
        step.synchronize()
        return torch.cuda.max_memory_allocated(step.device) - others
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler complains if there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return step.held_bytes() + _highest_sum(profiler)


def _highest_sum(profiler: profile) -> int:
    """The most bytes allocated, less those freed, since the profiler began."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def counted_peak(
    contender: Contender,
    batch: int,
    img_size: int,
    task: str,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: str,
) -> int | None:
    """Bytes that `measured_peak` would find if a step held nothing but the results of its operations: not what
    libraries work in, and no gaps between tensors. None for a compiled step, whose compiler decides what it holds.

    Nothing is computed and no device memory is taken: the step runs on fake tensors of its device.

    Args:
        batch: number of images.
        memory_format: one of `MEMORY_FORMATS`, of images and weights.
    """
    if contender.is_compiled:
        return None
    # Built for real, from a small batch: modules do not move to fake tensors.
    step = Step(contender, *random_batch(2, img_size, torch.device("cpu"), memory_format), task, dtype)
    with FakeTensorMode(), _Live() as live:
        _make_fake(step.model, device)
        step.device = device
        shape, layout = (batch, 3, img_size, img_size), MEMORY_FORMATS[memory_format]
        step.images = torch.empty(shape, device=device, memory_format=layout)
        step.targets = torch.empty(batch, dtype=torch.long, device=device)
        step.scaler = torch.amp.GradScaler(device.type, enabled=False)  # it would look at the gradients
        if step.optimizer:
            step.optimizer = adamw(step.model)
            step()  # makes the moments
        live.peak = live.now
        step()
    return live.peak


def _make_fake(model: nn.Module, device: torch.device) -> None:
    """Puts tensors without content on `device` in the place of the model's. To be called in a `FakeTensorMode`."""
    for module in model.modules():
        for tensors, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda tensor: tensor)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    tensors[name] = kind(like)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
