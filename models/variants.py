"""The models that timm and torch.hub know by name: the variants of both papers.

None has weights to download: the authors publish theirs through file-sharing sites. `released.py` loads the files.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .backbone import Backbone
from .released import checkpoint_filter_fn
from .sparse_mlp import SparseMLP
from .strip_mlp import StripMLP


def _cfg(paper: str, **kwargs) -> dict:
    """timm's description of a model's input, here of one trained on ImageNet-1K at 224 x 224."""
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


STRIP_MLP_PAPER, SPARSE_MLP_PAPER = "arXiv:2307.11458", "arXiv:2109.05422"

default_cfgs = generate_default_cfgs(
    {
        "strip_mlp_tiny_light": _cfg(STRIP_MLP_PAPER),
        "strip_mlp_tiny": _cfg(STRIP_MLP_PAPER),
        "strip_mlp_small": _cfg(STRIP_MLP_PAPER),
        "strip_mlp_base": _cfg(STRIP_MLP_PAPER),
        "strip_mlp_pico": _cfg(STRIP_MLP_PAPER, num_classes=10, input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
        "sparse_mlp_tiny": _cfg(SPARSE_MLP_PAPER),
        "sparse_mlp_small": _cfg(SPARSE_MLP_PAPER),
        "sparse_mlp_base": _cfg(SPARSE_MLP_PAPER),
    }
)


def _create(model: type[Backbone], variant: str, pretrained: bool, arguments: dict, kwargs: dict) -> Backbone:
    return build_model_with_cfg(
        model,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},  # what features_only=True does
        **{**arguments, **kwargs},
    )


@register_model
def strip_mlp_tiny_light(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 GMACs, 81.2 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 2, 6, 2), "patch_channels": 2}
    return _create(StripMLP, "strip_mlp_tiny_light", pretrained, arguments, kwargs)


@register_model
def strip_mlp_tiny(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-T: 24.9 M parameters, 3.6 GMACs, 82.2 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 2, 12, 2), "patch_channels": 2}
    return _create(StripMLP, "strip_mlp_tiny", pretrained, arguments, kwargs)


@register_model
def strip_mlp_small(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-S: 42.6 M parameters, 6.8 GMACs, 83.3 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 96, "depths": (2, 2, 18, 2), "patch_channels": 4}
    return _create(StripMLP, "strip_mlp_small", pretrained, arguments, kwargs)


@register_model
def strip_mlp_base(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-B: 57.2 M parameters, 9.2 GMACs, 83.6 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 112, "depths": (2, 2, 18, 2), "patch_channels": 4}
    return _create(StripMLP, "strip_mlp_base", pretrained, arguments, kwargs)


@register_model
def strip_mlp_pico(pretrained: bool = False, **kwargs) -> StripMLP:
    """Not in the paper: under 1 M parameters at 32 x 32, for the digits data set, tests and first steps."""
    arguments = {"img_size": 32, "embed_dim": 24, "depths": (1, 1, 2, 1), "patch_channels": 2}
    return _create(StripMLP, "strip_mlp_pico", pretrained, arguments, kwargs)


@register_model
def sparse_mlp_tiny(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-T: 24.1 M parameters, 5.0 GMACs, 81.9 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 8, 14, 2), "drop_path_rate": 0.0}
    return _create(SparseMLP, "sparse_mlp_tiny", pretrained, arguments, kwargs)


@register_model
def sparse_mlp_small(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-S: 48.6 M parameters, 10.3 GMACs, 83.1 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 96, "depths": (2, 10, 24, 2), "drop_path_rate": 0.2}
    return _create(SparseMLP, "sparse_mlp_small", pretrained, arguments, kwargs)


@register_model
def sparse_mlp_base(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-B: 65.9 M parameters, 14.0 GMACs, 83.4 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 112, "depths": (2, 10, 24, 2), "drop_path_rate": 0.3}
    return _create(SparseMLP, "sparse_mlp_base", pretrained, arguments, kwargs)
