"""Tests of tools/categories101_train_val_split.py, run as a user runs it and, where faults are injected, in-process."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import load_tool

TOOL = Path(__file__).resolve().parents[2] / "tools" / "categories101_train_val_split.py"

# Of the source that make_source() writes, split with the default ratio and seed. It may change only with a deliberate
# change of the split, since runs on the old split and on the new one cannot be compared.
CHECKSUM = "94c8e9f83b114ea9543058208aaf5fe68e85c63a778f27f133d4f1d0ee1bbb6f"

CLASS_SIZES = {"ant": 10, "Faces": 7, "water lilly": 2}


tool = load_tool(TOOL)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def make_source(folder: Path) -> Path:
    """Write a small 101_ObjectCategories with distinct images, a background folder and files that are no images."""
    source = folder / "101_ObjectCategories"
    for class_name, size in {**CLASS_SIZES, "BACKGROUND_Google": 5}.items():
        (source / class_name).mkdir(parents=True)
        for number in range(1, size + 1):
            suffix = "JPG" if number == 1 else "jpg"
            color = (number * 20, len(class_name) * 10, 0)
            Image.new("RGB", (4, 4), color).save(source / class_name / f"image_{number:04}.{suffix}", "JPEG")
    (source / "ant" / "notes.txt").write_text("no image")
    (source / "ant" / "folder.jpg").mkdir()
    (source / "README.txt").write_text("no class")
    return source


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def images_of_classes(source: Path) -> set[str]:
    return {f"{name}/{path.name}" for name in CLASS_SIZES for path in (source / name).glob("image_*")}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A finished split by copy: source, output and what the tool printed."""
    folder = tmp_path_factory.mktemp("copied")
    source, output = make_source(folder), folder / "new" / "split"
    result = run_tool("--source", source, "--output", output)
    assert result.returncode == 0, result.stderr
    return source, output, result.stdout


def test_every_image_lands_once_and_unchanged(copied):
    source, output, _ = copied
    train, val = files_under(output / "train"), files_under(output / "val")
    assert not train & val
    assert train | val == images_of_classes(source)
    assert files_under(output) == {f"train/{name}" for name in train} | {f"val/{name}" for name in val}
    for part, names in (("train", train), ("val", val)):
        for name in names:
            copy, original = output / part / name, source / name
            assert copy.read_bytes() == original.read_bytes()
            assert copy.stat().st_ino != original.stat().st_ino


def test_sizes_and_summary(copied):
    _, output, printed = copied
    rows = {tuple(line.rsplit(maxsplit=2)) for line in printed.splitlines()}
    for class_name, train, val in (("ant", 8, 2), ("Faces", 5, 2), ("water lilly", 1, 1)):
        assert len(list((output / "train" / class_name).iterdir())) == train
        assert len(list((output / "val" / class_name).iterdir())) == val
        assert (class_name, str(train), str(val)) in rows
    assert ("total", "14", "5") in rows
    assert "classes: 3; entries passed over because they are no image files: 2" in printed
    assert "BACKGROUND_Google" not in printed


def test_checksum_is_that_of_the_files_and_fixed(copied):
    _, output, printed = copied
    lines = sorted(f"{name}\n" for name in files_under(output))
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == CHECKSUM
    assert printed.splitlines()[-1] == f"checksum: {CHECKSUM}"


def test_links_share_inodes_and_an_empty_output_is_accepted(tmp_path):
    source, output = make_source(tmp_path), tmp_path / "split"
    output.mkdir()
    result = run_tool("--source", source, "--output", output, "--mode", "link")
    assert result.returncode == 0, result.stderr
    assert f"checksum: {CHECKSUM}" in result.stdout
    linked = [(part, name) for part in ("train", "val") for name in files_under(output / part)]
    assert len(linked) == sum(CLASS_SIZES.values())
    for part, name in linked:
        assert (output / part / name).samefile(source / name)


def names(count: int) -> list[str]:
    return [f"image_{number:04}.jpg" for number in range(1, count + 1)]


def test_split_does_not_depend_on_listing_order_or_other_classes():
    expected = tool.split_classes({"ant": names(40), "bass": names(30)}, 0.8, 1024)
    assert tool.split_classes({"bass": names(30)[::-1], "ant": names(40)[::-1]}, 0.8, 1024) == expected
    alone = tool.split_classes({"ant": names(40)}, 0.8, 1024)
    assert alone == ({"ant": expected[0]["ant"]}, {"ant": expected[1]["ant"]})


def test_split_depends_on_seed_and_class_name():
    _, val = tool.split_classes({"ant": names(40), "bass": names(40)}, 0.8, 1024)
    assert val["ant"] != val["bass"]
    assert tool.split_classes({"ant": names(40)}, 0.8, 1025)[1]["ant"] != val["ant"]


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def test_refuses_missing_source(tmp_path):
    result = run_tool("--source", tmp_path / "nowhere", "--output", tmp_path / "split")
    assert_refused(result, str(tmp_path / "nowhere"), "does not exist", "101_ObjectCategories")
    assert not (tmp_path / "split").exists()


def test_refuses_class_with_one_image(tmp_path):
    source = make_source(tmp_path)
    (source / "bass").mkdir()
    (source / "bass" / "image_0001.jpg").write_text("")
    (source / "bass" / "notes.txt").write_text("")
    result = run_tool("--source", source, "--output", tmp_path / "split")
    assert_refused(result, "'bass' holds 1 image files", "at least 2", str(source))
    assert list(tmp_path.iterdir()) == [source]


def test_refuses_ratio_out_of_range(tmp_path):
    source = make_source(tmp_path)
    result = run_tool("--source", source, "--output", tmp_path / "split", "--ratio", "1.5")
    assert_refused(result, "--ratio is 1.5", "between 0 and 1")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("output", [".", "split", "ant/split", "../101_ObjectCategories/split"])
def test_refuses_output_inside_source(tmp_path, output):
    source = make_source(tmp_path)
    before = files_under(tmp_path)
    assert_refused(run_tool("--source", source, "--output", source / output), "--output", "lies inside", str(source))
    assert files_under(tmp_path) == before


def test_refuses_filled_output_and_leaves_it_alone(tmp_path):
    source, output = make_source(tmp_path), tmp_path / "split"
    (output / "train").mkdir(parents=True)
    (output / "train" / "precious.txt").write_text("keep")
    assert_refused(run_tool("--source", source, "--output", output), str(output), "not empty")
    assert files_under(output) == {"train/precious.txt"}
    assert (output / "train" / "precious.txt").read_text() == "keep"


def test_nothing_is_left_of_a_copy_that_fails_midway(tmp_path, monkeypatch):
    source, output = make_source(tmp_path), tmp_path / "split"
    copyfile, copied_so_far = tool.shutil.copyfile, []

    def fill_the_disk(original: Path, copy: Path) -> None:
        if len(copied_so_far) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copyfile(original, copy)
        copied_so_far.append(copy)

    monkeypatch.setattr(tool.shutil, "copyfile", fill_the_disk)
    with pytest.raises(SystemExit) as stop:
        tool.main(["--source", str(source), "--output", str(output)])
    assert os.strerror(errno.ENOSPC) in stop.value.code
    assert str(output) in stop.value.code
    assert len(copied_so_far) == 5
    assert list(tmp_path.iterdir()) == [source]
