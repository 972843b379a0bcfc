"""Objects in image files: tools/predict.py with the checkpoint of a detector."""

import argparse
import csv
import io
import json

import numpy as np
import predict
import pytest
import torch
from PIL import Image

from config import add_checkpoint_arguments, leaves, load_config
from detection.models import build_detector
from detection.trained import load_detector
from runtime.checkpoint import read_checkpoint
from tests.helpers import ROOT, TINY, run_tool

NAMES = ["cat", "dog, or wolf", "mouse"]
SIZES = {"a.png": (50, 90), "b.png": (90, 60), "c.png": (64, 64)}  # height, width


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of an untrained detector for images of two sizes."""
    opts = ["DETECTION.SIZES", "[64, 96, 96, 64]", "DETECTION.HEAD.CHANNELS", "32", "MODEL.NUM_CLASSES", "3"]
    config, _ = load_config(ROOT / "configs/strip_mlp_pico_digits.yaml", [*TINY, *opts])
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best.pth"
    weights = build_detector(config, 3).state_dict()
    torch.save({"model": weights, "config": leaves(config), "classes": NAMES, "best": {"AP": 0.1, "epoch": 1}}, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def find(monkeypatch, capsys, checkpoint):
    return lambda *arguments: run_tool(monkeypatch, capsys, predict, checkpoint, "--device", "cpu", *arguments)


def test_formats_pictures_and_coco_results(find, images, tmp_path):
    drawn, coco = tmp_path / "drawn", tmp_path / "found.json"
    coco.write_text("old")
    options = ("--min-score", 0.012, "--top-k", 3)
    done = find(images, *options, "--format", "json", "--draw", drawn, "--coco", coco)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["file"] for line in lines] == [str(images / name) for name in SIZES]
    assert 0 < len(lines[0]["objects"]) <= 3
    for line, (height, width) in zip(lines, SIZES.values(), strict=True):
        for thing in line["objects"]:
            assert thing["class"] == NAMES[thing["index"]] and 0.012 <= thing["score"] <= 1
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
    for name, (height, width) in SIZES.items():
        assert Image.open(drawn / name.replace("png", "jpg")).size == (width, height)
    results = json.loads(coco.read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3}
    assert {result["category_id"] for result in results} == {1, 2, 3}
    assert len(results) > 50  # without --min-score and --top-k
    best = max((r for r in results if r["image_id"] == 1), key=lambda r: r["score"])
    left, top, right, bottom = lines[0]["objects"][0]["box"]
    assert best["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.01)

    # Whatever the batches; the other formats say the same.
    rows = list(csv.DictReader(io.StringIO(find(images, *options, "--format", "csv", "--batch-size", 1).out)))
    things = [(line["file"], thing) for line in lines for thing in line["objects"]]
    assert [row["file"] for row in rows] == [file for file, _ in things]
    for row, (_, thing) in zip(rows, things, strict=True):
        assert row["class"] == thing["class"] and float(row["score"]) == pytest.approx(thing["score"], abs=1e-4)
        assert float(row["right"]) == pytest.approx(thing["box"][2], abs=0.2)
    text = find(images, *options).out.splitlines()
    assert [len(line.split("\t")) for line in text] == [1 + len(line["objects"]) for line in lines]

    again = find(images, "--draw", drawn)
    assert again.status == 1 and "is not empty; choose a new folder" in again.err


def test_numbers_of_annotations(find, images, tmp_path):
    listed = [{"id": 70 + i, "file_name": n, "height": s[0], "width": s[1]} for i, (n, s) in enumerate(SIZES.items())]
    categories = [{"id": 9 - label, "name": name} for label, name in enumerate(NAMES)]
    path, coco = tmp_path / "annotations.json", tmp_path / "found.json"
    path.write_text(json.dumps({"images": listed, "categories": categories, "annotations": []}))
    done = find(images, "--coco", coco, "--annotations", path)
    assert done.status == 0, done.err
    results = json.loads(coco.read_text())
    assert {r["image_id"]: r["file_name"] for r in results} == {70 + i: str(images / n) for i, n in enumerate(SIZES)}
    assert {r["category_id"] for r in results} == {7, 8, 9}
    path.write_text(json.dumps({"images": listed[:1], "categories": categories, "annotations": []}))
    done = find(images, "--coco", coco, "--annotations", path)
    assert done.status == 1 and "b.png: is not among the images of --annotations" in done.err
    path.write_text(json.dumps({"images": listed, "categories": categories[:2], "annotations": []}))
    done = find(images, "--coco", coco, "--annotations", path)
    assert done.status == 1 and "has no category 'mouse', which the detector finds" in done.err


def test_files_and_options_that_cannot_be(find, images, checkpoint, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    done = find(tmp_path / "bad.png", images / "a.png", "--format", "json")
    assert done.status == 1 and "1 of 2 files cannot be read" in done.err
    first, second = map(json.loads, done.out.splitlines())
    assert "bad.png" in first["error"] and "objects" in second
    done = find(images, "--engine", "onnxruntime")
    assert done.status == 1 and "is of a detector; accepted: torch" in done.err
    done = find(images, "--opts", "DETECTION.HEAD.CHANNELS", "1024")
    assert done.status == 1 and "but it holds" in done.err


def test_a_classifier_takes_no_options_of_detectors(monkeypatch, capsys, images, tmp_path):
    torch.save({"model": {}, "config": {}}, tmp_path / "best.pth")
    done = run_tool(monkeypatch, capsys, predict, tmp_path / "best.pth", images, "--draw", tmp_path / "drawn")
    assert done.status == 1 and "--draw is for detectors" in done.err


def test_boxes_are_those_of_the_original(checkpoint, images):
    """A detector that finds the right lower quarter of what it is given finds that of the original."""
    parser = argparse.ArgumentParser()
    add_checkpoint_arguments(parser)
    args = parser.parse_args([str(checkpoint), "--device", "cpu", "--opts", "DETECTION.FIT", "pad"])
    detector = load_detector(args, read_checkpoint(checkpoint))
    prepared = [detector.prepare(Image.open(images / name)) for name in SIZES]
    assert [tuple(p.pixels.shape[-2:]) for p in prepared] == [(64, 96), (96, 64), (64, 96)]

    class Quarter(torch.nn.Module):
        def forward(self, batch):
            inner = {(64, 96): [(53, 96), (64, 64)], (96, 64): [(96, 64)]}[tuple(batch.shape[-2:])]
            return [
                {
                    "boxes": torch.tensor([[w / 2, h / 2, w, h]]),
                    "scores": torch.ones(1),
                    "labels": torch.ones(1, dtype=torch.int64),
                }
                for h, w in inner
            ]

    detector.model = Quarter()
    for found, (height, width) in zip(detector.find(prepared), SIZES.values(), strict=True):
        assert found["boxes"][0].tolist() == pytest.approx([width / 2, height / 2, width, height], abs=1)
