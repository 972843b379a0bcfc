"""What token mixing spends on the interaction of tokens, and what on the fusion of channels: the Strip-MLP paper's
table 1, for its peers too."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from complexity import Complexity
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import as_csv

from models.backbone import Backbone
from models.cycle_mlp import CycleMLP
from models.hire_mlp import HireMLP
from models.sparse_mlp import SparseMLP
from models.strip_mlp import StripMLP
from models.vision_permutator import VisionPermutator
from models.wave_mlp import WaveMLP
from utils import UserError

from .common import WIDTH

SUFFIXES = (".png", ".csv")
MARKERS = "osD^vP*X"

# The layers of a block's token mixing whose output takes from several tokens, and the others that mix channels. Gates
# and depthwise convolutions of 3 x 3 are neither, as in the paper's table.
LAYERS: dict[type[Backbone], tuple[Sequence[str], Sequence[str]]] = {
    StripMLP: (("cgsmm.strip_h", "cgsmm.strip_w"), ("cgsmm.fuse_h", "cgsmm.fuse_w")),
    SparseMLP: (("mix_h", "mix_w"), ("proj",)),
    CycleMLP: (("sfc_h", "sfc_w"), ("mlp_c", "proj")),
    VisionPermutator: (("mlp_h", "mlp_w"), ("mlp_c", "proj")),
    HireMLP: (("mlp_h", "mlp_w"), ("mlp_c", "proj")),
    WaveMLP: (
        ("wave_h.mix", "wave_w.mix"),
        ("wave_h.theta", "wave_w.theta", "wave_h.amplitude", "wave_w.amplitude", "fc_c", "proj"),
    ),
}


@dataclass
class Spent:
    """Of the first block of a stage, at 224 x 224 pixels.

    Attributes:
        map_size: tokens, (H, W).
        parameters: weights of the interaction and of the fusion, without biases, as the paper counts.
        macs: multiply-adds of the two.
    """

    channels: int
    map_size: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]


def share(spent: tuple[int, int]) -> float:
    """Of the interaction."""
    return spent[0] / sum(spent)


def count(name: str) -> list[Spent]:
    """By stage.

    Raises:
        UserError: no such model, or none whose layers are known here.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"--variants {name}: timm has no such model; nearest names: {', '.join(nearest) or 'none'}")
    with torch.device("meta"):
        model = timm.create_model(name)
        if type(model) not in LAYERS:
            families = ", ".join(family.__name__ for family in LAYERS)
            raise UserError(f"--variants {name}: a {type(model).__name__}; accepted: models that are one of {families}")
        model = timm.create_model(name, depths=(1, 1, 1, 1))
    complexity = Complexity(model, (224, 224))
    found = []
    for stage, info in enumerate(model.feature_info):
        mixing = f"stages.{stage}.0.token_mixing"
        parts = [[f"{mixing}.{layer}" for layer in layers] for layers in LAYERS[type(model)]]
        parameters = [sum(_weights(model, layer) for layer in layers) for layers in parts]
        macs = [sum(complexity.of(layer).macs for layer in layers) for layers in parts]
        side = 224 // info["reduction"]
        found.append(Spent(info["num_chs"], (side, side), tuple(parameters), tuple(macs)))
    return found


def _weights(model: Backbone, layer: str) -> int:
    """Without biases and norms. (The biases of strips are matrices.)"""
    parameters = model.get_submodule(layer).named_parameters()
    return sum(p.numel() for name, p in parameters if name.endswith("weight") and p.ndim > 1)


def draw(args: argparse.Namespace) -> tuple[Figure, str]:
    found = {name: count(name) for name in dict.fromkeys(args.variants)}
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    figure.suptitle(
        "Token mixing at 224 x 224: share of the layers that mix tokens, the rest mixes channels", fontsize=10
    )
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what in ((left, "parameters"), (right, "macs")):
        draw_shares(axes, {name: [share(getattr(stage, what)) for stage in stages] for name, stages in found.items()})
    left.set_title("of parameters")
    right.set_title("of multiply-adds")
    left.set_ylabel("interaction / (interaction + fusion)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure, table(found)


def draw_shares(axes: Axes, shares: dict[str, list[float]]) -> None:
    for number, (name, values) in enumerate(shares.items()):
        stages = range(1, len(values) + 1)
        line = {"marker": MARKERS[number % len(MARKERS)], "linestyle": ("-", "--")[number % 2]}  # some lie on others
        axes.plot(stages, values, **line, markersize=4, linewidth=1.2, label=name)
    axes.set_xticks(list(stages), [f"stage {stage}" for stage in stages])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


def table(found: dict[str, list[Spent]]) -> str:
    what = ("parameters", "macs")
    titles = ("model", "stage", "channels", "tokens")
    titles += tuple(f"{part}_{kind}" for kind in what for part in ("interaction", "fusion", "share"))
    rows = []
    for name, stages in found.items():
        for number, stage in enumerate(stages, start=1):
            numbers = [(*getattr(stage, kind), f"{share(getattr(stage, kind)):.4f}") for kind in what]
            rows.append((name, number, stage.channels, "x".join(map(str, stage.map_size)), *numbers[0], *numbers[1]))
    return as_csv(titles, rows)
