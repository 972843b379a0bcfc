"""Data sets whose images are in memory and transformed a batch at a time."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from data import build_eval_loader, build_train_loader
from data.dataset import ClassificationDataset
from data.memory import InMemoryDataset
from data.sources import ArraySource, SubsetSource
from data.transforms import build_transform
from tests.unit.test_data import NO_AUGMENTATION, by_key, config_with, generator_states, world
from utils import seed_all

SIMPLE = {**NO_AUGMENTATION, "DATA__IMG_SIZE": 16, "DATA__BATCH_SIZE": 4}


def source_of(count: int, *shape: int) -> ArraySource:
    """Noise, so that no two shifts of an image are the same."""
    images = np.random.default_rng(0).integers(1, 256, (count, *shape), dtype=np.uint8)
    return ArraySource(images, [i % 2 for i in range(count)], ["a", "b"], "noise")


@pytest.mark.parametrize("shape", [(14, 14), (14, 14, 3), (16, 16), (20, 9, 3)])
def test_evaluation_gives_what_an_image_at_a_time_gives(shape):
    source, config = source_of(6, *shape), config_with(**SIMPLE)
    one_by_one = ClassificationDataset(source, build_transform(config, False), (16, 16))
    loader = build_eval_loader(config, source, world())
    assert isinstance(loader.dataset, InMemoryDataset)
    for index, (image, target, readable) in by_key_of_evaluation(loader).items():
        expected = one_by_one[0, index]
        assert torch.equal(image, expected.image)
        assert (target, readable) == (expected.target, True)


def by_key_of_evaluation(loader) -> dict[int, tuple]:
    return {
        index.item(): (image, target.item(), readable.item())
        for batch in loader
        for image, target, index, readable in zip(*batch, strict=True)
    }


@pytest.mark.parametrize(("hflip", "flips"), [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
@pytest.mark.parametrize(
    ("size", "shift", "most"), [(16, 0.125, (2, 2)), ([16, 8], 0.125, (2, 1)), (16, 0.0625, (1, 1)), (16, 0.0, (0, 0))]
)
def test_training_shifts_and_flips(hflip, flips, size, shift, most):
    source = source_of(400, 16, 16)
    config = config_with(**{**SIMPLE, "AUG__HFLIP": hflip, "AUG__SHIFT": shift})
    config.DATA.IMG_SIZE = size
    (height, width), (down, right) = (size, size) if isinstance(size, int) else size, most
    whole = InMemoryDataset(config, source, is_train=False)
    seen = set()
    for index, (image, target, _) in by_key(build_train_loader(config, source, world()), 0).items():
        assert target == index % 2
        padded = pad(whole[0, index].image, (right, right, down, down))
        ways = [
            (top, left, flip)
            for top in range(2 * down + 1)
            for left in range(2 * right + 1)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, padded[:, top : top + height, left : left + width])
        ]
        assert len(ways) == 1
        seen.update(ways)
    assert {top for top, _, _ in seen} == set(range(2 * down + 1))
    assert {left for _, left, _ in seen} == set(range(2 * right + 1))
    assert {flip for _, _, flip in seen} == flips


def test_sample_depends_on_seed_epoch_and_index_alone():
    source = source_of(12, 14, 14)
    config = config_with(**{**SIMPLE, "AUG__HFLIP": 0.5, "SEED": 5})
    seed_all(1)
    data = InMemoryDataset(config, source, is_train=True)
    before = generator_states()
    expected = data.__getitems__([(3, index) for index in range(12)]).image
    data.__getitems__([(0, 1)])
    again = InMemoryDataset(config, source, is_train=True)
    seed_all(2)
    for index in reversed(range(12)):
        assert torch.equal(again[3, index].image, expected[index])
    seed_all(1)
    data.__getitems__([(4, 2)])
    assert generator_states() == before
    config.SEED = 6
    other_seed = InMemoryDataset(config, source, is_train=True).__getitems__([(3, index) for index in range(12)])
    other_epoch = data.__getitems__([(4, index) for index in range(12)])
    assert not torch.equal(other_seed.image, expected)
    assert not torch.equal(other_epoch.image, expected)


def test_two_processes_get_what_one_gets():
    source, config = source_of(13, 14, 14), config_with(**SIMPLE)
    alone = InMemoryDataset(config, source, is_train=True)
    for rank in range(2):
        for index, (image, _, _) in by_key(build_train_loader(config, source, world(rank, 2)), 1).items():
            assert torch.equal(image, alone[1, index].image)


def test_some_of_the_samples():
    source = source_of(6, 16, 16)
    chosen = SubsetSource(source, [5, 1, 3], ["b"])
    data = InMemoryDataset(config_with(**SIMPLE), chosen, is_train=False)
    assert torch.equal(data[0, 0].image[0], torch.from_numpy(source.images()[5]))
    assert [data[0, index].target for index in range(3)] == [0, 0, 0]
    assert data.name(1) == "noise image 1"
    assert data.classes == ["b"]


@pytest.mark.parametrize(
    "values", [{"AUG__AUTO_AUGMENT": "rand-m9"}, {"AUG__COLOR_JITTER": 0.4}, {"DATA__IMG_SIZE": 48}]
)
def test_other_augmentation_and_larger_images_are_one_at_a_time(values):
    loader = build_train_loader(config_with(**{**SIMPLE, **values}), source_of(8, 16, 16), world())
    assert type(loader.dataset) is ClassificationDataset
