"""What the figures share."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.decoding import Decoder
from data.sources import read_file
from utils import UserError, printable

WIDTH = 7.0  # of a figure over both columns of a paper, in inches
# matplotlib's settings. Sizes are as in print. Names of files and classes are not formulas.
SIZES = ("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
STYLE = {"font.size": 9, **dict.fromkeys(SIZES, 9), "text.parse_math": False, "axes.linewidth": 0.6}
STYLE |= {"figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06}


def load_image(path: Path, decoder: Decoder) -> Image.Image:
    """An RGB image.

    Raises:
        UserError: the file cannot be read as one.
    """
    try:
        return decoder(read_file(str(path)), printable(str(path)))
    except OSError as error:
        raise UserError(f"{printable(str(path))}: cannot be read as an image: {error}") from error


def pixels(image: Tensor) -> np.ndarray:
    """An image (3, H, W) as matplotlib shows it, (H, W, 3)."""
    return image.permute(1, 2, 0).cpu().numpy()


def shorten(text: str, most: int, keep_end: bool = False) -> str:
    """At most so many characters of a name: its beginning, or both ends where, as in a file's, the end tells most."""
    if len(text) <= most:
        return text
    tail = most // 2 if keep_end else 0
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"
