"""Engines: the model's logits for any batch, which one `auto` takes, and what is refused."""

import pytest
import torch
from torch import nn

from config import load_config
from engine import inference
from engine.inference import InParts, build_engine
from models import build_model
from tests.helpers import ROOT, TINY
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config():
    return load_config(ROOT / "configs/strip_mlp_pico_digits.yaml", [*TINY, "MODEL.NUM_CLASSES", "10"])[0]


@pytest.fixture(scope="module")
def model(config) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():  # statistics of BatchNorms that are worth folding
        for _ in range(5):
            model(2 * torch.randn(8, 3, 32, 32) + 1)
    return model.eval()


def build(name, model, config, images=1000, amp=None, device=CPU):
    """The engine of a name, for batches of 5, and what it was said about it."""
    notes = []
    return build_engine(name, model, config, device, amp, images, 5, notes.append), notes


@pytest.fixture
def worthwhile(monkeypatch):
    """Engines that pay for any number of images, all installed, and all the model itself."""
    monkeypatch.setattr(inference, "AUTO", {"openvino": -1, "onnxruntime": -1, "reparameterized": -1})
    monkeypatch.setattr(inference, "missing_packages", lambda name: [])
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(inference.BUILDERS, name, lambda model, images, part: InParts(model, part, fixed=True))


@pytest.mark.parametrize("name", ["reparameterized", "openvino"])
def test_same_logits_for_any_batch(model, config, name):
    if name == "openvino":
        pytest.importorskip("openvino")
    engine, notes = build(name, model, config)
    assert len(notes) == 1 and notes[0].startswith(f"engine: {name}, logits within ")
    for batch in (1, 5, 7):
        images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            found, expected = engine(images), model(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_parts():
    """A part is never larger than asked for, and of that size where it must be."""
    sizes = []

    def run(images):
        sizes.append(len(images))
        return images.flatten(1)[:, :2]

    images = torch.randn(7, 3, 4, 4)
    for fixed, expected in ((False, [3, 3, 1]), (True, [3, 3, 3])):
        sizes.clear()
        torch.testing.assert_close(InParts(run, 3, fixed)(images), images.flatten(1)[:, :2])
        assert sizes == expected


def test_auto_takes_the_first_that_works(monkeypatch, worthwhile, model, config):
    assert build("auto", model, config)[1][0].startswith("engine: openvino, ")

    def fail(*args):
        raise RuntimeError("no such operation\nand much more")

    wrong = lambda model, images, part: lambda images: 1.001 * model(images)  # noqa: E731
    for broken, reason in ((fail, "RuntimeError: no such operation"), (wrong, "its logits differ from the model's by")):
        monkeypatch.setitem(inference.BUILDERS, "openvino", broken)
        engine, (line,) = build("auto", model, config)
        assert isinstance(engine, InParts)
        assert line.startswith("engine: onnxruntime, ") and f"openvino cannot be used: {reason}" in line
        with pytest.raises(UserError, match=f"--engine openvino: cannot be used for strip_mlp_pico_digits: {reason}"):
            build("openvino", model, config)

    monkeypatch.setattr(inference, "missing_packages", lambda name: ["it"] if name != "reparameterized" else [])
    line = build("auto", model, config)[1][0]
    assert line.startswith("engine: reparameterized, ")
    assert "onnxruntime is not installed (requirements/export.txt)" in line
    with pytest.raises(UserError, match=r"needs it: pip install -r requirements/export.txt"):
        build("onnxruntime", model, config)


def test_auto_is_the_model_where_nothing_is_to_be_saved(worthwhile, model, config):
    assert build("auto", model, config, images=inference.FEW_IMAGES - 1) == (model, [])
    assert build("auto", model, config, amp=torch.bfloat16) == (model, [])
    assert build("auto", model, config, device=torch.device("cuda")) == (model, [])
    assert build("torch", model, config) == (model, [])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("openvino", {"amp": torch.bfloat16}, "computes in float32, but AMP gives bfloat16; accepted with it: torch"),
        ("compile", {"device": torch.device("cuda")}, "the device is cuda; accepted here: torch, reparameterized"),
        ("missing.pt2", {}, "--engine missing.pt2: cannot be used for strip_mlp_pico_digits: FileNotFoundError"),
    ],
)
def test_refused(model, config, name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, model, config, **options)


def test_refused_with_a_compiled_model(model, config):
    config = config.clone()
    config.defrost()
    config.TRAIN.COMPILE = True
    with pytest.raises(UserError, match=r"TRAIN.COMPILE is True, .*; accepted with it: torch"):
        build("reparameterized", model, config)
