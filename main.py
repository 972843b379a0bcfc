"""Train a model on one process or many.

    python main.py --cfg configs/strip_mlp_pico_digits.yaml
    torchrun --nproc_per_node 8 main.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA

Everything a run writes goes to OUTPUT/MODEL.NAME/TAG; the same command again continues there.
"""

import argparse
import inspect
import sys
import warnings
from datetime import timedelta
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import main_eval
from config import add_arguments, find, get_config, leaves, save_config
from data import build_eval_loader, build_mixup, build_sources, build_train_loader, check_num_classes
from data.sources import class_names
from engine.epoch import Control, LoadingFailed, evaluate, resolve_amp, steps_per_epoch, train_one_epoch
from engine.finite import build_scaler
from engine.state import Progress, TrainingState
from logger import ALL_RANKS, FILE_ONLY, MetricsLog, create_logger
from lr_scheduler import build_scheduler, lr_scale
from models import build_model, freeze, prepare_model, token_mixing_weights
from optimizer import build_optimizer
from runtime import signals
from runtime.checkpoint import CheckpointError, load_pretrained, load_weights, other_classes, read_training_state
from runtime.distributed import TIMEOUT, World, close_world, from_main, init_world, lost_processes_named
from runtime.run_folder import RunFolder, open_run_folder
from runtime.signals import Stopped, StopRequest
from runtime.watchdog import Watchdog
from utils import UserError, run_entry_point, seed_all, writing_to


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    parser.add_argument("--eval", action="store_true", help="evaluate only, as main_eval.py does")
    parser.add_argument("--throughput", action="store_true", help="measure images/s of the model alone")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config, notes = get_config(args)
    # The watchdog, which can say what is wrong, comes before the process group.
    timeout = max(TIMEOUT, 2 * timedelta(seconds=config.TIMEOUT))
    if args.eval or args.throughput:
        world = init_world(config.DEVICE, args.local_rank, timeout)
        with lost_processes_named():
            main_eval.run(config, notes, world, args.resume or args.pretrained, args.throughput)
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


def train(config, notes: list[str], world: World, request: StopRequest) -> None:
    """Raises Stopped when a signal has ended the run, which is saved."""
    # -----------------------------------------------------------------------------------------------------------------
    # Data and model: nothing is written before all that the run needs is there
    # -----------------------------------------------------------------------------------------------------------------
    sources = build_sources(config, world)
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = check_num_classes(config, sources.train)
    config.freeze()
    train_loader = build_train_loader(config, sources.train, world)
    eval_loader = build_eval_loader(config, sources.val, world)
    mixup = build_mixup(config, config.MODEL.NUM_CLASSES)

    seed_all(config.SEED)
    model = build_model(config)
    freeze(model, config.TRAIN.FREEZE)
    if config.TRAIN.SYNC_BN and world.distributed:
        if world.device.type != "cuda":
            raise UserError("TRAIN.SYNC_BN is True, which needs CUDA; accepted on the CPU: False")
        model = convert_sync_batchnorm(model)

    with open_run_folder(config, world) as folder:
        if not config.TRAIN.AUTO_RESUME:
            folder.refuse_overwriting()
        with writing_to(folder.path):
            logger = create_logger("train", world.rank, folder.path)
        log_start(config, notes + folder.notes, model, world, logger)
        try:
            fit(config, model, train_loader, eval_loader, mixup, folder, world, logger, request)
        except UserError as error:
            logger.error(str(error), extra=FILE_ONLY)  # the console gets it from run_entry_point
            raise


def fit(
    config,
    model: nn.Module,
    train_loader: DataLoader,
    eval_loader: DataLoader,
    mixup: Mixup | None,
    folder: RunFolder,
    world: World,
    logger: Logger,
    request: StopRequest,
) -> None:
    """Trains the model from wherever the run in `folder` is to TRAIN.EPOCHS, evaluating and saving after each epoch."""
    # -----------------------------------------------------------------------------------------------------------------
    # Where to start: this run's own newest checkpoint, or else --resume, or else --pretrained, or else fresh
    # -----------------------------------------------------------------------------------------------------------------
    classes = class_names(train_loader.dataset.source)
    content, path = find_start(config, folder, world, logger)
    is_own = path is not None and path.parent == folder.path
    if content:
        load_weights(model, content, path, ema=False, same_size=True)
        log_resume(config, content, path, classes, logger)
    elif config.MODEL.PRETRAINED:
        load_pretrained(model, config.MODEL.PRETRAINED, logger, classes)
    elif config.TRAIN.FREEZE != "none" or config.TRAIN.LAYER_DECAY < 1:
        message = "TRAIN.FREEZE or TRAIN.LAYER_DECAY is set, but the weights are random; --pretrained names others"
        logger.warning(message, extra=ALL_RANKS)
    if is_own:
        for named in filter(None, (config.MODEL.RESUME, config.MODEL.PRETRAINED)):
            message = f"{named} is not read, because the run goes on from {path}; to start from it, give a new --tag"
            logger.warning(message, extra=ALL_RANKS)
    if content and content["epoch"] >= config.TRAIN.EPOCHS:
        best = content["best"]
        logger.info(
            f"nothing left to train: {content['epoch']} of {config.TRAIN.EPOCHS} epochs are done, best top-1 "
            f"{best['top1']:.3f} % (epoch {best['epoch']}); everything is in {folder.path}"
        )
        return
    if world.is_main:
        with writing_to(folder.path):
            save_config(config, folder.path)

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer and schedule
    # -----------------------------------------------------------------------------------------------------------------
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    prepare_model(config, model, world.device)
    ema = None
    if config.TRAIN.EMA_DECAY:
        ema = ModelEmaV3(model, config.TRAIN.EMA_DECAY, use_warmup=True)
        if config.TRAIN.COMPILE:
            ema.module.compile()
    scale = lr_scale(config, world.size)
    optimizer = build_optimizer(config, model, config.TRAIN.BASE_LR * scale)
    steps = steps_per_epoch(train_loader, config.TRAIN.ACCUMULATION_STEPS)
    scheduler = build_scheduler(config, optimizer, steps, scale)
    amp = resolve_amp(config, world.device)
    state = TrainingState(model, optimizer, build_scaler(amp, world.device), amp, classes, ema)
    images = len(train_loader.dataset)
    left_out = len(train_loader.sampler) % config.DATA.BATCH_SIZE
    if left_out > len(train_loader.sampler) // 5:
        message = f"each epoch leaves out {left_out} of {len(train_loader.sampler)} images, too few for a batch"
        logger.warning(f"{message} of {config.DATA.BATCH_SIZE}; a smaller --batch-size leaves out fewer")
    logger.info(
        f"{images} training and {len(eval_loader.dataset)} validation images, "
        f"{config.MODEL.NUM_CLASSES} classes; {steps} steps per epoch; "
        f"peak lr {config.TRAIN.BASE_LR * scale:.3e} = {config.TRAIN.BASE_LR:g} x global batch / "
        f"{config.TRAIN.LR_REFERENCE_BATCH}; precision {str(amp or torch.float32).removeprefix('torch.')}"
    )

    wrapped = model
    if world.distributed:
        on_cpu = world.device.type == "cpu"
        # Running statistics are averaged once per epoch instead of being sent from rank 0 at each step. The name of
        # the argument that says so changed in PyTorch 2.15.
        known = inspect.signature(DistributedDataParallel).parameters
        no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        wrapped = DistributedDataParallel(
            model,
            device_ids=None if on_cpu else [world.local_rank],
            gradient_as_bucket_view=True,
            # Looking for unused parameters, of which there are none, keeps it from laying out its buckets anew after
            # the first step: from three processes on, a gradient's place there decides about the order of its sum, and
            # a resumed run would differ in the last bit. GPUs promise no such thing and save the time.
            find_unused_parameters=on_cpu,
            **no_broadcast,
        )
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        if config.TRAIN.COMPILE:
            # In the compiler's gradients of 1 x 1 kernels, those of dimensions of one element.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

    # After wrapping, which makes all processes' running statistics rank 0's.
    if content:
        state.restore_rest(content, path, config, images, steps, world, logger)
        if is_own:
            state.run = content["run"] or state.run
        else:
            state.best = {"top1": -1.0, "epoch": 0}  # this run's own best
        del content  # as large as the model and the optimizer together

    # -----------------------------------------------------------------------------------------------------------------
    # Epochs
    # -----------------------------------------------------------------------------------------------------------------
    def save(*names: str) -> None:
        content = state.capture(config, images, world)
        failure = None
        try:
            if world.is_main:
                folder.save(content, names)
        except UserError as error:
            failure = error
        # All wait: a launcher ends the others as soon as one has ended, and all must know if it failed.
        if message := from_main(failure and str(failure), world):
            raise failure or UserError(f"the main process cannot write the checkpoint: {message}")

    with writing_to(folder.path):
        metrics_log = MetricsLog(folder.path, state.epoch, logger) if world.is_main else None
    request.deferred = True
    with Watchdog(world, config.TIMEOUT, logger) as watchdog:
        control = Control(request, watchdog, folder.due, save)
        if metrics_log:
            control.show = partial(metrics_log.write_images, "training images as the model gets them")
        while state.epoch < config.TRAIN.EPOCHS:
            try:
                metrics = train_one_epoch(
                    config, state, wrapped, train_loader, scheduler, mixup, world, logger, control
                )
                if world.distributed and not state.progress.trained:
                    for trained in (model, *([ema.module] if ema else [])):
                        distribute_bn(trained, world.size, reduce=True)
                state.progress.trained = True
                metrics |= evaluate(config, model, eval_loader, world, logger, control, state.epoch)
                if ema:
                    metrics |= {f"{name}_raw": metrics[name] for name in ("top1", "top5", "val_loss")}
                    metrics |= evaluate(config, ema.module, eval_loader, world, logger, control, state.epoch, turn=1)
            except (Stopped, LoadingFailed) as reason:
                watchdog.at(state.epoch, 3, doing="writing the last checkpoint")
                request.saving = True
                save()
                logger.info(
                    f"stopped in epoch {state.epoch + 1} after {state.progress.step} of {steps} steps, saved in "
                    f"{folder.last}; the same command goes on from there"
                )
                if isinstance(reason, LoadingFailed):
                    raise reason.error from None
                raise
            state.epoch += 1
            state.progress = Progress(skipped_in_row=state.progress.skipped_in_row)
            is_best = metrics["top1"] > state.best["top1"]
            if is_best:
                state.best = {"top1": metrics["top1"], "epoch": state.epoch}
            log_epoch(config, state, metrics, logger)
            names = ["best.pth"] if is_best else []
            if state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS:
                names.append(f"ckpt_epoch_{state.epoch}.pth")
            watchdog.at(state.epoch, -1, doing=f"writing the checkpoint after epoch {state.epoch}")
            if world.is_main:
                # Metrics first: if the run is killed between the two, the epoch is trained and its line written again.
                with writing_to(folder.path):
                    metrics_log.write({"epoch": state.epoch, **metrics, "processes": world.size})
                    if len(names) > is_best:  # with the checkpoints that are kept
                        metrics_log.write_histograms("token mixing weights", token_mixing_weights(model), state.epoch)
            save(*names)
    if metrics_log:
        final = {name: metrics[name] for name in ("top1", "top5", "val_loss", "train_loss")}
        with writing_to(folder.path):
            metrics_log.write_hparams(leaves(config), {**final, "best_top1": state.best["top1"]})
        metrics_log.close()
    logger.info(f"best top-1 {state.best['top1']:.3f} % (epoch {state.best['epoch']}); everything is in {folder.path}")


def find_start(config, folder: RunFolder, world: World, logger: Logger) -> tuple[dict[str, Any] | None, Path | None]:
    """The checkpoint to go on from, if any: its content and path.

    Raises:
        CheckpointError: it cannot be used.
    """
    found = None
    if config.TRAIN.AUTO_RESUME:
        # The main process decides: two that look at different moments, or disks, could start from different places.
        failure = None
        try:
            found = folder.newest(logger) if world.is_main else None
        except UserError as error:
            failure = error
        path, message = from_main((found and found[0], failure and str(failure)), world)
        if message:
            raise failure or CheckpointError(message)
        if path:
            return (found[1] if found else read_training_state(path)), path
    if config.MODEL.RESUME:
        path = Path(config.MODEL.RESUME)
        return read_training_state(path), path
    return None, None


def log_start(config, notes: list[str], model: nn.Module, world: World, logger: Logger) -> None:
    """What is run on what."""
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


def log_resume(config, content: dict[str, Any], path: Path, classes: list[str], logger: Logger) -> None:
    """What a run goes on from, and what has changed since.

    Raises:
        CheckpointError: the optimizer is another one, or what it trains, or the classes of the data are.
    """
    step = content["progress"]["step"]
    done = f"{content['epoch']} epochs{f' and {step} steps' if step else ''} done"
    logger.info(f"resumed from {path}: {done}, best top-1 {content['best']['top1']:.3f} %")
    before, now = content["config"], leaves(config)
    if before["TRAIN.OPTIMIZER.NAME"] != config.TRAIN.OPTIMIZER.NAME:
        raise CheckpointError(
            f"{path}: has the state of {before['TRAIN.OPTIMIZER.NAME']}, but TRAIN.OPTIMIZER.NAME is "
            f"{config.TRAIN.OPTIMIZER.NAME}; --pretrained {path} with a new --tag starts from its weights alone"
        )
    if other_classes(content, classes):
        raise CheckpointError(
            f"{path}: was trained on classes {_some(content['classes'])}, but the data has {_some(classes)}: labels "
            f"have changed their meaning; --pretrained {path} with a new --tag starts from its weights"
        )
    frozen = before.get("TRAIN.FREEZE", "none") != config.TRAIN.FREEZE
    if frozen or (before.get("TRAIN.LAYER_DECAY", 1.0) < 1) != (config.TRAIN.LAYER_DECAY < 1):
        key = "TRAIN.FREEZE" if frozen else "TRAIN.LAYER_DECAY"
        raise CheckpointError(
            f"{path}: {key} was {before.get(key, 'not there')}, is {find(config, key.split('.'))}, for which its "
            f"optimizer state is of no use; --pretrained {path} with a new --tag starts from its weights"
        )
    # Keys that only newer, or only older, configs have did not change what the run does.
    for key in sorted(set(before) & set(now)):
        if before[key] != now[key] and key not in ("MODEL.RESUME", "MODEL.PRETRAINED"):
            message = f"changed since that checkpoint: {key} was {before[key]!r}, is {now[key]!r}"
            logger.warning(message, extra=ALL_RANKS)


def _some(classes: list[str]) -> str:
    """The first of them, for messages."""
    return ", ".join(classes[:5]) + f" and {len(classes) - 5} more" * (len(classes) > 5)


def log_epoch(config, state: TrainingState, metrics: dict[str, Any], logger: Logger) -> None:
    """An epoch's results, and what was not as it should be."""
    raw = f" (moving average; the weights themselves: {metrics['top1_raw']:.3f} %)" if "top1_raw" in metrics else ""
    logger.info(
        f"epoch {state.epoch}/{config.TRAIN.EPOCHS} {main_eval.describe(metrics)}{raw}; "
        f"best top-1 {state.best['top1']:.3f} % (epoch {state.best['epoch']}); trained at "
        f"{metrics['images_per_second']:.0f} images/s, {100 * metrics['data_wait']:.0f} % of the time waiting for data"
    )
    if metrics["unreadable_train"]:
        message = f"{metrics['unreadable_train']} unreadable images in this epoch's training, replaced"
        logger.warning(message, extra=ALL_RANKS)
    if metrics["skipped_steps"]:
        message = f"{metrics['skipped_steps']} steps of this epoch skipped: loss or gradient not finite"
        logger.warning(message, extra=ALL_RANKS)


if __name__ == "__main__":
    run_entry_point(main)
