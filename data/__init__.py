"""Data: sources of labelled images, transforms, loaders."""

from .build import (
    Sources,
    build_eval_loader,
    build_loader,
    build_sources,
    build_split,
    build_train_loader,
    check_num_classes,
    digit_sources,
    holds_out,
    source_digest,
    with_class_count,
)
from .dataset import Sample
from .device import build_batch_transform, build_normalize, denormalize
from .transforms import build_mixup

__all__ = [
    "Sample",
    "Sources",
    "build_batch_transform",
    "build_eval_loader",
    "build_loader",
    "build_mixup",
    "build_normalize",
    "build_sources",
    "build_split",
    "build_train_loader",
    "check_num_classes",
    "denormalize",
    "digit_sources",
    "source_digest",
    "holds_out",
    "with_class_count",
]
