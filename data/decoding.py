"""Encoded image files to RGB, 8 bits per channel: what black and white are, and which side is up."""

import contextlib
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.errors import UnreadableImage

# Accepted formats. Pillow goes by the content and not by the name, and would run Ghostscript on PostScript.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000")

# Values of 16 bits below it are taken for those of 12 bits or less in a wider type, as cameras and scanners write them.
FULL_16_BITS = 4096


@dataclass(frozen=True)
class Decoder:
    """An image file's content as RGB.

    The first image of animated and multi-page files counts. Transparency is dropped. Files of 8 bits per channel come
    as they are; of others, `black` becomes 0 and `white` 255, and what lies beyond is cut off.

    Attributes:
        black, white: of images with more than 8 bits, if `range` is "given".
        range: "given"; "file", the smallest and the largest value of each file; or "auto", 0 and 65,535 for 16 bits,
            while files that would come out nearly black, and other types, are refused.
        turn: whether to turn an image as its EXIF orientation says. (Pillow turns TIFF files whatever it is.)
    """

    range: str = "auto"
    black: float = 0.0
    white: float = 65535.0
    turn: bool = False

    def __call__(self, encoded: bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
        """
        Args:
            name: for the message.
            size: the (height, width) that someone has noted for this image, who saw it turned or as stored: it comes as
                they saw it, see `noted_turned`. None: `turn` decides.

        Raises:
            UnreadableImage: it is no image, or a damaged or too large one, or its range of values has to be named, or
                it cannot be the image of that size.
        """
        try:
            with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
                halved = ";16" in str(image.tile)  # of colours with 16 bits, Pillow keeps the upper 8
                if self.turn if size is None else noted_turned(image, size):
                    image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip to 8 bits
                    return Image.fromarray(self._scaled(np.asarray(image), image.mode)).convert("RGB")
                image = image.convert("RGB")
                if halved and 0 < (most := max(high for _, high in image.getextrema())) < FULL_16_BITS >> 8:
                    raise UnreadableImage(
                        f"{name}: the values of its 16-bit colours go up to about {most << 8} of 65535 only, and would "
                        "be nearly black; accepted: colours of 8 bits, or of 16 bits that use the range"
                    )
                return image
        except UnreadableImage:
            raise
        except UnidentifiedImageError as error:  # its own message would name the buffer
            formats = ", ".join(IMAGE_FORMATS)
            raise UnreadableImage(f"{name}: no image of a known format; accepted: {formats}") from error
        except Exception as error:  # decoders can raise anything on damaged or hostile bytes
            raise UnreadableImage(f"{name}: {error}") from error

    def _scaled(self, values: np.ndarray, mode: str) -> np.ndarray:
        """Values (H, W) of more than 8 bits as uint8."""
        low, high = float(values.min()), float(values.max())
        if not np.isfinite((low, high)).all():
            raise ValueError("some of its pixel values are not finite numbers")
        black, white = self.black, self.white
        if self.range == "file":
            black, white = low, max(high, low + 1e-12)
        elif self.range == "auto":
            if mode == "F" or low < 0 or high > 65535 or 0 < high < FULL_16_BITS:
                kind = "floating-point" if mode == "F" else f"{values.dtype.itemsize * 8}-bit"
                raise ValueError(
                    f"its {kind} pixel values go from {low:.12g} to {high:.12g}, and nothing says which are "
                    "black and white; set DATA.PIXEL_RANGE, for example to 0,4095 for 12 bits, or to file for each "
                    "file's own range"
                )
            return (values.astype(np.uint16) >> 8).astype(np.uint8)
        scaled = (values.astype(np.float64) - black) * (255 / (white - black))
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


# EXIF orientations that swap height and width
_SWAP_SIDES = range(5, 9)


def noted_turned(image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether an image is to be turned as its EXIF orientation says, if someone has noted `size`, its (height, width).

    The size decides. Where it cannot (square images, upside-down ones), the image is turned, as programs show it.

    Raises:
        ValueError: neither way has the image this size, or the same proportions within a pixel.
    """
    stored = image.height, image.width
    orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = stored[::-1] if orientation in _SWAP_SIDES else stored
    for fits in (tuple.__eq__, _same_shape):
        if fits(turned, size):
            return orientation != 1
        if fits(stored, size):
            return False
    raise ValueError(f"it has {stored[1]} x {stored[0]} pixels, but its annotation says {size[1]} x {size[0]}")


def _same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one is the other scaled, with sides rounded to pixels."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(sum(size), sum(other))


def shown_size(path: str, noted: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of an image file as programs show it, turned as its EXIF orientation says. No pixels are
    decoded.

    Args:
        noted: what someone has noted as its size; that is returned if it is one that `Decoder` takes for this image.

    Raises:
        UnreadableImage: it is no image.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            with contextlib.suppress(ValueError):
                if noted is not None:
                    noted_turned(image, noted)
                    return noted
            swap = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in _SWAP_SIDES
            return (image.width, image.height) if swap else (image.height, image.width)
    except Exception as error:  # as above
        raise UnreadableImage(f"{path}: {error}") from error


def build_decoder(config) -> Decoder:
    """The decoder of DATA.PIXEL_RANGE and DATA.EXIF_ORIENTATION."""
    given, turn = config.DATA.PIXEL_RANGE, config.DATA.EXIF_ORIENTATION
    if given in ("auto", "file"):
        return Decoder(given, turn=turn)
    black, white = map(float, given.split(","))
    return Decoder("given", black, white, turn)


def count_turned(files: Iterable[bytes], seconds: float = 0.5) -> tuple[int, int]:
    """How many image files have an EXIF orientation other than upright, and how many were looked at in about that time.
    No pixels are decoded. TIFF files do not count: Pillow always turns them."""
    turned = looked_at = 0
    deadline = time.perf_counter() + seconds
    for encoded in files:
        looked_at += 1
        with contextlib.suppress(Exception), Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            # What cannot be opened is reported when it is loaded.
            if image.format != "TIFF":
                turned += image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        if time.perf_counter() > deadline:
            break
    return turned, looked_at
