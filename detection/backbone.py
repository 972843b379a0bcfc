"""A classifier's network as the backbone of a detector: its maps at some strides, for images of one size or a few."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from config import detection_sizes
from models import build_model
from models.backbone import Backbone, check_img_size
from models.build import ModelError
from runtime.checkpoint import load_weights, read_checkpoint

Size = tuple[int, int]  # height, width


class BucketedBackbone(nn.Module):
    """A network that gives maps, for images of a few sizes.

    A network whose parameters depend on the size of its maps has such parameters for each size, resampled from those of
    the first. All others are the same ones for all sizes, and so are running statistics. Each parameter is registered
    once, so that optimizers, moving averages and checkpoints see it once. A network for any size is used as it is.

    Args:
        body: gives the maps (timm's `FeatureGetterNet`), for images of the first of `sizes`.
        sizes: (height, width) in pixels.

    Attributes:
        channels, strides: of the maps, finest first.
        sized: the modules that depend on the size, for each size after the first, under the names that they have in
            `body.model` for the first.

    Shape: (N, 3, H, W), (H, W) one of the sizes -> maps (N, C, H / stride, W / stride).
    """

    def __init__(self, body: FeatureGetterNet, sizes: Sequence[Size]):
        super().__init__()
        self.body, self.sizes = body, tuple(sizes)
        self.channels, self.strides = body.feature_info.channels(), body.feature_info.reduction()
        self.sized = nn.ModuleList()
        if isinstance(body.model, Backbone) and body.model.img_size is not None:
            self.sized.extend(resampled(body.model, size) for size in self.sizes[1:])

    @torch.compiler.disable
    def body_for(self, size: Size) -> nn.Module:
        """The network for images of that size. Raises ValueError if it is not one of the sizes."""
        if size not in self.sizes:
            accepted = ", ".join(f"{height} x {width}" for height, width in self.sizes)
            raise ValueError(f"images of {size[0]} x {size[1]} pixels; accepted: {accepted} (DETECTION.SIZES)")
        if size == self.sizes[0] or not self.sized:
            return self.body
        # Put together each time, which takes a millisecond or so: what is shared may have been replaced since, such as
        # batch norms by synchronised ones.
        body = assembled(self.body, {"model": self.sized[self.sizes.index(size) - 1]})
        body.model.img_size = size
        return body

    def forward(self, images: Tensor) -> list[Tensor]:
        body = self.body_for(tuple(images.shape[-2:])) if self.sized else self.body
        return body(images)


def resampled(model: Backbone, size: Size) -> nn.ModuleDict:
    """Copies of the model's modules that depend on the image size, for images of another size: by their names, in which
    each dot is a step into the next dictionary."""
    check_img_size(size, model.feature_info[-1]["reduction"])
    root = nn.ModuleDict()
    for name, module, reduction in model.map_sized():
        own = copy.deepcopy(module)
        own.set_map_size((size[0] // reduction, size[1] // reduction))
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if parent not in node:
                node[parent] = nn.ModuleDict()
            node = node[parent]
        node[last] = own
    return root


def assembled(module: nn.Module, own: Mapping[str, nn.Module] | nn.ModuleDict) -> nn.Module:
    """A copy of the module that has some of its modules from `own` (see `resampled`), and shares all others."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    for name in own:
        replacement = own[name]
        is_inside = isinstance(replacement, nn.ModuleDict)
        other._modules[name] = assembled(module._modules[name], replacement) if is_inside else replacement
    return other


def build_backbone(config) -> BucketedBackbone:
    """The network of `config.MODEL` without its head: its maps at `DETECTION.STRIDES`, for the sizes that images have.

    Raises:
        ModelError: it has no such maps, or cannot be made for these sizes.
    """
    sizes = detection_sizes(config)
    model = build_classifier(config, sizes[0], 0)
    if len(sizes) > 1 and not isinstance(model, Backbone) and (model.pretrained_cfg or {}).get("fixed_input_size"):
        raise ModelError(
            f"{config.MODEL.NAME} takes images of one size, but DETECTION.SIZES are {len(sizes)}; accepted: one size "
            "(DETECTION.FIT pad keeps aspect ratios), or a model that is written here or takes any size"
        )
    strides = config.DETECTION.STRIDES
    # Where several maps have a stride, the last of them is that of the most layers.
    last = {info["reduction"]: index for index, info in enumerate(getattr(model, "feature_info", []))}
    if not set(strides) <= set(last) or not hasattr(model, "forward_intermediates"):
        given = ", ".join(map(str, last)) if hasattr(model, "forward_intermediates") else "none: take another model"
        raise ModelError(f"DETECTION.STRIDES is {strides}, but {config.MODEL.NAME} gives maps at strides {given}")
    for height, width in sizes:
        if height % strides[-1] or width % strides[-1]:
            raise ModelError(
                f"images of {height} x {width} pixels (DETECTION.SIZES, DATA.IMG_SIZE) for maps at stride "
                f"{strides[-1]} (DETECTION.STRIDES); accepted: multiples of {strides[-1]}"
            )
    return BucketedBackbone(FeatureGetterNet(model, [last[stride] for stride in strides]), sizes)


def build_classifier(config, size: Size, num_classes: int) -> nn.Module:
    """The network of `config.MODEL` for images of that size."""
    config = config.clone()
    config.defrost()
    config.DATA.IMG_SIZE, config.MODEL.NUM_CLASSES = list(size), num_classes
    return build_model(config)


def load_classifier(backbone: BucketedBackbone, path: str | Path, config, ema: bool | None = None) -> list[str]:
    """Loads a classifier's checkpoint, of ours or released, into the backbone, resampled to each of its sizes. Its head
    and other parts that the backbone lacks are dropped.

    Args:
        ema: see `find_weights`.

    Returns:
        Notes for the log: which weights were taken, and what was resampled.

    Raises:
        CheckpointError: it cannot be read, or does not fit the model.
    """
    content = read_checkpoint(path)
    notes = []
    for size in backbone.sizes:
        body = backbone.body_for(size)
        if size != backbone.sizes[0] and body is backbone.body:
            continue
        # Into the whole classifier, so that a missing entry is noticed.
        classifier = build_classifier(config, size, 1)
        loaded = load_weights(classifier, content, path, new_classifier=True, ema=ema)
        notes += [f"the backbone starts from {path}: {loaded.taken}"] if not notes else []
        notes += loaded._replace(fresh=[]).notes(classifier)
        weights = classifier.state_dict()
        body.model.load_state_dict({name: weights[name] for name in body.model.state_dict()})
    return notes
