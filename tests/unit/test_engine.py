"""One epoch of training, evaluation, throughput; mixed precision; this process's place in the world."""

import contextlib
import copy
import itertools
import logging
import math
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from config import ConfigError, get_default_config
from data import build_batch_transform, build_mixup, build_normalize, build_train_loader, denormalize
from data.dataset import Sample
from data.loading import LoadingFailed
from data.sources import ArraySource
from engine import epoch
from engine.classification import Classification
from engine.control import Control
from engine.distill import Distillation, Teacher
from engine.epoch import Meter, Training, train_one_epoch
from engine.evaluate import evaluate, resolve_amp, throughput
from engine.finite import NonFiniteError, Step, build_scaler
from engine.loss import check_loss
from engine.state import Progress, TrainingState, is_better
from models import StripMLP, compile_model, prepare_model
from optimizer import build_optimizer
from runtime import distributed
from runtime.distributed import TIMEOUT, World, close_world, init_world
from runtime.signals import Stopped
from utils import UserError, seed_all

LR = 0.1
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def config_with(**values):
    """Plain SGD at full precision and batches of 4, but for what is given; `A__B` stands for A.B."""
    plain = {
        "DATA__BATCH_SIZE": 4,
        "DATA__IMG_SIZE": 32,
        "DATA__NUM_WORKERS": 0,
        "MODEL__LABEL_SMOOTHING": 0.0,
        "TRAIN__OPTIMIZER__NAME": "sgd",
        "TRAIN__OPTIMIZER__MOMENTUM": 0.0,
        "TRAIN__WEIGHT_DECAY": 0.0,
        "TRAIN__CLIP_GRAD": 0.0,
        "AMP": "off",
        "DATA__MAX_UNREADABLE": 1.0,
        "AUG__REPROB": 0.0,
    }
    config = get_default_config()
    for key, value in {**plain, **values}.items():
        config.merge_from_list([key.replace("__", "."), value])
    return config


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, rank, size, CPU)


ALONE = world()


class Loader(list):
    """Batches in memory with what the engine asks of a loader."""

    def __init__(self, batches=()):
        super().__init__(batches)
        self.epochs = []
        self.sampler = SimpleNamespace(set_epoch=lambda epoch, start: self.epochs.append((epoch, start)))
        self.dataset = Data(sum(len(batch.index) for batch in self))

    def __iter__(self):
        """From where the sampler was told to begin."""
        start = self.epochs[-1][1] if self.epochs else 0
        return itertools.islice(super().__iter__(), start // len(self[0].index) if self else 0, None)


class Data:
    def __init__(self, images: int):
        self.images = images

    def reason(self, index: int) -> str:
        return f"file {index}: damaged"

    def __len__(self) -> int:
        return self.images


def batches(images, targets, size: int = 4, readable=None) -> Loader:
    readable = torch.ones(len(images), dtype=torch.bool) if readable is None else torch.as_tensor(readable)
    parts = (part.split(size) for part in (images, torch.as_tensor(targets), torch.arange(len(images)), readable))
    return Loader(Sample(*part) for part in zip(*parts, strict=True))


def noise(count: int, features: int = 6, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, features, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def linear(features: int = 6, classes: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(features, classes)


class Schedule:
    """A rate of its own for each step, and the steps it was asked for."""

    def __init__(self, optimizer, rate=lambda step: LR):
        self.optimizer, self.rate, self.steps = optimizer, rate, []

    def step_update(self, step: int) -> None:
        self.steps.append(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)


class Log(logging.Logger):
    def __init__(self):
        super().__init__("test")
        self.messages = []

    def handle(self, record):
        self.messages.append((record.levelname, record.getMessage()))

    def of(self, level: str) -> list[str]:
        return [message for found, message in self.messages if found == level]


def training_state(config, model, epoch=0, scaler=None, optimizer=None, progress=None) -> TrainingState:
    amp = resolve_amp(config, CPU)
    scaler = scaler or build_scaler(amp, CPU)
    progress = progress or Progress()
    return TrainingState(
        model, optimizer or build_optimizer(config, model, LR), scaler, amp, epoch=epoch, progress=progress
    )


def train(
    config,
    model,
    loader,
    *,
    mixup=None,
    world=ALONE,
    rate=lambda step: LR,
    log=None,
    control=None,
    state=None,
    **kwargs,
):
    """Trains one epoch; gives its metrics and the schedule."""
    state = state or training_state(config, model, **kwargs)
    schedule = Schedule(state.optimizer, rate)
    log = Log() if log is None else log
    task = Classification(config, loader, Loader(), world, mixup)
    run = Training(config, task, state, model, schedule, world, log, control or Control())
    metrics = train_one_epoch(run)
    return metrics, schedule


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Accumulation


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulation_equals_a_larger_batch(optimizer):
    """Through the real loader, with augmentation, which depends on seed, epoch and index alone."""
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    source = ArraySource(images, [i % 3 for i in range(32)], "abc", "noise")
    found = []
    for batch, accumulation in ((16, 1), (8, 2), (4, 4), (2, 8)):
        config = config_with(
            DATA__BATCH_SIZE=batch,
            TRAIN__ACCUMULATION_STEPS=accumulation,
            TRAIN__OPTIMIZER__NAME=optimizer,
            TRAIN__WEIGHT_DECAY=0.05,
            TRAIN__CLIP_GRAD=0.5,
            MODEL__LABEL_SMOOTHING=0.1,
        )
        model = nn.Sequential(nn.Flatten(), linear(3 * 32 * 32))
        before = weights(model)
        loader = build_train_loader(config, source, ALONE)
        metrics, schedule = train(config, model, loader, epoch=2, rate=lambda step: 0.01)
        assert schedule.steps == [4, 5, 5]  # the last once more, for the metrics
        found.append((weights(model) - before, metrics["train_loss"]))
    for change, loss in found[1:]:
        torch.testing.assert_close(change, found[0][0], rtol=1e-3, atol=1e-6)
        assert loss == pytest.approx(found[0][1], rel=1e-5)


def test_shorter_last_group_and_rate_of_each_step():
    """Batches of 4 in groups of 4, 4 and 2: steps of 16, 16 and 8 images, each at its own rate."""
    images, targets = noise(40)
    model, reference = linear(), linear()

    def rate(step):
        return 0.1 / (1 + step)

    config = config_with(TRAIN__ACCUMULATION_STEPS=4)
    metrics, schedule = train(config, model, batches(images, targets), epoch=5, rate=rate)
    assert schedule.steps == [15, 16, 17, 17]
    losses = []
    for step, group in zip(schedule.steps[:3], (slice(0, 16), slice(16, 32), slice(32, 40)), strict=True):
        losses += [
            F.cross_entropy(reference(i), t).item()
            for i, t in zip(images[group].split(4), targets[group].split(4), strict=True)
        ]
        gradients = torch.autograd.grad(
            F.cross_entropy(reference(images[group]), targets[group]), list(reference.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= rate(step) * gradient
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-5, atol=1e-6)
    assert metrics["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["lr"] == rate(17)


def test_processes_wait_for_each_other_once_per_step(monkeypatch):
    """DistributedDataParallel's no_sync in all passes but the last of each step."""
    events = []

    class Wrapped(nn.Linear):
        @contextlib.contextmanager
        def no_sync(self):
            events.append("no_sync")
            yield

        def forward(self, x):
            events.append("forward")
            return super().forward(x)

    monkeypatch.setattr(distributed.dist, "all_reduce", lambda values, **_: values.mul_(2))
    metrics, _ = train(config_with(TRAIN__ACCUMULATION_STEPS=3), Wrapped(6, 3), batches(*noise(20)), world=world(0, 2))
    assert events == ["no_sync", "forward", "no_sync", "forward", "forward", "no_sync", "forward", "forward"]
    assert math.isfinite(metrics["train_loss"])


# What an epoch does to the gradients


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_gradients_are_clipped_and_float16_scaling_does_not_change_the_step(clip):
    images, targets = noise(8)
    found = []
    for amp in ("off", "float16"):
        model = linear()
        before = weights(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=amp == "float16")
        config = config_with(AMP=amp, TRAIN__CLIP_GRAD=clip, TRAIN__ACCUMULATION_STEPS=2)
        train(config, model, batches(images, targets), scaler=scaler)
        found.append(weights(model) - before)
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0.01 * found[0].abs().max().item())
    if clip:
        assert found[0].norm().item() == pytest.approx(LR * clip, rel=1e-3)


def test_float16_step_that_overflows_is_skipped():
    images, targets = noise(8)
    model = linear()
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    train(config_with(AMP="float16", TRAIN__CLIP_GRAD=1.0), model, batches(100 * images, targets), scaler=scaler)
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() == 2.0**14  # halved in both steps


@pytest.mark.parametrize(
    ("amp", "expected"), [("off", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_precision_of_the_model(amp, expected):
    """The loss of half-precision logits is computed in float32."""
    model, found = linear(), []
    model.register_forward_hook(lambda module, args, output: found.append(output))
    config, data = config_with(AMP=amp), batches(*noise(8))
    train(config, model, data)
    loss = evaluate(config, model, data, ALONE, Log())[0]["val_loss"]
    assert [logits.dtype for logits in found] == [expected] * 4
    assert model.weight.dtype == torch.float32
    assert loss == pytest.approx(F.cross_entropy(torch.cat(found[2:]).float(), noise(8)[1]).item(), rel=1e-6)


# The loss


def test_images_of_a_batch_are_normalised_erased_and_mixed_by_position():
    """What the model is given, from a real loader, depends on (seed, epoch, batch, rank). Mixup's soft targets are not
    smoothed again."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    source = ArraySource(images, [i % 3 for i in range(12)], "abc", "noise")
    config = config_with(SEED=7, AUG__REPROB=0.5, AUG__REMODE="pixel", AUG__RECOUNT=2, MODEL__LABEL_SMOOTHING=0.3)
    mixup = build_mixup(config, 3)
    model, found = nn.Sequential(nn.Flatten(), linear(3 * 32 * 32)), []
    model.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    loader = build_train_loader(config, source, ALONE)
    arguments = {"mixup": mixup, "epoch": 4, "world": world(rank=1), "rate": lambda step: 0.0}
    first, second = (train(config, model, loader, **arguments)[0]["train_loss"] for _ in range(2))
    assert first == second
    transform = build_batch_transform(config, mixup, CPU)
    loader.sampler.set_epoch(4)
    losses, given = [], list(found)
    for i, batch in enumerate(loader):
        seed_all(7, 4, i, 1)
        image, soft = transform(batch.image, batch.target)
        assert torch.equal(image, given[i]) and torch.equal(image, given[i + 3])
        losses.append(F.cross_entropy(model(image), soft).item())
    assert first == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_first_images_of_a_run_are_shown_as_the_model_gets_them():
    pixels = torch.randint(0, 256, (8, 3, 4, 6), dtype=torch.uint8)
    shown = []
    for done in (0, 1):
        model = nn.Sequential(nn.Flatten(), linear(72))
        control = Control(show=lambda images, targets: shown.append(images))
        train(config_with(), model, batches(pixels, [0] * 8), epoch=done, control=control)
    (images,) = shown
    torch.testing.assert_close(denormalize(images), pixels[:4] / 255)


# Losses and gradients that are not finite


class Fragile(nn.Sequential):
    """With running statistics, which an image that is not finite spoils."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(6), linear())


@pytest.mark.parametrize(
    ("bad", "accumulation", "optimizer"),
    [(float("nan"), 1, "sgd"), (float("inf"), 2, "sgd"), (float("nan"), 2, "adamw"), (float("inf"), 1, "adamw")],
)
def test_step_with_a_loss_that_is_not_finite_leaves_no_trace(bad, accumulation, optimizer):
    """Weights, moments, statistics and mean loss are those of an epoch without it."""
    images, targets = noise(40)
    values = {"TRAIN__ACCUMULATION_STEPS": accumulation, "TRAIN__OPTIMIZER__NAME": optimizer}
    config = config_with(**values, TRAIN__CLIP_GRAD=1.0, TRAIN__OPTIMIZER__MOMENTUM=0.9)
    good = [i for i in range(40) if i // (4 * accumulation) != 2]
    found = []
    for data in (torch.where(torch.arange(40)[:, None] == 8 * accumulation + 1, bad, images), images[good]):
        model = Fragile()
        state = training_state(config, model)
        log = Log()
        some_targets = targets if len(data) == 40 else targets[good]
        metrics, _ = train(config, model, batches(data, some_targets), state=state, log=log)
        found.append((model.state_dict(), str(state.optimizer.state_dict()["state"]), metrics["train_loss"]))
        if len(data) == 40:
            assert metrics["skipped_steps"] == 1
            ids = " ".join(str(8 * accumulation + i) for i in range(4 * accumulation))
            (line,) = log.of("WARNING")
            assert line.startswith("epoch 1 step 3 skipped: loss nan, gradient norm nan, lr 1.000e-01, float32")
            assert line.endswith(f"samples of the batch: {ids}")
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize(
    ("bad_steps", "most", "before", "stops"),
    [
        ([2], 0, 0, True),
        ([1, 2, 4, 5, 6], 2, 0, True),
        ([0, 1], 4, 3, True),
        ([2], 1, 1, False),
        ([1, 2, 4, 5], 2, 0, False),
    ],
)
def test_so_many_steps_in_a_row_may_be_skipped(bad_steps, most, before, stops):
    """Counted over epochs and restarts."""
    images, targets = noise(40)
    for step in bad_steps:
        images[4 * step + 1] = float("nan")
    state = training_state(config_with(), linear(), epoch=6, progress=Progress(skipped_in_row=before))
    config = config_with(PRINT_FREQ=5, TRAIN__MAX_SKIPPED_STEPS=most)
    arguments = {"rate": lambda step: 0.125, "state": state}
    if not stops:
        metrics, _ = train(config, state.model, batches(images, targets), **arguments)
        assert metrics["skipped_steps"] == len(bad_steps) and math.isfinite(metrics["train_loss"])
        assert state.progress.skipped_in_row == 0
        return
    with pytest.raises(NonFiniteError) as error:
        train(config, state.model, batches(images, targets), **arguments)
    last = bad_steps[-1]
    ids = " ".join(str(4 * last + i) for i in range(4))
    for part in (f"epoch 7 step {last + 1}: loss nan", "lr 1.250e-01", "float32", "MAX_SKIPPED_STEPS", ids):
        assert part in str(error.value)
    assert weights(state.model).isfinite().all()


class InfiniteConstant(nn.Linear):
    """Its loss is not finite, but has a finite gradient."""

    def forward(self, x):
        return super().forward(x) + (float("inf") if (x > 1e20).any() else 0.0)


class InfiniteGradient(nn.Linear):
    """Its loss is finite."""

    def forward(self, x):
        return super().forward(x) + ((self.weight.sum() * 0).abs().sqrt() if (x > 1e20).any() else 0.0)  # 0 * inf


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", [InfiniteConstant, InfiniteGradient, nn.Linear])
def test_loss_or_gradient_or_norm_alone_is_not_finite(kind, clip):
    """The last kind has finite gradients, whose norm overflows."""
    images, targets = noise(8)
    images[4:] = 1e25
    config, log = config_with(TRAIN__OPTIMIZER__NAME="adamw", TRAIN__CLIP_GRAD=clip), Log()
    state = training_state(config, kind(6, 3))
    metrics, _ = train(config, state.model, batches(images, targets), state=state, log=log)
    assert metrics["skipped_steps"] == 1
    assert {float(values["step"]) for values in state.optimizer.state.values()} == {1}
    assert weights(state.model).isfinite().all()
    assert ("samples" in log.of("WARNING")[0]) == (kind is InfiniteConstant)  # which alone tells whose fault it is


class TwoLayers(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 3))

    def get_classifier(self) -> nn.Module:
        return self[1]


@pytest.mark.parametrize("amp", ["off", "float16"])
@pytest.mark.parametrize("mode", ["value", "agc"])
def test_clipping_by_value_and_by_weight(mode, amp):
    """Against timm's, which is given the gradients of the loss itself."""
    images, targets = noise(4)
    model, reference = TwoLayers(), TwoLayers()
    limit = {"value": 0.003, "agc": 0.01}[mode]
    train(config_with(TRAIN__CLIP_MODE=mode, TRAIN__CLIP_GRAD=limit, AMP=amp), model, batches(images, targets))
    F.cross_entropy(reference(images), targets).backward()
    unclipped = [p.grad.clone() for p in reference.parameters()]
    clipped = reference.parameters() if mode == "value" else reference[0].parameters()
    dispatch_clip_grad(list(clipped), limit, mode)
    assert not any(torch.equal(p.grad, g) for p, g in zip(reference[0].parameters(), unclipped, strict=False))
    torch.optim.SGD(reference.parameters(), lr=LR).step()
    tolerance = 1e-6 if amp == "off" else 2e-4
    torch.testing.assert_close(weights(model), weights(reference), rtol=tolerance, atol=tolerance)


def test_binary_cross_entropy():
    images, targets = noise(4)
    metrics = {}
    for smoothing, threshold in ((0.0, 0.0), (0.3, 0.0), (0.3, 0.2)):
        config = config_with(
            TRAIN__LOSS="bce", MODEL__LABEL_SMOOTHING=smoothing, TRAIN__BCE_THRESHOLD=threshold, MODEL__NUM_CLASSES=3
        )
        check_loss(config)
        found, _ = train(config, linear(), batches(images, targets))
        right = F.one_hot(targets, 3).float()
        expected = right * (1 - smoothing) + smoothing / 3 if not threshold else right
        loss = F.binary_cross_entropy_with_logits(linear()(images), expected)
        assert found["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
        metrics[smoothing, threshold] = found["train_loss"]
    assert metrics[0.3, 0.2] == metrics[0.0, 0.0] != metrics[0.3, 0.0]
    config.TRAIN.BCE_THRESHOLD = 0.05
    with pytest.raises(ConfigError, match=r"BCE_THRESHOLD is 0.05.*target of 0.1"):
        check_loss(config)


def test_distillation_losses():
    """DeiT's equations (section 3), with a teacher that is asked, and with cached logits, of which one is missing."""
    images, targets = noise(4)
    student, teacher = linear(), nn.Linear(6, 3)
    batch = batches(images, targets)[0]
    criterion, logits, opinion = nn.CrossEntropyLoss(), student(images), teacher(images)
    labels = criterion(logits, targets)
    p, q = F.softmax(opinion / 3, dim=1), F.softmax(logits / 3, dim=1)
    soft = 9 * (p * (p / q).log()).sum(dim=1)
    hard = F.cross_entropy(logits, opinion.argmax(dim=1), reduction="none")
    cached = opinion.detach().numpy().copy()
    cached[2] = np.nan
    for kind, losses in (("soft", soft), ("hard", hard)):
        found = Distillation(kind, 0.25, 3.0, teacher=Teacher(teacher))(criterion, logits, images, targets, batch)
        torch.testing.assert_close(found, 0.75 * labels + 0.25 * losses.mean())
        found = Distillation(kind, 0.25, 3.0, logits=cached)(criterion, logits, images, targets, batch)
        torch.testing.assert_close(found, 0.75 * labels + 0.25 * losses[[0, 1, 3]].sum() / 4)
    # Two tokens: the second one listens.
    both = Distillation("hard", 0.25, 3.0, teacher=Teacher(teacher))(
        criterion, (logits, -logits), images, targets, batch
    )
    torch.testing.assert_close(both, 0.75 * labels + 0.25 * F.cross_entropy(-logits, opinion.argmax(dim=1)))


def test_teacher_gets_images_with_its_own_statistics():
    images = torch.rand(2, 3, 4, 4)
    given = build_normalize(config_with(), CPU)((images * 255).byte())
    pixels = denormalize(given)
    seen = Teacher(nn.Identity(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))(given)
    std = torch.tensor([0.5, 0.25, 0.5])[:, None, None]
    torch.testing.assert_close(seen, (pixels - 0.5) / std, rtol=1e-4, atol=1e-5)


def test_where_waiting_costs_steps_are_checked_at_log_lines(monkeypatch):
    """As on CUDA: the weights are as good, the message comes later."""
    monkeypatch.setattr(epoch, "steps_between_checks", lambda config, world: config.PRINT_FREQ)
    images, targets = noise(40)
    images[8:20] = float("nan")  # steps 3 to 5
    for most, logged in ((3, 3), (2, 0)):
        model, log = Fragile(), Log()
        config = config_with(PRINT_FREQ=4, TRAIN__MAX_SKIPPED_STEPS=most)
        stop = pytest.raises(NonFiniteError, match="epoch 1 step 5: ") if most == 2 else contextlib.nullcontext()
        with stop:
            train(config, model, batches(images, targets), log=log)
        assert len(log.of("INFO")) == logged or most == 2
        assert all(value.isfinite().all() for value in model.state_dict().values())


# A compiled model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_prepared_model(compiled, channels_last):
    """Under the compiler and in the memory format of the config, with the names that checkpoints have; and so are the
    images that it is fed."""
    config = config_with(TRAIN__COMPILE=compiled, TRAIN__CHANNELS_LAST=channels_last)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    names = list(model.state_dict())
    prepare_model(config, model, CPU)
    assert (model._compiled_call_impl is not None) is compiled
    assert list(model.state_dict()) == names
    images = build_normalize(config, CPU)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    for tensor in model[0].weight, images:
        assert tensor.is_contiguous(memory_format=torch.channels_last) is channels_last


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "graphs_per_mode"), [("model", 1), ("blocks", 4)])
def test_compiled_once_for_training_and_once_for_evaluation(unit, graphs_per_mode):
    """The whole model, or the block of each stage, of which one has two. Not again in later epochs, nor for the last
    batch of an evaluation, which is smaller; nor are there graph breaks, each of which would add a graph. What comes
    out is what the model gives without the compiler."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (10, 3, 32, 32), generator=generator, dtype=torch.uint8)
    targets = torch.randint(3, (10,), generator=generator)
    shape = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_classes": 3, "drop_path_rate": 0.0}
    results = {}
    for compiled in False, True:
        config = config_with(TRAIN__COMPILE=compiled)
        torch.manual_seed(0)
        model = StripMLP(**shape)
        graphs = CompileCounterWithBackend("aot_eager")
        if compiled:
            torch._dynamo.reset()
            compile_model(model, unit, backend=graphs, fullgraph=True)
        found, counts = [], []
        for _ in range(2):
            found.append(
                train(config, model, batches(images[:8], targets[:8]), rate=lambda step: 1e-3)[0]["train_loss"]
            )
            found.append(evaluate(config, model, batches(images, targets), ALONE, Log())[0]["val_loss"])
            counts.append(graphs.frame_count)
        results[compiled] = found
        assert counts == ([2 * graphs_per_mode] * 2 if compiled else [0, 0])
    assert results[True] == pytest.approx(results[False], rel=1e-4)


# Where an epoch may be left, and gone on with


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("why", ["stop", "failure", "save"])
def test_an_epoch_in_two_parts_equals_one(why, accumulation):
    """By a signal, a loader that fails inside a step, and a checkpoint that training goes on after."""
    images, targets = noise(40)
    config = config_with(TRAIN__ACCUMULATION_STEPS=accumulation, TRAIN__OPTIMIZER__NAME="adamw", AMP="bfloat16")
    data = batches(images, targets, readable=[i % 7 != 0 for i in range(40)])
    whole = training_state(config, Fragile(), epoch=3)
    expected, _ = train(config, whole.model, data, state=whole)

    class Failing(Loader):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 7 and self.epochs:
                    raise OSError("gone")
                yield batch

    state = training_state(config, Fragile(), epoch=3)
    control, first, saved = Control(), data, []
    if why == "failure":
        first = Failing(data)
        with pytest.raises(LoadingFailed, match="gone"):
            train(config, state.model, first, state=state, control=control)
        assert state.progress.step == 7 // accumulation
    elif why == "stop":
        control.watchdog.at = lambda *position, doing: setattr(
            control.request, "signal", "SIGTERM" if (*position, 0)[2] >= 6 else None
        )
        with pytest.raises(Stopped):
            train(config, state.model, data, state=state, control=control)
        assert state.progress.step == 6 // accumulation
    else:
        control.save_due = lambda step: step == 2
        control.save = lambda: saved.append(
            copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict(), state.progress))
        )
        train(config, state.model, data, state=state, control=control)
        (content,) = saved
        state.model.load_state_dict(content[0])
        state.optimizer.load_state_dict(content[1])
        state.progress = content[2]
        assert state.progress.step == 2
    found, schedule = train(config, state.model, data, state=state)
    assert len(schedule.steps) < 10
    for key in ("train_loss", "lr", "skipped_steps", "unreadable_train"):
        assert found[key] == expected[key]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, state.model.state_dict()[name]), name
    assert str(whole.optimizer.state_dict()) == str(state.optimizer.state_dict())


def test_too_many_unreadable_images():
    images, targets = noise(40)
    readable = [i not in (1, 9, 17, 25) for i in range(40)]
    state = training_state(config_with(), linear())
    config = config_with(DATA__MAX_UNREADABLE=0.05)
    with pytest.raises(LoadingFailed, match=r"3 of 40 images cannot be read .* DATA\.MAX_UNREADABLE 0\.05"):
        train(config, state.model, batches(images, targets, readable=readable), state=state)
    assert state.progress.step == 5  # before the sixth batch all know of the third
    for fraction in (0.05, 0.1):
        config = config_with(DATA__MAX_UNREADABLE=fraction)
        with pytest.raises(LoadingFailed) if fraction < 0.1 else contextlib.nullcontext():
            evaluate(config, linear(), batches(images, targets, readable=readable), ALONE, Log())


# Randomness and bookkeeping


def test_draws_depend_on_seed_epoch_batch_and_rank():
    def draws(**arguments):
        found = []

        class Model(nn.Linear):
            def forward(self, x):
                found.append((torch.rand(1).item(), random.random(), float(np.random.rand())))
                return super().forward(x)

        seed = arguments.pop("seed", 3)
        torch.rand(random.randrange(9))  # whatever was drawn before
        train(config_with(SEED=seed), Model(6, 3), batches(*noise(12)), **arguments)
        return found

    first = draws()
    assert len({torch_draw for torch_draw, *_ in first}) == 3
    assert draws() == first
    for other in (draws(epoch=1), draws(world=world(rank=1)), draws(seed=4)):
        for a, b in zip(first, other, strict=True):
            assert not set(a) & set(b)


def test_parts_of_the_loss_have_the_same_order_on_all_processes():
    """Whose sums are added by position: a library may give them in another order where it takes another path."""
    progress = Progress()
    meter = Meter(SimpleNamespace(state=SimpleNamespace(progress=progress), world=ALONE))
    meter.note({"b": torch.tensor(1.0), "a": torch.tensor(2.0)})
    meter.add(Step(0, 0.1, [torch.tensor(3.0)], torch.tensor(1.0), []))
    assert progress.parts == ["a", "b"] and progress.losses.tolist() == [3, 1, 2, 1]


def test_metrics_and_modes():
    loader = batches(*noise(12), readable=[True] * 9 + [False] * 3)
    model = nn.Sequential(nn.BatchNorm1d(6), linear()).eval()
    log = Log()
    config = config_with(MODEL__LABEL_SMOOTHING=0.3)
    (first, *_) = loader
    expected = F.cross_entropy(copy.deepcopy(model).train()(first.image), first.target, label_smoothing=0.3).item()
    assert train(config, copy.deepcopy(model), Loader([first]))[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
    metrics, _ = train(config, model, loader, epoch=3, log=log)
    assert loader.epochs == [(3, 0)]
    assert model.training
    assert model[0].num_batches_tracked == 3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert metrics["unreadable_train"] == 3
    assert metrics["images_per_second"] == pytest.approx(12 / metrics["seconds"])
    assert 0 <= metrics["data_wait"] < 1
    assert 10 < metrics["memory_mb"] < 1e6
    assert log.of("WARNING") == [f"cannot be read as an image: file {i}: damaged" for i in (9, 10, 11)]


# Waiting for the device

WAITING = ["item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"]


@pytest.fixture
def waits(monkeypatch):
    """Counts what would wait for a CUDA device, by the number of forward passes before it."""
    counts, passes = {}, itertools.count(1)

    def noted(method):
        def call(tensor, *args, **kwargs):
            counts[waits.passes] = counts.get(waits.passes, 0) + 1
            return method(tensor, *args, **kwargs)

        return call

    class Model(nn.Linear):
        def forward(self, x):
            waits.passes = next(passes)
            return super().forward(x)

    waits = SimpleNamespace(counts=counts, passes=0, model=Model(6, 3))
    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    return waits


def test_training_waits_for_the_device_at_log_lines_only(waits, monkeypatch):
    monkeypatch.setattr(epoch, "steps_between_checks", lambda config, world: config.PRINT_FREQ)
    data = batches(*noise(40))
    for i, batch in enumerate(data):
        # Flags of the loader stay on the CPU: as arrays, they are not counted.
        data[i] = batch._replace(readable=batch.readable.numpy())
    waits.counts.clear()
    config = config_with(PRINT_FREQ=4, TRAIN__CLIP_GRAD=1.0)
    # Fused, as on CUDA: others ask on the host whether a gradient is finite.
    optimizer = torch.optim.SGD(waits.model.parameters(), lr=LR, fused=True)
    train(config, waits.model, data, optimizer=optimizer)
    assert set(waits.counts) == {4, 8, 10}


def test_evaluation_waits_for_the_device_at_the_end_only(waits):
    class Flags(torch.Tensor):
        """Flags of the loader, whose use on the CPU is not counted."""

        def all(self):
            return True

    data = batches(*noise(40))
    for i, batch in enumerate(data):
        data[i] = batch._replace(readable=batch.readable.as_subclass(Flags))
    evaluate(config_with(), waits.model, data, ALONE, Log())
    assert set(waits.counts) == {10}


# Evaluation


def by_hand(logits: torch.Tensor, targets, readable) -> dict[str, float]:
    top1 = top5 = loss = 0
    for row, target, good in zip(logits.tolist(), targets, readable, strict=True):
        if not good:
            continue
        loss += math.log(sum(math.exp(x) for x in row)) - row[target]
        order = sorted(range(len(row)), key=lambda c: -row[c])
        top1 += order[0] == target
        top5 += target in order[:5]
    n = len(logits)
    return {"top1": 100 * top1 / n, "top5": 100 * top5 / n, "val_loss": loss / sum(readable), "images": n}


@pytest.mark.parametrize(("size", "classes"), [(1, 2), (4, 5), (4, 9), (11, 3)])
def test_evaluation_by_hand(size, classes):
    """11 images in batches of `size`, the last with the remainder; images are their own logits."""
    logits, targets = noise(11, features=classes, classes=classes)
    readable = [i not in (2, 10) for i in range(11)]
    targets[:4] = logits[:4].argmax(dim=1)  # right, but that 2 is unreadable
    expected = by_hand(logits, targets.tolist(), readable)
    logits[10] = float("nan")
    loader = batches(logits, targets, size, readable)
    model, log = nn.Sequential(nn.Identity(), nn.Dropout(0.9)), Log()
    found, correct = evaluate(config_with(), model, loader, ALONE, log)
    assert correct.tolist() == [
        int(good and int(row.argmax()) == target)
        for row, target, good in zip(logits, targets.tolist(), readable, strict=True)
    ]
    assert 100 * int(correct.sum()) / 11 == found["top1"]
    assert not any(module.training for module in model.modules())
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["unreadable_val"] == 2
    assert 0 < found["top1"] < 100
    assert found["val_images_per_second"] == pytest.approx(11 / found["val_seconds"])
    assert log.of("WARNING") == [f"cannot be read as an image: file {i}: damaged" for i in (2, 10)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_never_correct(bad):
    """Nor are unreadable images."""
    logits = torch.eye(6) * 5
    logits[0, 0] = bad  # at the target
    logits[1, 4] = bad  # elsewhere
    logits[2] = bad
    found, _ = evaluate(config_with(), nn.Identity(), batches(logits, range(6)), ALONE, Log())
    assert (found["top1"], found["top5"], found["images"]) == (50, 50, 6)
    found, _ = evaluate(config_with(), nn.Identity(), batches(logits, range(6), readable=[False] * 6), ALONE, Log())
    assert (found["top1"], found["top5"], found["unreadable_val"]) == (0, 0, 6)
    assert math.isnan(found["val_loss"])


def test_evaluation_of_several_processes(monkeypatch):
    """Counts are summed over processes; here the others have had the same images."""
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda values, **_: values.mul_(3))
    logits, targets = noise(11, features=4, classes=4)
    readable = [i != 2 for i in range(11)]
    found, _ = evaluate(config_with(), nn.Identity(), batches(logits, targets, 4, readable), world(0, 3), Log())
    expected = {**by_hand(logits, targets.tolist(), readable), "images": 33, "unreadable_val": 3}
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_throughput_is_of_the_median_pass(monkeypatch):
    """After a first pass to warm up. None begins after 20 seconds, except the first three."""
    for seconds, passes, expected in (([9.0] + [0.1] * 16 + [0.2] * 14, 31, 8 / 0.1), ([9.0] + [15.0] * 30, 4, 8 / 15)):
        times, now = iter(seconds), [0.0]
        model = nn.Identity().train()
        model.register_forward_hook(lambda *_, now=now, times=times: now.__setitem__(0, now[0] + next(times)))
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now[0])
        assert throughput(config_with(), model, torch.zeros(8, 3), ALONE) == pytest.approx(expected)
        assert len(list(times)) == 31 - passes
        assert not model.training


@pytest.mark.parametrize(
    ("amp", "device", "has_bfloat16", "expected"),
    [
        ("auto", "cpu", False, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("on", "cpu", False, torch.bfloat16),
        ("on", "cuda", False, torch.float16),
        ("off", "cuda", True, None),
        ("bfloat16", "cuda", False, torch.bfloat16),
        ("float16", "cpu", False, torch.float16),
    ],
)
def test_resolve_amp(monkeypatch, amp, device, has_bfloat16, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bfloat16
    )
    assert resolve_amp(config_with(AMP=amp), torch.device(device)) == expected


# The world


@pytest.fixture
def launched(monkeypatch):
    """Sets what a launcher puts into the environment, on a machine with some number of GPUs."""

    def launched(gpus=0, **environment):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: devices.append(index))
        monkeypatch.setattr(distributed.dist, "rendezvous", lambda url, timeout: iter([("store", 0, 1)]))
        monkeypatch.setattr(distributed, "_agree_on_attempt", lambda *args: "attempt")
        monkeypatch.setattr(distributed.dist, "PrefixStore", lambda prefix, store: (prefix, store))
        monkeypatch.setattr(distributed.dist, "new_group", lambda backend, timeout: f"{backend} group")
        monkeypatch.setattr(
            distributed.dist, "init_process_group", lambda *args, **kwargs: groups.append((args, kwargs))
        )
        return devices, groups

    devices, groups = [], []
    return launched


@pytest.mark.parametrize(
    ("gpus", "device", "group", "backend"),
    [(0, CPU, None, ["gloo"]), (4, torch.device("cuda", 1), "gloo group", ["nccl"])],
)
def test_world(gpus, device, group, backend, launched):
    """What a launcher says, on a machine with GPUs or without; nothing said is one process."""
    devices, groups = launched(gpus=gpus, RANK=5, LOCAL_RANK=1, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4)
    found = init_world("auto")
    assert found == World(5, 1, 8, device, group, "attempt") and not found.is_main
    joined = {"store": ("attempt", "store"), "rank": 5, "world_size": 8, "timeout": TIMEOUT}
    joined |= {"device_id": device} if gpus else {}
    assert groups == [((*backend,), joined)]
    assert devices == [device] * bool(gpus)
    launched(gpus=0)
    alone = init_world("auto", local_rank=2)  # as old launchers pass it
    assert alone == World(0, 2, 1, CPU) and alone.is_main and not alone.distributed
    close_world(alone)
    assert distributed.all_reduce_sum(torch.tensor(3.0), alone) == 3


def test_task_of_slurm_with_a_gpu_of_its_own(launched):
    """As `srun --gpus-per-task 1` shows it to the fourth task of a machine."""
    task = {"SLURM_PROCID": 3, "SLURM_LOCALID": 3, "SLURM_STEP_NUM_TASKS": 4}
    devices, _ = launched(gpus=1, RANK=3, LOCAL_RANK=3, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4, **task)
    found = init_world("auto")
    assert (found.local_rank, found.device) == (3, torch.device("cuda", 0))
    assert devices == [found.device]


@pytest.mark.parametrize("error", [UserError("no such folder"), PermissionError("no such folder")])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_others_get_their_turn_after_a_failed_one(rank, error, monkeypatch):
    """Two barriers for everyone, as after a turn that went well."""
    events = []
    monkeypatch.setattr(distributed.dist, "barrier", lambda: events.append("barrier"))
    world = World(rank, (0, 0, 1)[rank], 3, CPU)
    with pytest.raises(type(error), match="no such folder"), distributed.main_process_first(world):
        events.append("turn")
        raise error
    assert events.index("turn") == rank
    assert events.count("barrier") == 2


@pytest.mark.parametrize("size", [1, 2])
def test_on_main(size, monkeypatch):
    """One process does it; all have its result, or its error."""
    sent = []

    def broadcast(values, src):
        if sent:
            values[:] = sent.pop()
        else:
            sent.append(list(values))

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)
    calls = []
    assert [distributed.on_main(lambda: calls.append(1) or 7, world(rank, size)) for rank in range(size)] == [7] * size
    assert calls == [1]

    def fail():
        raise UserError("disk full")

    for rank in range(size):
        with pytest.raises(UserError, match="disk full"):
            distributed.on_main(fail, world(rank, size))


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "parts"),
    [
        ("cuda", 0, 1, ["1 process ", "0 CUDA devices", "--device cpu"]),
        ("cuda", 2, 4, ["4 processes", "2 CUDA devices"]),
        ("auto", 2, 4, ["4 processes", "2 CUDA devices"]),
    ],
)
def test_more_processes_than_gpus(launched, device, gpus, processes, parts):
    _, groups = launched(gpus=gpus, RANK=0, LOCAL_RANK=0, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    with pytest.raises(UserError) as error:
        init_world(device)
    for part in parts:
        assert part in str(error.value)
    assert groups == []


@pytest.mark.parametrize(
    ("top1", "loss", "best", "better"),
    [
        (90.0, 9.0, {"top1": 89.0, "val_loss": 0.1}, True),
        (89.0, 0.1, {"top1": 90.0, "val_loss": 9.0}, False),
        (90.0, 0.4, {"top1": 90.0, "val_loss": 0.8}, True),
        (90.0, 0.8, {"top1": 90.0, "val_loss": 0.8}, False),
        (90.0, math.nan, {"top1": 90.0, "val_loss": 0.8}, False),
        (90.0, 0.8, {"top1": 90.0, "val_loss": math.nan}, True),
        (90.0, 0.8, {"top1": 90.0}, True),
        (0.0, math.nan, {"top1": -1.0}, True),
    ],
)
def test_best_epoch(top1, loss, best, better):
    assert is_better({"top1": top1, "val_loss": loss}, best) is better
