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
    """Base of the networks that are written here. A subclass sets `patch_embed`, `stages`, `merging` (what leads from
    each stage to the next), `norm` and `head` (timm's `ClassifierHead`).

    Args:
        img_size: pixels, or (height, width); multiples of the last stage's patch size. None for a network that takes
            images of any size.
        patch_size: p, pixels per token side of the first stage, doubled by each later one; or those of each stage.
        embed_dim: C, channels of the first stage, doubled by each later one; or those of each stage.
        num_classes: outputs of the head; 0 for none.
    """

    patch_embed: nn.Module
    stages: nn.ModuleList
    merging: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    grad_checkpointing = False

    def __init__(
        self,
        img_size: int | tuple[int, int] | None,
        patch_size: int | Sequence[int],
        embed_dim: int | Sequence[int],
        num_classes: int,
    ):
        super().__init__()
        self.img_size = as_size(img_size)
        self.num_classes = num_classes
        self.widths, reductions = by_stage("widths", embed_dim), by_stage("patch_size", patch_size)
        check_img_size(self.img_size, reductions[-1])
        self.num_features = self.head_hidden_size = self.widths[-1]
        # timm's: channels, pixels per token side and module of each stage.
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(self.widths, reductions, strict=True))
        ]

    def build_stages(self, depths: Sequence[int], block: Callable[[int, tuple[int, int]], nn.Module]) -> nn.ModuleList:
        """Four stages of `depths` blocks, each made by `block(channels, (H, W))`."""
        return stack_blocks(depths, lambda stage, _: block(self.widths[stage], self.map_size(stage)))

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return next(layer.in_channels for layer in self.patch_embed.modules() if isinstance(layer, nn.Conv2d))

    def map_size(self, stage: int) -> tuple[int, int]:
        """(H, W) of the map of a stage, from 0."""
        reduction = self.feature_info[stage]["reduction"]
        return self.img_size[0] // reduction, self.img_size[1] // reduction

    def map_sized(self) -> Iterator[tuple[str, MapSized, int]]:
        """The modules that depend on the image size: name, module, pixels per token side of its map."""
        for index, (stage, info) in enumerate(zip(self.stages, self.feature_info, strict=False)):
            for name, module in stage.named_modules(prefix=f"stages.{index}"):
                if isinstance(module, MapSized):
                    yield name, module, info["reduction"]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the image size, in place: parameters that depend on it are resampled.

        Those are new parameters then. Build optimizers and wrappers afterwards. A network that takes any size stays as
        it is.

        Args:
            img_size: pixels, or (height, width); multiples of the last stage's patch size.

        Raises:
            ValueError: another size, with the nearest that work; a model that was reparameterized.
        """
        if self.img_size is None:
            return
        size = as_size(img_size)
        check_img_size(size, self.feature_info[-1]["reduction"])
        for _, module, reduction in self.map_sized():
            module.set_map_size((size[0] // reduction, size[1] // reduction))
        self.img_size = size

    def input_size_of(self, state_dict: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """(height, width) of the images that a state dict of this model was made for; this model's own size if nothing
        in it tells. None if any size will do."""
        if self.img_size is None:
            return None
        size = list(self.img_size)
        for name, module, reduction in self.map_sized():
            if not module.axis:
                continue
            parameter, axes = list(module.map_axes.items())[-1]  # the bias, if it has one
            value, dim = state_dict.get(f"{name}.{parameter}"), next(iter(axes))
            if value is not None and value.ndim > dim:
                size[module.axis == "row"] = value.shape[dim] * reduction
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
        """Images (N, in_chans, H, W) to the outputs of the stages 0 to `last`: (N, C, H / p, W / p) with each stage's
        own C and p."""
        maps = [self.run_stage(0, self.patch_embed(x))]
        for index in range(1, last + 1):
            maps.append(self.run_stage(index, self.merging[index - 1](maps[-1])))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to the normalised map of the last stage, (N, num_features, H / p, W / p)."""
        x = self.checked(x)
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
            (N, C, H / p, W / p), with each stage's own C and p.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; accepted: 'NCHW'")
        x = self.checked(x)
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
        """The map of `forward_features` to logits (N, num_classes), or to pooled features (N, num_features)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def checked(self, images: Tensor) -> Tensor:
        """The images themselves. Raises ValueError for those of a size that the network was not made for."""
        return images if self.img_size is None else of_size(images, self.img_size)

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
        """Replaces the classifier by a newly initialised one, on the same device and in the same dtype; `num_classes=0`
        removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        weight = next(self.parameters())
        self.head.to(weight.device, weight.dtype)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides vectors and biases: none. The released recipe decays the position
        tables too."""
        return set()


def token_mixing_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that mix tokens along rows and columns, by the layer's name, also of a backbone in the model. timm's
    own models have none."""
    backbones = {name: module for name, module in model.named_modules() if isinstance(module, Backbone)}
    return {
        f"{prefix}.{name}".removeprefix("."): layer.weight
        for prefix, backbone in backbones.items()
        for name, layer, _ in backbone.map_sized()
        if "weight" in layer.map_axes
    }


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


def as_size(img_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) from that or from one number for both. None stays None."""
    return (img_size, img_size) if isinstance(img_size, int) else img_size and tuple(img_size)


def by_stage(name: str, value: int | Sequence[int]) -> list[int]:
    """The values of the four stages, from those or from that of the first, which each later stage doubles. Raises
    ValueError if they are not four."""
    if isinstance(value, int):
        return [value * 2**i for i in range(4)]
    if len(value) != 4:
        raise ValueError(f"{name}={tuple(value)} must be four numbers, one per stage")
    return list(value)


def stack_blocks(depths: Sequence[int], block: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    """Four stages of `depths` blocks, made in order by `block(stage, number in the stage)`, both from 0."""
    if len(depths) != 4 or min(depths) < 1:
        raise ValueError(f"depths={tuple(depths)} must be four positive numbers, one per stage")
    return nn.ModuleList(
        nn.Sequential(*(block(stage, number) for number in range(depth))) for stage, depth in enumerate(depths)
    )


def growing_rates(last: float, depths: Sequence[int]) -> Iterator[float]:
    """Stochastic depth of each block, from the first of the first stage on: linear from 0 to `last`."""
    return iter(torch.linspace(0, last, sum(depths), dtype=torch.float64, device="cpu").tolist())


def merge(dim: int, out_dim: int, groups: int = 1) -> nn.Conv2d:
    """Patch merging (Strip-MLP paper, figure 2a): halves height and width."""
    return nn.Conv2d(dim, out_dim, kernel_size=2, stride=2, groups=groups, bias=False)


def check_img_size(img_size: tuple[int, int] | None, patch_size: int) -> None:
    """Raises ValueError for a size that the tokens of the last stage do not divide, with the nearest that they do."""
    for size in img_size or ():
        check_multiple("img_size", size, "the last stage's patch size", patch_size)


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
