"""Contenders side by side: speed, memory, and shares of what the machine can do."""

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import torch
from tables import markdown
from torch import Tensor

from bench.contenders import (
    DTYPES,
    Contender,
    Step,
    build,
    parse_contenders,
    random_batch,
    reparameterize,
    set_checkpointing,
    set_up_device,
)
from bench.kernels import NOTES, Profile, profile_step
from bench.memory import counted_peak, measured_peak
from bench.options import FEWEST_ROUNDS, LITERAL
from bench.report import document, kept_aside, machine, save, say
from bench.revision import RemoteStep, checkout
from bench.roofline import Ceilings, Probe, Work, count_work
from bench.timing import OtherLoad, Quartiles, Timing, describe, interleave, ratio, warm_up
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
        ratios: speed relative to others of the group, round by round: to "literal", the equations of the same variant,
            and to "revision", the same contender of --against. Without those that were not run.
        peak_bytes: of a step, with weights; None if it failed.
        counted_bytes: the same, counted; None if that was not asked for, or cannot be.
        matrix_share: of the machine's matrix ceiling in the same rounds.
        memory_share: of its memory ceiling in the same rounds.
    """

    group: Group
    contender: Contender
    timing: Timing
    ratios: dict[str, Quartiles] = field(default_factory=dict)
    peak_bytes: int | None = None
    counted_bytes: int | None = None
    matrix_share: float | None = None
    memory_share: float | None = None

    def cells(self, references: Sequence[str], counts_memory: bool) -> tuple[str, ...]:
        """Those of a table whose ratios are to `references`."""
        peaks = [f"{count / 2**20:,.0f}" if count else "-" for count in (self.peak_bytes, self.counted_bytes)]
        peaks = peaks if counts_memory else peaks[:1]
        if not self.timing.seconds:
            return (self.contender.label, "-", "-", *("-" for _ in references), *peaks, "-", "-", self.timing.problem)
        time = Quartiles.of(self.timing.seconds)
        milliseconds = f"{1e3 * time.median:.2f} [{1e3 * time.low:.2f}, {1e3 * time.high:.2f}]"
        speed = self.group.batch / time.median
        found = [self.ratios.get(reference) for reference in references]
        times = [f"{each.median:.2f} [{each.low:.2f}, {each.high:.2f}]" if each else "" for each in found]
        shares = [
            f"{100 * share:.0f} %" if share is not None else "-" for share in (self.matrix_share, self.memory_share)
        ]
        compiled = f"first call {self.timing.first:.0f} s" if self.contender.is_compiled else ""
        remark = "; ".join(filter(None, (compiled, time.remark)))
        return (self.contender.label, f"{speed:.1f}", milliseconds, *times, *peaks, *shares, remark)

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
            **{f"ratio_to_{reference}": asdict(each) for reference, each in self.ratios.items()},
            "peak_bytes": self.peak_bytes,
            "counted_bytes": self.counted_bytes,
            "matrix_share": self.matrix_share,
            "memory_share": self.memory_share,
            "first_call_seconds": self.timing.first,
            "calls_per_timing": self.timing.iterations,
            "rounds": self.timing.seconds,
            "problem": self.timing.problem,
        }


def titles(references: Sequence[str], revision: str, counts_memory: bool) -> tuple[str, ...]:
    names = {"literal": "literal", "revision": revision}
    return (
        *("contender", "images/s", "ms per batch [quartiles]"),
        *(f"times as fast as {names[reference]}" for reference in references),
        *(("peak, MiB", "counted, MiB") if counts_memory else ("peak, MiB",)),
        *("of matrix ceiling", "of memory ceiling", "remark"),
    )


@dataclass
class Table:
    """The rows of a group, and the machine while they were measured.

    Attributes:
        ceilings: medians over the rounds.
        others: share of the processors' time that other programs took, round by round.
    """

    group: Group
    rows: list[Row]
    ceilings: Ceilings
    others: list[float]

    def text(self, revision: str) -> str:
        """As Markdown."""
        references = [name for name in ("literal", "revision") if any(name in row.ratios for row in self.rows)]
        counts_memory = any(row.counted_bytes for row in self.rows)
        typical, most = 100 * statistics.median(self.others), 100 * max(self.others)
        return (
            f"## {self.group}\n\n"
            + markdown(
                titles(references, revision, counts_memory), [row.cells(references, counts_memory) for row in self.rows]
            )
            + f"\nOther programs took {typical:.0f} % of the processors' time in the median round, {most:.0f} % in the "
            f"worst. Ceilings in the same rounds: {self.ceilings.flops / 1e12:.3f} TFLOP/s ({self.ceilings.flops_by}), "
            f"{self.ceilings.bandwidth / 1e9:.1f} GB/s.\n"
        )


@cache
def work_of(model: str, batch: int, img_size: int) -> Work:
    return count_work(build(model.removeprefix(LITERAL), img_size), batch, img_size)


@cache
def probe_of(device: torch.device, dtype: str) -> Probe:
    say(f"looking for the machine's fastest product in {dtype}")
    return Probe(device, DTYPES[dtype])


def build_step(
    contender: Contender, group: Group, args: argparse.Namespace, batch: tuple[Tensor, Tensor]
) -> Step | RemoteStep:
    options = {"task": group.task, "compile_mode": args.compile_mode, "freeze": args.freeze}
    if not contender.revision:
        return Step(contender, *batch, dtype=DTYPES[group.dtype], **options)
    settings = {
        **options,
        "dtype": group.dtype,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "batch": group.batch,
        "img_size": group.img_size,
        "memory_format": args.memory_format,
    }
    return RemoteStep(args.revision_folder, contender.name, settings)


def counted(contender: Contender, group: Group, args: argparse.Namespace) -> int | None:
    """The peak of a step, counted; None, with a note, if that cannot be done: it is no reason to lose a row."""
    try:
        return counted_peak(
            *(contender, group.batch, group.img_size, group.task, DTYPES[group.dtype], args.device, args.memory_format)
        )
    except Exception as error:  # of operations that do not run on fake tensors
        say(f"{contender.label}: its memory cannot be counted: {describe(error)}")
        return None


def measure_group(group: Group, contenders: Sequence[Contender], args: argparse.Namespace) -> Table | None:
    """Compares contenders. If one fails, its row says so, and the others go on. None if none is of this task."""
    contenders = [contender for contender in contenders if contender.task in (None, group.task)]
    if not contenders:
        return None
    probe = probe_of(args.device, group.dtype)
    say(f"{group}: warming up")
    torch.compiler.reset()  # earlier shapes must not count against this group's limit of recompilations
    batch = random_batch(group.batch, group.img_size, args.device, args.memory_format)
    rows, steps = {}, {}
    with ExitStack() as processes:
        for contender in contenders:
            row = rows[contender.label] = Row(group, contender, Timing())
            try:
                step = build_step(contender, group, args, batch)
                if contender.revision:
                    processes.callback(step.close)
                row.timing = warm_up(step, args.warmup)
                row.peak_bytes = step.measured_peak() if contender.revision else measured_peak(step)
                if args.count_memory and not contender.revision:
                    row.counted_bytes = counted(contender, group, args)
                steps[contender.label] = step
            except Exception as error:  # any model's or compiler's own
                row.timing.problem = describe(error)
            step = None  # so that `steps` alone holds it
            if row.timing.problem:
                say(f"{contender.label}: {row.timing.problem}")
                release(args.device)  # only now is the error gone; its traceback held tensors
        say(f"{group}: timing {len(steps)} in turn")
        ceilings, others, load = [], [], OtherLoad()

        def on_round(order: list[str]) -> None:
            others.append(load.look())
            ceilings.append(probe.measure())

        interleave(steps, {label: row.timing for label, row in rows.items()}, args.rounds, args.seconds, on_round)
        others = [*others[1:], load.look()]  # a look is at the round before it
        steps.clear()
    for row in rows.values():
        compare_row(row, rows, ceilings)
    release(args.device)
    return Table(group, list(rows.values()), median_ceilings(ceilings or [probe.measure()]), others)


def compare_row(row: Row, rows: dict[str, Row], ceilings: Sequence[Ceilings]) -> None:
    """Fills in what a row has in relation to others of its group, and to the ceilings of its rounds."""
    seconds = row.timing.seconds
    if not seconds:
        return
    contender, group = row.contender, row.group
    if not contender.revision:
        work = work_of(contender.model, group.batch, group.img_size)
        shares = [
            each.shares(work, group.task, s, DTYPES[group.dtype].itemsize)
            for each, s in zip(ceilings, seconds, strict=True)
        ]
        row.matrix_share, row.memory_share = (statistics.median(share) for share in zip(*shares, strict=True))
    revisions = (other for other in rows if contender.is_ours and other.startswith(f"{contender.label}@"))
    for reference, label in (("literal", contender.literal), ("revision", next(revisions, ""))):
        other = rows.get(label)
        if other and len(other.timing.seconds) == len(seconds):
            row.ratios[reference] = ratio(seconds, other.timing.seconds)


def median_ceilings(ceilings: Sequence[Ceilings]) -> Ceilings:
    return Ceilings(
        statistics.median(each.flops for each in ceilings),
        ceilings[0].flops_by,
        statistics.median(each.bandwidth for each in ceilings),
    )


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
        "Of the matrix ceiling: 2 x multiply-adds x images/s; of the memory ceiling: the operands and results of "
        "convolutions and matrix products, each read or written once, in the run's dtype. Both count three forward "
        "passes for a training step, and the model as it is defined, whatever its mode. The ceilings are measured "
        "anew in each round.",
    ]
    if args.count_memory:
        said.append(
            "Counted: the same peak from the sizes of all results of PyTorch's operations, each as long as something "
            "holds it. What libraries work in, and gaps between tensors, are not in it; compiled steps have none."
        )
    if args.against:
        said.append(f"NAME@{args.against}: the same model by the code of that revision, in a process of its own.")
    if args.device.type == "cuda":
        said.append("TF32 is on for products in float32, and cudnn.benchmark is on.")
    return said


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
    set_up_device(args.device)
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


def run_kernels(args: argparse.Namespace, contenders: Sequence[Contender], about: dict, settings: dict) -> None:
    """Profiles contender after contender, and writes JSON and Markdown after each."""
    found: list[tuple[Group, Profile]] = []
    for group, contender in itertools.product(as_groups(args), contenders):
        if contender.task not in (None, group.task):
            continue
        say(f"{group}: profiling {contender.label}")
        batch = random_batch(group.batch, group.img_size, args.device, args.memory_format)
        try:
            step = build_step(contender, group, args, batch)
            warm_up(step, args.warmup)
            found.append((group, profile_step(step)))
        except Exception as error:  # any model's or compiler's own
            say(f"{contender.label}: {describe(error)}")
            continue
        finally:
            step = None
            release(args.device)
        texts = [f"## {profile.label}: {of}\n\n{profile.text()}" for of, profile in found]
        print(texts[-1], flush=True)
        data = {"machine": about, "settings": settings, "steps": [{**asdict(g), **asdict(p)} for g, p in found]}
        save(args.output, {".json": json.dumps(data, indent=1), ".md": document("Kernels", about, NOTES, *texts)})
    if not found:
        raise UserError("none of the contenders could be run")


def run_comparison(args: argparse.Namespace, contenders: Sequence[Contender], about: dict, settings: dict) -> None:
    """Measures group after group, and writes JSON and Markdown after each."""
    tables: list[Table] = []
    for group in as_groups(args):
        table = measure_group(group, contenders, args)
        if table is None:
            continue
        tables.append(table)
        print(table.text(args.against), flush=True)
        data = {
            "machine": about,
            "settings": settings,
            "groups": [{**asdict(t.group), "ceilings": asdict(t.ceilings), "others_share": t.others} for t in tables],
            "rows": [row.data() for t in tables for row in t.rows],
        }
        text = document("Benchmark", about, notes(args), *(t.text(args.against) for t in tables))
        save(args.output, {".json": json.dumps(data, indent=1), ".md": text})
    if not any(row.timing.seconds for table in tables for row in table.rows):
        raise UserError("none of the contenders could be run")


def run(args: argparse.Namespace) -> None:
    """Does what the parsed options ask for."""
    complete(args)
    contenders = runnable(parse_contenders(args.contenders, args.modes), args)
    grown = runnable(parse_contenders([args.growth], args.modes), args) if args.growth else []
    set_up(args)
    about = machine(args.device)
    names = ("memory_format", "compile_mode", "freeze", "warmup", "rounds", "seconds", "against")
    settings = {name: getattr(args, name) for name in names}
    if args.kernels:
        run_kernels(args, contenders, about, settings)
    elif grown:
        run_growth(args, grown[0], contenders, about, settings)
    elif args.against:
        with checkout(args.against) as args.revision_folder:
            run_comparison(args, with_revision(contenders, args.against), about, settings)
    else:
        run_comparison(args, contenders, about, settings)
    print(f"written: {args.output} and {args.output.with_suffix('.md').name}")


def with_revision(contenders: Sequence[Contender], revision: str) -> list[Contender]:
    """Each of ours is followed by the same of another revision.

    Raises:
        UserError: none is ours.
    """
    found = []
    for contender in contenders:
        found += [contender, replace(contender, revision=revision)] if contender.is_ours else [contender]
    if len(found) == len(contenders):
        raise UserError("--against: none of the contenders is this project's own model; accepted: strip_mlp_*, ...")
    return found
