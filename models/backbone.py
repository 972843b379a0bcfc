"""What timm and the training scripts expect of a network of four stages, whatever its blocks; and the checks that its
arguments share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import singledispatch

import torch
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.fx import wrap

from .activation_checkpoint import checkpoint_blocks
from .resample import MapSized, resample


@singledispatch
def reparameterized(module: nn.Module) -> nn.Module:
    """What computes the same as `module` in evaluation mode, with fewer operations; the module itself if nothing in it
    can be folded. `reparameterize.py` registers the modules that can."""
    return module


class Backbone(nn.Module):
    """Base of `StripMLP` and `SparseMLP`. A subclass sets `patch_embed`, `stages`, `merging`, `norm` and `head` (timm's
    `ClassifierHead`).

    Args:
        img_size: pixels, or (height, width); multiples of 8 * patch_size.
        patch_size: p, pixels per token side.
        embed_dim: C, channels of the first stage, doubled by each later one.
        num_classes: outputs of the head; 0 for none.
    """

    patch_embed: nn.Module
    stages: nn.ModuleList
    merging: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    grad_checkpointing = False

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, embed_dim: int, num_classes: int):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_img_size(self.img_size, patch_size)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 8 * embed_dim
        self.widths = [embed_dim * 2**i for i in range(4)]
        # timm's: channels, pixels per token side and module of each stage.
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(self.widths)
        ]

    def build_stages(self, depths: Sequence[int], block: Callable[[int, tuple[int, int]], nn.Module]) -> nn.ModuleList:
        """Four stages of `depths` blocks, each made by `block(channels, (H, W))`."""
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths={tuple(depths)} must be four positive numbers, one per stage")
        stages = []
        for info, depth in zip(self.feature_info, depths, strict=True):
            size = (self.img_size[0] // info["reduction"], self.img_size[1] // info["reduction"])
            stages.append(nn.Sequential(*(block(info["num_chs"], size) for _ in range(depth))))
        return nn.ModuleList(stages)

    def map_sized(self) -> Iterator[tuple[str, MapSized, int]]:
        """The modules that depend on the image size: name, module, pixels per token side of its map."""
        for index, (stage, info) in enumerate(zip(self.stages, self.feature_info, strict=False)):
            for name, module in stage.named_modules(prefix=f"stages.{index}"):
                if isinstance(module, MapSized):
                    yield name, module, info["reduction"]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the image size, in place: parameters that depend on it are resampled.

        Those are new parameters then. Build optimizers and wrappers afterwards.

        Args:
            img_size: pixels, or (height, width); multiples of 8 * patch_size.

        Raises:
            ValueError: another size, with the nearest that work; a model that was reparameterized.
        """
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_img_size(size, self.feature_info[0]["reduction"])
        for _, module, reduction in self.map_sized():
            module.set_map_size((size[0] // reduction, size[1] // reduction))
        self.img_size = size

    def input_size_of(self, state_dict: Mapping[str, Tensor]) -> tuple[int, int]:
        """(height, width) of the images that a state dict of this model was made for; this model's own size if nothing
        in it tells."""
        size = list(self.img_size)
        for name, module, reduction in self.map_sized():
            bias = state_dict.get(f"{name}.bias")
            if module.axis and bias is not None and bias.ndim:  # its last dimension is the mixed axis
                size[module.axis == "row"] = bias.shape[-1] * reduction
        return size[0], size[1]

    def resample(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This model's state dict from one of the same model for images of another size. What does not fit even so is
        left as it is, so that loading reports it."""
        resampled = dict(state_dict)
        for name, module, _ in self.map_sized():
            for parameter, axes in module.map_axes.items():
                value, shape = resampled.get(f"{name}.{parameter}"), getattr(module, parameter).shape
                if value is None or value.shape == shape or not value.is_floating_point() or value.ndim != len(shape):
                    continue
                if value.nbytes > value.untyped_storage().nbytes():
                    continue  # an expanded tensor: a few bytes can claim to be any number of elements
                if all(n and (dim in axes or n == shape[dim]) for dim, n in enumerate(value.shape)):
                    resampled[f"{name}.{parameter}"] = resample(value, axes, shape[next(iter(axes))])
        return resampled

    def forward_stages(self, x: Tensor, last: int = 3) -> list[Tensor]:
        """Images (N, in_chans, H, W) to the outputs of the stages 0 to `last`, (N, 2^i C, H / 2^i p, W / 2^i p) of
        stage i."""
        maps = [self.run_stage(0, self.patch_embed(x))]
        for index in range(1, last + 1):
            maps.append(self.run_stage(index, self.merging[index - 1](maps[-1])))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the normalised map of the last stage, (N, 8 C, H / 8p, W / 8p)."""
        x = of_size(x, self.img_size)
        return self.norm(self.forward_stages(x, len(self.stages) - 1)[-1])

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
            indices: stages, from 0; negative ones count from the end. A number n: the last n. None: all.
            norm: whether to normalise the last stage's map, as `forward_features` does.
            stop_early: whether to skip the stages after the last of `indices`.
            output_fmt: "NCHW" only.
            intermediates_only: whether to return the list alone.

        Returns:
            The output of `forward_features` (with `stop_early`, of the last stage that was run) and the list of maps
            (N, 2^i C, H / 2^i p, W / 2^i p).

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; accepted: 'NCHW'")
        x = of_size(x, self.img_size)
        take, most = feature_take_indices(len(self.stages), indices)
        end = len(self.stages) - 1
        outputs = self.forward_stages(x, most if stop_early else end)
        maps = [outputs[index] for index in range(len(outputs)) if index in take]
        x = self.norm(outputs[-1]) if len(outputs) == len(self.stages) else outputs[-1]
        if norm and end in take:
            maps[-1] = x
        return maps if intermediates_only else (x, maps)

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
        """Which parameters form a layer, from the input on: by stage if `coarse`, else by block (timm's convention, for
        layer-wise learning-rate decay). Merging belongs to the stage that it leaves."""
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                (r"^merging\.(\d+)", MATCH_PREV_GROUP),
            ],
            "head": r"^(?:norm|head)\.",
        }

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits (N, num_classes), or to pooled features (N, 8 C)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """The blocks of one stage, with activation checkpointing if it is on."""
        blocks = self.stages[index]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_blocks(blocks, x)
        return blocks(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing: only the input of each block is kept for the backward pass. Less memory, one more
        forward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a newly initialised one; `num_classes=0` removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides vectors and biases: none. The released recipe decays the position
        tables too."""
        return set()


def token_mixing_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that mix tokens along rows and columns, by the layer's name; none for timm's own models."""
    layers = model.map_sized() if isinstance(model, Backbone) else []
    return {name: layer.weight for name, layer, _ in layers if "weight" in layer.map_axes}


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The model's classifier; of distilled models of timm's, both."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


@wrap
def of_size(images: Tensor, img_size: tuple[int, int]) -> Tensor:
    """The images themselves; a ValueError for those of another size. (torch.fx, which cannot look at sizes, takes it as
    one operation.)"""
    if tuple(images.shape[-2:]) != img_size:
        raise ValueError(
            f"input of {tuple(images.shape[-2:])} pixels, but the token mixing weights were made for {img_size}: "
            "resize the images, build the model with this img_size, or call set_input_size"
        )
    return images


def merge(dim: int, out_dim: int, groups: int = 1) -> nn.Conv2d:
    """Patch merging (Strip-MLP paper, figure 2a): halves height and width."""
    return nn.Conv2d(dim, out_dim, kernel_size=2, stride=2, groups=groups, bias=False)


def check_img_size(img_size: tuple[int, int], patch_size: int) -> None:
    """Raises ValueError for a size that four stages do not divide, with the nearest that they do."""
    for size in img_size:
        check_multiple("img_size", size, "8 * patch_size", 8 * patch_size)


def check_multiple(name: str, value: int, of: str, factor: int) -> None:
    """Raises ValueError for a value that is no positive multiple of `factor`, with the nearest that are."""
    if value < 1 or value % factor:
        below, above = value // factor * factor, (value // factor + 1) * factor
        nearest = f"{below} and {above}" if below > 0 else f"{max(above, factor)}"
        factor_text = of if of == str(factor) else f"{of} = {factor}"
        raise ValueError(f"{name}={value} must be a multiple of {factor_text}; nearest that work: {nearest}")


def check_divides(name: str, value: int, of: str, total: int, or_else: str) -> None:
    """Raises ValueError for a value that does not divide `total`, with the nearest that do."""
    if value < 1 or total % value:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        nearest = [d for d in divisors if d < value][-1:] + [d for d in divisors if d > value][:1]
        raise ValueError(
            f"{name}={value} must divide {of} = {total}; nearest that work: {' and '.join(map(str, nearest))}; "
            f"or {or_else}"
        )


def check_odd(name: str, value: int) -> None:
    """Raises ValueError for a value that is not odd and positive, with the nearest that are."""
    if value < 1 or value % 2 == 0:
        nearest = "1" if value < 1 else f"{value - 1} and {value + 1}"
        raise ValueError(f"{name}={value} must be odd and positive; nearest that work: {nearest}")


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raises ValueError for a value that is not one of the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
