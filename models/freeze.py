"""Parts of a model that training leaves as they are: for fine-tuning, and linear probes of frozen features."""

from torch import nn

from utils import UserError

from .backbone import classifiers


def freeze(model: nn.Module, what: str) -> None:
    """Makes parameters of the model ones that are not trained.

    Args:
        what: "none"; "backbone": all but the classifier; or names of modules, separated by commas ("patch_embed,
            stages.0").

    Raises:
        UserError: a name that the model does not have, or nothing is left to train.
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
                f"or names of modules, of which the first level is: {known}"
            )
        modules[name].requires_grad_(False)
    if what == "backbone":
        for classifier in classifiers(model):
            classifier.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"TRAIN.FREEZE is {what!r}, which leaves nothing to train")


def train_mode(model: nn.Module) -> None:
    """`model.train()`, with whatever is frozen as a whole in evaluation mode: its BatchNorms keep their statistics, and
    its branches are not dropped."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
