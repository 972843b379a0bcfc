"""Recipes beyond the released one, through main.py without another process: each trains, and resumes exactly."""

import importlib.util

import numpy as np
import pytest
import timm
import torch

import main as training
from tests.helpers import ROOT, TINY, read_metrics, run_tool, torchrun

CONFIG = "configs/strip_mlp_pico_digits.yaml"
RUN = "strip_mlp_pico_digits"


@pytest.fixture
def train(monkeypatch, capsys, tmp_path, image_folder):
    """Trains a tiny model on 16 images; gives the run's folder, or what it says if it is refused."""
    torch.set_num_threads(1)

    def train(tag: str, *opts, resume=None, status: int = 0):
        command = ["--cfg", ROOT / CONFIG, "--device", "cpu", "--output", tmp_path, "--tag", tag]
        command += ["--data-path", image_folder, "--batch-size", 4, *(["--resume", resume] if resume else [])]
        # LOGGERS: the import of TensorBoard takes longer than these runs.
        common = ["DATA.DATASET", "imagenet", "TRAIN.EPOCHS", 3, "SAVE_FREQ", 1, "LOGGERS", "[]", "AUG.HFLIP", 0.5]
        said = run_tool(monkeypatch, capsys, training, *command, "--opts", *TINY, *common, *opts)
        assert said.status == status, said.err
        return said.err if status else tmp_path / RUN / tag

    return train


def content(folder, name: str = "last.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same(a, b) -> None:
    for key in ("model", "model_ema"):
        assert (key in a) == (key in b)
        for name, value in a.get(key, {}).items():
            assert torch.equal(value, b[key][name]), name


RECIPES = {
    "lamb, tanh, bce, agc": (
        *("TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.LR_SCHEDULER.NAME", "tanh", "TRAIN.LR_SCHEDULER.CYCLES", 2),
        *("TRAIN.LOSS", "bce", "TRAIN.BCE_THRESHOLD", 0.2, "TRAIN.CLIP_MODE", "agc", "TRAIN.CLIP_GRAD", 0.02),
        *("AUG.MIXUP", 0.8, "LOGGERS", "csv"),
    ),
    "adan, plateau, value": (
        *("TRAIN.OPTIMIZER.NAME", "adan", "TRAIN.LR_SCHEDULER.NAME", "plateau", "TRAIN.LR_SCHEDULER.PATIENCE", 1),
        *("TRAIN.LR_SCHEDULER.THRESHOLD", 100, "TRAIN.CLIP_MODE", "value", "TRAIN.LAYER_DECAY", 0.9),
    ),
    "muon, poly": ("TRAIN.OPTIMIZER.NAME", "muon", "TRAIN.LR_SCHEDULER.NAME", "poly", "TRAIN.EMA_DECAY", 0.9),
    "torch_muon, wsd": ("TRAIN.OPTIMIZER.NAME", "torch_muon", "TRAIN.LR_SCHEDULER.NAME", "wsd"),
    "schedule-free, constant": (
        *("TRAIN.OPTIMIZER.NAME", "schedulefree_adamw", "TRAIN.LR_SCHEDULER.NAME", "constant"),
        *("TRAIN.WARMUP_EPOCHS", 1),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_resumes_exactly(train, recipe):
    if "schedule-free" in recipe and importlib.util.find_spec("schedulefree") is None:
        pytest.skip("schedulefree is not installed")
    if "wsd" in recipe and not (hasattr(timm.scheduler, "WSDLRScheduler") and hasattr(torch.optim, "Muon")):
        pytest.skip("timm or torch is too old")
    whole = train("whole", *RECIPES[recipe])
    before, after = content(whole, "ckpt_epoch_1.pth"), content(whole)
    changed = [name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])]
    assert len(changed) > len(after["model"]) // 2
    other = train("resumed", *RECIPES[recipe], resume=whole / "ckpt_epoch_1.pth")
    assert_same(content(other), after)
    lrs = [record["lr"] for record in read_metrics(whole)]
    assert [record["lr"] for record in read_metrics(other)] == lrs[1:]
    if "plateau" in recipe:
        # A threshold that no evaluation reaches: down after the second and the third.
        assert lrs == pytest.approx([lrs[0], lrs[0], lrs[0] / 10]) and after["scheduler"]["factor"] < 0.011
    if "csv" in RECIPES[recipe]:
        assert len((whole / "metrics.csv").read_text().splitlines()) == 4
    if "schedule-free" in recipe:
        assert not all(torch.equal(value, after["model"][name]) for name, value in after["model_ema"].items())
        assert {"top1", "top1_raw"} <= set(read_metrics(whole)[0])


# Distillation


@pytest.fixture
def teacher(train):
    return train("teacher", "TRAIN.EPOCHS", 1) / "last.pth"


def distilled(teacher, **keys) -> list:
    keys = {"TEACHER_CHECKPOINT": teacher, "TYPE": "soft", "TEMPERATURE": 3.0, **keys}
    return [word for name, value in keys.items() for word in (f"TRAIN.DISTILLATION.{name}", value)]


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_resumes_exactly(train, teacher, kind):
    opts = [*distilled(teacher, TYPE=kind), "AUG.MIXUP", 0.8, "AMP", "bfloat16"]
    whole = train("whole", *opts)
    assert_same(content(train("resumed", *opts, resume=whole / "ckpt_epoch_1.pth")), content(whole))
    plain = content(train("plain", "AUG.MIXUP", 0.8, "AMP", "bfloat16"))["model"]
    assert not torch.equal(plain["head.fc.weight"], content(whole)["model"]["head.fc.weight"])


def test_cached_logits(train, teacher, tmp_path, image_folder):
    """Without augmentation they are what the teacher says at each step, but for their rounding; so are the weights."""
    plain = ["AUG.HFLIP", 0.0, "AUG.SHIFT", 0.0]
    asked = content(train("asked", *plain, *distilled(teacher)))["model"]
    cache = tmp_path / "logits.npy"
    opts = [*plain, *distilled(teacher, CACHE=cache)]
    first = content(train("made", *opts))["model"]
    made = cache.stat().st_mtime_ns
    assert np.load(cache).shape == (16, 2) and np.isfinite(np.load(cache)).all()
    again = train("read", *opts)
    assert cache.stat().st_mtime_ns == made
    for name, value in content(again)["model"].items():
        assert torch.equal(value, first[name]), name
        torch.testing.assert_close(value, asked[name], rtol=0, atol=1e-3)
    # Of another teacher
    other = train("other teacher", "TRAIN.EPOCHS", 1, "SEED", 1) / "last.pth"
    said = train("refused", *plain, *distilled(other, CACHE=cache), status=1)
    assert f"{cache}: TRAIN.DISTILLATION.CACHE was made for something else (teacher differ)" in said
    # Of images that are read in another way
    said = train("refused too", *opts, "DATA.EXIF_ORIENTATION", True, status=1)
    assert "was made for something else (exif_orientation differ)" in said
    assert cache.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("opts", "status", "said"),
    [
        (["TYPE", "soft"], 2, "there is no teacher"),
        (["TEACHER", "resnet18"], 2, "TRAIN.DISTILLATION.TYPE is none"),
        (["TYPE", "soft", "TEACHER", "x", "CACHE", "a.npy"], 2, "it has none of mixed images"),
        (["TYPE", "soft", "TEACHER", "resnet1"], 1, "timm cannot give its weights"),
        (["TYPE", "soft", "TEACHER_CHECKPOINT", "missing.pth"], 1, "missing.pth: no such checkpoint file"),
    ],
)
def test_teacher_that_cannot_be_had(train, tmp_path, opts, status, said):
    opts = [word if i % 2 else f"TRAIN.DISTILLATION.{word}" for i, word in enumerate(opts)]
    assert said in train("refused", *opts, "AUG.CUTMIX", 1.0, status=status)
    assert not (tmp_path / RUN).exists()


def test_bad_name_is_refused_before_anything_is_written(train, tmp_path):
    assert "nearest names: lamb" in train("refused", "TRAIN.OPTIMIZER.NAME", "lambs", status=2)
    assert not (tmp_path / RUN).exists()


@pytest.mark.slow
def test_processes_fill_a_cache_together(train, teacher, tmp_path, image_folder):
    """And then train as one process would with the cache that it has made."""
    caches = [tmp_path / "one.npy", tmp_path / "two.npy"]
    opts = [*TINY, "DATA.DATASET", "imagenet", "LOGGERS", "[]"]
    for processes, cache in enumerate(caches, 1):
        command = ["--cfg", CONFIG, "--device", "cpu", "--output", tmp_path, "--tag", cache.stem]
        command += ["--data-path", image_folder, "--batch-size", 4 // processes]
        torchrun(processes, "main.py", *command, "--opts", *opts, *distilled(teacher, CACHE=cache))
    np.testing.assert_allclose(*map(np.load, caches), atol=2e-3)
    assert np.load(caches[1]).any(axis=1).all()
