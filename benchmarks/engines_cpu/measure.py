"""Milliseconds per image of Strip-MLP-T* by each engine, and the seconds of tools/predict.py with them.

    pip install -r requirements/export.txt
    python benchmarks/engines_cpu/measure.py engines > benchmarks/engines_cpu/engines.md
    python benchmarks/engines_cpu/measure.py predict --before ../before > benchmarks/engines_cpu/predict.md

The engines take turns in rounds, on the CPU in float32; the weights are random. `engines` needs a C++ compiler.
`predict` makes photograph-like JPEGs of 500 x 375 pixels and runs the tool as a user does, with one thread. --before is
a working tree of another revision, whose tool takes its turn.
"""

import argparse
import csv
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench.data import write_photographs
from bench.timing import OtherLoad, rotated
from tables import markdown

from config import leaves, load_config
from engine.exported import FORMATS, quiet
from engine.inference import build_engine, logits, random_images, relative_difference
from models import build_model

CONFIG = ROOT / "configs/smlp_tiny_light_alpha3_patch4_224_imagenet1k.yaml"
ENGINES = ["torch", "reparameterized", "compile", "onnxruntime", "openvino"]
CPU = torch.device("cpu")


def build(folder: Path) -> tuple:
    """The config, the model in evaluation mode, and its checkpoint."""
    config, _ = load_config(CONFIG, ["MODEL.NUM_CLASSES", "1000"])
    torch.manual_seed(0)
    model = build_model(config).eval()
    nn.init.normal_(model.get_classifier().weight, std=0.1)  # so that the likeliest classes differ between images
    path = folder / "best.pth"
    torch.save({"model": model.state_dict(), "config": leaves(config)}, path)
    return config, model, path


def write_package(model: nn.Module, images: Tensor, folder: Path, threads: int) -> Path:
    """A compiled package; inductor compiles for as many threads as PyTorch has."""
    path = folder / f"compiled_{threads}.pt2"
    with quiet():
        FORMATS["aoti"].write(reparameterize_model(model), images, path, {})
    return path


def engines(args: argparse.Namespace, folder: Path) -> None:
    config, model, _ = build(folder)
    probe = random_images(config, CPU)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        names = {name: name for name in args.engines}
        if "aoti" in names:
            names["aoti"] = str(write_package(model, probe, folder, threads))
        for batch in args.batches:
            built, prepared, differences = {}, {}, {}
            for name, engine in names.items():
                started = time.perf_counter()
                built[name] = build_engine(engine, model, config, CPU, None, 0, batch, lambda line: None)
                prepared[name] = time.perf_counter() - started
                differences[name] = relative_difference(logits(built[name], probe), logits(model, probe))
            images = probe[:1].expand(batch, -1, -1, -1).contiguous()
            run = {name: lambda each=each, images=images: logits(each, images) for name, each in built.items()}
            seconds = take_turns(run, args.rounds)
            for name in built:
                ratios = [own / other for own, other in zip(seconds["torch"], seconds[name], strict=True)]
                cells = [f"{1000 * median(seconds[name]) / batch:.1f}", f"{median(ratios):.2f}"]
                rows.append([threads, batch, name, *cells, f"{differences[name]:.1g}", f"{prepared[name]:.1f}"])
    titles = ["threads", "batch", "engine", "ms per image", "times as fast", "difference, of the largest logit"]
    print(markdown([*titles, "s to prepare and check"], rows))


def take_turns(run: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, a number per round. The first round is not counted."""
    seconds = {name: [] for name in run}
    for number in range(rounds + 1):
        for name in rotated(list(run), number):
            started = time.perf_counter()
            run[name]()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def predict(args: argparse.Namespace, folder: Path) -> None:
    config, model, checkpoint = build(folder)
    photographs = write_photographs(folder / "photographs", args.images, (500, 375))
    exported = folder / "model.xml"
    with quiet():
        FORMATS["openvino"].write(reparameterize_model(model), random_images(config, CPU), exported, {})
    ways = {f"before: {args.before}": (args.before, [])} if args.before else {}
    ways |= {f"--engine {name}": (ROOT, ["--engine", name]) for name in args.engines}
    ways["--engine model.xml, exported before"] = (ROOT, ["--engine", exported])

    def run(tree: Path, options: list) -> None:
        command = [sys.executable, tree / "tools/predict.py", checkpoint, photographs, "--format", "csv", *options]
        output = folder / f"{len(options)}{Path(options[-1]).name if options else ''}.csv"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--output", output], check=True, stderr=subprocess.DEVNULL, env=environment)
        outputs[tuple(options)] = output

    outputs: dict[tuple, Path] = {}
    seconds = take_turns({name: lambda way=way: run(*way) for name, way in ways.items()}, args.rounds)
    first = next(iter(ways))
    expected = read(outputs[tuple(ways[first][1])])
    rows = []
    for name, (_, options) in ways.items():
        found = read(outputs[tuple(options)])
        ratios = [own / other for own, other in zip(seconds[first], seconds[name], strict=True)]
        same = sum(a[0][1] == b[0][1] for a, b in zip(found, expected, strict=True))
        difference = max(
            abs(a[2] - b[2]) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
        )
        cells = [f"{median(seconds[name]):.1f}", f"{args.images / median(seconds[name]):.1f}", f"{median(ratios):.2f}"]
        rows.append([name, *cells, f"{same} of {len(found)}", f"{difference:.1g}"])
    print(
        markdown(["tools/predict.py", "s", "images/s", "times as fast", "same top-1", "probabilities differ by"], rows)
    )


def read(path: Path) -> list[list[tuple[int, int, float]]]:
    """(rank, label, probability) of each image's predictions."""
    images: dict[str, list] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            images.setdefault(row["file"], []).append((int(row["rank"]), int(row["index"]), float(row["probability"])))
    return list(images.values())


def processor() -> str:
    """Its name, where Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    first = tasks.add_parser("engines")
    first.add_argument("--engines", nargs="+", choices=[*ENGINES, "aoti"], default=[*ENGINES, "aoti"])
    first.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    first.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    first.add_argument("--rounds", type=int, default=30)
    second = tasks.add_parser("predict")
    second.add_argument("--engines", nargs="+", default=["torch", "auto"])
    second.add_argument("--images", type=int, default=1000)
    second.add_argument("--rounds", type=int, default=3, help="counted; there is one more")
    second.add_argument("--before", type=Path, metavar="FOLDER")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    load = OtherLoad()
    with TemporaryDirectory() as folder:
        {"engines": engines, "predict": predict}[args.task](args, Path(folder))
    command = shlex.join(["python", "benchmarks/engines_cpu/measure.py", *sys.argv[1:]])
    print(f"`{command}`, {processor()}, {os.cpu_count()} cores, torch {torch.__version__}.", end=" ")
    print(f"{args.rounds} rounds. Other work took {100 * load.look():.0f} % of the processors' time.")


if __name__ == "__main__":
    main()
