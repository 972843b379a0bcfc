"""Tests of tools/plot_metrics.py, run as a user runs it; what the figure shows is read from the figure in-process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import load_tool

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot_metrics.py"


tool = load_tool(TOOL)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def epoch_record(epoch: int, /, **changes: object) -> dict[str, object]:
    """Return one epoch's record with all keys that training writes."""
    return {
        "epoch": epoch,
        "train_loss": 5 / epoch,
        "val_loss": 4 / epoch,
        "top1": 90 - 40 / epoch,
        "top5": 99 - 20 / epoch,
        "lr": 1e-3 / epoch,
        "images_per_second": 800.0,
        "memory_mb": 1000.0,
        "seconds": 9.0,
        **changes,
    }


def write_run(folder: Path, records: list[dict[str, object]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def curves(axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each curve in a panel by its name in the legend."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines}


@pytest.mark.parametrize("epochs", [1, 3, 300])
def test_draws_runs_of_any_length(tmp_path, epochs):
    run = write_run(tmp_path / "run", [epoch_record(epoch) for epoch in range(1, epochs + 1)])
    result = run_tool(run)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == str(run / "curves.png")
    height, width = pixels(run / "curves.png").shape
    assert 1200 <= width <= 3000
    assert 400 <= height <= 1200
    assert width > 2 * height
    thirds = np.array_split(pixels(run / "curves.png"), 3, axis=1)
    assert all((third < 200).mean() > 0.005 for third in thirds), "a panel is blank"


def test_panels_hold_the_numbers(tmp_path):
    records = [
        epoch_record(1, train_loss=3.0, val_loss=None, top1=10, top5=30.0, lr=1e-3),
        {"epoch": 2, "train_loss": 2.0, "lr": 2e-3},
        epoch_record(3, train_loss=1.5, val_loss=1.0, top1=70.0, top5=90.0, lr=1e-3),
        epoch_record(4, train_loss=1.2, val_loss=1.1, top1=70.0, top5=91.0, lr=0),
        epoch_record(5, train_loss=None, val_loss=1.2, top1=69.0, top5=90.0, lr=0),
    ]
    metrics = write_run(tmp_path / "run", records) / "metrics.jsonl"
    figure = tool.draw_metrics(tool.read_metrics(metrics), "run")
    loss, accuracy, rate = figure.axes
    assert curves(loss) == {
        "training": [(1, 3), (2, 2), (3, 1.5), (4, 1.2)],
        "validation": [(3, 1), (4, 1.1), (5, 1.2)],
    }
    assert curves(accuracy) == {
        "top-1": [(1, 10), (3, 70), (4, 70), (5, 69)],
        "top-5": [(1, 30), (3, 90), (4, 91), (5, 90)],
        "best top-1": [(3, 70)],
    }
    assert accuracy.get_title() == "Best top-1: 70.00 % (epoch 3)"
    assert curves(rate) == {"learning rate": [(1, 1e-3), (2, 2e-3), (3, 1e-3), (4, 0), (5, 0)]}
    assert [axes.get_xlabel() for axes in figure.axes] == ["Epoch"] * 3
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Cross-entropy (nats)",
        "Validation accuracy (%)",
        "Learning rate",
    ]


def test_run_without_any_evaluation(tmp_path):
    records = [epoch_record(epoch, val_loss=None, top1=None, top5=None) for epoch in (1, 2)]
    run = write_run(tmp_path / "run", records)
    result = run_tool(run)
    assert (result.returncode, result.stderr) == (0, "")
    figure = tool.draw_metrics(tool.read_metrics(run / "metrics.jsonl"), "run")
    assert [text.get_text() for text in figure.axes[1].texts] == ["no epoch was evaluated"]
    assert list(curves(figure.axes[0])) == ["training"]


def test_diverged_run_is_drawn_and_nan_is_not_the_best(tmp_path):
    nan, huge = float("nan"), float("inf")
    records = [epoch_record(1, top1=nan), epoch_record(2, top1=60.0), epoch_record(3, train_loss=huge, top1=nan)]
    run = write_run(tmp_path / "run", records)
    result = run_tool(run)
    assert (result.returncode, result.stderr) == (0, "")
    figure = tool.draw_metrics(tool.read_metrics(run / "metrics.jsonl"), "run")
    assert curves(figure.axes[1])["best top-1"] == [(2, 60)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00garbage", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (json.dumps(epoch_record(1, epoch=None)).encode(), "'epoch' is None"),
        (json.dumps(epoch_record(1, epoch=0)).encode(), "'epoch' is 0"),
        (json.dumps(epoch_record(1, epoch=1.5)).encode(), "'epoch' is 1.5"),
        (json.dumps(epoch_record(1, epoch=True)).encode(), "'epoch' is True"),
        (json.dumps(epoch_record(1, epoch=10**400)).encode(), "'epoch' is inf"),
        (json.dumps(epoch_record(1, train_loss="low")).encode(), "'train_loss' is 'low'"),
        (json.dumps(epoch_record(1, lr=None)).encode(), "'lr' is None"),
        (json.dumps(epoch_record(1, top1=[1])).encode(), "'top1' is [1.0]"),
        (json.dumps(epoch_record(1, val_loss=False)).encode(), "'val_loss' is False"),
    ],
)
def test_each_kind_of_damage_names_file_line_and_value(tmp_path, line, message):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(json.dumps(epoch_record(1)).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="^" + re.escape(f"{metrics}, line 2: {message}")):
        tool.read_metrics(metrics)
