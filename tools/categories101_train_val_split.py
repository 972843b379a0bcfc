"""Split Caltech-101 into a training and a validation folder.

Input: the archive's folder ``101_ObjectCategories`` with one folder per class, ``<class>/*.jpg``. Of its 102 folders
``BACKGROUND_Google`` is no class and is left out, so 101 classes remain.

Output: ``<output>/train/<class>/`` and ``<output>/val/<class>/``, the layout that torchvision's ``ImageFolder`` reads.

The ratio (80 % of each class for training) and the seed (1024) are those of the paper's released code, which shuffles
names in the order in which the file system lists them, so that its choice of images cannot be had again. Here the
choice depends on nothing but the file names, the ratio and the seed, and the printed checksum tells whether two splits
are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

NOT_A_CLASS = "BACKGROUND_Google"

EXAMPLE = """\
example:
  python tools/categories101_train_val_split.py \\
      --source data/101_ObjectCategories --output data/caltech101 --mode link

The checksum printed last is that of the output's file names. Without this tool:
  cd data/caltech101 && find train val -type f | LC_ALL=C sort | sha256sum
"""

FilesByClass = dict[str, list[str]]


def check_ratio(ratio: float) -> None:
    """Raise ``ValueError`` unless ``ratio`` lies between 0 and 1, both excluded."""
    if not 0 < ratio < 1:
        raise ValueError(f"--ratio is {ratio}: accepted is a number between 0 and 1, both excluded, such as 0.8")


def split_classes(
    files_by_class: Mapping[str, Sequence[str]], ratio: float, seed: int
) -> tuple[FilesByClass, FilesByClass]:
    """Divide each class's file names into a training and a validation part.

    ``ratio`` is the training part's share of each class, between 0 and 1, both excluded. The number of training files
    is rounded down, but each part gets at least one file. Classes and names come back sorted.

    A class's split depends on its own name, its own file names, the ratio and the seed; not on the order of the names,
    nor on the other classes.

    Raises ``ValueError`` for a ratio out of range and for a class with fewer than 2 files.
    """
    check_ratio(ratio)
    train: FilesByClass = {}
    val: FilesByClass = {}
    for class_name in sorted(files_by_class):
        names = sorted(files_by_class[class_name])
        if len(names) < 2:
            raise ValueError(
                f"class folder {class_name!r} holds {len(names)} image files: "
                "at least 2 are needed, one for training and one for validation"
            )
        # Of the random module's methods only seed(version=...) and random() are documented to give the same numbers in
        # every Python version ("Notes on Reproducibility" in the module's manual); shuffle() and sample() are not.
        # Hence the shuffle is a sort by random keys.
        generator = random.Random()
        generator.seed(f"{seed}/{class_name}".encode(errors="surrogateescape"), version=2)
        key = {name: generator.random() for name in names}
        shuffled = sorted(names, key=key.__getitem__)
        train_count = min(max(int(len(names) * ratio), 1), len(names) - 1)
        train[class_name] = sorted(shuffled[:train_count])
        val[class_name] = sorted(shuffled[train_count:])
    return train, val


def split_checksum(train: FilesByClass, val: FilesByClass) -> str:
    """Return the SHA-256 (hexadecimal) over the sorted lines ``train/<class>/<file>`` and ``val/<class>/<file>``.

    Each line ends in a newline; names are UTF-8. File contents do not enter.
    """
    lines = sorted(
        f"{part}/{class_name}/{name}\n"
        for part, files_by_class in (("train", train), ("val", val))
        for class_name, names in files_by_class.items()
        for name in names
    )
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def list_images(source: Path) -> tuple[FilesByClass, int]:
    """Return the image file names of each class folder in ``source``, and how many other entries those folders hold.

    Raises ``ValueError`` where there is no class folder.
    """
    folders = [folder for folder in source.iterdir() if folder.is_dir() and folder.name != NOT_A_CLASS]
    if not folders:
        raise ValueError(f"--source {source} holds no class folders: accepted is Caltech-101's 101_ObjectCategories")
    # Imported late: it takes seconds, and a mistyped argument should be answered at once.
    from torchvision.datasets.folder import is_image_file

    files_by_class: FilesByClass = {}
    passed_over = 0
    for folder in folders:
        entries = list(folder.iterdir())
        files_by_class[folder.name] = [entry.name for entry in entries if is_image_file(entry.name) and entry.is_file()]
        passed_over += len(entries) - len(files_by_class[folder.name])
    return files_by_class, passed_over


def write_split(source: Path, output: Path, train: FilesByClass, val: FilesByClass, mode: str) -> None:
    """Copy or hard-link the files into ``output``, which appears only once it is complete.

    ``output`` must be missing or empty. Raises ``OSError`` where the files cannot be read or written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".split-", dir=output.parent) as temporary:
        # One level down, since the temporary folder itself can be read by its owner only.
        staged = Path(temporary) / "split"
        parts = [
            (part, class_name, names)
            for part, files_by_class in (("train", train), ("val", val))
            for class_name, names in files_by_class.items()
        ]
        for part, class_name, names in tqdm(parts, desc="classes", leave=False, dynamic_ncols=True, disable=None):
            target = staged / part / class_name
            target.mkdir(parents=True)
            for name in names:
                if mode == "copy":
                    shutil.copyfile(source / class_name / name, target / name)
                else:
                    # Resolved, since a hard link to a relative symbolic link would point nowhere.
                    os.link((source / class_name / name).resolve(), target / name)
        # On POSIX this replaces an empty folder and fails on one that was filled in the meantime.
        os.replace(staged, output)


def check_folders(source: Path, output: Path) -> None:
    """Raise ``ValueError`` unless ``source`` is a folder and ``output`` is a missing or empty one outside of it."""
    if not source.is_dir():
        state = "is not a folder" if source.exists() else "does not exist"
        raise ValueError(f"--source {source} {state}: accepted is Caltech-101's folder 101_ObjectCategories")
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output {output} lies inside --source {source}: accepted is a folder outside of it")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is not a folder: accepted is a new or empty folder")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty: accepted is a new or empty folder (nothing was changed)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Split Caltech-101 into train/<class>/ and val/<class>/, the same way on every machine.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", type=Path, required=True, help=f"the folder 101_ObjectCategories; {NOT_A_CLASS} in it is left out"
    )
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder to write train/ and val/ into")
    parser.add_argument(
        "--ratio", type=float, default=0.8, help="share of each class used for training, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1024, help="seed of the split (default: %(default)s)")
    parser.add_argument(
        "--mode",
        choices=("copy", "link"),
        default="copy",
        help="copy the files, or hard-link them, which takes no space but needs one file system (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    source: Path = arguments.source
    output: Path = arguments.output
    try:
        check_ratio(arguments.ratio)
        check_folders(source, output)
        files_by_class, passed_over = list_images(source)
        try:
            train, val = split_classes(files_by_class, arguments.ratio, arguments.seed)
        except ValueError as error:
            raise ValueError(f"{error} (--source {source})") from error
        write_split(source, output.resolve(), train, val, arguments.mode)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        advice = "; --mode copy works without hard links" if arguments.mode == "link" else ""
        sys.exit(f"error: cannot split --source {source} into --output {output}: {error}{advice}")

    # A class name may hold bytes that are no UTF-8; the summary shows them escaped.
    sys.stdout.reconfigure(errors="backslashreplace")
    width = max(len(class_name) for class_name in train)
    print(f"{'class':<{width}}  train    val")
    for class_name in train:
        print(f"{class_name:<{width}}  {len(train[class_name]):5}  {len(val[class_name]):5}")
    print(f"{'total':<{width}}  {sum(map(len, train.values())):5}  {sum(map(len, val.values())):5}")
    print(f"classes: {len(train)}; entries passed over because they are no image files: {passed_over}")
    print(f"output: {output}")
    print(f"checksum: {split_checksum(train, val)}")


if __name__ == "__main__":
    main()
