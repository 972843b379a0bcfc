"""Models. Importing this package registers Strip-MLP with timm."""

from .build import build_model
from .strip_mlp import StripMLP

__all__ = ["StripMLP", "build_model"]
