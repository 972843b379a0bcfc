"""MNIST and the data sets like it: where their files are looked for, what is in them, and what is wrong with them."""

import gzip
import hashlib
import tracemalloc
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torchvision import datasets

from config import ACCEPTED, get_default_config
from data import build, build_sources
from data.errors import DataError
from data.idx import MOST_IDX_BYTES, read_idx
from runtime import distributed
from runtime.distributed import World
from tests.helpers import write_idx, write_idx_folder

MNIST_FILES = [f"{s}-{what}-ubyte" for s in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = MNIST_FILES


def sources(path: Path | str, name: str = "FashionMNIST", train: bool = True, val: bool = True, **values):
    config = get_default_config()
    config.DATA.DATASET, config.DATA.DATA_PATH = name, str(path)
    for key, value in values.items():
        config.DATA[key] = value
    return build_sources(config, World(0, 0, 1, torch.device("cpu")), train, val)


def refused(path: Path, *args, **kwargs) -> str:
    with pytest.raises(DataError) as error:
        sources(path, *args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same_as(source, data: datasets.MNIST) -> None:
    assert source.classes == data.classes
    assert len(source) == len(data)
    for i, (image, target) in enumerate(data):
        assert source.targets[i] == target
        assert source.load(i).tobytes() == image.convert("RGB").tobytes()


@pytest.fixture
def no_download(monkeypatch):
    def download(self):
        raise OSError("no network")

    for name in ("MNIST", "EMNIST"):
        monkeypatch.setattr(getattr(datasets, name), "download", download)


# What is read


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "torchvision", "raw"])
@pytest.mark.parametrize("name", ["FashionMNIST", "MNIST", "KMNIST"])
def test_same_as_torchvision(tmp_path, no_download, name, layout, suffix):
    torchvision_root, raw = tmp_path / "torchvision", tmp_path / "torchvision" / name / "raw"
    write_idx_folder(raw, 30, 20, "")
    if layout == ".":
        write_idx_folder(tmp_path / "data", 30, 20, suffix)
    elif suffix:
        raw = write_idx_folder(tmp_path / "zipped" / name / "raw", 30, 20, suffix)
    path = {".": tmp_path / "data", "torchvision": raw.parents[1], "raw": raw}[layout]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    found = sources(path, name)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    dataset = getattr(datasets, name)
    assert_same_as(found.train, dataset(torchvision_root, train=True))
    assert_same_as(found.val, dataset(torchvision_root, train=False))
    assert found.val.name(3) == f"{name} test image 3"


@pytest.mark.parametrize("split", datasets.EMNIST.splits)
def test_emnist_is_the_same_as_torchvision(tmp_path, no_download, split):
    """Its letters have the labels 1 to 26, and its images are left as they are in the files: transposed."""
    labels = range(1, 27) if split == "letters" else range(len(datasets.EMNIST.classes_split_dict[split]))
    write_idx_folder(tmp_path / "EMNIST/raw", 70, 62, "", split, labels)
    found = sources(tmp_path, "EMNIST", EMNIST_SPLIT=split)
    assert_same_as(found.train, datasets.EMNIST(tmp_path, split, train=True))
    assert_same_as(found.val, datasets.EMNIST(tmp_path, split, train=False))
    other = "mnist" if split != "mnist" else "digits"
    assert f"emnist-{other}-train-images-idx3-ubyte" in refused(tmp_path, "EMNIST", EMNIST_SPLIT=other)


def test_emnist_splits_are_those_of_torchvision():
    assert set(ACCEPTED["DATA.EMNIST_SPLIT"][1].split(", ")) == set(datasets.EMNIST.splits)


@pytest.mark.parametrize("train", [True, False])
def test_only_what_is_asked_for_needs_to_be_there(tmp_path, no_download, train):
    write_idx_folder(tmp_path, 30, 20)
    for name in MNIST_FILES[2:] if train else MNIST_FILES[:2]:
        (tmp_path / f"{name}.gz").unlink()
    found = sources(tmp_path, train=train, val=not train)
    assert (len(found.train or ()), len(found.val or ())) == ((30, 0) if train else (0, 20))
    message = refused(tmp_path)
    for name in MNIST_FILES:
        assert name in message


# What is not there, or wrong


@pytest.mark.parametrize("missing", MNIST_FILES)
def test_only_some_of_the_files(tmp_path, no_download, missing):
    write_idx_folder(tmp_path, 30, 20)
    (tmp_path / f"{missing}.gz").unlink()
    message = refused(tmp_path)
    has, lacks = message.partition(", but lacks ")[::2]
    assert str(tmp_path) in has and missing not in has and all(name in has for name in MNIST_FILES if name != missing)
    assert lacks.startswith(f"{missing};") and "dataset-fashion-mnist" in lacks


def test_no_path():
    assert "--data-path" in refused("")


def rewrite(path: Path, content: bytes) -> None:
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(content)


def header(*sizes: int, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(sizes))) + np.array(sizes, ">u4").tobytes()


DAMAGES = {
    "truncated gzip": (".gz", lambda p: p.write_bytes(p.read_bytes()[:-30]), TRAIN_IMAGES, ["incomplete"]),
    "damaged gzip": (
        ".gz",
        lambda p: p.write_bytes(p.read_bytes()[:20] + bytes(50) + p.read_bytes()[70:]),
        TRAIN_IMAGES,
        ["damaged"],
    ),
    "wrong checksum": (".gz", lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(8)), TRAIN_IMAGES, ["damaged"]),
    "empty gzip": (".gz", lambda p: p.write_bytes(b""), TEST_IMAGES, ["(none)"]),
    "not gzip": (".gz", lambda p: p.write_bytes(header(3) + bytes(3)), TRAIN_LABELS, ["not a gzip file"]),
    "gzip without .gz": ("", lambda p: p.write_bytes(gzip.compress(header(3) + bytes(3))), TRAIN_LABELS, ["1f 8b"]),
    "labels for images": ("", lambda p: p.write_bytes(header(3) + bytes(3)), TEST_IMAGES, ["looks swapped"]),
    "images for labels": ("", lambda p: p.write_bytes(header(1, 2, 2) + bytes(4)), TEST_LABELS, ["looks swapped"]),
    "magic number": ("", lambda p: p.write_bytes(header(3, kind=13) + bytes(12)), TRAIN_LABELS, ["00 00 0d 01"]),
    "an HTML page": ("", lambda p: p.write_bytes(b"<html>Not found</html>"), TRAIN_IMAGES, ["3c 68 74 6d"]),
    "empty": ("", lambda p: p.write_bytes(b""), TRAIN_IMAGES, ["(none)"]),
    "half a header": (".gz", lambda p: rewrite(p, header(3, 28, 28)[:10]), TRAIN_IMAGES, ["within its header"]),
    "no images": ("", lambda p: p.write_bytes(header(0, 28, 28)), TRAIN_IMAGES, ["0 x 28 x 28"]),
    "too large": ("", lambda p: p.write_bytes(header(2**21, 28, 28)), TRAIN_IMAGES, [str(MOST_IDX_BYTES)]),
    "fewer bytes": (".gz", lambda p: rewrite(p, header(30, 28, 28) + bytes(9)), TRAIN_IMAGES, ["9 bytes", "23520"]),
    "more bytes": (".gz", lambda p: rewrite(p, header(30) + bytes(31)), TRAIN_LABELS, ["more bytes than the 30"]),
    "counts": ("", lambda p: write_idx(p, np.zeros(29)), TRAIN_LABELS, ["30 images", "29 labels", TRAIN_IMAGES]),
    "no class": ("", lambda p: write_idx(p, np.arange(20) // 2 + 1), TEST_LABELS, ["label 18 is 10", "0 to 9"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(tmp_path, no_download, damage):
    suffix, do_damage, name, parts = DAMAGES[damage]
    write_idx_folder(tmp_path, 30, 20, suffix)
    do_damage(tmp_path / f"{name}{suffix}")
    message = refused(tmp_path)
    for part in [str(tmp_path / f"{name}{suffix}"), *parts]:
        assert part in message


def test_swapped_files(tmp_path, no_download):
    write_idx_folder(tmp_path, 30, 20)
    images, labels = (tmp_path / f"{name}.gz" for name in (TEST_IMAGES, TEST_LABELS))
    images.rename(tmp_path / "images")
    labels.rename(images)
    (tmp_path / "images").rename(labels)
    assert f"{images}: holds labels, not images; it looks swapped" in refused(tmp_path)


@pytest.mark.parametrize("says", [1000, MOST_IDX_BYTES + 1, 2**32 - 1])
def test_memory_is_bounded(tmp_path, says):
    """A file of 500 KB that becomes 512 MB."""
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(header(says)) + gzip.compress(bytes(2**25)) * 16)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_idx(path, 1)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


# Downloads


@pytest.fixture(params=["FashionMNIST", "MNIST", "KMNIST", "EMNIST"])
def remote(request, tmp_path, monkeypatch):
    """A small data set to be downloaded from a file: URL. Gives its name, the folder it is in, and the list of events,
    where downloads and barriers are noted."""
    name, folder = request.param, tmp_path / "remote"
    dataset = getattr(datasets, name)

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    if name == "EMNIST":
        write_idx_folder(folder / "gzip", 30, 20, ".gz", "balanced")
        with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
            for file in (folder / "gzip").iterdir():
                archive.write(file, f"gzip/{file.name}")
        monkeypatch.setattr(dataset, "url", (folder / "gzip.zip").as_uri())
        monkeypatch.setattr(dataset, "md5", md5(folder / "gzip.zip"))
    else:
        write_idx_folder(folder, 30, 20)
        monkeypatch.setattr(dataset, "mirrors", [f"{folder.as_uri()}/"])
        monkeypatch.setattr(dataset, "resources", [(f"{file}.gz", md5(folder / f"{file}.gz")) for file in MNIST_FILES])
    events = []

    def retrieve(url, *args, **kwargs):
        events.append(url.rpartition("/")[2])
        urllib.request.urlretrieve(url, *args)

    # torchvision's own wants the length, which the answer to a file: URL does not say.
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: events.append("barrier"))
    # The other process of two has the same data.
    monkeypatch.setattr(build, "from_all", lambda value, world: [value] * world.size)
    return name, folder, events


def test_download(remote, tmp_path):
    name, _, events = remote
    downloads = ["gzip.zip"] if name == "EMNIST" else [f"{file}.gz" for file in MNIST_FILES]
    config = get_default_config()
    config.DATA.DATASET, config.DATA.DATA_PATH = name, str(tmp_path / "data")
    found = build_sources(config, World(0, 0, 2, torch.device("cpu")))
    assert events == [*downloads, "barrier", "barrier"]  # and then the other process
    dataset, options = getattr(datasets, name), {"split": "balanced"} if name == "EMNIST" else {}
    assert_same_as(found.train, dataset(tmp_path / "data", train=True, **options))
    assert_same_as(found.val, dataset(tmp_path / "data", train=False, **options))
    events.clear()
    build_sources(config, World(1, 1, 2, torch.device("cpu")))
    assert events == ["barrier", "barrier"]


def test_interrupted_download_goes_on(remote, tmp_path):
    name, _, events = remote
    found = sources(tmp_path / "data", name)
    raw = tmp_path / "data" / name / "raw"
    gone = "emnist-balanced-test-labels-idx1-ubyte" if name == "EMNIST" else TEST_LABELS
    for file in raw.glob(f"{gone}*"):
        file.unlink()
    events.clear()
    again = sources(tmp_path / "data", name)
    assert events == ([] if name == "EMNIST" else [f"{TEST_LABELS}.gz"])  # EMNIST's zip file is still there
    assert np.array_equal(again.val.targets, found.val.targets)


@pytest.mark.parametrize("damage", ["missing", "corrupt", "folder"])
def test_what_cannot_be_downloaded(remote, tmp_path, damage):
    name, folder, _ = remote
    for file in folder.glob("*.*"):
        file.unlink() if damage == "missing" else file.write_bytes(b"no data")
    path = tmp_path / "data"
    if damage == "folder":
        path.write_text("a file")
    message = refused(path, name)
    splits = ("emnist-balanced-train", "emnist-balanced-test") if name == "EMNIST" else ("train", "t10k")
    files = [f"{split}-{what}-ubyte" for split in splits for what in ("images-idx3", "labels-idx1")]
    for part in (name, str(path), *files):
        assert part in message
    assert ("/usr/share/datasets/fashion-mnist" in message) == (name == "FashionMNIST")


@pytest.mark.skipif("os.geteuid() == 0", reason="root may write everywhere")
def test_folder_that_cannot_be_written(tmp_path, no_download):
    write_idx_folder(tmp_path / "data", 30, 20)
    (tmp_path / "data").chmod(0o555)
    assert len(sources(tmp_path / "data").train) == 30
    (tmp_path / "data" / f"{TRAIN_IMAGES}.gz").chmod(0o000)
    assert f"{tmp_path / 'data' / TRAIN_IMAGES}.gz: cannot be read: Permission denied" in refused(tmp_path / "data")
    (tmp_path / "data").chmod(0o000)
    assert f"FashionMNIST is not in {tmp_path / 'data'}" in refused(tmp_path / "data")
    (tmp_path / "data").chmod(0o755)  # for pytest to remove it
