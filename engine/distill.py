"""Knowledge distillation: a trained teacher's opinion as a second target, soft (Hinton et al., 2015) or hard (DeiT,
Touvron et al., 2021, section 3).

The teacher is in evaluation mode and draws nothing at random, so it does not change what a run draws.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from config import ConfigError, image_size
from data import Sample, build_eval_loader, build_normalize, source_digest
from data.dataset import SourceDataset
from data.loading import iterate, next_batch
from engine.evaluate import autocast, predict, resolve_amp
from engine.trained import read_config
from models import build_model, prepare_model
from runtime.checkpoint import CheckpointError, load_weights, other_classes, read_checkpoint
from runtime.distributed import World, from_all, main_process_first, on_main
from utils import UserError


def check_distillation(config) -> None:
    """Raises ConfigError for keys under TRAIN.DISTILLATION that do not go together, or with the augmentation."""
    keys = config.TRAIN.DISTILLATION
    named = keys.TEACHER or keys.TEACHER_CHECKPOINT
    if keys.TYPE == "none" and named:
        raise ConfigError(
            f"TRAIN.DISTILLATION has a teacher, {named}, but TRAIN.DISTILLATION.TYPE is none; accepted: soft or hard"
        )
    if keys.TYPE != "none" and not named:
        raise ConfigError(
            f"TRAIN.DISTILLATION.TYPE is {keys.TYPE}, but there is no teacher; accepted: TRAIN.DISTILLATION.TEACHER, a "
            "timm model, or TRAIN.DISTILLATION.TEACHER_CHECKPOINT, a file"
        )
    if keys.TYPE != "none" and keys.CACHE and (config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0):
        raise ConfigError(
            f"TRAIN.DISTILLATION.CACHE is {keys.CACHE}, the teacher's logits of whole images, but AUG.MIXUP is "
            f"{config.AUG.MIXUP:g} and AUG.CUTMIX {config.AUG.CUTMIX:g}: it has none of mixed images; accepted: "
            "both 0, or no cache"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A model that is only asked.

    Args:
        mean, std: of the images that it was trained on.
    """

    def __init__(self, model: nn.Module, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
        super().__init__()
        self.model = model
        # From images normalised with ImageNet's statistics, as the student gets them.
        own, given = torch.tensor([mean, std]), torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])
        self.is_normalized = torch.equal(own, given)
        self.register_buffer("scale", (given[1] / own[1])[:, None, None])
        self.register_buffer("shift", ((given[0] - own[0]) / own[1])[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of normalised images (N, 3, H, W)."""
        return self.model(images if self.is_normalized else images * self.scale + self.shift)


def build_teacher(config, classes: list[str], world: World) -> Teacher | None:
    """The teacher of `config.TRAIN.DISTILLATION` on the CPU, for images of the student's size; None if there is none.

    Args:
        classes: of the data, in label order.

    Raises:
        UserError: it cannot be had, or is for other classes.
    """
    keys = config.TRAIN.DISTILLATION
    if keys.TYPE == "none":
        return None
    if not keys.TEACHER_CHECKPOINT:
        with main_process_first(world):  # it downloads
            return _published_teacher(config)
    path = Path(keys.TEACHER_CHECKPOINT)
    content = read_checkpoint(path)
    if other_classes(content, classes):
        raise CheckpointError(
            f"{path}: TRAIN.DISTILLATION.TEACHER_CHECKPOINT was trained on other classes than the data has, or in "
            "another order; accepted: a teacher of the same classes"
        )
    is_own = isinstance(content.get("config"), Mapping) and "MODEL.TYPE" in content["config"]
    if keys.TEACHER:
        about = config.clone()
        about.defrost()
        about.MODEL.TYPE, about.MODEL.NAME = "timm", keys.TEACHER
    else:
        about = read_config(content, path, None, ()).clone()
        about.defrost()
    about.DATA.IMG_SIZE = config.DATA.IMG_SIZE
    about.MODEL.NUM_CLASSES = config.MODEL.NUM_CLASSES
    about.MODEL.DROP_PATH_RATE, about.TRAIN.USE_CHECKPOINT = 0.0, False
    about.freeze()
    model = build_model(about)
    load_weights(model, content, path)
    # This project trains all models on ImageNet's statistics, timm has others for some.
    return Teacher(model) if is_own else Teacher(model, **_statistics(model))


def _published_teacher(config) -> Teacher:
    """A timm model with the weights that timm downloads."""
    name, classes = config.TRAIN.DISTILLATION.TEACHER, config.MODEL.NUM_CLASSES
    about = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    sized = {"img_size": image_size(config)} if about and about.fixed_input_size else {}
    try:
        model = timm.create_model(name, pretrained=True, **sized)
    except Exception as error:  # of timm, of the hub's library, of the network below it
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise UserError(
            f"TRAIN.DISTILLATION.TEACHER is {name}, and timm cannot give its weights ({reason}); accepted: a timm "
            "model with published weights, or TRAIN.DISTILLATION.TEACHER_CHECKPOINT, a file"
        ) from error
    if model.num_classes != classes:
        raise UserError(
            f"TRAIN.DISTILLATION.TEACHER is {name}, whose weights are for {model.num_classes} classes, but the data "
            f"has {classes}; accepted: a teacher of the same classes, for example one fine-tuned by this project, as "
            "TRAIN.DISTILLATION.TEACHER_CHECKPOINT"
        )
    return Teacher(model, **_statistics(model))


def _statistics(model: nn.Module) -> dict[str, tuple[float, ...]]:
    about = getattr(model, "pretrained_cfg", None) or {}
    return {name: tuple(about[name]) for name in ("mean", "std") if about.get(name)}


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Distillation:
    """(1 - alpha) x the loss of the labels + alpha x that of the teacher's opinion.

    Attributes:
        kind: soft, temperature^2 x the Kullback-Leibler divergence of the softened predictions, mean over the images;
            or hard, the cross-entropy of the teacher's first choice.
        teacher: is asked about the images that the student gets, mixup included; or
        logits: (images, classes) float16, the teacher's about the whole images. A row of NaN: there is none.
    """

    kind: str
    alpha: float
    temperature: float
    teacher: Teacher | None = None
    logits: np.ndarray | None = None

    def __call__(
        self,
        criterion: nn.Module,
        output: Tensor | tuple[Tensor, Tensor],
        images: Tensor,
        targets: Tensor,
        batch: Sample,
    ) -> Tensor:
        """A scalar.

        Args:
            criterion: of logits and targets.
            output: the student's logits (N, classes); of timm's distilled models those of the class token and of the
                distillation token, which alone listens to the teacher.
        """
        logits, guided = output if isinstance(output, tuple) else (output, output)
        opinion, known = self._opinion(images, batch)
        if self.kind == "hard":
            losses = F.cross_entropy(guided.float(), opinion.argmax(dim=1), reduction="none")
        else:
            student, teacher = (F.log_softmax(x.float() / self.temperature, dim=1) for x in (guided, opinion))
            losses = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * self.temperature**2
        guidance = losses.masked_fill(~known, 0).mean()
        return (1 - self.alpha) * criterion(logits, targets) + self.alpha * guidance

    @torch.no_grad()
    def _opinion(self, images: Tensor, batch: Sample) -> tuple[Tensor, Tensor]:
        """The teacher's logits (N, classes), and for which images there are any (N,)."""
        if self.logits is None:
            return self.teacher(images), torch.ones(len(images), dtype=torch.bool, device=images.device)
        rows = torch.from_numpy(np.asarray(self.logits[batch.index.numpy()])).to(images.device).float()
        # A file that cannot be read was replaced by another one.
        known = rows.isfinite().all(dim=1) & batch.readable.to(images.device)
        return rows.nan_to_num(0.0), known


def build_distillation(
    config, model: nn.Module, teacher: Teacher | None, dataset: SourceDataset, world: World, logger: Logger
) -> Distillation | None:
    """What the config asks for; all processes must call it, because they fill the cache together.

    Args:
        model: the student. A timm model with a distillation token then gives the logits of both tokens in training.
        dataset: of training.

    Raises:
        UserError: the cache cannot be used, or written.
    """
    if teacher is None:
        return None
    keys = config.TRAIN.DISTILLATION
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    about = cache_key(config, teacher, dataset) if keys.CACHE else {}
    prepare_model(config, teacher, world.device)
    if not keys.CACHE:
        return Distillation(keys.TYPE, keys.ALPHA, keys.TEMPERATURE, teacher=teacher)
    path = Path(keys.CACHE)
    if not on_main(path.exists, world):
        logger.info(f"asking the teacher about {len(dataset)} images, for {path}")
        fill_cache(config, teacher, dataset, path, about, world)
    logits = open_cache(path, about)
    return Distillation(keys.TYPE, keys.ALPHA, keys.TEMPERATURE, logits=logits)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def cache_key(config, teacher: Teacher, dataset: SourceDataset) -> dict[str, Any]:
    """What the logits depend on, for JSON."""
    sha = hashlib.sha256()
    for value in teacher.state_dict().values():
        sha.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return {
        "teacher": sha.hexdigest(),
        "data": source_digest(dataset.source, config.DATA.DATA_PATH),
        "images": len(dataset),
        "classes": config.MODEL.NUM_CLASSES,
        "img_size": list(image_size(config)),
        "interpolation": config.DATA.INTERPOLATION,
        "pixel_range": config.DATA.PIXEL_RANGE,
        "exif_orientation": config.DATA.EXIF_ORIENTATION,
        "crop": config.TEST.CROP,
    }


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def fill_cache(
    config, teacher: Teacher, dataset: SourceDataset, path: Path, about: dict[str, Any], world: World
) -> None:
    """Writes the teacher's logits of all training images, as evaluation sees them, to the file `path`, which all
    processes must see. It has its name when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    shape = len(dataset), config.MODEL.NUM_CLASSES

    def create() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(temporary, "w+", np.float16, shape).flush()

    def finish() -> None:
        _about(path).write_text(json.dumps(about), encoding="utf-8")
        os.replace(temporary, path)

    on_main(_writing(create, path), world)
    _writing(lambda: _ask(config, teacher, dataset, temporary, world), path)()
    from_all(None, world)  # until all have written theirs
    on_main(_writing(finish, path), world)


def _writing(function, path: Path):
    """The function; that it cannot write is a UserError."""

    def run() -> None:
        try:
            function()
        except OSError as error:
            raise UserError(f"{path}: TRAIN.DISTILLATION.CACHE cannot be written: {error.strerror}") from error

    return run


def _ask(config, teacher: Teacher, dataset: SourceDataset, path: Path, world: World) -> None:
    """Fills this process's rows."""
    rows = np.lib.format.open_memmap(path, "r+")
    loader = build_eval_loader(config, dataset.source, world)
    normalize, amp = build_normalize(config, world.device), resolve_amp(config, world.device)
    batches = iterate(loader, "teacher", world)
    with torch.inference_mode():
        for _ in range(len(loader)):
            batch, failure = next_batch(batches)
            if failure is not None:
                raise failure
            with autocast(world.device, amp):
                logits = predict(config, teacher, normalize(batch.image.to(world.device)))
            logits = logits.float().cpu().masked_fill(~batch.readable[:, None], float("nan"))
            rows[batch.index.numpy()] = logits.numpy()
    rows.flush()


def open_cache(path: Path, about: dict[str, Any]) -> np.ndarray:
    """The logits (images, classes) in a cache, which stay on the disk.

    Raises:
        UserError: it is no cache, or one of another teacher, other data or another image size.
    """
    try:
        found = json.loads(_about(path).read_text(encoding="utf-8"))
        logits = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: TRAIN.DISTILLATION.CACHE cannot be read ({error}); accepted: a file that a run has made, or a "
            "name for a new one"
        ) from error
    expected = about["images"], about["classes"]
    wrong = [name for name in about if not isinstance(found, dict) or found.get(name) != about[name]]
    if wrong or logits.shape != expected or logits.dtype != np.float16:
        raise UserError(
            f"{path}: TRAIN.DISTILLATION.CACHE was made for something else ({', '.join(wrong) or 'shape'} differ); "
            "accepted: a name for a new file"
        )
    return logits
