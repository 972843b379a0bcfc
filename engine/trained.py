"""A trained model from its checkpoint alone."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from config import config_of, load_config
from data import build_normalize, build_sources, check_num_classes
from data.matching import EvalSet, match_classes
from data.sources import Source
from data.sources import class_names as class_names_of
from data.transforms import build_transform
from engine.evaluate import autocast, resolve_amp, with_classes_of
from engine.timm_format import config_values
from models import build_model
from runtime.checkpoint import (
    CheckpointError,
    load_weights,
    named_classes,
    other_classes,
    read_checkpoint,
)
from runtime.distributed import World
from runtime.weights import find_weights
from utils import UserError, printable


@dataclass
class Trained:
    """A model in evaluation mode, and what it takes to use it.

    Attributes:
        classes: their names in label order, for people; guessed if nobody names them.
        known_classes: the same if the checkpoint or --classes names them, else empty.
        config: of the run that made it, or of --cfg, with --opts on top; `MODEL.NUM_CLASSES` is the model's.
        path: of the checkpoint.
        transform: of one image, RGB, to (3, H, W) uint8, as in evaluation.
        normalize: of a batch of those to what the model is given, on its device.
    """

    model: nn.Module
    classes: list[str]
    known_classes: list[str]
    config: CfgNode
    path: Path
    device: torch.device
    transform: Callable[[Image.Image], Tensor]
    normalize: Callable[[Tensor], Tensor]

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """A batch (N, 3, H, W), normalised, on the model's device."""
        return self.normalize(torch.stack([self.transform(image) for image in images]).to(self.device))

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """(N, classes) float32 on the model's device, for uint8 images (N, 3, H, W), computed as main_eval.py does."""
        images = self.normalize(images.to(self.device))
        with autocast(self.device, resolve_amp(self.config, self.device)):
            logits = self.model(images)
        return logits.float()

    def validation_source(self) -> Source:
        """The validation images of the config's data. If their classes have other names than the model's, a note on
        stderr says so.

        Raises:
            UserError: the data is not there, or has another number of classes.
        """
        source = build_sources(self.config, World(rank=0, local_rank=0, size=1, device=self.device), train=False).val
        source = match_classes(self.config, EvalSet(source, None), self.known_classes, self.path).source
        check_num_classes(self.config, source)
        if other_classes({"classes": self.known_classes}, class_names_of(source)):
            print(f"note: {self.path} was trained on classes of other names than the data has", file=sys.stderr)
        return source


def load_trained(args: argparse.Namespace, content: Mapping[str, Any] | None = None) -> Trained:
    """The model that the parsed options of `config.add_checkpoint_arguments` name.

    Args:
        content: of the checkpoint, if it has been read.

    Raises:
        UserError: the checkpoint or the config cannot be used, or they do not fit each other.
    """
    content = read_checkpoint(args.checkpoint) if content is None else content
    config = with_classes_of(
        read_config(content, args.checkpoint, args.cfg, args.opts), content, args.checkpoint, args.ema
    )
    model = build_model(config)
    loaded = load_weights(model, content, args.checkpoint, ema=args.ema)
    for note in (f"weights from {args.checkpoint}: {loaded.taken}", *loaded.notes(model)):
        print(f"note: {note}", file=sys.stderr)
    device = find_device(args.device)
    known = class_names(content, args.checkpoint, args.classes, config.MODEL.NUM_CLASSES)
    return Trained(
        model.to(device).eval(),
        known or guessed_names(config.MODEL.NUM_CLASSES),
        known,
        config,
        args.checkpoint,
        device,
        build_transform(config, is_train=False),
        build_normalize(config, device),
    )


def find_device(name: str | None) -> torch.device:
    """The device that --device names. Raises UserError if there is none."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError("--device is cuda, but PyTorch finds no CUDA device; accepted here: auto, cpu")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def read_config(content: Mapping, path: Path, cfg: str | None, opts: Sequence[str]) -> CfgNode:
    """The frozen config of --cfg, or else of the checkpoint, with `opts` on top.

    Raises:
        UserError: there is none, or it is not one of the weights in the checkpoint.
    """
    if cfg:
        return load_config(cfg, opts)[0]
    return config_of(own_config(content, path), str(path), opts)


def own_config(content: Mapping, path: Path) -> Mapping[str, Any]:
    """The config of a checkpoint, by dotted keys: of ours, or of timm's `config.json` beside it.

    Raises:
        UserError: there is none, or it is not one of the weights in the checkpoint.
    """
    values = content.get("config")
    if not isinstance(values, Mapping) or "MODEL.TYPE" not in values:
        if "timm" not in content:
            raise CheckpointError(
                f"{path}: does not say which model its weights are for, as released files do not; name its config, for "
                "example --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
            )
        values, notes = config_values(content["timm"], path)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    check_size(config_of(values, str(path)), find_weights(content, path).weights, path)
    return values


def check_size(config, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError if the config's model is far larger than the weights beside it: a few bytes could ask for
    any amount of memory and time."""
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = config.MODEL.NUM_CLASSES or 1
    numbers = sum(value.numel() for value in weights.values())
    parameters = float("inf")
    if sum(config.MODEL.STRIP_MLP.LAYERS) <= max(100, len(weights)):
        try:
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
        except (RuntimeError, OverflowError) as error:  # sizes beyond 64 bits
            raise CheckpointError(f"{path}: the model of its config cannot be built: {error}") from error
    if parameters > 2 * numbers + 10_000:
        raise CheckpointError(
            f"{path}: its config is of a model of {parameters:,} parameters, but it holds {numbers:,} numbers"
        )


def class_names(content: Mapping, path: Path, listing: Path | None, count: int) -> list[str]:
    """The names of `count` classes in label order, printable: from the file `listing`, or else from the checkpoint, or
    else none."""
    if listing:
        try:
            names = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {listing}: cannot be read: {error}") from error
        if len(names) != count:
            raise UserError(f"--classes {listing}: has {len(names)} lines, but the model of {path} has {count} classes")
        return [printable(name) for name in names]
    return named_classes(content, count)


def guessed_names(count: int) -> list[str]:
    """ImageNet-1K's names if there are 1,000 classes, else their numbers."""
    if count == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        return [imagenet.index_to_description(index) for index in range(count)]
    return [str(label) for label in range(count)]
