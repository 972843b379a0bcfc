"""Strip-MLP as the backbone of a detector: torchvision's RetinaNet or Faster R-CNN finds digits on made canvases.

    python tools/detection_demo.py
    python tools/detection_demo.py --detector faster_rcnn --size 96 160 --output output/faster_rcnn
    python tools/detection_demo.py --checkpoint output/strip_mlp_pico_digits/default/best.pth --output output/fine_tuned

Canvases are drawn from scikit-learn's handwritten digits, 1 to 4 each, in random sizes and colours, on a background of
noise and of digits whose pixels are shuffled; those for validation from digits that training never sees. The detector's
average precision on them (COCO's, by pycocotools), before and after training, is printed beside what guessing gets.

Writes results.json, detections.png (some validation canvases with what was found) and detector.pth (weights, settings)
into --output, which may not have them yet. The same --seed and --threads give the same results on the same machine.
The exit status is 0 if they are written, 1 on an error, 2 for options that cannot be.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import platform
import shlex
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from number_options import above, at_least

from utils import UserError, parse_first, run_entry_point, seed_all, writing_to


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    count = at_least(1)
    add = parser.add_argument
    add("--detector", choices=["retinanet", "faster_rcnn"], default="retinanet", help="(retinanet)")
    add("--model", default="strip_mlp_pico", metavar="NAME", help="timm's name of the backbone (strip_mlp_pico)")
    add("--checkpoint", type=Path, metavar="FILE", help="of a classifier, to start its backbone from")
    add("--size", type=count, nargs="+", default=[128], metavar="N", help="side of a canvas, or height and width (128)")
    add("--digit-size", type=count, nargs=2, default=[20, 56], metavar=("MIN", "MAX"), help="in pixels (20 56)")
    add("--images", type=count, default=2000, metavar="N", help="canvases to train with (2000)")
    add("--val-images", type=count, default=300, metavar="N", help="canvases to evaluate with (300)")
    add("--epochs", type=count, default=10, metavar="N", help="(10)")
    add("--batch-size", type=count, default=16, metavar="N", help="canvases per step (16)")
    add("--lr", type=above(0), default=2e-3, metavar="X", help="peak learning rate of AdamW (0.002)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the canvases, weights and order; 0 or more (0)")
    add("--threads", type=count, metavar="N", help="of the CPU (PyTorch's default)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)")
    add("--output", type=Path, default=Path("output/detection_demo"), metavar="FOLDER", help="(output/detection_demo)")
    args = parser.parse_args(argv)
    if len(args.size) > 2:
        parser.error(f"argument --size: {len(args.size)} numbers; accepted: one, or height and width")
    args.size = tuple(args.size * 2)[:2]
    if not args.digit_size[0] <= args.digit_size[1] <= min(args.size):
        parser.error(
            f"argument --digit-size: {args.digit_size[0]} {args.digit_size[1]}; accepted: two sizes in ascending order "
            f"of at most {min(args.size)} pixels, the shorter side of --size"
        )
    if args.images < args.batch_size:
        parser.error(f"argument --images: {args.images}; accepted: at least --batch-size, {args.batch_size}")
    return args


if __name__ == "__main__":
    parse_first(parse_args, "matplotlib", "pycocotools", extra="detection")

import numpy as np
import timm
import torch
import torch.nn.functional as F
from bench.report import commit, cpu_name
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image
from plot_metrics import SECOND_COLOR
from tables import markdown
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from tqdm import tqdm

import models  # noqa: F401  (registers the variants with timm)
from data import digit_sources
from data.sources import Source
from runtime.checkpoint import load_weights, read_checkpoint, save_checkpoint

FILES = ("results.json", "detections.png", "detector.pth")
MOST_DIGITS = 4  # on a canvas
SCRAMBLED_DIGITS = 2
INK = 0.25  # a pixel of at least this opacity is part of a digit, and of its box
TRIES = 10  # to find room for a digit
FPN_CHANNELS = 64
SHOWN_CANVASES = 8
SHOWN_SCORE = 0.5
TRUTH_COLOR = "white"
WEIGHT_DECAY = 0.05
CLIP_GRAD = 5.0

Target = dict[str, Tensor]


class DetectionBackbone(nn.Module):
    """A timm backbone under a feature pyramid (Lin et al., 2017), as torchvision's detectors take one.

    Args:
        body: a model made with `timm.create_model(name, features_only=True, img_size=(H, W), out_indices=...)`.
        out_channels: of every map of the pyramid.

    Attributes:
        strides: pixels of the image per pixel of each map.

    Shape: (N, 3, H, W) -> an ordered dictionary of maps "0", "1", ..., (N, out_channels, H / stride, W / stride).
    Strip-MLP's token mixing weights need images of exactly the size that the body was made for.
    """

    def __init__(self, body: nn.Module, out_channels: int = 256):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels)
        self.out_channels = out_channels
        self.strides = body.feature_info.reduction()

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.body(x))))


def retinanet(backbone: DetectionBackbone, num_classes: int, size: tuple[int, int]) -> RetinaNet:
    """RetinaNet (Lin et al., 2017) for images of (height, width) `size`.

    Args:
        num_classes: with the background, which is class 0.
    """
    # Three scales per octave as in the paper, from twice the stride on instead of four times: small objects.
    sizes = tuple(tuple(round(2 * stride * 2 ** (i / 3)) for i in range(3)) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, ((1.0, 2.0),) * len(sizes))
    # With group norms, as in torchvision's retinanet_resnet50_fpn_v2, because nothing here is pretrained.
    norm = partial(nn.GroupNorm, 16)
    head = RetinaNetHead(backbone.out_channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
    return RetinaNet(
        backbone,
        num_classes,
        anchor_generator=anchors,
        head=head,
        # Even the least likely boxes count: torchvision's 0.05 would leave an untrained detector none.
        score_thresh=0.0,
        detections_per_img=100,
        fixed_size=size[::-1],
    )


def faster_rcnn(backbone: DetectionBackbone, num_classes: int, size: tuple[int, int]) -> FasterRCNN:
    """Faster R-CNN (Ren et al., 2015) for images of (height, width) `size`.

    Args:
        num_classes: with the background, which is class 0.
    """
    sizes = tuple((4 * stride, round(4 * stride * math.sqrt(2))) for stride in backbone.strides)
    levels = [str(level) for level in range(len(sizes))]
    # Level 4 is of stride 16. The paper of feature pyramids gives it boxes of 224 pixels; digits are smaller.
    pool = MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2, canonical_scale=56, canonical_level=4)
    width = 4 * backbone.out_channels
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ((1.0, 2.0),) * len(sizes)),
        # Fewer proposals than for photographs.
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=pool,
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, width),
        box_predictor=FastRCNNPredictor(width, num_classes),
        box_batch_size_per_image=64,
        box_score_thresh=0.0,
        fixed_size=size[::-1],
    )


# The stages that their papers use: RetinaNet those of strides 8 to 32, Faster R-CNN with a pyramid all four.
DETECTORS = {"retinanet": (retinanet, (1, 2, 3)), "faster_rcnn": (faster_rcnn, (0, 1, 2, 3))}


def build_detector(name: str, model: str, size: tuple[int, int], num_classes: int) -> nn.Module:
    """A detector with fresh weights.

    Args:
        name: a key of `DETECTORS`.
        model: a name that timm knows, of a model whose size can be set.
        size: height and width that images are resized to, and the backbone is made for.
        num_classes: with the background, which is class 0.

    Raises:
        UserError: the backbone cannot be built.
    """
    detector, stages = DETECTORS[name]
    try:
        body = timm.create_model(model, features_only=True, img_size=size, out_indices=stages)
    except (RuntimeError, TypeError, ValueError) as error:  # raised by that model's own code
        raise UserError(f"--model {model} cannot be built for --size {size[0]} {size[1]}: {error}") from error
    return detector(DetectionBackbone(body, FPN_CHANNELS), num_classes, size)


def load_backbone(detector: nn.Module, model: str, size: tuple[int, int], path: Path) -> None:
    """Loads a classifier's checkpoint into the backbone of a detector. Its head and other unused parts are dropped.

    Raises:
        CheckpointError: it cannot be read, or does not fit the model.
    """
    # Loaded into the whole classifier first, so that a missing entry is noticed.
    classifier = timm.create_model(model, img_size=size)
    loaded = load_weights(classifier, read_checkpoint(path), path, new_classifier=True)
    print(f"weights from {path}: {loaded.taken}", file=sys.stderr)
    weights = classifier.state_dict()
    body = detector.backbone.body.model
    body.load_state_dict({name: weights[name] for name in body.state_dict()})


class DigitCanvases(Dataset):
    """Images with digits on them. Each is drawn when it is asked for, always the same.

    Args:
        source: of the digits.
        count: of canvases.
        size: their (height, width) in pixels.
        digit_size: least and greatest height of a digit's 8 x 8 pixels on the canvas, in pixels.
        seed: numbers; other numbers, other canvases.
        clutter: whether the background is more than black.

    Items: an image (3, H, W) in [0, 1] and its target, as torchvision's detectors take them: `boxes` (n, 4), left, top,
    right and bottom of the ink of each digit in pixels, the last two exclusive, and `labels` (n,), the class plus 1.
    """

    def __init__(
        self,
        source: Source,
        count: int,
        size: tuple[int, int],
        digit_size: tuple[int, int],
        seed: Sequence[int],
        clutter: bool = True,
    ):
        self.digits = np.stack([np.asarray(source.load(i))[..., 0] for i in range(len(source))])
        self.targets = np.asarray(source.targets)
        self.count, self.size, self.digit_size = count, size, digit_size
        self.seed, self.clutter = tuple(seed), clutter

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng((*self.seed, index))
        image = self._background(rng) if self.clutter else torch.zeros(3, *self.size)
        frames, boxes, labels = torch.empty(0, 4), [], []
        for _ in range(rng.integers(1, MOST_DIGITS, endpoint=True)):
            frame = self._free_frame(rng, frames)
            if frame is None:
                continue
            frames = torch.cat([frames, frame[None]])
            digit = rng.integers(len(self.digits))
            boxes.append(paint(image, frame, self.digits[digit], rng.uniform(0.6, 1, 3)))
            labels.append(self.targets[digit] + 1)
        return image, {"boxes": torch.stack(boxes), "labels": torch.tensor(np.array(labels))}

    def _background(self, rng: np.random.Generator) -> Tensor:
        """Coloured clouds, digits with shuffled pixels, and noise."""
        height, width = self.size
        clouds = torch.from_numpy(rng.uniform(0, 0.4, (1, 3, max(height // 32, 2), max(width // 32, 2))))
        image = F.interpolate(clouds.float(), self.size, mode="bilinear")[0]
        for _ in range(SCRAMBLED_DIGITS):
            pixels = rng.permutation(self.digits[rng.integers(len(self.digits))].ravel()).reshape(8, 8)
            paint(image, self._frame(rng), pixels, rng.uniform(0.3, 0.7, 3))
        image += torch.from_numpy(rng.normal(0, 0.03, self.size)).float()
        return image.clamp_(0, 1)

    def _frame(self, rng: np.random.Generator) -> Tensor:
        """A square somewhere on the canvas: left, top, right, bottom."""
        side = rng.integers(*self.digit_size, endpoint=True)
        top, left = (rng.integers(length - side, endpoint=True) for length in self.size)
        return torch.tensor([left, top, left + side, top + side])

    def _free_frame(self, rng: np.random.Generator, taken: Tensor) -> Tensor | None:
        """A square that meets none of those taken, (n, 4); None if none is found."""
        for _ in range(TRIES):
            frame = self._frame(rng)
            if not box_iou(frame[None].float(), taken).any():
                return frame
        return None


def paint(image: Tensor, frame: Tensor, digit: np.ndarray, colour: np.ndarray) -> Tensor:
    """Paints a digit, (8, 8) uint8, into a square of the image, (3, H, W), in place.

    Args:
        frame: the square's left, top, right and bottom.
        colour: red, green and blue, in [0, 1].

    Returns:
        The box of the pixels that were painted, (4,): left, top, right, bottom.
    """
    left, top, right, bottom = frame.tolist()
    opacity = torch.from_numpy(digit)[None, None].float() / 255
    opacity = F.interpolate(opacity, (bottom - top, right - left), mode="bicubic")[0, 0].clamp(0, 1)
    opacity[opacity < INK] = 0
    part = image[:, top:bottom, left:right]
    part.lerp_(torch.from_numpy(colour).float()[:, None, None].expand_as(part), opacity.expand_as(part))
    rows, columns = opacity.any(dim=1).nonzero(), opacity.any(dim=0).nonzero()
    box = [left + columns[0].item(), top + rows[0].item(), left + columns[-1].item() + 1, top + rows[-1].item() + 1]
    return torch.tensor(box, dtype=torch.float32)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as torchvision's detectors take it."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def average_precision(truth: Sequence[Target], found: Sequence[Target], classes: Sequence[str]) -> dict[str, Any]:
    """COCO's average precision of boxes, at most 100 per image.

    Args:
        truth: of each image, `boxes` (n, 4) and `labels` (n,), which are 1 for the first class.
        found: the same with `scores` (n,).
        classes: their names.

    Returns:
        "AP" (mean over IoU thresholds of 0.5 to 0.95), "AP50" and "AP75", means over the classes that occur, and "AP
        by class"; all in [0, 1].
    """
    from pycocotools.coco import COCO  # an extra: requirements/detection.txt
    from pycocotools.cocoeval import COCOeval

    def dataset(images: Sequence[Target]):
        annotations = []
        for image_id, image in enumerate(images):
            scores = image.get("scores", torch.ones(len(image["labels"])))
            columns = (image["boxes"].tolist(), image["labels"].tolist(), scores.tolist())
            for (left, top, right, bottom), label, score in zip(*columns, strict=True):
                width, height = right - left, bottom - top
                # Numbered from 1: pycocotools treats a match with number 0 as no match.
                annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "score": score}
                annotations.append(
                    {**annotation, "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
                )
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in range(len(images))],
            "categories": [{"id": label, "name": name} for label, name in enumerate(classes, start=1)],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(dataset(truth), dataset(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]  # (thresholds, recalls, classes); all areas, 100 per image
    by_class = {name: precision[..., k].mean() for k, name in enumerate(classes) if precision[..., k].min() >= 0}
    ap, ap50, ap75 = map(float, evaluation.stats[:3])
    return {"AP": ap, "AP50": ap50, "AP75": ap75, "AP by class": {name: float(ap) for name, ap in by_class.items()}}


def guesses(truth: Sequence[Target], num_classes: int, seed: int) -> dict[str, list[Target]]:
    """What guessing gets: boxes and classes of another canvas, and the true boxes with any class.

    Args:
        num_classes: without the background.
    """
    generator = torch.Generator().manual_seed(seed)
    others = [{**target, "scores": torch.ones(len(target["labels"]))} for target in (*truth[1:], truth[0])]
    every = []
    for target in truth:
        count = len(target["boxes"])
        labels = torch.arange(1, num_classes + 1).repeat(count)
        scores = torch.rand(len(labels), generator=generator)
        every.append({"boxes": target["boxes"].repeat_interleave(num_classes, 0), "labels": labels, "scores": scores})
    return {"boxes and classes of another canvas": others, "the true boxes, any class": every}


@torch.inference_mode()
def detect(detector: nn.Module, canvases: Dataset, batch_size: int, device: torch.device, title: str) -> list[Target]:
    """What the detector finds on each canvas: `boxes` (n, 4), `labels` (n,) and `scores` (n,), on the CPU."""
    detector.eval()
    found = []
    for images, _ in tqdm(DataLoader(canvases, batch_size, collate_fn=collate), title):
        outputs = detector([image.to(device) for image in images])
        found += [{name: value.cpu() for name, value in output.items()} for output in outputs]
    return found


def train(detector: nn.Module, canvases: Dataset, args: argparse.Namespace, device: torch.device) -> list[float]:
    """Trains in place; the mean loss of each epoch.

    Raises:
        UserError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(
        canvases, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate, generator=generator
    )
    optimizer = torch.optim.AdamW(detector.parameters(), args.lr, weight_decay=WEIGHT_DECAY)
    steps = args.epochs * len(loader)
    # A tenth of the steps of warm-up, then a cosine.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)
    detector.train()
    means = []
    with tqdm(total=steps, desc="training") as bar:
        for epoch in range(args.epochs):
            total = 0.0
            for step, (images, targets) in enumerate(loader, start=1):
                targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
                loss = sum(detector([image.to(device) for image in images], targets).values())
                if not loss.isfinite():
                    raise UserError(f"the loss is {loss.item()} in epoch {epoch + 1}: lower --lr ({args.lr:g})")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(detector.parameters(), CLIP_GRAD)
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.set_postfix(epoch=epoch + 1, loss=f"{total / step:.4f}", refresh=False)
                bar.update()
            means.append(total / len(loader))
    return means


def draw_box(axes, box: Tensor, text: str, colour: str, is_truth: bool) -> None:
    """A frame around a box, (4,), and its name: above it, or below the true ones."""
    left, top, right, bottom = box.tolist()
    style = {"linestyle": "--", "linewidth": 1.2} if is_truth else {"linewidth": 1.8}
    # Pixels are centred on whole numbers, boxes are between pixels.
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=colour, **style))
    x, y, horizontal, vertical = (right, bottom, "right", "top") if is_truth else (left, top, "left", "bottom")
    label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
    axes.text(x, y, text, fontsize=8, color="black", ha=horizontal, va=vertical, bbox=label)


def draw(canvases: Dataset, found: Sequence[Target], classes: Sequence[str]) -> Figure:
    """The first canvases with their true boxes and the likely ones of those found."""
    count = min(SHOWN_CANVASES, len(canvases))
    columns = min(4, count)
    rows = math.ceil(count / columns)
    height, width = canvases.size
    figure = Figure(figsize=(max(3 * columns, 5), 3 * rows * height / width + 0.7), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index >= count:
            continue
        image, target = canvases[index]
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        for box, label, score in zip(*(found[index][name] for name in ("boxes", "labels", "scores")), strict=True):
            if score >= SHOWN_SCORE:
                draw_box(axes, box, f"{classes[label - 1]}  {score:.2f}", SECOND_COLOR, is_truth=False)
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            draw_box(axes, box, classes[label - 1], TRUTH_COLOR, is_truth=True)
    handles = [
        Line2D([], [], color=TRUTH_COLOR, linestyle="--", label="true"),
        Line2D([], [], color=SECOND_COLOR, label=f"found, with a score of {SHOWN_SCORE} or more"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, fontsize=11, facecolor="#404040", labelcolor="white"
    )
    return figure


def save_small(figure: Figure, path: Path) -> None:
    """Saves a PNG of 256 colours. With this much noise, one of all colours would be several times larger."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=100)
        Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def find_device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError("--device is cuda, but PyTorch finds no CUDA device; accepted here: auto, cpu")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def prepare_folder(folder: Path) -> None:
    """Makes the folder. Raises UserError if it has results of an earlier run."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            raise UserError(f"--output {folder}: has {name} of an earlier run; choose another folder, or remove it")


def circumstances(device: torch.device) -> dict[str, dict[str, Any]]:
    """What the results depend on besides the settings."""
    libraries = ("torch", "torchvision", "timm", "pycocotools", "scikit-learn")
    return {
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
            "commit": commit(),
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = find_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    sources = digit_sources()
    classes = sources[True].classes
    training, validation = (
        DigitCanvases(sources[is_train], count, args.size, args.digit_size, (args.seed, is_train))
        for is_train, count in ((True, args.images), (False, args.val_images))
    )
    truth = [target for _, target in validation]
    seed_all(args.seed)
    detector = build_detector(args.detector, args.model, args.size, num_classes=len(classes) + 1)
    if args.checkpoint:
        load_backbone(detector, args.model, args.size, args.checkpoint)
    detector.to(device)
    prepare_folder(args.output)
    about = circumstances(device)

    precision = {
        name: average_precision(truth, found, classes)
        for name, found in guesses(truth, len(classes), args.seed).items()
    }
    found = detect(detector, validation, args.batch_size, device, "before training")
    precision["the detector before training"] = average_precision(truth, found, classes)
    start = time.perf_counter()
    losses = train(detector, training, args, device)
    seconds = time.perf_counter() - start
    found = detect(detector, validation, args.batch_size, device, "after training")
    precision["the detector after training"] = average_precision(truth, found, classes)

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results = {
        "command": shlex.join(["python", "tools/detection_demo.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": settings,
        "average_precision": precision,
        "mean_loss_of_epochs": losses,
        "seconds_of_training": round(seconds, 1),
        "true_boxes": sum(len(target["labels"]) for target in truth),
        "parameters": {
            "backbone": sum(p.numel() for p in detector.backbone.body.parameters()),
            "detector": sum(p.numel() for p in detector.parameters()),
        },
        **about,
    }
    state = {"model": detector.state_dict(), "settings": settings, "classes": classes}
    save_checkpoint(state, args.output / "detector.pth")
    with writing_to(args.output):
        (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        save_small(draw(validation, found, classes), args.output / "detections.png")
    rows = [(name, *(f"{ap[key]:.3f}" for key in ("AP", "AP50", "AP75"))) for name, ap in precision.items()]
    print(markdown((f"{args.val_images} validation canvases", "AP", "AP50", "AP75"), rows))
    print(f"trained for {seconds:.0f} s; written to {args.output}: {', '.join(FILES)}")


if __name__ == "__main__":
    run_entry_point(main)
