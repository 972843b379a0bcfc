"""Training images/s and peak memory on the CPU: RetinaNet on Strip-MLP-T and torchvision's RetinaNet on ResNet-50.

    python benchmarks/detection_cpu/measure.py > benchmarks/detection_cpu/detection.md
    python benchmarks/detection_cpu/measure.py --size 64 --rounds 2 --steps 1    # does it work?

Contenders: configs/detection/retinanet_strip_mlp_tiny.yaml, and torchvision's `retinanet_resnet50_fpn_v2`, which trains
all of its layers. Both with random weights, for 80 classes, on the same images and boxes, with AdamW, and convolutions
in channels_last as main_detect.py has them.

A step is forward, backward and the optimizer's update. The contenders take turns, in another order in each round, in
one process each, which waits while the other computes. Medians over the rounds, with the 25th and 75th percentiles.
Memory: what the process has at most while it trains, beyond what it has before it builds the model, and in all.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from number_options import at_least

CONTENDERS = {
    "strip_mlp_tiny": "RetinaNet on Strip-MLP-T",
    "retinanet_resnet50_fpn_v2": "torchvision's RetinaNet on ResNet-50 (`retinanet_resnet50_fpn_v2`)",
}
CLASSES, OBJECTS = 80, 7  # as many in an image as COCO has
CONFIG = ROOT / "configs/detection/retinanet_strip_mlp_tiny.yaml"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", type=at_least(32), default=512, metavar="N", help="side of the images in pixels (512)")
    add("--batch-size", type=at_least(1), default=2, metavar="N", help="(2)")
    add("--rounds", type=at_least(1), default=12, metavar="N", help="(12)")
    add("--steps", type=at_least(1), default=2, metavar="N", help="of a contender in each round (2)")
    add("--threads", type=at_least(1), default=2, metavar="N", help="of the CPU (2)")
    add("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # a process of this very script
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()

import psutil
import torch
import torchvision
from bench.report import cpu_name
from tables import markdown
from torch import nn

from config import load_config
from detection.models import build_detector
from models.build import convolutions_to


def build(name: str, size: int) -> nn.Module:
    """A detector that takes a batch (N, 3, size, size) and targets with labels from 0."""
    if name == "retinanet_resnet50_fpn_v2":
        return torchvision.models.detection.retinanet_resnet50_fpn_v2(
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
            fixed_size=(size, size),
        )
    return build_detector(load_config(CONFIG, ["DATA.IMG_SIZE", str(size)])[0], CLASSES)


def batch(size: int, count: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(count):
        corners = torch.rand(OBJECTS, 2, generator=generator) * 0.7 * size
        sides = (0.05 + 0.25 * torch.rand(OBJECTS, 2, generator=generator)) * size
        labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], dim=1), "labels": labels})
    return torch.rand(count, 3, size, size, generator=generator), targets


def train(args: argparse.Namespace) -> None:
    """A contender's process: for each line on standard input, so many steps, and a line with what they took."""
    process = psutil.Process()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, targets = batch(args.size, args.batch_size)
    before = process.memory_info().rss
    model = build(args.contender, args.size).train()
    convolutions_to(model, torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    about = {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(args.steps):
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "peak": peak_memory(), "before": before}), flush=True)


def peak_memory() -> int:
    """The most that this process has had in memory, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class Contender:
    """A process that trains when it is told to."""

    def __init__(self, name: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.about, self.rounds = self._read(), []

    def run(self) -> dict[str, Any]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the process of a contender has ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(args: argparse.Namespace) -> None:
    contenders = {name: Contender(name) for name in CONTENDERS}
    for contender in contenders.values():
        contender.run()  # not counted
    for number in range(args.rounds):
        order = list(contenders.values())
        for contender in order if number % 2 else order[::-1]:
            contender.rounds.append(contender.run())
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    rows = []
    for name, contender in contenders.items():
        seconds = torch.tensor([turn["seconds"] for turn in contender.rounds])
        speed = args.steps * args.batch_size / seconds
        low, middle, high = torch.quantile(speed, torch.tensor([0.25, 0.5, 0.75])).tolist()
        last = contender.rounds[-1]
        memory = [f"{bytes_ / 2**30:.2f}" for bytes_ in (last["peak"] - last["before"], last["peak"])]
        parameters = f"{contender.about['parameters'] / 1e6:.1f}"
        rows.append((CONTENDERS[name], parameters, f"{middle:.3f} ({low:.3f} to {high:.3f})", *memory))
        contender.end()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{cpu_name()}, {args.threads} threads, {versions}, {platform.system()}; {args.size} x {args.size} pixels,")
    print(f"batch {args.batch_size}, float32, {args.rounds} rounds of {args.steps} steps.\n")
    columns = ("detector", "parameters, M", "training images/s", "memory of the training, GiB", "of the process, GiB")
    print(markdown(columns, rows), end="")


if __name__ == "__main__":
    train(args) if args.contender else main(args)
