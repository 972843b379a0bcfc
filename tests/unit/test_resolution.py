"""Models for images of another size than the one that their weights were made for."""

import numpy as np
import pytest
import timm
import torch

import models  # noqa: F401  (registers them)
from config import ConfigError, get_default_config, image_size, load_config
from data import build_eval_loader, build_sources, build_train_loader
from models.resample import interpolation
from models.sparse_mlp import TokenLinear
from models.strip_mlp import RelativePosition, StripMLPLayer
from runtime.checkpoint import CheckpointError, load_weights, read_checkpoint
from runtime.distributed import World
from tests.helpers import TINY, python, write_image_folder

SMALLER = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 5}
SMALL = ["strip_mlp_tiny", "sparse_mlp_tiny"]


def small(name: str, size: int | tuple[int, int], **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, **{**SMALLER, **kwargs}).eval()


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("source, target", [(4, 8), (7, 12), (8, 3), (56, 96), (1, 5), (5, 1), (6, 6)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_interpolation(source, target, align_corners):
    matrix = interpolation(source, target, align_corners)
    assert matrix.shape == (target, source)
    if align_corners and min(source, target) == 1:
        return  # no table is that small
    torch.testing.assert_close(matrix @ torch.ones(source).double(), torch.ones(target).double())
    signal = torch.randn(source, dtype=torch.float64)
    if target >= source:
        np.testing.assert_allclose(interpolation(target, source, align_corners) @ matrix @ signal, signal, atol=1e-9)
    if target > source and not align_corners:  # NumPy's, between the centres of the pixels
        centres = (np.arange(target) + 0.5) * source / target - 0.5
        np.testing.assert_allclose(matrix @ signal, np.interp(centres, np.arange(source), signal), atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("axis, dim", [("row", 3), ("column", 2)])
def test_enlarged_strip_layer_works_on_enlarged_maps(axis, dim):
    """It gives the enlarged output for the enlarged input: exactly, along the mixed axis."""
    layer = StripMLPLayer(8, 6, axis, q=2, m=3).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = layer(x)
    matrix = interpolation(6, 10)

    def enlarge(y):
        return torch.tensordot(y, matrix, dims=([dim], [1])).movedim(-1, dim)

    layer.set_map_size((6, 10) if axis == "row" else (10, 6))
    assert layer.weight.shape == (4, 10, 10, 3) and layer.bias.shape == (4, 10)
    torch.testing.assert_close(layer(enlarge(x)), enlarge(expected))


@torch.no_grad()
def test_strip_layer_keeps_its_scale():
    """A constant map becomes the same, whatever the size: a longer row has more, smaller weights."""
    for length in (3, 6, 9, 24):
        layer = StripMLPLayer(4, 6, "row", q=2, m=1)
        layer.weight.fill_(0.5)
        layer.bias.fill_(2.0)
        layer.set_map_size((6, length))
        torch.testing.assert_close(layer(torch.ones(1, 4, 6, length)), torch.full((1, 4, 6, length), 0.5 * 6 + 2))


@torch.no_grad()
def test_table_keeps_its_offsets():
    """Twice as many tokens: the value of a difference is that of half of it in the old ones."""
    position = RelativePosition(2, (4, 4), "height")
    position.table.copy_(torch.arange(-4, 5).float()[:, None] ** 3 * torch.tensor([1.0, -2.0]))
    position.set_map_size((8, 8))
    assert position.table.shape == (17, 2)
    for difference in range(-8, 9, 2):
        expected = (difference / 2) ** 3
        torch.testing.assert_close(position.table[difference + 8], torch.tensor([expected, -2 * expected]))
    y = position(torch.zeros(1, 2, 8, 8))
    torch.testing.assert_close(y[0, 0, 1, 7], torch.tensor(27.0))  # j - i = 6
    position.set_map_size((8, 4))  # its radius is the height
    assert position.table.shape == (17, 2) and position(torch.zeros(1, 2, 8, 4)).shape == (1, 2, 8, 4)


@pytest.mark.parametrize("name", SMALL)
def test_same_size_changes_nothing(name):
    model = small(name, 64)
    before = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(64)
    model.set_input_size((64, 64))
    assert all(after is before[key] for key, after in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    resampled = model.resample(state)
    assert all(value is state[key] for key, value in resampled.items())


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [96, (128, 64), (64, 160)])
def test_larger_and_back(name, size):
    model, x = small(name, 64), images((64, 64))
    expected = model(x)
    model.set_input_size(size)
    larger = (size, size) if isinstance(size, int) else size
    assert model.img_size == larger and model(images(larger)).shape == (2, 5)
    with pytest.raises(ValueError, match="set_input_size"):
        model(x)
    model.set_input_size(64)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("source, target", [(64, 96), (96, 32), ((64, 96), (96, 64)), (32, (64, 96))])
def test_loading_is_resizing(name, source, target):
    """checkpoint_filter_fn and load_weights give what set_input_size does, which is what the model of that size has."""
    model = small(name, source)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = small(name, target)
    note = load_weights(loaded, {"model": state}, "file.pth")
    assert note.img_size == model.img_size and not note.fresh
    assert [m for m in note.notes(loaded) if f"from {model.img_size[0]} x {model.img_size[1]} to" in m]
    model.set_input_size(target)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in loaded.state_dict().items()}
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    x = images(model.img_size)
    torch.testing.assert_close(loaded(x), model(x))
    linear = [m for m in model.modules() if isinstance(m, TokenLinear)]
    assert all(m.in_features == m.out_features == m.weight.shape[0] for m in linear)


def test_size_that_does_not_divide():
    model = small("strip_mlp_tiny", 64)
    with pytest.raises(ValueError, match=r"img_size=72 must be a multiple .* nearest that work: 64 and 96"):
        model.set_input_size((64, 72))
    assert model.img_size == (64, 64)
    model.requires_grad_(False).half().set_input_size(96)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="reparameterized"):
        model.float().reparameterize().set_input_size(64)


def test_number_that_is_shown_as_many_is_not_resampled():
    """A few bytes of a file could ask for any amount of memory."""
    state = small("strip_mlp_tiny", 64).state_dict()
    name = "stages.0.0.token_mixing.cgsmm.strip_h.weight"
    state[name] = torch.zeros(()).expand(2, 10**5, 10**5, 3)
    with pytest.raises(CheckpointError, match=r"other shape: .*strip_h\.weight \(2, 100000, 100000, 3\)"):
        load_weights(small("strip_mlp_tiny", 96), {"model": state}, "file.pth")


# Rectangles in the config and the data


@pytest.mark.parametrize(
    "value, expected", [("64", (64, 64)), ("[64, 96]", (64, 96)), ([96, 64], (96, 64)), ("[32,32]", (32, 32))]
)
def test_image_size_of_the_config(tmp_path, value, expected):
    path = tmp_path / "run.yaml"
    path.write_text(f"DATA: {{IMG_SIZE: {value}}}\n")
    config, _ = load_config(path)
    assert image_size(config) == expected
    again = tmp_path / "again.yaml"
    again.write_text(config.dump())
    assert load_config(again)[0] == config
    assert load_config(path, ["DATA.IMG_SIZE", str(value)])[0] == config


@pytest.mark.parametrize("value", ["[64]", "[1, 2, 3]", "wide", "[64, 0]", "0", "[]", "64.5", "[64, wide]"])
def test_bad_image_sizes(tmp_path, value):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"DATA\.IMG_SIZE is .*\[height, width\]"):
        load_config(tmp_path / "run.yaml", ["DATA.IMG_SIZE", value])


def rectangular(size: list[int], **values) -> object:
    config = get_default_config()
    config.DATA.IMG_SIZE = size
    config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = 4, 0
    for key, value in values.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


@pytest.mark.parametrize("size", [[64, 96], [96, 64], [32, 16]])
def test_rectangles_from_the_loaders(tmp_path, size):
    root = write_image_folder(tmp_path, train=8, val=4)
    config = rectangular(size, DATA__DATA_PATH=str(root))
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    sources = build_sources(config, world)
    for loader in (build_train_loader(config, sources.train, world), build_eval_loader(config, sources.val, world)):
        assert next(iter(loader)).image.shape == (4, 3, *size)


# As a user


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder):
    """A run at 32 x 32 pixels: its checkpoint, and the command without --tag."""
    output = tmp_path_factory.mktemp("resolution")
    config = output / "tiny.yaml"
    config.write_text("MODEL: {NAME: tiny}\nAUG: {MIXUP: 0.0, CUTMIX: 0.0}\nSAVE_FREQ: 1\n")
    command = ["main.py", "--cfg", config, "--data-path", image_folder, "--output", output, "--batch-size", 4]
    command += ["--device", "cpu", "--opts", *TINY]
    python(*command, "--tag", "small")
    return output / "tiny/small/last.pth", command


@pytest.mark.parametrize("size", ["64", "[64,32]"])
def test_fine_tuning_at_another_size(run, size):
    checkpoint, command = run
    tag = f"at_{size.strip('[]').replace(',', '_')}"
    result = python(*command, "DATA.IMG_SIZE", size, "--tag", tag, "--pretrained", checkpoint)
    height, width = (64, 64) if size == "64" else (64, 32)
    assert f"resampled from 32 x 32 to {height} x {width} pixels" in result.stdout
    content = read_checkpoint(checkpoint.parent.parent / tag / "last.pth")
    weight = content["model"]["stages.0.0.token_mixing.cgsmm.strip_h.weight"]
    assert weight.shape[1:] == (width // 4, width // 4, 3)


def test_resuming_at_another_size_is_refused(run):
    _, command = run
    result = python(*command, "DATA.IMG_SIZE", 64, "TRAIN.EPOCHS", 2, "--tag", "small", ok=False)
    assert "made for images of 32 x 32 pixels, but DATA.IMG_SIZE is (64, 64)" in result.stderr
    assert "--pretrained" in result.stderr and result.returncode == 1


def test_evaluation_at_another_size(run):
    checkpoint, command = run
    evaluation = ["main_eval.py", *command[1:], "DATA.IMG_SIZE", 64, "--resume", checkpoint]
    result = python(*evaluation)
    assert "resampled from 32 x 32 to 64 x 64 pixels" in result.stdout and "top-1" in result.stdout
