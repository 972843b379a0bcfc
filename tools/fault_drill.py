"""Kill training runs at random moments, start them again, and compare how they end with runs left alone.

    python tools/fault_drill.py --kills 50
    python tools/fault_drill.py --minutes 60 --seed 1
    python tools/fault_drill.py --device cuda --setups "1 process, 2 workers, bfloat16" --kills 5

Trains a tiny model on the digits, with all augmentation, in several setups (loader processes, mixed precision,
accumulation, two processes under torchrun). A run survives if it ends with the weights, optimizer, metrics and best
accuracy of an undisturbed run of its setup, to the last bit. The exit status is 0 if all did. Needs Linux.

On a GPU sums are not reproducible: there a run with other weights is counted as different, but survives.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import parse_first

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("strip_mlp_pico_digits/default")
OPTIONS = [
    *("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "64", "TRAIN.EPOCHS", "5", "TRAIN.WARMUP_EPOCHS", "1"),
    *("MODEL.STRIP_MLP.EMBED_DIM", "8", "MODEL.STRIP_MLP.LAYERS", "[1, 1, 1, 1]"),
    *("MODEL.STRIP_MLP.PATCH_CHANNELS", "2", "MODEL.DROP_PATH_RATE", "0.1"),
    *("AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.REPROB", "0.25", "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"),
    *("SAVE_STEPS", "5", "PRINT_FREQ", "1"),
]
SETUPS = {
    "1 process, 0 workers": (1, ["DATA.NUM_WORKERS", "0"]),
    "1 process, 2 workers, 3 passes per step": (1, ["DATA.NUM_WORKERS", "2", "TRAIN.ACCUMULATION_STEPS", "3"]),
    "1 process, 2 workers, bfloat16": (1, ["DATA.NUM_WORKERS", "2", "AMP", "bfloat16"]),
    "1 process, 0 workers, float16, 2 passes": (
        1,
        ["DATA.NUM_WORKERS", "0", "AMP", "float16", "TRAIN.ACCUMULATION_STEPS", "2"],
    ),
    "2 processes, 0 workers": (2, ["DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "32"]),
    "2 processes, 1 worker each, bfloat16": (2, ["DATA.NUM_WORKERS", "1", "DATA.BATCH_SIZE", "32", "AMP", "bfloat16"]),
}
# What is sent to whom: the training process (one of them, if there are two), the launcher, or all at once.
FAULTS = ("KILL process", "KILL all", "TERM launcher", "INT launcher", "USR1 process")
MOST_SECONDS = 180  # a run that has not ended so long after a signal hangs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--kills", type=int, help="until so many kills (default: 50)")
    length.add_argument("--minutes", type=float, help="until so many minutes have passed")
    parser.add_argument("--setups", nargs="+", metavar="SETUP", help=f"(default: all) of: {'; '.join(SETUPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the runs (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds of the kills")
    parser.add_argument("--output", type=Path, help="an empty folder for the runs (default: a temporary one)")
    args = parser.parse_args()
    if (args.kills or 1) < 1 or (args.minutes or 1) <= 0:
        parser.error("--kills and --minutes must be more than 0")
    for setup in args.setups or ():
        if setup not in SETUPS:
            parser.error(f"--setups is {setup!r}; accepted: {'; '.join(map(repr, SETUPS))}")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import torch


@dataclass
class Result:
    """Of one setup."""

    kills: collections.Counter = field(default_factory=collections.Counter)
    runs: int = 0
    lost: int = 0  # could not be brought to their end
    different: int = 0  # ended with something else than the undisturbed run


def launch(setup: str, output: Path, device: str) -> subprocess.Popen:
    """Starts, or goes on with, the run of a setup in `output`."""
    processes, options = SETUPS[setup]
    launcher = []
    if processes > 1:
        # Its own random port each time.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher += ["--max-restarts", "100", "--monitor-interval", "0.2"]
    command = [sys.executable, *launcher, "main.py", "--cfg", "configs/strip_mlp_pico_digits.yaml"]
    command += ["--device", device, "--output", str(output), "--opts", *OPTIONS, *options]
    with open(output / "console.txt", "a") as console:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=console,
            stderr=console,
            start_new_session=True,
            # A shell's background commands ignore SIGINT, and their children with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def descendants(process: int) -> list[int]:
    """Child processes, theirs, and so on."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def is_training(process: int) -> bool:
    """Whether it runs main.py itself, and is no loader process."""
    try:
        parts = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        parents = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"main.py" in parts[1:3] and b"main.py" not in parents[1:3]


def send(fault: str, launcher: subprocess.Popen, generator: random.Random) -> bool:
    """Sends a fault of FAULTS; whether it reached a process."""
    name, _, target = fault.partition(" ")
    number = signal.Signals[f"SIG{name}"]
    family = [launcher.pid, *descendants(launcher.pid)]
    if target == "launcher":
        targets = [launcher.pid]
    elif target == "all":
        targets = family
    else:
        trainers = [process for process in family if is_training(process)]
        targets = [generator.choice(trainers)] if trainers else []
    reached = False
    for process in targets:
        try:
            os.kill(process, number)
            reached = True
        except ProcessLookupError:
            continue
    return reached


def disturbed_run(
    setup: str, output: Path, device: str, result: Result, generator: random.Random, until: Callable[[], bool]
) -> bool:
    """Kills a run and starts it again until it ends; once `until` says that there were enough kills, it is left alone.
    Whether it came to its end."""
    log = output / RUN / "log_rank0.txt"
    while True:
        size = log.stat().st_size
        launcher = launch(setup, output, device)
        killed = False
        # Two of three in training, the others anywhere from the start of Python on.
        if generator.random() < 2 / 3:
            while launcher.poll() is None and b"images/s" not in log.read_bytes()[size:]:
                time.sleep(0.05)
        while launcher.poll() is None and not until():
            moment = time.monotonic() + generator.uniform(0, 4)
            while launcher.poll() is None and time.monotonic() < moment:
                time.sleep(0.01)
            fault = generator.choice(FAULTS)
            reached = send(fault, launcher, generator)
            result.kills[fault] += reached
            killed |= reached
            if SETUPS[setup][0] == 1:
                break
            # torchrun brings a process back by itself: then there is more to kill after so many seconds.
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(12)
        try:
            status = launcher.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"    hangs after {dict(result.kills)}; see {output}/console.txt", flush=True)
            send("KILL all", launcher, generator)
            return False
        if status == 0 and b"everything is in" in log.read_bytes():
            return True
        if not killed:  # an error of its own
            return False


def end(output: Path) -> dict:
    """What has to be the same at the end of a run."""
    same = ("epoch", "train_loss", "val_loss", "top1", "top5", "lr", "skipped_steps", "unreadable_train")
    lines = [json.loads(line) for line in (output / RUN / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [[line[key] for key in same] for line in lines]}
    for name in ("last.pth", "best.pth"):
        content = torch.load(output / RUN / name, map_location="cpu", weights_only=True)
        tensors = {f"model.{key}": value for key, value in content["model"].items()}
        for number, moments in content["optimizer"]["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in moments.items()}
        found[name] = {key: value.numpy().tobytes() for key, value in tensors.items()}
        found[name] |= {key: content[key] for key in ("scaler", "epoch", "best")}
    return found


def differences(expected: dict, found: dict) -> list[str]:
    """Names of what is not the same."""
    names = [] if expected["metrics"] == found["metrics"] else ["metrics.jsonl"]
    for file in ("last.pth", "best.pth"):
        keys = {**expected[file], **found[file]}
        names += [f"{file}: {key}" for key in keys if expected[file].get(key) != found[file].get(key)]
    return names


def drill(
    kills: int | None, minutes: float | None, seed: int, output: Path, setups: Sequence[str], device: str
) -> dict[str, Result]:
    """Rounds over the setups until there were `kills` kills, or `minutes` have passed."""
    generator = random.Random(seed)
    results = {setup: Result() for setup in setups}
    references: dict[str, dict] = {}
    deadline = None if minutes is None else time.monotonic() + 60 * minutes

    def enough() -> bool:
        if deadline is not None and time.monotonic() > deadline:
            return True
        return kills is not None and sum(sum(result.kills.values()) for result in results.values()) >= kills

    while not enough():
        for number, (setup, result) in enumerate(results.items()):
            if enough():
                break
            if setup not in references:
                folder = output / f"setup{number}_undisturbed"
                folder.mkdir()
                print(f"{setup}: undisturbed", flush=True)
                if launch(setup, folder, device).wait(10 * MOST_SECONDS) != 0:
                    raise SystemExit(f"error: the undisturbed run fails; see {folder}/console.txt")
                references[setup] = end(folder)
            folder = output / f"setup{number}_run{result.runs}"
            (folder / RUN).mkdir(parents=True)
            (folder / RUN / "log_rank0.txt").touch()
            before = sum(result.kills.values())
            finished = disturbed_run(setup, folder, device, result, generator, enough)
            result.runs += 1
            count = sum(result.kills.values()) - before
            if not finished:
                result.lost += 1
                print(f"{setup}: killed {count} times, LOST; see {folder}/console.txt", flush=True)
                continue
            different = differences(references[setup], end(folder))
            result.different += bool(different)
            outcome = f"DIFFERENT: {', '.join(different[:5])}; see {folder}" if different else "survived"
            print(f"{setup}: killed {count} times, {outcome}", flush=True)
    return results


def report(results: dict[str, Result], exact: bool) -> bool:
    """Prints the table; whether every run survived, to the last bit if `exact`."""
    titles = ("setup", "runs", *FAULTS, "lost", "different")
    rows = [(setup, r.runs, *(r.kills[fault] for fault in FAULTS), r.lost, r.different) for setup, r in results.items()]
    totals = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    for row in (titles, ("---",) * len(titles), *rows, ("all", *totals)):
        print(f"| {' | '.join(map(str, row))} |")
    runs, lost, different = totals[0], totals[-2], totals[-1]
    survived = runs - lost - different * exact
    print(f"{sum(totals[1:-2])} kills, {runs} runs: {survived} survived, {lost} lost, {different} different")
    return runs > 0 and not lost and not (exact and different)


def main() -> None:
    args = parse_args()
    setups, exact = args.setups or list(SETUPS), args.device == "cpu"
    kills = 50 if args.kills is None and args.minutes is None else args.kills
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        if any(args.output.iterdir()):
            sys.exit(f"error: --output {args.output}: not empty")
        good = report(drill(kills, args.minutes, args.seed, args.output.resolve(), setups, args.device), exact)
    else:
        with tempfile.TemporaryDirectory() as folder:
            good = report(drill(kills, args.minutes, args.seed, Path(folder), setups, args.device), exact)
    sys.exit(not good)


if __name__ == "__main__":
    main()
