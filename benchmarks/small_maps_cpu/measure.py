"""Milliseconds of a layer's forward and backward pass on small maps, in the forms that models/ops.py chooses from.

    python benchmarks/small_maps_cpu/measure.py > benchmarks/small_maps_cpu/small_maps.md

Medians of rounds in which the forms take turns, float32, batch 128, one thread.
"""

import platform
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tables import markdown

from models.ops import DepthwiseConv, mix_strips, pointwise

BATCH, ROUNDS = 128, 30


def milliseconds(forms: dict, shape: tuple[int, ...], weights: list[torch.Tensor]) -> dict[str, float]:
    """Of each form, called with the map and the weights."""
    x = torch.randn(BATCH, *shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    times = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            started = time.perf_counter()
            y = form(x, *weights)
            y.backward(torch.ones_like(y))
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: median(values[3:]) for name, values in times.items()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for side, dim in ((1, 192), (2, 96), (4, 48), (8, 24), (16, 24)):
        for kernel in (3, 7):
            conv = DepthwiseConv(dim, kernel)
            whole = partial(F.conv2d, padding=kernel // 2, groups=dim)
            cut = lambda x, weight, conv=conv: conv(x)  # noqa: E731
            forms = {"whole kernel": whole, "cut": cut}
            rows.append(
                (f"depthwise {kernel} x {kernel}", side, dim, milliseconds(forms, (dim, side, side), [conv.weight]))
            )
        forms = {form: partial(pointwise, form=form) for form in ("conv", "linear")}
        rows.append(("1 x 1 to 3 x as many", side, dim, milliseconds(forms, (dim, side, side), [random(3 * dim, dim)])))
        forms = {form: partial(mix_strips, axis="row", q=2, form=form) for form in ("conv", "matmul")}
        weights = [random(dim // 4, side, side, 3), random(dim // 4, side)]
        rows.append(("strips, m = 3, q = 2", side, dim // 2, milliseconds(forms, (dim // 2, side, side), weights)))
    cells = [
        (layer, f"{side} x {side}", dim, *(f"{name}: {value:.2f}" for name, value in found.items()))
        for layer, side, dim, found in rows
    ]
    print(markdown(("layer", "map", "channels", "convolution, ms", "other form, ms"), cells))
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")


if __name__ == "__main__":
    main()
