"""Milliseconds of depthwise convolutions and of their gradients, by oneDNN and by models/depthwise.py.

    python benchmarks/depthwise_cpu/measure.py > benchmarks/depthwise_cpu/depthwise.md

Medians of rounds in which all take turns, batch 8, the maps of Strip-MLP-T at 224 x 224.
"""

import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench.report import cpu_name
from tables import markdown

from models.depthwise import input_gradient, same_padding, weight_gradient

BATCH, ROUNDS = 8, 15
COLUMNS = ("forward", "gradient of the map", "gradient of the weight, oneDNN", "the same here")


def onednn_gradient(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight as PyTorch computes it."""
    ones, mask = [1, 1], [False, True, False]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, ones, same_padding(weight), ones, False, [0, 0], len(weight), mask
    )[1]


def milliseconds(dim: int, side: int, kernel: tuple[int, int], dtype: torch.dtype) -> list[float]:
    x, gradient = (torch.randn(BATCH, dim, side, side).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(dim, 1, *kernel).to(dtype)
    works = (
        lambda: F.conv2d(x, weight, padding=same_padding(weight), groups=dim),
        lambda: input_gradient(gradient, x, weight),
        lambda: onednn_gradient(gradient, x, weight),
        lambda: weight_gradient(gradient, x, weight),
    )
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            taken.append(1000 * (time.perf_counter() - started))
    return [median(taken[2:]) for taken in times]


def main() -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for dim, side in ((80, 56), (160, 28), (320, 14), (640, 7)):
            for kernel, channels in (((7, 3), dim // 2), ((3, 7), dim // 2), ((7, 7), dim)):
                taken = milliseconds(channels, side, kernel, dtype)
                name = f"{kernel[0]} x {kernel[1]}, {channels} channels, {side} x {side}"
                gain = f"{taken[2] / taken[3]:.1f}"
                rows.append((str(dtype).removeprefix("torch."), name, *(f"{ms:.2f}" for ms in taken), gain))
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}\n")
    print(markdown(("dtype", "kernel (rows x columns)", *COLUMNS, "times as fast"), rows), end="")


if __name__ == "__main__":
    main()
