"""Checkpoints: what is left when writing fails, what is refused when reading, which weights are loaded where."""

import collections
import io
import logging
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from yacs.config import CfgNode

from models import StripMLP
from runtime.checkpoint import (
    FORMAT,
    CheckpointError,
    classifier_names,
    find_weights,
    load_pretrained,
    load_weights,
    read_checkpoint,
    read_training_state,
    save_checkpoint,
)


def strip_mlp(seed: int = 0, num_classes: int = 5, **arguments) -> StripMLP:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1), "patch_channels": 2}
    return StripMLP(num_classes=num_classes, **{**sizes, **arguments})


def vit(seed: int = 0, num_classes: int = 5):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **sizes)


MODELS = {"strip_mlp": strip_mlp, "vit": vit}


@pytest.fixture(params=MODELS)
def build(request):
    return MODELS[request.param]


def save(path: Path, content, **options) -> Path:
    torch.save(content, path, **options)
    return path


def copies(state: dict) -> dict:
    return {name: value.clone() for name, value in state.items()}


def assert_same_weights(model, expected: dict, but=()) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) != (name in but), name


# Writing


def test_save_and_read(tmp_path):
    state = {"format": FORMAT, "model": {"a": torch.arange(3.0)}, "epoch": 3, "config": {"LAYERS": [1, 2.5, "x", None]}}
    names = [tmp_path / name for name in ("best.pth", "ckpt_epoch_3.pth", "last.pth")]
    names[1].write_bytes(b"an older one")
    save_checkpoint(state, *names)
    assert sorted(tmp_path.iterdir()) == names
    for path in names:
        content = read_checkpoint(path)
        assert torch.equal(content["model"].pop("a"), torch.arange(3.0))
        assert content == {**state, "model": {}}


def test_names_share_the_space(tmp_path):
    save_checkpoint({"epoch": 1}, tmp_path / "best.pth", tmp_path / "last.pth")
    assert os.path.samefile(tmp_path / "best.pth", tmp_path / "last.pth")
    save_checkpoint({"epoch": 2}, tmp_path / "last.pth")
    assert read_checkpoint(tmp_path / "best.pth") == {"epoch": 1}
    assert read_checkpoint(tmp_path / "last.pth") == {"epoch": 2}


def test_without_hard_links(tmp_path, monkeypatch):
    def no_link(*args, **kwargs):
        raise OSError("no hard links on this file system")

    monkeypatch.setattr(os, "link", no_link)
    for epoch in (1, 2):
        save_checkpoint({"epoch": epoch}, tmp_path / "best.pth", tmp_path / "last.pth")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "last.pth"]
        for name in ("best.pth", "last.pth"):
            assert read_checkpoint(tmp_path / name) == {"epoch": epoch}
    assert not os.path.samefile(tmp_path / "best.pth", tmp_path / "last.pth")


def test_left_over_that_is_a_second_name_of_the_best_checkpoint(tmp_path):
    """What a kill between the two names leaves; the next save must not write through it."""
    save_checkpoint({"epoch": 1}, tmp_path / "best.pth")
    os.link(tmp_path / "best.pth", tmp_path / ".last.pth.tmp")
    save_checkpoint({"epoch": 2}, tmp_path / "last.pth")
    assert read_checkpoint(tmp_path / "best.pth") == {"epoch": 1}
    assert read_checkpoint(tmp_path / "last.pth") == {"epoch": 2}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs to see which file a descriptor is of")
@pytest.mark.parametrize("links", [True, False])
def test_file_is_on_the_disk_before_it_gets_a_name(tmp_path, monkeypatch, links):
    synced, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(path)
        if path != tmp_path:
            assert read_checkpoint(path) == {"epoch": 1}  # all of it has left Python's buffers
        fsync(descriptor)

    def checked_replace(source, name):
        assert any(os.path.samefile(source, path) for path in synced if path.exists()), name
        replace(source, name)

    def no_link(*args, **kwargs):
        raise OSError("no hard links on this file system")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", checked_replace)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    save_checkpoint({"epoch": 1}, tmp_path / "best.pth", tmp_path / "last.pth")
    assert synced[-1] == tmp_path  # the names


def failing_save(state, file):
    file.write(b"half of it")
    raise RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0")


def failing_fsync(descriptor):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("function", "failure"), [("torch.save", failing_save), ("os.fsync", failing_fsync)], ids=["save", "fsync"]
)
def test_failed_write_leaves_the_files_before(tmp_path, monkeypatch, function, failure):
    names = tmp_path / "best.pth", tmp_path / "last.pth"
    save_checkpoint({"epoch": 1}, *names)
    before = [path.read_bytes() for path in names]
    monkeypatch.setattr(function, failure)
    with pytest.raises(CheckpointError, match=str(tmp_path / "last.pth")) as error:
        save_checkpoint({"epoch": 2}, *names)
    assert str(error.value.__cause__) in str(error.value)
    assert [path.read_bytes() for path in names] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "last.pth"]


# Reading


def state_bytes(**options) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": {"weight": torch.arange(100.0)}}, stream, **options)
    return stream.getvalue()


DAMAGED = {
    "empty": b"",
    "one byte": b"a",
    "text": b"epoch 1: loss 3.4\n",
    "web page": b"<!DOCTYPE html><html>not found</html>",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "zeros": bytes(5000),
    **{f"first {n} bytes": state_bytes()[:n] for n in (10, 300, 1000)},
    **{f"first {n} bytes, legacy": state_bytes(_use_new_zipfile_serialization=False)[:n] for n in (10, 50, 120, 400)},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: not a checkpoint, or damaged")
    assert error.value.exit_status == 1


# Finding the weights


def test_released_format(tmp_path):
    """Released Strip-MLP and Swin-style files carry their config as a yacs node, with nodes in it."""
    model = strip_mlp()
    config = CfgNode({"MODEL": {"NAME": "smlp", "LAYERS": [2, 2, 6, 2]}, "BASE": [""]})
    content = {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 299, "config": config}
    content["max_accuracy"] = 81.2
    path = save(tmp_path / "released.pth", content)
    read = read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):  # what lets a CfgNode in holds while reading only
        torch.load(path, weights_only=True)
    assert read["epoch"] == 299
    assert read["config"]["MODEL"]["LAYERS"] == [2, 2, 6, 2]
    other = strip_mlp(seed=1)
    assert load_weights(other, read, path).fresh == []
    assert_same_weights(other, model.state_dict())


WRAPPERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "arch": "x"},
    "OrderedDict": lambda state: collections.OrderedDict(state),
}
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_weights(tmp_path, build, wrapper, prefix):
    expected = build().state_dict()
    path = save(tmp_path / "a.pth", WRAPPERS[wrapper]({prefix + name: value for name, value in expected.items()}))
    model = build(seed=1)
    assert load_weights(model, read_checkpoint(path), path).fresh == []
    assert_same_weights(model, expected)


@pytest.mark.parametrize("content", [{}, {"epoch": 1, "config": {}}, {"model": {}}, {"model": {"a": 3}}])
def test_no_weights(content):
    with pytest.raises(CheckpointError, match=r"x\.pth: holds no weights"):
        find_weights(content, "x.pth")


# Loading weights


def test_half_precision_weights_are_loaded(build):
    expected = {n: v.half() if v.is_floating_point() else v for n, v in build().state_dict().items()}
    model = build(seed=1)
    load_weights(model, expected, "x.pth")
    assert_same_weights(model, {name: value.to(model.state_dict()[name].dtype) for name, value in expected.items()})


def test_all_weights_that_do_not_fit_are_listed(build):
    model = build()
    before = copies(model.state_dict())
    names = [name for name, _ in model.named_parameters() if name not in classifier_names(model)]
    missing, reshaped = names[0], names[-1]
    weights = copies(build(seed=1).state_dict())
    del weights[missing]
    weights[reshaped] = torch.zeros(2, 3, 7)
    weights["surplus.weight"] = torch.zeros(1)
    for new_classifier in (False, True):
        with pytest.raises(CheckpointError) as error:
            load_weights(model, {"model": weights}, "x.pth", new_classifier)
        shape = tuple(before[reshaped].shape)
        for part in (
            "x.pth: does not fit",
            type(model).__name__,
            f"missing: {missing}",
            "not in the model: surplus.weight",
            f"other shape: {reshaped} (2, 3, 7), not {shape}",
        ):
            assert part in str(error.value)
    assert_same_weights(model, before)


# Fine-tuning


@pytest.fixture
def log():
    """A logger and the list of its messages."""
    messages = []
    logger = logging.Logger("test")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: messages.append(record.getMessage())
    return logger, messages


def test_pretrained_with_other_classes_starts_only_the_classifier_anew(tmp_path, build, log):
    source = build(seed=1, num_classes=7).state_dict()
    path = save(tmp_path / "a.pth", {"model": source})
    model = build(num_classes=5)
    head = classifier_names(model)
    assert len(head) == 2
    fresh = {name: copies(model.state_dict())[name] for name in head}
    load_pretrained(model, path, log[0])
    assert_same_weights(model, {**source, **fresh})
    assert log[1][0] == f"pretrained weights from {path}: model"
    for part in (*head, "5 classes"):
        assert part in log[1][1]


# Training states


def training_content(**other) -> dict:
    """What a run writes, without weights."""
    progress = {"step": 3, "trained": False, "skipped": 1, "skipped_in_row": 0, "seconds": 1.5, "buffers": None}
    ranks = {"losses": torch.ones(2, 2, dtype=torch.float64), "unreadable": torch.zeros(2, dtype=torch.int64)}
    config = {"DATA.BATCH_SIZE": 4, "TRAIN.ACCUMULATION_STEPS": 1, "TRAIN.OPTIMIZER.NAME": "adamw"}
    return {
        "format": FORMAT,
        "run": "a",
        "model": {},
        "optimizer": {},
        "scaler": {},
        "epoch": 3,
        "best": {"top1": 3.5, "epoch": 2},
        "progress": {**progress, **ranks},
        "config": config,
        "processes": 2,
        "images": 40,
        **other,
    }


def test_training_state(tmp_path):
    state = training_content()
    assert str(read_training_state(save(tmp_path / "a.pth", state))) == str(state)


def test_training_state_of_the_first_format(tmp_path):
    state = training_content(format=1)
    for key in ("run", "progress", "processes", "images"):
        del state[key]
    found = read_training_state(save(tmp_path / "a.pth", state))
    assert found["epoch"] == 3
    assert (found["run"], found["processes"], found["images"]) == (None, None, None)
    assert (found["progress"]["step"], found["progress"]["trained"]) == (0, False)


RELEASED = {"model": {}, "optimizer": {}, "lr_scheduler": {}, "epoch": 3}


@pytest.mark.parametrize("content", [{"patch_embed.weight": torch.zeros(1)}, RELEASED, {"format": FORMAT, "model": {}}])
def test_file_without_a_training_state(tmp_path, content):
    path = save(tmp_path / "a.pth", content)
    with pytest.raises(CheckpointError) as error:
        read_training_state(path)
    for part in (str(path), "no training state", "--pretrained", "main_eval.py", next(iter(content))):
        assert part in str(error.value)
