"""What timm and the training scripts expect of a network of four stages, whatever its blocks."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from .activation_checkpoint import checkpoint_blocks


def interpolation(source: int, target: int, align_corners: bool = False) -> Tensor:
    """The matrix (target, source) that resizes a signal of `source` samples to `target`: enlarges it linearly, or finds
    the smaller one that, enlarged, is nearest to it. So to enlarge and to make small again changes nothing, and a
    constant stays what it is.

    Args:
        align_corners: whether the first and the last sample keep their places, as in a table of differences -r to r;
            else they are pixels, which keep their area.
    """
    if target < source:
        return torch.linalg.pinv(interpolation(target, source, align_corners))
    identity = torch.eye(source, dtype=torch.float64, device="cpu")
    return F.interpolate(identity[None], target, mode="linear", align_corners=align_corners)[0].T


# What to multiply a parameter with, along one of its dimensions, so that its module does to a map of another size what
# it did to one of its own, up to the resizing of maps. A weight takes its input from a map that is resized to the size
# that it was made for; what it gives is resized back.
RESAMPLING = {
    "output": interpolation,
    "input": lambda source, target: interpolation(target, source).T,
    "offset": partial(interpolation, align_corners=True),
}


@torch.no_grad()
def resample(value: Tensor, axes: Mapping[int, str], length: int) -> Tensor:
    """`value` with `length` entries along each of the dimensions `axes`, which says what they stand for: a key of
    `RESAMPLING`. The tensor itself where it has that length."""
    if all(value.shape[dim] == length for dim in axes):
        return value
    resized = value.double()
    for dim, role in axes.items():
        matrix = RESAMPLING[role](value.shape[dim], length).to(value.device)
        resized = torch.tensordot(resized, matrix, dims=([dim], [1])).movedim(-1, dim)
    return resized.to(value.dtype).contiguous()


class MapSized(nn.Module):
    """A module whose parameters have the height or the width of the map, in tokens, in their shape.

    Attributes:
        map_axes: by parameter, the dimensions that depend on the map and what they stand for (see `RESAMPLING`).
    """

    map_axes: ClassVar[dict[str, dict[int, str]]] = {}

    def map_length(self, size: tuple[int, int]) -> int:
        """How long those dimensions are for a map of `size`, (H, W)."""
        raise NotImplementedError

    def set_map_size(self, size: tuple[int, int]) -> None:
        """Resamples the parameters, in place, for a map of `size`, (H, W)."""
        for name, axes in self.map_axes.items():
            parameter = getattr(self, name)
            value = resample(parameter, axes, self.map_length(size))
            if value is not parameter:
                setattr(self, name, nn.Parameter(value, parameter.requires_grad))


# timm's: how `features_only=True` gets the maps.
FEATURE_CFG = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}


class Backbone(nn.Module):
    """Base of `StripMLP` and `SparseMLP`.

    A subclass sets `img_size` (height, width), `num_classes`, `feature_info`, `patch_embed`, `stages`, `merging`,
    `norm` and `head` (timm's `ClassifierHead`), and may define `embed` and `between_stages`.
    """

    img_size: tuple[int, int]
    num_classes: int
    feature_info: list[dict]
    patch_embed: nn.Module
    stages: nn.ModuleList
    merging: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    grad_checkpointing = False

    def map_sized(self) -> Iterator[tuple[str, MapSized, int]]:
        """The modules that depend on the size of the images: name, module, pixels per side of its map's tokens."""
        for index, (stage, info) in enumerate(zip(self.stages, self.feature_info, strict=False)):
            for name, module in stage.named_modules(prefix=f"stages.{index}"):
                if isinstance(module, MapSized):
                    yield name, module, info["reduction"]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Makes the model one for images of another size, in place: what depends on it is resampled.

        The parameters are new ones where that changes them: build optimizers and wrappers afterwards.

        Args:
            img_size: pixels, or (height, width); multiples of 8 * patch_size.

        Raises:
            ValueError: a size that is none, naming the nearest that are; a model that was reparameterized.
        """
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_img_size(size, self.feature_info[0]["reduction"])
        for _, module, reduction in self.map_sized():
            module.set_map_size((size[0] // reduction, size[1] // reduction))
        self.img_size = size

    def input_size_of(self, state_dict: Mapping[str, Tensor]) -> tuple[int, int]:
        """(height, width) of the images that a state dict of this model was made for; this model's own where nothing
        in it says so."""
        size = list(self.img_size)
        for name, module, reduction in self.map_sized():
            if isinstance(axis := getattr(module, "axis", None), str):
                bias = state_dict.get(f"{name}.bias")
                if bias is not None and bias.ndim:
                    size[axis == "row"] = bias.shape[-1] * reduction
        return size[0], size[1]

    def resample(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This model's state dict from that of the same model for images of another size. What does not come out in
        this model's shapes is left as it is, so that loading reports it."""
        resampled = dict(state_dict)
        for name, module, _ in self.map_sized():
            for parameter, axes in module.map_axes.items():
                value, shape = resampled.get(f"{name}.{parameter}"), getattr(module, parameter).shape
                if value is None or value.shape == shape or not value.is_floating_point() or value.ndim != len(shape):
                    continue
                if value.nbytes > value.untyped_storage().nbytes():
                    continue  # one number in memory can be shown as any number of them
                if all(n and (dim in axes or n == shape[dim]) for dim, n in enumerate(value.shape)):
                    resampled[f"{name}.{parameter}"] = resample(value, axes, shape[next(iter(axes))])
        return resampled

    def embed(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the first stage's input, (N, C, H / p, W / p)."""
        return self.patch_embed(x)

    def between_stages(self, index: int, x: Tensor, carried: list[Tensor]) -> Tensor:
        """The input of stage `index`, from 1, given the merged output of the one before; the same unless a subclass
        has connections between stages. `carried` is theirs, to keep what later stages get."""
        return x

    def forward_stages(self, x: Tensor, last: int | None = None, keep: Collection[int] = ()) -> list[Tensor]:
        """Images (N, in_chans, H, W) to the maps of the stages `keep`, in order, and of stage `last` (by default the
        last there is), which comes last: (N, 2^i C, H / 2^i p, W / 2^i p) of stage i from 0."""
        self.check_size(x)
        x = self.embed(x)
        last = len(self.stages) - 1 if last is None else last
        kept, carried = [], []
        for index in range(last + 1):
            if index > 0:
                x = self.between_stages(index, self.merging[index - 1](x), carried)
            x = self.run_stage(index, x)
            if index in keep:
                kept.append(x)
        return [*kept, x]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the normalised map of the last stage, (N, 8 C, H / 8p, W / 8p)."""
        return self.norm(self.forward_stages(x)[-1])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of some of the stages (timm's convention).

        Args:
            x: images (N, in_chans, H, W).
            indices: stages, from 0, negative ones counted from the end; a number n: the last n; None: all.
            norm: whether that of the last stage is normalised, as `forward_features` does.
            stop_early: whether to leave out the stages after the last of those.
            output_fmt: "NCHW", which is all there is.
            intermediates_only: whether to return no more than the list.

        Returns:
            The output of `forward_features` (with `stop_early`, of the last stage that was run) and the list of maps
            (N, 2^i C, H / 2^i p, W / 2^i p).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; accepted: 'NCHW'")
        take, most = feature_take_indices(len(self.stages), indices)
        end = len(self.stages) - 1
        *maps, x = self.forward_stages(x, most if stop_early else end, take)
        normalized = self.norm(x) if not stop_early or most == end else x
        if norm and end in take:
            maps[-1] = normalized
        return maps if intermediates_only else (normalized, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last of `indices`, and what only they need (timm's convention). In place.

        Returns:
            The stages that `indices` names, from 0.
        """
        take, most = feature_take_indices(len(self.stages), indices)
        is_cut = most < len(self.stages) - 1
        self.stages, self.merging = self.stages[: most + 1], self.merging[:most]
        if prune_norm or is_cut:
            self.norm = nn.Identity()  # it has the width of the last stage
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return take

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters belong together, from the images on: by stage if `coarse`, else by block (timm's convention,
        for learning rates that decay by layer). What leads from a stage to the next belongs to the one it leaves."""
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                (r"^merging\.(\d+)", MATCH_PREV_GROUP),
                # Its last stage's number: shortcuts are as deep as the merging into the stage that they lead to.
                (r"^shortcut_2to3", (1, *MATCH_PREV_GROUP)),
                (r"^shortcut_[23]to4", (2, *MATCH_PREV_GROUP)),
            ],
            "head": r"^(?:norm|head)\.",
        }

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits (N, num_classes), or to pooled features (N, 8 C)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def check_size(self, x: Tensor) -> None:
        """Raises ValueError for images of another size than the one that the weights were made for."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"input of {tuple(x.shape[-2:])} pixels, but the token mixing weights were made for {self.img_size}: "
                "resize the images, build the model with this img_size, or call set_input_size"
            )

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """Blocks of one stage, recomputing their activations in the backward pass if asked to."""
        blocks = self.stages[index]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_blocks(blocks, x)
        return blocks(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass: less memory, one more forward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a freshly initialised one; `num_classes=0` removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides vectors and biases: none in the released recipe, which decays
        the position tables too."""
        return set()


def token_mixing_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the layers in which tokens interact along rows and columns, by the layer's name: none in models
    that are not of this package."""
    layers = model.map_sized() if isinstance(model, Backbone) else []
    return {name: layer.weight for name, layer, _ in layers if "weight" in layer.map_axes}


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The model's classifier; of distilled models of timm's, both."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def describe_stages(embed_dim: int, patch_size: int) -> list[dict]:
    """timm's `feature_info`: channels, pixels per token side and module of each of the four stages."""
    return [{"num_chs": embed_dim * 2**i, "reduction": patch_size * 2**i, "module": f"stages.{i}"} for i in range(4)]


def build_stages(
    feature_info: Sequence[dict],
    depths: Sequence[int],
    img_size: tuple[int, int],
    block: Callable[[int, tuple[int, int]], nn.Module],
) -> nn.ModuleList:
    """The stages that `feature_info` describes, of `depths` blocks, each made by `block(channels, (H, W))`."""

    def stage(info: dict, depth: int) -> nn.Sequential:
        size = (img_size[0] // info["reduction"], img_size[1] // info["reduction"])
        return nn.Sequential(*(block(info["num_chs"], size) for _ in range(depth)))

    return nn.ModuleList(stage(info, depth) for info, depth in zip(feature_info, depths, strict=True))


def merge(dim: int, out_dim: int, groups: int = 1) -> nn.Conv2d:
    """Patch merging (Strip-MLP paper, figure 2a): halves height and width."""
    return nn.Conv2d(dim, out_dim, kernel_size=2, stride=2, groups=groups, bias=False)


def check_img_size(img_size: tuple[int, int], patch_size: int) -> None:
    """Raises ValueError for a size that four stages do not divide, naming the nearest ones that they do."""
    stride = 8 * patch_size
    for size in img_size:
        if size < 1 or size % stride:
            below, above = size // stride * stride, (size // stride + 1) * stride
            nearest = f"{below} and {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"img_size={size} must be a multiple of 8 * patch_size = {stride}; nearest that work: {nearest}"
            )


def check_depths(depths: Sequence[int]) -> None:
    """Raises ValueError for anything but four positive numbers."""
    if len(depths) != 4 or min(depths) < 1:
        raise ValueError(f"depths={tuple(depths)} must be four positive numbers, one per stage")


def plain_weights(state_dict: Mapping) -> dict[str, Tensor]:
    """A state dict, bare or under "model", without the prefix "module." that DistributedDataParallel adds."""
    inner = state_dict.get("model")
    state_dict = inner if isinstance(inner, Mapping) else state_dict
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def translate(name: str, pairs: Sequence[tuple[str, str]], back: bool = False) -> str:
    """`name` with its beginning replaced: if it is the first of one of the `pairs`, by the second; `back`: the other
    way round."""
    for pair in pairs:
        old, new = reversed(pair) if back else pair
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def image_cfg(paper: str, **kwargs) -> dict:
    """timm's description of a model's input, for one trained on ImageNet-1K at 224 x 224."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed",
        "classifier": "head.fc",
        "paper_ids": paper,
        **kwargs,
    }
