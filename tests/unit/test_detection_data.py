"""Batches of images with boxes, and their average precision."""

import json
import math
import sys
from logging import getLogger

import numpy as np
import pytest
import torch
from PIL import Image

from config import get_default_config
from data.errors import DataError
from data.loading import UnreadableFiles
from detection.coco import CocoSource
from detection.dataset import build_eval_loader, build_train_loader, to_original, whole_batches
from detection.metrics import CocoAP, to_results
from runtime.distributed import World
from tests.helpers import ROOT, load_tool
from utils import UserError

SIDES = ((96, 64), (64, 96), (70, 70))  # width, height
IMAGES = 26


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Each image has a white object, by which its box can be checked, on black. Image 5 has none; image 6 is damaged;
    image 7 has a crowd too."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(IMAGES):
        width, height = SIDES[number % 3]
        left, top, wide, high = (int(n) for n in (*rng.integers(0, 30, 2), *rng.integers(8, 30, 2)))
        pixels = np.zeros((height, width, 3), np.uint8)
        bbox = [left, top, wide, high]
        images.append({"id": 100 + number, "file_name": f"{number}.png", "width": width, "height": height})
        entry = {"image_id": 100 + number, "category_id": 1 + number % 2, "bbox": bbox}
        if number != 5:
            annotations.append(entry)
            pixels[top : top + high, left : left + wide] = 255
        if number == 7:
            annotations.append({**entry, "bbox": [40, 60, 20, 20], "iscrowd": 1})
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "6.png").write_bytes(b"no image")
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    (folder / "labels.json").write_text(json.dumps(content))
    return CocoSource(folder, folder / "labels.json")


def settings(**keys):
    config = get_default_config()
    config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = 4, 0
    config.DATA.INTERPOLATION = "bilinear"
    config.DETECTION.SIZES, config.DETECTION.PHOTOMETRIC = [64, 96, 96, 64], 0.0
    for name, value in keys.items():
        section, _, key = name.rpartition("__")
        config[section][key] = value
    return config


def world(rank=0, size=1):
    return World(rank, rank, size, torch.device("cpu"))


def check_box(image, target):
    """The only box bounds what is white."""
    white = image.amin(dim=0) > 180
    if not len(target["boxes"]):
        assert white.sum() < 120  # what was left of it was less than a pixel thick
        return
    rows, columns = white.any(dim=1).nonzero(), white.any(dim=0).nonzero()
    bounds = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    torch.testing.assert_close(target["boxes"][0], bounds.float(), atol=1.0, rtol=0)


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_evaluation_gives_each_image_once_and_boxes_go_back(source, fit):
    seen = []
    for rank in range(3):
        loader = build_eval_loader(settings(DETECTION__FIT=fit), source, world(rank, 3))
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            seen += batch.index.tolist()
            for i, index in enumerate(batch.index.tolist()):
                target = batch.target[i]
                width, height = SIDES[index % 3]
                assert batch.image.shape[2] < batch.image.shape[3] or width <= height
                assert batch.readable[i] == (index != 6)
                back = to_original(target["boxes"], target["geometry"])
                torch.testing.assert_close(back, torch.from_numpy(source.boxes(index)), atol=1e-3, rtol=0)
                assert target["iscrowd"].tolist() == source.crowd(index).tolist()
                sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
                torch.testing.assert_close(target["area"], sides.prod(dim=1), atol=1e-2, rtol=0)
                if index not in (5, 6):
                    check_box(batch.image[i], target)
                scale = target["geometry"][:2]
                assert fit == "resize" or math.isclose(*scale.tolist(), rel_tol=0.02)
    assert sorted(seen) == list(range(IMAGES))


@pytest.mark.parametrize("keys", [{}, {"DETECTION__FIT": "pad", "DETECTION__CROP": 0.7}])
def test_training_augments_boxes_with_their_pixels(source, keys):
    config = settings(DETECTION__SCALE_JITTER=[0.5, 1.6], **keys)
    loader = build_train_loader(config, source, world())
    firsts = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for image, target in zip(batch.image, batch.target, strict=True):
                assert len(target["boxes"]) <= 1  # crowds are left out
                check_box(image, target)
        firsts.append(batch.image)
    assert not torch.equal(firsts[0], firsts[1])


def test_mosaic_has_the_objects_of_four_images(source):
    loader = build_train_loader(settings(DETECTION__MOSAIC=1.0, DETECTION__PHOTOMETRIC=1.0), source, world())
    targets = [target for batch in loader for target in batch.target]
    assert max(len(target["boxes"]) for target in targets) == 4
    for batch in loader:
        for image, target in zip(batch.image, batch.target, strict=True):
            for left, top, right, bottom in target["boxes"].round().int().tolist():
                inside = image[:, top + 1 : bottom - 1, left + 1 : right - 1].float()
                assert not inside.numel() or inside.mean() > 100


def test_processes_train_in_step_and_a_run_goes_on_where_it_was(source):
    loaders = [build_train_loader(settings(), source, world(rank, 2)) for rank in range(2)]
    for loader in loaders:
        loader.sampler.set_epoch(3)
    keys = [list(loader.sampler) for loader in loaders]
    assert len(keys[0]) == len(keys[1]) == len(loaders[0]) == 3
    assert [key.size for key in keys[0]] == [key.size for key in keys[1]]
    assert {key.size for key in keys[0]} == {(64, 96), (96, 64)}
    indices = [index for of_rank in keys for key in of_rank for index in key.indices]
    assert len(set(indices)) == len(indices) == 24
    whole = list(loaders[0])
    loader = build_train_loader(settings(DATA__NUM_WORKERS=1), source, world(0, 2))
    loader.sampler.set_epoch(3, start=4)
    rest = list(loader)
    assert len(rest) == 2
    for batch, expected in zip(rest, whole[1:], strict=True):
        assert torch.equal(batch.image, expected.image)
        assert torch.equal(batch.index, expected.index)
        for target, other in zip(batch.target, expected.target, strict=True):
            assert all(torch.equal(target[name], other[name]) for name in other)


def test_sizes_without_a_whole_batch_are_not_used_in_training():
    images = np.array([[64, 96]] * 9 + [[96, 64]] * 3 + [[80, 80]] * 5)
    sizes = [(64, 96), (96, 64), (80, 80)]
    assert np.bincount(whole_batches(images, sizes, 1), minlength=3).tolist() == [9, 3, 5]
    assert np.bincount(whole_batches(images, sizes, 4), minlength=3).tolist() == [9, 0, 8]
    assert np.bincount(whole_batches(images, sizes, 17), minlength=3).sum() == 17


def test_unreadable_images_are_replaced_and_named(source, caplog):
    loader = build_train_loader(settings(DATA__BATCH_SIZE=1), source, world())
    unreadable = UnreadableFiles(loader, 0.05, getLogger("test"))
    for batch in loader:
        unreadable.note(batch)
        if batch.index.tolist() == [6]:
            assert batch.target[0]["labels"].tolist() == [1]  # of image 7
    assert unreadable.count == 1
    assert "6.png: no image of a known format" in caplog.text


def test_too_few_images(source):
    with pytest.raises(DataError, match=r"DATA\.BATCH_SIZE is 20, .* 26 images for 2 processes; accepted: at most 13"):
        build_train_loader(settings(DATA__BATCH_SIZE=20), source, world(0, 2))


def found(*rows):
    """Left, top, right, bottom, score, label of each."""
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()}


def exact(source, index):
    return found(*((*box, 0.9, label) for box, label in zip(source.boxes(index), source.labels(index), strict=True)))


def test_average_precision(source):
    pytest.importorskip("pycocotools")  # at least; the faster one is used if it is there
    ids = [source.image_id(i) for i in range(len(source))]
    ap = CocoAP(source)
    assert ap.compute()["AP"] == 0
    for part in (slice(9, None), slice(9)):
        ap.add(ids[part], [exact(source, i) for i in range(len(source))[part]])
    result = ap.compute()
    assert [result[name] for name in ("AP", "AP50", "AP75", "AP_small")] == [1, 1, 1, 1]
    assert math.isnan(result["AP_large"])
    assert result["per_class"] == {"one": 1, "two": 1}

    # A crowd is not missed, nor is what is found in it wrong.
    index = 7
    box = source.boxes(index)[~source.crowd(index)][0].tolist()
    ap.add([ids[index]], [found((*box, 0.9, 1), (42, 62, 50, 70, 0.95, 1), (42, 66, 50, 72, 0.94, 1))])
    assert ap.compute()["per_class"]["two"] == 1
    # What is found beside the objects, and more likely, is.
    ap.add([ids[index]], [found((*box, 0.9, 1), (0, 0, 5, 5, 0.95, 1), (0, 0, float("nan"), 5, 0.99, 1))])
    result = ap.compute()
    assert 0.9 < result["per_class"]["two"] < 1
    assert result["per_class"]["one"] == 1


def test_equal_scores_come_in_the_order_of_image_ids(tmp_path):
    """As in COCO's own evaluation of files, whatever the order in the file: here, the wrong one first."""
    pytest.importorskip("pycocotools")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "2.png")
    images = [{"id": number, "file_name": f"{number}.png", "width": 32, "height": 32} for number in (2, 1)]
    content = {"images": images, "annotations": [{"image_id": 2, "category_id": 1, "bbox": [4, 4, 8, 8]}]}
    (tmp_path / "a.json").write_text(json.dumps({**content, "categories": [{"id": 1, "name": "one"}]}))
    ap = CocoAP(CocoSource(tmp_path, tmp_path / "a.json"))
    ap.add([2, 1], [found((4, 4, 12, 12, 0.5, 0))] * 2)
    assert ap.compute()["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["crowds", "equal scores"])
def test_both_libraries_agree(kind):
    pytest.importorskip("pycocotools")
    pytest.importorskip("faster_coco_eval")
    measure = load_tool(ROOT / "benchmarks/coco_eval/measure.py")
    precision, average, _ = measure.compare(0, 12, 3, 6, 20, 0.3, kind == "equal scores")
    assert max(precision, average) < 1e-12


def test_a_missing_library_is_named(source, monkeypatch):
    for name in ("faster_coco_eval", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install -r requirements/detection\.txt"):
        CocoAP(source).compute()


def test_results_are_in_the_ids_of_the_file(source):
    results = to_results(source, [103], [found((1, 2, 4, 8, 0.5, 1))])
    assert results == [{"image_id": 103, "category_id": 2, "bbox": [1, 2, 3, 6], "score": 0.5}]
    assert json.dumps(results)
