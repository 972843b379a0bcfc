"""Pixel values of more than 8 bits, and EXIF orientation."""

import io
import struct
import zlib

import numpy as np
import predict
import pytest
import torch
from PIL import Image

from config import ConfigError, get_default_config, load_config
from data.build import build_sources, note_on_orientation
from data.decoding import Decoder, build_decoder, count_turned
from data.errors import UnreadableImage
from runtime.distributed import World
from tests.helpers import ROOT

ALONE = World(0, 0, 1, torch.device("cpu"))
RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def tiff(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values), "TIFF")


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def grey(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0].astype(int)


# What a file holds at white, and how
TYPES = {
    "12 bits in 16": (4095, np.uint16),
    "8 bits in 32": (255, np.int32),
    "20 bits in 32": (2**20, np.int32),
    "float to 1": (1, np.float32),
    "float to 65535": (65535, np.float32),
}


@pytest.mark.parametrize(("white", "kind"), TYPES.values(), ids=TYPES)
def test_range(white, kind):
    content = tiff((RAMP * white).astype(kind))
    with pytest.raises(UnreadableImage, match=rf"scan: its .* go from 0 to {white}, .*DATA.PIXEL_RANGE"):
        Decoder()(content, "scan")
    for decoder in (Decoder("given", 0, white), Decoder("file")):
        assert (
            np.abs(grey(decoder(content, "")) - np.floor(RAMP * white).clip(0) / white * 255).max() <= 255 / white + 1
        )


def test_values_beyond_a_range_are_cut_off():
    values = np.array([[-5, 0], [80, 10**9]], np.int32)
    assert grey(Decoder("given", 0, 200)(tiff(values), "")).tolist() == [[0, 0], [102, 255]]
    with pytest.raises(UnreadableImage, match="32-bit pixel values go from -5 to 1000000000"):
        Decoder()(tiff(values), "")


@pytest.mark.parametrize("range", ["auto", "file", "given"])
def test_values_that_are_no_numbers(range):
    with pytest.raises(UnreadableImage, match="not finite"):
        Decoder(range)(tiff(np.array([[0, np.nan]], np.float32)), "")


def test_8_bits_and_uniform_images_are_not_scaled():
    assert grey(Decoder("given", 0, 4095)(encode(Image.new("L", (2, 2), 90)), "")).max() == 90
    black = tiff(np.zeros((2, 2), np.uint16))
    assert grey(Decoder()(black, "")).max() == grey(Decoder("file")(black, "")).max() == 0


def png_of_16_bits(white: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (np.repeat(RAMP[..., None], 3, 2) * white).astype(">u2")
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def test_colours_of_16_bits():
    assert np.abs(grey(Decoder()(png_of_16_bits(65535), "")) - RAMP * 255).max() <= 1
    with pytest.raises(UnreadableImage, match="16-bit colours go up to about 3840 of 65535"):
        Decoder()(png_of_16_bits(4095), "")


def test_orientation(tmp_path):
    """Through a folder, by the config, as training and predict.py take it."""
    pixels = np.zeros((16, 8, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("turned", {"exif": exif}), ("upright", {})):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
        for split in ("train", "val"):
            path = tmp_path / split / "a" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stream.getvalue())
    config = get_default_config()
    config.DATA.DATA_PATH = str(tmp_path)
    source = build_sources(config, ALONE).train
    assert [source.load(i).size for i in (0, 1)] == [(8, 16), (8, 16)]
    expected = "1 of 2 image files looked at have an EXIF orientation; they are used as stored"
    assert note_on_orientation(config, source).startswith(expected)
    config.DATA.EXIF_ORIENTATION = True
    source = build_sources(config, ALONE).train
    assert [source.load(i).size for i in (0, 1)] == [(16, 8), (8, 16)]
    assert grey(source.load(0))[:, 0].max() < 20 < 200 < grey(source.load(0))[:, -1].min()
    assert "they are turned" in note_on_orientation(config, source)
    files = predict.ImageFiles([str(tmp_path / "train/a/turned.jpg")], lambda image: image, build_decoder(config))
    assert files[0][1].size == (16, 8)


def test_tiff_files_are_turned_by_pillow():
    """So that nothing is turned twice, and the note does not say that they are used as stored."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 16)).save(stream, "TIFF", exif=exif)
    assert [Decoder(turn=turn)(stream.getvalue(), "").size for turn in (False, True)] == [(16, 8), (16, 8)]
    assert count_turned([stream.getvalue()]) == (0, 1)


@pytest.mark.parametrize("value", ["0,4095", "[0, 4095]", "file", "auto"])
def test_accepted_ranges(tmp_path, value):
    path = tmp_path / "scans.yaml"
    path.write_text(f"DATA: {{PIXEL_RANGE: {value if '[' in value else repr(value)}}}")
    config = load_config(path, [])[0]
    decoder = build_decoder(config)
    assert (decoder.range, decoder.white) == (("given", 4095) if "4095" in value else (value, 65535))


@pytest.mark.parametrize("value", ["4095", "4095,0", "0,1,2", "0,nan", "white"])
def test_refused_ranges(value):
    with pytest.raises(ConfigError, match=r"DATA.PIXEL_RANGE is .*accepted: auto, file, or LOW,HIGH"):
        load_config(ROOT / "configs/strip_mlp_pico_digits.yaml", ["DATA.PIXEL_RANGE", value])
