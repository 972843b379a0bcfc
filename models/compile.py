"""torch.compile, of a whole model or of its repeated blocks."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList)
# PyTorch gives up on a function after 8 graphs. Blocks share one function, and each stage has a graph for training and
# one for evaluation.
MOST_GRAPHS = 64


def compile_model(model: nn.Module, unit: str, **options) -> None:
    """Compiles the forward pass, in place; parameters keep their names.

    Args:
        model: if it has a `compiled_part`, that alone is compiled.
        unit: "model": one graph of all of it. "blocks": a graph of each kind of `repeated_blocks`, all else as it is,
            which takes less time to compile. The model, if it has none.
        **options: of torch.compile.
    """
    model = getattr(model, "compiled_part", model)
    blocks = list(repeated_blocks(model)) if unit == "blocks" else []
    if not blocks:
        model.compile(**options)
        return
    allow_graphs(MOST_GRAPHS)
    for block in blocks:
        # Stages have maps of different sizes. A graph for any size would be slower.
        block.compile(**{**options, "dynamic": False})


def allow_graphs(count: int) -> None:
    """Lets PyTorch make at least so many graphs of one function."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.7
    setattr(config, name, max(getattr(config, name), count))


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that stages are made of: the outermost modules of each class of which a container has two or more with
    parameters of the same shapes."""
    classes = set()
    for container in model.modules():
        if isinstance(container, CONTAINERS):
            kinds = Counter(_kind(child) for child in container if _is_composed(child))
            classes |= {kind[0] for kind, count in kinds.items() if count > 1}
    return _outermost(model, tuple(classes))


def _is_composed(module: nn.Module) -> bool:
    """Neither a single layer nor a mere container."""
    return any(module.children()) and not isinstance(module, CONTAINERS)


def _kind(module: nn.Module) -> tuple:
    return type(module), tuple((name, value.shape) for name, value in module.named_parameters())


def _outermost(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, classes):
            yield child
        else:
            yield from _outermost(child, classes)
