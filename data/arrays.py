"""Long lists in arrays.

A list of Python strings takes 100 bytes and more for each, and loader processes copy it: reading an element changes its
reference count, and so the memory page that they share with the main process. Arrays have neither problem.
"""

import os
from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class Strings(Sequence[str]):
    """A list of strings that cannot be changed. File names may hold bytes that are no text (PEP 383).

    Attributes:
        text: (bytes,) uint8, all strings one after the other.
        ends: (N,) int64, where each ends in `text`.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Takes them one by one, so that they need not be in memory together."""
        text, ends = bytearray(), array("q")
        for string in strings:
            text += os.fsencode(string)
            ends.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())

    def is_sound(self) -> bool:
        """Whether the arrays, if they come from a file, are those of a list."""
        text, ends = self.text, self.ends
        if (text.dtype, text.ndim, ends.dtype, ends.ndim) != (np.uint8, 1, np.int64, 1):
            return False
        if not len(ends):
            return not len(text)
        return bool(ends[0] >= 0 and ends[-1] == len(text) and (np.diff(ends) >= 0).all())

    def contain(self, text: bytes) -> bool:
        """Whether a text is in any of them (or where two meet)."""
        step, more = 2**24, len(text) - 1
        parts = (self.text[start : start + step + more] for start in range(0, len(self.text), step))
        return any(text in part.tobytes() for part in parts)


def by_class(targets: np.ndarray, classes: int) -> list[np.ndarray]:
    """The indices of each class's samples, ascending.

    Args:
        targets: (N,), labels below `classes`.
    """
    # One sort, not one pass over all labels for each class: ImageNet-21K has 21,841 classes of 14 million samples.
    order = np.argsort(targets, kind="stable")
    return np.split(order, np.cumsum(np.bincount(targets, minlength=classes))[:-1])
