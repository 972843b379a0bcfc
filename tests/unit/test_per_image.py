"""A run's correct.npz: written, read, and damaged."""

import io

import numpy as np
import pytest

from runtime.per_image import CORRECT, read_correct, save_correct
from utils import UserError


@pytest.mark.parametrize("images", [1, 8, 13])
def test_what_is_written_is_read(images, tmp_path):
    correct = np.arange(images) % 3 == 0
    save_correct(tmp_path / CORRECT, ~correct, 1)
    save_correct(tmp_path / CORRECT, correct.astype(np.uint8), 2)
    found, epoch = read_correct(tmp_path / CORRECT)
    assert found.tolist() == correct.tolist() and epoch == 2
    assert [path.name for path in tmp_path.iterdir()] == [CORRECT]


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


BITS = np.packbits(np.ones(13, bool))
GOOD = npz(correct=BITS, images=13, epoch=2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip file",
        GOOD[:300],
        GOOD[:-30],
        GOOD.replace(BITS.tobytes(), b"\x00\x00", 1),  # not its checksum
        npz(correct=BITS, images=13),
        npz(correct=BITS, images=30, epoch=2),
        npz(correct=BITS, images=2**60, epoch=2),
        npz(correct=BITS.astype(float), images=13, epoch=2),
        npz(correct=BITS, images=[13, 13], epoch=2),
        npz(correct=BITS, images=13, epoch="two"),
        npz(correct=np.array([print], dtype=object), images=13, epoch=2),  # a pickle
    ],
)
def test_damaged(content, tmp_path):
    path = tmp_path / CORRECT
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"correct\.npz: not a run's correct\.npz, or damaged: \S") as found:
        read_correct(path)
    assert "\n" not in str(found.value)


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"correct\.npz: .*No such file"):
        read_correct(tmp_path / CORRECT)


def test_one_that_cannot_be_written(tmp_path, monkeypatch):
    """Leaves the one before."""
    save_correct(tmp_path / CORRECT, np.ones(13, bool), 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError):
        save_correct(tmp_path / CORRECT, np.zeros(13, bool), 2)
    assert read_correct(tmp_path / CORRECT)[1] == 1
    assert [path.name for path in tmp_path.iterdir()] == [CORRECT]
