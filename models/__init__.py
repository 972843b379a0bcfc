"""Models. Importing this package registers Strip-MLP, Sparse MLP and small peers with timm."""

from . import reparameterize, small_peers, variants  # noqa: F401  (register folds, and names with timm)
from .backbone import token_mixing_weights
from .build import build_model, idle_keys, prepare_model
from .compile import compile_model
from .freeze import freeze, train_mode
from .sparse_mlp import SparseMLP
from .strip_mlp import StripMLP

__all__ = [
    "SparseMLP",
    "StripMLP",
    "build_model",
    "compile_model",
    "freeze",
    "idle_keys",
    "prepare_model",
    "token_mixing_weights",
    "train_mode",
]
