"""Tables of images: CSV or parquet files with a row for each image, its path, its label and perhaps its split."""

import csv
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.arrays import Strings
from data.errors import DataError
from data.sources import MOST_CLASSES, VALIDATION, FileSource, Source, read_file
from utils import printable, shorten

SUFFIXES = (".csv", ".parquet")
TRAINING = ("train", "training")


class Row(NamedTuple):
    """A line of a table."""

    path: str
    label: str
    split: str  # in lower case; "" in a table without splits


class TableSource(FileSource):
    """The images of one split of a table.

    Args:
        root: the folder that paths are relative to.
        rows: of this split.
        labels: the number of each label.
        classes: their names in that order.
    """

    def __init__(
        self, root: Path, rows: Sequence[Row], labels: dict[str, int], classes: Sequence[str], has_names: bool
    ):
        super().__init__()
        self._root, self._paths = os.path.join(root, ""), Strings.of(row.path for row in rows)
        self.targets = np.array([labels[row.label] for row in rows], np.int32)
        self.classes, self.has_names = list(classes), has_names

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self._root, self._paths[index]))

    def name(self, index: int) -> str:
        return printable(os.path.join(self._root, self._paths[index]))


def table_sources(config, train: bool, val: bool) -> dict[bool, Source]:
    """The splits asked for of the table that `DATA.DATA_PATH` names; True: training. Of a table without splits, all
    rows are for training.

    Raises:
        DataError: no such table, column or split, or rows that cannot be used.
    """
    table = load_table(config)
    path, rows, notes = table.path, table.rows, list(table.notes)
    names = {row.split for row in rows}
    validation = next((name for name in VALIDATION if name in names), None)
    if val and validation is None:
        raise DataError(
            f"{_show(path)}: has no rows for validation; accepted: a column split with train and val, or "
            "DATA.VAL_FRACTION 0.1, which holds out a tenth of the training images for validation"
        )
    unused = Counter(row.split for row in rows if row.split not in ("", *TRAINING, validation))
    if validation and unused:
        counts = ", ".join(f"{count} of {name}" for name, count in sorted(unused.items()))
        notes.append(f"{_show(path)}: the rows of {validation} are used for validation; not used: {counts}")
    sources = {}
    for is_train, wanted in ((True, ("", *TRAINING)), (False, (validation,))):
        if not (train if is_train else val):
            continue
        chosen = [row for row in rows if row.split in wanted]
        if not chosen:
            raise DataError(f"{_show(path)}: no row has the split train; accepted: a table with some")
        sources[is_train] = table.source(chosen, "training" if is_train else "validation", notes)
    return sources


def table_split(config, names: Sequence[str], split: str) -> Source:
    """The rows of the first of some names of splits that is there.

    Raises:
        DataError: see `table_sources`; or there is no such split, naming those that are there.
    """
    table = load_table(config)
    there = list(dict.fromkeys(row.split or "train" for row in table.rows))
    name = next((name for name in names if name in there), None)
    if name is None:
        raise DataError(f"{_show(table.path)}: no row has the split {split}; its splits: {', '.join(there)}")
    return table.source([row for row in table.rows if (row.split or "train") == name], split, table.notes)


class Table(NamedTuple):
    """A table that has been read: its rows without duplicates, and the number of each label (`number_labels`)."""

    path: Path
    rows: list[Row]
    notes: list[str]
    labels: dict[str, int]
    classes: list[str]
    has_names: bool

    def source(self, rows: Sequence[Row], title: str, notes: Sequence[str]) -> TableSource:
        """Some of its rows; `title` is what they are for."""
        source = TableSource(self.path.parent, rows, self.labels, self.classes, self.has_names)
        counts = np.bincount(source.targets, minlength=len(self.classes))
        lacking = [self.classes[label] for label in np.flatnonzero(counts == 0)]
        source.notes = list(notes)
        if lacking:
            message = f"no images for {title} of {len(lacking)} classes: {shorten(lacking)}"
            source.notes.append(f"{_show(self.path)}: {message}")
        return source


def load_table(config) -> Table:
    """The table that `DATA.DATA_PATH` names.

    Raises:
        DataError: see `table_sources`.
    """
    path = find_table(config.DATA.DATA_PATH)
    rows, notes = clean(path, read_table(path, config.DATA.IMAGE_COLUMN or "path", config.DATA.LABEL_COLUMN or "label"))
    notes += missing_files(path, rows)
    unknown = sorted({row.split for row in rows} - {"", *TRAINING, *VALIDATION})
    if unknown:
        raise DataError(
            f"{_show(path)}: has the splits {shorten(unknown)}; accepted: {', '.join((*TRAINING, *VALIDATION))}"
        )
    return Table(path, rows, notes, *number_labels(path, rows))


def find_table(path: str) -> Path:
    """The table that a path is, or the only one in the folder that it is.

    Raises:
        DataError: there is none, or there are several.
    """
    accepted = "a file .csv or .parquet with the columns path and label, or a folder with one"
    if not path:
        raise DataError(f"DATA.DATA_PATH is empty; give --data-path: {accepted}")
    table = Path(path)
    if table.is_dir():
        found = sorted(p for p in table.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if len(found) != 1:
            names = f": {shorten([p.name for p in found])}; name one of them" if found else ""
            raise DataError(f"{_show(table)}: has {len(found)} tables{names}; accepted: {accepted}")
        return found[0]
    if not table.is_file():
        raise DataError(f"{_show(table)}: no such file (DATA.DATA_PATH or --data-path); accepted: {accepted}")
    if table.suffix.lower() not in SUFFIXES:
        raise DataError(f"{_show(table)}: is no table; accepted: {accepted}")
    return table


def read_table(path: Path, image_column: str, label_column: str) -> Iterator[tuple[str, Row]]:
    """The rows of a table, and where each stands, for messages.

    Raises:
        DataError: it cannot be read, lacks a column, or has a row without a path, a label, or a split if others have
            one.
    """
    read = _read_csv if path.suffix.lower() == ".csv" else _read_parquet
    for place, (image, label, split) in read(path, image_column, label_column):
        where = f"{_show(path)}, {place}"
        for name, value in ((image_column, image), (label_column, label), ("split", split)):
            if value is not None and not value.strip():
                raise DataError(f"{where}: has no {printable(name)}; accepted: one in each row")
        if "\0" in image:
            raise DataError(f"{where}: {image[:200]!r} is no path")
        yield where, Row(os.path.normpath(image), label.strip(), "" if split is None else split.strip().lower())


# Path, label and split of a row; the split is None if there is no such column.
Cells = tuple[str, str, str | None]


def _read_csv(path: Path, *columns: str) -> Iterator[tuple[str, Cells]]:
    """Where each row is in the file, and its cells."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            titles = [title.strip() for title in next(reader, [])]
            places = _places(path, titles, columns)
            for cells in reader:
                if not cells:
                    continue  # an empty line
                if len(cells) != len(titles):
                    raise DataError(
                        f"{_show(path)}, line {reader.line_num}: has {len(cells)} cells, the first line {len(titles)}; "
                        'accepted: as many, and "..." around one with a comma in it'
                    )
                yield f"line {reader.line_num}", tuple(None if place is None else cells[place] for place in places)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{_show(path)}: cannot be read as CSV in UTF-8: {printable(str(error))}") from error


def _read_parquet(path: Path, *columns: str) -> Iterator[tuple[str, Cells]]:
    """As `_read_csv`."""
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"{_show(path)}: needs the package pyarrow: pip install -r requirements/hfds.txt; or give a CSV"
        )
    from pyarrow import parquet  # for such files only

    try:
        with parquet.ParquetFile(path) as file:
            titles = file.schema_arrow.names
            places = _places(path, titles, columns)
            names = [titles[place] for place in places if place is not None]
            number = 0
            for batch in file.iter_batches(columns=names):
                for cells in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    number += 1
                    place = f"row {number}"
                    image, label, split = (*(_as_text(cell, f"{_show(path)}, {place}") for cell in cells), None)[:3]
                    yield place, (image, label, split)
    except DataError:
        raise
    except Exception as error:  # Arrow's readers raise many kinds on a damaged file
        reason = printable(" ".join(str(error).split())[:500])
        raise DataError(f"{_show(path)}: cannot be read as parquet: {reason}") from error


def _as_text(value: Any, where: str) -> str:
    """A cell of a parquet file."""
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise DataError(f"{where}: has the {type(value).__name__} {value!r:.200}; accepted: text and whole numbers")


def _places(path: Path, titles: Sequence[str], columns: Sequence[str]) -> tuple[int, int, int | None]:
    """Where the columns of paths, labels and splits are; None: there are no splits."""
    for name in columns:
        if titles.count(name) != 1:
            raise DataError(
                f"{_show(path)}: its columns are {shorten(titles, 20) or 'not there'}; accepted: one of the name "
                f"{printable(name)} (path and label, or those that DATA.IMAGE_COLUMN and DATA.LABEL_COLUMN name)"
            )
    if titles.count("split") > 1:
        raise DataError(f"{_show(path)}: has {titles.count('split')} columns of the name split; accepted: one")
    image, label = (titles.index(name) for name in columns)
    return image, label, titles.index("split") if "split" in titles else None


def clean(path: Path, rows: Iterable[tuple[str, Row]]) -> tuple[list[Row], list[str]]:
    """Each row once, in their order, and notes about those that are there twice and about images in several splits.

    Raises:
        DataError: no rows, or an image with two labels.
    """
    labels: dict[str, str] = {}
    seen: dict[Row, None] = {}
    count = 0
    twice = ""
    for where, row in rows:
        count += 1
        if labels.setdefault(row.path, row.label) != row.label:
            raise DataError(
                f"{where}: {printable(row.path)} has the label {printable(row.label)}, and "
                f"{printable(labels[row.path])} before; accepted: one label for each image"
            )
        if row in seen:
            twice = twice or row.path
        seen[row] = None
    if not seen:
        raise DataError(f"{_show(path)}: has no rows; accepted: one for each image")
    notes = []
    if count > len(seen):
        notes.append(
            f"{_show(path)}: {count - len(seen)} rows are there before and are left out, such as {printable(twice)}"
        )
    if len(seen) > len(labels):
        times = Counter(row.path for row in seen)
        several = [name for name, number in times.items() if number > 1]
        notes.append(
            f"{_show(path)}: {len(several)} images are in more than one split, such as {printable(several[0])}; "
            "accuracy on images that were trained on says little"
        )
    return list(seen), notes


def missing_files(path: Path, rows: Iterable[Row]) -> list[str]:
    """A note about the files that are not there. Each folder is listed once: on a network, asking for each file would
    take minutes.

    Raises:
        DataError: none of them is there.
    """
    there: dict[str, set[str]] = {}
    missing: dict[str, None] = {}
    names = dict.fromkeys(row.path for row in rows)
    for name in names:
        full = os.path.join(path.parent, name)
        folder, file = os.path.split(full)
        if folder not in there:
            try:
                there[folder] = set(os.listdir(folder))
            except OSError:
                there[folder] = set()
        # Where upper and lower case are the same, a listing alone does not say.
        if file not in there[folder] and not (there[folder] and os.path.exists(full)):
            missing[name] = None
    if not missing:
        return []
    first = printable(next(iter(missing)))
    if len(missing) == len(names):
        raise DataError(
            f"{_show(path)}: none of its {len(names)} files is there, such as {first}; accepted: paths relative to "
            f"{_show(path.parent)}"
        )
    return [
        f"{_show(path)}: {len(missing)} of its {len(names)} files are not there, such as {first}; they count as "
        "unreadable (DATA.MAX_UNREADABLE)"
    ]


def number_labels(path: Path, rows: Sequence[Row]) -> tuple[dict[str, int], list[str], bool]:
    """The number of each label; the names of the classes in that order; whether the table names them. Whole numbers
    are the labels themselves, as everywhere. Anything else is a name, and they are sorted, as folders are.

    Raises:
        DataError: numbers that are no labels.
    """
    found = {row.label for row in rows}
    if all(re.fullmatch(r"-?(0|[1-9][0-9]*)", label) for label in found):
        wrong = sorted(
            label for label in found if label.startswith("-") or len(label) > 18 or int(label) >= MOST_CLASSES
        )
        if wrong:
            raise DataError(
                f"{_show(path)}: has the labels {shorten(wrong)}; accepted: names, or 0 to {MOST_CLASSES - 1}"
            )
        numbers = {label: int(label) for label in found}
        return numbers, [str(number) for number in range(max(numbers.values()) + 1)], False
    names = sorted(found)
    return {name: number for number, name in enumerate(names)}, names, True


def _show(path: Path) -> str:
    return printable(str(path))
