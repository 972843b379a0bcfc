"""timm's networks, and ours beside Strip-MLP, made as small as Strip-MLP of 0.7 M parameters, for images of 32 x 32
pixels.

The layers are unchanged; depths and widths are ours. Networks with stages begin with tokens of 2 x 2 pixels and
have four stages. Those without have 64 tokens of 4 x 4 pixels. They have about the same number of parameters, but not
of multiply-adds: `tools/complexity.py` counts both. Two also come with stages at strides of 4 to 32 pixels, as
detectors of larger images use them (configs/detection).
"""

from timm.layers import GatedMlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .cycle_mlp import CycleMLP
from .hire_mlp import HireMLP
from .sparse_mlp import SparseMLP
from .variants import create
from .vision_permutator import VisionPermutator
from .wave_mlp import WaveMLP


def _cfg(**kwargs) -> dict:
    """timm's description of a model's input."""
    return {"num_classes": 10, "input_size": (3, 32, 32), "fixed_input_size": True, "classifier": "head", **kwargs}


default_cfgs = generate_default_cfgs(
    {
        "small_resnet": _cfg(classifier="fc", fixed_input_size=False),
        "small_convnext": _cfg(classifier="head.fc", fixed_input_size=False),
        "small_resmlp": _cfg(),
        "small_mixer": _cfg(),
        "small_gmlp": _cfg(),
        "small_swin": _cfg(classifier="head.fc"),
        "small_vit": _cfg(),
        "small_sparse_mlp": _cfg(classifier="head.fc"),
        "small_cycle_mlp": _cfg(classifier="head.fc", fixed_input_size=False),
        "small_vip": _cfg(classifier="head.fc"),
        "small_hire_mlp": _cfg(classifier="head.fc", fixed_input_size=False),
        "small_wave_mlp": _cfg(classifier="head.fc", fixed_input_size=False),
        "small_resnet_stride4": _cfg(classifier="fc", fixed_input_size=False),
        "small_sparse_mlp_stride4": _cfg(classifier="head.fc"),
    }
)

FOUR_STAGES = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}


class ResNetWithoutPooling(ResNet):
    """timm's ResNet without the max-pooling before the stages."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.maxpool = nn.Identity()
        for stage in self.feature_info[1:]:
            stage["reduction"] //= 2


class ConvNeXtAtStride2(ConvNeXt):
    """timm's ConvNeXt whose first stage has the tokens of the stem. timm's own merges them again if patch_size is 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stages[0].downsample = nn.Identity()
        for stage in self.feature_info:
            stage["reduction"] //= 2


@register_model
def small_resnet(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet (arXiv:1512.03385) of basic blocks; max-pooling would leave maps of 8 x 8."""
    arguments = {"layers": (1, 1, 1, 1), "channels": (24, 48, 96, 192), "stem_type": "deep", "stem_width": 16}
    arguments = {"block": BasicBlock, **arguments, **kwargs}
    return build_model_with_cfg(ResNetWithoutPooling, "small_resnet", pretrained, **arguments)


@register_model
def small_convnext(pretrained: bool = False, **kwargs) -> ConvNeXt:
    """ConvNeXt (arXiv:2201.03545)."""
    arguments = {"depths": (2, 2, 3, 1), "dims": (24, 48, 96, 192), "patch_size": 2, **kwargs}
    return build_model_with_cfg(ConvNeXtAtStride2, "small_convnext", pretrained, feature_cfg=FOUR_STAGES, **arguments)


@register_model
def small_resmlp(pretrained: bool = False, **kwargs) -> MlpMixer:
    """ResMLP (arXiv:2105.03404)."""
    arguments = {"img_size": 32, "patch_size": 4, "num_blocks": 9, "embed_dim": 96, "mlp_ratio": 4}
    arguments = {**arguments, "block_layer": ResBlock, "norm_layer": Affine, **kwargs}
    return build_model_with_cfg(MlpMixer, "small_resmlp", pretrained, **arguments)


@register_model
def small_mixer(pretrained: bool = False, **kwargs) -> MlpMixer:
    """MLP-Mixer (arXiv:2105.01601)."""
    arguments = {"img_size": 32, "patch_size": 4, "num_blocks": 9, "embed_dim": 96, **kwargs}
    return build_model_with_cfg(MlpMixer, "small_mixer", pretrained, **arguments)


@register_model
def small_gmlp(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP (arXiv:2105.08050)."""
    arguments = {"img_size": 32, "patch_size": 4, "num_blocks": 8, "embed_dim": 96, "mlp_ratio": 6}
    arguments = {**arguments, "block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, **kwargs}
    return build_model_with_cfg(MlpMixer, "small_gmlp", pretrained, **arguments)


@register_model
def small_swin(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin Transformer (arXiv:2103.14030) with windows of 4 x 4 tokens."""
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24}
    arguments = {**arguments, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8), **kwargs}
    return build_model_with_cfg(SwinTransformer, "small_swin", pretrained, feature_cfg=FOUR_STAGES, **arguments)


@register_model
def small_vit(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT (arXiv:2010.11929)."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, **kwargs}
    return build_model_with_cfg(VisionTransformer, "small_vit", pretrained, **arguments)


@register_model
def small_sparse_mlp(pretrained: bool = False, **kwargs) -> SparseMLP:
    """Sparse MLP (arXiv:2109.05422)."""
    arguments = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (1, 2, 3, 1)}
    return create(SparseMLP, "small_sparse_mlp", pretrained, arguments, kwargs)


@register_model
def small_cycle_mlp(pretrained: bool = False, **kwargs) -> CycleMLP:
    """CycleMLP (arXiv:2107.10224)."""
    arguments = {"patch_size": 2, "widths": (20, 40, 80, 160), "depths": (1, 2, 2, 1)}
    return create(CycleMLP, "small_cycle_mlp", pretrained, arguments, kwargs)


@register_model
def small_vip(pretrained: bool = False, **kwargs) -> VisionPermutator:
    """Vision Permutator (arXiv:2106.12368)."""
    arguments = {"img_size": 32, "patch_size": 4, "widths": (96,) * 4, "depths": (2, 2, 2, 1), "segments": (8,) * 4}
    return create(VisionPermutator, "small_vip", pretrained, arguments, kwargs)


@register_model
def small_hire_mlp(pretrained: bool = False, **kwargs) -> HireMLP:
    """Hire-MLP (arXiv:2108.13341)."""
    arguments = {"patch_size": 2, "widths": (20, 40, 80, 144), "depths": (1, 2, 2, 1)}
    return create(HireMLP, "small_hire_mlp", pretrained, arguments, kwargs)


@register_model
def small_wave_mlp(pretrained: bool = False, **kwargs) -> WaveMLP:
    """Wave-MLP (arXiv:2111.12294)."""
    arguments = {"patch_size": 2, "widths": (20, 40, 80, 144), "depths": (1, 2, 2, 1)}
    return create(WaveMLP, "small_wave_mlp", pretrained, arguments, kwargs)


@register_model
def small_resnet_stride4(pretrained: bool = False, **kwargs) -> ResNet:
    """`small_resnet` with timm's max-pooling: stages at strides 4 to 32."""
    arguments = {"layers": (1, 1, 1, 1), "channels": (24, 48, 96, 192), "stem_type": "deep", "stem_width": 16}
    arguments = {"block": BasicBlock, **arguments, **kwargs}
    return build_model_with_cfg(ResNet, "small_resnet_stride4", pretrained, **arguments)


@register_model
def small_sparse_mlp_stride4(pretrained: bool = False, **kwargs) -> SparseMLP:
    """`small_sparse_mlp` with tokens of 4 x 4 pixels: stages at strides 4 to 32."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (1, 2, 3, 1)}
    return create(SparseMLP, "small_sparse_mlp_stride4", pretrained, arguments, kwargs)
