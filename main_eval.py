"""Evaluate checkpoints, released or our own.

    python main_eval.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA --resume FILE

Without --resume or --pretrained it evaluates best.pth (or else last.pth) of the run that the config, --output and --tag
name. Under torchrun, each process evaluates its share of the images.
"""

import argparse
import json
from pathlib import Path

import timm
import torch

from config import add_arguments, get_config
from data import build_eval_loader, build_sources, check_num_classes
from data.sources import class_names
from engine.epoch import LoadingFailed, evaluate, resolve_amp, throughput
from logger import ALL_RANKS, create_logger, json_numbers
from models import build_model, prepare_model
from runtime.checkpoint import CheckpointError, load_weights, other_classes, read_checkpoint
from runtime.distributed import World, close_world, init_world, lost_processes_named
from runtime.run_folder import run_path
from utils import UserError, run_entry_point


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--throughput", action="store_true", help="measure images/s of the model alone, no accuracy")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config, notes = get_config(args)
    world = init_world(config.DEVICE, args.local_rank)
    with lost_processes_named():
        run(config, notes, world, args.resume or args.pretrained, args.throughput, args.json)
    close_world(world)


def run(
    config,
    notes: list[str],
    world: World,
    checkpoint: str | None = None,
    measure_throughput: bool = False,
    json_file: Path | None = None,
) -> None:
    """Evaluates the file `checkpoint`, or else the run that the config names; or measures the model's throughput."""
    logger = create_logger("eval", world.rank)
    for note in notes:
        logger.warning(note, extra=ALL_RANKS)

    # Data and model
    source = build_sources(config, world, train=False).val
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = check_num_classes(config, source)
    config.freeze()
    loader = build_eval_loader(config, source, world)
    model = build_model(config)
    amp = str(resolve_amp(config, world.device) or torch.float32).removeprefix("torch.")
    logger.info(f"torch {torch.__version__}, timm {timm.__version__}, {world.size} x {world.device.type}, {amp}")

    if measure_throughput:
        prepare_model(config, model, world.device)
        images = next(iter(loader)).image
        result = {"images_per_second": throughput(config, model, images, world), "batch": len(images)}
        logger.info(f"throughput {result['images_per_second']:.1f} images/s per process at batch {len(images)}, {amp}")
    else:
        path = find_checkpoint(config, checkpoint)
        content = read_checkpoint(path)
        loaded = load_weights(model, content, path)
        for line in (f"weights from {path}", *loaded.notes(model)):
            logger.info(line)
        if other_classes(content, class_names(source)):
            message = f"{path} was trained on classes of other names than the data has: the accuracy may mean nothing"
            logger.warning(message, extra=ALL_RANKS)
        prepare_model(config, model, world.device)
        try:
            result = {"checkpoint": str(path), **evaluate(config, model, loader, world, logger)}
        except LoadingFailed as failed:
            raise failed.error from failed
        logger.info(describe(result))

    if json_file and world.is_main:
        result = json_numbers({"model": config.MODEL.NAME, "amp": amp, "processes": world.size, **result})
        try:
            json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file}: cannot be written: {error.strerror}") from error


def describe(result: dict) -> str:
    """One line about an evaluation, for people."""
    unreadable = result["unreadable_val"]
    remark = f", of which {unreadable} unreadable and counted as wrong" if unreadable else ""
    return (
        f"top-1 {result['top1']:.3f} % top-5 {result['top5']:.3f} % loss {result['val_loss']:.4f} "
        f"on {result['images']} images{remark}, {result['val_images_per_second']:.0f} images/s"
    )


def find_checkpoint(config, named: str | None) -> Path:
    """The file to evaluate: the one named on the command line; or the best, or last, of the run that the config names;
    or the one in the config. What a finished run's config.yaml has there is where that run started from."""
    folder = run_path(config)
    own = [folder / name for name in ("best.pth", "last.pth", "previous.pth") if (folder / name).is_file()]
    for path in (named, *own, config.MODEL.RESUME, config.MODEL.PRETRAINED):
        if path:
            return Path(path)
    raise CheckpointError(f"{folder}: no best.pth or last.pth there; train first, or name a file with --resume")


if __name__ == "__main__":
    run_entry_point(main)
