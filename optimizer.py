"""AdamW or SGD with the released recipe's two groups of parameters."""

import torch
from timm.models import group_parameters
from torch import nn

from utils import UserError

# What each optimizer remembers of every parameter, in the parameter's shape.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}


def build_optimizer(config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of `config.TRAIN.OPTIMIZER` at learning rate `lr`.

    Build it before DistributedDataParallel wraps the model: weight decay depends on the names of parameters.
    """
    keys = config.TRAIN.OPTIMIZER
    groups = param_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY)
    fused = keys.FUSED or None  # None is PyTorch's default; False would loop over the parameters one by one
    if keys.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(keys.BETAS), eps=keys.EPS, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=keys.MOMENTUM, nesterov=keys.MOMENTUM > 0, fused=fused)
    if keys.MOMENTUM:
        # Otherwise made at the first step; if that is skipped, the fused kernel leaves it uninitialised.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restores the moments of a checkpoint. Hyper-parameters stay as the optimizer was built, so that a changed config
    takes effect.

    Args:
        state: one for these parameters (see `runtime.untrusted.check_optimizer_state`).
    """
    groups = [
        {**group, "params": saved["params"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    adam = isinstance(optimizer, torch.optim.AdamW)
    kept = {}
    for number, values in state["state"].items():
        step = {"step": torch.tensor(float(values["step"]))} if adam and "step" in values else {}
        # In the parameter's memory format, which may differ from the checkpoint's: the fused kernels rely on it.
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


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Trainable parameters: a group with weight decay and one without; with `layer_decay`, such a pair for each layer,
    without the empty ones.

    Vectors, biases and what the model's `no_weight_decay()` names (timm's convention) have none. A model may name
    vectors that have it all the same in `weight_decay_vectors()`. timm's param_groups_layer_decay has no place for
    those, so the groups are made here, from timm's layers.

    Args:
        layer_decay: the learning rate of a layer as a fraction of the next one's; the last layer is the classifier.
            Groups then have an "lr_scale", by which timm's schedulers multiply (BEiT, section 3.1). The layers are
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
    """The highest of all groups: the classifier's."""
    return max(group["lr"] for group in optimizer.param_groups)
