"""timm's networks, and Sparse MLP, made as small as Strip-MLP of 0.7 M parameters, for images of 32 x 32 pixels.

The layers are timm's, unchanged; depths and widths are ours. Networks with stages begin with tokens of 2 x 2 pixels and
have four stages. Those without have 64 tokens of 4 x 4 pixels.
"""

from timm.layers import GatedMlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .sparse_mlp import SparseMLP

NAMES = ("resnet", "convnext", "resmlp", "mixer", "gmlp", "swin", "vit", "sparse_mlp")

default_cfgs = generate_default_cfgs(
    {
        f"small_{name}": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": name not in ("resnet", "convnext"),
            "classifier": {"resnet": "fc", "convnext": "head.fc", "swin": "head.fc", "sparse_mlp": "head.fc"}.get(
                name, "head"
            ),
        }
        for name in NAMES
    }
)


def _create(model: type[nn.Module], variant: str, pretrained: bool, arguments: dict, kwargs: dict) -> nn.Module:
    return build_model_with_cfg(model, variant, pretrained, **{**arguments, **kwargs})


@register_model
def small_resnet(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet (arXiv:1512.03385) of basic blocks, without the max-pooling that would leave maps of 8 x 8."""
    arguments = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (24, 48, 96, 192), "stem_type": "deep"}
    model = _create(ResNet, "small_resnet", pretrained, {**arguments, "stem_width": 16}, kwargs)
    model.maxpool = nn.Identity()
    return model


@register_model
def small_convnext(pretrained: bool = False, **kwargs) -> ConvNeXt:
    """ConvNeXt (arXiv:2201.03545)."""
    arguments = {"depths": (2, 2, 3, 1), "dims": (24, 48, 96, 192), "patch_size": 2}
    return _create(ConvNeXt, "small_convnext", pretrained, arguments, kwargs)


@register_model
def small_resmlp(pretrained: bool = False, **kwargs) -> MlpMixer:
    """ResMLP (arXiv:2105.03404)."""
    arguments = {"img_size": 32, "patch_size": 4, "num_blocks": 9, "embed_dim": 96, "mlp_ratio": 4}
    blocks = {"block_layer": ResBlock, "norm_layer": Affine}
    return _create(MlpMixer, "small_resmlp", pretrained, {**arguments, **blocks}, kwargs)


@register_model
def small_mixer(pretrained: bool = False, **kwargs) -> MlpMixer:
    """MLP-Mixer (arXiv:2105.01601)."""
    arguments = {"img_size": 32, "patch_size": 4, "num_blocks": 9, "embed_dim": 96}
    return _create(MlpMixer, "small_mixer", pretrained, arguments, kwargs)


@register_model
def small_gmlp(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP (arXiv:2105.08050)."""
    arguments = {"img_size": 32, "patch_size": 4, "num_blocks": 8, "embed_dim": 96, "mlp_ratio": 6}
    blocks = {"block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp}
    return _create(MlpMixer, "small_gmlp", pretrained, {**arguments, **blocks}, kwargs)


@register_model
def small_swin(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """Swin Transformer (arXiv:2103.14030) with windows of 4 x 4 tokens."""
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24}
    arguments |= {"depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
    return _create(SwinTransformer, "small_swin", pretrained, arguments, kwargs)


@register_model
def small_vit(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT (arXiv:2010.11929)."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
    return _create(VisionTransformer, "small_vit", pretrained, arguments, kwargs)


@register_model
def small_sparse_mlp(pretrained: bool = False, **kwargs) -> SparseMLP:
    """Sparse MLP (arXiv:2109.05422)."""
    arguments = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (1, 2, 3, 1)}
    return _create(SparseMLP, "small_sparse_mlp", pretrained, arguments, kwargs)
