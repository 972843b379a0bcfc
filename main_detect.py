"""Train a detector of objects on one process or many, on images with boxes in COCO's layout.

    python main_detect.py --cfg configs/detection/retinanet_strip_mlp_tiny.yaml --data-path DATA
    torchrun --nproc_per_node 8 main_detect.py --cfg configs/detection/retinanet_strip_mlp_tiny.yaml --data-path DATA
    python main_detect.py --cfg configs/detection/retinanet_strip_mlp_tiny.yaml --data-path DATA --eval

DATA has annotations/instances_train.json, annotations/instances_val.json and the images in train/ and val/. The
backbone starts from --pretrained, a classifier's checkpoint. Everything a run writes goes to OUTPUT/MODEL.NAME/TAG; the
same command again continues there.

--eval prints the average precision of best.pth (or else last.pth) of that run, or of --resume FILE.
"""

import argparse
import json
from pathlib import Path

from config import add_arguments, get_config
from utils import UserError, parse_first, run_entry_point, seed_all


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--eval", action="store_true", help="evaluate only")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="with --eval: write the results there, over what it holds"
    )
    parser.add_argument(
        "--detections", metavar="FILE", type=Path, help="with --eval: likewise what is found, as COCO results JSON"
    )
    args = parser.parse_args()
    if (args.json or args.detections) and not args.eval:
        parser.error("--json and --detections go with --eval")
    return args


if __name__ == "__main__":
    parse_first(parse_args, "pycocotools", extra="detection")

from data import Sources, with_class_count
from data.build import check_same_data
from detection.coco import read_splits
from detection.dataset import build_eval_loader, build_train_loader
from detection.evaluate import evaluate_run
from detection.metrics import to_results
from detection.models import build_detector
from detection.task import Detection, check_detection
from engine.fit import group_timeout, run_training, train_in_folder, with_sync_bn
from logger import check_trackers, json_numbers
from models import freeze, idle_keys
from optimizer import check_optimizer
from runtime.distributed import World, close_world, init_world, lost_processes_named
from runtime.signals import StopRequest


def main() -> None:
    args = parse_args()
    config, notes = get_config(args, idle_keys)
    check_detection(config)
    if args.eval:
        evaluate(args, config, notes)
    else:
        run_training(config, args.local_rank, lambda world, request: train(config, notes, world, request))


def train(config, notes: list[str], world: World, request: StopRequest) -> None:
    """Trains the detector of a config in the run's folder. Data and detector are put together here, before anything is
    written. engine/fit.py is the run itself, as for classification, and detection/task.py what is special about it.

    Raises:
        Stopped: a signal has ended the run, which is saved.
    """
    check_optimizer(config)
    check_trackers(config.LOGGERS)
    sources = read_splits(config)
    check_same_data(config, Sources(*sources), world)
    config = with_class_count(config, sources.train)
    train_loader = build_train_loader(config, sources.train, world)
    eval_loader = build_eval_loader(config, sources.val, world)

    seed_all(config.SEED)
    model = build_detector(config, config.MODEL.NUM_CLASSES)
    freeze(model, config.TRAIN.FREEZE)
    model = with_sync_bn(config, model, world)

    task = Detection(config, train_loader, eval_loader, world)
    train_in_folder(config, task, model, [*notes, *sources.train.notes, *sources.val.notes], world, request)


def evaluate(args: argparse.Namespace, config, notes: list[str]) -> None:
    """Evaluates a checkpoint, and writes the files that the command line asks for."""
    world = init_world(config.DEVICE, args.local_rank, group_timeout(config))
    with lost_processes_named():
        result, source, details = evaluate_run(config, notes, world, args.resume or args.pretrained)
    if world.is_main:
        if args.json:
            result["per_class"] = json_numbers(result["per_class"])
            write_json(args.json, "--json", json_numbers(result), indent=2)
        if args.detections:
            found = to_results(source, details.found.keys(), details.found.values())
            write_json(args.detections, "--detections", found)
    close_world(world)


def write_json(path: Path, option: str, content: dict | list, indent: int | None = None) -> None:
    try:
        path.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_entry_point(main)
