"""The benchmark of the input pipeline: what it measures is what the loaders do, and it ends in two files."""

import json
import time

import pytest
import torch
from bench import data as benchmark_data

from config import ConfigError, load_config
from data.sources import FolderSource
from data.transforms import RandomResizedCrop, build_transform
from runtime.distributed import World
from tests.helpers import ROOT, python, write_image_folder
from utils import UserError, seed_all

# torchvision's decoders, one of the alternatives.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")]

PICO = str(ROOT / "configs/strip_mlp_pico_digits.yaml")
ALONE = World(0, 0, 1, torch.device("cpu"))
SMALL = ("--images", "4", "--seconds", "0.05", "--batch-size", "4")
SMALL_MODEL = ("DATA.IMG_SIZE", "64", "MODEL.STRIP_MLP.EMBED_DIM", "8", "MODEL.STRIP_MLP.LAYERS", "[1, 1, 1, 1]")
SMALL_MODEL += ("MODEL.STRIP_MLP.PATCH_CHANNELS", "2")


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "data", train=6, val=2)


@pytest.fixture
def source(folder):
    return FolderSource(folder / "train")


def training_config(**values):
    opts = ["DATA.IMG_SIZE", "48", "DATA.DATASET", "imagenet", "DATA.BATCH_SIZE", "2"]
    opts += [text for key, value in values.items() for text in (key.replace("__", "."), str(value))]
    return load_config(ROOT / "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml", opts)[0]


def test_from_no_data_to_two_files(tmp_path):
    """With made images and a real step, as a command."""
    output = tmp_path / "new/result.json"
    command = ("tools/benchmark.py", "--data", *SMALL, "--cfg", PICO, "--output", output, "--workers", 0, 1)
    done = python(*command, "--opts", *SMALL_MODEL)
    assert "making 4 photograph-like JPEGs" in done.stdout
    result = json.loads(output.read_text())
    assert list(result["parts"]) == ["500 x 375 pixels", "1500 x 1000 pixels"]
    assert 60 < result["parts"]["500 x 375 pixels"]["kilobytes_per_file"] < 110
    for size in result["parts"].values():
        assert len(size["milliseconds"]) == len(benchmark_data.PIPELINES)
        for row in size["milliseconds"].values():
            assert list(row) == [*benchmark_data.PARTS, "whole"]
            for values in row.values():
                assert 0 < values["quartile1"] <= values["median"] <= values["quartile3"]
    assert [row["workers"] for row in result["loader"]] == [0, 1]
    assert all(row["images_per_second"] == row["per_worker"] > 0 for row in result["loader"])
    assert [row["workers"] for row in result["waiting"]] == [0, 1]
    for row in result["waiting"]:
        assert row["step"] == "strip_mlp_pico_digits on cpu"
        assert 0 < row["data_wait"] < 1
        assert row["step_images_per_second"] > 0
    assert result["machine"]["gpu"] is None
    assert result["command"].startswith("python tools/benchmark.py --data --images 4 ")

    text = (tmp_path / "new/result.md").read_text()
    assert text in done.stdout
    for part in (
        result["command"],
        "500 x 375",
        "1500 x 1000",
        "(default here)",
        "The loader alone",
        "waiting for data",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--workers", "-1"), ["--workers", "'-1'", "a whole number of 0 or more"]),
        (("--workers", "1.5"), ["--workers", "'1.5'", "a whole number"]),
        (("--images", "0"), ["--images", "'0'", "1 or more"]),
        (("--seconds", "0"), ["--seconds", "'0'", "a number above 0"]),
        (("--seconds", "nan"), ["--seconds", "'nan'"]),
        (("--seconds", "inf"), ["--seconds", "'inf'"]),
        (("--step-images-per-second", "fast"), ["--step-images-per-second", "'fast'", "a number above 0"]),
        (("--batch-size", "0"), ["--batch-size", "'0'", "1 or more"]),
        (("--output", "result.md"), ["--output", "result.md", ".json"]),
        (("--outptu", "result.json"), ["--outptu"]),
    ],
)
def test_arguments_that_are_refused(arguments, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark_data.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_data_and_configs_that_cannot_be_used(folder, tmp_path):
    output = ("--output", str(tmp_path / "a.json"))
    with pytest.raises(UserError, match=r"--data-path .*/train: no folder train/"):
        benchmark_data.main([*SMALL, *output, "--data-path", str(folder / "train")])
    with pytest.raises(ConfigError, match=r"DATA\.IMG_SIZE is 28.*more than 32"):
        benchmark_data.main([*SMALL, *output, "--cfg", PICO, "--opts", "DATA.IMG_SIZE", "28"])
    with pytest.raises(UserError, match=r"data: cannot be written"):
        benchmark_data.main([*SMALL, "--output", str(folder / "train/class0/train_000.jpg/data/a.json")])
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 4 images can be read"):
        benchmark_data.main([*SMALL, *output, "--data-path", str(folder)])


def run(pipeline, seed: int) -> torch.Tensor:
    seed_all(seed)
    value = 0
    for part in pipeline.parts():
        value = part(value)
    return value


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_the_loaders_pipeline_is_what_is_measured(monkeypatch, source, by_torch, interpolation):
    monkeypatch.setattr(RandomResizedCrop, "by_torch", by_torch)
    config = training_config(DATA__INTERPOLATION=interpolation)
    transform = build_transform(config, is_train=True)
    kind = benchmark_data.PyTorchResize if by_torch else benchmark_data.Pipeline
    for seed in range(5):
        found = run(kind(config, source), seed)
        seed_all(seed)
        assert torch.equal(found, transform(source.load(0)))


def test_alternatives_give_the_same_image(tmp_path):
    """But for rounding, and with draft for the decoder's filter."""
    benchmark_data.write_photographs(tmp_path, 2, (700, 500))
    source = FolderSource(tmp_path / "train")
    config = training_config(AUG__AUTO_AUGMENT="none", AUG__COLOR_JITTER=0.0, AUG__REPROB=0.0)
    pipelines = set(benchmark_data.PIPELINES)
    assert pipelines >= {benchmark_data.PyTorchResize, benchmark_data.Draft, benchmark_data.NormalizedFloats}
    for seed in range(5):
        expected = run(benchmark_data.Pipeline(config, source), seed)
        for kind in pipelines - {benchmark_data.Draft, benchmark_data.NormalizedFloats}:
            assert (run(kind(config, source), seed).float() - expected).abs().mean() < 0.1
        # Of a crop that is much reduced, the decoder's share of the reduction is another filter.
        assert (run(benchmark_data.Draft(config, source), seed).float() - expected).abs().mean() < 5
        floats = run(benchmark_data.NormalizedFloats(config, source), seed)
        assert floats.dtype == torch.float32
        assert floats.abs().max() < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_waits_for_a_loader_that_is_slower(source, workers):
    class Slow(benchmark_data.Repeated):
        def load(self, index):
            time.sleep(0.02)
            return super().load(index)

    slow = Slow(source, [0, 1, 2], 1000)
    # Batches of two take the loader at least 40 ms per process.
    for speed, low, high in ((2000, 0.75, 1.0), (5, 0.0, 0.35)):
        found = benchmark_data.feed(training_config(), slow, ALONE, workers, 0.3, benchmark_data.pause(speed))
        assert low <= found.waited / found.seconds <= high
        assert found.images % 2 == 0
        assert found.images / found.seconds < 60 * max(1, workers)
