"""How time and memory grow with the image side, and from variant to variant, beside what the equations predict."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from complexity import Complexity
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from tables import as_csv, markdown

from bench.contenders import Contender, Step, build, random_batch
from bench.memory import measured_peak
from bench.options import LITERAL, TASKS
from bench.timing import Quartiles, Timing, describe, interleave, warm_up
from utils import UserError

TIME_LAW, MEMORY_LAW = "seconds per image ~ side^k", "peak bytes ~ side^k"
COLORS = {"inference": "#006BA4", "training": "#C85200"}  # of matplotlib's "tableau-colorblind10"


@dataclass
class Counted:
    """What the equations of a model say, for one image.

    Attributes:
        macs: multiply-adds.
        strip_macs: those of the strip MLP layers, which grow with the cube of the side where the rest grows with its
            square; 0 in models that have none.
        saved_bytes: kept for the backward pass, in float32.
        weight_bytes: in float32.
    """

    macs: int
    strip_macs: int
    saved_bytes: int
    weight_bytes: int

    @classmethod
    def of(cls, name: str, img_size: int) -> "Counted":
        complexity = Complexity(build(name.removeprefix(LITERAL), img_size), (img_size, img_size))
        strips = [n for n, _ in complexity.model.named_modules() if n.endswith((".strip_h", ".strip_w"))]
        total = complexity.of()
        return cls(total.macs, sum(complexity.of(n).macs for n in strips), total.saved_bytes, total.weight_bytes)

    def training_bytes(self, batch: int) -> int:
        """Weights, gradients, two moments, and what the forward pass keeps."""
        return 4 * self.weight_bytes + batch * self.saved_bytes


@dataclass
class Point:
    """One model at one image size.

    Attributes:
        series: "sizes" or "variants".
        seconds: per image, one number per round.
        peak_bytes: of a step; None where it is not known.
    """

    series: str
    model: str
    img_size: int
    task: str
    batch: int
    counted: Counted
    seconds: list[float]
    peak_bytes: int | None
    problem: str

    @property
    def median(self) -> float:
        return Quartiles.of(self.seconds).median


@dataclass
class Exponent:
    """The k of y ~ x^k, fitted by least squares to the logarithms, and its standard error (nan for two points)."""

    k: float
    error: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> "Exponent | None":
        """None for fewer than two different points, or for numbers that are not positive."""
        if len(set(x)) < 2 or min(*x, *y) <= 0:
            return None
        a, b = np.log(x), np.log(y)
        k = float(np.cov(a, b, bias=True)[0, 1] / np.var(a))
        residuals = b - b.mean() - k * (a - a.mean())
        spread = float((residuals**2).sum() / (len(x) - 2)) if len(x) > 2 else math.nan
        return cls(k, math.sqrt(spread / float(((a - a.mean()) ** 2).sum())))

    def __str__(self) -> str:
        return f"{self.k:.2f}" if math.isnan(self.error) else f"{self.k:.2f} ± {self.error:.2f}"


def measure(
    series: str,
    cases: Sequence[tuple[Contender, int]],
    task: str,
    batch: int,
    device: torch.device,
    settings: dict,
    say: Callable[[str], None],
) -> list[Point]:
    """Times all cases, (contender, image side), in turn.

    Args:
        settings: dtype, memory_format, compile_mode, freeze, warmup, rounds, seconds, as the benchmark's options have
            them.

    Raises:
        UserError: a model does not take an image size.
    """
    steps: dict[str, Step] = {}
    timings: dict[str, Timing] = {}
    points: dict[str, Point] = {}
    for contender, img_size in cases:
        label = f"{contender.label} {img_size}"
        say(f"warming up {label}, {task}")
        try:
            counted = Counted.of(contender.model, img_size)
        except Exception as error:  # any model's own, for sizes that it does not take
            raise UserError(f"{contender.label} at {img_size} pixels: {error}") from error
        point = Point(series, contender.label, img_size, task, batch, counted, [], None, "")
        points[label] = point
        try:
            images, targets = random_batch(batch, img_size, device, settings["memory_format"])
            dtype, how = getattr(torch, settings["dtype"]), (settings["compile_mode"], settings["freeze"])
            step = Step(contender, images, targets, task, dtype, *how)
            timings[label] = warm_up(step, settings["warmup"])
            point.peak_bytes = measured_peak(step)
            steps[label] = step
        except Exception as error:  # out of memory, say; the others go on
            point.problem = describe(error)
        step = None  # so that `steps` alone holds it
    say(f"timing {len(steps)} in turn, {task}")
    interleave(steps, timings, settings["rounds"], settings["seconds"])
    for label, timing in timings.items():
        points[label].seconds = [seconds / batch for seconds in timing.seconds]
        points[label].problem = points[label].problem or timing.problem
    return list(points.values())


def table(points: Sequence[Point]) -> tuple[str, str]:
    """As Markdown and as CSV."""
    rows, numbers = [], []
    for p in points:
        share = p.counted.strip_macs / p.counted.macs
        quartiles = Quartiles.of(p.seconds) if p.seconds else None
        predicted = p.counted.training_bytes(p.batch) if p.task == "training" else None
        rows.append(
            (
                *(p.task, p.model, p.img_size, p.batch),
                f"{1 / quartiles.median:.2f}" if quartiles else "-",
                f"{1e3 * quartiles.median:.2f} [{1e3 * quartiles.low:.2f}, {1e3 * quartiles.high:.2f}]"
                if quartiles
                else "-",
                f"{p.peak_bytes / 2**20:,.0f}" if p.peak_bytes else "-",
                f"{predicted / 2**20:,.0f}" if predicted else "-",
                f"{p.counted.macs:,}",
                f"{share:.1%}",
                p.problem,
            )
        )
        times = (quartiles.median, quartiles.low, quartiles.high) if quartiles else (None,) * 3
        numbers.append(
            (
                *(p.series, p.task, p.model, p.img_size, p.batch, *times, p.peak_bytes, predicted),
                *(p.counted.macs, p.counted.strip_macs, p.problem),
            )
        )
    titles = (
        *("task", "model", "side", "batch", "images/s", "ms per image [quartiles]", "peak, MiB"),
        *("counted, MiB", "MACs", "in strips", "remark"),
    )
    columns = (
        *("series", "task", "model", "img_size", "batch", "seconds_per_image", "low", "high", "peak_bytes"),
        *("counted_bytes", "macs", "strip_macs", "problem"),
    )
    return markdown(titles, rows), as_csv(columns, numbers)


def exponents(points: Sequence[Point]) -> list[dict]:
    """Of time and memory over the image side ("sizes") or over the multiply-adds ("variants"), measured and counted."""
    fits = []
    for task in TASKS:
        done = [p for p in points if p.series == "sizes" and p.task == task and p.seconds]
        if done:
            sides = [float(p.img_size) for p in done]
            parts = {
                "all multiply-adds": [p.counted.macs for p in done],
                "strips (S^3)": [p.counted.strip_macs for p in done],
                "all others (S^2)": [p.counted.macs - p.counted.strip_macs for p in done],
            }
            counted = {name: Exponent.of(sides, numbers) for name, numbers in parts.items()}
            fits.append(_fit(task, TIME_LAW, Exponent.of(sides, [p.median for p in done]), counted))
            kept, held = {}, {}  # inference keeps nothing that could be counted
            if task == "training":
                kept = {"what is kept": Exponent.of(sides, [p.counted.saved_bytes for p in done])}
                all_bytes = [p.counted.training_bytes(p.batch) for p in done]
                held = {"weights, gradients, moments and what is kept": Exponent.of(sides, all_bytes)}
            fits.append(_fit(task, MEMORY_LAW, Exponent.of(sides, [p.peak_bytes or 0 for p in done]), held))
            # Gradients take the place of what was kept for them.
            copies = {"inference": 1, "training": 3}[task]
            maps = [(p.peak_bytes or 0) - copies * p.counted.weight_bytes for p in done]
            fits.append(_fit(task, "the same, less weights and moments", Exponent.of(sides, maps), kept))
        done = [p for p in points if p.series == "variants" and p.task == task and p.seconds]
        if done:
            time = Exponent.of([p.counted.macs for p in done], [p.median for p in done])
            fits.append(
                _fit(
                    task, "seconds per image ~ MACs^k, of the variants", time, {"in proportion": Exponent(1, math.nan)}
                )
            )
    return [fit for fit in fits if fit["measured"]]


def _fit(task: str, law: str, measured: Exponent | None, counted: dict[str, Exponent | None]) -> dict:
    return {"task": task, "law": law, "measured": measured, "counted": {k: v for k, v in counted.items() if v}}


def exponents_table(fits: Sequence[dict]) -> str:
    rows = [
        (
            fit["task"],
            fit["law"],
            fit["measured"],
            "; ".join(f"{name}: {value.k:.2f}" for name, value in fit["counted"].items()),
        )
        for fit in fits
    ]
    return markdown(("task", "law", "measured k", "k counted from the equations"), rows)


def draw(points: Sequence[Point], fits: Sequence[dict]) -> Figure:
    """Time and memory: above against the image side, with the fitted law (solid) and the counted one (dashed, through
    the same middle); below of the variants, against multiply-adds."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    (time, memory), (variant_time, variant_memory) = figure.subplots(2, 2)
    for task, color in COLORS.items():
        laws = {fit["law"]: fit for fit in fits if fit["task"] == task}
        done = [p for p in points if p.series == "sizes" and p.task == task and p.seconds]
        if done:
            sides, name = [p.img_size for p in done], f"{done[0].model}, {task}"
            _draw_law(time, sides, [1e3 * p.median for p in done], laws.get(TIME_LAW), color, name)
            _draw_law(
                memory, sides, [(p.peak_bytes or math.nan) / 2**20 for p in done], laws.get(MEMORY_LAW), color, name
            )
        done = [p for p in points if p.series == "variants" and p.task == task and p.seconds]
        done.sort(key=lambda p: p.counted.macs)
        macs = [p.counted.macs / 1e9 for p in done]
        for axes, values in (
            (variant_time, [1e3 * p.median for p in done]),
            (variant_memory, [(p.peak_bytes or math.nan) / 2**20 for p in done]),
        ):
            axes.plot(macs, values, marker="o", color=color, label=task)
            for x, y, point in zip(macs, values, done, strict=True):
                place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(point.model.removeprefix("strip_mlp_"), (x, y), **place)
    batches = " and ".join(f"{batch}" for batch in dict.fromkeys(p.batch for p in points))
    ticks = sorted({p.img_size for p in points if p.series == "sizes"})
    for axes in (time, memory):
        axes.set(xlabel="Image side (pixels)", xscale="log", yscale="log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in (variant_time, variant_memory):
        side = next((p.img_size for p in points if p.series == "variants"), "")
        axes.set(xlabel=f"Multiply-adds at {side} x {side} (G)")
        axes.margins(x=0.1, y=0.15)
        axes.set_ylim(bottom=0)
    for axes in (time, variant_time):
        axes.set_ylabel("Time per image (ms)")
    for axes in (memory, variant_memory):
        axes.set_ylabel(f"Peak memory at batch {batches} (MiB)")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def _draw_law(axes: Axes, sides: list[int], values: list[float], fit: dict | None, color: str, name: str) -> None:
    axes.plot(sides, values, linestyle="", marker="o", color=color, label=name)
    if fit is None:
        return
    middle = (np.exp(np.mean(np.log(sides))), np.exp(np.mean(np.log(values))))
    whole = list(fit["counted"].values())[:1]  # the others are its parts
    for what, law, style in [("measured", fit["measured"], "-"), *(("counted", law, "--") for law in whole)]:
        line = middle[1] * (np.array(sides) / middle[0]) ** law.k
        axes.plot(sides, line, style, color=color, linewidth=1.2, label=f"{what}: side^{law.k:.2f}")


def as_data(points: Sequence[Point], fits: Sequence[dict]) -> dict:
    """For JSON."""

    def plain(exponent: Exponent) -> dict:
        return {"k": exponent.k, "error": None if math.isnan(exponent.error) else exponent.error}

    exponents = [
        {**fit, "measured": plain(fit["measured"]), "counted": {name: law.k for name, law in fit["counted"].items()}}
        for fit in fits
    ]
    return {"points": [asdict(point) for point in points], "exponents": exponents}
