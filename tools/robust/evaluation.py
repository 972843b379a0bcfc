"""Accuracy and calibration of models on clean and on corrupted images."""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error
from tqdm import tqdm

from config import image_size
from data import build_loader
from data.dataset import ClassificationDataset
from data.sources import Source
from engine.trained import Trained, load_trained
from runtime.checkpoint import other_classes
from runtime.distributed import World
from utils import UserError

from .corruptions import CORRUPTIONS, CorruptedDataset

BINS = 15  # of the confidence, as in Guo et al. (ICML 2017)
CLEAN = ("clean", 0)
HELD_OUT = ("VAL_FRACTION", "VAL_SEED", "FOLDS", "FOLD")  # keys under DATA that choose images

Condition = tuple[str, int]  # the corruption and its severity


@dataclass
class Score:
    """Of a model on images under one condition.

    Attributes:
        accuracy: top-1, in percent.
        ece: expected calibration error over `BINS` bins of equal width, in percent.
        nll: mean negative log-likelihood, in nats.
        confidence: mean probability of the predicted class, in percent.
        bins: by bin of the confidence: images, sum of their confidences (0 to 1), right ones; (3, `BINS`).
    """

    accuracy: float
    ece: float
    nll: float
    confidence: float
    bins: np.ndarray


@dataclass
class Subject:
    """A model that is evaluated.

    Attributes:
        name: short, and not the others'.
        confusion: clean images by true and predicted class, (classes, classes).
    """

    name: str
    model: Trained
    scores: dict[Condition, Score] = field(default_factory=dict)
    confusion: np.ndarray | None = None

    @property
    def clean(self) -> Score:
        return self.scores[CLEAN]

    @property
    def corruptions(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.scores if name != CLEAN[0]))

    def corrupted(self, *names: str) -> list[Score]:
        """The scores under some corruptions, or under all."""
        return [score for (name, _), score in self.scores.items() if name in (names or self.corruptions)]

    def mean(self, value: str, *names: str) -> float:
        """Of a value of these scores."""
        return float(np.mean([getattr(score, value) for score in self.corrupted(*names)]))

    @property
    def relative_drop(self) -> float:
        """Of the accuracy, from clean to the mean under corruption, in percent of the clean one."""
        clean = self.clean.accuracy
        return 100 * (clean - self.mean("accuracy")) / clean if clean else math.nan

    @property
    def class_accuracies(self) -> np.ndarray:
        """On the clean images, in percent; NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            return 100 * self.confusion.diagonal() / self.confusion.sum(axis=1)


def score(logits: Tensor, targets: Tensor) -> Score:
    """Of logits (N, classes) and labels (N,)."""
    classes = logits.shape[1]
    # torchmetrics would put a confidence of exactly 1, which float32 often gives, into a bin of its own.
    probabilities = logits.softmax(dim=1).clamp(max=1 - torch.finfo(torch.float32).eps)
    confidences, predicted = probabilities.max(dim=1)
    right = predicted == targets
    weights = (None, confidences.double().numpy(), right.double().numpy())
    bins = [np.histogram(confidences.numpy(), BINS, range=(0, 1), weights=each)[0] for each in weights]
    return Score(
        accuracy=100 * right.double().mean().item(),
        ece=100 * multiclass_calibration_error(probabilities, targets, classes, n_bins=BINS, norm="l1").item(),
        nll=F.cross_entropy(logits.double(), targets).item(),
        confidence=100 * confidences.double().mean().item(),
        bins=np.stack(bins),
    )


def load_models(args: argparse.Namespace) -> list[Subject]:
    """The models of the checkpoints, each once.

    Raises:
        UserError: one cannot be used.
    """
    flags = {
        "DATA.DATA_PATH": args.data_path,
        "DATA.BATCH_SIZE": args.batch_size,
        "DATA.NUM_WORKERS": args.workers,
        "AMP": args.amp,
    }
    opts = [*args.opts, *(word for key, value in flags.items() if value is not None for word in (key, str(value)))]
    paths = list({path.resolve(): path for path in args.checkpoint}.values())
    models = [load_trained(argparse.Namespace(**{**vars(args), "checkpoint": path, "opts": opts})) for path in paths]
    # The shortest names that distinguish them
    short = [model.config.MODEL.NAME for model in models]
    with_tag = [f"{name}/{path.resolve().parent.name}" for name, path in zip(short, paths, strict=True)]
    distinct = (names for names in (short, with_tag) if len(set(names)) == len(names))
    names = next(distinct, list(map(str, paths)))
    return [Subject(name, model) for name, model in zip(names, models, strict=True)]


def common_source(subjects: Sequence[Subject]) -> Source:
    """The validation images of all models.

    Raises:
        UserError: the models are of different images or classes.
    """
    first, *others = (subject.model for subject in subjects)
    source = first.validation_source()
    for other in others:
        if first.config.DATA.DATASET != other.config.DATA.DATASET:
            what = f"data sets {first.config.DATA.DATASET} and {other.config.DATA.DATASET}"
        elif other_classes({"classes": first.known_classes}, other.known_classes):
            what = "classes of other names"
        elif different := [key for key in HELD_OUT if first.config.DATA[key] != other.config.DATA[key]]:
            values = [f"{first.config.DATA[key]!r} and {other.config.DATA[key]!r}" for key in different]
            what = ", ".join(f"DATA.{key} {both}" for key, both in zip(different, values, strict=True))
        elif images_of(source) != images_of(other.validation_source()):
            what = f"images in {first.config.DATA.DATA_PATH} and {other.config.DATA.DATA_PATH}"
        else:
            continue
        raise UserError(
            f"{first.path} and {other.path} are of different data: {what}; accepted: checkpoints of the same images "
            "and classes, whose folder --data-path may name"
        )
    return source


def images_of(source: Source) -> tuple[list[str], list[int], list[str]]:
    """What distinguishes a source from others."""
    return source.classes, source.targets.tolist(), [source.name(i) for i in range(len(source))]


def choose_conditions(corruptions: Sequence[str] | None, severities: Sequence[int]) -> list[Condition]:
    """The clean images first.

    Raises:
        UserError: there is no such corruption.
    """
    names = list(dict.fromkeys(corruptions or CORRUPTIONS))
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(f"--corruptions {name}: no such corruption; accepted: {', '.join(CORRUPTIONS)}")
    return [CLEAN, *itertools.product(names, sorted(set(severities)))]


def choose_images(source: Source, most: int | None, seed: int) -> list[int]:
    """At most so many indices, drawn at random, in order."""
    return sorted(np.random.default_rng(seed).permutation(len(source))[:most].tolist())


def dataset_for(model: Trained, source: Source, condition: Condition, seed: int) -> ClassificationDataset:
    """The source's images as the model gets them under a condition."""
    inputs = (source, model.transform, image_size(model.config), seed)
    if condition == CLEAN:
        return ClassificationDataset(*inputs)
    return CorruptedDataset(*inputs, corruption=condition[0], severity=condition[1])


def evaluate(
    subjects: Sequence[Subject], source: Source, indices: Sequence[int], conditions: Sequence[Condition], seed: int
) -> None:
    """Fills the models' scores.

    Raises:
        UserError: no image can be read, or a model's outputs are not finite.
    """
    # Models of the same input share the work of making it.
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        config = subject.model.config
        key = (image_size(config), config.DATA.INTERPOLATION, config.TEST.CROP)
        groups.setdefault(repr(key), []).append(subject)
    total = len(indices) * len(conditions) * len(groups)
    with tqdm(total=total, unit="image", disable=None, dynamic_ncols=True, leave=False) as bar:
        for condition, group in itertools.product(conditions, groups.values()):
            bar.set_description(" ".join(map(str, condition)) if condition != CLEAN else "clean")
            model = group[0].model
            dataset = dataset_for(model, source, condition, seed)
            sampler = [(0, index) for index in indices]
            world = World(rank=0, local_rank=0, size=1, device=model.device)
            loader = build_loader(model.config, dataset, sampler, world)
            outputs, targets = predict([subject.model for subject in group], loader, bar.update)
            for subject, logits in zip(group, outputs, strict=True):
                subject.scores[condition] = score(logits, targets)
                if condition == CLEAN:
                    labels = np.arange(logits.shape[1])
                    subject.confusion = confusion_matrix(targets, logits.argmax(dim=1), labels=labels)


def predict(
    models: Sequence[Trained], loader: DataLoader, advance: Callable[[int], Any]
) -> tuple[list[Tensor], Tensor]:
    """The models' logits, (N, classes) each, and the labels (N,) of the images that can be read, on the CPU."""
    columns: list[tuple[Tensor, ...]] = []
    for batch in loader:
        logits = [model.logits(batch.image).cpu()[batch.readable] for model in models]
        columns.append((batch.target[batch.readable], *logits))
        advance(len(batch.target))
    targets, *outputs = (torch.cat(parts) for parts in zip(*columns, strict=True))
    if not len(targets):
        raise UserError(f"{loader.dataset.name(0)} and all other images cannot be read")
    for model, logits in zip(models, outputs, strict=True):
        if not logits.isfinite().all():
            raise UserError(f"{model.path}: the model's outputs are not finite")
    return outputs, targets
