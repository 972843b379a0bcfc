"""Peak memory of a step, measured on its device: what it holds at its peak, weights and moments included."""

import itertools
import os

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contenders import Step


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
