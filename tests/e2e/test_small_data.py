"""Early stopping and little data, through main.py in this process."""

import signal

import pytest
import torch

from engine import classification, epoch
from tests.helpers import ROOT, TINY, load_tool, read_metrics, run_tool, write_image_folder

CONFIG = ROOT / "configs/strip_mlp_pico_digits.yaml"
TOP1 = [10, 50, 40, 50, 45, 45, 60, 45]
LOSS = [2.0, 1.0, 1.5, 1.0, 0.9, 1.0, 1.1, 1.2]
FEW = ("DATA.IMAGES_PER_CLASS", 7, "DATA.BATCH_SIZE", 64, "TRAIN.EPOCHS", 8)


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """main.py, with made-up results of evaluation; a signal arrives in the evaluation after `interrupted` epochs."""
    tool = load_tool(ROOT / "main.py")

    def run(*opts, interrupted=None):
        def evaluate(config, model, loader, world, logger, control, epoch, turn=0):
            if epoch + 1 == interrupted:
                signal.raise_signal(signal.SIGTERM)
            metrics = {"top1": TOP1[epoch], "top5": 100, "val_loss": LOSS[epoch], "images": 360, "unreadable_val": 0}
            metrics |= {"val_seconds": 1.0, "val_images_per_second": 360.0}
            return metrics, torch.zeros(360, dtype=torch.uint8)

        monkeypatch.setattr(classification, "evaluate", evaluate)
        command = ("--cfg", CONFIG, "--output", tmp_path, "--device", "cpu", "--opts", *TINY, *FEW, *opts)
        return run_tool(monkeypatch, capsys, tool, *command), tmp_path / "strip_mlp_pico_digits/default"

    return run


@pytest.mark.parametrize(
    ("opts", "last"),
    [
        (("TRAIN.PATIENCE", 3), 5),  # the best is epoch 2: in 4 the loss is not lower
        (("TRAIN.PATIENCE", 3, "TRAIN.PATIENCE_METRIC", "val_loss"), 8),
        (("TRAIN.PATIENCE", 2, "TRAIN.PATIENCE_METRIC", "val_loss"), 4),
        (("TRAIN.PATIENCE", 3, "TEST.INTERVAL", 2), 6),  # the first evaluated epoch from 5 on
        (("TRAIN.PATIENCE", 8), 8),
    ],
)
def test_patience(train, opts, last):
    done, folder = train(*opts)
    assert done.status == 0
    records = read_metrics(folder)
    assert [record["epoch"] for record in records] == list(range(1, last + 1))
    assert (folder / f"ckpt_epoch_{last}.pth").exists()
    assert ["stopped_early" in record for record in records] == [False] * (last - 1) + [last < 8]
    assert ("the run stops after epoch" in done.out) == (last < 8)
    again, _ = train(*opts)
    assert again.status == 0 and "nothing left to train" in again.out
    assert len(read_metrics(folder)) == last
    compare = load_tool(ROOT / "tools/compare_runs.py")
    assert compare.read_run(folder).finished


def test_patience_over_an_interruption(train):
    opts = ("TRAIN.PATIENCE", 2, "TRAIN.PATIENCE_METRIC", "val_loss")
    done, folder = train(*opts, interrupted=3)
    assert done.status == 75 and len(read_metrics(folder)) == 3
    done, _ = train(*opts)
    assert done.status == 0 and [record["epoch"] for record in read_metrics(folder)] == [1, 2, 3, 4]
    # More patience goes on.
    train(*opts, "TRAIN.PATIENCE", 3)
    assert len(read_metrics(folder)) == 8


def test_balanced_sampler_goes_on_inside_an_epoch(monkeypatch, capsys, tmp_path):
    """To the same weights, also with class weights of one's own."""
    tool, seeded = load_tool(ROOT / "main.py"), epoch.seed_all
    opts = ("DATA.SAMPLER", "balanced", "TRAIN.CLASS_WEIGHTS", "1,2", "TRAIN.EPOCHS", 2)
    data = write_image_folder(tmp_path / "data", train=24, val=4)
    for path in sorted((data / "train/class1").iterdir())[:9]:
        path.unlink()
    config = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"

    def weights(tag, status=0):
        command = ("--cfg", config, "--data-path", data, "--batch-size", 2, "--output", tmp_path, "--tag", tag)
        done = run_tool(monkeypatch, capsys, tool, *command, "--device", "cpu", "--opts", *TINY, *opts)
        assert done.status == status
        (path,) = tmp_path.glob(f"*/{tag}/last.pth")
        return torch.load(path, weights_only=True)

    expected = weights("whole")["model"]

    def seed_and_stop(*position, **options):
        if position == (0, 1, 3, 0):
            signal.raise_signal(signal.SIGTERM)
        seeded(*position, **options)

    monkeypatch.setattr(epoch, "seed_all", seed_and_stop)
    assert weights("parts", status=75)["progress"]["step"] == 4
    monkeypatch.setattr(epoch, "seed_all", seeded)
    found = weights("parts")["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Little data


@pytest.mark.parametrize(
    ("train_images", "batch", "opts", "message"),
    [
        (2, 2, (), ""),  # one image of each of two classes
        (2, 4, (), "DATA.BATCH_SIZE is 4, but the training data has 2 images"),
        (2, 2, ("DATA.SAMPLER", "balanced"), ""),
        (3, 2, ("TRAIN.CLASS_WEIGHTS", "balanced"), ""),
        (3, 2, ("TRAIN.CLASS_WEIGHTS", "1,2,3"), "has 3 numbers, but the data has 2 classes"),
    ],
)
def test_a_few_images(monkeypatch, capsys, tmp_path, train_images, batch, opts, message):
    """The last batch of evaluation is a single image."""
    data = write_image_folder(tmp_path / "data", train=train_images, val=3)
    config = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
    command = ("--cfg", config, "--data-path", data, "--batch-size", batch, "--output", tmp_path / "out")
    done = run_tool(
        monkeypatch, capsys, load_tool(ROOT / "main.py"), *command, "--device", "cpu", "--opts", *TINY, *opts
    )
    assert done.status == (1 if message else 0) and message in done.err
    assert (tmp_path / "out").exists() == (not message)
    if not message:
        assert f"training images per class: class0 {train_images - 1}, class1 1" in done.out
