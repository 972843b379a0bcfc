"""Robustness and calibration of trained models: accuracy under common corruptions, and expected calibration error.

    python tools/robustness.py output/strip_mlp_pico_digits/default/best.pth --output output/robustness
    python tools/robustness.py strip/best.pth swin/best.pth --data-path DATA --output compared --images 5000 --workers 8
    python tools/robustness.py best.pth --output noise --corruptions gaussian_noise shot_noise --severities 1 3 5

Takes checkpoints of one data set and evaluates them on its validation images, clean and under the corruptions of
Hendrycks & Dietterich (ICLR 2019) that scikit-image, SciPy and Pillow make, in severities 1 to 5: gaussian_noise,
shot_noise, impulse_noise, gaussian_blur, defocus_blur, brightness, contrast, elastic_transform, pixelate,
jpeg_compression. All checkpoints see the same corrupted images, which depend on --seed alone. docs/robustness.md says
what the numbers mean.

Writes into --output, anew each time: robustness.md, robustness.csv (a line per checkpoint), robustness_corruptions.csv
(a line per checkpoint, corruption and severity), robustness.json (all numbers and settings), robustness.png (accuracy
by severity), calibration.png (reliability diagrams) and confusion.png (confusion matrices of the clean images). Images
that cannot be read are left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import at_least

from config import add_checkpoint_arguments
from utils import parse_first, run_entry_point, writing_to


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_checkpoint_arguments(parser, nargs="+")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--data-path", help="data set folder (DATA.DATA_PATH)")
    parser.add_argument("--images", type=at_least(1), metavar="N", help="use so many, drawn with --seed (default: all)")
    parser.add_argument("--corruptions", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument(
        "--severities", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5], help="(default: 1 2 3 4 5)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the corruptions and of --images (default: 0)")
    parser.add_argument("--batch-size", type=at_least(1), metavar="N", help="images (DATA.BATCH_SIZE)")
    parser.add_argument(
        "--workers", type=at_least(0), metavar="N", help="processes that read and corrupt (DATA.NUM_WORKERS)"
    )
    parser.add_argument("--amp", choices=["auto", "on", "off", "bfloat16", "float16"], help="mixed precision (AMP)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_first(parse_args, "matplotlib", "skimage", "torchmetrics", extra="robustness")

import matplotlib
from compare_runs import save
from figures.common import STYLE
from robust import charts, report
from robust.evaluation import choose_conditions, choose_images, common_source, evaluate, load_models


def main() -> None:
    args = parse_args()
    conditions = choose_conditions(args.corruptions, args.severities)
    subjects = load_models(args)
    source = common_source(subjects)
    with writing_to(args.output):  # before hours of work
        args.output.mkdir(parents=True, exist_ok=True)
    indices = choose_images(source, args.images, args.seed)
    evaluate(subjects, source, indices, conditions, args.seed)
    about = report.describe(subjects, source, len(indices), args.seed, ema=args.ema)
    with matplotlib.rc_context(STYLE):
        save(
            args.output,
            {
                "robustness.md": report.as_markdown(subjects, about),
                "robustness.csv": report.by_checkpoint(subjects),
                "robustness_corruptions.csv": report.by_condition(subjects),
                "robustness.json": report.as_json(subjects, about),
                "robustness.png": charts.draw_accuracy(subjects),
                "calibration.png": charts.draw_calibration(subjects),
                "confusion.png": charts.draw_confusion(subjects),
            },
        )
    print(f"\n{report.overview(subjects)}", end="")


if __name__ == "__main__":
    run_entry_point(main)
