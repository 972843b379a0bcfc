"""Models. Importing this package registers Strip-MLP and Sparse MLP with timm."""

from .build import build_model, prepare_model
from .sparse_mlp import SparseMLP
from .strip_mlp import StripMLP

__all__ = ["SparseMLP", "StripMLP", "build_model", "prepare_model"]
