"""Means over seeds and over pairs of seeds with their intervals, and Holm's correction for multiple tests.

Does not compare arms (`comparisons` does).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brushstroke.errors import require

ROUNDING = 1e-12  # smaller differences of nats or shares are float64 rounding


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its confidence interval.

    Args:
        mean: of the values.
        low, high: bounds of the interval; None for a single value.
        count: the number of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g} (one value: no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The t-interval of the mean of at least one value: mean ± t·sd/√n with n − 1 degrees of freedom.

    >>> print(interval([1.0, 2.0, 3.0]))
    2 [-0.4841, 4.484]
    """
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    half = _t_quantile((1 + level) / 2, n - 1) * statistics.stdev(values) / n**0.5
    return Interval(mean, mean - half, mean + half, n)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979): the k-th smallest of m times m − k + 1, never descending.

    None represents a comparison without a p; it also counts in m.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected: list[float | None] = [None] * len(ps)
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(ps) - rank)))
        corrected[i] = largest
    return corrected


def over_pairs(values: Mapping[tuple[int, int], float]) -> list[float]:
    """Pseudo-values, one for each seed, of a mean over pairs of seeds.

    Pairs that share a seed are not independent. The jackknife leaves one seed out at a time: the mean and the
    t-interval of n·mean − (n − 1)·(mean without the seed) are those of the mean over pairs. With fewer than
    three seeds there is nothing to leave out: the values themselves are returned.

    >>> over_pairs({(0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0})
    [1.0, 1.0, 1.0]
    """
    seeds = sorted({seed for pair in values for seed in pair})
    if len(seeds) < 3:
        return list(values.values())
    n, whole = len(seeds), statistics.fmean(values.values())
    found = []
    for seed in seeds:
        without = [value for pair, value in values.items() if seed not in pair]
        found.append(n * whole - (n - 1) * statistics.fmean(without))
    return found


def exceeds(values: Sequence[float], level: float) -> float | None:
    """One-sided p that the mean of the values is above a level (t-test); None with fewer than two values.

    It is 1 if both the spread and the distance from the level are within rounding.

    >>> exceeds([0.4, 0.5, 0.6], 0.1) < 0.05
    True
    """
    if len(values) < 2:
        return None
    spread = statistics.stdev(values) / len(values) ** 0.5
    gap = statistics.fmean(values) - level
    if spread < ROUNDING and abs(gap) < ROUNDING:
        return 1.0
    if spread == 0:
        return 0.0 if gap > 0 else 1.0
    return 1 - _t_distribution(gap / spread, len(values) - 1)


def _t_quantile(share: float, freedom: int) -> float:
    return float(require("scipy.special", extra="study").stdtrit(freedom, share))


def _t_distribution(t: float, freedom: int) -> float:
    return float(require("scipy.special", extra="study").stdtr(freedom, t))
