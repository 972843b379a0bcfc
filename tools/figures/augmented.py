"""Augmented images: the first of a training epoch, as the model gets them."""

import argparse
import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from config import load_config
from data import build_batch_transform, build_mixup, build_sources, build_train_loader, check_num_classes, denormalize
from runtime.distributed import World
from utils import seed_all

from .common import WIDTH, pixels, shorten

SUFFIXES = (".png",)
LEAST_SHARE = 0.005  # of a class that is named, so that it rounds to 0.01


def first_batch(config, epoch: int) -> tuple[Tensor, Tensor, list[str]]:
    """The first batch of an epoch, from 0: normalised images (N, 3, S, S), targets (N, classes) without label
    smoothing, and the names of the classes.

    Raises:
        UserError: the data or the config cannot be used.
    """
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    config = config.clone()
    config.defrost()
    config.DATA.NUM_WORKERS = 0  # images do not depend on it, and workers would load further batches
    source = build_sources(config, world, val=False).train
    classes = check_num_classes(config, source)
    mixup = build_mixup(config, classes)
    transform = build_batch_transform(config, mixup, world.device)
    loader = build_train_loader(config, source, world)
    loader.sampler.set_epoch(epoch)
    batch = next(iter(loader))
    seed_all(config.SEED, epoch, 0, world.rank)  # as in training
    images, targets = transform(batch.image, batch.target)
    if mixup:
        smoothing = config.MODEL.LABEL_SMOOTHING
        return images, (targets - smoothing / classes) / (1 - smoothing), source.classes
    return images, torch.nn.functional.one_hot(targets, classes).float(), source.classes


def describe(target: Tensor, classes: Sequence[str], most: int) -> str:
    """A target's class, or classes with their shares, a line each of at most `most` characters."""
    shares, labels = target.topk(min(2, len(target)))
    named = [(float(s), classes[i]) for s, i in zip(shares, labels.tolist(), strict=True) if s >= LEAST_SHARE]
    if len(named) == 1:
        return shorten(named[0][1], most)
    return "\n".join(f"{shorten(name, most - 6)}: {share:.2f}" for share, name in named)


def draw(args: argparse.Namespace) -> tuple[Figure]:
    overrides = [("DATA.DATA_PATH", args.data_path, "--data-path")] if args.data_path else []
    config, _ = load_config(args.cfg, args.opts, overrides)
    images, targets, classes = first_batch(config, args.epoch - 1)
    return (draw_tiles(denormalize(images[: args.count]), targets[: args.count], classes),)


def draw_tiles(images: Tensor, targets: Tensor, classes: Sequence[str]) -> Figure:
    """A grid of images (N, 3, S, S), 0 to 1, titled by their targets (N, classes)."""
    columns = min(6, len(images))
    rows = math.ceil(len(images) / columns)
    titles = [describe(target, classes, most=16) for target in targets]
    lines = max(title.count("\n") for title in titles) + 1
    tile = WIDTH / max(columns, 4)
    figure = Figure(figsize=(tile * columns, rows * (tile + 0.16 * lines)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, image, title in zip(panels, images, titles, strict=False):
        axes.imshow(pixels(image))
        axes.set_title(title)
    return figure
