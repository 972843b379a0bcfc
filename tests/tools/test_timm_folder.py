"""Folders of timm: what tools/convert_checkpoint.py --to timm writes, who opens it, and how it is read back."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import models
from config import get_default_config, leaves
from models import build_model
from runtime.checkpoint import save_checkpoint
from tests.helpers import ROOT, load_tool, run_tool, trained_model, write_image_folder

pytestmark = pytest.mark.slow

NAMES = ["ape", "bee", "cow"]


@pytest.fixture(scope="module")
def tool():
    return load_tool(ROOT / "tools/convert_checkpoint.py")


def checkpoint(path, size=(32, 64), **keys):
    """A checkpoint of a small model, and the model."""
    config = get_default_config()
    config.DATA.IMG_SIZE = list(size)
    config.DATA.DATA_PATH = "/home/somebody/secret"
    config.DATA.PIXEL_RANGE, config.DATA.EXIF_ORIENTATION = "0,4095", True
    config.MODEL.NUM_CLASSES = 3
    config.MODEL.STRIP_MLP.EMBED_DIM = 8
    config.MODEL.STRIP_MLP.LAYERS = [1, 1, 1, 1]
    config.MODEL.STRIP_MLP.CGSMM_STRUCTURE = "parallel"
    for key, value in keys.items():
        config.MODEL[key] = value
    torch.manual_seed(0)
    model = build_model(config).eval()
    content = {"model": model.state_dict(), "config": leaves(config), "classes": NAMES}
    save_checkpoint(content, path)
    return path, model


@pytest.fixture
def folder(tmp_path, tool, monkeypatch, capsys):
    path, model = checkpoint(tmp_path / "best.pth")
    result = run_tool(monkeypatch, capsys, tool, path, tmp_path / "made", "--to", "timm")
    assert result.status == 0 and "32 x 64" in result.out, result.err
    return tmp_path / "made", model


IMAGES = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_timm_opens_it(folder):
    path, model = folder
    assert sorted(file.name for file in path.parent.iterdir()) == ["best.pth", "made"]
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=0, atol=0)
    cfg = loaded.pretrained_cfg
    assert cfg["label_names"] == NAMES and cfg["input_size"] == (3, 32, 64)
    data = timm.data.resolve_model_data_config(loaded)
    # Larger than 32 pixels: evaluation resizes to 256 / 224 of the size and crops.
    assert list(data["mean"]) == [0.485, 0.456, 0.406] and data["crop_pct"] == 0.875 and data["crop_mode"] == "center"
    other = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=5)
    assert other(IMAGES).shape == (2, 5)
    assert "secret" not in (path / "config.json").read_text()


@torch.no_grad()
def test_transformers_opens_it(folder):
    transformers = pytest.importorskip("transformers")
    path, model = folder
    loaded = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    torch.testing.assert_close(loaded(IMAGES).logits, model(IMAGES), rtol=0, atol=0)
    assert list(loaded.config.id2label.values()) == NAMES
    loaded.save_pretrained(path.parent / "again")  # names begin with timm_model. there
    assert torch.equal(trained_model(path.parent / "again").model(IMAGES), model(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_it_is_read_back_without_a_config(folder, name):
    path, model = folder
    trained = trained_model(path / name)
    assert trained.known_classes == NAMES and trained.config.MODEL.STRIP_MLP.CGSMM_STRUCTURE == "parallel"
    assert trained.config.DATA.PIXEL_RANGE == "0,4095" and trained.config.DATA.EXIF_ORIENTATION
    assert torch.equal(trained.model(IMAGES), model(IMAGES))


def test_evaluation_and_prediction_without_a_config(folder, monkeypatch, capsys):
    path, _ = folder
    data = write_image_folder(path.parent / "data", train=3, val=3, classes=3)
    main_eval, predict = load_tool(ROOT / "main_eval.py"), load_tool(ROOT / "tools/predict.py")
    arguments = ("--data-path", data, "--device", "cpu", "--opts", "DATA.NUM_WORKERS", 0)
    result = run_tool(monkeypatch, capsys, main_eval, "--resume", path / "model.safetensors", *arguments)
    assert result.status == 0 and "on 3 images" in result.out + result.err
    assert f"weights from {path / 'model.safetensors'}: model" in result.out + result.err
    Image.new("RGB", (50, 40)).save(path.parent / "a.png")
    result = run_tool(monkeypatch, capsys, predict, path, path.parent / "a.png", "--top-k", 1)
    assert result.status == 0 and any(name in result.out for name in NAMES)
    assert run_tool(monkeypatch, capsys, main_eval, *arguments).status == 2  # which checkpoint?


@torch.no_grad()
def test_timm_model(tmp_path, tool, monkeypatch, capsys):
    path, model = checkpoint(tmp_path / "vit.pth", (160, 160), TYPE="timm", NAME="test_vit")
    assert run_tool(monkeypatch, capsys, tool, path, tmp_path / "vit", "--to", "timm").status == 0
    loaded = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    images = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    # timm's own: no config of ours in it.
    save_for_hf(loaded, tmp_path / "theirs", safe_serialization=True, model_config={"label_names": NAMES})
    trained = trained_model(tmp_path / "theirs")
    assert torch.equal(trained.model(images), model(images)) and trained.known_classes == NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, r"normalised with mean \[0.5, 0.5, 0.5\]; accepted here"),
        ({"architecture": "no_such_model"}, "names the model 'no_such_model', which timm"),
        ({"model_args": {"depth": 2}}, "asks for arguments of strip_mlp_pico that no config has: depth"),
        ({"model_args": {"global_pool": "max"}}, "that no config has: global_pool"),
    ],
)
def test_descriptions_that_no_config_has(tmp_path, change, message):
    save_for_hf(timm.create_model("strip_mlp_pico"), tmp_path, safe_serialization=True)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, **change}))
    with pytest.raises(models.build.UserError, match=message):
        trained_model(tmp_path)


def test_nothing_is_overwritten(folder, tool, monkeypatch, capsys):
    path, _ = folder
    (path / "config.json").write_text("mine")
    (path / "notes.txt").write_text("mine")
    result = run_tool(monkeypatch, capsys, tool, path.parent / "best.pth", path, "--to", "timm")
    assert result.status == 1 and "is there already" in result.err
    assert (path / "config.json").read_text() == "mine"
    result = run_tool(monkeypatch, capsys, tool, path.parent / "best.pth", path, "--to", "timm", "--force")
    assert result.status == 0 and json.loads((path / "config.json").read_text())["num_classes"] == 3
    assert (path / "notes.txt").read_text() == "mine"


class Hub:
    """Stands in for huggingface_hub's HfApi: keeps what would be sent."""

    files: dict
    there = False

    def __init__(self, **_):
        pass

    def repo_exists(self, repo_id):
        return self.there

    def create_repo(self, repo_id, private, exist_ok):
        type(self).files = {"private": private}
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, **_):
        return False

    def upload_folder(self, repo_id, folder_path, **_):
        for name in ("config.json", "model.safetensors", "README.md"):
            with open(f"{folder_path}/{name}", "rb") as file:
                self.files[name] = file.read()

    def upload_file(self, path_or_fileobj, path_in_repo, **_):
        self.files[path_in_repo] = path_or_fileobj.read_bytes()
        return SimpleNamespace(repo_url="the address")


@torch.no_grad()
def test_hub(tmp_path, tool, monkeypatch, capsys):
    path, model = checkpoint(tmp_path / "best.pth")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(timm.models._hub, "HfApi", Hub)
    result = run_tool(monkeypatch, capsys, tool, path, "me/mine", "--to", "hub")
    assert result.status == 0 and result.out.splitlines()[-1] == "the address", result.err
    assert Hub.files["private"] and b"license: unknown" in Hub.files["README.md"]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(Hub.files[name])
    assert "num_classes" not in json.loads(Hub.files["config.json"])["model_args"]
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(IMAGES), model(IMAGES))

    monkeypatch.setattr(Hub, "there", True)
    assert "is there already" in run_tool(monkeypatch, capsys, tool, path, "me/mine", "--to", "hub").err
    monkeypatch.setattr(Hub, "repo_exists", lambda self, name: 1 / 0)
    assert "me/mine: the hub does not answer" in run_tool(monkeypatch, capsys, tool, path, "me/mine", "--to", "hub").err
    assert run_tool(monkeypatch, capsys, tool, path, "no_repository", "--to", "hub").status == 2
