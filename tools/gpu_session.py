"""Everything that has to be seen on a GPU, in one go: tests, speed, memory, kernels, mixed precision, NCCL, resuming.

    bash tools/gpu_session.sh --output FOLDER
    bash tools/gpu_session.sh --device cpu --tiny --output FOLDER
    bash tools/gpu_session.sh --only tests resume

Parts run one stage after the other, the most valuable first; those of a stage that times nothing run side by side. Each
has a time limit of its own, and none may pass that of the session (--minutes). As soon as a part is over, FOLDER gets
its result: report.md to read, results.jsonl with all numbers, log.txt with what it printed. Later sessions add to the
same files. A part that fails or is too slow costs the others nothing.

--device cpu --tiny is the rehearsal: the same parts with tiny models and images. The exit status is 0 if no part failed
or was too slow.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import above

from utils import UserError, run_entry_point, writing_to

with contextlib.suppress(ImportError):  # said by `missing_packages`
    import psutil

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 500_000  # of a part's output that are kept: its end
LAST_LINES = 15
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
TEST_PACKAGES = ("pytest", "hypothesis")


@dataclass
class Part:
    """A command, whose results are the .md and .json files that it leaves in its folder.

    Attributes:
        command: in it, FOLDER stands for that folder.
        limit: seconds that it may take.
    """

    name: str
    command: list[str]
    limit: float


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        status: "ok", "failed", "timed out", or "no time left".
        seconds: that it took.
        last_lines: of what it printed, if it is not ok or has no tables.
        data: the content of its JSON files, by name.
    """

    part: str
    status: str
    seconds: float = 0.0
    exit_status: int | None = None
    command: str = ""
    last_lines: list[str] = field(default_factory=list)
    data: dict = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def stages(device: str, tiny: bool) -> list[list[Part]]:
    """The parts in the order in which they run; those of one stage run side by side."""
    ours = ["strip_mlp_tiny_light", "strip_mlp_tiny", "strip_mlp_small", "strip_mlp_base"]
    main, peers = "strip_mlp_tiny", ["swin_tiny_patch4_window7_224", "convnext_tiny"]
    sizes = {"inference": ["--batch-sizes", "256"], "training": ["--batch-sizes", "128"]}
    how = ["--seconds", "12", "--warmup", "3"]
    checks = 100  # seconds
    if tiny:
        ours, main, peers = ["strip_mlp_pico"], "strip_mlp_pico", ["test_resnet"]
        sizes = {name: ["--batch-sizes", "2"] for name in sizes}
        how = ["--img-sizes", "32", "--rounds", "3", "--seconds", "0.1", "--warmup", "0"]
        checks = 240

    def bench(name: str, limit: float, contenders: Sequence[str], *more: str, dtype: str = "bfloat16") -> Part:
        command = [sys.executable, "tools/benchmark.py", "--device", device, "--dtypes", dtype, *how, *more]
        return Part(name, [*command, "--contenders", *contenders, "--output", "FOLDER/result.json"], limit)

    def task(name: str) -> list[str]:
        return ["--tasks", name, *sizes[name]]

    def check(name: str, *more: str) -> Part:
        command = [sys.executable, "tools/gpu_checks.py", *more, "--device", device, "--output", "FOLDER"]
        return Part(name, [*command, *(["--tiny"] if tiny else [])], checks)

    tests = [
        str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/*.py")) if "mark.cuda" in path.read_text()
    ]
    pytest = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]
    drill = [sys.executable, "tools/fault_drill.py", "--device", device, "--kills", "1" if tiny else "2"]
    drill += [
        "--setups",
        "1 process, 0 workers" if tiny else "1 process, 2 workers, bfloat16",
        "--output",
        "FOLDER/runs",
    ]
    compiled = peers if tiny else [main, *peers, "strip_mlp_base", "strip_mlp_tiny_light", "strip_mlp_small"]
    return [
        [Part("tests", pytest, 90)],
        [bench("eager_inference", 80, [*ours, *peers], *task("inference"), "--count-memory")],
        [bench("eager_training", 100, [*ours, *peers], *task("training"), "--count-memory")],
        [bench("kernels", 40, [main], *task("training"), "--kernels")],
        [
            check("group", "group"),
            check("digits", "digits"),
            check("digits_float16", "digits", "--amp", "float16"),
            Part("resume", drill, checks),
        ],
        *(
            [bench(f"compile_{task_name}_{name}", checks, [name, f"{name}:compile_blocks"], *task(task_name))]
            for name in compiled[:1]
            for task_name in ("training", "inference")
        ),
        [bench("literal_training", 45, [main, f"literal:{main}"], *task("training"), "--rounds", "3")],
        [bench("literal_inference", 45, [main, f"literal:{main}"], *task("inference"), "--rounds", "3")],
        [bench("float16_training", 40, [main], *task("training"), dtype="float16")],
        *(
            [bench(f"compile_{task_name}_{name}", 90, [name, f"{name}:compile_blocks"], *task(task_name))]
            for name in compiled[1:]
            for task_name in ("training", "inference")
        ),
        *(
            [bench(f"compile_whole_{task_name}_{main}", checks, [main, f"{main}:compile"], *task(task_name))]
            for task_name in ("training", "inference")
            if not tiny
        ),
    ]


def chosen(all_stages: Sequence[Sequence[Part]], only: Sequence[str] | None, skip: Sequence[str]) -> list[list[Part]]:
    """The stages with the parts that were asked for.

    Raises:
        UserError: there is no part of such a name.
    """
    names = [part.name for stage in all_stages for part in stage]
    for option, wanted in (("--only", only or ()), ("--skip", skip)):
        for name in wanted:
            if name not in names:
                raise UserError(f"{option} {name}: accepted: {', '.join(names)}")
    kept = [[p for p in stage if p.name not in skip and (not only or p.name in only)] for stage in all_stages]
    return [stage for stage in kept if stage]


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


class Report:
    """The three files, to which every part adds what it has."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, file: str, text: str) -> None:
        with writing_to(self.folder), open(self.folder / file, "a", encoding="utf-8") as opened:
            opened.write(text)

    def begin(self, facts: dict[str, str]) -> None:
        lines = "".join(f"- {name}: {value}\n" for name, value in facts.items())
        self.add("report.md", f"# GPU session\n\n{lines}\n")
        self.add("results.jsonl", json.dumps({"session": facts}) + "\n")

    def part(self, outcome: Outcome, texts: Sequence[str], log: str) -> None:
        text = f"## {outcome.part}: {outcome.status}, {outcome.seconds:.0f} s\n\n"
        if outcome.last_lines:
            text += "```\n" + "\n".join(outcome.last_lines) + "\n```\n\n"
        for each in texts:
            # The benchmark's notes before its tables are the same each time; its machine and options are in the data.
            tables = each[each.index("\n## ") :] if "\n## " in each else each
            text += re.sub(r"^#+ ", "### ", tables.strip(), flags=re.MULTILINE) + "\n\n"
        self.add("report.md", text)
        self.add("results.jsonl", json.dumps(asdict(outcome)) + "\n")
        self.add("log.txt", f"===== {outcome.part}: {outcome.command}\n{log}\n")


def run_session(all_stages: Sequence[Sequence[Part]], report: Report, seconds: float) -> list[Outcome]:
    """Runs the stages until `seconds` are over, and reports each part as soon as it is over."""
    deadline = time.monotonic() + seconds
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="gpu_session_") as work:
        for stage in all_stages:
            outcomes += run_stage(stage, Path(work), report, deadline)
    return outcomes


def run_stage(stage: Sequence[Part], work: Path, report: Report, deadline: float) -> list[Outcome]:
    """Runs parts side by side, none beyond the deadline (of the monotonic clock)."""
    outcomes: list[Outcome] = []
    if deadline - time.monotonic() < GRACE:
        for part in stage:
            outcomes.append(Outcome(part.name, "no time left", command=shlex.join(part.command)))
            report.part(outcomes[-1], [], "")
            say(outcomes[-1])
        return outcomes
    running = [Running(part, work / part.name, deadline) for part in stage]
    try:
        while running:
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                outcomes.append(one.outcome())
                report.part(outcomes[-1], one.texts(), one.log())
                say(outcomes[-1])
            time.sleep(0.1)
    finally:
        for one in running:  # this session is being interrupted
            one.end()
    return outcomes


class Running:
    """A part's process, with a group of its own.

    Args:
        folder: is made, for what the part writes.
        deadline: of the session, on the monotonic clock.
    """

    def __init__(self, part: Part, folder: Path, deadline: float):
        self.part, self.folder = part, folder
        folder.mkdir()
        self.command = [word.replace("FOLDER", str(folder)) for word in part.command]
        self.started = time.monotonic()
        # The grace is within the limit.
        self.limit = min(self.started + part.limit, deadline) - GRACE
        self.timed_out = False
        self.family: list[psutil.Process] = []
        # On a CPU that others use too, a second thread costs far more than it gains.
        threads = {"OMP_NUM_THREADS": "1"} if "cpu" in part.command else {}
        # A compiler that is killed leaves half a library, which the next part would load.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        with open(folder / "log.txt", "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**threads, **os.environ, **cache, "PYTHONUNBUFFERED": "1"},
            )

    def is_over(self) -> bool:
        """Ends the process if its time is over."""
        if self.process.poll() is not None:
            self.kill_family()  # what it may have left behind
            self.seconds = time.monotonic() - self.started
            return True
        now = time.monotonic()
        if now > self.limit + GRACE:
            self.kill(signal.SIGKILL)
        elif now > self.limit and not self.timed_out:
            self.timed_out = True
            self.remember_family()
            self.kill(signal.SIGTERM)
        return False

    def end(self) -> None:
        """Ends the process and all that it has started, at once."""
        self.remember_family()
        self.kill_family()
        self.process.wait()

    def remember_family(self) -> None:
        """Some parts start processes with groups of their own, which would run on."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def kill_family(self) -> None:
        self.kill(signal.SIGKILL)
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def log(self) -> str:
        content = (self.folder / "log.txt").read_bytes()
        return content[-LOG_BYTES:].decode(errors="replace")

    def texts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("*.md"))]

    def outcome(self) -> Outcome:
        data = {}
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(ValueError):  # a part that was killed may have left half a file
                data[path.stem] = json.loads(path.read_text())
        # The benchmark goes on after a network that fails.
        failed = self.process.returncode or any(row["problem"] for row in data.get("result", {}).get("rows", ()))
        status = "timed out" if self.timed_out else "failed" if failed else "ok"
        shown = status != "ok" or not self.texts()
        lines = self.log().rstrip().splitlines()[-LAST_LINES:] if shown else []
        command = shlex.join(self.part.command)
        return Outcome(self.part.name, status, self.seconds, self.process.returncode, command, lines, data)


def say(outcome: Outcome) -> None:
    print(f"{outcome.part}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)


def missing_packages() -> list[str]:
    """Of requirements.txt and of the tests that run, those that are not installed."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=~!\[; ]", line)[0] for line in lines if line and not line.startswith("#")]
    found = []
    for name in (*names, *TEST_PACKAGES):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    return found


def facts(args: argparse.Namespace) -> dict[str, str]:
    """The machine and the versions, without PyTorch, which would take seconds."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu = "none that nvidia-smi knows"
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "timm"))
    return {
        "GPU": gpu,
        "device": f"{args.device}{', tiny' if args.tiny else ''}",
        "system": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "versions": ", ".join(versions),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, images and runs")
    parser.add_argument("--only", nargs="+", metavar="PART", help="no other parts")
    parser.add_argument("--skip", nargs="+", metavar="PART", default=[], help="not these parts")
    parser.add_argument(
        "--list", action="store_true", help="the parts, their limits and commands, without running them"
    )
    parser.add_argument("--minutes", type=above(0), default=8.5, help="of the whole session (8.5)")
    output = Path("output/gpu_session")
    parser.add_argument("--output", type=Path, default=output, metavar="FOLDER", help=f"({output})")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` leaves nothing running either
    started = time.monotonic()
    wanted = chosen(stages(args.device, args.tiny), args.only, args.skip)
    if args.list:
        for part in (part for stage in wanted for part in stage):
            print(f"{part.name} ({part.limit:g} s): {shlex.join(part.command)}")
        return
    missing = missing_packages()
    if missing:
        raise UserError(f"not installed for {sys.executable}: {', '.join(missing)}; see requirements.txt")
    with writing_to(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    report = Report(args.output.resolve())
    report.begin(facts(args))
    outcomes = run_session(wanted, report, 60 * args.minutes - (time.monotonic() - started))
    bad = [outcome.part for outcome in outcomes if outcome.status in ("failed", "timed out")]
    text = (
        f"{len(outcomes)} parts in {time.monotonic() - started:.0f} s; failed or timed out: {', '.join(bad) or 'none'}"
    )
    report.add("report.md", f"{text}\n")
    print(f"{text}; written: {args.output}/report.md, results.jsonl and log.txt")
    sys.exit(bool(bad))


if __name__ == "__main__":
    run_entry_point(main)
