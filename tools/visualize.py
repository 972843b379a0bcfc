"""Pictures of models and data, for papers and for looking.

    python tools/visualize.py receptive-field --variants strip_mlp_tiny_light sparse_mlp_tiny
    python tools/visualize.py token-mixing
    python tools/visualize.py strips output/strip_mlp_pico_digits/default/best.pth
    python tools/visualize.py cam output/strip_mlp_t/default/best.pth cat.jpg dog.jpg
    python tools/visualize.py augmented --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA
    python tools/visualize.py mistakes output/strip_mlp_pico_digits/default/best.pth

Each has a --help of its own. A picture is a PNG, in the current folder unless --output says otherwise. An existing
file is replaced only if --output names it. The names of the files are printed. The exit status is 0 if they are
written, 1 if not, 2 for options that are not accepted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from figures.options import PICTURES
from number_options import at_least

from utils import UserError, parse_first, run_entry_point, writing_to


def parse_args() -> argparse.Namespace:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="PICTURE")
    for name, (description, add_arguments) in PICTURES.items():
        title = description.splitlines()[0]
        command = commands.add_parser(name, help=title[0].lower() + title[1:], description=description, **form)
        add_arguments(command)
        default = f"{name.replace('-', '_')}.png"
        command.add_argument("--dpi", type=at_least(150), default=200, help="of the PNG, 150 or more (default: 200)")
        command.add_argument("--output", metavar="FILE", type=Path, help=f"the PNG to write (default: {default})")
    return parser.parse_args()


if __name__ == "__main__":
    parse_first(parse_args, "matplotlib", extra="figures")

import matplotlib
from figures import augmented, cam, mistakes, receptive_field, strips, token_mixing
from figures.common import STYLE
from matplotlib.figure import Figure

COMMANDS = {
    "receptive-field": receptive_field,
    "token-mixing": token_mixing,
    "strips": strips,
    "cam": cam,
    "augmented": augmented,
    "mistakes": mistakes,
}


def output_paths(output: Path | None, command: str) -> list[Path]:
    """The files that a picture goes to.

    Raises:
        UserError: not a PNG, no such folder, or a file is there and --output does not name it.
    """
    path = output or Path(f"{command.replace('-', '_')}.png")
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {path}: no PNG file; accepted: a name that ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")
    paths = [path, *(path.with_name(path.stem + suffix) for suffix in COMMANDS[command].SUFFIXES[1:])]
    there = [str(each) for each in paths if each.exists()]
    if there and output is None:
        raise UserError(
            f"{', '.join(there)}: there already; name another file with --output, or this one to replace it"
        )
    return paths


def main() -> None:
    args = parse_args()
    paths = output_paths(args.output, args.command)
    with matplotlib.rc_context(STYLE):
        contents = COMMANDS[args.command].draw(args)
        with writing_to(paths[0].parent):
            for path, content in zip(paths, contents, strict=True):
                if isinstance(content, Figure):
                    content.savefig(path, dpi=args.dpi, pil_kwargs={"optimize": True})
                else:
                    path.write_text(content, encoding="utf-8")
    print(*paths, sep="\n")


if __name__ == "__main__":
    run_entry_point(main)
