"""The models that timm and torch.hub know by name: the variants of Strip-MLP, and of the peers that timm does not have.

None has weights to download: the authors publish theirs through file-sharing sites. `released.py` loads the files.
"""

from contextlib import nullcontext

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .backbone import Backbone
from .cycle_mlp import CycleMLP
from .hire_mlp import HireMLP
from .released import checkpoint_filter_fn
from .sparse_mlp import SparseMLP
from .strip_mlp import StripMLP
from .vision_permutator import VisionPermutator
from .wave_mlp import WaveMLP


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


def _any_size(paper: str, **kwargs) -> dict:
    """The same of a model that takes images of any size."""
    return _cfg(paper, **{"fixed_input_size": False, "first_conv": "patch_embed.proj", **kwargs})


STRIP_MLP_PAPER, SPARSE_MLP_PAPER = "arXiv:2307.11458", "arXiv:2109.05422"
CYCLE_MLP_PAPER, VIP_PAPER = "arXiv:2107.10224", "arXiv:2106.12368"
HIRE_MLP_PAPER, WAVE_MLP_PAPER = "arXiv:2108.13341", "arXiv:2111.12294"
VIP_SIZES, HIRE_MLP_SIZES = ("s14", "s7", "m7"), ("tiny", "small", "base", "large")
WAVE_MLP_SIZES = ("t", "t_dw", "s", "m", "b")

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
        **{f"cycle_mlp_b{size}": _any_size(CYCLE_MLP_PAPER) for size in range(1, 6)},
        **{f"vip_{size}": _cfg(VIP_PAPER, first_conv="patch_embed.proj", pool_size=(16, 16)) for size in VIP_SIZES},
        **{f"hire_mlp_{size}": _any_size(HIRE_MLP_PAPER) for size in HIRE_MLP_SIZES},
        **{f"wave_mlp_{size}": _any_size(WAVE_MLP_PAPER) for size in WAVE_MLP_SIZES},
    }
)
VARIANTS = list(default_cfgs)


def create(model: type[Backbone], variant: str, pretrained: bool, arguments: dict, kwargs: dict) -> Backbone:
    """A network of ours under a name that timm knows.

    Args:
        arguments: of the model's class; `kwargs`, the user's, go before them.
    """
    # timm's models take a device, "meta" among them, and a dtype to make their weights in.
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    with torch.device(device) if device is not None else nullcontext():
        network = build_model_with_cfg(
            model,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},  # what features_only=True does
            **{**arguments, **kwargs},
        )
    return network if dtype is None else network.to(dtype)


@register_model
def strip_mlp_tiny_light(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 GMACs, 81.2 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 2, 6, 2), "patch_channels": 2}
    return create(StripMLP, "strip_mlp_tiny_light", pretrained, arguments, kwargs)


@register_model
def strip_mlp_tiny(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-T: 24.9 M parameters, 3.6 GMACs, 82.2 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 2, 12, 2), "patch_channels": 2}
    return create(StripMLP, "strip_mlp_tiny", pretrained, arguments, kwargs)


@register_model
def strip_mlp_small(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-S: 42.6 M parameters, 6.8 GMACs, 83.3 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 96, "depths": (2, 2, 18, 2), "patch_channels": 4}
    return create(StripMLP, "strip_mlp_small", pretrained, arguments, kwargs)


@register_model
def strip_mlp_base(pretrained: bool = False, **kwargs) -> StripMLP:
    """Strip-MLP-B: 57.2 M parameters, 9.2 GMACs, 83.6 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 112, "depths": (2, 2, 18, 2), "patch_channels": 4}
    return create(StripMLP, "strip_mlp_base", pretrained, arguments, kwargs)


@register_model
def strip_mlp_pico(pretrained: bool = False, **kwargs) -> StripMLP:
    """Not in the paper: under 1 M parameters at 32 x 32, for the digits data set, tests and first steps."""
    arguments = {"img_size": 32, "embed_dim": 24, "depths": (1, 1, 2, 1), "patch_channels": 2}
    return create(StripMLP, "strip_mlp_pico", pretrained, arguments, kwargs)


@register_model
def sparse_mlp_tiny(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-T: 24.1 M parameters, 5.0 GMACs, 81.9 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 80, "depths": (2, 8, 14, 2), "drop_path_rate": 0.0}
    return create(SparseMLP, "sparse_mlp_tiny", pretrained, arguments, kwargs)


@register_model
def sparse_mlp_small(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-S: 48.6 M parameters, 10.3 GMACs, 83.1 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 96, "depths": (2, 10, 24, 2), "drop_path_rate": 0.2}
    return create(SparseMLP, "sparse_mlp_small", pretrained, arguments, kwargs)


@register_model
def sparse_mlp_base(pretrained: bool = False, **kwargs) -> SparseMLP:
    """sMLPNet-B: 65.9 M parameters, 14.0 GMACs, 83.4 % top-1 on ImageNet-1K (published)."""
    arguments = {"embed_dim": 112, "depths": (2, 10, 24, 2), "drop_path_rate": 0.3}
    return create(SparseMLP, "sparse_mlp_base", pretrained, arguments, kwargs)


@register_model
def cycle_mlp_b1(pretrained: bool = False, **kwargs) -> CycleMLP:
    """CycleMLP-B1: 15.2 M parameters, 2.1 GMACs."""
    return create(CycleMLP, "cycle_mlp_b1", pretrained, {"depths": (2, 2, 4, 2)}, kwargs)


@register_model
def cycle_mlp_b2(pretrained: bool = False, **kwargs) -> CycleMLP:
    """CycleMLP-B2: 26.8 M parameters, 3.9 GMACs."""
    return create(CycleMLP, "cycle_mlp_b2", pretrained, {"depths": (2, 3, 10, 3)}, kwargs)


@register_model
def cycle_mlp_b3(pretrained: bool = False, **kwargs) -> CycleMLP:
    """CycleMLP-B3: 38.4 M parameters, 6.8 GMACs."""
    arguments = {"depths": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4)}
    return create(CycleMLP, "cycle_mlp_b3", pretrained, arguments, kwargs)


@register_model
def cycle_mlp_b4(pretrained: bool = False, **kwargs) -> CycleMLP:
    """CycleMLP-B4: 51.8 M parameters, 10.0 GMACs."""
    arguments = {"depths": (3, 8, 27, 3), "mlp_ratios": (8, 8, 4, 4)}
    return create(CycleMLP, "cycle_mlp_b4", pretrained, arguments, kwargs)


@register_model
def cycle_mlp_b5(pretrained: bool = False, **kwargs) -> CycleMLP:
    """CycleMLP-B5: 75.7 M parameters, 12.2 GMACs."""
    arguments = {"widths": (96, 192, 384, 768), "depths": (3, 4, 24, 3)}
    return create(CycleMLP, "cycle_mlp_b5", pretrained, arguments, kwargs)


@register_model
def vip_s14(pretrained: bool = False, **kwargs) -> VisionPermutator:
    """ViP-Small/14: 29.9 M parameters, 6.9 GMACs."""
    arguments = {"patch_size": 14, "depths": (4, 3, 8, 3)}
    return create(VisionPermutator, "vip_s14", pretrained, arguments, kwargs)


@register_model
def vip_s7(pretrained: bool = False, **kwargs) -> VisionPermutator:
    """ViP-Small/7: 25.1 M parameters, 6.9 GMACs."""
    arguments = {"patch_size": 7, "widths": (192, 384, 384, 384), "depths": (4, 3, 8, 3), "strides": (2, 1, 1)}
    arguments["segments"] = (32, 16, 16, 16)
    return create(VisionPermutator, "vip_s7", pretrained, arguments, kwargs)


@register_model
def vip_m7(pretrained: bool = False, **kwargs) -> VisionPermutator:
    """ViP-Medium/7: 55.3 M parameters, 16.3 GMACs."""
    arguments = {"patch_size": 7, "widths": (256, 256, 512, 512), "depths": (4, 3, 14, 3), "strides": (1, 2, 1)}
    arguments["segments"] = (32, 32, 16, 16)
    return create(VisionPermutator, "vip_m7", pretrained, arguments, kwargs)


@register_model
def hire_mlp_tiny(pretrained: bool = False, **kwargs) -> HireMLP:
    """Hire-MLP-Tiny: 18.0 M parameters, 2.1 GMACs."""
    return create(HireMLP, "hire_mlp_tiny", pretrained, {"depths": (2, 2, 4, 2)}, kwargs)


@register_model
def hire_mlp_small(pretrained: bool = False, **kwargs) -> HireMLP:
    """Hire-MLP-Small: 33.1 M parameters, 4.2 GMACs."""
    return create(HireMLP, "hire_mlp_small", pretrained, {"depths": (3, 4, 10, 3)}, kwargs)


@register_model
def hire_mlp_base(pretrained: bool = False, **kwargs) -> HireMLP:
    """Hire-MLP-Base: 58.2 M parameters, 8.1 GMACs."""
    return create(HireMLP, "hire_mlp_base", pretrained, {"depths": (4, 6, 24, 3)}, kwargs)


@register_model
def hire_mlp_large(pretrained: bool = False, **kwargs) -> HireMLP:
    """Hire-MLP-Large: 95.7 M parameters, 13.4 GMACs."""
    arguments = {"widths": (96, 192, 384, 768), "depths": (4, 6, 24, 3)}
    return create(HireMLP, "hire_mlp_large", pretrained, arguments, kwargs)


@register_model
def wave_mlp_t(pretrained: bool = False, **kwargs) -> WaveMLP:
    """Wave-MLP-T: 17.2 M parameters, 2.5 GMACs."""
    return create(WaveMLP, "wave_mlp_t", pretrained, {"depths": (2, 2, 4, 2)}, kwargs)


@register_model
def wave_mlp_t_dw(pretrained: bool = False, **kwargs) -> WaveMLP:
    """Wave-MLP-T*, whose phases are depthwise convolutions: 15.3 M parameters, 2.2 GMACs."""
    arguments = {"depths": (2, 2, 4, 2), "depthwise_phase": True}
    return create(WaveMLP, "wave_mlp_t_dw", pretrained, arguments, kwargs)


@register_model
def wave_mlp_s(pretrained: bool = False, **kwargs) -> WaveMLP:
    """Wave-MLP-S: 30.7 M parameters, 4.5 GMACs."""
    arguments = {"depths": (2, 3, 10, 3), "norm": "group"}
    return create(WaveMLP, "wave_mlp_s", pretrained, arguments, kwargs)


@register_model
def wave_mlp_m(pretrained: bool = False, **kwargs) -> WaveMLP:
    """Wave-MLP-M: 44.1 M parameters, 7.9 GMACs."""
    arguments = {"depths": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4), "norm": "group", "norm_between": False}
    return create(WaveMLP, "wave_mlp_m", pretrained, arguments, kwargs)


@register_model
def wave_mlp_b(pretrained: bool = False, **kwargs) -> WaveMLP:
    """Wave-MLP-B: 63.6 M parameters, 10.2 GMACs."""
    arguments = {"widths": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "norm": "group", "norm_between": False}
    return create(WaveMLP, "wave_mlp_b", pretrained, arguments, kwargs)
