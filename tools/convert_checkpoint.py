"""Convert a checkpoint to its weights alone: any to ours, to the released form, or to timm's and a Hugging Face hub.

    python tools/convert_checkpoint.py output/strip_mlp_pico_digits/default/best.pth digits.safetensors
    python tools/convert_checkpoint.py released.pth tiny.pth --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml
    python tools/convert_checkpoint.py best.pth released.pth --to released
    python tools/convert_checkpoint.py best.pth at_384.pth --opts DATA.IMG_SIZE 384
    python tools/convert_checkpoint.py best.pth my_model --to timm
    python tools/convert_checkpoint.py best.pth my_name/my_model --to hub

What it writes has no optimizer state and, of a model with a moving average of its weights, that average (--no-ema: the
weights themselves). Ours also hold the config and the names of the classes, so that the other tools need nothing else.
--to timm writes a folder, config.json and model.safetensors, for timm.create_model("local-dir:my_model",
pretrained=True) and transformers; --to hub puts the same on a Hugging Face hub, private unless --public, with the token
of `hf auth login`. Neither holds paths of this machine.
The last line is the file's SHA-256 and its name, or the address. Exit status: 0, or 1 if something cannot be read,
converted or written.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import add_checkpoint_arguments, get_default_config, leaves
from utils import UserError, parse_first, run_entry_point

SUFFIXES = (".pth", ".safetensors")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("output", type=Path, help=f"file {' or '.join(SUFFIXES)}, folder, or name on the hub")
    parser.add_argument(
        "--to", choices=["ours", "released", "timm", "hub"], default="ours", help="whose form (default: ours)"
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it is there")
    parser.add_argument("--public", action="store_true", help="with --to hub: for everybody to see")
    args = parser.parse_args()
    if args.to == "hub" and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(args.output)):
        parser.error(f"output is {args.output}; accepted with --to hub: a repository, such as my_name/my_model")
    if args.public and args.to != "hub":
        parser.error("--public is for --to hub")
    if args.to in ("ours", "released") and args.output.suffix not in SUFFIXES:
        parser.error(f"output is {args.output}; accepted: a name that ends in {' or '.join(SUFFIXES)}")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

from engine.timm_format import as_timm_model, exists_on_hub, push, save_folder
from engine.trained import Trained, load_trained
from models.build import released_patch_channels
from models.released import to_released_names
from runtime.checkpoint import CheckpointError, save_checkpoint, save_safetensors
from runtime.folders import WEIGHTS


def write(trained: Trained, output: Path, names: str) -> None:
    """Writes the weights under our names, with config and classes, or under the released ones, alone.

    Raises:
        CheckpointError: it cannot be written, or there are no released models like this one.
    """
    weights, config, classes = trained.model.state_dict(), leaves(trained.config), trained.known_classes
    if names == "released":
        released = to_released_names(trained.model)
        if released is None:
            raise CheckpointError(
                f"{trained.path}: is of a {type(trained.model).__name__}, which has no released names; "
                "accepted for --to released: Strip-MLP and Sparse MLP"
            )
        check_released(trained)
        weights, config, classes = released, {}, []
    if output.suffix == ".safetensors":
        save_safetensors(weights, output, config, classes)
    else:
        others = {"config": config, "classes": classes}
        save_checkpoint({"model": weights, **{key: value for key, value in others.items() if value}}, output)


def check_released(trained: Trained) -> None:
    """Raises CheckpointError for what the released code would take for another model, or cannot build: ablations."""
    if trained.config.MODEL.TYPE != "strip_mlp_layer":
        return  # all of Sparse MLP is released
    keys, defaults = trained.config.MODEL.STRIP_MLP, get_default_config().MODEL.STRIP_MLP
    free = ("EMBED_DIM", "LAYERS", "ALPHA", "PATCH_CHANNELS")
    other = [f"{key} {keys[key]}" for key in keys if key not in free and keys[key] != defaults[key]]
    if keys.PATCH_CHANNELS not in (0, released_patch_channels(keys.EMBED_DIM)):
        other.append(f"PATCH_CHANNELS {keys.PATCH_CHANNELS}")
    if other:
        raise CheckpointError(
            f"{trained.path}: there is no released model with MODEL.STRIP_MLP {', '.join(other)}; accepted: --to ours"
        )


def main() -> None:
    args = parse_args()
    there = exists_on_hub(str(args.output)) if args.to == "hub" else args.output.exists()
    if there and not args.force:
        raise UserError(f"{args.output}: is there already; choose another name, or --force")
    args.device = "cpu"
    trained = load_trained(args)
    file, address = args.output, None
    if args.to in ("ours", "released"):
        write(trained, args.output, args.to)
    else:
        made = as_timm_model(trained.model, trained.config, trained.known_classes)
        if args.to == "timm":
            save_folder(made, args.output)
            file = args.output / WEIGHTS
        else:
            address = push(made, str(args.output), private=not args.public)
    size = sum(value.numel() for value in trained.model.parameters())
    height_width = getattr(trained.model, "img_size", None)
    at = f" for images of {height_width[0]} x {height_width[1]} pixels" if height_width else ""
    print(f"{type(trained.model).__name__} of {size:,} parameters{at}, {len(trained.classes)} classes")
    print(address or f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}")


if __name__ == "__main__":
    run_entry_point(main)
