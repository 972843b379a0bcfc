"""Image folders as tar files, and the runs on them."""

import hashlib
import shutil
import tarfile

import make_shards
import pytest

from data import build_sources
from tests.helpers import ROOT, TINY, python, read_metrics, write_image_folder
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


def make(folder, output, *options):
    return python("tools/make_shards.py", folder, output, *options)


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if not path.name.startswith(".")}


def test_shards_hold_what_the_folder_holds(folder, tmp_path):
    result = make(folder, tmp_path / "shards", "--images", 5)
    assert "train-000002.tar: 3 images (3 of 3)" in result.stdout
    files = contents(tmp_path / "shards")
    tars = [f"train-{i:06d}.tar" for i in range(3)] + ["val-000000.tar"]
    assert sorted(files) == ["SHA256SUMS", "classes.txt", *tars]
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
    assert len(contents(tmp_path / "again")) == 4  # two tar files, sums and classes
    make_shards.main()
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert len(calls) == 3 + 3  # none of the finished ones again


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


@pytest.mark.slow
def test_the_same_weights_from_folder_and_shards(folder, tmp_path):
    """Two epochs with augmentation, by loader processes."""
    make(folder, tmp_path / "shards", "--images", 5)
    digests = {}
    for name, data, dataset in (("folder", folder, "imagenet"), ("shards", tmp_path / "shards", "wds")):
        command = ("main.py", "--cfg", "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", "--data-path", data)
        opts = ("--opts", *TINY, "DATA.DATASET", dataset, "TRAIN.EPOCHS", 2, "DATA.NUM_WORKERS", 2)
        python(*command, "--batch-size", 4, "--output", tmp_path / name, *opts, cwd=ROOT)
        (run,) = (tmp_path / name).glob("*/default")
        metrics = [(record["train_loss"], record["val_loss"], record["top1"]) for record in read_metrics(run)]
        digests[name] = metrics
    assert digests["folder"] == digests["shards"]
