"""Where a model's parameters, multiply-adds, activations and memory are: per stage and block, for any config.

    python tools/complexity.py --cfg configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml
    python tools/complexity.py --cfg configs/peers/swin_tiny.yaml --csv swin_tiny.csv
    python tools/complexity.py --table1

No data, no weights and no arithmetic are needed: PyTorch's meta device runs the model on shapes alone. --table1 counts
the modules behind the Strip-MLP paper's table 1 and prints what they give beside what the paper says.
"""

import argparse
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, parse_first, run_entry_point


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg", metavar="FILE", help="YAML config file")
    what.add_argument("--table1", action="store_true", help="the paper's table 1, counted")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to set"
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the table there too")
    args = parser.parse_args()
    if args.table1 and (args.opts or args.csv):
        parser.error("--opts and --csv go with --cfg; --table1 is of the paper's models alone")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import timm
import torch
from tables import as_csv, markdown
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.datasets import EMNIST

from config import image_size, load_config
from models import build_model, idle_keys
from models.build import ModelError
from models.chains import CHAINED
from models.strip_mlp import GlobalResponseNorm

# Of the data sets with a fixed number; an image folder is taken for ImageNet-1K.
CLASSES = {"CIFAR10": 10, "CIFAR100": 100, "101_ObjectCategories": 101, "digits": 10}
CLASSES |= {"FashionMNIST": 10, "MNIST": 10, "KMNIST": 10}  # EMNIST's depends on its split
BATCH = 2  # the least with which BatchNorm trains on a 1 x 1 map


@dataclass
class Count:
    """Of one module with all inside it; activations and memory per image."""

    parameters: int = 0
    macs: int = 0  # multiply-adds of convolutions, matrix products and attention
    activations: int = 0  # elements of their outputs
    weight_bytes: int = 0
    saved_bytes: int = 0  # kept for the backward pass

    def __iadd__(self, other: "Count") -> "Count":
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


class Complexity:
    """Counts of a model, by module.

    Args:
        model: is moved to the meta device, where it stays.
        img_size: (height, width) of the images in pixels.
        in_chans: their channels.
    """

    def __init__(self, model: nn.Module, img_size: tuple[int, int], in_chans: int = 3):
        self.model = model.to("meta").train()
        self._counts: dict[str, Count] = defaultdict(Count)  # by module, without the modules inside it
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                self._counts[name].parameters += parameter.numel()
                self._counts[name].weight_bytes += parameter.numel() * parameter.element_size()
        images = torch.empty(BATCH, in_chans, *img_size, device="meta")
        _Products(model, self._counts).run(images)
        _Kept(model, self._counts).run(images)

    def of(self, name: str = "") -> Count:
        """Of the module of that name with all inside it; of the whole model without a name."""
        total = Count()
        for path, count in self._counts.items():
            if not name or path == name or path.startswith(f"{name}."):
                total += count
        return total

    def rows(self) -> Iterator[tuple[str, str, Count]]:
        """(kind, name, count) of the stages, each before its blocks, and of everything else; the model last. Without
        the blocks of stages, the rows add up to the model.

        Stages are what timm's `feature_info` says, if they have parts; networks that are one row of blocks have none.
        """
        stages = {info["module"] for info in getattr(self.model, "feature_info", ())}
        for kind, name in _walk("", self.model, stages):
            count = self._counts[name] if kind == "own" else self.of(name)
            if count != Count():
                yield kind, name or "(itself)", count
        yield "model", "total", self.of()


def _walk(name: str, module: nn.Module, stages: set[str], beside_stages: bool = False) -> Iterator[tuple[str, str]]:
    """(kind, name) of everything that is listed of a module; "own" is what a container has besides its parts."""
    parts = [(f"{name}.{child}".removeprefix("."), part) for child, part in module.named_children()]
    is_ancestor = any(stage.startswith(f"{name}.") for stage in stages)
    if not name or is_ancestor or (isinstance(module, nn.ModuleList) and not beside_stages):
        yield "own", name
        for path, part in parts:
            yield from _walk(path, part, stages, bool(name) and is_ancestor)
    elif (name in stages or beside_stages) and _has_blocks(module):
        yield "stage", name
        for path, part in parts:
            if path.endswith("blocks"):
                yield from (("block", f"{path}.{child}") for child, _ in part.named_children())
            else:
                yield "block", path
    else:
        yield "block" if beside_stages else "", name


def _has_blocks(module: nn.Module) -> bool:
    """Whether its parts have parts of their own, where a block, a norm or a stem is made of layers."""
    parts = list(module.children())
    layers = [part for part in parts if not list(part.children())]
    return len(layers) < len(parts) and not any(list(layer.parameters()) for layer in layers)


class _Watch:
    """Adds what happens in a forward pass to the counts of the module in which it happens."""

    def __init__(self, model: nn.Module, counts: dict[str, Count]):
        super().__init__()
        self._model, self._counts = model, counts
        self._inside = [""]

    def run(self, images: torch.Tensor) -> None:
        hooks = []
        for name, module in self._model.named_modules():
            if self._listens(name, module):
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            self._watch(images)
        finally:
            for hook in hooks:
                hook.remove()

    def _listens(self, name: str, module: nn.Module) -> bool:
        return True

    def _leave(self, *_) -> None:
        self._inside.pop()


class _Products(_Watch, TorchDispatchMode):
    """Multiply-adds and activations."""

    def _watch(self, images: torch.Tensor) -> None:
        with self:
            self._model(images)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flops = flop_registry.get(func._overloadpacket)
        if flops is None:
            with self:  # what it is made of may be counted, as PyTorch's own FlopCounterMode does
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        count = self._counts[self._inside[-1]]
        count.macs += flops(*args, **kwargs, out_val=result) // 2 // BATCH
        output = result[0] if isinstance(result, tuple | list) else result
        count.activations += output.numel() // BATCH
        return result


class _Kept(_Watch):
    """What is kept for the backward pass."""

    def _listens(self, name: str, module: nn.Module) -> bool:
        # Layers that would be computed together are left alone, because they would not be if someone listened.
        return "." not in name or type(module) not in (*CHAINED, GlobalResponseNorm)

    def _watch(self, images: torch.Tensor) -> None:
        known = (*self._model.parameters(), *self._model.buffers(), images)
        self._seen = {_storage(tensor) for tensor in known}
        with saved_tensors_hooks(self._save, lambda tensor: tensor):
            output = self._model(images)  # holds the graph, so that no storage's address is used again
        del output

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        # Tensors that share memory, and those that two operations need, are kept once.
        storage = _storage(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self._counts[self._inside[-1]].saved_bytes += tensor.untyped_storage().nbytes() // BATCH
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def without_data(config):
    """The config of a model that can be built and measured without its data: with as many classes as its data set
    usually has if it does not say how many, and without recomputing activations, which hides what a pass keeps."""
    config = config.clone()
    config.defrost()
    if config.DATA.DATASET == "EMNIST" and not config.MODEL.NUM_CLASSES:
        config.MODEL.NUM_CLASSES = len(EMNIST.classes_split_dict[config.DATA.EMNIST_SPLIT])
    config.MODEL.NUM_CLASSES = config.MODEL.NUM_CLASSES or CLASSES.get(config.DATA.DATASET, 1000)
    config.TRAIN.USE_CHECKPOINT = False
    return config


def model_complexity(config) -> Complexity:
    """Of the model of a config.

    Raises:
        ModelError: the model cannot be built, or cannot run on images of that size.
    """
    config = without_data(config)
    try:
        return Complexity(build_model(config), image_size(config))
    except ModelError:
        raise
    except Exception as error:  # any timm model's own, for sizes that it does not take
        problem = f"{config.MODEL.NAME} at {config.DATA.IMG_SIZE} pixels: {error}"
        raise ModelError(f"the model of the config cannot be built: {problem}") from error


def write_csv(path: Path, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table to what --csv names. Raises UserError if that cannot be written."""
    try:
        path.write_text(as_csv(titles, rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written: {error.strerror}") from error


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.2f}"


def report(complexity: Complexity) -> str:
    rows = [
        (
            f"**{name}**" if kind in ("stage", "model") else name,
            f"{count.parameters:,}",
            f"{count.macs:,}",
            f"{count.activations:,}",
            megabytes(count.weight_bytes),
            megabytes(count.saved_bytes),
        )
        for kind, name, count in complexity.rows()
    ]
    titles = ("module", "parameters", "MACs", "activations", "weights, MiB", "kept for backward, MiB")
    return markdown(titles, rows)


def table1() -> str:
    """The paper's table 1, stage by stage for the base models at 224 x 224, and its four figures beside ours."""
    sparse = Complexity(timm.create_model("sparse_mlp_base"), (224, 224))
    strip = Complexity(timm.create_model("strip_mlp_base"), (224, 224))
    rows, shares = [], []
    for stage in range(4):
        mixing, name = sparse.model.stages[stage][0].token_mixing, f"stages.{stage}.0.token_mixing"
        cgsmm, cgsmm_name = strip.model.stages[stage][0].token_mixing.cgsmm, f"stages.{stage}.0.token_mixing.cgsmm"
        # As the paper counts: weights without biases.
        tokens = mixing.mix_h.weight.numel() + mixing.mix_w.weight.numel()
        token_macs = sparse.of(f"{name}.mix_h").macs + sparse.of(f"{name}.mix_w").macs
        fusion, fusion_macs = mixing.proj.weight.numel(), sparse.of(f"{name}.proj").macs
        one = cgsmm.strip_h.weight.numel()
        both = one + cgsmm.strip_w.weight.numel()
        strip_fusion = strip.of(f"{cgsmm_name}.fuse_h").parameters + strip.of(f"{cgsmm_name}.fuse_w").parameters
        shares.append(
            (tokens, token_macs / (token_macs + fusion_macs), one / (one + strip_fusion), both / (both + strip_fusion))
        )
        rows.append(
            (
                stage + 1,
                mixing.proj.out_channels,
                mixing.mix_w.out_features,
                f"{tokens:,}",
                f"{tokens / (tokens + fusion):.2%}",
                f"{shares[-1][1]:.2%}",
                f"{one:,}",
                f"{shares[-1][2]:.2%}",
                f"{shares[-1][3]:.2%}",
            )
        )
    titles = (
        *("stage", "C", "H = W", "Sparse MLP: interaction", "of parameters", "of MACs"),
        *("CGSMM: one direction", "of parameters", "both directions, of parameters"),
    )
    first, last = shares[0], shares[-1]
    rounded = round(first[0] / 1000, 2) / round(last[0] / 1000, 2)
    figures = [
        ("Sparse MLP, stage 4: parameters of the interaction", "0.10 k", f"{last[0] / 1000:.2f} k ({last[0]})"),
        (
            "as many times fewer than in stage 1",
            "62.7x",
            f"{first[0] / last[0]:.1f}x ({first[0]:,} / {last[0]}); {rounded:.1f}x from figures rounded to 0.01 k",
        ),
        ("its share of the MACs of interaction and fusion", "0.52 %", f"{100 * last[1]:.2f} %"),
        (
            "CGSMM, stage 4: share of the parameters of interaction and fusion",
            "2.01 %",
            f"{100 * last[2]:.2f} % (one direction, both fusions); {100 * last[3]:.2f} % with both directions",
        ),
    ]
    return markdown(titles, rows) + "\n" + markdown(("figure", "published", "counted"), figures)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
    if args.table1:
        print(table1(), end="")
        return
    config, notes = load_config(args.cfg, args.opts, idle_keys=idle_keys)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    complexity = model_complexity(config)
    total = complexity.of()
    batch, (height, width) = config.DATA.BATCH_SIZE, image_size(config)
    print(report(complexity), end="")
    # Weights, gradients and AdamW's two moments, and what the forward pass keeps.
    training = 4 * total.weight_bytes + batch * total.saved_bytes
    print(
        f"\nper {height} x {width} image, float32; training with AdamW at batch {batch} "
        f"holds at least {training / 2**30:.2f} GiB (weights, gradients, moments, what is kept for the backward pass)"
    )
    if args.csv:
        titles = ("kind", "module", *(field.name for field in fields(Count)))
        rows = [(kind, name, *vars(count).values()) for kind, name, count in complexity.rows()]
        write_csv(args.csv, titles, rows)


if __name__ == "__main__":
    run_entry_point(main)
