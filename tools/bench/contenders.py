"""What the benchmark compares: models by name and mode, and one step of inference or training of each."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.options import COMPILED, LITERAL, MODES
from config import get_default_config
from engine.evaluate import autocast
from models import StripMLP, build_model, compile_model
from models.build import convolutions_to
from models.released import checkpoint_filter_fn
from tests import literal
from utils import UserError

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_CLASSES = 1000
OURS = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("models.")}


@dataclass(frozen=True)
class Contender:
    """A model and how it is run.

    Attributes:
        model: a name that timm knows (ours are registered), or "literal:" and a Strip-MLP's: the equations.
        mode: one of `MODES`.
        is_explicit: whether the user named the mode for this model, and not for all of them.
        revision: of git, from which the model's code comes; empty for this one.
    """

    model: str
    mode: str = "eager"
    is_explicit: bool = True
    revision: str = ""

    @property
    def name(self) -> str:
        """As users give it."""
        return self.model if self.mode == "eager" else f"{self.model}:{self.mode}"

    @property
    def label(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def literal(self) -> str:
        """Label of the equations of the same variant, eager."""
        return f"{LITERAL}{self.model.removeprefix(LITERAL)}"

    @property
    def is_ours(self) -> bool:
        """Whether the model is this project's, and not timm's or the equations."""
        return self.model in OURS

    @property
    def is_reparameterized(self) -> bool:
        return self.mode.startswith("reparameterized")

    @property
    def is_checkpointed(self) -> bool:
        return self.mode.startswith("checkpoint")

    @property
    def task(self) -> str | None:
        """The only one that its mode is of; None for any."""
        return "inference" if self.is_reparameterized else "training" if self.is_checkpointed else None

    @property
    def compiled_unit(self) -> str | None:
        """What is compiled at once, see `compile_model`; None if nothing is."""
        return COMPILED.get(self.mode.rpartition("+")[2])

    @property
    def is_compiled(self) -> bool:
        return self.compiled_unit is not None


def parse_contenders(texts: Iterable[str], modes: Sequence[str] = ("eager",)) -> list[Contender]:
    """Contenders in the order given, each once.

    Args:
        texts: "[literal:]name[:mode]".
        modes: for those that name none, each in all of these.

    Raises:
        UserError: an unknown model or mode.
    """
    found: dict[str, Contender] = {}
    for text in texts:
        prefix = LITERAL if text.startswith(LITERAL) else ""
        name, colon, mode = text.removeprefix(LITERAL).partition(":")
        if not timm.is_model(name):
            nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"nearest names: {', '.join(nearest)}" if nearest else "see timm.list_models()"
            raise UserError(f"contender {text!r}: timm {timm.__version__} has no model {name!r}; {hint}")
        if prefix and not name.startswith("strip_mlp_"):
            raise UserError(
                f"contender {text!r}: there are equations of Strip-MLP alone; accepted: literal:strip_mlp_*"
            )
        if colon and mode not in MODES:
            raise UserError(f"contender {text!r}: mode is {mode!r}; accepted: {', '.join(MODES)}")
        for each in (mode,) if colon else modes:
            contender = Contender(prefix + name, each, is_explicit=bool(colon))
            found.setdefault(contender.label, contender)
    return list(found.values())


class LiteralStripMLP(nn.Module):
    """The equations of `tests/literal.py` as a module: the oracle of the tests, and what speed is measured against.

    In training it does not update the running statistics of BatchNorm, which spares it a little work.

    Args:
        model: a Strip-MLP, whose shape and weights it takes (in copy).

    Shape: (N, in_chans, img_size, img_size) -> (N, num_classes).
    """

    def __init__(self, model: StripMLP):
        super().__init__()
        block = model.stages[0][0]
        self.spec = literal.Spec(
            embed_dim=model.patch_embed.out_channels,
            depths=tuple(len(stage) for stage in model.stages),
            patch_channels=block.token_mixing.cgsmm.strip_h.q,
            img_size=model.img_size,
            num_classes=model.num_classes,
            alpha=block.channel_mixing.mlp.fc1.out_features // model.patch_embed.out_channels,
            strip_width=block.token_mixing.cgsmm.strip_h.weight.shape[-1],
            patch_size=model.patch_embed.stride[0],
            in_chans=model.patch_embed.in_channels,
        )
        shapes = dict(literal.state_dict_shapes(self.spec))
        # The conversion of a released checkpoint keeps the order, and changes shapes by reshaping alone.
        ours = checkpoint_filter_fn({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, model)
        weights, parameters = model.state_dict(), dict(model.named_parameters())
        for (name, shape), our_name in zip(shapes.items(), ours, strict=True):
            value = weights[our_name].detach().reshape(shape).clone()
            if our_name in parameters:
                self.register_parameter(_flat(name), nn.Parameter(value))
            else:
                self.register_buffer(_flat(name), value)
        self.names = {name: _flat(name) for name in shapes}

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: getattr(self, flat) for name, flat in self.names.items()}
        return literal.forward(weights, x, self.spec, training=self.training)["logits"]


def _flat(name: str) -> str:
    """A name that a module takes for a parameter: without dots."""
    return name.replace(".", "__")


def build(name: str, img_size: int) -> nn.Module:
    """The model of a contender's name on the CPU in float32, with 1000 classes and without stochastic depth; the same
    weights at each call.

    Raises:
        ValueError: it cannot be built, or not at that size.
    """
    torch.manual_seed(0)
    config = get_default_config()
    config.MODEL.TYPE, config.MODEL.NAME = "timm", name.removeprefix(LITERAL)
    config.MODEL.NUM_CLASSES, config.MODEL.DROP_PATH_RATE = NUM_CLASSES, 0.0
    config.DATA.IMG_SIZE = img_size
    model = build_model(config)
    return LiteralStripMLP(model) if name.startswith(LITERAL) else model


def reparameterize(model: nn.Module, name: str) -> nn.Module:
    """The model in evaluation mode with what follows one another linearly merged, by its own `reparameterize()`.

    Raises:
        ValueError: it has no such method.
    """
    if not hasattr(model, "reparameterize"):
        raise ValueError(
            f"{name} has no reparameterize(), so that its mode must be one of: eager, compile, compile_blocks"
        )
    return model.eval().reparameterize() or model


def set_checkpointing(model: nn.Module, name: str) -> None:
    """Has the model keep the input of each block alone for the backward pass.

    Raises:
        ValueError: it cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # timm's way of saying so
        raise ValueError(
            f"{name} has no activation checkpointing; accepted modes: eager, compile, compile_blocks"
        ) from error


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same for every contender: one fused kernel, one group of parameters."""
    # A rate at which weights stay what they are: random labels are not to be learnt.
    return torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)


class Step:
    """A forward pass of a contender in evaluation mode, or a whole training step: forward pass, cross-entropy,
    backward pass, AdamW. Call it to run it once.

    Mixed precision is as in `engine/epoch.py`: autocast over float32 weights, and a gradient scaler for float16.

    Args:
        images: (N, 3, S, S), on the device and in the memory format to run in.
        targets: (N,), classes.
        task: one of `TASKS`.
        dtype: of autocast; float32 for none.
        compile_mode: of torch.compile, where the contender's mode asks for it.
        freeze: whether compiled inference has its weights for constants: folded, cast and laid out once.

    Raises:
        ValueError: the contender cannot be built, at this size or in its mode, or its mode is of the other task.
    """

    def __init__(
        self,
        contender: Contender,
        images: Tensor,
        targets: Tensor,
        task: str = "inference",
        dtype: torch.dtype = torch.float32,
        compile_mode: str = "default",
        freeze: bool = False,
    ):
        self.contender, self.images, self.targets, self.task = contender, images, targets, task
        self.device = images.device
        self.amp = None if dtype == torch.float32 else dtype
        model = build(contender.model, images.shape[-1])
        if contender.task not in (None, task):
            raise ValueError(f"{contender.label} is of {contender.task} alone, not of {task}")
        if contender.is_reparameterized:
            model = reparameterize(model, contender.model)
        if contender.is_checkpointed:
            set_checkpointing(model, contender.model)
        is_channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        self.model = model.to(self.device).train(task == "training")
        convolutions_to(model, memory_format)
        self.optimizer = adamw(model) if task == "training" else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.forward = self.model
        self.uses_cuda_graphs = contender.is_compiled and compile_mode != "default" and self.device.type == "cuda"
        if contender.is_compiled:
            mode = None if compile_mode == "default" else compile_mode
            if isinstance(model, LiteralStripMLP) and contender.compiled_unit != "model":
                raise ValueError(f"{contender.model} does not call its blocks; accepted modes: eager, compile")
            compile_model(self.model, contender.compiled_unit, mode=mode, dynamic=False)
            if freeze and task == "inference":
                # Dynamo looks at the setting too, when the first call compiles: an option of torch.compile is not seen.
                self.forward = torch._inductor.config.patch(freezing=True)(self.forward)

    def repeat(self, times: int) -> None:
        """Runs it so many times, and waits for the device."""
        for _ in range(times):
            self()
        self.synchronize()

    def __call__(self) -> Tensor:
        """The logits (N, 1000), or the loss."""
        if self.contender.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()  # what the step before returned may be overwritten
        if self.task == "inference":
            with torch.inference_mode(), autocast(self.device, self.amp):
                return self.forward(self.images)
        with autocast(self.device, self.amp):
            loss = F.cross_entropy(self.forward(self.images), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def held_bytes(self) -> int:
        """Of what it keeps between two steps: weights, moments, images."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self.images, self.targets]
        if self.optimizer:
            tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def set_up_device(device: torch.device) -> None:
    """What makes this process fast on a GPU."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def random_batch(batch: int, img_size: int, device: torch.device, memory_format: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) of noise and targets (N,), the same at each call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, img_size, img_size, generator=generator)
    targets = torch.randint(NUM_CLASSES, (batch,), generator=generator)
    return images.to(device, memory_format=MEMORY_FORMATS[memory_format]), targets.to(device)
