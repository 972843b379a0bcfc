"""transformers' Deformable DETR, RT-DETR and D-FINE on a backbone of ours.

Its own way for timm's networks, `TimmBackbone`, knows them by name alone: no options of MODEL.STRIP_MLP, no size of
images, let alone several. And Deformable DETR freezes the batch norms that it finds there. So the library is given
finished maps instead.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from utils import UserError

from .backbone import BucketedBackbone
from .detector import Detector, Target

try:
    import scipy  # noqa: F401  (the library matches boxes with it)
    from transformers import (
        AutoBackbone,
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        DeformableDetrImageProcessor,
        DFineConfig,
        DFineForObjectDetection,
        PreTrainedConfig,
        RTDetrConfig,
        RTDetrForObjectDetection,
    )
    from transformers.modeling_outputs import BackboneOutput
except ImportError as error:
    raise UserError(
        f"DETECTION.DETECTOR is one of the DETRs, which cannot be imported: {error}; "
        "pip install -r requirements/detr.txt"
    ) from error

NETWORKS = {
    "deformable_detr": (DeformableDetrConfig, DeformableDetrForObjectDetection),
    "rt_detr": (RTDetrConfig, RTDetrForObjectDetection),
    "d_fine": (DFineConfig, DFineForObjectDetection),
}
LOSSES = {
    "deformable_detr": ("loss_ce", "loss_bbox", "loss_giou"),
    "rt_detr": ("loss_vfl", "loss_bbox", "loss_giou"),
    "d_fine": ("loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf"),
}
# What the matcher and SciPy say of predictions that are not finite.
NOT_FINITE = r"boxes1 must be in|invalid numeric entries"
# Of Deformable DETR's losses, which come without their weights; what else comes is no loss.
DEFORMABLE_WEIGHTS = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}


class GivenMapsConfig(PreTrainedConfig):
    """What the library must know of a backbone: the channels of its maps."""

    model_type = "given_maps"
    channels: list[int] | None = None


class GivenMaps(nn.Module):
    """A backbone as the library takes one, which hands over finished maps."""

    config_class = GivenMapsConfig

    def __init__(self, config: GivenMapsConfig):
        super().__init__()
        self.channels = config.channels

    @classmethod
    def _from_config(cls, config: GivenMapsConfig, **kwargs: Any) -> "GivenMaps":
        return cls(config)

    def forward(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(feature_maps=tuple(x.float() for x in self.given(images)))


PROCESSOR = DeformableDetrImageProcessor()
AutoBackbone.register(GivenMapsConfig, GivenMaps, exist_ok=True)


class TransformersDetector(Detector):
    """transformers' Deformable DETR (Zhu et al., 2021) with refined boxes, RT-DETR (Zhao et al., 2024) or D-FINE (Peng
    et al., 2025).

    Args:
        name: a key of `NETWORKS`.
        options: `config.DETECTION`.
        num_classes: without a background.
    """

    def __init__(self, backbone: BucketedBackbone, name: str, options: Any, num_classes: int):
        head = options.HEAD
        denoises = name != "deformable_detr" and head.DENOISING_QUERIES > 0
        super().__init__(backbone, has_unused_parameters=denoises)  # a batch may have no boxes to add noise to
        self.options, self.name = options, name
        if name != "deformable_detr":
            check_queries(backbone, head.QUERIES)
        if head.CHANNELS % head.ATTENTION_HEADS:
            raise ValueError(
                f"DETECTION.HEAD.ATTENTION_HEADS is {head.ATTENTION_HEADS}; accepted: what divides "
                f"DETECTION.HEAD.CHANNELS, {head.CHANNELS}"
            )
        arguments = {
            "backbone_config": GivenMapsConfig(channels=list(backbone.channels)),
            "num_labels": num_classes,
            "num_queries": head.QUERIES,
            "d_model": head.CHANNELS,
            "num_feature_levels": len(backbone.strides),
            "encoder_layers": head.ENCODER_LAYERS,
            "decoder_layers": head.DECODER_LAYERS,
            "encoder_attention_heads": head.ATTENTION_HEADS,
            "decoder_attention_heads": head.ATTENTION_HEADS,
            "encoder_ffn_dim": head.HIDDEN_CHANNELS,
            "decoder_ffn_dim": head.HIDDEN_CHANNELS,
            "dropout": head.DROPOUT,
            "auxiliary_loss": True,
            "with_box_refine": True,
            # The library's names for sharing one head among all layers, which none of the papers does.
            "tie_word_embeddings": False,
            # PyTorch's deviation for linear layers of this width. The library's default of 0.01 is for its 256 channels
            # and weights that are loaded afterwards.
            "initializer_range": (3 * head.CHANNELS) ** -0.5,
        }
        if name != "deformable_detr":
            arguments |= {
                "encoder_hidden_dim": head.CHANNELS,
                "encoder_in_channels": list(backbone.channels),
                "decoder_in_channels": [head.CHANNELS] * len(backbone.strides),
                "feat_strides": list(backbone.strides),
                "encode_proj_layers": [len(backbone.strides) - 1],
                "num_denoising": head.DENOISING_QUERIES,
            }
        config_class, network_class = NETWORKS[name]
        self.network = network_class(config_class(**arguments))
        self.network.model.backbone.model.given = self.given
        initialise(self.network, name)
        share_heads(self.network, name)

    def losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        scale = images.new_tensor([width, height, width, height], dtype=torch.float32)
        labels = [
            {"class_labels": target["labels"], "boxes": box_convert(target["boxes"], "xyxy", "cxcywh") / scale}
            for target in targets
        ]
        try:
            with torch.autocast(images.device.type, enabled=False):
                parts = self.network(pixel_values=images, labels=labels).loss_dict
        except ValueError as error:
            if not re.search(NOT_FINITE, str(error)):
                raise
            # The step is skipped, as after any loss that is no number. Other processes may wait for these gradients.
            nothing = sum(p.sum() for p in self.parameters() if p.requires_grad) * math.nan
            return dict.fromkeys(LOSSES[self.name], nothing)
        losses: dict[str, Tensor] = {}
        for name, value in parts.items():  # such as loss_bbox_aux_1: of a layer, or of queries with noise
            kind = re.match(r"loss_[a-z]+|", name)[0]
            weight = DEFORMABLE_WEIGHTS.get(kind, 0) if self.name == "deformable_detr" else 1
            if kind and weight:
                losses[kind] = losses.get(kind, 0) + weight * value
        return losses

    def find(self, images: Tensor) -> list[Target]:
        sizes = [tuple(images.shape[-2:])] * len(images)
        with torch.autocast(images.device.type, enabled=False):
            output = self.network(pixel_values=images)
        threshold, most = self.options.SCORE_THRESHOLD, self.options.MAX_DETECTIONS
        # It ranks all pairs of a query and a class, which is right for all three.
        all_found = PROCESSOR.post_process_object_detection(output, threshold, sizes, top_k=most)
        return [{**found, "boxes": clip_boxes_to_image(found["boxes"], sizes[0])} for found in all_found]


def check_queries(backbone: BucketedBackbone, queries: int) -> None:
    """Raises ValueError for more queries than tokens, of which the library chooses them."""
    tokens = min(sum(height * width // stride**2 for stride in backbone.strides) for height, width in backbone.sizes)
    if queries > tokens:
        raise ValueError(
            f"DETECTION.HEAD.QUERIES is {queries}, but the maps of the smallest images have {tokens} tokens; accepted: "
            f"at most {tokens}"
        )


@torch.no_grad()
def initialise(network: nn.Module, name: str) -> None:
    """Sets weights as the papers' code does where the library does not, as it expects to load weights afterwards."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # RT-DETR's would nearly be 0
    if name == "deformable_detr":
        # Its reference points would all be in the middle of the image.
        nn.init.normal_(network.model.query_position_embeddings.weight)
        classes, last_of_boxes = list(network.class_embed), [boxes.layers[-1] for boxes in network.bbox_embed]
    else:
        classes = [network.model.enc_score_head, *network.model.decoder.class_embed]
        last_of_boxes = [network.model.enc_bbox_head.layers[-1]]
    if name == "d_fine":
        last_of_boxes.append(network.model.decoder.pre_bbox_head.layers[-1])
    for layer in classes:
        layer.reset_parameters()
        nn.init.constant_(layer.bias, -math.log(99))  # a probability of 0.01 (Lin et al., 2017)
    for layer in last_of_boxes:  # boxes begin as their anchors, or with the size 0.12 of the image
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if name == "deformable_detr":
        nn.init.constant_(last_of_boxes[0].bias[2:], -2.0)


def share_heads(network: nn.Module, name: str) -> None:
    """Makes one of the two copies of heads that the library has where its decoder refines boxes. It is registered once:
    a moving average would go twice as far with a parameter that a state dict has twice."""
    decoder = network.model.decoder
    if name == "deformable_detr":
        del decoder.bbox_embed
        decoder.__dict__["bbox_embed"] = network.bbox_embed
    elif name == "d_fine":
        del network.class_embed, network.bbox_embed  # not used: the decoder's are
