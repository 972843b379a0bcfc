"""Strip weights: what the strip MLP layers of a model do with each token of a row or column, patch by patch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from engine import trained
from models.strip_mlp import StripMLPBlock, StripMLPLayer
from utils import UserError

from .common import WIDTH

SUFFIXES = (".png",)


@dataclass
class Strip:
    """The weights of a layer for one of the rows (columns) in its strips.

    Attributes:
        offset: of that row from the one that the output is in.
        matrices: (P, L, L), output token by input token.
    """

    block: str
    offset: int
    matrices: np.ndarray


def strip_layers(model: nn.Module, axis: str) -> dict[str, StripMLPLayer]:
    """The layers along an axis ("row" or "column") by the names of their blocks, from the images on."""
    return {
        name: layer
        for name, block in model.named_modules()
        if isinstance(block, StripMLPBlock)
        for layer in block.modules()
        if isinstance(layer, StripMLPLayer) and layer.axis == axis
    }


def choose(layers: dict[str, StripMLPLayer], blocks: Sequence[str]) -> dict[str, StripMLPLayer]:
    """Those of `blocks`, or else of the first block of each stage.

    Raises:
        UserError: there is no such block.
    """
    for name in blocks:
        if name not in layers:
            raise UserError(f"--block {name}: no block with strips; accepted: {', '.join(layers)}")
    return {name: layers[name] for name in (blocks or [name for name in layers if name.endswith(".0")])}


def weights_of(name: str, layer: StripMLPLayer, every_offset: bool) -> list[Strip]:
    weight = layer.weight.detach().float().cpu().numpy()  # (P, L, L, m)
    r = weight.shape[-1] // 2
    return [Strip(name, d, weight[..., d + r]) for d in (range(-r, r + 1) if every_offset else [0])]


def draw(args: argparse.Namespace) -> tuple[Figure]:
    model = trained.load_trained(args)
    layers = strip_layers(model.model, args.axis)
    if not layers:
        raise UserError(f"{args.checkpoint}: {model.config.MODEL.NAME} has no strips along the {args.axis}s")
    chosen = choose(layers, args.block)
    strips = [strip for name in chosen for strip in weights_of(name, chosen[name], args.offsets == "all")]
    return (draw_strips(strips, f"{model.config.MODEL.NAME}: strip weights along the {args.axis}s", args.patches),)


def draw_strips(strips: Sequence[Strip], title: str, most: int) -> Figure:
    """One row of matrices per strip, of its first `most` patches, all on one scale."""
    columns = min(most, max(len(strip.matrices) for strip in strips))
    size = min(1.2, (WIDTH - 2) / columns)  # of a matrix, in inches
    figure = Figure(figsize=(WIDTH, 1 + (size + 0.25) * len(strips)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("input position (token)", fontsize=9)
    figure.supylabel("output position (token)", fontsize=9)
    panels = figure.subplots(len(strips), columns, squeeze=False)
    largest = max(np.abs(strip.matrices[:columns]).max() for strip in strips)
    for number, (row, strip) in enumerate(zip(panels, strips, strict=True)):
        patches, length, _ = strip.matrices.shape
        ticks = sorted({0, length - 1})
        for patch, axes in enumerate(row):
            if patch >= patches:
                axes.remove()
                continue
            if number == 0 or patch >= len(strips[number - 1].matrices):
                axes.set_title(f"patch {patch}")
            shown = axes.imshow(strip.matrices[patch], cmap="RdBu_r", vmin=-largest, vmax=largest)
            axes.set_xticks(ticks)
            axes.set_yticks(ticks if patch == 0 else [])
        offset = f"\noffset {strip.offset:+d}" if strip.offset else "\noffset 0"
        many = f"{columns} of {patches} patches" if patches > columns else f"{patches} patches"
        label = f"{strip.block}{offset if any(each.offset for each in strips) else ''}\n{many}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    bar = figure.colorbar(shown, ax=figure.axes, shrink=min(1, 2 / (size * len(strips))), aspect=25, pad=0.02)
    bar.set_label("weight")
    return figure
