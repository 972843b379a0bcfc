"""Tests of tools/robustness.py: the corruptions, the calibration, and the command as a user runs it."""

import csv
import hashlib
import json

import numpy as np
import pytest
import robustness
import torch
from PIL import Image
from robust.corruptions import CORRUPTIONS, SEVERITIES, SMALL, CorruptedDataset, corrupt
from robust.evaluation import BINS, choose_conditions, dataset_for, score
from sklearn.datasets import load_sample_image
from torchmetrics.functional.classification import multiclass_calibration_error

from config import image_size, leaves, load_config
from data import build_loader, build_sources
from data.transforms import build_transform
from engine.evaluate import evaluate_run
from models import build_model
from runtime.distributed import World
from tests.helpers import ROOT, TINY, python, run_tool, trained_model, write_image_folder

pytestmark = pytest.mark.slow

DIGITS = str(ROOT / "configs/strip_mlp_pico_digits.yaml")
WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
OUTPUTS = ["robustness.md", "robustness.csv", "robustness_corruptions.csv", "robustness.json"]
OUTPUTS += ["robustness.png", "calibration.png", "confusion.png"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of an epoch on the digits, with a best.pth."""
    output = tmp_path_factory.mktemp("output")
    python("main.py", "--cfg", DIGITS, "--output", output, "--opts", *TINY, "TRAIN.WARMUP_EPOCHS", "0")
    return output / "strip_mlp_pico_digits/default"


def write_checkpoint(path, *opts, classes="0123456789"):
    """An untrained model of a timm network."""
    timm = ("MODEL.TYPE", "timm", "MODEL.NAME", "resnet10t", "MODEL.NUM_CLASSES", str(len(classes)))
    config, _ = load_config(DIGITS, [*timm, *opts])
    torch.manual_seed(0)
    torch.save({"model": build_model(config).state_dict(), "config": leaves(config), "classes": list(classes)}, path)
    return path


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("peer") / "best.pth")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command: (exit status, stdout, stderr)."""

    def run(*arguments):
        said = run_tool(monkeypatch, capsys, robustness, *arguments, "--output", tmp_path / "out")
        return said.status, said.out, said.err

    return run


def photograph(size):
    return Image.fromarray(load_sample_image("china.jpg")).crop((100, 0, 500, 400)).resize((size, size))


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


# Corruptions


@pytest.mark.parametrize("size", [28, 96])  # severities of small and of large images
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption(name, size):
    clean = photograph(size)
    corrupted = [corrupt(clean, name, severity, seed=0, index=5) for severity in SEVERITIES]
    assert {(image.mode, image.size) for image in corrupted} == {("RGB", (size, size))}
    assert distance(corrupted[0], clean) > 0.2
    assert distance(corrupted[4], clean) > 1.2 * distance(corrupted[0], clean)
    assert corrupt(clean, name, 3, seed=0, index=5).tobytes() == corrupted[2].tobytes()


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "elastic_transform"])
def test_randomness_depends_on_seed_and_index(name):
    clean = photograph(28)
    drawn = {corrupt(clean, name, 3, seed, index).tobytes() for seed, index in ((0, 0), (0, 1), (1, 0))}
    assert len(drawn) == 3


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(2, 2), (8, 8), (30, 100)])
def test_any_size_and_grey_stays_grey(name, shape, recwarn):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB")
    corrupted = corrupt(image, name, 5, seed=0, index=0)
    assert corrupted.size == image.size
    red, green, blue = corrupted.split()
    assert red.tobytes() == green.tobytes() == blue.tobytes()
    assert not recwarn.list


def test_parameters_of_noise_and_blur():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = [np.asarray(corrupt(grey, "gaussian_noise", s, 0, 0))[..., 0].std() / 255 for s in SEVERITIES]
    assert noise == pytest.approx(CORRUPTIONS["gaussian_noise"].small, rel=0.05)
    large = grey.resize((SMALL + 1, SMALL + 1))
    noise = [np.asarray(corrupt(large, "shot_noise", s, 0, 0))[..., 0].std() / 255 for s in SEVERITIES[:3]]
    assert noise == pytest.approx([(0.5 / photons) ** 0.5 for photons in (60, 25, 12)], rel=0.1)
    point = np.zeros((65, 65, 3), dtype=np.uint8)
    point[32, 32] = 255
    disk = np.asarray(corrupt(Image.fromarray(point), "defocus_blur", 1, 0, 0))[..., 0]
    rows, columns = np.nonzero(disk)
    assert len(rows) == 29  # pixels within 3 of the centre
    assert ((rows - 32) ** 2 + (columns - 32) ** 2).max() == 9


def test_where_images_are_corrupted():
    """Small ones before they are enlarged, others after they are resized and cropped."""
    config, _ = load_config(DIGITS)
    small, large = photograph(16), photograph(100)
    for image, before in ((small, True), (large, False)):
        transform = build_transform(config, is_train=False)
        data = CorruptedDataset(None, transform, image_size(config), 0, corruption="gaussian_noise", severity=5)
        seen = data.view(image, 7)
        assert seen.shape == (3, 32, 32)
        if before:
            expected = transform(corrupt(image, "gaussian_noise", 5, 0, 7))
        else:
            resized = Image.fromarray(transform(image).permute(1, 2, 0).numpy())
            expected = torch.tensor(np.asarray(corrupt(resized, "gaussian_noise", 5, 0, 7))).permute(2, 0, 1)
        assert torch.equal(seen, expected)


def test_images_do_not_depend_on_batches_and_processes(peer):
    images = {}
    for batch_size, workers in ((3, 0), (8, 2)):
        model = trained_model(peer, "--opts", "DATA.BATCH_SIZE", batch_size, "DATA.NUM_WORKERS", workers)
        data = dataset_for(model, model.validation_source(), ("impulse_noise", 5), seed=1)
        order = range(20) if workers else reversed(range(20))
        for batch in build_loader(model.config, data, [(0, i) for i in order], WORLD):
            for index, image in zip(batch.index.tolist(), batch.image, strict=True):
                assert torch.equal(images.setdefault(index, image), image)
    assert len(images) == 20


# Calibration


def test_calibration_of_constructed_probabilities():
    """Of 10 images with confidence 0.8, 6 are right; of 30 with 0.5, 15 are."""
    probabilities = torch.tensor([[0.8, 0.1, 0.1]] * 10 + [[0.25, 0.5, 0.25]] * 30)
    targets = torch.tensor([0] * 6 + [1] * 4 + [1] * 15 + [2] * 15)
    found = score(probabilities.log() + 3, targets)
    assert found.accuracy == pytest.approx(100 * 21 / 40)
    assert found.ece == pytest.approx(100 * (10 * 0.2 + 30 * 0) / 40, rel=1e-4)
    assert found.confidence == pytest.approx(100 * (8 + 15) / 40)
    losses = 6 * np.log(0.8) + 4 * np.log(0.1) + 15 * np.log(0.5) + 15 * np.log(0.25)
    assert found.nll == pytest.approx(-losses / 40, rel=1e-5)
    assert {i: found.bins[:, i].round(4).tolist() for i in range(BINS) if found.bins[0, i]} == {
        7: [30, 15, 15],
        12: [10, 8, 6],
    }


def test_error_is_that_of_the_diagram():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator)
    targets = torch.where(torch.rand(500, generator=generator) < 0.5, logits.argmax(dim=1), 0)
    found = score(logits, targets)
    count, confidence, right = found.bins
    assert found.ece == pytest.approx(100 * np.abs(confidence - right).sum() / count.sum(), rel=1e-4)
    expected = multiclass_calibration_error(logits.softmax(dim=1), targets, 10, n_bins=BINS, norm="l1")
    assert found.ece == pytest.approx(100 * expected.item(), rel=1e-5)


def test_confidence_of_exactly_1_is_in_the_last_bin():
    """Of 10 such images 9 are right, of 10 with 0.95 all: together 95 % are, with a mean confidence of 0.975."""
    logits = torch.tensor([[100.0, 0.0]] * 10 + [[0.95, 0.05]] * 10)
    logits[10:] = logits[10:].log()
    targets = torch.tensor([0] * 9 + [1] + [0] * 10)
    assert score(logits, targets).ece == pytest.approx(2.5, rel=1e-4)


# The command


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_two_checkpoints_as_a_user(run_folder, peer, tmp_path):
    output = tmp_path / "a/b"
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("mine")
    (output / "robustness.md").write_text("old")
    checkpoint = run_folder / "best.pth"
    options = ("--output", output, "--corruptions", "contrast", "impulse_noise", "--severities", 5, 1)
    result = python("tools/robustness.py", checkpoint, peer, *options)
    assert [line for line in result.stdout.split() if line.startswith(str(output))] == [
        str(output / name) for name in OUTPUTS
    ]
    assert sorted(path.name for path in output.iterdir()) == sorted([*OUTPUTS, "mine.txt"])
    for name in OUTPUTS[-3:]:
        with Image.open(output / name) as image:
            assert min(image.size) > 400
            assert np.asarray(image.convert("L")).std() > 5, "blank"

    found = json.loads((output / "robustness.json").read_text())
    names = ["strip_mlp_pico_digits", "resnet10t"]
    assert list(found["results"]) == list(found["checkpoints"]) == names
    assert found["checkpoints"][names[0]]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (found["images"], found["unreadable_images"], found["severities"]) == (360, 0, [1, 5])
    config, _ = load_config(DIGITS, TINY)
    evaluated = evaluate_run(config, [], WORLD, str(checkpoint))
    mine = found["results"][names[0]]
    assert mine["clean"]["accuracy"] == pytest.approx(evaluated["top1"])
    assert mine["clean"]["nll"] == pytest.approx(evaluated["val_loss"], rel=1e-5)
    confusion = np.array(mine["confusion"])
    targets = build_sources(config, WORLD, train=False).val.targets
    assert confusion.sum(axis=1).tolist() == np.bincount(targets).tolist()
    assert 100 * np.trace(confusion) / 360 == pytest.approx(evaluated["top1"])
    assert mine["class_accuracies"][3] == pytest.approx(100 * confusion[3, 3] / confusion[3].sum())
    accuracies = [mine["corruptions"][c][s]["accuracy"] for c in ("contrast", "impulse_noise") for s in ("1", "5")]
    assert mine["mean_accuracy_under_corruption"] == pytest.approx(np.mean(accuracies))
    clean = mine["clean"]["accuracy"]
    assert mine["relative_drop"] == pytest.approx(100 * (clean - np.mean(accuracies)) / clean)

    rows = read_csv(output / "robustness.csv")
    assert [row["checkpoint"] for row in rows] == names
    assert float(rows[0]["corrupted_accuracy"]) == pytest.approx(np.mean(accuracies))
    rows = read_csv(output / "robustness_corruptions.csv")
    assert len(rows) == 2 * (1 + 4)
    assert [float(row["accuracy"]) for row in rows[1:5]] == pytest.approx(accuracies)
    assert (output / "robustness.md").read_text().startswith("# Robustness and calibration")


def test_results_do_not_depend_on_batches_and_company(command, run_folder, peer, tmp_path):
    """Nor does the limit on the images change how one is corrupted."""
    options = ("--corruptions", "gaussian_noise", "--images", 50)
    found = []
    for arguments in ((run_folder / "best.pth", "--batch-size", 7), (peer, run_folder / "best.pth")):
        assert command(*arguments, *options)[0] == 0
        results = json.loads((tmp_path / "out/robustness.json").read_text())
        assert results["images"] == 50
        found.append(results["results"]["strip_mlp_pico_digits"]["corruptions"]["gaussian_noise"])
    for severity in found[0]:
        a, b = (each[severity]["nll"] for each in found)
        assert a == pytest.approx(b, rel=1e-5)


def test_photographs_of_two_input_sizes(command, tmp_path):
    """In folders, one of them not readable; the names of the runs distinguish them."""
    data = write_image_folder(tmp_path / "data", train=2, val=7)
    (data / "val/class0/broken.jpg").write_text("no image")
    folder = ("DATA.DATASET", "imagenet")
    for size in (32, 64):
        (tmp_path / str(size)).mkdir()
        write_checkpoint(
            tmp_path / str(size) / "best.pth", *folder, "DATA.IMG_SIZE", str(size), classes=("class0", "class1")
        )
    paths = [tmp_path / "32/best.pth", tmp_path / "64/best.pth"]
    status, _, err = command(*paths, "--data-path", data, "--corruptions", "pixelate", "--severities", 3)
    assert status == 0, err
    found = json.loads((tmp_path / "out/robustness.json").read_text())
    assert [each["image_size"] for each in found["checkpoints"].values()] == [[32, 32], [64, 64]]
    assert list(found["results"]) == ["resnet10t/32", "resnet10t/64"]
    assert (found["images"], found["unreadable_images"]) == (7, 1)


def test_the_clean_images_come_first():
    assert choose_conditions(["contrast", "contrast"], [5, 1, 5]) == [("clean", 0), ("contrast", 1), ("contrast", 5)]
    assert len(choose_conditions(None, SEVERITIES)) == 1 + 5 * len(CORRUPTIONS)


def test_different_data_is_refused(command, peer, tmp_path):
    others = {
        "data sets digits and CIFAR10": write_checkpoint(tmp_path / "a.pth", "DATA.DATASET", "CIFAR10"),
        "classes of other names": write_checkpoint(tmp_path / "b.pth", classes="abcdefghij"),
    }
    for reason, other in others.items():
        status, out, err = command(peer, other)
        assert (status, out) == (1, "")
        assert f"error: {peer} and {other} are of different data: {reason}" in err
    for name in ("one", "two"):
        write_image_folder(tmp_path / name, train=2, val=2)
        opts = ("DATA.DATASET", "imagenet", "DATA.DATA_PATH", str(tmp_path / name))
        write_checkpoint(tmp_path / f"{name}.pth", *opts, classes=("class0", "class1"))
    pair = (tmp_path / "one.pth", tmp_path / "two.pth")
    status, out, err = command(*pair)
    assert (status, out) == (1, "")
    assert f"images in {tmp_path / 'one'} and {tmp_path / 'two'}; accepted: checkpoints of the same" in err
    assert not (tmp_path / "out").exists()
    assert command(*pair, "--data-path", tmp_path / "one", "--corruptions", "contrast", "--severities", 1)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--corruptions", "fog"], 1, "--corruptions fog: no such corruption; accepted: gaussian_noise, shot_noise"),
        (["--severities", "6"], 2, "--severities"),
        (["--images", "0"], 2, "accepted: a whole number of 1 or more"),
        (["--opts", "DATA.DATASET", "imagenet"], 1, "DATA.DATA_PATH is empty"),
        (["--device", "cuda"], 1, "--device is cuda, but PyTorch finds no CUDA device"),
    ],
)
def test_bad_input(command, peer, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, err = command(peer, *arguments)
    assert (found, out) == (status, ""), err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(command, peer, tmp_path):
    (tmp_path / "out").write_text("a file")
    status, _, err = command(peer)
    assert status == 1
    assert "out: cannot be written" in err
