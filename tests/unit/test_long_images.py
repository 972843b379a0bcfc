"""Images of extreme shape: only what the centre crop keeps is resized."""

import resource

import numpy as np
import pytest
from PIL import Image

from config import load_config
from data.transforms import Cover, build_transform
from tests.helpers import ROOT, python

CONFIG = ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"


def transform(size, interpolation):
    config, _ = load_config(CONFIG, ["DATA.IMG_SIZE", str(size), "DATA.INTERPOLATION", interpolation])
    return build_transform(config, is_train=False)


def smooth(height, width):
    """A photograph-like image: noise would show the order of Pillow's two passes."""
    y, x = np.mgrid[:height, :width].astype(float)
    channels = [128 + 100 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [56, [48, 64]])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(60, 500), (500, 60), (40, 1501), (1501, 41), (300, 2500), (25, 2000), (98, 588)])
def test_the_same_crop(shape, interpolation, size, monkeypatch):
    image = smooth(*shape)
    part = transform(size, interpolation)(image)
    monkeypatch.setattr(Cover, "LONG", 10**9)
    whole = transform(size, interpolation)(image)
    assert part.shape == whole.shape
    assert (part.int() - whole.int()).abs().max() <= 2


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (60, 200), (500, 500)])
def test_usual_images_are_resized_as_before(shape, monkeypatch):
    image = smooth(*shape)
    part = transform(56, "bicubic")(image)
    monkeypatch.setattr(Cover, "LONG", 10**9)
    assert part.equal(transform(56, "bicubic")(image))


MEASURE = """
import resource, sys
from PIL import Image
from config import load_config
from data.transforms import build_transform
config, _ = load_config(sys.argv[1], ["DATA.IMG_SIZE", sys.argv[2]])
transform = build_transform(config, is_train=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in ((1, 30_000), (30_000, 1), (3, 65_000)):
    print(tuple(transform(Image.new("RGB", shape, "red")).shape), end=" ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="Unix only")
@pytest.mark.parametrize(("size", "shape"), [("224", "(3, 224, 224)"), ("[192, 256]", "(3, 192, 256)")])
def test_memory_of_a_line_of_pixels(size, shape):
    *shapes, grown = python("-c", MEASURE, CONFIG, size).stdout.replace(") ", ");").split(";")
    assert shapes == [shape] * 3
    assert int(grown) < 50_000  # kilobytes; 8.6 GB where the whole is resized
