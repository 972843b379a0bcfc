"""Speed and memory of training and inference: Strip-MLP, timm's peers and the literal equations, side by side.

    python tools/benchmark.py
    python tools/benchmark.py --contenders strip_mlp_tiny literal:strip_mlp_tiny convnext_tiny --modes eager compile
    python tools/benchmark.py --contenders strip_mlp_tiny:reparameterized strip_mlp_tiny --tasks inference
    python tools/benchmark.py --kernels --contenders strip_mlp_tiny --tasks training
    python tools/benchmark.py --growth
    python tools/benchmark.py --data --help

A contender is [literal:]NAME[:MODE]. NAME is any model that timm knows, ours included; "literal:" is tests/literal.py,
the equations transcribed, with the same weights; MODE is eager, compile (the whole model) or compile_blocks (its
repeated blocks), for inference reparameterized, for training checkpoint (activation checkpointing), and both with
+compile or +compile_blocks.
Contenders of the same task, dtype, batch and image size are timed in turn in one process, in an order that rotates.
Training is forward pass, cross-entropy, backward pass and a fused AdamW step; stochastic depth is 0 everywhere.

--kernels profiles instead: how many kernels a step launches, and the ten dearest.
--growth measures over image sizes and over the variants, and fits the exponents; it needs requirements/figures.txt.
--data measures the data pipeline and has options of its own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.options import parse_args, parse_data_args

from utils import parse_first, require, run_entry_point


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments that they come from, without --data."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--data"]
    is_data = len(arguments) < len(sys.argv) - 1
    return (parse_data_args(arguments) if is_data else parse_args(arguments, __doc__)), arguments


if __name__ == "__main__":
    parse_first(parse)

from bench import compare, data


def main() -> None:
    args, arguments = parse()
    if "--data" in sys.argv[1:]:
        data.main(arguments)
        return
    if args.growth:
        require("matplotlib", extra="figures")
    compare.run(args)


if __name__ == "__main__":
    run_entry_point(main)
