"""Class activation maps: which parts of an image speak for a class."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from data.decoding import build_decoder
from engine import trained
from utils import UserError

from .common import load_image, pixels, shorten

SUFFIXES = (".png",)
STAGES = 4


@dataclass
class Evidence:
    """For a class in an image.

    Attributes:
        image: (H, W, 3) uint8, as the model gets it but for the normalisation.
        map: (h, w).
        probability: of the class.
    """

    name: str
    image: np.ndarray
    map: np.ndarray
    label: int
    probability: float


@torch.no_grad()
def class_activation_map(model: nn.Module, image: Tensor, label: int) -> Tensor:
    """Zhou et al., equation 2, for one image (1, 3, H, W): (h, w), the mean of which is the class's logit without the
    classifier's bias.

    Raises:
        UserError: the model does not end in global average pooling and a linear layer.
    """
    classifier = model.get_classifier()
    features = model.forward_features(image)  # (1, C, h, w)
    if isinstance(classifier, nn.Linear) and features.ndim == 4 and features.shape[1] == classifier.in_features:
        found = torch.einsum("c,chw->hw", classifier.weight[label], features[0])
        bias = 0 if classifier.bias is None else classifier.bias[label]
        if torch.allclose(found.mean() + bias, model.forward_head(features)[0, label], rtol=1e-3, atol=1e-3):
            return found
    raise UserError(
        f"{type(model).__name__} does not end in global average pooling and a linear layer, as class activation maps "
        "need; accepted: Grad-CAM, with --stage 4"
    )


def grad_cam(model: nn.Module, image: Tensor, label: int, stage: int) -> Tensor:
    """Selvaraju et al., equations 1 and 2, for one image (1, 3, H, W) at the map of a stage from 1: (h, w), 0 or more.

    Raises:
        UserError: the model gives no such map, or its logits do not come of it.
    """
    try:
        features, maps = model.forward_intermediates(image, indices=STAGES)
    except (AttributeError, AssertionError, ValueError, TypeError) as error:  # any timm model's own
        raise UserError(f"{type(model).__name__} gives no maps of {STAGES} stages: {error}") from error
    activations = maps[stage - 1]  # (1, C, h, w)
    logit = model.forward_head(features)[0, label]
    (gradient,) = torch.autograd.grad(logit, activations, allow_unused=True)
    if gradient is None:
        raise UserError(f"{type(model).__name__} gives copies of its stages' maps, so that Grad-CAM has no gradient")
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * activations).sum(dim=1)[0].relu().detach()


def find_class(name: str | None, classes: Sequence[str]) -> int | None:
    """The label of a class; None where none is named.

    Raises:
        UserError: there is no such class.
    """
    if name is None:
        return None
    if name not in classes:
        raise UserError(f"--class {name}: no such class; accepted: {shorten(', '.join(classes), 300)}")
    return classes.index(name)


def draw(args: argparse.Namespace) -> tuple[Figure]:
    model = trained.load_trained(args)
    wanted = find_class(args.label, model.classes)
    found = []
    for path in tqdm(args.images, desc="images", leave=False, dynamic_ncols=True, disable=None):
        shown = model.transform(load_image(path, build_decoder(model.config)))
        image = model.normalize(shown[None].to(model.device))
        with torch.no_grad():
            probabilities = model.model(image)[0].softmax(dim=0)
        label = int(probabilities.argmax()) if wanted is None else wanted
        if args.stage:
            values = grad_cam(model.model, image, label, args.stage)
        else:
            values = class_activation_map(model.model, image, label)
        if values.numel() == 1:
            print(f"note: {path}: the map is one token; --stage {STAGES - 1} or less gives finer ones", file=sys.stderr)
        found.append(Evidence(path.name, pixels(shown), values.cpu().numpy(), label, float(probabilities[label])))
    return (draw_evidence(found, model.classes, args.stage),)


def draw_evidence(found: Sequence[Evidence], classes: Sequence[str], stage: int | None) -> Figure:
    """A row per image: it, and the map over it. CAMs share a scale around 0; Grad-CAMs are relative to their maxima."""
    figure = Figure(figsize=(4.8, 0.4 + 2.15 * len(found)), layout="constrained")
    largest = max(np.abs(each.map).max() for each in found)
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (left, right), each in zip(panels, found, strict=True):
        height, width, _ = each.image.shape
        left.imshow(each.image)
        left.set_title(shorten(each.name, 28, keep_end=True))
        right.imshow(each.image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        values = each.map / (each.map.max() or 1) if stage else each.map
        scale = {"cmap": "inferno", "vmin": 0, "vmax": 1} if stage else {"cmap": "RdBu_r"}
        if not stage:
            scale |= {"vmin": -largest, "vmax": largest}
        # Between the tokens' centres, as bilinear resizing to the image's size would.
        shown = right.imshow(
            values, alpha=0.6, interpolation="bilinear", extent=(-0.5, width - 0.5, height - 0.5, -0.5), **scale
        )
        right.set_title(f"{shorten(classes[each.label], 20)}: {each.probability:.2f}")
        for axes in (left, right):
            axes.set_axis_off()
    bar = figure.colorbar(shown, ax=panels, shrink=min(1, 1.6 / len(found)), aspect=25, pad=0.02)
    bar.set_label(f"Grad-CAM at stage {stage} / its maximum" if stage else "CAM (contribution to the logit)")
    bar.solids.set_alpha(1)
    return figure
