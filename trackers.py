"""Where a run's metrics go beside metrics.jsonl: TensorBoard, a CSV file, Weights & Biases, MLflow. All of them write
into the run's folder and need no network, unless the environment says otherwise.

A tracker never stops a run: the first time it fails, the log says so, and it is not called again.
"""

import contextlib
import csv
import importlib.util
import json
import os
from collections.abc import Callable
from logging import Logger
from pathlib import Path
from typing import Any

from torch import Tensor

from utils import UserError


class Tracker:
    """What a run tells. By default it is not listened to."""

    def write(self, metrics: dict[str, Any]) -> None:
        """One epoch: finite numbers by name, and "epoch", how many are done."""

    def write_images(self, title: str, image: Tensor) -> None:
        """One picture (3, H, W), 0 to 1, before the first epoch."""

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

    def write_images(self, title: str, image: Tensor) -> None:
        self._writer.add_image(title, image, 0)  # filed under epoch 0, which no run trains again

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

    def write_images(self, title: str, image: Tensor) -> None:
        import wandb

        self._run.log({title: wandb.Image(image.permute(1, 2, 0).numpy())}, step=0)

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
            self._client.log_metric(self._id, name, value, step=metrics["epoch"])

    def write_result(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, f"final/{name}", value)
        self._client.set_terminated(self._id)


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

    def __init__(self, names: list[str], folder: Path, done: int, run: str, config: dict[str, Any], logger: Logger):
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
