"""Freezing parts of a model, for fine-tuning and linear probes.

timm.utils.freeze would replace BatchNorm by a layer without its batch counter, so that checkpoints would have other
entries; without that option it is the one line of `requires_grad_` here.
"""

from torch import nn

from utils import UserError

from .backbone import classifiers


def freeze(model: nn.Module, what: str) -> None:
    """Freezes parameters of the model, in place.

    Args:
        what: "none"; "backbone", which is all but the classifier; or names of modules, separated by commas, such as
            "patch_embed,stages.0".

    Raises:
        UserError: the model has no module of that name, or nothing is left to train.
    """
    if what == "none":
        return
    modules = dict(model.named_modules())
    names = [""] if what == "backbone" else [name.strip() for name in what.split(",")]
    for name in names:
        if name not in modules or (not name and what != "backbone"):
            known = ", ".join(dict.fromkeys(known.partition(".")[0] for known in modules if known))
            raise UserError(
                f"TRAIN.FREEZE names {name!r}, which {type(model).__name__} does not have; accepted: none, backbone, "
                f"or names of modules; those of the first level: {known}"
            )
        modules[name].requires_grad_(False)
    if what == "backbone":
        for classifier in classifiers(model):
            classifier.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"TRAIN.FREEZE is {what!r}, which leaves nothing to train")


def train_mode(model: nn.Module) -> None:
    """`model.train()`, except that modules that are frozen as a whole are in evaluation mode: their BatchNorms keep
    their statistics, and no branch of theirs is dropped."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
