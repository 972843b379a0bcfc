"""The registered models in other training loops: `torch.compile`, DDP, FSDP2, Lightning and Accelerate give the weights
of a plain one."""

import os

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import models  # noqa: F401  (registers the variants with timm)
from tests.helpers import free_port

pytestmark = pytest.mark.slow

STEPS = 2


def build() -> nn.Module:
    torch.manual_seed(0)
    # Without stochastic depth: the compiler draws other random numbers. Not of 32 pixels: the last map would have one
    # token, where BatchNorm takes the biases of strips away.
    return timm.create_model("strip_mlp_pico", img_size=64, embed_dim=8, depths=(1, 1, 1, 1), drop_path_rate=0.0)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 64, 64, generator=generator), torch.tensor([0, 3, 7, 9])) for _ in range(STEPS)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, backward=Tensor.backward) -> None:
    model.train()
    for images, labels in batches():
        optimizer.zero_grad()
        backward(F.cross_entropy(model(images), labels))
        optimizer.step()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """Parameters and BatchNorm's statistics after a plain loop."""
    return trained_plainly()


def trained_plainly() -> dict[str, Tensor]:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, sgd(model))
    after = model.state_dict()
    unchanged = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert unchanged == []
    return after


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=1e-5)


def test_compile(expected):
    """All but the compiler of the kernels, which takes minutes on CPUs; test_strip_mlp.py has one model for that."""
    model = build()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, sgd(compiled))
    check(model, expected)


def run_distributed(rank: int, port: str) -> None:
    """Of two processes that get the same images, so that BatchNorm sees what it sees in one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    expected = trained_plainly()

    model = build()
    wrapped = DistributedDataParallel(model)
    train(wrapped, sgd(wrapped))
    check(model, expected)

    model = build()
    mesh = init_device_mesh("cpu", (2,))
    for stage in model.stages:
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, sgd(model))
    full = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in model.state_dict().items()}
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-5)
    dist.destroy_process_group()


def test_ddp_and_fsdp():
    torch.multiprocessing.spawn(run_distributed, (free_port(),), nprocs=2)


def test_lightning(expected):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, batch):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return sgd(self)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    assert trainer.global_step == STEPS
    check(module.model, expected)


def test_accelerate(expected):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = build()
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    train(wrapped, optimizer, accelerator.backward)
    check(accelerator.unwrap_model(wrapped), expected)
