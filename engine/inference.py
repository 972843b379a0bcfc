"""What computes a trained model: PyTorch, or another engine that gives the same logits sooner.

An engine is a module that takes the place of the model: normalised images (N, 3, H, W) to logits (N, classes). None is
used before its logits for a few images were within `TOLERANCE` of the model's own. docs/export.md has their speed.
"""

import time
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from config import image_size
from data import build_normalize
from engine.exported import FORMATS, Run, compile_openvino, convert_to_openvino, first_line, quiet
from utils import UserError

TOLERANCE = 1e-4  # of the largest logit
CHECKED = 3  # images; not a whole part, so that filling up is checked too
# Images that engines on a CPU compute at a time, and their pixels: more at a time leave the caches.
PART_PIXELS = 4 * 224 * 224
# `auto` takes the first of these that is installed, fastest first, where the model itself would need so many seconds
# for all images: preparing the engine then costs less than it saves. ONNX Runtime is not among them: in batches it is
# no faster than the model itself (docs/export.md).
AUTO = {"openvino": 30, "reparameterized": 10}
# Fewer images than this are not worth the check.
FEW_IMAGES = 32


class InParts(nn.Module):
    """An engine that computes a batch in parts. Shape: (N, 3, H, W) -> (N, classes).

    Args:
        run: computes one part.
        part: images of one; a last part that is smaller is filled up with zeros, if `fixed`.
    """

    def __init__(self, run: Run, part: int, fixed: bool = False):
        super().__init__()
        self.run, self.part, self.fixed = run, part, fixed

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.logits(part) for part in images.contiguous().split(self.part)])

    def logits(self, images: Tensor) -> Tensor:
        missing = self.part - len(images) if self.fixed else 0
        if not missing:
            return self.run(images)
        return self.run(F.pad(images, (0, 0) * 3 + (0, missing)))[: len(images)]


def reparameterized(model: nn.Module, images: Tensor, part: int) -> nn.Module:
    """The model with fewer operations.

    Args:
        model: in evaluation mode; it is not changed.
        images: an example.
        part: the most images to compute at a time.
    """
    folded = reparameterize_model(model)
    return folded if images.is_cuda else InParts(folded, part)


def compiled(model: nn.Module, images: Tensor, part: int) -> nn.Module:
    """The same compiled by inductor, with its weights laid out once. Otherwise as `reparameterized`."""
    folded = torch.compile(reparameterize_model(model), dynamic=False)
    return InParts(torch._inductor.config.patch(freezing=True)(folded), part, fixed=True)


def onnxruntime(model: nn.Module, images: Tensor, part: int) -> nn.Module:
    """The same by ONNX Runtime. Otherwise as `reparameterized`."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        FORMATS["onnx"].write(reparameterize_model(model), images, path, {})
        return InParts(FORMATS["onnx"].load(path), part)


def openvino(model: nn.Module, images: Tensor, part: int) -> nn.Module:
    """The same by OpenVINO. Otherwise as `reparameterized`."""
    converted = convert_to_openvino(reparameterize_model(model), images)
    return InParts(compile_openvino(converted, batch=part), part, fixed=True)


def from_file(path: Path, model: nn.Module, images: Tensor, part: int) -> nn.Module:
    """What tools/export.py wrote without --normalize. Otherwise as `reparameterized`."""
    return InParts(FORMATS[format_of(path)].load(path), part)


def format_of(path: Path) -> str:
    """The format of an exported file, by its name's end; a .pt2 that holds compiled code is a package."""
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            return "aoti" if any(name.endswith(".so") for name in archive.namelist()) else "torch"
    return {".onnx": "onnx", ".xml": "openvino"}[path.suffix]


BUILDERS = {
    "reparameterized": reparameterized,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
PACKAGES = {"onnxruntime": FORMATS["onnx"].packages, "openvino": FORMATS["openvino"].packages}


def missing_packages(name: str) -> list[str]:
    """Of an engine's name, or of an exported file."""
    is_file = name not in BUILDERS and Path(name).is_file()
    packages = FORMATS[format_of(Path(name))].packages if is_file else PACKAGES.get(name, ())
    return [package for package in packages if find_spec(package) is None]


def build_engine(
    name: str,
    model: nn.Module,
    config,
    device: torch.device,
    amp: torch.dtype | None,
    images: int,
    batch: int,
    note: Callable[[str], object],
) -> nn.Module:
    """The engine of a name; the model itself for "torch".

    Args:
        name: one of `config.ENGINES`, or an exported file.
        model: in evaluation mode, on the device.
        amp: the dtype of mixed precision, or None.
        images: that it will be given in all, for "auto".
        batch: the most that it will be given at a time.
        note: is told, in a line, which engine was chosen, or why one was not.

    Raises:
        UserError: it cannot be used here, or computes something else than the model.
    """
    reason = cannot(name, config, device, amp)
    if name == "torch" or (name == "auto" and (reason or images < FEW_IMAGES)):
        return model
    if reason:
        raise UserError(f"--engine {name}: {reason}")
    height, width = image_size(config)
    part = max(1, min(batch, PART_PIXELS // (height * width)))
    probe = random_images(config, device)
    logits(model, probe[:1])  # the first call takes longer
    started = time.perf_counter()
    expected = logits(model, probe)
    seconds = (time.perf_counter() - started) * images / CHECKED
    candidates = [name] if name != "auto" else [each for each, least in AUTO.items() if seconds > least]
    remarks = []
    for each in candidates:
        if missing := missing_packages(each):
            if name == each:
                raise UserError(f"--engine {name}: needs {', '.join(missing)}: pip install -r requirements/export.txt")
            remarks.append(f"{each} is not installed (requirements/export.txt)")
            continue
        try:
            with quiet():
                engine = BUILDERS.get(each, partial(from_file, Path(each)))(model, probe, part)
                error = relative_difference(logits(engine, probe), expected)
            if not error <= TOLERANCE:  # NaN included
                raise UserError(f"its logits differ from the model's by {error:.2g} of the largest")
        except Exception as failure:  # exporters and engines raise anything
            problem = str(failure) if isinstance(failure, UserError) else first_line(failure)
            if name == each:
                raise UserError(
                    f"--engine {name}: cannot be used for {config.MODEL.NAME}: {problem}; accepted: auto, torch, "
                    "another engine, or a file of this model that was exported without --normalize"
                ) from failure
            remarks.append(f"{each} cannot be used: {problem}")
            continue
        note("; ".join([f"engine: {each}, logits within {error:.1g} of the model's", *remarks]))
        return engine
    if remarks:
        note("; ".join(["engine: torch", *remarks]))
    return model


def cannot(name: str, config, device: torch.device, amp: torch.dtype | None) -> str:
    """Why an engine other than PyTorch's eager one cannot be used, or nothing."""
    if config.TRAIN.COMPILE:
        return "TRAIN.COMPILE is True, which compiles the model itself; accepted with it: torch"
    if device.type != "cpu" and name != "reparameterized":
        return f"computes on the CPU, but the device is {device.type}; accepted here: torch, reparameterized"
    if amp and name != "reparameterized":
        given = str(amp).removeprefix("torch.")
        return f"computes in float32, but AMP gives {given}; accepted with it: torch, reparameterized"
    return ""


def random_images(config, device: torch.device) -> Tensor:
    """A few, normalised, always the same."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (CHECKED, 3, *image_size(config)), dtype=torch.uint8, generator=generator)
    return build_normalize(config, device)(pixels.to(device)).contiguous()


@torch.inference_mode()
def logits(engine: nn.Module, images: Tensor) -> Tensor:
    return engine(images)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest logit; NaN if there is one among them."""
    if found.shape != expected.shape:
        raise UserError(f"it gives {list(found.shape)} logits for {len(expected)} images, not {list(expected.shape)}")
    return ((found - expected).abs().max() / expected.abs().max()).item()
