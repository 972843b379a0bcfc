"""Evaluate checkpoints, released or our own.

    python main_eval.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA --resume FILE

Without --resume or --pretrained it evaluates best.pth (or else last.pth) of the run that the config, --output and --tag
name. A checkpoint that knows its config (ours, or a folder of timm's) needs no --cfg. Under torchrun, each process
evaluates its share of the images.
"""

import argparse
import json
from pathlib import Path

from config import add_arguments, get_config
from utils import UserError, parse_first, run_entry_point


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser, cfg_required=False)
    parser.add_argument("--throughput", action="store_true", help="measure images/s of the model alone, no accuracy")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    args = parser.parse_args()
    if not args.cfg and not (args.resume or args.pretrained):
        parser.error("needs --cfg, or --resume with a checkpoint that knows its config")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

from engine.evaluate import evaluate_run
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
        result = evaluate_run(config, notes, world, args.resume or args.pretrained, args.throughput)
    if args.json and world.is_main:
        try:
            args.json.write_text(json.dumps(json_numbers(result), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from error
    close_world(world)


if __name__ == "__main__":
    run_entry_point(main)
