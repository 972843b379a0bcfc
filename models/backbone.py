"""What timm and the training scripts expect of a network of four stages, whatever its blocks."""

from collections.abc import Callable, Mapping, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .activation_checkpoint import checkpoint_blocks


class Backbone(nn.Module):
    """Base of `StripMLP` and `SparseMLP`.

    A subclass sets `img_size` (height, width), `num_classes`, `stages` and `head` (timm's `ClassifierHead`), and
    defines `forward_features`.
    """

    img_size: tuple[int, int]
    num_classes: int
    stages: nn.ModuleList
    head: nn.Module
    grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

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
                "resize the images or build the model with this img_size"
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
