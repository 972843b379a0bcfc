"""Training and evaluation through main.py and main_eval.py, on one process."""

import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision import datasets, transforms
from yacs.config import CfgNode

from config import load_config
from models import StripMLP
from runtime.checkpoint import read_checkpoint
from runtime.per_image import CORRECT, read_correct, save_correct
from tests.helpers import ROOT, TINY, python, read_metrics, write_idx_folder, write_image_folder
from tests.reference import fill

PICO = ("main.py", "--cfg", "configs/strip_mlp_pico_digits.yaml")
PICO_RUN = "strip_mlp_pico_digits/default"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    """Three epochs of a tiny model on digits, a checkpoint kept of each."""
    output = tmp_path_factory.mktemp("digits")
    python(*PICO, "--output", output, "--opts", *TINY, "TRAIN.EPOCHS", 3, "SAVE_FREQ", 1)
    return output / PICO_RUN


def test_a_run_writes_what_it_promises(digits_run):
    names = {path.name for path in digits_run.iterdir() if not path.name.startswith("events.out.tfevents")}
    checkpoints = {"ckpt_epoch_1.pth", "ckpt_epoch_2.pth", "ckpt_epoch_3.pth", "last.pth", "best.pth"}
    others = {"config.yaml", "log_rank0.txt", "metrics.jsonl", "correct.npz", "run.lock", "previous.pth"}
    assert names == others | checkpoints
    assert list(digits_run.glob("events.out.tfevents*"))

    records = read_metrics(digits_run)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    promised = {"train_loss", "val_loss", "top1", "top5", "lr", "images_per_second", "data_wait"}
    promised |= {"memory_mb", "seconds"}
    assert promised <= set(records[0])
    best = max(records, key=lambda record: (record["top1"], -record["val_loss"]))
    content = torch.load(digits_run / "best.pth", weights_only=True)
    assert content["best"] == {key: best[key] for key in ("top1", "epoch", "val_loss")}
    assert content["epoch"] == best["epoch"]

    assert "epoch 1/3 step 10/22 eta" in (digits_run / "log_rank0.txt").read_text()
    config, notes = load_config(digits_run / "config.yaml")
    assert notes == [] and config.MODEL.NUM_CLASSES == 10 and config.MODEL.STRIP_MLP.EMBED_DIM == 8
    assert config.dump() == (digits_run / "config.yaml").read_text()


def test_tensorboard(digits_run):
    found = {}
    for path in digits_run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(value)
    assert [value.tensor.float_val[0] for value in found["top1"]] == pytest.approx(
        [record["top1"] for record in read_metrics(digits_run)]
    )
    assert len(found["training images as the model gets them"]) == 1
    assert len(found["token mixing weights/stages.0.0.token_mixing.cgsmm.strip_h"]) == 3
    assert found["final/top1"][0].tensor.float_val[0] == pytest.approx(read_metrics(digits_run)[-1]["top1"])
    plugin_data = found["_hparams_/session_start_info"][0].metadata.plugin_data.content
    values = HParamsPluginData.FromString(plugin_data).session_start_info.hparams
    assert values["TRAIN.EPOCHS"].number_value == 3
    assert values["MODEL.STRIP_MLP.LAYERS"].string_value == "[1, 1, 1, 1]"


@pytest.mark.slow
def test_same_seed_same_losses_whatever_the_workers(tmp_path):
    # With colour jitter, digits are loaded one at a time, as larger images are.
    runs = {"alone": (), "workers": ("DATA.NUM_WORKERS", 2), "seed": ("SEED", 1)}
    for tag, opts in runs.items():
        python(*PICO, "--output", tmp_path, "--tag", tag, "--opts", *TINY, "AUG.COLOR_JITTER", 0.4, *opts)
    folders = {tag: (tmp_path / PICO_RUN).with_name(tag) for tag in runs}
    alone, workers, seed = (
        [(r["train_loss"], r["val_loss"], r["top1"]) for r in read_metrics(f)] for f in folders.values()
    )
    assert alone == workers
    assert alone[0][0] != seed[0][0]
    assert_same_weights(weights(folders["alone"] / "last.pth"), weights(folders["workers"] / "last.pth"))


@pytest.mark.slow
def test_epochs_between_evaluations(digits_run, tmp_path):
    result = python(*PICO, "--output", tmp_path, "--opts", *TINY, "TRAIN.EPOCHS", 3, "TEST.INTERVAL", 2)
    run = tmp_path / PICO_RUN
    assert "epoch 1/3 not evaluated" in result.stdout
    expected = [(r["train_loss"], r["top1"]) for r in read_metrics(digits_run)]
    assert [(r["train_loss"], r.get("top1")) for r in read_metrics(run)] == [(expected[0][0], None), *expected[1:]]
    assert read_checkpoint(run / "best.pth")["best"]["epoch"] in (2, 3)
    assert read_correct(run / CORRECT)[1] == 3


def test_auto_resume_ends_where_an_undisturbed_run_ends(digits_run, tmp_path):
    run = tmp_path / PICO_RUN
    run.mkdir(parents=True)
    (run / "last.pth").write_bytes((digits_run / "ckpt_epoch_2.pth").read_bytes())
    # The second line of a run that was killed after it, and half of a third.
    lines = (digits_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], lines[2][:20]]))
    save_correct(run / CORRECT, np.zeros(360, bool), 3)

    result = python(*PICO, "--output", tmp_path, "--opts", *TINY, "TRAIN.EPOCHS", 3)
    assert "2 epochs done" in result.stdout
    assert_same_weights(weights(run / "last.pth"), weights(digits_run / "last.pth"))
    full, resumed = (torch.load(folder / "last.pth", weights_only=True) for folder in (digits_run, run))
    assert full["best"] == resumed["best"]
    assert str(full["optimizer"]) == str(resumed["optimizer"])
    same = ("epoch", "train_loss", "val_loss", "top1", "lr")
    for a, b in zip(read_metrics(digits_run), read_metrics(run), strict=True):
        assert [a[key] for key in same] == [b[key] for key in same]
    for folder in (digits_run, run):
        correct, epoch = read_correct(folder / CORRECT)
        assert epoch == 3
        assert 100 * correct.sum() / len(correct) == read_metrics(folder)[-1]["top1"] > 0


@pytest.mark.slow
def test_a_finished_run_is_left_alone(digits_run):
    before = {path: path.read_bytes() for path in digits_run.glob("*.pth")}
    named = ("--output", digits_run.parents[1], "--pretrained", "elsewhere.pth")
    result = python(*PICO, *named, "--opts", *TINY, "TRAIN.EPOCHS", 3, "SAVE_FREQ", 1)
    assert "elsewhere.pth is not read" in result.stdout
    assert "nothing left to train: 3 of 3 epochs are done" in result.stdout
    opts = (*TINY, "TRAIN.AUTO_RESUME", "False")
    assert "holds a run already" in python(*PICO, *named[:2], "--opts", *opts, ok=False).stderr
    assert {path: path.read_bytes() for path in digits_run.glob("*.pth")} == before


@pytest.mark.slow
def test_best_of_several_epochs_with_the_same_accuracy(tmp_path):
    """Black or white: the accuracy stays while the loss goes on falling."""
    data = tmp_path / "data"
    for split, colour, number in itertools.product(("train", "val"), ("black", "white"), range(4)):
        (data / split / colour).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(data / split / colour / f"{number}.png")
    command = ("main.py", "--cfg", "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", "--data-path", data)
    plain = ("AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.AUTO_AUGMENT", "none", "AUG.REPROB", 0, "MODEL.DROP_PATH_RATE", 0)
    opts = ("DATA.BATCH_SIZE", 4, "TRAIN.EPOCHS", 4, "TRAIN.BASE_LR", 0.2, *plain)
    python(*command, "--output", tmp_path / "out", "--opts", *TINY, *opts)
    (run,) = (tmp_path / "out").glob("*/default")
    best = max(read_metrics(run), key=lambda record: (record["top1"], -record["val_loss"]))
    content = torch.load(run / "best.pth", weights_only=True)
    assert content["best"] == {key: best[key] for key in ("top1", "epoch", "val_loss")}


@pytest.mark.slow
def test_resume_of_a_finished_run_into_another_folder(digits_run, tmp_path):
    last = digits_run / "last.pth"
    result = python(*PICO, "--output", tmp_path, "--resume", last, "--opts", *TINY, "TRAIN.EPOCHS", 3)
    said = f"{last} is of a finished run; nothing is written into {tmp_path / PICO_RUN}"
    assert "nothing left to train: 3 of 3 epochs are done" in result.stdout and said in result.stdout
    assert not list((tmp_path / PICO_RUN).glob("*.pth"))


@pytest.mark.slow
def test_resume_from_a_named_checkpoint_says_what_changed(digits_run, tmp_path):
    command = (*PICO, "--output", tmp_path, "--resume", digits_run / "ckpt_epoch_1.pth")
    result = python(*command, "--opts", *TINY, "TRAIN.EPOCHS", 2)
    assert "1 epochs done" in result.stdout
    assert "TRAIN.EPOCHS was 3, is 2" in result.stdout
    assert [record["epoch"] for record in read_metrics(tmp_path / PICO_RUN)] == [2]
    # Whatever the other run's best was, this one has a best checkpoint of its own.
    best = torch.load(tmp_path / PICO_RUN / "best.pth", weights_only=True)["best"]
    (record,) = read_metrics(tmp_path / PICO_RUN)
    assert best == {"top1": record["top1"], "epoch": 2, "val_loss": record["val_loss"]}


def test_evaluation_of_the_best_checkpoint_by_default_and_as_json(digits_run, tmp_path):
    command = ("main_eval.py", "--cfg", "configs/strip_mlp_pico_digits.yaml", "--output", digits_run.parents[1])
    result = python(*command, "--json", tmp_path / "result.json", "--opts", *TINY)
    content = json.loads((tmp_path / "result.json").read_text())
    best = max(read_metrics(digits_run), key=lambda record: (record["top1"], -record["val_loss"]))
    assert content["checkpoint"].endswith("best.pth")
    assert content["images"] == 360
    assert (content["top1"], content["top5"]) == (best["top1"], best["top5"])
    assert content["val_loss"] == pytest.approx(best["val_loss"], abs=1e-6)
    assert content["val_images_per_second"] > 0
    assert f"top-1 {best['top1']:.3f} %" in result.stdout
    assert "on 360 images" in result.stdout


@pytest.mark.slow
def test_evaluation_and_throughput_by_main(digits_run):
    best = max(record["top1"] for record in read_metrics(digits_run))
    command = (*PICO, "--output", digits_run.parents[1], "--opts", *TINY)
    assert f"top-1 {best:.3f} %" in python(*command, "--eval").stdout
    assert "images/s per process at batch 64" in python(*command, "--throughput").stdout


@pytest.mark.slow
def test_evaluation_by_the_config_of_a_fine_tuned_run(digits_run, tmp_path):
    """Its weights, not those it started from."""
    start = ("--pretrained", digits_run / "ckpt_epoch_1.pth")
    python(*PICO, *start, "--output", tmp_path, "--tag", "a", "--opts", *TINY, "--opts", "SEED", 5)
    result = python("main_eval.py", "--cfg", tmp_path / "strip_mlp_pico_digits/a/config.yaml")
    assert f"weights from {tmp_path}/strip_mlp_pico_digits/a/best.pth" in result.stdout
    assert "SEED: 5" in (tmp_path / "strip_mlp_pico_digits/a/config.yaml").read_text()


SGD = ("TRAIN.LR_SCHEDULER.NAME", "linear", "TRAIN.OPTIMIZER.NAME", "sgd", "AUG.MIXUP", 0.8, "AUG.CUTMIX", 1.0)
STEP = ("TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.CLIP_GRAD", 0, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "opts", "expected"),
    [
        (("--amp", "on"), SGD, ["precision bfloat16"]),
        (("--amp-opt-level", "O1"), STEP, ["precision bfloat16", "deprecated"]),
        (("--amp", "float16", "--use-checkpoint", "--accumulation-steps", "3"), (), ["precision float16", "step 8/8"]),
    ],
)
def test_options(flags, opts, expected, tmp_path):
    result = python(*PICO, *flags, "--tag", "options", "--output", tmp_path, "--opts", *TINY, *opts)
    for words in expected:
        assert words in result.stdout
    assert np.isfinite(read_metrics(tmp_path / "strip_mlp_pico_digits/options")[0]["train_loss"])


@pytest.mark.slow
def test_zip_and_cache_modes(image_folder, tmp_path):
    for split in ("train", "val"):
        paths = sorted((image_folder / split).rglob("*.jpg"))
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for path in paths:
                archive.write(path, path.relative_to(image_folder / split))
        lines = [f"{path.relative_to(image_folder / split)}\t{int(path.parent.name[-1])}\n" for path in paths]
        (tmp_path / f"{split}_map.txt").write_text("".join(lines))

    losses = {}
    command = ("main.py", "--cfg", "configs/smlp_base_alpha3_patch4_224_imagenet1k.yaml", "--batch-size", 4)
    for tag, flags in {
        "folder": ("--data-path", image_folder),
        "zip": ("--data-path", tmp_path, "--zip", "--cache-mode", "full"),
        "part": ("--data-path", tmp_path, "--zip", "--cache-mode", "part"),
    }.items():
        python(*command, *flags, "--output", tmp_path, "--tag", tag, "--opts", *TINY)
        record = read_metrics(tmp_path / "smlp_base_alpha3_patch4_224_imagenet1k" / tag)[0]
        losses[tag] = record["train_loss"], record["val_loss"]
    assert losses["folder"] == losses["zip"] == losses["part"]  # on one process, its share is everything
    # A zip file has no names of classes, and so says nothing against those of the folders.
    named, unnamed = (next(tmp_path.glob(f"*/{tag}/last.pth")) for tag in ("folder", "zip"))
    assert read_checkpoint(named)["classes"] == ["class0", "class1"] and read_checkpoint(unnamed)["classes"] == []


def released_yaml(folder: Path, num_classes: int) -> Path:
    """A config as the released code's users have it."""
    path = folder / "released.yaml"
    content = {
        "BASE": [""],
        "DATA": {"DATASET": "imagenet-1k", "DATA_PATH": "/home/somebody/imagenet", "IMG_SIZE": 64},
        "MODEL": {
            "TYPE": "strip_mlp_layer",
            "NAME": "smlp_tiny_light_alpha3_patch4_224",
            "DROP": 0.0,
            "DROP_RATE": 0.1,
            "NUM_CLASSES": num_classes,
            "ALPHA": 3,
            "PATCH_NORM": True,
            "STRIP_MLP": {"EMBED_DIM": 80, "LAYERS": [2, 2, 6, 2]},
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_released_checkpoint_evaluates(tmp_path):
    """With a yacs CfgNode inside, under "model", with the accuracy that the reference logits give."""
    reference = json.loads((ROOT / "tests/reference/strip_mlp_tiny_light_64.json").read_text())
    state = {name: torch.from_numpy(np.array(fill.weight(name, tuple(shape)))) for name, shape in
             reference["state_dict"]}  # fmt: skip
    config = CfgNode({"MODEL": {"NAME": "x", "LAYERS": [2, 2, 6, 2]}, "DATA": {"BATCH_SIZE": 128}})
    released = {"model": state, "epoch": 299, "max_accuracy": 81.2, "config": config, "optimizer": {"state": {}}}
    torch.save(released, tmp_path / "released.pth")

    data = write_image_folder(tmp_path / "data", train=10, val=20, classes=10)
    command = ("--cfg", released_yaml(tmp_path, 10), "--data-path", data, "--batch-size", 8)
    opts = ("--opts", "DATA.NUM_WORKERS", 0)
    named = ("--resume", tmp_path / "released.pth", "--json", tmp_path / "result.json")
    python("main_eval.py", *command, *named, *opts)
    result = json.loads((tmp_path / "result.json").read_text())

    # The same in plain PyTorch: the model, the images and the argmax.
    model = timm.create_model("strip_mlp_tiny_light", img_size=64, num_classes=10).eval()
    assert isinstance(model, StripMLP)

    from models.released import checkpoint_filter_fn

    model.load_state_dict(checkpoint_filter_fn(state, model))
    transform = transforms.Compose(
        [
            transforms.Resize(73, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images, labels = zip(*datasets.ImageFolder(str(data / "val"), transform), strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
    labels = torch.tensor(labels)
    assert result["images"] == 20
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert result["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)

    # The config trains, but the checkpoint is no training state of ours.
    result = python("main.py", *command, "--output", tmp_path, "--opts", *TINY)
    assert "MODEL.DROP_RATE changes nothing" in result.stdout
    error = python("main.py", *command, "--resume", tmp_path / "released.pth", "--tag", "b", *opts, ok=False)
    assert "--pretrained" in error.stderr
    assert "Traceback" not in error.stderr


@pytest.mark.slow
def test_fashion_mnist_with_held_out_images(tmp_path):
    """Training does without the test images; evaluation finds the same held-out ones, and then the test images."""
    data = write_idx_folder(tmp_path / "data", train=60, test=30)
    test_files = list(data.glob("t10k*"))
    for path in test_files:
        path.rename(tmp_path / path.name)
    command = ("--cfg", "configs/fashion_mnist/strip_mlp_pico.yaml", "--data-path", data, "--output", tmp_path)
    opts = ("--opts", *TINY, "DATA.BATCH_SIZE", 16)
    python("main.py", *command, *opts, "DATA.VAL_FRACTION", 0.3, "SEED", 5)
    folder = tmp_path / "strip_mlp_pico_fashion_mnist/default"
    (record,) = read_metrics(folder)
    names = (folder / "held_out.txt").read_text().splitlines()
    assert len(set(names)) == 20 and "train" in names[0]

    held_out, test = tmp_path / "held_out.json", tmp_path / "test.json"
    python("main_eval.py", *command, "--json", held_out, *opts, "DATA.VAL_FRACTION", 0.3)
    result = json.loads(held_out.read_text())
    assert result["images"] == 20
    assert (result["top1"], result["val_loss"]) == pytest.approx((record["top1"], record["val_loss"]))
    for path in test_files:
        (tmp_path / path.name).rename(path)
    for path in data.glob("train*"):
        path.unlink()
    python("main_eval.py", *command, "--json", test, *opts)
    assert json.loads(test.read_text())["images"] == 30
    assert read_checkpoint(folder / "best.pth")["classes"][0] == "T-shirt/top"
