"""Splits by name, of every kind of data that has them."""

import shutil
import zipfile

import pytest

from data import build_split
from data.errors import DataError
from tests.helpers import write_image_folder
from tests.unit.test_data import config_with, world
from tests.unit.test_shards import sample, write_tar

COUNTS = {"train": 8, "val": 4, "test": 6}


def test_zip(tmp_path):
    for split, count in COUNTS.items():
        folder = write_image_folder(tmp_path / split, count, 0)
        names = sorted(path.name for path in folder.rglob("*.jpg"))
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as file:
            for path in folder.rglob("*.jpg"):
                file.write(path, path.name)
        (tmp_path / f"{split}_map.txt").write_text("".join(f"{name}\t{i % 2}\n" for i, name in enumerate(names)))
        shutil.rmtree(folder)
    config = config_with(DATA__DATA_PATH=str(tmp_path), DATA__ZIP_MODE=True)
    assert {split: len(build_split(config, world(), split)) for split in COUNTS} == COUNTS
    (tmp_path / "test.zip").unlink()
    with pytest.raises(DataError, match=r"no test\.zip in it; its splits: train, val"):
        build_split(config, world(), "test")


def test_shards(tmp_path):
    config = config_with(DATA__DATASET="wds", DATA__DATA_PATH=str(tmp_path))
    write_tar(tmp_path / "train-0.tar", sample(0, 1))
    with pytest.raises(DataError, match=r"no shards of test in it; .*its splits: train$"):
        build_split(config, world(), "test")
    write_tar(tmp_path / "test-0.tar", sample(1, 4))
    assert build_split(config, world(), "test").targets.tolist() == [4]


def test_hfds(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from tests.unit.test_hfds import made, save

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = save(tmp_path / "data", "disk", made(), made(labels=[1, 0]), "test")
    config = config_with(DATA__DATASET="hfds", DATA__DATA_PATH=str(path))
    assert [len(build_split(config, world(), split)) for split in ("train", "test")] == [7, 2]
    with pytest.raises(DataError, match="has the splits train, test; accepted: val or validation or valid or dev"):
        build_split(config, world(), "val")


def test_digits():
    config = config_with(DATA__DATASET="digits")
    assert len(build_split(config, world(), "val")) == 360
    with pytest.raises(DataError, match="digits has no test images; its splits: train, val"):
        build_split(config, world(), "test")
