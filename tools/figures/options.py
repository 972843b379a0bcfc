"""The pictures that tools/visualize.py makes, and their options. Nothing here imports PyTorch or matplotlib, so that
--help answers at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

from number_options import at_least

from config import add_checkpoint_arguments

STAGES = 4


def _receptive_field(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser, nargs="*")
    parser.add_argument(
        "--variants", nargs="+", default=[], metavar="NAME", help="models by timm's names, with random weights"
    )
    parser.add_argument("--images", metavar="FOLDER", type=Path, help="of images (default: random noise)")
    parser.add_argument("--count", type=at_least(1), default=20, help="of images (default: 20)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of random weights and noise (default: 0)")


def _token_mixing(parser: argparse.ArgumentParser) -> None:
    models = ["strip_mlp_tiny", "sparse_mlp_tiny", "cycle_mlp_b2", "vip_s7", "hire_mlp_small", "wave_mlp_s"]
    parser.add_argument(
        "--variants", nargs="+", default=models, metavar="NAME", help=f"of these families (default: {' '.join(models)})"
    )


def _strips(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--block",
        nargs="+",
        default=[],
        metavar="NAME",
        help="such as stages.2.5 (default: the first of each stage)",
    )
    parser.add_argument("--axis", choices=["row", "column"], default="row", help="of the strips (default: row)")
    parser.add_argument(
        "--offsets", choices=["centre", "all"], default="centre", help="rows of the strips (default: centre)"
    )
    parser.add_argument("--patches", type=at_least(1), default=8, help="how many, the first ones (default: 8)")


def _cam(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument("--class", dest="label", metavar="NAME", help="of the classes (default: the predicted one)")
    parser.add_argument("--stage", type=at_least(1), choices=range(1, STAGES + 1), help="Grad-CAM at this stage's map")


def _augmented(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML config file")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set, in pairs"
    )
    parser.add_argument("--data-path", help="data set folder (DATA.DATA_PATH)")
    parser.add_argument("--epoch", type=at_least(1), default=1, help="from 1 (default: 1)")
    parser.add_argument("--count", type=at_least(1), default=24, help="of images, at most a batch (default: 24)")


def _mistakes(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument("--data-path", help="data set folder (DATA.DATA_PATH)")
    parser.add_argument("--count", type=at_least(1), default=12, help="of mistakes shown, at most (default: 12)")


# By name: the description, and what adds its options to a parser.
PICTURES: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "receptive-field": (
        """Effective receptive field of each stage: how much each input pixel matters to the stage's central token.

    python tools/visualize.py receptive-field --variants strip_mlp_tiny_light sparse_mlp_tiny
    python tools/visualize.py receptive-field output/strip_mlp_t/default/best.pth --images DATA/val --count 50

One row per model, one panel per stage: the mean over images of the absolute gradient of the central token, summed over
its channels, with respect to the pixels, relative to the panel's maximum, on a logarithmic scale. The squares are the
smallest that hold 50 % (solid) and 95 % (dashed) of it; under the panel is their area in percent of the image's. A
model that timm knows by name has random weights (timm's ResNets then show little but their shortcuts: they start with
residual branches that give zero). FILE.csv has the numbers.
""",
        _receptive_field,
    ),
    "token-mixing": (
        """Token mixing, counted: what its layers spend on tokens and what on channels, as in the paper's table 1.

    python tools/visualize.py token-mixing
    python tools/visualize.py token-mixing --variants strip_mlp_base sparse_mlp_base

By stage, in its first block: the share that layers which mix tokens (interaction) have in the parameters and
multiply-adds of them and of those which mix channels (fusion). Without biases, gates and depthwise convolutions of
3 x 3. The layers of CycleMLP, ViP and Hire-MLP that mix tokens mix channels at the same time, and are all interaction
here. FILE.csv has the numbers.
""",
        _token_mixing,
    ),
    "strips": (
        """Strip weights: what the strip MLP layers of a model do with each token of a row or column, patch by patch.

    python tools/visualize.py strips output/strip_mlp_pico_digits/default/best.pth
    python tools/visualize.py strips output/strip_mlp_t/default/best.pth --block stages.2.5 --axis column --offsets all

Each matrix is of one patch (a group of channels): the weight of each input token for each output token of the row, or
column. By default of the row that the output is in (offset 0), of the first block of each stage; --offsets all adds the
rows beside it.
""",
        _strips,
    ),
    "cam": (
        """Class activation maps: which parts of an image speak for a class.

    python tools/visualize.py cam output/strip_mlp_t/default/best.pth cat.jpg dog.jpg
    python tools/visualize.py cam output/strip_mlp_t/default/best.pth cat.jpg --class dog --stage 3

By default CAM (Zhou et al., CVPR 2016), which is exact for networks that end in global average pooling and a linear
layer: each token's contribution, of which the mean over the map and the bias add up to the class's logit. With --stage,
Grad-CAM (Selvaraju et al., ICCV 2017) at an earlier, finer map, relative to its maximum. For the class that the model
predicts, or --class. One row per image; on the left what the model gets of it.
""",
        _cam,
    ),
    "augmented": (
        """Augmented images: the first of a training epoch, as the model gets them.

    python tools/visualize.py augmented --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA
    python tools/visualize.py augmented --cfg configs/strip_mlp_pico_digits.yaml --opts AUG.REPROB 0.5 AUG.CUTMIX 1.0

The same images that main.py trains on with that config and seed as a single process on the CPU: transformed, erased and
mixed as a batch of DATA.BATCH_SIZE, then without the normalisation. Above each, its class; of a mixture, the classes
and their shares of the target, without label smoothing.
""",
        _augmented,
    ),
    "mistakes": (
        """Mistakes on the validation data: the worst ones with their images, the confusion matrix, and all predictions.

    python tools/visualize.py mistakes output/strip_mlp_pico_digits/default/best.pth
    python tools/visualize.py mistakes output/strip_mlp_t/default/best.pth --data-path DATA --output t.png

FILE.png has the wrongly classified images of the highest loss, FILE_confusion.png the confusion matrix (of many
classes, the ones most confused), FILE_predictions.csv a line per image. The data is that of the checkpoint's config.
Images that cannot be read are in the table only.
""",
        _mistakes,
    ),
}
