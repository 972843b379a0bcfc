"""Paired comparison of two settings that were trained with the same seeds and evaluated on the same images."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.sandwich_covariance import cov_cluster, cov_cluster_2groups

from runtime.per_image import unpack
from runtime.untrusted import reason_of
from utils import UserError

LEVEL = 0.05  # of the tests; intervals have 1 - LEVEL

# By seed: (images,) bool, which images the run classifies correctly
Results = Mapping[int, np.ndarray]


@dataclass
class Comparison:
    """A setting's top-1 minus its base's.

    Attributes:
        seeds: that both have, over which the difference is the mean.
        difference: in points of top-1 in percent.
        interval: its 95 % confidence interval; None if the two are right about the same images.
        p: two-sided, against no difference.
        p_holm: after `adjust`; None with one seed.
    """

    seeds: int
    difference: float
    interval: tuple[float, float] | None
    p: float
    p_holm: float | None = None

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "undecided": not told from the base."""
        if self.p_holm is None or self.p_holm > LEVEL:
            return "undecided"
        return "better" if self.difference > 0 else "worse"


def compare(setting: Results, base: Results) -> Comparison:
    """The mean of d[image, seed], 1 where only the setting is right and -1 where only the base is, with an error that
    allows for other images and for other seeds.

    It is the intercept of a least-squares fit with two-way cluster-robust errors (Cameron, Gelbach and Miller, 2011, J.
    Bus. Econ. Stat. 29), and Student's t with one degree of freedom less than there are clusters of the smaller kind.
    With few clusters the two-way variance may be too small, or negative. So the largest of it and the two one-way
    variances is taken (MacKinnon, Nielsen and Webb, 2024, "Jackknife inference with two-way clustering").

    With one shared seed only the images are clusters: the result is about these two runs, not about the settings.

    Raises:
        UserError: no seed is in both, or the runs are of different images, or of one.
    """
    seeds = sorted(setting.keys() & base.keys())
    if not seeds:
        raise UserError("no finished run has a seed of the base's")
    counts = [sorted({len(results[seed]) for seed in seeds}) for results in (setting, base)]
    if counts[0] != counts[1] or len(counts[0]) > 1:
        found, wanted = (" and ".join(map(str, numbers)) for numbers in counts)
        raise UserError(f"its runs were evaluated on {found} images, the base's on {wanted}; accepted: the same images")
    if counts[0] == [1]:
        raise UserError("its runs were evaluated on 1 image; accepted: 2 or more")
    right, base_right = (np.stack([results[seed] for seed in seeds], axis=1) for results in (setting, base))
    d = right.astype(np.float64) - base_right
    if not d.any():
        return Comparison(len(seeds), 0.0, None, 1.0)
    if abs(d.sum()) == d.size:  # no variance either: one is right about all images, the other about none
        return Comparison(len(seeds), 100 * d.mean(), (100 * d.mean(),) * 2, 0.0)
    image, seed = (index.ravel() for index in np.indices(d.shape))
    fit = OLS(d.ravel(), np.ones(d.size)).fit()
    if len(seeds) > 1:
        variance = max(float(v.item()) for v in cov_cluster_2groups(fit, image, seed))
    else:
        variance = float(cov_cluster(fit, image).item())
    mean, error, freedom = d.mean(), np.sqrt(variance), min(n for n in d.shape if n > 1) - 1
    low, high = student_t.interval(1 - LEVEL, freedom, mean, error)
    p = 2 * student_t.sf(abs(mean) / error, freedom)
    return Comparison(len(seeds), float(100 * mean), (float(100 * low), float(100 * high)), float(p))


def adjust(comparisons: Sequence[Comparison]) -> None:
    """Sets `p_holm` of all settings that are compared with one base: Holm's correction, which keeps the chance of any
    wrong "better" or "worse" among them below `LEVEL`. Those with one seed are left out: their p is about two runs, and
    other seeds of the same setting may differ as much."""
    tested = [comparison for comparison in comparisons if comparison.seeds > 1]
    if tested:
        corrected = multipletests([comparison.p for comparison in tested], alpha=LEVEL, method="holm")[1]
        for comparison, p in zip(tested, corrected, strict=True):
            comparison.p_holm = float(p)


def pack_results(results: Mapping[str, Results]) -> bytes:
    """An npz file: `runs`, the names `<setting>_seed<N>`; `images`, how many each was evaluated on; and under its name
    the bits of each run, as np.packbits makes them."""
    runs = {f"{name}_seed{seed}": bits for name, by_seed in results.items() for seed, bits in by_seed.items()}
    images = np.array([len(bits) for bits in runs.values()], np.int64)
    file = io.BytesIO()
    packed = {name: np.packbits(bits) for name, bits in runs.items()}
    np.savez_compressed(file, runs=np.array(list(runs), str), images=images, **packed)
    return file.getvalue()


def read_results(path: Path) -> dict[str, dict[int, np.ndarray]]:
    """What `pack_results` has made, by setting and seed.

    Raises:
        UserError: damaged, or no such file.
    """
    results: dict[str, dict[int, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name, images in zip(file["runs"].tolist(), file["images"], strict=True):
                setting, seed = re.fullmatch(r"(.+)_seed(\d+)", name).groups()
                results.setdefault(setting, {})[int(seed)] = unpack(file[name], images)
    except Exception as error:  # NumPy's and zipfile's readers raise many kinds on a damaged file
        raise UserError(f"{path}: no results per image, or damaged: {reason_of(error)}") from error
    return results
