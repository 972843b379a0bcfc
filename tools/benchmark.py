"""Speed and memory of training and inference: Strip-MLP, timm's peers and the literal equations, side by side.

    python tools/benchmark.py
    python tools/benchmark.py --contenders strip_mlp_tiny literal:strip_mlp_tiny convnext_tiny --modes eager compile
    python tools/benchmark.py --contenders strip_mlp_tiny:reparameterized strip_mlp_tiny --tasks inference
    python tools/benchmark.py --growth
    python tools/benchmark.py --predict-memory --contenders strip_mlp_base literal:strip_mlp_base
    python tools/benchmark.py --data --help

A contender is [literal:]NAME[:MODE]. NAME is any model that timm knows, ours included; "literal:" is tests/literal.py,
the equations transcribed, with the same weights; MODE is eager or compile, for inference reparameterized or
reparameterized+compile, for training checkpoint or checkpoint+compile (activation checkpointing).
Contenders of the same task, dtype, batch and image size are timed in turn in one process, in an order that rotates.
Training is forward pass, cross-entropy, backward pass and a fused AdamW step; stochastic depth is 0 everywhere.

--growth measures over image sizes and over the variants, and fits the exponents. --predict-memory computes, on any
machine, what a step would hold on a CUDA device. --data is about the data pipeline and has options of its own.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import growth
import torch
from benchmark_report import document, kept_aside, machine, save, say
from contenders import (
    COMPILE_MODES,
    DTYPES,
    LITERAL,
    MEMORY_FORMATS,
    MODES,
    TASKS,
    Contender,
    Step,
    build,
    parse_contenders,
    random_batch,
    reparameterize,
    set_checkpointing,
)
from peak_memory import measured_peak, predicted_peak
from roofline import Ceilings, Work, count_work, measure_ceilings
from tables import markdown
from timing import FEWEST_ROUNDS, Quartiles, Timing, describe, interleave, ratio, warm_up

from utils import UserError, run_entry_point, writing_to

DEFAULT = (
    *("strip_mlp_tiny", "literal:strip_mlp_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny"),
    *("resnet50", "resmlp_24_224"),
)
BATCH = {"cpu": {"inference": 8, "training": 8}, "cuda": {"inference": 256, "training": 128}}


@dataclass(frozen=True)
class Group:
    """What contenders must have in common to be compared."""

    task: str
    dtype: str
    batch: int
    img_size: int

    def __str__(self) -> str:
        return f"{self.task}, {self.dtype}, batch {self.batch}, {self.img_size} x {self.img_size}"


@dataclass
class Row:
    """What is found out about a contender in a group.

    Attributes:
        timing: seconds per batch.
        ratio: how many times as fast as the literal equations of the same variant, round by round; None without them.
        peak_bytes: of a step, with weights; None where it failed.
        matrix_share: of the machine's matrix ceiling.
        memory_share: of its memory ceiling.
    """

    group: Group
    contender: Contender
    timing: Timing
    ratio: Quartiles | None = None
    peak_bytes: int | None = None
    matrix_share: float | None = None
    memory_share: float | None = None

    def cells(self) -> tuple[str, ...]:
        peak = f"{self.peak_bytes / 2**20:,.0f}" if self.peak_bytes else "-"
        if not self.timing.seconds:
            return (self.contender.label, "-", "-", "-", peak, "-", "-", self.timing.problem)
        time = Quartiles.of(self.timing.seconds)
        milliseconds = f"{1e3 * time.median:.2f} [{1e3 * time.low:.2f}, {1e3 * time.high:.2f}]"
        speed = self.group.batch / time.median
        times = f"{self.ratio.median:.2f} [{self.ratio.low:.2f}, {self.ratio.high:.2f}]" if self.ratio else ""
        shares = [
            f"{100 * share:.0f} %" if share is not None else "-" for share in (self.matrix_share, self.memory_share)
        ]
        return (self.contender.label, f"{speed:.1f}", milliseconds, times, peak, *shares, self.timing.problem)

    def data(self) -> dict:
        """For JSON."""
        time = Quartiles.of(self.timing.seconds) if self.timing.seconds else None
        return {
            **asdict(self.group),
            "contender": self.contender.label,
            "model": self.contender.model,
            "mode": self.contender.mode,
            "images_per_second": self.group.batch / time.median if time else None,
            "seconds": asdict(time) if time else None,
            "ratio_to_literal": asdict(self.ratio) if self.ratio else None,
            "peak_bytes": self.peak_bytes,
            "matrix_share": self.matrix_share,
            "memory_share": self.memory_share,
            "first_call_seconds": self.timing.first,
            "calls_per_timing": self.timing.iterations,
            "rounds": self.timing.seconds,
            "problem": self.timing.problem,
        }


TITLES = (
    *("contender", "images/s", "ms per batch [quartiles]", "times as fast as literal", "peak, MiB"),
    *("of matrix ceiling", "of memory ceiling", "remark"),
)


@cache
def work_of(model: str, batch: int, img_size: int) -> Work:
    return count_work(build(model.removeprefix(LITERAL), img_size), batch, img_size)


@cache
def ceilings_of(device: torch.device, dtype: str) -> Ceilings:
    say(f"measuring the machine's ceilings in {dtype}")
    return measure_ceilings(device, DTYPES[dtype])


def measure_group(group: Group, contenders: Sequence[Contender], args: argparse.Namespace) -> list[Row]:
    """Compares contenders; one that fails says so in its row, and the others go on."""
    ceilings = ceilings_of(args.device, group.dtype)
    say(f"{group}: warming up")
    torch.compiler.reset()  # what was compiled for other shapes does not count against the limit of this group
    images, targets = random_batch(group.batch, group.img_size, args.device, args.memory_format)
    rows, steps = {}, {}
    for contender in contenders:
        if contender.task not in (None, group.task):
            continue
        row = rows[contender.label] = Row(group, contender, Timing())
        try:
            dtype = DTYPES[group.dtype]
            step = Step(contender, images, targets, group.task, dtype, args.compile_mode, args.freeze)
            row.timing = warm_up(step, args.warmup)
            row.peak_bytes = measured_peak(step)
            steps[contender.label] = step
        except Exception as error:  # any model's or compiler's own
            row.timing.problem = describe(error)
        step = None  # so that `steps` alone holds it
        if row.timing.problem:
            say(f"{contender.label}: {row.timing.problem}")
            release(args.device)  # not before the error is gone, whose traceback holds tensors
    say(f"{group}: timing {len(steps)} in turn")
    interleave(steps, {label: row.timing for label, row in rows.items()}, args.rounds, args.seconds)
    for row in rows.values():
        if not row.timing.seconds:
            continue
        seconds = Quartiles.of(row.timing.seconds).median
        work = work_of(row.contender.model, group.batch, group.img_size)
        row.matrix_share, row.memory_share = ceilings.shares(work, group.task, seconds, DTYPES[group.dtype].itemsize)
        literal = rows.get(row.contender.literal)
        if literal and len(literal.timing.seconds) == len(row.timing.seconds):
            row.ratio = ratio(row.timing.seconds, literal.timing.seconds)
    steps.clear()
    release(args.device)
    return list(rows.values())


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def predict(contenders: Sequence[Contender], groups: Sequence[Group], args: argparse.Namespace) -> tuple[str, dict]:
    """Computed peak memory of a step on a CUDA device, as Markdown and for JSON."""
    rows, data = [], []
    for group in groups:
        dtype, peaks, problems = DTYPES[group.dtype], {}, {}
        for contender in contenders:
            label = contender.label
            say(f"{group}: {label}")
            try:
                model = build(contender.model, group.img_size)
                if contender.is_checkpointed:
                    set_checkpointing(model, contender.model)
                peaks[label] = predicted_peak(model, group.batch, group.img_size, dtype, args.memory_format, group.task)
            except Exception as error:  # any model's own; the others go on
                problems[label] = describe(error)
        for contender in contenders:
            label = contender.label
            peak, literal, problem = peaks.get(label), peaks.get(contender.literal), problems.get(label, "")
            share = f"{peak / literal:.3f}" if peak and literal else ""
            rows.append((label, str(group), f"{peak / 2**30:.2f}" if peak else "-", share, problem))
            data.append({"contender": label, **asdict(group), "computed_peak_bytes": peak, "problem": problem})
    titles = ("contender", "step", "peak on CUDA, GiB (computed, not measured)", "of literal's", "remark")
    return markdown(titles, rows), {"computed_not_measured": data}


def notes(args: argparse.Namespace) -> list[str]:
    """What is set, and how to read the columns."""
    said = [
        "Stochastic depth is 0 in every model, and there are 1000 classes. bfloat16 and float16 are autocast over "
        "float32 weights, as in training; float16 trains with a gradient scaler.",
        f"Memory format {args.memory_format} of images and weights; torch.compile mode {args.compile_mode!r}"
        f"{', with frozen weights in inference' if args.freeze else ''}.",
        f"{args.warmup} calls of warm-up after the first, then up to {args.rounds} rounds or {args.seconds:g} seconds, "
        f"at least {FEWEST_ROUNDS} rounds. Medians, with quartiles in brackets; the ratio is taken round by round.",
        "The literal equations do not update BatchNorm's running statistics in training; the others do.",
        "Peak: of one step, weights, gradients and AdamW's moments included; not known under CUDA graphs.",
    ]
    if args.device.type == "cuda":
        said.append("TF32 is on for products in float32, and cudnn.benchmark is on.")
    return said


def ceiling_lines(dtypes: Sequence[str], device: torch.device) -> str:
    rows = []
    for dtype in dtypes:
        ceilings = ceilings_of(device, dtype)
        rows.append((dtype, f"{ceilings.flops / 1e12:.3f}", ceilings.flops_by, f"{ceilings.bandwidth / 1e9:.1f}"))
    return (
        "The machine's ceilings, measured in this run:\n\n"
        + markdown(("dtype", "TFLOP/s", "by", "memory, GB/s"), rows)
        + "\nOf the matrix ceiling: 2 x multiply-adds x images/s; of the memory ceiling: the operands and results of "
        "convolutions and matrix products, each read or written once, in the run's dtype. Both count three forward "
        "passes for a training step, and the model as it is defined, whatever its mode.\n"
    )


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        *("--growth",),
        nargs="?",
        const="strip_mlp_tiny",
        metavar="CONTENDER",
        help="cost over image sizes of one model (strip_mlp_tiny), and over the variants (--contenders) at 224",
    )
    what.add_argument("--predict-memory", action="store_true", help="compute the peak on a CUDA device, eager alone")
    parser.add_argument("--contenders", nargs="+", metavar="CONTENDER", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="of contenders that name none")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: both; with --predict-memory: training")
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
    return complete(args, parser)


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options with the defaults that depend on others."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no CUDA device; accepted here: cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device)
    on_cuda = args.device.type == "cuda" or args.predict_memory
    args.dtypes = args.dtypes or ["bfloat16" if on_cuda else "float32"]
    args.tasks = args.tasks or (["training"] if args.predict_memory else list(TASKS))
    args.img_sizes = args.img_sizes or (list(growth.SIZES) if args.growth else [224])
    if args.freeze is None:
        args.freeze = args.device.type == "cpu"
    if args.warmup is None:
        args.warmup = 5 if args.device.type == "cuda" else 1
    name = "growth" if args.growth else "predicted_memory" if args.predict_memory else "benchmark"
    args.output = args.output or Path(f"output/{name}.json")
    if args.growth and (len(set(args.img_sizes)) < 2 or any(size % 32 for size in args.img_sizes)):
        parser.error(f"--img-sizes {' '.join(map(str, args.img_sizes))}: --growth takes two or more multiples of 32")
    args.contenders = args.contenders or list(growth.VARIANTS if args.growth else DEFAULT)
    args.on_cuda = on_cuda
    return args


def as_groups(args: argparse.Namespace) -> list[Group]:
    groups = []
    for task in args.tasks:
        batches = args.batch_sizes or [BATCH["cuda" if args.on_cuda else "cpu"][task]]
        groups += [Group(task, *rest) for rest in itertools.product(args.dtypes, batches, args.img_sizes)]
    return groups


def runnable(contenders: Sequence[Contender], args: argparse.Namespace) -> list[Contender]:
    """The contenders that can be run; those of a mode that was meant for all are left out with a note.

    Raises:
        UserError: a contender that was named with its mode cannot be run in it; or there are none left.
    """
    kept = []
    for contender in contenders:
        try:
            if args.predict_memory and (contender.is_compiled or contender.is_reparameterized):
                raise ValueError(
                    "--predict-memory is of models as they train, not compiled; accepted: eager, checkpoint"
                )
            if contender.task not in (None, *args.tasks):
                raise ValueError(f"its mode is of {contender.task} alone; accepted: --tasks {contender.task}")
            if contender.is_reparameterized:
                reparameterize(build(contender.model, args.img_sizes[0]), contender.model)
            if contender.is_checkpointed:
                set_checkpointing(build(contender.model, args.img_sizes[0]), contender.model)
        except ValueError as error:
            if contender.is_explicit:
                raise UserError(f"contender {contender.label}: {error}") from error
            say(f"left out: {contender.label}: {error}")
            continue
        kept.append(contender)
    if not kept:
        raise UserError("no contender is left")
    return kept


def set_up(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    with writing_to(args.output.parent):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        kept_aside(args.output)


def run_growth(
    args: argparse.Namespace, grown: Contender, contenders: Sequence[Contender], about: dict, settings: dict
) -> None:
    """Measures over the image sizes of one contender and over the variants; writes JSON, CSV, Markdown and a plot."""
    fixed = max((size for size in args.img_sizes if size <= 224), default=min(args.img_sizes))
    options = {**settings, "dtype": args.dtypes[0]}
    points = []
    for task in args.tasks:
        batch = (args.batch_sizes or [BATCH[args.device.type][task]])[0]
        for series, cases in (
            ("sizes", [(grown, size) for size in sorted(set(args.img_sizes))]),
            ("variants", [(contender, fixed) for contender in contenders]),
        ):
            points += growth.measure(series, cases, task, batch, args.device, options, say)
            release(args.device)
    fits = growth.exponents(points)
    table, csv = growth.table(points)
    law = growth.exponents_table(fits)
    print(f"{table}\n{law}")
    lines = [
        *notes(args),
        "Counted from the equations, in float32: multiply-adds, and for training the bytes of weights, gradients, "
        "moments and of what the forward pass keeps. Their exponents are fitted as the measured ones are.",
    ]
    data = {"machine": about, "settings": settings, **growth.as_data(points, fits)}
    save(
        args.output,
        {
            ".json": json.dumps(data, indent=1),
            ".csv": csv,
            ".md": document("Growth of cost", about, lines, table, law, f"![growth]({args.output.stem}.png)\n"),
            ".png": growth.draw(points, fits),
        },
    )


def run_comparison(args: argparse.Namespace, contenders: Sequence[Contender], about: dict, settings: dict) -> None:
    """Measures group after group, and writes JSON and Markdown after each."""
    tables, rows = [], []
    for group in as_groups(args):
        found = measure_group(group, contenders, args)
        if not found:
            continue
        rows += found
        tables.append(f"## {group}\n\n{markdown(TITLES, [row.cells() for row in found])}")
        print(f"{tables[-1]}", flush=True)
        ceilings = {
            dtype: asdict(ceilings_of(args.device, dtype)) for dtype in dict.fromkeys(row.group.dtype for row in rows)
        }
        data = {"machine": about, "settings": settings, "ceilings": ceilings, "rows": [row.data() for row in rows]}
        text = document("Benchmark", about, notes(args), *tables, ceiling_lines(list(ceilings), args.device))
        save(args.output, {".json": json.dumps(data, indent=1), ".md": text})
    print(ceiling_lines(args.dtypes, args.device))
    if not any(row.timing.seconds for row in rows):
        raise UserError("none of the contenders could be run")


def main() -> None:
    argv = sys.argv[1:]
    if "--data" in argv:
        import benchmark_data

        benchmark_data.main([argument for argument in argv if argument != "--data"])
        return
    args = parse_args(argv)
    contenders = runnable(parse_contenders(args.contenders, args.modes), args)
    grown = runnable(parse_contenders([args.growth], args.modes), args) if args.growth else []
    set_up(args)
    about = machine(args.device)
    names = ("memory_format", "compile_mode", "freeze", "warmup", "rounds", "seconds")
    settings = {name: getattr(args, name) for name in names}
    if grown:
        run_growth(args, grown[0], contenders, about, settings)
    elif args.predict_memory:
        table, data = predict(contenders, as_groups(args), args)
        print(table)
        lines = ["Tensors alone, without the workspaces of libraries and the CUDA context; computed, not measured."]
        text = document("Predicted memory", about, lines, table)
        save(args.output, {".json": json.dumps({"machine": about, **data}, indent=1), ".md": text})
    else:
        run_comparison(args, contenders, about, settings)
    print(f"written: {args.output} and {args.output.with_suffix('.md').name}")


if __name__ == "__main__":
    run_entry_point(main)
