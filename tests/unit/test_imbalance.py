"""Classes of different sizes: weights in the loss, the balanced sampler, counts in the log."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup

from config import ConfigError, load_config
from data.dataset import BalancedSampler, ClassificationDataset
from data.memory import InMemoryDataset
from data.sources import ArraySource, describe_counts
from data.transforms import build_transform
from engine.loss import WeightedCrossEntropy, build_criterion, class_weights
from tests.helpers import ROOT
from tests.unit.test_data import config_with
from utils import UserError, seed_all

DIGITS = ROOT / "configs/strip_mlp_pico_digits.yaml"


def source(*counts: int) -> ArraySource:
    targets = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(0).integers(0, 256, (len(targets), 8, 8), dtype=np.uint8)
    return ArraySource(images, targets, [f"c{label}" for label in range(len(counts))], "images")


# Weights


def test_class_weights():
    assert class_weights("balanced", source(6, 3, 1)) == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert class_weights("balanced", source(6, 0, 2))[[0, 2]] == pytest.approx([8 / 12, 2])
    listed = class_weights("1, 1, 4", source(6, 3, 1))
    assert listed == pytest.approx(np.array([1, 1, 4]) * 10 / 13)
    with pytest.raises(UserError, match=r"has 2 numbers, but the data has 3 classes \(c0, c1, c2\)"):
        class_weights("1,2", source(6, 3, 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_loss_of_labels_and_of_mixed_images(smoothing):
    logits, targets = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    weights = torch.tensor([0.5, 1.0, 7.0])
    loss = WeightedCrossEntropy(weights, smoothing)
    each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    assert loss(logits, targets).item() == pytest.approx((weights[targets] * each).mean().item(), rel=1e-5)
    # Of two halves, as two processes or passes have them
    assert (loss(logits[:4], targets[:4]) + loss(logits[4:], targets[4:])).item() / 2 == pytest.approx(
        loss(logits, targets).item(), rel=1e-5
    )
    seed_all(0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=0, label_smoothing=smoothing, num_classes=3)
    _, soft = mixup(torch.zeros(8, 3, 4, 4), targets)
    other = targets.flip(0)
    i = next(i for i in range(8) if targets[i] != other[i])
    on = 1 - smoothing + smoothing / 3
    share = (soft[i, targets[i]].item() - smoothing / 3) / (on - smoothing / 3)
    assert 0 < share < 1
    mixed = share * weights[targets] * each
    mixed += (1 - share) * weights[other] * F.cross_entropy(logits, other, label_smoothing=smoothing, reduction="none")
    assert loss(logits, soft).item() == pytest.approx(mixed.mean().item(), rel=1e-4)


def test_rare_class_is_not_learned_from_smoothing():
    """Of a common class alone, the loss is lowest where that class has the smoothed probability."""
    logits = torch.zeros(1, 2, requires_grad=True)
    loss = WeightedCrossEntropy(torch.tensor([0.505, 50.0]), 0.1)
    for _ in range(500):
        (gradient,) = torch.autograd.grad(loss(logits, torch.tensor([0])), logits)
        logits = (logits - 2 * gradient).detach().requires_grad_()
    assert logits.softmax(1)[0].tolist() == pytest.approx([0.95, 0.05], abs=1e-3)


def test_choice_of_the_loss(tmp_path):
    cpu = torch.device("cpu")
    plain = build_criterion(config_with(), None, soft=False, device=cpu)
    assert isinstance(plain, torch.nn.CrossEntropyLoss)
    weighted = build_criterion(config_with(TRAIN__CLASS_WEIGHTS="balanced"), lambda: source(3, 1), True, cpu)
    assert weighted.weights.tolist() == pytest.approx([2 / 3, 2])
    (tmp_path / "c.yaml").write_text(f"BASE: {DIGITS}\nTRAIN: {{CLASS_WEIGHTS: [1, 2.5]}}\n")
    assert load_config(tmp_path / "c.yaml")[0].TRAIN.CLASS_WEIGHTS == "1.0,2.5"
    for opts in (["TRAIN.CLASS_WEIGHTS", "1,0"], ["TRAIN.CLASS_WEIGHTS", "much"]):
        with pytest.raises(ConfigError, match="none, balanced, or numbers"):
            load_config(DIGITS, opts)
    with pytest.raises(ConfigError, match="small classes would count twice over"):
        load_config(DIGITS, ["TRAIN.CLASS_WEIGHTS", "balanced", "DATA.SAMPLER", "balanced"])


# Sampler

TARGETS = source(70, 20, 9, 1).targets


def epoch_of(sampler, epoch: int, start: int = 0) -> list[tuple]:
    sampler.set_epoch(epoch, start)
    return list(sampler)


@pytest.mark.parametrize("size", [1, 3])
def test_balanced_sampler(size):
    parts = [epoch_of(BalancedSampler(TARGETS, rank, size, seed=5), 2) for rank in range(size)]
    assert {len(part) for part in parts} == {100 // size}
    together = [key for part in parts for key in part]
    assert len(set(together)) == len(together)  # what comes again has a key of its own
    counts = Counter(int(TARGETS[key[1]]) for key in together)
    assert all(abs(counts[label] - 25) <= size for label in range(4))
    if size == 1:
        times = Counter(key[1] for key in together)
        assert times[99] == 25 and {times[index] for index in range(90, 99)} == {2, 3}
        assert {key for key in together if key[1] == 99} == {(2, 99), *((2, 99, n) for n in range(1, 25))}


@pytest.mark.parametrize("sharded", [False, True])
def test_balanced_sampler_depends_on_seed_and_epoch_alone_and_goes_on(sharded):
    sampler = BalancedSampler(TARGETS, 1, 2, 5, sharded)
    orders = [epoch_of(sampler, epoch) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 3
    torch.manual_seed(9)
    assert epoch_of(BalancedSampler(TARGETS, 1, 2, 5, sharded), 1) == orders[1]
    assert epoch_of(BalancedSampler(TARGETS, 1, 2, 6, sharded), 1) != orders[1]
    for start in (0, 7, 50):
        assert epoch_of(sampler, 1, start) == orders[1][start:]
    if sharded:
        assert {key[1] % 2 for key in orders[0]} == {1}


def test_balanced_sampler_favours_no_class_over_the_epochs():
    """10 samples of 3 classes: each epoch another one may come four times."""
    targets = np.array([0] * 6 + [1, 1, 1, 2])
    sampler = BalancedSampler(targets, 0, 1, 5)
    counts = [np.bincount(targets[[key[1] for key in epoch_of(sampler, epoch)]]) for epoch in range(20)]
    assert all(sorted(count) == [3, 3, 4] for count in counts)
    assert {int(count.argmax()) for count in counts} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["batch", "image"])
def test_what_comes_again_is_augmented_anew(kind):
    config = config_with(DATA__IMG_SIZE=32, AUG__AUTO_AUGMENT="none", AUG__COLOR_JITTER=0.0)
    if kind == "batch":
        dataset = InMemoryDataset(config, source(3, 1), is_train=True)
        views = dataset.__getitems__([(0, 3), (0, 1), (0, 3, 1), (0, 3, 2), (0, 3, 1)]).image
        plain = dataset.__getitems__([(0, 3), (0, 1)]).image
    else:
        dataset = ClassificationDataset(source(3, 1), build_transform(config, True), (32, 32), 0, is_train=True)
        views = [dataset[key].image for key in ((0, 3), (0, 1), (0, 3, 1), (0, 3, 2), (0, 3, 1))]
        plain = [dataset[key].image for key in ((0, 3), (0, 1))]
    first, other, again, third, again_too = views
    assert torch.equal(plain[0], first) and torch.equal(plain[1], other) and torch.equal(again, again_too)
    assert not torch.equal(first, again) and not torch.equal(again, third)


def test_counts():
    assert describe_counts(source(2, 0, 5)) == "c0 2, c1 0, c2 5"
    assert describe_counts(source(*[4] * 11)) == "4 of each of 11 classes"
    many = describe_counts(source(*range(12)))
    assert many == "fewest c0 0, c1 1, c2 2, c3 3, c4 4; most c11 11, c10 10, c9 9, c8 8, c7 7; median 5.5"
