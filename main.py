"""Train a model on one process or many.

    python main.py --cfg configs/strip_mlp_pico_digits.yaml
    torchrun --nproc_per_node 8 main.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml --data-path DATA

Everything a run writes goes to OUTPUT/MODEL.NAME/TAG; the same command again continues there.
"""

import argparse

from config import add_arguments, get_config
from utils import parse_first, run_entry_point, seed_all


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

from data import build_eval_loader, build_mixup, build_sources, build_train_loader, with_class_count
from engine.classification import Classification
from engine.distill import build_teacher, check_distillation
from engine.evaluate import evaluate_run
from engine.fit import group_timeout, run_training, train_in_folder, with_sync_bn
from engine.loss import build_criterion, check_loss
from logger import check_trackers
from models import build_model, freeze, idle_keys
from optimizer import check_optimizer
from runtime.distributed import World, close_world, init_world, lost_processes_named
from runtime.signals import StopRequest


def main() -> None:
    args = parse_args()
    config, notes = get_config(args, idle_keys)
    if args.eval or args.throughput:
        world = init_world(config.DEVICE, args.local_rank, group_timeout(config))
        with lost_processes_named():
            evaluate_run(config, notes, world, args.resume or args.pretrained, args.throughput)
        close_world(world)
        return
    run_training(config, args.local_rank, lambda world, request: train(config, notes, world, request))


def train(config, notes: list[str], world: World, request: StopRequest) -> None:
    """Trains the model of a config in the run's folder. The data, the model and the loss are put together here, before
    anything is written. engine/fit.py is the run itself, engine/epoch.py one epoch of it.

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
    model = with_sync_bn(config, model, world)

    task = Classification(config, train_loader, eval_loader, world, mixup, teacher)
    train_in_folder(config, task, model, notes + sources.notes, world, request)


if __name__ == "__main__":
    run_entry_point(main)
