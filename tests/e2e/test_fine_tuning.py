"""Fine-tuning and transfer: frozen parts, layer-wise learning rates, moving averages, parts of the data."""

import json
import signal
from pathlib import Path

import pytest
import timm
import torch
from timm.optim.optim_factory import param_groups_layer_decay

import models
from config import load_config
from data import build_sources
from data.build import select
from data.errors import DataError
from models import freeze, train_mode
from models.released import to_released_names
from optimizer import param_groups
from runtime.checkpoint import classifier_names, read_checkpoint
from runtime.distributed import World
from runtime.per_image import CORRECT, read_correct
from tests.helpers import ROOT, TINY, python, read_metrics, start_processes
from utils import UserError

pytestmark = pytest.mark.slow

CFG = "configs/strip_mlp_pico_digits.yaml"
RUN = "strip_mlp_pico_digits"
# Four steps of an epoch, on one class of two.
SHORT = (*TINY, "DATA.IMAGES_PER_CLASS", 8, "DATA.BATCH_SIZE", 20, "PRINT_FREQ", 1, "SEED", 3)


def tiny(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_classes": 3}
    return timm.create_model("strip_mlp_pico", **{**options, **kwargs})


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Frozen parts


def test_freeze():
    model = tiny()
    freeze(model, "none")
    assert trained(model) == {name for name, _ in model.named_parameters()}
    freeze(model, "patch_embed, stages.0,merging.0")
    frozen = {name for name, _ in model.named_parameters()} - trained(model)
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith(("patch_embed.", "stages.0.", "merging.0."))
    }
    freeze(model, "backbone")
    assert trained(model) == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize(
    "name, heads",
    [("resnet18", 1), ("vit_tiny_patch16_224", 1), ("sparse_mlp_tiny", 1), ("deit_tiny_distilled_patch16_224", 2)],
)
def test_freeze_the_backbone_of_other_models(name, heads):
    model = timm.create_model(name, num_classes=3)
    freeze(model, "backbone")
    assert trained(model) == set(classifier_names(model)) and len(trained(model)) == 2 * heads
    assert all(p.shape[0] == 3 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "what, message",
    [
        ("stages.7", r"names 'stages\.7', which StripMLP does not have; accepted: none, backbone, .*patch_embed"),
        ("stages.0,", "names ''"),
        ("patch_embed,stages,merging,norm,head,shortcut_2to3,shortcut_2to4,shortcut_3to4", "leaves nothing to train"),
    ],
)
def test_freeze_what_is_not_there(what, message):
    with pytest.raises(UserError, match=message):
        freeze(tiny(), what)


def test_train_mode():
    """Frozen parts neither move their statistics nor drop branches; the others do."""
    model = tiny(drop_path_rate=0.5)
    freeze(model, "stages.0,stages.3")
    model.eval()
    train_mode(model)
    in_training = {name for name, module in model.named_modules() if module.training}
    assert not [name for name in in_training if name.startswith(("stages.0", "stages.3"))]
    assert {"", "stages", "stages.1", "stages.1.0.drop_path", "stages.1.0.token_mixing.norm", "norm"} <= in_training
    train_mode(freeze_nothing := tiny())
    assert all(module.training for module in freeze_nothing.modules())


# Layers' learning rates


@pytest.mark.parametrize("name", ["strip_mlp_pico", "vit_tiny_patch16_224"])
def test_layer_decay_gives_the_rates_that_timm_gives(name):
    model = timm.create_model(name)
    exempt = getattr(model, "no_weight_decay", set)()
    expected = {}
    for group in param_groups_layer_decay(model, 0.05, no_weight_decay_list=exempt, layer_decay=0.7):
        expected |= {id(p): group["lr_scale"] for p in group["params"]}
    groups = param_groups(model, 0.05, layer_decay=0.7)
    assert {id(p): group["lr_scale"] for group in groups for p in group["params"]} == pytest.approx(expected)
    plain = {id(p): group["weight_decay"] for group in param_groups(model, 0.05) for p in group["params"]}
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == plain
    assert all(group["params"] for group in groups)
    assert [group["lr_scale"] for group in groups] == sorted(group["lr_scale"] for group in groups)


# Parts of the data


def digits():
    return build_sources(
        load_config(ROOT / CFG)[0], World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    ).train


def test_select(tmp_path):
    source = digits()
    assert select(source, "all") is source
    some = select(source, "7, 3", per_class=5, seed=1)
    assert some.classes == ["7", "3"] and sorted(some.targets) == [0] * 5 + [1] * 5
    originals = {source.name(i): i for i in range(len(source))}
    for index, target in enumerate(some.targets):
        original = originals[some.name(index)]
        assert source.targets[original] == (7, 3)[target]
        assert some.load(index).tobytes() == source.load(original).tobytes()
    names = [some.name(i) for i in range(10)]
    assert names == [select(source, "7,3", 5, seed=1).name(i) for i in range(10)]
    assert names != [select(source, "7,3", 5, seed=2).name(i) for i in range(10)]
    assert len(select(source, "7")) == (source.targets == 7).sum()
    assert len(select(source, "all", 4)) == 40
    (tmp_path / "some.txt").write_text("3\n\n 9 \n")
    assert select(source, str(tmp_path / "some.txt")).classes == ["3", "9"]


@pytest.mark.parametrize(
    "classes, per_class, message",
    [
        ("gone.txt", 0, r"gone\.txt, which cannot be read"),
        ("3,cat", 0, r"DATA\.CLASSES has 'cat', which the data has not; its classes: 0, 1, 2"),
        ("3,4", 10**6, r"DATA\.IMAGES_PER_CLASS is 1000000, but the training data has 14\d of 3"),
    ],
)
def test_select_what_is_not_there(classes, per_class, message):
    with pytest.raises(DataError, match=message):
        select(digits(), classes, per_class)


# As a user


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A checkpoint of digits 0 to 4."""
    output = tmp_path_factory.mktemp("pretrained")
    python("main.py", "--cfg", CFG, "--output", output, "--opts", *SHORT, "DATA.CLASSES", "0,1,2,3,4")
    return output / RUN / "default/best.pth"


def fine_tune(output: Path, checkpoint: Path, *opts, classes: str = "5,6,7,8,9"):
    """A run's last checkpoint, its metrics and what it printed."""
    command = ("main.py", "--cfg", CFG, "--output", output, "--pretrained", checkpoint)
    result = python(*command, "--opts", *SHORT, "DATA.CLASSES", classes, *opts)
    folder = output / RUN / "default"
    return read_checkpoint(folder / "last.pth"), read_metrics(folder), result.stdout


@pytest.mark.slow
def test_linear_probe(pretrained, tmp_path):
    """The backbone stays as it is, its statistics too; the classifier is a new one, for it is for other classes."""
    content, metrics, printed = fine_tune(tmp_path, pretrained, "TRAIN.FREEZE", "backbone", "TRAIN.BASE_LR", 1.0)
    before, after = read_checkpoint(pretrained)["model"], content["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.fc.weight", "head.fc.bias"}
    assert "is for other classes there: a new one for 5 classes" in printed
    assert "of which 325 are trained" in printed  # 64 x 5 + 5
    assert content["classes"] == ["5", "6", "7", "8", "9"] and metrics[0]["train_loss"] > 0
    assert sum(v["exp_avg"].numel() for v in content["optimizer"]["state"].values()) == 325


@pytest.mark.slow
def test_classifier_for_the_same_classes_is_kept(pretrained, tmp_path):
    """And evaluation warns of other classes."""
    _, _, printed = fine_tune(tmp_path, pretrained, "TRAIN.BASE_LR", 1e-12, classes="0,1,2,3,4")
    assert "a new one" not in printed
    after = read_checkpoint(tmp_path / RUN / "default/last.pth")["model"]
    torch.testing.assert_close(after["head.fc.weight"], read_checkpoint(pretrained)["model"]["head.fc.weight"])
    for classes, other in (("0,1,2,3,4", False), ("5,6,7,8,9", True)):
        command = ("main_eval.py", "--cfg", CFG, "--resume", pretrained, "--opts", *SHORT, "DATA.CLASSES", classes)
        assert ("was trained on classes of other names" in python(*command).stdout) == other


@pytest.mark.slow
def test_layer_decay(pretrained, tmp_path):
    """Early layers hardly move, and the log says the classifier's rate."""
    opts = ("TRAIN.LAYER_DECAY", 0.01, "TRAIN.WEIGHT_DECAY", 0.0, "TRAIN.MIN_LR", 0.0)
    content, metrics, _ = fine_tune(tmp_path, pretrained, *opts)
    before, after = read_checkpoint(pretrained)["model"], content["model"]

    def moved(name: str) -> float:
        return (after[name] - before[name]).abs().mean().item()

    assert moved("patch_embed.weight") < 1e-3 * moved("stages.3.0.token_mixing.fuse.weight")
    assert moved("stages.3.0.token_mixing.fuse.weight") > 0
    scales = [group["lr_scale"] for group in content["optimizer"]["param_groups"]]
    assert max(scales) == 1 and min(scales) == pytest.approx(0.01**5)
    assert metrics[0]["lr"] == max(group["lr"] for group in content["optimizer"]["param_groups"])


@pytest.mark.slow
def test_moving_average(pretrained, tmp_path):
    """It is what the recurrence gives, what is evaluated, and what main_eval.py takes."""
    # With seed 0, both happen to be right about as many images.
    opts = ("TRAIN.EMA_DECAY", 0.5, "TRAIN.BASE_LR", 0.05, "SAVE_STEPS", 1, "TRAIN.EPOCHS", 2, "SEED", 1)
    content, metrics, printed = fine_tune(tmp_path, pretrained, *opts)
    last, previous = content, read_checkpoint(tmp_path / RUN / "default/previous.pth")
    assert last["epoch"] == 2 and previous["progress"]["step"] == 1  # of the two of the last epoch
    for name, average in last["model_ema"].items():
        if average.is_floating_point():
            expected = 0.5 * previous["model_ema"][name] + 0.5 * last["model"][name]
            torch.testing.assert_close(average, expected, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(last["model_ema"][name], last["model"][name]) for name in last["model"])
    assert "moving average; the weights themselves" in printed
    line = metrics[-1]
    assert line["val_loss"] != line["val_loss_raw"]
    correct, _ = read_correct(tmp_path / RUN / "default" / CORRECT)
    assert line["top1"] == 100 * correct.sum() / len(correct) != line["top1_raw"]
    average, raw = tmp_path / RUN / "default/last.pth", tmp_path / "raw.pth"
    python("tools/convert_checkpoint.py", average, raw, "--no-ema")
    for checkpoint, expected in ((average, "val_loss"), (raw, "val_loss_raw")):
        json_file = tmp_path / f"{expected}.json"
        command = ("main_eval.py", "--cfg", CFG, "--resume", checkpoint, "--json", json_file)
        python(*command, "--opts", *SHORT, "DATA.CLASSES", "5,6,7,8,9")
        assert json.loads(json_file.read_text())["val_loss"] == pytest.approx(line[expected], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decays", [(0.9, 0.0), (0.0, 0.9)])
def test_moving_average_switched_inside_an_epoch(tmp_path, decays):
    """On two processes, whose running statistics differ there."""

    def run(decay: float, *opts):
        command = ("main.py", "--cfg", CFG, "--output", tmp_path, "--opts", *SHORT, "DATA.CLASSES", "0,1,2,3,4")
        return start_processes(2, *command, "DATA.BATCH_SIZE", 2, "TRAIN.EMA_DECAY", decay, *opts)

    first = run(decays[0], "TRAIN.EPOCHS", 30)
    first[0].wait_for("epoch 1/30 step 3")
    first[1].kill(signal.SIGTERM)
    assert [process.wait() for process in first] == [75, 75]
    content = read_checkpoint(tmp_path / RUN / "default/last.pth")
    assert content["progress"]["buffers"] is not None and ("model_ema" in content) == (decays[0] > 0)
    second = run(decays[1], "TRAIN.EPOCHS", content["epoch"] + 1)
    assert [process.wait() for process in second] == [0, 0], second[0].stderr
    assert ("model_ema" in read_checkpoint(tmp_path / RUN / "default/last.pth")) == (decays[1] > 0)


@pytest.mark.slow
def test_what_cannot_change_in_a_run(pretrained, tmp_path):
    """The message says what to do instead."""
    fine_tune(tmp_path, pretrained)
    command = ("main.py", "--cfg", CFG, "--output", tmp_path, "--opts", *SHORT, "TRAIN.EPOCHS", 2, "DATA.CLASSES")
    for opts, message in (
        (("9,8,7,6,5",), "was trained on classes 5, 6, 7, 8, 9, but the data has 9, 8, 7, 6, 5"),
        (("5,6,7,8,9", "TRAIN.FREEZE", "backbone"), "TRAIN.FREEZE was none, is backbone"),
        (("5,6,7,8,9", "TRAIN.LAYER_DECAY", 0.5), "TRAIN.LAYER_DECAY was 1.0, is 0.5"),
        (("5,6,7,8,9", "TRAIN.OPTIMIZER.NAME", "sgd"), "has the state of adamw, but TRAIN.OPTIMIZER.NAME is sgd"),
    ):
        result = python(*command, *opts, ok=False)
        assert "Traceback" not in result.stderr
        assert message in result.stderr and "--pretrained" in result.stderr and result.returncode == 1


@pytest.mark.slow
def test_random_weights_and_images_left_out_are_told(tmp_path):
    opts = ("TRAIN.FREEZE", "backbone", "DATA.IMAGES_PER_CLASS", 3, "DATA.BATCH_SIZE", 16)
    result = python("main.py", "--cfg", CFG, "--output", tmp_path, "--opts", *SHORT, *opts)
    assert "but the weights are random; --pretrained names others" in result.stdout
    assert "each epoch leaves out 14 of 30 images, too few for a batch of 16" in result.stdout


@pytest.mark.slow
def test_imagenet_checkpoint_to_a_folder_of_images(image_folder, tmp_path):
    """The recipes as the README has them, from a released checkpoint of a model that is small but for its classes."""
    small = ("MODEL.STRIP_MLP.EMBED_DIM", 8, "MODEL.STRIP_MLP.LAYERS", "[1,1,1,1]", "DATA.NUM_WORKERS", 0)
    small += ("TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)
    torch.manual_seed(0)
    model = timm.create_model("strip_mlp_tiny", embed_dim=8, depths=(1, 1, 1, 1))  # 224 x 224, 1000 classes
    torch.save({"model": to_released_names(model), "epoch": 299}, tmp_path / "released.pth")
    for recipe, height, width in (
        ("smlp_tiny_224", 224, 224),
        ("smlp_tiny_224", 32, 32),
        ("smlp_tiny_224", 64, 96),
        ("smlp_tiny_384", 384, 384),
        ("smlp_tiny_linear_probe", 224, 224),
    ):
        size = ("DATA.IMG_SIZE", f"[{height},{width}]") if height < 224 else ()
        command = ("main.py", "--cfg", f"configs/finetune/{recipe}.yaml", "--data-path", image_folder)
        command += ("--pretrained", tmp_path / "released.pth", "--output", tmp_path, "--batch-size", 8)
        result = python(*command, "--tag", f"at_{height}", "--opts", *small, *size)
        assert "a new one for 2 classes" in result.stdout
        assert (f"resampled from 224 x 224 to {height} x {width} pixels" in result.stdout) == (height != 224)
    best = tmp_path / "smlp_tiny_finetune_224/at_224/best.pth"
    predicted = python("tools/predict.py", best, image_folder / "val", "--top-k", 1, "--format", "csv")
    assert predicted.stdout.count("class") >= 7


RECIPES = [*(ROOT / "configs/finetune").glob("*.yaml"), *(ROOT / "configs/transfer_fashion_mnist").glob("*.yaml")]


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: path.stem)
def test_recipes(path):
    """They load, and their models can be built."""
    config, notes = load_config(path, ["DATA.DATA_PATH", "anywhere", "MODEL.NUM_CLASSES", "3"])
    assert not notes
    with torch.device("meta"):
        model = models.build_model(config)
    freeze(model, config.TRAIN.FREEZE)
    assert param_groups(model, 0.05, config.TRAIN.LAYER_DECAY)
