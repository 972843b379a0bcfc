"""The launchers and what several processes must agree on (gloo, CPU)."""

import json
import logging
import os
import socket
import subprocess
import sys

import pytest
import torch

from data import build_eval_loader, build_sources
from engine import evaluate as evaluation
from runtime.distributed import World
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
    torchrun,
    trained_model,
    write_image_folder,
)

pytestmark = pytest.mark.slow

CONFIG = ("--cfg", "configs/smlp_base_alpha3_patch4_224_imagenet1k.yaml")
RUN = "smlp_base_alpha3_patch4_224_imagenet1k/default"
ALONE = World(0, 0, 1, torch.device("cpu"))


def evaluate(image_folder, tmp_path, checkpoint, processes: int, batch_size: int) -> dict:
    result = tmp_path / f"eval_{processes}_{batch_size}.json"
    command = ("main_eval.py", *CONFIG, "--data-path", image_folder, "--batch-size", batch_size)
    named = ("--resume", checkpoint, "--json", result)
    for run in start_processes(processes, *command, *named, "--opts", *TINY):
        assert run.wait() == 0, run.stderr
    return json.loads(result.read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_the_commands_of_the_released_readme(processes, image_folder, tmp_path):
    """Training, and then evaluation of what it left, without a word about checkpoints."""
    launch = ("-m", "torch.distributed.launch", "--nproc_per_node", processes, "--master_port", free_port())
    options = (*CONFIG, "--data-path", image_folder, "--batch-size", 8, "--output", tmp_path, "--opts", *TINY)
    python(*launch, "main.py", *options)
    assert (tmp_path / RUN / "best.pth").is_file()
    assert (tmp_path / RUN / f"log_rank{processes - 1}.txt").is_file()
    assert [record["epoch"] for record in read_metrics(tmp_path / RUN)] == [1]
    result = python(*launch, "main_eval.py", *options)
    assert "on 7 images" in result.stdout


def test_two_processes_train_and_agree(image_folder, tmp_path):
    """After training on two processes, which normalise by statistics of their own, every process evaluates and saves
    the same model."""
    options = (*CONFIG, "--data-path", image_folder, "--batch-size", 4, "--accumulation-steps", 3)
    opts = ("--opts", *TINY, "TRAIN.EPOCHS", 3, "SAVE_FREQ", 1)
    for process in start_processes(2, "main.py", *options, "--output", tmp_path / "a", *opts):
        assert process.wait() == 0, process.stderr
    run = tmp_path / "a" / RUN
    records = read_metrics(run)
    # 16 images / 2 processes / 4 images = 2 passes, fewer than 3: one step each epoch, of both.
    assert "step 1/1" in (run / "log_rank0.txt").read_text()

    # The losses in metrics.jsonl come from both processes' models, half of the images each.
    alone = evaluate(image_folder, tmp_path, run / "last.pth", processes=1, batch_size=8)
    assert alone["images"] == 7
    assert records[-1]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)
    assert records[-1]["top1"] == alone["top1"]

    # So does what is right per image, in the order of the data set.
    trained = trained_model(run / "last.pth", "--device", "cpu")
    source = build_sources(trained.config, ALONE, train=False).val
    loader = build_eval_loader(trained.config, source, ALONE)
    _, expected = evaluation.evaluate(trained.config, trained.model, loader, ALONE, logging.getLogger())
    correct, epoch = read_correct(run / CORRECT)
    assert (correct.tolist(), epoch) == (expected.bool().tolist(), 3)
    assert 0 < correct.sum() < 7


def test_evaluation_is_the_same_on_any_number_of_processes(tmp_path):
    """Every image once: 19 images on 1, 2 and 3 processes, in batches that leave remainders."""
    data = write_image_folder(tmp_path / "data", train=16, val=19, classes=3)
    train = ("main.py", *CONFIG, "--data-path", data, "--batch-size", 8, "--output", tmp_path)
    python(*train, "--opts", *TINY)
    checkpoint = tmp_path / RUN / "last.pth"
    expected = evaluate(data, tmp_path, checkpoint, processes=1, batch_size=19)
    assert expected["images"] == 19
    for processes, batch_size in ((1, 4), (2, 4), (3, 4)):
        result = evaluate(data, tmp_path, checkpoint, processes, batch_size)
        assert result["images"] == 19
        assert (result["top1"], result["top5"]) == (expected["top1"], expected["top5"])
        assert result["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_one_process_downloads_while_the_others_wait(tmp_path):
    """On two processes, the second enters only after the first has left."""
    script = tmp_path / "enter.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from runtime.distributed import close_world, init_world, main_process_first\n"
        "world = init_world('cpu')\n"
        "with main_process_first(world):\n"
        "    print(f'enter {world.rank} {time.time():.6f}', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    print(f'leave {world.rank} {time.time():.6f}', flush=True)\n"
        "close_world(world)\n"
    )
    times = {}
    for line in torchrun(2, script, PYTHONPATH=".").stdout.splitlines():
        event, rank, time = line.split()
        times[event, rank] = float(time)
    assert times["enter", "1"] >= times["leave", "0"]


def slurm_task(rank: int, tasks: int) -> dict[str, str]:
    """What srun sets on a machine of its own."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": str(tasks)}
    task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    return {**step, **task, "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}


def test_tasks_of_slurm_are_one_run(image_folder, tmp_path):
    """As `srun --ntasks 2 python main.py`, without a launcher."""
    options = (*CONFIG, "--data-path", image_folder, "--batch-size", 4, "--output", tmp_path, "--opts", *TINY)
    for task in [Run("main.py", *options, **slurm_task(rank, 2)) for rank in range(2)]:
        assert task.wait() == 0, task.stderr
    assert read_metrics(tmp_path / RUN)[-1]["processes"] == 2
    assert (tmp_path / RUN / "log_rank1.txt").is_file()


@pytest.mark.parametrize("inside", [{"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, slurm_task(0, 1)])
def test_batch_script_and_shell_of_slurm_are_alone(inside, image_folder, tmp_path):
    options = (*CONFIG, "--data-path", image_folder, "--batch-size", 4, "--output", tmp_path, "--opts", *TINY)
    python("main.py", *options, **{**inside, "SLURM_JOB_ID": "1"})
    assert read_metrics(tmp_path / RUN)[-1]["processes"] == 1


def test_shell_wrappers(image_folder, tmp_path):
    """One really starts Python, twice over; of the other, what it would start is run."""
    options = ["--data-path", image_folder, "--batch-size", "8", "--output", tmp_path, "--opts", *TINY]

    def printed(tool: str, processes: int, interpreter) -> str:
        words = ["bash", f"tools/{tool}", CONFIG[1], str(processes), *options]
        env = environment(PYTHON=str(interpreter), PORT=free_port())
        result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    interpreter = tmp_path / "interpreter"
    interpreter.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    interpreter.chmod(0o755)
    trained = python(*printed("dist_train.sh", 2, interpreter).splitlines())
    assert "epoch 1/1 top-1" in trained.stdout
    assert read_metrics(tmp_path / RUN)[-1]["processes"] == 2
    assert "on 7 images" in printed("dist_eval.sh", 1, sys.executable)


def start_machines(tmp_path, *command):
    """One process on each of two machines, which are folders: what a relative path leads to is each one's own."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    runs = []
    for rank in range(2):
        cwd = tmp_path / f"machine{rank}"
        cwd.mkdir(exist_ok=True)
        runs.append(Run(*command, cwd=cwd, **job, LOCAL_WORLD_SIZE="1", LOCAL_RANK="0", RANK=str(rank)))
    return runs


@pytest.mark.parametrize("script", ["main.py", "main_eval.py"])
def test_machine_with_other_data(tmp_path, script):
    for rank in range(2):
        write_image_folder(tmp_path / f"machine{rank}/data", train=8, val=4)
    sorted((tmp_path / "machine1/data/val").rglob("*.jpg"))[0].unlink()
    config = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
    options = ("--data-path", "data", "--output", tmp_path / "output", "--opts", *TINY, "DATA.BATCH_SIZE", "2")
    runs = start_machines(tmp_path, script, "--cfg", config, *options)
    assert [run.wait() for run in runs] == [1, 1]
    host = socket.gethostname()
    for run in runs:
        assert f"data on {host} (rank 1) has 3 samples of val, on {host} (rank 0) 4, and they are not" in run.stderr


def test_machines_with_the_same_data_in_other_places(tmp_path):
    runs, job = [], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    config = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
    for rank in range(2):
        data = write_image_folder(tmp_path / f"scratch{rank}", train=8, val=4)
        options = ("--data-path", data, "--output", tmp_path / "output", "--opts", *TINY, "DATA.BATCH_SIZE", "2")
        machine = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": str(rank)}
        runs.append(Run("main.py", "--cfg", config, *options, **job, **machine))
    assert [run.wait() for run in runs] == [0, 0], runs[0].stderr


def test_machine_that_does_not_share_the_disk(tmp_path):
    # Two machines, each with another folder under the same relative name
    driver = tmp_path / "main_in_a_hurry.py"
    driver.write_text(
        "import runpy, runtime.run_folder\n"
        "runtime.run_folder.SHARED_WITHIN = 1.0\n"
        f"runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')\n"
    )
    config = ROOT / "configs/strip_mlp_pico_digits.yaml"
    runs = start_machines(tmp_path, driver, "--cfg", config, "--output", "output", "--opts", *TINY)
    assert [run.wait() for run in runs] == [1, 1]
    folder = tmp_path / "machine1/output/strip_mlp_pico_digits/default"
    for run in runs:
        assert f"error: {folder} on {socket.gethostname()} (rank 1) is not the folder of that name" in run.stderr
        assert "accepted for OUTPUT: a folder on a disk that all machines of the run share" in run.stderr
    assert not (tmp_path / "machine1/output").exists()
    left = [path.name for path in (tmp_path / "machine0").rglob("*") if path.is_file()]
    assert left == ["run.lock"]
