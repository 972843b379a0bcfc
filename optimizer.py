"""AdamW or SGD with the released recipe's two groups of parameters."""

import math

import torch
from torch import nn

from checkpoint import is_plain


def build_optimizer(config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of `config.TRAIN.OPTIMIZER` at learning rate `lr`; one fused kernel per step on CUDA.

    Build it on the model before DistributedDataParallel wraps it: names decide about weight decay.
    """
    keys = config.TRAIN.OPTIMIZER
    groups = param_groups(model, config.TRAIN.WEIGHT_DECAY)
    fused = next(model.parameters()).is_cuda
    if keys.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(keys.BETAS), eps=keys.EPS, fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=keys.MOMENTUM, nesterov=keys.MOMENTUM > 0, fused=fused)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restores the moments of a checkpoint; hyper-parameters stay as the optimizer was built with them, so that a
    config that was changed, or another device, counts.

    Raises:
        ValueError: the state is not one for these parameters.
    """
    _check_optimizer_state(optimizer, state)
    groups = [
        {**saved, **{key: value for key, value in group.items() if key != "params"}}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """load_state_dict takes any moments, and the first step then fails, or broadcasts them."""
    saved = state.get("param_groups")
    if not isinstance(saved, list) or not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved):
        raise ValueError("no optimizer state: param_groups is not a list of groups")
    counts, expected = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if counts != expected:
        raise ValueError(f"its optimizer state is for groups of {counts} parameters, not {expected}")
    numbers = [number for group in saved for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = state.get("state")
    if not isinstance(moments, dict) or numbers != list(range(len(parameters))) or not set(moments) <= set(numbers):
        raise ValueError("no optimizer state: its parameters are not numbered in order")
    for number, values in moments.items():
        if not isinstance(values, dict):
            raise ValueError(f"the optimizer state of parameter {number} is not a dictionary")
        for name, value in values.items():
            if value is None or (isinstance(value, int | float) and math.isfinite(value)):
                continue
            shape = parameters[number].shape
            if not is_plain(value) or value.shape not in ((), shape) or not bool(value.isfinite().all()):
                raise ValueError(
                    f"its optimizer state has as {str(name)[:40]} of parameter {number} no tensor of finite numbers of "
                    f"shape {tuple(shape)}"
                )


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters with weight decay, then those without.

    Without: vectors, biases, and what the model's `no_weight_decay()` names (timm's convention). A model may name
    vectors that are decayed all the same in `weight_decay_vectors()`.
    """
    exempt = getattr(model, "no_weight_decay", set)()
    decayed_vectors = getattr(model, "weight_decay_vectors", set)()
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = (parameter.ndim <= 1 or name.endswith(".bias")) and name not in decayed_vectors
        (no_decay if vector or name in exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
