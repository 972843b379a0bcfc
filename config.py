"""All config keys with their defaults and limits; merging of YAML files, --opts and command-line flags over them.

Precedence, lowest first: the defaults below, the files in a YAML's `BASE`, the YAML itself, `--opts`, flags.
"""

import argparse
import ast
import contextlib
import difflib
import itertools
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yacs.config import CfgNode

from utils import UserError, write_keeping_old

# A limit: whether a value is accepted, and what is, in words.
Limit = tuple[Callable[[Any], bool], str]


def one_of(*accepted: str) -> Limit:
    return lambda value: value in accepted, ", ".join(accepted)


def within(low: float, high: float) -> Limit:
    return lambda value: low <= value <= high, f"{low} to {high}"


def at_least(low: float) -> Limit:
    return lambda value: low <= value < float("inf"), f"{low} or more"


def _is_path(value: str) -> bool:
    """Whether the system takes it."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _are_weights(value: str) -> bool:
    """Whether TRAIN.CLASS_WEIGHTS is one of its words, or numbers."""
    try:
        return value in ("none", "balanced") or all(0 < float(w) < float("inf") for w in value.split(","))
    except ValueError:
        return False


def _is_range(value: str) -> bool:
    """Whether DATA.PIXEL_RANGE is one of its words, or two numbers in order."""
    try:
        return value in ("auto", "file") or (
            len(ends := [float(end) for end in value.split(",")]) == 2 and -1e300 < ends[0] < ends[1] < 1e300
        )
    except ValueError:
        return False


def _pair(size: int | list[int]) -> tuple[int, int]:
    """Height and width, of a square or of a rectangle."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


POSITIVE: Limit = (lambda value: 0 < value < float("inf"), "more than 0")
LESS_THAN_1: Limit = (lambda value: 0 <= value < 1, "0 to less than 1")
PATH: Limit = (_is_path, "a path, or nothing")
FOLDER_NAME: Limit = (
    lambda value: value not in ("", ".", "..") and not set(value) & set("/\\") and value.isprintable(),
    "a name for a folder, without slashes",
)

# Keys of words or numbers, which are kept as text with commas
NUMBERS_AS_TEXT = ("TRAIN.CLASS_WEIGHTS", "DATA.PIXEL_RANGE")

# What MODEL.LOAD_EMA stands for: see `runtime.weights.find_weights`.
EMA = {"auto": None, "on": True, "off": False}

_C = CfgNode()
ACCEPTED: dict[str, Limit] = {}


def key(name: str, default: Any, limit: Limit | None = None) -> None:
    """Declares a config key: its dotted name, its default, which also sets its type, and what it accepts."""
    *sections, last = name.split(".")
    node = _C
    for section in sections:
        node = node.setdefault(section, CfgNode())
    node[last] = default
    if limit:
        ACCEPTED[name] = limit


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
# imagenet (or imagenet-1k): train/ and val/ with one folder per class, which any image folder may imitate.
# wds: WebDataset's tar files, such as train-000000.tar, which tools/make_shards.py makes of such folders.
# hfds: an image data set of Hugging Face's library: a folder of parquet files or of save_to_disk, or a name on the hub.
# table: a CSV or parquet file with the columns path, label and perhaps split, or a folder with one such file.
# CIFAR10, CIFAR100: downloaded on first use. FashionMNIST, MNIST, KMNIST, EMNIST: their four IDX files, downloaded if
# they are not there. 101_ObjectCategories: made by tools/categories101_train_val_split.py. digits: 1,797 handwritten
# digits that come with scikit-learn.
key(
    "DATA.DATASET",
    "imagenet",
    one_of(
        "imagenet",
        "imagenet-1k",
        "wds",
        "hfds",
        "table",
        "CIFAR10",
        "CIFAR100",
        "FashionMNIST",
        "MNIST",
        "KMNIST",
        "EMNIST",
        "101_ObjectCategories",
        "digits",
    ),
)
key("DATA.DATA_PATH", "", PATH)
# The columns of images and of labels. hfds: empty for the only ones of these types; table: empty for path and label
key("DATA.IMAGE_COLUMN", "")
key("DATA.LABEL_COLUMN", "")
# EMNIST only: which of its data sets
key("DATA.EMNIST_SPLIT", "balanced", one_of("byclass", "bymerge", "balanced", "letters", "digits", "mnist"))
# More than 0: validation is this fraction of each class of the training images, drawn with VAL_SEED alone, and training
# is the rest; the data's own validation (or test) images are not read.
key("DATA.VAL_FRACTION", 0.0, LESS_THAN_1)
key("DATA.VAL_SEED", 0, at_least(0))
# FOLDS 2 or more: cross-validation. VAL_SEED cuts each class into as many parts; validation is part FOLD, from 0.
key("DATA.FOLDS", 0, (lambda value: value == 0 or 2 <= value < float("inf"), "0, or 2 or more"))
key("DATA.FOLD", 0, at_least(0))
# Images per process and step; the global batch is this times processes times TRAIN.ACCUMULATION_STEPS.
key("DATA.BATCH_SIZE", 128, at_least(1))
# Pixels, or [height, width]
key("DATA.IMG_SIZE", 224, (lambda value: min(_pair(value)) >= 1, "1 or more, or [height, width]"))
# bicubic, bilinear, nearest, or random (training only)
key("DATA.INTERPOLATION", "bicubic", one_of("bicubic", "bilinear", "nearest", "random"))
# The order of training images. uniform: each once per epoch. balanced: as many of each class, which repeats images of
# small classes, each time augmented anew, and leaves out some of large ones; an epoch has as many images as before.
key("DATA.SAMPLER", "uniform", one_of("uniform", "balanced"))
# Classes to use: all, names separated by commas, or a .txt file with a name per line
key("DATA.CLASSES", "all", (lambda value: value != "" and _is_path(value), "all, names, or a .txt file"))
# What black and white are in image files of more than 8 bits per channel: LOW,HIGH; file: each file's smallest and
# largest value; auto: 0 and 65535 in files of 16 bits, while those that would be nearly black, and files of 32 bits or
# floating-point values, cannot be read.
key("DATA.PIXEL_RANGE", "auto", (_is_range, "auto, file, or LOW,HIGH with LOW less than HIGH"))
# Turn photographs as their EXIF orientation says. The released models were trained and evaluated without. (Pillow turns
# TIFF files in any case.)
key("DATA.EXIF_ORIENTATION", False)
# Training images to use of each class, drawn with SEED (of those that VAL_FRACTION or FOLDS leave); 0: all
key("DATA.IMAGES_PER_CLASS", 0, at_least(0))
# Read train.zip and val.zip, listed in train_map.txt and val_map.txt, instead of folders.
key("DATA.ZIP_MODE", False)
# Keep files in memory: no; full (every process all of them); part (every process its share, and it trains on that
# share only).
key("DATA.CACHE_MODE", "no", one_of("no", "full", "part"))
key("DATA.PIN_MEMORY", True)
# Fraction of the images that may be unreadable; with more, the run stops.
key("DATA.MAX_UNREADABLE", 0.05, within(0, 1))
# Loader processes per training process; -1: this process's share of the CPU cores, at most 8; 0: none.
key("DATA.NUM_WORKERS", -1, at_least(-1))

# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
# strip_mlp_layer, or timm: any timm model by its MODEL.NAME
key("MODEL.TYPE", "strip_mlp_layer", one_of("strip_mlp_layer", "timm"))
# Names the output folder. With TYPE timm, it names the model too.
key("MODEL.NAME", "strip_mlp", FOLDER_NAME)
# Weights to fine-tune from; a classifier of another size starts anew.
key("MODEL.PRETRAINED", "", PATH)
# Of a checkpoint to fine-tune from or to evaluate: on: the moving average of its weights; off: the weights themselves;
# auto: the average if there is one.
key("MODEL.LOAD_EMA", "auto", one_of(*EMA))
# Checkpoint to continue from, with optimizer, schedule and epoch. One in the output folder takes precedence.
key("MODEL.RESUME", "", PATH)
# 0: as many as the data has
key("MODEL.NUM_CLASSES", 0, at_least(0))
# Stochastic depth. Strip-MLP uses one value for all blocks; timm models apply their own rule.
key("MODEL.DROP_PATH_RATE", 0.1, LESS_THAN_1)
key("MODEL.LABEL_SMOOTHING", 0.1, LESS_THAN_1)

key("MODEL.STRIP_MLP.PATCH_SIZE", 4, at_least(1))
# 3: the data pipeline gives RGB
key("MODEL.STRIP_MLP.IN_CHANS", 3, (lambda value: value == 3, "3, because images are read as RGB"))
key("MODEL.STRIP_MLP.EMBED_DIM", 80, at_least(4))
key(
    "MODEL.STRIP_MLP.LAYERS",
    [2, 2, 6, 2],
    (lambda value: len(value) == 4 and min(value) >= 1, "four numbers, each 1 or more"),
)
# q, channels that share strip weights. 0: the released rule, 2 if EMBED_DIM is a multiple of 80, else 4. -1: all, which
# is one patch (table 7, "without the group strip layer").
key(
    "MODEL.STRIP_MLP.PATCH_CHANNELS",
    0,
    (lambda value: value >= -1, "channels per patch, 0 for the released rule, or -1 for one patch"),
)
# m, odd (table 6)
key("MODEL.STRIP_MLP.STRIP_WIDTH", 3, (lambda value: value > 0 and value % 2 == 1, "1, 3, 5, 7, ..."))
key("MODEL.STRIP_MLP.ALPHA", 3.0, POSITIVE)
# cascade, or parallel: both strips read the module's input (table 8)
key("MODEL.STRIP_MLP.CGSMM_STRUCTURE", "cascade", one_of("cascade", "parallel"))
# both, cgsmm or lsmm; the channels of a missing branch pass unchanged (table 9)
key("MODEL.STRIP_MLP.BRANCHES", "both", one_of("both", "cgsmm", "lsmm"))
key("MODEL.STRIP_MLP.POSITION_TABLES", True)
key("MODEL.STRIP_MLP.MULTI_SCALE_SHORTCUTS", True)
key("MODEL.STRIP_MLP.GRN", True)

# ---------------------------------------------------------------------------------------------------------------------
# The detector on the model (main_detect.py alone)
# ---------------------------------------------------------------------------------------------------------------------
# torchvision's retinanet, faster_rcnn or fcos, with a feature pyramid; or transformers' deformable_detr, rt_detr or
# d_fine, which need requirements/detr.txt
key(
    "DETECTION.DETECTOR",
    "retinanet",
    one_of("retinanet", "faster_rcnn", "fcos", "deformable_detr", "rt_detr", "d_fine"),
)
# Pixels per token side of the model's maps that the detector gets. RetinaNet, FCOS and the DETRs have 8 to 32 in their
# papers, Faster R-CNN 4 to 32.
key(
    "DETECTION.STRIDES",
    [8, 16, 32],
    (
        lambda value: len(value) > 0 and value[0] > 0 and all(2 * a == b for a, b in itertools.pairwise(value)),
        "strides of the model, each twice the one before",
    ),
)
# Only what is more likely is reported; 0: everything, up to MAX_DETECTIONS per image, as COCO's AP counts it
key("DETECTION.SCORE_THRESHOLD", 0.0, LESS_THAN_1)
key("DETECTION.MAX_DETECTIONS", 100, at_least(1))
# Channels of the feature pyramid, or of a DETR's tokens (d_model)
key("DETECTION.HEAD.CHANNELS", 256, (lambda value: value > 0 and value % 32 == 0, "a multiple of 32"))
# Pyramids only: coarser maps than the model's: 2 in RetinaNet and FCOS, 1 in Faster R-CNN; 0 if all objects are small
key("DETECTION.HEAD.EXTRA_LEVELS", 0, (lambda value: value in (0, 1, 2), "0, 1 or 2"))
# RetinaNet and Faster R-CNN only: the smallest anchor of a map, as a multiple of its stride; how many sizes there are
# from it to twice that; and ratios of height to width. RetinaNet: 4, 3; Faster R-CNN: 8, 1
key("DETECTION.HEAD.ANCHOR_SCALE", 4.0, POSITIVE)
key("DETECTION.HEAD.ANCHORS_PER_OCTAVE", 3, within(1, 100))
key(
    "DETECTION.HEAD.ASPECT_RATIOS",
    [0.5, 1.0, 2.0],
    (lambda value: len(value) > 0 and min(value) > 0 and max(value) < 100, "numbers, more than 0"),
)
# Faster R-CNN only: regions of an image in evaluation, and twice as many in training; the size in pixels of a box that
# is pooled from the map at stride 16
key("DETECTION.HEAD.PROPOSALS", 1000, at_least(4))
key("DETECTION.HEAD.ROI_SCALE", 224, at_least(1))
# DETRs only: queries, which is the largest number of objects in an image; layers (Deformable DETR: 6 and 6, RT-DETR and
# D-FINE: 1 and 6), heads, hidden channels of their MLPs, dropout
key("DETECTION.HEAD.QUERIES", 300, at_least(1))
key("DETECTION.HEAD.ENCODER_LAYERS", 1, within(1, 100))
key("DETECTION.HEAD.DECODER_LAYERS", 6, within(1, 100))
key("DETECTION.HEAD.ATTENTION_HEADS", 8, at_least(1))
key("DETECTION.HEAD.HIDDEN_CHANNELS", 1024, at_least(1))
key("DETECTION.HEAD.DROPOUT", 0.0, LESS_THAN_1)
# RT-DETR and D-FINE only: queries that training adds, which are true boxes with noise
key("DETECTION.HEAD.DENOISING_QUERIES", 100, at_least(0))

# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
key("TRAIN.EPOCHS", 300, at_least(1))
key("TRAIN.WARMUP_EPOCHS", 20, at_least(0))
key("TRAIN.WEIGHT_DECAY", 0.05, at_least(0))
# Each of the three learning rates is multiplied by global batch / LR_REFERENCE_BATCH.
key("TRAIN.BASE_LR", 5e-4, POSITIVE)
key("TRAIN.WARMUP_LR", 5e-7, at_least(0))
key("TRAIN.MIN_LR", 5e-6, at_least(0))
# 512 is Swin's and DeiT's rule. The Strip-MLP configs say 300, because the released code divides by its 300 epochs
# there: the paper's peak at a global batch of 1024 is 1.7e-3, not 1.0e-3.
key("TRAIN.LR_REFERENCE_BATCH", 512, at_least(1))
# Weights of the classes in the loss: none; balanced, in inverse proportion to their training images; or a number for
# each class in label order, separated by commas. Only their ratios matter: the mean over the training images is made 1.
key("TRAIN.CLASS_WEIGHTS", "none", (_are_weights, "none, balanced, or numbers more than 0 separated by commas"))
# Early stopping: the run ends after the first evaluation this many epochs after the best one, counted by
# PATIENCE_METRIC; 0: never. top1: the best epoch is that of best.pth (of detectors by AP). val_loss: that with the
# lowest validation loss.
key("TRAIN.PATIENCE", 0, at_least(0))
key("TRAIN.PATIENCE_METRIC", "top1", one_of("top1", "val_loss"))
# Largest global gradient norm, or what CLIP_MODE makes of it; 0: no clipping
key("TRAIN.CLIP_GRAD", 5.0, at_least(0))
# norm: of all gradients together. value: CLIP_GRAD is the largest absolute value of a gradient's element. agc: it is
# the largest norm of a gradient as a fraction of its weight's, by rows, such as 0.02; the classifier is left out (Brock
# et al., 2021).
key("TRAIN.CLIP_MODE", "norm", one_of("norm", "value", "agc"))
# cross_entropy, or bce: binary cross-entropy of each class (Wightman et al., 2021). LABEL_SMOOTHING is for both.
key("TRAIN.LOSS", "cross_entropy", one_of("cross_entropy", "bce"))
# bce only: targets above it are 1, all others 0; 0: targets stay as they are
key("TRAIN.BCE_THRESHOLD", 0.0, LESS_THAN_1)
# Steps in a row that may be skipped because loss or gradient is not finite; one more stops the run. Loss scaling
# (float16) skips some at the start: from 2^16 to 1 takes 16 halvings.
key("TRAIN.MAX_SKIPPED_STEPS", 20, at_least(0))
# Continue from the newest checkpoint in the output folder if there is one.
key("TRAIN.AUTO_RESUME", True)
# Forward and backward passes per optimizer step
key("TRAIN.ACCUMULATION_STEPS", 1, at_least(1))
# Recompute activations in the backward pass: less memory, more time
key("TRAIN.USE_CHECKPOINT", False)
# torch.compile the model. The first step and the first evaluation then take minutes, all others less time. On the CPU
# it needs a C++ compiler.
key("TRAIN.COMPILE", False)
# What is compiled at once: blocks, one graph of each kind of repeated block, or the whole model, which takes longer
key("TRAIN.COMPILE_UNIT", "blocks", one_of("blocks", "model"))
# Images and convolution weights in torch.channels_last, which is faster for timm's convolutional models. Strip-MLP's
# maps always are in it.
key("TRAIN.CHANNELS_LAST", True)
# Batch statistics over all processes (CUDA only). Without it each process has its own; they are averaged before
# evaluating and saving.
key("TRAIN.SYNC_BN", False)

# Distillation: none; soft, the teacher's probabilities; hard, its first choice (DeiT)
key("TRAIN.DISTILLATION.TYPE", "none", one_of("none", "soft", "hard"))
# A timm model, with timm's weights or those of TEACHER_CHECKPOINT. Empty: TEACHER_CHECKPOINT is one of this project,
# which says what it is of.
key("TRAIN.DISTILLATION.TEACHER", "")
key("TRAIN.DISTILLATION.TEACHER_CHECKPOINT", "", PATH)
# Weight of the teacher's opinion; the labels have 1 - ALPHA. DeiT: 0.5 if hard, 0.1 if soft
key("TRAIN.DISTILLATION.ALPHA", 0.5, within(0, 1))
# soft only; DeiT: 3
key("TRAIN.DISTILLATION.TEMPERATURE", 1.0, POSITIVE)
# A file of the teacher's logits of the training images as evaluation sees them, made if it is not there: faster, but
# the student sees other crops. Not with mixup and cutmix. Empty: the teacher is asked at each step.
key("TRAIN.DISTILLATION.CACHE", "", PATH)

# After the warm-up: cosine, linear, poly (to a POWER) or tanh down to MIN_LR; step; constant; wsd (constant, then down
# at the end); plateau (down when evaluations do not get better)
key(
    "TRAIN.LR_SCHEDULER.NAME",
    "cosine",
    one_of("cosine", "linear", "step", "poly", "tanh", "constant", "wsd", "plateau"),
)
# step: every DECAY_EPOCHS after the warm-up, times DECAY_RATE. plateau: times DECAY_RATE too
key("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30, at_least(1))
key("TRAIN.LR_SCHEDULER.DECAY_RATE", 0.1, POSITIVE)
# cosine, linear, poly and tanh: how often they go down; how much longer each time takes than the one before, and what
# its peak is multiplied by; epochs at MIN_LR at the end. All within TRAIN.EPOCHS.
key("TRAIN.LR_SCHEDULER.CYCLES", 1, at_least(1))
key("TRAIN.LR_SCHEDULER.CYCLE_MUL", 1.0, at_least(1))
key("TRAIN.LR_SCHEDULER.CYCLE_DECAY", 1.0, (lambda value: 0 < value <= 1, "more than 0, to 1"))
key("TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS", 0, at_least(0))
# poly only; 1 is linear
key("TRAIN.LR_SCHEDULER.POWER", 0.5, POSITIVE)
# wsd only: the part of the epochs after the warm-up in which the rate goes down, and how
key("TRAIN.LR_SCHEDULER.WSD_DECAY", 0.2, (lambda value: 0 < value <= 1, "more than 0, to 1"))
key("TRAIN.LR_SCHEDULER.WSD_SHAPE", "1-sqrt", one_of("1-sqrt", "linear", "cosine"))
# plateau only: after PATIENCE evaluations in a row of which METRIC (top1, of detectors AP; val_loss) was not better
# than the best by more than THRESHOLD
key("TRAIN.LR_SCHEDULER.PATIENCE", 10, at_least(1))
key("TRAIN.LR_SCHEDULER.METRIC", "top1", one_of("top1", "val_loss"))
key("TRAIN.LR_SCHEDULER.THRESHOLD", 0.0, at_least(0))

# Fine-tuning: the learning rate of a layer is this times that of the next one; 1: all the same. timm's group_matcher
# says what a layer is (patch embedding, each block, classifier).
key("TRAIN.LAYER_DECAY", 1.0, (lambda value: 0 < value <= 1, "more than 0, to 1"))
# What is frozen: none; backbone, which leaves the classifier (a linear probe); or names of modules, separated by
# commas, such as patch_embed,stages.0,merging.0
key("TRAIN.FREEZE", "none")
# Decay per step of an exponential moving average of the weights, such as 0.9999; smaller in the first steps (timm's
# warm-up); 0: no average. It is evaluated beside the weights, and whoever uses a checkpoint gets it.
key("TRAIN.EMA_DECAY", 0.0, LESS_THAN_1)

# adamw or sgd; any of timm's, such as lamb, lion, muon or adan; torch_muon; schedulefree_adamw, schedulefree_radam or
# schedulefree_sgd. `optimizer.optimizer_names()` lists them. Weight decay and layer decay are the same for all.
key("TRAIN.OPTIMIZER.NAME", "adamw", (str.isidentifier, "adamw, sgd, or a name that docs/training.md lists"))
# All but adamw and sgd, which have the keys below: arguments in place of the optimizer's own defaults, such as
# betas=(0.95, 0.98), eps=1e-6
key("TRAIN.OPTIMIZER.ARGS", "")
# adamw only
key("TRAIN.OPTIMIZER.EPS", 1e-8, POSITIVE)
key(
    "TRAIN.OPTIMIZER.BETAS",
    [0.9, 0.999],
    (lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value), "two numbers, each 0 to less than 1"),
)
# sgd only (Nesterov)
key("TRAIN.OPTIMIZER.MOMENTUM", 0.9, LESS_THAN_1)
# One kernel for all parameters. Without it, every step on CUDA waits for the device.
key("TRAIN.OPTIMIZER.FUSED", True)

# ---------------------------------------------------------------------------------------------------------------------
# Augmentation (timm's)
# ---------------------------------------------------------------------------------------------------------------------
# Probability of a horizontal flip
key("AUG.HFLIP", 0.5, within(0, 1))
# Images of IMG_SIZE <= 32, which are not cropped: the largest shift, as a fraction of height and width
key("AUG.SHIFT", 0.125, within(0, 0.5))
# Not applied if AUTO_AUGMENT is on (timm's rule).
key("AUG.COLOR_JITTER", 0.4, at_least(0))
# timm's RandAugment / AutoAugment policy string; "none" for none
key("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1")
# Random erasing: probability, fill (const, rand, pixel), number of regions
key("AUG.REPROB", 0.25, within(0, 1))
key("AUG.REMODE", "pixel", one_of("const", "rand", "pixel"))
key("AUG.RECOUNT", 1, at_least(1))
# Beta distributions of mixup and cutmix; 0 turns one off
key("AUG.MIXUP", 0.8, at_least(0))
key("AUG.CUTMIX", 1.0, at_least(0))
# Probability of either, and of cutmix rather than mixup where both are on
key("AUG.MIXUP_PROB", 1.0, within(0, 1))
key("AUG.MIXUP_SWITCH_PROB", 0.5, within(0, 1))
# batch, pair or elem
key("AUG.MIXUP_MODE", "batch", one_of("batch", "pair", "elem"))

# ---------------------------------------------------------------------------------------------------------------------
# Detection
# ---------------------------------------------------------------------------------------------------------------------
# Sizes that images are brought to, as height, width, height, width, ...: each goes to the one of the nearest aspect
# ratio, and a batch has one of them. [0]: DATA.IMG_SIZE alone.
key(
    "DETECTION.SIZES",
    [0],
    (
        lambda value: value in ([], [0]) or (len(value) % 2 == 0 and min(value) >= 1 and len(value) <= 40),
        "[height, width, height, width, ...], each 1 or more, at most 20 sizes, or [0] for DATA.IMG_SIZE",
    ),
)
# How: resize: to exactly that size; pad: the aspect ratio is kept, and the rest is filled with ImageNet's mean
key("DETECTION.FIT", "resize", one_of("resize", "pad"))
# Training only, drawn for each image. Probability of a horizontal flip
key("DETECTION.FLIP", 0.5, within(0, 1))
# The image is scaled by a factor between these two, beyond what fits it into its size, and cropped or padded to that
key(
    "DETECTION.SCALE_JITTER",
    [0.8, 1.25],
    (lambda value: len(value) == 2 and 0.05 <= value[0] <= value[1] <= 20, "two factors in order, 0.05 to 20"),
)
# Probability of a crop before that, which keeps a box with an overlap drawn from 0 to 1 (Liu et al., 2016, SSD)
key("DETECTION.CROP", 0.0, within(0, 1))
# Probability of a change of brightness, contrast, saturation and hue, in half of the cases with the colour channels in
# another order (SSD's as well); 0 where classes differ by their colour
key("DETECTION.PHOTOMETRIC", 0.0, within(0, 1))
# Probability that an image is put together from four, it and three others (Bochkovskiy et al., 2020, YOLOv4)
key("DETECTION.MOSAIC", 0.0, within(0, 1))

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
# Resize to 256 / 224 of IMG_SIZE and crop the centre; False resizes to IMG_SIZE. Images of IMG_SIZE <= 32 are never
# cropped.
key("TEST.CROP", True)
# Epochs between two evaluations; the last epoch is always evaluated. best.pth is the best of those.
key("TEST.INTERVAL", 1, at_least(1))

# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision. auto: on CUDA bfloat16 if the hardware has it, else float16; off on the CPU. on: like auto, but
# bfloat16 on the CPU. Or off, bfloat16, float16.
key("AMP", "auto", one_of("auto", "on", "off", "bfloat16", "float16"))
# auto (CUDA if there is a device), cpu or cuda
key("DEVICE", "auto", one_of("auto", "cpu", "cuda"))
# Everything a run writes goes to OUTPUT/MODEL.NAME/TAG.
key("OUTPUT", "output", (lambda value: value != "" and _is_path(value), "a folder"))
key("TAG", "default", FOLDER_NAME)
# Epochs between two kept checkpoints (ckpt_epoch_N.pth); last.pth and best.pth are written when they change.
key("SAVE_FREQ", 10, at_least(1))
# How many of those to keep; 0: all
key("KEEP_CHECKPOINTS", 0, at_least(0))
# Minutes, and optimizer steps, between two writes of last.pth inside an epoch; 0: only after epochs
key("SAVE_MINUTES", 0.0, at_least(0))
key("SAVE_STEPS", 0, at_least(0))
# Seconds without progress after which a process stops the run and names the process that hangs
key("TIMEOUT", 1800.0, within(1, 10**9))
# Where the metrics of each epoch go beside metrics.jsonl: tensorboard, csv, wandb, mlflow; [] for nowhere. wandb and
# mlflow write into the run's folder, and need requirements/loggers.txt.
key(
    "LOGGERS",
    ["tensorboard"],
    (
        lambda value: set(value) <= {"tensorboard", "csv", "wandb", "mlflow"} and len(set(value)) == len(value),
        "tensorboard, csv, wandb and mlflow, each once",
    ),
)
# Optimizer steps between two log lines
key("PRINT_FREQ", 10, at_least(1))
key("SEED", 0, at_least(0))


# Keys of YAML files for the released code that this one lacks, and where their values go. None: nowhere, because they
# change nothing in the released models.
RELEASED_KEYS = {
    "MODEL.ALPHA": "MODEL.STRIP_MLP.ALPHA",
    "MODEL.DROP": None,
    "MODEL.DROP_RATE": None,
    "MODEL.PATCH_NORM": None,
    "MODEL.STRIP_MLP.PATCH_NORM": None,
}


# A YAML file of a few lines can stand for billions of values (aliases of aliases), and a few files for billions of
# files (BASE: [a.yaml, a.yaml], and so on in a.yaml).
MOST_YAML_BYTES = 2**17
MOST_YAML_VALUES = 100_000
MOST_YAML_FILES = 100


class ConfigError(UserError):
    """A config file, key or value that cannot be used."""

    exit_status = 2


def get_default_config() -> CfgNode:
    """A copy of the defaults."""
    return _C.clone()


# What `main_eval.py --eval-set` accepts, see data/matching.py
EVAL_SETS = ("imagenet-r", "imagenet-a", "imagenet-sketch", "imagenet-v2", "imagenet-real", "numbered")

# What --engine accepts, see engine/inference.py; and the ends of the names of exported files
ENGINES = ("auto", "torch", "reparameterized", "compile", "onnxruntime", "openvino")
ENGINE_FILES = (".onnx", ".xml", ".pt2")


def add_arguments(parser: argparse.ArgumentParser, cfg_required: bool = True) -> None:
    """The options that all entry points share; `get_config` reads them."""
    parser.add_argument("--cfg", required=cfg_required, metavar="FILE", help="YAML config file")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set, in pairs"
    )
    parser.add_argument("--batch-size", type=int, help="images per process (DATA.BATCH_SIZE)")
    parser.add_argument("--data-path", help="data set folder (DATA.DATA_PATH)")
    parser.add_argument("--zip", action="store_true", help="read train.zip and val.zip (DATA.ZIP_MODE)")
    parser.add_argument("--cache-mode", choices=["no", "full", "part"], help="keep files in memory (DATA.CACHE_MODE)")
    parser.add_argument("--pretrained", help="weights to fine-tune from (MODEL.PRETRAINED)")
    parser.add_argument("--resume", help="checkpoint to continue from or to evaluate (MODEL.RESUME)")
    _add_ema(parser)
    parser.add_argument("--accumulation-steps", type=int, help="passes per step (TRAIN.ACCUMULATION_STEPS)")
    parser.add_argument("--use-checkpoint", action="store_true", help="recompute activations (TRAIN.USE_CHECKPOINT)")
    parser.add_argument("--amp", choices=["auto", "on", "off", "bfloat16", "float16"], help="mixed precision (AMP)")
    parser.add_argument("--amp-opt-level", choices=["O0", "O1", "O2"], help="deprecated apex level: O0 is --amp off")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to run (DEVICE)")
    parser.add_argument("--output", help="root of the output folders (OUTPUT)")
    parser.add_argument("--tag", help="name of this run's folder (TAG)")
    # torch.distributed.launch passes it; LOCAL_RANK says the same on every launcher since PyTorch 1.10.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="whether to take a checkpoint's moving average of the weights (default: if there is one; MODEL.LOAD_EMA)",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The options that name a trained model; `engine.trained.load_trained` reads them.

    Args:
        nargs: argparse's, for tools that take several checkpoints.
    """
    parser.add_argument("checkpoint", type=Path, nargs=nargs, help="a checkpoint, of whatever origin: file or folder")
    parser.add_argument("--cfg", metavar="FILE", help="config of the model; ours have it in the checkpoint")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set, in pairs"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=Path,
        help="names of the classes, one per line in label order (default: those in the checkpoint, or ImageNet-1K's "
        "if there are 1,000)",
    )
    _add_ema(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to run (DEVICE)")


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """The option that names what computes the model; `engine.inference.build_engine` reads it."""
    parser.add_argument(
        "--engine",
        type=_engine,
        default="auto",
        metavar="NAME",
        help=f"what computes the model: {', '.join(ENGINES)}, or a file of tools/export.py, which you trust (default: "
        "auto, the fastest that is installed and exact, where it saves more time than it takes to prepare)",
    )


def _engine(text: str) -> str:
    if text not in ENGINES and Path(text).suffix not in ENGINE_FILES:
        raise argparse.ArgumentTypeError(
            f"{text!r}; accepted: {', '.join(ENGINES)}, or a file that ends in {', '.join(ENGINE_FILES)}"
        )
    return text


# The keys of a config that do not reach its model, and why.
IdleKeys = Callable[[CfgNode], tuple[Sequence[str], str]]


def get_config(
    args: argparse.Namespace, idle_keys: IdleKeys | None = None, own: Mapping[str, Any] | None = None
) -> tuple[CfgNode, list[str]]:
    """The frozen config of a parsed command line, and notes for the log about keys that were renamed or ignored.

    Args:
        own: the config of the checkpoint, by dotted keys, where there is no --cfg.

    Raises:
        ConfigError: naming the file (or flag), the key and what is accepted.
    """
    flags = {
        "DATA.BATCH_SIZE": ("--batch-size", args.batch_size),
        "DATA.DATA_PATH": ("--data-path", args.data_path),
        "DATA.ZIP_MODE": ("--zip", args.zip or None),
        "DATA.CACHE_MODE": ("--cache-mode", args.cache_mode),
        "MODEL.PRETRAINED": ("--pretrained", args.pretrained),
        "MODEL.RESUME": ("--resume", args.resume),
        "MODEL.LOAD_EMA": ("--ema", {True: "on", False: "off", None: None}[args.ema]),
        "TRAIN.ACCUMULATION_STEPS": ("--accumulation-steps", args.accumulation_steps),
        "TRAIN.USE_CHECKPOINT": ("--use-checkpoint", args.use_checkpoint or None),
        "AMP": ("--amp", args.amp),
        "DEVICE": ("--device", args.device),
        "OUTPUT": ("--output", args.output),
        "TAG": ("--tag", args.tag),
    }
    notes = []
    if args.amp_opt_level:
        level = {"O0": "off"}.get(args.amp_opt_level, "on")
        if args.amp is None:
            flags["AMP"] = ("--amp-opt-level", level)
        read_as = f"read as --amp {level}" if args.amp is None else f"ignored for --amp {args.amp}"
        notes.append(f"--amp-opt-level is apex's and deprecated: {args.amp_opt_level} is {read_as}")
    overrides = [(key, value, flag) for key, (flag, value) in flags.items() if value is not None]
    if own is not None:
        return config_of(own, args.resume or args.pretrained, args.opts, overrides), notes
    config, file_notes = load_config(args.cfg, args.opts, overrides, idle_keys)
    return config, file_notes + notes


def load_config(
    path: str | Path,
    opts: Sequence[str] = (),
    overrides: Sequence[tuple[str, Any, str]] = (),
    idle_keys: IdleKeys | None = None,
) -> tuple[CfgNode, list[str]]:
    """The frozen config of a YAML file with `opts` and then `overrides` on top, and notes for the log.

    Args:
        opts: key, value, key, value, ...
        overrides: key, value, and where the value comes from.
        idle_keys: `models.idle_keys`, if the notes are to name chosen values that do not reach the model.

    Raises:
        ConfigError: naming the file, the key and what is accepted.
    """
    merge = _Merge()
    merge.file(Path(path), including=())
    merge.options(opts)
    for key, value, where in overrides:
        merge.value(key, value, where)
    validate(merge.config, merge.origins)
    if idle_keys:
        merge.notes += notes_without_effect(merge.config, merge.origins, merge.inherited, *idle_keys(merge.config))
    merge.config.freeze()
    return merge.config, merge.notes


def config_of(
    values: Mapping[str, Any],
    where: str,
    opts: Sequence[str] = (),
    overrides: Sequence[tuple[str, Any, str]] = (),
) -> CfgNode:
    """The frozen config of a checkpoint: `values` by dotted key (see `leaves`) over the defaults, then `opts` and
    `overrides` as in `load_config`. Keys that this version does not have are left out.

    Raises:
        ConfigError: naming `where`, the key and what is accepted.
    """
    merge = _Merge()
    for key in leaves(_C):
        if key in values:
            merge.value(key, values[key], where)
    merge.options(opts)
    for key, value, flag in overrides:
        merge.value(key, value, flag)
    validate(merge.config, merge.origins)
    merge.config.freeze()
    return merge.config


class _Merge:
    """A config being put together, with the origin of every value that is not a default."""

    def __init__(self) -> None:
        self.config = get_default_config()
        self.origins: dict[str, str] = {}
        self.notes: list[str] = []
        self.files = 0
        self.inherited: set[str] = set()  # keys that a BASE has set last

    def file(self, path: Path, including: tuple[Path, ...]) -> None:
        """Merges a YAML file after the files in its `BASE`, which are relative to it."""
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        if resolved in including:
            chain = " -> ".join(str(p) for p in (*including, resolved))
            raise ConfigError(f"{path}: BASE goes in a circle: {chain}")
        self.files += 1
        if self.files > MOST_YAML_FILES:
            raise ConfigError(f"{path}: BASE leads to more than {MOST_YAML_FILES} files")
        tree = read_yaml(path)
        bases = tree.pop("BASE", None) or []
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(
            isinstance(b, str) and b.isprintable() and len(b) < 1000 for b in bases
        ):
            raise ConfigError(f"{path}: BASE is {_show(bases)}; accepted: a file name or a list of file names")
        for base in filter(None, bases):  # Swin's YAML files say BASE: [''] for none
            self.file(path.parent / base, (*including, resolved))
        if not including:
            self.inherited = set(self.origins)
        self.tree(tree, (), str(path))

    def options(self, opts: Sequence[str]) -> None:
        """Merges the pairs of --opts."""
        if len(opts) % 2:
            raise ConfigError(f"--opts takes pairs of a key and a value; the last key {_show(opts[-1])} has no value")
        for key, value in zip(opts[::2], opts[1::2], strict=True):
            self.value(key, value, "--opts")

    def tree(self, tree: dict, prefix: tuple[str, ...], where: str) -> None:
        for name, value in tree.items():
            path = (*prefix, name if isinstance(name, str) else _show(name))
            node = find(self.config, path)
            if isinstance(node, CfgNode) and (isinstance(value, dict) or value is None):
                self.tree(value or {}, path, where)
            else:
                self.value(".".join(path), value, where)

    def value(self, key: str, value: Any, where: str) -> None:
        if key in RELEASED_KEYS:
            renamed = RELEASED_KEYS[key]
            if renamed is None:
                self.notes.append(f"{where}: {key} changes nothing in the released models and is ignored")
                return
            self.notes.append(f"{where}: {key} is read as {renamed}")
            key = renamed
        default = find(_C, key.split("."))
        if default is None:
            known = [*leaves(_C), *RELEASED_KEYS]
            # A key put in the wrong section is as likely as a misspelt one.
            same_name = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
            nearest = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            shown = key if key.isprintable() and len(key) <= 200 else _show(key)
            raise ConfigError(f"{where}: unknown key {shown}{hint}")
        if isinstance(default, CfgNode):
            raise ConfigError(f"{where}: {key} is a section, not a value; its keys: {', '.join(default)}")
        section, _, name = key.rpartition(".")
        node = find(self.config, section.split(".")) if section else self.config
        if key in NUMBERS_AS_TEXT and not isinstance(value, str):
            value = ",".join(map(str, coerce(value, [0.0], f"{where}: {key}")))
        if key == "DATA.IMG_SIZE":
            node[name] = coerce_size(value, f"{where}: {key}")
        else:
            node[name] = coerce(value, default, f"{where}: {key}")
        self.origins[key] = where
        self.inherited.discard(key)


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's booleans: `AMP: off` and `CACHE_MODE: no` are words, not False."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuses a key that is there twice. Other YAML loaders keep the last silently."""
        keys = set()
        for key in [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def read_yaml(path: Path) -> dict:
    """A YAML file's mapping, through the safe loader only (no Python objects, no code)."""
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a config must be a .yaml or .yml file; anything else (.py above all) is not read")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise ConfigError(f"{path}: cannot be read: not a file")
        if status.st_size > MOST_YAML_BYTES:
            raise ConfigError(f"{path}: has {status.st_size:,} bytes; accepted: {MOST_YAML_BYTES:,}")
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_YAML_VALUES:
            raise ConfigError(f"{path}: its aliases repeat each other into more than {MOST_YAML_VALUES:,} values")
        tree = None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # text that is no UTF-8, month 13; what PyYAML raises on `!!bool maybe` can be anything
        reason = " ".join((str(error) or type(error).__name__).split())[:500]
        raise ConfigError(f"{path}: not valid YAML: {reason if reason.isprintable() else ascii(reason)}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; accepted: a mapping of config keys")
    return tree or {}


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a YAML node stands for with its aliases written out; infinitely many if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # as long as it is being counted
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = itertools.chain(*children) if isinstance(node, yaml.MappingNode) else children
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def find(config: CfgNode, path: Sequence[str]) -> Any:
    """The section or value at a path of names; None if there is none (no config value is None)."""
    node = config
    for name in path:
        if not isinstance(node, CfgNode) or name not in node:
            return None
        node = node[name]
    return node


def leaves(config: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All values by dotted key."""
    values = {}
    for name, value in config.items():
        if isinstance(value, CfgNode):
            values.update(leaves(value, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values


def coerce(value: Any, default: Any, where: str) -> Any:
    """`value` in the type of `default`, or ConfigError. Text is read as a literal where the type is not text: what
    --opts gives, and `5e-4`, which YAML 1.1 takes for text."""
    kind = type(default)
    if kind is str:
        if isinstance(value, str | float) or (isinstance(value, int) and _is_count(value)):
            return str(value)
        raise ConfigError(f"{where} is {_show(value)}; accepted: text")
    if isinstance(value, str):
        try:
            words = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}
            literal = ast.literal_eval(words.get(value.lower(), value))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            literal = value
        if kind is list and isinstance(default[0], str) and literal == value:  # --opts LOGGERS [tensorboard,csv]
            literal = [word.strip() for word in value.strip("[]").split(",") if word.strip()]
    else:
        literal = value
    if kind is bool and isinstance(literal, bool):
        return literal
    if kind is int and isinstance(literal, int) and _is_count(literal):
        return literal
    if kind is float and isinstance(literal, int | float) and not isinstance(literal, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond all floats
            return float(literal)
    if kind is list and isinstance(literal, list | tuple):
        return [coerce(item, default[0], f"{where}[{i}]") for i, item in enumerate(literal)]
    accepted = {bool: "True or False", int: "a whole number", float: "a number", list: "a list"}[kind]
    raise ConfigError(f"{where} is {_show(value)}; accepted: {accepted}")


def coerce_size(value: Any, where: str) -> int | list[int]:
    """The size of an image, or ConfigError: pixels, or [height, width]; a square as its one number."""
    for default in (0, [0]):
        with contextlib.suppress(ConfigError):
            size = coerce(value, default, where)
            if isinstance(size, int) or len(size) == 2:
                return size if isinstance(size, int) or size[0] != size[1] else size[0]
    raise ConfigError(f"{where} is {_show(value)}; accepted: a whole number, or two of them, [height, width]")


def image_size(config: CfgNode) -> tuple[int, int]:
    """Height and width of the images that the model is given, in pixels."""
    return _pair(config.DATA.IMG_SIZE)


def detection_sizes(config: CfgNode) -> list[tuple[int, int]]:
    """The (height, width) in pixels that images are brought to for detection, in the order of DETECTION.SIZES."""
    sides = [side for side in config.DETECTION.SIZES if side]
    return list(zip(sides[::2], sides[1::2], strict=True)) or [image_size(config)]


def _is_count(number: int) -> bool:
    """Whether it has at most 64 bits: larger ones may not even be printed."""
    return not isinstance(number, bool) and -(2**63) <= number < 2**63


def _show(value: Any) -> str:
    """A value for messages, on one line; the beginning of a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python prints whole numbers of up to 4300 digits only
        text = "a number too large to print"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def save_config(config: CfgNode, folder: Path) -> None:
    """Writes the config to `<folder>/config.yaml`, from which --cfg loads it back. A different one there is kept as
    `config_old<n>.yaml`."""
    write_keeping_old(folder / "config.yaml", config.dump())


def validate(config: CfgNode, origins: dict[str, str]) -> None:
    """Raises ConfigError for the first value outside its range, or pair of values that do not go together.

    `origins` says where each value that is not a default came from.
    """

    def says(key: str) -> str:
        return f"{origins.get(key, 'default')}: {key} is {_show(find(config, key.split('.')))}"

    for key, (accepts, accepted) in ACCEPTED.items():
        if not accepts(find(config, key.split("."))):
            raise ConfigError(f"{says(key)}; accepted: {accepted}")
    if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        raise ConfigError(
            f"{says('TRAIN.WARMUP_EPOCHS')} and {says('TRAIN.EPOCHS')}; accepted: a warm-up shorter than the training, "
            "for example --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
        )
    if config.DATA.FOLDS and config.DATA.VAL_FRACTION:
        raise ConfigError(f"{says('DATA.FOLDS')} and {says('DATA.VAL_FRACTION')}; accepted: one of them")
    if config.DATA.FOLD and config.DATA.FOLD >= config.DATA.FOLDS:
        accepted = f"0 to {config.DATA.FOLDS - 1}" if config.DATA.FOLDS else "0, as there are no DATA.FOLDS"
        raise ConfigError(f"{says('DATA.FOLD')}; accepted: {accepted}")
    if config.DATA.SAMPLER == "balanced" and config.TRAIN.CLASS_WEIGHTS == "balanced":
        raise ConfigError(
            f"{says('DATA.SAMPLER')} and {says('TRAIN.CLASS_WEIGHTS')}: small classes would count twice over; "
            "accepted: one of them"
        )
    if config.TRAIN.LOSS == "bce" and config.TRAIN.CLASS_WEIGHTS != "none":
        raise ConfigError(f"{says('TRAIN.CLASS_WEIGHTS')}, which is for cross_entropy; {says('TRAIN.LOSS')}")
    cooldown = config.TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS
    if cooldown and config.TRAIN.WARMUP_EPOCHS + cooldown >= config.TRAIN.EPOCHS:
        raise ConfigError(
            f"{says('TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS')}, {says('TRAIN.WARMUP_EPOCHS')} and {says('TRAIN.EPOCHS')}; "
            "accepted: a warm-up and a cooldown that leave epochs between them"
        )
    if config.TRAIN.LR_SCHEDULER.NAME == "plateau" and config.TRAIN.LR_SCHEDULER.DECAY_RATE >= 1:
        raise ConfigError(f"{says('TRAIN.LR_SCHEDULER.DECAY_RATE')}; accepted with plateau: more than 0, less than 1")
    if config.DATA.ZIP_MODE and config.DATA.DATASET not in ("imagenet", "imagenet-1k"):
        raise ConfigError(f"{says('DATA.ZIP_MODE')}, which is for imagenet, not for {config.DATA.DATASET}")


def notes_without_effect(
    config: CfgNode, origins: dict[str, str], inherited: set[str], idle: Sequence[str], reason: str
) -> list[str]:
    """Notes for the log about the keys `idle`, which do not reach the model for some `reason`.

    Only deliberate choices are reported: not defaults, not what a BASE has set for its own model, and nothing of a file
    that sets all of them, as a run's config.yaml does.
    """
    notes = []
    dumped = set.intersection(*({origins.get(f"MODEL.STRIP_MLP.{name}")} for name in config.MODEL.STRIP_MLP))
    for name in idle:
        value = find(config, name.split("."))
        chosen = name in origins and name not in inherited and origins[name] not in dumped
        if chosen and value != find(_C, name.split(".")):
            notes.append(f"{origins[name]}: {name} is {_show(value)}, which changes nothing, because {reason}")
    return notes
