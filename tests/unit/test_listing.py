"""Lists of samples in arrays, and the index of a folder."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.datasets import ImageFolder

from data import index, listing
from data.arrays import Strings, by_class
from data.errors import DataError
from data.index import index_paths, read_index
from data.listing import Listing, list_classes, list_folder

NAMES = ["a.jpg", "größer 試.png", "", "bytes \udcff.png", "x" * 300]


@pytest.mark.parametrize("names", [NAMES, [], ["one"]])
def test_strings(names):
    strings = Strings.of(iter(names))
    assert list(strings) == names and len(strings) == len(names)
    assert [strings[i - len(names)] for i in range(len(names))] == names
    for outside in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            strings[outside]


def test_by_class():
    targets = np.array([2, 0, 2, 4, 0], np.int32)
    assert [indices.tolist() for indices in by_class(targets, 6)] == [[1, 4], [], [0, 2], [], [3], []]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of 4 images in two classes whose index is kept."""
    monkeypatch.setattr(index, "FEWEST_SAMPLES", 4)
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data/train"
    for path in ("a/2.jpg", "a/deep/1.PNG", "a/notes.txt", "b/bytes \udcff.png", "b/3.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(path, (1e9, 1e9))  # long ago: any change shows, however coarse the clock is
    return root


@pytest.fixture
def never_listed(monkeypatch):
    """Makes listing a folder a failure from now on."""

    def start():
        monkeypatch.setattr(listing, "list_classes", lambda root: pytest.fail(f"{root} was listed"))

    return start


def content(found):
    return found.classes, list(found.paths), found.targets.tolist()


LISTED = (["a", "b"], ["a/2.jpg", "a/deep/1.PNG", "b/3.jpg", "b/bytes \udcff.png"], [0, 0, 1, 1])


def test_listing_is_that_of_torchvision(folder):
    found = list_classes(folder)
    assert content(found) == LISTED
    expected = ImageFolder(str(folder))
    assert [(f"{folder}/{path}", label) for path, label in zip(*content(found)[1:], strict=True)] == expected.samples
    assert list(found.folders) == ["", "a", "a/deep", "b"]


def test_second_start_reads_the_index(folder, never_listed):
    assert content(list_folder(folder)) == LISTED
    beside, cached = index_paths(folder)
    assert beside == folder.parent / ".train.index" and beside.exists() and not cached.exists()
    never_listed()
    assert content(list_folder(folder)) == LISTED


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        (lambda root: (root / "b/4.jpg").touch(), [*LISTED[1], "b/4.jpg"]),
        (lambda root: (root / "a/deep/0.jpg").touch(), ["a/2.jpg", "a/deep/0.jpg", *LISTED[1][1:]]),
        (lambda root: (root / "a/2.jpg").unlink(), LISTED[1][1:]),
        (lambda root: (root / "b/3.jpg").rename(root / "b/5.jpg"), [*LISTED[1][:2], "b/5.jpg", LISTED[1][3]]),
        (lambda root: shutil.rmtree(root / "a/deep"), [LISTED[1][0], *LISTED[1][2:]]),
        (lambda root: shutil.copytree(root / "b", root / "c"), [*LISTED[1], "c/3.jpg", "c/bytes \udcff.png"]),
        (lambda root: (root / "b").rename(root / "B"), ["B/3.jpg", "B/bytes \udcff.png", *LISTED[1][:2]]),
    ],
    ids=["added", "added below", "removed", "renamed", "folder removed", "class added", "class renamed"],
)
def test_changed_folder_is_listed_again(folder, change, paths):
    list_folder(folder)
    change(folder)
    assert list(list_folder(folder).paths) == sorted(paths)


def test_change_with_the_old_time_is_noticed(folder):
    list_folder(folder)
    before = os.stat(folder / "b")
    (folder / "b/4.jpg").touch()
    os.utime(folder / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(list_folder(folder).paths) == 5


def test_folder_that_was_just_changed_has_no_index(folder, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_SECONDS", 60.0)
    assert content(list_folder(folder)) == LISTED
    assert not any(path.exists() for path in index_paths(folder))


def test_small_folder_has_no_index(folder, monkeypatch):
    monkeypatch.setattr(index, "FEWEST_SAMPLES", 5)
    assert content(list_folder(folder)) == LISTED
    assert not any(path.exists() for path in index_paths(folder))


def test_index_in_the_cache_where_it_cannot_be_beside(folder, monkeypatch, never_listed):
    beside, cached = index_paths(folder)
    write = index.write_index

    def refuse(path, value):
        if path == beside:
            raise PermissionError("read-only")
        write(path, value)

    monkeypatch.setattr(index, "write_index", refuse)
    assert content(list_folder(folder)) == LISTED
    assert cached.exists() and not beside.exists()
    never_listed()
    assert content(list_folder(folder)) == LISTED


def test_nowhere_to_write(folder, monkeypatch):
    monkeypatch.setattr(index, "write_index", lambda path, value: (_ for _ in ()).throw(OSError("full")))
    assert content(list_folder(folder)) == LISTED


def changed(**arrays):
    """What replaces some arrays of an index."""

    def change(path):
        save_file({**load_file(path), **arrays}, path, {"format": index.FORMAT})

    return change


def text(string):
    return torch.frombuffer(bytearray(string.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(os.urandom(1000)),
        lambda path: save_file(load_file(path), path, {"format": "another"}),
        lambda path: save_file({"targets": torch.zeros(4)}, path, {"format": index.FORMAT}),
        changed(targets=torch.tensor([0, 0, 1, 2], dtype=torch.int32)),
        changed(targets=torch.tensor([0, 0, 0, 0], dtype=torch.int32)),
        changed(targets=torch.tensor([0, 0, 1], dtype=torch.int32)),
        changed(targets=torch.tensor([0.0, 0.0, 1.0, 1.0])),
        changed(**{"paths.ends": torch.tensor([9, 3, 20, 38])}),
        changed(**{"paths.ends": torch.tensor([-1, 3, 20, 38])}),
        changed(**{"paths.text": text("../x.jpgb.jpg"), "paths.ends": torch.tensor([8, 9, 12, 13])}),
        changed(stamps=torch.zeros(4, 1, dtype=torch.int64)),
        changed(**{"notes.text": text("a\nforged line"), "notes.ends": torch.tensor([13])}),
    ],
)
def test_damaged_index_is_made_anew(folder, damage, never_listed):
    list_folder(folder)
    path, _ = index_paths(folder)
    damage(path)
    assert content(list_folder(folder)) == LISTED
    never_listed()
    assert content(list_folder(folder)) == LISTED


def test_index_does_not_hide_errors(folder):
    list_folder(folder)
    for name in ("3.jpg", "bytes \udcff.png"):
        (folder / "b" / name).unlink()
    with pytest.raises(DataError, match="no images in b"):
        list_folder(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="no such folder"):
        list_folder(folder)


def test_file_may_be_damaged_while_its_list_is_used(folder):
    list_folder(folder)
    path, _ = index_paths(folder)
    found = read_index(path, Listing)
    os.truncate(path, 0)  # a process that maps it would die here
    assert content(found) == LISTED


def test_change_while_it_is_listed(folder, monkeypatch):
    scan = listing._Tree.scan

    def scan_and_add(tree, path):
        found = scan(tree, path)
        if path.endswith("/b") and not (folder / "b/late.jpg").exists():
            (folder / "b/late.jpg").touch()
        return found

    monkeypatch.setattr(listing._Tree, "scan", scan_and_add)
    assert content(list_folder(folder)) == LISTED
    assert len(list_folder(folder).paths) == 5


@pytest.mark.parametrize("name", ["", "a", "a/deep"])
def test_folder_that_cannot_be_listed(folder, name, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path) == folder / name:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{folder / name}: cannot be listed: Permission denied"):
        list_folder(folder)
    assert not any(path.exists() for path in index_paths(folder))


@pytest.mark.parametrize("name", ["c", "a/more"])
def test_link_to_a_folder_that_is_not_there(folder, tmp_path, name):
    (folder / name).symlink_to(tmp_path / "pool")
    with pytest.raises(DataError, match=rf"{folder / name}: a link to {tmp_path}/pool, which is not there"):
        list_folder(folder)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/9.jpg").touch()
    assert f"{name}/9.jpg" in list_folder(folder).paths


def test_link_that_leads_to_itself(folder):
    (folder / "b/9.jpg").symlink_to("9.jpg")
    assert "b/9.jpg" in list_folder(folder).paths  # counted as unreadable
    (folder / "b/more").symlink_to("more")
    with pytest.raises(DataError, match=r"b/more: a link to more, which is not there"):
        list_folder(folder)


def test_links_that_do_not_matter(folder, tmp_path):
    (folder / "a/.#notes").symlink_to(tmp_path / "editor's lock")
    assert content(list_folder(folder)) == LISTED
    (folder / "a/9.jpg").symlink_to(tmp_path / "gone.jpg")  # counted as unreadable, as any image
    assert "a/9.jpg" in list_folder(folder).paths
    (folder / "a/more").symlink_to(tmp_path / "pool")
    assert len(listing.find_images(folder)) == 5  # images to classify: what else is there does not matter


def copy(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "a/2.jpg", folder / name)


def test_hidden_files_and_folders(folder):
    """What notebooks, macOS, Windows, git and network storage leave behind; copies of images among it."""
    hidden = (
        *(".ipynb_checkpoints/2-checkpoint.jpg", "a/.ipynb_checkpoints/2-checkpoint.jpg", ".git/a.png", ".DS_Store"),
        *("__MACOSX/a/._2.jpg", "a/._2.jpg", "b/@eaDir/3.jpg", "b/Thumbs.db", "desktop.ini"),
    )
    for name in hidden:
        copy(folder, name)
    found = list_folder(folder)
    assert content(found) == LISTED
    assert found.notes == [f"{folder}: 9 hidden files and folders are left out, such as {folder}/.DS_Store"]
    assert list_folder(folder).notes == found.notes  # from the index
    assert [Path(path).name for path in listing.find_images(folder)] == [Path(path).name for path in LISTED[1]]


def test_empty_hidden_folder_is_no_class(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    assert content(list_folder(folder)) == LISTED


def test_images_of_other_kinds_are_named(folder):
    for name in ("b/4.gif", "a/x.JP2", "a/y.jfif", "b/z.avif", "b/1.gif", "b/notes.xml"):
        copy(folder, name)
    found = list_folder(folder)
    assert content(found) == LISTED
    (note,) = found.notes
    assert f"{folder}: images of other kinds are left out: 1 .avif, 2 .gif, 1 .jfif, 1 .jp2, such as " in note
    assert f"{folder}/a/x.JP2; accepted: .jpg, .jpeg, .png" in note


def test_nothing_left_out(folder):
    assert list_folder(folder).notes == []
