"""Training and evaluation of detectors through main_detect.py, in this process."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from engine import epoch
from tests.helpers import ROOT, TINY, load_tool, read_metrics, run_tool, torchrun

pytest.importorskip("pycocotools")

CONFIG = ROOT / "configs/strip_mlp_pico_digits.yaml"
RUN = "strip_mlp_pico_digits"
SMALL = (*TINY, "DATA.IMG_SIZE", 64, "DATA.BATCH_SIZE", 4, "DETECTION.HEAD.CHANNELS", 32, "TRAIN.EPOCHS", 2)
COLORS = {"red thing": (255, 0, 0), "green thing": (0, 255, 0)}


def write_coco_folder(root: Path, train: int, val: int, size: int = 64) -> Path:
    """Rectangles of two colours, one to three in an image, all but the first of each split. Every other image is wider
    than high."""
    for seed, (split, count) in enumerate((("train", train), ("val", val))):
        draw, images, annotations = np.random.default_rng(seed), [], []
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        for number in range(count):
            wide = size + size // 2 * (number % 2)
            pixels = draw.integers(0, 40, (size, wide, 3), dtype=np.uint8)
            for _ in range(draw.integers(1, 4) if number else 0):
                label, (width, height) = int(draw.integers(2)), draw.integers(12, 40, 2).tolist()
                left, top = (int(draw.integers(side)) for side in (wide - width, size - height))
                pixels[top : top + height, left : left + width] = [*COLORS.values()][label]
                box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                about = {"id": len(annotations) + 1, "image_id": 10 + number, "category_id": 3 * label + 1}
                annotations.append({**about, **box})
            Image.fromarray(pixels).save(root / split / f"{number}.png")
            images.append({"id": 10 + number, "file_name": f"{number}.png", "width": wide, "height": size})
        categories = [{"id": 3 * label + 1, "name": name} for label, name in enumerate(COLORS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """9 training and 5 validation images."""
    return write_coco_folder(tmp_path_factory.mktemp("coco"), train=9, val=5)


@pytest.fixture
def detect(monkeypatch, capsys, data, tmp_path):
    """main_detect.py: its end, and the run's folder."""
    tool = load_tool(ROOT / "main_detect.py")

    def run(*arguments, tag="a", opts=()):
        command = ("--cfg", CONFIG, "--data-path", data, "--output", tmp_path, "--tag", tag, "--device", "cpu")
        return run_tool(monkeypatch, capsys, tool, *command, *arguments, "--opts", *SMALL, *opts), tmp_path / RUN / tag

    return run


def content(folder: Path, name: str = "last.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same_end(folder: Path, expected: Path) -> None:
    """Weights, moving average, optimizer and metrics."""
    found, wanted = content(folder), content(expected)
    for key in ("model", "model_ema"):
        different = [name for name in wanted[key] if not torch.equal(found[key][name], wanted[key][name])]
        assert not different
    assert str(found["optimizer"]) == str(wanted["optimizer"])
    for a, b in zip(read_metrics(folder), read_metrics(expected), strict=True):
        measured = ("seconds", "per_second", "wait", "memory")
        names = [name for name in b if not any(word in name for word in measured)]
        assert {name: a[name] for name in names} == {name: b[name] for name in names}


def pictures(folder: Path) -> dict[str, int]:
    """How often TensorBoard has each picture."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "images":
                    found[value.tag] = found.get(value.tag, 0) + 1
    return found


SIZES = ("DETECTION.SIZES", "[64, 64, 64, 96]")
EXACT = ("TRAIN.EMA_DECAY", 0.9, "TRAIN.ACCUMULATION_STEPS", 2, "DATA.BATCH_SIZE", 2)


def test_a_run_and_its_evaluation(detect, tmp_path):
    """With a moving average and accumulation."""
    done, folder = detect(opts=EXACT)
    assert done.status == 0, done.err
    assert "training boxes per class: red thing" in done.out and "best AP" in done.out
    records = read_metrics(folder)
    assert len(records) == 2
    losses = [name for name in records[0] if name.startswith("train_") and name != "train_loss"]
    assert len(losses) >= 2
    for record in records:
        assert record["train_loss"] == pytest.approx(sum(record[name] for name in losses), rel=1e-5)
        assert {"AP", "AP50", "AP_raw", "AP/red thing", "AP/green thing", "val_images_per_second"} <= set(record)
        assert record["images"] == 5 and 0 <= record["AP"] <= 1  # of two epochs little can be said
    best = max(record["AP"] for record in records)
    assert content(folder)["best"]["AP"] == best and content(folder)["classes"] == list(COLORS)
    found = pictures(folder)
    assert found == {"training images as the model gets them": 1, "validation images: true boxes green, found red": 1}

    files = tmp_path / "result.json", tmp_path / "detections.json"
    evaluated = ("--eval", "--resume", folder / "last.pth", "--json", files[0], "--detections", files[1])
    for ema, name in ((), "AP"), (("--no-ema",), "AP_raw"):
        done, _ = detect(*evaluated, *ema, opts=EXACT)
        assert done.status == 0, done.err
        result = json.loads(files[0].read_text())
        assert result["AP"] == records[-1][name]
    assert sorted(result["per_class"]) == sorted(COLORS)
    assert f"AP {result['AP']:.3f} (AP50" in done.out and "red thing" in done.out
    detections = json.loads(files[1].read_text())
    assert {found["category_id"] for found in detections} <= {1, 4}
    assert {found["image_id"] for found in detections} <= set(range(10, 15))

    done, _ = detect(opts=EXACT)
    assert "nothing left to train: 2 of 2 epochs are done, best AP" in done.out


def test_an_interrupted_run_ends_as_an_undisturbed_one(detect, monkeypatch):
    """With images of two sizes, of which each step trains the weights of one."""
    opts = (*EXACT, *SIZES, "DETECTION.FLIP", 0.5, "DETECTION.MOSAIC", 0.5)
    detect(tag="whole", opts=opts)
    seeded = epoch.seed_all

    def seed_and_stop(*position, **options):
        if position == (0, 1, 1, 0):
            signal.raise_signal(signal.SIGTERM)
        seeded(*position, **options)

    monkeypatch.setattr(epoch, "seed_all", seed_and_stop)
    done, folder = detect(tag="parts", opts=opts)
    assert done.status == 75 and content(folder)["progress"]["step"] == 1
    monkeypatch.setattr(epoch, "seed_all", seeded)
    done, _ = detect(tag="parts", opts=opts)
    assert done.status == 0 and "1 epochs and 1 steps done" in done.out
    assert_same_end(folder, folder.with_name("whole"))


@pytest.mark.slow
def test_two_processes(data, tmp_path):
    """Each image is trained by one and evaluated by one; they end with the same weights."""
    command = ("main_detect.py", "--cfg", CONFIG, "--data-path", data, "--output", tmp_path, "--device", "cpu")
    opts = ("--opts", *SMALL, *SIZES, "DATA.BATCH_SIZE", 2)
    torchrun(2, *command, *opts)
    (first, second) = read_metrics(tmp_path / RUN / "default")
    assert first["processes"] == 2 and second["images"] == 5
    torchrun(2, *command, "--eval", "--json", tmp_path / "two.json", *opts)
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["AP"] == max(first["AP"], second["AP"])


@pytest.mark.slow
def test_a_detector_starts_from_a_classifier_and_from_a_detector(detect, monkeypatch, capsys, tmp_path):
    command = ("--cfg", CONFIG, "--output", tmp_path, "--tag", "classifier", "--device", "cpu", "--opts", *TINY)
    few = ("DATA.IMAGES_PER_CLASS", 7, "DATA.BATCH_SIZE", 64)
    assert run_tool(monkeypatch, capsys, load_tool(ROOT / "main.py"), *command, *few).status == 0
    classifier = tmp_path / RUN / "classifier/last.pth"
    done, folder = detect("--pretrained", classifier, opts=("TRAIN.BASE_LR", 1e-9, "TRAIN.EPOCHS", 1))
    assert done.status == 0 and f"the backbone starts from {classifier}" in done.out
    before, after = content(classifier.parent)["model"], content(folder)["model"]
    name = "patch_embed.0.weight" if "patch_embed.0.weight" in before else next(iter(before))
    (own,) = [key for key in after if key.endswith(f".{name}")]
    torch.testing.assert_close(after[own], before[name])

    done, _ = detect("--resume", classifier, tag="b")
    assert done.status == 1 and "is of a run for another task, whose best epoch is by top1" in done.err
    done, _ = detect("--pretrained", folder / "last.pth", tag="b", opts=("TRAIN.EPOCHS", 1))
    assert done.status == 0 and f"pretrained weights from {folder}/last.pth" in done.out


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("DATA.VAL_FRACTION", 0.1), "DATA.VAL_FRACTION is 0.1, which is for classification"),
        (("TRAIN.PATIENCE", 3, "TRAIN.PATIENCE_METRIC", "val_loss"), "val_loss, which detection does not have"),
        (("TRAIN.COMPILE", True, *SIZES), "for images of one size, but DETECTION.SIZES has 2; accepted: False"),
        (("DATA.BATCH_SIZE", 10), "DATA.BATCH_SIZE is 10, but the training data has 9 images"),
    ],
)
def test_what_cannot_be(detect, tmp_path, opts, message):
    done, _ = detect(opts=opts)
    assert done.status and message in done.err
    assert not list(tmp_path.iterdir())
