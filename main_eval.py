"""Evaluate checkpoints, released or our own.

    python main_eval.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA --resume FILE

Without --resume or --pretrained it evaluates best.pth (or else last.pth) of the run that the config, --output and --tag
name. A checkpoint that knows its config (ours, or a folder of timm's) needs no --cfg. Under torchrun, each process
evaluates its share of the images.

--split evaluates another split. --eval-set evaluates a model of ImageNet's classes, or some of them, on ImageNet's
other test sets; --data-path is then the folder with the class folders:

    imagenet-r, imagenet-a, imagenet-sketch   folders with WordNet ids; only the classes that are there count
    imagenet-v2                               folders with numbers: ImageNet's classes by WordNet id
    imagenet-real                             val/ as it is, with the labels of --real-labels real.json
    numbered                                  folders with numbers: the labels of any model
"""

import argparse
import json
from pathlib import Path

from config import EVAL_SETS, add_arguments, add_engine_argument, get_config
from utils import UserError, parse_first, run_entry_point

REPORT_SUFFIXES = (".txt", ".json", ".csv")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser, cfg_required=False)
    parser.add_argument("--throughput", action="store_true", help="measure images/s of the model alone, no accuracy")
    parser.add_argument(
        "--split", choices=["train", "val", "test"], default="", help="(default: val, or what it is called)"
    )
    parser.add_argument("--eval-set", choices=EVAL_SETS, default="", help="see above")
    parser.add_argument("--real-labels", metavar="FILE", type=Path, help="for --eval-set imagenet-real")
    parser.add_argument(
        "--report",
        metavar="PATH",
        type=Path,
        help="write precision, recall and F1 of each class and who is taken for whom: a .txt, .json or .csv file, or a "
        "folder for all of them",
    )
    add_engine_argument(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    args = parser.parse_args()
    if args.eval_set and args.split:
        parser.error("--eval-set and --split: accepted: one of them")
    if (args.eval_set == "imagenet-real") != bool(args.real_labels):
        parser.error("--eval-set imagenet-real and --real-labels FILE go together")
    if args.eval_set == "imagenet-real" and args.report:
        parser.error("--report: with --eval-set imagenet-real an image may have several labels: there is no confusion")
    if args.throughput and (args.eval_set or args.report):
        parser.error("--throughput measures the model alone; accepted with it: neither --eval-set nor --report")
    if args.report and args.report.suffix not in ("", *REPORT_SUFFIXES) and not args.report.is_dir():
        parser.error(f"--report {args.report}: accepted: a folder, or a file named {', '.join(REPORT_SUFFIXES)}")
    if not args.cfg and not (args.resume or args.pretrained):
        parser.error("needs --cfg, or --resume with a checkpoint that knows its config")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

from engine.evaluate import EvalOptions, evaluate_run
from engine.trained import own_config
from logger import json_numbers
from models import idle_keys
from runtime.checkpoint import read_checkpoint
from runtime.distributed import close_world, init_world, lost_processes_named


def main() -> None:
    args = parse_args()
    own = None
    if not args.cfg:
        path = Path(args.resume or args.pretrained)
        own = own_config(read_checkpoint(path), path)
    config, notes = get_config(args, idle_keys, own)
    world = init_world(config.DEVICE, args.local_rank)
    with lost_processes_named():
        options = EvalOptions(args.split, args.eval_set, args.real_labels, args.report, args.engine)
        result = evaluate_run(config, notes, world, args.resume or args.pretrained, args.throughput, options)
    if args.json and world.is_main:
        try:
            args.json.write_text(json.dumps(json_numbers(result), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from error
    close_world(world)


if __name__ == "__main__":
    run_entry_point(main)
