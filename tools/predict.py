"""Classify images with a trained model.

    python tools/predict.py output/strip_mlp_pico_digits/default/best.pth photo.jpg scans/
    python tools/predict.py released.pth photos/ --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --top-k 1
    find . -name '*.png' | python tools/predict.py best.pth - --format json > predictions.jsonl

Takes image files of any name, folders (with all below them, files named as images, in sorted order) and "-", which
reads such paths from standard input, one per line. Images are resized, normalised and computed as main_eval.py does.
--engine auto takes OpenVINO for many images on a CPU where it is installed; see docs/export.md.

text: a line per image: its path, then each class with its probability (0 to 1), by tabs.
json: JSON Lines, an object per image: {"file", "predictions": [{"class", "index", "probability"}, ...]}.
csv: a line per prediction: file, rank (from 1), class, index, probability.

A file that cannot be read as an image is named on standard error, and the others go on; in JSON its object has "error"
in place of "predictions", in text and CSV it is left out. The exit status is 0 if all images were classified, 1 if one
could not be read or on any other error, 2 for options that are not accepted.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import at_least

from config import add_checkpoint_arguments, add_engine_argument
from utils import UserError, parse_first, printable, run_entry_point


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", help='image files, folders, or "-" for a list of them on standard input')
    parser.add_argument("--top-k", type=at_least(1), default=5, metavar="N", help="classes per image (default: 5)")
    parser.add_argument("--format", choices=["text", "json", "csv"], default="text", help="(default: text)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, over what it holds (default: standard output)"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=64, metavar="N", help="images (default: 64)")
    parser.add_argument(
        "--workers", type=at_least(0), default=0, metavar="N", help="processes that read images (default: 0, this one)"
    )
    add_engine_argument(parser)
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
from engine.evaluate import resolve_amp
from engine.inference import build_engine
from engine.trained import Trained, load_trained
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


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    paths = find_paths(args.images)
    trained = with_engine(load_trained(args), args.engine, len(paths), args.batch_size)
    failures = 0
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if args.output:
            try:
                stream = stack.enter_context(open(args.output, "w", encoding="utf-8", newline=""))
            except OSError as error:
                raise UserError(f"--output {args.output}: cannot be written: {error.strerror}") from error
        if args.format == "csv":
            stream.write(csv_lines([("file", "rank", "class", "index", "probability")]))
        predictions = predict(trained, paths, args.top_k, args.batch_size, args.workers)
        # disable=None: a bar only where a person is watching. tqdm.write keeps it apart from what is on its screen.
        for prediction in tqdm(predictions, total=len(paths), unit="image", disable=None, dynamic_ncols=True):
            if prediction.error:
                failures += 1
                tqdm.write(f"cannot be read as an image: {prediction.error}", file=sys.stderr)
            tqdm.write(FORMATS[args.format](prediction), file=stream, end="")
    if failures:
        raise UserError(f"{failures} of {len(paths)} files cannot be read as images")


if __name__ == "__main__":
    run_entry_point(main)
