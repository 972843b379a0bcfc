"""tools/slurm/train.sbatch with stand-ins for Slurm's commands. tools/slurm_drill.sh runs it under Slurm itself."""

import os
import signal
import subprocess
import time

import pytest

from tests.helpers import ROOT

SCRIPT = ROOT / "tools/slurm/train.sbatch"


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as a batch job whose `srun` does what is said; files tell what it was called with."""

    def start(srun: str, *arguments: str, state: str = "RUNNING") -> subprocess.Popen:
        commands = tmp_path / "bin"
        commands.mkdir()
        for name, what in (("srun", srun), ("scontrol", f"echo JobId=7 JobState={state}")):
            (commands / name).write_text(
                f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/{name}\n'
                f'printf "%s" "$SRUN_CPUS_PER_TASK" > {tmp_path}/{name}_cpus\n{what}\n'
            )
            (commands / name).chmod(0o755)
        environment = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": "python3.x", "SLURM_JOB_ID": "7"}
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env={**environment, "SLURM_CPUS_PER_TASK": "12"}, cwd=ROOT
        )

    return start


def test_finished(slurm, tmp_path):
    assert slurm("exit 0", "--cfg", "a b.yaml", "--tag", "x").wait(30) == 0
    called = (tmp_path / "srun").read_text().splitlines()
    assert called == ["--kill-on-bad-exit=0", "--wait=300", "python3.x", "main.py", "--cfg", "a b.yaml", "--tag", "x"]
    assert (tmp_path / "srun_cpus").read_text() == "12"
    assert not (tmp_path / "scontrol").exists()


def test_failed(slurm, tmp_path):
    assert slurm("exit 1").wait(30) == 1
    assert not (tmp_path / "scontrol").exists()


def test_stopped_and_saved(slurm, tmp_path):
    assert slurm("exit 75").wait(30) == 75
    assert (tmp_path / "scontrol").read_text().split() == ["show", "job", "7", "requeue", "7"]


def test_cancelled(slurm, tmp_path):
    assert slurm("exit 75", state="COMPLETING").wait(30) == 75
    assert (tmp_path / "scontrol").read_text().split() == ["show", "job", "7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_batch_script_too(slurm, tmp_path, number):
    job = slurm(f"while [ ! -e {tmp_path}/signalled ]; do sleep 0.05; done; exit 75")
    deadline = time.monotonic() + 30
    while not (tmp_path / "srun_cpus").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(number)
    (tmp_path / "signalled").touch()
    assert job.wait(30) == 75
    assert (tmp_path / "scontrol").read_text().split() == ["show", "job", "7", "requeue", "7"]
