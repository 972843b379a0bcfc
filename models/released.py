"""Names and shapes of the released checkpoints, Strip-MLP's and its peers', and ours: each way."""

import importlib
import re
from collections.abc import Mapping, Sequence

from timm.models import clean_state_dict
from torch import Tensor, nn

from .backbone import Backbone
from .cycle_mlp import CycleMLP
from .hire_mlp import HireMLP
from .sparse_mlp import SparseMLP
from .strip_mlp import StripMLP
from .vision_permutator import SegmentLinear, VisionPermutator
from .wave_mlp import WaveMLP

Names = Sequence[tuple[str, str]]  # pairs of the beginnings of names, the released one first

STRIP_MLP: Names = (
    ("merging1.", "merging.0."),
    ("merging2.", "merging.1."),
    ("merging3.", "merging.2."),
    ("conv_s1_28.", "shortcut_2to3."),
    ("conv_s1_14.", "shortcut_2to4."),
    ("conv_s2_14.", "shortcut_3to4."),
    ("head.weight", "head.fc.weight"),
    ("head.bias", "head.fc.bias"),
)
WRAPPED = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What follows the number of a block.
STRIP_MLP_BLOCK: Names = (
    ("token_mixing.dwsc.conv_merge.BN.", "token_mixing.norm."),
    ("token_mixing.dwsc.conv_merge.Conv.", "token_mixing.dwconv."),
    ("token_mixing.smlp_block.mlp.0.", "token_mixing.proj."),
    ("token_mixing.smlp_block.mlp.1.", "token_mixing.proj_norm."),
    ("token_mixing.smlp_block.fuse.", "token_mixing.fuse."),
    ("token_mixing.smlp_block.BN.", "token_mixing.cgsmm.norm."),
    ("token_mixing.smlp_block.proj_", "token_mixing.cgsmm.strip_"),
    ("token_mixing.smlp_block.fuse_", "token_mixing.cgsmm.fuse_"),
    ("token_mixing.smlp_block.relate_pos_h.embeddings_table", "token_mixing.cgsmm.pos_h.table"),
    ("token_mixing.smlp_block.relate_pos_w.embeddings_table", "token_mixing.cgsmm.pos_w.table"),
    ("token_mixing.smlp_block.fc_", "token_mixing.lsmm.conv_"),
    ("token_mixing.smlp_block.reweight.", "token_mixing.lsmm.reweight."),
    ("channel_mixing.conv_77.", "channel_mixing.dwconv."),
    ("channel_mixing.layer_norm.", "channel_mixing.norm."),
    ("channel_mixing.fc", "channel_mixing.mlp.fc"),
    ("channel_mixing.grn.gamma", "channel_mixing.mlp.grn.weight"),
    ("channel_mixing.grn.beta", "channel_mixing.mlp.grn.bias"),
)
# The released code numbers the blocks of all stages through, after "token_mix." or "channel_mix."; here that number is
# left out. "proh_w" is its spelling.
SPARSE_MLP: Names = (
    ("to_patch_embedding.0.0.", "patch_embed."),
    ("to_patch_embedding.1.0.", "merging.0."),
    ("to_patch_embedding.2.0.", "merging.1."),
    ("to_patch_embedding.3.0.", "merging.2."),
    ("batch_norm.", "norm."),
    ("mlp_head.0.", "head.fc."),
    ("token_mix.0.conv_merge.BN.", "token_mixing.norm1."),
    ("token_mix.0.conv_merge.Conv.", "token_mixing.dwconv."),
    ("token_mix.1.BN.", "token_mixing.norm2."),
    ("token_mix.1.proj_h.", "token_mixing.mix_w."),
    ("token_mix.1.proh_w.", "token_mixing.mix_h."),
    ("token_mix.1.fuse.", "token_mixing.proj."),
    ("channel_mix.1.", "channel_mixing.norm."),
    ("channel_mix.2.net.0.", "channel_mixing.mlp.fc1."),
    ("channel_mix.2.net.3.", "channel_mixing.mlp.fc2."),
)
# Of the peers of `branches.py`. Their released code numbers stages and transitions through: "network.0", "network.1".
BRANCHES = (CycleMLP, VisionPermutator, HireMLP, WaveMLP)
BRANCHES_HEAD: Names = (("head.weight", "head.fc.weight"), ("head.bias", "head.fc.bias"))
# What follows the number of a block, or of a transition.
BRANCHES_BLOCK: Names = (
    ("attn.mlp_h1_norm.", "token_mixing.mlp_h.norm."),
    ("attn.mlp_h1.", "token_mixing.mlp_h.fc1."),
    ("attn.mlp_h2.", "token_mixing.mlp_h.fc2."),
    ("attn.mlp_w1_norm.", "token_mixing.mlp_w.norm."),
    ("attn.mlp_w1.", "token_mixing.mlp_w.fc1."),
    ("attn.mlp_w2.", "token_mixing.mlp_w.fc2."),
    ("attn.theta_h_conv.", "token_mixing.wave_h.theta."),
    ("attn.fc_h.", "token_mixing.wave_h.amplitude."),
    ("attn.tfc_h.", "token_mixing.wave_h.mix."),
    ("attn.theta_w_conv.", "token_mixing.wave_w.theta."),
    ("attn.fc_w.", "token_mixing.wave_w.amplitude."),
    ("attn.tfc_w.", "token_mixing.wave_w.mix."),
    ("attn.", "token_mixing."),
)


def checkpoint_filter_fn(state_dict: Mapping, model: Backbone) -> dict[str, Tensor]:
    """The state dict for `model` from a released checkpoint or one of ours, for images of any size (timm's convention).

    Args:
        state_dict: bare or under "model"; names may carry the prefixes of wrappers. Unknown names are kept, so that
            loading reports them.
        model: what it is for. Strip weights and position tables are resampled to its image size.
    """
    inner = state_dict.get("model")
    weights = strip_prefixes(inner if isinstance(inner, Mapping) else state_dict)
    return model.resample(to_our_names(weights, model))


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefixes "module." (DistributedDataParallel) and "_orig_mod." (torch.compile), and
    without what FSDP and activation checkpointing put between the parts of names."""
    state_dict = {WRAPPED.sub("", name): value for name, value in state_dict.items()}
    # Twice, because timm 1.0.11 takes them off in one order only.
    return clean_state_dict(clean_state_dict(state_dict))


def to_our_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict under the names and in the shapes of `model`, for images of whatever size; the same one if it has
    them already. Checkpoints for timm's own models are converted by timm."""
    weights = dict(weights)
    if isinstance(model, StripMLP):
        return _strip_mlp_to_ours(weights) if "merging1.weight" in weights else weights
    if isinstance(model, SparseMLP):
        # Our own first files had another name for the projection.
        weights = {name.replace("token_mixing.fuse.", "token_mixing.proj."): value for name, value in weights.items()}
        return _sparse_mlp_to_ours(weights, model) if "to_patch_embedding.0.0.weight" in weights else weights
    if isinstance(model, BRANCHES):
        return _branches_to_ours(weights, model)
    # timm keeps the conversion beside the model's class.
    module = importlib.import_module(type(model).__module__)
    return module.checkpoint_filter_fn(weights, model) if hasattr(module, "checkpoint_filter_fn") else weights


def to_released_names(model: nn.Module) -> dict[str, Tensor] | None:
    """The model's weights under the released names and in the released shapes: the inverse of `to_our_names`. None for
    a model that has no released form.

    The released code loads those of the released models only. Ablations lack some of their entries, or have others.
    """
    if isinstance(model, StripMLP):
        return _strip_mlp_to_released(model.state_dict())
    if isinstance(model, SparseMLP):
        return _sparse_mlp_to_released(model.state_dict(), model)
    if isinstance(model, BRANCHES):
        return _branches_to_released(model.state_dict(), model)
    return None


def _strip_mlp_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for released_name, value in weights.items():
        if block := re.match(r"blocks([1-4])\.(\d+)\.", released_name):
            inside = _translate(released_name[block.end() :], STRIP_MLP_BLOCK)
            name = f"stages.{int(block[1]) - 1}.{block[2]}.{inside}"
        else:
            name = _translate(released_name, STRIP_MLP)
        if name.endswith((".strip_h.weight", ".strip_w.weight")):
            value = value.squeeze(2).unflatten(0, (-1, value.shape[1]))  # (P L, L, 1, m) -> (P, L, L, m)
        elif name.endswith((".strip_h.bias", ".strip_w.bias")):
            weight = weights.get(released_name.removesuffix("bias") + "weight")
            if weight is not None:  # else loading reports it as missing
                value = value.unflatten(0, (-1, weight.shape[1]))  # (P L) -> (P, L)
        elif ".grn." in name:
            value = value.flatten()  # (1, 1, 1, C) -> (C,)
        converted[name] = value
    return converted


def _strip_mlp_to_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for our_name, value in weights.items():
        if block := re.match(r"stages\.(\d)\.(\d+)\.", our_name):
            inside = _translate(our_name[block.end() :], STRIP_MLP_BLOCK, back=True)
            name = f"blocks{int(block[1]) + 1}.{block[2]}.{inside}"
        else:
            name = _translate(our_name, STRIP_MLP, back=True)
        if ".cgsmm.strip_" in our_name:
            value = value.flatten(0, 1)
            value = value[:, :, None] if our_name.endswith("weight") else value
        elif ".grn." in our_name:
            value = value[None, None, None]
        converted[name] = value
    return converted


def _sparse_mlp_to_ours(weights: Mapping[str, Tensor], model: SparseMLP) -> dict[str, Tensor]:
    blocks = _block_names(model)
    converted = {}
    for released_name, value in weights.items():
        block = re.match(r"(token_mix|channel_mix)\.(\d+)\.", released_name)
        if block and int(block[2]) < len(blocks):
            inside = _translate(f"{block[1]}.{released_name[block.end() :]}", SPARSE_MLP)
            name = f"{blocks[int(block[2])]}.{inside}"
        else:
            name = _translate(released_name, SPARSE_MLP)
        if name.endswith((".mix_w.weight", ".mix_h.weight")):
            value = value.flatten(1)  # (L, L, 1, 1) -> (L, L)
        converted[name] = value
    return converted


def _sparse_mlp_to_released(weights: Mapping[str, Tensor], model: SparseMLP) -> dict[str, Tensor]:
    blocks = _block_names(model)
    converted = {}
    for our_name, value in weights.items():
        block = re.match(r"stages\.\d\.\d+", our_name)
        name = _translate(our_name[block.end() + 1 :] if block else our_name, SPARSE_MLP, back=True)
        if block:
            kind, rest = name.split(".", 1)
            name = f"{kind}.{blocks.index(block[0])}.{rest}"
        if our_name.endswith((".mix_w.weight", ".mix_h.weight")):
            value = value[:, :, None, None]
        converted[name] = value
    return converted


def _block_names(model: SparseMLP) -> list[str]:
    """The blocks of all stages, in order."""
    return [f"stages.{stage}.{block}" for stage, blocks in enumerate(model.stages) for block in range(len(blocks))]


def _branches_to_ours(weights: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    parts, segments = _network_parts(model), _segment_channels(model)
    converted = {}
    for released_name, value in weights.items():
        if isinstance(model, CycleMLP) and released_name.endswith(".offset"):
            continue  # of its deformable convolutions: constants
        numbered = re.match(r"network\.(\d+)\.(\d+\.)?", released_name)
        if numbered and int(numbered[1]) < len(parts):
            inside = _translate(released_name[numbered.end() :], BRANCHES_BLOCK)
            name = f"{parts[int(numbered[1])]}.{numbered[2] or ''}{inside}"
            channels = segments.get(name)
            if channels and value.ndim == 2 and not any(n % channels for n in value.shape):  # else loading says so
                value = value.unflatten(1, (-1, channels)).unflatten(0, (-1, channels))  # (L S, L S) -> (L, S, L, S)
        else:
            name = _translate(released_name, BRANCHES_HEAD)
        converted[name] = value
    return converted


def _branches_to_released(weights: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    parts, segments = _network_parts(model), _segment_channels(model)
    converted = {}
    for our_name, value in weights.items():
        if part := re.match(r"((?:stages|merging)\.\d)\.(\d+\.)?", our_name):
            inside = _translate(our_name[part.end() :], BRANCHES_BLOCK, back=True)
            name = f"network.{parts.index(part[1])}.{part[2] or ''}{inside}"
        else:
            name = _translate(our_name, BRANCHES_HEAD, back=True)
        if our_name in segments:
            value = value.flatten(2).flatten(0, 1)
        converted[name] = value
    return converted


def _network_parts(model: Backbone) -> list[str]:
    """Stages, and the transitions that have weights, in order."""
    parts = []
    for index in range(len(model.stages)):
        if index and list(model.merging[index - 1].parameters()):
            parts.append(f"merging.{index - 1}")
        parts.append(f"stages.{index}")
    return parts


def _segment_channels(model: nn.Module) -> dict[str, int]:
    """Of the weights over segments, by name."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SegmentLinear))
    return {f"{name}.weight": layer.channels for name, layer in layers}


def _translate(name: str, pairs: Names, back: bool = False) -> str:
    """`name` with its beginning replaced by the other one of the first pair that matches."""
    for pair in pairs:
        old, new = reversed(pair) if back else pair
        if name.startswith(old):
            return new + name[len(old) :]
    return name
