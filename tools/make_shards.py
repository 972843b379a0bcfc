"""Write an image folder as WebDataset's tar files.

    python tools/make_shards.py <imagenet-path> <output>
    cd <output> && sha256sum --check SHA256SUMS

The folder has train/ and val/ with one folder per class. The output gets train-000000.tar and so on, val-000000.tar and
so on, classes.txt (a name per line, in label order), SHA256SUMS, and shards.json, which says which tar files there
must be. In a tar file each image, byte for byte, is followed by its label in a .cls file. The images are in the order
of the folder. A second call, after the first was stopped, goes on with the tar file that was not finished. Train on
them with DATA.DATASET wds.
"""

import argparse
import contextlib
import errno
import fcntl
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

from data.errors import UnreadableImage
from data.listing import Listing, list_folder
from data.shards import NOTES
from data.sources import read_file

SUMS, LOCK = "SHA256SUMS", ".make_shards.lock"


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
    with writing_to(args.output), alone_in(args.output):
        take_note(args, listings)
        write_text(args.output / "classes.txt", "".join(f"{printable(name)}\n" for name in first[1].classes))
        for split, listing in listings.items():
            write_split(args.output, split, args.folder / split, listing, args.images)


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Inside, no other call writes into the folder, which is made if it is not there.

    Raises:
        UserError: another one does, or the folder is not ours.
    """
    output.mkdir(parents=True, exist_ok=True)
    if not (output / NOTES).exists() and any(path.name != LOCK for path in output.iterdir()):
        raise UserError(f"{output}: holds other files; accepted: a new or empty folder")
    with open(output / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another call of this tool writes there; wait for it to end") from None
        except OSError as error:
            print(f"warning: {output}: has no locks ({error.strerror}); call this tool once at a time", file=sys.stderr)
        yield
        (output / LOCK).unlink()


def write_text(path: Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def take_note(args: argparse.Namespace, listings: dict[str, Listing]) -> None:
    """Writes into shards.json what is going to be made, or checks that it is what an earlier call began.

    Raises:
        UserError: the output is of other images or classes, or was cut otherwise.
    """
    path, classes = args.output / NOTES, next(iter(listings.values())).classes
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        per_shard, splits, same = known["images"], known["splits"], known["classes"] == classes
    except FileNotFoundError:
        per_shard, splits, same = args.images, {}, True
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); choose another output") from error
    if per_shard != args.images:
        raise UserError(f"{args.output}: was begun with --images {per_shard}, not {args.images}")
    if not same:
        raise UserError(f"{args.output}: was begun with other classes; accepted: the same ones, or another output")
    for split, listing in listings.items():
        sha = hashlib.sha256(listing.paths.text.tobytes())
        sha.update(listing.paths.ends.tobytes() + listing.targets.tobytes())
        about = {"files": sha.hexdigest(), "shards": list(shard_names(split, listing, args.images))}
        if splits.setdefault(split, about) != about:
            raise UserError(
                f"{args.output}: was begun when {args.folder / split} had other files; choose another output"
            )
    write_text(path, json.dumps({"images": args.images, "classes": classes, "splits": splits}, indent=1) + "\n")


def shard_names(split: str, listing: Listing, per_shard: int) -> Iterator[str]:
    yield from (f"{split}-{number:06d}.tar" for number in range(-(-len(listing.paths) // per_shard)))


def write_split(output: Path, split: str, root: Path, listing: Listing, per_shard: int) -> None:
    """Writes the tar files of a split that are not there yet."""
    listed = output / SUMS
    lines = listed.read_text().splitlines() if listed.exists() else []
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    names = list(shard_names(split, listing, per_shard))
    for number, name in enumerate(names):
        path = output / name
        if name in sums and path.exists():
            continue
        indices = range(number * per_shard, min((number + 1) * per_shard, len(listing.paths)))
        temporary = output / f".{name}.tmp"
        sums[name] = write_shard(temporary, root, listing, indices)
        # The sum first: a tar file without one would not be known as finished.
        write_text(listed, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        os.replace(temporary, path)
        print(f"{path}: {len(indices)} images ({number + 1} of {len(names)})", flush=True)


def write_shard(path: Path, root: Path, listing: Listing, indices: range) -> str:
    """Writes a tar file that depends on nothing but names, labels and contents, and returns its SHA-256. A file that is
    gone, or is none, becomes an empty one, with a warning: in training it counts as unreadable, as in the folder.

    Raises:
        UserError: a file that is there and cannot be read.
    """
    file = Hashing(path)
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for index in indices:
            name = listing.paths[index]
            try:
                content = read_file(os.path.join(root, name))
            except OSError as error:
                problem = f"{printable(str(root / name))}: cannot be read: {printable(str(error))}"
                # Anything else may pass, such as a network file system that does not answer.
                if not isinstance(error, FileNotFoundError | UnreadableImage) and error.errno != errno.ELOOP:
                    raise UserError(f"{problem}; the same command goes on with this tar file") from error
                print(f"warning: {problem}; it is empty in {path.name[1:-4]}", file=sys.stderr)
                content = b""
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
