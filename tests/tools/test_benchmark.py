"""The benchmark: that it compares what it says, counts what it says, and writes it down. No test is of a speed."""

import csv
import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import benchmark
import pytest
import timm
import torch
from bench import compare, contenders, options, roofline, timing
from bench import revision as revision_module
from bench.contenders import (
    Contender,
    LiteralStripMLP,
    Step,
    build,
    parse_contenders,
    random_batch,
    set_checkpointing,
)
from bench.growth import Counted, Exponent
from bench.memory import counted_peak, measured_peak
from bench.timing import OtherLoad, Quartiles, Timing, interleave, rotated
from complexity import Complexity
from torch import nn

from models.released import checkpoint_filter_fn
from tests.helpers import ROOT
from utils import run_entry_point

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PICO = ["strip_mlp_pico", "literal:strip_mlp_pico"]
QUICK = ["--batch-sizes", "2", "--img-sizes", "32", "--rounds", "3", "--seconds", "0.1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    """The real ones take seconds."""

    class Probe:
        def __init__(self, *_):
            self.rounds = 0

        def measure(self):
            self.rounds += 1
            return roofline.Ceilings(1e12 * (1 + self.rounds % 3), "linear", 1e10)

    compare.probe_of.cache_clear()
    monkeypatch.setattr(compare, "Probe", Probe)
    monkeypatch.setattr(timing, "SHORTEST", 0.0)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    benchmark.main()


def refused(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_entry_point(benchmark.main)
    assert ended.value.code in (1, 2)
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["strip_mlp_pico", "strip_mlp_tiny_light"])
def test_literal_is_ours(name):
    model = build(name, 64)
    equations = LiteralStripMLP(model)
    images, _ = random_batch(4, 64, CPU, "channels_last")
    with torch.no_grad():
        torch.testing.assert_close(equations.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(equations.train()(images), model.train()(images), rtol=1e-3, atol=1e-3)
    ours, theirs = ({p.numel(): None for p in m.parameters()} for m in (model, equations))
    assert ours == theirs
    released = {name: getattr(equations, flat) for name, flat in equations.names.items()}
    model.load_state_dict(checkpoint_filter_fn(released, model))


def test_literal_trains_like_ours():
    images, targets = random_batch(2, 32, CPU, "channels_last")
    losses = [Step(Contender(name), images, targets, "training") for name in PICO]
    first, second = ([float(step()) for _ in range(2)] for step in losses)
    assert first == pytest.approx(second, rel=1e-3)
    for step in losses:
        assert all(p.isfinite().all() for p in step.model.parameters())
        assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["inference", "training"])
def test_mixed_precision(dtype, task):
    images, targets = random_batch(2, 32, CPU, "contiguous")
    step = Step(Contender("strip_mlp_pico"), images, targets, task, dtype)
    result = step()
    assert result.isfinite().all()
    assert result.dtype == (torch.float32 if task == "training" else dtype)
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}


def test_default_set():
    args = options.parse_args(["--device", "cpu"], "")
    compare.complete(args)
    assert [g.task for g in compare.as_groups(args)] == ["inference", "training"]
    assert {(g.dtype, g.batch, g.img_size) for g in compare.as_groups(args)} == {("float32", 8, 224)}
    names = [c.model for c in parse_contenders(args.contenders, args.modes)]
    assert names[:2] == ["strip_mlp_tiny", "literal:strip_mlp_tiny"]
    assert [name.partition("_")[0] for name in names[2:]] == ["swin", "convnext", "resnet50", "resmlp"]


def test_order_rotates():
    assert [rotated("abc", i) for i in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]

    class Fake:
        def __init__(self, fails=False):
            self.fails = fails

        def repeat(self, times):
            if self.fails:
                raise torch.OutOfMemoryError

        def synchronize(self):
            pass

    steps = {"a": Fake(), "b": Fake(fails=True), "c": Fake()}
    timings = {label: Timing() for label in steps}
    orders = []
    interleave(steps, timings, rounds=4, budget=60, on_round=orders.append)
    assert orders == [["a", "b", "c"], ["c", "a"], ["a", "c"], ["c", "a"]]
    assert [len(t.seconds) for t in timings.values()] == [4, 0, 4]
    assert timings["b"].problem == "out of memory"
    interleave(steps, timings, rounds=9, budget=0)  # over at once: 3 rounds all the same
    assert len(timings["a"].seconds) == 7


def test_modes_of_one_task():
    images, targets = random_batch(2, 32, CPU, "channels_last")
    contender = Contender("strip_mlp_pico", "checkpoint")
    Step(contender, images, targets, "training")()
    with pytest.raises(ValueError, match="of training alone, not of inference"):
        Step(contender, images, targets, "inference")
    with pytest.raises(ValueError, match="resmlp_12_224 has no activation checkpointing"):
        set_checkpointing(nn.Linear(1, 1), "resmlp_12_224")


class Wide(nn.Module):
    """Whose peak can be told by hand: a matrix product and a sum of its result with itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 1000, bias=False)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y + y


def test_memory_meter(monkeypatch):
    monkeypatch.setattr("bench.contenders.build", lambda name, img_size: Wide())
    images, targets = random_batch(64, 32, CPU, "contiguous")
    weights, activations = 4 * 3 * 32 * 32 * 1000, 4 * 64 * 1000
    held = weights + images.nbytes + targets.nbytes
    step = Step(Contender("wide"), images, targets, "inference")
    step()
    assert step.held_bytes() == held
    assert measured_peak(step) == pytest.approx(held + 2 * activations, rel=0.001)
    step = Step(Contender("wide"), images, targets, "training")
    step()
    assert measured_peak(step) == pytest.approx(held + 3 * weights, rel=0.03)  # gradients and two moments
    for task, expected in (("inference", held + 2 * activations), ("training", held + 3 * weights)):
        counted = counted_peak(Contender("wide"), 64, 32, task, torch.float32, CPU, "contiguous")
        assert counted == pytest.approx(expected, rel=0.03)


@pytest.mark.cuda
def test_memory_meter_counts_no_other(monkeypatch):
    monkeypatch.setattr("bench.contenders.build", lambda name, img_size: Wide())
    images, targets = random_batch(64, 32, torch.device("cuda"), "contiguous")
    other = torch.zeros(1 << 28, device="cuda")
    step = Step(Contender("wide"), images, targets, "training")
    step()
    assert 4 * 4 * 3 * 32 * 32 * 1000 < measured_peak(step) < other.nbytes


@pytest.mark.parametrize("name", [*PICO, "resnet18", "swin_tiny_patch4_window7_224"])
def test_work(name):
    work = roofline.count_work(build(name, 32), 2, 32)
    assert work.macs == 2 * Complexity(build(name, 32), (32, 32)).of().macs
    weights = sum(p.numel() for p in timm.create_model(name.removeprefix("literal:")).parameters() if p.ndim > 1)
    assert work.elements > weights / 2


def test_work_by_hand():
    work = roofline.count_work(nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(64, 5)), 2, 8)
    assert work.macs == 2 * (16 * 4 * 12 + 64 * 5)
    assert work.elements == (2 * 3 * 64 + 4 * 12 + 4 + 2 * 64) + (2 * 64 + 64 * 5 + 5 + 2 * 5)
    ceilings = roofline.Ceilings(flops=1000, flops_by="", bandwidth=100)
    shares = ceilings.shares(roofline.Work(macs=100, elements=10), "training", seconds=2, itemsize=2)
    assert shares == pytest.approx((3 * 200 / 2 / 1000, 3 * 20 / 2 / 100))


def test_comparison(monkeypatch, tmp_path, capsys):
    output = tmp_path / "new" / "b.json"
    for _ in range(2):
        run(monkeypatch, "--contenders", *PICO, "resnet18", *QUICK, "--count-memory", "--output", output)
    assert f"{output} was there already: kept as b.1.json" in capsys.readouterr().err
    assert sorted(path.name for path in output.parent.iterdir()) == ["b.1.json", "b.1.md", "b.json", "b.md"]
    data = json.loads(output.read_text())
    assert {"CPU", "versions", "command", "commit", "date"} <= data["machine"].keys()
    rows = {(row["task"], row["contender"]): row for row in data["rows"]}
    assert len(rows) == 6
    for (_, contender), row in rows.items():
        assert len(row["rounds"]) == 3
        low, median, high = (row["seconds"][key] for key in ("low", "median", "high"))
        assert 0 < low <= median <= high
        assert row["images_per_second"] == pytest.approx(2 / median)
        assert row["peak_bytes"] > 0 and 0 < row["matrix_share"] < 1 and row["memory_share"] > 0
        if contender == "resnet18":
            assert "ratio_to_literal" not in row
        else:
            assert math.isfinite(row["ratio_to_literal"]["median"]) and row["ratio_to_literal"]["median"] > 0
    assert rows["training", "resnet18"]["peak_bytes"] > rows["inference", "resnet18"]["peak_bytes"]
    for group in data["groups"]:
        assert group["ceilings"]["flops"] == 2e12  # the median of the three rounds
        assert len(group["others_share"]) == 3 and all(0 <= share <= 1 for share in group["others_share"])
    text = output.with_suffix(".md").read_text()
    assert "Other programs took" in text
    assert "## training, float32, batch 2, 32 x 32" in text
    assert "Stochastic depth is 0" in text
    assert f"- command: `python tools/benchmark.py --contenders {' '.join(PICO)} resnet18" in text


def test_against_a_revision(monkeypatch, tmp_path):
    """The other revision is a checkout of its own: its model is changed here, and the change is seen."""
    output = tmp_path / "b.json"

    @contextmanager
    def changed(revision):
        with revision_module.checkout(revision) as folder:
            file = folder / "models" / "variants.py"
            file.write_text(file.read_text().replace('"embed_dim": 24, "depths": (1, 1, 2, 1)', '"embed_dim": 48'))
            yield folder
        assert not folder.exists()

    monkeypatch.setattr(compare, "checkout", changed)
    contenders = ["--contenders", "strip_mlp_pico", "literal:strip_mlp_pico", "resnet18"]
    run(monkeypatch, *contenders, *QUICK, "--tasks", "inference", "--against", "HEAD", "--output", output)
    rows = {row["contender"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["strip_mlp_pico", "strip_mlp_pico@HEAD", *contenders[2:]]
    assert len(rows["strip_mlp_pico@HEAD"]["rounds"]) == 3
    assert rows["strip_mlp_pico@HEAD"]["peak_bytes"] > 2 * rows["strip_mlp_pico"]["peak_bytes"] > 0
    assert set(rows["strip_mlp_pico"]) - set(rows["resnet18"]) == {"ratio_to_literal", "ratio_to_revision"}
    assert "times as fast as HEAD" in output.with_suffix(".md").read_text()


def test_against_no_revision(monkeypatch, capsys, tmp_path):
    output = ["--output", tmp_path / "b.json"]
    arguments = ["--contenders", "strip_mlp_pico", *QUICK, *output]
    assert "nonesuch" in refused(monkeypatch, capsys, "--against", "nonesuch", *arguments)
    arguments = ["--contenders", "resnet18", *QUICK, *output]
    assert "none of the contenders is this project's own" in refused(
        monkeypatch, capsys, "--against", "HEAD", *arguments
    )


def test_disturbances_are_said(monkeypatch):
    assert Quartiles.of([1.0, 1.0, 1.05, 1.0]).remark == ""
    assert Quartiles.of([1.0, 2.0, 1.0, 2.0]).remark == "unsteady: quartiles 67 % apart"
    # Two processors for 10 seconds, busy for 15 seconds in all: 4 by this process, 3 by a child that has ended, 2 by
    # another.
    cpu = SimpleNamespace(user=0.0, system=0.0, idle=0.0)
    own, child = SimpleNamespace(user=0.0, system=0.0, ended=0.0), SimpleNamespace(user=0.0, system=0.0)
    process = SimpleNamespace(
        cpu_times=lambda: (own.user, own.system, own.ended, 0.0),
        children=lambda recursive: [SimpleNamespace(cpu_times=lambda: (child.user, child.system))],
    )

    class Times(tuple):
        idle = property(lambda self: self[2])

    monkeypatch.setattr(timing.psutil, "cpu_times", lambda: Times((cpu.user, cpu.system, cpu.idle)))
    monkeypatch.setattr(timing.psutil, "Process", lambda: process)
    load = OtherLoad()
    cpu.user, cpu.system, cpu.idle = 12.0, 3.0, 5.0
    own.user, own.system, own.ended, child.user = 3.0, 1.0, 3.0, 2.0
    assert load.look() == pytest.approx((15 - 9) / 20)
    cpu.user += 1
    own.user += 2  # clocks that do not agree
    assert load.look() == 0


def test_modes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contenders, "compile_model", lambda *_, **__: None)  # the real one takes a minute
    output = tmp_path / "b.json"
    modes = ["--modes", "eager", "compile", "reparameterized"]
    run(monkeypatch, "--contenders", "resnet18", *modes, *QUICK, "--output", output)
    assert "left out: resnet18:reparameterized: resnet18 has no reparameterize()" in capsys.readouterr().err
    labels = [(row["task"], row["contender"]) for row in json.loads(output.read_text())["rows"]]
    assert labels == [(t, c) for t in ("inference", "training") for c in ("resnet18", "resnet18:compile")]


def test_growth(monkeypatch, tmp_path):
    output = tmp_path / "g.json"
    arguments = ["--contenders", *PICO, *QUICK, "--img-sizes", 32, 64, 96]
    run(monkeypatch, "--growth", "strip_mlp_pico", *arguments, "--output", output)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md", ".png"]
    data = json.loads(output.read_text())
    assert len(data["points"]) == 2 * (3 + 2)
    laws = {(fit["task"], fit["law"].partition(" ~")[0]): fit for fit in data["exponents"]}
    counted = laws["training", "seconds per image"]["counted"]
    assert counted["strips (S^3)"] == pytest.approx(3)
    assert counted["all others (S^2)"] == pytest.approx(2, abs=0.1)
    assert counted["all others (S^2)"] < counted["all multiply-adds"] < 3
    assert math.isfinite(laws["training", "peak bytes"]["measured"]["k"])
    with open(output.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert [row["img_size"] for row in rows[:3]] == ["32", "64", "96"]
    assert int(rows[5]["counted_bytes"]) > 0


def test_kernels(monkeypatch, tmp_path):
    output = tmp_path / "k.json"
    arguments = ["--kernels", "--contenders", "strip_mlp_pico", "--tasks", "inference"]
    run(monkeypatch, *arguments, *QUICK, "--output", output)
    (step,) = json.loads(output.read_text())["steps"]
    assert len(step["dearest"]) == 10
    assert step["launches"] > sum(kernel["launches"] for kernel in step["dearest"]) > 10
    assert step["seconds"] >= sum(kernel["seconds"] for kernel in step["dearest"]) > 0
    assert "| aten::" in output.with_suffix(".md").read_text()


def test_exponent():
    assert Exponent.of([1, 2, 4], [5, 40, 320]).k == pytest.approx(3)
    assert Exponent.of([1], [1]) is None
    assert str(Exponent.of([1, 2], [1, 4])) == "2.00"
    assert Counted.of("sparse_mlp_tiny", 32).strip_macs == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "resnet19"], "contender 'resnet19': timm"),
        (["--contenders", "resnet19"], "nearest names: resnet"),
        (["--contenders", "resnet18:fast"], "mode is 'fast'; accepted: eager, compile"),
        (["--contenders", "literal:resnet18"], "accepted: literal:strip_mlp_*"),
        (["--contenders", "resnet18:reparameterized"], "resnet18 has no reparameterize()"),
        (["--contenders", "resnet18:reparameterized", "--tasks", "training"], "accepted: --tasks inference"),
        (["--contenders", "resnet18", "--modes", "reparameterized"], "no contender is left"),
        (["--rounds", "2"], "--rounds is 2; accepted: 3 or more"),
        (["--batch-sizes", "8", "0"], "--batch-sizes is 0; accepted: 1 or more"),
        (["--seconds", "-1"], "--seconds is -1; accepted: more than 0"),
        (["--output", "b.txt"], "accepted: a name that ends in .json"),
        (["--growth", "--batch-sizes", "2", "4"], "--growth takes one of"),
        (["--kernels", "--growth"], "--kernels goes with none of"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_refused(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_missing_gpu_is_said(monkeypatch, capsys):
    assert "no CUDA device; accepted here: cpu" in refused(monkeypatch, capsys, "--device", "cuda")
