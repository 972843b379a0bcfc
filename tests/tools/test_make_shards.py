"""Image folders as tar files, and the runs on them."""

import hashlib
import shutil
import tarfile
import zipfile

import datasets
import make_shards
import pytest
import torch

from data import build_sources
from data.errors import DataError
from data.shards import ShardSource
from tests.helpers import TINY, python, read_metrics, trained_model, write_image_folder
from tests.unit.test_data import config_with, world
from utils import UserError


@pytest.fixture
def folder(tmp_path):
    """12 training and 5 validation images of 3 classes, one of them in a folder below its class."""
    root = write_image_folder(tmp_path / "images", train=12, val=5, classes=3)
    first = sorted((root / "train").rglob("*.*"))[0]
    below = first.parent / "more.of.them"
    below.mkdir()
    shutil.copy(first, below / "a.b.PNG")
    return root


def make(folder, output, *options, ok=True):
    return python("tools/make_shards.py", folder, output, *options, ok=ok)


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if not path.name.startswith(".")}


def test_shards_hold_what_the_folder_holds(folder, tmp_path):
    result = make(folder, tmp_path / "shards", "--images", 5)
    assert "train-000002.tar: 3 images (3 of 3)" in result.stdout
    files = contents(tmp_path / "shards")
    tars = [f"train-{i:06d}.tar" for i in range(3)] + ["val-000000.tar"]
    assert sorted(files) == ["SHA256SUMS", "classes.txt", "shards.json", *tars]
    assert files["SHA256SUMS"].decode() == "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in tars)

    plain = build_sources(config_with(DATA__DATASET="imagenet", DATA__DATA_PATH=str(folder)), world())
    sharded = build_sources(config_with(DATA__DATASET="wds", DATA__DATA_PATH=str(tmp_path / "shards")), world())
    for one, other in zip(plain, sharded, strict=True):
        assert (one.classes, one.targets.tolist()) == (other.classes, other.targets.tolist())
        assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(one))]
    with tarfile.open(tmp_path / "shards/train-000000.tar") as tar:
        assert any("/more.of.them/a_b_0000" in name for name in tar.getnames())


def test_stopped_and_called_again(folder, tmp_path, monkeypatch):
    make(folder, tmp_path / "whole", "--images", 4)
    write, calls = make_shards.write_shard, []

    def stopping(path, *args):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        return write(path, *args)

    monkeypatch.setattr(make_shards, "write_shard", stopping)
    monkeypatch.setattr("sys.argv", ["make_shards.py", str(folder), str(tmp_path / "again"), "--images", "4"])
    with pytest.raises(KeyboardInterrupt):
        make_shards.main()
    assert len(contents(tmp_path / "again")) == 5  # two tar files, sums, classes and notes
    with pytest.raises(
        DataError, match=r"2 of the 4 shards of train are missing: train-000002.tar, train-000003.tar; get"
    ):
        ShardSource(tmp_path / "again", "train")
    make_shards.main()
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert len(calls) == 3 + 4  # none of the finished ones again


@pytest.mark.parametrize("what", ["images", "files", "foreign"])
def test_output_of_something_else(folder, tmp_path, monkeypatch, what):
    output, options = tmp_path / "shards", ["--images", "5"]
    if what == "foreign":
        output.mkdir()
        (output / "train-000000.tar").write_bytes(b"precious")
    else:
        make(folder, output, *options)
    before = contents(output)
    if what == "images":
        options = ["--images", "6"]
    if what == "files":
        sorted((folder / "train").rglob("*.jpg"))[0].unlink()
    monkeypatch.setattr("sys.argv", ["make_shards.py", str(folder), str(output), *options])
    message = {"images": "--images 5, not 6", "files": "had other files", "foreign": "holds other files"}[what]
    with pytest.raises(UserError, match=message):
        make_shards.main()
    assert contents(output) == before


def test_one_split_after_the_other(folder, tmp_path):
    output = tmp_path / "shards"
    make(folder, output, "--splits", "train")
    make(folder, output, "--splits", "val")
    make(folder, tmp_path / "both")
    assert contents(output) == contents(tmp_path / "both")


def test_one_split_after_the_other_with_other_classes(folder, tmp_path):
    output = tmp_path / "shards"
    make(folder, output, "--splits", "train")
    before = contents(output)
    sorted((folder / "val").iterdir())[0].rename(folder / "val/another")
    result = make(folder, output, "--splits", "val", ok=False)
    assert (result.returncode, contents(output)) == (1, before)
    assert "was begun with other classes" in result.stderr


def test_files_that_cannot_be_read_are_empty_ones(folder, tmp_path):
    first = sorted(path for path in (folder / "train").rglob("*.*") if path.is_file())[0]
    first.unlink()
    first.symlink_to("nowhere")
    result = make(folder, tmp_path / "shards")
    assert f"warning: {first}: cannot be read: " in result.stderr
    source = ShardSource(tmp_path / "shards", "train")
    assert [source.read(i) for i in range(len(source))].count(b"") == 1


def test_file_that_cannot_be_read_just_now(folder, tmp_path, monkeypatch):
    read, calls = make_shards.read_file, []

    def stale(path):
        calls.append(path)
        if len(calls) == 7:
            raise OSError(116, "Stale file handle")
        return read(path)

    monkeypatch.setattr(make_shards, "read_file", stale)
    monkeypatch.setattr("sys.argv", ["make_shards.py", str(folder), str(tmp_path / "shards"), "--images", "5"])
    with pytest.raises(UserError, match=r"Stale file handle; the same command goes on with this tar file"):
        make_shards.main()
    make_shards.main()
    make(folder, tmp_path / "whole", "--images", 5)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_folder_of_another_name(folder, tmp_path):
    (folder / "val").rename(folder / "validation")
    make(folder, tmp_path / "shards", "--splits", "train", "validation")
    assert len(ShardSource(tmp_path / "shards", "val")) == 5
    (tmp_path / "shards/validation-000000.tar").rename(tmp_path / "shards/validation.tar")
    with pytest.raises(DataError, match=r"1 of the 1 shards of val are missing: validation-000000.tar"):
        ShardSource(tmp_path / "shards", "val")


def test_two_calls_at_once(folder, tmp_path):
    output = tmp_path / "shards"
    with make_shards.alone_in(output):
        result = make(folder, output, ok=False)
    assert result.returncode == 1 and "another call of this tool writes there" in result.stderr
    make(folder, output)


@pytest.mark.parametrize("text", ["", "[]", '{"images": 5}'])
def test_damaged_notes(folder, tmp_path, text):
    make(folder, tmp_path / "shards")
    (tmp_path / "shards/shards.json").write_text(text)
    result = make(folder, tmp_path / "shards", ok=False)
    assert result.returncode == 1 and "shards.json: damaged" in result.stderr
    with pytest.raises(DataError, match=r"shards.json: damaged"):
        ShardSource(tmp_path / "shards", "train")


def as_zip(source, output, split):
    """The files of a source in their order."""
    output.mkdir(exist_ok=True)
    with zipfile.ZipFile(output / f"{split}.zip", "w") as archive:
        for index in range(len(source)):
            archive.writestr(f"{index}.jpg", source.read(index))
    lines = "".join(f"{index}.jpg\t{label}\n" for index, label in enumerate(source.targets))
    (output / f"{split}_map.txt").write_text(lines)


def as_parquet(source, output, split):
    """The same."""
    output.mkdir(exist_ok=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=source.classes))
    images = [{"bytes": source.read(index), "path": None} for index in range(len(source))]
    columns = {"image": images, "label": source.targets.tolist()}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(output / f"{split}-00000-of-00001.parquet")


@pytest.mark.slow
def test_the_same_weights_whatever_the_images_are_in(folder, tmp_path):
    """Two epochs with augmentation, by loader processes, from a folder, a zip file, shards and parquet."""
    make(folder, tmp_path / "shards", "--images", 5)
    sources = build_sources(config_with(DATA__DATASET="imagenet", DATA__DATA_PATH=str(folder)), world())
    for split, source in zip(("train", "val"), sources, strict=True):
        as_zip(source, tmp_path / "zip", split)
        as_parquet(source, tmp_path / "parquet", split)
    weights, metrics = {}, {}
    for name, data, options in (
        ("folder", folder, ()),
        ("zip", tmp_path / "zip", ("DATA.ZIP_MODE", "True")),
        ("shards", tmp_path / "shards", ("DATA.DATASET", "wds")),
        ("parquet", tmp_path / "parquet", ("DATA.DATASET", "hfds")),
    ):
        command = ("main.py", "--cfg", "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", "--data-path", data)
        opts = ("--opts", *TINY, "TRAIN.EPOCHS", 2, "DATA.NUM_WORKERS", 2, *options)
        environment = {"HF_HOME": str(tmp_path / "hf")}
        python(*command, "--batch-size", 4, "--output", tmp_path / "out", "--tag", name, *opts, **environment)
        (run,) = (tmp_path / "out").glob(f"*/{name}")
        metrics[name] = [(record["train_loss"], record["val_loss"], record["top1"]) for record in read_metrics(run)]
        weights[name] = trained_model(run / "last.pth", "--device", "cpu").model.state_dict()
    for name in ("zip", "shards", "parquet"):
        assert metrics[name] == metrics["folder"]
        assert all(torch.equal(weights[name][key], value) for key, value in weights["folder"].items()), name
