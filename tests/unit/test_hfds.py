"""Image data sets of Hugging Face's library, in small local ones."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image as Picture

from data import build_sources
from data.errors import DataError
from data.hfds import HFSource
from tests.unit.test_data import config_with, world

datasets = pytest.importorskip("datasets")

NAMES = ["cat", "dog", "kürbis"]
LABELS = [2, 0, 1, 1, 0, 2, 0]


def png(number: int) -> bytes:
    """Random pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def made(labels=LABELS, names=NAMES, image="image", label="label", first=0, **more):
    """A data set of PNG files; `more` has further columns, each with its type and its values."""
    images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = {image: datasets.Image(), label: kind, **{name: feature for name, (feature, _) in more.items()}}
    columns = {image: images, label: labels, **{name: values for name, (_, values) in more.items()}}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's cache, which it looks up when it is imported."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sources(path, **values):
    return build_sources(config_with(DATA__DATASET="hfds", DATA__DATA_PATH=str(path), **values), world())


def save(path, kind, train, val=None, val_name="validation"):
    """As parquet files or as save_to_disk writes them."""
    splits = {"train": train} if val is None else {"train": train, val_name: val}
    if kind == "disk":
        datasets.DatasetDict(splits).save_to_disk(path)
        return path
    (path / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(path / f"data/{name}-00000-of-00001.parquet")
    return path


def test_part_of_a_split_that_was_saved(tmp_path):
    path = save(tmp_path / "data", "parquet", made())
    datasets.load_dataset("parquet", data_dir=str(path), split="train[:2]").save_to_disk(tmp_path / "part")
    train, _ = build_sources(
        config_with(DATA__DATASET="hfds", DATA__DATA_PATH=str(tmp_path / "part")), world(), val=False
    )
    assert len(train) == 2


@pytest.mark.parametrize("kind", ["parquet", "disk"])
@pytest.mark.parametrize("val_name", ["validation", "test"])
def test_data_set(kind, val_name, tmp_path):
    path = save(tmp_path / "data", kind, made(), made(labels=[1, 0], first=100), val_name)
    train, val = sources(path)
    assert (train.targets.tolist(), val.targets.tolist()) == (LABELS, [1, 0])
    assert (train.classes, train.has_names) == (NAMES, True)
    assert [train.read(i) for i in reversed(range(7))] == [png(i) for i in reversed(range(7))]
    assert [val.read(i) for i in range(2)] == [png(100), png(101)]
    assert train.load(0).size == (4, 4)
    assert train.name(3) == f"{path}:train image 3"
    assert pickle.loads(pickle.dumps(train)).read(5) == png(5)


def test_rows_in_another_order():
    """The library keeps a list of rows beside the data."""
    source = HFSource(made().select([4, 2, 0]), "", "", "some")
    assert (source.targets.tolist(), source.read(0)) == ([0, 1, 2], png(4))


def test_hold_out_of_training_images(tmp_path):
    path = save(tmp_path / "data", "disk", made(labels=LABELS * 2))
    with pytest.raises(DataError, match=r"has the splits train; accepted: val or .* DATA.VAL_FRACTION"):
        sources(path)
    train, val = sources(path, DATA__VAL_FRACTION=0.3)
    assert len(train) + len(val) == 14 and len(val) >= 3


def test_files_beside_the_data_set(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    images = [{"bytes": None, "path": str(tmp_path / "a.png")}, None]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int32"))
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    source = HFSource(data, "", "", "some")
    assert (source.read(0), source.classes, source.has_names) == (png(0), ["0", "1"], False)
    with pytest.raises(OSError, match="some image 1: is missing"):
        source.load(1)


def test_columns():
    coarse = [0, 1] * 3 + [0]
    data = made(image="img", label="fine", coarse=(datasets.ClassLabel(names=["a", "b"]), coarse))
    assert HFSource(data, "", "coarse", "some").targets.tolist() == coarse
    assert HFSource(data, "img", "fine", "some").targets.tolist() == LABELS
    with pytest.raises(DataError, match=r"2 columns of type ClassLabel; its .*: img, fine, coarse; .*LABEL_COLUMN"):
        HFSource(data, "", "", "some")
    with pytest.raises(DataError, match=r"DATA.IMAGE_COLUMN is 'pixels'; the columns of some: img, fine, coarse"):
        HFSource(data, "pixels", "fine", "some")
    with pytest.raises(DataError, match="column fine holds no images"):
        HFSource(data, "fine", "coarse", "some")
    with pytest.raises(DataError, match="0 columns of type Image"):
        HFSource(data.remove_columns("img"), "", "fine", "some")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, None], NAMES, "column label has 1 missing values"),
        ([0, -1], NAMES, "has values from -1 to 0"),
        ([0, -5], None, "has values from -5 to 0"),
        ([], None, "has 0 values of int64"),
        ([0, 10**15], None, "has values from 0 to 1000000000000000"),
    ],
)
def test_labels_that_cannot_be_used(labels, names, message):
    with pytest.raises(DataError, match=message):
        HFSource(made(labels=labels, names=names), "", "", "some")


def test_labels_in_words():
    data = made(label="number", names=None, words=(datasets.Value("string"), ["cat"] * 7))
    with pytest.raises(DataError, match="has 7 values of"):
        HFSource(data, "", "words", "some")


@pytest.mark.parametrize("content", ["nothing", "damaged", "text"])
def test_folder_that_is_none(content, tmp_path):
    (tmp_path / "data").mkdir()
    if content == "damaged":
        (tmp_path / "data/train.parquet").write_bytes(b"PAR1 and no more")
    if content == "text":
        (tmp_path / "data/dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"data: (has no parquet|cannot be loaded)"):
        sources(tmp_path / "data")


def test_library_is_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install -r requirements/hfds.txt"):
        sources("anything")
