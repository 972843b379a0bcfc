"""Train every setting of an ablation with several seeds, and tabulate the results.

    python tools/ablate.py configs/ablations/digits --seeds 0 1 2 3 4
    python tools/ablate.py 'configs/ablations/cifar100/table6_*.yaml' --data-path data_cifar --processes 8
    python tools/ablate.py configs/peers --data-path DATA --print > commands.txt    # for a scheduler
    python tools/ablate.py configs/peers --data-path DATA --report                  # tabulates what has been run
    python tools/ablate.py configs/finetune/smlp_tiny_224.yaml --data-path DATA --folds 5      # cross-validation

Takes config files, folders of them and globs. The base of a setting is the config that its BASE names, and is trained
too, unless that is a fragment without a MODEL.NAME; a setting that is the same as its base is not trained twice. Each
run is the ordinary main.py (under torchrun with --processes) in OUTPUT/MODEL.NAME/<config>_seed<N>: the same command
again skips what is finished and goes on with what was stopped. A run that fails does not stop the others.

Writes ablation.md, ablation.csv, ablation.png, runs.csv (one line per run) and correct.npz (which images each run
classifies correctly) into --output, anew each time. Each setting is tested against its base over images and seeds, with
Holm's correction for the number of settings; "undecided" means that these runs do not tell it from the base. The exit
status is 0 if all runs are finished, 1 if not, 75 if a signal stopped this command (and the run that it was at, which
is saved).
"""

import argparse
import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, run_entry_point, shorten, writing_to

NAMED_BY_US = ("SEED", "OUTPUT", "TAG", "DATA.FOLDS", "DATA.FOLD")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML file, folder of them, or glob")
    parser.add_argument("--base", metavar="FILE", help="compare all with this config (default: what their BASE names)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    parser.add_argument(
        "--folds", type=int, metavar="N", help="cross-validation, instead of seeds: N runs, each holds out another part"
    )
    parser.add_argument("--epochs", type=int, help="TRAIN.EPOCHS, with the warm-up shortened in proportion")
    parser.add_argument("--data-path", help="data set folder (DATA.DATA_PATH)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="per run, under torchrun (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        help="(default: output/ablation/<folder of the first config>, where the tables are made anew)",
    )
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set in all runs"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--print", action="store_true", help="print the commands of what is not finished, run nothing")
    action.add_argument("--report", action="store_true", help="only tabulate what has been run")
    args = parser.parse_args()
    if len(args.opts) % 2:
        parser.error("--opts takes pairs of a key and a value")
    for key in NAMED_BY_US:
        if key in args.opts[::2]:
            parser.error(f"--opts {key}: chosen by this command; see --seeds, --folds and --output")
    for flag, number in (("--epochs", args.epochs), ("--processes", args.processes)):
        if number is not None and number < 1:
            parser.error(f"{flag} {number}: accepted: 1 or more")
    if min(args.seeds) < 0:
        parser.error(f"--seeds {min(args.seeds)}: accepted: 0 or more")
    if args.folds is not None and args.folds < 2:
        parser.error(f"--folds {args.folds}: accepted: 2 or more")
    args.seeds = list(range(args.folds)) if args.folds else list(dict.fromkeys(args.seeds))
    if args.output is None:
        first = Path(args.configs[0])
        name = (first if first.is_dir() else first.parent).resolve().name
        args.output = Path("output/ablation") / (name if "*" not in name else "")
    return args


if __name__ == "__main__":
    parse_first(parse_args, "matplotlib", "statsmodels", extra="figures")

import numpy as np
import torch
from compare_runs import COLORS, Model, Run, comparable, model_size, read_run, save, whole, with_deviation
from complexity import Count, without_data
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import LEVEL, Comparison, adjust, compare, pack_results
from tables import as_csv, markdown

from config import ConfigError, get_default_config, image_size, leaves, load_config, read_yaml
from models import build_model, idle_keys
from runtime.per_image import CORRECT, read_correct
from runtime.run_folder import run_path
from runtime.signals import EXIT_STATUS

ROOT = Path(__file__).resolve().parent.parent
CHANGES_NOTHING = "changes nothing in the model"
CHOOSE_IMAGES = (
    *("DATA.DATASET", "DATA.DATA_PATH", "DATA.EMNIST_SPLIT", "DATA.CLASSES", "DATA.ZIP_MODE"),
    *("DATA.VAL_FRACTION", "DATA.VAL_SEED", "DATA.FOLDS"),
)
SHAPES_THE_MODEL = ("MODEL.TYPE", "MODEL.NAME", "MODEL.STRIP_MLP.", "MODEL.DROP_PATH_RATE")


@dataclass(eq=False)
class Setting:
    """One config of an ablation.

    Attributes:
        values: by dotted key.
        base: what it is compared with.
        same_as_base: why it needs no runs of its own; empty if it does.
        problem: why it cannot be trained.
        repetition: what its runs differ in: "seed", or "fold" with --folds, whose number then stands wherever there is
            a seed here.
        notes: about values that change nothing.
        runs: by seed.
        failures: of runs, by seed.
        correct: which images its finished runs classify correctly, by seed: (images,) bool.
        comparison: with its base, if both have these.
    """

    path: Path
    config: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    base: "Setting | None" = None
    same_as_base: str = ""
    problem: str = ""
    repetition: str = "seed"
    notes: list[str] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    correct: dict[int, np.ndarray] = field(default_factory=dict)
    comparison: Comparison | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def changes(self) -> dict[str, Any]:
        """The values that differ from the base's."""
        if not self.base or self.base.problem or self.problem:
            return {}
        before, now = comparable(self.base.values), comparable(self.values)
        changed = {key: value for key, value in now.items() if value != before.get(key)}
        if self.values["MODEL.TYPE"] != "timm":  # whose name is the model
            changed.pop("MODEL.NAME", None)
        return changed

    @property
    def finished(self) -> Model:
        """Its finished runs, or its base's if it is the same."""
        if self.same_as_base:
            return Model(self.name, self.base.finished.runs)
        return Model(self.name, [run for run in self.runs.values() if run.finished])

    @property
    def results(self) -> dict[int, np.ndarray]:
        """`correct`, or its base's if it is the same."""
        return self.base.results if self.same_as_base else self.correct

    @property
    def size(self) -> Count | None:
        return None if self.problem else model_size(self.config)


def find_configs(patterns: Sequence[str]) -> list[Path]:
    """The config files that paths, folders and globs name, each once, in the order given.

    Raises:
        UserError: one names nothing.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml"))
        elif path.exists():
            files = [path]
        else:
            files = [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]
        if not files:
            raise UserError(f"{pattern}: no config there; accepted: a YAML file, a folder that has some, or a glob")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def base_of(path: Path, opts: Sequence[str] = ()) -> Path | None:
    """The config that a file's BASE names; None if that is a fragment without a MODEL.NAME, or if there are several."""
    bases = read_yaml(path).get("BASE")
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or len(bases) != 1 or not isinstance(bases[0], str) or not bases[0]:
        return None
    base = Path(os.path.relpath((path.parent / bases[0]).resolve()))
    # A name on the command line is every config's: it does not say that this one can be trained.
    pairs = zip(opts[::2], opts[1::2], strict=True)
    config, _ = load_config(base, [word for pair in pairs if pair[0] != "MODEL.NAME" for word in pair])
    return base if get_default_config().MODEL.NAME != config.MODEL.NAME else None


def options_of(args: argparse.Namespace, path: Path) -> list[str]:
    """--opts for main.py, without the seed and the fold. The warm-up keeps its share of the training.

    Raises:
        ConfigError: the config cannot be used.
    """
    opts = ["DATA.FOLDS", str(args.folds)] if args.folds else []
    if args.epochs is None:
        return [*opts, *args.opts]
    config, _ = load_config(path, args.opts)
    opts += ["TRAIN.EPOCHS", str(args.epochs)]
    if "TRAIN.WARMUP_EPOCHS" not in args.opts[::2]:
        warmup = min(round(config.TRAIN.WARMUP_EPOCHS * args.epochs / config.TRAIN.EPOCHS), args.epochs - 1)
        opts += ["TRAIN.WARMUP_EPOCHS", str(warmup)]
    return [*opts, *args.opts]


def load_setting(path: Path, args: argparse.Namespace) -> Setting:
    """A setting with the command line's values on top. If something is wrong with it, that is its `problem`."""
    setting = Setting(path, repetition="fold" if args.folds else "seed")
    try:
        overrides = [("OUTPUT", str(args.output), "--output")]
        overrides += [("DATA.DATA_PATH", args.data_path, "--data-path")] if args.data_path else []
        setting.config, setting.notes = load_config(path, options_of(args, path), overrides, idle_keys)
        setting.values = leaves(setting.config)
    except ConfigError as error:
        setting.problem = str(error)
    return setting


def load_settings(args: argparse.Namespace) -> list[Setting]:
    """All settings, a base before those that are compared with it.

    Raises:
        UserError: nothing to do, or two settings would share their folders.
    """
    settings: dict[Path, Setting] = {}
    if args.base and (problem := load_setting(Path(args.base), args).problem):
        raise ConfigError(f"--base: {problem}")
    for path in find_configs(args.configs):
        try:
            base = Path(args.base) if args.base else base_of(path, args.opts)
        except ConfigError:
            base = None  # loading the setting fails on it again, and reports it
        for needed in filter(None, (base, path)):
            if needed.resolve() not in settings:
                settings[needed.resolve()] = load_setting(needed, args)
        if base and base.resolve() != path.resolve():
            settings[path.resolve()].base = settings[base.resolve()]
    order: list[Setting] = []
    for setting in settings.values():
        before = [setting]
        while before[-1].base:
            before.append(before[-1].base)
        order += [s for s in reversed(before) if s not in order]
    folders: dict[str, Path] = {}
    for setting in order:
        if setting.problem:
            continue
        folder = f"{setting.values['MODEL.NAME']}/{setting.name}"
        if folder in folders:
            raise UserError(
                f"{folders[folder]} and {setting.path} would share their runs' folders, {folder}_seed<N>: give one of "
                "them another file name or MODEL.NAME"
            )
        folders[folder] = setting.path
        if setting.base and not setting.base.problem:
            setting.same_as_base = sameness(setting)
    return order


def sameness(setting: Setting) -> str:
    """Why a setting's runs would repeat its base's; empty if they would not."""
    changes = setting.changes
    if not changes:
        return "as the base"
    if not all(key.startswith(SHAPES_THE_MODEL) for key in changes):
        return ""
    # What differs in size differs. The arithmetic is needed only for the rest.
    size, base_size = setting.size, setting.base.size
    if size is None or base_size is None or size.parameters != base_size.parameters:
        return ""
    same = all(map(torch.equal, behaviour(setting.config), behaviour(setting.base.config)))
    return CHANGES_NOTHING if same else ""


def behaviour(config: Any) -> list[torch.Tensor]:
    """What distinguishes two models of one seed: their weights, and their outputs in training and evaluation."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(without_data(config))
        for parameter in model.parameters():  # some start at zero, and hide what they multiply
            parameter.add_(0.02 * torch.randn_like(parameter))
        images = torch.randn(2, 3, *image_size(config))
        outputs = [model.train()(images), model.eval()(images)]
    return [*outputs, torch.cat([parameter.flatten() for parameter in model.parameters()])]


def command(setting: Setting, seed: int, args: argparse.Namespace) -> list[str]:
    """main.py for one run, as a user would call it from here."""
    launcher = [sys.executable]
    if args.processes > 1:
        # --standalone takes a free port: several runs may share a machine.
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
    words = [*launcher, os.path.relpath(ROOT / "main.py"), "--cfg", str(setting.path), "--output", str(args.output)]
    words += ["--tag", tag(setting, seed)]
    words += ["--data-path", args.data_path] if args.data_path else []
    which = ["DATA.FOLD", str(seed)] if args.folds else ["SEED", str(seed)]
    return [*words, "--opts", *options_of(args, setting.path), *which]


def tag(setting: Setting, seed: int) -> str:
    return f"{setting.name}_{setting.repetition}{seed}"


def folder_of(setting: Setting, seed: int) -> Path:
    return run_path(setting.config).with_name(tag(setting, seed))


def look(setting: Setting, seed: int, processes: int | None = None) -> None:
    """Reads the run's folder.

    Raises:
        UserError: another config has written it, or another number of processes, if that is given.
    """
    folder = folder_of(setting, seed)
    if not (folder / "config.yaml").exists():
        setting.runs.pop(seed, None)
        return
    run = setting.runs[seed] = read_run(folder)
    if not run.values:
        return
    found, wanted = comparable(run.values), comparable(setting.values)
    if not setting.values["DATA.DATA_PATH"]:  # --report does not need the images
        wanted.pop("DATA.DATA_PATH", None)
    if processes is not None and run.processes is not None:
        found["processes"], wanted["processes"] = run.processes, processes
    wanted.pop("MODEL.NUM_CLASSES")  # comes from the data
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}: holds a run with {key} {found.get(key)!r}, not {value!r}; give the options that it was "
                "started with, or another --output"
            )


class Interrupted(Exception):
    """A signal has stopped this command."""


class Launcher:
    """Runs commands one after the other, and passes the signals that stop a run on to it, as SIGTERM to torchrun,
    which dies of SIGUSR1 and leaves its processes behind. A terminal that goes away ends the run too, unless under
    nohup."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, torchrun: bool) -> None:
        self._torchrun = torchrun
        self._process: subprocess.Popen | None = None
        self._stopping = False

    def __enter__(self) -> "Launcher":
        # A script's background commands, and those under nohup, ignore some.
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame) -> None:
        self._stopping = True
        if self._process and self._process.poll() is None:
            hard = self._torchrun or number == signal.SIGHUP
            self._process.send_signal(signal.SIGTERM if hard else number)

    def run(self, words: list[str], console: Path) -> tuple[int, str]:
        """The command's exit status and what it printed, which is also added to the file `console`.

        Raises:
            Interrupted: a signal came; the command has ended.
        """
        if self._stopping:
            raise Interrupted
        with writing_to(console):
            console.parent.mkdir(parents=True, exist_ok=True)
            file = console.open("a+", encoding="utf-8", errors="backslashreplace")
        with file:
            before = file.seek(0, os.SEEK_END)
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once.
            self._process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
            if self._stopping:
                self._process.terminate()
            status = self._process.wait()
            file.seek(before)
            printed = file.read()
        if self._stopping:
            raise Interrupted
        return status, printed


def console_of(setting: Setting, seed: int) -> Path:
    folder = folder_of(setting, seed)
    return folder.with_name(f"{folder.name}.console.txt")


def reason(status: int, printed: str, console: Path) -> str:
    """Why a run failed: its first error message. Later ones may follow from it."""
    lines = [line for line in printed.splitlines() if line.strip()]
    # Ours, or else an exception's, with or without the rank before it
    patterns = (
        r"(?:\[rank \d+\] )?error: (.+)",
        r"(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)",
    )
    found = [[m[1] for line in lines if (m := re.fullmatch(pattern, line))] for pattern in patterns]
    message = next((messages[0] for messages in found if messages), lines[-1] if lines else "printed nothing")
    return f"status {status}: {message[:300]} (all of it: {console})"


def to_train(settings: Sequence[Setting], seeds: Sequence[int]) -> Iterator[tuple[Setting, int]]:
    """What is not finished, all settings with the first seed first."""
    for seed in seeds:
        for setting in settings:
            done = seed in setting.runs and setting.runs[seed].finished
            if not (setting.problem or setting.same_as_base or done):
                yield setting, seed


def announce(settings: Sequence[Setting]) -> None:
    """What is wrong before anything runs, on stderr."""
    for setting in settings:
        for note in setting.notes:
            print(f"note: {note}", file=sys.stderr)
        if setting.problem:
            print(f"{setting.name}: FAILED: {setting.problem}", file=sys.stderr)
        if setting.same_as_base:
            changes = "".join(f"{key} {value!r} " for key, value in setting.changes.items())
            print(f"{setting.name}: {changes}{setting.same_as_base}; not trained", file=sys.stderr)


def train(settings: Sequence[Setting], args: argparse.Namespace) -> None:
    """Trains what is not finished. Raises Interrupted if a signal came."""
    todo = list(to_train(settings, args.seeds))
    done = sum(run.finished for setting in settings for run in setting.runs.values())
    print(f"{len(todo)} runs to train, {done} finished before", flush=True)
    if todo:
        word = todo[0][0].repetition
        print(f"what they print: {args.output}/<MODEL.NAME>/<config>_{word}<N>.console.txt", flush=True)
    with Launcher(torchrun=args.processes > 1) as launcher:
        for number, (setting, seed) in enumerate(todo, start=1):
            was_there = setting.runs.get(seed)
            going_on = f", goes on after {was_there.epochs} epochs" if was_there and was_there.epochs else ""
            which = f"{setting.name} {setting.repetition} {seed}"
            print(f"[{number}/{len(todo)}] {which}{going_on}", end=" ... ", flush=True)
            started = time.monotonic()
            console = console_of(setting, seed)
            try:
                status, printed = launcher.run(command(setting, seed, args), console)
            finally:
                look(setting, seed, args.processes)
            run = setting.runs.get(seed)
            if status == 0 and run and run.finished and run.last is not None:
                print(f"top-1 {run.last:.2f} % ({time.monotonic() - started:.0f} s)", flush=True)
            elif status == EXIT_STATUS:
                print("stopped by a signal of its own", flush=True)
            else:
                setting.failures[seed] = reason(status, printed, console)
                print(f"FAILED: {setting.failures[seed]}", flush=True)


TITLES = (
    "setting",
    "changes",
    "seeds",
    "top-1, %",
    "to base [95 % interval]",
    "p (Holm)",
    "verdict",
    "best, %",
    "val. loss",
    "parameters",
    "MACs",
    "images/s",
)


def report(settings: Sequence[Setting], seeds: Sequence[int]) -> dict[str, str | bytes | Figure]:
    """The files to write, by name."""
    word = settings[0].repetition
    test_notes = compare_with_bases(settings)
    rows, numbers = [], []
    for setting in settings:
        model = setting.finished
        size = model.size if model.runs else setting.size  # with the number of classes that the data had
        last, best, loss, (speed, _) = map(model.statistics, ("last", "best", "loss", "speed"))
        base, _ = setting.base.finished.statistics("last") if setting.base else (None, None)
        delta = None if base is None or last[0] is None else last[0] - base
        changes = ", ".join(
            f"{key.removeprefix('MODEL.').removeprefix('STRIP_MLP.')} {value}" for key, value in setting.changes.items()
        )
        if setting.same_as_base:
            changes = f"{changes} {setting.same_as_base}".strip()
        elif any(other.base is setting for other in settings):
            changes = f"{changes} (base)".strip()
        done = "failed" if setting.problem else f"{len(model.runs)} of {len(seeds)}"
        if setting.failures:
            done += f", {len(setting.failures)} failed"
        parameters, macs = (size.parameters, size.macs) if size else (None, None)
        c = setting.comparison
        test = (c.difference, *(c.interval or (None, None)), c.p, c.p_holm, c.verdict) if c else (None,) * 6
        rows.append(
            (
                *(setting.name, changes, done, with_deviation(*last), *comparison_cells(c, delta)),
                with_deviation(*best),
                "-" if loss[0] is None else f"{loss[0]:.3f}" + (f" ± {loss[1]:.3f}" if loss[1] is not None else ""),
                *map(whole, (parameters, macs, speed)),
            )
        )
        runs = (len(model.runs), done)
        numbers.append((setting.name, changes, *runs, *last, delta, *test, *best, *loss, parameters, macs, speed))
    columns = (
        "setting",
        "changes",
        f"{word}s",
        "status",
        "top1",
        "top1_std",
        "delta_to_base",
        *("difference", "ci_low", "ci_high", "p", "p_holm", "verdict"),
        "best",
        "best_std",
        "val_loss",
    )
    columns += ("val_loss_std", "parameters", "macs", "images_per_second")
    notes = [
        f"Top-1, best (of all epochs) and validation loss: mean ± sample standard deviation over the {word}s.",
        *(["Cross-validation: each fold has validation images of its own. No test."] if word == "fold" else []),
        *test_notes,
        *conditions(settings),
        *problems(settings, seeds),
    ]
    titles = [f"{word}s" if title == "seeds" else title for title in TITLES]
    text = markdown(titles, rows) + "".join(f"\n- {note}" for note in notes) + "\n"
    per_run = []
    for setting in settings:
        for seed in () if setting.same_as_base else seeds:
            run = setting.runs.get(seed) or Run(setting.path)
            measured = (run.last, run.best, run.loss, run.speed, run.seconds)
            status, why = state(setting, seed)
            per_run.append((setting.name, seed, status, run.epochs, *measured, why))
    run_columns = ("setting", word, "status", "epochs", "top1", "best", "val_loss", "images_per_second", "seconds")
    run_columns += ("remark",)
    return {
        "ablation.md": text,
        "ablation.csv": as_csv(columns, numbers),
        "runs.csv": as_csv(run_columns, per_run),
        "ablation.png": draw(settings),
        CORRECT: collect_correct(settings),
    }


def comparison_cells(tested: Comparison | None, delta: float | None) -> tuple[str, str, str]:
    """The difference to the base with its interval, p and verdict for the Markdown table; the difference `delta` alone
    if there is no test."""
    if tested is None:
        return "-" if delta is None else f"{delta:+.2f}", "-", "-"
    interval = " [{:+.2f}, {:+.2f}]".format(*tested.interval) if tested.interval else ""
    p = "-" if tested.p_holm is None else "< 0.001" if tested.p_holm < 0.001 else f"{tested.p_holm:.3f}"
    return f"{tested.difference:+.2f}{interval}", p, tested.verdict


def compare_with_bases(settings: Sequence[Setting]) -> list[str]:
    """Reads which images the finished runs classify correctly, and tests each setting against its base. Returns notes
    about the tests, and about those that cannot be made."""
    missing, failed = [], []
    for setting in settings:
        setting.correct, setting.comparison = {}, None
        for seed, run in setting.runs.items():
            if setting.same_as_base or not run.finished:
                continue
            if not (run.path / CORRECT).exists():
                missing.append(tag(setting, seed))
                continue
            try:
                correct, epoch = read_correct(run.path / CORRECT)
                if epoch != run.epochs:
                    raise UserError(f"{run.path / CORRECT}: is of epoch {epoch}, not {run.epochs}")
                setting.correct[seed] = correct
            except UserError as error:
                failed.append(f"not tested: {error}")
    for base in dict.fromkeys(setting.base for setting in settings if setting.base):
        if base.repetition == "fold":
            continue  # each fold has images of its own
        for setting in (s for s in settings if s.base is base and s.correct and base.results):
            try:
                check_same_images(setting)
                setting.comparison = compare(setting.correct, base.results)
            except UserError as error:
                failed.append(f"{setting.name}: no test: {error}")
        adjust([s.comparison for s in settings if s.base is base and s.comparison])
    notes = []
    tested = [s for s in settings if s.comparison]
    if tested:
        notes.append(
            "To base: mean over the seeds that both have, with a 95 % confidence interval. p: paired test over images "
            f"and seeds, after Holm's correction for all settings with the same base. Undecided: p above {LEVEL}, not "
            "told from the base."
        )
    if one_seed := [s.name for s in tested if s.comparison.seeds == 1]:
        notes.append(
            "One shared seed: interval and p cover other images but not other seeds, so there is no verdict: "
            f"{shorten(one_seed)}."
        )
    if missing:
        notes.append(
            f"Not tested, as these runs have no {CORRECT} (an older version trained them): {shorten(missing)}."
        )
    return notes + failed


def check_same_images(setting: Setting) -> None:
    """Raises UserError if a setting and its base are evaluated on different images."""
    before, now = comparable(setting.base.values), comparable(setting.values)
    for key in CHOOSE_IMAGES:
        if now.get(key) != before.get(key):
            raise UserError(f"its {key} is {now.get(key)!r}, the base's {before.get(key)!r}; accepted: the same images")


def collect_correct(settings: Sequence[Setting]) -> bytes:
    """correct.npz of all runs that have one."""
    times = Counter(setting.name for setting in settings if setting.correct)
    results = {
        s.name if times[s.name] == 1 else f"{s.values['MODEL.NAME']}_{s.name}": s.correct for s in settings if s.correct
    }
    return pack_results(results)


def state(setting: Setting, seed: int) -> tuple[str, str]:
    """The state of one run: finished, failed, stopped or not run; and why."""
    run = setting.runs.get(seed)
    if setting.problem or seed in setting.failures:
        return "failed", setting.problem or setting.failures[seed]
    if run is None:
        return "not run", ""
    if run.finished:
        return "finished", ""
    return "stopped", run.problem or f"after {run.epochs} of {run.values['TRAIN.EPOCHS']} epochs"


def problems(settings: Sequence[Setting], seeds: Sequence[int]) -> list[str]:
    """What keeps a table from being complete."""
    found = []
    for setting in settings:
        if setting.problem:
            found.append(f"{setting.name}: FAILED: {setting.problem}")
        elif not setting.same_as_base:
            for seed in seeds:
                status, why = state(setting, seed)
                if status != "finished":
                    status = "FAILED:" if status == "failed" else status
                    found.append(f"{setting.name} {setting.repetition} {seed}: {status} {why}".strip())
    return found


def conditions(settings: Sequence[Setting]) -> list[str]:
    """What each base's settings were trained with."""
    bases = dict.fromkeys(setting.base or setting for setting in settings if not setting.problem)
    lines = []
    for base in bases:
        if base.values:
            v = base.values
            height, width = np.broadcast_to(v["DATA.IMG_SIZE"], 2)
            lines.append(
                f"{base.path}: {v['DATA.DATASET']}, {height} x {width} pixels, "
                f"{v['TRAIN.EPOCHS']} epochs, batch size {v['DATA.BATCH_SIZE']}"
            )
    return lines


def draw(settings: Sequence[Setting]) -> Figure:
    """Top-1 of every setting, its mean and standard deviation over the seeds and each run as a dot; a line where the
    base is. Beside it, if there are tests, the differences to the base with their confidence intervals."""
    tested = any(setting.comparison for setting in settings)
    bases = list(dict.fromkeys(setting.base or setting for setting in settings))
    groups = [(base, [s for s in settings if s is base or s.base is base]) for base in bases]
    rows = sum(len(members) + 2 for _, members in groups)
    figure = Figure(figsize=(14 if tested else 9, max(3, 0.36 * rows)), layout="constrained")
    heights = [len(members) + 2 for _, members in groups]
    grid = figure.subplots(len(groups), 2 if tested else 1, squeeze=False, sharey="row", height_ratios=heights)
    panels = grid[:, 0]
    for axes, (base, members) in zip(panels, groups, strict=True):
        axes.set_title("".join(conditions([base])) or base.name, fontsize=10, parse_math=False)
        for row, setting in enumerate(members):
            color = COLORS[1] if setting is base else COLORS[2] if setting.same_as_base else COLORS[0]
            model = setting.finished
            average, deviation = model.statistics("last")
            if average is None:
                axes.annotate(
                    "no finished run", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8
                )
                continue
            points = [run.last for run in model.runs if run.last is not None]
            axes.plot(points, [row + 0.25] * len(points), ".", color=color, alpha=0.45, markersize=5)
            axes.errorbar(average, row, xerr=deviation or 0, fmt="o", color=color, capsize=3, markersize=5)
            if setting is base:
                axes.axvline(average, color=color, linewidth=1, alpha=0.6)
        axes.set_yticks(range(len(members)), [s.name for s in members], fontsize=9, parse_math=False)
        axes.set_ylim(len(members) - 0.5, -0.5)
        axes.grid(alpha=0.3, axis="x")
    panels[-1].set_xlabel(
        f"Top-1 after the last epoch (%): mean ± standard deviation over {settings[0].repetition}s; small dots: runs\n"
        "orange: the base; grey: settings that are the same"
    )
    if tested:
        for axes, (base, members) in zip(grid[:, 1], groups, strict=True):
            draw_differences(axes, base, members)
        grid[-1, 1].set_xlabel(
            "Difference to the base (points of top-1): mean and 95 % confidence interval\n"
            "filled: better or worse; open: undecided"
        )
    return figure


def draw_differences(axes: Axes, base: Setting, members: Sequence[Setting]) -> None:
    """Each setting's comparison with `base`, in its row; zero is the base."""
    axes.axvline(0, color=COLORS[1], linewidth=1, alpha=0.6)
    for row, setting in enumerate(members):
        tested = setting.comparison
        if tested and setting is not base:  # which may have a base of its own
            low, high = tested.interval or (tested.difference, tested.difference)
            error = [[tested.difference - low], [high - tested.difference]]
            style = {"color": COLORS[0], "mfc": "white" if tested.verdict == "undecided" else COLORS[0]}
            axes.errorbar(tested.difference, row, xerr=error, fmt="o", capsize=3, markersize=6, **style)
    axes.tick_params(labelleft=False)
    axes.grid(alpha=0.3, axis="x")


def main() -> None:
    args = parse_args()
    settings = load_settings(args)
    for setting in settings:
        for seed in args.seeds:
            if not (setting.problem or setting.same_as_base):
                look(setting, seed, None if args.report else args.processes)
    announce(settings)
    if args.print:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
        for setting, seed in to_train(settings, args.seeds):
            print(shlex.join(command(setting, seed, args)))
        sys.exit(1 if any(setting.problem for setting in settings) else 0)
    interrupted = False
    if not args.report:
        try:
            train(settings, args)
        except Interrupted:
            interrupted = True
            print("stopped; the same command goes on", flush=True)
    files = report(settings, args.seeds)
    print(f"\n{files['ablation.md']}")
    save(args.output, files)
    if interrupted:
        sys.exit(EXIT_STATUS)
    sys.exit(1 if problems(settings, args.seeds) else 0)


if __name__ == "__main__":
    run_entry_point(main)
