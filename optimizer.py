"""AdamW or SGD with the released recipe's two groups of parameters."""

from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from runtime.checkpoint import LARGEST, is_plain
from utils import UserError

# By optimizer: what it remembers of every parameter, in the parameter's shape.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}


def build_optimizer(config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of `config.TRAIN.OPTIMIZER` at learning rate `lr`.

    Build it on the model before DistributedDataParallel wraps it: names decide about weight decay.
    """
    keys = config.TRAIN.OPTIMIZER
    groups = param_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY)
    fused = keys.FUSED or None  # PyTorch's default; False would have it go through the parameters one by one
    if keys.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(keys.BETAS), eps=keys.EPS, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=keys.MOMENTUM, nesterov=keys.MOMENTUM > 0, fused=fused)
    if keys.MOMENTUM:
        # Made at the first step otherwise; the fused kernel leaves it uninitialised if that step is skipped.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restores the moments of a checkpoint; hyper-parameters stay as the optimizer was built with them, so that a
    config that was changed, or another device, counts.

    Raises:
        ValueError: the state is not one for these parameters.
    """
    _check_optimizer_state(optimizer, state)
    groups = [
        {**group, "params": saved["params"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    adam = isinstance(optimizer, torch.optim.AdamW)
    kept = {}
    for number, values in state["state"].items():
        step = {"step": torch.tensor(float(values["step"]))} if adam and "step" in values else {}
        # In the parameter's own memory format, which the fused kernels take for granted: that of the checkpoint may be
        # another one.
        moments = {
            name: torch.empty_like(parameters[number]).copy_(values[name])
            for name in MOMENTS[type(optimizer)]
            if values.get(name) is not None
        }
        kept[number] = step | moments
    if not adam and optimizer.defaults["momentum"]:
        for number, parameter in enumerate(parameters):  # as `build_optimizer` makes them
            kept.setdefault(number, {}).setdefault("momentum_buffer", torch.zeros_like(parameter))
    optimizer.load_state_dict({"state": kept, "param_groups": groups})


def _check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """load_state_dict takes any moments, and the first step then fails, or broadcasts them, or gives no numbers."""
    saved = state.get("param_groups")
    if not isinstance(saved, list) or not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved):
        raise ValueError("no optimizer state: param_groups is not a list of groups")
    counts, expected = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if counts != expected:
        raise ValueError(f"its optimizer state is for groups of {counts} parameters, not {expected}")
    numbers = [number for group in saved for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = state.get("state")
    whole = isinstance(moments, dict) and all(type(number) is int for number in (*numbers, *moments))
    if not whole or numbers != list(range(len(parameters))) or not set(moments) <= set(numbers):
        raise ValueError("no optimizer state: its parameters are not numbered in order")
    for number, values in moments.items():
        if not isinstance(values, dict):
            raise ValueError(f"the optimizer state of parameter {number} is not a dictionary")
        if not values:
            continue  # a parameter that had no gradient yet
        adam = isinstance(optimizer, torch.optim.AdamW)
        if adam and not _is_step(values.get("step")):
            raise ValueError(f"its optimizer state has no number of steps of parameter {number}")
        for name in MOMENTS[type(optimizer)]:
            value, parameter = values.get(name), parameters[number]
            if value is None and not adam:
                continue  # without momentum
            if not _is_moment(value, parameter) or (name == "exp_avg_sq" and bool((value < 0).any())):
                raise ValueError(
                    f"its optimizer state has as {name} of parameter {number} no tensor of finite numbers of "
                    f"shape {tuple(parameter.shape)}"
                )


def _is_step(value: Any) -> bool:
    number = value.item() if is_plain(value) and value.ndim == 0 else value
    return isinstance(number, int | float) and 0 <= number < LARGEST


def _is_moment(value: Any, parameter: torch.Tensor) -> bool:
    """Whether it can be a moment of the parameter: finite in its precision, and each number in a place of its own, for
    the optimizer writes into it."""
    if not is_plain(value) or value.shape != parameter.shape:
        return False
    shared = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return not shared and all(bool(x.isfinite().all()) for x in (value, value.to(parameter.dtype)))


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Trainable parameters with weight decay, then those without; with `layer_decay` such a pair per layer, from the
    first, as far as there are any.

    Without: vectors, biases, and what the model's `no_weight_decay()` names (timm's convention). A model may name
    vectors that are decayed all the same in `weight_decay_vectors()`.

    Args:
        layer_decay: the learning rate of a layer as a part of the next one's; the last, the classifier, has the whole.
            Groups then have an "lr_scale", which timm's schedulers multiply with (BEiT, section 3.1). The layers are
            those of the model's `group_matcher()` (timm's convention).

    Raises:
        UserError: the model does not say what its layers are.
    """
    exempt = getattr(model, "no_weight_decay", set)()
    decayed_vectors = getattr(model, "weight_decay_vectors", set)()
    layers: dict[str, int] = {}
    if layer_decay < 1:
        if not hasattr(model, "group_matcher"):
            raise UserError(
                f"TRAIN.LAYER_DECAY is {layer_decay:g}, but {type(model).__name__} does not say what its layers are; "
                "accepted: 1"
            )
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values(), default=0)
    groups = [
        {"params": [], "weight_decay": decay} | ({"lr_scale": layer_decay ** (last - layer)} if layers else {})
        for layer in range(last + 1)
        for decay in (weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = (parameter.ndim <= 1 or name.endswith(".bias")) and name not in decayed_vectors
        groups[2 * layers.get(name, 0) + (vector or name in exempt)]["params"].append(parameter)
    return [group for group in groups if group["params"] or not layers]


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """That of the classifier, where layers have their own: the highest."""
    return max(group["lr"] for group in optimizer.param_groups)
