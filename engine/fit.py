"""A training run, whatever its task: from a model and its data to the last checkpoint.

In the order in which things happen: `run_training` joins the process group, `train_in_folder` opens the run's folder
and its log, `fit` builds what changes in training and goes through the epochs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from logging import Logger
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

from config import leaves, save_config
from data.loading import LoadingFailed
from engine.control import Control
from engine.epoch import Training, steps_per_epoch, train_one_epoch
from engine.evaluate import precision_name, resolve_amp
from engine.finite import build_scaler
from engine.start import Start, find_start, is_finished, load_start, restore_state
from engine.state import Progress, TrainingState, is_better, no_best, stops_early
from engine.task import Metric, Task
from logger import ALL_RANKS, FILE_ONLY, MetricsLog, create_logger
from lr_scheduler import PlateauScheduler, build_scheduler, lr_scale
from models import compile_model, token_mixing_weights
from optimizer import SCHEDULE_FREE, ScheduleFreeAverage, build_optimizer
from runtime import signals
from runtime.distributed import TIMEOUT, World, close_world, init_world, lost_processes_named, on_main, wrap
from runtime.run_folder import RunFolder, open_run_folder
from runtime.signals import Stopped, StopRequest
from runtime.watchdog import Watchdog
from utils import UserError, write_keeping_old, writing_to


def run_training(config, local_rank: int | None, train: Callable[[World, StopRequest], None]) -> None:
    """Calls `train` in the process group, and ends the program if a signal has stopped it.

    Args:
        local_rank: see `init_world`.
    """
    with StopRequest() as request:
        world = init_world(config.DEVICE, local_rank, group_timeout(config))
        status = 0
        with lost_processes_named():
            try:
                train(world, request)
            except Stopped:
                status = signals.EXIT_STATUS
        close_world(world)
    sys.exit(status)


def group_timeout(config) -> timedelta:
    """How long processes wait for each other: longer than the watchdog, which comes first because it can say what is
    wrong."""
    return max(TIMEOUT, 2 * timedelta(seconds=config.TIMEOUT))


def with_sync_bn(config, model: nn.Module, world: World) -> nn.Module:
    """The model, with BatchNorms over all processes if the config asks for them.

    Raises:
        UserError: not on the CPU.
    """
    if not config.TRAIN.SYNC_BN or not world.distributed:
        return model
    if world.device.type != "cuda":
        raise UserError("TRAIN.SYNC_BN is True, which needs CUDA; accepted on the CPU: False")
    return convert_sync_batchnorm(model)


def train_in_folder(config, task: Task, model: nn.Module, notes: list[str], world: World, request: StopRequest) -> None:
    """Trains the model, which is on the CPU, in the run's folder.

    Args:
        notes: for the log.

    Raises:
        Stopped: a signal has ended the run, which is saved.
    """
    with open_run_folder(config, world) as folder:
        if not config.TRAIN.AUTO_RESUME:
            folder.refuse_overwriting()
        with writing_to(folder.path):
            logger = create_logger("train", world.rank, folder.path)
        log_setup(config, notes + folder.notes, model, world, logger)
        try:
            fit(config, task, model, folder, world, logger, request)
        except UserError as error:
            logger.error(str(error), extra=FILE_ONLY)  # run_entry_point prints it
            raise


def fit(
    config,
    task: Task,
    model: nn.Module,
    folder: RunFolder,
    world: World,
    logger: Logger,
    request: StopRequest,
) -> None:
    """Trains the model from wherever the run in `folder` is to TRAIN.EPOCHS, evaluating and saving after each epoch."""
    start = find_start(config, folder, world, logger, task.metric)
    load_start(config, model, start, task, logger)
    if is_finished(config, start):
        log_nothing_left(config, start, task.metric, folder, logger)
        return
    if world.is_main:
        with writing_to(folder.path):
            save_config(config, folder.path)
            for name, text in task.files().items():
                write_keeping_old(folder.path / name, text)

    # Model on its device, optimizer, schedule
    torch.backends.cudnn.benchmark = True  # batches have the same shape, or one of a few
    task.place(model, logger)
    scale = lr_scale(config, world.size)
    optimizer = build_optimizer(config, model, config.TRAIN.BASE_LR * scale)
    steps = steps_per_epoch(task.train_loader, config.TRAIN.ACCUMULATION_STEPS)
    scheduler = build_scheduler(config, optimizer, steps, scale)
    amp = resolve_amp(config, world.device)
    state = TrainingState(
        model,
        optimizer,
        build_scaler(amp, world.device),
        amp,
        task.classes,
        build_ema(config, model, optimizer),
        best=no_best(task.metric),
        scheduler=scheduler,
    )
    log_plan(config, task, steps, scale, amp, logger)
    wrapped = wrap(model, world)
    # After wrapping, which gives all processes rank 0's running statistics.
    restore_state(state, start, config, task, steps, world, logger)

    # Epochs
    with writing_to(folder.path):
        metrics_log = None
        if world.is_main:
            metrics_log = MetricsLog(folder.path, state.epoch, logger, config.LOGGERS, state.run, leaves(config))
    request.deferred = True  # from here on there is something to save
    with Watchdog(world, config.TIMEOUT, logger) as watchdog:
        control = Control(request, watchdog, folder.due)
        run = Training(config, task, state, wrapped, scheduler, world, logger, control)
        control.save = Saver(run, folder)
        if metrics_log:
            control.show = lambda images, targets: metrics_log.write_images(*task.picture(images, targets))
        metrics = {}
        while state.epoch < config.TRAIN.EPOCHS:
            metrics, details = train_and_evaluate(run, folder)
            if finish_epoch(run, metrics, details, folder, metrics_log):
                break
    close_log(run, metrics, metrics_log, folder)
    logger.info(f"{describe_best(task.metric, state.best)}; everything is in {folder.path}")


def build_ema(config, model: nn.Module, optimizer: torch.optim.Optimizer) -> ModelEmaV3 | ScheduleFreeAverage | None:
    """A moving average of the model's weights, if the config or the optimizer asks for one."""
    if config.TRAIN.OPTIMIZER.NAME in SCHEDULE_FREE:
        ema = ScheduleFreeAverage(model, optimizer)
    elif config.TRAIN.EMA_DECAY:
        ema = ModelEmaV3(model, config.TRAIN.EMA_DECAY, use_warmup=True)
    else:
        return None
    if config.TRAIN.COMPILE:
        compile_model(ema.module, config.TRAIN.COMPILE_UNIT)
    return ema


# ---------------------------------------------------------------------------------------------------------------------
# Epochs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Saver:
    """Called by all processes: writes last.pth, also under the given names."""

    run: Training
    folder: RunFolder

    def __call__(self, *names: str) -> None:
        run = self.run
        content = run.state.capture(run.config, len(run.loader.dataset), run.world)
        try:
            on_main(lambda: self.folder.save(content, names), run.world)
        except UserError as error:
            if run.world.is_main:
                raise
            raise UserError(f"the main process cannot write the checkpoint: {error}") from error


def train_and_evaluate(run: Training, folder: RunFolder) -> tuple[dict[str, Any], Any]:
    """Trains one epoch, or the rest of one, and evaluates. If something stops it, the run is saved first.

    Returns:
        The metrics of both, and the details that `Task.evaluate` gives. After an epoch that TEST.INTERVAL skips, the
        metrics of training and None.

    Raises:
        Stopped: a process got a signal.
        UserError: the data cannot be loaded.
    """
    config, task, state, control = run.config, run.task, run.state, run.control
    try:
        metrics = train_one_epoch(run)
        if run.world.distributed and not state.progress.trained:
            for trained in (state.model, *([state.ema.module] if state.ema else [])):
                distribute_bn(trained, run.world.size, reduce=True)
        state.progress.trained = True
        if (state.epoch + 1) % config.TEST.INTERVAL and state.epoch + 1 < config.TRAIN.EPOCHS:
            return metrics, None
        found, details = task.evaluate(state.model, run.logger, control, state.epoch)
        metrics |= found
        if state.ema:
            metrics |= {f"{name}_raw": metrics[name] for name in task.results}
            found, details = task.evaluate(state.ema.module, run.logger, control, state.epoch, turn=1)
            metrics |= found
        return metrics, details
    except (Stopped, LoadingFailed) as reason:
        control.at_last_checkpoint(state.epoch)
        control.request.saving = True
        control.save()
        run.logger.info(
            f"stopped in epoch {state.epoch + 1} after {state.progress.step} of {run.steps} steps, saved in "
            f"{folder.last}; the same command goes on from there"
        )
        if isinstance(reason, LoadingFailed):
            raise reason.error from None
        raise


def finish_epoch(
    run: Training, metrics: dict[str, Any], details: Any, folder: RunFolder, metrics_log: MetricsLog | None
) -> bool:
    """Counts the epoch as done, logs its metrics and writes the details of its evaluation and the checkpoints.

    Returns:
        Whether it was the last one, also by TRAIN.PATIENCE.
    """
    config, task, state = run.config, run.task, run.state
    metric = task.metric
    is_evaluated = metric.name in metrics
    state.epoch += 1
    state.progress = Progress(skipped_in_row=state.progress.skipped_in_row)
    names = []
    if is_evaluated and is_better(metrics, state.best, metric):
        losses = {name: metrics[name] for name in ("val_loss",) if name in metrics}
        state.best = {metric.name: metrics[metric.name], "epoch": state.epoch, **losses}
        names.append("best.pth")
    if "val_loss" in metrics and metrics["val_loss"] < state.lowest["val_loss"]:
        state.lowest = {"val_loss": metrics["val_loss"], "epoch": state.epoch}
    if is_evaluated and isinstance(run.scheduler, PlateauScheduler):
        # In the config, top1 stands for the task's metric.
        run.scheduler.evaluated({**metrics, "top1": metrics[metric.name]}, state.epoch * run.steps)
    log_epoch(run, metrics)
    is_last = state.epoch == config.TRAIN.EPOCHS
    if not is_last and stops_early(config, state.epoch, state.best, state.lowest):
        is_last, metrics["stopped_early"] = True, 1
        watched = metric.name if config.TRAIN.PATIENCE_METRIC == "top1" else config.TRAIN.PATIENCE_METRIC
        what = f"{watched} has not improved for TRAIN.PATIENCE {config.TRAIN.PATIENCE} epochs"
        run.logger.info(f"{what}: the run stops after epoch {state.epoch}")
    is_kept = state.epoch % config.SAVE_FREQ == 0 or is_last
    if is_kept:
        names.append(f"ckpt_epoch_{state.epoch}.pth")
    run.control.at_checkpoint_after(state.epoch)
    if metrics_log:
        # These first: if the run is killed before the checkpoint, the epoch is trained and they are written again.
        with writing_to(folder.path):
            if is_evaluated:
                task.save(details, state.epoch, folder.path)
            metrics_log.write({"epoch": state.epoch, **metrics, "processes": run.world.size})
            if is_kept:
                metrics_log.write_histograms("token mixing weights", token_mixing_weights(state.model), state.epoch)
            if is_kept and is_evaluated:
                task.show(details, state.epoch, metrics_log)
    run.control.save(*names)
    return is_last


# ---------------------------------------------------------------------------------------------------------------------
# What the log says
# ---------------------------------------------------------------------------------------------------------------------


def log_setup(config, notes: list[str], model: nn.Module, world: World, logger: Logger) -> None:
    """The config, the model and the machine."""
    for note in notes:
        logger.warning(note, extra=ALL_RANKS)
    logger.info(f"config:\n{config.dump()}", extra=FILE_ONLY)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = f", of which {trained:,} are trained" if trained < parameters else ""
    logger.info(
        f"{config.MODEL.NAME}: {parameters:,} parameters{frozen}; torch {torch.__version__}, timm {timm.__version__}, "
        f"{world.size} x {torch.cuda.get_device_name() if world.device.type == 'cuda' else 'cpu'}"
    )


def describe_best(metric: Metric, best: dict[str, Any]) -> str:
    """The best epoch so far, see `TrainingState.best`."""
    return f"best {metric.title} {metric.text(best[metric.name])} (epoch {best['epoch']})"


def log_nothing_left(config, start: Start, metric: Metric, folder: RunFolder, logger: Logger) -> None:
    """That the run is finished already."""
    done = start.content["epoch"]
    where = f"everything is in {folder.path}"
    if not start.is_own:
        where = f"{start.path} is of a finished run; nothing is written into {folder.path}"
    early = f", stopped early by TRAIN.PATIENCE {config.TRAIN.PATIENCE}" if done < config.TRAIN.EPOCHS else ""
    logger.info(
        f"nothing left to train: {done} of {config.TRAIN.EPOCHS} epochs are done{early}, "
        f"{describe_best(metric, start.content['best'])}; {where}"
    )


def log_plan(config, task: Task, steps: int, scale: float, amp: torch.dtype | None, logger: Logger) -> None:
    """What is about to be trained on what."""
    images = len(task.train_loader.dataset) // task.world.size
    left_out = images - len(task.train_loader) * config.DATA.BATCH_SIZE
    if left_out > images // 5:
        message = f"each epoch leaves out {left_out} of {images} images, too few for a batch"
        logger.warning(f"{message} of {config.DATA.BATCH_SIZE}; a smaller --batch-size leaves out fewer")
    logger.info(
        f"{len(task.train_loader.dataset)} training and {len(task.eval_loader.dataset)} validation images, "
        f"{config.MODEL.NUM_CLASSES} classes; {steps} steps per epoch; "
        f"peak lr {config.TRAIN.BASE_LR * scale:.3e} = {config.TRAIN.BASE_LR:g} x global batch / "
        f"{config.TRAIN.LR_REFERENCE_BATCH}; precision {precision_name(amp)}"
    )
    task.log_data(logger)


def log_epoch(run: Training, metrics: dict[str, Any]) -> None:
    """An epoch's results, and what went wrong in it."""
    task, state, logger = run.task, run.state, run.logger
    metric, result = task.metric, "not evaluated"
    if metric.name in metrics:
        result = task.describe(metrics)
    if (raw := metrics.get(f"{metric.name}_raw")) is not None:
        result += f" (moving average; the weights themselves: {metric.text(raw)})"
    if state.best["epoch"]:
        result += f"; {describe_best(metric, state.best)}"
    logger.info(
        f"epoch {state.epoch}/{run.config.TRAIN.EPOCHS} {result}; trained at {metrics['images_per_second']:.0f} "
        f"images/s, {100 * metrics['data_wait']:.0f} % of the time waiting for data"
    )
    if metrics["unreadable_train"]:
        message = f"{metrics['unreadable_train']} unreadable images in this epoch's training, replaced"
        logger.warning(message, extra=ALL_RANKS)
    if metrics["skipped_steps"]:
        message = f"{metrics['skipped_steps']} steps of this epoch skipped: loss or gradient not finite"
        logger.warning(message, extra=ALL_RANKS)


def close_log(run: Training, metrics: dict[str, Any], metrics_log: MetricsLog | None, folder: RunFolder) -> None:
    """Adds the run to the tables that compare runs."""
    if metrics_log:
        task, best = run.task, run.state.best
        final = {name: metrics[name] for name in (*task.results, "train_loss")}
        with writing_to(folder.path):
            metrics_log.write_hparams(leaves(run.config), {**final, f"best_{task.metric.name}": best[task.metric.name]})
        metrics_log.close()
