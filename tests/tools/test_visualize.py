"""Tests of tools/visualize.py: what the pictures show, against independent computations; and each picture as a user
makes it."""

import csv
import math

import numpy as np
import pytest
import timm
import torch
import visualize
from figures import augmented, cam, strips
from figures.receptive_field import effective_receptive_fields
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import main as training
from config import leaves, load_config
from data import build_sources
from engine.evaluate import evaluate_run
from models import StripMLP, build_model
from models.strip_mlp import StripMLPLayer
from runtime.distributed import World
from tests.helpers import ROOT, TINY, python, run_tool, write_image

pytestmark = pytest.mark.slow

DIGITS = str(ROOT / "configs/strip_mlp_pico_digits.yaml")
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet
WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def write_checkpoint(path, opts=(), classes=tuple("0123456789")):
    """A model of the digits' config with random weights, of which the classifier makes something."""
    config, _ = load_config(DIGITS, [*opts, "MODEL.NUM_CLASSES", str(len(classes))])
    torch.manual_seed(0)
    model = build_model(config)
    nn.init.normal_(model.head.fc.weight, std=0.3)
    nn.init.normal_(model.head.fc.bias)
    torch.save({"model": model.state_dict(), "config": leaves(config), "classes": list(classes)}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pth")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        said = run_tool(monkeypatch, capsys, visualize, *arguments)
        return said.status, said.out, said.err

    return run


def png_size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 5, "blank"
        return image.size


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Effective receptive field


def test_field_of_a_convolution():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    (field,) = effective_receptive_fields(lambda x: [conv(x)], [torch.randn(2, 3, 8, 8), torch.randn(1, 3, 8, 8)])
    expected = np.zeros((8, 8))
    expected[3:6, 3:6] = conv.weight.sum(dim=0).abs().sum(dim=0).detach()
    np.testing.assert_allclose(field.values, expected, rtol=1e-5)
    assert field.map_size == (8, 8)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_field_of_strips(axis):
    layer = StripMLPLayer(3, 8, axis, q=1, m=3)
    (field,) = effective_receptive_fields(lambda x: [layer(x)], [torch.randn(2, 3, 8, 8)])
    expected = np.zeros((8, 8), dtype=bool)
    expected[3:6] = True
    np.testing.assert_array_equal(field.values > 0, expected if axis == "row" else expected.T)


def test_receptive_field(command, tmp_path, checkpoint):
    for i in range(5):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    arguments = ("--variants", "strip_mlp_pico", "resnet10t", "--count", 3)
    status, out, err = command("receptive-field", checkpoint, *arguments)
    assert (status, out.split()) == (0, ["receptive_field.png", "receptive_field.csv"]), err
    width, height = png_size(tmp_path / "receptive_field.png")
    assert width == 1400
    assert height > 1000
    rows = read_csv(tmp_path / "receptive_field.csv")
    assert [row["model"] for row in rows[::4]] == ["strip_mlp_pico_digits", "strip_mlp_pico", "resnet10t"]
    assert [row["weights"] for row in rows[::4]] == [f"{checkpoint.parent.name}/best.pth", "random", "random"]
    assert [row["stride"] for row in rows] == [*["4", "8", "16", "32"] * 2, "4", "8", "16", "29.3333"]  # of 176 pixels
    assert all(0 < float(row["area_50"]) < float(row["area_95"]) <= 1 for row in rows)
    first = (tmp_path / "receptive_field.csv").read_text()

    # The same again, but for other images; under the default's name it would have to replace what is there.
    assert command("receptive-field", checkpoint, *arguments)[0] == 1
    assert command("receptive-field", checkpoint, *arguments, "--output", "a.png")[0] == 0
    assert (tmp_path / "a.csv").read_text() == first
    status, *_ = command("receptive-field", checkpoint, *arguments, "--output", "a.png", "--images", "images")
    assert status == 0
    assert (tmp_path / "a.csv").read_text() != first


# Strips


@pytest.mark.parametrize("axis", ["row", "column"])
def test_strip_matrices_are_what_the_layer_does(axis):
    """On a map of one row, the matrices of offset 0 alone count."""
    model = timm.create_model("strip_mlp_pico")
    layer = strips.strip_layers(model, axis)["stages.1.0"]
    (strip,) = strips.weights_of("stages.1.0", layer, every_offset=False)
    q, patches, length = layer.q, *strip.matrices.shape[:2]
    x = torch.randn(1, q * patches, 1, length)
    y = layer(x if axis == "row" else x.transpose(2, 3)).flatten(2)[0].detach().numpy()  # (C', L)
    for channel in range(q * patches):
        patch = channel % patches
        expected = strip.matrices[patch] @ x[0, channel, 0].numpy() + layer.bias[patch].detach().numpy()
        np.testing.assert_allclose(y[channel], expected, rtol=1e-4, atol=1e-5)
    offsets = strips.weights_of("stages.1.0", layer, every_offset=True)
    assert [each.offset for each in offsets] == [-1, 0, 1]
    np.testing.assert_array_equal(offsets[1].matrices, strip.matrices)
    np.testing.assert_array_equal(offsets[2].matrices, layer.weight.detach().numpy()[..., 2])


def test_strips(command, tmp_path, checkpoint, monkeypatch):
    figures = []
    draw_strips = strips.draw_strips
    monkeypatch.setattr(strips, "draw_strips", lambda *a: figures.append(draw_strips(*a)) or figures[-1])
    status, out, err = command("strips", checkpoint)
    assert (status, out) == (0, "strips.png\n"), err
    assert png_size(tmp_path / "strips.png")[0] == 1400
    layers = strips.strip_layers(build_from(checkpoint), "row")
    shown = [axes.images[0] for axes in figures[0].axes if axes.images]
    assert len(shown) == 6 + 3 * 8  # stage 1 has 6 patches
    for image, name in ((shown[3], "stages.0.0"), (shown[6 + 3], "stages.1.0")):
        np.testing.assert_array_equal(image.get_array(), layers[name].weight[3, :, :, 1].detach())
    assert {image.get_clim() for image in shown} == {shown[0].get_clim()}
    assert sum(shown[0].get_clim()) == 0
    assert max(abs(image.get_array()).max() for image in shown) == pytest.approx(shown[0].get_clim()[1])

    arguments = ("--axis", "column", "--offsets", "all", "--block", "stages.2.1", "--patches", 3, "--output", "b.png")
    assert command("strips", checkpoint, *arguments, "--dpi", 150)[0] == 0
    assert png_size(tmp_path / "b.png")[0] == 1050
    assert sum(bool(axes.images) for axes in figures[1].axes) == 9
    labels = [axes.get_ylabel() for axes in figures[1].axes[:9:3]]
    assert labels == [f"stages.2.1\noffset {offset}\n3 of 24 patches" for offset in ("-1", "0", "+1")]


def build_from(path):
    content = torch.load(path, weights_only=True)
    model = build_model(load_config(DIGITS, ["MODEL.NUM_CLASSES", "10"])[0]).eval()
    model.load_state_dict(content["model"])
    return model


# Class activation maps


def with_statistics(model):
    """In evaluation mode, its normalisations as a training would leave them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def test_mean_of_the_map_and_bias_are_the_logit():
    own = StripMLP(img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_classes=5)
    for model in (own, timm.create_model("resnet10t", num_classes=5)):
        model = with_statistics(model)
        nn.init.normal_(model.get_classifier().bias)
        image = torch.randn(1, 3, 64, 64)
        logits = model(image)[0]
        for label in range(5):
            found = cam.class_activation_map(model, image, label)
            assert found.shape == (2, 2)
            assert found.std() > 0
            torch.testing.assert_close(found.mean() + model.get_classifier().bias[label], logits[label])


def test_grad_cam_of_the_last_stage_is_the_map_of_the_weights_alone():
    """What is between it and the logit is a BatchNorm, a mean and the classifier."""
    model = with_statistics(StripMLP(img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_classes=5))
    image = torch.randn(1, 3, 64, 64)
    last = model.forward_intermediates(image, intermediates_only=True)[3]
    slope = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt() / 4  # of 2 x 2 tokens
    for label in range(5):
        expected = torch.einsum("c,chw->hw", model.head.fc.weight[label] * slope, last[0]).relu()
        torch.testing.assert_close(cam.grad_cam(model, image, label, 4), expected)
    assert cam.grad_cam(model, image, 0, 1).shape == (16, 16)


def test_cam(command, tmp_path, checkpoint, monkeypatch):
    images = [tmp_path / f"{i}$x^.png" for i in range(3)]
    for i, path in enumerate(images):
        Image.fromarray(np.uint8(load_digits().images[i] * 15)).save(path)
    figures = []
    draw_evidence = cam.draw_evidence
    monkeypatch.setattr(cam, "draw_evidence", lambda *a: figures.append(draw_evidence(*a)) or figures[-1])
    status, out, err = command("cam", checkpoint, *images)
    assert (status, out) == (0, "cam.png\n"), err
    assert "the map is one token" in err
    assert png_size(tmp_path / "cam.png")[0] == 960
    model = build_from(checkpoint)
    shown = np.stack([axes.images[0].get_array() for axes in figures[0].axes[:6:2]])
    with torch.no_grad():
        logits = model((torch.tensor(shown).permute(0, 3, 1, 2) / 255 - MEAN) / STD)
    for axes, row in zip(figures[0].axes[1:6:2], logits, strict=True):
        label = int(row.argmax())
        assert axes.get_title() == f"{label}: {row.softmax(dim=0)[label]:.2f}"
        drawn = axes.images[1].get_array()
        assert drawn.mean() == pytest.approx((row[label] - model.head.fc.bias[label]).item(), rel=1e-3)

    status, out, err = command("cam", checkpoint, images[1], "--class", "7", "--stage", 2, "--output", "d.png")
    assert (status, out) == (0, "d.png\n"), err
    assert figures[1].axes[1].get_title() == f"7: {logits[1].softmax(dim=0)[7]:.2f}"
    assert figures[1].axes[1].images[1].get_array().shape == (4, 4)
    assert figures[1].axes[0].get_title() == images[1].name


# Augmented images

MIXED = ("AUG.REPROB", "0.5", "AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.MIXUP_MODE", "elem")


def test_augmented_images_are_those_of_training(monkeypatch, tmp_path):
    """The first batch that the model of main.py is given."""

    class Seen(Exception):
        pass

    def forward(self, x):
        seen.append(x)
        raise Seen

    seen = []
    monkeypatch.setattr(StripMLP, "forward", forward)
    opts = [*TINY, *MIXED, "DATA.BATCH_SIZE", "8", "SEED", "3"]
    monkeypatch.setattr("sys.argv", ["main.py", "--cfg", DIGITS, "--output", str(tmp_path), "--opts", *opts])
    with pytest.raises(Seen):
        training.main()
    images, *_ = augmented.first_batch(load_config(DIGITS, opts)[0], epoch=0)
    torch.testing.assert_close(images, seen[0], rtol=0, atol=0)


def test_augmented(command, tmp_path, monkeypatch):
    figures = []
    draw_tiles = augmented.draw_tiles
    monkeypatch.setattr(augmented, "draw_tiles", lambda *a: figures.append(draw_tiles(*a)) or figures[-1])
    status, out, err = command("augmented", "--cfg", DIGITS, "--count", 8, "--epoch", 2)
    assert (status, out) == (0, "augmented.png\n"), err
    assert png_size(tmp_path / "augmented.png")[0] == 1400
    images, targets, _ = augmented.first_batch(load_config(DIGITS)[0], epoch=1)
    tiles = [axes for axes in figures[0].axes if axes.images]
    assert [tile.get_title() for tile in tiles] == [str(int(target.argmax())) for target in targets[:8]]
    for tile, image in zip(tiles, images, strict=False):  # the config neither erases nor mixes
        expected = (image * STD + MEAN).permute(1, 2, 0)
        np.testing.assert_allclose(tile.images[0].get_array(), expected, atol=1e-6)


# Mistakes


def test_mistakes(checkpoint, tmp_path):
    result = python(ROOT / "tools/visualize.py", "mistakes", checkpoint, cwd=tmp_path)
    names = ["mistakes.png", "mistakes_confusion.png", "mistakes_predictions.csv"]
    assert result.stdout.split() == names
    assert png_size(tmp_path / names[0])[0] == 1400
    assert png_size(tmp_path / names[1])[0] > 800

    config, _ = load_config(DIGITS)
    evaluated = evaluate_run(config, [], WORLD, str(checkpoint))
    rows = read_csv(tmp_path / names[2])
    assert [row["index"] for row in rows] == [str(i) for i in range(360)]
    right = sum(row["true"] == row["predicted"] for row in rows)
    assert 0 < right < 360
    assert 100 * right / 360 == pytest.approx(evaluated["top1"])
    assert np.mean([float(row["loss"]) for row in rows]) == pytest.approx(evaluated["val_loss"], rel=1e-4)
    assert all(float(row["loss"]) == pytest.approx(-math.log(float(row["p_true"])), abs=1e-3) for row in rows[:20])
    source = build_sources(config, WORLD, train=False).val
    assert [int(row["true"]) for row in rows] == source.targets.tolist()
    assert rows[5]["image"] == source.name(5)


# Token mixing


def test_token_mixing(command, tmp_path):
    """The figures of the paper's table 1 (tools/complexity.py --table1), and of peers by their equations."""
    variants = ["strip_mlp_base", "sparse_mlp_base", "cycle_mlp_b1", "vip_s14", "hire_mlp_tiny", "wave_mlp_t_dw"]
    status, out, err = command("token-mixing", "--variants", *variants)
    assert (status, out.split()) == (0, ["token_mixing.png", "token_mixing.csv"]), err
    png_size(tmp_path / "token_mixing.png")
    rows = {(row["model"], int(row["stage"])): row for row in read_csv(tmp_path / "token_mixing.csv")}
    assert len(rows) == 4 * len(variants)
    last = {name: rows[name, 4] for name in variants}
    expected = {
        "strip_mlp_base": (2 * 16_464, 802_816),
        "sparse_mlp_base": (98, 3 * 896**2),
        "cycle_mlp_b1": (2 * 512**2, 2 * 512**2),
        "vip_s14": (2 * 384**2, 2 * 384**2),
        "hire_mlp_tiny": (2 * 2 * 1024 * 256, 2 * 512**2),
        "wave_mlp_t_dw": (2 * 2 * 7 * 512, 4 * 512**2 + 2 * 9 * 512),
    }
    parameters = {name: (int(r["interaction_parameters"]), int(r["fusion_parameters"])) for name, r in last.items()}
    assert parameters == expected
    assert (last["strip_mlp_base"]["share_parameters"], last["sparse_mlp_base"]["share_macs"]) == ("0.0394", "0.0052")
    # Hire-MLP's regions of 2 tokens need 8 x 7 for the 7 x 7.
    assert int(last["hire_mlp_tiny"]["interaction_macs"]) == 2 * (4 * 7) * 2 * 1024 * 256


# The command


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["strips", "CHECKPOINT", "--output", "a.pdf"], 1, "a.pdf: no PNG file"),
        (["strips", "CHECKPOINT", "--output", "nowhere/a.png"], 1, "there is no folder nowhere"),
        (
            ["strips", "CHECKPOINT", "--block", "stages.9.0"],
            1,
            "--block stages.9.0: no block with strips; accepted: st",
        ),
        (["strips", "missing.pth"], 1, "missing.pth: no such checkpoint file"),
        (["strips", "CHECKPOINT", "--patches", "0"], 2, "accepted: a whole number of 1 or more"),
        (["strips", "CHECKPOINT", "--dpi", "72"], 2, "accepted: a whole number of 150 or more"),
        (["cam", "CHECKPOINT", "missing.png"], 1, "missing.png: cannot be read as an image"),
        (["cam", "CHECKPOINT", "missing.png", "--class", "cat"], 1, "--class cat: no such class; accepted: 0, 1, 2"),
        (["cam", "CHECKPOINT", "missing.png", "--stage", "5"], 2, "--stage"),
        (["receptive-field"], 1, "nothing to draw"),
        (["receptive-field", "--variants", "strip_mlp_pic"], 1, "nearest names: strip_mlp_pico"),
        (["receptive-field", "CHECKPOINT", "--images", "nowhere"], 1, "--images nowhere: no image files there"),
        (["token-mixing", "--variants", "resnet18"], 1, "--variants resnet18: a ResNet; accepted: models that are one"),
        (["augmented", "--cfg", "missing.yaml"], 2, "missing.yaml: cannot be read"),
        (["augmented", "--cfg", DIGITS, "--opts", "DATA.BATCH_SIZE", "9999"], 1, "DATA.BATCH_SIZE is 9999"),
        (["mistakes", "CHECKPOINT", "--opts", "DATA.DATASET", "imagenet"], 1, "DATA.DATA_PATH is empty"),
        ([], 2, "PICTURE"),
    ],
)
def test_bad_input(command, checkpoint, tmp_path, arguments, status, message):
    found, out, err = command(*(str(checkpoint) if each == "CHECKPOINT" else each for each in arguments))
    assert found == status, err
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.glob("*.png"))


def test_a_file_that_nobody_named_is_not_replaced(command, checkpoint, tmp_path):
    (tmp_path / "strips.png").write_bytes(b"mine")
    status, _, err = command("strips", checkpoint)
    assert (status, (tmp_path / "strips.png").read_bytes()) == (1, b"mine")
    assert "strips.png: there already; name another file with --output" in err
    assert command("strips", checkpoint, "--output", "strips.png")[0] == 0
    assert png_size(tmp_path / "strips.png")
