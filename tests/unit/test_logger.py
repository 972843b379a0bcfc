"""The console, the log files, and the metrics of a run."""

import io
import json
import logging
import re
import sys

import numpy as np
import pytest
import termcolor
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from data.device import Normalize, denormalize
from logger import MetricsLog, create_logger
from tests.helpers import TINY, python

ESCAPE = "\033["


@pytest.fixture(autouse=True)
def no_colors_of_the_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "ANSI_COLORS_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quiet() -> logging.Logger:
    """A logger that keeps its messages in `messages`."""
    logger = logging.Logger("quiet")
    logger.messages = []
    logger.handle = lambda record: logger.messages.append(record.getMessage())
    return logger


# Lines


def test_file_is_appended_to(tmp_path):
    for i in range(2):
        logger = create_logger("test-append", 0, tmp_path)
        logger.info(f"run {i}")
        logger.warning("größer 試")
    lines = (tmp_path / "log_rank0.txt").read_text(encoding="utf-8").splitlines()
    assert [re.sub(r"^[\d-]+ [\d:,]+ ", "", line) for line in lines] == [
        "INFO run 0",
        "WARNING größer 試",
        "INFO run 1",
        "WARNING größer 試",
    ]


def test_each_rank_has_its_file_and_only_rank_0_the_console(tmp_path, capsys):
    for rank in (0, 1):
        create_logger("test-ranks", rank, tmp_path).info(f"from rank {rank}")
    for rank in (0, 1):
        assert (tmp_path / f"log_rank{rank}.txt").read_text().endswith(f"INFO from rank {rank}\n")
    out, err = capsys.readouterr()
    assert "from rank 0" in out
    assert "from rank 1" not in out + err


def test_warnings_of_other_ranks_are_seen(tmp_path, capsys):
    create_logger("test-alarm", 3, tmp_path).warning("disk nearly full")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "[rank 3] WARNING: disk nearly full\n"


def test_without_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_logger("test-no-folder").info("hello")
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello\n", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_debug_messages_and_other_loggers_stay_out(capsys, caplog):
    create_logger("test-level").debug("details")
    create_logger("test-level").info("propagated?")
    assert "details" not in capsys.readouterr().out
    assert caplog.records == []


def test_one_name_twice_logs_each_line_once(tmp_path, capsys):
    create_logger("test-twice", 0, tmp_path)
    create_logger("test-twice", 0, tmp_path).info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "log_rank0.txt").read_text().count("hello") == 1


def forget_terminal() -> None:
    """Some versions of termcolor remember whether there is a terminal."""
    getattr(getattr(termcolor, "can_colorize", None), "cache_clear", lambda: None)()


@pytest.mark.parametrize(
    ("terminal", "variable", "colored"),
    [
        (True, None, True),
        (False, None, False),
        (True, "NO_COLOR", False),
        (False, "FORCE_COLOR", True),
    ],
)
def test_colors_are_for_terminals(tmp_path, capsys, monkeypatch, terminal, variable, colored):
    forget_terminal()
    monkeypatch.setenv("TERM", "xterm")
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("os.isatty", lambda descriptor: terminal)
    logger = create_logger("test-colors", 0, tmp_path)
    logger.info("plain")
    logger.warning("yellow")
    out = capsys.readouterr().out
    assert (ESCAPE in out) == colored
    assert "warning: yellow" in out
    assert ESCAPE not in (tmp_path / "log_rank0.txt").read_text()
    forget_terminal()


# Metrics


def epochs(folder) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_epochs(folder, logger, first: int, last: int, done: int) -> None:
    log = MetricsLog(folder, done, logger)
    for epoch in range(first, last + 1):
        log.write({"epoch": epoch, "train_loss": 1 / epoch, "top1": 10.0 * epoch, "images": 7})
    log.close()


def test_metrics_are_lines_of_json(tmp_path, quiet):
    write_epochs(tmp_path, quiet, 1, 3, done=0)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"epoch": epoch, "train_loss": 1 / epoch, "top1": 10.0 * epoch, "images": 7} for epoch in (1, 2, 3)
    ]
    assert quiet.messages == []


def test_metrics_that_are_no_numbers_are_json_still(tmp_path, quiet):
    """As null: JSON proper has no NaN, which val_loss is where no image could be read."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    log = MetricsLog(tmp_path, 0, quiet)
    log.write({"epoch": 1, "top1": 0.0, "val_loss": float("nan"), "lr": float("inf")})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"epoch": 1, "top1": 0.0, "val_loss": None, "lr": None}
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["top1"]


def test_each_line_is_written_at_once(tmp_path, quiet):
    log = MetricsLog(tmp_path, 0, quiet)
    for epoch in (1, 2, 3):
        log.write({"epoch": epoch, "top1": 3.0})
        assert epochs(tmp_path)[-1] == epoch
        assert EventAccumulator(str(tmp_path)).Reload().Scalars("top1")[-1].step == epoch
    log.close()


def test_epochs_that_are_trained_again_are_removed(tmp_path, quiet):
    write_epochs(tmp_path, quiet, 1, 5, done=0)
    MetricsLog(tmp_path, 3, quiet).close()
    assert epochs(tmp_path) == [1, 2, 3]
    assert len(quiet.messages) == 1
    assert "2 lines about epochs after 3" in quiet.messages[0]
    assert not (tmp_path / "metrics.tmp").exists()
    write_epochs(tmp_path, quiet, 4, 6, done=3)
    assert epochs(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("done", [3, 5])
def test_epochs_that_are_done_stay(tmp_path, quiet, done):
    write_epochs(tmp_path, quiet, 1, 3, done=0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    MetricsLog(tmp_path, done, quiet).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert quiet.messages == []


def test_last_line_that_was_cut_off_is_removed(tmp_path, quiet):
    """Wherever it was cut, up to its line feed."""
    path = tmp_path / "metrics.jsonl"
    write_epochs(tmp_path, quiet, 1, 3, done=0)
    text = path.read_text()
    start = text.rindex("\n", 0, -1) + 1
    for cut in range(start + 1, len(text)):
        path.write_text(text[:cut])
        log = MetricsLog(tmp_path, 2, quiet)
        log.write({"epoch": 3, "top1": 3.0})
        log.close()
        assert epochs(tmp_path) == [1, 2, 3]


def test_tensorboard(tmp_path, quiet):
    write_epochs(tmp_path, quiet, 1, 3, done=0)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["images", "top1", "train_loss"]
    assert [(event.step, event.value) for event in events.Scalars("top1")] == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_tensorboard_forgets_epochs_that_are_trained_again(tmp_path, quiet):
    write_epochs(tmp_path, quiet, 1, 3, done=0)
    log = MetricsLog(tmp_path, 1, quiet)
    log.write({"epoch": 2, "top1": -1.0})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("top1")] == [(1, 10.0), (2, -1.0)]


def events_of(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_shows_images_as_they_were(tmp_path, quiet):
    """Without the normalisation, and no more than make a legible grid."""
    world = torch.device("cpu")
    pixels = torch.randint(0, 256, (70, 3, 8, 12), dtype=torch.uint8)
    log = MetricsLog(tmp_path, 0, quiet)
    log.write_images("first batch", denormalize(Normalize(world)(pixels)))
    log.close()
    (image,) = events_of(tmp_path).Images("first batch")
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert shown.shape == (8 * (8 + 2) + 2, 8 * (12 + 2) + 2, 3)  # 8 x 8 of them, 2 pixels apart
    second = shown[2:10, 16:28].astype(int)
    assert abs(second - pixels[1].permute(1, 2, 0).numpy()).max() <= 1


def test_tensorboard_shows_how_weights_are_distributed(tmp_path, quiet):
    log = MetricsLog(tmp_path, 0, quiet)
    log.write_histograms("weights", {"strip_h": torch.linspace(-2, 6, 500).bfloat16()}, 7)
    log.close()
    (event,) = events_of(tmp_path).Histograms("weights/strip_h")
    histogram = event.histogram_value
    assert event.step == 7 and histogram.num == 500 and (histogram.min, histogram.max) == (-2, 6)
    assert len(histogram.bucket) <= 70


def test_hyper_parameters_of_a_run(tmp_path):
    """All that a person compares runs by, at the end of the ordinary command."""
    command = ("main.py", "--cfg", "configs/strip_mlp_pico_digits.yaml", "--output", tmp_path)
    python(*command, "--opts", *TINY, "TRAIN.BASE_LR", 0.125)
    folder = tmp_path / "strip_mlp_pico_digits/default"
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(value)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["final/top1"][0].tensor.float_val[0] == pytest.approx(last["top1"])
    assert "training images as the model gets them" in found
    assert "token mixing weights/stages.0.0.token_mixing.cgsmm.strip_h" in found
    start = HParamsPluginData.FromString(
        found["_hparams_/session_start_info"][0].metadata.plugin_data.content
    ).session_start_info
    assert start.hparams["TRAIN.BASE_LR"].number_value == 0.125
    assert start.hparams["MODEL.STRIP_MLP.LAYERS"].string_value == "[1, 1, 1, 1]"
