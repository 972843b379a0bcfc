"""Peak memory of a step: measured on its device, or computed for a GPU that is not there.

Both count what the step holds at its peak, weights and moments included, and nothing that others hold. Measured, it is
what PyTorch's allocator gave out, without what libraries keep from the first call on; computed, the tensors alone.
"""

import heapq
import itertools
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from contenders import MEMORY_FORMATS, Step, adamw
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils import UserError

_runs = itertools.count()
# In older versions (2.11 for one), the graph of a torch.autograd.Function is gone with its result.
PREDICTS_FROM = (2, 15)
BLOCK = 512  # bytes to which PyTorch's allocator for CUDA rounds up


def measured_peak(step: Step) -> int | None:
    """Bytes that a step which has been run before holds at its peak; None where CUDA graphs run it, for they allocate
    nothing."""
    if step.uses_cuda_graphs:
        return None
    if step.device.type == "cuda":
        step.synchronize()
        others = torch.cuda.memory_allocated(step.device) - step.held_bytes()
        torch.cuda.reset_peak_memory_stats(step.device)
        step()
        step.synchronize()
        return torch.cuda.max_memory_allocated(step.device) - others
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler complains where there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return step.held_bytes() + _highest_sum(profiler)


def _highest_sum(profiler: profile) -> int:
    """Of the bytes allocated less those freed since the profiler began; what was allocated before it does not count
    when it is freed."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


class _Tracker(TorchDispatchMode):
    """Follows the storages that operations make on a (fake) CUDA device, until they are freed.

    Attributes:
        peak: the most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, number: int) -> None:
        self._now -= self._alive.pop(number)


def predicted_peak(
    model: nn.Module,
    batch: int,
    img_size: int,
    dtype: torch.dtype,
    memory_format: str = "channels_last",
    task: str = "training",
) -> int:
    """Bytes that a step of an eager model would hold at its peak on a CUDA device, by running it on tensors that have
    shapes and a device but no numbers. For float16 the scaler is left out.

    Args:
        model: of the contender, on the CPU; it is of no use afterwards.

    Raises:
        UserError: this version of PyTorch is too old.
    """
    if torch.__version__ < PREDICTS_FROM:
        raise UserError(
            f"predicting memory needs PyTorch {'.'.join(map(str, PREDICTS_FROM))}; this is {torch.__version__}"
        )
    model = model.to(memory_format=MEMORY_FORMATS[memory_format]).train(task == "training")
    autocast = {"device_type": "cuda", "dtype": dtype, "enabled": dtype != torch.float32}
    with _cuda_autocast_taken_for_available(), FakeTensorMode(), _Tracker() as tracker:
        _move_to_fake_cuda(model)
        shape = (batch, 3, img_size, img_size)
        images = torch.empty(shape, device="cuda", memory_format=MEMORY_FORMATS[memory_format])
        targets = torch.zeros(batch, dtype=torch.long, device="cuda")
        if task == "inference":
            with torch.no_grad(), torch.autocast(**autocast):
                model(images)
            return tracker.peak
        optimizer = adamw(model)
        for _ in range(2):  # the moments are there from the first step on
            with torch.autocast(**autocast):
                graph = [F.cross_entropy(model(images), targets)]
            backward(graph)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.peak


def _move_to_fake_cuda(model: nn.Module) -> None:
    """`Module.to` cannot exchange parameters that are watched."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cuda")
                    tensors[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def _cuda_autocast_taken_for_available() -> Iterator[None]:
    """Where there is no CUDA device, torch.autocast("cuda") turns itself off."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        yield


def backward(graph: list[Tensor]) -> None:
    """What `loss.backward()` does, node by node from Python, freeing each as soon as it is done.

    PyTorch's own engine asks the driver of the tensors' device for its state, also where the tensors are fake.

    Args:
        graph: the loss alone; taken out, so that nothing keeps its graph alive. No other tensor of it may be held.
    """
    loss = graph.pop()
    node, gradients = loss.grad_fn, [torch.ones_like(loss.detach())]
    del loss
    # Every node has a higher number than those that it leads to, those that hold parameters the highest.
    waiting: dict[torch.autograd.graph.Node, list[Tensor | None]] = {node: gradients}
    tie = itertools.count()
    queue = [(-node._sequence_nr(), next(tie), node)]
    # Checkpointing computes a region again once for each run of the engine, which this stands for.
    run_of_engine = mock.patch("torch._C._current_graph_task_id", return_value=next(_runs))
    with torch.no_grad(), run_of_engine:
        while queue:
            node = heapq.heappop(queue)[-1]
            gradients = waiting.pop(node)
            run = node.apply if isinstance(node, BackwardCFunction) else node
            results = run(*gradients)
            edges = node.next_functions
            del node, run, gradients
            for (following, place), gradient in zip(edges, _as_tuple(results), strict=False):
                if following is None or gradient is None:
                    continue
                # What broadcasting and mixed precision changed is changed back, as the engine does.
                like = following._input_metadata[place]
                gradient = gradient.sum_to_size(like.shape) if gradient.shape != like.shape else gradient
                gradient = gradient.to(like.dtype)
                if hasattr(following, "variable"):
                    parameter = following.variable
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                    continue
                if following not in waiting:
                    waiting[following] = [None] * len(following._input_metadata)
                    heapq.heappush(queue, (-following._sequence_nr(), next(tie), following))
                sums = waiting[following]
                sums[place] = gradient if sums[place] is None else sums[place] + gradient
            del results, edges, following, gradient


def _as_tuple(results: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return results if isinstance(results, tuple) else (results,)
