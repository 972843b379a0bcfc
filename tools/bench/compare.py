"""Contenders side by side: speed, memory, and shares of what the machine can do."""

import argparse
import gc
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from tables import markdown

from bench.contenders import (
    DTYPES,
    Contender,
    Step,
    build,
    parse_contenders,
    random_batch,
    reparameterize,
    set_checkpointing,
)
from bench.memory import measured_peak
from bench.options import FEWEST_ROUNDS, LITERAL
from bench.report import document, kept_aside, machine, save, say
from bench.roofline import Ceilings, Work, count_work, measure_ceilings
from bench.timing import Quartiles, Timing, describe, interleave, ratio, warm_up
from utils import UserError, writing_to

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
    """The measurements of a contender in a group.

    Attributes:
        timing: seconds per batch.
        ratio: speed relative to the literal equations of the same variant, round by round; None without them.
        peak_bytes: of a step, with weights; None if it failed.
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
    """Compares contenders. If one fails, its row says so, and the others go on."""
    ceilings = ceilings_of(args.device, group.dtype)
    say(f"{group}: warming up")
    torch.compiler.reset()  # earlier shapes must not count against this group's limit of recompilations
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
            release(args.device)  # only now is the error gone; its traceback held tensors
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


def as_groups(args: argparse.Namespace) -> list[Group]:
    groups = []
    for task in args.tasks:
        batches = args.batch_sizes or [BATCH[args.device.type][task]]
        groups += [Group(task, *rest) for rest in itertools.product(args.dtypes, batches, args.img_sizes)]
    return groups


def runnable(contenders: Sequence[Contender], args: argparse.Namespace) -> list[Contender]:
    """The contenders that can be run. One that cannot, in a mode of --modes, is left out with a note.

    Raises:
        UserError: a contender cannot be run in the mode that it names, or none is left.
    """
    kept = []
    for contender in contenders:
        try:
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


def complete(args: argparse.Namespace) -> None:
    """Fills in the options whose defaults depend on the device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but there is no CUDA device; accepted here: cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device)
    on_cuda = args.device.type == "cuda"
    args.dtypes = args.dtypes or ["bfloat16" if on_cuda else "float32"]
    if args.freeze is None:
        args.freeze = not on_cuda
    if args.warmup is None:
        args.warmup = 5 if on_cuda else 1


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
    from bench import growth  # needs matplotlib, an extra

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


def run(args: argparse.Namespace) -> None:
    """Does what the parsed options ask for."""
    complete(args)
    contenders = runnable(parse_contenders(args.contenders, args.modes), args)
    grown = runnable(parse_contenders([args.growth], args.modes), args) if args.growth else []
    set_up(args)
    about = machine(args.device)
    names = ("memory_format", "compile_mode", "freeze", "warmup", "rounds", "seconds")
    settings = {name: getattr(args, name) for name in names}
    if grown:
        run_growth(args, grown[0], contenders, about, settings)
    else:
        run_comparison(args, contenders, about, settings)
    print(f"written: {args.output} and {args.output.with_suffix('.md').name}")
