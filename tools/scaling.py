"""What training would take on a cluster: images/s, hours and the bottleneck, from counts and a few figures.

    python tools/scaling.py
    python tools/scaling.py --gpus 4 32 --cores 64 --file-system 2 --csv small_cluster.csv

Nothing is trained. PyTorch's meta device counts what a training step computes and moves. A GPU's time is that of its
arithmetic plus that of its memory traffic at their peaks, divided by the share of that speed which other networks
reach; timm's published measurements on another GPU give the share (--efficiency sets it). Decoding, the file system
and the all-reduce of the gradients are figures of the cluster, and every one is a flag. docs/scaling.md has the
sources, and what follows from the table.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import above, at_least

from utils import UserError, parse_first, run_entry_point

CONFIGS = ("configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", "configs/smlp_base_alpha3_patch4_224_imagenet1k.yaml")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = above(0)
    add = parser.add_argument
    add("--cfg", nargs="+", default=CONFIGS, metavar="FILE", help="YAML config files (T and B)")
    add("--gpus", nargs="+", type=at_least(1), default=[1, 8, 64, 512], metavar="N", help="(1 8 64 512)")
    add("--batch-size", type=at_least(1), default=128, help="images per GPU, if --global-batch allows it (128)")
    add("--global-batch", type=at_least(1), default=4096, help="images per step at most (4096)")
    add("--tflops", type=positive, default=989.4, help="of a GPU, bfloat16, dense (989.4, H100 SXM5)")
    add("--memory", type=positive, default=3350.0, help="GB/s of a GPU's memory (3350, H100 SXM5)")
    add("--efficiency", type=positive, help="share of the peaks that is reached (from published figures)")
    add("--launch", type=positive, default=5.0, help="microseconds that PyTorch takes per operation (5)")
    add("--gpus-per-node", type=at_least(1), default=8, metavar="N", help="(8)")
    add("--nvlink", type=positive, default=476.0, help="GB/s of an all-reduce within a node (476)")
    add("--network", type=positive, default=368.0, help="GB/s of an all-reduce between nodes (368)")
    add("--cores", type=at_least(1), default=112, help="of a node's processors (112, DGX H100)")
    add("--decode", type=positive, default=375.0, help="images/s that one core reads and augments (375)")
    add("--file-system", type=positive, default=9.6, help="GB/s of the file system that all nodes share (9.6)")
    add("--csv", metavar="FILE", type=Path, help="write the table there too")
    return parser.parse_args()


if __name__ == "__main__":
    parse_first(parse_args)

import timm
import torch
from complexity import Complexity, without_data, write_csv
from tables import markdown
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import image_size, load_config
from models import build_model, idle_keys

# timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: training images/s on one GPU, and the batch size
RTX_3090 = {
    "swin_tiny_patch4_window7_224": (648.69, 256),
    "swin_base_patch4_window7_224": (281.0, 128),
    "convnext_small": (487.15, 192),
    "convnext_base": (338.68, 128),
    "resnet152": (501.44, 192),
    "vit_base_patch16_224": (392.99, 192),
    "mixer_b16_224": (556.6, 256),
    "resmlp_36_224": (509.53, 192),
    "gmlp_s16_224": (657.63, 192),
}
# NVIDIA's GA102 white paper: float16 with float32 sums, dense; memory
RTX_3090_TFLOPS, RTX_3090_MEMORY = 71.0, 936.0

# Images, epochs of the usual recipe, GB of files
DATA_SETS = {"ImageNet-1K": (1_281_167, 300, 148), "ImageNet-21K": (14_197_122, 90, 1_310)}
ADAMW_BYTES = 28  # per parameter: reads weight, gradient and two moments, writes all but the gradient; float32


@dataclass
class Work:
    """Of training steps of one model, on one GPU.

    Attributes:
        parameters: of the model.
        flops: per image, two per multiply-add, of the forward and the backward pass.
        image_bytes: that pass between memory and processor, per image.
        step_bytes: the same per step, whatever the batch: weights, gradients, the optimizer.
        operations: that start a kernel, per step.
    """

    parameters: int
    flops: float
    image_bytes: float
    step_bytes: float
    operations: int

    def seconds(self, batch: int, tflops: float, memory: float) -> float:
        """Of a step, at the peaks of arithmetic (`tflops`, 10^12 per second) and memory (GB/s), one after the other."""
        return batch * self.flops / (tflops * 1e12) + (batch * self.image_bytes + self.step_bytes) / (memory * 1e9)


class _Traffic(TorchDispatchMode):
    """Counts operations that run a kernel, and the bytes that they read and write. Views run none."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten" or func._overloadpacket in NO_KERNEL:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.operations += 1
        return result


NO_KERNEL = {torch.ops.aten.detach, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten._unsafe_view}


def work(model: nn.Module, size: tuple[int, int] = (224, 224)) -> Work:
    """What a training step of the model does in bfloat16. Its traffic is counted at batches of 2 and 4.

    Args:
        model: is moved to the meta device, where it stays.
    """
    total = Complexity(model, size).of()
    model = model.to(torch.bfloat16)
    counts = []
    for batch in (2, 4):
        images = torch.empty(batch, 3, *size, device="meta", dtype=torch.bfloat16)
        model.zero_grad()  # gradients that are there would be added to
        # Strip-MLP has other forms on a GPU, which copy and recompute more.
        with patch("models.ops.on_gpu", lambda x: True), _Traffic() as traffic:
            model(images).float().sum().backward()
        counts.append(traffic)
    two, four = counts
    return Work(
        parameters=total.parameters,
        # The backward pass has two products for each one. (PyTorch's own counter takes those of grouped convolutions
        # for ungrouped ones.)
        flops=3 * 2 * total.macs,
        image_bytes=(four.bytes - two.bytes) / 2,
        step_bytes=2 * two.bytes - four.bytes + ADAMW_BYTES * total.parameters,
        operations=four.operations,
    )


def published_efficiency(networks: Iterable[str] = tuple(RTX_3090)) -> dict[str, float]:
    """By network, the share of the RTX 3090's peaks that timm measured in training."""
    shares = {}
    for name in networks:
        images_per_second, batch = RTX_3090[name]
        counted = work(timm.create_model(name))
        shares[name] = counted.seconds(batch, RTX_3090_TFLOPS, RTX_3090_MEMORY) * images_per_second / batch
    return shares


def allreduce_seconds(args: argparse.Namespace, gpus: int, parameters: int) -> float:
    """Of the gradients, which are float32: a ring sends each byte 2 (n - 1) / n times (nccl-tests, PERFORMANCE.md)."""
    bandwidth = args.nvlink if gpus <= args.gpus_per_node else min(args.nvlink, args.network)
    return 2 * (gpus - 1) / gpus * 4 * parameters / (bandwidth * 1e9)


def row(args: argparse.Namespace, name: str, counted: Work, gpus: int, data_set: str) -> tuple:
    """One line of the table. Rates in images/s, times in milliseconds per step and in hours."""
    batch = max(1, min(args.batch_size, args.global_batch // gpus))
    kernels = counted.seconds(batch, args.tflops, args.memory) / args.efficiency
    launches = counted.operations * args.launch * 1e-6
    allreduce = allreduce_seconds(args, gpus, counted.parameters)
    # The all-reduce goes on beside the backward pass, about two thirds of the step; what is longer is waited for.
    step = max(kernels, launches)
    step += max(0.0, allreduce - 2 / 3 * step)
    images, epochs, gigabytes = DATA_SETS[data_set]
    cores = args.cores * gpus / args.gpus_per_node  # a node that is used in part gives as much of its cores
    rates = {
        "GPU": gpus * batch / step,
        "decoding": cores * args.decode,
        "file system": args.file_system * images / gigabytes,
    }
    bottleneck = min(rates, key=rates.get)
    if bottleneck == "GPU":
        bottleneck = "all-reduce" if step > max(kernels, launches) else "launches" if launches > kernels else "GPU"
    hours = images * epochs / min(rates.values()) / 3600
    milliseconds = (round(1000 * seconds, 1) for seconds in (kernels, launches, allreduce))
    return (name, data_set, gpus, batch, *milliseconds, *map(round, rates.values()), bottleneck, round(hours, 2))


def count_all(configs: Sequence[str]) -> dict[str, Work]:
    """By the models' names.

    Raises:
        UserError: a config is wrong, or two have the same MODEL.NAME.
    """
    counted = {}
    for file in configs:
        config, _ = load_config(file, [], idle_keys=idle_keys)
        if config.MODEL.NAME in counted:
            raise UserError(f"--cfg {file}: its MODEL.NAME {config.MODEL.NAME} is another file's too; give it its own")
        counted[config.MODEL.NAME] = work(build_model(without_data(config)), image_size(config))
    return counted


def main() -> None:
    args = parse_args()
    counted = count_all(args.cfg)
    if args.efficiency is None:
        shares = published_efficiency()
        args.efficiency = median(shares.values())
        rows = [(name, RTX_3090[name][0], f"{share:.2f}") for name, share in shares.items()]
        print(markdown(("network, RTX 3090", "images/s, published", "share of the peaks"), rows))
    print(f"share of the peaks that is assumed: {args.efficiency:.2f}\n")
    rows = [
        (name, f"{one.parameters:,}", f"{one.flops / 1e9:.1f}", f"{one.image_bytes / 1e6:,.0f}", one.operations)
        for name, one in counted.items()
    ]
    print(markdown(("model", "parameters", "GFLOP per image", "MB moved per image", "operations per step"), rows))
    titles = (
        *("model", "data set", "GPUs", "images per GPU", "kernels, ms", "launches, ms", "all-reduce, ms"),
        *("GPUs, images/s", "decoding, images/s", "file system, images/s", "bottleneck", "hours"),
    )
    cases = itertools.product(DATA_SETS, counted, args.gpus)
    rows = [row(args, name, counted[name], gpus, data_set) for data_set, name, gpus in cases]
    shown = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in cells] for cells in rows]
    print(markdown(titles, shown), end="")
    if args.csv:
        write_csv(args.csv, titles, rows)


if __name__ == "__main__":
    run_entry_point(main)
