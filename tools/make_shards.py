"""Write an image folder as WebDataset's tar files.

    python tools/make_shards.py <imagenet-path> <output>
    cd <output> && sha256sum --check SHA256SUMS

The folder has train/ and val/ with one folder per class. The output gets train-000000.tar and so on, val-000000.tar and
so on, classes.txt (a name per line, in label order) and SHA256SUMS. In a tar file each image, byte for byte, is
followed by its label in a .cls file. The images are in the order of the folder. A second call, after the first was
stopped, goes on with the tar file that was not finished. Train on them with DATA.DATASET wds.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, printable, run_entry_point, writing_to


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train/ and val/")
    parser.add_argument("output", type=Path, help="where to write: a new or empty folder, or one to go on with")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="NAME", help="default: train val")
    parser.add_argument("--images", type=int, default=10_000, help="images in a tar file (default: 10000)")
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images is {args.images}; accepted: 1 or more")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

from data.listing import Listing, list_folder
from data.sources import read_file

SUMS = "SHA256SUMS"


class Hashing:
    """A file to be written to, with the SHA-256 of what was written."""

    def __init__(self, path: Path):
        self.file, self.sha = open(path, "wb"), hashlib.sha256()  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def main() -> None:
    args = parse_args()
    listings = {split: list_folder(args.folder / split) for split in args.splits}
    first, *others = listings.items()
    for split, listing in others:
        if listing.classes != first[1].classes:
            raise UserError(f"{args.folder}: {first[0]}/ and {split}/ have different classes; accepted: the same ones")
    with writing_to(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
        check_same_task(args, listings)
        classes = "".join(f"{printable(name)}\n" for name in first[1].classes)
        (args.output / "classes.txt").write_text(classes, encoding="utf-8")
        for split, listing in listings.items():
            write_split(args.output, split, args.folder / split, listing, args.images)


def check_same_task(args: argparse.Namespace, listings: dict[str, Listing]) -> None:
    """Remembers in .make_shards.json what is written, or checks that it is what an earlier call began.

    Raises:
        UserError: the output is of other images, or was cut otherwise, or is not ours.
    """
    digests = {}
    for split, listing in listings.items():
        sha = hashlib.sha256(listing.paths.text.tobytes())
        sha.update(listing.paths.ends.tobytes() + listing.targets.tobytes())
        digests[split] = sha.hexdigest()
    path = args.output / ".make_shards.json"
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        if any(args.output.iterdir()):
            raise UserError(f"{args.output}: holds other files; accepted: a new or empty folder") from None
        known = {"images": args.images, "splits": {}}
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); choose another output") from error
    if known["images"] != args.images:
        raise UserError(f"{args.output}: was begun with --images {known['images']}, not {args.images}")
    for split, digest in digests.items():
        if known["splits"].setdefault(split, digest) != digest:
            raise UserError(
                f"{args.output}: was begun when {args.folder / split} had other files; choose another output"
            )
    path.write_text(json.dumps(known))


def write_split(output: Path, split: str, root: Path, listing: Listing, per_shard: int) -> None:
    """Writes the tar files of a split that are not there yet."""
    listed = output / SUMS
    lines = listed.read_text().splitlines() if listed.exists() else []
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    count = len(listing.paths)
    shards = -(-count // per_shard)
    for number in range(shards):
        path = output / f"{split}-{number:06d}.tar"
        if path.name in sums and path.exists():
            continue
        indices = range(number * per_shard, min((number + 1) * per_shard, count))
        temporary = output / f".{path.name}.tmp"
        sums[path.name] = write_shard(temporary, root, listing, indices)
        # The sum first: a tar file without one would not be known as finished.
        listed.with_name(f".{SUMS}.tmp").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        os.replace(listed.with_name(f".{SUMS}.tmp"), listed)
        os.replace(temporary, path)
        print(f"{path}: {len(indices)} images ({number + 1} of {shards})", flush=True)


def write_shard(path: Path, root: Path, listing: Listing, indices: range) -> str:
    """Writes a tar file that depends on nothing but names, labels and contents, and returns its SHA-256.

    Raises:
        UserError: an image that cannot be read.
    """
    file = Hashing(path)
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for index in indices:
            name = listing.paths[index]
            try:
                content = read_file(os.path.join(root, name))
            except OSError as error:
                raise UserError(f"{printable(str(root / name))}: cannot be read: {error}") from error
            for member, data in members(index, name, content, int(listing.targets[index])):
                about = tarfile.TarInfo(member)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    file.close()
    return file.sha.hexdigest()


def members(index: int, name: str, content: bytes, label: int) -> Iterator[tuple[str, bytes]]:
    """What stands for an image. WebDataset takes all up to the first dot for the name of the sample, and it must be
    unique, so the number of the image ends it: two files may differ in what follows the dot alone."""
    folder, _, file = name.rpartition("/")
    stem, suffix = os.path.splitext(file)
    key = f"{folder}/{stem.replace('.', '_')}_{index:09d}"
    yield f"{key}{suffix.lower()}", content
    yield f"{key}.cls", str(label).encode()


if __name__ == "__main__":
    run_entry_point(main)
