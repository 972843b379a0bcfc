"""The models for `torch.hub`, from a folder with this repository:

torch.hub.load("Strip-MLP", "strip_mlp_tiny", source="local", checkpoint="best.pth")
"""

import logging
from collections.abc import Callable

import timm
import torch
from torch import nn

from models.variants import VARIANTS
from runtime.checkpoint import count_classes, load_weights, read_checkpoint

logger = logging.getLogger(__name__)

dependencies = ["numpy", "safetensors", "timm", "torch", "yacs", "yaml"]


# Arguments for which timm adapts pretrained weights, or leaves some of them out.
ADAPTED = ("num_classes", "in_chans", "global_pool", "features_only", "out_indices")


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(checkpoint: str | None = None, ema: bool | None = None, **kwargs) -> nn.Module:
        if checkpoint is None:
            return timm.create_model(name, **kwargs)
        content = read_checkpoint(checkpoint)
        # As in the checkpoint first, where everything has to fit; then, by timm's own rules for pretrained weights, as
        # it is asked for.
        own = {key: value for key, value in kwargs.items() if key not in ADAPTED}
        with torch.device("meta"):
            classes = count_classes(timm.create_model(name, **own), content, checkpoint, ema)
        model = timm.create_model(name, num_classes=classes, **own)
        logger.info("weights from %s: %s", checkpoint, load_weights(model, content, checkpoint, ema=ema).taken)
        if own == kwargs:
            return model
        weights = {"state_dict": model.state_dict(), "num_classes": classes}
        kwargs.setdefault("num_classes", classes)
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights, **kwargs)

    create.__name__ = name
    create.__doc__ = f"""The model `{name}` of timm.

    Args:
        checkpoint: a file or folder with its weights, of whatever origin (see docs/export.md); by default they are
            random. What depends on the size of the images is resampled to `img_size`.
        ema: whether to take the moving average of the weights, by default if there is one.
        **kwargs: of `timm.create_model`, such as img_size, in_chans, features_only; num_classes by default as in the
            checkpoint, while another number gives a new classifier, and 0 none.

    Raises:
        checkpoint.CheckpointError: the file cannot be read, or does not fit the model.
    """
    return create


globals().update({name: _entry_point(name) for name in VARIANTS})
