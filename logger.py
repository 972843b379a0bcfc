"""Logging: coloured lines on the console of rank 0, one plain file per rank. Callers pass the logger on."""

import contextlib
import csv
import importlib.util
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from termcolor import colored
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from utils import UserError

_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Console(logging.Handler):
    """Writes above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # File names may have characters that the console's encoding lacks.
            encoding = sys.stdout.encoding or "utf-8"
            text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)  # logging's way: reported on stderr, the program goes on


class _ColorFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = colored(self.formatTime(record, "%H:%M:%S"), "green")
        message = record.getMessage()
        if record.levelno in _COLORS:
            message = colored(f"{record.levelname.lower()}: {message}", _COLORS[record.levelno])
        return f"{time} {message}"


# For the `extra` of a record.
FILE_ONLY = {"file_only": True}  # not on any console
ALL_RANKS = {"all_ranks": True}  # a warning that every rank gives: on the console of rank 0 alone


def create_logger(name: str, rank: int = 0, folder: Path | None = None) -> logging.Logger:
    """A logger with a console on rank 0 (on the others, for warnings only) and, given a folder, the file
    `log_rank<rank>.txt` in it, appended to.

    Colours only where the console is a terminal (NO_COLOR and FORCE_COLOR are respected).
    """
    logger = logging.getLogger(f"{name}.rank{rank}")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:  # the name was used before in this process (tests, notebooks): start anew
        logger.removeHandler(handler)
        handler.close()
    if rank == 0:
        console = _Console()
        console.setFormatter(_ColorFormatter())
        console.addFilter(lambda record: not hasattr(record, "file_only"))
        logger.addHandler(console)
    else:
        alarm = logging.StreamHandler()  # a warning that only this rank gives must be seen
        alarm.setLevel(logging.WARNING)
        alarm.addFilter(lambda record: not hasattr(record, "file_only") and not hasattr(record, "all_ranks"))
        alarm.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s: %(message)s"))
        logger.addHandler(alarm)
    if folder is not None:
        file = logging.FileHandler(folder / f"log_rank{rank}.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    return logger


def json_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with None for NaN and infinity, which JSON lacks (the loss if no image could be read)."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


class MetricsLog:
    """One JSON object per epoch in `<folder>/metrics.jsonl`, and the same for the trackers.

    Args:
        folder: the run's folder.
        done: epochs that are done. Lines of later epochs are removed: a run that was killed before it could save its
            checkpoint leaves them, and those epochs are trained again.
        trackers: keys of `TRACKERS`.
        run, config: of the run, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        done: int,
        logger: logging.Logger,
        trackers: Sequence[str] = ("tensorboard",),
        run: str = "",
        config: dict[str, Any] | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if self._epoch(line) <= done]
            if len(kept) < len(lines):
                dropped = len(lines) - len(kept)
                logger.info(f"{self.path}: {dropped} lines about epochs after {done}, which are trained again, removed")
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                temporary.replace(self.path)
        self._trackers = Trackers(trackers, folder, done, run, config or {}, logger)

    def _epoch(self, line: str) -> float:
        try:
            return json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            return float("inf")  # cut off in the middle

    def write(self, metrics: dict[str, Any]) -> None:
        """Adds one epoch."""
        metrics = json_numbers(metrics)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as the checkpoint that follows is
        self._trackers.call("write", metrics)

    def write_images(self, title: str, images: Tensor, epoch: int = 0) -> None:
        """Shows the first 64 of images (N, 3, H, W), 0 to 1."""
        self._trackers.call("write_images", title, make_grid(images[:64], nrow=8, pad_value=1.0), epoch)

    def write_histograms(self, title: str, weights: dict[str, Tensor], epoch: int) -> None:
        """Shows the distribution of each weight's values."""
        self._trackers.call("write_histograms", title, weights, epoch)

    def write_hparams(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        """A run's config and final metrics, for tables that compare runs, such as TensorBoard's."""
        self._trackers.call("write_result", config, metrics)

    def close(self) -> None:
        self._trackers.call("close")


# ---------------------------------------------------------------------------------------------------------------------
# Trackers: where metrics go beside metrics.jsonl. All of them write into the run's folder and need no network, unless
# the environment says otherwise. A tracker never stops a run: the first time it fails, the log says so, and it is not
# called again.
# ---------------------------------------------------------------------------------------------------------------------


class Tracker:
    """What a run tells. By default it is not listened to."""

    def write(self, metrics: dict[str, Any]) -> None:
        """One epoch: finite numbers by name, and "epoch", how many are done."""

    def write_images(self, title: str, image: Tensor, epoch: int) -> None:
        """One picture (3, H, W), 0 to 1, after so many epochs."""

    def write_histograms(self, title: str, weights: dict[str, Tensor], epoch: int) -> None:
        """The values of some weights."""

    def write_result(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        """The config and the final metrics of a run that is finished."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoard(Tracker):
    """Event files in the run's folder. Those of epochs that are trained again are purged."""

    def __init__(self, folder: Path, done: int, run: str, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, metrics: dict[str, Any]) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics["epoch"])
        self._writer.flush()

    def write_images(self, title: str, image: Tensor, epoch: int) -> None:
        self._writer.add_image(title, image, epoch)

    def write_histograms(self, title: str, weights: dict[str, Tensor], epoch: int) -> None:
        for name, weight in weights.items():
            # TensorBoard's default, over a thousand bins, would make up most of the file.
            self._writer.add_histogram(f"{title}/{name}", weight.detach().float().cpu(), epoch, bins=64)

    def write_result(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        values = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in config.items()
        }
        self._writer.add_hparams(values, {f"final/{name}": value for name, value in metrics.items()}, run_name=".")

    def close(self) -> None:
        self._writer.close()


class CSVFile(Tracker):
    """metrics.csv: metrics.jsonl as a table, written anew after each epoch, because epochs may have other columns."""

    def __init__(self, folder: Path, done: int, run: str, config: dict[str, Any]):
        self.folder = folder

    def write(self, metrics: dict[str, Any]) -> None:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        temporary = self.folder / ".metrics.csv.tmp"
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.folder / "metrics.csv")


class WandB(Tracker):
    """Weights & Biases. Offline, in <folder>/wandb, which `wandb sync` uploads; WANDB_MODE=online is respected."""

    def __init__(self, folder: Path, done: int, run: str, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", config["MODEL.NAME"]),
            name=config["TAG"],
            id=run,
            resume="allow",
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write(self, metrics: dict[str, Any]) -> None:
        self._run.log(_scalars(metrics), step=metrics["epoch"])

    def write_images(self, title: str, image: Tensor, epoch: int) -> None:
        import wandb

        self._run.log({title: wandb.Image(image.permute(1, 2, 0).numpy())}, step=epoch)

    def write_result(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._run.summary[f"final/{name}"] = value

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """MLflow. In the database <folder>/mlflow.db, which `mlflow ui` shows; MLFLOW_TRACKING_URI is respected. A run that
    goes on is the same run there."""

    def __init__(self, folder: Path, done: int, run: str, config: dict[str, Any]):
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", config["MODEL.NAME"])
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        before = self._client.search_runs([experiment_id], f"tags.run = '{run}'")
        if before:
            self._id = before[0].info.run_id
            return
        self._id = self._client.create_run(experiment_id, tags={"run": run}, run_name=config["TAG"]).info.run_id
        for key, value in config.items():
            self._client.log_param(self._id, key, value)

    def write(self, metrics: dict[str, Any]) -> None:
        for name, value in _scalars(metrics).items():
            self._client.log_metric(self._id, _mlflow_name(name), value, step=metrics["epoch"])

    def write_result(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, f"final/{name}", value)
        self._client.set_terminated(self._id)


def _mlflow_name(name: str) -> str:
    """With the characters that MLflow takes in a name."""
    return re.sub(r"[^\w\-. /]", "_", name)


TRACKERS: dict[str, Callable[[Path, int, str, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "csv": CSVFile,
    "wandb": WandB,
    "mlflow": MLflow,
}
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "epoch" and value is not None}


def check_trackers(names: list[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"LOGGERS has {name}, which is not installed: pip install -r requirements/loggers.txt")


class Trackers:
    """Some of `TRACKERS`, called one after the other. What goes wrong in one is said once in the log.

    Args:
        names: keys of `TRACKERS`.
        folder: the run's.
        done: epochs that are done.
        run: identifies the run, over restarts.
        config: its values by dotted key.
    """

    def __init__(
        self, names: list[str], folder: Path, done: int, run: str, config: dict[str, Any], logger: logging.Logger
    ):
        self._logger, self._working = logger, {}
        for name in names:
            with self._guarded(name):
                self._working[name] = TRACKERS[name](folder, done, run, config)

    @contextlib.contextmanager
    def _guarded(self, name: str):
        try:
            yield
        except Exception as error:  # whatever a library raises
            self._working.pop(name, None)
            reason = " ".join((str(error) or type(error).__name__).split())[:500]
            self._logger.warning(f"{name} failed and is not used any more, the run goes on without it: {reason}")

    def call(self, method: str, *arguments: Any) -> None:
        """Calls a method of all that still work."""
        for name, tracker in list(self._working.items()):
            with self._guarded(name):
                getattr(tracker, method)(*arguments)
