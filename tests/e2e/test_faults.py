"""Runs that are stopped, killed, starved and hung: what is left, and that they end as if nothing had happened."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from runtime.checkpoint import read_checkpoint, read_training_state
from runtime.per_image import CORRECT, read_correct
from tests.helpers import (
    ROOT,
    TINY,
    Run,
    environment,
    free_port,
    python,
    read_metrics,
    start_processes,
    write_image_folder,
)
from utils import process_runs

pytestmark = pytest.mark.slow

PICO = ("main.py", "--cfg", "configs/strip_mlp_pico_digits.yaml")
FOLDER = "strip_mlp_pico_digits/default"
TWO_EPOCHS = ("TRAIN.EPOCHS", 2, "SAVE_STEPS", 4, "PRINT_FREQ", 1)
# Of metrics.jsonl, all that does not measure time or memory.
SAME = ("epoch", "train_loss", "val_loss", "top1", "top5", "lr", "skipped_steps", "unreadable_train", "images")


def command(output: Path, *flags, opts=()) -> tuple:
    return (*PICO, "--output", output, *flags, "--opts", *TINY, *TWO_EPOCHS, *opts)


def start(processes: int, *arguments) -> list[Run]:
    return start_processes(processes, *arguments) if processes > 1 else [Run(*arguments)]


def metrics(folder: Path) -> list[list]:
    return [[record[key] for key in SAME] for record in read_metrics(folder)]


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, optimizer, loss scaler, best, metrics and the results per image, to the last bit."""
    assert metrics(a) == metrics(b)
    (correct, epoch), (other, _) = (read_correct(folder / CORRECT) for folder in (a, b))
    assert np.array_equal(correct, other)
    last = read_metrics(a)[-1]  # with TRAIN.EMA_DECAY, of the moving average
    assert (epoch, len(correct), 100 * correct.sum() / len(correct)) == (last["epoch"], last["images"], last["top1"])
    for name in ("last.pth", "best.pth"):
        x, y = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert list(x["model"]) == list(y["model"])
        assert [n for n in x["model"] if not torch.equal(x["model"][n], y["model"][n])] == []
        averages = [content.get("model_ema", {}) for content in (x, y)]
        assert averages[0].keys() == averages[1].keys()
        assert [n for n in averages[0] if not torch.equal(averages[0][n], averages[1][n])] == []
        torch.testing.assert_close(x["optimizer"]["state"], y["optimizer"]["state"], rtol=0, atol=0)
        for key in ("scaler", "epoch", "best"):
            assert x[key] == y[key]


def children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")  # its own, in user mode


@contextlib.contextmanager
def popen(*command, **kwargs):
    """A process of its own, outside of the zygote, which is killed in the end."""
    process = subprocess.Popen(list(map(str, (sys.executable, *command))), cwd=ROOT, env=environment(), **kwargs)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_log(log: Path, text: str, run: Run) -> None:
    deadline = time.monotonic() + 90
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline and run.running
        time.sleep(0.02)


def steps_logged(run: Run) -> int:
    return run.stdout.count("images/s memory")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    python(*command(output))
    return output / FOLDER


# Stopped anywhere


@pytest.fixture(scope="module")
def augmented(tmp_path_factory) -> tuple:
    """A command with all of the recipe's augmentation, on 160 images: 20 short steps per epoch of batch 8."""
    data = write_image_folder(tmp_path_factory.mktemp("data"), train=160, val=9, classes=3)
    return ("main.py", "--cfg", "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", "--data-path", data)


@pytest.mark.parametrize(
    ("processes", "workers", "amp", "accumulation", "fine_tuning"),
    [
        (1, 2, "off", 3, ()),
        (1, 2, "bfloat16", 1, ("TRAIN.EMA_DECAY", 0.9, "TRAIN.LAYER_DECAY", 0.8, "TRAIN.FREEZE", "stages.1")),
        (1, 0, "float16", 2, ()),
        (2, 2, "on", 2, ()),
        (3, 0, "off", 1, ("TRAIN.EMA_DECAY", 0.9)),
    ],
)
def test_a_run_killed_again_and_again_ends_as_one_never_stopped(
    processes, workers, amp, accumulation, fine_tuning, augmented, tmp_path
):
    """SIGTERM and SIGKILL in turn, at random steps; on several processes, to any of them."""
    flags = ("--amp", amp, "--accumulation-steps", accumulation, "--batch-size", (8, 8, 4, 2)[processes], "--output")
    opts = ("--opts", *TINY, *TWO_EPOCHS, "DATA.NUM_WORKERS", workers, "TRAIN.BASE_LR", 0.02)
    opts += fine_tuning
    opts += ("TIMEOUT", 60)  # gloo does not always notice that a process was killed: then the watchdog ends the others
    for run in start(processes, *augmented, *flags, tmp_path / "a", *opts):
        assert run.wait() == 0, run.stderr
    folder = tmp_path / "b" / "smlp_tiny_alpha3_patch4_224_imagenet1k/default"
    generator = random.Random(f"{processes} {workers} {amp} {accumulation}")
    rounds = [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    most = 40 // accumulation // len(rounds) - 1
    for number in rounds:
        runs = start(processes, *augmented, *flags, tmp_path / "b", *opts)
        victim = generator.choice(runs)
        steps = generator.randint(2, most)
        while steps_logged(runs[0]) < steps and runs[0].running:
            time.sleep(0.003)
        time.sleep(generator.uniform(0, 0.02))
        assert victim.running, runs[0].stdout + runs[0].stderr
        victim.kill(number)
        for run in runs:
            status = run.wait()
            assert status == (75 if number == signal.SIGTERM else -9 if run is victim else 1), run.stderr
            assert "Traceback" not in run.stderr or run is victim  # orphans complain
        if number == signal.SIGTERM:
            assert "the same command goes on from there" in runs[0].stdout
            assert read_training_state(folder / "last.pth")["epoch"] < 2
    for run in start(processes, *augmented, *flags, tmp_path / "b", *opts):
        assert run.wait() == 0, run.stderr
    assert_same_end(tmp_path / "a" / folder.relative_to(tmp_path / "b"), folder)


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGUSR1, 2)]
)
def test_signal_to_the_whole_group(number, workers, undisturbed, tmp_path):
    """As a terminal, torchrun and Slurm send it: the loader processes get it too."""
    opts = ("DATA.NUM_WORKERS", workers)
    run = Run(*command(tmp_path, opts=opts))
    run.wait_for("epoch 1/2 step 7")
    run.kill(number, group=True)
    assert run.wait() == 75
    assert f"{number.name}: stopping after this step" in run.stderr
    assert run.stderr.count("\n") == 1
    assert "saved in" in run.stdout.splitlines()[-1]
    assert f"{FOLDER}/last.pth; the same command goes on from there" in run.stdout.splitlines()[-1]
    progress = read_training_state(tmp_path / FOLDER / "last.pth")["progress"]
    assert progress["step"] >= 7
    assert f"after {progress['step']} of 22 steps" in run.stdout
    result = python(*command(tmp_path, opts=opts))
    assert f"0 epochs and {progress['step']} steps done" in result.stdout
    assert_same_end(undisturbed, tmp_path / FOLDER)


def test_stopped_in_the_evaluation(undisturbed, tmp_path):
    """Nothing is trained again."""
    opts = ("DATA.BATCH_SIZE", 64, "PRINT_FREQ", 22)
    run = Run(*command(tmp_path, opts=opts))
    run.wait_for("epoch 1/2 step 22/22")
    run.kill(signal.SIGTERM)
    assert run.wait() == 75
    content = read_training_state(tmp_path / FOLDER / "last.pth")
    if content["epoch"] == 0:  # else the evaluation was over by then
        assert content["progress"]["trained"]
        assert "after 22 of 22 steps" in run.stdout
    result = python(*command(tmp_path, opts=opts))
    assert "epoch 1/2 step" not in result.stdout
    assert_same_end(undisturbed, tmp_path / FOLDER)


def test_second_signal_exits_at_once(tmp_path):
    """In a step that takes all the epoch."""
    flags = ("--batch-size", 200, "--accumulation-steps", 8, "--output", tmp_path)
    run = Run(*PICO, *flags, "--opts", "DATA.NUM_WORKERS", 0, "DATA.IMG_SIZE", 64)
    run.wait_for("steps per epoch")
    before = cpu_seconds(run.process)
    while cpu_seconds(run.process) < before + 0.3:  # however busy the machine, the step has begun by then
        time.sleep(0.01)
    run.kill(signal.SIGTERM)
    run.wait_for("SIGTERM: stopping after this step; a second signal exits at once")
    run.kill(signal.SIGUSR1)  # within the same second: the same request
    time.sleep(1.2)
    assert run.running
    run.kill(signal.SIGTERM)
    assert run.wait(5) == 128 + signal.SIGTERM
    assert "a second signal, exiting without saving" in run.stderr
    assert not (tmp_path / FOLDER / "last.pth").exists()


def test_second_signal_to_a_process_that_waits_for_another(tmp_path):
    """Python's own handlers would not run before the wait is over."""
    runs = start(2, *command(tmp_path, "--batch-size", 32))
    runs[0].wait_for("epoch 1/2 step 3")
    runs[1].kill(signal.SIGSTOP)
    try:
        time.sleep(0.3)
        runs[0].kill(signal.SIGTERM)
        runs[0].wait_for("SIGTERM: stopping after this step")
        time.sleep(1.2)
        runs[0].kill(signal.SIGTERM)
        assert runs[0].wait(10) == 128 + signal.SIGTERM
    finally:
        runs[1].kill(signal.SIGKILL)


def test_signal_before_training_begins(tmp_path):
    run = Run(*command(tmp_path))
    run.wait_for("parameters; torch")
    run.kill(signal.SIGUSR1)
    assert run.wait(30) == 75
    assert "stopped before training began" in run.stderr or "saved in" in run.stdout


def test_ctrl_c_where_the_console_goes_away_with_it(tmp_path):
    """As in `python main.py ... 2>&1 | tee log`."""
    os.mkfifo(tmp_path / "console")
    reading = os.open(tmp_path / "console", os.O_RDONLY | os.O_NONBLOCK)
    run = Run(*command(tmp_path), stderr=tmp_path / "console")
    wait_for_log(tmp_path / FOLDER / "log_rank0.txt", "epoch 1/2 step 3", run)
    os.close(reading)
    run.kill(signal.SIGINT)
    assert run.wait(30) == 75
    assert read_training_state(tmp_path / FOLDER / "last.pth")["progress"]["step"] >= 3


def test_two_processes_and_a_model_without_running_statistics(augmented, tmp_path):
    """A vision transformer: there is nothing to gather."""
    (tmp_path / "peer.yaml").write_text("MODEL: {TYPE: timm, NAME: test_vit}\nDATA: {IMG_SIZE: 32, NUM_WORKERS: 0}\n")
    job = ("main.py", "--cfg", tmp_path / "peer.yaml", *augmented[3:], "--batch-size", 4, "--output", tmp_path)
    opts = ("--opts", "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "PRINT_FREQ", 1)
    runs = start(2, *job, *opts)
    runs[0].wait_for("step 3/")
    runs[1].kill(signal.SIGTERM)
    assert [run.wait() for run in runs] == [75, 75], runs[0].stderr
    assert read_training_state(tmp_path / "test_vit/default/last.pth")["progress"]["buffers"] is None
    assert [run.wait() for run in start(2, *job, *opts)] == [0, 0]


def test_processes_may_be_fewer_after_a_restart(undisturbed, tmp_path):
    """Two processes with half the batch each see the same batches as one; a batch of other images is said to be one."""
    runs = start(2, *command(tmp_path, "--batch-size", 32))
    runs[0].wait_for("epoch 1/2 step 6")
    runs[0].kill(signal.SIGTERM)
    assert [run.wait() for run in runs] == [75, 75]
    step = read_training_state(tmp_path / FOLDER / "last.pth")["progress"]["step"]
    shutil.copytree(tmp_path / FOLDER, tmp_path / "other" / FOLDER)

    result = python(*command(tmp_path, "--batch-size", 64))
    assert "the global batch was" not in result.stdout
    assert f"epoch 1/2 step {step + 1}/22" in result.stdout
    assert f"epoch 1/2 step {step}/22" not in result.stdout
    for found, expected in zip(metrics(tmp_path / FOLDER), metrics(undisturbed), strict=True):
        # Each process normalises over its half of the batch, so the losses are not the same.
        assert found[1:3] == pytest.approx(expected[1:3], rel=0.08)

    other = Run(*command(tmp_path / "other", "--batch-size", 16))
    other.wait_for(f"epoch 1/2 step {4 * step + 1}/89")
    other.kill(signal.SIGKILL)
    other.wait()
    assert "the global batch was 64 images (2 processes), is 16 (1)" in other.stdout
    assert f"epoch 1/2 step {4 * step}/89" not in other.stdout


# Checkpoints


@pytest.mark.parametrize("key", ["SAVE_STEPS", "SAVE_MINUTES"])
def test_checkpoints_inside_an_epoch(key, tmp_path):
    every = 8 if key == "SAVE_STEPS" else 0.002
    opts = ("TRAIN.EPOCHS", 1, "SAVE_STEPS", 0, key, every, "DATA.IMG_SIZE", 64)  # slow enough to be looked at
    run, seen = Run(*command(tmp_path, opts=opts)), set()
    while run.running:
        for name in ("last.pth", "previous.pth"):
            if (tmp_path / FOLDER / name).exists():  # always whole, if there at all
                seen.add(read_training_state(tmp_path / FOLDER / name)["progress"]["step"])
    assert run.wait() == 0
    # On a busy machine, one may be gone before it is looked at.
    assert {16} <= seen - {0} <= {8, 16} if key == "SAVE_STEPS" else len(seen - {0}) >= 3


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The output of a run that was killed in its second epoch, with two checkpoints."""
    output = tmp_path_factory.mktemp("killed")
    run = Run(*command(output, opts=("SAVE_STEPS", 5)))
    run.wait_for("epoch 2/2 step 12")
    run.kill(signal.SIGKILL)
    run.wait()
    return output


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "gone"])
def test_damaged_newest_checkpoint(damage, killed, undisturbed, tmp_path):
    """The one before is taken, the damaged one is kept under another name."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    last, previous = (tmp_path / FOLDER / name for name in ("last.pth", "previous.pth"))
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    content = {"truncated": content[: len(content) // 2], "changed": content, "empty": b"", "gone": None}[damage]
    last.unlink()
    if content is not None:
        last.write_bytes(content)
    result = python(*command(tmp_path, opts=("SAVE_STEPS", 5)))
    if damage == "gone":
        assert f"last.pth is gone; going on from {previous}" in result.stdout
    else:
        assert "damaged" in result.stdout and "skipped and renamed last_damaged1.pth" in result.stdout
        assert f"going on from {previous}, which is older" in result.stdout
        assert (tmp_path / FOLDER / "last_damaged1.pth").read_bytes() == content
    assert_same_end(undisturbed, tmp_path / FOLDER)


def test_folder_without_a_checkpoint_to_go_on_from(tmp_path):
    """What is there is not overwritten."""
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "weights.pth")
    for number, names, content, message in (
        (0, ("last.pth", "best.pth"), b"PK\3\4", "all checkpoints are damaged (last.pth, best.pth)"),
        (
            1,
            ("best.pth",),
            (tmp_path / "weights.pth").read_bytes(),
            "best.pth: holds no training state of this project",
        ),
    ):
        folder = tmp_path / str(number) / FOLDER
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(content)
        result = python(*command(tmp_path / str(number)), ok=False)
        assert message in result.stderr and "Traceback" not in result.stderr
        assert all((folder / name).read_bytes() == content for name in names)


def test_disk_full_during_training(undisturbed, tmp_path):
    """A limit on the size of files, set when there is a checkpoint already."""
    run = Run(*command(tmp_path, opts=("SAVE_STEPS", 0)))
    run.wait_for("epoch 1/2 step 22")
    last = tmp_path / FOLDER / "last.pth"
    while not last.exists():
        time.sleep(0.01)
    resource.prlimit(run.process, resource.RLIMIT_FSIZE, (200_000, 200_000))
    assert run.wait() == 1
    assert "last.pth: cannot be written" in run.stderr
    assert "the one before is untouched" in run.stderr
    assert "Traceback" not in run.stderr
    assert read_training_state(last)["epoch"] == 1
    assert not (tmp_path / FOLDER / ".last.pth.tmp").exists()
    python(*command(tmp_path))
    assert_same_end(undisturbed, tmp_path / FOLDER)


WRITER = """
import sys
from pathlib import Path
import torch
from runtime.checkpoint import save_checkpoint
folder = Path(sys.argv[1])
for i in range(10**9):
    state = {"number": i, "tensor": torch.full((30_000,), float(i))}
    save_checkpoint(state, folder / "best.pth", folder / "last.pth", previous=folder / "previous.pth")
    if i == 1:
        print("started", flush=True)
"""


def test_killed_while_writing(tmp_path):
    """At random moments of a process that does nothing but write: whatever is there can be read."""
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    generator = random.Random(0)
    left_halfway = 0
    for _ in range(30):
        run = Run(script, tmp_path)
        run.wait_for("started")
        time.sleep(generator.uniform(0, 0.05))
        run.kill(signal.SIGKILL)
        assert run.wait() == -9
        left_halfway += (tmp_path / ".last.pth.tmp").exists()
        numbers = []
        for name in ("last.pth", "previous.pth", "best.pth"):
            content = read_checkpoint(tmp_path / name)
            assert content["tensor"].eq(content["number"]).all()
            numbers.append(content["number"])
        assert numbers[1] in (numbers[0] - 1, numbers[0])
    assert left_halfway > 3  # that it was indeed caught writing


def test_retention(undisturbed, image_folder, tmp_path):
    """The two latest of this run's; neither another run's nor what cannot be read is deleted."""
    name = "smlp_tiny_alpha3_patch4_224_imagenet1k"
    job = ("main.py", "--cfg", f"configs/{name}.yaml", "--data-path", image_folder, "--batch-size", 8)
    opts, folder = ("--output", tmp_path, "--opts", *TINY, "SAVE_FREQ", 1), tmp_path / name / "default"
    opts += ("KEEP_CHECKPOINTS", 2, "TRAIN.EPOCHS")
    python(*job, *opts, 1)
    for foreign in ("ckpt_epoch_0.pth", "ckpt_epoch_300.pth"):
        shutil.copy(undisturbed / "last.pth", folder / foreign)
    (folder / "ckpt_epoch_00.pth").write_bytes(b"mine")
    python(*job, *opts, 5)
    kept = {"ckpt_epoch_0.pth", "ckpt_epoch_00.pth", "ckpt_epoch_300.pth", "ckpt_epoch_4.pth", "ckpt_epoch_5.pth"}
    assert {path.name for path in folder.glob("*.pth")} == {"last.pth", "previous.pth", "best.pth", *kept}


def test_second_run_in_one_folder(undisturbed, tmp_path):
    first = Run(*command(tmp_path))
    first.wait_for("epoch 1/2 step 3")
    first.kill(signal.SIGSTOP)  # so that it is not over before the others have come
    second = python(*command(tmp_path), ok=False)
    assert f"process {first.process} on {os.uname().nodename} has been training there since" in second.stderr
    assert "another --tag" in second.stderr
    assert "Traceback" not in second.stderr
    # On two processes, all end.
    for run in start(2, *command(tmp_path)):
        assert run.wait(60) == 1
        assert f"process {first.process} on" in run.stderr
    # The lock of a run that was killed is recognised, also while its loader processes live.
    first.kill(signal.SIGKILL)
    first.wait()
    result = python(*command(tmp_path))
    assert f"process {first.process} on {os.uname().nodename} was training here and was killed" in result.stdout
    assert_same_end(undisturbed, tmp_path / FOLDER)
    assert "was killed" not in python(*command(tmp_path)).stdout


# Loader processes and other processes


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_process_that_is_killed(processes, tmp_path):
    """All processes end, with a checkpoint, from which the run goes on as if nothing had been."""
    flags = ("--accumulation-steps", 2, "--batch-size", 64 // processes)
    opts = ("TRAIN.EPOCHS", 1, "SAVE_STEPS", 0)
    opts += ("DATA.NUM_WORKERS", 2, "AUG.COLOR_JITTER", 0.4)  # which is drawn by loader processes
    for run in start(processes, *command(tmp_path / "a", *flags, opts=opts)):
        assert run.wait() == 0
    runs = start(processes, *command(tmp_path / "b", *flags, opts=opts))
    runs[0].wait_for("epoch 1/1 step 2")
    victim = runs[-1]
    os.kill(max(children(victim.process)), signal.SIGKILL)
    assert [run.wait(60) for run in runs] == [1] * processes
    assert "a loader process has died" in victim.stderr
    assert "DATA.NUM_WORKERS" in victim.stderr
    if processes > 1:
        assert "another process could not load its data" in runs[0].stderr
    assert "Traceback" not in victim.stderr + runs[0].stderr
    assert "saved in" in runs[0].stdout
    assert read_training_state(tmp_path / "b" / FOLDER / "last.pth")["progress"]["step"] >= 2
    for run in start(processes, *command(tmp_path / "b", *flags, opts=opts)):
        assert run.wait() == 0
    assert_same_end(tmp_path / "a" / FOLDER, tmp_path / "b" / FOLDER)


def test_loader_process_that_hangs(tmp_path):
    """A single process has a watchdog too."""
    run = Run(*command(tmp_path, opts=("DATA.NUM_WORKERS", 1, "TIMEOUT", 2, "AUG.COLOR_JITTER", 0.4)))
    run.wait_for("epoch 1/2 step 2")
    (worker,) = children(run.process)[-1:]
    os.kill(worker, signal.SIGSTOP)
    assert run.wait(30) == 1
    assert "no progress for 2 seconds (TIMEOUT): waiting for the data of epoch 1 batch" in run.stdout
    assert "epoch.py" in run.stderr  # the stack


@pytest.mark.parametrize("victim", [0, 1])
def test_process_that_hangs_is_named(victim, tmp_path):
    runs = start(2, *command(tmp_path, "--batch-size", 32, opts=("TIMEOUT", 3)))
    runs[0].wait_for("epoch 1/2 step 3")
    runs[victim].kill(signal.SIGSTOP)
    other = runs[1 - victim]
    try:
        assert other.wait(60) == 1
    finally:
        runs[victim].kill(signal.SIGKILL)
    process = runs[victim].process
    if victim == 1:
        assert f"rank 1 (process {process} on {os.uname().nodename}) does not respond" in other.stdout + other.stderr
    else:  # without torchrun, the store is rank 0's
        assert "the processes' store (torchrun's, or else rank 0's) does not answer" in other.stderr


STORE = """
import sys, time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("there", flush=True)
time.sleep(300)
"""
WAITING_FOR_THE_DEAD = """
import logging, sys, time
import torch
from runtime import watchdog
from runtime.distributed import World
watchdog.ORPHAN_SECONDS = 2.0
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
rank, timeout, steps, seconds = map(int, sys.argv[1:])
dog = watchdog.Watchdog(World(rank, rank, 2, torch.device("cpu")), timeout, logging.getLogger())
dog.interval = 0.2
with dog:
    for _ in range(steps):  # as long as there is progress, the rest of the job may be well
        dog.at((0,), doing="stepping")
        print("step", flush=True)
        time.sleep(0.5)
    dog.at((1,), doing="adding up gradients")
    time.sleep(seconds)
"""


@pytest.mark.parametrize("what", ["killed", "stopped", "finished", "store lost"])
def test_process_that_waits_for_another(what, tmp_path):
    """Gloo does not always notice that another process has gone. If it was killed, or rank 0 with the processes' store,
    there is no need to wait for TIMEOUT."""
    script, timeout = tmp_path / "waiting.py", 1000 if what in ("killed", "store lost") else 4
    script.write_text(WAITING_FOR_THE_DEAD)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with popen("-c", STORE, env["MASTER_PORT"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "there\n"
        store = dist.TCPStore("127.0.0.1", int(env["MASTER_PORT"]), is_master=False)
        other = Run(script, 1, 1000, 0, 1 if what == "finished" else 300, **env)
        store.wait(["/watchdog/1"], timedelta(seconds=60))
        waiting = Run(script, 0, timeout, 8 if what == "store lost" else 0, 300, **env)
        try:
            store.wait(["/watchdog/0"], timedelta(seconds=60))
            if what == "store lost":
                server.kill()
            elif what != "finished":
                other.kill(signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
            assert waiting.wait(60) == 1
            assert other.running == (what == "stopped") or what == "store lost"
        finally:
            other.kill(signal.SIGKILL)
    name = f"rank 1 (process {other.process} on {os.uname().nodename})"
    expected = {
        "killed": f"no progress for 2 seconds, and {name} has ended; here: adding up gradients; this process exits",
        "store lost": "no progress for 2 seconds since the processes' store (torchrun's, or else rank 0's) was lost",
    }
    assert expected.get(what, "no progress for 4 seconds (TIMEOUT)") in waiting.stdout
    assert waiting.stdout.count("step\n") == (8 if what == "store lost" else 0)  # all: meanwhile there was progress
    assert "waiting.py" in waiting.stderr  # the stack


def test_process_that_has_ended_does_not_run():
    """Neither before nor after its parent has taken note."""
    assert process_runs(os.getpid())
    with subprocess.Popen(["sleep", "300"]) as process:
        process.send_signal(signal.SIGSTOP)
        assert process_runs(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not process_runs(process.pid)
    assert not process_runs(process.pid)


def torchrun(*arguments) -> Run:
    return Run("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(), *arguments)


def test_torchrun_brings_a_killed_process_back(tmp_path):
    """`--max-restarts`: one rank is killed twice, and the job ends by itself with the weights of an undisturbed one."""
    arguments = command(tmp_path / "a", "--batch-size", 32, opts=("SAVE_STEPS", 3))
    for run in start(2, *arguments):
        assert run.wait() == 0
    log = tmp_path / "b" / FOLDER / "log_rank0.txt"
    options = ("--max-restarts", "3", "--monitor-interval", "0.1")
    launcher = torchrun(*options, *command(tmp_path / "b", "--batch-size", 32, opts=("SAVE_STEPS", 3)))
    try:
        for epoch, rank in ((1, 1), (2, 0)):
            wait_for_log(log, f"epoch {epoch}/2 step 6", launcher)
            os.kill(sorted(children(launcher.process))[-2:][rank], signal.SIGKILL)
        assert launcher.wait(120) == 0, log.read_text()
    finally:
        launcher.kill(signal.SIGKILL, group=True)
    assert log.read_text().count("resumed from") == 2
    assert_same_end(tmp_path / "a" / FOLDER, tmp_path / "b" / FOLDER)


def test_torchrun_passes_a_signal_on(tmp_path):
    log = tmp_path / FOLDER / "log_rank0.txt"
    launcher = torchrun(*command(tmp_path, "--batch-size", 32, opts=("DATA.NUM_WORKERS", 2)))
    try:
        wait_for_log(log, "epoch 1/2 step 4", launcher)
        launcher.kill(signal.SIGTERM)
        launcher.wait(60)
    finally:
        launcher.kill(signal.SIGKILL, group=True)
    assert "saved in" in log.read_text()
    assert read_training_state(tmp_path / FOLDER / "last.pth")["progress"]["step"] >= 4


# Data


def test_files_that_vanish_or_cannot_be_read_are_counted(tmp_path):
    """While the run goes on."""
    data = write_image_folder(tmp_path / "data", train=64, val=8)
    paths = sorted((data / "train").rglob("*.jpg"))
    paths[3].write_bytes(b"")
    paths[9].unlink()
    os.mkfifo(paths[9])
    config = ("--cfg", "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", "--data-path", data, "--batch-size", 4)
    opts = ("TRAIN.EPOCHS", 3, "PRINT_FREQ", 1, "DATA.NUM_WORKERS", 1, "DATA.MAX_UNREADABLE", 0.2)
    run = Run("main.py", *config, "--output", tmp_path, "--opts", *TINY, *opts)
    run.wait_for("epoch 1/3 step 4")
    for path in paths[40:43]:
        path.unlink()
    os.truncate(paths[50], 300)
    assert run.wait() == 0
    lines = read_metrics(tmp_path / "smlp_tiny_alpha3_patch4_224_imagenet1k/default")
    assert 2 <= lines[0]["unreadable_train"] <= 6
    assert [line["unreadable_train"] for line in lines[1:]] == [6, 6]
    for path in (paths[9], paths[40], paths[50]):
        assert f"cannot be read as an image: {path}" in run.stdout
