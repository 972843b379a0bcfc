"""A trained model from its checkpoint alone, for the tools that use one."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from checkpoint import CheckpointError, count_classes, load_weights, read_checkpoint
from config import config_of, load_config
from data import build_normalize
from data.transforms import build_transform
from models import build_model
from utils import UserError


@dataclass
class Trained:
    """A model in evaluation mode, and what it takes to use it.

    Attributes:
        classes: their names, in label order.
        config: of the run that made it, or of --cfg, with --opts on top; `MODEL.NUM_CLASSES` is the model's.
        path: of the checkpoint.
        transform: of one image, RGB, to (3, H, W) uint8, as in evaluation.
        normalize: of a batch of those to what the model is given, on its device.
    """

    model: nn.Module
    classes: list[str]
    config: CfgNode
    path: Path
    device: torch.device
    transform: Callable[[Image.Image], Tensor]
    normalize: Callable[[Tensor], Tensor]

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """A batch (N, 3, H, W), normalised, on the model's device."""
        return self.normalize(torch.stack([self.transform(image) for image in images]).to(self.device))


def add_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The options of `load_trained`; `nargs` as argparse has it, for tools that take several checkpoints."""
    parser.add_argument("checkpoint", type=Path, nargs=nargs, help="a checkpoint: ours, released, or safetensors")
    parser.add_argument("--cfg", metavar="FILE", help="config of the model; ours have it in the checkpoint")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set, in pairs"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="names of the classes, one per line in label order (default: those in the checkpoint, or ImageNet-1K's "
        "where there are 1,000)",
    )
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to run (DEVICE)")


def load_trained(args: argparse.Namespace) -> Trained:
    """The model that the parsed options name.

    Raises:
        UserError: the checkpoint or the config cannot be used, or they do not fit each other.
    """
    content = read_checkpoint(args.checkpoint)
    config = read_config(content, args.checkpoint, args.cfg, args.opts).clone()
    config.defrost()
    if args.device:
        config.DEVICE = args.device
    ema = not args.no_ema
    if not config.MODEL.NUM_CLASSES:
        config.MODEL.NUM_CLASSES = 1
        with torch.device("meta"):
            model = build(config)
        config.MODEL.NUM_CLASSES = count_classes(model, content, args.checkpoint, ema)
    config.freeze()
    model = build(config)
    for note in load_weights(model, content, args.checkpoint, ema=ema).notes(model):
        print(f"note: {note}", file=sys.stderr)
    has_cuda = torch.cuda.is_available()
    if config.DEVICE == "cuda" and not has_cuda:
        raise UserError("--device is cuda, but PyTorch finds no CUDA device; accepted here: auto, cpu")
    device = torch.device("cuda" if config.DEVICE != "cpu" and has_cuda else "cpu")
    return Trained(
        model.to(device).eval(),
        class_names(content, args.checkpoint, args.classes, config.MODEL.NUM_CLASSES),
        config,
        args.checkpoint,
        device,
        build_transform(config, is_train=False),
        build_normalize(config, device),
    )


def read_config(content: Mapping, path: Path, cfg: str | None, opts: Sequence[str]) -> CfgNode:
    """The frozen config of --cfg, or else of the checkpoint, with `opts` on top."""
    if cfg:
        return load_config(cfg, opts)[0]
    values = content.get("config")
    if not isinstance(values, Mapping) or "MODEL.TYPE" not in values:
        raise CheckpointError(
            f"{path}: does not say which model its weights are for, as released files do not; name its config, for "
            "example --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"
        )
    return config_of(values, str(path), opts)


def build(config) -> nn.Module:
    """The model of the config; a UserError where it cannot be built."""
    try:
        return build_model(config)
    except ValueError as error:
        raise UserError(f"the model of the config cannot be built: {error}") from error


def class_names(content: Mapping, path: Path, listing: Path | None, count: int) -> list[str]:
    """Of `count` classes, in label order: from the file `listing`, or else from the checkpoint, or else ImageNet-1K's,
    or else their numbers."""
    if listing:
        try:
            names = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {listing}: cannot be read: {error}") from error
        if len(names) != count:
            raise UserError(f"--classes {listing}: has {len(names)} lines, but the model of {path} has {count} classes")
        return names
    names = content.get("classes")
    if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
        return names
    if count == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        return [imagenet.index_to_description(index) for index in range(count)]
    return [str(label) for label in range(count)]
