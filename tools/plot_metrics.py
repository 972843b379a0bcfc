"""Draw a training run's curves (loss, accuracy, learning rate) into a PNG.

Input: ``<run>/metrics.jsonl``, one JSON object per line and epoch. Read from it: ``epoch`` (from 1), ``lr`` and, where
they are there and not null, ``train_loss`` (null where all steps were skipped), ``val_loss``, ``top1`` and ``top5``
(percent); for compare_runs.py and ablate.py also ``images_per_second``, ``seconds`` and ``processes``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import isfinite, nan
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import parse_first

EXAMPLE = """\
example:
  python tools/plot_metrics.py runs/strip_mlp_t    # writes runs/strip_mlp_t/curves.png
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw a run's loss, accuracy and learning rate from <run>/metrics.jsonl into a PNG.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the run's folder, with metrics.jsonl in it")
    parser.add_argument("--output", type=Path, help="the PNG file to write (default: <run>/curves.png)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_first(parse_args, "matplotlib", extra="figures")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

OPTIONAL = ("train_loss", "val_loss", "top1", "top5", "images_per_second", "seconds", "processes", "stopped_early")

# Blue and orange of matplotlib's "tableau-colorblind10", which colour-blind readers can tell apart.
FIRST_COLOR = "#006BA4"
SECOND_COLOR = "#FF800E"


Record = dict[str, float]


def read_record(line: bytes) -> Record:
    """Return the numbers of one line of metrics.jsonl; those missing or null are left out.

    Raises ``TypeError`` or ``ValueError`` that says what is wrong with the line.
    """
    try:
        # Integers too are read as floats: one too large then becomes infinite, where matplotlib would fail on it.
        data = json.loads(line, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(data, dict):
        raise TypeError(f"not a JSON object: {data!r:.40}")
    epoch = data.get("epoch")
    if not isinstance(epoch, float) or not epoch.is_integer() or epoch < 1:
        raise ValueError(f"'epoch' is {epoch!r:.40}: accepted is an integer from 1")
    record: Record = {"epoch": epoch}
    for key in ("lr", *OPTIONAL):
        value = data.get(key)
        if value is None and key in OPTIONAL:
            continue
        if not isinstance(value, float):
            raise TypeError(f"{key!r} is {value!r:.40}: accepted is a number")
        record[key] = value
    return record


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a metrics.jsonl file in the order of their epochs.

    Of an epoch found twice the later line counts: a run that resumes from a checkpoint repeats epochs.

    Raises ``ValueError`` that names the file, and the line where one is damaged.
    """
    by_epoch: dict[float, Record] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = read_record(line)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        by_epoch[record["epoch"]] = record
    if not by_epoch:
        raise ValueError(f"{path} is empty: accepted is one JSON object per line and epoch")
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def draw_curve(axes: Axes, records: Sequence[Record], key: str, color: str, label: str) -> None:
    """Draw one value against the epoch over those epochs that have it; nothing where none has."""
    epochs = [record["epoch"] for record in records if key in record]
    values = [record[key] for record in records if key in record]
    if values:
        # Markers show the single epochs of a short run; in a long one they would hide the curve.
        axes.plot(epochs, values, color=color, label=label, linewidth=1.8, marker="o" if len(values) <= 30 else "")


def draw_metrics(records: Sequence[Record], title: str) -> Figure:
    """Return the figure: loss, accuracy with its best epoch marked, and learning rate, each against the epoch."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.08)
    # Plain text, since a folder's name may hold what matplotlib reads as formulas ("$").
    figure.suptitle(title, fontsize=15, parse_math=False)
    loss, accuracy, rate = figure.subplots(1, 3)

    loss.set_title("Loss")
    loss.set_ylabel("Cross-entropy (nats)")
    draw_curve(loss, records, "train_loss", FIRST_COLOR, "training")
    draw_curve(loss, records, "val_loss", SECOND_COLOR, "validation")
    loss.legend(fontsize=11)

    accuracy.set_title("Accuracy")
    accuracy.set_ylabel("Validation accuracy (%)")
    draw_curve(accuracy, records, "top1", FIRST_COLOR, "top-1")
    draw_curve(accuracy, records, "top5", SECOND_COLOR, "top-5")
    # A diverged run may log NaN, which max() would not order.
    evaluated = [record for record in records if isfinite(record.get("top1", nan))]
    if evaluated:
        # The first of equals, as in a training loop that keeps a checkpoint when it beats the best so far.
        best = max(evaluated, key=lambda record: record["top1"])
        accuracy.plot(best["epoch"], best["top1"], "k*", markersize=14, label="best top-1")
        accuracy.set_title(f"Best top-1: {best['top1']:.2f} % (epoch {best['epoch']:.0f})")
    if accuracy.lines:
        accuracy.legend(fontsize=11)
    else:
        accuracy.text(0.5, 0.5, "no epoch was evaluated", transform=accuracy.transAxes, ha="center", fontsize=12)
        accuracy.set_yticks([])

    rate.set_title("Learning rate")
    rate.set_ylabel("Learning rate")
    draw_curve(rate, records, "lr", FIRST_COLOR, "learning rate")
    rate.ticklabel_format(axis="y", style="scientific", scilimits=(-2, 2), useMathText=True)

    # One range for all panels, whichever epochs were evaluated; at least 1 wide, for the tick of a one-epoch run.
    first, last = records[0]["epoch"], records[-1]["epoch"]
    margin = max(0.5, 0.03 * (last - first))
    for axes in (loss, accuracy, rate):
        axes.set_xlim(first - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.title.set_size(13)
        axes.set_xlabel("Epoch", fontsize=13)
        axes.yaxis.label.set_size(13)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    run: Path = arguments.run
    metrics = run / "metrics.jsonl"
    output: Path = arguments.output or run / "curves.png"
    try:
        if not run.is_dir():
            raise ValueError(f"run {run} is not a folder: accepted is a run's folder with metrics.jsonl in it")
        if not metrics.is_file():
            raise ValueError(f"run {run} has no metrics.jsonl: accepted is a folder that training has written")
        if output.suffix.lower() != ".png":
            raise ValueError(f"--output {output} is no PNG file: accepted is a name that ends in .png")
        title = "/".join(run.resolve().parts[-2:])  # MODEL.NAME/TAG
        figure = draw_metrics(read_metrics(metrics), title)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        figure.savefig(output, dpi=150)
    # ValueError comes from matplotlib where numbers near the largest float leave it no axis to draw.
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot draw {metrics} into {output}: {error}")
    print(output)


if __name__ == "__main__":
    main()
