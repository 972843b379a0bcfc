"""Classify images with a trained model, or find objects in them with a trained detector.

    python tools/predict.py output/strip_mlp_pico_digits/default/best.pth photo.jpg scans/
    python tools/predict.py released.pth photos/ --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --top-k 1
    find . -name '*.png' | python tools/predict.py best.pth - --format json > predictions.jsonl
    python tools/predict.py output/strip_mlp_pico/retinanet/best.pth photos/ --draw drawn --coco found.json

Takes image files of any name, folders (with all below them, files named as images, in sorted order) and "-", which
reads such paths from standard input, one per line. Images are resized, normalised and computed as main_eval.py does.
--engine auto takes OpenVINO for many images on a CPU where it is installed; see docs/export.md.

text: a line per image: its path, then each class with its probability (0 to 1), by tabs.
json: JSON Lines, an object per image: {"file", "predictions": [{"class", "index", "probability"}, ...]}.
csv: a line per prediction: file, rank (from 1), class, index, probability.

A checkpoint of main_detect.py finds objects. They have a score in place of a probability, and a box: left, top, right
and bottom in pixels of the image. In JSON, "objects" are in place of "predictions". Photographs are turned as their
EXIF orientation says.

A file that cannot be read as an image is named on standard error, and the others go on; in JSON its object has "error"
in place of "predictions", in text and CSV it is left out. The exit status is 0 if all images were classified, 1 if one
could not be read or on any other error, 2 for options that are not accepted.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import at_least, within

from config import add_checkpoint_arguments, add_engine_argument
from utils import UserError, parse_first, printable, run_entry_point


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", help='image files, folders, or "-" for a list of them on standard input')
    parser.add_argument(
        "--top-k", type=at_least(1), metavar="N", help="classes per image (default: 5), or objects (default: all)"
    )
    parser.add_argument("--format", choices=["text", "json", "csv"], default="text", help="(default: text)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, over what it holds (default: standard output)"
    )
    parser.add_argument("--batch-size", type=at_least(1), metavar="N", help="images (default: 64; for a detector: 8)")
    parser.add_argument(
        "--workers", type=at_least(0), default=0, metavar="N", help="processes that read images (default: 0, this one)"
    )
    add_engine_argument(parser)
    boxes = parser.add_argument_group("detectors only")
    boxes.add_argument(
        "--min-score", type=within(0, 1), metavar="X", help="objects to show; --coco has all (default: 0.3)"
    )
    boxes.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="write the images with their boxes into a new folder"
    )
    boxes.add_argument(
        "--coco", type=Path, metavar="FILE", help="write all that is found as COCO's results, over what it holds"
    )
    boxes.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="COCO's annotations, whose numbers of images and categories --coco is to have (default: 1, 2, ... in the "
        "order of the images and of the classes)",
    )
    return parser.parse_intermixed_args()  # options may stand between the images


if __name__ == "__main__":
    parse_first(parse_args)

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.decoding import Decoder, build_decoder
from data.listing import find_images
from data.sources import read_file
from detection import files
from detection.task import is_detector
from detection.trained import load_detector
from engine.evaluate import resolve_amp
from engine.inference import build_engine
from engine.trained import Trained, load_trained
from runtime.checkpoint import read_checkpoint
from runtime.signals import ignore_signals


@dataclass
class Prediction:
    """Of one image.

    Attributes:
        classes: (name, label, probability) of the likeliest, best first.
        error: why there are no predictions.
    """

    path: str
    classes: Sequence[tuple[str, int, float]] = ()
    error: str = ""


class ImageFiles(Dataset):
    """Image files, transformed: (path, pixels (3, S, S), "") or, of one that cannot be read, (path, None, reason)."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor], decoder: Decoder):
        self.paths, self.transform, self.decoder = paths, transform, decoder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        path = self.paths[index]
        try:
            return path, self.transform(self.decoder(read_file(path), printable(path))), ""
        except OSError as error:
            # The system's errors come with a number, and their path not always printable.
            return path, None, f"{printable(path)}: {error.strerror}" if error.strerror else str(error)


def find_paths(arguments: Sequence[str]) -> list[str]:
    """The image files that arguments name, in their order; see the top of this file.

    Raises:
        UserError: a folder without images, nothing at all, or standard input that is no list.
    """
    named = [path for argument in arguments for path in (read_list() if argument == "-" else [argument])]
    if not named:
        raise UserError("standard input is empty; accepted: paths of images, one per line")
    paths = []
    for path in named:
        found = find_images(path) if os.path.isdir(path) else [path]
        if not found:
            raise UserError(f"{printable(path)}: no images in this folder; accepted: {', '.join(IMG_EXTENSIONS)}")
        paths += found
    return paths


def read_list() -> list[str]:
    """The lines of standard input."""
    text = sys.stdin.buffer.read()
    if b"\0" in text:
        raise UserError("standard input is no text; accepted: paths of images, one per line")
    return [os.fsdecode(line) for line in text.splitlines() if line]


def predict(
    trained: Trained, paths: Sequence[str], top_k: int = 5, batch_size: int = 64, workers: int = 0
) -> Iterator[Prediction]:
    """The `top_k` likeliest classes of each image file, in order."""
    dataset = ImageFiles(paths, trained.transform, build_decoder(trained.config))
    options = {"num_workers": workers, "worker_init_fn": ignore_signals}
    for batch in DataLoader(dataset, batch_size, collate_fn=list, **options):
        images = [pixels for _, pixels, _ in batch if pixels is not None]
        rows: Iterator = iter(())
        if images:
            scores = trained.logits(torch.stack(images)).softmax(dim=1).cpu()
            top = scores.topk(min(top_k, scores.shape[1]))
            rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        for path, pixels, error in batch:
            if pixels is None:
                yield Prediction(path, error=error)
                continue
            labels, values = next(rows)
            names = [trained.classes[label] for label in labels]
            yield Prediction(path, list(zip(names, labels, values, strict=True)))


def with_engine(trained: Trained, name: str, images: int, batch_size: int) -> Trained:
    """The same, with the model computed by the engine of that name; a note on standard error says which is chosen.

    Raises:
        UserError: it cannot be used.
    """
    config, device = trained.config, trained.device
    amp = resolve_amp(config, device)
    note = lambda text: print(f"note: {text}", file=sys.stderr)  # noqa: E731
    return replace(trained, model=build_engine(name, trained.model, config, device, amp, images, batch_size, note))


def as_text(prediction: Prediction) -> str:
    if prediction.error:
        return ""
    classes = (f"{name} {value:.4f}" for name, _, value in prediction.classes)
    return "\t".join([printable(prediction.path), *classes]) + "\n"


def as_json(prediction: Prediction) -> str:
    if prediction.error:
        return json.dumps({"file": prediction.path, "error": prediction.error}) + "\n"
    classes = [
        {"class": name, "index": label, "probability": round(value, 6)} for name, label, value in prediction.classes
    ]
    return json.dumps({"file": prediction.path, "predictions": classes}) + "\n"


def as_csv(prediction: Prediction) -> str:
    path = printable(prediction.path)
    rows = [(path, rank, *columns[:2], f"{columns[2]:.6f}") for rank, columns in enumerate(prediction.classes, 1)]
    return csv_lines(rows)


def csv_lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


FORMATS = {"text": as_text, "json": as_json, "csv": as_csv}


def opened(path: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    """The file that --output names, to write to; standard output if it names none."""
    if path is None:
        return contextlib.nullcontext(sys.stdout)
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror}") from error


def classify(args: argparse.Namespace, content: Mapping, paths: Sequence[str]) -> Iterator[tuple[Prediction, str]]:
    """Each image's prediction, and it in the chosen format."""
    for option in ("min_score", "draw", "coco", "annotations"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise UserError(f"--{name} is for detectors, but {args.checkpoint} is of a classifier")
    trained = with_engine(load_trained(args, content), args.engine, len(paths), args.batch_size or 64)
    for prediction in predict(trained, paths, args.top_k or 5, args.batch_size or 64, args.workers):
        yield prediction, FORMATS[args.format](prediction)


def detect(args: argparse.Namespace, content: Mapping, paths: Sequence[str]) -> Iterator[tuple[files.Found, str]]:
    """What is found in each image, and it in the chosen format. Writes the files that --draw and --coco name."""
    if args.engine not in ("auto", "torch"):
        raise UserError(f"--engine {args.engine}: {args.checkpoint} is of a detector; accepted: torch")
    if args.annotations and not args.coco:
        raise UserError("--annotations goes with --coco")
    detector = load_detector(args, content)
    ids, sizes = list(range(1, len(paths) + 1)), [None] * len(paths)
    category_ids = list(range(1, len(detector.classes) + 1))
    if args.annotations:
        annotations = files.Annotations(args.annotations, detector.classes)
        ids, sizes = zip(*map(annotations.of, paths), strict=True)
        category_ids = annotations.category_ids
    if args.draw:
        files.prepare_folder(args.draw)
    if args.coco:
        write_coco(args.coco, "", "a")  # what it holds is replaced at the end
    formats = {"text": files.as_text, "json": files.as_json, "csv": lambda found: csv_lines(files.as_rows(found))}
    results: list[dict] = []
    found = files.find(detector, paths, sizes, args.batch_size or 8, args.workers)
    for every, image_id, size in zip(found, ids, sizes, strict=True):
        results += files.as_coco(every, image_id, category_ids)
        shown = every.at_least(0.3 if args.min_score is None else args.min_score, args.top_k)
        if args.draw and not shown.error:
            files.save_picture(shown, args.draw, detector.decoder, size)
        yield shown, formats[args.format](shown)
    if args.coco:
        write_coco(args.coco, json.dumps(results))


def write_coco(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"--coco {path}: cannot be written: {error.strerror}") from error


HEADERS = {classify: ("file", "rank", "class", "index", "probability"), detect: files.CSV_HEADER}


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    paths = find_paths(args.images)
    content = read_checkpoint(args.checkpoint)
    run = detect if is_detector(content) else classify
    predictions = run(args, content, paths)
    first = next(predictions)  # loads the model, before anything is written
    failures = 0
    with opened(args.output) as stream:
        if args.format == "csv":
            stream.write(csv_lines([HEADERS[run]]))
        predictions = itertools.chain([first], predictions)
        # disable=None: a bar only where a person is watching. tqdm.write keeps it apart from what is on its screen.
        for prediction, text in tqdm(predictions, total=len(paths), unit="image", disable=None, dynamic_ncols=True):
            if prediction.error:
                failures += 1
                tqdm.write(f"cannot be read as an image: {prediction.error}", file=sys.stderr)
            tqdm.write(text, file=stream, end="")
    if failures:
        raise UserError(f"{failures} of {len(paths)} files cannot be read as images")


if __name__ == "__main__":
    run_entry_point(main)
