"""Sources, data sets, samplers, transforms and loaders; randomness by position."""

import hashlib
import io
import pickle
import random
import re
import tarfile
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from config import ConfigError, get_default_config, image_size
from data import (
    build_batch_transform,
    build_eval_loader,
    build_mixup,
    build_sources,
    build_train_loader,
)
from data.build import hold_out
from data.dataset import MOST_REPLACEMENTS, ClassificationDataset, EvalSampler, TrainSampler
from data.device import Normalize
from data.errors import DataError
from data.sources import ArraySource, FolderSource, ZipSource
from data.transforms import RandomResizedCrop, build_transform
from runtime import distributed
from runtime.distributed import World
from tests.helpers import write_idx_folder
from utils import seed_all

NO_AUGMENTATION = {
    "AUG__HFLIP": 0.0,
    "AUG__COLOR_JITTER": 0.0,
    "AUG__AUTO_AUGMENT": "none",
}


def config_with(**values):
    """The defaults with some of them replaced; `A__B` stands for A.B."""
    return with_values(get_default_config(), **{"DATA__NUM_WORKERS": 0, **values})


def with_values(config, **values):
    config = config.clone()
    for key, value in values.items():
        config.merge_from_list([key.replace("__", "."), value])
    return config


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, rank, size, torch.device("cpu"))


def pixels(seed: int, height: int = 36, width: int = 44) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(seed: int) -> bytes:
    return encode(Image.fromarray(pixels(seed)))


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(root: Path, split: str, files: list[tuple[str, int, bytes]], compression=zipfile.ZIP_STORED) -> ZipSource:
    """A zip and its map, in the order of `files` (path, label, content)."""
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / f"{split}.zip", "w", compression) as archive:
        for name, _, content in files:
            archive.writestr(name, content)
    lines = "".join(f"{name}\t{label}\n" for name, label, _ in files)
    (root / f"{split}_map.txt").write_text(lines, encoding="utf-8")
    return ZipSource(root / f"{split}.zip", root / f"{split}_map.txt")


def numbered_folder(root: Path, count: int = 6) -> Path:
    """`count` images with the random pixels of their number, of two classes in turn; sorted by name within each."""
    return write_folder(root, {f"class{i % 2}/{i:03d}.png": png(i) for i in range(count)})


def array_source(count: int, size: int = 40, classes: int = 3) -> ArraySource:
    images = np.stack([pixels(i, size, size) for i in range(count)])
    return ArraySource(images, [i % classes for i in range(count)], [str(c) for c in range(classes)], "noise")


def dataset(source, is_train: bool, seed: int = 0, **values) -> ClassificationDataset:
    config = config_with(**{"DATA__IMG_SIZE": 32, **values})
    return ClassificationDataset(source, build_transform(config, is_train), image_size(config), seed, is_train)


def assert_same(sample, other) -> None:
    assert torch.equal(sample.image, other.image)
    assert sample[1:] == other[1:]


# Digits


def digest(source) -> str:
    """Of all images and labels in their order."""
    sha = hashlib.sha256()
    for index, target in enumerate(source.targets):
        sha.update(np.asarray(source.load(index)).tobytes() + bytes([target]))
    return sha.hexdigest()


@pytest.fixture(scope="module")
def digits():
    return build_sources(config_with(DATA__DATASET="digits"), world())


def test_digits_split_is_fixed(digits):
    assert (len(digits.train), len(digits.val)) == (1437, 360)
    assert digest(digits.train) == "40582f54f1a6613b04ba04b9471441940d213bd3b7f5f663664fdf2d6f499bd0"
    assert digest(digits.val) == "3047ceab0a1066037a6ad1dfc12a121ea29258b5a55db70cfeeff7fb94e15f30"


# CIFAR


def write_cifar(folder: Path, name: str) -> dict[str, bytes]:
    """Three images per file in torchvision's on-disk format; the files by name."""
    classes, label_key, meta_key = {
        "CIFAR10": (10, "labels", "label_names"),
        "CIFAR100": (100, "fine_labels", "fine_label_names"),
    }[name]
    dataset = getattr(torchvision.datasets, name)
    files = {dataset.meta["filename"]: pickle.dumps({meta_key: [f"class {c}" for c in range(classes)]})}
    for number, (file, _) in enumerate(dataset.train_list + dataset.test_list):
        data = np.random.default_rng(number).integers(0, 256, (3, 3072), dtype=np.uint8)
        files[file] = pickle.dumps({"data": data, label_key: [number, number + 1, 9 - number]})
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return files


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, tmp_path, monkeypatch):
    """A small CIFAR to be downloaded from a file: URL. Gives its name, class, files and the list of events, where
    downloads and barriers are noted."""
    dataset = getattr(torchvision.datasets, request.param)
    files = write_cifar(tmp_path / dataset.base_folder, request.param)
    archive = tmp_path / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / dataset.base_folder, dataset.base_folder)

    def md5(content):
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(dataset, "url", archive.as_uri())
    # torchvision's own wants the length, which the answer to a file: URL does not say.
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", urllib.request.urlretrieve)
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive.read_bytes()))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, part, [[file, md5(files[file])] for file, _ in getattr(dataset, part)])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(files[dataset.meta["filename"]])})

    events = []
    download = torchvision.datasets.cifar.download_and_extract_archive

    def noted_download(*args, **kwargs):
        events.append("download")
        download(*args, **kwargs)

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", noted_download)
    monkeypatch.setattr(distributed.dist, "barrier", lambda: events.append("barrier"))
    return request.param, dataset, files, events


def test_cifar(cifar, tmp_path):
    name, dataset, files, events = cifar
    config = config_with(DATA__DATASET=name, DATA__DATA_PATH=str(tmp_path / "data"))
    sources = build_sources(config, world())
    assert events == ["download"]
    assert len(sources.train.classes) == (10 if name == "CIFAR10" else 100)
    assert sources.train.classes == sources.val.classes
    assert sources.train.classes[9] == "class 9"
    for source, parts in ((sources.train, dataset.train_list), (sources.val, dataset.test_list)):
        content = [pickle.loads(files[part]) for part, _ in parts]
        images = np.concatenate([part["data"] for part in content])
        labels = [label for part in content for key in part if key.endswith("labels") for label in part[key]]
        assert source.targets.tolist() == labels
        assert len(source) == len(images)
        for i, image in enumerate(images):
            # channels first on disk
            assert np.array_equal(np.asarray(source.load(i)), image.reshape(3, 32, 32).transpose(1, 2, 0))
    assert sources.val.name(1) == f"{name} test image 1"
    build_sources(config, world())
    assert events == ["download"]


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_cifar_that_cannot_be_downloaded(cifar, tmp_path, damage):
    name, dataset, _, _ = cifar
    archive = tmp_path / dataset.filename
    archive.unlink() if damage == "missing" else archive.write_bytes(b"no archive")
    config = config_with(DATA__DATASET=name, DATA__DATA_PATH=str(tmp_path / "data"))
    with pytest.raises(DataError) as error:
        build_sources(config, world())
    for part in (name, str(tmp_path / "data"), dataset.url, dataset.filename):
        assert part in str(error.value)


# Folders


@pytest.mark.parametrize("name", ["imagenet", "imagenet-1k", "101_ObjectCategories"])
def test_folders(tmp_path, name):
    train = {"b c/x.png": png(1), "a/z.PNG": png(2), "a/deep/y.jpeg": png(3), "a/notes.txt": b"no image"}
    write_folder(tmp_path / "train", train)
    write_folder(tmp_path / "val", {"a/v.png": png(4), "b c/w.png": png(5)})
    sources = build_sources(config_with(DATA__DATASET=name, DATA__DATA_PATH=str(tmp_path)), world())
    assert sources.train.classes == sources.val.classes == ["a", "b c"]
    names = [str(tmp_path / "train" / file) for file in ("a/deep/y.jpeg", "a/z.PNG", "b c/x.png")]
    assert sorted(sources.train.name(i) for i in range(3)) == sorted(names)
    found = {sources.train.name(i): (sources.train.targets[i], sources.train.load(i)) for i in range(3)}
    for file, (label, seed) in zip(names, [(0, 3), (0, 2), (1, 1)], strict=True):
        assert found[file][0] == label
        assert np.array_equal(np.asarray(found[file][1]), pixels(seed))


@pytest.mark.parametrize(
    ("name", "files", "parts"),
    [
        ("imagenet", {}, ["DATA_PATH is empty", "--data-path"]),
        ("imagenet", {"train/a/1.png": png(0)}, ["no folder val/", "one folder per class", "DATA.VAL_FRACTION"]),
        ("imagenet", {"a/1.png": png(0), "b/1.png": png(0)}, ["no folder train/", "DATA.VAL_FRACTION 0.1 holds out"]),
        ("101_ObjectCategories", {"Faces/1.png": png(0)}, ["no folder train/", "categories101_train_val_split.py"]),
        ("imagenet", {"train": None, "val": None}, ["no class folders"]),
        ("imagenet", {"train/a/1.png": png(0), "train/bare": None, "val": None}, ["no images in bare", ".png"]),
        (
            "imagenet",
            {"train/a/1.png": png(0), "train/b/1.png": png(0), "val/a/1.png": png(0), "val/c/1.png": png(0)},
            ["2 classes", "only in train: b", "only in val: c"],
        ),
    ],
    ids=["no-path", "no-val", "flat", "no-split", "no-classes", "no-images", "other-classes"],
)
def test_folders_that_cannot_be_used(tmp_path, name, files, parts):
    for file, content in files.items():
        if content is None:
            (tmp_path / file).mkdir(parents=True)
        else:
            write_folder(tmp_path, {file: content})
    with pytest.raises(DataError) as error:
        build_sources(config_with(DATA__DATASET=name, DATA__DATA_PATH=str(tmp_path) if files else ""), world())
    for part in parts:
        assert part in str(error.value)
    if files:
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "test"])
def test_names_of_the_validation_folder(tmp_path, name):
    files = {f"{folder}/{label}/1.png": png(0) for folder in ("train", name) for label in "ab"}
    if name == "val":
        files["test/a/1.png"] = png(0)
    write_folder(tmp_path, files)
    sources = build_sources(config_with(DATA__DATA_PATH=str(tmp_path)), world())
    assert sources.val.name(0) == f"{tmp_path}/{name}/a/1.png"
    said = [] if name == "val" else [f"{tmp_path}/{name}: its class folders are used for validation"]
    assert sources.notes == said


@pytest.mark.parametrize("above", ["", "train/"])
def test_class_folders_alone(tmp_path, above):
    write_folder(tmp_path, {f"{above}{label}/{number}.png": png(0) for label in "ab" for number in range(10)})
    config = config_with(DATA__DATA_PATH=str(tmp_path), DATA__VAL_FRACTION=0.3)
    sources = build_sources(config, world())
    assert [len(source) for source in sources] == [14, 6]
    assert sources.train.classes == ["a", "b"]
    said = [] if above else [f"{tmp_path}: its class folders are used for training and validation"]
    assert sources.notes == said


def test_class_folders_beside_a_folder_of_validation_images(tmp_path):
    write_folder(tmp_path, {"a/1.png": png(0), "a/2.png": png(0), "test/a/1.png": png(0)})
    with pytest.raises(DataError, match=f"{tmp_path}: no folder train/"):
        build_sources(config_with(DATA__DATA_PATH=str(tmp_path), DATA__VAL_FRACTION=0.5), world())


# Zip files


def test_zip(tmp_path):
    images = [("n01/image 1.png", 0, png(1)), ("ünicode/b.png", 2, png(2)), ("c.png", 1, png(3))]
    write_zip(tmp_path, "train", images)
    write_zip(tmp_path, "val", [("x y z.png", 2, png(4))])
    config = config_with(DATA__ZIP_MODE=True, DATA__DATA_PATH=str(tmp_path))
    sources = build_sources(config, world())
    assert sources.train.targets.tolist() == [0, 2, 1]
    assert sources.train.classes == ["0", "1", "2"]
    assert sources.train.name(0) == f"{tmp_path / 'train.zip'}:n01/image 1.png"
    for i, seed in enumerate((1, 2, 3)):
        assert np.array_equal(np.asarray(sources.train.load(i)), pixels(seed))
    assert np.array_equal(np.asarray(sources.val.load(0)), pixels(4))
    (tmp_path / "train.zip").unlink()
    assert len(build_sources(config, world(), train=False).val) == 1
    with pytest.raises(DataError, match=r"train\.zip: no such file"):
        build_sources(config, world())


@pytest.mark.parametrize(
    ("listing", "parts"),
    [
        (b"a.png\t0\nb.png 1\n", ["line 2", "b.png 1"]),
        (b"a.png\tdog\n", ["line 1", "dog"]),
        (b"a.png\t-1\n", ["line 1", "-1"]),
        (b"a.png\t" + b"9" * 5000 + b"\n", ["line 1"]),
        (b"\t0\n", ["line 1"]),
        (b"a.png\t0\ngone 2.png\t0\n", ["lacks gone 2.png"]),
        (b"", ["lists no images"]),
        ("bücher.png\t0\n".encode("latin-1"), []),
    ],
    ids=["no-tab", "text-label", "negative", "large", "no-path", "missing-member", "empty", "latin-1"],
)
def test_zip_listing_that_cannot_be_used(tmp_path, listing, parts):
    write_zip(tmp_path, "train", [("a.png", 0, png(1))])
    (tmp_path / "train_map.txt").write_bytes(listing)
    with pytest.raises(DataError) as error:
        ZipSource(tmp_path / "train.zip", tmp_path / "train_map.txt")
    for part in (str(tmp_path), *parts):
        assert part in str(error.value)


@pytest.mark.parametrize("cache_mode", ["no", "full"])
@pytest.mark.parametrize("damage", ["compression", "encryption", "overwritten"])
def test_zip_whose_members_cannot_be_read(tmp_path, damage, cache_mode):
    """Deflate64 (what Windows makes of large archives), a password, or a file that changed since it was listed."""
    source = write_zip(tmp_path, "train", [(f"{i}.png", 0, png(i)) for i in range(4)])
    content = bytearray((tmp_path / "train.zip").read_bytes())
    field, value = {"compression": (8, 9), "encryption": (6, 1), "overwritten": (0, 0)}[damage]
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        for start in [match.start() for match in re.finditer(re.escape(signature), content)]:
            content[start + shift + field] = value
    (tmp_path / "train.zip").write_bytes(content)

    config = config_with(DATA__IMG_SIZE=32, DATA__BATCH_SIZE=2, DATA__CACHE_MODE=cache_mode)
    with pytest.raises(DataError, match=r"train\.zip"):
        next(iter(build_train_loader(config, source, world())))


# Validation images held out from the training images


def held_out(config, **values):
    """The sources of a config with some values replaced, and the names of the images in each."""
    sources = build_sources(with_values(config, **values), world())
    return sources, *([source.name(i) for i in range(len(source))] for source in sources)


@pytest.fixture(params=["digits", "CIFAR10", "imagenet", "zip", "FashionMNIST"])
def training_data(request, tmp_path, monkeypatch):
    """The config of a data set whose validation split is not there, or fails the test when it is read."""
    root, name = tmp_path / "data", request.param
    if name == "CIFAR10":
        images = np.stack([pixels(i, 32, 32) for i in range(50)])

        def cifar(path, train, download):
            assert train
            return SimpleNamespace(data=images, targets=[i % 10 for i in range(50)], classes=list("abcdefghij"))

        monkeypatch.setattr(torchvision.datasets, name, cifar)
    elif name == "imagenet":
        numbered_folder(root / "train", 50)
    elif name == "zip":
        write_zip(root, "train", [(f"{i}.png", i % 3, png(i)) for i in range(50)])
    elif name == "FashionMNIST":
        write_idx_folder(root, 50, 10)
        for path in root.glob("t10k*"):
            path.unlink()
    values = {"DATA__ZIP_MODE": True} if name == "zip" else {"DATA__DATASET": name}
    return config_with(DATA__DATA_PATH=str(root), DATA__VAL_FRACTION=0.3, **values)


def test_hold_out(training_data):
    sources, train, val = held_out(training_data)
    whole = build_sources(with_values(training_data, DATA__VAL_FRACTION=0.0), world(), val=False).train
    targets = {whole.name(i): target for i, target in enumerate(whole.targets)}
    images = {whole.name(i): whole.load(i).tobytes() for i in range(len(whole))}
    assert len(train) + len(val) == len(whole) and {*train, *val} == set(targets)
    assert sources.train.classes == sources.val.classes == whole.classes
    for label in range(len(whole.classes)):
        assert (sources.val.targets == label).sum() == round(0.3 * (whole.targets == label).sum()) > 0
    for source in sources:
        assert [targets[source.name(i)] for i in range(len(source))] == source.targets.tolist()
        assert all(source.load(i).tobytes() == images[source.name(i)] for i in range(0, len(source), 7))
    # Evaluation reads the training split too, and only that.
    alone = build_sources(training_data, world(), train=False)
    assert alone.train is None and [alone.val.name(i) for i in range(len(alone.val))] == val


def test_hold_out_depends_on_its_own_seed_alone(training_data):
    _, train, val = held_out(training_data)
    for values in ({"SEED": 7}, {"DATA__IMAGES_PER_CLASS": 2}, {"DATA__IMAGES_PER_CLASS": 2, "SEED": 7}):
        sources, some, same = held_out(training_data, **values)
        assert same == val and set(some) <= set(train)
        if "DATA__IMAGES_PER_CLASS" in values:
            assert len(some) == 2 * len(sources.train.classes)
    chosen = build_sources(training_data, world()).train.classes[1]
    sources, some, fewer = held_out(training_data, DATA__CLASSES=repr(chosen))
    assert sources.val.classes == [chosen] and 0 < len(fewer) < len(val)
    assert set(fewer) <= set(val) and set(some) <= set(train)
    assert held_out(training_data, DATA__CLASSES="all", DATA__VAL_SEED=1)[2] != val


def test_hold_out_is_the_same_on_every_machine():
    sources, _, _ = held_out(config_with(DATA__DATASET="digits"), DATA__VAL_FRACTION=0.1)
    assert digest(sources.val) == "ba8036f9c8a2e12d0a271f5307219f0316da653cdb437ea48eb3edd64b5b2340"


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.001, [1, 1, 1]), (0.2, [1, 1, 4]), (0.5, [1, 2, 10]), (0.74, [1, 3, 15]), (0.99, [1, 3, 19])],
)
def test_hold_out_counts(fraction, counts):
    targets = [0] * 2 + [1] * 4 + [3] * 20
    source = ArraySource(np.zeros((26, 4, 4), np.uint8), targets, list("abcd"), "noise")
    parts = hold_out(source, config_with(DATA__VAL_FRACTION=fraction))
    assert np.bincount(parts[False].targets, minlength=4).tolist() == [*counts[:2], 0, counts[2]]
    assert len(parts[True]) + len(parts[False]) == 26


def test_hold_out_of_a_class_of_one_image():
    source = ArraySource(np.zeros((3, 4, 4), np.uint8), [0, 0, 1], ["many", "one"], "noise")
    with pytest.raises(DataError, match=r"DATA\.VAL_FRACTION is 0\.5, but the training data has 1 of one; accepted: 2"):
        hold_out(source, config_with(DATA__VAL_FRACTION=0.5))


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds(training_data, folds):
    """Each image is held out once, and of each class as many in each fold, give or take one."""
    whole = build_sources(with_values(training_data, DATA__VAL_FRACTION=0.0), world(), val=False).train
    parts = []
    for fold in range(folds):
        values = {"DATA__VAL_FRACTION": 0.0, "DATA__FOLDS": folds, "DATA__FOLD": fold}
        sources, train, val = held_out(training_data, **values)
        assert not {*train} & {*val} and len(train) + len(val) == len(whole)
        parts.append((val, np.bincount(sources.val.targets, minlength=len(whole.classes))))
    assert sorted(name for val, _ in parts for name in val) == sorted(whole.name(i) for i in range(len(whole)))
    counts = np.array([count for _, count in parts])
    assert (counts.max(0) - counts.min(0)).max() <= 1 and counts.min() > 0
    assert held_out(training_data, **values, DATA__VAL_SEED=1)[2] != val


def test_folds_are_of_equal_size():
    source = ArraySource(np.zeros((40, 4, 4), np.uint8), np.repeat(range(10), 4), list("abcdefghij"), "noise")
    sizes = [len(hold_out(source, config_with(DATA__FOLDS=3, DATA__FOLD=fold))[False]) for fold in range(3)]
    assert sum(sizes) == 40 and max(sizes) - min(sizes) <= 1
    with pytest.raises(DataError, match=r"DATA\.FOLDS is 5, but the training data has 4 of a; accepted: 2 to 4"):
        hold_out(source, config_with(DATA__FOLDS=5))


def test_images_per_class_are_of_what_is_left():
    config = config_with(DATA__DATASET="digits", DATA__VAL_FRACTION=0.9, DATA__IMAGES_PER_CLASS=15)
    with pytest.raises(DataError, match=r"IMAGES_PER_CLASS is 15, but the training data has 14 of"):
        build_sources(config, world())


def test_folds_are_the_same_on_every_machine():
    sources, _, _ = held_out(config_with(DATA__DATASET="digits"), DATA__FOLDS=5, DATA__FOLD=3)
    assert digest(sources.val) == "5c00b10d8103e9e3227519c885937fa373f1d216766bf2d585f70f51f5cc54b6"


# The cache


@pytest.fixture(params=["folder", "zip"])
def file_source(request, tmp_path):
    """Six images of two classes and a function that deletes their files."""
    if request.param == "folder":
        source = FolderSource(numbered_folder(tmp_path / "images"))

        def delete():
            for path in (tmp_path / "images").rglob("*.png"):
                path.unlink()
    else:
        source = write_zip(tmp_path, "train", [(f"{i}.png", i % 2, png(i)) for i in range(6)])

        def delete():
            # An archive that is open already could still be read.
            (tmp_path / "train.zip").write_bytes(b"")

    return source, delete


def samples(data) -> list:
    return [data[epoch, index] for epoch in (0, 1) for index in range(len(data))]


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("mode", ["full", "part"])
def test_cache_gives_the_same_samples_without_reading_files_again(file_source, mode, is_train):
    source, delete = file_source
    expected = samples(dataset(source, is_train))
    assert all(sample.readable for sample in expected)
    config = config_with(DATA__CACHE_MODE=mode, DATA__BATCH_SIZE=2, DATA__IMG_SIZE=32)
    data = (build_train_loader if is_train else build_eval_loader)(config, source, world()).dataset
    delete()
    for sample, other in zip(samples(data), expected, strict=True):
        assert_same(sample, other)


@pytest.mark.parametrize(("mode", "kept"), [("no", []), ("part", [1, 3, 5]), ("full", [0, 1, 2, 3, 4, 5])])
def test_cached_share_of_one_process_of_two(file_source, mode, kept):
    source, _ = file_source
    read, reads = source.read, []
    source.read = lambda index: reads.append(index) or read(index)
    config = config_with(DATA__CACHE_MODE=mode, DATA__BATCH_SIZE=1, DATA__IMG_SIZE=32)
    loader = build_train_loader(config, source, world(1, 2))
    assert reads == kept
    trained_on = torch.cat([batch.index for batch in loader]).tolist()
    assert len(trained_on) == 3
    if mode == "part":
        assert sorted(trained_on) == kept
    assert reads == (trained_on if mode == "no" else kept)


# Samplers


def epoch_of(sampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    assert {e for e, _ in keys} <= {epoch}
    assert all(type(index) is int for _, index in keys)
    return [index for _, index in keys]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("length", "size"), [(12, 1), (12, 3), (14, 3), (7, 4), (3, 4)])
def test_train_sampler_deals_each_sample_at_most_once(length, size, sharded):
    parts = [epoch_of(TrainSampler(length, rank, size, 0, sharded), 0) for rank in range(size)]
    assert {len(part) for part in parts} == {length // size}
    together = [index for part in parts for index in part]
    assert len(set(together)) == len(together)
    assert set(together) <= set(range(length))
    if sharded:
        for rank, part in enumerate(parts):
            assert set(part) <= set(range(rank, length, size))


@pytest.mark.parametrize("sharded", [False, True])
def test_train_sampler_order_depends_on_seed_and_epoch_alone(sharded):
    sampler = TrainSampler(50, 1, 2, seed=3, sharded=sharded)
    orders = {epoch: epoch_of(sampler, epoch) for epoch in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all(order != sorted(order) for order in orders.values())
    seed_all(99)
    for epoch in (2, 0, 1):
        assert epoch_of(sampler, epoch) == orders[epoch]
        assert epoch_of(TrainSampler(50, 1, 2, 3, sharded), epoch) == orders[epoch]
    assert epoch_of(TrainSampler(50, 1, 2, 4, sharded), 0) != orders[0]


def test_train_sampler_goes_on_inside_an_epoch():
    sampler = TrainSampler(5000, 1, 2, seed=3)
    whole = epoch_of(sampler, 1)
    for start in (0, 1, 1023, 1024, 2499, 2500):
        sampler.set_epoch(1, start)
        assert [index for _, index in sampler] == whole[start:]


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("length", [1, 2, 4, 5, 12, 13])
def test_eval_sampler_gives_each_sample_exactly_once(length, size):
    parts = [list(EvalSampler(length, rank, size)) for rank in range(size)]
    assert sorted(index for part in parts for _, index in part) == list(range(length))
    assert {epoch for part in parts for epoch, _ in part} == {0}
    assert [len(EvalSampler(length, rank, size)) for rank in range(size)] == [len(part) for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# What a sample depends on


def generator_states() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def by_key(loader, epoch: int) -> dict[int, tuple]:
    loader.sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        for image, target, index, readable in zip(*batch, strict=True):
            found[index.item()] = (image, target.item(), readable.item())
    return found


def test_sample_depends_on_seed_epoch_and_index_alone():
    source = array_source(12)
    data = dataset(source, is_train=True, seed=5)
    expected = [data[3, index] for index in range(12)]
    data[0, 0], data[7, 2]
    seed_all(1, 2, 3)
    for index in reversed(range(12)):
        assert_same(data[3, index], expected[index])
    for other in (data[4, 6], dataset(source, True, seed=6)[3, 6], expected[7]):
        assert not torch.equal(other.image, expected[6].image)


@pytest.mark.parametrize("size", [32, 48])
def test_sample_does_not_depend_on_loader_processes_or_batches(size):
    source = array_source(12)
    found = []
    for workers, batch in ((0, 4), (2, 4), (2, 3)):
        config = config_with(
            DATA__IMG_SIZE=size, DATA__NUM_WORKERS=workers, DATA__BATCH_SIZE=batch, SEED=5, DATA__PIN_MEMORY=False
        )
        loader = build_train_loader(config, source, world())
        found.append([by_key(loader, epoch) for epoch in (0, 1)])
    for others in found[1:]:
        for epoch in (0, 1):
            assert others[epoch].keys() == found[0][epoch].keys() == set(range(12))
            for index, (image, *rest) in others[epoch].items():
                assert torch.equal(image, found[0][epoch][index][0])
                assert rest == [*found[0][epoch][index][1:]]


@pytest.mark.parametrize("is_train", [True, False])
def test_sample_leaves_the_generators_alone(is_train):
    data = dataset(array_source(4), is_train)
    seed_all(8)
    before = generator_states()
    data[0, 1]
    assert generator_states() == before


def test_batch_of_a_loader():
    config = config_with(DATA__IMG_SIZE=32, DATA__BATCH_SIZE=5)
    sizes = [len(batch.image) for batch in build_train_loader(config, array_source(12), world())]
    assert sizes == [5, 5]
    batches = list(build_eval_loader(config, array_source(12), world()))
    assert [len(batch.image) for batch in batches] == [5, 5, 2]
    assert batches[0].image.shape == (5, 3, 32, 32)
    assert batches[0].image.dtype == torch.uint8
    assert batches[0].image.is_contiguous()
    assert batches[2].target.tolist() == [1, 2]
    assert batches[2].index.tolist() == [10, 11]
    assert batches[2].readable.dtype == torch.bool
    assert batches[2].readable.all()


@pytest.mark.parametrize(
    ("asked", "cores", "processes", "expected"),
    [(-1, 4, 1, 4), (-1, 64, 1, 8), (-1, 16, 4, 4), (-1, 2, 4, 0), (3, 2, 1, 3), (0, 4, 1, 0)],
)
def test_loader_processes(monkeypatch, asked, cores, processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("torch.utils.data.DataLoader.check_worker_number_rationality", lambda self: None)
    config = config_with(DATA__IMG_SIZE=48, DATA__NUM_WORKERS=asked)  # smaller ones would be in memory
    assert build_eval_loader(config, array_source(2), world()).num_workers == expected


# Unreadable images

JPEG = encode(Image.fromarray(pixels(9)), "JPEG")
DAMAGED = {
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "truncated png": png(9)[:500],
    "header only": JPEG[:20],
    "zero bytes": b"",
    "text": b"<html>404</html>",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_unreadable_image(tmp_path, content):
    root = numbered_folder(tmp_path, 6)
    source = FolderSource(root)
    flips = {**NO_AUGMENTATION, "AUG__HFLIP": 0.5}
    last = len(source) - 1
    for broken, following in ((1, 2), (last, 0)):
        Path(source.name(broken)).write_bytes(content)
        sample = dataset(source, is_train=True, **flips)[0, broken]
        data = dataset(source, is_train=True, **flips)
        seed_all(0, 0, broken)
        assert torch.equal(sample.image, data.transform(source.load(following)))
        assert sample[1:] == (source.targets[following], broken, False)
        assert data[0, following].readable

        sample = dataset(source, is_train=False)[0, broken]
        assert torch.equal(sample.image, torch.zeros(3, 32, 32, dtype=torch.uint8))
        assert sample[1:] == (source.targets[broken], broken, False)


@pytest.mark.parametrize("broken", [MOST_REPLACEMENTS - 1, MOST_REPLACEMENTS])
def test_many_unreadable_images_in_a_row(tmp_path, broken):
    """Those after index 0, of more than are tried."""
    files = {f"a/{i:03d}.png": png(i) if i >= broken else b"" for i in range(MOST_REPLACEMENTS + 5)}
    data = dataset(FolderSource(write_folder(tmp_path, files)), is_train=True)
    if broken < MOST_REPLACEMENTS:
        assert data[0, 0].readable is False
    else:
        with pytest.raises(DataError, match=f"000.png and the {MOST_REPLACEMENTS - 1} files after it"):
            data[0, 0]


# Colour modes

RGB = (200, 30, 60)


def palette_with_alpha() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RGB])
    image.info["transparency"] = bytes([0, 128])
    return image


MODES = {
    "RGB png": (encode(Image.new("RGB", (8, 8), RGB)), RGB),
    "RGBA png": (encode(Image.new("RGBA", (8, 8), (*RGB, 128))), RGB),
    "CMYK jpeg": (encode(Image.new("RGB", (8, 8), RGB).convert("CMYK"), "JPEG"), RGB),
    "palette png": (encode(Image.new("RGB", (8, 8), RGB).convert("P", palette=Image.Palette.ADAPTIVE)), RGB),
    "palette gif": (encode(Image.new("RGB", (8, 8), RGB), "GIF"), RGB),
    "palette and alpha png": (encode(palette_with_alpha()), RGB),
    "grey jpeg": (encode(Image.new("L", (8, 8), 90), "JPEG"), (90, 90, 90)),
    "grey and alpha png": (encode(Image.new("LA", (8, 8), (90, 40))), (90, 90, 90)),
    "black and white png": (encode(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "grey 16 bit png": (encode(Image.fromarray(np.full((8, 8), 0x5A5A, np.uint16))), (90, 90, 90)),
    "grey 16 bit pgm": (b"P5\n8 8\n65535\n" + 64 * b"\x5a\x5a", (90, 90, 90)),
    "grey 16 bit big-endian tiff": (encode(Image.fromarray(np.full((8, 8), 0x5A00, ">u2")), "TIFF"), (90, 90, 90)),
    "grey 16 bit tiff": (encode(Image.fromarray(np.full((8, 8), 0x5A5A, np.uint16)), "TIFF"), (90, 90, 90)),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(("content", "color"), MODES.values(), ids=MODES)
def test_colour_mode(tmp_path, content, color):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/image.png").write_bytes(content)
    image = FolderSource(tmp_path).load(0)
    assert image.mode == "RGB"
    assert image.size == (8, 8)
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 3


# Transforms


def as_array(image: torch.Tensor) -> np.ndarray:
    """(S, S, 3) of a transformed image."""
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("size", "crop", "shorter"), [(224, True, 256), (64, True, 73), (40, True, 45), (40, False, None), (32, True, None)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "random"])
def test_evaluation_transform(size, crop, shorter, interpolation):
    config = config_with(DATA__IMG_SIZE=size, DATA__INTERPOLATION=interpolation, TEST__CROP=crop)
    image = Image.fromarray(pixels(0, 60, 90))
    method = Image.Resampling["BICUBIC" if interpolation == "random" else interpolation.upper()]
    if shorter is None:
        expected = image.resize((size, size), method)
    else:
        width = int(shorter * 90 / 60)
        left, top = round((width - size) / 2), round((shorter - size) / 2)
        expected = image.resize((width, shorter), method).crop((left, top, left + size, top + size))
    found = build_transform(config, is_train=False)(image)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.uint8
    assert np.array_equal(as_array(found), np.asarray(expected))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, None),
        ("AUG__COLOR_JITTER", 0.4),
        ("AUG__AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"),
    ],
)
def test_augmentation_that_is_off_changes_no_colour(key, value):
    """A random crop and a flip of one colour are that colour."""
    config = config_with(DATA__IMG_SIZE=48, **{**NO_AUGMENTATION, **({key: value} if key else {})})
    transform = build_transform(config, is_train=True)
    changed = 0
    for seed in range(20):
        seed_all(seed)
        changed += (as_array(transform(Image.new("RGB", (60, 60), RGB))) != RGB).any()
    assert changed == 0 if key is None else changed >= 5


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(375, 500), (1000, 1500), (60, 90), (5, 3), (300, 40)])
def test_crop_that_pytorch_resizes_is_pillows_but_for_rounding(monkeypatch, shape, method):
    """Whatever resizes, the draws, and with them the crop, are timm's."""
    image = Image.fromarray(pixels(0, *shape)).filter(ImageFilter.GaussianBlur(3))
    expected = timm.data.transforms.RandomResizedCropAndInterpolation(224, interpolation=method)
    crop = RandomResizedCrop(224, interpolation=method)
    for resizes in (True, False):
        monkeypatch.setattr(RandomResizedCrop, "by_torch", resizes)
        for seed in range(5):
            seed_all(seed)
            found, following = np.asarray(crop(image)).astype(int), random.random()
            seed_all(seed)
            difference = found - np.asarray(expected(image))
            assert random.random() == following
            assert np.abs(difference).max() <= (2 if resizes else 0)
            assert abs(difference.mean()) < 0.2  # of 255 levels; PyTorch 2.6 rounds bilinear down by 0.1


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [32, 48])
def test_flip(size, hflip):
    array = np.zeros((60, 60, 3), np.uint8)
    array[:, 30:] = 255
    config = config_with(DATA__IMG_SIZE=size, **{**NO_AUGMENTATION, "AUG__HFLIP": hflip})
    transform = build_transform(config, is_train=True)
    for seed in range(20):
        seed_all(seed)
        found = transform(Image.fromarray(array))
        assert found.shape == (3, size, size)
        left, right = found[..., : size // 2].float().mean(), found[..., size // 2 :].float().mean()
        assert left >= right if hflip else left <= right


@pytest.mark.parametrize(("shift", "most", "fewest"), [(0.125, 4, 20), (0.0625, 2, 10), (0.0, 0, 1)])
def test_small_images_are_shifted_in_training_not_cropped(shift, most, fewest):
    config = config_with(DATA__IMG_SIZE=32, AUG__SHIFT=shift, **NO_AUGMENTATION)
    transform = build_transform(config, is_train=True)
    array = pixels(0, 32, 32)
    padded = np.pad(array, ((most, most), (most, most), (0, 0)))
    places = range(2 * most + 1)
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in places for x in places}
    seed_all(0)
    shifts = {windows[as_array(transform(Image.fromarray(array))).tobytes()] for _ in range(60)}
    assert len(shifts) >= fewest


# On the device

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
def test_normalisation_is_torchvisions_to_the_last_bit(device):
    """For all levels in all channels, in images and batches."""
    levels = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 8, 3))
    images = [Image.fromarray(levels), Image.fromarray(pixels(3, 256, 8))]
    expected = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )
    batch = torch.stack([transforms.functional.pil_to_tensor(image) for image in images]).to(device)
    found = Normalize(batch.device)(batch)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), torch.stack([expected(image) for image in images]))
    assert batch.dtype == torch.uint8


def erase(mode: str, seed: int = 0, device: str = "cpu", **values) -> torch.Tensor:
    """16 images of one colour, normalised and erased."""
    config = config_with(**{"AUG__REPROB": 1.0, "AUG__REMODE": mode, "AUG__RECOUNT": 3, **values})
    transform = build_batch_transform(config, None, torch.device(device))
    images = torch.tensor(RGB, dtype=torch.uint8)[:, None, None].repeat(16, 1, 48, 48).to(device)
    seed_all(seed)
    found, targets = transform(images, torch.arange(16))
    assert targets.tolist() == list(range(16))
    return found.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing(mode, device):
    normal = Normalize(CPU)(torch.tensor(RGB, dtype=torch.uint8)[:, None, None])[:, 0, 0]
    for image in erase(mode, device=device):
        colors = {tuple(color) for color in image.flatten(1).T.tolist()}
        assert tuple(normal.tolist()) in colors
        assert {"const": len(colors) == 2, "rand": 2 <= len(colors) <= 4, "pixel": len(colors) > 10}[mode]
        assert ((0.0, 0.0, 0.0) in colors) == (mode == "const")


def test_batches_are_normalised_then_erased_then_mixed():
    """timm's order, in which regions erased to 0 are mixed with another image's colours."""
    config = config_with(
        DATA__BATCH_SIZE=4, AUG__REPROB=1.0, AUG__REMODE="const", AUG__CUTMIX=0.0, AUG__MIXUP=10.0, AUG__RECOUNT=2
    )
    mixup = build_mixup(config, 4)
    images = torch.randint(256, (4, 3, 24, 24), dtype=torch.uint8)
    transform = build_batch_transform(config, mixup, CPU)
    seed_all(5)
    found, targets = transform(images.clone(), torch.arange(4))
    seed_all(5)
    erased = transform.erasing(Normalize(CPU)(images))
    expected, soft = mixup(erased, torch.arange(4))
    assert torch.equal(found, expected)
    assert torch.equal(targets, soft)
    assert targets.shape == (4, 4)


@pytest.mark.cuda
def test_batch_transform_does_not_wait_for_the_device():
    config = config_with(DATA__BATCH_SIZE=8, AUG__REPROB=1.0, AUG__RECOUNT=3)
    transform = build_batch_transform(config, build_mixup(config, 4), torch.device("cuda"))
    images = torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8, device="cuda")
    targets = torch.arange(8, device="cuda") % 4
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            transform(images, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Mixup


@pytest.mark.parametrize("on", ["MIXUP", "CUTMIX"])
def test_mixup_needs_an_even_batch(on):
    values = {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0, f"AUG__{on}": 0.5}
    assert build_mixup(config_with(DATA__BATCH_SIZE=4, **values), 10) is not None
    with pytest.raises(ConfigError, match=r"DATA\.BATCH_SIZE is 3.*even"):
        build_mixup(config_with(DATA__BATCH_SIZE=3, **values), 10)


@pytest.mark.parametrize("on", ["MIXUP", "CUTMIX"])
def test_mixup(on):
    values = {"AUG__MIXUP": 0.0, "AUG__CUTMIX": 0.0, f"AUG__{on}": 10.0}  # shares near a half
    mixup = build_mixup(config_with(DATA__BATCH_SIZE=4, MODEL__LABEL_SMOOTHING=0.1, **values), 5)
    seed_all(1)
    before = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    images, targets = mixup(before.clone(), torch.tensor([0, 1, 2, 3]))
    # Image i is mixed with image 3 - i; the share of i can be read off the mean.
    share = (images[0].mean().item() - 3) / -3
    assert 0.05 < share < 0.95
    assert len(images[0].unique()) == (1 if on == "MIXUP" else 2)
    expected = torch.full((5,), 0.02)
    expected[0] += 0.9 * share
    expected[3] += 0.9 * (1 - share)
    torch.testing.assert_close(targets[0], expected)


@pytest.mark.parametrize(("switch", "cut"), [(0.0, False), (1.0, True)])
def test_mixup_switch_and_probability(switch, cut):
    before = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    values = {"DATA__BATCH_SIZE": 2, "AUG__MIXUP_SWITCH_PROB": switch}
    mixup, never = (build_mixup(config_with(**values, AUG__MIXUP_PROB=prob), 5) for prob in (1.0, 0.0))
    for seed in range(10):
        seed_all(seed)
        images, _ = mixup(before.clone(), torch.tensor([0, 1]))
        assert (set(images.unique().tolist()) <= {0.0, 1.0}) == cut
        assert torch.equal(never(before.clone(), torch.tensor([0, 1]))[0], before)


# Randomness by position


def draw(*position: int) -> tuple[float, float, float]:
    seed_all(*position)
    return random.random(), float(np.random.rand()), torch.rand(1, dtype=torch.float64).item()


def test_position_gives_all_three_generators_the_same_draws_again():
    assert draw(3, 1, 4) == draw(3, 1, 4)
    random.random(), np.random.rand(5), torch.rand(7)
    assert draw(3, 1, 4) == draw(3, 1, 4)
    # Training draws from (seed), (seed, epoch, index) and (seed, epoch, batch, rank).
    positions = [(0,), (1,), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0)]
    for generator in zip(*[draw(*position) for position in positions], strict=True):
        assert len(set(generator)) == len(positions)
