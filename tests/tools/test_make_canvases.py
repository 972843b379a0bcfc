"""Canvases of Fashion-MNIST items."""

import json

import make_canvases
import numpy as np
import pytest
from PIL import Image

from config import get_default_config
from detection.coco import read_splits
from tests.helpers import run_tool, write_idx

OPTIONS = ("--train", 6, "--val", 3, "--format", "png")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Items of bright pixels: of 200 in training, of 250 in the test set."""
    folder = tmp_path_factory.mktemp("idx")
    for prefix, level in (("train", 200), ("t10k", 250)):
        images = np.zeros((20, 28, 28), np.uint8)
        images[:, 3:25, 8:20] = level
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(20) % 10)
    return folder


def splits_of(folder):
    config = get_default_config()
    config.DATA.DATA_PATH = str(folder)
    return read_splits(config)


def test_canvases(monkeypatch, capsys, tmp_path, items):
    options = (*OPTIONS, "--aspects", 0.5, 2, "--item-size", 20, 40)
    result = run_tool(monkeypatch, capsys, make_canvases, tmp_path / "a", "--items", items, *options)
    assert result.status == 0, result.err
    train, val = splits_of(tmp_path / "a")
    assert (len(train), len(val)) == (6, 3)
    assert train.classes[0] == "T-shirt/top"
    assert {train.size(i) for i in range(6)} == {(101, 202), (202, 101)}
    for source in (train, val):
        assert all("categories have no box" in note for note in source.notes)
        for i in range(len(source)):
            boxes = source.boxes(i)
            assert 1 <= len(boxes) <= 5
            longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
            assert longer.min() >= 18
            assert longer.max() <= 40
            for k, box in enumerate(boxes[1:], start=1):
                corners = [[a[0], a[1], a[2] - a[0], a[3] - a[1]] for a in (box, *boxes[:k])]
                assert max(make_canvases.covered(corners[0], other) for other in corners[1:]) <= 0.2
    # The same options, the same pixels; another seed, others; and nothing is written over.
    run_tool(monkeypatch, capsys, make_canvases, tmp_path / "b", "--items", items, *options)
    run_tool(monkeypatch, capsys, make_canvases, tmp_path / "c", "--items", items, *options, "--seed", 1)
    first, again, other = ((tmp_path / name / "train/000001.png").read_bytes() for name in "abc")
    assert first == again != other
    result = run_tool(monkeypatch, capsys, make_canvases, tmp_path / "a", "--items", items, *options)
    assert (result.status, "is there already, and not empty" in result.err) == (1, True)


def test_boxes_bound_the_items(items):
    """On black, each item's tint is in its box alone."""
    photographs, targets = make_canvases.read_items(items, "train")
    original = make_canvases.background
    make_canvases.background = lambda rng, items, size: np.zeros((*size, 3))
    try:
        canvas = make_canvases.draw_canvas(np.random.default_rng(0), photographs, targets, (128, 160), (20, 60), 1, 0.0)
    finally:
        make_canvases.background = original
    rows, columns = (np.flatnonzero((canvas.pixels > 0).any(axis=(2, axis))) for axis in (1, 0))
    left, top, width, height = canvas.boxes[0]
    assert [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]] == [left, top, width, height]


def test_validation_has_the_test_items_only(monkeypatch, capsys, tmp_path, items):
    run_tool(monkeypatch, capsys, make_canvases, tmp_path / "a", "--items", items, *OPTIONS, "--size", 96)
    categories = json.loads((tmp_path / "a/annotations/instances_val.json").read_text())["categories"]
    assert [category["id"] for category in categories] == list(range(1, 11))
    with Image.open(tmp_path / "a/val/000001.png") as image:
        assert image.size == (96, 96)
    drawn = {}

    def note(rng, items, *_):
        drawn.setdefault(int(items.max()), 0)
        return make_canvases.Canvas(np.zeros((128, 160, 3), np.uint8), [[0, 0, 5, 5]], [0])

    monkeypatch.setattr(make_canvases, "draw_canvas", note)
    for split in ("train", "val"):
        args = make_canvases.parse_args([str(tmp_path / split), *map(str, OPTIONS)])
        (args.output / "annotations").mkdir(parents=True)
        make_canvases.make_split(args, split, make_canvases.read_items(items, split))
        assert list(drawn) == ([200] if split == "train" else [200, 250])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--item-size", 30, 20), 2, "--item-size: 30 20; accepted: two in ascending order"),
        (("--aspects", 9), 2, "--aspects: accepted: ratios from 0.25 to 4"),
        (("--overlap", 2), 2, "--overlap: 2; accepted: 0 to 1"),
        (("--items", "."), 1, "lacks train-images-idx3-ubyte, train-labels-idx1-ubyte"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, status, message):
    result = run_tool(monkeypatch, capsys, make_canvases, tmp_path / "out", *arguments)
    assert result.status == status
    assert message in result.err
    assert not (tmp_path / "out").exists()
