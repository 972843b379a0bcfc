"""Models for images of another size: parameters that have the size of the map in their shape are resampled."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def interpolation(source: int, target: int, align_corners: bool = False) -> Tensor:
    """The matrix (target, source) that resizes a signal of `source` samples to `target`.

    It enlarges linearly. It shrinks by least squares: the result is the smaller signal that, enlarged again, is nearest
    to the original. So enlarging and then shrinking changes nothing, and a constant stays the same.

    Args:
        align_corners: True if the first and the last sample keep their places, as in a table of differences from -r to
            r; False if the samples are pixels, which keep their area.
    """
    if target < source:
        return torch.linalg.pinv(interpolation(target, source, align_corners))
    identity = torch.eye(source, dtype=torch.float64, device="cpu")
    return F.interpolate(identity[None], target, mode="linear", align_corners=align_corners)[0].T


# By what a dimension of a parameter stands for: the matrix to multiply it by, so that the module does to a map of
# another size what it did to one of its own, up to the resizing of maps. The module's input is then resized to the size
# that the weights were made for, and its output is resized back.
RESAMPLING = {
    "output": interpolation,
    "input": lambda source, target: interpolation(target, source).T,
    "offset": partial(interpolation, align_corners=True),
}


@torch.no_grad()
def resample(value: Tensor, axes: Mapping[int, str], length: int) -> Tensor:
    """`value` with `length` entries along each of the dimensions in `axes`; the same tensor if it has them already.

    Args:
        axes: what each dimension stands for, a key of `RESAMPLING`.
    """
    if all(value.shape[dim] == length for dim in axes):
        return value
    resized = value.double()
    for dim, role in axes.items():
        matrix = RESAMPLING[role](value.shape[dim], length).to(value.device)
        resized = torch.tensordot(resized, matrix, dims=([dim], [1])).movedim(-1, dim)
    return resized.to(value.dtype).contiguous()


class MapSized(nn.Module):
    """A module that has the height or the width of the map, in tokens, in the shapes of its parameters.

    Attributes:
        map_axes: by parameter, the dimensions that depend on the map and what they stand for (see `RESAMPLING`).
        axis: "row" or "column" if the module mixes the tokens along one of them.
    """

    map_axes: ClassVar[dict[str, dict[int, str]]] = {}
    axis: str | None = None

    def map_length(self, size: tuple[int, int]) -> int:
        """The length of those dimensions for a map of `size`, (H, W): W if rows are mixed, H if columns are."""
        return size[1] if self.axis == "row" else size[0]

    def set_map_size(self, size: tuple[int, int]) -> None:
        """Resamples the parameters, in place, for a map of `size`, (H, W)."""
        for name, axes in self.map_axes.items():
            parameter = getattr(self, name)
            value = resample(parameter, axes, self.map_length(size))
            if value is not parameter:
                setattr(self, name, nn.Parameter(value, parameter.requires_grad))
