"""Tar files in WebDataset's layout."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import index, shards
from data.errors import DataError
from data.shards import ShardSource


def png(number: int, size: int = 4) -> bytes:
    """Random pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(number: int, label: int, name: str | None = None) -> dict[str, bytes]:
    name = name or f"{number:04d}"
    return {f"{name}.png": png(number), f"{name}.cls": str(label).encode()}


@pytest.fixture
def root(tmp_path):
    """Seven images of three classes in three shards, of which one is of another split."""
    write_tar(tmp_path / "data-train-0.tar", {**sample(0, 2), **sample(1, 0), **sample(2, 1)})
    write_tar(tmp_path / "data-train-1.tar", {**sample(3, 0), **sample(4, 0)})
    write_tar(tmp_path / "data-val-0.tar", {**sample(5, 1), **sample(6, 2)})
    return tmp_path


def test_shards(root):
    train, val = ShardSource(root, "train"), ShardSource(root, "val")
    assert train.targets.tolist() == [2, 0, 1, 0, 0]
    assert val.targets.tolist() == [1, 2]
    assert (train.classes, train.has_names) == (["0", "1", "2"], False)
    for source, numbers in ((train, (0, 1, 2, 3, 4)), (val, (5, 6))):
        for position, number in reversed(list(enumerate(numbers))):
            assert source.read(position) == png(number)
            assert source.load(position).size == (4, 4)
    assert train.name(3) == f"{root}/data-train-1.tar:0003.png"


def test_names_of_classes(root):
    (root / "classes.txt").write_text("cat\ndog\nkürbis\nunused\n", encoding="utf-8")
    source = ShardSource(root, "val")
    assert (source.classes, source.has_names) == (["cat", "dog", "kürbis", "unused"], True)


def test_names_of_classes_with_a_byte_order_mark(root):
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nbird\r\n")
    assert ShardSource(root, "train").classes == ["cat", "dog", "bird"]


def test_empty_line_among_the_names_of_classes(root):
    (root / "classes.txt").write_text("cat\ndog\nbird\n\n")
    with pytest.raises(DataError, match=r"classes.txt: line 4 is empty"):
        ShardSource(root, "train")


@pytest.mark.parametrize("text", ["cat\ndog\n", "cat\ncat\ndog\n"])
def test_names_that_do_not_fit(root, text):
    (root / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=r"classes.txt: has \d names, 2 of them different"):
        ShardSource(root, "val")


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_folders(tmp_path, format):
    name = "größe/" * 30 + "x" * 120
    write_tar(
        tmp_path / "train.tar", {**sample(0, 0, name), **sample(1, 1, "a/0000"), **sample(2, 0, "b/0000")}, format
    )
    source = ShardSource(tmp_path, "train")
    assert [source.read(i) for i in range(3)] == [png(i) for i in range(3)]
    assert source.targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "labels",
    [
        {"a.json": b'{"label": 3}'},
        {"a.json": b'{"cls": 3, "text": "a cat"}'},
        {"a.cls": b"3\n"},
        {"a.cls": b"3", "a.json": b'{"label": 1}'},
        {"a.json": b'{"label": 1}', "a.cls": b"3"},
        {"a.cls": b"3", "a.json": b"["},
        {"a.CLS": b"3", "a.seg.png": b"not the image"},
    ],
)
def test_labels(tmp_path, labels):
    write_tar(tmp_path / "train.tar", {"a.PNG": png(0), **labels})
    source = ShardSource(tmp_path, "train")
    assert (source.targets.tolist(), source.read(0)) == ([3], png(0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b""}, "no label for a"),
        ({"a.png": b"", "a.json": b'{"text": "cat"}'}, "no label for a"),
        ({"a.png": b"", "a.json": b'{"label": true}'}, "no label for a"),
        ({"a.png": b"", "a.json": b'{"label": -1}'}, "no label for a"),
        ({"a.png": b"", "a.json": b"[" * 100_000}, "no label for a"),
        ({"a.cls": b"0"}, "no image for a"),
        ({"a.b.png": b"", "a.cls": b"0"}, "no image for a"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"0"}, "two images of a"),
        ({"a.png": b"", "a.cls": b"0", "a.CLS": b"1"}, "two labels of a"),
        ({"a.png": b"", "a.cls": b"cat"}, "a.cls has b'cat'; accepted: a label"),
        ({"a.png": b"", "a.cls": b"-1"}, "a.cls has"),
        ({"a.png": b"", "a.cls": b"9" * 18}, "a.cls has"),
        ({"readme.txt": b"nothing here"}, "have no images"),
    ],
)
def test_members_that_cannot_be_used(tmp_path, members, message):
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=message):
        ShardSource(tmp_path, "train")


def test_a_sample_in_two_shards(root):
    write_tar(root / "data-train-2.tar", sample(9, 1, "0003"))
    with pytest.raises(
        DataError, match=r"data-train-1.tar:0003.png and .*data-train-2.tar:0003.png have the same name"
    ):
        ShardSource(root, "train")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: content.index(png(3)) + 20],
        # Between two members, where a tar file has a header or its end mark
        lambda content: content[: content.rindex(b"0004.png") // 512 * 512],
        lambda content: content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512),
        lambda content: b"no tar file" * 1000,
    ],
)
def test_damaged_shard(root, damage):
    path = root / "data-train-1.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"data-train-1\.tar: (not a tar file, or damaged|ends without)"):
        ShardSource(root, "train")


def test_no_shards(tmp_path):
    for name in ("trainval-0.tar", "constraint-0.tar", "medieval.tar", "train.txt"):
        (tmp_path / name).touch()
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"no shards of {split} in it; accepted: .* such as {split}-000000.tar"):
            ShardSource(tmp_path, split)


def test_split_is_a_word_of_the_name(tmp_path):
    for number, name in enumerate(("medieval-train-0", "Training_1", "x.validation.0", "2_val")):
        write_tar(tmp_path / f"{name}.tar", sample(number, number))
    assert ShardSource(tmp_path, "train").targets.tolist() == [1, 0]
    assert ShardSource(tmp_path, "val").targets.tolist() == [3, 2]


def test_shard_of_both_splits(root):
    (root / "train-and-val.tar").touch()
    with pytest.raises(DataError, match=r"train-and-val.tar: is it for training or for validation\?"):
        ShardSource(root, "val")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("name", ["0001.PNG", "0001.cls"])
def test_link_in_place_of_a_file(tmp_path, kind, name):
    path = write_tar(tmp_path / "train.tar", sample(0, 0))
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "0000.png"
        tar.addfile(member)
    with pytest.raises(DataError, match=f"train.tar: {name} is a link or has holes; accepted: plain files"):
        ShardSource(tmp_path, "train")


def test_links_to_other_things(tmp_path):
    path = write_tar(tmp_path / "train.tar", sample(0, 0))
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("readme.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "elsewhere"
        tar.addfile(member)
    assert ShardSource(tmp_path, "train").read(0) == png(0)


@pytest.mark.parametrize("change", [{"size": -1}, {"offset": 0}])
def test_member_of_impossible_size_or_place(root, monkeypatch, change):
    following = tarfile.TarFile.next
    count = iter(range(100))

    def damaged(tar):
        member = following(tar)
        if next(count) == 2:
            for name, value in change.items():
                setattr(member, name, value)
        return member

    monkeypatch.setattr(tarfile.TarFile, "next", damaged)
    with pytest.raises(DataError, match=r"data-train-0.tar: damaged: 0000.cls has an impossible size or place"):
        ShardSource(root, "train")


def test_too_large_a_member(tmp_path, monkeypatch):
    write_tar(tmp_path / "train.tar", {**sample(0, 0), "b.png": bytes(2000), "b.cls": b"1"})
    monkeypatch.setattr(shards, "MOST_FILE_BYTES", 1000)
    source = ShardSource(tmp_path, "train")
    assert source.read(0) == png(0)
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        source.load(1)


def test_shard_that_shrinks(root):
    source = ShardSource(root, "train")
    os.truncate(root / "data-train-1.tar", 600)
    with pytest.raises(OSError, match=r"0004\.png: the file has become shorter"):
        source.load(4)


def test_more_shards_than_may_be_open(root, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN_SHARDS", 1)
    source = ShardSource(root, "train")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for position in (0, 3, 1, 4, 2, 0):
        assert source.read(position) == png(position)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 1


def test_the_second_start_reads_the_index(root, monkeypatch):
    monkeypatch.setattr(index, "FEWEST_SAMPLES", 1)
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)
    found = ShardSource(root, "train")
    assert (root / ".train.shards.index").exists()
    listing = shards.list_shards
    monkeypatch.setattr(shards, "list_shards", lambda paths: pytest.fail("listed again"))
    again = ShardSource(root, "train")
    assert [again.read(i) for i in range(5)] == [found.read(i) for i in range(5)]
    assert (again.targets.tolist(), again.name(3)) == (found.targets.tolist(), found.name(3))
    monkeypatch.setattr(shards, "list_shards", listing)
    write_tar(root / "data-train-2.tar", sample(9, 1))
    assert len(ShardSource(root, "train")) == 6
    write_tar(root / "data-train-1.tar", sample(3, 1))
    assert ShardSource(root, "train").targets.tolist() == [2, 0, 1, 1, 1]


def test_json_of_a_label_is_read_whole(tmp_path):
    text = json.dumps({"text": "x" * 10_000, "label": 1}).encode()
    write_tar(tmp_path / "train.tar", {"a.png": png(0), "a.json": text})
    assert ShardSource(tmp_path, "train").targets.tolist() == [1]
