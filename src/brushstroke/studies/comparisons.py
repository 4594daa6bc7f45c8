"""Compares arms over seeds as randomised blocks: which arms differ, and which are shown to be equal.

Does not run arms, and does not treat a large p as equality: equality needs an interval inside of a margin.
A seed gives every arm the same data in the same order, so it is a block. The single-step comparisons use the
residual spread after subtracting the means of arms and seeds: Tukey's for all pairs, Dunnett's if one arm is
the reference. `benchmarks/study_statistics.py` fixed the constants below before any study was evaluated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from brushstroke.errors import require
from brushstroke.studies.statistics import ROUNDING, Interval

# degrees of freedom that the pooled variance of all arms counts for; an arm's own variance: seeds − 1
PRIOR_FREEDOM = 10
SIMULATED_ARMS = 9  # the levels below are for at most so many arms; `_level` lowers them for more
TUKEY_LEVEL = 0.0275  # nominal; with variances of 4 to 1 the family-wise error stays below 6.5 %
DUNNETT_LEVEL = 0.0125  # lower, because the variance of the reference is in every comparison; see DUNNETT
RESAMPLES = 2000  # bootstrap samples of the test rows
MARGIN = 0.01  # default margin of equality: nats of test loss per trained token, 1 % of perplexity
NORMAL_95 = 1.96  # the quantile of a 95 % interval over rows
LARGEST_T = 1e4  # p is 0 from this t on


@dataclass(frozen=True)
class Procedure:
    """A single-step procedure for comparisons of one table.

    Args:
        name: the name in reports.
        quantile: (arms, degrees of freedom) → the t from which on a difference is significant.
        p: (t, arms, degrees of freedom) → adjusted p.
    """

    name: str
    quantile: Callable[[int, int], float]
    p: Callable[[float, int, int], float]

    def level(self, arms: int, freedom: int) -> float:
        """The nominal family-wise level: a comparison is significant if its p is below it."""
        return self.p(self.quantile(arms, freedom), arms, freedom)


@dataclass(frozen=True)
class Difference:
    """The difference of two arms over the seeds that all compared arms have.

    Args:
        first, second: names of the arms.
        difference: mean of first − second; the intervals of one comparison are simultaneous.
        p: adjusted for all simultaneous comparisons; None with fewer than two seeds.
        level: p is significant below this level.
        new_rows: the same difference with an interval that is also valid for other test rows; None if the
            losses of single rows were not stored.
    """

    first: str
    second: str
    difference: Interval
    p: float | None
    level: float
    new_rows: Interval | None = None

    def significant(self) -> bool:
        """Whether the arms are shown to differ on the rows of the test split."""
        return self.p is not None and self.p < self.level

    def lower(self) -> bool:
        """Whether the first arm is shown to have the lower value."""
        return self.significant() and self.difference.mean < 0

    def significant_on_new_rows(self) -> bool:
        """Whether the arms are also shown to differ on other rows from the same distribution."""
        return self.significant() and self.new_rows is not None and not _contains(self.new_rows, 0.0)

    def equal_within(self, margin: float) -> bool:
        """Whether two one-sided tests show that the difference is smaller than a margin.

        That is, the interval lies inside of ±margin; uses the interval for new rows if it is known.
        """
        found = self.new_rows or self.difference
        return found.low is not None and found.high is not None and -margin < found.low <= found.high < margin


@dataclass(frozen=True)
class Comparison:
    """Simultaneous comparisons of several arms, and the data that they are based on.

    Args:
        procedure: its name.
        level: its nominal family-wise level.
        differences: one for each pair.
        seeds: the seeds that all compared arms have.
        spread: standard deviation of the residuals; None with fewer than two seeds.
        freedom: degrees of freedom of the residuals.
        notes: sentences about arms and seeds that are left out.
    """

    procedure: str
    level: float
    differences: tuple[Difference, ...]
    seeds: tuple[int, ...]
    spread: float | None
    freedom: int
    notes: tuple[str, ...] = ()

    def of(self, first: str, second: str) -> Difference | None:
        """The difference of two arms, in this order; None if they were not compared."""
        return next((one for one in self.differences if (one.first, one.second) == (first, second)), None)


@dataclass(frozen=True)
class RowLosses:
    """Losses of single test rows.

    Args:
        tokens: trained tokens of each row.
        sums: arm → seed → the summed loss of each row.
    """

    tokens: Sequence[int]
    sums: Mapping[str, Mapping[int, Sequence[float]]]


def compare_all(values: Mapping[str, Mapping[int, float]], rows: RowLosses | None = None) -> Comparison:
    """All pairs of arms, by Tukey's procedure from the block-adjusted residuals.

    Args:
        values: arm → (seed → value).
        rows: losses of single test rows, if they were stored.
    """
    return _compare(values, lambda arms: list(combinations(arms, 2)), TUKEY, rows)


def compare_with(
    reference: str, values: Mapping[str, Mapping[int, float]], rows: RowLosses | None = None
) -> Comparison:
    """Every other arm against the reference, by Dunnett's procedure from the block-adjusted residuals."""
    others = {name: seeds for name, seeds in values.items() if name != reference}

    def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
        return [(arm, reference) for arm in arms if arm != reference] if reference in arms else []

    return _compare({reference: values[reference], **others}, pairs, DUNNETT, rows)


def own_variances(table: np.ndarray) -> np.ndarray:
    """Residual variance of every arm, (…, arms, seeds) → (…, arms); their mean is the pooled variance.

    >>> float(own_variances(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 6.0]])).mean())
    1.5
    """
    arms, seeds = table.shape[-2:]
    centred = table - table.mean(-1, keepdims=True)
    residual = centred - centred.mean(-2, keepdims=True)
    return (residual**2).sum(-1) * arms / ((arms - 1) * (seeds - 1))


def pair_errors(own: np.ndarray, first: Sequence[int], second: Sequence[int], seeds: int) -> np.ndarray:
    """Standard error of the difference of two arms' means, (…, arms) → (…, pairs).

    The variance is the pooled one, shrunk a little towards those of the two arms: with the pooled variance
    alone, an error of 5 % becomes 9 % if a third of nine arms have four times the variance of the others.
    """
    share = (seeds - 1) / (seeds - 1 + PRIOR_FREEDOM)
    of_pair = (own[..., first] + own[..., second]) / 2
    return np.sqrt(2 * ((1 - share) * own.mean(-1, keepdims=True) + share * of_pair) / seeds)


def row_errors(rows: RowLosses, arms: Sequence[str], seeds: Sequence[int]) -> np.ndarray | None:
    """Standard errors over test rows of every pair's difference, from a bootstrap of the rows, (arms, arms).

    None if the losses of a run were not stored.
    """
    means = _resampled(rows, arms, seeds)
    return None if means is None else np.std(means[:, :, None] - means[:, None, :], axis=0, ddof=1)


def mean_on_new_rows(found: Interval, rows: RowLosses, arm: str, seeds: Sequence[int]) -> Interval | None:
    """An arm's mean over seeds with an interval that is also valid for other test rows.

    None if it has no interval over seeds, or if the losses of a run were not stored.
    """
    means = _resampled(rows, [arm], seeds)
    if means is None or found.high is None:
        return None
    over_rows = NORMAL_95 * float(np.std(means, ddof=1))
    return _around(found.mean, float(np.hypot(found.high - found.mean, over_rows)), found.count)


def tukey_p(t: float, arms: int, freedom: int) -> float:
    """P(the largest |t| of all pairs of arms ≥ t) if no arms differ.

    >>> round(tukey_p(3.557, 9, 16), 3)
    0.05
    """
    found = require("scipy.stats", extra="study").studentized_range.sf(t * 2**0.5, arms, freedom)
    return float(min(1.0, max(0.0, found)))


def dunnett_p(t: float, arms: int, freedom: int) -> float:
    """P(the largest |t| against the reference ≥ t) if no arms differ; `arms` includes the reference.

    Integrates the conditional probability over the reference's mean and the residual spread.

    >>> round(dunnett_p(2.974, 9, 16), 3)
    0.05
    """
    special = require("scipy.special", extra="study")
    nodes, weights = np.polynomial.legendre.leggauss(200)
    spread = np.sqrt(special.chdtri(freedom, (1 - nodes) / 2) / freedom)[:, None]
    mean = np.linspace(-8, 8, 401)
    density = np.exp(-(mean**2) / 2)
    density /= density.sum()
    reach = 2**0.5 * t * spread
    inside = (special.ndtr(mean + reach) - special.ndtr(mean - reach)) ** (arms - 1)
    return float(min(1.0, max(0.0, 1 - weights @ (inside @ density) / 2)))


def tukey_quantile(arms: int, freedom: int) -> float:
    """The t at which Tukey's p is `TUKEY_LEVEL`, or less with many arms."""
    return t_at(tukey_p, _level(TUKEY_LEVEL, arms), arms, freedom)


def dunnett_quantile(arms: int, freedom: int) -> float:
    """The t at which Dunnett's p is `DUNNETT_LEVEL`, or Tukey's quantile if that is smaller.

    Tukey's is valid for all pairs, and so for these; with few arms it is the smaller one, and the level of
    Dunnett's procedure is then above `DUNNETT_LEVEL`.
    """
    return min(t_at(dunnett_p, _level(DUNNETT_LEVEL, arms), arms, freedom), tukey_quantile(arms, freedom))


def _level(level: float, arms: int) -> float:
    """The level for this number of arms: unequal variances raise the error more if there are more arms."""
    return level * min(1.0, SIMULATED_ARMS / arms)


TUKEY = Procedure("Tukey", tukey_quantile, tukey_p)
DUNNETT = Procedure("Dunnett", dunnett_quantile, dunnett_p)


def _compare(
    values: Mapping[str, Mapping[int, float]],
    pairs_of: Callable[[Sequence[str]], list[tuple[str, str]]],
    procedure: Procedure,
    rows: RowLosses | None,
) -> Comparison:
    arms, seeds, notes = _complete(values)
    pairs = pairs_of(arms)
    freedom = (len(arms) - 1) * (len(seeds) - 1)
    level = procedure.level(len(arms), freedom) if pairs and len(seeds) > 1 else 0.0
    empty = Comparison(procedure.name, level, (), tuple(seeds), None, 0, notes)
    if not pairs or not seeds:
        return empty
    table = np.array([[values[arm][seed] for seed in seeds] for arm in arms], dtype=float)
    first, second = ([arms.index(pair[side]) for pair in pairs] for side in (0, 1))
    gaps = [float(gap) for gap in (table[first] - table[second]).mean(1)]
    if len(seeds) < 2:
        single = [
            Difference(a, b, Interval(gap, None, None, 1), None, level)
            for (a, b), gap in zip(pairs, gaps, strict=True)
        ]
        return replace(empty, differences=tuple(single))
    variances = own_variances(table)
    reach = procedure.quantile(len(arms), freedom)
    errors = [float(error) for error in pair_errors(variances, first, second, len(seeds))]
    by_row = row_errors(rows, arms, seeds) if rows else None
    found = []
    for (a, b), gap, error, i, j in zip(pairs, gaps, errors, first, second, strict=True):
        wider = None if by_row is None else reach * float(np.hypot(error, by_row[i, j]))
        difference = _around(gap, reach * error, len(seeds))
        new_rows = None if wider is None else _around(gap, wider, len(seeds))
        p = _p(procedure, gap, error, len(arms), freedom)
        found.append(Difference(a, b, difference, p, level, new_rows))
    spread = float(variances.mean() ** 0.5)
    return replace(empty, differences=tuple(found), spread=spread, freedom=freedom)


@cache
def t_at(p: Callable[[float, int, int], float], level: float, arms: int, freedom: int) -> float:
    """The t at which p(t, arms, degrees of freedom) equals a level."""
    solve = require("scipy.optimize", extra="study").brentq
    return float(solve(lambda t: p(t, arms, freedom) - level, 1.0, LARGEST_T, rtol=1e-9))


def _complete(values: Mapping[str, Mapping[int, float]]) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Arms, their common seeds, and notes.

    Drops the arm with the fewest seeds while fewer than two seeds are common. Never drops the first arm,
    because it may be the reference.
    """
    arms, notes = list(values), []
    most = max((len(seeds) for seeds in values.values()), default=0)
    while len(arms) > 2 and most > 1 and len(_common(values, arms)) < 2:
        fewest = min(reversed(arms[1:]), key=lambda arm: len(values[arm]))
        arms.remove(fewest)
        notes.append(f"{fewest} is in no comparison: it shares too few seeds with the other arms.")
    common = _common(values, arms)
    for seed in sorted({seed for arm in arms for seed in values[arm]} - set(common)):
        lacking = ", ".join(arm for arm in arms if seed not in values[arm])
        notes.append(f"Seed {seed} is in no comparison: it is missing from {lacking}.")
    return arms, common, tuple(notes)


def _common(values: Mapping[str, Mapping[int, Any]], arms: Sequence[str]) -> list[int]:
    return sorted(set.intersection(*(set(values[arm]) for arm in arms))) if arms else []


def _resampled(rows: RowLosses, arms: Sequence[str], seeds: Sequence[int]) -> np.ndarray | None:
    """Mean losses over seeds on resampled test rows, the same for all arms, (resamples, arms)."""
    kept = [[rows.sums.get(arm, {}).get(seed, ()) for seed in seeds] for arm in arms]
    n = len(rows.tokens)
    if n < 2 or any(len(one) != n for of_arm in kept for one in of_arm):
        return None
    sums, tokens = np.array(kept, dtype=float).mean(1), np.array(rows.tokens, dtype=float)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return (drawn @ sums.T) / (drawn @ tokens)[:, None]


def _p(procedure: Procedure, gap: float, error: float, arms: int, freedom: int) -> float:
    """Adjusted p; 1 if both the spread and the difference are within rounding."""
    if error < ROUNDING and abs(gap) < ROUNDING:
        return 1.0
    t = abs(gap) / error if error > 0 else LARGEST_T
    return 0.0 if t >= LARGEST_T else procedure.p(t, arms, freedom)


def _around(mean: float, half: float, count: int) -> Interval:
    return Interval(mean, mean - half, mean + half, count)


def _contains(found: Interval, value: float) -> bool:
    return found.low is None or found.high is None or found.low <= value <= found.high
