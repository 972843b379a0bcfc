"""Labels of YOLO and Pascal VOC in COCO's layout, as our reader reads them."""

import pytest
import to_coco
from PIL import Image

from config import get_default_config
from detection.coco import read_splits
from tests.helpers import run_tool

YAML = "train: ../train/images\nval: valid/images\ntest: ../test/images\nnames: [cat, no, dog]\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_image(path, size=(200, 100), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)


def splits_of(folder):
    config = get_default_config()
    config.DATA.DATA_PATH = str(folder)
    return read_splits(config)


def yolo(root):
    """As Roboflow writes it: folders for each split, and paths that are not where they lead."""
    write(root / "data.yaml", YAML)
    for split in ("train", "valid"):
        for name in ("a", "b"):
            write_image(root / split / "images" / f"{name}.png")
        lines = "0 0.5 0.5 0.2 0.4\n2 0.95 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.4\n1 0.1 0.2 0.3 0.2 0.3 0.6\n"
        write(root / split / "labels/a.txt", lines)
    return root


def test_yolo(monkeypatch, capsys, tmp_path):
    root = yolo(tmp_path)
    result = run_tool(monkeypatch, capsys, to_coco, "yolo", root)
    assert result.status == 0, result.err
    for note in (
        "2 images, 3 boxes, 3 categories",
        "1 lines are there twice",
        "1 polygons",
        "1 images have no text file",
    ):
        assert result.out.count(note) == 2
    assert "left out:" in result.err
    assert not (root / "annotations/instances_test.json").exists()
    train, val = splits_of(root)
    assert train.classes == ["cat", "no", "dog"]
    assert train.path(0) == str(root / "train/images/a.png")
    for source in (train, val):
        assert source.boxes(0).tolist() == [[80, 30, 120, 70], [170, 40, 200, 60], [20, 20, 60, 60]]
        assert source.labels(0).tolist() == [0, 2, 1]
        assert source.areas(0).tolist() == [1600, 600, 800]
        assert len(source.boxes(1)) == 0
    again = run_tool(monkeypatch, capsys, to_coco, "yolo", root)
    assert (again.status, "instances_train.json: is there already" in again.err) == (1, True)


def test_yolo_in_images_and_labels_with_links_in_another_folder(monkeypatch, capsys, tmp_path):
    root = tmp_path / "yolo"
    write(root / "my.yaml", "path: .\ntrain: train.txt\nval: images/val\nnames:\n  0: cat\n")
    write(root / "train.txt", "./images/train/a.png\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(root / "images/train/a.png", exif=exif)
    write_image(root / "images/val/a.png")
    for split in ("train", "val"):
        write(root / "labels" / split / "a.txt", "0 0.5 0.5 1 0.5")
    result = run_tool(monkeypatch, capsys, to_coco, "yolo", root / "my.yaml", "--output", tmp_path / "coco")
    assert result.status == 0, result.err
    train, val = splits_of(tmp_path / "coco")
    assert (train.size(0), train.boxes(0).tolist()) == ((200, 100), [[0, 50, 100, 150]])  # YOLO's tools turn images
    assert train.load(0).size == (100, 200)
    assert (val.size(0), val.boxes(0).tolist()) == ((100, 200), [[0, 25, 200, 75]])
    again = run_tool(monkeypatch, capsys, to_coco, "yolo", root, "--output", root)
    assert (again.status, "data.yaml: cannot be read" in again.err) == (2, True)


def test_a_missing_validation_split_is_said(monkeypatch, capsys, tmp_path):
    root = yolo(tmp_path)
    write(root / "data.yaml", "train: train/images\nnames: [cat, no, dog]\n")
    result = run_tool(monkeypatch, capsys, to_coco, "yolo", root)
    assert result.status == 0 and "there is no validation split, which main_detect.py needs" in result.err


def voc_object(name, *corners, difficult=0):
    sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox>{part}</object>"


def voc_xml(*objects, size=(200, 100)):
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{''.join(objects)}</annotation>"


def voc(root):
    for number, split in ((1, "train"), (2, "val")):
        write(root / f"ImageSets/Main/{split}.txt", f"{number:06d}\n")
        write_image(root / f"JPEGImages/{number:06d}.jpg")
        objects = voc_object("dog", 1, 1, 200, 100), voc_object("cat", 11, 21, 20.5, 40, difficult=1)
        write(root / f"Annotations/{number:06d}.xml", voc_xml(*objects, size=(0, 0) if number == 2 else (200, 100)))
    return root


def test_voc(monkeypatch, capsys, tmp_path):
    root = voc(tmp_path / "VOC")
    result = run_tool(monkeypatch, capsys, to_coco, "voc", root)
    assert result.status == 0, result.err
    assert result.out.count("1 objects are difficult") == 2
    assert result.out.count("1 XML files do not say the size") == 1
    for source in splits_of(root):
        assert source.classes == ["cat", "dog"]
        assert source.boxes(0).tolist() == [[0, 0, 200, 100], [10, 20, 20.5, 40]]
        assert source.labels(0).tolist() == [1, 0]
        assert source.crowd(0).tolist() == [False, True]
    folders = tmp_path / "labelled"
    for split in ("train", "valid"):
        write_image(folders / split / "a.png")
        write(folders / split / "a.xml", voc_xml(voc_object("dog", 0, 0, 200, 100)))
    result = run_tool(monkeypatch, capsys, to_coco, "voc", folders, "--first-pixel", "0")
    assert result.status == 0, result.err
    assert splits_of(folders).val.boxes(0).tolist() == [[0, 0, 200, 100]]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train/labels/a.txt", "3 0.5 0.5 0.1 0.1", "a.txt: '3 0.5 0.5 0.1 0.1'; accepted: a class from 0 to 2"),
        ("train/labels/a.txt", "0 0.5 0.5 0.1", "has 3 numbers after the class; accepted: 4"),
        ("train/labels/a.txt", "0 50 50 10 10", "accepted: fractions of the image's width and height"),
        ("train/labels/a.txt", "0 nan 0.5 0.1 0.1", "accepted: fractions"),
        ("data.yaml", "train: train/images\nnames: 3\n", "names is '3'; accepted: a list of names"),
        ("data.yaml", "train: nowhere\nnames: [a]\n", "train is nowhere, but there is no"),
        ("data.yaml", "train: ../outside\nnames: [a]\n", "accepted: images in that folder"),
    ],
)
def test_bad_yolo(monkeypatch, capsys, tmp_path, file, text, message):
    root = yolo(tmp_path / "yolo")
    write_image(tmp_path / "outside/a.png")
    write(root / file, text)
    result = run_tool(monkeypatch, capsys, to_coco, "yolo", root)
    assert result.status == 1
    assert message in result.err
    assert not (root / "annotations").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "refused: it has a document type"),
        ("<annotation>", "000002.xml: not XML, or damaged"),
        (voc_xml(voc_object("dog", "x", 1, 2, 3)), "xmin is 'x'; accepted: a number of pixels"),
        (voc_xml(voc_object("", 1, 1, 2, 3)), "an object has no name"),
    ],
)
def test_bad_voc(monkeypatch, capsys, tmp_path, text, message):
    root = voc(tmp_path)
    write(root / "Annotations/000002.xml", text)
    result = run_tool(monkeypatch, capsys, to_coco, "voc", root)
    assert result.status == 1
    assert message in result.err
    assert not (root / "annotations").exists()
