"""Parameter groups, optimizers, and learning rates by step."""

import copy
import importlib.util
import math

import pytest
import timm
import timm.scheduler
import torch
from torch import nn

from config import ConfigError, get_default_config
from lr_scheduler import build_scheduler, lr_scale
from models import StripMLP, prepare_model
from optimizer import (
    MOMENTS,
    SCHEDULE_FREE,
    ScheduleFreeAverage,
    build_optimizer,
    check_optimizer,
    expected_state,
    load_optimizer_state,
    optimizer_names,
    param_groups,
)
from runtime.untrusted import check_optimizer_state

has_wsd = hasattr(timm.scheduler, "WSDLRScheduler")
STEPS = 5  # per epoch
PEAK = 0.3


def config_with(**values):
    """The defaults with some of them replaced; `A__B` stands for A.B."""
    config = get_default_config()
    for key, value in values.items():
        config.merge_from_list([key.replace("__", "."), value])
    return config


def group_names(model, groups) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


# Parameter groups


def test_groups_of_strip_mlp():
    model = StripMLP(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), patch_channels=2)
    groups = param_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decay, no_decay = group_names(model, groups)
    assert decay.isdisjoint(no_decay)
    assert decay | no_decay == {name for name, _ in model.named_parameters()}

    block = "stages.0.0"
    for name in (
        "patch_embed.weight",
        f"{block}.token_mixing.cgsmm.strip_h.weight",
        f"{block}.token_mixing.cgsmm.pos_h.table",
        f"{block}.token_mixing.cgsmm.pos_w.table",
        f"{block}.channel_mixing.mlp.fc1.weight",
        f"{block}.channel_mixing.mlp.grn.weight",  # vectors here, (1, 1, 1, C) in the released code
        f"{block}.channel_mixing.mlp.grn.bias",
        "head.fc.weight",
    ):
        assert name in decay, name
    for name in (
        f"{block}.token_mixing.cgsmm.strip_h.bias",  # a matrix here, a vector in the released code
        f"{block}.token_mixing.cgsmm.strip_w.bias",
        f"{block}.token_mixing.norm.weight",
        f"{block}.channel_mixing.norm.weight",
        f"{block}.channel_mixing.mlp.fc1.bias",
        "norm.weight",
        "norm.bias",
        "head.fc.bias",
    ):
        assert name in no_decay, name


def test_groups_of_a_timm_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_classes=3)
    decay, no_decay = group_names(model, param_groups(model, 0.05))
    assert {"pos_embed", "cls_token"} <= no_decay  # what its no_weight_decay() names
    assert no_decay - {"pos_embed", "cls_token"} == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert decay == {name for name, p in model.named_parameters() if p.ndim > 1} - {"pos_embed", "cls_token"}


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert group_names(model, param_groups(model, 0.1)) == [{"1.weight"}, {"1.bias"}]


# Optimizers


def first_step(optimizer, model) -> tuple[float, float]:
    """Weight and bias, 1 before, after a step with gradients 0.5 and -0.25."""
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    model.weight.grad = torch.full_like(model.weight, 0.5)
    model.bias.grad = torch.full_like(model.bias, -0.25)
    optimizer.step()
    return model.weight.item(), model.bias.item()


def test_adamw():
    config = config_with(TRAIN__OPTIMIZER__BETAS=[0.8, 0.95], TRAIN__OPTIMIZER__EPS=0.1, TRAIN__WEIGHT_DECAY=0.2)
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(config, model, lr=0.01)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [0.01, (0.8, 0.95), 0.1, decay]
    # AdamW's first step is lr * gradient / (|gradient| + eps).
    weight, bias = first_step(optimizer, model)
    assert weight == pytest.approx(1 - 0.01 * 0.2 - 0.01 * 0.5 / 0.6)
    assert bias == pytest.approx(1 + 0.01 * 0.25 / 0.35)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum):
    config = config_with(TRAIN__OPTIMIZER__NAME="sgd", TRAIN__OPTIMIZER__MOMENTUM=momentum, TRAIN__WEIGHT_DECAY=0.2)
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(config, model, lr=0.01)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["momentum"] for group in optimizer.param_groups] == [momentum] * 2
    # Nesterov's first step is (1 + momentum) * gradient.
    weight, bias = first_step(optimizer, model)
    assert weight == pytest.approx(1 - 0.01 * (1 + momentum) * (0.5 + 0.2))
    assert bias == pytest.approx(1 + 0.01 * (1 + momentum) * 0.25)


# Resuming


def take_steps(optimizer, model, steps) -> None:
    for step in steps:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, math.sin(1 + 3 * step + i))
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_restored_optimizer_goes_on_exactly(name):
    config = config_with(TRAIN__OPTIMIZER__NAME=name)
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(config, model, 0.01)
    take_steps(optimizer, model, range(3))
    state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    take_steps(optimizer, model, range(3, 6))

    restored = build_optimizer(config, other, 0.01)
    load_optimizer_state(restored, state)
    take_steps(restored, other, range(3, 6))
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def test_restored_optimizer_has_the_hyper_parameters_of_the_config():
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(config_with(), model, 0.01)
    take_steps(optimizer, model, range(3))
    config = config_with(TRAIN__OPTIMIZER__BETAS=[0.8, 0.95], TRAIN__OPTIMIZER__EPS=0.1, TRAIN__WEIGHT_DECAY=0.2)
    restored = build_optimizer(config, model, 0.02)
    load_optimizer_state(restored, optimizer.state_dict())
    assert [group["weight_decay"] for group in restored.param_groups] == [0.2, 0.0]
    for group in restored.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 0.1)
    assert torch.equal(restored.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert restored.state[model.weight]["step"] == 3


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("before", [False, True])
def test_state_of_another_memory_format(name, before):
    """A run that goes on with other values of TRAIN.CHANNELS_LAST and FUSED takes the steps it would have taken."""
    torch.manual_seed(0)

    def built(channels_last, fused):
        torch.manual_seed(0)
        model = StripMLP(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), patch_channels=2)
        keys = {"TRAIN__CHANNELS_LAST": channels_last, "TRAIN__OPTIMIZER__FUSED": fused}
        config = config_with(TRAIN__OPTIMIZER__NAME=name, **keys)
        prepare_model(config, model, torch.device("cpu"))
        return model, build_optimizer(config, model, 0.01)

    def step(model, optimizer, number):
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * number + i)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    model, optimizer = built(before, True)
    step(model, optimizer, 1)
    other, restored = built(not before, True)
    other.load_state_dict(model.state_dict())
    load_optimizer_state(restored, optimizer.state_dict())
    reference, plain = built(False, False)
    for number in 1, 2, 3:
        step(reference, plain, number)
        if number > 1:
            step(other, restored, number)
    for parameter, expected in zip(other.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert other.merging[0].weight.is_contiguous(memory_format=torch.channels_last) is not before
    assert other.stages[0][0].token_mixing.cgsmm.strip_h.weight.is_contiguous()


# Optimizers by name


def sine_step(optimizer, model, number: int) -> None:
    """With gradients that depend on the number alone."""
    for i, parameter in enumerate(model.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
        parameter.grad = torch.sin(values + 3 * number + i)
    optimizer.step()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def installed_optimizers() -> list[str]:
    missing = importlib.util.find_spec("schedulefree") is None
    return [name for name in optimizer_names() if not (missing and name in SCHEDULE_FREE)]


@pytest.mark.filterwarnings("ignore")  # of optimizers that timm calls old
def test_every_optimizer_goes_on_exactly(tmp_path):
    """From a file, through the check of its state."""
    names = installed_optimizers()
    assert {"adamw", "sgd", "lamb", "lion", "adan", "nadamw"} <= set(names)
    for name in names:
        config = config_with(TRAIN__OPTIMIZER__NAME=name)
        check_optimizer(config)
        model = small_network()
        optimizer = build_optimizer(config, model, 0.01)
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert set(decays) == {0.05, 0.0}, name
        for number in range(3):
            sine_step(optimizer, model, number)
        torch.save(optimizer.state_dict(), tmp_path / "state.pth")
        other = copy.deepcopy(model)
        for number in range(3, 6):
            sine_step(optimizer, model, number)

        restored = build_optimizer(config, other, 0.01)
        state, moments = torch.load(tmp_path / "state.pth", weights_only=True), MOMENTS.get(type(restored))
        check_optimizer_state(state, restored, moments, None if moments else expected_state(config, other))
        load_optimizer_state(restored, state)
        for number in range(3, 6):
            sine_step(restored, other, number)
        for parameter, expected in zip(other.parameters(), model.parameters(), strict=True):
            assert parameter.isfinite().all() and torch.equal(parameter, expected), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lamb", lambda state: state["state"][0].update(exp_avg=torch.zeros(1))),
        ("lamb", lambda state: state["state"][0].update(exp_avg_sq=-torch.ones(4, 3, 3, 3))),
        ("lamb", lambda state: state["param_groups"][0].update(step=torch.tensor(math.nan))),
        ("adan", lambda state: state["param_groups"][0].update(step="3")),
        ("lion", lambda state: state["state"][1].update(exp_avg=torch.full((4,), math.nan))),
        ("lion", lambda state: state["state"][1].clear() or state["state"][1].update(other=torch.zeros(4))),
        ("adafactor", lambda state: state["state"][0].update(step=math.nan)),
    ],
)
def test_state_that_is_not_the_optimizers_is_refused(name, change):
    config, model = config_with(TRAIN__OPTIMIZER__NAME=name), small_network()
    optimizer = build_optimizer(config, model, 0.01)
    sine_step(optimizer, model, 0)
    state, like = copy.deepcopy(optimizer.state_dict()), expected_state(config, model)
    check_optimizer_state(state, optimizer, None, like)
    change(state)
    with pytest.raises(ValueError, match="its optimizer state"):
        check_optimizer_state(state, optimizer, None, like)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_torch_muon_takes_matrices_and_adamw_the_rest():
    model = small_network()
    optimizer = build_optimizer(config_with(TRAIN__OPTIMIZER__NAME="torch_muon"), model, 0.01)
    sine_step(optimizer, model, 0)
    for name, parameter in model.named_parameters():
        kind = {"momentum_buffer"} if name == "3.weight" else {"step", "exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[parameter]) == kind, name
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule sets it
    before = [model[3].weight.clone(), model[3].bias.clone()]
    sine_step(optimizer, model, 1)
    assert torch.equal(model[3].weight, before[0]) and not torch.equal(model[3].bias, before[1])


def test_timm_muon_leaves_vectors_and_tables_to_adamw():
    if "muon" not in optimizer_names():
        pytest.skip("timm has no Muon")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_classes=3)
    optimizer = build_optimizer(config_with(TRAIN__OPTIMIZER__NAME="muon"), model, 0.01)
    sine_step(optimizer, model, 0)
    by_muon = {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert "blocks.0.mlp.fc1.weight" in by_muon and "pos_embed" not in by_muon


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_average_is_what_its_eval_mode_gives(name):
    pytest.importorskip("schedulefree")
    config, model = config_with(TRAIN__OPTIMIZER__NAME=name), small_network()
    optimizer = build_optimizer(config, model, 0.01)
    average = ScheduleFreeAverage(model, optimizer)
    for number in range(8):  # RAdam's first ones do nothing
        sine_step(optimizer, model, number)
        model[1].running_mean += 1
        average.update(model)
    trained = copy.deepcopy(model)
    optimizer.eval()
    for own, expected in zip(average.module.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(own, expected)
    assert not torch.equal(trained[0].weight, model[0].weight)


def test_arguments_of_an_optimizer():
    keys = {"TRAIN__OPTIMIZER__NAME": "lion", "TRAIN__OPTIMIZER__ARGS": "betas=(0.5, 0.6)"}
    optimizer = build_optimizer(config_with(**keys), nn.Linear(1, 1), 0.01)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.6)] * 2


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("lamp", "", ["'lamp'", "lamb"]),
        ("Lion", "", ["'Lion'", "lion"]),
        ("adahessian", "", ["'adahessian'"]),
        ("lion", "betas", ["TRAIN.OPTIMIZER.ARGS is 'betas'", "accepted: names and values"]),
        ("lion", "betas=open('a')", ["accepted: names and values"]),
        ("lion", "lr=1", ["TRAIN.BASE_LR sets it"]),
        ("lion", "speed=1", ["speed", "accepted: arguments of lion"]),
        ("lion", "betas=(2, 3)", ["accepted: arguments of lion"]),
        ("adamw", "eps=1", ["TRAIN.OPTIMIZER.EPS"]),
    ],
)
def test_wrong_name_or_argument_of_an_optimizer(name, arguments, said):
    config = config_with(TRAIN__OPTIMIZER__NAME=name, TRAIN__OPTIMIZER__ARGS=arguments)
    with pytest.raises(ConfigError) as error:
        check_optimizer(config)
    assert all(text in str(error.value) for text in said), error.value


# Learning rates


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation", "reference", "expected"),
    [(128, 8, 1, 512, 2.0), (128, 8, 1, 300, 1024 / 300), (32, 2, 3, 512, 0.375), (64, 1, 1, 64, 1.0)],
)
def test_lr_scale(batch, processes, accumulation, reference, expected):
    config = config_with(
        DATA__BATCH_SIZE=batch, TRAIN__ACCUMULATION_STEPS=accumulation, TRAIN__LR_REFERENCE_BATCH=reference
    )
    assert lr_scale(config, processes) == pytest.approx(expected)


def schedule_config(name: str, warmup: int = 2):
    return config_with(
        TRAIN__LR_SCHEDULER__NAME=name,
        TRAIN__LR_SCHEDULER__DECAY_EPOCHS=3,
        TRAIN__LR_SCHEDULER__DECAY_RATE=0.1,
        TRAIN__EPOCHS=12,
        TRAIN__WARMUP_EPOCHS=warmup,
        TRAIN__WARMUP_LR=0.001,
        TRAIN__MIN_LR=0.01,
    )


def rates(config, steps, scale: float = 1.0) -> list[float]:
    """The learning rates at `steps`, in that order, from one scheduler."""
    optimizer = build_optimizer(config, nn.Linear(1, 1), PEAK)
    scheduler = build_scheduler(config, optimizer, STEPS, scale)
    found = []
    for step in steps:
        scheduler.step_update(step)
        decay, no_decay = optimizer.param_groups
        assert decay["lr"] == no_decay["lr"]
        found.append(decay["lr"])
    return found


ALL_SCHEDULES = ["cosine", "linear", "step", "poly", "tanh", "constant", "plateau"] + ["wsd"] * has_wsd


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_warmup(name):
    found = rates(schedule_config(name), range(11))
    expected = [0.001 + (PEAK - 0.001) * step / 10 for step in range(11)]
    # timm's tanh reaches its peak but for a thousandth.
    assert found == pytest.approx(expected, rel=0.002 if name == "tanh" else 1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_decay(name):
    steps = range(10, 60)
    found = rates(schedule_config(name), steps)
    assert found == sorted(found, reverse=True)
    done = [(step - 10) / 50 for step in steps]
    expected = {
        "cosine": [0.01 + (PEAK - 0.01) * (1 + math.cos(math.pi * t)) / 2 for t in done],
        "linear": [0.01 + (PEAK - 0.01) * (1 - t) for t in done],
        "step": [PEAK * 0.1 ** ((step - 10) // 15) for step in steps],
    }
    assert found == pytest.approx(expected[name])
    if name != "step":
        assert found[-1] == pytest.approx(0.01, abs=0.02 * PEAK)
        assert rates(schedule_config(name), [60, 61, 1000]) == pytest.approx([0.01] * 3)


def test_cycles_and_cooldown():
    """Two cycles, the second twice as long with half the peak, then 6 epochs at MIN_LR: 20 + 40 of 90 steps."""
    config = schedule_config("cosine", warmup=0)
    config.TRAIN.EPOCHS, keys = 18, config.TRAIN.LR_SCHEDULER
    keys.CYCLES, keys.CYCLE_MUL, keys.CYCLE_DECAY, keys.COOLDOWN_EPOCHS = 2, 2.0, 0.5, 6
    found = rates(config, range(90))
    assert [found[0], found[20]] == pytest.approx([PEAK, PEAK / 2])
    assert [found[10], found[40]] == pytest.approx([(PEAK + 0.01) / 2, (PEAK / 2 + 0.01) / 2])
    assert found[60:] == [0.01] * 30 and found[59] > 0.01


@pytest.mark.skipif(not has_wsd, reason="timm has no WSD")
def test_wsd_goes_down_at_the_end():
    config = schedule_config("wsd")
    config.TRAIN.LR_SCHEDULER.WSD_DECAY, config.TRAIN.LR_SCHEDULER.WSD_SHAPE = 0.5, "linear"
    found = rates(config, range(61))
    assert found[10:36] == [PEAK] * 26
    assert found[35:] == pytest.approx([PEAK - (PEAK - 0.01) * step / 25 for step in range(26)])


def test_poly_and_constant():
    config = schedule_config("poly")
    config.TRAIN.LR_SCHEDULER.POWER = 2.0
    assert rates(config, [35]) == pytest.approx([0.01 + (PEAK - 0.01) / 4])
    assert rates(schedule_config("constant"), [10, 59, 500]) == [PEAK] * 3


def test_plateau_goes_down_and_on_from_its_state():
    config = schedule_config("plateau")
    config.TRAIN.LR_SCHEDULER.PATIENCE = 2

    def scheduler():
        return build_scheduler(config, build_optimizer(config, nn.Linear(1, 1), PEAK), STEPS, 1.0)

    def rate(schedule) -> float:
        schedule.step_update(30)
        return schedule.optimizer.param_groups[0]["lr"]

    schedule = scheduler()
    schedule.evaluated({"top1": 99.0}, 10)  # in the warm-up: does not count
    found = []
    for top1 in (10.0, 20.0, 20.0, math.nan, 19.0, 21.0, 5.0, 5.0, 5.0):
        schedule.evaluated({"top1": top1}, 11)
        found.append(rate(schedule))
        other = scheduler()
        other.load_state_dict(schedule.state_dict())
        schedule = other
        assert rate(schedule) == found[-1]
    assert found == pytest.approx([PEAK, PEAK, PEAK, PEAK / 10, PEAK / 10, PEAK / 10, PEAK / 10, 0.01, 0.01])


@pytest.mark.parametrize("name", [name for name in ALL_SCHEDULES if name != "plateau"])
def test_rate_depends_on_the_step_alone(name):
    config = schedule_config(name)
    in_order = rates(config, range(60))
    for step in (0, 3, 9, 10, 31, 59):
        assert rates(config, [step]) == [in_order[step]]
    assert rates(config, [40, 2, 59, 10]) == [in_order[step] for step in (40, 2, 59, 10)]
