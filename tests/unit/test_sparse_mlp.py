"""Sparse MLP against the reference numbers of the released code, and its loading of released checkpoints."""

import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from complexity import Complexity
from timm.layers import DropPath

from config import load_config
from models import build_model  # and registers the variants with timm
from models.released import checkpoint_filter_fn
from models.sparse_mlp import SparseMLP, TokenMixing
from optimizer import param_groups
from runtime.checkpoint import CheckpointError, load_pretrained, load_weights
from tests.reference import fill

DATA = json.loads((Path(__file__).parents[1] / "reference/sparse_mlp_tiny_64.json").read_text())
TOY = {"img_size": 32, "embed_dim": 8, "depths": (1, 2, 1, 1), "num_classes": 5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def released():
    """The released checkpoint that the reference numbers were made with."""
    return {name: torch.as_tensor(fill.weight(name, tuple(shape))) for name, shape in DATA["state_dict"]}


def tiny(**kwargs) -> SparseMLP:
    return timm.create_model(DATA["variant"], img_size=DATA["img_size"], num_classes=DATA["num_classes"], **kwargs)


@torch.no_grad()
def test_logits(released):
    model = tiny().eval()
    load_weights(model, {"model": released}, "released.pth")
    logits = model(torch.as_tensor(fill.images(DATA["eval"]["batch"], DATA["img_size"])))
    torch.testing.assert_close(logits, torch.tensor(DATA["eval"]["logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_released_checkpoint(released, prefix, wrapped):
    model = tiny()
    assert sum(parameter.numel() for parameter in model.parameters()) == DATA["num_params"]
    state = {prefix + name: value for name, value in released.items()}
    converted = checkpoint_filter_fn({"model": state, "epoch": 3} if wrapped else state, model)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in converted.items()} == expected
    assert list(checkpoint_filter_fn(model.state_dict(), model)) == list(expected)  # ours stays as it is


def test_every_released_entry_is_needed(released):
    model = tiny()
    for name in released:
        if name.split(".")[1] in ("0", "25") and not name.endswith("num_batches_tracked"):  # first and last blocks
            rest = {key: value for key, value in released.items() if key != name}
            with pytest.raises(CheckpointError, match=r"missing|does not fit"):
                load_weights(model, rest, "released.pth")


def test_checkpoint_of_another_depth(released):
    model = SparseMLP(img_size=64, num_classes=10, depths=(2, 8, 14, 1))
    with pytest.raises(CheckpointError, match=r"token_mix\.25"):
        load_weights(model, released, "released.pth")


def test_fine_tuning_with_other_classes(released, tmp_path):
    torch.save({"model": released}, tmp_path / "released.pth")
    model = timm.create_model("sparse_mlp_tiny", img_size=64, num_classes=3)
    fresh = model.head.fc.weight.clone()

    class Log(list):
        info = warning = lambda self, message, **kwargs: self.append(message)

    load_pretrained(model, str(tmp_path / "released.pth"), Log())
    assert torch.equal(model.head.fc.weight, fresh)
    assert torch.equal(model.patch_embed.weight, released["to_patch_embedding.0.0.weight"])


# Published: 24.12 M and 4.99 G, 48.56 M and 10.31 G, 65.88 M and 13.99 G
@pytest.mark.parametrize(
    ("variant", "millions", "gigas", "drop_path"),
    [("tiny", 24.12, 4.99, 0.0), ("small", 48.56, 10.31, 0.2), ("base", 65.88, 13.99, 0.3)],
)
def test_variants(variant, millions, gigas, drop_path):
    model = timm.create_model(f"sparse_mlp_{variant}")
    drops = [block.drop_path for stage in model.stages for block in stage]
    blocks = [drop.drop_prob if isinstance(drop, DropPath) else 0.0 for drop in drops]
    assert (blocks[0], blocks[-1]) == (0.0, pytest.approx(drop_path))
    assert blocks == sorted(blocks)
    assert len({round(b - a, 6) for a, b in itertools.pairwise(blocks)}) == 1  # linear
    count = Complexity(model, (224, 224)).of()
    assert round(count.parameters / 1e6, 2) == millions
    assert round(count.macs / 1e9, 2) == gigas


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_stochastic_depth_of_the_config(rate):
    """A rate of 0 too, in a model with another default."""
    path = Path(__file__).parents[2] / "configs/peers/sparse_mlp_small.yaml"
    config, _ = load_config(path, ["MODEL.DROP_PATH_RATE", str(rate), "MODEL.NUM_CLASSES", "10"])
    rates = [module.drop_prob for module in build_model(config).modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.0) == rate


@torch.no_grad()
def test_token_mixing():
    """Rows and columns against the sums that define them, on a map that is not square."""
    torch.manual_seed(0)
    block = TokenMixing(2, (3, 5)).eval().double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    y = F.gelu(block.norm2(block.dwconv(F.gelu(block.norm1(x)))))
    rows = torch.einsum("vw,nchw->nchv", block.mix_w.weight, y) + block.mix_w.bias
    columns = torch.einsum("gh,nchw->ncgw", block.mix_h.weight, y) + block.mix_h.bias[:, None]
    expected = F.conv2d(torch.cat([y, rows, columns], dim=1), block.proj.weight)
    torch.testing.assert_close(block(x), expected)


def test_grad_checkpointing():
    results = []
    for enable in False, True:
        torch.manual_seed(0)
        model = SparseMLP(**TOY, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        images = torch.randn(4, 3, 32, 32)
        model(images).square().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_optimised():
    model = SparseMLP(**TOY)
    decayed, rest = (group["params"] for group in param_groups(model, 0.05))
    assert len(decayed) + len(rest) == len(list(model.parameters()))
    assert all(p.ndim == 1 for p in rest)
    assert all(p.ndim > 1 for p in decayed)


def test_head():
    model = SparseMLP(**TOY).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 40}, r"img_size=40 .*32 and 64"),
        ({"depths": (1, 1, 1)}, r"depths=\(1, 1, 1\)"),
        ({"depths": (1, 0, 1, 1)}, r"depths=\(1, 0, 1, 1\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseMLP(**{**TOY, **arguments})


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"64.*32"):
        SparseMLP(**TOY)(torch.zeros(1, 3, 64, 64))
