"""Peers as small as Strip-MLP of 0.7 M parameters, as configs/fashion_mnist/peers builds them."""

import pytest
import timm
import torch

from config import leaves, load_config
from models import build_model
from models.small_peers import default_cfgs
from tests.helpers import ROOT

NAMES = [name.partition(".")[0].removeprefix("small_") for name in default_cfgs]
# Those for detectors have configs of their own.
NAMES = [name for name in NAMES if not name.endswith("_stride4")]
FOLDER = ROOT / "configs/fashion_mnist"


def test_every_peer_has_its_config():
    assert {path.stem for path in (FOLDER / "peers").iterdir()} == {*NAMES, "strip_mlp"}


def test_strip_mlp_beside_them_differs_from_the_longer_run_in_its_epochs_alone():
    config, _ = load_config(FOLDER / "peers/strip_mlp.yaml", [])
    base, _ = load_config(FOLDER / "strip_mlp_pico_patch2.yaml", [])
    changed = {key for key, value in leaves(config).items() if value != leaves(base)[key]}
    assert changed == {"TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS"}


@pytest.mark.parametrize("name", NAMES)
def test_peer(name):
    config, notes = load_config(FOLDER / "peers" / f"{name}.yaml", ["MODEL.NUM_CLASSES", "7"])
    assert not notes
    assert f"small_{name}" == config.MODEL.NAME
    base, _ = load_config(FOLDER / "strip_mlp_pico_patch2.yaml", [])
    changed = {key for key, value in leaves(config).items() if value != leaves(base)[key]}
    assert changed - {"TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS"} == {"MODEL.TYPE", "MODEL.NAME", "MODEL.NUM_CLASSES"}
    model = build_model(config)
    assert 650_000 < sum(parameter.numel() for parameter in model.parameters()) < 760_000
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["convnext", "resnet", "sparse_mlp", "cycle_mlp", "hire_mlp", "wave_mlp", "swin"])
def test_stages_begin_at_stride_2(name):
    model = timm.create_model(f"small_{name}", features_only=True)
    maps = model(torch.randn(1, 3, 32, 32))[-4:]
    assert [32 // min(sorted(m.shape[1:])[:2]) for m in maps] == [2, 4, 8, 16]
    assert model.feature_info.reduction()[-4:] == [2, 4, 8, 16]
