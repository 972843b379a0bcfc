"""Memory of a training step in the forms that a GPU takes, counted without one: the peak of what PyTorch's operations
return, weights, gradients and AdamW's moments included, at batch 128 in bfloat16.

    python benchmarks/memory_gpu/count.py > benchmarks/memory_gpu/memory.md

No tensor has content, so that a laptop can count it. What libraries work in, and gaps between tensors, are not in it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch
from bench.contenders import parse_contenders
from bench.memory import counted_peak
from tables import markdown

from models import ops

BATCH = 128
NAMES = (
    *("strip_mlp_tiny_light", "strip_mlp_tiny", "strip_mlp_tiny:checkpoint", "strip_mlp_small", "strip_mlp_base"),
    *("literal:strip_mlp_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50"),
)


def main() -> None:
    ops.on_gpu = lambda x: True
    rows = []
    for contender in parse_contenders(NAMES):
        peak = counted_peak(contender, BATCH, 224, "training", torch.bfloat16, torch.device("cpu"), "channels_last")
        rows.append((contender.label, f"{peak / 2**30:.2f}"))
    print(markdown(("network", "peak of a training step, GiB"), rows), end="")


if __name__ == "__main__":
    main()
