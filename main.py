"""Train a model on one process or many.

    python main.py --cfg configs/strip_mlp_pico_digits.yaml
    torchrun --nproc_per_node 8 main.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA

Everything a run writes goes to OUTPUT/MODEL.NAME/TAG; the same command again continues there.
"""

import argparse
import sys
from dataclasses import dataclass
from datetime import timedelta
from logging import Logger
from typing import Any

from config import add_arguments, get_config, leaves, save_config
from utils import UserError, parse_first, run_entry_point, seed_all, write_keeping_old, writing_to


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--eval", action="store_true", help="evaluate only, as main_eval.py does")
    parser.add_argument("--throughput", action="store_true", help="measure images/s of the model alone")
    return parser.parse_args()


if __name__ == "__main__":
    parse_first(parse_args)

import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import (
    build_eval_loader,
    build_mixup,
    build_sources,
    build_train_loader,
    denormalize,
    holds_out,
    with_class_count,
)
from data.build import note_on_orientation
from data.loading import LoadingFailed
from data.sources import describe_counts
from engine.control import Control
from engine.distill import Teacher, build_distillation, build_teacher, check_distillation
from engine.epoch import Training, steps_per_epoch, train_one_epoch
from engine.evaluate import describe, evaluate, evaluate_run, precision_name, resolve_amp
from engine.finite import build_scaler
from engine.loss import build_criterion, check_loss
from engine.start import Start, find_start, is_finished, load_start, restore_state
from engine.state import Progress, TrainingState, is_better, stops_early
from logger import ALL_RANKS, FILE_ONLY, MetricsLog, check_trackers, create_logger
from lr_scheduler import PlateauScheduler, build_scheduler, lr_scale
from models import build_model, compile_model, freeze, idle_keys, prepare_model, token_mixing_weights
from optimizer import SCHEDULE_FREE, ScheduleFreeAverage, build_optimizer, check_optimizer
from runtime import signals
from runtime.distributed import TIMEOUT, World, close_world, init_world, lost_processes_named, on_main, wrap
from runtime.per_image import CORRECT, save_correct
from runtime.run_folder import RunFolder, open_run_folder
from runtime.signals import Stopped, StopRequest
from runtime.watchdog import Watchdog


def main() -> None:
    args = parse_args()
    config, notes = get_config(args, idle_keys)
    # Longer than the watchdog, which comes first because it can say what is wrong.
    timeout = max(TIMEOUT, 2 * timedelta(seconds=config.TIMEOUT))
    if args.eval or args.throughput:
        world = init_world(config.DEVICE, args.local_rank, timeout)
        with lost_processes_named():
            evaluate_run(config, notes, world, args.resume or args.pretrained, args.throughput)
        close_world(world)
        return
    with StopRequest() as request:
        world = init_world(config.DEVICE, args.local_rank, timeout)
        status = 0
        with lost_processes_named():
            try:
                train(config, notes, world, request)
            except Stopped:
                status = signals.EXIT_STATUS
        close_world(world)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Data and model: nothing is written before everything that the run needs is there
# ---------------------------------------------------------------------------------------------------------------------


def train(config, notes: list[str], world: World, request: StopRequest) -> None:
    """Trains the model of a config in the run's folder.

    Raises:
        Stopped: a signal has ended the run, which is saved.
    """
    check_optimizer(config)
    check_trackers(config.LOGGERS)
    check_distillation(config)
    sources = build_sources(config, world)
    config = with_class_count(config, sources.train)
    check_loss(config)
    train_loader = build_train_loader(config, sources.train, world)
    eval_loader = build_eval_loader(config, sources.val, world)
    mixup = build_mixup(config, config.MODEL.NUM_CLASSES)
    build_criterion(config, lambda: sources.train, bool(mixup), world.device)  # raises before anything is written

    seed_all(config.SEED)
    model = build_model(config)
    freeze(model, config.TRAIN.FREEZE)
    teacher = build_teacher(config, train_loader.dataset.classes, world)
    if config.TRAIN.SYNC_BN and world.distributed:
        if world.device.type != "cuda":
            raise UserError("TRAIN.SYNC_BN is True, which needs CUDA; accepted on the CPU: False")
        model = convert_sync_batchnorm(model)

    with open_run_folder(config, world) as folder:
        if not config.TRAIN.AUTO_RESUME:
            folder.refuse_overwriting()
        with writing_to(folder.path):
            logger = create_logger("train", world.rank, folder.path)
        log_setup(config, notes + sources.notes + folder.notes, model, world, logger)
        try:
            fit(config, model, teacher, train_loader, eval_loader, mixup, folder, world, logger, request)
        except UserError as error:
            logger.error(str(error), extra=FILE_ONLY)  # run_entry_point prints it
            raise


def fit(
    config,
    model: nn.Module,
    teacher: Teacher | None,
    train_loader: DataLoader,
    eval_loader: DataLoader,
    mixup: Mixup | None,
    folder: RunFolder,
    world: World,
    logger: Logger,
    request: StopRequest,
) -> None:
    """Trains the model from wherever the run in `folder` is to TRAIN.EPOCHS, evaluating and saving after each epoch."""
    start = find_start(config, folder, world, logger)
    load_start(config, model, start, train_loader.dataset.classes, logger)
    if is_finished(config, start):
        log_nothing_left(config, start, folder, logger)
        return
    if world.is_main:
        with writing_to(folder.path):
            save_config(config, folder.path)
            if holds_out(config):
                source = eval_loader.dataset.source
                names = (f"{source.name(index)}\n" for index in range(len(source)))
                write_keeping_old(folder.path / "held_out.txt", "".join(names))

    # Model on its device, optimizer, schedule
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    prepare_model(config, model, world.device)
    distillation = build_distillation(config, model, teacher, train_loader.dataset, world, logger)
    scale = lr_scale(config, world.size)
    optimizer = build_optimizer(config, model, config.TRAIN.BASE_LR * scale)
    steps = steps_per_epoch(train_loader, config.TRAIN.ACCUMULATION_STEPS)
    scheduler = build_scheduler(config, optimizer, steps, scale)
    amp = resolve_amp(config, world.device)
    classes, scaler = train_loader.dataset.classes, build_scaler(amp, world.device)
    state = TrainingState(
        model, optimizer, scaler, amp, classes, build_ema(config, model, optimizer), scheduler=scheduler
    )
    log_plan(config, train_loader, eval_loader, steps, scale, amp, world, logger)
    wrapped = wrap(model, world)
    # After wrapping, which gives all processes rank 0's running statistics.
    restore_state(state, start, config, len(train_loader.dataset), steps, world, logger)

    # Epochs
    with writing_to(folder.path):
        metrics_log = None
        if world.is_main:
            metrics_log = MetricsLog(folder.path, state.epoch, logger, config.LOGGERS, state.run, leaves(config))
    request.deferred = True  # from here on there is something to save
    with Watchdog(world, config.TIMEOUT, logger) as watchdog:
        control = Control(request, watchdog, folder.due)
        run = Training(config, state, wrapped, train_loader, scheduler, mixup, world, logger, control, distillation)
        control.save = Saver(run, folder)
        if metrics_log:
            control.show = lambda images: metrics_log.write_images(
                "training images as the model gets them", denormalize(images[:64])
            )
        metrics = {}
        while state.epoch < config.TRAIN.EPOCHS:
            metrics, correct = train_and_evaluate(run, eval_loader, folder)
            if finish_epoch(run, metrics, correct, folder, metrics_log):
                break
    close_log(config, state, metrics, metrics_log, folder)
    logger.info(f"best top-1 {state.best['top1']:.3f} % (epoch {state.best['epoch']}); everything is in {folder.path}")


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


def train_and_evaluate(
    run: Training, eval_loader: DataLoader, folder: RunFolder
) -> tuple[dict[str, Any], Tensor | None]:
    """Trains one epoch, or the rest of one, and evaluates. If something stops it, the run is saved first.

    Returns:
        The metrics of both, and the images classified correctly as `evaluate` gives them. After an epoch that
        TEST.INTERVAL skips, the metrics of training and None.

    Raises:
        Stopped: a process got a signal.
        UserError: the data cannot be loaded.
    """
    config, state, world, control = run.config, run.state, run.world, run.control
    try:
        metrics = train_one_epoch(run)
        if world.distributed and not state.progress.trained:
            for trained in (state.model, *([state.ema.module] if state.ema else [])):
                distribute_bn(trained, world.size, reduce=True)
        state.progress.trained = True
        if (state.epoch + 1) % config.TEST.INTERVAL and state.epoch + 1 < config.TRAIN.EPOCHS:
            return metrics, None
        found, correct = evaluate(config, state.model, eval_loader, world, run.logger, control, state.epoch)
        metrics |= found
        if state.ema:
            metrics |= {f"{name}_raw": metrics[name] for name in ("top1", "top5", "val_loss")}
            average = state.ema.module
            found, correct = evaluate(config, average, eval_loader, world, run.logger, control, state.epoch, turn=1)
            metrics |= found
        return metrics, correct
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
    run: Training, metrics: dict[str, Any], correct: Tensor | None, folder: RunFolder, metrics_log: MetricsLog | None
) -> bool:
    """Counts the epoch as done, logs its metrics and writes the results per image and the checkpoints.

    Returns:
        Whether it was the last one, also by TRAIN.PATIENCE.
    """
    config, state = run.config, run.state
    state.epoch += 1
    state.progress = Progress(skipped_in_row=state.progress.skipped_in_row)
    names = []
    if correct is not None and is_better(metrics, state.best):
        state.best = {"top1": metrics["top1"], "epoch": state.epoch, "val_loss": metrics["val_loss"]}
        names.append("best.pth")
    if correct is not None and metrics["val_loss"] < state.lowest["val_loss"]:
        state.lowest = {"val_loss": metrics["val_loss"], "epoch": state.epoch}
    if correct is not None and isinstance(run.scheduler, PlateauScheduler):
        run.scheduler.evaluated(metrics, state.epoch * run.steps)
    log_epoch(config, state, metrics, run.logger)
    is_last = state.epoch == config.TRAIN.EPOCHS
    if not is_last and stops_early(config, state.epoch, state.best, state.lowest):
        is_last, metrics["stopped_early"] = True, 1
        what = f"{config.TRAIN.PATIENCE_METRIC} has not improved for TRAIN.PATIENCE {config.TRAIN.PATIENCE} epochs"
        run.logger.info(f"{what}: the run stops after epoch {state.epoch}")
    is_kept = state.epoch % config.SAVE_FREQ == 0 or is_last
    if is_kept:
        names.append(f"ckpt_epoch_{state.epoch}.pth")
    run.control.at_checkpoint_after(state.epoch)
    if metrics_log:
        # These first: if the run is killed before the checkpoint, the epoch is trained and they are written again.
        with writing_to(folder.path):
            if correct is not None:
                save_correct(folder.path / CORRECT, correct.cpu().numpy(), state.epoch)
            metrics_log.write({"epoch": state.epoch, **metrics, "processes": run.world.size})
            if is_kept:
                metrics_log.write_histograms("token mixing weights", token_mixing_weights(state.model), state.epoch)
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


def log_nothing_left(config, start: Start, folder: RunFolder, logger: Logger) -> None:
    """That the run is finished already."""
    done, best = start.content["epoch"], start.content["best"]
    where = f"everything is in {folder.path}"
    if not start.is_own:
        where = f"{start.path} is of a finished run; nothing is written into {folder.path}"
    early = f", stopped early by TRAIN.PATIENCE {config.TRAIN.PATIENCE}" if done < config.TRAIN.EPOCHS else ""
    logger.info(
        f"nothing left to train: {done} of {config.TRAIN.EPOCHS} epochs are done{early}, "
        f"best top-1 {best['top1']:.3f} % (epoch {best['epoch']}); {where}"
    )


def log_plan(
    config,
    train_loader: DataLoader,
    eval_loader: DataLoader,
    steps: int,
    scale: float,
    amp: torch.dtype | None,
    world: World,
    logger: Logger,
) -> None:
    """What is about to be trained on what."""
    left_out = len(train_loader.sampler) % config.DATA.BATCH_SIZE
    if left_out > len(train_loader.sampler) // 5:
        message = f"each epoch leaves out {left_out} of {len(train_loader.sampler)} images, too few for a batch"
        logger.warning(f"{message} of {config.DATA.BATCH_SIZE}; a smaller --batch-size leaves out fewer")
    logger.info(
        f"{len(train_loader.dataset)} training and {len(eval_loader.dataset)} validation images, "
        f"{config.MODEL.NUM_CLASSES} classes; {steps} steps per epoch; "
        f"peak lr {config.TRAIN.BASE_LR * scale:.3e} = {config.TRAIN.BASE_LR:g} x global batch / "
        f"{config.TRAIN.LR_REFERENCE_BATCH}; precision {precision_name(amp)}"
    )
    source = train_loader.dataset.source
    logger.info(f"training images per class: {describe_counts(source)}")
    if world.is_main and (note := note_on_orientation(config, source)):  # reads files, once for all processes
        logger.warning(note)


def log_epoch(config, state: TrainingState, metrics: dict[str, Any], logger: Logger) -> None:
    """An epoch's results, and what went wrong in it."""
    raw = f" (moving average; the weights themselves: {metrics['top1_raw']:.3f} %)" if "top1_raw" in metrics else ""
    result = f"{describe(metrics)}{raw}" if "top1" in metrics else "not evaluated"
    if state.best["epoch"]:
        result += f"; best top-1 {state.best['top1']:.3f} % (epoch {state.best['epoch']})"
    logger.info(
        f"epoch {state.epoch}/{config.TRAIN.EPOCHS} {result}; trained at {metrics['images_per_second']:.0f} images/s, "
        f"{100 * metrics['data_wait']:.0f} % of the time waiting for data"
    )
    if metrics["unreadable_train"]:
        message = f"{metrics['unreadable_train']} unreadable images in this epoch's training, replaced"
        logger.warning(message, extra=ALL_RANKS)
    if metrics["skipped_steps"]:
        message = f"{metrics['skipped_steps']} steps of this epoch skipped: loss or gradient not finite"
        logger.warning(message, extra=ALL_RANKS)


def close_log(
    config, state: TrainingState, metrics: dict[str, Any], metrics_log: MetricsLog | None, folder: RunFolder
) -> None:
    """Adds the run to the tables that compare runs."""
    if metrics_log:
        final = {name: metrics[name] for name in ("top1", "top5", "val_loss", "train_loss")}
        with writing_to(folder.path):
            metrics_log.write_hparams(leaves(config), {**final, "best_top1": state.best["top1"]})
        metrics_log.close()


if __name__ == "__main__":
    run_entry_point(main)
