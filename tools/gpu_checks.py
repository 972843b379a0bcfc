"""Training runs that show whether a GPU gives what a CPU gives. Each ends with status 1 if it does not.

    python tools/gpu_checks.py digits --device cuda --output FOLDER
    python tools/gpu_checks.py digits --amp float16 --output FOLDER
    python tools/gpu_checks.py group --output FOLDER

digits: trains strip_mlp_pico on the digits as the quick start does, and compares the accuracy with the CPU's.
group:  trains with one process in a process group (NCCL; gloo on the CPU), DistributedDataParallel and SyncBatchNorm,
        which main.py has from two processes on, and compares the losses with those of a run without.

Writes FOLDER/result.json and result.md, and the runs into FOLDER/runs.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, run_entry_point

CONFIG = "configs/strip_mlp_pico_digits.yaml"
CPU_TOP1 = 99.72  # in percent of 360 digits, the mean of five seeds: docs/ablations.md
IMAGES_OFF = 2  # by so many of the 360 a run may be behind: other rounding is another run
LOSS_OFF = 0.05  # relative difference of losses of two runs that differ in rounding alone


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("digits", "group"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--amp", choices=("auto", "off", "bfloat16", "float16"), default="auto", help="of the digits")
    parser.add_argument("--tiny", action="store_true", help="one epoch; no accuracy is asked for")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="without runs in it")
    args = parser.parse_args()
    if (args.output / "runs").exists():
        parser.error(f"--output {args.output}: there are runs in it already; accepted: a folder without")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import torch
import torch.distributed as dist
from tables import markdown
from torch.nn import SyncBatchNorm

import main as training
from runtime.distributed import World


def train(args: argparse.Namespace, tag: str, *options: str) -> list[dict]:
    """The metrics of each epoch of a run of main.py in this process.

    Raises:
        UserError: it did not come to its end.
    """
    command = ["main.py", "--cfg", CONFIG, "--device", args.device, "--output", str(args.output / "runs"), "--tag", tag]
    with patch("sys.argv", [*command, *options]):
        try:
            training.main()
        except SystemExit as ended:
            if ended.code:
                raise UserError(f"the run {tag} ended with status {ended.code}") from ended
    lines = (args.output / "runs" / "strip_mlp_pico_digits" / tag / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def digits(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """What was found, and what is wrong with it."""
    epochs = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"] if args.tiny else []
    metrics = train(args, args.amp, "--amp", args.amp, *epochs)
    found = {
        "amp": args.amp,
        "top1": metrics[-1]["top1"],
        "top1_cpu": CPU_TOP1,
        "skipped_steps": sum(line["skipped_steps"] for line in metrics),
        "images_per_second": metrics[-1]["images_per_second"],
        "epochs": len(metrics),
    }
    least = CPU_TOP1 - 100 * IMAGES_OFF / 360 - 0.01  # the percentages are rounded
    wrong = [] if args.tiny or found["top1"] >= least else [f"top-1 is {found['top1']:.2f} %, expected {least:.2f} %"]
    return found, wrong


class OneOfMany(World):
    """One process that takes part in everything that several do."""

    distributed = True


class One(int):
    """1, but more than one: SyncBatchNorm asks whether it is, and else is an ordinary BatchNorm."""

    def __gt__(self, other: int) -> bool:
        return int(self) >= other


@contextlib.contextmanager
def group_of_one(device: str) -> Iterator[World]:
    """A process group of this process alone, as `runtime.distributed.init_world` makes larger ones."""
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # port 0: any that is free
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}  # where the watchdog looks for it
    keys = {"store": store, "rank": 0, "world_size": 1}
    if device == "cuda":
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", **keys, device_id=where)
        host_group = dist.new_group(backend="gloo")
    else:
        dist.init_process_group("gloo", **keys)
        host_group = None
    try:
        yield OneOfMany(0, 0, 1, where, host_group, "")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def group(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """What was found, and what is wrong with it."""
    options = ["--opts", "TRAIN.EPOCHS", "1" if args.tiny else "3", "TRAIN.WARMUP_EPOCHS", "0"]
    alone = train(args, "alone", *options)
    # The product refuses SyncBatchNorm on the CPU.
    sync = ["TRAIN.SYNC_BN", "True"] if args.device == "cuda" else []
    normalised = []
    forward = SyncBatchNorm.forward

    def counted(self: SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
        with patch("torch.distributed.get_world_size", lambda *_: One(1)):
            normalised.append(self.training)
            return forward(self, x)

    with group_of_one(args.device) as world:
        backend = dist.get_backend()
        with patch.object(training, "init_world", lambda *_: world), patch.object(SyncBatchNorm, "forward", counted):
            grouped = train(args, "group", *options, *sync)
    losses = [[line["train_loss"] for line in metrics] for metrics in (alone, grouped)]
    found = {
        "backend": backend,
        "sync_batch_norm": f"{sum(normalised)} times in training" if sync else "skipped: the CPU has none",
        "losses_alone": losses[0],
        "losses_group": losses[1],
        "top1_alone": alone[-1]["top1"],
        "top1_group": grouped[-1]["top1"],
    }
    # Later epochs may drift apart, as rounding grows in training.
    difference = abs(losses[1][0] / losses[0][0] - 1)
    wrong = [f"the losses of epoch 1 differ by {difference:.1%}, accepted: {LOSS_OFF:.0%}"]
    wrong = wrong if not difference <= LOSS_OFF else []
    if sync and not any(normalised):
        wrong.append("SyncBatchNorm was not used")
    return found, wrong


def main() -> None:
    args = parse_args()
    found, wrong = {"digits": digits, "group": group}[args.check](args)
    (args.output / "result.json").write_text(json.dumps({**found, "wrong": wrong}, indent=1))
    (args.output / "result.md").write_text(markdown(("what", "found"), list(found.items())))
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    run_entry_point(main)
