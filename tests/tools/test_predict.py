"""Predictions: as the evaluation's, whatever the batches, in three formats; and what is done about bad files."""

import csv
import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import predict
import pytest
import torch

from config import leaves, load_config
from data import build_eval_loader, build_sources
from engine.evaluate import evaluate
from engine.trained import Trained
from models import build_model
from runtime.distributed import World
from tests.helpers import ROOT, TINY, python, run_tool, trained_model

NAMES = ["zero", "one, or I", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of an untrained model for the digits, its classifier enlarged so that it has opinions."""
    config, _ = load_config(ROOT / "configs/strip_mlp_pico_digits.yaml", [*TINY, "MODEL.NUM_CLASSES", "10"])
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.normal_(model.head.fc.weight)
    path = tmp_path_factory.mktemp("run") / "best.pth"
    torch.save({"model": model.state_dict(), "config": leaves(config), "classes": NAMES}, path)
    return path


@pytest.fixture(scope="module")
def trained(checkpoint) -> Trained:
    return trained_model(checkpoint, "--device", "cpu")


@pytest.fixture(scope="module")
def digits(trained):
    """The loader with which they are evaluated."""
    world = World(0, 0, 1, torch.device("cpu"))
    return build_eval_loader(trained.config, build_sources(trained.config, world, train=False).val, world)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory) -> Path:
    """The same images as PNG, in two folders."""
    root = tmp_path_factory.mktemp("digits")
    for half in ("a", "b"):
        (root / half).mkdir()
    source = digits.dataset.source
    for index in range(len(source)):
        source.load(index).save(root / ("a" if index < 100 else "b") / f"{index:03d}.png")
    return root


def run(monkeypatch, capsys, *arguments, stdin: bytes = b"") -> SimpleNamespace:
    """The tool, without another process."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
    return run_tool(monkeypatch, capsys, predict, *arguments)


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_same_as_evaluation(trained, checkpoint, digits, folder):
    result = python("tools/predict.py", checkpoint, folder, "--format", "json", "--workers", "1")
    found = objects(result.stdout)
    assert "cannot be read" not in result.stderr  # older versions of timm may warn there
    assert [Path(item["file"]).name for item in found] == [f"{i:03d}.png" for i in range(360)]
    with torch.inference_mode():
        logits = torch.cat([trained.model(trained.normalize(batch.image)) for batch in digits])
    expected = logits.softmax(dim=1).sort(dim=1, descending=True)
    for item, values, labels in zip(found, expected.values, expected.indices.tolist(), strict=True):
        top = item["predictions"]
        assert [entry["index"] for entry in top] == labels[:5]
        assert [entry["class"] for entry in top] == [NAMES[label] for label in labels[:5]]
        assert [entry["probability"] for entry in top] == pytest.approx(values[:5].tolist(), abs=2e-6)
    assert len({item["predictions"][0]["index"] for item in found}) > 2

    measured, _ = evaluate(
        trained.config, trained.model, digits, World(0, 0, 1, torch.device("cpu")), logging.getLogger()
    )
    hits = [item["predictions"][0]["index"] == t for item, t in zip(found, digits.dataset.source.targets, strict=True)]
    assert 100 * np.mean(hits) == pytest.approx(measured["top1"])


def test_engine(monkeypatch, capsys, checkpoint, folder):
    options = ["--format", "json", "--top-k", 1, "--batch-size", 7]
    plain = run(monkeypatch, capsys, checkpoint, folder / "a", *options, "--engine", "torch")
    other = run(monkeypatch, capsys, checkpoint, folder / "a", *options, "--engine", "reparameterized")
    assert "note: engine: reparameterized, logits within " in other.err and "engine" not in plain.err
    for found, expected in zip(objects(other.out), objects(plain.out), strict=True):
        (a,), (b,) = found["predictions"], expected["predictions"]
        assert (found["file"], a["index"]) == (expected["file"], b["index"])
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)


def test_formats_agree(monkeypatch, capsys, checkpoint, folder, tmp_path):
    images = [folder / "a/003.png", folder / "b/101.png"]
    output = tmp_path / "out"
    options = ["--top-k", 3, "--output", output]
    texts = {}
    for form in ("text", "json", "csv"):
        output.write_text("an older, much longer text\n" * 100)
        assert run(monkeypatch, capsys, checkpoint, *images, "--format", form, *options).out == ""
        texts[form] = output.read_text()
    expected = [
        (item["file"], rank, entry["class"], entry["index"], entry["probability"])
        for item in objects(texts["json"])
        for rank, entry in enumerate(item["predictions"], 1)
    ]
    assert len(expected) == 6
    assert [row[0] for row in expected[::3]] == list(map(str, images))
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert list(rows[0]) == ["file", "rank", "class", "index", "probability"]
    kinds = (str, int, str, int, float)
    assert [tuple(kind(cell) for kind, cell in zip(kinds, row.values(), strict=True)) for row in rows] == expected
    lines = [line.split("\t") for line in texts["text"].splitlines()]
    assert [line[0] for line in lines] == list(map(str, images))
    cells = [cell for line in lines for cell in line[1:]]
    assert cells == [f"{name} {value:.4f}" for _, _, name, _, value in expected]


@pytest.mark.parametrize("form", ["text", "json", "csv"])
def test_unreadable_files_do_not_stop_the_others(monkeypatch, capsys, checkpoint, folder, tmp_path, form):
    bad, good = tmp_path / "bad.png", folder / "a/000.png"
    bad.write_text("no image")
    missing = tmp_path / "missing.png"
    options = ["--format", form, "--batch-size", 1, "--top-k", 1]
    result = run(monkeypatch, capsys, checkpoint, bad, good, *options, missing)
    assert result.status == 1
    assert f"cannot be read as an image: {bad}: no image of a known format" in result.err
    assert f"cannot be read as an image: {missing}: No such file or directory" in result.err
    assert result.err.splitlines()[-1] == "error: 2 of 3 files cannot be read as images"
    if form == "json":
        first, second, third = objects(result.out)
        assert (first["file"], second["file"], third["file"]) == (str(bad), str(good), str(missing))
        assert str(bad) in first["error"] and "predictions" not in first
        assert len(second["predictions"]) == 1 and "error" not in second
        assert "error" in third
    else:
        assert str(good) in result.out
        assert str(bad) not in result.out and str(missing) not in result.out


def test_list_on_standard_input(monkeypatch, capsys, checkpoint, folder):
    images = [folder / "b/200.png", folder / "a/001.png"]
    listing = "\r\n".join(map(str, [images[1], "", folder / "a"])).encode()
    result = run(monkeypatch, capsys, checkpoint, images[0], "-", "--format", "json", stdin=listing)
    assert result.status == 0
    expected = [*images, *sorted((folder / "a").iterdir())]
    assert [item["file"] for item in objects(result.out)] == list(map(str, expected))


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "message"),
    [
        (["-"], b"", 1, "standard input is empty"),
        (["-"], b"\x89PNG\0\0", 1, "standard input is no text; accepted: paths of images, one per line"),
        (["{empty}"], b"", 1, "no images in this folder; accepted: .jpg"),
        (["{image}", "--output", "{empty}"], b"", 1, "--output {empty}: cannot be written"),
        (["{image}", "--output", "{empty}/missing/a"], b"", 1, "{empty}/missing/a: cannot be written"),
        (["{image}", "--top-k", "0"], b"", 2, "'0'; accepted: a whole number of 1 or more"),
        (["{image}", "--batch-size", "-3"], b"", 2, "'-3'; accepted: a whole number of 1 or more"),
        (["{image}", "--workers", "many"], b"", 2, "'many'; accepted: a whole number of 0 or more"),
        (["{image}", "--engine", "tensorrt"], b"", 2, "'tensorrt'; accepted: auto, torch, reparameterized, compile, "),
        (["{image}", "--engine", "a.onnx", "--opts", "AMP", "bfloat16"], b"", 1, "but AMP gives bfloat16"),
        (["{image}", "--format", "xml"], b"", 2, "invalid choice: 'xml'"),
        ([], b"", 2, "the following arguments are required: images"),
    ],
)
def test_bad_input(monkeypatch, capsys, checkpoint, folder, tmp_path, arguments, stdin, status, message):
    names = {"empty": tmp_path, "image": folder / "a/000.png"}
    result = run(monkeypatch, capsys, checkpoint, *(a.format(**names) for a in arguments), stdin=stdin)
    assert result.status == status
    assert message.format(**names) in result.err
    assert result.out == ""
