"""Config files, merging and validation; errors at the entry points; the model that a config describes."""

import argparse
from pathlib import Path

import pytest
import torch
import yaml

from config import (
    ACCEPTED,
    ConfigError,
    add_arguments,
    get_config,
    get_default_config,
    leaves,
    load_config,
    save_config,
)
from lr_scheduler import lr_scale
from models import build_model, idle_keys
from utils import UserError, run_entry_point

DATASETS = ACCEPTED["DATA.DATASET"][1].split(", ")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))

# embed_dim, layers, patch_channels (q), millions of parameters
VARIANTS = {
    "tiny_light": (80, [2, 2, 6, 2], 2, 18.2),
    "tiny": (80, [2, 2, 12, 2], 2, 24.9),
    "small": (96, [2, 2, 18, 2], 4, 42.6),
    "base": (112, [2, 2, 18, 2], 4, 57.2),
}
RELEASED_DATASETS = {
    "imagenet1k": "imagenet-1k",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "caltech101": "101_ObjectCategories",
}
RECIPE = {
    "DATA.IMG_SIZE": 224,
    "DATA.INTERPOLATION": "bicubic",
    "MODEL.TYPE": "strip_mlp_layer",
    "MODEL.NUM_CLASSES": 0,
    "MODEL.DROP_PATH_RATE": 0.1,
    "MODEL.LABEL_SMOOTHING": 0.1,
    "MODEL.STRIP_MLP.PATCH_SIZE": 4,
    "MODEL.STRIP_MLP.STRIP_WIDTH": 3,
    "MODEL.STRIP_MLP.ALPHA": 3.0,
    "TRAIN.EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 5e-6,
    "TRAIN.LR_REFERENCE_BATCH": 300,
    "TRAIN.CLIP_GRAD": 5.0,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": [0.9, 0.999],
    "AUG.COLOR_JITTER": 0.4,
    "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.REPROB": 0.25,
    "AUG.REMODE": "pixel",
    "AUG.RECOUNT": 1,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.MIXUP_PROB": 1.0,
    "AUG.MIXUP_SWITCH_PROB": 0.5,
    "AUG.MIXUP_MODE": "batch",
    "TEST.CROP": True,
}


@pytest.fixture
def write(tmp_path):
    """Writes files below tmp_path and returns the path of the last."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text, encoding="utf-8")
        return path

    return write


def as_yaml(key: str, value) -> str:
    """A YAML file that sets one dotted key."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return yaml.safe_dump(value)


def parse(*command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in command])


def refused(path, opts=(), overrides=()) -> str:
    """The message that a config is refused with."""
    with pytest.raises(ConfigError) as error:
        load_config(path, opts, overrides)
    assert error.value.exit_status == 2
    assert "\n" not in str(error.value)
    return str(error.value)


# The files of configs/


@pytest.mark.parametrize("file", FILES)
def test_file_loads_and_its_dump_loads_as_the_same(file, tmp_path):
    config, notes = load_config(CONFIGS / file)
    assert notes == []
    assert config.is_frozen()
    save_config(config, tmp_path)
    again, notes = load_config(tmp_path / "config.yaml")
    assert notes == []
    assert leaves(again) == leaves(config)
    assert {key: type(value) for key, value in leaves(again).items()} == {
        key: type(value) for key, value in leaves(config).items()
    }


@pytest.mark.parametrize("dataset", RELEASED_DATASETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_released_file(variant, dataset):
    name = f"smlp_{variant}_alpha3_patch4_224_{dataset}"
    config, _ = load_config(CONFIGS / f"{name}.yaml")
    values = leaves(config)
    assert {key: values[key] for key in RECIPE} == RECIPE
    assert values["MODEL.NAME"] == name
    assert values["DATA.DATASET"] == RELEASED_DATASETS[dataset]
    geometry = [values[f"MODEL.STRIP_MLP.{name}"] for name in ("EMBED_DIM", "LAYERS", "PATCH_CHANNELS")]
    assert geometry == list(VARIANTS[variant][:3])


PEER = "BASE: base.yaml\nMODEL: {TYPE: timm, NAME: resnet50%s}"


@pytest.mark.parametrize(
    ("text", "opts", "reported"),
    [
        (PEER % "", [], []),
        (PEER % ", STRIP_MLP: {STRIP_WIDTH: 5}", [], ["STRIP_WIDTH is 5"]),
        (PEER % ", STRIP_MLP: {STRIP_WIDTH: 3}", [], []),  # the default
        (PEER % "", ["MODEL.STRIP_MLP.GRN", "False"], ["GRN is False"]),
        ("BASE: base.yaml\nMODEL: {STRIP_MLP: {BRANCHES: cgsmm}}", ["MODEL.STRIP_MLP.STRIP_WIDTH", "5"], []),
        ("BASE: base.yaml\nMODEL: {STRIP_MLP: {BRANCHES: lsmm}}", [], []),
        (
            "BASE: base.yaml\nMODEL: {STRIP_MLP: {BRANCHES: lsmm, PATCH_CHANNELS: 1}}",
            ["MODEL.STRIP_MLP.POSITION_TABLES", "False", "MODEL.STRIP_MLP.GRN", "False"],
            ["PATCH_CHANNELS is 1", "POSITION_TABLES is False"],
        ),
    ],
)
def test_values_without_effect_on_the_model(write, text, opts, reported):
    path = write(base="MODEL: {NAME: base, STRIP_MLP: {LAYERS: [1, 1, 1, 1], PATCH_CHANNELS: 2}}", run=text)
    _, notes = load_config(path, opts, idle_keys=idle_keys)
    assert [
        f"MODEL.STRIP_MLP.{words}, which changes nothing, because MODEL." in note
        for words, note in zip(reported, notes, strict=True)
    ] == [True] * len(reported), notes
    assert all(note.startswith((str(path), "--opts")) for note in notes)


# YAML files for the released code

RELEASED_YAML = """
BASE: ['']
DATA:
  DATASET: imagenet-1k
  DATA_PATH: /home/someone/imagenet
  IMG_SIZE: 224
MODEL:
  TYPE: strip_mlp_layer
  NAME: smlp_small_alpha3_patch4_224_imagenet1k
  DROP: 0.0
  DROP_RATE: 0.0
  NUM_CLASSES: 1000
  ALPHA: 2
  PATCH_NORM: True
  STRIP_MLP:
    EMBED_DIM: 96
    LAYERS: [2, 2, 18, 2]
"""


def test_released_format(write):
    path = write(released=RELEASED_YAML)
    config, notes = load_config(path, overrides=[("DATA.DATA_PATH", "/data", "--data-path")])
    assert config.MODEL.STRIP_MLP.ALPHA == 2.0
    assert config.MODEL.STRIP_MLP.EMBED_DIM == 96
    assert config.MODEL.STRIP_MLP.LAYERS == [2, 2, 18, 2]
    assert config.MODEL.NUM_CLASSES == 1000
    assert config.DATA.DATASET == "imagenet-1k"
    assert config.DATA.DATA_PATH == "/data"
    assert load_config(path)[0].DATA.DATA_PATH == "/home/someone/imagenet"
    assert len(notes) == 4
    assert all(str(path) in note for note in notes)
    for key in ("MODEL.DROP ", "MODEL.DROP_RATE ", "MODEL.PATCH_NORM "):
        assert any(key in note and "ignored" in note for note in notes)
    assert any("MODEL.ALPHA is read as MODEL.STRIP_MLP.ALPHA" in note for note in notes)


# BASE


def test_base_is_recursive_and_relative_to_its_file(tmp_path, monkeypatch):
    for folder in ("runs", "common", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "common/first.yaml").write_text("SEED: 1\nTAG: first\nPRINT_FREQ: 1\n")
    (tmp_path / "common/second.yaml").write_text("BASE: first.yaml\nTAG: second\nSAVE_FREQ: 2\n")
    (tmp_path / "runs/run.yaml").write_text("BASE: [../common/second.yaml]\nSAVE_FREQ: 3\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, _ = load_config("../runs/run.yaml")
    assert (config.SEED, config.TAG, config.SAVE_FREQ, config.PRINT_FREQ) == (1, "second", 3, 1)


@pytest.mark.parametrize("base", ["a.yaml", "b.yaml", "c.yaml"])
def test_base_in_a_circle(write, base):
    path = write(c="BASE: a.yaml", b="BASE: c.yaml", a=f"BASE: {base}")
    message = refused(path)
    assert "BASE goes in a circle" in message
    assert message.count("a.yaml") >= 2
    assert base in message


# What may not be read


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/new:os.system ['touch {marker}']",
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
    ],
)
def test_yaml_with_python_tags_is_refused_and_not_run(tmp_path, write, tag):
    marker = tmp_path / "marker"
    path = write(run=f"TAG: {tag.format(marker=marker)}")
    message = refused(path)
    assert str(path) in message
    assert "not valid YAML" in message
    assert not marker.exists()


DAMAGED = ["DATA: [", "DATA:\n\tIMG_SIZE: 3", "a: b: c", "TAG: \0", "TAG: 2024-13-01", "SEED: !!int x"]
DAMAGED += ["SEED: !!bool x", "TRAIN:\n  EPOCHS: 40\nSEED: 1\nTRAIN:\n  BASE_LR: 0.1"]  # the last: a key twice
NO_MAPPING = ["- SEED", "SEED", "3"]
NO_BASE = ["BASE: 3", "BASE: {a: b}", "BASE: [3]"]


@pytest.mark.parametrize("text", [*DAMAGED, *NO_MAPPING, *NO_BASE])
def test_yaml_that_is_no_config(write, text):
    path = write(run=text)
    said = "not valid YAML" if text in DAMAGED else "a mapping of config keys" if text in NO_MAPPING else "BASE is "
    message = refused(path)
    assert message.startswith(f"{path}: ") and said in message


# Keys


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("TRAIN.BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("DATA.BATCHSIZE", "DATA.BATCH_SIZE"),
        ("TRAIN.EPOCH", "TRAIN.EPOCHS"),
        ("EMBED_DIM", "MODEL.STRIP_MLP.EMBED_DIM"),
        ("MODEL.LAYERS", "MODEL.STRIP_MLP.LAYERS"),
        ("MODEL.STRIP_MLP.ALPHAS", "MODEL.STRIP_MLP.ALPHA"),
    ],
)
def test_unknown_key(write, key, suggestion):
    path = write(run=as_yaml(key, 3))
    message = refused(path)
    assert message == f"{path}: unknown key {key}; did you mean {suggestion}?"
    assert refused(write(empty=""), [key, "3"]) == f"--opts: unknown key {key}; did you mean {suggestion}?"


# Values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TRAIN.EPOCHS", "many"),
        ("TRAIN.EPOCHS", 1.5),
        ("TRAIN.EPOCHS", True),
        ("TRAIN.EPOCHS", [3]),
        ("TRAIN.EPOCHS", None),
        ("TRAIN.EPOCHS", "{{}}"),
        ("TRAIN.EPOCHS", "(" * 10000),
        ("TRAIN.BASE_LR", "fast"),
        ("TRAIN.BASE_LR", True),
        ("TRAIN.BASE_LR", "__import__('os').getcwd()"),
        ("TRAIN.AUTO_RESUME", 1),
        ("TRAIN.AUTO_RESUME", "yes please"),
        ("MODEL.STRIP_MLP.GRN", "perhaps"),
        ("DATA.DATA_PATH", ["a"]),
        ("DATA.DATA_PATH", None),
        ("MODEL.NAME", {"a": "b"}),
        ("MODEL.STRIP_MLP.LAYERS", 2),
        ("MODEL.STRIP_MLP.LAYERS", [2, 2, "six", 2]),
        ("MODEL.STRIP_MLP.LAYERS", [2, 2, 6.5, 2]),
        ("TRAIN.OPTIMIZER.BETAS", 0.9),
    ],
)
def test_wrong_type(write, key, value):
    path = write(run=as_yaml(key, value))
    message = refused(path)
    assert message.startswith(f"{path}: {key}")
    assert "accepted:" in message
    if isinstance(value, str):
        message = refused(write(empty=""), [key, value])
        assert message.startswith(f"--opts: {key}")
        assert "accepted:" in message


NAN, INFINITY = float("nan"), float("inf")
WORDS = [key for key, (_, words) in ACCEPTED.items() if "," in words and all(map(str.isidentifier, words.split(", ")))]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("DATA.DATASET", ["", "mnist", "cifar10"]),
        ("DATA.EMNIST_SPLIT", ["", "Balanced"]),
        ("DATA.VAL_FRACTION", [-0.1, 1, NAN]),
        ("DATA.VAL_SEED", [-1]),
        ("DATA.FOLDS", [-1, 1]),
        ("DATA.FOLD", [-1]),
        ("DATA.PIXEL_RANGE", ["", "0", "0,0", "5,1", "0,1,2", "0,inf", "0,nan"]),
        ("DATA.BATCH_SIZE", [0, -2]),
        ("DATA.IMG_SIZE", [0]),
        ("DATA.INTERPOLATION", ["cubic"]),
        ("DATA.CACHE_MODE", ["all"]),
        ("DATA.NUM_WORKERS", [-2]),
        ("MODEL.TYPE", ["smlp"]),
        ("MODEL.NAME", ["", "..", ".", "a/b"]),
        ("MODEL.NUM_CLASSES", [-1]),
        ("MODEL.DROP_PATH_RATE", [-0.1, 1, NAN]),
        ("MODEL.LABEL_SMOOTHING", [-0.1, 1, NAN]),
        ("MODEL.STRIP_MLP.PATCH_SIZE", [0]),
        ("MODEL.STRIP_MLP.IN_CHANS", [1, 4]),
        ("MODEL.STRIP_MLP.EMBED_DIM", [0, 3]),
        ("MODEL.STRIP_MLP.LAYERS", [[], [2, 2, 6], [2, 2, 6, 2, 2], [2, 2, 0, 2]]),
        ("MODEL.STRIP_MLP.PATCH_CHANNELS", [-2]),
        ("MODEL.STRIP_MLP.STRIP_WIDTH", [0, 2, -1]),
        ("MODEL.STRIP_MLP.ALPHA", [0, -1, NAN, INFINITY]),
        ("MODEL.STRIP_MLP.CGSMM_STRUCTURE", ["", "serial", "Cascade"]),
        ("MODEL.STRIP_MLP.BRANCHES", ["", "none", "cgsmm+lsmm"]),
        ("TRAIN.EPOCHS", [0]),
        ("TRAIN.WARMUP_EPOCHS", [-1, 300, 301]),
        ("TRAIN.WEIGHT_DECAY", [-0.1, NAN, INFINITY]),
        ("TRAIN.BASE_LR", [0, -1, NAN, INFINITY]),
        ("TRAIN.WARMUP_LR", [-1, NAN, INFINITY]),
        ("TRAIN.MIN_LR", [-1, NAN, INFINITY]),
        ("TRAIN.LR_REFERENCE_BATCH", [0]),
        ("TRAIN.CLIP_GRAD", [-1, NAN, INFINITY]),
        ("TRAIN.ACCUMULATION_STEPS", [0]),
        ("TRAIN.LR_SCHEDULER.NAME", ["warm"]),
        ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", [0]),
        ("TRAIN.LR_SCHEDULER.DECAY_RATE", [0, NAN]),
        ("TRAIN.LR_SCHEDULER.CYCLE_MUL", [0.5, NAN]),
        ("TRAIN.LR_SCHEDULER.WSD_DECAY", [0, 1.1]),
        ("TRAIN.OPTIMIZER.NAME", ["", "lamb 8"]),
        ("TRAIN.OPTIMIZER.EPS", [0, NAN]),
        ("TRAIN.OPTIMIZER.BETAS", [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9]]),
        ("TRAIN.OPTIMIZER.MOMENTUM", [1, -0.1]),
        ("AUG.HFLIP", [-0.1, 1.1, NAN]),
        ("AUG.COLOR_JITTER", [-0.1, INFINITY]),
        ("AUG.REPROB", [-0.1, 1.1]),
        ("AUG.REMODE", ["noise"]),
        ("AUG.RECOUNT", [0]),
        ("AUG.MIXUP", [-0.1]),
        ("AUG.CUTMIX", [-0.1]),
        ("AUG.MIXUP_PROB", [-0.1, 1.1]),
        ("AUG.MIXUP_SWITCH_PROB", [-0.1, 1.1]),
        ("AUG.MIXUP_MODE", ["image"]),
        ("DETECTION.SIZES", [[64], [64, 0], [-1, 64], [64, 64, 96], [8] * 42]),
        ("DETECTION.HEAD.ANCHORS_PER_OCTAVE", [0, 10**9]),
        ("DETECTION.HEAD.ENCODER_LAYERS", [0, 10**9]),
        ("DETECTION.HEAD.DECODER_LAYERS", [0, 10**9]),
        ("DETECTION.FIT", ["crop"]),
        ("DETECTION.FLIP", [-0.1, 1.1]),
        ("DETECTION.SCALE_JITTER", [[1.0], [2.0, 1.0], [0.0, 1.0], [0.5, INFINITY]]),
        ("AMP", ["O1"]),
        ("DEVICE", ["tpu", "cuda:0"]),
        ("DATA.DATA_PATH", ["a\0b"]),
        ("MODEL.RESUME", ["a\0b"]),
        ("OUTPUT", ["", "a\0b"]),
        ("TAG", ["", "..", "a/b", "a\nb"]),
        ("LOGGERS", [["tensorboards"], ["csv", "csv"]]),
        ("SAVE_FREQ", [0]),
        ("PRINT_FREQ", [0]),
        ("SEED", [-1]),
    ],
)
def test_out_of_range(write, key, values):
    for value in values:
        path = write(run=as_yaml(key, value))
        message = refused(path)
        assert message.startswith(f"{path}: {key} is {value!r}"), message
        assert key == "TRAIN.WARMUP_EPOCHS" or message.endswith(f"accepted: {ACCEPTED[key][1]}")
        message = refused(write(empty=""), overrides=[(key, value, "--some-flag")])
        assert message.startswith(f"--some-flag: {key} is {value!r}"), message


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("DATA.NUM_WORKERS", [-1, 0]),
        ("MODEL.DROP_PATH_RATE", [0.0, 0.99]),
        ("MODEL.STRIP_MLP.STRIP_WIDTH", [1, 3, 5, 7]),
        ("MODEL.STRIP_MLP.PATCH_CHANNELS", [-1, 0, 1]),
        ("TRAIN.WARMUP_EPOCHS", [0, 299]),
        ("TRAIN.CLIP_GRAD", [0.0]),
        ("TRAIN.OPTIMIZER.MOMENTUM", [0.0]),
        ("AUG.HFLIP", [0.0, 1.0]),
        ("AUG.AUTO_AUGMENT", ["none", "rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m5-w4-d2"]),
        *[(key, words.split(", ")) for key, (_, words) in ACCEPTED.items() if key in WORDS],
    ],
)
def test_accepted(write, key, values):
    for value in values:
        config, _ = load_config(write(run=as_yaml(key, value)))
        assert leaves(config)[key] == value


@pytest.mark.parametrize(
    ("text", "opts", "key", "value"),
    [
        ("AMP: off", [], "AMP", "off"),  # YAML 1.1 takes the first three for booleans
        ("AMP: on", [], "AMP", "on"),
        ("DATA: {CACHE_MODE: no}", [], "DATA.CACHE_MODE", "no"),
        ("TRAIN: {SYNC_BN: yes}", [], "TRAIN.SYNC_BN", True),
        ("TRAIN: {AUTO_RESUME: off}", [], "TRAIN.AUTO_RESUME", False),
        ("TRAIN: {BASE_LR: 5e-4}", [], "TRAIN.BASE_LR", 5e-4),  # and this for text
        ("TRAIN: {BASE_LR: 1}", [], "TRAIN.BASE_LR", 1.0),
        ("LOGGERS: [csv, mlflow]", [], "LOGGERS", ["csv", "mlflow"]),
        ("", ["LOGGERS", "[csv, mlflow]"], "LOGGERS", ["csv", "mlflow"]),
        ("", ["LOGGERS", "csv,mlflow"], "LOGGERS", ["csv", "mlflow"]),
        ("", ["LOGGERS", "[]"], "LOGGERS", []),
        ("TRAIN: {OPTIMIZER: {BETAS: [0, 9e-1]}}", [], "TRAIN.OPTIMIZER.BETAS", [0.0, 0.9]),
        ("TAG: 12", [], "TAG", "12"),
        ("TRAIN.EPOCHS: 40", [], "TRAIN.EPOCHS", 40),
        ("DATA:\nTRAIN: {}\nBASE: ['']", [], "TRAIN.EPOCHS", 300),
        ("", ["TRAIN.BASE_LR", "5e-4"], "TRAIN.BASE_LR", 5e-4),
        ("", ["TRAIN.EPOCHS", "40"], "TRAIN.EPOCHS", 40),
        ("", ["TRAIN.AUTO_RESUME", "false"], "TRAIN.AUTO_RESUME", False),
        ("", ["TRAIN.USE_CHECKPOINT", "TRUE"], "TRAIN.USE_CHECKPOINT", True),
        ("", ["MODEL.STRIP_MLP.LAYERS", "[1, 1, 2, 1]"], "MODEL.STRIP_MLP.LAYERS", [1, 1, 2, 1]),
        ("", ["MODEL.STRIP_MLP.LAYERS", "1,1,2,1"], "MODEL.STRIP_MLP.LAYERS", [1, 1, 2, 1]),
        ("", ["AMP", "off"], "AMP", "off"),
        ("", ["TAG", "True"], "TAG", "True"),
        ("", ["MODEL.ALPHA", "2"], "MODEL.STRIP_MLP.ALPHA", 2.0),
    ],
)
def test_type_of_a_value(write, text, opts, key, value):
    before = leaves(get_default_config())
    found = leaves(load_config(write(run=text), opts)[0])[key]
    assert (found, type(found)) == (value, type(value))
    assert leaves(get_default_config()) == before


def test_opts_that_are_no_pairs_or_name_a_section(write):
    path = write(run="")
    assert "'TAG' has no value" in refused(path, ["SEED", "1", "TAG"])
    assert "DATA is a section" in refused(path, ["DATA", "3"])
    assert "DATA is a section" in refused(write(run="DATA: 3"))


# Values that do not go together


def test_warmup_as_long_as_the_training(write):
    path = write(run="TRAIN: {EPOCHS: 30, WARMUP_EPOCHS: 30}")
    message = refused(path)
    for part in (str(path), "TRAIN.WARMUP_EPOCHS is 30", "TRAIN.EPOCHS", "30"):
        assert part in message


@pytest.mark.parametrize("dataset", DATASETS)
def test_zip_is_for_imagenet(write, dataset):
    path = write(run=f"DATA: {{DATASET: {dataset}}}")
    zipped = [("DATA.ZIP_MODE", True, "--zip")]
    if dataset.startswith("imagenet"):
        assert load_config(path, overrides=zipped)[0].DATA.ZIP_MODE
    else:
        message = refused(path, overrides=zipped)
        assert message.startswith("--zip: DATA.ZIP_MODE")
        assert dataset in message


# The command line

LAYERS = ["first base", "second base", "yaml", "opts", "flag"]


@pytest.mark.parametrize("highest", range(-1, len(LAYERS)))
def test_precedence(write, highest):
    """Each layer sets the batch size to twice its place in the order; those above `highest` do not."""
    text = [f"DATA: {{BATCH_SIZE: {2 * place + 2}}}\n" if place <= highest else "" for place in range(3)]
    path = write(one=text[0], two=text[1], run="BASE: [one.yaml, two.yaml]\n" + text[2])
    command = ["--cfg", path]
    if highest >= LAYERS.index("flag"):
        command += ["--batch-size", "10"]
    if highest >= LAYERS.index("opts"):
        command += ["--opts", "DATA.BATCH_SIZE", "8"]
    config, notes = get_config(parse(*command))
    expected = 2 * highest + 2 if highest >= 0 else 128
    assert leaves(config)["DATA.BATCH_SIZE"] == expected
    assert notes == []


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        (["--batch-size", "6"], "DATA.BATCH_SIZE", 6),
        (["--data-path", "somewhere"], "DATA.DATA_PATH", "somewhere"),
        (["--zip"], "DATA.ZIP_MODE", True),
        (["--cache-mode", "part"], "DATA.CACHE_MODE", "part"),
        (["--pretrained", "a.pth"], "MODEL.PRETRAINED", "a.pth"),
        (["--resume", "b.pth"], "MODEL.RESUME", "b.pth"),
        (["--ema"], "MODEL.LOAD_EMA", "on"),
        (["--no-ema"], "MODEL.LOAD_EMA", "off"),
        (["--accumulation-steps", "3"], "TRAIN.ACCUMULATION_STEPS", 3),
        (["--use-checkpoint"], "TRAIN.USE_CHECKPOINT", True),
        (["--amp", "bfloat16"], "AMP", "bfloat16"),
        (["--amp-opt-level", "O0"], "AMP", "off"),
        (["--amp-opt-level", "O1"], "AMP", "on"),
        (["--amp-opt-level", "O2"], "AMP", "on"),
        (["--amp-opt-level", "O1", "--amp", "float16"], "AMP", "float16"),
        (["--device", "cpu"], "DEVICE", "cpu"),
        (["--output", "out"], "OUTPUT", "out"),
        (["--tag", "trial"], "TAG", "trial"),
    ],
)
def test_flag(write, flag, key, value):
    path = write(run="")
    before = leaves(get_default_config())
    config, notes = get_config(parse("--cfg", path, *flag))
    assert leaves(config) == {**before, key: value}
    assert len(notes) == ("--amp-opt-level" in flag)
    assert all("deprecated" in note for note in notes)


@pytest.mark.parametrize("spelling", ["--local_rank=3", "--local-rank=3"])
def test_local_rank_of_old_launchers(write, spelling):
    args = parse("--cfg", write(run=""), spelling)
    assert args.local_rank == 3
    assert leaves(get_config(args)[0]) == leaves(get_default_config())


# Writing a config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TAG", "5e-4"),
        ("TAG", "12"),
        ("TAG", "off"),
        ("TAG", "null"),
        ("TAG", "# no comment: 'quoted' \"twice\""),
        ("TAG", "größer 試"),
        ("DATA.DATA_PATH", "/data/with spaces/a: b\\c"),
        ("TRAIN.BASE_LR", 1e-05),
        ("TRAIN.BASE_LR", 1 / 3),
        ("TRAIN.OPTIMIZER.EPS", 1e-300),
        ("MODEL.STRIP_MLP.LAYERS", [1, 2, 3, 4]),
    ],
)
def test_saved_config_loads_as_the_same(write, tmp_path, key, value):
    config, _ = load_config(write(run=""), overrides=[(key, value, "test")])
    save_config(config, tmp_path)
    again, _ = load_config(tmp_path / "config.yaml")
    assert leaves(again) == leaves(config)
    assert leaves(again)[key] == value


def test_save_config_keeps_a_different_one(write, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_bytes(b"\xff\xfe")  # no text
    for seed in (1, 1, 2):
        save_config(load_config(write(run=f"SEED: {seed}"))[0], folder)
    assert (folder / "config_old1.yaml").read_bytes() == b"\xff\xfe"
    assert [load_config(folder / name)[0].SEED for name in ("config_old2.yaml", "config.yaml")] == [1, 2]


# Errors at the entry points


def test_error_is_one_message_and_an_exit_status(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def fail(error):
        raise error

    for error, status in ((UserError("the path x"), 1), (ConfigError("the path x"), 2)):
        with pytest.raises(SystemExit) as leaving:
            run_entry_point(lambda error=error: fail(error))
        assert leaving.value.code == status
        assert capsys.readouterr() == ("", "error: the path x\n")


# The model of a config


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_of_a_released_file(variant):
    """Also without PATCH_CHANNELS, which YAML files for the released code do not have."""
    _, _, patch_channels, parameters = VARIANTS[variant]
    path = CONFIGS / f"smlp_{variant}_alpha3_patch4_224_imagenet1k.yaml"
    config, _ = load_config(path, ["MODEL.NUM_CLASSES", "1000", "MODEL.STRIP_MLP.PATCH_CHANNELS", "0"])
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.051)
    assert model.stages[0][0].token_mixing.cgsmm.strip_h.q == patch_channels


def test_peak_learning_rate_of_the_paper():
    config, _ = load_config(CONFIGS / "smlp_tiny_alpha3_patch4_224_imagenet1k.yaml")
    assert config.TRAIN.BASE_LR * lr_scale(config, world_size=8) == pytest.approx(1.7e-3, rel=0.005)


def test_model_takes_every_key(write):
    path = write(
        run="""
        DATA: {IMG_SIZE: 64}
        MODEL:
          NUM_CLASSES: 7
          DROP_PATH_RATE: 0.25
          STRIP_MLP: {PATCH_SIZE: 2, EMBED_DIM: 16, LAYERS: [1, 2, 1, 1], PATCH_CHANNELS: 8, STRIP_WIDTH: 5, ALPHA: 1.5}
        TRAIN: {USE_CHECKPOINT: True}
        """
    )
    model = build_model(load_config(path)[0])
    assert model.img_size == (64, 64)
    assert model.patch_embed.kernel_size == (2, 2)
    assert model.patch_embed.in_channels == 3
    assert [len(stage) for stage in model.stages] == [1, 2, 1, 1]
    block = model.stages[0][0]
    assert block.token_mixing.cgsmm.strip_h.weight.shape == (1, 32, 32, 5)  # q = C' = 8: one patch
    assert block.channel_mixing.mlp.fc1.out_features == 24
    assert block.drop_path.drop_prob == 0.25
    assert model.get_classifier().out_features == 7
    assert model.grad_checkpointing


@pytest.mark.filterwarnings("ignore:vgg11 has no stochastic depth")
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.2])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vgg11"])
def test_any_timm_model(write, name, drop_path_rate):
    keys = f"TYPE: timm, NAME: {name}, NUM_CLASSES: 5, DROP_PATH_RATE: {drop_path_rate}"
    path = write(run=f"DATA: {{IMG_SIZE: 64}}\nMODEL: {{{keys}}}")
    # VGG for its size; older timm cannot build the others there.
    with torch.device("meta" if name == "vgg11" else "cpu"):
        model = build_model(load_config(path)[0])
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_timm_model_without_stochastic_depth_says_so(write):
    path = write(run="MODEL: {TYPE: timm, NAME: vgg11, NUM_CLASSES: 5, DROP_PATH_RATE: 0.3}")
    with torch.device("meta"), pytest.warns(UserWarning, match=r"vgg11.*MODEL\.DROP_PATH_RATE"):
        build_model(load_config(path)[0])


def test_folds(write):
    path = write(run="DATA: {FOLDS: 3, FOLD: 2}")
    assert load_config(path)[0].DATA.FOLD == 2
    assert refused(path, ["DATA.FOLD", "3"]).endswith("accepted: 0 to 2")
    message = refused(path, ["DATA.VAL_FRACTION", "0.1"])
    assert "DATA.FOLDS is 3" in message and "DATA.VAL_FRACTION is 0.1; accepted: one of them" in message
