"""Reading run folders, and what is drawn and tabulated of them."""

import csv
import json

import pytest
from compare_runs import as_models, differences, draw_accuracy, find_runs, table

from config import load_config, save_config
from tests.helpers import ROOT, python
from utils import UserError

DIGITS = ROOT / "configs/strip_mlp_pico_digits.yaml"


@pytest.fixture
def run_folder(tmp_path):
    """Writes a run's folder, NAME/TAG, with one line of metrics per accuracy given."""

    def write(tag, accuracies, *opts, cfg=DIGITS, finished=True):
        options = ["TRAIN.EPOCHS", str(len(accuracies) if accuracies and finished else 10), "TRAIN.WARMUP_EPOCHS", "0"]
        config, _ = load_config(cfg, [*options, "OUTPUT", str(tmp_path), "TAG", tag, *opts])
        folder = tmp_path / config.MODEL.NAME / tag
        folder.mkdir(parents=True)
        save_config(config, folder)
        lines = [
            {
                **{"epoch": epoch, "train_loss": 2.0 / epoch, "lr": 1e-3, "val_loss": 1.0 / epoch},
                **{"top1": top1, "top5": 99.0, "images_per_second": 100.0 * epoch, "seconds": 1.5},
            }
            for epoch, top1 in enumerate(accuracies, start=1)
        ]
        if lines:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def rows_of(text):
    return {row["model"]: row for row in csv.DictReader(text.splitlines())}


def test_seeds_are_one_model(run_folder, tmp_path):
    run_folder("default_seed0", [50.0, 90.0, 80.0], "SEED", "0")
    run_folder("default_seed1", [50.0, 60.0, 70.0], "SEED", "1")
    run_folder("wide_seed0", [50.0, 60.0, 61.0], "MODEL.STRIP_MLP.STRIP_WIDTH", "5")
    runs = find_runs([tmp_path])
    models = as_models(runs)
    assert [(model.name, len(model.runs)) for model in models] == [("strip_mlp_pico_digits", 2), ("wide", 1)]
    text, numbers = table(models, runs)
    rows = rows_of(numbers)
    both = rows["strip_mlp_pico_digits"]
    assert (float(both["top1"]), float(both["best"])) == (75.0, 80.0)
    assert float(both["top1_std"]) == pytest.approx(50**0.5)  # of a sample: sqrt(((80 - 75)^2 + (70 - 75)^2) / 1)
    assert (both["runs"], both["epochs"], both["images_per_second"]) == ("2", "3", "200.0")
    assert (both["parameters"], both["macs"]) == ("707608", "2296992")
    assert float(both["minutes"]) == pytest.approx(3 * 1.5 / 60)
    assert models[0].runs[0].course == [(0.025, 50.0), (0.05, 90.0), (pytest.approx(0.075), 80.0)]
    assert rows["wide"]["top1_std"] == ""
    assert rows["wide"]["parameters"] == "710872"
    assert "75.00 ± 7.07" in text

    changed, changed_csv = differences(models)
    assert rows_of(changed_csv)["wide"] == {"model": "wide", "MODEL.STRIP_MLP.STRIP_WIDTH": "5"}
    assert changed.count("\n") == 4


def test_run_without_metrics_is_listed(run_folder, tmp_path):
    run_folder("good", [90.0])
    empty = run_folder("empty", [])
    unfinished = run_folder("unfinished", [20.0, 30.0], finished=False)
    damaged = run_folder("damaged", [20.0])
    (damaged / "metrics.jsonl").write_text('{"epoch": 1, "tra')
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metrics.jsonl").write_text("")
    runs = find_runs([tmp_path])
    text, numbers = table(as_models(runs), runs)
    assert len(runs) == len(rows_of(numbers)) == 5
    remarks = {name: row["remark"] for name, row in rows_of(numbers).items()}
    assert remarks["good"] == ""
    assert f"{empty}: no metrics.jsonl" in remarks["empty"]
    assert f"{unfinished}: 2 of 10 epochs" in remarks["unfinished"]
    assert "metrics.jsonl, line 1: not JSON" in remarks["damaged"]
    assert "cannot be read" in remarks[str(foreign)]
    assert all(remark in text for remark in remarks.values())


def test_unfinished_runs_do_not_count(run_folder, tmp_path):
    run_folder("a_seed0", [50.0] * 10)
    run_folder("a_seed1", [10.0], "SEED", "1", finished=False)
    (model,) = as_models(find_runs([tmp_path]))
    assert len(model.runs) == 2
    assert model.statistics("last") == (50.0, None)


def test_values_of_another_kind_of_model_do_not_count(run_folder, tmp_path):
    resnet = ROOT / "configs/peers/resnet50.yaml"
    run_folder("a_seed0", [50.0], cfg=resnet)
    run_folder("a_seed1", [50.0], "SEED", "1", "MODEL.STRIP_MLP.STRIP_WIDTH", "5", cfg=resnet)
    models = as_models(find_runs([tmp_path]))
    assert [len(model.runs) for model in models] == [2]
    assert differences(models) is None


def test_small_networks_are_no_family(run_folder, tmp_path):
    for name in ("convnext", "vit"):
        run_folder("default", [50.0, 60.0], cfg=ROOT / f"configs/fashion_mnist/peers/{name}.yaml")
    models = as_models(find_runs([tmp_path]))
    assert [model.family for model in models] == ["convnext", "vit"]
    figure = draw_accuracy(models)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["small_convnext", "small_vit"]
    assert all(not axes.texts for axes in figure.axes)


def test_command(run_folder, tmp_path):
    folders = [run_folder("a", [50.0, 60.0]), run_folder("b", [], "MODEL.STRIP_MLP.GRN", "False")]
    result = python("tools/compare_runs.py", *folders, "--output", tmp_path / "out")
    names = {"accuracy.png", "curves.png", "differences.csv", "differences.md", "runs.csv", "runs.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(f"out/{name}" in result.stdout for name in names)
    for name in ("accuracy.png", "curves.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "60.00" in result.stdout
    assert "no metrics.jsonl" in result.stdout
    assert "MODEL.STRIP_MLP.GRN" in result.stdout


@pytest.mark.parametrize(("make", "message"), [(False, "is not a folder"), (True, "no run")])
def test_no_run(tmp_path, make, message):
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match=message):
        find_runs([folder])
