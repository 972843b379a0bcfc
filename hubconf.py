"""The models for `torch.hub`, from a folder with this repository:

torch.hub.load("Strip-MLP", "strip_mlp_tiny", source="local", checkpoint="best.pth")
"""

from collections.abc import Callable

import timm
import torch
from torch import nn

import models  # noqa: F401  (registers the models with timm)
from checkpoint import count_classes, load_weights, read_checkpoint

dependencies = ["numpy", "safetensors", "timm", "torch", "yacs", "yaml"]


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(checkpoint: str | None = None, **kwargs) -> nn.Module:
        content = checkpoint and read_checkpoint(checkpoint)
        if content and "num_classes" not in kwargs:
            with torch.device("meta"):
                model = timm.create_model(name)
            kwargs["num_classes"] = count_classes(model, content, checkpoint)
        model = timm.create_model(name, **kwargs)
        if content:
            load_weights(model, content, checkpoint, new_classifier=True)
        return model

    create.__name__ = name
    create.__doc__ = f"""The model `{name}` of timm.

    Args:
        checkpoint: a file with its weights, ours, released or safetensors; by default they are random. What depends on
            the size of the images is resampled to `img_size`.
        **kwargs: of `timm.create_model`, such as img_size, in_chans, drop_path_rate; num_classes by default as in the
            checkpoint, while another number gives a new classifier.

    Raises:
        checkpoint.CheckpointError: the file cannot be read, or does not fit the model.
    """
    return create


strip_mlp_tiny_light = _entry_point("strip_mlp_tiny_light")
strip_mlp_tiny = _entry_point("strip_mlp_tiny")
strip_mlp_small = _entry_point("strip_mlp_small")
strip_mlp_base = _entry_point("strip_mlp_base")
strip_mlp_pico = _entry_point("strip_mlp_pico")
sparse_mlp_tiny = _entry_point("sparse_mlp_tiny")
sparse_mlp_small = _entry_point("sparse_mlp_small")
sparse_mlp_base = _entry_point("sparse_mlp_base")
