"""What the end-to-end tests share: small image folders, and running the project's scripts as a user would."""

import importlib.util
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# Makes any Strip-MLP config small enough for a test: 3,000 parameters or so, 32 x 32 images, one epoch.
TINY = [
    *("DATA.IMG_SIZE", "32"),
    *("DATA.NUM_WORKERS", "0"),
    *("MODEL.STRIP_MLP.EMBED_DIM", "8"),
    *("MODEL.STRIP_MLP.LAYERS", "[1, 1, 1, 1]"),
    *("MODEL.STRIP_MLP.PATCH_CHANNELS", "2"),
    *("TRAIN.EPOCHS", "1"),
    *("TRAIN.WARMUP_EPOCHS", "0"),
]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def write_image(path: Path, seed: int, size: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_image_folder(root: Path, train: int, val: int, classes: int = 2) -> Path:
    """An ImageNet layout with `train` and `val` JPEGs in all, dealt to the classes in turn."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = root / split / f"class{i % classes}" / f"{split}_{i:03d}.jpg"
            write_image(path, seed=zlib.crc32(path.name.encode()))
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """16 training and 7 validation images of 2 classes; 7 divides by neither 2 nor 3 processes."""
    return write_image_folder(tmp_path_factory.mktemp("imagenet"), train=16, val=7)


def load_tool(path: Path) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**env: str) -> dict[str, str]:
    """What a command under test sees: one thread, no GPU, no wish about colours."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}


def python(*command, ok: bool = True, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Runs `python <command>` from the top folder as a user would, on one thread, and checks how it ended."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if ok:
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert result.returncode != 0, result.stdout + result.stderr
    return result


def torchrun(processes: int, *command, ok: bool = True, **env: str) -> subprocess.CompletedProcess:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", free_port())
    return python(*launcher, *command, ok=ok, **env)
