"""Means over seeds, and paired differences with their intervals."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Mean:
    """Of a figure over seeds.

    Attributes:
      mean: over the seeds.
      deviation: standard deviation of a sample (n-1); nan of one seed.
      count: number of seeds.
    """

    mean: float
    deviation: float
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two arms, seed by seed.

    Attributes:
      mean: of the differences.
      low, high: the interval of Student's t for their mean, at `CONFIDENCE`; nan of one seed.
      count: number of seeds that both have.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0; 0 where the two are not separated."""
        return int(self.low > 0) - int(self.high < 0)


def mean(figures: Mapping[int, float]) -> Mean:
    """Mean and standard deviation of {seed: figure}, of at least one seed."""
    values = np.array(list(figures.values()), np.float64)
    return Mean(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan, len(values))


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """`first` minus `second` over the seeds that both have; None without one.

    Args:
      first, second: {seed: figure}. A seed decides the split of the data, its noise and its order alike for both, so
        that differences within a seed have less noise than those of the means.

    Source: Student's interval of paired samples, as `scipy.stats.ttest_rel(...).confidence_interval()`.
    """
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    differences = np.array([first[seed] - second[seed] for seed in seeds], np.float64)
    center, count = float(differences.mean()), len(seeds)
    if count == 1:
        return Difference(center, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return Difference(center, center - half, center + half, count)


@dataclasses.dataclass(frozen=True)
class Relation:
    """Of two quantities over several arms.

    Attributes:
      correlation: Spearman's, of their ranks.
      p_value: of no relation, two-sided.
      count: number of arms.
    """

    correlation: float
    p_value: float
    count: int


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> Relation | None:
    """Spearman's rank correlation (`scipy.stats.spearmanr`); None for fewer than three pairs, or equal values."""
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    if len(pairs) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    found = stats.spearmanr(first, second)
    return Relation(float(found.statistic), float(found.pvalue), len(pairs))
