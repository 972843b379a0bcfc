"""The ablation command, from config files to a table, with runs that fail, are stopped, or need not be."""

import csv
import json
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import ablate
import numpy as np
import pytest
from ablate import base_of, find_configs, load_settings, options_of, problems, report, to_train
from compare_runs import read_run
from paired import compare, read_results

from config import load_config, save_config
from runtime.per_image import CORRECT, save_correct
from tests.helpers import ROOT, Run, python
from utils import UserError

pytestmark = pytest.mark.slow

BASE = """
DATA: {IMG_SIZE: 32, BATCH_SIZE: 8, NUM_WORKERS: 0}
MODEL:
  NAME: small
  STRIP_MLP: {EMBED_DIM: 8, LAYERS: [1, 1, 1, 1]}
TRAIN: {EPOCHS: 2, WARMUP_EPOCHS: 1}
AUG: {AUTO_AUGMENT: none}
"""


def setting(line: str = "") -> str:
    return f"BASE: ../base.yaml\nMODEL: {{STRIP_MLP: {{{line}}}}}\n" if line else "BASE: ../base.yaml\n"


@pytest.fixture
def configs(tmp_path):
    """base.yaml, and in settings/ what is given by name."""

    def write(**files: str) -> Path:
        (tmp_path / "settings").mkdir()
        (tmp_path / "base.yaml").write_text(BASE)
        for name, text in files.items():
            (tmp_path / "settings" / f"{name}.yaml").write_text(text)
        return tmp_path / "settings"

    return write


def arguments(*configs, **kwargs) -> Namespace:
    """A parsed command line."""
    defaults = {
        "base": None,
        "seeds": [0],
        "folds": None,
        "epochs": None,
        "data_path": None,
        "processes": 1,
        "opts": [],
    }
    defaults |= {"output": Path("out"), "configs": [str(path) for path in configs]}
    return Namespace(**{**defaults, **kwargs})


def write_run(setting, seed, top1, output, *opts, epochs=2, correct=None):
    """The folder of a run that main.py has trained; `correct`: which images it classifies correctly."""
    config, _ = load_config(setting.path, [*opts, "OUTPUT", str(output), "SEED", str(seed)])
    folder = Path(output) / config.MODEL.NAME / ablate.tag(setting, seed)
    folder.mkdir(parents=True)
    save_config(config, folder)
    numbers = {"train_loss": 1.0, "lr": 1e-3, "val_loss": 0.5, "images_per_second": 100.0, "seconds": 2.0}
    lines = [{"epoch": epoch, **numbers, "top1": top1, "top5": 100.0} for epoch in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if correct is not None:
        save_correct(folder / CORRECT, correct, epochs)


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path) as file:
        return {row["setting"]: row for row in csv.DictReader(file)}


# From the command line, with real training


def test_from_configs_to_a_table(configs, image_folder, tmp_path):
    folder = configs(
        wide=setting("STRIP_WIDTH: 5"),
        same=setting(),
        idle=setting("PATCH_CHANNELS: 4"),  # which 0, the default, stands for at this width
        unknown=setting("BRANCHES: neither"),
        unbuildable=setting("PATCH_CHANNELS: 3"),
    )
    output = tmp_path / "out"
    command = ("tools/ablate.py", folder, "--data-path", image_folder, "--seeds", "0", "--output", output)
    result = python(*command, ok=False)
    assert result.returncode == 1
    assert "3 runs to train, 0 finished before" in result.stdout
    assert "idle: MODEL.STRIP_MLP.PATCH_CHANNELS 4 changes nothing in the model; not trained" in result.stderr
    assert "unbuildable seed 0: FAILED: status 1: the model of the config cannot be built" in result.stdout
    assert "BRANCHES is 'neither'; accepted: both, cgsmm, lsmm" in result.stderr

    rows = rows_of(output / "ablation.csv")
    assert list(rows) == ["base", "idle", "same", "unbuildable", "unknown", "wide"]
    assert {name: row["seeds"] for name, row in rows.items() if row["seeds"] == "1"}.keys() == {
        *("base", "idle", "same", "wide")
    }
    metrics = [json.loads(line) for line in (output / "small/wide_seed0/metrics.jsonl").read_text().splitlines()]
    assert float(rows["wide"]["top1"]) == metrics[-1]["top1"]
    assert float(rows["wide"]["delta_to_base"]) == metrics[-1]["top1"] - float(rows["base"]["top1"])
    assert rows["same"]["top1"] == rows["idle"]["top1"] == rows["base"]["top1"]
    assert rows["unbuildable"]["top1"] == rows["unknown"]["top1"] == ""
    assert int(rows["wide"]["parameters"]) > int(rows["base"]["parameters"]) > 0
    assert float(rows["wide"]["images_per_second"]) > 0
    assert "unknown: FAILED" in (output / "ablation.md").read_text()
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    for name, by_seed in read_results(output / "correct.npz").items():
        assert 100 * by_seed[0].sum() / len(by_seed[0]) == float(rows[name]["top1"])
    assert rows["wide"]["verdict"] in ("better", "worse", "undecided") and rows["same"]["verdict"] == ""
    with open(output / "runs.csv") as file:
        runs = {row["setting"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in runs.items()} == {
        **{"base": "finished", "wide": "finished"},
        **{"unbuildable": "failed", "unknown": "failed"},
    }
    assert "cannot be built" in runs["unbuildable"]["remark"]
    assert rows["unbuildable"]["status"] == "0 of 1, 1 failed"
    assert "imagenet, 32 x 32 pixels, 2 epochs" in (output / "ablation.md").read_text()

    # Finished runs are left alone.
    before = {path: path.stat().st_mtime_ns for path in (output / "small").rglob("*.pth")}
    again = python(*command, "--print", ok=False)  # unknown.yaml is not among them
    lines = again.stdout.splitlines()
    assert len(lines) == 1
    assert "unbuildable.yaml" in lines[0]
    again = python(*command[:1], *[folder / f"{name}.yaml" for name in ("wide", "same")], *command[2:])
    assert "0 runs to train, 2 finished before" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (output / "small").rglob("*.pth")} == before


def test_stopped_and_continued(configs, image_folder, tmp_path):
    folder = configs(wide=setting("STRIP_WIDTH: 5"))
    output = tmp_path / "out"
    command = ["tools/ablate.py", folder, "--data-path", image_folder, "--seeds", "0", "--output", output]
    command += ["--epochs", "20"]
    process = Run(*command)
    metrics = output / "small/base_seed0/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.running
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill(signal.SIGINT, group=True)  # as Ctrl-C does
    assert process.wait(60) == 75, process.stdout
    assert "stopped; the same command goes on" in process.stdout
    done = read_run(metrics.parent).epochs
    assert 3 <= done < 20
    assert not (output / "small/wide_seed0").exists()
    assert f"base seed 0: stopped after {done} of 20 epochs" in (output / "ablation.md").read_text()

    result = python(*command)
    assert f"base seed 0, goes on after {done} epochs" in result.stdout
    assert "resumed from" in (metrics.parent / "log_rank0.txt").read_text()
    assert read_run(metrics.parent).finished
    assert read_run(output / "small/wide_seed0").epochs == 20


# Which runs there are


def test_configs_of_paths_folders_and_globs(configs):
    folder = configs(b=setting(), a=setting(), c=setting())
    names = [path.stem for path in find_configs([str(folder / "c.yaml"), str(folder / "[ab]*"), str(folder)])]
    assert names == ["c", "a", "b"]
    for nothing in ("missing.yaml", str(folder / "z*.yaml")):
        with pytest.raises(UserError, match="no config there"):
            find_configs([nothing])


def test_base(configs):
    folder = configs(a=setting())
    assert base_of(folder / "a.yaml").resolve() == (folder / "../base.yaml").resolve()
    assert base_of(folder / "../base.yaml") is None
    # A name may come from further down.
    (folder / "b.yaml").write_text("BASE: a.yaml\n")
    assert base_of(folder / "b.yaml").name == "a.yaml"
    # What gives the model no name is a fragment, and no run.
    assert base_of(ROOT / "configs/smlp_tiny_alpha3_patch4_224_cifar10.yaml") is None
    for path in (ROOT / "configs/peers").glob("*.yaml"):
        assert base_of(path).name == "smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"


def test_name_on_the_command_line_makes_no_base_of_a_fragment(configs, tmp_path):
    folder = configs(a="BASE: ../fragment.yaml\nMODEL: {NAME: small}\n")
    (tmp_path / "fragment.yaml").write_text("TRAIN: {EPOCHS: 2}\n")
    assert base_of(folder / "a.yaml", ["MODEL.NAME", "other", "TRAIN.EPOCHS", "30"]) is None


def test_bases_of_bases(configs):
    """A base is trained before what is compared with it, whatever the order on the command line."""
    folder = configs(a=setting("STRIP_WIDTH: 5"), c="BASE: a.yaml\nTRAIN: {OPTIMIZER: {NAME: sgd}}\n")
    settings = load_settings(arguments(folder / "c.yaml", folder / "a.yaml"))
    assert [(s.name, s.base and s.base.name) for s in settings] == [("base", None), ("a", "base"), ("c", "a")]
    assert [s.name for s, _ in to_train(settings, [0])] == ["base", "a", "c"]
    assert "TRAIN.OPTIMIZER.NAME sgd" in report(settings, [0])["ablation.md"]


def test_two_settings_in_one_folder(configs, tmp_path):
    folder = configs(a=setting("STRIP_WIDTH: 5"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.yaml").write_text(setting("STRIP_WIDTH: 7"))
    with pytest.raises(UserError, match=r"settings/a.yaml and .*other/a.yaml would share"):
        load_settings(arguments(folder, tmp_path / "other"))


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("", "as the base"),
        ("PATCH_CHANNELS: 4", "changes nothing in the model"),
        ("CGSMM_STRUCTURE: parallel", ""),  # as many parameters, other outputs
        ("POSITION_TABLES: False", ""),
        ("STRIP_WIDTH: 5", ""),
    ],
)
def test_settings_that_change_nothing(configs, line, same):
    base, changed = load_settings(arguments(configs(a=setting(line))))
    assert base.same_as_base == ""
    assert changed.same_as_base == same
    assert [s.name for s, _ in to_train([base, changed], [0])] == (["base"] if same else ["base", "a"])


def test_epochs_shorten_the_warm_up():
    config = ROOT / "configs/smlp_tiny_alpha3_patch4_224_cifar10.yaml"
    assert options_of(arguments(epochs=30), config) == ["TRAIN.EPOCHS", "30", "TRAIN.WARMUP_EPOCHS", "2"]
    assert options_of(arguments(epochs=1), config) == ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    opts = ["TRAIN.WARMUP_EPOCHS", "5"]
    assert options_of(arguments(epochs=30, opts=opts), config) == ["TRAIN.EPOCHS", "30", *opts]


def test_commands_for_a_scheduler(configs, monkeypatch, capsys, tmp_path):
    folder = configs(a=setting("STRIP_WIDTH: 5"), broken=setting("STRIP_WIDTH: 4"))
    words = ["--data-path", "my data", "--seeds", "3", "3", "4", "--processes", "8", "--opts", "AMP", "off"]
    monkeypatch.setattr(
        sys, "argv", ["ablate.py", str(folder / "a.yaml"), str(folder / "broken.yaml"), "--print", *words]
    )
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    assert ended.value.code == 1  # one is missing
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 4
    assert lines[1] == (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 8 main.py --cfg {folder}/a.yaml "
        "--output output/ablation/settings --tag a_seed3 --data-path 'my data' --opts AMP off SEED 3"
    )
    assert [line.split()[-1] for line in lines] == ["3", "3", "4", "4"]
    assert "broken: FAILED" in printed.err
    assert "accepted: 1, 3, 5, 7, ..." in printed.err
    assert "accepted: 1, 3, 5, 7, ..." in printed.err


# What is there already


def test_report(configs, tmp_path):
    settings = load_settings(arguments(configs(a=setting("STRIP_WIDTH: 5")), output=tmp_path / "out"))
    base, a = settings
    for seed, top1 in enumerate((90.0, 92.0, 94.0)):
        write_run(base, seed, top1, tmp_path / "out")
    for seed, top1 in enumerate((80.0, 84.0)):
        write_run(a, seed, top1, tmp_path / "out")
    write_run(a, 2, 10.0, tmp_path / "out", epochs=1)
    for s in settings:
        for seed in range(3):
            ablate.look(s, seed)
    files = report(settings, range(3))
    row = next(csv.DictReader(files["ablation.csv"].splitlines()))
    assert (float(row["top1"]), float(row["top1_std"])) == (92.0, 2.0)
    assert "90.00" not in files["ablation.md"]
    assert "92.00 ± 2.00" in files["ablation.md"]
    assert "| 2 of 3 | 82.00 ± 2.83 | -10.00 " in files["ablation.md"]
    assert problems(settings, range(3)) == ["a seed 2: stopped after 1 of 2 epochs"]
    assert row["verdict"] == "" and "have no correct.npz" in files["ablation.md"]
    (panel,) = files["ablation.png"].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["base", "a"]
    assert panel.get_title().endswith("imagenet, 32 x 32 pixels, 2 epochs, batch size 8")
    bar = panel.containers[1]
    assert bar.lines[0].get_xdata().tolist() == [82.0]
    left, right = (cap.get_xdata()[0] for cap in bar.lines[1])
    assert (right - left) / 2 == pytest.approx(8**0.5)


def right(count: int, images: int = 200, first: int = 0) -> np.ndarray:
    """`count` of the images, from `first` on."""
    return np.isin(np.arange(images), np.arange(first, first + count))


def test_settings_are_tested_against_their_base(configs, tmp_path):
    """From the runs' folders, and again from the one file beside the table."""
    lines = {"worse": "STRIP_WIDTH: 5", "undecided": "STRIP_WIDTH: 7", "images": "GRN: False", "same": ""}
    lines |= {"older": "POSITION_TABLES: False", "damaged": "BRANCHES: lsmm", "once": "BRANCHES: cgsmm"}
    folder = configs(**{name: setting(line) for name, line in lines.items()})
    settings = load_settings(arguments(folder, output=tmp_path / "out"))
    by_name = {s.name: s for s in settings}
    for seed in range(5):
        bits = {"base": right(150 + seed % 2), "worse": right(100 + seed), "undecided": right(150 + seed, first=1)}
        bits |= {"images": right(90, 100), "older": None, "damaged": right(150)}
        bits |= {"once": right(100)} if seed == 3 else {}
        for name, correct in bits.items():
            top1 = 50.0 if correct is None else 100 * correct.mean()
            write_run(by_name[name], seed, top1, tmp_path / "out", correct=correct)
            ablate.look(by_name[name], seed)
    for run in by_name["damaged"].runs.values():
        (run.path / CORRECT).write_bytes(b"PK\3\4")
    files = report(settings, range(5))
    rows = {row["setting"]: row for row in csv.DictReader(files["ablation.csv"].splitlines())}
    columns = ("difference", "ci_low", "ci_high", "p", "p_holm", "verdict")
    assert {name for name, row in rows.items() if any(row[c] for c in columns)} == {"worse", "undecided", "once"}
    for name in ("worse", "undecided", "once"):
        row = rows[name]
        assert row["verdict"] == (name if name != "once" else "undecided")
        assert float(row["ci_low"]) < float(row["difference"]) < float(row["ci_high"])
        assert (row["p_holm"] == "") == (name == "once") and 0 < float(row["p"]) <= 1
    assert float(rows["worse"]["p_holm"]) == 2 * float(rows["worse"]["p"])  # the smallest of two
    assert float(rows["worse"]["difference"]) == pytest.approx(float(rows["worse"]["delta_to_base"]))
    assert float(rows["once"]["difference"]) == -25.5  # to the base's run with the same seed

    text = files["ablation.md"]
    assert "| worse     |" in text and "older_seed0, older_seed1" in text
    assert "images: no test: its runs were evaluated on 100 images, the base's on 200" in text
    assert "damaged_seed0/correct.npz: not a run's correct.npz, or damaged" in text
    assert "cover other images but not other seeds, so there is no verdict: once." in text

    tops, differences = files["ablation.png"].axes
    assert [label.get_text() for label in tops.get_yticklabels()] == [s.name for s in settings]
    drawn = {
        container.lines[0].get_ydata()[0]: container.lines[0].get_xdata()[0] for container in differences.containers
    }
    positions = {
        settings.index(by_name[name]): float(rows[name]["difference"]) for name in ("worse", "undecided", "once")
    }
    assert drawn == pytest.approx(positions)

    (tmp_path / CORRECT).write_bytes(report(settings, range(5))[CORRECT])
    found = read_results(tmp_path / CORRECT)
    assert found.keys() == {"base", "worse", "undecided", "once", "images"} and list(found["once"]) == [3]
    assert compare(found["worse"], found["base"]).p == float(rows["worse"]["p"])


def test_cross_validation(configs, tmp_path):
    """Folds take the place of seeds: in the commands, the folders and the table, which has no test."""
    folder = configs(a=setting(), b=setting("STRIP_WIDTH: 5"))
    args = arguments(folder, folds=3, seeds=[0, 1, 2], output=tmp_path / "out")
    settings = load_settings(args)
    for chosen in settings:
        if chosen.same_as_base:
            continue
        for fold in args.seeds:
            opts = ["DATA.FOLDS", "3", "DATA.FOLD", str(fold)]
            write_run(chosen, fold, 50.0 + fold, args.output, *opts, correct=np.arange(4 + fold) < 2)
            ablate.look(chosen, fold, 1)
    words = ablate.command(settings[0], 2, args)
    assert words[words.index("--tag") + 1].endswith("_fold2")
    assert words[-4:] == ["DATA.FOLDS", "3", "DATA.FOLD", "2"]
    assert not problems(settings, args.seeds)
    files = report(settings, args.seeds)
    assert "3 of 3" in files["ablation.md"] and "| folds " in files["ablation.md"]
    assert "over the folds" in files["ablation.md"] and "undecided" not in files["ablation.md"]
    assert "51.00 ± 1.00" in files["ablation.md"]
    assert files["runs.csv"].startswith("setting,fold,")


def test_results_on_other_images_are_not_compared(configs, tmp_path):
    """Though they are as many."""
    folder = configs(a="BASE: ../base.yaml\nDATA: {VAL_SEED: 1}\n")
    base, a = load_settings(arguments(folder, output=tmp_path / "out"))
    for s, options in ((base, ()), (a, ("DATA.VAL_SEED", "1"))):
        write_run(s, 0, 50.0, tmp_path / "out", *options, correct=right(100))
        ablate.look(s, 0)
    files = report([base, a], [0])
    assert "a: no test: its DATA.VAL_SEED is 1, the base's 0" in files["ablation.md"] and a.comparison is None


def test_results_of_another_epoch_are_not_used(configs, tmp_path):
    base, a = load_settings(arguments(configs(a=setting("STRIP_WIDTH: 5")), output=tmp_path / "out"))
    for s, bits in ((base, right(150)), (a, right(100))):
        write_run(s, 0, 50.0, tmp_path / "out", correct=bits)
        ablate.look(s, 0)
    save_correct(a.runs[0].path / CORRECT, right(100), 1)
    files = report([base, a], [0])
    assert "is of epoch 1, not 2" in files["ablation.md"] and a.comparison is None
    assert len(files["ablation.png"].axes) == 1


def test_folder_of_other_images_or_processes(configs, tmp_path):
    images = {"data_path": str(tmp_path / "images"), "output": tmp_path / "out"}
    (base,) = load_settings(arguments(configs() / "../base.yaml", **images))
    write_run(base, 0, 90.0, tmp_path / "out", "DATA.DATA_PATH", str(tmp_path / "images"))
    write_run(base, 1, 90.0, tmp_path / "out", "DATA.DATA_PATH", "others")
    ablate.look(base, 0, processes=1)
    assert base.runs[0].finished
    with pytest.raises(UserError, match=r"holds a run with DATA.DATA_PATH"):
        ablate.look(base, 1, processes=1)

    metrics = base.runs[0].path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"top5"', '"processes": 8, "top5"'))
    ablate.look(base, 0)  # to tabulate, nobody need say how many there were
    assert base.runs[0].finished
    with pytest.raises(UserError, match=r"holds a run with processes 8, not 1"):
        ablate.look(base, 0, processes=1)


def test_model_that_cannot_run(tmp_path, monkeypatch):
    """Is no obstacle to the others."""
    for name in ("crossvit_9_240", "no_such_model"):
        text = f"BASE: {ROOT}/configs/peers/resnet50.yaml\nMODEL: {{NAME: {name}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    settings = load_settings(arguments(tmp_path))
    assert [s.name for s in settings] == ["resnet50", "crossvit_9_240", "no_such_model"]
    assert [s.size is None for s in settings] == [False, True, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opts", "SEED", "3"], "--opts SEED: chosen by this command"),
        (["--opts", "AMP"], "--opts takes pairs"),
        (["--epochs", "0"], "--epochs 0: accepted: 1 or more"),
        (["--seeds", "-1"], "--seeds -1: accepted: 0 or more"),
        (["--processes", "0"], "--processes 0: accepted: 1 or more"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "configs/ablations/digits", *words])
    with pytest.raises(SystemExit) as ended:
        ablate.parse_args()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# The files in configs/


@pytest.mark.parametrize("name", ["caltech101", "cifar100", "digits", "fashion_mnist"])
def test_ablations_of_the_paper(name, monkeypatch):
    if name in ("caltech101", "cifar100"):  # where building every model takes long
        monkeypatch.setattr(ablate, "model_size", lambda config: None)
    settings = load_settings(arguments(ROOT / "configs/ablations" / name))
    base = settings[0]
    assert base.base is None
    assert all(s.base is base and not s.problem for s in settings[1:])
    changed = {s.name: {key.rpartition(".")[2]: value for key, value in s.changes.items()} for s in settings[1:]}
    assert [changed.pop(f"table6_strip_width_{m}") for m in (1, 3, 5, 7)] == [
        {"STRIP_WIDTH": m} if m != 3 else {} for m in (1, 3, 5, 7)
    ]
    released = base.values["MODEL.STRIP_MLP.PATCH_CHANNELS"]
    patches = {1, 2, 4, 8 if name in ("caltech101", "cifar100") else 6}
    for q in patches:
        assert changed.pop(f"table7_patch_channels_{q}") == ({"PATCH_CHANNELS": q} if q != released else {})
    assert changed == {
        "table7_one_patch": {"PATCH_CHANNELS": -1},
        "table8_cascade": {},
        "table8_parallel": {"CGSMM_STRUCTURE": "parallel"},
        "table9_both": {},
        "table9_cgsmm": {"BRANCHES": "cgsmm"},
        "table9_lsmm": {"BRANCHES": "lsmm"},
        "without_grn": {"GRN": False},
        "without_position_tables": {"POSITION_TABLES": False},
        "without_shortcuts": {"MULTI_SCALE_SHORTCUTS": False},
    }
    for s in settings[1:]:
        assert bool(s.same_as_base) == (not s.changes)
        assert s.values["TAG"] == s.name  # so that main.py alone, too, keeps them apart


def test_peers_differ_in_the_model_alone(monkeypatch):
    monkeypatch.setattr(ablate, "model_size", lambda config: None)
    settings = load_settings(arguments(ROOT / "configs/peers"))
    assert len(settings) == 31
    for s in settings[1:]:
        assert set(s.changes) == {"MODEL.TYPE", "MODEL.NAME"}
        assert not s.problem
    resnet = str(ROOT / "configs/peers/resnet50.yaml")
    (base, other) = load_settings(arguments(ROOT / "configs/peers/resnet101.yaml", base=resnet))
    assert base.changes == {}
    assert other.changes == {"MODEL.NAME": "resnet101"}
