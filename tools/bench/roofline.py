"""What a machine can do at most, measured, and how much of it a model needs."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PASSES = {"inference": 1, "training": 3}  # in forward passes: the backward pass has two products for each one


@dataclass
class Work:
    """Of one forward pass of a batch.

    Attributes:
        macs: multiply-adds of convolutions, matrix products and attention.
        elements: of their operands and results, each read or written once: what must pass between memory and processor
            however well they are written. What lies between them could be fused into them.
    """

    macs: int = 0
    elements: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flops = flop_registry.get(func._overloadpacket)
        if flops is None:
            with self:  # what it is made of may be counted, as in complexity.py
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.work.macs += flops(*args, **kwargs, out_val=result) // 2
        output = result[0] if isinstance(result, tuple | list) else result
        operands = tree_leaves((args, kwargs))
        self.work.elements += sum(_elements(tensor) for tensor in (*operands, output) if isinstance(tensor, Tensor))
        return result


def _elements(tensor: Tensor) -> int:
    """Without the repetitions of what was expanded."""
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())


def count_work(model: nn.Module, batch: int, img_size: int) -> Work:
    """Counts on shapes alone.

    Args:
        model: is moved to the meta device, where it stays.
    """
    counter = _Counter()
    model = model.to("meta").eval()
    with torch.no_grad(), counter:
        model(torch.empty(batch, 3, img_size, img_size, device="meta"))
    return counter.work


@dataclass
class Ceilings:
    """Measured on a device in one dtype.

    Attributes:
        flops: floating point operations per second, two per multiply-add.
        flops_by: the product that reached them.
        bandwidth: bytes per second from and to memory.
    """

    flops: float
    flops_by: str
    bandwidth: float

    def shares(self, work: Work, task: str, seconds: float, itemsize: int) -> tuple[float, float]:
        """Of the matrix and of the memory ceiling, that a model reaches which does `work` in `seconds` per step.

        Args:
            itemsize: bytes per element of the dtype that it computes in.
        """
        passes = PASSES[task]
        matrix = 2 * work.macs * passes / seconds / self.flops
        return matrix, work.elements * itemsize * passes / seconds / self.bandwidth


class Probe:
    """Measures the machine's ceilings: the best of several products (square matrices, and a 1 x 1 convolution, which on
    the CPU goes through another library), and of a copy and a sum of large vectors.

    Args:
        budget: seconds for the first measurement, roughly; each product is run at least twice.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, budget: float = 3.0):
        self.device = device
        sides = (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048)
        reached: dict[str, float] = {}
        for side in sides:
            for name, product in self._products(side, dtype).items():
                with contextlib.suppress(RuntimeError), torch.inference_mode():  # not every library has every dtype
                    seconds = _fastest(product, device, budget / 3 / 2 / len(sides))
                    reached[f"{name} of {side} x {side}"] = 2 * side**3 / seconds
        self.by = max(reached, key=reached.__getitem__)
        name, _, side = self.by.partition(" of ")
        self.side = int(side.partition(" ")[0])
        self.product = self._products(self.side, dtype)[name]
        count = (1 << 28) // 4  # far more than any cache holds
        self.vectors = [torch.ones(count, device=device) for _ in range(3)]

    def _products(self, side: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        # The same product, as a convolution of one image with `side` channels and `side` pixels
        image = a.view(1, 16, side // 16, side).permute(0, 3, 1, 2)
        kernel = b.view(side, side, 1, 1)
        return {"linear": lambda: F.linear(a, b), "conv2d": lambda: F.conv2d(image, kernel)}

    def measure(self, budget: float = 0.0) -> Ceilings:
        """The product that was the fastest, and the copy or the sum.

        Args:
            budget: seconds, roughly; each is run at least twice.
        """
        with torch.inference_mode():
            flops = 2 * self.side**3 / _fastest(self.product, self.device, budget / 3)
            source, other, target = self.vectors
            copy = _fastest(lambda: target.copy_(source), self.device, budget / 3)
            triad = _fastest(lambda: torch.add(source, other, alpha=0.5, out=target), self.device, budget / 3)
        return Ceilings(flops, self.by, max(2 * source.nbytes / copy, 3 * source.nbytes / triad))


def _fastest(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Seconds of the fastest of several runs after the first; at least one."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    deadline = time.perf_counter() + budget
    timed()
    seconds = [timed()]
    while time.perf_counter() < deadline:
        seconds.append(timed())
    return min(seconds)
