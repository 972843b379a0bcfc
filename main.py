"""Train a model on one process or many.

    python main.py --cfg configs/strip_mlp_pico_digits.yaml
    torchrun --nproc_per_node 8 main.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA

Everything a run writes goes to OUTPUT/MODEL.NAME/TAG; the same command again continues there.
"""

import argparse
import inspect
from logging import Logger
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import main_eval
from checkpoint import FORMAT, CheckpointError, load_pretrained, load_weights, read_training_state, save_checkpoint
from config import add_arguments, get_config, leaves, save_config
from data import build_eval_loader, build_mixup, build_sources, build_train_loader, check_num_classes
from distributed import World, close_world, from_main, init_world
from engine import evaluate, resolve_amp, steps_per_epoch, train_one_epoch
from logger import ALL_RANKS, FILE_ONLY, MetricsLog, create_logger
from lr_scheduler import build_scheduler, lr_scale
from models import build_model
from optimizer import build_optimizer, load_optimizer_state
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
    world = init_world(config.DEVICE, args.local_rank)
    if args.eval or args.throughput:
        main_eval.run(config, notes, world, args.resume or args.pretrained, args.throughput)
    else:
        train(config, notes, world)
    close_world(world)


def train(config, notes: list[str], world: World) -> None:
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
    try:
        model = build_model(config)
    except ValueError as error:
        raise UserError(f"the model of the config cannot be built: {error}") from error
    if config.TRAIN.SYNC_BN and world.distributed:
        if world.device.type != "cuda":
            raise UserError("TRAIN.SYNC_BN is True, which needs CUDA; accepted on the CPU: False")
        model = convert_sync_batchnorm(model)

    folder = create_run_folder(config)
    with writing_to(folder):
        logger = create_logger("train", world.rank, folder)
    log_start(config, notes, model, world, logger)
    try:
        fit(config, model, train_loader, eval_loader, mixup, folder, world, logger)
    except UserError as error:
        logger.error(str(error), extra=FILE_ONLY)  # the console gets it from run_entry_point
        raise


def fit(
    config,
    model: nn.Module,
    train_loader: DataLoader,
    eval_loader: DataLoader,
    mixup: Mixup | None,
    folder: Path,
    world: World,
    logger: Logger,
) -> None:
    """Trains the model from wherever the run in `folder` is to TRAIN.EPOCHS, evaluating and saving after each epoch."""
    # -----------------------------------------------------------------------------------------------------------------
    # Where to start: this run's own last.pth, or else --resume, or else --pretrained, or else fresh
    # -----------------------------------------------------------------------------------------------------------------
    last = folder / "last.pth"
    state = None
    best = {"top1": -1.0, "epoch": 0}
    # The main process decides: the folders of several machines may differ, the place to start from must not.
    if config.TRAIN.AUTO_RESUME and from_main(last.exists(), world):
        state = resume(config, model, last, logger)
        best = state["best"]
        for named in filter(None, (config.MODEL.RESUME, config.MODEL.PRETRAINED)):
            message = f"{named} is not read, because the run goes on from {last}; to start from it, give a new --tag"
            logger.warning(message, extra=ALL_RANKS)
    elif config.MODEL.RESUME:
        state = resume(config, model, Path(config.MODEL.RESUME), logger)
    elif config.MODEL.PRETRAINED:
        load_pretrained(model, config.MODEL.PRETRAINED, logger)
    start_epoch = state["epoch"] if state else 0
    if start_epoch >= config.TRAIN.EPOCHS:
        logger.info(
            f"nothing left to train: {start_epoch} of {config.TRAIN.EPOCHS} epochs are done, best top-1 "
            f"{best['top1']:.3f} % (epoch {best['epoch']}); everything is in {folder}"
        )
        return
    if world.is_main:
        with writing_to(folder):
            save_config(config, folder)

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer and schedule
    # -----------------------------------------------------------------------------------------------------------------
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    model.to(world.device)
    scale = lr_scale(config, world.size)
    optimizer = build_optimizer(config, model, config.TRAIN.BASE_LR * scale)
    steps = steps_per_epoch(train_loader, config.TRAIN.ACCUMULATION_STEPS)
    scheduler = build_scheduler(config, optimizer, steps, scale)
    amp = resolve_amp(config, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=amp == torch.float16)
    if state:
        load_optimizer_state(optimizer, state["optimizer"])
        if state["scaler"] and scaler.is_enabled():  # both empty or off outside float16
            scaler.load_state_dict(state["scaler"])
        del state  # as large as the model and the optimizer together
    logger.info(
        f"{len(train_loader.dataset)} training and {len(eval_loader.dataset)} validation images, "
        f"{config.MODEL.NUM_CLASSES} classes; {steps} steps per epoch; "
        f"peak lr {config.TRAIN.BASE_LR * scale:.3e} = {config.TRAIN.BASE_LR:g} x global batch / "
        f"{config.TRAIN.LR_REFERENCE_BATCH}; precision {str(amp or torch.float32).removeprefix('torch.')}"
    )

    wrapped = model
    if world.distributed:
        device_ids = [world.local_rank] if world.device.type == "cuda" else None
        # Running statistics are averaged once per epoch instead of being sent from rank 0 at each step. The name of
        # the argument that says so changed in PyTorch 2.15.
        known = inspect.signature(DistributedDataParallel).parameters
        no_broadcast = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **no_broadcast)

    # -----------------------------------------------------------------------------------------------------------------
    # Epochs
    # -----------------------------------------------------------------------------------------------------------------
    with writing_to(folder):
        metrics_log = MetricsLog(folder, start_epoch, logger) if world.is_main else None
    for epoch in range(start_epoch, config.TRAIN.EPOCHS):
        metrics = train_one_epoch(
            config, wrapped, train_loader, optimizer, scheduler, scaler, mixup, epoch, world, logger
        )
        if world.distributed:
            distribute_bn(model, world.size, reduce=True)
        metrics |= evaluate(config, model, eval_loader, world, logger)
        done = epoch + 1
        is_best = metrics["top1"] > best["top1"]
        if is_best:
            best = {"top1": metrics["top1"], "epoch": done}
        logger.info(
            f"epoch {done}/{config.TRAIN.EPOCHS} {main_eval.describe(metrics)}; "
            f"best top-1 {best['top1']:.3f} % (epoch {best['epoch']})"
        )
        if metrics["unreadable_train"]:
            message = f"{metrics['unreadable_train']} unreadable images in this epoch's training, replaced"
            logger.warning(message, extra=ALL_RANKS)
        if world.is_main:
            # Metrics first: if the run is killed between the two, the epoch is trained and its line written again.
            with writing_to(folder):
                metrics_log.write({"epoch": done, **metrics})
            names = ["best.pth"] if is_best else []
            if done % config.SAVE_FREQ == 0 or done == config.TRAIN.EPOCHS:
                names.append(f"ckpt_epoch_{done}.pth")
            save_checkpoint(
                {
                    "format": FORMAT,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "epoch": done,
                    "best": best,
                    "config": leaves(config),
                },
                *(folder / name for name in names),
                last,
            )
    if metrics_log:
        metrics_log.close()
    logger.info(f"best top-1 {best['top1']:.3f} % (epoch {best['epoch']}); everything is in {folder}")


def create_run_folder(config) -> Path:
    """OUTPUT/MODEL.NAME/TAG, made if need be. Raises UserError where it cannot be written, or holds a run that this
    one would overwrite."""
    folder = Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not config.TRAIN.AUTO_RESUME and (folder / "last.pth").exists():
        raise UserError(
            f"{folder}: holds a run already, which TRAIN.AUTO_RESUME False would overwrite; choose another --tag, or "
            "continue it with TRAIN.AUTO_RESUME True"
        )
    return folder


def log_start(config, notes: list[str], model: nn.Module, world: World, logger: Logger) -> None:
    """What is run on what."""
    for note in notes:
        logger.warning(note, extra=ALL_RANKS)
    logger.info(f"config:\n{config.dump()}")
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{config.MODEL.NAME}: {parameters:,} parameters; torch {torch.__version__}, timm {timm.__version__}, "
        f"{world.size} x {torch.cuda.get_device_name() if world.device.type == 'cuda' else 'cpu'}"
    )


def resume(config, model: nn.Module, path: Path, logger: Logger) -> dict[str, Any]:
    """Loads the weights of a training checkpoint into the model and returns its content."""
    state = read_training_state(path)
    load_weights(model, state, path)
    logger.info(f"resumed from {path}: {state['epoch']} epochs done, best top-1 {state['best']['top1']:.3f} %")
    before, now = state["config"], leaves(config)
    if before["TRAIN.OPTIMIZER.NAME"] != config.TRAIN.OPTIMIZER.NAME:
        raise CheckpointError(
            f"{path}: has the state of {before['TRAIN.OPTIMIZER.NAME']}, but TRAIN.OPTIMIZER.NAME is "
            f"{config.TRAIN.OPTIMIZER.NAME}; --pretrained {path} with a new --tag starts from its weights alone"
        )
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key) and key not in ("MODEL.RESUME", "MODEL.PRETRAINED"):
            message = f"changed since that checkpoint: {key} was {before.get(key)!r}, is {now.get(key)!r}"
            logger.warning(message, extra=ALL_RANKS)
    return state


if __name__ == "__main__":
    run_entry_point(main)
