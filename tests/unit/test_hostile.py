"""Hostile files: nothing in them is run, and whatever they hold ends in one clear message rather than in a crash, a
hang, or all memory taken. What can be described is tried in examples that hypothesis draws, always the same ones."""

import collections
import contextlib
import copy
import functools
import io
import logging
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import hypothesis.configuration
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torch import nn

from config import ConfigError, get_default_config, leaves, load_config, save_config, validate
from data.dataset import ClassificationDataset
from data.errors import DataError
from data.sources import MOST_FILE_BYTES, FolderSource, ZipSource
from data.transforms import build_transform
from engine.finite import build_scaler, update_scaler
from engine.start import check_resume, log_resume
from engine.state import TrainingState
from logger import create_logger
from optimizer import build_optimizer
from runtime import untrusted
from runtime.checkpoint import (
    FORMAT,
    CheckpointError,
    DamagedCheckpointError,
    load_weights,
    read_checkpoint,
    read_training_state,
)
from runtime.distributed import World
from runtime.run_folder import LOCK, open_run_folder, run_path
from tests.helpers import TINY, python
from utils import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of libraries, about files like these

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)

# Nothing of hypothesis in the working folder.
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
# For a longer search: HOSTILE_EXAMPLES=20 bash tools/run_tests.sh -k hostile
MORE = float(os.environ.get("HOSTILE_EXAMPLES", 0.2))


def examples(count: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    count = max(10, round(MORE * count))
    return settings(derandomize=True, deadline=None, database=None, max_examples=count, suppress_health_check=checks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For all examples of a test, which would not want a new one each."""
    return tmp_path_factory.mktemp("hostile")


def _megabytes(kind: str) -> int:
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


class TooLong(BaseException):
    """No Exception: what is tested catches those."""


@contextlib.contextmanager
def little(seconds: float = 10, megabytes: float = 300):
    """What is inside must neither block, nor take long, nor take much memory."""

    def alarm(signum, frame):
        raise TooLong(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, alarm)
    measured = os.access("/proc/self/clear_refs", os.W_OK)
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        at_first = _megabytes("VmHWM")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # For what would otherwise take all there is, and other processes with it.
    resource.setrlimit(resource.RLIMIT_AS, (_megabytes("VmSize") * 2**20 + 2**32, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    if measured:
        assert _megabytes("VmHWM") - at_first < megabytes


def assert_clear(error: UserError) -> None:
    """One line that a terminal shows as it is, and that a person would read."""
    assert str(error).isprintable(), repr(str(error))
    assert 0 < len(str(error)) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Tiny(nn.Sequential):
    """Every kind of entry a model has: matrices, vectors, running statistics and a count."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def get_classifier(self) -> nn.Module:
        return self[2]


IMAGES, STEPS = 40, 10
KINDS = {"adamw": None, "sgd": None, "adamw float16": torch.float16}


def config_of(kind: str):
    config = get_default_config()
    config.TRAIN.OPTIMIZER.NAME = kind.split()[0]
    config.DATA.BATCH_SIZE = 4
    return config


def take_step(state: TrainingState) -> None:
    """As in an epoch."""
    state.model.train()
    batch = torch.linspace(-1, 1, 12).view(4, 3)
    loss = state.model(batch).square().mean()
    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    state.scaler.step(state.optimizer)
    update_scaler(state.scaler, state.amp)
    state.optimizer.zero_grad()
    of_step = torch.stack([loss.detach().double(), state.progress.losses.new_tensor(1.0)])
    state.progress.losses = state.progress.losses + of_step
    state.progress.step += 1


@functools.cache
def trained(kind: str) -> dict:
    """What a run in the middle of an epoch writes. Not to be changed."""
    config, model = config_of(kind), Tiny()
    state = TrainingState(model, build_optimizer(config, model, 0.1), build_scaler(KINDS[kind], CPU), KINDS[kind])
    for _ in range(3):
        take_step(state)
    content = state.capture(config, IMAGES, ALONE)
    # As if written by several processes, which is when there are statistics of each.
    content["progress"]["buffers"] = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 9)
    return content


def resume(path: Path, kind: str) -> TrainingState:
    """What main.py does with a checkpoint of a run, up to the next step and the next checkpoint."""
    config, amp, log = config_of(kind), KINDS[kind], logging.getLogger("hostile")
    content = read_training_state(path)
    model = Tiny()
    load_weights(model, content, path)
    check_resume(config, content, path, [])
    log_resume(config, content, path, log)
    state = TrainingState(model, build_optimizer(config, model, 0.1), build_scaler(amp, CPU), amp)
    state.restore_rest(content, path, config, IMAGES, STEPS, ALONE, log)
    assert 0 <= state.progress.step <= STEPS
    assert all(value.isfinite().all() for value in model.state_dict().values())
    take_step(state)
    # If the step was skipped, the engine puts the running statistics back.
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert f"{state.best['top1']:.3f} {state.progress.seconds + 1.5}"
    return state


def resumes_or_is_refused(path: Path, kind: str) -> bool:
    try:
        resume(path, kind)
    except CheckpointError as error:
        assert_clear(error)
        return False
    return True


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@functools.cache
def encoded(kind: str = "adamw", **options) -> bytes:
    stream = io.BytesIO()
    torch.save(trained(kind), stream, **options)
    return stream.getvalue()


def write(path: Path, content) -> Path:
    """As bytes, or what torch.save makes of it."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_whole_checkpoint_resumes(tmp_path, kind):
    """Or what follows would show nothing."""
    path = write(tmp_path / "a.pth", encoded(kind))
    state = resume(path, kind)
    assert state.progress.step == 4
    write(path, state.capture(config_of(kind), IMAGES, ALONE))
    assert resume(path, kind).progress.step == 5
    assert bool(trained(kind)["scaler"]) == (kind == "adamw float16")
    assert state.optimizer.state_dict()["state"]
    assert same(read_checkpoint(write(tmp_path / "a.pth", encoded(kind))), plain_copy(trained(kind)))


def plain_copy(value):
    if isinstance(value, dict):
        return {key: plain_copy(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain_copy, value))
    return value


# Bytes


@st.composite
def changed(draw, content: bytes) -> bytes:
    """With a byte, or a run of them, changed, gone, or new."""
    start = draw(st.integers(0, len(content) - 1))
    if draw(st.booleans()):
        return content[:start] + bytes([draw(st.integers(0, 255))]) + content[start + 1 :]
    new = draw(st.binary(max_size=40) | st.integers(1, 40).map(bytes) | st.integers(1, 40).map(lambda n: b"\xff" * n))
    removed = draw(st.integers(0, 40) | st.just(len(new)))
    return content[:start] + new + content[start + removed :]


def test_checkpoint_of_which_any_byte_changed(tmp_path):
    """Every so many bytes, and all of the directory at the end that says where everything is."""
    content = encoded()
    directory = content.index(b"PK\x01\x02")
    path, refused = tmp_path / "a.pth", 0
    for position in {
        *range(0, len(content), 31),
        *range(directory, directory + 120),
        *range(len(content) - 100, len(content)),
    }:
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        try:
            found = read_checkpoint(write(path, bytes(flipped)))
        except CheckpointError:
            refused += 1
        else:
            assert same(found, plain_copy(trained("adamw")))
    assert refused > 100


STARTS = [b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x04\x95", b"", encoded()[:200]]
LEGACY = encoded(_use_new_zipfile_serialization=False)


@examples(300)
@given(st.builds(bytes.__add__, st.sampled_from(STARTS), st.binary(max_size=300)) | changed(LEGACY))
def test_arbitrary_bytes(folder, content):
    """In the format before PyTorch 1.6, which has no checksums, other numbers may come out; nothing worse."""
    try:
        read_checkpoint(write(folder / "a.pth", content))
    except CheckpointError as error:
        assert_clear(error)


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """A checkpoint with this list of contents, and right checksums."""
    files = members(encoded())
    (name,) = (name for name in files if name.endswith("data.pkl"))
    return packed({**files, name: pickled})


def legacy(pickled: bytes) -> bytes:
    """The same in the format before PyTorch 1.6."""
    before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in before) + pickled + pickle.dumps([], 2)


PICKLE = next(value for name, value in members(encoded()).items() if name.endswith("data.pkl"))


# Pickles

MARKER = "pickle_was_run"
CALLS = {
    "builtins.eval": (b"c__builtin__\neval\n", f"open({MARKER!r}, 'w')"),
    "builtins.exec": (b"cbuiltins\nexec\n", f"open({MARKER!r}, 'w')"),
    "os.system": (b"cos\nsystem\n", f"touch {MARKER}"),
    "posix.system": (b"cposix\nsystem\n", f"touch {MARKER}"),
    "subprocess.getoutput": (b"csubprocess\ngetoutput\n", f"touch {MARKER}"),
    "torch.load": (b"ctorch\nload\n", MARKER),
    "torch.hub._exec": (b"ctorch.hub\nload\n", MARKER),
    "runpy.run_path": (b"crunpy\nrun_path\n", "/dev/null"),
    "importlib.import_module": (b"cimportlib\nimport_module\n", "antigravity"),
}
TEXT = {
    "reduce": lambda function, text: function + b"X" + struct.pack("<I", len(text)) + text.encode() + b"\x85R",
    "instance": lambda function, text: b"(X" + struct.pack("<I", len(text)) + text.encode() + b"i" + function[1:],
    "object": lambda function, text: b"(" + function + b"X" + struct.pack("<I", len(text)) + text.encode() + b"o",
    "new object": lambda function, text: function + b"X" + struct.pack("<I", len(text)) + text.encode() + b"\x85\x81",
    "extra": lambda function, text: function + b"\x82\x01",
}


@pytest.mark.parametrize("how", TEXT)
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_not_made(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    pickled = b"\x80\x02}X\x01\x00\x00\x00a" + TEXT[how](*CALLS[name]) + b"s."
    for content in (with_pickle(pickled), legacy(pickled), pickled):
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(write(tmp_path / "a.pth", content))
        assert_clear(error.value)
    assert os.listdir() == ["a.pth"]
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("key", ["\x1b[2J", "x\ny", "\ud800", "x" * 100_000, 10**600, (1, 2), None])
@pytest.mark.parametrize("where", ["top", "model", "more", "config", "moments"])
def test_messages_about_keys(tmp_path, key, where):
    content = {} if where == "top" else copy.deepcopy(trained("adamw"))
    section = at(content, {"model": ("model",), "config": ("config",), "moments": MOMENT}.get(where, ()))
    section[key] = torch.zeros(1)
    resumes_or_is_refused(write(tmp_path / "a.pth", content), "adamw")


BOMBS = {
    "hash": b"\x80\x02}K\x00\x85" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(64)) + b"K\x01s.",
    "set": b"\x80\x02c__builtin__\nset\nK\x00\x85" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(64)) + b"\x85R.",
    "deep": b"\x80\x02}K\x00" + b"\x85" * 1_000_000 + b"K\x01s.",
    "deep, from marks": b"\x80\x02}" + b"(" * 500_000 + b"t" * 500_000 + b"K\x01s.",
    "deep lists": b"\x80\x02}K\x00" + b"]" * 50_000 + b"a" * 49_999 + b"s.",
    "deep dictionaries": b"\x80\x02}K\x00" + b"}K\x00" * 50_000 + b"K\x00" + b"s" * 50_001 + b".",
    "bytearray": b"\x80\x02}K\x00c__builtin__\nbytearray\n\x8a\x05" + (2**32).to_bytes(5, "little") + b"\x85Rs.",
    "doubling": b"\x80\x02}K\x00"
    + b"c_codecs\nencode\nq\x01X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
    + b"".join(b"q\x02h\x01h\x02X\x03\x00\x00\x00hex\x86R" for _ in range(30))
    + b"s.",
}
READ = """
import resource, sys, time
from runtime.checkpoint import CheckpointError, read_checkpoint
for path in sys.argv[1:]:
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{time.monotonic() - started:.1f} s {used:.0f} MB: {error}", flush=True)
"""


def test_small_pickles_that_would_take_for_ever_or_all_memory_or_overflow_the_stack(tmp_path):
    """In a process of its own, which could not be interrupted while it compares tuples, and which could die."""
    paths = []
    for name, pickled in BOMBS.items():
        paths.append(write(tmp_path / f"{name}.pth", with_pickle(pickled)))
        paths.append(write(tmp_path / f"{name}, legacy.pth", legacy(pickled)))
    command = [sys.executable, "-c", READ, *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths), result.stdout
    for line, path in zip(lines, paths, strict=True):
        seconds, megabytes = map(float, re.match(r"([\d.]+) s (-?\d+) MB", line).groups())
        assert str(path) in line
        assert (seconds < 5) and (megabytes < 500), line
        assert "refused" in line or "recursion" in line, line


def test_dictionary_that_contains_itself(tmp_path):
    content = {"model": {}, "optimizer": {}, "format": 2}
    content["model"]["a"] = content["config"] = content
    path = write(tmp_path / "a.pth", content)
    assert not resumes_or_is_refused(path, "adamw")
    with pytest.raises(CheckpointError, match="no weights"):
        load_weights(Tiny(), read_checkpoint(path), path)


# Sizes


def test_compressed_checkpoint(tmp_path):
    files = members(encoded())
    files[next(name for name in files if "/data/" in name)] = bytes(2**28)
    path = write(tmp_path / "a.pth", packed(files, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 2**20
    with little(megabytes=100), pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(path)


SIZES = [0, 1, 2**20, 2**31 - 1, 2**32 - 2, 2**32 - 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("field", ["both", "stored", "real"])
def test_sizes_in_the_directory_that_are_not_so(tmp_path, field, size):
    """Of each entry in turn, in the directory at the end and in the header before the entry."""
    content = encoded()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        headers = [entry.header_offset for entry in archive.infolist()]
    directory = [match.start() for match in re.finditer(rb"PK\x01\x02", content)]
    assert len(headers) == len(directory)
    for in_directory, in_header in zip(directory, headers, strict=True):
        wrong = bytearray(content)
        for offset, wanted in ((0, ("both", "stored")), (4, ("both", "real"))):
            if field in wanted:
                wrong[in_directory + 20 + offset :][:4] = b""
                struct.pack_into("<I", wrong, in_directory + 20 + offset, size)
                struct.pack_into("<I", wrong, in_header + 18 + offset, size)
        with little(5, megabytes=100):
            try:
                found = read_checkpoint(write(tmp_path / "a.pth", bytes(wrong)))
            except CheckpointError as error:
                assert_clear(error)
            else:
                assert same(found, plain_copy(trained("adamw")))


@pytest.mark.parametrize("pickles", [[], ["archive/data.pkl"] * 2, ["archive/data.pkl", "archive/DATA.PKL"]])
def test_archive_with_no_list_of_contents_or_two(tmp_path, pickles):
    path = tmp_path / "a.pth"
    others = [item for item in members(encoded()).items() if not item[0].endswith("data.pkl")]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*others, *[(name, PICKLE) for name in pickles]]:
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="twice" if pickles else "damaged") as error:
        read_checkpoint(path)
    assert_clear(error.value)


def test_limits_hold_whatever_the_case_of_the_name(tmp_path, monkeypatch):
    """PyTorch's reader finds DATA.PKL where it looks for data.pkl."""
    monkeypatch.setattr(untrusted, "MOST_PICKLE_BYTES", len(PICKLE) - 1)
    files = {name.replace("data.pkl", "DATA.PKL"): content for name, content in members(encoded()).items()}
    with pytest.raises(CheckpointError, match="list of contents has"):
        read_checkpoint(write(tmp_path / "a.pth", packed(files)))


def test_tensor_that_is_said_to_have_more_numbers_than_the_file(tmp_path):
    """Reading those would be reading someone else's memory."""
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.arange(3.0)}}, path)
    files = members(path.read_bytes())
    for name, content in files.items():
        if name.endswith("data.pkl"):
            assert content.count(b"K\x03") == 2  # the storage's size and the tensor's
            files[name] = content.replace(b"K\x03", b"J" + struct.pack("<i", 100_000_000))
    with little(5, megabytes=200), pytest.raises(DamagedCheckpointError, match="not the size of the 100000000 numbers"):
        read_checkpoint(write(path, packed(files)))


ENDLESS = torch.zeros(1).expand(10**9, 10**9)
ENDLESS64 = torch.zeros(1, dtype=torch.float64).expand(1, 10**15)


def test_tensor_of_one_number_that_claims_to_have_10_to_the_18(tmp_path):
    path = write(tmp_path / "a.pth", {"model": {"weight": ENDLESS, "bias": ENDLESS[0]}})
    assert path.stat().st_size < 3000
    with little(5, megabytes=100):
        with pytest.raises(CheckpointError, match="no training state"):
            read_training_state(path)
        with pytest.raises(CheckpointError, match="not in the model"):
            load_weights(Tiny(), read_checkpoint(path), path)
        for place in SOME_PLACES:
            for endless in (ENDLESS, ENDLESS64, torch.zeros(1, dtype=torch.int64).expand(10**9)):
                resumes_or_is_refused(write(path, replaced("adamw", {place: endless})), "adamw")


# Contents


def places(content: dict) -> list[tuple]:
    """The keys on the way to each value in the dictionaries and lists of a checkpoint, and to those themselves."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        found.append((key,))
        if isinstance(value, dict | list):
            found += [(key, *rest) for rest in places(value)]
    return found


PLACES = {kind: places(trained(kind)) for kind in KINDS}
GONE = "gone"
# One of each kind.
SOME_PLACES = [
    *[(key,) for key in trained("adamw")],
    *[("model", name) for name in ("0.weight", "1.running_var", "1.num_batches_tracked", "2.bias")],
    *[("optimizer", "state", 0, name) for name in ("step", "exp_avg", "exp_avg_sq")],
    *[("optimizer", "param_groups", 0, "params"), ("optimizer", "param_groups", 0, "params", 0)],
    *[("progress", name) for name in ("losses", "unreadable", "buffers", "step")],
    *[("config", "SEED"), ("config", "DATA.BATCH_SIZE"), ("best", "top1")],
]


def at(content, place: tuple):
    return functools.reduce(lambda part, key: part[key], place, content)


def replaced(kind: str, values: dict[tuple, object]) -> dict:
    """What a run writes, with other values at these places. A place inside one that was replaced is not there."""
    content = copy.deepcopy(trained(kind))
    for place, value in values.items():
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
            section = at(content, place[:-1])
            if value is GONE:
                del section[place[-1]]
            else:
                section[place[-1]] = value
    return content


def with_attribute(value, **attributes):
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def odd_tensors(shape: tuple) -> dict[str, torch.Tensor]:
    """All of one shape."""
    ones = torch.ones(shape)
    size = ones.numel()
    tensors = {
        "zeros": torch.zeros(shape),
        "negative": -ones,
        "nan": ones * float("nan"),
        "infinite": ones * float("inf"),
        "too large for float32": ones.double() * 1e300,
        "float64": ones.double(),
        "half": ones.half(),
        "bfloat16": ones.bfloat16(),
        "whole": ones.long(),
        "largest whole": torch.full(shape, 2**63 - 1),
        "bytes": torch.full(shape, 255, dtype=torch.uint8),
        "bool": ones.bool(),
        "uint32": ones.to(torch.uint32),
        "float8": ones.to(torch.float8_e4m3fn),
        "bits": torch.zeros(shape, dtype=torch.uint8).view(torch.bits8),
        "complex": ones * 1j,
        "sparse": ones.to_sparse(),
        "meta": ones.to("meta"),
        "one number": torch.zeros(()).expand(shape),
        "parameter": nn.Parameter(ones.clone()),
        "gradient": ones.clone().requires_grad_(),
        "flipped": torch.arange(float(size)).flip(0).view(shape),
        "own isfinite": with_attribute(ones.clone(), isfinite=3, is_complex=4, clone=5, to=6, sum=7),
    }
    if hasattr(torch, "quantize_per_tensor"):  # PyTorch says it will go
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors["quantised"] = torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8)
    if len(shape) == 2:
        tensors["compressed sparse"] = ones.to_sparse_csr()
        tensors["transposed"] = torch.ones(shape[::-1]).t()
    return tensors


class Disguised:
    """Saved as an OrderedDict of its own with attributes that hide its methods."""

    def __init__(self, content: dict, **attributes):
        self.content, self.attributes = content, attributes

    def __reduce__(self):
        return collections.OrderedDict, (), self.attributes, None, iter(self.content.items())


def test_training_checkpoint_with_every_odd_tensor_in_place_of_one(folder):
    resumed = collections.Counter()
    momentum = ("sgd", ("optimizer", "state", 0, "momentum_buffer"))
    for kind, place in [*[("adamw", place) for place in SOME_PLACES], momentum]:
        value = at(trained(kind), place)
        if isinstance(value, torch.Tensor):
            for odd in odd_tensors(tuple(value.shape)).values():
                resumed[resumes_or_is_refused(write(folder / "a.pth", replaced(kind, {place: odd})), kind)] += 1
    assert min(resumed[True], resumed[False]) > 50


@pytest.mark.parametrize("value", [GONE, None, 10**600, -1, 2.5, []], ids=lambda value: str(value)[:9])
def test_training_checkpoint_with_one_value_in_any_place(folder, value):
    kind = "adamw float16"
    for place in PLACES[kind]:
        if place in SOME_PLACES or place[0] not in ("config", "model"):  # of which one is like the other
            resumes_or_is_refused(write(folder / "a.pth", replaced(kind, {place: value})), kind)


def large(*shape: int) -> torch.Tensor:
    """Finite, and not in the model's precision."""
    return torch.full(shape, 1e300, dtype=torch.float64)


MOMENT = ("optimizer", "state", 0)
REFUSED = {
    "format of several numbers": ({("format",): torch.zeros(3)}, "format a Tensor"),
    "no statistics, not even none": ({("progress", "buffers"): GONE}, "no buffers"),
    "format as a bool": ({("format",): True}, "format True"),
    "format that is newer": ({("format",): FORMAT + 1}, f"format {FORMAT + 1}; .* reads formats 1 to {FORMAT}"),
    "format without end": ({("format",): "x" * 10_000}, "format xxx"),
    "weight too large": ({("model", "0.weight"): large(4, 3)}, "finite numbers: 0.weight"),
    "weight nan": ({("model", "2.bias"): torch.tensor([1, float("nan")])}, "finite numbers: 2.bias"),
    "weight of no dimensions": ({("model", "2.weight"): torch.ones(())}, r"other shape: 2.weight \(\), not \(2, 4\)"),
    "other inputs": ({("model", "2.weight"): torch.ones(2, 5)}, r"other shape: 2.weight \(2, 5\), not \(2, 4\)"),
    "bits": ({("model", "0.bias"): odd_tensors((4,))["bits"]}, "no plain numbers: 0.bias"),
    "moments one number": ({(*MOMENT, "exp_avg"): torch.zeros(())}, "exp_avg of parameter 0"),
    "moments in one place": ({(*MOMENT, "exp_avg"): torch.zeros(()).expand(4, 3)}, "exp_avg of parameter 0"),
    "moments too large": ({(*MOMENT, "exp_avg"): large(4, 3)}, "exp_avg of parameter 0"),
    "negative squares": ({(*MOMENT, "exp_avg_sq"): -torch.ones(4, 3)}, "exp_avg_sq of parameter 0"),
    "steps before the first": ({(*MOMENT, "step"): -1}, "number of steps of parameter 0"),
    "too many steps": ({(*MOMENT, "step"): 10**600}, "number of steps of parameter 0"),
    "parameters as tensors": ({("optimizer", "param_groups", 0, "params"): [torch.zeros(2)] * 2}, "not numbered"),
    "parameters as fractions": ({("optimizer", "state"): {1.0: {}}}, "not numbered"),
    "epoch before the first": ({("epoch",): -1}, "epoch is not"),
    "epoch as a bool": ({("epoch",): True}, "epoch is not"),
    "run as a number": ({("run",): 7}, "run is not a name"),
    "best gone": ({("best",): None}, "best is not a dictionary"),
    "best loss as text": ({("best", "val_loss"): "low"}, "best has a val_loss"),
    "best of two tasks": ({("best", "AP"): 0.5}, "best is not"),
    "parts of the loss without names": ({("progress", "parts"): [1]}, "no names of losses"),
    "a part of the loss without a sum": ({("progress", "parts"): ["a"]}, "no losses"),
    "best nan": ({("best", "top1"): float("nan")}, "best is not"),
    "config empty": ({("config",): {}}, "config has no DATA.BATCH_SIZE"),
    "no processes": ({("processes",): 0}, "processes is not a number"),
    "half an image": ({("images",): 0.5}, "images is not a number"),
    "progress as a list": ({("progress",): [1]}, "progress is not a dictionary"),
    "step before the first": ({("progress", "step"): -1}, "no step"),
    "skipped gone": ({("progress", "skipped"): None}, "no skipped"),
    "seconds without end": ({("progress", "seconds"): float("inf")}, "no seconds"),
    "trained as a number": ({("progress", "trained"): 1}, "whether the epoch is trained"),
    "losses nan": ({("progress", "losses"): torch.full((1, 2), float("nan")).double()}, "no losses"),
    "losses of more processes": ({("progress", "losses"): torch.zeros(3, 2).double()}, "no losses"),
    "unreadable of no shape": ({("progress", "unreadable"): torch.zeros(2, 2).long()}, "no unreadable"),
    "best too large": ({("best", "top1"): 10**600}, "best is not"),
    "config of tensors": ({("config", "SEED"): torch.zeros(3)}, "no plain value of SEED"),
    "losses in one place": ({("progress", "losses"): ENDLESS64.expand(1, 2, 10**15)[..., 0]}, "no losses"),
    "processes without end": (
        {
            ("processes",): 10**15,
            ("progress", "losses"): ENDLESS64[0, :1].expand(10**15, 2),
            ("progress", "buffers"): None,
        },
        "no losses",
    ),
    "statistics without end": ({("progress", "buffers"): ENDLESS64}, "no buffers"),
    "statistics too large": ({("progress", "buffers"): large(1, 9)}, "statistics 1.running"),
    "negative count": ({("progress", "unreadable"): torch.tensor([-1])}, "negative number of unreadable"),
    "loss scale 0": ({("scaler", "scale"): 0}, "loss scaler"),
    "loss scale count too large": ({("scaler", "_growth_tracker"): 2**40}, "loss scaler"),
    "loss scale interval no whole number": ({("scaler", "growth_interval"): 0.5}, "loss scaler"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_training_checkpoint_that_is_refused(tmp_path, values, message):
    with little(5, megabytes=100), pytest.raises(CheckpointError, match=message) as error:
        resume(write(tmp_path / "a.pth", replaced("adamw float16", values)), "adamw float16")
    assert_clear(error.value)


def test_attributes_that_hide_methods_are_left_behind(tmp_path):
    weights = {n: with_attribute(v.clone(), isfinite=3, to=4) for n, v in Tiny().state_dict().items()}
    content = Disguised({**trained("adamw"), "model": Disguised(weights, values=1, items=2)}, get=3, keys=4)
    path = write(tmp_path / "a.pth", content)
    assert vars(torch.load(path, weights_only=True)) == {"get": 3, "keys": 4}  # they do come back
    assert resumes_or_is_refused(path, "adamw")


# The lock, which is in the folder of a run as well


@examples(150)
@given(
    st.binary(max_size=60)
    | st.builds(
        '{{"host": {}, "process": {}, "since": {}}}'.format,
        *[st.sampled_from(["1e999", "-1", "null", "[]", '"\\u001b[2J"', '"a\\nb"', "9" * 400, "[" * 5000, "7", "NaN"])]
        * 3,
    ).map(str.encode)
)
def test_lock_with_anything_in_it(folder, content):
    config = get_default_config()
    config.OUTPUT = str(folder)
    run_path(config).mkdir(parents=True, exist_ok=True)
    (run_path(config) / LOCK).write_bytes(content)
    with open_run_folder(config, ALONE) as found:
        assert all(note.isprintable() and len(note) < 500 for note in found.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

DEFAULTS = leaves(get_default_config())


def accepted_or_refused(path: Path, opts=()) -> bool:
    """A config that is accepted is in range, and what a run writes of it is the same config."""
    try:
        config, notes = load_config(path, opts)
    except ConfigError as error:
        assert_clear(error)
        return False
    assert config.is_frozen()
    validate(config, {})
    assert {key: type(value) for key, value in leaves(config).items()} == {k: type(v) for k, v in DEFAULTS.items()}
    assert all(note.isprintable() for note in notes)
    again = path.with_name("again")
    again.mkdir(exist_ok=True)
    save_config(config, again)
    loaded, _ = load_config(again / "config.yaml")
    assert loaded.dump() == config.dump()
    assert leaves(loaded) == leaves(config)
    with contextlib.suppress(OSError):  # too long, perhaps, which is the system's to say
        run_path(config).exists()
    return True


@examples(150)
@given(st.binary(max_size=60) | changed((ROOT / "configs/strip_mlp_pico_digits.yaml").read_bytes()))
def test_any_bytes_as_a_config(folder, content):
    (folder / "b.yaml").write_bytes(content)
    accepted_or_refused(folder / "b.yaml")


def laughs(levels: int, kind: str) -> str:
    first, level = {
        "lists": ("[a, a]", "[{0}, {0}]"),
        "mappings": ("{{k: 1}}", "{{{{l: {0}, r: {0}}}}}"),
        "merges": ("{{k: 1}}", "{{{{<<: [{0}, {0}]}}}}"),
    }[kind]
    lines = [f"a0: &a0 {first.format()}"]
    lines += [f"a{i}: &a{i} " + level.format(f"*a{i - 1}").format() for i in range(1, levels)]
    return "\n".join(lines)


YAML_BOMBS = {
    **{f"aliases of {kind}": laughs(60, kind) for kind in ("lists", "mappings", "merges")},
    "aliases in a value": "SEED: [&a0 [0], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)) + "]",
    "contains itself": "a: &a [*a]",
    "contains itself as a key": "? &a [*a]\n: 1",
    "deep lists": "a: " + "[" * 50_000,
    "deep mappings": "{a: " * 3000 + "}" * 3000,
    "deep blocks": "- " * 5000 + "1",
    "many keys": "\n".join(f"{i}: " for i in range(14_000)),
    "many values": "a: [" + "1," * 60_000 + "]",
    "long key": "? " + "x" * 100_000 + "\n: 1",
    "long value": "SEED: " + "x" * 100_000,
    "long list": "MODEL: {STRIP_MLP: {LAYERS: [" + "1, " * 30_000 + "1]}}",
    "long number": "SEED: 0x" + "f" * 100_000,
    "too large": "#" * 200_000,
}


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_yaml_that_is_small_and_endless(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with little(8, megabytes=250), pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.yaml")
    assert_clear(error.value)
    assert str(tmp_path / "a.yaml") in str(error.value)


def test_files_that_lead_to_endless_files(tmp_path):
    """Each is the BASE of the one before it twice."""
    for i in range(40):
        (tmp_path / f"{i}.yaml").write_text(f"BASE: [{i + 1}.yaml, {i + 1}.yaml]")
    (tmp_path / "40.yaml").write_text("SEED: 1")
    with little(8), pytest.raises(ConfigError, match="more than 100 files") as error:
        load_config(tmp_path / "0.yaml")
    assert_clear(error.value)
    assert load_config(tmp_path / "36.yaml")[0].SEED == 1


SECRET = "the-secret-of-the-file"
BASES = {
    "itself": "a.yaml",
    "itself through a link": "link.yaml",
    "system file": "/etc/passwd",
    "folder": ".",
    "folder with the ending": "folder.yaml",
    "python": "a.py",
    "python with the ending": "python.yaml",
    "text with the ending": "secret.yaml",
    "system file with the ending": "passwd.yaml",
    "pipe": "pipe.yaml",
    "device": "zero.yaml",
    "dangling link": "dangling.yaml",
    "link to itself": "circle.yaml",
    "nul": '"a\\0b.yaml"',
    "surrogate": '"\\ud800.yaml"',
    "line feed": '"a\\nb.yaml"',
    "long": "x" * 5000 + ".yaml",
    "home": "~/.yaml",
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_base_that_is_no_config(tmp_path, base):
    (tmp_path / "a.py").write_text(f"open({str(tmp_path / MARKER)!r}, 'w')  # {SECRET}")
    (tmp_path / "python.yaml").symlink_to("a.py")
    (tmp_path / "secret.yaml").write_text(SECRET)
    (tmp_path / "passwd.yaml").symlink_to("/etc/passwd")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to("a.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "dangling.yaml").symlink_to("gone")
    (tmp_path / "circle.yaml").symlink_to("circle.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "a.yaml").write_text(f"BASE: {base}")
    with little(5, megabytes=100), pytest.raises(ConfigError) as error:
        load_config(tmp_path / "a.yaml")
    assert_clear(error.value)
    for content in (SECRET, *Path("/etc/passwd").read_text().splitlines()):
        assert content not in str(error.value)
    assert not (tmp_path / MARKER).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

NAMES = [
    b"line\nfeed",
    b"tab\tand\rreturn",
    b"\x1b[2J\x1b[31mred",
    b"\xff\xfe\x80",
    "größer 試 😀".encode(),
    "\u202eright to left".encode(),
    b"'single' \"double\" `back`",
    b"$(touch executed); touch executed",
    b"-rf",
    b" leading and trailing ",
    b"%s %d {0} {} %(message)s",
    b"back\\slash",
    b"x" * 200,
]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


PNG = encode(Image.fromarray(noise(0, 12, 16, 3)))


def put(root: Path, name: bytes, content: bytes = PNG) -> bytes:
    path = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
    return path


def assert_logged_on_one_line(folder: Path, name: str, monkeypatch) -> None:
    """In the file and on a console that has ASCII only."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        logger = create_logger("hostile", 0, folder)
        logger.warning(f"cannot be read as an image: {name}; and so on")
    console.flush()
    for handler in logger.handlers:
        handler.close()
    (line,) = (folder / "log_rank0.txt").read_text(encoding="utf-8").splitlines()
    assert line.endswith(f"WARNING cannot be read as an image: {name}; and so on")
    assert line.isprintable()
    shown = console.buffer.getvalue().decode("ascii")
    assert shown.count("\n") == 1 and shown.endswith("; and so on\n")
    assert re.sub(r"\x1b\[\d*m", "", shown.strip()).isprintable()
    (folder / "log_rank0.txt").unlink()


def test_names_of_classes_and_files(tmp_path, monkeypatch):
    root = tmp_path / "data"
    for name in NAMES:
        for ending in (b".jpg", b".PNG"):
            put(root, name + b"/" + name + ending)
        put(root, name + b"/" + name + b"/deep.jpg")
    for name in (b".hidden", b"..dots"):
        put(root, name + b"/1.jpg")
    source = FolderSource(root)
    assert [os.fsencode(name) for name in source.classes] == sorted(NAMES, key=os.fsdecode)
    assert len(source) == 3 * len(NAMES)
    for index in range(len(source)):
        assert source.load(index).size == (16, 12)
        assert_logged_on_one_line(tmp_path, source.name(index), monkeypatch)
    assert len({source.name(index) for index in range(len(source))}) == len(source)
    assert source.name(source.targets.tolist().index(source.classes.index("größer 試 😀"))).endswith(".PNG")


# What is no file


LOOPS = {
    "class": {"a/up": ".."},
    "data": {"a/around": "../.."},
    "root of the system": {"a/around": "/"},
    "itself": {"a/up": "."},
    "several": {f"a/up{i}": ".." for i in range(4)},
    "several in folders of no images": {**{f"b/up{i}": "." for i in range(8)}, "b/1.png": "../a/1.png"},
    "each other": {"a/b": "../c", "c/a": "../a", "c/d": "../a", "c/1.png": "../a/1.png"},
    "class folder": {"b": "."},
    "class folder around": {"around": ".."},
    "class folder of the system": {"around": "/"},
}


@pytest.mark.parametrize("links", LOOPS.values(), ids=LOOPS)
def test_links_to_folders_around_them(tmp_path, links):
    """With two of them, the paths to follow would double forty times, before the system gives up."""
    put(tmp_path, b"data/a/1.png")
    for name, target in links.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)
    message = "around is a link to a folder that contains it" if "around" in str(links) else "same folder through links"
    with little(5, megabytes=100), pytest.raises(DataError, match=message) as error:
        FolderSource(tmp_path / "data")
    assert_clear(error.value)


def test_what_is_no_file_is_not_read(tmp_path):
    put(tmp_path, b"a/0.png")
    os.mkfifo(tmp_path / "a/1 pipe.jpg")
    (tmp_path / "a/2 zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "a/3 random.jpg").symlink_to("/dev/urandom")
    (tmp_path / "a/4 null.jpg").symlink_to("/dev/null")
    with open(tmp_path / "a/5 sparse.jpg", "wb") as file:
        file.truncate(300 * 2**20)
    (tmp_path / "a/6 memory.jpg").symlink_to("/proc/self/mem")
    (tmp_path / "a/7 folder.jpg").mkdir()
    (tmp_path / "a/8 folder.jpg").symlink_to("/dev")
    (tmp_path / "a/8 folder.jpg").unlink()
    source = FolderSource(tmp_path)
    assert len(source) == 7
    config = get_default_config()
    config.DATA.IMG_SIZE = 32
    dataset = ClassificationDataset(source, build_transform(config, False), (32, 32))
    with little(5, megabytes=100):
        assert [dataset[0, index].readable for index in range(len(source))] == [True] + 6 * [False]
        source.cache(range(len(source)))
        for index in range(1, len(source)):
            with pytest.raises(OSError):
                source.load(index)


# Images

SOURCE_IMAGE = Image.fromarray(noise(1, 13, 17, 3))


@pytest.fixture(scope="module")
def one_image(tmp_path_factory) -> tuple[FolderSource, Path]:
    root = tmp_path_factory.mktemp("image")
    put(root, b"a/image.jpg")
    return FolderSource(root), root / "a/image.jpg"


@pytest.mark.parametrize("error", [SyntaxError, KeyError("a"), struct.error, RecursionError, MemoryError])
@pytest.mark.parametrize("where", ["PIL.Image.open", "PIL.Image.Image.convert"])
def test_odd_errors_of_decoders(one_image, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match=r"image\.jpg"):
        one_image[0].load(0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [60_000, 2**31 - 1])
def test_small_files_of_huge_images(one_image, size):
    source, path = one_image

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, size, size, 1, 24, 0, 0, 0, 0, 0, 0)
    for content in (png, bmp, b"P6 %d %d 255\n" % (size, size)):
        path.write_bytes(content)
        with little(5, megabytes=100), pytest.raises(OSError):
            source.load(0)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow hands it to Ghostscript, an interpreter, whatever the file is called. Here it is a script that tells."""
    script = tmp_path / "bin/gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = encode(SOURCE_IMAGE, "EPS")
    put(tmp_path, b"data/a/image.jpg", eps)
    with pytest.raises(OSError):
        FolderSource(tmp_path / "data").load(0)
    assert not (tmp_path / "executed").exists()
    with contextlib.suppress(Exception):
        Image.open(io.BytesIO(eps)).load()
    assert (tmp_path / "executed").exists()  # it would have been


# Zip files


def zip_source(root: Path, archive: bytes, listing: str = "a.png\t0\n") -> ZipSource:
    (root / "train.zip").write_bytes(archive)
    (root / "train_map.txt").write_text(listing)
    return ZipSource(root / "train.zip", root / "train_map.txt")


def with_sizes(archive: bytes, size: int) -> bytes:
    """Of the one member, in both places that say it."""
    wrong = bytearray(archive)
    struct.pack_into("<I", wrong, archive.index(b"PK\x01\x02") + 24, size)
    struct.pack_into("<I", wrong, 22, size)
    return bytes(wrong)


@functools.cache
def zeros_deflated(megabytes: int) -> bytes:
    """Deflate's full flushes allow its blocks to be repeated."""
    deflate = zlib.compressobj(9, wbits=-15)
    block = deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return block * (megabytes // 16) + deflate.flush()


def bomb(megabytes: int, size: int) -> bytes:
    """A zip file of so many megabytes of zeros, said to be of `size` bytes."""
    body = zeros_deflated(megabytes)
    fields = (0, 8, 0, 0, 0, len(body), size, 5)
    local = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, *fields[:-1], 5, 0) + b"a.png" + body
    central = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, *fields, 0, 0, 0, 0, 0, 0) + b"a.png"
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


@pytest.mark.parametrize("size", [100, MOST_FILE_BYTES - 1, MOST_FILE_BYTES + 1, 2**32 - 2], ids=str)
def test_zip_member_that_is_larger_than_it_should_be(tmp_path, size):
    archive = bomb(1024, size)
    assert len(archive) < 2 * 2**20
    source = zip_source(tmp_path, archive)
    with little(20, megabytes=2.5 * min(size, 2**28) / 2**20 + 60 if size < MOST_FILE_BYTES else 60):
        with pytest.raises(OSError):
            source.load(0)
        source.cache([0])


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**32 - 2])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_member_of_a_size_that_is_not_so(tmp_path, compression, size):
    source = zip_source(tmp_path, with_sizes(packed({"a.png": PNG}, compression), size))
    with little(5, megabytes=100), pytest.raises(OSError):
        source.load(0)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_member_of_a_compression_without_bounds(tmp_path, compression):
    archive = packed({"a.png": bytes(2**28)}, compression)
    assert len(archive) < 2**18
    source = zip_source(tmp_path, with_sizes(archive, 100))
    with little(5, megabytes=100), pytest.raises(OSError):
        source.load(0)


# All together


def test_training_on_a_hostile_folder(tmp_path):
    """Every name in turn is a class; some files cannot be read."""
    classes = [name for name in NAMES if not name.startswith(b".")][:6]
    for split, count in ((b"train", 4), (b"val", 2)):
        for number, name in enumerate(classes):
            for i in range(count):
                put(tmp_path / "data", split + b"/" + name + b"/%d" % i + NAMES[number + i] + b".jpg")
    broken = b"0" + NAMES[0] + b".jpg"
    first = os.path.join(os.fsencode(tmp_path / "data/train"), classes[0])
    put(tmp_path / "data", b"val/" + classes[1] + b"/" + broken, b"no image")
    put(tmp_path / "data", b"train/" + classes[0] + b"/" + broken, encode(SOURCE_IMAGE, "JPEG")[:200])
    os.symlink("/dev/zero", os.path.join(first, b"9\xff zero.jpg"))
    os.symlink("gone", os.path.join(first, b"9\n gone.jpg"))
    os.mkfifo(os.path.join(first, b"9\x1b[2J pipe.jpg"))
    command = (
        "main.py",
        "--cfg",
        "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml",
        "--data-path",
        tmp_path / "data",
    )
    flags = ("--batch-size", 4, "--output", tmp_path / "out", "--opts", *TINY, "DATA.MAX_UNREADABLE", 0.5)
    result = python(*command, *flags)
    assert "Traceback" not in result.stdout + result.stderr
    (run,) = (tmp_path / "out").glob("*/default")
    for text in (result.stdout, (run / "log_rank0.txt").read_text(encoding="utf-8")):
        named = [line for line in text.splitlines() if "cannot be read as an image" in line]
        assert len(named) == 5
        assert all(line.isprintable() for line in named)
        assert "\\x1b[2J pipe.jpg" in text
    assert "epoch 1/1" in result.stdout
    assert not (tmp_path / "executed").exists() and not (ROOT / "executed").exists()
    assert read_checkpoint(run / "last.pth")["epoch"] == 1
