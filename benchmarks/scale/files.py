"""Files: how long it takes to find a million of them, and how fast images come from folders, zip files, shards and
parquet.

    python benchmarks/scale/files.py index --folder FOLDER
    python benchmarks/scale/files.py sources --folder FOLDER

FOLDER is made, and stays for the next call. `index` links 1,000 images a thousand times each, in 1,000 class folders,
and lists them in processes of their own: without an index, with it, with a folder changed, with it again. `sources`
writes photograph-like JPEGs of 500 x 375 pixels as each source wants them, and reads all of one epoch, in its order:
bytes alone in this process, and through the training loader with 2 loader processes. "Cold": the files' pages are
dropped from the cache first (posix_fadvise). The sources take turns; medians over the rounds.

Writes index.csv and .md, or sources.csv and .md, beside this script.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from statistics import median

import numpy as np

FOLDER, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tools")]

from tables import as_csv, markdown

CLASSES, LINKS = 1000, 1000
KINDS = ("folder", "zip", "shards", "parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["index", "sources"])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are, or will be made")
    parser.add_argument("--images", type=int, default=4000, help="of sources (default: 4000)")
    parser.add_argument("--rounds", type=int, default=5, help="of sources (default: 5)")
    parser.add_argument("--list", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print(json.dumps(list_once(args.folder)))
    elif args.what == "index":
        index(args.folder)
    else:
        sources(args.folder, args.images, args.rounds)


def write(name: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
    (FOLDER / f"{name}.csv").write_text(as_csv(columns, rows))
    (FOLDER / f"{name}.md").write_text(markdown(columns, rows))
    print(markdown(columns, rows), end="")


# ---------------------------------------------------------------------------------------------------------------------
# The index of a folder
# ---------------------------------------------------------------------------------------------------------------------


def index(folder: Path) -> None:
    make_links(folder / "train")
    kept, rows = folder / ".train.index", []
    kept.unlink(missing_ok=True)
    one = folder / "train/class0500"
    for start, has_index in (("first", False), ("second", True), ("third", True)):
        time.sleep(3)  # what was changed just before is listed, but not kept
        assert kept.exists() == has_index
        rows.append((start, *run_list(folder)))
    os.link(one / "0.jpg", one / "new.jpg")
    time.sleep(3)
    rows += [("a file added", *run_list(folder)), ("after it", *run_list(folder))]
    (one / "new.jpg").unlink()
    write("index", ("start", "seconds", "images", "MB, of this process alone"), rows)


def make_links(folder: Path) -> None:
    for label in range(CLASSES):
        of_class = folder / f"class{label:04d}"
        if of_class.exists():
            continue
        part = folder / f"part{label:04d}"
        part.mkdir(parents=True)
        (part / "0.jpg").write_bytes(b"not read here")
        for number in range(1, LINKS):
            os.link(part / "0.jpg", part / f"{number}.jpg")
        part.rename(of_class)


def run_list(folder: Path) -> tuple[str, int, str]:
    command = [sys.executable, __file__, "index", "--list", "--folder", folder / "train"]
    seconds, images, memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return f"{seconds:.3f}", images, f"{memory / 1e6:.0f}"


def list_once(folder: Path) -> tuple[float, int, int]:
    from measure import private_bytes

    from data.listing import list_folder

    before, started = private_bytes(), time.perf_counter()
    listing = list_folder(folder)
    return time.perf_counter() - started, len(listing.targets), private_bytes() - before


# ---------------------------------------------------------------------------------------------------------------------
# Images from each source
# ---------------------------------------------------------------------------------------------------------------------


def sources(folder: Path, images: int, rounds: int) -> None:
    # The library converts parquet files into Arrow files there, which are then read. It looks once, when imported.
    os.environ["HF_HOME"] = str((folder / "parquet_cache").absolute())
    import torch

    from config import load_config
    from data import build_sources, build_train_loader
    from runtime.distributed import World

    paths = make_sources(folder, images)
    alone = World(0, 0, 1, torch.device("cpu"))
    common = ["DATA.BATCH_SIZE", "64", "DATA.NUM_WORKERS", "2", "DATA.PIN_MEMORY", "False"]
    options = {
        "folder": [],
        "zip": ["DATA.ZIP_MODE", "True"],
        "shards": ["DATA.DATASET", "wds"],
        "parquet": ["DATA.DATASET", "hfds"],
    }
    files = {**paths, "parquet": folder / "parquet_cache"}
    rates: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):  # the first is not counted
        for kind in KINDS:
            values = [*common, "DATA.DATA_PATH", str(paths[kind]), *options[kind]]
            config, _ = load_config(ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", values)
            for cold in (False, True):
                build_sources(config, alone)  # parquet is converted the first time
                prepare(files[kind], cold)  # nothing maps the files now
                train = build_sources(config, alone).train
                order = np.random.default_rng(turn).permutation(len(train))
                started = time.perf_counter()
                read = sum(len(train.read(int(i))) for i in order)
                assert read > 1000 * images
                bytes_alone = len(train) / (time.perf_counter() - started)
                del train
                prepare(files[kind], cold)
                loader = build_train_loader(config, build_sources(config, alone).train, alone)
                started = time.perf_counter()
                count = sum(len(batch.image) for batch in loader)
                through_loader = count / (time.perf_counter() - started)
                del loader
                if turn:
                    state = "cold" if cold else "warm"
                    rates.setdefault((kind, f"bytes, {state}"), []).append(bytes_alone)
                    rates.setdefault((kind, f"loader, {state}"), []).append(through_loader)
    columns = tuple(f"{what}, {state}" for what in ("bytes", "loader") for state in ("warm", "cold"))
    rows = [(kind, *(round(median(rates[kind, column])) for column in columns)) for kind in KINDS]
    write("sources", ("images/s", *columns), rows)


def prepare(path: Path, cold: bool) -> None:
    """Has the files below a folder in the page cache, or not."""
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        with open(file, "rb") as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 20):
                    pass


def make_sources(folder: Path, images: int) -> dict[str, Path]:
    """The same images for each kind of source."""
    import datasets
    from bench.data import photograph

    paths = {kind: folder / kind for kind in KINDS}
    if (folder / "complete").exists():
        return paths
    generator = np.random.default_rng(0)
    made = []
    for _ in range(64):
        encoded = io.BytesIO()
        photograph(generator, 500, 375).save(encoded, "JPEG", quality=90)
        made.append(encoded.getvalue())
    files = {}
    for split, count in (("train", images), ("val", 10)):
        for i in range(count):
            # Each file is another one: what comes after a JPEG's end is not read.
            files[f"{split}/class{i % 10}/{i:06d}.jpg"] = made[i % 64] + i.to_bytes(4, "little")
    for name, content in files.items():
        path = paths["folder"] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    paths["zip"].mkdir()
    for split in ("train", "val"):
        below = sorted(name for name in files if name.startswith(split))
        with zipfile.ZipFile(paths["zip"] / f"{split}.zip", "w") as archive:
            for name in below:
                archive.writestr(name.removeprefix(f"{split}/"), files[name])
        lines = [f"{name.removeprefix(f'{split}/')}\t{name.split('/')[1].removeprefix('class')}\n" for name in below]
        (paths["zip"] / f"{split}_map.txt").write_text("".join(lines))
    command = [sys.executable, ROOT / "tools/make_shards.py", paths["folder"], paths["shards"], "--images", "1000"]
    subprocess.run(command, check=True, capture_output=True)
    paths["parquet"].mkdir()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class{i}" for i in range(10)])}
    )
    for split in ("train", "val"):
        below = sorted(name for name in files if name.startswith(split))
        columns = {
            "image": [{"bytes": files[name], "path": None} for name in below],
            "label": [int(name.split("/")[1].removeprefix("class")) for name in below],
        }
        name = {"train": "train", "val": "validation"}[split]
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            paths["parquet"] / f"{name}-00000-of-00001.parquet"
        )
    os.sync()
    (folder / "complete").touch()
    return paths


if __name__ == "__main__":
    main()
