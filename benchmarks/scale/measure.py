"""Memory and time of long lists of samples: nothing but names and labels, no files.

    python benchmarks/scale/measure.py --trees before=../before now=. --samples 1281167 14197122

Each tree is a checkout of this repository. Each measurement has a process of its own. It makes names like those of
ImageNet-21K (21,841 classes; 1,000 up to ImageNet-1K's count) and gives them to the folder source and the training
sampler of that tree. It reads all of them once with loader processes, which look up the name and the label of every
sample but open nothing. Writes scale.md and scale.csv beside this script. Linux only: it reads /proc.

Memory is that of one process alone (Private_Clean + Private_Dirty of /proc/PID/smaps_rollup, known as USS).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1] / "tools"))

from tables import as_csv, markdown

COLUMNS = (
    *("tree", "samples", "list_seconds", "bytes_per_sample", "first_batch_seconds", "epoch_seconds"),
    *("worker_start_mb", "worker_end_mb", "worker_growth_mb"),
)
IMAGENET_1K = 1_281_167


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs="+", default=["now=."], metavar="NAME=FOLDER")
    parser.add_argument("--samples", nargs="+", type=int, default=[IMAGENET_1K, 14_197_122])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.workers)))
        return
    rows = []
    for samples in args.samples:
        for name, folder in (tree.split("=", 1) for tree in args.trees):
            command = [sys.executable, __file__, "--child", str(samples), "--workers", str(args.workers)]
            environment = {**os.environ, "PYTHONPATH": str(Path(folder).resolve())}
            result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            rows.append({"tree": name, "samples": samples, **json.loads(result.stdout)})
            print(json.dumps(rows[-1]))
    write(rows)


def measure(samples: int, workers: int) -> dict[str, float]:
    """One row without its first two columns."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from data.dataset import TrainSampler

    class Looked(Dataset):
        """The name and the label of a sample, as far as they take part in loading it."""

        def __init__(self, source):
            self.source = source

        def __getitems__(self, keys: list[tuple[int, int]]) -> torch.Tensor:
            return torch.tensor([len(self.source.name(index)) + self.source.targets[index] for _, index in keys])

        def __len__(self) -> int:
            return len(self.source)

    before, started = private_bytes(), time.perf_counter()
    source = generated_source(samples)
    listed = time.perf_counter()
    per_sample = (private_bytes() - before) / samples
    sampler = TrainSampler(len(source), 0, 1, 0)
    loader = DataLoader(Looked(source), 256, sampler=sampler, num_workers=workers, collate_fn=lambda batch: batch)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    at_start = worker_bytes(batches)
    for _ in zip(range(len(loader) - 2 * workers - 1), batches, strict=False):
        pass  # the last batches are on their way: the workers are still there
    at_end = worker_bytes(batches)
    epoch = time.perf_counter()
    for _ in batches:
        pass
    return {
        "list_seconds": listed - started,
        "bytes_per_sample": per_sample,
        "first_batch_seconds": first - listed,
        "epoch_seconds": epoch - listed,
        "worker_start_mb": at_start / 1e6,
        "worker_end_mb": at_end / 1e6,
        "worker_growth_mb": (at_end - at_start) / 1e6,
    }


def generated_source(samples: int):
    """The folder source of the tree on PYTHONPATH, as it is after listing so many files."""
    import numpy as np

    from data.sources import FolderSource

    classes = [f"n{label:08d}" for label in range(1000 if samples <= IMAGENET_1K else 21_841)]
    counts = np.diff(np.linspace(0, samples, len(classes) + 1).astype(int))

    def names() -> Iterator[str]:
        for name, count in zip(classes, counts, strict=True):
            for number in range(count):
                yield f"{name}/{name}_{number}.JPEG"

    source = object.__new__(FolderSource)
    source._cached, source.classes = {}, classes
    try:
        from data.arrays import Strings
    except ImportError:  # before there were arrays
        source._paths = [f"/data/imagenet/train/{name}" for name in names()]
        source.targets = [label for label, count in enumerate(counts.tolist()) for _ in range(count)]
    else:
        source._root, source._paths = "/data/imagenet/train/", Strings.of(names())
        source.targets = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return source


def worker_bytes(batches) -> float:
    """The memory of a loader process, mean."""
    workers = batches._workers
    return sum(private_bytes(worker.pid) for worker in workers) / len(workers)


def private_bytes(pid: int | str = "self") -> int:
    """The memory that a process does not share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def write(rows: list[dict]) -> None:
    """scale.csv and scale.md."""
    cells = [[row[c] if isinstance(row[c], str | int) else f"{row[c]:.1f}" for c in COLUMNS] for row in rows]
    (FOLDER / "scale.csv").write_text(as_csv(COLUMNS, cells))
    (FOLDER / "scale.md").write_text(markdown(COLUMNS, cells))


if __name__ == "__main__":
    main()
