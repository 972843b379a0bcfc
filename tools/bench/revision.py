"""Another revision of this project as a contender: built from git in a temporary folder, run in a process of its own,
which waits while others are timed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.options import ROOT
from utils import UserError


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A folder with the project's files of a git revision, as long as the context lasts.

    Raises:
        UserError: git does not know the revision, or there is no git checkout.
    """
    with tempfile.TemporaryDirectory(prefix="revision_") as folder:
        target = Path(folder) / "project"
        # Not `git archive`: like that, the other revision can tell its own commit.
        git("worktree", "add", "--quiet", "--detach", str(target), revision)
        try:
            yield target
        finally:
            git("worktree", "remove", "--force", str(target))


def git(*arguments: str) -> None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--against needs git: {error}") from error
    if done.returncode:
        raise UserError(f"--against: git {' '.join(arguments)}: {done.stderr.strip()}")


class RemoteStep:
    """A `Step` of another revision's model. Its process has that revision's modules, and this one's benchmark.

    Args:
        folder: the other revision's files.
        contender: what `parse_contenders` takes, without a revision.
        settings: the other arguments of `serve.build_step`.

    Raises:
        RuntimeError: it cannot be built there; the message is the other process's.
    """

    uses_cuda_graphs = False

    def __init__(self, folder: Path, contender: str, settings: dict):
        self.device = torch.device(settings["device"])
        # Run in `folder`, Python finds the other revision's modules first, and the benchmark here.
        paths = [str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "bench.serve", contender, json.dumps(settings)]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.uses_cuda_graphs = self._answer()["uses_cuda_graphs"]

    def repeat(self, times: int) -> None:
        """Runs it so many times, and waits for the device."""
        self.ask(f"run {times}")

    def synchronize(self) -> None:
        """`repeat` waits for the device already."""

    def measured_peak(self) -> int | None:
        return self.ask("peak")["bytes"]

    def ask(self, what: str) -> dict:
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other revision's process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "out_of_memory" in answer:
            raise torch.OutOfMemoryError(answer["error"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
