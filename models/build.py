"""The model that a config describes."""

import difflib
import warnings
from dataclasses import fields
from typing import Any

import timm
import torch
from torch import nn

from config import image_size
from utils import UserError

from .compile import compile_model
from .strip_mlp import StripMixingOptions, StripMLP


class ModelError(UserError, ValueError):
    """The model that a config describes cannot be built."""


def build_model(config) -> nn.Module:
    """Builds `config.MODEL` on the CPU in float32.

    `MODEL.TYPE: strip_mlp_layer` gives a `StripMLP` from `MODEL.STRIP_MLP`; `MODEL.TYPE: timm` the timm model
    `MODEL.NAME`, so that the paper's peers train under the same recipe. `MODEL.NUM_CLASSES` must have been resolved
    from the data already; 0 builds a feature extractor without a classifier, as in timm.

    Raises:
        ModelError: the model cannot be built from these values; the message names them and what would work.
    """
    try:
        return _build_model(config)
    except ValueError as error:
        raise ModelError(f"the model of the config cannot be built: {error}") from error


def _build_model(config) -> nn.Module:
    model = {"strip_mlp_layer": build_strip_mlp, "timm": build_timm_model}[config.MODEL.TYPE](config)
    if config.TRAIN.USE_CHECKPOINT:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:  # timm's way of saying that a model cannot do it
            raise ValueError(
                f"TRAIN.USE_CHECKPOINT is True, which {config.MODEL.NAME} does not support; accepted: False"
            ) from error
    return model


def prepare_model(config, model: nn.Module, device: torch.device) -> None:
    """Moves the model to the device and gives it the memory format and the compiler that `config.TRAIN` asks for. In
    place; parameters keep their names."""
    model.to(device)
    if config.TRAIN.CHANNELS_LAST:
        convolutions_to(model, torch.channels_last)
    if config.TRAIN.COMPILE:
        compile_model(model, config.TRAIN.COMPILE_UNIT)


def convolutions_to(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Puts the weights of convolutions into the memory format. Other four-dimensional parameters (strips) are left
    alone, and so are 1 x 1 kernels, which look the same in both formats."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.to(memory_format=memory_format)


def build_strip_mlp(config) -> StripMLP:
    """`StripMLP` with the arguments of `MODEL.STRIP_MLP`."""
    return StripMLP(
        img_size=image_size(config),
        num_classes=config.MODEL.NUM_CLASSES,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        **strip_mlp_arguments(config),
    )


def strip_mlp_arguments(config) -> dict[str, Any]:
    """The arguments of `StripMLP` that `MODEL.STRIP_MLP` holds: a field of `StripMixingOptions` is the key of its
    name."""
    keys = config.MODEL.STRIP_MLP
    options = {field.name: keys[field.name.upper()] for field in fields(StripMixingOptions)}
    options["patch_channels"] = keys.PATCH_CHANNELS or released_patch_channels(keys.EMBED_DIM)
    return {
        "patch_size": keys.PATCH_SIZE,
        "in_chans": keys.IN_CHANS,
        "embed_dim": keys.EMBED_DIM,
        "depths": list(keys.LAYERS),
        "alpha": keys.ALPHA,
        "multi_scale_shortcuts": keys.MULTI_SCALE_SHORTCUTS,
        "grn": keys.GRN,
        **options,
    }


def idle_keys(config) -> tuple[list[str], str]:
    """The keys under MODEL that do not reach the model, and why."""
    if config.MODEL.TYPE != "strip_mlp_layer":
        names, reason = list(config.MODEL.STRIP_MLP), f"MODEL.TYPE is {config.MODEL.TYPE}"
    elif config.MODEL.STRIP_MLP.BRANCHES == "lsmm":
        names = ["STRIP_WIDTH", "PATCH_CHANNELS", "CGSMM_STRUCTURE", "POSITION_TABLES"]
        reason = "MODEL.STRIP_MLP.BRANCHES is lsmm: there is no CGSMM"
    else:
        names, reason = [], ""
    return [f"MODEL.STRIP_MLP.{name}" for name in names], reason


def released_patch_channels(embed_dim: int) -> int:
    """q by the rule of the released code. YAML files written for it have no key for q."""
    return 2 if embed_dim % 80 == 0 else 4


def build_timm_model(config) -> nn.Module:
    """Any timm model by name, at the image size of the data where the model's weights depend on it."""
    name = config.MODEL.NAME
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"nearest names: {', '.join(nearest)}" if nearest else "see timm.list_models()"
        raise ValueError(f"MODEL.NAME is {name!r}, which timm {timm.__version__} does not have; {hint}")
    pretrained_cfg = timm.get_pretrained_cfg(name)
    sized = {"img_size": image_size(config)} if pretrained_cfg and pretrained_cfg.fixed_input_size else {}
    arguments = {"num_classes": config.MODEL.NUM_CLASSES, **sized}
    try:
        # Passed even if it is 0: some models have another default.
        return timm.create_model(name, drop_path_rate=config.MODEL.DROP_PATH_RATE, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
    if config.MODEL.DROP_PATH_RATE > 0:
        warnings.warn(f"{name} has no stochastic depth: MODEL.DROP_PATH_RATE is ignored", stacklevel=2)
    return timm.create_model(name, **arguments)
