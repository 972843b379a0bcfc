"""The detection demo: canvases whose boxes are true, average precision against hand counts, both detectors as a user
runs them."""

import json

import detection_demo
import numpy as np
import pytest
import timm
import torch
from detection_demo import (
    DETECTORS,
    DetectionBackbone,
    DigitCanvases,
    average_precision,
    build_detector,
    detect,
    load_backbone,
)
from PIL import Image

from data import digit_sources
from runtime.checkpoint import CheckpointError
from tests.helpers import python
from utils import UserError, run_entry_point

pytestmark = pytest.mark.slow

pytest.importorskip("pycocotools")

TOOL = "tools/detection_demo.py"
CLASSES = [str(digit) for digit in range(10)]
SMALL = ("--size", "64", "--digit-size", "16", "32", "--images", "8", "--val-images", "5", "--batch-size", "4")
SMALL += ("--epochs", "1", "--threads", "1")


def canvases(count=20, size=(64, 96), seed=(0, 1), source=None, **kwargs):
    return DigitCanvases(source or digit_sources()[True], count, size, (16, 32), seed, **kwargs)


def bounds(mask):
    """Left, top, right and bottom of what is true in (H, W), the last two exclusive."""
    y, x = np.nonzero(mask.numpy())
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def truth_of(*boxes, label=1):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.full((len(boxes),), label)}


def test_boxes_bound_the_digits():
    """On black, each pixel of ink is in one box, and each side of a box touches ink."""
    counts = set()
    for image, target in canvases(40, clutter=False):
        ink, seen = image.amax(dim=0) > 0, torch.zeros(64, 96, dtype=torch.int64)
        for left, top, right, bottom in target["boxes"].int().tolist():
            part = ink[top:bottom, left:right]
            assert bounds(part) == [0, 0, right - left, bottom - top]
            seen[top:bottom, left:right] += 1
        assert seen.max() == 1
        assert (seen[ink] == 1).all()
        counts.add(len(target["boxes"]))
    assert counts == {1, 2, 3, 4}


def test_training_sees_no_validation_digit(monkeypatch, tmp_path):
    used = {}

    def stop(detector, canvases, *_):
        used["train"] = canvases
        raise UserError("stopped")

    def detect_nothing(detector, canvases, *_):
        used["val"] = canvases
        return [truth_of((0, 0, 1, 1))] * len(canvases)

    monkeypatch.setattr(detection_demo, "train", stop)
    monkeypatch.setattr(detection_demo, "detect", detect_nothing)
    with pytest.raises(UserError, match="stopped"):
        detection_demo.main([*SMALL, "--output", str(tmp_path)])
    pixels = {split: {digit.tobytes() for digit in canvases.digits} for split, canvases in used.items()}
    assert len(used["train"].digits) == 1437
    assert len(used["val"].digits) == 360
    assert not pixels["train"] & pixels["val"]
    assert not torch.equal(used["train"][0][0], used["val"][0][0])


def test_average_precision_of_the_truth_is_1_and_of_boxes_beside_it_0():
    truth = [target for _, target in canvases()]
    exact = [{**target, "scores": torch.ones(len(target["labels"]))} for target in truth]
    result = average_precision(truth, exact, CLASSES)
    assert [result[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([1, 1, 1])
    occurring = {str(label - 1) for target in truth for label in target["labels"].tolist()}
    assert result["AP by class"] == pytest.approx(dict.fromkeys(sorted(occurring), 1))

    beside = [{**target, "boxes": target["boxes"] + 40} for target in exact]
    assert average_precision(truth, beside, CLASSES)["AP50"] == 0
    wrong = [{**target, "labels": target["labels"] % 10 + 1} for target in exact]
    assert average_precision(truth, wrong, CLASSES)["AP50"] < 0.1
    nothing = [{"boxes": torch.empty(0, 4), "labels": torch.empty(0), "scores": torch.empty(0)}] * len(truth)
    assert average_precision(truth, nothing, CLASSES)["AP"] == 0


def test_backbone():
    body = timm.create_model("strip_mlp_pico", features_only=True, img_size=(64, 96))
    backbone = DetectionBackbone(body, out_channels=16).eval()
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert backbone.strides == [4, 8, 16, 32]
    assert list(maps) == ["0", "1", "2", "3"]
    for map_, stride in zip(maps.values(), backbone.strides, strict=True):
        assert map_.shape == (2, 16, 64 // stride, 96 // stride)
    with pytest.raises(ValueError, match=r"input of \(96, 64\) pixels"):
        backbone(torch.rand(2, 3, 96, 64))


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_resize_images_to_the_backbones_size(name):
    detector = build_detector(name, "strip_mlp_pico", (64, 96), num_classes=11).eval()
    seen = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        found = detector([torch.rand(3, 64, 96), torch.rand(3, 130, 150)])
    assert seen == [(2, 3, 64, 96)]
    for output, (height, width) in zip(found, ((64, 96), (130, 150)), strict=True):
        assert 0 < len(output["boxes"]) <= 100
        assert (output["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert output["boxes"][:, 2].max() > 0.8 * width
        assert set(output["labels"].tolist()) <= set(range(11))


def test_backbone_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    classifier = timm.create_model("strip_mlp_pico", img_size=(64, 96), num_classes=7).eval()
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pth")
    images = torch.rand(2, 3, 64, 96)
    for name, (_, stages) in DETECTORS.items():
        detector = build_detector(name, "strip_mlp_pico", (64, 96), num_classes=11).eval()
        expected = classifier.forward_intermediates(images, indices=list(stages), intermediates_only=True)
        assert not torch.allclose(detector.backbone.body(images)[0], expected[0])
        load_backbone(detector, "strip_mlp_pico", (64, 96), tmp_path / "c.pth")
        for map_, expected_map in zip(detector.backbone.body(images), expected, strict=True):
            torch.testing.assert_close(map_, expected_map)
    weights = classifier.state_dict()
    del weights["stages.1.0.token_mixing.norm.weight"]
    torch.save({"model": weights}, tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match=r"d.pth: .* missing: stages.1.0.token_mixing.norm.weight"):
        load_backbone(detector, "strip_mlp_pico", (64, 96), tmp_path / "d.pth")


def test_command(tmp_path):
    folder = tmp_path / "out"
    result = python(TOOL, *SMALL, "--output", folder)
    results = json.loads((folder / "results.json").read_text())
    before, after = (results["average_precision"][f"the detector {when} training"] for when in ("before", "after"))
    assert f"| the detector after training         | {after['AP']:.3f} |" in result.stdout
    assert "training: 100%" in result.stderr
    assert "loss=" in result.stderr
    assert results["settings"]["size"] == [64, 64]
    assert len(results["mean_loss_of_epochs"]) == 1
    assert before != after
    with Image.open(folder / "detections.png") as image:
        assert image.width > 800
    assert (folder / "detections.png").stat().st_size < 300_000

    # The weights are those that were evaluated.
    saved = torch.load(folder / "detector.pth", weights_only=True)
    assert saved["classes"] == CLASSES
    detector = build_detector(saved["settings"]["detector"], saved["settings"]["model"], (64, 64), num_classes=11)
    detector.load_state_dict(saved["model"])
    val = canvases(5, (64, 64), (0, 0), digit_sources()[False])
    found = detect(detector, val, 4, torch.device("cpu"), "")
    assert average_precision([target for _, target in val], found, CLASSES) == after

    # Nothing is replaced, and the same options give the same.
    with pytest.raises(UserError, match=r"out: has results.json of an earlier run"):
        detection_demo.main([*SMALL, "--output", str(folder)])
    detection_demo.main([*SMALL, "--output", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/results.json").read_text())
    assert again["mean_loss_of_epochs"] == results["mean_loss_of_epochs"]
    assert again["average_precision"] == results["average_precision"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--size", "40"], 1, "strip_mlp_pico cannot be built for --size 40 40: img_size=40 must be a multiple of"),
        (["--model", "no_model"], 1, "--model no_model cannot be built"),
        (["--model", "resnet18"], 1, "--model resnet18 cannot be built"),
        (["--checkpoint", "missing.pth"], 1, "missing.pth"),
        (["--size", "64", "64", "64"], 2, "--size: 3 numbers; accepted: one, or height and width"),
        (["--digit-size", "30", "20"], 2, "--digit-size: 30 20; accepted: two sizes in ascending order of at most 64"),
        (["--digit-size", "30", "65"], 2, "--digit-size: 30 65"),
        (["--batch-size", "9"], 2, "--images: 8; accepted: at least --batch-size, 9"),
        (["--epochs", "0"], 2, "'0'; accepted: a whole number of 1 or more"),
        (["--lr", "nan"], 2, "'nan'; accepted: a number above 0"),
        (["--lr", "inf"], 2, "'inf'; accepted: a number above 0"),
        (["--seed", "-1"], 2, "--seed: '-1'; accepted: a whole number of 0 or more"),
        (["--lr", "1e30"], 1, "lower --lr"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, status, message):
    monkeypatch.setattr("sys.argv", ["detection_demo.py", *SMALL, "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        run_entry_point(detection_demo.main)
    assert ended.value.code == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out/*"))
