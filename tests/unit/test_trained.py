"""A model from its checkpoint alone: whichever kind of file, with which names of classes, and what is said where
something is missing."""

from pathlib import Path

import pytest
import torch

from config import leaves, load_config
from engine.trained import Trained
from models import build_model
from models.released import checkpoint_filter_fn
from runtime.checkpoint import CheckpointError, read_checkpoint, save_safetensors
from tests.helpers import ROOT, TINY, trained_model
from utils import UserError

PICO = ROOT / "configs/strip_mlp_pico_digits.yaml"
NAMES = [f"digit {number}" for number in range(10)]


def make(seed: int = 0, count: int = 10):
    """(config, model) of a few thousand weights."""
    config, _ = load_config(PICO, [*TINY, "MODEL.NUM_CLASSES", str(count)])
    torch.manual_seed(seed)
    return config, build_model(config).eval()


def load(*arguments) -> Trained:
    return trained_model(*arguments, "--device", "cpu")


def save(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


def save_ours(path: Path, count: int = 10, **more) -> Path:
    config, model = make(count=count)
    return save(path, {"model": model.state_dict(), "config": leaves(config), **more})


def released(state: dict) -> dict:
    """A state dict of ours under the names, and in the shapes, of the released files."""
    backwards = (
        *((f"stages.{i}.", f"blocks{i + 1}.") for i in range(4)),
        *((f"merging.{i}.", f"merging{i + 1}.") for i in range(3)),
        ("shortcut_2to3.", "conv_s1_28."),
        ("shortcut_2to4.", "conv_s1_14."),
        ("shortcut_3to4.", "conv_s2_14."),
        ("head.fc.", "head."),
        ("token_mixing.norm.", "token_mixing.dwsc.conv_merge.BN."),
        ("token_mixing.dwconv.", "token_mixing.dwsc.conv_merge.Conv."),
        ("token_mixing.proj.", "token_mixing.smlp_block.mlp.0."),
        ("token_mixing.proj_norm.", "token_mixing.smlp_block.mlp.1."),
        ("token_mixing.fuse.", "token_mixing.smlp_block.fuse."),
        ("token_mixing.cgsmm.norm.", "token_mixing.smlp_block.BN."),
        *((f"token_mixing.cgsmm.strip_{a}.", f"token_mixing.smlp_block.proj_{a}.") for a in "hw"),
        *((f"token_mixing.cgsmm.fuse_{a}.", f"token_mixing.smlp_block.fuse_{a}.") for a in "hw"),
        *((f"cgsmm.pos_{a}.table", f"smlp_block.relate_pos_{a}.embeddings_table") for a in "hw"),
        *((f"token_mixing.lsmm.conv_{a}.", f"token_mixing.smlp_block.fc_{a}.") for a in "hw"),
        ("token_mixing.lsmm.reweight.", "token_mixing.smlp_block.reweight."),
        ("channel_mixing.dwconv.", "channel_mixing.conv_77."),
        ("channel_mixing.norm.", "channel_mixing.layer_norm."),
        ("channel_mixing.mlp.grn.weight", "channel_mixing.grn.gamma"),
        ("channel_mixing.mlp.grn.bias", "channel_mixing.grn.beta"),
        ("channel_mixing.mlp.", "channel_mixing."),
    )
    result = {}
    for name, value in state.items():
        if ".strip_" in name:
            value = value.flatten(0, 1)[:, :, None] if name.endswith("weight") else value.flatten()
        elif ".grn." in name:
            value = value[None, None, None]
        for ours, theirs in backwards:
            name = name.replace(ours, theirs)
        result[name] = value
    return result


def assert_same(trained: Trained, model) -> None:
    assert not trained.model.training
    found, expected = trained.model.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_ours(tmp_path):
    config, model = make()
    trained = load(save_ours(tmp_path / "best.pth", classes=NAMES))
    assert_same(trained, model)
    assert trained.classes == NAMES
    assert trained.path == tmp_path / "best.pth"
    assert trained.device == torch.device("cpu")
    assert leaves(trained.config) == leaves(config)


@pytest.mark.parametrize(("option", "seed"), [([], 1), (["--no-ema"], 0)], ids=["average", "weights"])
def test_moving_average(tmp_path, option, seed):
    path = save_ours(tmp_path / "a.pth", model_ema=make(seed=1)[1].state_dict())
    assert_same(load(path, *option), make(seed)[1])


def test_run_without_a_count_of_classes(tmp_path):
    """As in most configs, where it is 0: to be taken from the data, which is not here."""
    config, model = make(count=7)
    values = {**leaves(config), "MODEL.NUM_CLASSES": 0}
    trained = load(save(tmp_path / "a.pth", {"model": model.state_dict(), "config": values}))
    assert_same(trained, model)
    assert trained.config.MODEL.NUM_CLASSES == 7
    assert trained.classes == list("0123456")


def test_safetensors(tmp_path):
    config, model = make()
    path = tmp_path / "weights.safetensors"
    save_safetensors(model.state_dict(), path, leaves(config), NAMES)
    trained = load(path)
    assert_same(trained, model)
    assert trained.classes == NAMES


def test_released(tmp_path):
    _, model = make(count=6)
    state = released(model.state_dict())
    assert not [name for name in state if name.startswith(("stages", "merging."))]
    assert checkpoint_filter_fn(state, model).keys() == model.state_dict().keys()
    path = save(tmp_path / "released.pth", {"model": state, "epoch": 299})
    trained = load(path, "--cfg", PICO, "--opts", *TINY)
    assert_same(trained, model)
    assert len(trained.classes) == 6
    with pytest.raises(CheckpointError) as error:
        load(path)
    for part in (str(path), "does not say which model", "--cfg configs/"):
        assert part in str(error.value)


def test_timm_model(tmp_path):
    config, _ = load_config(ROOT / "configs/peers/resnet50.yaml", ["MODEL.NAME", "resnet10t", "DATA.IMG_SIZE", "32"])
    config.defrost()
    config.MODEL.NUM_CLASSES = 4
    model = build_model(config)
    values = {**leaves(config), "MODEL.NUM_CLASSES": 0}
    trained = load(save(tmp_path / "a.pth", {"model": model.state_dict(), "config": values}))
    assert_same(trained, model)
    assert len(trained.classes) == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.STRIP_MLP.LAYERS", [10**8, 1, 1, 1], "its config is of a model of inf parameters"),
        ("MODEL.STRIP_MLP.EMBED_DIM", 4096, "its config is of a model of"),
        ("MODEL.STRIP_MLP.EMBED_DIM", 2**30, "the model of its config cannot be built"),
        ("MODEL.NUM_CLASSES", 10**15, "its config is of a model of"),
        ("DATA.IMG_SIZE", 320_000, "its config is of a model of"),
    ],
)
def test_config_of_a_model_that_the_weights_are_not_of(tmp_path, key, value, message):
    """A small file does not make a large model."""
    path = save_ours(tmp_path / "a.pth")
    content = read_checkpoint(path)
    save(path, {**content, "config": {**content["config"], key: value}})
    with pytest.raises(UserError, match=message):
        load(path)
