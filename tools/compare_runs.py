"""Compare training runs: accuracy against parameters and multiply-adds, learning curves, and where configs differ.

    python tools/compare_runs.py output/*/default
    python tools/compare_runs.py output --output figures

A folder is a run's (with its config.yaml) or is searched for runs. Runs that differ in their seed or fold alone are one
model: a point with its standard deviation, a mean curve. Writes into --output accuracy.png (the paper's figure 4, and
accuracy against minutes of training), curves.png, runs.md and runs.csv, differences.md and differences.csv. Accuracies
are top-1 in percent, after the last epoch unless it says "best".
"""

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, run_entry_point, writing_to


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders to search for runs")
    parser.add_argument(
        "--output", type=Path, default=Path("output/comparison"), help="where to write (default: output/comparison)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_first(parse_args, "matplotlib", extra="figures")

from complexity import Count, model_complexity
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from plot_metrics import Record, read_metrics
from tables import as_csv, markdown

from config import leaves, load_config

# Where and how a run is kept: results do not depend on these
BOOKKEEPING = (
    *("OUTPUT", "TAG", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "PRINT_FREQ", "SAVE_FREQ", "TIMEOUT"),
    *("SAVE_MINUTES", "SAVE_STEPS", "KEEP_CHECKPOINTS", "TRAIN.AUTO_RESUME", "TEST.INTERVAL"),
)
# Data sets that do not depend on the path
SAME_ANYWHERE = ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST", "KMNIST", "EMNIST", "digits")
# In names such as small_convnext, which is of another family than small_vit
SIZE_FIRST = re.compile(r"^((nano|pico|tiny|small|base|large)_)+")
# matplotlib's "tableau-colorblind10"
COLORS = ("#006BA4", "#FF800E", "#595959", "#5F9ED1", "#C85200", "#A2C8EC", "#898989", "#FFBC79", "#ABABAB", "#CFCFCF")


@dataclass
class Run:
    """The content of a run's folder.

    Attributes:
        values: its config by dotted key; empty where it cannot be read.
        records: one per epoch that is done, as `read_metrics` gives them.
        problem: why there are no numbers, or empty.
    """

    path: Path
    config: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    problem: str = ""

    @cached_property
    def epochs(self) -> int:
        """Epochs done."""
        return int(self.records[-1]["epoch"]) if self.records else 0

    @property
    def finished(self) -> bool:
        """Whether it has trained to its last epoch, of all or by TRAIN.PATIENCE, and saved that."""
        early = bool(self.records) and "stopped_early" in self.records[-1]
        if not self.records or (self.epochs < self.values["TRAIN.EPOCHS"] and not early):
            return False
        # The metrics are written before the checkpoint. Without any, they were deleted to save space.
        last, metrics = self.path / "last.pth", self.path / "metrics.jsonl"
        if (self.path / f"ckpt_epoch_{self.epochs}.pth").exists() or not last.exists():
            return True
        return last.stat().st_mtime >= metrics.stat().st_mtime

    @property
    def last(self) -> float | None:
        """Top-1 after the last epoch."""
        return self.records[-1].get("top1") if self.records else None

    @property
    def best(self) -> float | None:
        """Top-1 after the epoch with the highest."""
        return max((record["top1"] for record in self.records if "top1" in record), default=None)

    @property
    def loss(self) -> float | None:
        """Validation loss after the last epoch; None if it was not finite."""
        return self.records[-1].get("val_loss") if self.records else None

    @property
    def processes(self) -> int | None:
        """The number of processes that trained it last; None if the run does not say."""
        count = self.records[-1].get("processes") if self.records else None
        return None if count is None else int(count)

    @property
    def seconds(self) -> float:
        """Time of training, without evaluation."""
        return sum(record.get("seconds", 0.0) for record in self.records)

    @property
    def minutes(self) -> float | None:
        """Time of training, without evaluation; None if the run does not say."""
        return self.seconds / 60 or None

    @property
    def course(self) -> list[tuple[float, float]]:
        """Minutes of training so far and top-1, after each epoch that was evaluated."""
        minutes = itertools.accumulate(record.get("seconds", 0.0) / 60 for record in self.records)
        return [(m, record["top1"]) for m, record in zip(minutes, self.records, strict=True) if "top1" in record]

    @property
    def speed(self) -> float | None:
        """Images per second in training, of the median epoch."""
        speeds = [record["images_per_second"] for record in self.records if "images_per_second" in record]
        return median(speeds) if speeds else None


def comparable(values: dict[str, Any]) -> dict[str, Any]:
    """The config values that results depend on, without the seed and the fold. The data path is one of them if nothing
    else says which images there are."""
    left_out = {*BOOKKEEPING, "SEED", "DATA.FOLD"}
    if values["DATA.DATASET"] in SAME_ANYWHERE:
        left_out.add("DATA.DATA_PATH")
    if values["MODEL.TYPE"] != "strip_mlp_layer":
        left_out |= {key for key in values if key.startswith("MODEL.STRIP_MLP.")}
    kept = {key: value for key, value in values.items() if key not in left_out}
    if "DATA.DATA_PATH" in kept:
        kept["DATA.DATA_PATH"] = os.path.abspath(kept["DATA.DATA_PATH"])
    return kept


def read_run(path: Path) -> Run:
    """Reads a run's folder. `problem` says what cannot be read."""
    run = Run(path)
    try:
        run.config, _ = load_config(path / "config.yaml")
        run.values = leaves(run.config)
        if not (path / "metrics.jsonl").exists():
            run.problem = "no metrics.jsonl: not one epoch is done"
        else:
            run.records = read_metrics(path / "metrics.jsonl")
    except (UserError, ValueError, OSError) as error:
        run.problem = str(error)
    return run


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs that the folders are or contain, each once.

    Raises:
        UserError: a folder is none and contains none.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder; accepted: a run's folder, or one to search for runs")
        inside = [folder] if _is_run(folder) else sorted(path for path in folder.rglob("*") if _is_run(path))
        if not inside:
            raise UserError(f"{folder}: has neither config.yaml nor metrics.jsonl, nor has any folder in it; no run")
        for path in inside:
            if path.resolve() not in found:
                found[path.resolve()] = read_run(path)
    return list(found.values())


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


@dataclass(eq=False)
class Model:
    """Runs that differ in their seed or fold alone, and where they are kept."""

    name: str
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """The runs that its numbers come from: the finished ones, if there are any."""
        return [run for run in self.runs if run.finished] or self.runs

    def statistics(self, what: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation of an attribute, over the runs that have it; None if too few do."""
        numbers = [number for run in self.counted if (number := getattr(run, what)) is not None]
        return mean(numbers) if numbers else None, stdev(numbers) if len(numbers) > 1 else None

    @cached_property
    def size(self) -> Count | None:
        """The size of its model; None if that cannot be built."""
        return model_size(self.runs[0].config)

    def cost(self, what: str) -> float | None:
        """Its "parameters" or "macs", or its mean "minutes" of training; None if unknown."""
        if what == "minutes":
            return self.statistics("minutes")[0]
        return getattr(self.size, what, None)

    @property
    def family(self) -> str:
        """Runs of the same family share a colour."""
        values = self.runs[0].values
        name = values["MODEL.NAME"] if values["MODEL.TYPE"] == "timm" else "strip_mlp"
        named = SIZE_FIRST.sub("", name)
        return re.match(r"[A-Za-z]*(_mlp)?", named)[0] or name


def as_models(runs: Sequence[Run]) -> list[Model]:
    """The runs that have a config, those that differ in their seed or fold alone together, in the order given."""
    groups: dict[tuple[str, int], list[Run]] = {}
    times: Counter[tuple[str, int]] = Counter()
    processes = {repr(comparable(r.values)): r.processes for r in reversed(runs) if r.values and r.processes}
    for run in runs:
        if run.values:
            # A run without an epoch does not say how many processes it has. It is counted with the others.
            same = repr(comparable(run.values))
            same += f" {run.processes or processes.setdefault(same, run.processes)}"
            seed = run.values["SEED"]
            # A second run with the same seed is not another sample. It is kept apart.
            groups.setdefault((same, times[same, seed]), []).append(run)
            times[same, seed] += 1
    tags = [re.sub(r"_?seed\d+$", "", members[0].values["TAG"]) for members in groups.values()]
    names = [members[0].values["MODEL.NAME"] for members in groups.values()]
    # The first of these that distinguishes a model from the others
    short = [name if tag in ("", "default") else tag for name, tag in zip(names, tags, strict=True)]
    both = [f"{name}/{tag}".rstrip("/") for name, tag in zip(names, tags, strict=True)]
    paths = [str(members[0].path) for members in groups.values()]
    models = []
    for number, members in enumerate(groups.values()):
        candidates = (names[number] for names in (short, both) if names.count(names[number]) == 1)
        models.append(Model(next(candidates, paths[number]), members))
    return models


_sizes: dict[str, Count | None] = {}


def model_size(config: Any) -> Count | None:
    """The size of a config's model, counted once; None if it cannot be built."""
    values = leaves(config)
    keys = [key for key in values if key.startswith("MODEL.")] + ["DATA.IMG_SIZE", "DATA.DATASET", "DATA.EMNIST_SPLIT"]
    key = repr([values[key] for key in keys if key not in ("MODEL.PRETRAINED", "MODEL.RESUME")])
    if key not in _sizes:
        try:
            _sizes[key] = model_complexity(config).of()
        except ValueError:
            _sizes[key] = None
    return _sizes[key]


def with_deviation(average: float | None, deviation: float | None) -> str:
    """A mean and its standard deviation, for tables."""
    if average is None:
        return "-"
    return f"{average:.2f}" if deviation is None else f"{average:.2f} ± {deviation:.2f}"


def whole(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


TITLES = ("model", "runs", "epochs", "top-1, %", "best, %", "parameters", "MACs", "minutes", "images/s", "remark")


def table(models: Sequence[Model], runs: Sequence[Run]) -> tuple[str, str]:
    """One row per model, and one per run whose config cannot be read, as Markdown and as CSV."""
    rows, numbers = [], []
    for model in models:
        last, best, (speed, _) = map(model.statistics, ("last", "best", "speed"))
        parameters, macs, minutes = map(model.cost, ("parameters", "macs", "minutes"))
        epochs = min(run.epochs for run in model.counted)
        remark = _remark(model)
        time = "-" if minutes is None else f"{minutes:.1f}"
        cells = (with_deviation(*last), with_deviation(*best), whole(parameters), whole(macs), time, whole(speed))
        rows.append((model.name, len(model.counted), epochs, *cells, remark))
        numbers.append((model.name, len(model.counted), epochs, *last, *best, parameters, macs, minutes, speed, remark))
    for run in runs:
        if not run.values:
            rows.append((run.path, *("-",) * 8, run.problem))
            numbers.append((run.path, 0, *(None,) * 9, run.problem))
    columns = ("model", "runs", "epochs", "top1", "top1_std", "best", "best_std", "parameters", "macs")
    return markdown(TITLES, rows), as_csv((*columns, "minutes", "images_per_second", "remark"), numbers)


def _remark(model: Model) -> str:
    """What is missing."""
    remarks = [f"{run.path}: {run.problem}" for run in model.runs if run.problem]
    for run in model.runs:
        if not run.problem and not run.finished:
            remarks.append(f"{run.path}: {run.epochs} of {run.values['TRAIN.EPOCHS']} epochs")
    return "; ".join(remarks)


def differences(models: Sequence[Model]) -> tuple[str, str] | None:
    """The config values that are not the same in all models, and the number of processes if it is not, as Markdown and
    as CSV; None if all are the same."""
    values = [
        {**comparable(m.runs[0].values), "processes": next((r.processes for r in m.runs if r.processes), None)}
        for m in models
    ]
    keys = [key for key in dict.fromkeys(itertools.chain(*values)) if len({repr(v.get(key)) for v in values}) > 1]
    if len({v["processes"] for v in values} - {None}) < 2:  # None: not one epoch is done
        keys = [key for key in keys if key != "processes"]
    if not keys:
        return None
    rows = [(model.name, *(v.get(key, "") for key in keys)) for model, v in zip(models, values, strict=True)]
    return markdown(("model", *keys), rows), as_csv(("model", *keys), rows)


def draw_accuracy(models: Sequence[Model]) -> Figure:
    """The paper's figure 4, top-1 against parameters and against multiply-adds, and top-1 against minutes of training,
    there with a thin line for the epochs before the last. Models of one family that differ in name are a line;
    variations of one model, and families of one, are points."""
    figure = Figure(figsize=(18, 5.5), layout="constrained")
    shown = [model for model in models if model.size and model.statistics("last")[0] is not None]
    families: dict[str, list[Model]] = {}
    for model in models:
        families.setdefault(model.family, []).append(model)
    lines: dict[str, list[Model]] = {}
    for family, members in families.items():
        drawn = [model.runs[0].values["MODEL.NAME"] for model in members if model in shown]
        is_line = len(set(drawn)) == len(drawn) > 1
        lines |= {family: members} if is_line else {model.name: [model] for model in members}
    for axes, what in zip(figure.subplots(1, 3), ("parameters", "macs", "minutes"), strict=True):
        points = [model for model in shown if model.cost(what) is not None]
        name, unit = _axis(what, max((model.cost(what) for model in points), default=0))
        for label, unsorted in lines.items():
            number = models.index(unsorted[0])  # its colour is that of the learning curve
            members = sorted(set(unsorted) & set(points), key=lambda model: model.cost(what))
            if not members:
                continue
            x = [model.cost(what) / unit for model in members]
            y, deviations = zip(*(model.statistics("last") for model in members), strict=True)
            style = {"color": COLORS[number % len(COLORS)], "marker": "os^Dv"[number // len(COLORS) % 5], "capsize": 3}
            if what == "minutes":
                style["linestyle"] = ""
                for run in (run for model in members for run in model.counted):
                    axes.plot(*zip(*run.course, strict=True), color=style["color"], linewidth=0.8, alpha=0.6)
            axes.errorbar(x, y, [deviation or 0 for deviation in deviations], label=plain(label), **style)
            for model, point in zip(members, zip(x, y, strict=True), strict=True):
                if model.name != label:
                    offset = {"textcoords": "offset points", "xytext": (6, 4)}
                    axes.annotate(model.name, point, fontsize=8, parse_math=False, **offset)
        axes.set_xlabel(name, fontsize=12)
        axes.set_ylabel("Top-1 (%)", fontsize=12)
        axes.margins(0.15)
        axes.grid(alpha=0.3)
        if not points:
            axes.text(0.5, 0.5, "no run has an accuracy yet", transform=axes.transAxes, ha="center")
            axes.set(xticks=[], yticks=[])
    _legend(figure)
    return figure


def _axis(what: str, most: float) -> tuple[str, float]:
    """The title of an axis, and the unit of its numbers."""
    if what == "minutes":
        return "Minutes of training", 1
    unit, prefix = (1e9, "G") if most >= 1e9 else (1e6, "M")
    name = {"parameters": "Parameters", "macs": "MACs"}[what]
    return f"{name} ({prefix})", unit


def plain(name: str) -> str:
    """A name for legends, whose "$" matplotlib would read as a formula."""
    return name.replace("$", r"\$")


def _legend(figure: Figure) -> None:
    """One legend for all panels, beside them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=9)


def draw_curves(models: Sequence[Model]) -> Figure:
    """Top-1 and training loss against the epoch: mean and standard deviation over the seeds of each model."""
    figure = Figure(figsize=(15, max(5.0, 0.24 * len(models))), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for number, model in enumerate(models):
        style = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[number // len(COLORS) % 4]}
        for axes, key in ((accuracy, "top1"), (loss, "train_loss")):
            _draw_mean(axes, model, key, {**style, "linewidth": 1.6})
    for axes, title in ((accuracy, "Validation top-1 (%)"), (loss, "Training loss (nats)")):
        axes.set_xlabel("Epoch", fontsize=12)
        axes.set_ylabel(title, fontsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def _draw_mean(axes: Axes, model: Model, key: str, style: dict[str, Any]) -> None:
    by_epoch: dict[float, list[float]] = {}
    for run in model.counted:
        for record in run.records:
            if key in record:
                by_epoch.setdefault(record["epoch"], []).append(record[key])
    if by_epoch:
        epochs = sorted(by_epoch)
        means = [mean(by_epoch[epoch]) for epoch in epochs]
        deviations = [stdev(by_epoch[epoch]) if len(by_epoch[epoch]) > 1 else 0.0 for epoch in epochs]
        axes.plot(epochs, means, label=plain(model.name), marker="o" if len(epochs) == 1 else "", **style)
        if any(deviations):
            low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)


def save(folder: Path, files: dict[str, str | bytes | Figure]) -> None:
    """Writes texts, bytes and figures into a folder, made if need be, and prints their names."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, Figure):
                content.savefig(folder / name, dpi=130)
            elif isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                (folder / name).write_text(content, encoding="utf-8")
    for name in files:
        print(folder / name)


def main() -> None:
    args = parse_args()
    runs = find_runs(args.folders)
    models = as_models(runs)
    overview, overview_csv = table(models, runs)
    print(overview)
    files: dict[str, str | bytes | Figure] = {"runs.md": overview, "runs.csv": overview_csv}
    different = differences(models)
    if different:
        print(different[0])
        files |= {"differences.md": different[0], "differences.csv": different[1]}
    elif len(models) > 1:
        print("the configs are the same\n")
    files |= {"accuracy.png": draw_accuracy(models), "curves.png": draw_curves(models)}
    save(args.output, files)


if __name__ == "__main__":
    run_entry_point(main)
