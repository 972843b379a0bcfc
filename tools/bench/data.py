"""How fast images come: per image and part, from the loader alone, and as seen by a training step."""

import argparse
import contextlib
import io
import json
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image, features
from tables import markdown
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from bench.options import CPU_BATCH, cores, parse_data_args
from config import ConfigError, image_size, load_config
from data import build_batch_transform, build_mixup, build_train_loader
from data.dataset import Sample
from data.decoding import IMAGE_FORMATS
from data.sources import FolderSource, Source
from data.transforms import SMALL_IMAGE, RandomResizedCrop, build_transform
from engine.evaluate import autocast, resolve_amp
from models import build_model, idle_keys
from optimizer import build_optimizer
from runtime.distributed import World, init_world
from utils import UserError, seed_all, writing_to

# (width, height) of the images that are made: ImageNet's most frequent size, and what cameras and phones give after a
# first reduction. The loader is measured with the first.
SIZES = ((500, 375), (1500, 1000))
LARGE_IMAGES = 8  # of the second size, one for so many of the first
PARTS = ("read, decode", "crop, resize, flip", "augment", "tensor")


class Spread(NamedTuple):
    """Of a part's milliseconds per image."""

    median: float
    quartile1: float
    quartile3: float
    mean: float


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def photograph(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours with some texture and noise, which JPEG compresses about as much as it does a photograph."""
    image = np.zeros((height, width, 3))
    for cells, amplitude in ((4, 70), (16, 30), (64, 12)):
        for channel in range(3):
            noise = generator.normal(size=(cells * height // width + 2, cells + 2)).astype(np.float32)
            smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            image[..., channel] += amplitude * np.asarray(smooth)
    image += generator.normal(scale=8, size=(height, width, 1))
    return Image.fromarray((image + 128).clip(0, 255).astype(np.uint8))


def write_photographs(root: Path, count: int, size: tuple[int, int]) -> Path:
    """An image folder of two classes with `count` JPEGs of quality 90 in all; two at least."""
    generator = np.random.default_rng(0)
    for i in range(max(count, 2)):
        path = root / "train" / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(generator, *size).save(path, quality=90)
    return root


class Repeated(Source):
    """The samples `chosen` of a source over and over, `length` in all, so that an epoch outlasts a measurement."""

    def __init__(self, source: Source, chosen: Sequence[int], length: int):
        self.source, self.chosen = source, chosen
        self.classes = source.classes
        self.targets = np.resize(source.targets[np.asarray(chosen)], length)

    def _index(self, index: int) -> int:
        return self.chosen[index % len(self.chosen)]

    def load(self, index: int) -> Image.Image:
        return self.source.load(self._index(index))

    def name(self, index: int) -> str:
        return self.source.name(self._index(index))

    def cache(self, indices: Iterable[int]) -> None:
        self.source.cache({self._index(index) for index in indices})


def evenly(source: Source, most: int) -> list[int]:
    """At most that many samples, evenly spread over its classes."""
    count = min(most, len(source))
    return [i * len(source) // count for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


class Pipeline:
    """One way from a file to a tensor, as the four PARTS: Pillow's, with everything else as the loaders have it."""

    name = "Pillow"

    def __init__(self, config, source: FolderSource):
        self.source = source
        crop, *others, _ = build_transform(config, is_train=True).transforms
        self.crop = RandomResizedCropAndInterpolation(crop.size, crop.scale, crop.ratio, config.DATA.INTERPOLATION)
        flips = [step for step in others if isinstance(step, transforms.RandomHorizontalFlip)]
        self.flip = transforms.Compose(flips)
        self.augment = transforms.Compose([step for step in others if step not in flips])
        self.tensor = transforms.PILToTensor()

    def load(self, index: int) -> Any:
        return self.source.load(index)

    def resized_crop(self, image: Any) -> Image.Image:
        return self.crop(image)

    def parts(self) -> Iterator[Callable[[Any], Any]]:
        """Each takes what the one before gave; the first, an index."""
        yield self.load
        yield lambda image: self.flip(self.resized_crop(image))
        yield self.augment
        yield self.tensor


class PyTorchResize(Pipeline):
    name = "Pillow, resized by PyTorch"

    def __init__(self, config, source: FolderSource):
        super().__init__(config, source)
        self.crop = RandomResizedCrop(self.crop.size, self.crop.scale, self.crop.ratio, config.DATA.INTERPOLATION)
        self.crop.by_torch = True


class NormalizedFloats(Pipeline):
    """With what the device does otherwise; four bytes per value instead of one."""

    name = "Pillow, normalised and erased in the loader"

    def __init__(self, config, source: FolderSource):
        super().__init__(config, source)
        steps = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        aug = config.AUG
        steps += [RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device="cpu")]
        self.tensor = transforms.Compose(steps)


class Torchvision(Pipeline):
    """Tensors from the decoder to the crop, and an image for what timm augments. The decoder is deprecated since
    torchvision 0.29."""

    name = "torchvision"

    def load(self, index: int) -> torch.Tensor:
        encoded = bytearray(self.source.read(index))
        return torchvision.io.decode_image(
            torch.frombuffer(encoded, dtype=torch.uint8), torchvision.io.ImageReadMode.RGB
        )

    def resized_crop(self, image: torch.Tensor) -> Image.Image:
        box = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        resized = TF.resized_crop(image, *box, self.crop.size, drawn_method(self.crop), antialias=True)
        return Image.fromarray(resized.permute(1, 2, 0).numpy())


class Draft(Pipeline):
    """JPEGs decoded at a half, a quarter or an eighth of their size where the crop keeps at least the pixels that it is
    resized to. Its pixels are not those of the recipe: the decoder's reduction is no bicubic filter."""

    name = "Pillow, JPEG draft"

    def load(self, index: int) -> tuple[Image.Image, tuple[float, ...]]:
        with Image.open(io.BytesIO(self.source.read(index)), formats=IMAGE_FORMATS) as image:
            top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            full = image.width
            reduction = min(width // self.crop.size[1], height // self.crop.size[0])
            if reduction > 1:
                image.draft("RGB", (image.width // reduction, image.height // reduction))
            scale = image.width / full
            box = (left * scale, top * scale, (left + width) * scale, (top + height) * scale)
            image = image.convert("RGB")
        return image, (*box[:2], min(box[2], image.width), min(box[3], image.height))

    def resized_crop(self, image: tuple[Image.Image, tuple[float, ...]]) -> Image.Image:
        image, box = image
        method = transforms.functional.pil_modes_mapping[drawn_method(self.crop)]
        return image.resize(self.crop.size[::-1], method, box)


PIPELINES = [Pipeline, PyTorchResize, Draft, NormalizedFloats]
if hasattr(torchvision.io, "decode_image"):
    PIPELINES.insert(2, Torchvision)


def drawn_method(crop: RandomResizedCropAndInterpolation) -> InterpolationMode:
    """As timm's crop draws it."""
    methods = crop.interpolation
    return random.choice(methods) if isinstance(methods, tuple | list) else methods


def measure_parts(config, source: FolderSource, chosen: Sequence[int], seconds: float) -> dict[str, dict[str, Spread]]:
    """By pipeline and part, and as "whole", milliseconds per image over at least one pass over the samples `chosen`,
    and as many as begin within so many seconds. Images that one of them cannot read are left out.

    Raises:
        UserError: that is all of them.
    """
    pipelines = [kind(config, source) for kind in PIPELINES]
    taken: dict[str, list[list[float]]] = defaultdict(list)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    ends, i = time.perf_counter() + seconds, 0
    while i < len(chosen) or (taken and time.perf_counter() < ends):
        # Each goes first in turn: it finds the caches cold.
        order = [pipelines[(i + shift) % len(pipelines)] for shift in range(len(pipelines))]
        try:
            found = {
                pipeline.name: time_of_parts(pipeline, chosen[i % len(chosen)], (config.SEED, i)) for pipeline in order
            }
        except (OSError, RuntimeError):
            found = {}
        for name, milliseconds in found.items():
            taken[name].append([*milliseconds, sum(milliseconds)])
        i += 1
    torch.set_num_threads(threads)
    if not taken:
        raise UserError(f"none of {len(chosen)} images can be read, {source.name(chosen[0])} first")
    return {
        pipeline.name: {
            part: spread(values)
            for part, values in zip((*PARTS, "whole"), zip(*taken[pipeline.name], strict=True), strict=True)
        }
        for pipeline in pipelines
    }


def time_of_parts(pipeline: Pipeline, index: int, seed: tuple[int, ...]) -> list[float]:
    """Milliseconds of each of PARTS."""
    seed_all(*seed, cuda=False)
    milliseconds, value = [], index
    for part in pipeline.parts():
        started = time.perf_counter()
        value = part(value)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return milliseconds


def spread(values: Sequence[float]) -> Spread:
    quartile1, median, quartile3 = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, quartile1, quartile3, statistics.fmean(values))


# ---------------------------------------------------------------------------------------------------------------------
# The loader, alone and with a step
# ---------------------------------------------------------------------------------------------------------------------


def with_workers(config, workers: int):
    """The config with so many loader processes."""
    config = config.clone()
    config.defrost()
    config.DATA.NUM_WORKERS = workers
    return config


class Feed(NamedTuple):
    """What a loader gave over a while."""

    images: int
    seconds: float
    waited: float  # of the seconds, for the loader


def feed(config, source: Source, world: World, workers: int, seconds: float, step: Callable[[Sample], None]) -> Feed:
    """Takes batches from a training loader, each followed by `step`, until so many seconds have passed; at least two.

    Those that the loader prepares while it starts do not count.
    """
    loader = build_train_loader(with_workers(config, workers), source, world)
    warm_up = 1 + loader.num_workers * (loader.prefetch_factor or 0)
    images = epoch = done = 0
    waited = 0.0
    batches: Iterator[Sample] = iter(())
    started = time.perf_counter()
    while done < warm_up + 2 or time.perf_counter() - started < seconds:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            loader.sampler.set_epoch(epoch)
            epoch, batches = epoch + 1, iter(loader)
            batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
        images, done = images + len(batch.index), done + 1
        if done == warm_up:
            images, waited, started = 0, 0.0, time.perf_counter()
    return Feed(images, time.perf_counter() - started, waited)


def pause(images_per_second: float) -> Callable[[Sample], None]:
    """A step of that speed in which the processor is free."""
    return lambda batch: time.sleep(len(batch.index) / images_per_second)


def training_step(config, world: World) -> Callable[[Sample], None]:
    """Forward, backward and optimizer on a batch, with all that the engine does to it before; waits for the device."""
    model = build_model(config).to(world.device).train()
    optimizer = build_optimizer(config, model, config.TRAIN.WARMUP_LR)
    mixup = build_mixup(config, config.MODEL.NUM_CLASSES)
    transform = build_batch_transform(config, mixup, world.device)
    amp = resolve_amp(config, world.device)

    def step(batch: Sample) -> None:
        images = batch.image.to(world.device, non_blocking=True)
        images, targets = transform(images, batch.target.to(world.device, non_blocking=True))
        with autocast(world.device, amp):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if world.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def speed_of(step: Callable[[Sample], None], batch: Sample, seconds: float) -> float:
    """Images per second of a step with its batch at hand: the median of as many as begin within so many seconds; three
    at least, after one to warm up."""
    step(batch)
    taken: list[float] = []
    ends = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < ends:
        started = time.perf_counter()
        step(batch)
        taken.append(time.perf_counter() - started)
    return len(batch.index) / statistics.median(taken)


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, config, world: World, folders: dict[str, Path]) -> dict[str, Any]:
    """The content of the JSON file.

    Args:
        folders: image folders by a title; the loader is measured with the first.
    """
    result: dict[str, Any] = {"parts": {}, "loader": [], "waiting": []}
    sources = {title: FolderSource(folder / "train") for title, folder in folders.items()}
    for title, source in sources.items():
        print(f"parts: {title}", flush=True)
        chosen = evenly(source, args.images)
        parts = measure_parts(config, source, chosen, args.seconds)
        bytes_per_file = []
        for index in chosen:
            with contextlib.suppress(OSError):
                bytes_per_file.append(len(source.read(index)))
        result["parts"][title] = {
            "images": len(chosen),
            "kilobytes_per_file": statistics.fmean(bytes_per_file) / 1000,
            "milliseconds": {
                name: {part: values._asdict() for part, values in row.items()} for name, row in parts.items()
            },
        }

    source = next(iter(sources.values()))
    # 5,000 images/s and loader process are more than there is to be had.
    length = config.DATA.BATCH_SIZE * 2 + int(5000 * args.seconds * max(1, *args.workers))
    source = Repeated(source, evenly(source, args.images), length)
    for workers in args.workers:
        print(f"loader: {workers} workers", flush=True)
        found = feed(config, source, world, workers, args.seconds, lambda batch: None)
        speed = found.images / found.seconds
        result["loader"].append({"workers": workers, "images_per_second": speed, "per_worker": speed / max(1, workers)})

    if args.step_images_per_second:
        steps = [("pause", speed, pause(speed)) for speed in args.step_images_per_second]
    else:
        print(f"step: {config.MODEL.NAME} on {world.device.type}", flush=True)
        step = training_step(config, world)
        batch = next(iter(build_train_loader(with_workers(config, 0), source, world)))
        title = f"{config.MODEL.NAME} on {world.device.type}"
        steps = [(title, speed_of(step, batch, args.seconds), step)]
    for title, speed, step in steps:
        for workers in args.workers:
            print(f"waiting: a step of {speed:.4g} images/s, {workers} workers", flush=True)
            found = feed(config, source, world, workers, args.seconds, step)
            result["waiting"].append(
                {
                    "step": title,
                    "step_images_per_second": speed,
                    "workers": workers,
                    "images_per_second": found.images / found.seconds,
                    "data_wait": found.waited / found.seconds,
                }
            )
    return result


def machine(world: World) -> dict[str, Any]:
    """What was measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or no x86
        model = platform.processor() or platform.machine()
    return {
        "cpu": model,
        "cores": cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "libjpeg-turbo of pillow": features.version_feature("libjpeg_turbo") or "none",
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = result["machine"]
    default = (PyTorchResize if RandomResizedCrop.by_torch else Pipeline).name
    libraries = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = [
        "# Input pipeline\n",
        f"`{result['command']}`\n",
        f"{about['cores']} cores ({about['cpu']}, {about['instructions']}), GPU: {about['gpu'] or 'none'}; "
        f"{about['threads']} thread{'s' * (about['threads'] > 1)}; {libraries}; "
        f"{result['images_are']}.\n",
    ]
    for title, parts in result["parts"].items():
        rows = []
        for name, row in parts["milliseconds"].items():
            cells = [f"{row[part]['median']:.2f}" for part in PARTS]
            whole = row["whole"]
            between = f"{whole['median']:.2f} ({whole['quartile1']:.2f} to {whole['quartile3']:.2f})"
            shown = f"**{name}** (default here)" if name == default else name
            rows.append((shown, *cells, between, f"{whole['mean']:.2f}"))
        text += [
            f"## Milliseconds per image in one process: {title}, {parts['kilobytes_per_file']:.0f} kB per file\n",
            "Medians; of the whole also the quartiles and the mean, which augmentation makes larger.\n",
            markdown(("pipeline", *PARTS, "whole", "mean"), rows),
        ]
    rows = [(row["workers"], f"{row['images_per_second']:.0f}", f"{row['per_worker']:.0f}") for row in result["loader"]]
    text += ["## The loader alone\n", markdown(("workers", "images/s", "per process"), rows)]
    rows = [
        (
            row["step"],
            f"{row['step_images_per_second']:.4g}",
            row["workers"],
            f"{row['images_per_second']:.4g}",
            f"{100 * row['data_wait']:.1f} %",
        )
        for row in result["waiting"]
    ]
    titles = ("step", "its images/s", "workers", "images/s with the loader", "of the time waiting for data")
    text += [f"## A step that waits for the loader, batch {result['batch_size']}\n", markdown(titles, rows)]
    return "\n".join(text)


def read_config(args: argparse.Namespace):
    """The config of an image folder, whatever data set the file names, that the tool may change."""
    fixed = {"DATA.DATASET": "imagenet", "DATA.ZIP_MODE": False, "DATA.CACHE_MODE": "no"}
    overrides = [(key, value, "benchmark.py --data") for key, value in fixed.items()]
    if args.batch_size:
        overrides.append(("DATA.BATCH_SIZE", args.batch_size, "--batch-size"))
    config, notes = load_config(args.cfg, args.opts, overrides, idle_keys)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if max(image_size(config)) <= SMALL_IMAGE:
        raise ConfigError(
            f"{args.cfg}: DATA.IMG_SIZE is {config.DATA.IMG_SIZE}, at which images are not cropped; accepted here: "
            f"more than {SMALL_IMAGE}"
        )
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = config.MODEL.NUM_CLASSES or 1000
    return config


def main(argv: Sequence[str]) -> None:
    args = parse_data_args(argv)
    config = read_config(args)
    world = init_world(config.DEVICE)
    if world.device.type == "cpu" and not args.batch_size and "DATA.BATCH_SIZE" not in args.opts:
        config.DATA.BATCH_SIZE = CPU_BATCH
    config.freeze()
    with writing_to(args.output.parent):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        if args.data_path:
            folders, kind = {f"{args.data_path}": args.data_path}, "images of that folder"
            if not (args.data_path / "train").is_dir():
                raise UserError(f"--data-path {args.data_path}: no folder train/ in it; accepted: one that has")
        else:
            kind = "photograph-like JPEGs of quality 90 made for this"
            print(f"no --data-path: making {args.images} {kind}", flush=True)
            folders = {
                f"{size[0]} x {size[1]} pixels": write_photographs(Path(temporary, str(size[0])), count, size)
                for size, count in zip(SIZES, (args.images, args.images // LARGE_IMAGES), strict=True)
            }
        result = {
            "command": shlex.join(["python", "tools/benchmark.py", "--data", *argv]),
            "machine": machine(world),
            "versions": versions(),
            "model": config.MODEL.NAME,
            "img_size": config.DATA.IMG_SIZE,
            "batch_size": config.DATA.BATCH_SIZE,
            "images_are": kind,
            **measure(args, config, world, folders),
        }
    text = report(result)
    with writing_to(args.output.parent):
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {args.output} and {args.output.with_suffix('.md')}")
