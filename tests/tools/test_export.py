"""Exported files: the same logits for any batch, what they say about themselves, int8, and what is left where an
export fails."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import export
import pytest
import torch

from config import leaves, load_config
from data import build_eval_loader, build_sources
from engine.evaluate import evaluate
from engine.inference import build_engine
from engine.trained import Trained
from models import build_model
from runtime.distributed import World
from tests.helpers import ROOT, TINY, python, run_tool, trained_model
from utils import UserError

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NAMES = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]


def save_model(path: Path, config) -> Path:
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.normal_(model.get_classifier().weight)
    with torch.no_grad():  # statistics of BatchNorms that are worth folding
        for _ in range(5):
            model(2 * torch.randn(8, 3, 32, 32) + 1)
    torch.save({"model": model.state_dict(), "config": leaves(config), "classes": NAMES}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config, _ = load_config(ROOT / "configs/strip_mlp_pico_digits.yaml", [*TINY, "MODEL.NUM_CLASSES", "10"])
    return save_model(tmp_path_factory.mktemp("run") / "best.pth", config)


@pytest.fixture(scope="module")
def trained(checkpoint) -> Trained:
    return trained_model(checkpoint, "--device", "cpu")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> SimpleNamespace:
    """An ONNX file that normalises, as a user makes it, and what was printed."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip("the ONNX exporter of PyTorch before 2.9 does not take this model")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    result = python("tools/export.py", checkpoint, "--normalize", "--evaluate", "--output", path)
    # NAMES are not the digits'.
    taken, names = result.stderr.splitlines()
    assert taken == f"note: weights from {checkpoint}: model"
    assert names == f"note: {checkpoint} was trained on classes of other names than the data has"
    return SimpleNamespace(path=path, stdout=result.stdout)


@pytest.fixture(scope="module")
def measured(trained) -> dict:
    """What main_eval.py measures."""
    world = World(0, 0, 1, torch.device("cpu"))
    loader = build_eval_loader(trained.config, build_sources(trained.config, world, train=False).val, world)
    return evaluate(trained.config, trained.model, loader, world, logging.getLogger())[0]


def run(monkeypatch, capsys, *arguments) -> SimpleNamespace:
    """The tool, without another process."""
    return run_tool(monkeypatch, capsys, export, *arguments)


def copying(source: Path, change=lambda model: None):
    """In place of the exporter, which takes seconds: a copy of what it has written, changed."""

    def write(model, images, path, properties):
        copy = onnx.load(source)
        change(copy)
        onnx.save(copy, path)

    return export.FORMATS["onnx"]._replace(write=write)


def rows(text: str) -> dict[str, list[str]]:
    """Of a table, by the first column."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in cells}


def pixels(batch: int) -> torch.Tensor:
    return torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


def expected_logits(trained: Trained, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return trained.model((images / 255 - mean) / std)


def test_onnx_computes_the_same(exported, trained):
    session = onnxruntime.InferenceSession(exported.path)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    for batch in (1, 2, 5):
        expected = expected_logits(trained, pixels(batch))
        assert expected.std() > 0.1
        (found,) = session.run(None, {"images": pixels(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    assert onnx.load(exported.path).opset_import[0].version == 18
    onnx.checker.check_model(exported.path)


def test_onnx_says_what_it_takes(exported):
    said = onnxruntime.InferenceSession(exported.path).get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == NAMES
    assert (json.loads(said["mean"]), json.loads(said["std"])) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (said["model"], said["image_size"]) == ("strip_mlp_pico_digits", "[32, 32]")
    assert said["input"] == "images (N, 3, 32, 32), uint8, RGB from 0 to 255"
    assert (said["normalizes"], said["reparameterized"]) == ("true", "true")


def test_report(exported, measured):
    assert exported.stdout.splitlines()[-1] == str(exported.path)
    found = rows(exported.stdout)
    assert "top-1 of 360 images, %" in found["computed by"]
    size, difference, *_ = found["ONNX"]
    assert float(size) == pytest.approx(exported.path.stat().st_size / 2**20, abs=0.006)
    assert 0 <= float(difference) < 1e-4
    for name in ("PyTorch", "ONNX"):
        assert float(found[name][2]) == pytest.approx(measured["top1"], abs=0.006)
        assert float(found[name][3]) > 0
    assert float(found["PyTorch"][4]) == 1
    assert not [path for path in exported.path.parent.iterdir() if path != exported.path]


def test_int8(monkeypatch, capsys, checkpoint, exported, trained, measured, tmp_path):
    monkeypatch.setitem(export.FORMATS, "onnx", copying(exported.path))
    path = tmp_path / "int8.onnx"
    result = run(monkeypatch, capsys, checkpoint, "--normalize", "--int8", "--evaluate", "--output", path)
    assert result.status == 0 and result.err.startswith("note: ") and result.err.count("\n") == 2
    (found,) = onnxruntime.InferenceSession(path).run(None, {"images": pixels(5).numpy()})
    expected = expected_logits(trained, pixels(5))
    difference = (torch.from_numpy(found) - expected).abs().max()
    assert 1e-4 < difference < expected.std()

    nodes = onnx.load(path).graph.node
    groups = [{a.name: a.i for a in node.attribute}.get("group", 1) for node in nodes if node.op_type == "Conv"]
    assert groups and min(groups) > 1
    assert len([node for node in nodes if node.op_type == "ConvInteger"]) > 20
    assert not [node for node in nodes if node.op_type in ("Gemm", "MatMul") and node.domain == ""]
    assert json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["classes"]) == NAMES

    cells = rows(result.out)
    assert cells.keys() >= {"PyTorch", "ONNX", "ONNX, int8"}
    assert float(cells["ONNX, int8"][0]) < float(cells["ONNX"][0])
    assert float(cells["ONNX, int8"][1]) > 1e-4 > float(cells["ONNX"][1])
    assert abs(float(cells["ONNX, int8"][2]) - measured["top1"]) < 5


@pytest.mark.parametrize("options", [["--no-reparameterize"], ["--normalize"]], ids=["plain", "uint8"])
def test_program(monkeypatch, capsys, checkpoint, trained, tmp_path, options):
    path = tmp_path / "model.pt2"
    result = run(monkeypatch, capsys, checkpoint, "--format", "torch", "--output", path, *options)
    assert result.status == 0 and result.err.startswith("note: weights from ") and result.err.count("\n") == 1
    assert float(rows(result.out)["torch.export"][1]) < 1e-4
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    for batch in (1, 2, 5):
        images = pixels(batch) if "--normalize" in options else trained.normalize(pixels(batch))
        found = program.module()(images)
        torch.testing.assert_close(found, expected_logits(trained, pixels(batch)), rtol=0, atol=1e-4)
    said = json.loads(extra["metadata.json"])
    assert json.loads(said["classes"]) == NAMES
    assert ("float32" in said["input"]) == ("--normalize" not in options)
    folded = not [name for name in program.state_dict if "proj_norm" in name]
    assert folded == ("--no-reparameterize" not in options) == json.loads(said["reparameterized"])
    # Only a copy of the model was folded.
    assert any("proj_norm" in name for name in trained.model.state_dict())


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_file_that_computes_something_else(monkeypatch, capsys, checkpoint, exported, tmp_path, value):
    def change(model):
        (bias,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("head.fc.bias")]
        changed = onnx.numpy_helper.to_array(bias).copy()
        changed[3] += value
        bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))

    monkeypatch.setitem(export.FORMATS, "onnx", copying(exported.path, change))
    path = tmp_path / "model.onnx"
    path.write_text("an older one")
    result = run(monkeypatch, capsys, checkpoint, "--normalize", "--output", path)
    assert (result.status, result.out) == (1, "")
    assert f"{path}: not written, because its logits differ by {value:g}" in result.err
    assert "accepted: --tolerance 0.0001, or try --no-reparameterize" in result.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "an older one"

    options = ["--normalize", "--tolerance", "1.01", "--output", path]
    assert run(monkeypatch, capsys, checkpoint, *options).status == (1 if value != value else 0)


def test_exporter_that_fails(monkeypatch, capsys, checkpoint, tmp_path):
    def fail(*args):
        try:
            raise TypeError("no such operator\nand much more")
        except TypeError as error:
            raise RuntimeError("step 3 of 3") from error

    monkeypatch.setitem(export.FORMATS, "onnx", export.FORMATS["onnx"]._replace(write=fail))
    result = run(monkeypatch, capsys, checkpoint, "--output", tmp_path / "a.onnx")
    assert result.status == 1
    assert f"error: torch {torch.__version__} cannot export strip_mlp_pico_digits" in result.err
    assert (
        "(TypeError: no such operator); accepted: --format openvino or --format torch or --format aoti, or "
        in result.err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--output", "model.pt2"], 2, "--output model.pt2: accepted with --format onnx: a name that ends in .onnx"),
        (["--output", "best.pth", "--format", "torch"], 2, "a name that ends in .pt2"),
        (["--int8", "--format", "torch"], 2, "--int8 goes with --format onnx"),
        (["--output", "best.bin", "--format", "openvino"], 2, "a name that ends in .xml"),
        (["--format", "tflite"], 2, "invalid choice: 'tflite'"),
        (["--device", "cuda"], 2, "exported and checked on the CPU"),
        (["--output", "missing/folder/a.onnx"], 1, "missing/folder"),
    ],
)
def test_bad_input(monkeypatch, capsys, checkpoint, tmp_path, options, status, message):
    monkeypatch.chdir(tmp_path)
    result = run(monkeypatch, capsys, checkpoint, *options)
    assert result.status == status
    assert message in result.err


def test_openvino(monkeypatch, capsys, checkpoint, trained, tmp_path):
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "model.xml"
    result = run(monkeypatch, capsys, checkpoint, "--format", "openvino", "--normalize", "--output", path)
    assert result.status == 0 and float(rows(result.out)["OpenVINO"][1]) < 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    model = openvino.Core().read_model(path)
    said = {name: model.get_rt_info(name).astype(str) for name in ("classes", "normalizes")}
    assert (json.loads(said["classes"]), said["normalizes"]) == (NAMES, "true")
    compute = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 5):
        found = torch.from_numpy(compute({"images": pixels(batch).numpy()})["logits"])
        torch.testing.assert_close(found, expected_logits(trained, pixels(batch)), rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_package(monkeypatch, capsys, checkpoint, trained, tmp_path):
    """It runs without the model's code, and predict.py takes it as an engine."""
    path = tmp_path / "model.pt2"
    result = run(monkeypatch, capsys, checkpoint, "--format", "aoti", "--output", path)
    assert result.status == 0 and float(rows(result.out)["compiled package"][1]) < 1e-4
    images = trained.normalize(pixels(5)).contiguous()
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch; model = torch._inductor.aoti_load_package('model.pt2'); assert 'models' not in sys.modules;"
        "torch.save([model(torch.load('images.pt', weights_only=True)), model.get_metadata()['classes']], 'found.pt')"
    )
    python("-c", script, cwd=tmp_path)
    found, classes = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found, expected_logits(trained, pixels(5)), rtol=0, atol=1e-4)
    assert json.loads(classes) == NAMES
    engine = build_engine(str(path), trained.model, trained.config, torch.device("cpu"), None, 5, 5, print)
    with torch.inference_mode():
        channels_last = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(engine(channels_last), found)


def test_weights_beside_openvino_files_are_not_replaced(monkeypatch, tmp_path):
    """OpenVINO writes NAME.bin beside NAME.xml, and people call checkpoints pytorch_model.bin."""
    checkpoint, other = tmp_path / "pytorch_model.bin", tmp_path / "other.bin"
    for file in checkpoint, other:
        file.write_bytes(b"weights")
    monkeypatch.setattr("export.require", lambda *_, **__: None)
    for output, message in (
        ([], "would be written over the checkpoint"),
        (["--output", checkpoint.with_suffix(".xml")], "would be written over the checkpoint"),
        (["--output", other.with_suffix(".xml")], "other.bin: is there already; accepted: another --output"),
    ):
        monkeypatch.setattr("sys.argv", ["export.py", str(checkpoint), "--format", "openvino", *map(str, output)])
        with pytest.raises(UserError, match=message):
            export.main()
        assert checkpoint.read_bytes() == other.read_bytes() == b"weights"
