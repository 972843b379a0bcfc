"""From a config to sources, data sets and loaders."""

import hashlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from yacs.config import CfgNode

from config import image_size
from data.arrays import by_class
from data.dataset import BalancedSampler, ClassificationDataset, EvalSampler, TrainSampler
from data.decoding import build_decoder, count_turned
from data.errors import DataError
from data.hfds import hf_sources, hf_split
from data.idx import IDX_DATASETS, idx_sources
from data.memory import InMemoryDataset, collated, suits_batches
from data.shards import ShardSource
from data.sources import VALIDATION, ArraySource, FolderSource, Source, SubsetSource, ZipSource
from data.tables import TRAINING, table_sources, table_split
from data.transforms import build_transform
from runtime.distributed import World, from_all, main_process_first
from runtime.signals import ignore_signals
from runtime.slurm import is_task
from utils import printable

DIGITS_TEST_IMAGES = 360  # 20 % of 1,797, rounded up


class Sources(NamedTuple):
    """Training and validation samples with the same classes. Either is None where it was not asked for."""

    train: Source | None
    val: Source | None

    @property
    def notes(self) -> list[str]:
        """What was left out of the data, for the log."""
        notes = [note for source in self if source for note in source.notes]
        if any(source and len(source.classes) == 1 for source in self):
            notes.append("the data has a single class: whatever a model says is right")
        return list(dict.fromkeys(notes))


def build_sources(config, world: World, train: bool = True, val: bool = True) -> Sources:
    """The sources of `config.DATA`.

    Raises:
        DataError: the data is missing, empty, cannot be downloaded, other data on another machine, or training and
            validation have different classes.
    """
    if holds_out(config):
        # The data's own validation images are not even looked for.
        splits = hold_out(_splits(config, world, True, False)[True], config)
    else:
        splits = _splits(config, world, train, val)
    sources = Sources(splits.get(True) if train else None, splits.get(False) if val else None)
    check_same_data(config, sources, world)
    for source in sources:
        if source:
            source.decode_with(build_decoder(config))
    if train and val:
        _check_same_classes(config, sources.train.classes, sources.val.classes)
    return Sources(
        sources.train and select(sources.train, config.DATA.CLASSES, config.DATA.IMAGES_PER_CLASS, config.SEED),
        sources.val and select(sources.val, config.DATA.CLASSES),
    )


# What each split may be called
SPLIT_NAMES = {"train": ("train",), "val": tuple(name for name in VALIDATION if name != "test"), "test": ("test",)}


def build_split(config, world: World, split: str) -> Source:
    """One split: "train", "val" or "test". With DATA.VAL_FRACTION or FOLDS, "val" is what that holds out, "train" the
    rest, and "test" the data's own.

    Raises:
        DataError: see `build_sources`; or there is no such split, naming those that are there.
    """
    if holds_out(config) and split != "test":
        sources = build_sources(config, world, train=split == "train", val=split == "val")
        return sources.train or sources.val
    source = _own_split(config, world, split)
    check_same_data(config, Sources(*((source, None) if split == "train" else (None, source))), world)
    source.decode_with(build_decoder(config))
    return select(source, config.DATA.CLASSES, config.DATA.IMAGES_PER_CLASS if split == "train" else 0, config.SEED)


def _own_split(config, world: World, split: str) -> Source:
    """A split of the data set itself."""
    name, is_train = config.DATA.DATASET, split == "train"
    if name in ("digits", "CIFAR10", "CIFAR100", *IDX_DATASETS):
        if name == "digits" and split == "test":
            raise DataError("--split is test, but digits has no test images; its splits: train, val")
        return _splits(config, world, is_train, not is_train)[is_train]  # they have two, and test is the second's name
    if name == "hfds":
        return hf_split(config, world, SPLIT_NAMES[split])
    if name == "table":
        return table_split(config, TRAINING if is_train else SPLIT_NAMES[split], split)
    root = _root(config)
    if name == "wds":
        with main_process_first(world):
            return ShardSource(root, split)
    if config.DATA.ZIP_MODE:
        there = {name: root / f"{name}.zip" for name in SPLIT_NAMES if (root / f"{name}.zip").is_file()}
        if split not in there:
            raise DataError(f"{root}: no {split}.zip in it; its splits: {', '.join(there) or 'none'}")
        return ZipSource(there[split], root / f"{split}_map.txt")
    there = [name for name in ("train", *VALIDATION) if (root / name).is_dir()]
    folder = next((name for name in SPLIT_NAMES[split] if name in there), None)
    if folder is None:
        raise DataError(f"{root}: no folder {split}/ in it; its splits: {', '.join(there) or 'none'}")
    return _class_folders(root / folder, world)


def build_class_folders(config, world: World) -> Source:
    """The class folders of DATA.DATA_PATH itself or, if it has a folder of validation images, those in that.

    Raises:
        DataError: see `build_sources`.
    """
    root = _root(config)
    source = _class_folders(next((root / name for name in VALIDATION if (root / name).is_dir()), root), world)
    check_same_data(config, Sources(None, source), world)
    source.decode_with(build_decoder(config))
    return source


def _class_folders(folder: Path, world: World) -> FolderSource:
    with main_process_first(world):  # it writes the index that the others read
        return FolderSource(folder)


def check_same_data(config, sources: Sources, world: World) -> None:
    """Raises a DataError on all processes if one has other samples than the main process: machines may have copies of
    the data of which one is not complete, and each process takes its share of what it believes is there."""
    if not world.distributed:
        return
    present = {split: source for split, source in sources._asdict().items() if source}
    found = {split: (len(source), source_digest(source, config.DATA.DATA_PATH)) for split, source in present.items()}
    mine = socket.gethostname(), found
    everyone = from_all(mine, world)
    main_host, main = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        for split, (count, digest) in found.items():
            if (count, digest) != main[split]:
                raise DataError(
                    f"{config.DATA.DATA_PATH} on {host} (rank {rank}) has {count} samples of {split}, on {main_host} "
                    f"(rank 0) {main[split][0]}, and they are not the same; accepted: the same data on all machines"
                )


def source_digest(source: Source, path: str) -> str:
    """Of the classes, all that is known of the samples and a thousand names: a sample more or less moves those after
    it. Machines may have the data under another `path`."""
    path = os.path.dirname(path) if os.path.isfile(path) else path  # a table's images are beside it
    some = np.linspace(0, len(source) - 1, min(len(source), 1000)).astype(int)
    text = "\0".join([*source.classes, *(source.name(int(index)).removeprefix(path) for index in some)])
    sha = hashlib.sha256(text.encode("utf-8", "backslashreplace"))
    for values in source.truth():
        sha.update(np.ascontiguousarray(values).tobytes())
    return sha.hexdigest()


def _splits(config, world: World, train: bool, val: bool) -> dict[bool, Source]:
    """The data set's own splits, at least those asked for; True: training."""
    name = config.DATA.DATASET
    wanted = [is_train for is_train, asked in ((True, train), (False, val)) if asked]
    if name == "digits":
        return digit_sources()
    if name in IDX_DATASETS:
        return idx_sources(config, world, train, val)
    if name in ("CIFAR10", "CIFAR100"):
        with main_process_first(world):
            return {is_train: _cifar(config, is_train) for is_train in wanted}
    names = {True: "train", False: "val"}
    if name == "wds":
        root = _root(config)
        with main_process_first(world):  # it writes the index that the others read
            return {is_train: ShardSource(root, names[is_train]) for is_train in wanted}
    if name == "hfds":
        return hf_sources(config, world, train, val)
    if name == "table":
        return table_sources(config, train, val)
    if config.DATA.ZIP_MODE:
        root = _root(config)
        return {
            is_train: ZipSource(root / f"{names[is_train]}.zip", root / f"{names[is_train]}_map.txt")
            for is_train in wanted
        }
    return _folders(config, world, train, val)


def holds_out(config) -> bool:
    """Whether validation images are taken from the training images."""
    return bool(config.DATA.VAL_FRACTION or config.DATA.FOLDS)


def hold_out(source: Source, config) -> dict[bool, Source]:
    """A source in two parts of the same classes. True: for training; False: held out, for validation. They are drawn
    with `DATA.VAL_SEED`, class by class: `DATA.VAL_FRACTION`, rounded to the nearest count, at least one sample and
    never all; or fold `DATA.FOLD` of `DATA.FOLDS`, whose sizes differ by one at most.

    Raises:
        DataError: a class of a single sample, or of fewer than there are folds.
    """
    fraction, folds = config.DATA.VAL_FRACTION, config.DATA.FOLDS
    held = np.zeros(len(source), bool)
    of_class = by_class(source.targets, len(source.classes))
    for label, (name, indices) in enumerate(zip(source.classes, of_class, strict=True)):
        if 0 < len(indices) < folds:
            raise DataError(
                f"DATA.FOLDS is {folds}, but the training data has {len(indices)} of {printable(name)}; "
                f"accepted: 2 to {len(indices)}, or more images"
            )
        if len(indices) == 1:
            raise DataError(
                f"DATA.VAL_FRACTION is {fraction}, but the training data has 1 of {printable(name)}; "
                "accepted: 2 of each class or more, one of them for validation"
            )
        if not len(indices):  # EMNIST's letters have a class without images
            continue
        drawn = np.random.default_rng((config.DATA.VAL_SEED, label)).permutation(indices)
        count = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
        # What is left over of each class goes to other folds, so that these are of equal size too.
        held[drawn[(config.DATA.FOLD - label) % folds :: folds] if folds else drawn[:count]] = True
    return {
        True: SubsetSource(source, np.flatnonzero(~held), source.classes),
        False: SubsetSource(source, np.flatnonzero(held), source.classes),
    }


def select(source: Source, classes: str, per_class: int = 0, seed: int = 0) -> Source:
    """The samples of a source that the config asks for; the source itself if that is all of them.

    Args:
        classes: "all", names separated by commas, or a .txt file with a name per line (`DATA.CLASSES`).
        per_class: samples of each class (`DATA.IMAGES_PER_CLASS`), drawn with `seed`; 0: all.

    Raises:
        DataError: a class that the source does not have, or has too few samples of.
    """
    if classes == "all" and not per_class:
        return source
    names = source.classes
    if classes != "all":
        names = _read_names(classes) if classes.endswith(".txt") else [name.strip() for name in classes.split(",")]
        names = list(dict.fromkeys(names))
        unknown = [name for name in names if name not in source.classes]
        if unknown or not names:
            some = ", ".join(map(printable, source.classes[:10])) + " ..." * (len(source.classes) > 10)
            unknown = ", ".join(map(repr, unknown[:5])) or "nothing"
            raise DataError(f"DATA.CLASSES has {unknown}, which the data has not; its classes: {some}")
    of_class = by_class(source.targets, len(source.classes))
    labels = {name: label for label, name in enumerate(source.classes)}
    chosen = []
    for name in names:
        indices = of_class[labels[name]]
        if per_class > len(indices):
            raise DataError(
                f"DATA.IMAGES_PER_CLASS is {per_class}, but the training data has {len(indices)} of {printable(name)}"
            )
        if per_class:
            indices = np.random.default_rng((seed, labels[name])).permutation(indices)[:per_class]
        chosen.append(indices)
    return SubsetSource(source, np.sort(np.concatenate(chosen)), names)


def _read_names(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"DATA.CLASSES is {path}, which cannot be read: {error}") from error


def note_on_orientation(config, source: Source) -> str:
    """How many image files ask to be turned, for the log; empty if none of those looked at does."""
    turned, looked_at = count_turned(source.some_files())
    if not turned:
        return ""
    done = "they are turned" if config.DATA.EXIF_ORIENTATION else "they are used as stored"
    return (
        f"{turned} of {looked_at} image files looked at have an EXIF orientation; {done} "
        f"(DATA.EXIF_ORIENTATION is {config.DATA.EXIF_ORIENTATION})"
    )


def check_num_classes(config, source: Source) -> int:
    """The class count of the data, which `MODEL.NUM_CLASSES` must be or leave open (0).

    Raises:
        DataError: saying both numbers and what to set.
    """
    found, expected = len(source.classes), config.MODEL.NUM_CLASSES
    if expected not in (0, found):
        raise DataError(
            f"MODEL.NUM_CLASSES is {expected}, but the data ({config.DATA.DATASET}, {config.DATA.DATA_PATH}) has "
            f"{found} classes; set MODEL.NUM_CLASSES to {found}, or to 0 to take it from the data"
        )
    return found


def with_class_count(config, source: Source) -> CfgNode:
    """The config with `MODEL.NUM_CLASSES` as the data has it; frozen.

    Raises:
        DataError: the config asks for another number.
    """
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = check_num_classes(config, source)
    config.freeze()
    return config


def build_train_loader(config, source: Source, world: World) -> DataLoader:
    """Batches of `Sample` of DATA.BATCH_SIZE images for this process, the last incomplete one dropped.

    Raises:
        DataError: the data set is smaller than one batch.
    """
    sharded = config.DATA.CACHE_MODE == "part"
    _fill_cache(config, source, world)
    dataset = _dataset(config, source, is_train=True)
    if config.DATA.SAMPLER == "balanced":
        sampler = BalancedSampler(source.targets, world.rank, world.size, config.SEED, sharded)
    else:
        sampler = TrainSampler(len(source), world.rank, world.size, config.SEED, sharded)
    if len(sampler) < config.DATA.BATCH_SIZE:
        raise DataError(
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}, but the training data has {len(source)} images, "
            f"{len(sampler)} for each of {world.size} process{'es' * (world.size > 1)}; "
            f"accepted: at most {len(sampler)}"
        )
    return build_loader(config, dataset, sampler, world, drop_last=True)


def build_eval_loader(config, source: Source, world: World) -> DataLoader:
    """Batches of `Sample` that together hold every image exactly once over all processes."""
    _fill_cache(config, source, world)
    dataset = _dataset(config, source, is_train=False)
    return build_loader(config, dataset, EvalSampler(len(source), world.rank, world.size), world)


def _dataset(config, source: Source, is_train: bool) -> InMemoryDataset | ClassificationDataset:
    if suits_batches(config, source, is_train):
        return InMemoryDataset(config, source, is_train)
    transform = build_transform(config, is_train)
    return ClassificationDataset(source, transform, image_size(config), config.SEED, is_train)


def build_loader(
    config, dataset: Dataset, sampler: Iterable, world: World, drop_last: bool = False, whole_batches: bool = False
) -> DataLoader:
    """Batches of DATA.BATCH_SIZE by DATA.NUM_WORKERS processes.

    Args:
        sampler: the (epoch, index) of each sample, in order.
        whole_batches: the sampler gives a key for each batch, for which the data set gives the batch.
    """
    in_memory = isinstance(dataset, InMemoryDataset)
    workers = 0 if in_memory else config.DATA.NUM_WORKERS  # a batch takes less than its way between two processes
    if workers < 0:
        workers = min(8, _cores())
    return DataLoader(
        dataset,
        batch_size=None if whole_batches else config.DATA.BATCH_SIZE,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=collated if in_memory or whole_batches else None,
        pin_memory=config.DATA.PIN_MEMORY and world.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,
    )


def _cores() -> int:
    """This process's share of the CPU cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if is_task(os.environ) and os.environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        # The variable is the batch job's, srun's own --cpus-per-task may be less.
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _fill_cache(config, source: Source, world: World) -> None:
    if config.DATA.CACHE_MODE == "full":
        source.cache(range(len(source)))
    elif config.DATA.CACHE_MODE == "part":
        source.cache(range(world.rank, len(source), world.size))


def _root(config) -> Path:
    if not config.DATA.DATA_PATH:
        raise DataError(f"DATA.DATA_PATH is empty; {config.DATA.DATASET} needs a folder: give --data-path")
    root = Path(config.DATA.DATA_PATH)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (DATA.DATA_PATH or --data-path, for {config.DATA.DATASET})")
    return root


def _folders(config, world: World, train: bool, val: bool) -> dict[bool, Source]:
    root = _root(config)
    splits = {}
    for is_train, wanted in ((True, train), (False, val)):
        if wanted:
            folder = _split_folder(config, root, is_train)
            splits[is_train] = _class_folders(folder, world)
            if folder.name not in ("train", "val"):
                use = "training and validation" if is_train else "validation"
                splits[is_train].notes = [
                    *splits[is_train].notes,
                    f"{printable(str(folder))}: its class folders are used for {use}",
                ]
    return splits


def _split_folder(config, root: Path, is_train: bool) -> Path:
    """Where the class folders of a split are."""
    there = {name: root / name for name in ("train", *VALIDATION) if (root / name).is_dir()}
    if is_train and "train" in there:
        return there["train"]
    if is_train and holds_out(config) and not there:
        return root  # class folders without a folder for each split
    names = () if is_train else [name for name in VALIDATION if name in there]
    if names:
        return there[names[0]]
    accepted = "train/ and val/, one folder per class"
    if config.DATA.DATASET == "101_ObjectCategories":
        accepted += f"; make it: python tools/categories101_train_val_split.py --source {root} --output <folder>"
    else:
        accepted += "; or class folders alone, of which DATA.VAL_FRACTION 0.1 holds out a tenth for validation"
    missing = "train" if is_train or "train" not in there else "val"
    raise DataError(f"{root}: no folder {missing}/ in it; accepted: {accepted}")


def _cifar(config, is_train: bool) -> Source:
    if not config.DATA.DATA_PATH:
        raise DataError(f"DATA.DATA_PATH is empty; give --data-path, a folder to download {config.DATA.DATASET} into")
    dataset = getattr(datasets, config.DATA.DATASET)
    try:
        data = dataset(config.DATA.DATA_PATH, train=is_train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{config.DATA.DATASET} is not complete in {config.DATA.DATA_PATH} and cannot be downloaded from "
            f"{dataset.url} ({error}); get {dataset.filename} yourself and put it into that folder"
        ) from error
    title = f"{config.DATA.DATASET} {'train' if is_train else 'test'}"
    return ArraySource(data.data, data.targets, data.classes, title)


def digit_sources() -> dict[bool, Source]:
    """scikit-learn's handwritten digits (8 x 8, grey), 80 / 20, stratified, always the same split; True: training."""
    from sklearn.datasets import load_digits  # a second to import, for this data set only
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # grey levels 0..16 -> 0..255
    train, val = train_test_split(
        np.arange(len(images)), test_size=DIGITS_TEST_IMAGES, stratify=digits.target, random_state=0
    )
    classes = [str(name) for name in digits.target_names]
    return {
        True: ArraySource(images[train], digits.target[train], classes, "digits train"),
        False: ArraySource(images[val], digits.target[val], classes, "digits val"),
    }


def _check_same_classes(config, train: list[str], val: list[str]) -> None:
    if train != val:
        only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        differences = [
            f"only in {split}: {', '.join(map(printable, names[:5]))}{' ...' * (len(names) > 5)}"
            for split, names in (("train", only_train), ("val", only_val))
            if names
        ]
        if not differences:
            differences = ["the same ones in another order"]
        raise DataError(
            f"{config.DATA.DATA_PATH}: train has {len(train)} classes and val {len(val)}; {'; '.join(differences)}; "
            "accepted: the same classes in both"
        )
