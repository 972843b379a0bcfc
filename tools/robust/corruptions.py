"""Corruptions of images in five severities, after Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations" (ICLR 2019), as far as NumPy, SciPy, scikit-image and Pillow make them.

The severities are those of the paper's code (github.com/hendrycks/robustness): of CIFAR-10-C for images of at most 64
pixels, of ImageNet-C for larger ones. Differences from that code:

- contrast is lowered around the mean grey level of the image, not around each channel's mean (it is Pillow's);
- elastic_transform has severities of our own, and no affine part: sizes are relative to the image's;
- pixels are rounded, not truncated, to 8 bits;
- a grey image stays grey: its three channels get the same noise.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance
from scipy.signal import fftconvolve
from skimage.color import hsv2rgb, rgb2hsv
from skimage.draw import disk
from skimage.filters import gaussian
from skimage.transform import warp
from skimage.util import random_noise
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from data.dataset import ClassificationDataset

SMALL = 64  # pixels of the shorter side, up to which the severities are CIFAR-10-C's
SEVERITIES = (1, 2, 3, 4, 5)
ELASTIC_SIGMA = 0.06  # smoothness of elastic_transform, relative to the shorter side


def as_floats(image: Image.Image) -> np.ndarray:
    """(H, W, 3), 0 to 1."""
    return np.asarray(image) / 255


def as_image(pixels: np.ndarray) -> Image.Image:
    """The inverse of `as_floats`; what is outside 0 to 1 is clipped."""
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


# All take an RGB image, the parameter of a severity and a generator.


def gaussian_noise(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    return as_image(random_noise(as_floats(image), "gaussian", rng=rng, var=deviation**2))


def shot_noise(image: Image.Image, photons: float, rng: np.random.Generator) -> Image.Image:
    # The "poisson" of random_noise has no strength.
    return as_image(rng.poisson(as_floats(image) * photons) / photons)


def impulse_noise(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    return as_image(random_noise(as_floats(image), "s&p", rng=rng, amount=share))


def gaussian_blur(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    return as_image(gaussian(as_floats(image), sigma, channel_axis=-1))


def defocus_blur(image: Image.Image, lens: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    radius, sigma = lens
    reach = int(radius) + 2
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    kernel[disk((reach, reach), radius + 1e-6)] = 1  # with the pixels on its rim, as in the paper's code
    kernel = gaussian(kernel / kernel.sum(), sigma)[..., None]
    pixels = np.pad(as_floats(image), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return as_image(fftconvolve(pixels, kernel, mode="valid", axes=(0, 1)))


def brightness(image: Image.Image, added: float, rng: np.random.Generator) -> Image.Image:
    pixels = rgb2hsv(as_floats(image))
    pixels[..., 2] = (pixels[..., 2] + added).clip(0, 1)
    return as_image(hsv2rgb(pixels))


def contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def elastic_transform(image: Image.Image, displacement: float, rng: np.random.Generator) -> Image.Image:
    """Displacements are uniform noise smoothed by a Gaussian (Simard et al., ICDAR 2003)."""
    side = min(image.size)
    fields = [gaussian(rng.uniform(-1, 1, image.size), ELASTIC_SIGMA * side, mode="reflect") for _ in "xy"]
    offsets = np.stack([(displacement * side * field / field.std()).ravel() for field in fields], axis=1)
    return as_image(warp(as_floats(image), lambda points: points + offsets, mode="reflect"))


def pixelate(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    fewer = tuple(max(1, int(side * share)) for side in image.size)
    return image.resize(fewer, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


def jpeg_compression(image: Image.Image, quality: int, rng: np.random.Generator) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded).convert("RGB")


class Corruption(NamedTuple):
    """A corruption and its parameters by severity, for small and for large images."""

    apply: Callable[[Image.Image, Any, np.random.Generator], Image.Image]
    small: tuple
    large: tuple
    meaning: str  # of the parameter


# The displacement relative to the shorter side. Our own, see above.
ELASTIC = (0.005, 0.01, 0.015, 0.02, 0.03)
CORRUPTIONS = {
    "gaussian_noise": Corruption(
        gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38), "standard deviation, of 1"
    ),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3), "photons of a white pixel"),
    "impulse_noise": Corruption(
        impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27), "share of black and white values"
    ),
    "gaussian_blur": Corruption(
        gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6), "standard deviation, in pixels"
    ),
    "defocus_blur": Corruption(
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "radius of the disk and standard deviation of its edge, in pixels",
    ),
    "brightness": Corruption(
        brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), "added to the value of HSV, of 1"
    ),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), "factor"),
    "elastic_transform": Corruption(
        elastic_transform, ELASTIC, ELASTIC, "standard deviation of displacements / shorter side"
    ),
    "pixelate": Corruption(
        pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), "pixels per side / before"
    ),
    "jpeg_compression": Corruption(jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), "quality"),
}


def corrupt(image: Image.Image, name: str, severity: int, seed: int, index: int) -> Image.Image:
    """An RGB image under one of the `CORRUPTIONS`, of the same size.

    What is drawn at random depends on the other arguments alone.

    Args:
        severity: 1 to 5.
        index: of the image in its data set.
    """
    corruption = CORRUPTIONS[name]
    parameters = corruption.small if min(image.size) <= SMALL else corruption.large
    rng = np.random.default_rng((seed, index, zlib.crc32(name.encode()), severity))
    corrupted = corruption.apply(image, parameters[severity - 1], rng)
    is_grey = len({channel.tobytes() for channel in image.split()}) == 1
    return corrupted.getchannel("G").convert("RGB") if is_grey else corrupted


class CorruptedDataset(ClassificationDataset):
    """A data set for evaluation whose images are corrupted: one that is smaller than the model's input as it is, before
    it is enlarged; any other as the model gets it, resized and cropped (as in ImageNet-C)."""

    def __init__(self, *args, corruption: str, severity: int, **options):
        super().__init__(*args, **options)
        self.corruption, self.severity = corruption, severity

    def view(self, image: Image.Image, index: int) -> Tensor:
        how = (self.corruption, self.severity, self.seed, index)
        height, width = self.image_size
        if image.width < width or image.height < height:
            return self.transform(corrupt(image, *how))
        return pil_to_tensor(corrupt(to_pil_image(self.transform(image)), *how))
