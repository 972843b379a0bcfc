"""AdamW or SGD with the released recipe's two groups of parameters."""

import torch
from torch import nn


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
    config that was changed, or another device, counts."""
    groups = [
        {**saved, **{key: value for key, value in group.items() if key != "params"}}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


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
