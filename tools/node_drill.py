"""Trains on two machines, takes one away and brings it back. Each run must end as an undisturbed one does.

    python tools/node_drill.py
    python tools/node_drill.py --cases two slow

The machines are network namespaces of this one, joined by a virtual cable, with torchrun and gloo as on real ones.
Trains a tiny model on the digits. Cases:

    two      2 machines of 1 process, and of 2: trains and evaluates as on one machine, to the last bit
    slow     the same over a link with 20 ms of delay each way, which loses 1 % of the packets
    lost     a machine is killed; the other one says so and ends; the same commands go on and end with the same weights
    cut      the cable is pulled, so that no machine hears of the other's end: noticed after TIMEOUT, here 90 seconds
    elastic  torchrun --nnodes 1:2: a machine is killed, the other goes on alone, and takes it in again when it is back
    unshared the second machine has another disk where the output folder is: refused at the start

Prints a line per case with its seconds. The exit status is 0 if all are as said. Needs Linux, root,
iproute2 and, for the slow link, /dev/net/tun.
"""

import argparse
import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, run_entry_point

CASES = ("two", "slow", "lost", "cut", "elastic", "unshared")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help="(default: all)")
    parser.add_argument("--output", type=Path, help="an empty folder for the runs (default: a temporary one)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_first(parse_args)

import torch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/strip_mlp_pico_digits.yaml"
BATCH = 128  # of all processes
OPTIONS = [
    *("DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "6", "TRAIN.WARMUP_EPOCHS", "1"),
    *("MODEL.STRIP_MLP.EMBED_DIM", "8", "MODEL.STRIP_MLP.LAYERS", "[1, 1, 1, 1]"),
    *("MODEL.STRIP_MLP.PATCH_CHANNELS", "2", "SAVE_STEPS", "5", "PRINT_FREQ", "1"),
]
NODES = ("strip_mlp_a", "strip_mlp_b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable"
DELAY, LOSS = 0.02, 0.01
MOST_SECONDS = 900


class Failed(Exception):
    """A case did not end as it should have."""


# ---------------------------------------------------------------------------------------------------------------------
# Machines and the link between them
# ---------------------------------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"ip {' '.join(arguments)}: {result.stderr.strip()}; this drill needs root and Linux")


@contextlib.contextmanager
def machines(slow: bool = False) -> Iterator[None]:
    """Inside, two namespaces that reach each other, and nothing else, over INTERFACE."""
    with contextlib.ExitStack() as stack:
        for node in NODES:
            with contextlib.suppress(UserError):  # left by a drill that was killed
                ip("netns", "del", node)
            ip("netns", "add", node)
            stack.callback(ip, "netns", "del", node)
            ip("-n", node, "link", "set", "lo", "up")
        if slow:
            stack.enter_context(SlowLink())
        else:
            ip(
                "link",
                "add",
                INTERFACE,
                "netns",
                NODES[0],
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                NODES[1],
            )
        for node, address in zip(NODES, ADDRESSES, strict=True):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", node, "link", "set", INTERFACE, "up")
        stack.callback(kill_nodes)
        yield


def kill_node(number: int) -> None:
    """All processes of a machine, at once."""
    listed = subprocess.run(["ip", "netns", "pids", NODES[number]], capture_output=True, text=True, check=True)
    for process in map(int, listed.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def kill_nodes() -> None:
    for number in range(len(NODES)):
        kill_node(number)


class SlowLink:
    """Inside `with`, packets between the machines pass through this process, each DELAY seconds late, a share of LOSS
    not at all. (What `tc netem` does where the kernel has it.)"""

    TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000

    def __enter__(self) -> "SlowLink":
        self._ends = []
        for number, node in enumerate(NODES):
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            name = f"slow{number}"
            fcntl.ioctl(end, self.TUNSETIFF, struct.pack("16sH22s", name.encode(), self.IFF_TUN | self.IFF_NO_PI, b""))
            ip("link", "set", name, "netns", node)
            ip("-n", node, "link", "set", name, "name", INTERFACE)
            self._ends.append(end)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()
        return self

    def _relay(self) -> None:
        generator, waiting, count = random.Random(0), [], 0
        while not self._stopped.is_set():
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for end in select.select(self._ends, [], [], min(pause, 0.1))[0]:
                packet = os.read(end, 65536)
                if generator.random() >= LOSS:
                    count += 1
                    heapq.heappush(waiting, (time.monotonic() + DELAY, count, self._ends[end == self._ends[0]], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                *_, end, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):  # the other machine's end is down
                    os.write(end, packet)

    def __exit__(self, *exception) -> None:
        self._stopped.set()
        self._thread.join()
        for end in self._ends:
            os.close(end)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------


class Job:
    """torchrun with the same command on both machines, or on this one alone.

    Args:
        output: of the run; its consoles are beside it.
        processes: per machine.
        nodes: what torchrun's --nnodes gets; None: this machine, without namespaces.
    """

    def __init__(
        self, output: Path, processes: int, nodes: str | None = "2", script: str = "main.py", more: Sequence[str] = ()
    ):
        self.output, self.processes, self.nodes, self.script, self.more = output, processes, nodes, script, more
        self.restarts, self.timeout = 3, "1800"
        self.run = output / "strip_mlp_pico_digits/default"
        self.running: dict[int, subprocess.Popen] = {}
        output.mkdir(exist_ok=True)

    def start(self, *numbers: int, before: str = "") -> None:
        """Starts the machines of those numbers.

        Args:
            before: a shell command that the machine runs first.
        """
        for number in numbers:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
            prefix, size = [], 1
            if self.nodes is None:
                launcher += ["--standalone"]
            else:
                prefix, size = ["ip", "netns", "exec", NODES[number]], len(NODES)
                launcher += ["--nnodes", self.nodes, "--max-restarts", str(self.restarts), "--monitor-interval", "0.5"]
                launcher += ["--rdzv_backend", "c10d", "--rdzv_id", "drill", "--local_addr", ADDRESSES[number]]
                # torchrun does not find out that the endpoint is its own machine, whose name leads elsewhere here. And
                # it need not wait 30 s for machines that do not come.
                launcher += ["--rdzv_endpoint", f"{ADDRESSES[0]}:29400"]
                launcher += ["--rdzv_conf", f"is_host={number == 0},last_call_timeout=5"]
            batch = ["DATA.BATCH_SIZE", str(BATCH // (size * self.processes)), "TIMEOUT", self.timeout]
            command = [*launcher, self.script, "--cfg", CONFIG, "--device", "cpu", "--output", str(self.output)]
            command += [*self.more, "--opts", *OPTIONS, *batch]
            if before:
                command = ["sh", "-c", f'{before} && exec "$@"', "sh", *command]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
            # Without it torchrun does not take in a machine that comes later
            # (findings/torchrun_machine_that_comes_back.sh).
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            if self.nodes is None:
                environment.pop("GLOO_SOCKET_IFNAME")
            with open(self.console(number), "a") as console:
                self.running[number] = subprocess.Popen(
                    [*prefix, *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                )

    def console(self, number: int) -> Path:
        return self.output / f"console_{self.script}_{number}.txt"

    def wait(self, *numbers: int) -> list[int]:
        """Their exit statuses."""
        return [self.running[number].wait(MOST_SECONDS) for number in numbers]

    def finish(self, *numbers: int) -> None:
        self.start(*numbers)
        if any(statuses := self.wait(*numbers)):
            raise Failed(f"exit statuses {statuses}; see {self.output}")

    def metrics(self) -> list[dict]:
        file = self.run / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + MOST_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"not {what} within {MOST_SECONDS} s; see {self.output}")
            time.sleep(0.2)

    def expect_weights_of(self, other: "Job") -> None:
        ours, theirs = (torch.load(job.run / "last.pth", weights_only=True)["model"] for job in (self, other))
        different = [key for key, value in theirs.items() if not torch.equal(ours[key], value)]
        if different:
            raise Failed(f"{len(different)} tensors differ, {different[0]} first; see {self.output} and {other.output}")
        if self.metrics()[-1]["top1"] != other.metrics()[-1]["top1"]:
            raise Failed(f"the accuracies differ; see {self.output} and {other.output}")


class Drill:
    """Args: folder: for the runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._undisturbed: dict[int, Job] = {}

    def undisturbed(self, processes: int) -> Job:
        """So many processes on this machine alone; trained when it is first asked for."""
        if processes not in self._undisturbed:
            job = Job(self.folder / f"undisturbed_{processes}", processes, None)
            job.finish(0)
            self._undisturbed[processes] = job
        return self._undisturbed[processes]

    def two(self) -> str:
        said = []
        for processes in (1, 2):
            other = self.undisturbed(2 * processes)
            with machines():
                job = Job(self.folder / f"two_{processes}", processes)
                started = time.monotonic()
                job.finish(0, 1)
                said.append(f"2 x {processes} processes in {time.monotonic() - started:.0f} s")
                job.expect_weights_of(other)
                evaluation = ["--resume", str(job.run / "last.pth"), "--json", str(job.output / "eval.json")]
                Job(job.output, processes, script="main_eval.py", more=evaluation).finish(0, 1)
            top1 = json.loads((job.output / "eval.json").read_text())["top1"]
            if top1 != job.metrics()[-1]["top1"]:
                raise Failed(f"main_eval.py says {top1}, training said {job.metrics()[-1]['top1']}")
        return "; ".join(said) + "; same weights as on one machine, same accuracy from main_eval.py"

    def slow(self) -> str:
        other, seconds = self.undisturbed(2), []
        for slow in (False, True):
            with machines(slow):
                job = Job(self.folder / f"slow_{slow}", 1)
                job.finish(0, 1)
                job.expect_weights_of(other)
                seconds.append(sum(record["seconds"] for record in job.metrics()[1:]) / (len(job.metrics()) - 1))
        return f"{seconds[0]:.1f} s per epoch without, {seconds[1]:.1f} s with delay and loss; same weights"

    def lost(self) -> str:
        return self._taken_away("lost", lambda: kill_node(1), "lost the connection to another process")

    def cut(self) -> str:
        pull = ("-n", NODES[1], "link", "set", INTERFACE, "down")
        return self._taken_away("cut", lambda: ip(*pull), "no progress for 90 seconds")

    def _taken_away(self, name: str, take_away: Callable[[], None], said: str) -> str:
        other = self.undisturbed(4)
        with machines():
            job = Job(self.folder / name, 2)
            job.timeout = "90"
            job.start(0, 1)
            job.wait_for("at epoch 3", lambda: len(job.metrics()) >= 2)
            take_away()
            at = time.monotonic()
            # The processes of the first machine; its torchrun then waits for a second machine.
            job.wait_for("noticed", lambda: not training_processes(job, 0))
            noticed = time.monotonic() - at
            if said not in job.console(0).read_text():
                raise Failed(f"the first machine does not say {said!r}; see {job.output}")
            kill_nodes()
            if name == "cut":
                ip("-n", NODES[1], "link", "set", INTERFACE, "up")
            job.wait(0, 1)
            job.finish(0, 1)
        job.expect_weights_of(other)
        return f"the others ended after {noticed:.0f} s; the same commands ended with the same weights"

    def elastic(self) -> str:
        with machines():
            job = Job(self.folder / "elastic", 1, "1:2")
            job.start(0, 1)
            job.wait_for("at epoch 3", lambda: len(job.metrics()) >= 2)
            kill_node(1)
            at, done = time.monotonic(), len(job.metrics())
            job.wait_for("going on alone", lambda: len(job.metrics()) > done or job.running[0].poll() is not None)
            alone = time.monotonic() - at
            job.start(1)
            if any(statuses := job.wait(0, 1)):
                raise Failed(f"exit statuses {statuses}; see {job.output}")
        numbers = [record["processes"] for record in job.metrics()]
        if len(numbers) != 6 or numbers[0] != 2 or 1 not in numbers or numbers[-1] != 2:
            raise Failed(f"processes by epoch: {numbers}; expected: 2, then 1, then 2")
        return f"the next epoch was done alone {alone:.0f} s after the kill; processes by epoch: {numbers}"

    def unshared(self) -> str:
        with machines():
            job = Job(self.folder / "unshared", 1)
            job.restarts = 0
            at = time.monotonic()
            job.start(0)
            job.start(1, before=f"mount -t tmpfs none {shlex.quote(str(job.output))}")
            statuses = job.wait(0, 1)
            seconds = time.monotonic() - at
        text = job.console(0).read_text()
        if 0 in statuses or "accepted for OUTPUT: a folder on a disk that all machines of the run share" not in text:
            raise Failed(f"exit statuses {statuses}; see {job.output}")
        if job.metrics():
            raise Failed(f"it trained; see {job.output}")
        return f"refused after {seconds:.0f} s, with the start"


def training_processes(job: Job, number: int) -> list[int]:
    """The processes of a machine that run the job's script themselves."""
    listed = subprocess.run(["ip", "netns", "pids", NODES[number]], capture_output=True, text=True, check=True)
    found = []
    for process in map(int, listed.stdout.split()):
        with contextlib.suppress(OSError):
            if job.script.encode() in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[1:3]:
                found.append(process)
    return found


def main() -> None:
    args = parse_args()
    folder = args.output or Path(tempfile.mkdtemp(prefix="node_drill_"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"--output {folder}: is not empty; accepted: an empty folder, or a new one")
    drill, failed = Drill(folder.absolute()), 0
    for case in args.cases:
        try:
            said = getattr(drill, case)()
        except (Failed, subprocess.TimeoutExpired) as error:
            said, failed = f"FAILED: {error}", failed + 1
        print(f"{case}: {said}", flush=True)
    if failed:
        sys.exit(1)
    print("all as promised")


if __name__ == "__main__":
    run_entry_point(main)
