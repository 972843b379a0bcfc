"""A trained detector from its checkpoint alone."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from config import detection_sizes
from data import build_normalize
from data.decoding import Decoder, build_decoder
from detection.dataset import nearest_sizes
from detection.detector import Detector
from detection.evaluate import Objects, finite, in_original
from detection.models import build_detector
from detection.transforms import build_fit, mark
from engine.evaluate import autocast, resolve_amp
from engine.trained import class_names, find_device, guessed_names, read_config
from runtime.checkpoint import CheckpointError, load_weights
from runtime.weights import find_weights


@dataclass
class Prepared:
    """An image as a detector gets it.

    Attributes:
        pixels: (3, H, W) uint8.
        geometry: (4,), where the original is in it; see `detection.dataset.DetectionBatch`.
        size: height and width of the original.
    """

    pixels: Tensor
    geometry: Tensor
    size: tuple[int, int]


class Preparation:
    """Brings an image, RGB, to that of the config's sizes which has the nearest aspect ratio."""

    def __init__(self, config: CfgNode):
        self.sizes, self.fit = detection_sizes(config), build_fit(config)

    def __call__(self, image: Image.Image) -> Prepared:
        size = image.height, image.width
        target = self.sizes[nearest_sizes(np.array([size]), self.sizes)[0, 0]]
        marked = mark(image, torch.empty(0, 4), torch.empty(0, dtype=torch.int64), size)
        pixels = self.fit(marked, target).image.as_subclass(Tensor)
        return Prepared(pixels, self.fit.geometry(size, target), size)


@dataclass
class TrainedDetector:
    """A detector in evaluation mode, and what it takes to use it.

    Attributes:
        classes: their names in label order, for people.
        config: of the run that made it, or of --cfg, with --opts on top.
        decoder: of image files. It turns photographs as programs show them, as in training.
    """

    model: Detector
    classes: list[str]
    config: CfgNode
    device: torch.device
    decoder: Decoder
    prepare: Preparation

    def __post_init__(self) -> None:
        self.normalize, self.amp = build_normalize(self.config, self.device), resolve_amp(self.config, self.device)

    @torch.inference_mode()
    def find(self, images: Sequence[Prepared]) -> list[Objects]:
        """What is in each of the images, which may be of several sizes: boxes (n, 4) in pixels of the original, scores
        (n,), best first, labels (n,); on the CPU. Computed as main_detect.py does."""
        found: list[Objects] = [{}] * len(images)
        for size in {image.pixels.shape for image in images}:
            places = [place for place, image in enumerate(images) if image.pixels.shape == size]
            batch = self.normalize(torch.stack([images[place].pixels for place in places]).to(self.device))
            with autocast(self.device, self.amp):
                results = self.model(batch)
            for place, objects in zip(places, results, strict=True):
                objects = finite({name: value.cpu() for name, value in objects.items()})
                found[place] = in_original(objects, images[place].geometry, images[place].size)
        return found


def load_detector(args: argparse.Namespace, content: Mapping[str, Any]) -> TrainedDetector:
    """The detector that the parsed options of `config.add_checkpoint_arguments` name.

    Args:
        content: of the checkpoint.

    Raises:
        UserError: the checkpoint or the config cannot be used, or they do not fit each other.
    """
    path = args.checkpoint
    config = read_config(content, path, args.cfg, args.opts)
    count = config.MODEL.NUM_CLASSES or len(content.get("classes", ()))
    check_size(config, count, content, path)
    model = build_detector(config, count)
    loaded = load_weights(model, content, path, ema=args.ema)
    for note in (f"weights from {path}: {loaded.taken}", *loaded.notes(model)):
        print(f"note: {note}", file=sys.stderr)
    device = find_device(args.device)
    classes = class_names(content, path, args.classes, count) or guessed_names(count)
    decoder = replace(build_decoder(config), turn=True)
    return TrainedDetector(model.to(device).eval(), classes, config, device, decoder, Preparation(config))


def check_size(config: CfgNode, num_classes: int, content: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError if the config's detector is far larger than the weights beside it, as
    `engine.trained.check_size` does for classifiers."""
    numbers = sum(value.numel() for value in find_weights(content, path).weights.values())
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_detector(config, num_classes).parameters())
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: the detector of its config cannot be built: {error}") from error
    if parameters > 2 * numbers + 10_000:
        raise CheckpointError(
            f"{path}: its config is of a detector of {parameters:,} parameters, but it holds {numbers:,} numbers"
        )
