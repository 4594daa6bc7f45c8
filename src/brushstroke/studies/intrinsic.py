"""The intrinsic dimension of a task, d90, from training in random subspaces (background of the paper).

Does not implement the subspaces (`random_subspace` does).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from brushstroke.checks import check_integer
from brushstroke.errors import ConfigError
from brushstroke.report.charts import lines
from brushstroke.studies.arm_run import ArmRunner, Score
from brushstroke.studies.arms import (
    Arm,
    chosen_sites,
    low_rank,
    matrices_name,
    parameters_per_rank,
    two_digits,
    whole,
)
from brushstroke.studies.findings import Figure, Finding, format_seeds
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import interval
from brushstroke.studies.study import Material
from brushstroke.studies.tables import arms_table, as_interval, band, limits, test_loss

SMALL = 500_000  # up to this number of weights at the sites, subspaces are those of W
SHARE = 0.9
ALREADY = "not asked, since the untouched base has 90 % of it already"


@dataclass(frozen=True)
class IntrinsicStudy:
    """Random subspaces of growing dimension, and all of the parameters.

    Args:
        targets: the matrices.
        dimensions: of the subspaces.
        rank: rank of the update if the subspaces are those of its factors; 8 by default.
        alpha: numerator of that update's scale; 16 by default.
        of: "W" for subspaces of the weights, "factors" for subspaces of U and V, "auto" to choose by size.

    Raises:
        ConfigError: a dimension or the rank is below 1.
    """

    targets: tuple[str, ...] = ("all-linear",)
    dimensions: tuple[int, ...] = (10, 30, 100, 300, 1000)
    rank: int | None = None
    alpha: float | None = None
    of: str = "auto"
    name: str = "intrinsic"

    def __post_init__(self) -> None:
        for value in self.dimensions:
            check_integer("dimension", value)
        if self.rank is not None:
            check_integer("rank", self.rank)

    def arms(self, material: Material) -> list[Arm]:
        """One arm with all parameters, and one for each dimension, with its rates multiplied by √(D/d).

        Adam moves each of the d coordinates by about the rate; the columns of the projection have norm 1, so
        that each of the D parameters moves by the rate times √(d/D).

        Raises:
            ConfigError: a rank or alpha is set, but the subspaces are those of W.
        """
        full = self._full(material)
        rates, size = material.grid.of(full), self._parameters(material, full)

        def subspace(d: int) -> Arm:
            scaled = two_digits([rate * math.sqrt(size / d) for rate in rates])
            return replace(full, name=_subspace(full.name, d), dimension=d, rates=scaled)

        return [full, *map(subspace, sorted(set(self.dimensions)))]

    def _parameters(self, material: Material, full: Arm) -> int:
        """The number of values that the arm with all parameters trains."""
        if full.rank is not None:
            return full.rank * parameters_per_rank(self.targets, material.sites)
        return _weights(self.targets, material)

    def _full(self, material: Material) -> Arm:
        matrices = matrices_name(self.targets)
        size = _weights(self.targets, material)
        if self.of == "W" or (self.of == "auto" and size <= SMALL):
            if self.rank is not None or self.alpha is not None:
                raise ConfigError(
                    f"the subspaces are those of the {size:,} weights W of {matrices}: they have no rank and "
                    "no alpha; leave these out (--rank, --alpha)"
                )
            return whole(matrices, self.targets, material.grid.rates)
        return low_rank(matrices, self.targets, *self._factors)

    @property
    def _factors(self) -> tuple[int, float]:
        """Rank and alpha of the update if the subspaces are those of its factors."""
        return 8 if self.rank is None else self.rank, 16.0 if self.alpha is None else self.alpha

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """d90 by both definitions, and the curve."""
        matrices = matrices_name(self.targets)
        full_names = (f"{matrices} W itself", f"{matrices} r={self._factors[0]}")
        full = next(name for name in full_names if _subspace(name, self.dimensions[0]) in results.planned)
        subspaces = [_subspace(full, d) for d in sorted(set(self.dimensions))]
        question = "How many dimensions does the task need?"
        notes = (
            "A random subspace of the parameters (Li et al. 2018); d90 is an upper bound at the dimensions "
            "that were tried, for this training and these matrices.",
            "The accuracy is the share of test tokens that are predicted first.",
            "Between two dimensions that were tried, the share that is reached is taken as linear in log d; "
            "the interval is a t-interval over seeds of log d90.",
            *limits(results, [*subspaces, full]),
        )
        table = arms_table(results, [full, *subspaces], "All parameters, and random subspaces.")
        good = results.conclusive([*subspaces, full])
        if full not in good:
            answer = "Training all of the parameters is not conclusive, so there is nothing to take 90 % of."
            return Finding(question, answer, (table,), (), notes)
        before, after, seeds = results.untouched["task"], _mean_score(results, full), results.arms[full].seeds
        if after.loss >= before.loss:
            answer = "Training all of the parameters is no better than the untouched base: 90 % of nothing."
            return Finding(question, answer, (table,), (), notes)
        kept = [name for name in subspaces if name in good]
        losses = {results.arms[name].arm.dimension or 0: _mean_score(results, name) for name in kept}
        kept_scores = {seed: _scores(results, kept, seed) for seed in _by_seed(results, full)}
        of_gain = _d90(_gain, before, after, losses, _by_seed(results, full), kept_scores)
        asked = before.accuracy < SHARE * after.accuracy
        of_metric = (
            _d90(_accuracy, before, after, losses, _by_seed(results, full), kept_scores) if asked else None
        )
        return Finding(
            question,
            f"{'Over the means of' if len(seeds) > 1 else 'With'} {format_seeds([len(seeds)])}: "
            f"d90 of the gain in loss over the untouched base ({before.loss:.3f} to {after.loss:.3f} nats): "
            f"{of_gain}. d90 of the accuracy of "
            f"full training ({100 * after.accuracy:.1f} %; the untouched base has "
            f"{100 * before.accuracy:.1f} %): {ALREADY if of_metric is None else of_metric}.",
            (table,),
            (_figure(results, kept, before.loss, after.loss),),
            notes,
            {
                "d90_gain": of_gain.smallest,
                "d90_gain_by_seed": of_gain.between_by_seed(),
                "d90_metric": None if of_metric is None else of_metric.smallest,
                "d90_metric_by_seed": None if of_metric is None else of_metric.between_by_seed(),
                "test_loss": {n: as_interval(test_loss(good[n])) for n in good},
            },
        )


def _figure(results: Results, kept: Sequence[str], before: float, after: float) -> Figure:
    """Loss by dimension with its intervals, with the levels of the base and of training all parameters."""
    found = {results.arms[name].arm.dimension or 0: test_loss(results.arms[name]) for name in kept}
    records = [
        {"dimension": d, "loss": loss.mean, "arm": "random subspace", **band(loss)}
        for d, loss in sorted(found.items())
        if loss
    ]
    levels = {
        "untouched base": before,
        "90 % of the gain": before - SHARE * (before - after),
        "all parameters": after,
    }
    records += [
        {"dimension": d, "loss": level, "arm": label}
        for d in (min(found, default=1), max(found, default=1))
        for label, level in levels.items()
    ]
    spec = lines(
        records,
        x="dimension",
        y="loss",
        series="arm",
        x_title="dimensions",
        y_title="test loss, nats",
        log_x=True,
    )
    caption = "Test loss by the dimension of the subspace, with 95 % intervals over seeds."
    return Figure("intrinsic", caption, spec)


def _subspace(full: str, dimension: int) -> str:
    """The name of the arm that trains a subspace of this arm's parameters."""
    return f"{full}, {dimension} dimensions"


def _weights(targets: Sequence[str], material: Material) -> int:
    return sum(site.d * site.h for site in chosen_sites(targets, material.sites))


def _gain(before: Score, after: Score, score: Score) -> float:
    """The share of full training's gain in loss over the base."""
    return (before.loss - score.loss) / (before.loss - after.loss)


def _accuracy(before: Score, after: Score, score: Score) -> float:
    """The share of the accuracy of full training."""
    return score.accuracy / after.accuracy


@dataclass(frozen=True)
class _D90:
    """The dimensions that reach 90 % of a measure.

    Args:
        smallest: the smallest tried dimension that reaches it, by means over seeds; None if none does.
        tried: all tried dimensions.
        between: seed → interpolated dimension at which it reaches 90 %.
    """

    smallest: int | None
    tried: tuple[int, ...]
    between: Mapping[int, float | None]

    def between_by_seed(self) -> dict[str, float | None]:
        """JSON types."""
        return {str(seed): found for seed, found in self.between.items()}

    def __str__(self) -> str:
        return f"{_told(self.smallest, self.tried)}{_spread(self.between)}"


def _d90(
    share: Callable[[Score, Score, Score], float],
    before: Score,
    after: Score,
    losses: Mapping[int, Score],
    full: Mapping[int, Score],
    by_seed: Mapping[int, Mapping[int, Score]],
) -> _D90:
    """d90 by one definition.

    Args:
        share: (score of the base, of all parameters, of a subspace) → the share of full training.
        before: score of the base.
        after: score of all parameters, the mean over seeds.
        losses: dimension → score, the mean over seeds.
        full: seed → score of all parameters.
        by_seed: seed → dimension → score.
    """
    smallest = next((d for d in sorted(losses) if share(before, after, losses[d]) >= SHARE), None)
    between = {
        seed: _crossing({d: share(before, top, score) for d, score in by_seed[seed].items()})
        for seed, top in full.items()
        if top.loss < before.loss
    }
    return _D90(smallest, tuple(sorted(losses)), between)


def _crossing(shares: Mapping[int, float]) -> float | None:
    """The first dimension with a share of 90 %, linear in log d; None if it is not between two dimensions."""
    for smaller, larger in pairwise(sorted(shares)):
        low, high = shares[smaller], shares[larger]
        if low >= SHARE:
            return None
        if high >= SHARE:
            return smaller * (larger / smaller) ** ((SHARE - low) / (high - low))
    return None


def _spread(between: Mapping[int, float | None]) -> str:
    """The interval over seeds as text, or the values of single seeds if not all seeds have one."""
    if len(between) < 2:
        return ""
    passed = [d for d in between.values() if d is not None]
    if not passed:
        return "; with no seed is 90 % passed between two dimensions that were tried"
    if len(passed) < len(between):
        values = ", ".join(f"{d:,.0f}" for d in passed)
        others = "the other" if len(between) - len(passed) == 1 else "the others"
        return (
            f", by interpolation {values} with {len(passed)} of {len(between)} seeds; with {others} 90 % is "
            "not passed between two dimensions that were tried"
        )
    found = interval([math.log(d) for d in passed])
    mean, low, high = (math.exp(value or 0) for value in (found.mean, found.low, found.high))
    return f", by interpolation {mean:,.0f} [{low:,.0f}, {high:,.0f}]"


def _by_seed(results: Results, name: str) -> dict[int, Score]:
    return {seed: o.test for seed, o in results.arms[name].outcomes.items() if o.test}


def _scores(results: Results, names: Sequence[str], seed: int) -> dict[int, Score]:
    """Dimension → score with this seed."""
    found = {results.arms[name].arm.dimension or 0: _by_seed(results, name).get(seed) for name in names}
    return {dimension: score for dimension, score in found.items() if score}


def _mean_score(results: Results, name: str) -> Score:
    scores = list(_by_seed(results, name).values())
    n = len(scores)
    return Score(sum(s.loss for s in scores) / n, sum(s.accuracy for s in scores) / n, scores[0].tokens)


def _told(found: int | None, tried: Sequence[int]) -> str:
    if found is None:
        return f"above {max(tried):,}, the largest that is conclusive" if tried else "not known"
    smaller = [d for d in tried if d < found]
    return f"{found:,}" + (f" (more than {max(smaller):,})" if smaller else " or less")
