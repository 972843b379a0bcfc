"""timm's folders of a model, `model.safetensors` and `config.json`: ours as one of them, and the config of one.

timm opens such a folder (`timm.create_model("local-dir:FOLDER", pretrained=True)`), and so does transformers. A
repository of a Hugging Face hub holds the same files.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn

from config import image_size, leaves
from data.transforms import SMALL_IMAGE, whole_image_interpolation
from models import StripMLP
from models.build import strip_mlp_arguments
from runtime.checkpoint import CheckpointError
from runtime.folders import DESCRIPTION, WEIGHTS
from runtime.untrusted import reason_of
from utils import shorten

# Ours in config.json: what makes the model and prepares its images, and no path of somebody's machine.
OWN = "training_config"
SHARED = ("MODEL.TYPE", "MODEL.NAME", "MODEL.NUM_CLASSES", "MODEL.STRIP_MLP.", "DATA.IMG_SIZE", "DATA.INTERPOLATION")
SHARED += ("DATA.PIXEL_RANGE", "DATA.EXIF_ORIENTATION", "DATA.DATASET", "TEST.CROP")
CROP = 224 / 256


@dataclass
class TimmModel:
    """A model as timm writes it.

    Attributes:
        model: made by timm, with `pretrained_cfg` of the training that made its weights.
        arguments: of `timm.create_model`, besides its name and the number of classes.
        description: what else is in `config.json`.
    """

    model: nn.Module
    arguments: dict[str, Any]
    description: dict[str, Any]


def as_timm_model(model: nn.Module, config, classes: list[str]) -> TimmModel:
    """A model of the config as timm knows it.

    Args:
        classes: names in label order; none if they are not known.
    """
    size = image_size(config)
    arguments: dict[str, Any] = {}
    if config.MODEL.TYPE == "strip_mlp_layer":
        # Each argument is named, so that the name of the variant says nothing more.
        arguments = {"img_size": list(size), **strip_mlp_arguments(config)}
        weights = model.state_dict()
        model = timm.create_model(_variant(model), num_classes=config.MODEL.NUM_CLASSES, **arguments)
        model.load_state_dict(weights)
    elif model.pretrained_cfg.get("fixed_input_size"):
        arguments = {"img_size": list(size)}
    kept = ("architecture", "fixed_input_size", "first_conv", "classifier")
    whole = max(size) <= SMALL_IMAGE or not config.TEST.CROP
    model.pretrained_cfg = {
        **{name: model.pretrained_cfg[name] for name in kept if name in model.pretrained_cfg},
        "num_classes": config.MODEL.NUM_CLASSES,
        "input_size": (3, *size),
        "interpolation": whole_image_interpolation(config),
        "crop_pct": 1.0 if whole else CROP,
        "crop_mode": "squash" if whole else "center",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
    values = {key: value for key, value in leaves(config).items() if key.startswith(SHARED)}
    return TimmModel(model, arguments, {OWN: values, **({"label_names": classes} if classes else {})})


def _variant(model: StripMLP) -> str:
    """The name of the variant of these widths and depths, or else of the smallest of the paper's."""

    def sizes(one: StripMLP) -> tuple:
        return one.widths, [len(stage) for stage in one.stages]

    with torch.device("meta"):
        names = [name for name in timm.list_models("strip_mlp_*") if sizes(timm.create_model(name)) == sizes(model)]
    return names[0] if names else "strip_mlp_tiny_light"


def save_folder(made: TimmModel, folder: Path) -> None:
    """Writes the two files. What the folder holds under their names is replaced only when both are complete.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            save_for_hf(
                made.model,
                temporary,
                model_config=dict(made.description),
                model_args=dict(made.arguments),
                safe_serialization=True,
            )
            written = Path(temporary, DESCRIPTION)
            written.write_text(_for_both(written.read_text(encoding="utf-8")), encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for name in (WEIGHTS, DESCRIPTION):
                os.replace(Path(temporary, name), folder / name)
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


def _for_both(description: str) -> str:
    """A `config.json` that transformers opens too. timm 1.0.31 states the number of classes in the arguments of the
    model as well, and transformers (5.24) then passes it twice: a TypeError."""
    content = json.loads(description)
    content.get("model_args", {}).pop("num_classes", None)
    return json.dumps(content, indent=2)


def push(made: TimmModel, repository: str, private: bool) -> str:
    """Puts the model on a Hugging Face hub with timm's function, and the `config.json` that transformers opens after
    it. Returns the address.

    Raises:
        CheckpointError: the hub does not take it.
    """
    from huggingface_hub import HfApi  # a requirement of timm

    card = {"license": "unknown", "tags": ["image-classification", "timm"]}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            save_folder(made, Path(temporary, "model"))
            push_to_hf_hub(
                made.model,
                repository,
                private=private,
                model_config=dict(made.description),
                model_args=dict(made.arguments),
                model_card=card,
                safe_serialization=True,
            )
            written = HfApi().upload_file(
                path_or_fileobj=Path(temporary, "model", DESCRIPTION),
                path_in_repo=DESCRIPTION,
                repo_id=repository,
                commit_message="config.json for timm and transformers",
            )
    except Exception as error:  # of the network's libraries too, which differ between versions
        raise CheckpointError(f"{repository}: the hub does not take it: {reason_of(error)}") from error
    return str(getattr(written, "repo_url", repository))


def exists_on_hub(repository: str) -> bool:
    """Raises CheckpointError if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_exists(repository)
    except Exception as error:
        raise CheckpointError(f"{repository}: the hub does not answer: {reason_of(error)}") from error


def config_values(description: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Config keys by dotted name from the `config.json` beside the weights `path`, and notes for people.

    Raises:
        CheckpointError: a model or images that no config here describes.
    """
    own = description.get(OWN)
    if isinstance(own, Mapping) and "MODEL.TYPE" in own:
        return dict(own), []
    where = f"{path}: its {DESCRIPTION}"
    name = description["architecture"].partition(".")[0]
    if not timm.is_model(name):
        raise CheckpointError(f"{where} names the model {name[:80]!r}, which timm {timm.__version__} does not have")
    inner = description.get("pretrained_cfg")
    inner = inner if isinstance(inner, Mapping) else description  # older files have no inner one
    arguments = description.get("model_args") or {}
    known = {"num_classes", "in_chans", "img_size", "global_pool"}
    other = [str(key) for key in arguments if key not in known]
    if arguments.get("global_pool", _pooling(name)) != _pooling(name):
        other.append("global_pool")
    if other or arguments.get("in_chans", 3) != 3:
        raise CheckpointError(
            f"{where} asks for arguments of {name} that no config has: {shorten(other or ['in_chans'])}; accepted: the "
            "model as its name says, or --cfg"
        )
    for key, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        if list(inner.get(key, default)) != list(default):
            raise CheckpointError(
                f"{where} asks for images normalised with {key} {inner[key]}; accepted here: {list(default)}. With "
                "--cfg the weights are used with those all the same"
            )
    size = inner.get("input_size", (3, 224, 224))[1:]
    notes, crop = [], inner.get("crop_pct", CROP)
    crops = crop < 1 and inner.get("crop_mode", "center") == "center"
    if max(size) > SMALL_IMAGE and (abs(crop - CROP) > 0.01 if crops else inner.get("crop_mode") != "squash"):
        notes.append(f"images are resized as here, not with crop_pct {crop} as {DESCRIPTION} says")
    values = {"MODEL.TYPE": "timm", "MODEL.NAME": name, "DATA.IMG_SIZE": list(size), "TEST.CROP": crops}
    if inner.get("interpolation") in ("bicubic", "bilinear", "nearest"):
        values["DATA.INTERPOLATION"] = inner["interpolation"]
    return values, notes


def _pooling(name: str) -> str | None:
    """How timm's model of that name pools."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1)
    head = getattr(model, "head", None)
    for pool in (getattr(head, "global_pool", None), getattr(model, "global_pool", None)):
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return None
