"""torchvision's RetinaNet, FCOS and Faster R-CNN, with a feature pyramid on a backbone of ours."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .backbone import BucketedBackbone
from .detector import Detector, HandedOver, Target

# torchvision counts the background as class 0 in Faster R-CNN alone.
BACKGROUND_CLASSES = {"retinanet": 0, "fcos": 0, "faster_rcnn": 1}


class Pyramid(nn.Module):
    """A feature pyramid (Lin et al., 2017) on the maps of a backbone, as torchvision's detectors take one.

    Args:
        given: hands over the maps.
        channels, strides: of the maps.
        out_channels: of every map of the pyramid.
        extra_levels: 0; 1, by max-pooling as in Faster R-CNN; or 2, by convolutions as in RetinaNet.

    Attributes:
        strides: of the pyramid's maps.

    Shape: (N, 3, H, W) -> maps "0", "1", ..., (N, out_channels, H / stride, W / stride).
    """

    def __init__(
        self, given: HandedOver, channels: Sequence[int], strides: Sequence[int], out_channels: int, extra_levels: int
    ):
        super().__init__()
        self.given, self.out_channels = given, out_channels
        self.strides = [*strides, *(strides[-1] * 2**level for level in range(1, extra_levels + 1))]
        extra = (None, LastLevelMaxPool, partial(LastLevelP6P7, out_channels, out_channels))[extra_levels]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra and extra())

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.given(images))))
        # Anchors are computed in the maps' dtype, and bfloat16 has no odd numbers above 256.
        return OrderedDict((level, x.float()) for level, x in maps.items())


class AsGiven(nn.Module):
    """In place of torchvision's transform, which normalises and resizes: images and boxes stay as they are."""

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> tuple[ImageList, list[Target] | None]:
        return ImageList(images, [tuple(image.shape[-2:]) for image in images]), targets

    def postprocess(self, found: list[Target], *sizes: Any) -> list[Target]:
        return found


def in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the output in float32. torchvision decodes boxes in the dtype of a head's output."""
    if isinstance(output, dict):
        return {name: in_float32(module, inputs, value) for name, value in output.items()}
    if isinstance(output, list | tuple):
        return type(output)(in_float32(module, inputs, value) for value in output)
    return output.float()


class TorchvisionDetector(Detector):
    """torchvision's RetinaNet (Lin et al., 2017), FCOS (Tian et al., 2019) or Faster R-CNN (Ren et al., 2015).

    Args:
        name: a key of `BACKGROUND_CLASSES`.
        options: `config.DETECTION`.
        num_classes: without the background.
    """

    def __init__(self, backbone: BucketedBackbone, name: str, options: Any, num_classes: int):
        super().__init__(backbone)
        head = options.HEAD
        pyramid = Pyramid(self.given, backbone.channels, backbone.strides, head.CHANNELS, head.EXTRA_LEVELS)
        self.background = BACKGROUND_CLASSES[name]
        build = {"retinanet": retinanet, "fcos": fcos, "faster_rcnn": faster_rcnn}[name]
        self.network = build(pyramid, options, num_classes + self.background)
        self.network.transform = AsGiven()
        if name == "faster_rcnn":
            computing_boxes = [self.network.rpn.head, self.network.roi_heads.box_predictor]
        else:
            computing_boxes = [self.network.head]
        for module in computing_boxes:
            module.register_forward_hook(in_float32)

    def losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        targets = [{**target, "labels": target["labels"] + self.background} for target in targets]
        return self.network(images, targets)

    def find(self, images: Tensor) -> list[Target]:
        return [{**found, "labels": found["labels"] - self.background} for found in self.network(images)]


def anchors(pyramid: Pyramid, head: Any) -> AnchorGenerator:
    """Boxes of each size per octave and aspect ratio, at each token of each map."""
    scales = [head.ANCHOR_SCALE * 2 ** (i / head.ANCHORS_PER_OCTAVE) for i in range(head.ANCHORS_PER_OCTAVE)]
    sizes = tuple(tuple(round(scale * stride) for scale in scales) for stride in pyramid.strides)
    return AnchorGenerator(sizes, (tuple(head.ASPECT_RATIOS),) * len(sizes))


def retinanet(pyramid: Pyramid, options: Any, num_classes: int) -> RetinaNet:
    generator = anchors(pyramid, options.HEAD)
    channels = pyramid.out_channels
    # Group norms as in torchvision's retinanet_resnet50_fpn_v2: heads begin untrained, and batches are small.
    norm = partial(nn.GroupNorm, min(32, channels // 4))
    head = RetinaNetHead(channels, generator.num_anchors_per_location()[0], num_classes, norm_layer=norm)
    return RetinaNet(
        pyramid,
        num_classes,
        anchor_generator=generator,
        head=head,
        score_thresh=options.SCORE_THRESHOLD,
        detections_per_img=options.MAX_DETECTIONS,
    )


def fcos(pyramid: Pyramid, options: Any, num_classes: int) -> FCOS:
    # The one "anchor" of a token is a square of its size: it stands for the token's place.
    sizes = tuple((stride,) for stride in pyramid.strides)
    return FCOS(
        pyramid,
        num_classes,
        anchor_generator=AnchorGenerator(sizes, ((1.0,),) * len(sizes)),
        score_thresh=options.SCORE_THRESHOLD,
        detections_per_img=options.MAX_DETECTIONS,
    )


def faster_rcnn(pyramid: Pyramid, options: Any, num_classes: int) -> FasterRCNN:
    head = options.HEAD
    levels = [str(level) for level in range(len(pyramid.strides) - head.EXTRA_LEVELS)]
    width = 4 * pyramid.out_channels
    return FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors(pyramid, head),
        # torchvision's ratios: twice as many in training, and half as many that the box head learns from.
        rpn_pre_nms_top_n_train=2 * head.PROPOSALS,
        rpn_pre_nms_top_n_test=head.PROPOSALS,
        rpn_post_nms_top_n_train=2 * head.PROPOSALS,
        rpn_post_nms_top_n_test=head.PROPOSALS,
        box_batch_size_per_image=head.PROPOSALS // 2,
        # Level 4 is of stride 16 (Lin et al., 2017).
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2, canonical_scale=head.ROI_SCALE, canonical_level=4),
        box_head=TwoMLPHead(pyramid.out_channels * 7 * 7, width),
        box_predictor=FastRCNNPredictor(width, num_classes),
        box_score_thresh=options.SCORE_THRESHOLD,
        box_detections_per_img=options.MAX_DETECTIONS,
    )
