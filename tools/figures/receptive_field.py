"""Effective receptive field of each stage: how much each pixel of the input matters to the stage's central token."""

import argparse
import difflib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image
from tables import as_csv
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import models  # noqa: F401  (registers the variants with timm)
from config import image_size
from data.decoding import Decoder
from engine import trained
from runtime.distributed import init_world
from utils import UserError

from .common import WIDTH, load_image, shorten

SUFFIXES = (".png", ".csv")
STAGES = 4
SHARES = {0.5: "solid", 0.95: "dashed"}  # of the field, and how its square is drawn
LEAST = 1e-5  # of the colour scale, as a fraction of the maximum
COLORS = colormaps["inferno"].resampled(50)  # ten per decade, with which noise makes a file of half the size
BATCH = 4


@dataclass
class Subject:
    """A model, in evaluation mode, to be looked at.

    Attributes:
        weights: where they come from; empty where they are random.
        preprocess: images to a batch (N, 3, H, W), normalised, on the model's device.
    """

    name: str
    weights: str
    model: nn.Module
    img_size: tuple[int, int]
    device: torch.device
    preprocess: Callable[[Sequence[Image.Image]], Tensor]


@dataclass
class Field:
    """The effective receptive field of one stage.

    Attributes:
        values: (H, W), of the pixels of the image.
        map_size: tokens of the stage, (h, w).
    """

    values: np.ndarray
    map_size: tuple[int, int]

    @property
    def stride(self) -> float:
        """Pixels per token side, down the image."""
        return len(self.values) / self.map_size[0]

    def square(self, share: float) -> tuple[int, int, int]:
        """The smallest square that holds `share` of the field: its side, top and left, in pixels."""
        size = max(self.values.shape)
        total = np.zeros((size + 1, size + 1))  # of all above and to the left
        total[1:, 1:] = np.pad(self.values, [(0, size - n) for n in self.values.shape]).cumsum(axis=0).cumsum(axis=1)

        def held(side: int) -> np.ndarray:
            """By each square of that side."""
            return total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]

        enough = share * total[-1, -1]
        side = 1 + bisect_left(range(1, size), True, key=lambda side: held(side).max() >= enough)
        top, left = np.unravel_index(held(side).argmax(), held(side).shape)
        return side, int(top), int(left)

    def area(self, share: float) -> float:
        """Of that square, as far as it is inside the image: 0 to 1, a fraction of the image's (Ding et al., CVPR 2022,
        whose squares are around the image's centre, where a network's central token need not lie)."""
        side, _, _ = self.square(share)
        height, width = self.values.shape
        return min(side, height) * min(side, width) / (height * width)


def effective_receptive_fields(
    stage_maps: Callable[[Tensor], Sequence[Tensor]], batches: Sequence[Tensor], title: str = ""
) -> list[Field]:
    """A field per stage (Luo et al., NIPS 2016: the gradient of the central unit with respect to the input). Of the
    gradient the absolute value is taken, image by image, because a pixel matters whichever sign it has; Ding et al.
    (CVPR 2022) take the positive part, which is half of that where both signs are as likely.

    Args:
        stage_maps: images (N, 3, H, W) to the maps of the stages, (N, C, h, w) each.
        batches: of images.
        title: of the progress bar.
    """
    fields: list[Field] = []
    for images in tqdm(batches, desc=title, leave=False, dynamic_ncols=True, disable=None):
        images = images.clone().requires_grad_()
        maps = stage_maps(images)
        fields = fields or [Field(np.zeros(images.shape[2:]), tuple(each.shape[2:])) for each in maps]
        for field, each in zip(fields, maps, strict=True):
            h, w = field.map_size
            central = each[:, :, h // 2, w // 2].sum()  # images do not depend on each other
            (gradient,) = torch.autograd.grad(central, images, retain_graph=each is not maps[-1])
            field.values += gradient.abs().sum(dim=(0, 1)).double().cpu().numpy()
    count = sum(len(images) for images in batches)
    for field in fields:
        field.values /= count
    return fields


def stage_maps(subject: Subject, images: Tensor) -> Sequence[Tensor]:
    """The maps of the model's last four stages (of networks without stages, blocks)."""
    if not hasattr(subject.model, "forward_intermediates"):
        raise UserError(f"{subject.name}: timm {timm.__version__} gives no maps of its stages (forward_intermediates)")
    try:
        return subject.model.forward_intermediates(images, indices=STAGES, intermediates_only=True)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:  # any timm model's own
        raise UserError(f"{subject.name}: gives no maps of {STAGES} stages: {error}") from error


def of_checkpoint(path: Path, args: argparse.Namespace) -> Subject:
    model = trained.load_trained(argparse.Namespace(**{**vars(args), "checkpoint": path}))
    size = image_size(model.config)
    weights = "/".join(path.resolve().parts[-2:])  # TAG/best.pth
    return Subject(model.config.MODEL.NAME, weights, model.model, size, model.device, model.preprocess)


def of_timm(name: str, seed: int, device: torch.device) -> Subject:
    """With random weights, the same for the same seed."""
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"--variants {name}: timm has no such model; nearest names: {', '.join(nearest) or 'none'}")
    torch.manual_seed(seed)
    model = timm.create_model(name).to(device).eval()
    settings = resolve_data_config({}, model=model)
    transform = create_transform(**settings)
    return Subject(
        name,
        "",
        model,
        settings["input_size"][1:],
        device,
        lambda images: torch.stack([transform(image) for image in images]).to(device),
    )


def find_images(folder: Path, count: int) -> list[Path]:
    """`count` of the image files in a folder and those inside it, evenly spaced in alphabetical order; fewer where
    there are not so many.

    Raises:
        UserError: no image was found.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UserError(f"--images {folder}: no image files there; accepted: a folder of {', '.join(IMG_EXTENSIONS)}")
    return [paths[i * len(paths) // min(count, len(paths))] for i in range(min(count, len(paths)))]


def make_batches(subject: Subject, paths: Sequence[Path], args: argparse.Namespace) -> list[Tensor]:
    """The images of `paths`, or else Gaussian noise of mean 0 and variance 1, what normalised images have."""
    if paths:
        images = [load_image(path, Decoder()) for path in paths]
        return [subject.preprocess(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(args.count, 3, *subject.img_size, generator=generator)
    return list(noise.to(subject.device).split(BATCH))


def draw(args: argparse.Namespace) -> tuple[Figure, str]:
    if not args.checkpoint and not args.variants:
        raise UserError("nothing to draw: name checkpoints, or models with --variants")
    paths = find_images(args.images, args.count) if args.images else []
    found: list[tuple[Subject, list[Field]]] = []
    for source in (*args.checkpoint, *args.variants):
        if isinstance(source, Path):
            subject = of_checkpoint(source, args)
        else:
            subject = of_timm(source, args.seed, init_world(args.device or "auto").device)
        subject.model.requires_grad_(False)
        batches = make_batches(subject, paths, args)
        found.append((subject, effective_receptive_fields(partial(stage_maps, subject), batches, subject.name)))
    images = (
        f"{len(paths)} images from {args.images.resolve().name}/" if paths else f"{args.count} images of Gaussian noise"
    )
    return draw_fields(found, images), table(found)


def draw_fields(found: Sequence[tuple[Subject, list[Field]]], images: str) -> Figure:
    """The figure; `images` says which images the mean is over."""
    figure = Figure(figsize=(WIDTH, 0.9 + 1.6 * len(found)), layout="constrained")
    weights = "" if any(subject.weights for subject, _ in found) else ", random weights"  # else the rows say it
    figure.suptitle(f"Effective receptive field, mean over {images}{weights}", fontsize=10)
    panels = figure.subplots(len(found), STAGES, squeeze=False)
    for stage, axes in enumerate(panels[0], start=1):
        axes.set_title(f"stage {stage}")
    for row, (subject, fields) in zip(panels, found, strict=True):
        for axes, field in zip(row, fields, strict=True):
            shown = draw_field(axes, field)
        names = (subject.name, subject.weights or "random weights")
        row[0].set_ylabel("\n".join(shorten(name, 24, keep_end=True) for name in names))
    figure.supxlabel(
        "smallest squares that hold 50 % (solid) and 95 % (dashed), and their area in % of the image", fontsize=9
    )
    bar = figure.colorbar(shown, ax=panels, shrink=min(1, 1.6 / len(found)), aspect=25, pad=0.02, format="{x:g}")
    bar.set_label("gradient / panel's maximum")
    return figure


def draw_field(axes: Axes, field: Field) -> AxesImage:
    """One panel; returns what a colour bar needs."""
    height, width = field.values.shape
    highest = field.values.max()
    # Pixels that do not matter at all are as dark as those that hardly do.
    relative = np.maximum(field.values / highest if highest > 0 else field.values, LEAST)
    extent = (0, width, height, 0)
    shown = axes.imshow(relative, norm=LogNorm(LEAST, 1), cmap=COLORS, extent=extent, interpolation_stage="data")
    for share, style in SHARES.items():
        side, top, left = field.square(share)
        outline = {"fill": False, "edgecolor": "white", "linestyle": style, "clip_on": False}
        axes.add_patch(Rectangle((left, top), min(side, width), min(side, height), **outline))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(" / ".join(f"{100 * field.area(share):.1f} %" for share in SHARES))
    return shown


def table(found: Sequence[tuple[Subject, list[Field]]]) -> str:
    titles = ("model", "weights", "image_size", "stage", "tokens", "stride", *(f"area_{s:.0%}"[:-1] for s in SHARES))
    return as_csv(
        titles,
        [
            (
                subject.name,
                subject.weights or "random",
                "x".join(map(str, subject.img_size)),
                stage,
                "x".join(map(str, field.map_size)),
                f"{field.stride:g}",
                *(f"{field.area(share):.6f}" for share in SHARES),
            )
            for subject, fields in found
            for stage, field in enumerate(fields, start=1)
        ],
    )
