"""Optimizers by name, PyTorch's, timm's and schedule-free ones, with the released recipe's two groups of parameters."""

import ast
import copy
import difflib
import importlib.util
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from config import ConfigError
from utils import UserError

# What each optimizer remembers of every parameter, in the parameter's shape.
MOMENTS = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}

# Those that come with keys of their own, TRAIN.OPTIMIZER.EPS, BETAS and MOMENTUM.
OWN = ("adamw", "sgd")
TORCH_MUON = "torch_muon"
SCHEDULE_FREE = {
    "schedulefree_adamw": "AdamWScheduleFree",
    "schedulefree_radam": "RAdamScheduleFree",
    "schedulefree_sgd": "SGDScheduleFree",
}
# What a group counts as it goes, beside its hyper-parameters: a resumed run goes on from the saved ones.
COUNTERS = ("step", "k", "weight_sum", "lr_max", "scheduled_lr")


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def optimizer_names() -> list[str]:
    """What TRAIN.OPTIMIZER.NAME may be here."""
    names = {*OWN, *SCHEDULE_FREE}
    if hasattr(torch.optim, "Muon"):
        names.add(TORCH_MUON)
    try:
        from timm.optim import get_optimizer_info, list_optimizers
    except ImportError:  # before timm 1.0.12
        return sorted(names)
    for name in list_optimizers():
        info = get_optimizer_info(name)
        # Those of apex and bitsandbytes are named as text. Second-order ones need a graph of the gradient. Kron keeps
        # Python's random generator, and its updates depend on it.
        if not isinstance(info.opt_class, str) and not info.second_order and "kron" not in name:
            names.add(name)
    return sorted(names)


def check_optimizer(config) -> None:
    """Raises ConfigError for an optimizer that there is not, or arguments that it cannot have. Costs no model."""
    keys = config.TRAIN.OPTIMIZER
    names = optimizer_names()
    if keys.NAME not in names:
        nearest = difflib.get_close_matches(keys.NAME, names, n=3) or OWN
        raise ConfigError(
            f"TRAIN.OPTIMIZER.NAME is {keys.NAME!r}, which neither this project, timm {timm.__version__} nor torch "
            f"{torch.__version__} has; nearest names: {', '.join(nearest)}; all: docs/training.md#optimizers"
        )
    if keys.NAME in SCHEDULE_FREE:
        if importlib.util.find_spec("schedulefree") is None:
            raise ConfigError(
                f"TRAIN.OPTIMIZER.NAME is {keys.NAME}, which needs schedulefree: pip install -r "
                "requirements/optimizers.txt"
            )
        if config.TRAIN.EMA_DECAY:
            raise ConfigError(
                f"TRAIN.EMA_DECAY is {config.TRAIN.EMA_DECAY:g}, but {keys.NAME} averages the weights itself; "
                "accepted: 0"
            )
    arguments = read_arguments(keys.ARGS)
    if keys.NAME in OWN and arguments:
        raise ConfigError(
            f"TRAIN.OPTIMIZER.ARGS is {keys.ARGS!r}, but {keys.NAME} has keys instead: TRAIN.OPTIMIZER.EPS, BETAS, "
            "MOMENTUM; accepted: nothing"
        )
    model = nn.Linear(2, 2)
    _build(config, model, param_groups(model, config.TRAIN.WEIGHT_DECAY), 0.1)


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments in text such as "betas=(0.95, 0.98), eps=1e-6".

    Raises:
        ConfigError: it is something else.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("not names and values")
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ConfigError(
            f"TRAIN.OPTIMIZER.ARGS is {text!r}; accepted: names and values, such as betas=(0.95, 0.98), eps=1e-6"
        ) from error
    taken = {
        "lr": "TRAIN.BASE_LR",
        "weight_decay": "TRAIN.WEIGHT_DECAY",
        "params": "",
        "fused": "TRAIN.OPTIMIZER.FUSED",
    }
    for name in arguments:
        if name is None or name in taken:
            instead = f"; {taken[name]} sets it" if taken.get(name) else ""
            raise ConfigError(f"TRAIN.OPTIMIZER.ARGS has {name or '**'}, which cannot be set there{instead}")
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def build_optimizer(config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of `config.TRAIN.OPTIMIZER` at learning rate `lr`.

    Build it before DistributedDataParallel wraps the model: weight decay depends on the names of parameters.
    """
    groups = param_groups(model, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LAYER_DECAY)
    return _build(config, model, groups, lr)


def _build(config, model: nn.Module, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    keys = config.TRAIN.OPTIMIZER
    fused = keys.FUSED or None  # None is PyTorch's default; False would loop over the parameters one by one
    if keys.NAME == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(keys.BETAS), eps=keys.EPS, fused=fused)
    if keys.NAME == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=keys.MOMENTUM, nesterov=keys.MOMENTUM > 0, fused=fused)
        return _with_momentum(optimizer)
    arguments = read_arguments(keys.ARGS)
    try:
        return _by_name(keys.NAME, groups, lr, arguments, fused)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"TRAIN.OPTIMIZER.NAME is {keys.NAME} and TRAIN.OPTIMIZER.ARGS {keys.ARGS!r}: {error}; accepted: arguments "
            f"of {keys.NAME}"
        ) from error


def _by_name(
    name: str, groups: list[dict], lr: float, arguments: dict[str, Any], fused: bool | None
) -> torch.optim.Optimizer:
    """Any but the two that have keys of their own."""
    if name in SCHEDULE_FREE:
        import schedulefree

        # Weight decay of the groups; theirs is for groups without one.
        optimizer = getattr(schedulefree, SCHEDULE_FREE[name])(groups, lr=lr, **arguments)
        optimizer.train()
        return optimizer
    if name == TORCH_MUON:
        return MuonWithAdamW(groups, lr, **arguments)
    if "muon" in name:  # timm's: AdamW for what its rule does not take, and for biases and position tables
        groups = [{**group, "use_fallback": not group["weight_decay"]} for group in groups]
    from timm.optim import get_optimizer_class

    kind = get_optimizer_class(name, bind_defaults=False)
    if fused and issubclass(kind, torch.optim.Adam | torch.optim.SGD):
        arguments = {**arguments, "fused": True}
    optimizer = create_optimizer_v2(groups, name, lr=lr, **arguments)
    return _with_momentum(optimizer) if isinstance(optimizer, torch.optim.SGD) else optimizer


def _with_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """With its momentum, which is otherwise made at the first step; if that is skipped, the fused kernel leaves it
    uninitialised."""
    if optimizer.defaults["momentum"]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """PyTorch's Muon, which takes matrices alone, for those with weight decay, and AdamW for all other parameters, as
    its documentation asks for. Both at the same learning rate, which Muon adjusts to AdamW's.

    Args:
        groups: of `param_groups`; each with matrices and others becomes two.
        betas, eps: AdamW's.
        arguments: `torch.optim.Muon`'s.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **arguments: Any,
    ):
        def part(matrices: bool) -> list[dict]:
            def belongs(group: dict, p: Tensor) -> bool:
                return (p.ndim == 2 and group["weight_decay"] > 0) == matrices

            parts = [{**group, "params": [p for p in group["params"] if belongs(group, p)]} for group in groups]
            return [group for group in parts if group["params"]]

        muon, adamw = part(True), part(False)
        arguments = {"adjust_lr_fn": "match_rms_adamw", **arguments}
        self._parts = [torch.optim.Muon(muon, lr=lr, **arguments)] if muon else []
        self._parts += [torch.optim.AdamW(adamw, lr=lr, betas=tuple(betas), eps=eps)] if adamw else []
        super().__init__([group for inner in self._parts for group in inner.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state."""
        start = 0
        for inner in self._parts:
            end = start + len(inner.param_groups)
            inner.param_groups, inner.state = self.param_groups[start:end], self.state
            start = end

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for inner in self._parts:
            inner.step(closure)


class ScheduleFreeAverage:
    """The weights that a schedule-free optimizer is about, x in "The Road Less Scheduled" (Defazio et al., 2024), in a
    copy of the model. The model itself holds y, at which gradients are taken, and which a run goes on from. With the
    interface of timm's ModelEmaV3.

    The optimizer's own switch to evaluation would write x over y, and the way back gives y but for rounding, so that a
    run would depend on how often it is saved. Running statistics are the model's, those of y.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = optimizer

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """After a step: x = y + (1 - 1 / beta) (z - y)."""
        copies = dict(zip(model.parameters(), self.module.parameters(), strict=True))
        for group in self.optimizer.param_groups:
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            trained = [p for p in group["params"] if "z" in self.optimizer.state[p]]
            if trained:
                bases = [self.optimizer.state[p]["z"] for p in trained]
                averages = torch._foreach_lerp(trained, bases, 1 - 1 / beta)
                torch._foreach_copy_([copies[p] for p in trained], averages)
        for own, value in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(value)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


def expected_state(config, model: nn.Module) -> dict:
    """The state dict of the config's optimizer after a step for this model, for names, types and shapes. The model is
    not changed."""
    model = copy.deepcopy(model)
    optimizer = build_optimizer(config, model, 1e-3)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restores the moments and counters of a checkpoint. Hyper-parameters stay as the optimizer was built, so that a
    changed config takes effect.

    Args:
        state: one for these parameters (see `runtime.untrusted.check_optimizer_state`).
    """
    groups = [
        {**group, **{name: copy.deepcopy(saved[name]) for name in COUNTERS if name in saved}, "params": saved["params"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = MOMENTS.get(type(optimizer))
    adam = isinstance(optimizer, torch.optim.AdamW)
    kept = {}
    for number, values in state["state"].items():
        if moments:
            step = {"step": torch.tensor(float(values["step"]))} if adam and "step" in values else {}
            values = step | {name: values[name] for name in moments if values.get(name) is not None}
        # In the parameter's memory format, which may differ from the checkpoint's: the fused kernels rely on it.
        kept[number] = {
            name: torch.empty_like(parameters[number], dtype=value.dtype).copy_(value)
            if isinstance(value, Tensor) and value.shape == parameters[number].shape and name != "step"
            else value
            for name, value in values.items()
        }
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"]:
        for number, parameter in enumerate(parameters):  # as `build_optimizer` makes them
            kept.setdefault(number, {}).setdefault("momentum_buffer", torch.zeros_like(parameter))
    optimizer.load_state_dict({"state": kept, "param_groups": groups})


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups
# ---------------------------------------------------------------------------------------------------------------------


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
