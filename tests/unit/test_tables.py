"""Tables of images: columns, labels, splits, and what is said about rows that are not as they should be."""

from pathlib import Path

import pytest

from data import build_sources
from data.build import build_split
from data.errors import DataError
from tests.unit.test_data import config_with, png, world, write_folder

ROWS = [("images/0.png", "dog", "train"), ("images/1.png", "cat", "train"), ("./2.png", "dog", "VAL ")]
ROWS += [("images/3.png", "cat", "val"), ("images/4.png", "ant", "train"), ("images/5.png", "ant", "test")]


def write_csv(root: Path, rows, titles=("path", "label", "split"), name="table.csv") -> Path:
    """A table, and an image with the pixels of its number for each row."""
    write_folder(root, {row[0]: png(int(Path(row[0]).stem)) for row in rows})
    (root / name).write_text("".join(",".join(map(str, row)) + "\n" for row in (titles, *rows)))
    return root / name


def write_parquet(root: Path, columns: dict[str, list]) -> Path:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    root.mkdir(exist_ok=True)
    parquet.write_table(table(columns), root / "table.parquet")
    return root / "table.parquet"


def sources(path, **values):
    return build_sources(config_with(DATA__DATASET="table", DATA__DATA_PATH=str(path), **values), world())


def labelled(source) -> list[tuple[str, str]]:
    return [(Path(source.name(i)).name, source.classes[label]) for i, label in enumerate(source.targets)]


@pytest.mark.parametrize("kind", ["csv", "folder", "parquet"])
def test_table_with_splits(tmp_path, kind):
    path = write_csv(tmp_path, ROWS)
    if kind == "parquet":
        path.unlink()
        columns = {"split": [row[2] for row in ROWS], "size": [1.5] * 6}
        path = write_parquet(tmp_path, {**columns, "label": [r[1] for r in ROWS], "path": [r[0] for r in ROWS]})
    found = sources(tmp_path if kind == "folder" else path)
    assert found.train.classes == ["ant", "cat", "dog"] and found.train.has_names
    assert labelled(found.train) == [("0.png", "dog"), ("1.png", "cat"), ("4.png", "ant")]
    assert labelled(found.val) == [("2.png", "dog"), ("3.png", "cat")]
    assert found.val.load(0).tobytes() == found.val.load(0).tobytes() != found.val.load(1).tobytes()
    assert [note.partition(": ")[2] for note in found.notes] == [
        "the rows of val are used for validation; not used: 1 of test",
        "no images for validation of 1 classes: ant",
    ]


def test_table_without_splits_is_held_out_of(tmp_path):
    rows = [(f"{i}.png", i % 2) for i in range(20)]
    path = write_csv(tmp_path, rows, ("file", "class"))
    columns = {"DATA__IMAGE_COLUMN": "file", "DATA__LABEL_COLUMN": "class"}
    with pytest.raises(DataError, match=r"no rows for validation; accepted: a column split .* DATA.VAL_FRACTION 0.1"):
        sources(path, **columns)
    found = sources(path, **columns, DATA__VAL_FRACTION=0.2)
    assert found.train.classes == ["0", "1"] and not found.train.has_names and not found.notes
    assert [sorted(source.targets.tolist()) for source in found] == [8 * [0] + 8 * [1], [0, 0, 1, 1]]
    names = [name for source in found for name, _ in labelled(source)]
    assert sorted(names) == sorted(name for name, _ in rows)


def test_numbers_are_labels_and_text_is_names(tmp_path):
    numbers = sources(write_csv(tmp_path / "a", [("1.png", 3, "train"), ("2.png", 1, "train"), ("3.png", 3, "val")]))
    assert numbers.train.classes == ["0", "1", "2", "3"] and numbers.train.targets.tolist() == [3, 1]
    assert any("no images for training of 2 classes: 0, 2" in note for note in numbers.notes)
    codes = sources(
        write_csv(tmp_path / "b", [("1.png", "010", "train"), ("2.png", "09", "train"), ("3.png", "09", "val")])
    )
    assert codes.train.classes == ["010", "09"] and codes.train.has_names


def test_missing_and_repeated_rows_and_images_in_both_splits_are_said(tmp_path):
    rows = [*ROWS, ("./images/0.png", "dog", "train"), ("images/1.png", "cat", "val"), ("images/7.png", "cat", "val")]
    path = write_csv(tmp_path, rows)
    (tmp_path / "images/7.png").unlink()
    found = sources(path)
    assert len(found.train) == 3 and len(found.val) == 4
    said = "\n".join(found.notes)
    assert "1 rows are there before and are left out, such as images/0.png" in said
    assert "1 images are in more than one split, such as images/1.png" in said
    assert "1 of its 7 files are not there, such as images/7.png; they count as unreadable" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its columns are not there; accepted: one of the name path"),
        ("path,label\n", "has no rows"),
        ("file,label\n0.png,a\n", "its columns are file, label; accepted: one of the name path"),
        ("path,label\n0.png\n", "line 2: has 1 cells, the first line 2"),
        ("path,label\n0.png,a\n1.png, \n", "line 3: has no label"),
        ("path,label,split\n0.png,a,train\n1.png,a,\n", "line 3: has no split"),
        ("path,label,split\n0.png,a,train\n1.png,a,fold1\n", "has the splits fold1; accepted: train, training, val"),
        ("path,label\n0.png,a\n1.png,a\n0.png,b\n", "line 4: 0.png has the label b, and a before"),
        ("path,label\n0.png,0\n1.png,-1\n", "has the labels -1; accepted: names, or 0 to"),
        (
            "path,label\nx/0.png,0\nx/1.png,1\n",
            "none of its 2 files is there, such as x/0.png; accepted: paths relative",
        ),
        ("path,label\n\xff.png,0\n", "cannot be read as CSV in UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    write_folder(tmp_path, {"0.png": png(0), "1.png": png(1), "t.csv": text.encode("latin-1")})
    with pytest.raises(DataError) as error:
        sources(tmp_path, DATA__VAL_FRACTION=0.5)
    assert message in str(error.value) and "t.csv" in str(error.value)


def test_which_table(tmp_path):
    for path, message in (("", "DATA_PATH is empty"), (tmp_path, "has 0 tables"), (tmp_path / "x.csv", "no such file")):
        with pytest.raises(DataError, match=message):
            sources(path)
    write_folder(tmp_path, {"a.csv": b"", "b.csv": b"", "images.txt": b""})
    with pytest.raises(DataError, match=r"has 2 tables: a\.csv, b\.csv; name one"):
        sources(tmp_path)
    with pytest.raises(DataError, match="is no table"):
        sources(tmp_path / "images.txt")


def test_damaged_parquet_and_labels_of_other_types(tmp_path):
    path = write_parquet(tmp_path, {"path": ["0.png"], "label": [0.5]})
    with pytest.raises(DataError, match=r"table\.parquet, row 1: has the float 0\.5; accepted: text and whole numbers"):
        sources(path, DATA__VAL_FRACTION=0.5)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        sources(path, DATA__VAL_FRACTION=0.5)


def test_split_of_evaluation(tmp_path):
    path = write_csv(tmp_path, ROWS)
    config = config_with(DATA__DATASET="table", DATA__DATA_PATH=str(path))
    for split, count in {"train": 3, "val": 2, "test": 1}.items():
        source = build_split(config, world(), split)
        assert len(source) == count and source.classes == ["ant", "cat", "dog"]
    write_csv(tmp_path / "plain", [row[:2] for row in ROWS], ("path", "label"))
    config = config_with(DATA__DATASET="table", DATA__DATA_PATH=str(tmp_path / "plain"))
    assert len(build_split(config, world(), "train")) == 6
    with pytest.raises(DataError, match=r"no row has the split test; its splits: train"):
        build_split(config, world(), "test")
