"""The console, the log files, and the metrics of a run."""

import json
import logging
import math
import re
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import termcolor
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from logger import ALL_RANKS, FILE_ONLY, MetricsLog, check_trackers, create_logger
from utils import UserError

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
        logger = create_logger("test-append", 0, tmp_path)  # the second one in place of the first
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
        logger = create_logger("test-ranks", rank, tmp_path)
        logger.info(f"from rank {rank}")
        logger.warning(f"{rank} is alone")
        logger.warning("all say so", extra=ALL_RANKS)
        logger.warning("in the file", extra=FILE_ONLY)
        lines = (tmp_path / f"log_rank{rank}.txt").read_text()
        for text in (f"INFO from rank {rank}\n", f"WARNING {rank} is alone\n", "all say so", "in the file"):
            assert lines.count(text) == 1
    out, err = capsys.readouterr()
    assert out.count("from rank 0") == out.count("0 is alone") == out.count("all say so") == 1
    assert "rank 1" not in out and "in the file" not in out
    assert err == "[rank 1] WARNING: 1 is alone\n"


def forget_terminal() -> None:
    """Some versions of termcolor remember whether there is a terminal."""
    getattr(getattr(termcolor, "can_colorize", None), "cache_clear", lambda: None)()


@pytest.mark.parametrize(
    ("terminal", "variable", "colored"),
    [(True, None, True), (False, None, False), (True, "NO_COLOR", False), (False, "FORCE_COLOR", True)],
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


def test_metrics_that_are_not_finite_are_null(tmp_path, quiet):
    """JSON has no NaN, which val_loss is if no image could be read."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    log = MetricsLog(tmp_path, 0, quiet)
    log.write({"epoch": 1, "top1": 0.0, "val_loss": float("nan"), "lr": float("inf")})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"epoch": 1, "top1": 0.0, "val_loss": None, "lr": None}
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["top1"]


def test_epochs_that_are_trained_again_are_removed(tmp_path, quiet):
    write_epochs(tmp_path, quiet, 1, 5, done=0)
    assert quiet.messages == []
    MetricsLog(tmp_path, 3, quiet).close()
    assert epochs(tmp_path) == [1, 2, 3]
    assert len(quiet.messages) == 1
    assert "2 lines about epochs after 3" in quiet.messages[0]
    assert not (tmp_path / "metrics.tmp").exists()
    write_epochs(tmp_path, quiet, 4, 6, done=3)
    assert epochs(tmp_path) == [1, 2, 3, 4, 5, 6]


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


def test_tensorboard_forgets_epochs_that_are_trained_again(tmp_path, quiet):
    write_epochs(tmp_path, quiet, 1, 3, done=0)
    log = MetricsLog(tmp_path, 1, quiet)
    log.write({"epoch": 2, "top1": -1.0})
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("top1")] == [(1, 10.0), (2, -1.0)]


# Trackers


def test_csv_has_the_columns_of_all_epochs(tmp_path, quiet):
    log = MetricsLog(tmp_path, 0, quiet, ["csv"])
    log.write({"epoch": 1, "train_loss": 0.5})
    log.write({"epoch": 2, "train_loss": 0.25, "top1": 10.0})
    log.close()
    MetricsLog(tmp_path, 1, quiet, ["csv"]).write({"epoch": 2, "top1": 20.0})  # trained again
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,train_loss,top1", "1,0.5,", "2,,20.0"]
    assert not list(tmp_path.glob("events*"))


def stand_in_for_wandb(monkeypatch) -> list:
    """Its calls, in order."""
    calls = []

    class Run:
        summary: ClassVar = {}

        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda pixels: pixels.shape))
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_wandb(tmp_path, quiet, monkeypatch):
    calls = stand_in_for_wandb(monkeypatch)
    config = {"MODEL.NAME": "tiny", "TAG": "first"}
    log = MetricsLog(tmp_path, 0, quiet, ["wandb"], "abc", config)
    log.write_images("images", torch.zeros(4, 3, 8, 8))
    log.write({"epoch": 1, "top1": 10.0, "val_loss": math.nan})
    log.write_hparams(config, {"top1": 10.0})
    log.close()
    options, image, epoch, finished = calls
    assert options["mode"] == "offline" and options["config"] == config and options["dir"] == str(tmp_path)
    assert (options["id"], options["resume"], options["project"], options["name"]) == ("abc", "allow", "tiny", "first")
    assert image[0]["images"][2] == 3 and epoch == ({"top1": 10.0}, 1) and finished == "finished"
    assert quiet.messages == []


def test_mlflow_goes_on_with_the_same_run(tmp_path, quiet, monkeypatch):
    runs, calls = {}, []

    class Client:
        def __init__(self, tracking_uri):
            self.uri = tracking_uri

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def search_runs(self, experiments, condition):
            return [SimpleNamespace(info=SimpleNamespace(run_id=i)) for i, run in runs.items() if run in condition]

        def create_run(self, experiment, tags, run_name):
            runs[f"id{len(runs)}"] = tags["run"]
            return SimpleNamespace(info=SimpleNamespace(run_id="id0"))

        def __getattr__(self, name):
            return lambda *arguments, **options: calls.append((self.uri, name, *arguments, *options.values()))

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for done in (0, 1):
        log = MetricsLog(tmp_path, done, quiet, ["mlflow"], "abc", {"MODEL.NAME": "tiny", "TAG": "first"})
        log.write({"epoch": done + 1, "top1": 10.0})
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert runs == {"id0": "abc"}
    assert calls[-2:] == [(uri, "log_metric", "id0", "top1", 10.0, step) for step in (1, 2)]
    assert [call[1:4] for call in calls[:2]] == [("log_param", "id0", "MODEL.NAME"), ("log_param", "id0", "TAG")]
    assert quiet.messages == []


def test_tracker_that_fails_is_named_once_and_the_others_go_on(tmp_path, quiet, monkeypatch):
    calls = stand_in_for_wandb(monkeypatch)
    log = MetricsLog(tmp_path, 0, quiet, ["wandb", "csv"], "abc", {"MODEL.NAME": "tiny", "TAG": "first"})
    monkeypatch.setattr("logger.WandB.write", lambda *_: 1 / 0)
    for number in (1, 2):
        log.write({"epoch": number, "top1": 10.0})
    log.close()
    assert len(quiet.messages) == 1 and "wandb failed" in quiet.messages[0] and "division" in quiet.messages[0]
    assert "finished" not in calls
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    # From the start
    monkeypatch.setattr("logger.WandB.__init__", lambda *_: 1 / 0)
    MetricsLog(tmp_path, 0, quiet, ["wandb"]).write({"epoch": 1})
    assert len(quiet.messages) == 3  # and one about epochs that are trained again


def test_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(["tensorboard", "csv"])
    with pytest.raises(UserError, match=r"LOGGERS has mlflow.*requirements/loggers.txt"):
        check_trackers(["csv", "mlflow"])
