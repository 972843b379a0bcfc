"""Milliseconds of CycleMLP's cycle fully-connected layers, as models/cycle_mlp.py computes them and as deformable
convolutions with the offsets of the paper's equation: one layer of each stage of CycleMLP-B1, and the network.

    python benchmarks/cycle_cpu/measure.py > benchmarks/cycle_cpu/cycle.md

Medians of rounds in which the two take turns, float32, images of 224 x 224, batch 8, one thread. The deformable
convolutions get their offsets ready-made, and maps in the memory format that they like.
"""

import copy
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tables import markdown

import models  # noqa: F401  (registers the variants with timm)
from models.cycle_mlp import CycleMixing, cycle
from models.ops import PointwiseConv

BATCH, ROUNDS = 8, 15
FORMATS = {"ours": torch.channels_last, "deformable": torch.contiguous_format}


class Ours(nn.Module):
    def __init__(self, conv: PointwiseConv):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(cycle(x, "row"))


class Deformable(nn.Module):
    """The same; `down` and `right` say which of each pair of offsets is the channel's step."""

    def __init__(self, conv: PointwiseConv, size: tuple[int, int], axis: str = "row"):
        super().__init__()
        self.conv = conv
        offsets = torch.zeros(BATCH, conv.in_channels, 2, *size)  # (down, right) of each channel
        steps = (torch.arange(conv.in_channels) + 1) % 3 - 1.0
        offsets[:, :, int(axis == "row")] = steps[:, None, None]
        self.offsets = offsets.flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return deform_conv2d(x, self.offsets, self.conv.weight, self.conv.bias)


class DeformableMixing(nn.Module):
    def __init__(self, mixing: CycleMixing, size: tuple[int, int]):
        super().__init__()
        self.mixing = mixing
        self.sfc_h, self.sfc_w = Deformable(mixing.sfc_h, size, "row"), Deformable(mixing.sfc_w, size, "column")

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixing.reweight(self.sfc_h(x), self.sfc_w(x), self.mixing.mlp_c(x))
        return self.mixing.proj(y)


def milliseconds(forms: dict[str, nn.Module], shape: tuple[int, ...], backward: bool) -> dict[str, float]:
    """Of each form, in turn. They must give the same."""
    images = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(*(form(images) for form in forms.values()), rtol=1e-3, atol=1e-4)
    times = {name: [] for name in forms}
    inputs = {name: images.contiguous(memory_format=FORMATS[name]).requires_grad_() for name in forms}

    def step(name: str) -> None:
        if not backward:
            with torch.no_grad():
                forms[name](inputs[name])
            return
        y = forms[name](inputs[name])
        y.backward(torch.ones_like(y))

    for number in range(ROUNDS):
        for name in forms if number % 2 else reversed(forms):
            started = time.perf_counter()
            step(name)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: median(values[2:]) for name, values in times.items()}


def deformable_network(network: nn.Module, side: int) -> nn.Module:
    network = copy.deepcopy(network)
    for stage, info in zip(network.stages, network.feature_info, strict=True):
        for block in stage:
            block.token_mixing = DeformableMixing(block.token_mixing, (side // info["reduction"],) * 2)
    return network


def compare(what: str, ours: nn.Module, other: nn.Module, shape: tuple[int, ...], say: Callable) -> None:
    for backward in (False, True):
        found = milliseconds({"ours": ours, "deformable": other}, shape, backward)
        ratio = found["deformable"] / found["ours"]
        task = "forward and backward" if backward else "forward"
        say((what, task, f"{found['ours']:.2f}", f"{found['deformable']:.2f}", f"{ratio:.1f}"))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, rows = timm.create_model("cycle_mlp_b1").eval(), []
    for stage, info in zip(network.stages, network.feature_info, strict=True):
        conv, side, dim = stage[0].token_mixing.sfc_h, 224 // info["reduction"], info["num_chs"]
        other = Deformable(conv, (side, side))
        compare(f"layer, {dim} x {side} x {side}", Ours(conv), other, (BATCH, dim, side, side), rows.append)
    compare("CycleMLP-B1", network, deformable_network(network, 224), (BATCH, 3, 224, 224), rows.append)
    print(markdown(("what", "task", "ours, ms", "deformable convolutions, ms", "times as fast"), rows))
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")


if __name__ == "__main__":
    main()
