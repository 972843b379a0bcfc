"""What main_eval.py evaluates on, and what it reports: splits, ImageNet's other test sets, results per class."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, classification_report
from timm.data import ImageNetInfo

from config import leaves, load_config
from data import build_normalize
from models import build_model
from tests.helpers import ROOT, TINY, load_tool, run_tool, start_processes, trained_model

CONFIG = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
IDS = ImageNetInfo("imagenet-1k").label_names()
CLASSES = 12  # "10" and "11" stand before "2" as text


def color(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, 3, dtype=np.uint8)


def write_images(folder: Path, number: int, names=("a.png",), shown: int | None = None) -> None:
    """Images of a class that all have its colour, or that of another one that is `shown`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.broadcast_to(color(number if shown is None else shown), (32, 32, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)


def write_checkpoint(path: Path, names: list[str], count: int = CLASSES, label_of=range(CLASSES)) -> Path:
    """A model of `count` classes that tells the colours 0 to 11 apart, which have the labels `label_of`."""
    opts = [*TINY, "MODEL.NUM_CLASSES", str(count)]
    config, _ = load_config(CONFIG, opts)
    torch.manual_seed(0)
    model = build_model(config).eval()
    pixels = np.stack([np.broadcast_to(color(number), (32, 32, 3)) for number in range(CLASSES)])
    images = build_normalize(config, torch.device("cpu"))(torch.tensor(pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        found = model.forward_head(model.forward_features(images), pre_logits=True).double()
        found = (found - found.mean(0)) / found.std()
        weight = torch.linalg.lstsq(torch.cat([found, torch.ones(CLASSES, 1)], 1), 20 * torch.eye(CLASSES).double())
        raw = model.forward_head(model.forward_features(images), pre_logits=True).double()
        mean, std = raw.mean(0), raw.std()
        head = model.get_classifier()
        head.weight.zero_(), head.bias.fill_(-50)
        rows = torch.tensor(list(label_of))
        head.weight[rows] = (weight.solution[:-1].T / std).float()
        head.bias[rows] = (weight.solution[-1] - weight.solution[:-1].T @ (mean / std)).float()
        assert model(images).argmax(1).tolist() == list(label_of)
    content = {"model": model.state_dict(), "config": leaves(config), "classes": names}
    torch.save(content, path)
    return path


def logits_of(checkpoint: Path, number: int) -> torch.Tensor:
    """What a model says to a colour, (classes,)."""
    pixels = np.ascontiguousarray(np.broadcast_to(color(number)[:, None, None], (3, 32, 32)))
    return trained_model(checkpoint, "--device", "cpu").logits(torch.tensor(pixels)[None])[0]


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """main_eval.py in this process: its result, what it says with status 0, or its one error message."""
    tool = load_tool(ROOT / "main_eval.py")

    def run(checkpoint, data, *flags, opts=()):
        command = ("--cfg", CONFIG, "--resume", checkpoint, "--data-path", data, "--json", tmp_path / "result.json")
        command += ("--device", "cpu", "--batch-size", "4", *flags, "--opts", *TINY, *opts)
        done = run_tool(monkeypatch, capsys, tool, *command)
        if done.status:
            return done.err
        return {**json.loads((tmp_path / "result.json").read_text()), "said": done.out + done.err}

    return run


NAMES = [f"class{number:02d}" for number in range(CLASSES)]


@pytest.fixture
def named(tmp_path):
    """A checkpoint of the classes NAMES."""
    return write_checkpoint(tmp_path / "named.pth", NAMES)


# Splits


def test_split_of_folders(named, evaluate, tmp_path):
    for number, name in enumerate(NAMES):
        write_images(tmp_path / "data/train" / name, number, ("a.png", "b.png"))
        write_images(tmp_path / "data/validation" / name, number, shown=(number + (number < 3)) % CLASSES)
        write_images(tmp_path / "data/test" / name, number, shown=(number + (number < 6)) % CLASSES)
    for split, images, top1 in (("train", 24, 100), ("val", 12, 75), ("test", 12, 50)):
        result = evaluate(named, tmp_path / "data", "--split", split)
        assert (result["split"], result["images"], result["top1"]) == (split, images, top1)
    plain = evaluate(named, tmp_path / "data")
    assert plain["top1"] == 75 and "engine:" not in plain["said"]
    other = evaluate(named, tmp_path / "data", "--engine", "reparameterized")
    assert (other["top1"], other["val_loss"]) == (75, pytest.approx(plain["val_loss"], rel=1e-4))
    assert "engine: reparameterized, logits within " in other["said"]
    held_out = ("DATA.VAL_FRACTION", "0.5")
    assert evaluate(named, tmp_path / "data", "--split", "train", opts=held_out)["images"] == 12
    assert evaluate(named, tmp_path / "data", "--split", "test", opts=held_out)["top1"] == 50


def test_split_that_is_not_there(named, evaluate, tmp_path):
    for number, name in enumerate(NAMES):
        write_images(tmp_path / "data/train" / name, number)
        write_images(tmp_path / "data/valid" / name, number)
    message = evaluate(named, tmp_path / "data", "--split", "test")
    assert f"{tmp_path}/data: no folder test/ in it; its splits: train, valid" in message
    write_images(tmp_path / "data/test", 0)
    message = evaluate(named, tmp_path / "data", "--split", "test")
    assert "has no class folders" in message and "tools/predict.py classifies images without labels" in message


# Order of the classes


def test_folders_named_by_numbers(evaluate, tmp_path):
    for number in range(CLASSES):
        write_images(tmp_path / "data/val" / str(number), number)
    texts = sorted(map(str, range(CLASSES)))
    nameless = write_checkpoint(tmp_path / "nameless.pth", [])
    message = evaluate(nameless, tmp_path / "data")
    assert "sorted as text, so that 10 would be label 2" in message and "--eval-set numbered" in message
    assert evaluate(nameless, tmp_path / "data", "--eval-set", "numbered")["top1"] == 100
    # Someone else's model, trained on such folders in the order of text
    as_text = write_checkpoint(tmp_path / "text.pth", [], label_of=[texts.index(str(n)) for n in range(CLASSES)])
    (tmp_path / "order.txt").write_text("\n".join(texts))
    assert evaluate(as_text, tmp_path / "data", opts=("DATA.CLASSES", tmp_path / "order.txt"))["top1"] == 100
    # Names tell, in whatever order
    for names in (texts, list(map(str, range(CLASSES)))):
        checkpoint = write_checkpoint(tmp_path / "c.pth", names, label_of=[names.index(str(n)) for n in range(CLASSES)])
        assert evaluate(checkpoint, tmp_path / "data")["top1"] == 100
    checkpoint = write_checkpoint(tmp_path / "c.pth", NAMES)
    (tmp_path / "order.txt").write_text("\n".join(map(str, range(CLASSES))))
    chosen = evaluate(checkpoint, tmp_path / "data", opts=("DATA.CLASSES", tmp_path / "order.txt"))
    assert chosen["top1"] == 100 and "classes of other names" in chosen["said"]
    message = evaluate(checkpoint, tmp_path / "data")
    assert "named by numbers (0, 1, 10, 11, 2 and 7 more), but those of" in message and "class00, class01" in message


def test_classes_in_another_order_or_fewer(named, evaluate, tmp_path):
    order = [5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10]
    checkpoint = write_checkpoint(tmp_path / "c.pth", [NAMES[n] for n in order], label_of=np.argsort(order).tolist())
    for number in (2, 3, 7):
        write_images(tmp_path / "data/val" / NAMES[number], number)
    result = evaluate(checkpoint, tmp_path / "data")
    assert result["top1"] == 100 and "3 of the 12 classes" in result["said"]
    assert evaluate(named, tmp_path / "data")["top1"] == 100


# ImageNet's other test sets


def test_sets_with_wordnet_ids(evaluate, tmp_path):
    """Only logits of classes that are there count; those the model does not have are left out."""
    checkpoint = write_checkpoint(tmp_path / "c.pth", IDS[:CLASSES])
    for number in (2, 3, 7):
        write_images(tmp_path / "data" / IDS[number], number)
    write_images(tmp_path / "data" / IDS[500], 2, ("a.png", "b.png"))
    result = evaluate(checkpoint, tmp_path / "data", "--eval-set", "imagenet-r")
    assert (result["top1"], result["images"], result["left_out"], result["classes"]) == (100, 3, 2, 3)
    assert f"2 images of 1 classes that the model does not have are left out: {IDS[500]}" in result["said"]
    # A colour that is taken for another class than these, whose logit does not count
    there = [2, 3, 7]
    for shown in range(20, 90):
        logits = logits_of(checkpoint, shown)
        (first, second, _), (best, *_) = logits[there].topk(3)
        if int(logits.argmax()) not in there and first - second > 1:
            break
    else:
        pytest.fail("no such colour")
    write_images(tmp_path / "data" / IDS[2], 2, ("b.png",), shown)
    restricted = evaluate(checkpoint, tmp_path / "data", "--eval-set", "imagenet-a", "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    expected = np.diag([1, 1, 1, 0])[:3]
    expected[0, int(best)] += 1
    assert restricted["images"] == 4 and report["confusion"] == expected.tolist()
    full = write_checkpoint(tmp_path / "full.pth", [], 1000)
    assert evaluate(full, tmp_path / "data", "--eval-set", "imagenet-sketch")["left_out"] == 0
    message = evaluate(write_checkpoint(tmp_path / "c.pth", NAMES), tmp_path / "data", "--eval-set", "imagenet-r")
    assert "its classes are class00" in message and "WordNet ids such as n01440764" in message


def test_imagenet_v2(evaluate, tmp_path):
    for number in range(CLASSES):
        write_images(tmp_path / "data" / str(number), number)
    order = [5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10]
    for checkpoint in (
        write_checkpoint(tmp_path / "nameless.pth", [], 1000),
        write_checkpoint(tmp_path / "c.pth", [IDS[n] for n in order], label_of=np.argsort(order).tolist()),
    ):
        assert evaluate(checkpoint, tmp_path / "data", "--eval-set", "imagenet-v2")["top1"] == 100
    write_images(tmp_path / "data/1000", 0)
    message = evaluate(checkpoint, tmp_path / "data", "--eval-set", "imagenet-v2")
    assert "has the folders 1000; --eval-set imagenet-v2 has numbers, 0 to 999" in message


def test_imagenet_real(evaluate, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c.pth", IDS[:CLASSES])
    # As label, as shown; the labels of ReaL: right, one of them right, wrong, none, not the model's alone
    images = {1: (0, 4, [4]), 2: (1, 5, [8, 5, 700]), 3: (2, 2, [3]), 5: (3, 3, []), 6: (4, 4, [900])}
    for number, (label, shown, _) in images.items():
        write_images(tmp_path / "data/val" / IDS[label], 0, (f"ILSVRC2012_val_{number:08d}.JPEG.png",), shown)
    (tmp_path / "real.json").write_text(json.dumps([images.get(n, (0, 0, [9]))[2] for n in range(1, 7)]))
    flags = ("--eval-set", "imagenet-real", "--real-labels", tmp_path / "real.json")
    result = evaluate(checkpoint, tmp_path / "data", *flags)
    assert (result["images"], result["left_out"], result["top1"]) == (3, 2, pytest.approx(200 / 3))
    assert "2 of 5 images have no label and are left out" in result["said"]
    losses = [-logits_of(checkpoint, shown).log_softmax(0) for shown in (4, 5, 2)]
    expected = (losses[0][4] + (losses[1][8] + losses[1][5]) / 2 + losses[2][3]) / 3
    assert result["val_loss"] == pytest.approx(expected.item(), rel=1e-4)
    write_images(tmp_path / "data/val" / IDS[0], 0, ("other.png",))
    assert "other.png: is none of the 6 images" in evaluate(checkpoint, tmp_path / "data", *flags)


# Results per class


@pytest.fixture
def mistaken(tmp_path):
    """An image folder of 3 classes with known predictions; one image cannot be read. Targets and predictions."""
    shown = {0: [0, 0, 1, 0, 0], 1: [1, 2], 2: [2]}
    for number, colors in shown.items():
        for index, other in enumerate(colors):
            write_images(tmp_path / "data/val" / NAMES[number], number, (f"{index}.png",), other)
    (tmp_path / "data/val" / NAMES[0] / "4.png").write_bytes(b"no image")
    targets = [number for number, colors in shown.items() for _ in colors]
    predicted = [other for colors in shown.values() for other in colors]
    predicted[4] = -1
    return targets, predicted


def check_report(folder, targets, predicted):
    content = json.loads((folder / "report.json").read_text())
    expected = classification_report(targets, predicted, labels=range(12), output_dict=True, zero_division=0)
    for number, row in enumerate(content["classes"]):
        row_of = expected[str(number)]
        assert row["class"] == NAMES[number]
        found = [row[name] for name in ("precision", "recall", "f1", "images")]
        assert found == pytest.approx([row_of[name] for name in ("precision", "recall", "f1-score", "support")])
    assert content["balanced_accuracy"] == pytest.approx(100 * (3 / 5 + 1 / 2 + 1) / 3)
    rows = list(csv.reader((folder / "confusion.csv").open()))
    assert rows[0][1:4] == NAMES[:3] and rows[0][-1] == "(nothing)"
    assert [row[1:4] + row[-1:] for row in rows[1:4]] == [list("3101"), list("0110"), list("0010")]
    assert list(csv.DictReader((folder / "classes.csv").open()))[1]["recall"] == "0.5"
    assert f"1  {NAMES[0]} taken for (nothing)" in (folder / "report.txt").read_text()


def test_report(named, evaluate, mistaken, tmp_path):
    opts = ("DATA.MAX_UNREADABLE", 1.0)
    result = evaluate(named, tmp_path / "data", "--report", tmp_path / "report", opts=opts)
    with pytest.warns(UserWarning, match="not in y_true"):
        assert result["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(*mistaken))
    check_report(tmp_path / "report", *mistaken)
    (tmp_path / "r.csv").write_text("mine")
    evaluate(named, tmp_path / "data", "--report", tmp_path / "r.csv", opts=opts)
    assert (tmp_path / "r_old1.csv").read_text() == "mine"
    assert (tmp_path / "r.csv").read_text() == (tmp_path / "report/classes.csv").read_text()
    assert "accepted: a folder, or a file named" in evaluate(named, tmp_path, "--report", "a.xlsx")


@pytest.mark.slow
def test_report_of_three_processes(named, mistaken, tmp_path):
    command = ("main_eval.py", "--cfg", CONFIG, "--resume", named, "--data-path", tmp_path / "data", "--device", "cpu")
    command += ("--report", tmp_path / "report", "--opts", *TINY, "DATA.MAX_UNREADABLE", 1.0)
    for process in start_processes(3, *command):
        assert process.wait() == 0, process.stderr
    check_report(tmp_path / "report", *mistaken)
