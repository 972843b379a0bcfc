"""Which validation images a run classifies correctly: correct.npz in its folder, one bit per image."""

import os
from pathlib import Path

import numpy as np

from runtime.untrusted import reason_of
from utils import UserError

CORRECT = "correct.npz"


def save_correct(path: Path, correct: np.ndarray, epoch: int) -> None:
    """Writes what the evaluation after `epoch` epochs found. The file is complete and on the disk before it replaces
    the one before.

    Args:
        correct: (images,), true or 1 where the image is classified correctly, in the order of the data set.

    Raises:
        OSError: it cannot be written; the one before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, correct=np.packbits(correct), images=np.int64(len(correct)), epoch=np.int64(epoch))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_correct(path: Path) -> tuple[np.ndarray, int]:
    """What `save_correct` has written: (images,) bool, and the epochs that were done.

    Raises:
        UserError: damaged, or no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return unpack(file["correct"], file["images"]), int(file["epoch"].item())
    except Exception as error:  # NumPy's and zipfile's readers raise many kinds on a damaged file
        raise UserError(f"{path}: not a run's {CORRECT}, or damaged: {reason_of(error)}") from error


def unpack(bits: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(images,) bool from bits (images / 8, rounded up) uint8 as np.packbits makes them.

    Raises:
        ValueError: they are not bits of so many images.
    """
    count = int(images.item())
    if bits.dtype != np.uint8 or bits.shape != (-(-count // 8),) or count < 1:
        raise ValueError(f"it has {bits.shape} {bits.dtype} as the bits of {count} images")
    return np.unpackbits(bits, count=count).view(bool)
