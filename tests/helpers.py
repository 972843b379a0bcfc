"""What the tests share: small image folders, and running the project's scripts as a user would."""

import argparse
import contextlib
import gzip
import importlib.util
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
from PIL import Image

from config import add_checkpoint_arguments
from utils import run_entry_point

ROOT = Path(__file__).resolve().parent.parent

# Makes any Strip-MLP config small enough for a test: 3,000 parameters or so, 32 x 32 images, one epoch.
TINY = [
    *("DATA.IMG_SIZE", "32"),
    *("DATA.NUM_WORKERS", "0"),
    *("MODEL.STRIP_MLP.EMBED_DIM", "8"),
    *("MODEL.STRIP_MLP.LAYERS", "[1, 1, 1, 1]"),
    *("MODEL.STRIP_MLP.PATCH_CHANNELS", "2"),
    *("TRAIN.EPOCHS", "1"),
    *("TRAIN.WARMUP_EPOCHS", "0"),
]


def write_image(path: Path, seed: int, size: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_image_folder(root: Path, train: int, val: int, classes: int = 2) -> Path:
    """An ImageNet layout with `train` and `val` JPEGs in all, dealt to the classes in turn."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = root / split / f"class{i % classes}" / f"{split}_{i:03d}.jpg"
            write_image(path, seed=zlib.crc32(path.name.encode()))
    return root


def write_idx(path: Path, content: np.ndarray) -> None:
    """An IDX file of unsigned bytes, gzipped if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, content.ndim)) + np.array(content.shape, ">u4").tobytes()
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(header + content.astype(np.uint8).tobytes())


def write_idx_folder(
    root: Path, train: int, test: int, suffix: str = ".gz", emnist: str = "", classes=range(10)
) -> Path:
    """MNIST's four files, or those of a split of EMNIST, with `train` and `test` random images of `classes` in turn."""
    for seed, (split, count) in enumerate((("train", train), ("test" if emnist else "t10k", test))):
        prefix = f"emnist-{emnist}-{split}" if emnist else split
        images = np.random.default_rng(seed).integers(0, 256, (count, 28, 28))
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", np.resize(classes, count))
    return root


def read_metrics(folder: Path) -> list[dict]:
    """A run's metrics, of each epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load_tool(path: Path) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(monkeypatch, capsys, tool: ModuleType, *arguments) -> SimpleNamespace:
    """A tool as its command line runs it, without another process: status, out and err."""
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *map(str, arguments)])
    status = 0
    try:
        run_entry_point(tool.main)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return SimpleNamespace(status=status, out=said.out, err=said.err)


def trained_model(*arguments):
    """What engine/trained.py makes of a command line."""
    from engine import trained

    parser = argparse.ArgumentParser()
    add_checkpoint_arguments(parser)
    return trained.load_trained(parser.parse_args([str(argument) for argument in arguments]))


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**env: str) -> dict[str, str]:
    """What a command under test sees: one thread, no GPU, no wish about colours."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}


class Run:
    """A script of the project that runs in a process, and process group, of its own.

    Args:
        command: a script, by its path from the top folder, and its arguments; or `-m`, a module and its arguments.
        folder: for its output.
        stderr: where else the errors go.
    """

    _zygote: subprocess.Popen | None = None
    _ids = itertools.count()
    _unread: ClassVar[bytes] = b""
    _ended: ClassVar[dict[str, int]] = {}

    def __init__(self, *command, folder: Path | None = None, stderr: Path | None = None, cwd: Path = ROOT, **env: str):
        cls = type(self)
        if cls._zygote is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            cls._zygote = subprocess.Popen([sys.executable, ROOT / "tests/zygote.py"], env=environment(), **pipes)
        self.id = str(next(cls._ids))
        folder = Path(tempfile.mkdtemp()) if folder is None else folder
        self._out, self._err = folder / f"stdout{self.id}", stderr or folder / f"stderr{self.id}"
        words = list(map(str, command))
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        request = {"id": self.id, "command": words, "cwd": str(cwd)}
        request |= {"env": environment(**env), "stdout": str(self._out), "stderr": str(self._err)}
        cls._zygote.stdin.write(json.dumps(request).encode() + b"\n")
        while (answer := cls._answer())[:2] != ["started", self.id]:
            pass
        self.process = int(answer[2])

    @classmethod
    def _answer(cls, timeout: float = 60) -> list[str]:
        while b"\n" not in Run._unread:
            if not select.select([cls._zygote.stdout], [], [], max(timeout, 0))[0]:
                raise TimeoutError
            received = os.read(cls._zygote.stdout.fileno(), 65536)
            assert received, "the process that runs the scripts has died"
            Run._unread += received
        line, Run._unread = Run._unread.split(b"\n", 1)
        answer = line.decode().split()
        if answer[0] == "ended":
            cls._ended[answer[1]] = int(answer[2])
        return answer

    def wait(self, timeout: float = 300) -> int:
        """Its exit status; minus the signal that killed it."""
        deadline = time.monotonic() + timeout
        while self.id not in self._ended:
            try:
                self._answer(deadline - time.monotonic())
            except TimeoutError:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s\n{self.stdout}{self.stderr}") from None
        return self._ended[self.id]

    @property
    def running(self) -> bool:
        with contextlib.suppress(TimeoutError):
            while True:
                self._answer(0)
        return self.id not in self._ended

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until it has printed `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.stdout + self.stderr:
            assert self.running and time.monotonic() < deadline, f"no {text!r} in\n{self.stdout}{self.stderr}"
            time.sleep(0.01)

    def kill(self, number: int, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process, number)

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="backslashreplace") if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="backslashreplace") if self._err.exists() else ""


def start_processes(count: int, *command, **env: str) -> list[Run]:
    """The processes of one job, as torchrun starts them."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count), **env}
    local = {"LOCAL_WORLD_SIZE": str(count)}
    return [Run(*command, **job, **local, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def python(*command, ok: bool = True, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Runs `python <command>` from the top folder as a user would, on one thread, and checks how it ended."""
    if str(command[0]).endswith(".py") or command[0] == "-m":
        run = Run(*command, cwd=cwd, **env)
        result = subprocess.CompletedProcess(command, run.wait(), run.stdout, run.stderr)
    else:
        result = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment(**env),
            capture_output=True,
            text=True,
            timeout=300,
        )
    if ok:
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert result.returncode != 0, result.stdout + result.stderr
    return result


def torchrun(processes: int, *command, ok: bool = True, **env: str) -> subprocess.CompletedProcess:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", free_port())
    return python(*launcher, *command, ok=ok, **env)
