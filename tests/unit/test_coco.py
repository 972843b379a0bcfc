"""COCO's layout, and what labelling tools make of it."""

import json

import numpy as np
import pytest
from PIL import Image

from config import get_default_config
from data.errors import DataError, UnreadableImage
from data.sources import class_names
from detection.coco import CocoSource, read_splits

CATEGORIES = [{"id": 5, "name": "five"}, {"id": 0, "name": "zero"}]


def write_images(folder, *names, size=(64, 48), **options):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name, **options)


def entry(number, name="a.png", width=64, height=48):
    return {"id": number, "file_name": name, "width": width, "height": height}


def box(image, category, *bbox, **more):
    return {"image_id": image, "category_id": category, "bbox": list(bbox), **more}


def coco(folder, images, annotations, categories=CATEGORIES, classes=None, file="labels.json"):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / file).write_text(json.dumps(content))
    return CocoSource(folder, folder / file, classes)


def test_what_is_unusual_is_right_and_counted(tmp_path):
    write_images(tmp_path, "a.png", "empty.png", "plain.png")
    images = [entry(900), entry(7, "empty.png"), entry(8, "gone.png"), {"id": 3, "file_name": "plain.png"}]
    annotations = [
        box(3, 5, 60, 40, 4, 8),  # touches the corner of an image whose size the file does not say
        box(900, 5, -5, 0, 20, 20, iscrowd=0),
        box(900, 0, 1, 1, 0, 4),
        box(900, 0, 64, 1, 3, 4),
        box(900, 0, 1, 1, 100, 4.5, iscrowd=1, area=7, segmentation={"counts": [1], "size": [2, 2]}),
        box(1, 0, 1, 1, 3, 4),
        {"image_id": 900, "category_id": 0, "segmentation": [[1, 1, 2, 2, 3, 1]]},
    ]
    categories = [*CATEGORIES, {"id": 2, "name": "unused"}, {"id": 9, "name": "all", "supercategory": "none"}]
    categories[0] = {**categories[0], "supercategory": "all"}
    source = coco(tmp_path, images, annotations, categories)
    assert (source.classes, source.category_ids) == (["zero", "unused", "five"], [0, 2, 5])
    assert [source.image_id(i) for i in range(len(source))] == [900, 7, 8, 3]
    assert source.boxes(0).tolist() == [[0, 0, 15, 20], [1, 1, 64, 5.5]]
    assert source.boxes(0).dtype == np.float32
    assert (source.labels(0).tolist(), source.crowd(0).tolist()) == ([2, 0], [False, True])
    assert source.areas(0).tolist() == [300, 7]
    assert source.boxes(1).shape == (0, 4)
    assert (source.size(3), source.boxes(3).tolist()) == ((48, 64), [[60, 40, 64, 48]])
    assert source.counts().tolist() == [0, 0, 2]
    expected = [
        "the category all, above all others, has no box and is left out",
        "1 categories have no box: unused",
        "1 of its 4 images are not there, such as gone.png",
        "1 images have no width and height",
        "1 annotations are of images that it does not list",
        "1 annotations have no box (bbox)",
        "1 boxes have no area",
        "1 boxes are outside their image",
        "2 boxes of 5 reach out of their image",
        "2 of 4 images have no box",
        "1 boxes are crowds",
    ]
    for note, text in zip(source.notes, expected, strict=True):
        assert f"labels.json: {text}" in note
    with pytest.raises(FileNotFoundError):
        source.load(2)


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [
        (6, (48, 64), (47, 0)),  # as shown: the stored top left is at the top right
        (6, (64, 48), (0, 0)),  # as stored
        (6, (24, 32), (47, 0)),  # of half the size
        (3, (64, 48), (63, 47)),  # the size does not say: as shown
        (1, (64, 48), (0, 0)),
    ],
)
def test_turned_photographs_come_as_they_were_marked(tmp_path, orientation, size, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (64, 48))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png", exif=exif)
    source = coco(tmp_path, [entry(1, width=size[0], height=size[1])], [box(1, 0, 1, 1, 3, 4)])
    loaded = source.load(0)
    assert loaded.getpixel(corner) == (255, 255, 255)
    assert source.size(0) == size[::-1]


def test_an_image_of_another_shape_cannot_be_read(tmp_path):
    write_images(tmp_path, "a.png")
    source = coco(tmp_path, [entry(1, width=64, height=64)], [box(1, 0, 1, 1, 3, 4)])
    with pytest.raises(UnreadableImage, match=r"a\.png: it has 64 x 48 pixels, but its annotation says 64 x 64"):
        source.load(0)


def test_files_in_folders(tmp_path):
    write_images(tmp_path, "x/1.png", "y/1.png", "2.png")
    images = [entry(1, "x/1.png"), entry(2, "y\\1.png"), entry(3, "C:\\marked\\2.png")]
    source = coco(tmp_path, images, [box(1, 0, 1, 1, 3, 4)])
    assert [source.path(i) for i in range(3)] == [str(tmp_path / name) for name in ("x/1.png", "y/1.png", "2.png")]
    assert "1 file names are of other folders, such as C:" in source.notes[1]
    with pytest.raises(DataError, match=r"x/2\.png and y/2\.png, are the same file"):
        coco(tmp_path, [entry(1, "x/2.png"), entry(2, "y/2.png")], [box(1, 0, 1, 1, 3, 4)])


def test_classes_of_training_are_matched_by_name(tmp_path):
    write_images(tmp_path, "a.png")
    categories = [{"id": 1, "name": "b"}, {"id": 2, "name": "a"}, {"id": 3, "name": "idle"}]
    source = coco(tmp_path, [entry(1)], [box(1, 1, 1, 1, 3, 4), box(1, 2, 1, 1, 3, 4)], categories, ["a", "b", "c"])
    assert source.labels(0).tolist() == [1, 0]
    assert (source.classes, source.category_ids) == (["a", "b", "c"], [2, 1, 4])
    assert "1 categories without a box, which training does not have" in source.notes[0]
    assert "lacks 1 of the 3 categories of training: c" in source.notes[1]
    with pytest.raises(DataError, match="boxes of 1 categories that training does not have: b; accepted: a, c"):
        coco(tmp_path, [entry(1)], [box(1, 1, 1, 1, 3, 4)], categories, ["a", "c"])


def test_names_are_those_that_a_checkpoint_has(tmp_path):
    """By which an evaluation finds the classes again."""
    write_images(tmp_path, "a.png")
    files = [entry(1)], [box(1, 4, 1, 1, 3, 4)], [{"id": 4, "name": "hard\u00a0hat "}]
    names = class_names(coco(tmp_path, *files))
    assert names[0].isprintable() and coco(tmp_path, *files, classes=names).classes == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [entry(1), entry(1, "b.png")]}, r"images\[1\]: has the id 1 of another image"),
        ({"images": [entry("1")]}, r'images\[0\]: id is "1"; accepted: a whole number'),
        ({"images": [entry(1, "../a.png")]}, "leads out of the folder"),
        ({"images": [entry(1, width=-3)]}, "height and width are 48 and -3"),
        ({"images": [entry(1, "b.png")]}, "none of its 1 images is in"),
        ({"images": {}}, "has a dict as images"),
        ({"annotations": [box(1, 3, 1, 1, 3, 4)]}, "annotations are of category 3, which categories lacks; .* 0, 5"),
        ({"annotations": [box(1, 0, 1, 1, 3)]}, r"annotations\[0\]: bbox is \[1, 1, 3\]; accepted: four numbers"),
        ({"annotations": [box(1, 0, 1, 1, 3, float("nan"))]}, r"bbox is \[1, 1, 3, NaN\]"),
        ({"annotations": [box(1, 0, 0.1, 0.1, 0.3, 0.4)]}, "they seem to be fractions"),
        ({"annotations": [box(1, 0, 1, 1, 3, 4, iscrowd=2)]}, "iscrowd is 2; accepted: 0 or 1"),
        ({"annotations": []}, "has no box in its images"),
        ({"annotations": [box(1, 0, 1, 1, 3, 4, iscrowd=1)]}, "has only crowds"),
        ({"categories": [{"id": 0, "name": ""}]}, r'categories\[0\]: name is ""'),
        ({"categories": [{"id": 0, "name": "a"}, {"id": 0, "name": "b"}]}, "has the id 0 of another category"),
        (
            {
                "categories": [{"id": 0, "name": "a"}, {"id": 5, "name": "a"}],
                "annotations": [box(1, 0, 1, 1, 3, 4), box(1, 5, 1, 1, 3, 4)],
            },
            "the categories 0, 5 are all called a",
        ),
    ],
)
def test_refused(tmp_path, change, message):
    write_images(tmp_path, "a.png")
    content = {"images": [entry(1)], "annotations": [box(1, 0, 1, 1, 3, 4)], "categories": CATEGORIES, **change}
    with pytest.raises(DataError, match=message):
        coco(tmp_path, *content.values())


@pytest.mark.parametrize("text", ["", "[1", "[" * 100_000, "[]", '{"images": []}', "9" * 5000])
def test_files_that_are_not_in_that_layout(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DataError, match=r"labels\.json: (not JSON|holds a|has no )"):
        CocoSource(tmp_path, tmp_path / "labels.json")


@pytest.mark.parametrize(
    ("files", "images"),
    [
        (("annotations/instances_train.json", "annotations/instances_val.json"), ("train/a.png", "val/a.png")),
        (
            ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
            ("train2017/a.png", "val2017/a.png"),
        ),
        (("annotations/instances_train.json", "annotations/instances_val.json"), ("images/a.png", "images/a.png")),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train/a.png", "valid/a.png")),
    ],
)
def test_folders(tmp_path, files, images):
    write_images(tmp_path, "a.png", *images)
    for file in files:
        coco(tmp_path, [entry(1)], [box(1, 5, 1, 1, 3, 4)], file=file)
    config = get_default_config()
    config.DATA.DATA_PATH = str(tmp_path)
    splits = read_splits(config)
    assert [source.path(0) for source in splits] == [str(tmp_path / image) for image in images]
    assert splits.val.classes == ["zero", "five"]


def test_missing_annotations_are_named(tmp_path):
    config = get_default_config()
    config.DATA.DATA_PATH = str(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_default.json").touch()
    with pytest.raises(DataError, match=r"no annotations/instances_train\.json .* has instances_default\.json"):
        read_splits(config)
