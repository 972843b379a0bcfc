"""What the benchmark writes: the machine and the versions behind the numbers; files that keep older ones."""

import datetime
import importlib.metadata
import itertools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils import writing_to


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on besides the options."""
    found = {
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    found["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    found["versions"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm"))
    found["commit"] = commit()
    found["date"] = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    found["command"] = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    return found


def cpu_name() -> str:
    """Its model, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the code; "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def kept_aside(path: Path) -> None:
    """Gives the files of an older run (all of the same stem) another name."""
    older = [
        path.with_suffix(suffix) for suffix in (".json", ".md", ".csv", ".png") if path.with_suffix(suffix).exists()
    ]
    if not older:
        return
    number = next(n for n in itertools.count(1) if not list(path.parent.glob(f"{path.stem}.{n}.*")))
    for file in older:
        file.rename(file.with_name(f"{path.stem}.{number}{file.suffix}"))
    say(f"{path} was there already: kept as {path.stem}.{number}{path.suffix}")


def save(path: Path, files: dict[str, Any]) -> None:
    """Writes text and matplotlib figures by suffix."""
    with writing_to(path.parent):
        for suffix, content in files.items():
            if isinstance(content, str):
                path.with_suffix(suffix).write_text(content, encoding="utf-8")
            else:
                content.savefig(path.with_suffix(suffix), dpi=130)


def document(title: str, about: dict[str, str], lines: Sequence[str], *parts: str) -> str:
    """A Markdown file."""
    facts = "\n".join(
        f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}" for name, value in about.items()
    )
    return "\n".join([f"# {title}\n", facts, *(f"- {line}" for line in lines), "", *parts])
