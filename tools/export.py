"""Export a trained model to ONNX, OpenVINO, a program of torch.export or a compiled package, and check that it computes
the same.

    python tools/export.py output/strip_mlp_pico_digits/default/best.pth --evaluate
    python tools/export.py best.pth --format torch --normalize --output model.pt2
    python tools/export.py best.pth --int8 --output model_int8.onnx --evaluate
    python tools/export.py best.pth --format openvino --output model.xml --evaluate
    python tools/export.py best.pth --format aoti --output model_compiled.pt2

openvino writes two files, NAME.xml and the weights in NAME.bin. aoti is a package that inductor compiles for processors
like this one, which takes minutes and a C++ compiler: torch._inductor.aoti_load_package runs it without the model's
code. It wants contiguous images, and does not check that they are.

The file takes batches of any size as `images` and gives `logits` (N, classes), float32. `images` are RGB, (N, 3, H, W):
float32, normalised as in training; with --normalize uint8, 0 to 255, which the file normalises itself. What it takes,
H and W, mean, std and the names of the classes are in the file: ONNX's metadata_props, OpenVINO's rt_info,
metadata.json in a program, get_metadata() of a compiled package.

Before the file gets its name, its logits for random images, of batch sizes 1 and 3, are compared with those of the
model itself in PyTorch: where they differ by more than --tolerance, nothing is written.

--int8 stores the weights of matrix products and of convolutions without groups as 8-bit integers, and computes those
in integers (ONNX Runtime's dynamic quantisation). The ONNX file that it is made from is checked as above. How much the
quantised one differs is printed, not judged: --evaluate shows what it costs.

--evaluate computes the validation images of the checkpoint's config (--opts DATA.DATA_PATH FOLDER, if they have moved)
by PyTorch and the exported files in turn: accuracy, and medians of milliseconds per image over the batches, all on the
CPU with as many threads as PyTorch has (OMP_NUM_THREADS).

Needs onnx, onnxscript and onnxruntime for ONNX, openvino for OpenVINO. The exit status is 0 if the file was written, 1
on any error, 2 for options that are not accepted.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import add_checkpoint_arguments, image_size
from utils import UserError, parse_first, require, run_entry_point, writing_to

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "aoti": ".pt2"}  # by --format


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="(default: onnx)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a name that ends in .onnx, .xml or .pt2; an existing file is replaced (default: the checkpoint's name "
        "beside it, if there is no such file)",
    )
    parser.add_argument("--normalize", action="store_true", help="the file takes uint8 images and normalises them")
    parser.add_argument(
        "--no-reparameterize",
        dest="reparameterize",
        action="store_false",
        help="without folding BatchNorms, position tables and chained fusions, which by default is done where the "
        "model has a reparameterize()",
    )
    parser.add_argument("--int8", action="store_true", help="quantise the ONNX file")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="D", help="accepted difference of logits (default: 1e-4)"
    )
    parser.add_argument("--evaluate", action="store_true", help="accuracy and speed on the validation data")
    args = parser.parse_args()
    if args.device == "cuda":
        parser.error("--device cuda: models are exported and checked on the CPU, for any device")
    if args.int8 and args.format != "onnx":
        parser.error("--int8 goes with --format onnx")
    suffix = SUFFIXES[args.format]
    if args.output and args.output.suffix != suffix:
        parser.error(f"--output {args.output}: accepted with --format {args.format}: a name that ends in {suffix}")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import torch
from tables import markdown
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

from data import build_eval_loader
from data.transforms import SMALL_IMAGE
from engine.exported import FORMATS, first_line, quiet
from engine.trained import Trained, load_trained
from runtime.distributed import World

TRACED_BATCH = 2  # torch.export would treat a size of 1 as a constant
CHECKED_BATCHES = (1, 3)


class NormalizedModel(nn.Module):
    """A model with its normalisation before it. Shape: uint8 (N, 3, H, W) -> (N, classes)."""

    def __init__(self, model: nn.Module, normalize: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))


@dataclass
class Form:
    """One way to compute the model.

    Attributes:
        run: uint8 images (N, 3, H, W) to logits (N, classes), normalisation included.
        path: its file, if it has one.
        difference: the largest from the model's logits for random images.
        hits: validation images that it classified rightly.
        seconds: per image, a number per batch.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    path: Path | None = None
    difference: float = 0.0
    hits: int = 0
    seconds: list[float] = field(default_factory=list)


def prepare(trained: Trained, reparameterize: bool, normalize: bool) -> nn.Module:
    """The module to export. The model itself is not changed."""
    model = trained.model
    if reparameterize:
        model = reparameterize_model(model)
    return NormalizedModel(model, trained.normalize).eval() if normalize else model


def random_images(size: tuple[int, int], batch: int) -> Tensor:
    """uint8 (batch, 3, H, W), always the same."""
    return torch.randint(256, (batch, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def numbers(values: Tensor) -> str:
    """Numbers as JSON, with the six digits that float32 has."""
    return json.dumps([round(value, 6) for value in values.flatten().tolist()])


def metadata(trained: Trained, reparameterized: bool, normalize: bool) -> dict[str, str]:
    """What a user of the file must know; lists as JSON."""
    (height, width), classes, config = image_size(trained.config), len(trained.classes), trained.config
    values = (
        "uint8, RGB from 0 to 255"
        if normalize
        else "float32, RGB from 0 to 255 divided by 255, less mean, divided by std"
    )
    return {
        "model": config.MODEL.NAME,
        "input": f"images (N, 3, {height}, {width}), {values}",
        "output": f"logits (N, {classes}), float32, without softmax",
        "image_size": json.dumps([height, width]),
        "preprocessing": preprocessing(trained.config),
        "mean": numbers(trained.normalize.mean),
        "std": numbers(trained.normalize.std),
        "classes": json.dumps(trained.classes),
        "normalizes": json.dumps(normalize),
        "reparameterized": json.dumps(reparameterized),
    }


def preprocessing(config) -> str:
    """What evaluation does to an image of any size, before the normalisation (data/transforms.py)."""
    (height, width), method = image_size(config), config.DATA.INTERPOLATION
    method = "bicubic" if method == "random" else method
    if max(height, width) <= SMALL_IMAGE or not config.TEST.CROP:
        return f"resize to {height} x {width} (height x width), {method}, as Pillow does"
    cover = f"{int(256 / 224 * height)} x {int(256 / 224 * width)}"
    return f"resize, keeping the ratio, to cover {cover} (height x width), {method}, as Pillow does; crop the centre"


def quantize(source: Path, path: Path) -> None:
    """Writes an ONNX file with matrix products, and convolutions without groups, in 8-bit integers."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        # Folds what is computed from weights alone: only stored weights can be quantised. (Some versions of ONNX
        # Runtime's quant_pre_process lose their file if this is all they are asked to do.)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        model = onnx.load(path)
        # These are from before folding; the quantiser would reject them as contradictions.
        model.graph.ClearField("value_info")
        # ONNX Runtime computes convolutions in groups (strips, depthwise) slower in integers than in float32.
        grouped = [
            node.name
            for node in model.graph.node
            if any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        ]
        # Unsigned: convolutions with signed weights take three times as long, and may overflow without VNNI.
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            nodes_to_exclude=grouped,
            weight_type=QuantType.QUInt8,
        )


@contextmanager
def exporting(name: str, form: str):
    """Inside, writing a format does not warn, and its errors become UserErrors."""
    try:
        with quiet():
            yield
    except OSError:  # the disk's
        raise
    except Exception as error:  # exporters raise anything
        others = " or ".join(f"--format {other}" for other in FORMATS if other != form)
        raise UserError(
            f"torch {torch.__version__} cannot export {name} with --format {form} ({first_line(error)}); "
            f"accepted: {others}, or newer versions of torch and of requirements/export.txt"
        ) from error


@torch.inference_mode()
def largest_difference(one: Form, other: Form, size: tuple[int, int]) -> float:
    """Between their logits for random images, in batches of several sizes; NaN if there is one among them."""
    batches = [random_images(size, batch) for batch in CHECKED_BATCHES]
    return torch.stack([(one.run(images) - other.run(images)).abs().max() for images in batches]).max().item()


@torch.inference_mode()
def evaluate(trained: Trained, forms: Sequence[Form]) -> int:
    """Fills in hits and seconds of the forms from the validation data, each batch computed by all of them in an order
    that rotates. Unreadable images count as wrong.

    Returns:
        The number of images.
    """
    source = trained.validation_source()
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    loader = build_eval_loader(trained.config, source, world)
    for number, batch in enumerate(tqdm(loader, desc="evaluation", leave=False, disable=None)):
        if number == 0:
            for form in forms:  # the first call takes longer
                form.run(batch.image)
        first = number % len(forms)
        for form in [*forms[first:], *forms[:first]]:
            started = time.perf_counter()
            logits = form.run(batch.image)
            form.seconds.append((time.perf_counter() - started) / len(logits))
            form.hits += int(((logits.argmax(dim=1) == batch.target) & batch.readable).sum())
    return len(source)


def export(trained: Trained, output: Path, args: argparse.Namespace) -> str:
    """Writes the file `output`, checked; with --evaluate, evaluates it first.

    Returns:
        A table of what was compared.

    Raises:
        UserError: it cannot be exported or written, or computes something else.
    """
    size = image_size(trained.config)
    form = FORMATS[args.format]
    before = (lambda images: images) if args.normalize else (lambda images: trained.normalize(images).contiguous())

    def loaded(path: Path) -> Callable[[Tensor], Tensor]:
        run = form.load(path)
        return lambda images: run(before(images))

    forms = [Form("PyTorch", lambda images: trained.model(trained.normalize(images)))]
    bar = tqdm(total=3 + args.int8, leave=False, disable=None)
    with bar, writing_to(output.parent), TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        bar.set_description("export")
        path = Path(folder, f"exported{output.suffix}")
        model = prepare(trained, args.reparameterize, args.normalize)
        properties = metadata(trained, args.reparameterize, args.normalize)
        images = before(random_images(size, TRACED_BATCH))
        with exporting(trained.config.MODEL.NAME, args.format):
            form.write(model, images, path, properties)
        bar.update()

        bar.set_description("check")
        exported = Form(form.title, loaded(path), path)
        exported.difference = largest_difference(exported, forms[0], size)
        if not exported.difference <= args.tolerance:  # NaN included
            raise UserError(
                f"{output}: not written, because its logits differ by {exported.difference:.3g} from PyTorch's; "
                f"accepted: --tolerance {args.tolerance:g}" + ", or try --no-reparameterize" * args.reparameterize
            )
        forms.append(exported)
        bar.update()

        if args.int8:
            bar.set_description("quantise")
            path = Path(folder, f"quantised{output.suffix}")
            quantize(exported.path, path)
            quantised = Form(f"{form.title}, int8", loaded(path), path)
            quantised.difference = largest_difference(quantised, forms[0], size)
            forms.append(quantised)
            bar.update()

        report = table(forms, evaluate(trained, forms) if args.evaluate else 0)
        for written, final in zip(files_of(path), files_of(output), strict=True):
            os.replace(written, final)
    return report


def files_of(path: Path) -> list[Path]:
    """The files of what is exported as `path`, which is the last: OpenVINO keeps the weights in one of their own."""
    return [path.with_suffix(".bin"), path] if path.suffix == SUFFIXES["openvino"] else [path]


def mebibytes(path: Path) -> float:
    """The size of what is exported as `path`."""
    return sum(file.stat().st_size for file in files_of(path)) / 2**20


def table(forms: Sequence[Form], evaluated: int) -> str:
    """A table of the forms.

    Args:
        evaluated: images of the evaluation; 0 without one.
    """
    titles = ["computed by", "file, MiB", "largest difference of logits"]
    titles += [f"top-1 of {evaluated} images, %", "ms per image", "times as fast"] if evaluated else []
    rows = []
    for form in forms:
        row = [form.name, f"{mebibytes(form.path):.2f}" if form.path else ""]
        row.append(f"{form.difference:.2g}" if form.path else "")
        if evaluated:
            ratios = [reference / own for own, reference in zip(form.seconds, forms[0].seconds, strict=True)]
            row += [f"{100 * form.hits / evaluated:.2f}", f"{1000 * statistics.median(form.seconds):.3g}"]
            row.append(f"{statistics.median(ratios):.2f}")
        rows.append(row)
    return markdown(titles, rows)


def main() -> None:
    args = parse_args()
    require(*FORMATS[args.format].packages, extra="export")
    args.device = "cpu"
    output = args.output or args.checkpoint.with_suffix(SUFFIXES[args.format])
    for file in files_of(output):
        if file.exists() and file.samefile(args.checkpoint):
            raise UserError(f"{output}: would be written over the checkpoint {file}; accepted: another --output")
        # A .bin without its .xml is somebody's checkpoint.
        is_other = file.suffix == ".bin" and not output.exists()
        if file.exists() and (not args.output or is_other):
            how = "accepted: another --output" if is_other else f"to replace it, name it: --output {output}"
            raise UserError(f"{file}: is there already; {how}")
    trained = load_trained(args)
    print(export(trained, output, args), end="")
    print(f"\n{output}")


if __name__ == "__main__":
    run_entry_point(main)
