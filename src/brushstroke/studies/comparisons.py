"""Arms over seeds as a randomised block: which arms differ, and which are shown to be equal.

A seed gives every arm the same data in the same order, so it is a block. Single-step comparisons use the
spread that is left when the means of arms and seeds are taken away: Tukey's for all pairs, Dunnett's where
one arm is the reference. The constants below were fixed by `benchmarks/study_statistics.py` before any study
was read with them. A large p is never read as equality: that takes an interval inside of a margin.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from brushstroke.errors import ConfigError, require
from brushstroke.studies.statistics import ROUNDING, Interval

PRIOR_FREEDOM = (
    10  # the variance of all arms weighs like so many degrees of freedom, an arm's own like seeds − 1
)
TUKEY_LEVEL = 0.0275  # nominal; with variances of 4 to 1 the family-wise error stays below 6.5 %
DUNNETT_LEVEL = 0.0125  # lower, as the variance of the reference is in every comparison
RESAMPLES = 2000  # of the test rows
MARGIN = (
    0.01  # nats of test loss per trained token, 1 % of perplexity: what equal means where nothing is said
)
NORMAL_95 = 1.96  # the quantile of a 95 % interval over rows
LARGEST_T = 1e4  # beyond it p is 0


@dataclass(frozen=True)
class Procedure:
    """A single-step procedure for comparisons of one table.

    Args:
        name: as reports call it.
        level: nominal family-wise level; a comparison whose p is below it is significant.
        p: (t, arms, degrees of freedom) → adjusted p.
    """

    name: str
    level: float
    p: Callable[[float, int, int], float]

    def quantile(self, arms: int, freedom: int) -> float:
        """The t at which p is the level."""
        return _quantile(self, arms, freedom)


@dataclass(frozen=True)
class Difference:
    """How two arms differ over the seeds that every compared arm ran.

    Args:
        first, second: names of the arms.
        difference: mean of first − second; the intervals of one comparison hold together.
        p: adjusted for all comparisons that were made together; None with fewer than two seeds.
        level: below which p is significant.
        new_rows: the same difference with the interval that holds for other test rows too; None where
            the losses of single rows were not kept.
    """

    first: str
    second: str
    difference: Interval
    p: float | None
    level: float
    new_rows: Interval | None = None

    def significant(self) -> bool:
        """Whether the arms are shown to differ, on the rows of the test split."""
        return self.p is not None and self.p < self.level

    def lower(self) -> bool:
        """Whether the first arm is shown to have the lower value."""
        return self.significant() and self.difference.mean < 0

    def significant_on_new_rows(self) -> bool:
        """Whether they are shown to differ on other rows of this kind too."""
        return self.significant() and self.new_rows is not None and not _holds(self.new_rows, 0.0)

    def equal_within(self, margin: float) -> bool:
        """Whether two one-sided tests show that the difference is smaller than a margin.

        That is, the interval lies inside of ±margin: the one for new rows, where it is known.
        """
        found = self.new_rows or self.difference
        return found.low is not None and found.high is not None and -margin < found.low <= found.high < margin


@dataclass(frozen=True)
class Comparison:
    """Differences that were judged together, and what they rest on.

    Args:
        procedure: its name.
        level: its nominal family-wise level.
        differences: one for each pair.
        seeds: the complete blocks.
        spread: standard deviation of the residuals; None with fewer than two seeds.
        freedom: degrees of freedom of the residuals.
        notes: which arms or seeds are left out, in words.
    """

    procedure: str
    level: float
    differences: tuple[Difference, ...]
    seeds: tuple[int, ...]
    spread: float | None
    freedom: int
    notes: tuple[str, ...] = ()

    def of(self, first: str, second: str) -> Difference | None:
        """The difference of two arms, in this order; None where they were not compared."""
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
        rows: where they were kept.
    """
    return _compare(values, lambda arms: list(combinations(arms, 2)), TUKEY, rows)


def compare_with(
    reference: str, values: Mapping[str, Mapping[int, float]], rows: RowLosses | None = None
) -> Comparison:
    """Every other arm against one, by Dunnett's procedure from the block-adjusted residuals."""
    others = {name: seeds for name, seeds in values.items() if name != reference}

    def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
        return [(arm, reference) for arm in arms if arm != reference] if reference in arms else []

    return _compare({reference: values[reference], **others}, pairs, DUNNETT, rows)


def own_variances(table: np.ndarray) -> np.ndarray:
    """Residual variance of every arm, (…, arms, seeds) → (…, arms); their mean is that of all arms together.

    >>> float(own_variances(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 6.0]])).mean())
    1.5
    """
    arms, seeds = table.shape[-2:]
    centred = table - table.mean(-1, keepdims=True)
    residual = centred - centred.mean(-2, keepdims=True)
    return (residual**2).sum(-1) * arms / ((arms - 1) * (seeds - 1))


def pair_errors(own: np.ndarray, first: Sequence[int], second: Sequence[int], seeds: int) -> np.ndarray:
    """Standard error of the difference of two arms' means, (…, arms) → (…, pairs).

    The variance is that of all arms, drawn a little towards those of the two: an error of 5 % becomes 9 %
    under one variance where a third of nine arms have four times that of the others.
    """
    share = (seeds - 1) / (seeds - 1 + PRIOR_FREEDOM)
    of_pair = (own[..., first] + own[..., second]) / 2
    return np.sqrt(2 * ((1 - share) * own.mean(-1, keepdims=True) + share * of_pair) / seeds)


def row_errors(rows: RowLosses, arms: Sequence[str], seeds: Sequence[int]) -> np.ndarray | None:
    """Standard errors over test rows of every pair's difference: a bootstrap of the rows, (arms, arms).

    None where some run's losses were not kept.
    """
    means = _resampled(rows, arms, seeds)
    return None if means is None else np.std(means[:, :, None] - means[:, None, :], axis=0, ddof=1)


def mean_on_new_rows(found: Interval, rows: RowLosses, arm: str, seeds: Sequence[int]) -> Interval | None:
    """An arm's mean over seeds with the interval that holds for other test rows too.

    None where it has no interval over seeds, or some run's losses were not kept.
    """
    means = _resampled(rows, [arm], seeds)
    if means is None or found.high is None:
        return None
    over_rows = NORMAL_95 * float(np.std(means, ddof=1))
    return _around(found.mean, float(np.hypot(found.high - found.mean, over_rows)), found.count)


def tukey_p(t: float, arms: int, freedom: int) -> float:
    """P(the largest |t| of all pairs of arms ≥ t), where no arms differ.

    >>> round(tukey_p(3.557, 9, 16), 3)
    0.05
    """
    found = require("scipy.stats", extra="study").studentized_range.sf(t * 2**0.5, arms, freedom)
    return float(min(1.0, max(0.0, found)))


def dunnett_p(t: float, arms: int, freedom: int) -> float:
    """P(the largest |t| of the arms against the reference, one of `arms`, ≥ t), where no arms differ.

    The probability given the reference's mean and the residual spread, integrated over both.

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


def check_margin(margin: float) -> None:
    """Refuse a margin that is none.

    Raises:
        ConfigError: it is no finite number above 0.
    """
    if not 0 < margin < float("inf"):
        raise ConfigError(
            f"the margin of equality must be a finite number above 0 (--margin); got {margin:g}"
        )


TUKEY = Procedure("Tukey", TUKEY_LEVEL, tukey_p)
DUNNETT = Procedure(
    "Dunnett",
    DUNNETT_LEVEL,
    # Few degrees of freedom make its level the harsher one; Tukey's for all pairs holds for these as well.
    lambda *given: min(dunnett_p(*given), tukey_p(*given) * DUNNETT_LEVEL / TUKEY_LEVEL),
)


def _compare(
    values: Mapping[str, Mapping[int, float]],
    pairs_of: Callable[[Sequence[str]], list[tuple[str, str]]],
    procedure: Procedure,
    rows: RowLosses | None,
) -> Comparison:
    arms, seeds, notes = _complete(values)
    pairs = pairs_of(arms)
    empty = Comparison(procedure.name, procedure.level, (), tuple(seeds), None, 0, notes)
    if not pairs or not seeds:
        return empty
    table = np.array([[values[arm][seed] for seed in seeds] for arm in arms], dtype=float)
    first, second = ([arms.index(pair[side]) for pair in pairs] for side in (0, 1))
    gaps = [float(gap) for gap in (table[first] - table[second]).mean(1)]
    if len(seeds) < 2:
        told = [
            Difference(a, b, Interval(gap, None, None, 1), None, procedure.level)
            for (a, b), gap in zip(pairs, gaps, strict=True)
        ]
        return replace(empty, differences=tuple(told))
    own = own_variances(table)
    freedom = (len(arms) - 1) * (len(seeds) - 1)
    reach = procedure.quantile(len(arms), freedom)
    errors = [float(error) for error in pair_errors(own, first, second, len(seeds))]
    by_row = row_errors(rows, arms, seeds) if rows else None
    found = []
    for (a, b), gap, error, i, j in zip(pairs, gaps, errors, first, second, strict=True):
        wider = None if by_row is None else reach * float(np.hypot(error, by_row[i, j]))
        told = _around(gap, reach * error, len(seeds))
        new_rows = None if wider is None else _around(gap, wider, len(seeds))
        p = _p(procedure, gap, error, len(arms), freedom)
        found.append(Difference(a, b, told, p, procedure.level, new_rows))
    return replace(empty, differences=tuple(found), spread=float(own.mean() ** 0.5), freedom=freedom)


@cache
def _quantile(procedure: Procedure, arms: int, freedom: int) -> float:
    solve = require("scipy.optimize", extra="study").brentq
    return float(solve(lambda t: procedure.p(t, arms, freedom) - procedure.level, 1.0, LARGEST_T, rtol=1e-9))


def _complete(values: Mapping[str, Mapping[int, float]]) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Arms and the seeds that all of them have; the arm of fewest seeds goes while less than two are common.

    The first arm stays: it may be the reference.
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
    """Adjusted p; 1 where both the spread and the difference are no more than rounding."""
    if error < ROUNDING and abs(gap) < ROUNDING:
        return 1.0
    t = abs(gap) / error if error > 0 else LARGEST_T
    return 0.0 if t >= LARGEST_T else procedure.p(t, arms, freedom)


def _around(mean: float, half: float, count: int) -> Interval:
    return Interval(mean, mean - half, mean + half, count)


def _holds(found: Interval, value: float) -> bool:
    return found.low is None or found.high is None or found.low <= value <= found.high
