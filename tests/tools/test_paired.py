"""Paired comparisons of runs, on constructed results."""

import numpy as np
import pytest
from paired import Comparison, adjust, compare, pack_results, read_results
from scipy import stats
from statsmodels.api import OLS

from utils import UserError


def results(seeds: int, images: int = 500, accuracy: float = 0.8, seed: int = 0, flip: float = 0.05) -> list[dict]:
    """Of a setting and its base: the same images but for a few."""
    generator = np.random.default_rng(seed)
    base = {s: generator.random(images) < accuracy for s in range(seeds)}
    return [{s: bits ^ (generator.random(images) < flip) for s, bits in base.items()}, base]


def test_known_difference():
    """The setting loses 30 of 100 images that the base has right, 10 of them in one seed more."""
    base = {seed: np.ones(100, bool) for seed in (3, 5, 9)}
    setting = {seed: np.arange(100) >= lost for seed, lost in ((9, 40), (5, 30), (3, 30), (7, 99))}
    found = compare(setting, base)
    assert found.seeds == 3 and found.difference == pytest.approx(-100 / 3)
    d = np.stack([setting[seed] for seed in (3, 5, 9)], axis=1).astype(float) - 1
    image, seed = np.indices(d.shape)
    fits = [
        OLS(d.ravel(), np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
        for groups in (np.column_stack([image.ravel(), seed.ravel()]), image.ravel(), seed.ravel())
    ]
    largest = max(fits, key=lambda fit: fit.bse[0])
    low, high = -100 / 3 + 100 * largest.bse[0] * stats.t.ppf(0.975, 2) * np.array([-1, 1])  # 3 seeds
    assert found.interval == pytest.approx((low, high))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(largest.tvalues[0]), 2))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_is_the_two_way_test_where_that_is_larger(seeds):
    """As statsmodels gives it from end to end."""
    setting, base = results(seeds)
    for s, bits in setting.items():
        bits &= np.arange(500) >= 40 + 60 * s  # images and seeds both have effects
    found = compare(setting, base)
    d = np.stack([setting[s].astype(float) - base[s] for s in range(seeds)], axis=1)
    groups = np.column_stack([index.ravel() for index in np.indices(d.shape)])
    fit = OLS(d.ravel(), np.ones(d.size)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    assert (found.difference, found.p) == pytest.approx((100 * fit.params[0], fit.pvalues[0]))
    assert found.interval == pytest.approx(100 * fit.conf_int()[0])


def test_a_variance_that_is_not_positive():
    """Each of three seeds loses another image: by seed the difference is always the same."""
    base = {seed: np.ones(500, bool) for seed in range(3)}
    setting = {seed: np.arange(500) != seed for seed in range(3)}
    found = compare(setting, base)
    assert found.difference == pytest.approx(-0.2)
    assert found.p > 0.05 and found.interval[0] < -0.2 < 0 < found.interval[1]


def test_equal_runs():
    _, base = results(3)
    found = compare(base, base)
    assert (found.difference, found.interval, found.p) == (0, None, 1)


def test_one_seed():
    """Is a paired t-test over the images."""
    setting, base = results(1)
    found = compare(setting, base)
    expected = stats.ttest_rel(setting[0].astype(float), base[0].astype(float))
    assert (found.seeds, found.p) == (1, pytest.approx(expected.pvalue))
    assert found.interval == pytest.approx([100 * x for x in expected.confidence_interval()])
    adjust([worse := compare({0: base[0] & (np.arange(500) > 200)}, base)])
    assert worse.p < 1e-6
    assert (worse.p_holm, worse.verdict) == (None, "undecided")  # another seed may be as far from this one


@pytest.mark.parametrize(
    ("setting", "base", "message"),
    [
        ({0: 5}, {1: 5}, "no finished run has a seed of the base's"),
        ({0: 5, 1: 5}, {0: 6, 1: 6}, "evaluated on 5 images, the base's on 6;"),
        ({0: 5, 1: 6}, {0: 5, 1: 6}, "evaluated on 5 and 6 images, the base's on 5 and 6;"),
        ({0: 1}, {0: 1}, "on 1 image; accepted: 2 or more"),
    ],
)
def test_runs_that_cannot_be_compared(setting, base, message):
    setting, base = ({seed: np.ones(count, bool) for seed, count in counts.items()} for counts in (setting, base))
    with pytest.raises(UserError, match=message):
        compare(setting, base)


def test_holm_and_verdicts():
    comparisons = [Comparison(3, d, None, p) for d, p in ((1, 0.04), (-1, 0.01), (2, 0.02), (0, 1.0))]
    assert [c.verdict for c in comparisons] == ["undecided"] * 4  # not yet corrected
    adjust(comparisons)
    assert [c.p_holm for c in comparisons] == pytest.approx([0.08, 0.04, 0.06, 1.0])
    assert [c.verdict for c in comparisons] == ["undecided", "worse", "undecided", "undecided"]
    better = Comparison(3, 1, None, 0.05)
    adjust([better, Comparison(1, 9, None, 1e-9)])
    assert better.verdict == "better"
    adjust([])


@pytest.mark.parametrize("seeds", [3, 5])
def test_no_difference_is_rarely_found(seeds):
    """At most one in 20 where nothing but chance makes runs differ, here in their seeds too."""
    generator, found = np.random.default_rng(seeds), []
    for _ in range(200):
        image = generator.normal(4, 4, (300, 1))
        runs = [
            generator.random((300, seeds)) < 1 / (1 + np.exp(-image - generator.normal(0, 0.5, seeds)))
            for _ in range(2)
        ]
        found.append(compare(*({s: run[:, s] for s in range(seeds)} for run in runs)).p)
    assert np.mean(np.array(found) < 0.05) < 0.09  # 5 % and 2.6 standard errors


def test_results_in_one_file(tmp_path):
    setting, base = results(2, images=13)
    path = tmp_path / "correct.npz"
    path.write_bytes(pack_results({"a_seed_b": setting, "base": base, "other": {3: np.ones(14, bool)}}))
    found = read_results(path)
    names = {name: sorted(by_seed) for name, by_seed in found.items()}
    assert names == {"a_seed_b": [0, 1], "base": [0, 1], "other": [3]}
    assert all(np.array_equal(found["a_seed_b"][s], setting[s]) for s in setting)
    with np.load(path) as file:
        assert file["images"].tolist() == [13, 13, 13, 13, 14]
        assert np.array_equal(np.unpackbits(file["base_seed1"], count=13), base[1])
    assert found["other"][3].shape == (14,)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"correct\.npz: no results per image, or damaged"):
        read_results(path)


def test_all_images_differ_alike():
    found = compare({s: np.ones(20, bool) for s in range(3)}, {s: np.zeros(20, bool) for s in range(3)})
    assert found.interval == (100.0, 100.0) and found.p == 0.0
