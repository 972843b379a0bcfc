"""Image data sets of Hugging Face's `datasets`: parquet files, what its save_to_disk has written, or a name on the hub.
The library keeps them in Arrow files, which all processes map into their memory."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, UnreadableImage
from data.sources import MOST_CLASSES, MOST_FILE_BYTES, VALIDATION, FileSource, Source, read_file
from runtime.distributed import World, main_process_first
from utils import printable


def hf_sources(config, world: World, train: bool, val: bool) -> dict[bool, Source]:
    """The splits asked for; True: training.

    Raises:
        DataError: the library is not installed, no such data set, or no such split or column.
    """
    splits = _all_splits(config, world)
    sources = {}
    for is_train, names in ((True, ("train",)), (False, VALIDATION)):
        if train if is_train else val:
            otherwise = "" if is_train else ", or DATA.VAL_FRACTION to hold out training images"
            sources[is_train] = _first_of(splits, names, config, otherwise)
    return sources


def hf_split(config, world: World, names: Sequence[str]) -> Source:
    """The first of the splits `names` that is there.

    Raises:
        DataError: see `hf_sources`.
    """
    return _first_of(_all_splits(config, world), names, config)


def _all_splits(config, world: World) -> dict[str, Any]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError("DATA.DATASET is hfds, which needs the package datasets: pip install -r requirements/hfds.txt")
    path = config.DATA.DATA_PATH
    if not path:
        raise DataError("DATA.DATA_PATH is empty; give --data-path: a folder of parquet files, or a name on the hub")
    with main_process_first(world):  # it downloads and converts what the others then find in the library's cache
        return _load(path)


def _first_of(splits: dict[str, Any], names: Sequence[str], config, otherwise: str = "") -> "HFSource":
    path = printable(config.DATA.DATA_PATH)
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise DataError(
            f"{path}: has the splits {', '.join(map(printable, splits))}; accepted: {' or '.join(names)}{otherwise}"
        )
    return HFSource(splits[name], config.DATA.IMAGE_COLUMN, config.DATA.LABEL_COLUMN, f"{path}:{name}")


def _load(path: str) -> dict[str, Any]:
    """The splits of a data set."""
    import datasets  # seconds to import, for this data set only

    folder = Path(path)
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(path)
        elif folder.is_dir():
            if not any(folder.rglob("*.parquet")):
                raise DataError(f"{printable(path)}: has no parquet files, nor is it what save_to_disk writes")
            found = datasets.load_dataset("parquet", data_dir=path)
        else:
            found = datasets.load_dataset(path)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds: damaged files, no network, no such name
        reason = printable(" ".join(str(error).split())[:1000])
        raise DataError(f"{printable(path)}: cannot be loaded as a data set of Hugging Face: {reason}") from error
    if isinstance(found, dict):
        return dict(found)
    # Of a part that was saved, such as "train[:1000]", the name of what it is a part of
    return {re.match(r"\w*", str(found.split or "train"))[0]: found}


class HFSource(FileSource):
    """A split.

    Args:
        dataset: a `datasets.Dataset`.
        image_column, label_column: their names; "": the only column of images, and the only one of class labels or the
            one named "label".
        title: for messages.

    Raises:
        DataError: no such columns, or labels that are not numbers from 0 up.
    """

    def __init__(self, dataset: Any, image_column: str, label_column: str, title: str):
        from datasets import ClassLabel, Image

        super().__init__()
        self._title = title
        self._column = _choose(dataset, image_column, Image, "image", "DATA.IMAGE_COLUMN", title)
        label = _choose(dataset, label_column, ClassLabel, "label", "DATA.LABEL_COLUMN", title)
        try:
            images = dataset.select_columns([self._column]).with_format(None)
            self._images = images.cast_column(self._column, Image(decode=False))
        except Exception as error:  # Arrow's and the library's
            reason = printable(" ".join(str(error).split())[:500])
            raise DataError(f"{title}: column {printable(self._column)} holds no images: {reason}") from error
        # As a table, because the library's arrays of numbers turn a missing one into "not a number".
        column = dataset.select_columns([label]).with_format("arrow")[:].column(0)
        self.targets = _as_targets(column, f"{title}: column {printable(label)}")
        feature = dataset.features[label]
        self.has_names = isinstance(feature, ClassLabel) and bool(feature.names)
        largest = int(self.targets.max()) + 1
        self.classes = list(feature.names) if self.has_names else [str(number) for number in range(largest)]
        if len(self.classes) < largest:
            raise DataError(
                f"{title}: column {printable(label)} has label {largest - 1} of {len(self.classes)} classes"
            )

    def read(self, index: int) -> bytes:
        try:
            content = self._images[int(index)][self._column]
        except Exception as error:  # damaged Arrow files
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        if not content or (content["bytes"] is None and not content["path"]):
            raise UnreadableImage(f"{self.name(index)}: is missing")
        if content["bytes"] is None:
            return read_file(content["path"])
        if len(content["bytes"]) > MOST_FILE_BYTES:
            raise UnreadableImage(f"{self.name(index)}: larger than {MOST_FILE_BYTES} bytes")
        return content["bytes"]

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"


def _choose(dataset: Any, asked: str, kind: type, usual: str, key: str, title: str) -> str:
    """The name of a column."""
    if asked:
        if asked in dataset.column_names:
            return asked
        raise DataError(
            f"{key} is {asked!r}; the columns of {title}: {', '.join(map(printable, dataset.column_names))}"
        )
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if not found and usual in dataset.column_names:
        return usual
    if len(found) != 1:
        raise DataError(
            f"{title} has {len(found)} columns of type {kind.__name__}; its columns: "
            f"{', '.join(map(printable, dataset.column_names))}; say which one is the {usual} with {key}"
        )
    return found[0]


def _as_targets(column: Any, title: str) -> np.ndarray:
    """A column of Arrow's as labels."""
    import pyarrow

    if column.null_count or not len(column) or not pyarrow.types.is_integer(column.type):
        what = f"{column.null_count} missing values" if column.null_count else f"{len(column)} values of {column.type}"
        raise DataError(f"{title} has {what}; accepted: a label (0, 1, 2, ...) for each image")
    targets = column.to_numpy()
    if targets.min() < 0 or targets.max() >= MOST_CLASSES:
        raise DataError(
            f"{title} has values from {targets.min()} to {targets.max()}; accepted: 0 to {MOST_CLASSES - 1}"
        )
    return targets.astype(np.int32)
