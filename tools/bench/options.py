"""The options of tools/benchmark.py. Nothing here imports PyTorch, so that --help answers at once."""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from number_options import above, at_least

LITERAL = "literal:"
# As TRAIN.COMPILE does with each TRAIN.COMPILE_UNIT
COMPILED = {"compile": "model", "compile_blocks": "blocks"}
MODES = tuple(
    "+".join(filter(None, parts)) or "eager"
    for parts in itertools.product(("", "reparameterized", "checkpoint"), ("", *COMPILED))
)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
TASKS = ("inference", "training")
MEMORY_FORMATS = ("channels_last", "contiguous")
DTYPES = ("float32", "bfloat16", "float16")
FEWEST_ROUNDS = 3
DEFAULT = (
    *("strip_mlp_tiny", "literal:strip_mlp_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny"),
    *("resnet50", "resmlp_24_224"),
)
GROWTH_SIZES = (128, 160, 192, 224, 256, 288, 320, 384)
VARIANTS = ("strip_mlp_tiny_light", "strip_mlp_tiny", "strip_mlp_small", "strip_mlp_base")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
# A step on a CPU takes a while: with the batch of a GPU, minutes.
CPU_BATCH = 16

DATA_HELP = """How fast images come: per image and part, from the loader alone, and as seen by a training step.

    python tools/benchmark.py --data
    python tools/benchmark.py --data --cfg configs/peers/swin_tiny.yaml --data-path DATA --workers 4 8 16
    python tools/benchmark.py --data --step-images-per-second 500 1000 2000

Three measurements, all of the training pipeline of a config:

- parts: milliseconds per image to read and decode, to crop, resize and flip, to augment (RandAugment), and to make a
  tensor; of what the loaders do and of alternatives to it, image by image in turn, with the same random draws.
- loader: images per second of the loader with nothing else to do, for each number of --workers.
- waiting: the share of the time in which a step that takes so many images per second waits for its data. The step is a
  pause for each of --step-images-per-second, as for the host of a GPU; without that option it is the real one, forward,
  backward and optimizer, of the config's model on this machine.

Without --data-path (a folder with train/ in it, one folder per class) it makes photograph-like JPEGs in a temporary
folder. The files are read often, so that they come from memory rather than from a disk.

Writes the JSON file --output and a Markdown table beside it.
"""


def parse_args(argv: Sequence[str], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--growth",
        nargs="?",
        const="strip_mlp_tiny",
        metavar="CONTENDER",
        help="cost over image sizes of one model (strip_mlp_tiny), and over the variants (--contenders) at 224",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="how many kernels a step launches, and the dearest, instead of speeds"
    )
    parser.add_argument("--contenders", nargs="+", metavar="CONTENDER", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="of contenders that name none")
    parser.add_argument(
        "--against", metavar="REVISION", help="of git: ours among the contenders are also run as they were there"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="default: 8 on CPU; 256, 128 on CUDA")
    parser.add_argument("--img-sizes", nargs="+", type=int, metavar="S", help="default: 224; with --growth, 128 to 384")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--memory-format", choices=MEMORY_FORMATS, default="channels_last")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default")
    parser.add_argument(
        "--freeze",
        action=argparse.BooleanOptionalAction,
        help="compile inference with the weights for constants (default: on the CPU)",
    )
    parser.add_argument(
        "--count-memory", action="store_true", help="a column with the peak that the operations' results add up to"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument("--warmup", type=int, metavar="N", help="calls after the first; default: 1 on CPU, 5 on CUDA")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of timing, at most (default: 20)")
    parser.add_argument(
        "--seconds", type=float, default=30, metavar="S", help="of timing per group, unless 3 rounds take longer"
    )
    parser.add_argument(
        "--output", type=Path, metavar="NAME.json", help="Markdown goes beside it (default: output/benchmark.json)"
    )
    args = parser.parse_args(argv)
    for name, least in (("batch_sizes", 1), ("img_sizes", 1), ("threads", 1), ("warmup", 0), ("rounds", FEWEST_ROUNDS)):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                parser.error(f"--{name.replace('_', '-')} is {value}; accepted: {least} or more")
    if args.seconds <= 0:
        parser.error(f"--seconds is {args.seconds:g}; accepted: more than 0")
    if args.output and args.output.suffix != ".json":
        parser.error(f"--output is {args.output}; accepted: a name that ends in .json")
    if args.growth and any(values and len(values) > 1 for values in (args.batch_sizes, args.dtypes, args.modes)):
        parser.error("--growth takes one of --batch-sizes, --dtypes and --modes")
    if args.kernels and (args.growth or args.against or args.count_memory):
        parser.error("--kernels goes with none of --growth, --against and --count-memory")
    if args.growth and args.count_memory:
        parser.error("--growth counts memory by itself; --count-memory is for comparisons")
    if args.growth and args.against:
        parser.error("--growth and --against exclude each other")
    args.img_sizes = args.img_sizes or (list(GROWTH_SIZES) if args.growth else [224])
    if args.growth and (len(set(args.img_sizes)) < 2 or any(size % 32 for size in args.img_sizes)):
        parser.error(f"--img-sizes {' '.join(map(str, args.img_sizes))}: --growth takes two or more multiples of 32")
    args.output = args.output or Path(
        f"output/{'growth' if args.growth else 'kernels' if args.kernels else 'benchmark'}.json"
    )
    args.contenders = args.contenders or list(VARIANTS if args.growth else DEFAULT)
    return args


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse_data_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DATA_HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    add = parser.add_argument
    add("--cfg", metavar="FILE", default=CONFIG, help=f"YAML config file (configs/{CONFIG.name})")
    add("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set, in pairs")
    add("--batch-size", type=at_least(1), help=f"images per step (the config's; {CPU_BATCH} without a GPU)")
    add("--data-path", metavar="FOLDER", type=Path, help="has train/ with one folder of images per class")
    usual = sorted({0, 1, min(8, cores())})
    add("--workers", nargs="+", type=at_least(0), default=usual, metavar="N", help=f"loader processes ({usual})")
    add("--images", type=at_least(1), default=256, metavar="N", help="to make, or to use of those there are (256)")
    add("--seconds", type=above(0), default=10.0, metavar="S", help="per measurement (10)")
    add(
        "--step-images-per-second",
        nargs="+",
        type=above(0),
        metavar="X",
        help="speeds of a step; without, a real one is run",
    )
    add("--output", type=Path, default=Path("output/benchmark_data/input_pipeline.json"), metavar="PATH.json")
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        parser.error(f"argument --output: {args.output}; accepted: a name that ends in .json")
    return args
