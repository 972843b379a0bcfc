"""Bad input at the entry points: one clear message, a non-zero exit, no traceback, nothing lost."""

import json
import os
import shutil

import pytest
import torch

from tests.helpers import TINY, python, torchrun, write_image_folder

pytestmark = pytest.mark.slow

CONFIG = "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
RUN = "smlp_tiny_alpha3_patch4_224_imagenet1k/default"


def fails(*command, status: int = 1, **env) -> str:
    """The one message of a command that must fail."""
    result = python(*command, ok=False, **env)
    assert result.returncode == status
    assert "Traceback" not in result.stdout + result.stderr
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, result.stderr
    return messages[0]


def train_command(data, output, *flags, opts=()) -> tuple:
    command = ("main.py", "--cfg", CONFIG, "--data-path", data, "--batch-size", 4, "--output", output)
    return (*command, *flags, "--opts", *TINY, *opts)


@pytest.fixture(scope="module")
def checkpoint(image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    python(*train_command(image_folder, output))
    return output / RUN / "last.pth"


@pytest.mark.parametrize("script", ["main.py", "main_eval.py"])
def test_missing_data_path(script, tmp_path):
    message = fails(script, "--cfg", CONFIG, "--data-path", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message
    assert not (tmp_path / "out").exists()


def test_batches_of_one_image_that_batch_norm_cannot_take(tmp_path):
    config = "configs/strip_mlp_pico_digits.yaml"
    command = ("main.py", "--cfg", config, "--output", tmp_path, "--batch-size", 1, "--accumulation-steps", 8)
    message = fails(*command, "--opts", *TINY)
    assert "DATA.BATCH_SIZE is 1 and the model's last map has a single token" in message
    assert "accepted: 2 or more" in message


def test_hidden_copies_of_images_are_left_out_and_said(tmp_path):
    data = write_image_folder(tmp_path / "data", train=8, val=4)
    for folder in ("train/.ipynb_checkpoints", "train/class0/.ipynb_checkpoints", "val/__MACOSX"):
        (data / folder).mkdir()
        shutil.copy(data / "train/class0/train_000.jpg", data / folder / "copy.jpg")
    result = python(*train_command(data, tmp_path / "out"))
    assert (
        f"warning: {data}/train: 2 hidden files and folders are left out, such as {data}/train/.ipynb" in result.stdout
    )
    assert f"warning: {data}/val: 1 hidden files and folders are left out, such as {data}/val/__MACOSX" in result.stdout
    assert "8 training and 4 validation images, 2 classes" in result.stdout


def test_corrupt_images_are_named_counted_and_never_correct(tmp_path):
    data = write_image_folder(tmp_path / "data", train=16, val=8)
    broken_train = data / "train/class0/train_000.jpg"
    broken_train.write_bytes(broken_train.read_bytes()[:300])  # truncated
    # All of one class, so that a model that always says "class0" would be right about each.
    for path in (data / "val/class0").iterdir():
        path.write_bytes(b"not a jpeg")
    result = python(*train_command(data, tmp_path / "out", opts=("DATA.MAX_UNREADABLE", 0.5)))
    assert str(broken_train) in result.stdout
    assert "1 unreadable images in this epoch's training" in result.stdout
    assert "of which 4 unreadable and counted as wrong" in result.stdout
    assert str(data / "val/class0/val_000.jpg") in result.stdout
    record = json.loads((tmp_path / "out" / RUN / "metrics.jsonl").read_text())
    assert (record["unreadable_train"], record["unreadable_val"], record["images"]) == (1, 4, 8)
    assert record["top1"] <= 50
    assert record["top5"] <= 50  # two classes: every readable image is among the five best

    # By default a run does not go on with so many.
    message = fails(*train_command(data, tmp_path / "strict"))
    assert "1 of 16 images cannot be read" in message
    evaluation = ("main_eval.py", *train_command(data, tmp_path / "out")[1:])
    assert "4 of 8 images cannot be read" in fails(*evaluation)


def test_a_data_set_that_is_all_corrupt(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    for path in (tmp_path / "data/train").rglob("*.jpg"):
        path.write_bytes(b"")
    for workers in (0, 1):
        message = fails(*train_command(tmp_path / "data", tmp_path, opts=("DATA.NUM_WORKERS", workers)))
        assert "cannot be read as images" in message


def test_class_count_of_the_config_disagrees_with_the_data(image_folder, tmp_path):
    message = fails(*train_command(image_folder, tmp_path, opts=("MODEL.NUM_CLASSES", 1000)))
    for part in ("MODEL.NUM_CLASSES is 1000", "2 classes", "set MODEL.NUM_CLASSES to 2"):
        assert part in message


def test_class_count_of_the_checkpoint_disagrees_with_the_data(checkpoint, tmp_path):
    data = write_image_folder(tmp_path / "data", train=9, val=9, classes=3)
    command = ("main_eval.py", "--cfg", CONFIG, "--data-path", data, "--resume", checkpoint, "--opts", *TINY)
    message = fails(*command)
    assert "made for 2 classes" in message
    assert "the model has 3" in message


@pytest.mark.parametrize("script", ["main.py", "main_eval.py"])
def test_checkpoint_of_another_model(script, image_folder, checkpoint, tmp_path):
    command = (script, "--cfg", CONFIG, "--data-path", image_folder, "--batch-size", 4, "--output", tmp_path)
    message = fails(*command, "--resume", checkpoint, "--opts", *TINY, "MODEL.STRIP_MLP.EMBED_DIM", 16)
    assert "does not fit the model" in message
    assert "patch_embed.weight (8, 3, 4, 4), not (16, 3, 4, 4)" in message


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("script", ["main.py", "main_eval.py"])
def test_malicious_checkpoint_is_refused(script, image_folder, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"model": {}, "config": Malice(marker)}, tmp_path / "evil.pth")
    command = (script, "--cfg", CONFIG, "--data-path", image_folder, "--batch-size", 4, "--output", tmp_path)
    message = fails(*command, "--pretrained", tmp_path / "evil.pth", "--opts", *TINY)
    assert "refused" in message
    assert "system" in message
    assert not marker.exists()


def test_damaged_and_missing_checkpoints(image_folder, checkpoint, tmp_path):
    (tmp_path / "half.pth").write_bytes(checkpoint.read_bytes()[:5000])
    command = ("main_eval.py", "--cfg", CONFIG, "--data-path", image_folder, "--output", tmp_path)
    assert "damaged" in fails(*command, "--resume", tmp_path / "half.pth", "--opts", *TINY)
    assert "no such checkpoint" in fails(*command, "--resume", tmp_path / "none.pth", "--opts", *TINY)
    assert "no best.pth or last.pth" in fails(*command, "--opts", *TINY)


def test_unwritable_output(image_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = fails(*train_command(image_folder, tmp_path / "file"))
    assert str(tmp_path / "file") in message
    assert "cannot be written" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_batch_larger_than_the_data_set(image_folder, tmp_path):
    message = fails("main.py", "--cfg", CONFIG, "--data-path", image_folder, "--batch-size", 18, "--output", tmp_path)
    for part in ("DATA.BATCH_SIZE is 18", "16 images", "at most 16"):
        assert part in message


def test_more_processes_than_gpus(image_folder, tmp_path):
    result = torchrun(2, *train_command(image_folder, tmp_path, "--device", "cuda"), ok=False)
    assert "error: 2 processes on this machine (--nproc_per_node), which has 0 CUDA devices" in result.stderr
    assert 'main.py", line' not in result.stderr
    one = fails(*train_command(image_folder, tmp_path, "--device", "cuda"))
    assert "--device cpu" in one


def test_bad_config_on_every_launcher(image_folder, tmp_path):
    (tmp_path / "bad.yaml").write_text("TRAIN:\n  EPOCH: 3\n")
    message = fails("main.py", "--cfg", tmp_path / "bad.yaml", "--data-path", image_folder, status=2)
    assert message == f"error: {tmp_path}/bad.yaml: unknown key TRAIN.EPOCH; did you mean TRAIN.EPOCHS?"
    result = torchrun(2, "main.py", "--cfg", tmp_path / "bad.yaml", "--data-path", image_folder, ok=False)
    assert "did you mean TRAIN.EPOCHS?" in result.stderr
    assert 'main.py", line' not in result.stderr


def test_unknown_timm_model(image_folder, tmp_path):
    opts = ("MODEL.TYPE", "timm", "MODEL.NAME", "resnet55")
    message = fails(*train_command(image_folder, tmp_path, opts=opts))
    assert "resnet50" in message


def test_training_that_diverges_stops_and_keeps_the_checkpoint(image_folder, checkpoint, tmp_path):
    run = tmp_path / RUN
    run.mkdir(parents=True)
    shutil.copy(checkpoint, run / "last.pth")
    opts = ("TRAIN.EPOCHS", 3, "TRAIN.BASE_LR", 1e30, "TRAIN.CLIP_GRAD", 0, "TRAIN.MAX_SKIPPED_STEPS", 1)
    message = fails(*train_command(image_folder, tmp_path, opts=opts))
    for part in ("loss nan", "lr ", "float32", "2 in a row", "TRAIN.MAX_SKIPPED_STEPS 1", "Samples of"):
        assert part in message
    assert (run / "last.pth").read_bytes() == checkpoint.read_bytes()
