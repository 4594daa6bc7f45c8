"""The background of the paper: how many dimensions does a task need? d90 by training in random subspaces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from brushstroke.errors import ConfigError
from brushstroke.report.charts import lines
from brushstroke.studies.arms import Arm, chosen_sites, low_rank, matrices_name, whole
from brushstroke.studies.findings import Figure, Finding
from brushstroke.studies.reading import arms_table, as_interval, limits, test_loss
from brushstroke.studies.runner import Results
from brushstroke.studies.study import Material
from brushstroke.studies.workshop import Score, Workshop

SMALL = 500_000  # weights at the sites up to which the subspace is one of W itself
SHARE = 0.9


@dataclass(frozen=True)
class IntrinsicStudy:
    """Random subspaces of growing dimension, and all of the parameters.

    Args:
        targets: the matrices.
        dimensions: of the subspaces.
        rank: of the update whose factors the subspace lies in, where the matrices are large; 8 by default.
        alpha: its numerator; 16 by default.
        of: "W" for subspaces of the weights themselves, "factors" for those of U and V, "auto" by size.
    """

    targets: tuple[str, ...] = ("all-linear",)
    dimensions: tuple[int, ...] = (10, 30, 100, 300, 1000)
    rank: int | None = None
    alpha: float | None = None
    of: str = "auto"
    name: str = "intrinsic"

    def arms(self, material: Material) -> list[Arm]:
        """All parameters, and one arm for each dimension.

        Raises:
            ConfigError: a rank or alpha where the subspaces are those of W itself.
        """
        rates = material.grid.rates
        full = self._full(material)
        wider = tuple(float(f"{rate * 10:.1e}") for rate in rates)
        return [
            full,
            *(
                replace(full, name=f"{full.name}, {d} dimensions", dimension=d, rates=wider)
                for d in sorted(set(self.dimensions))
            ),
        ]

    def _full(self, material: Material) -> Arm:
        matrices = matrices_name(self.targets)
        size = sum(site.d * site.h for site in chosen_sites(self.targets, material.sites))
        if self.of == "W" or (self.of == "auto" and size <= SMALL):
            if self.rank is not None or self.alpha is not None:
                raise ConfigError(
                    f"the subspaces are those of W itself, {size:,} weights of {matrices}: they have no "
                    "rank and no alpha; leave these out (--rank, --alpha)"
                )
            return whole(matrices, self.targets, material.grid.rates)
        return low_rank(matrices, self.targets, *self._factors)

    @property
    def _factors(self) -> tuple[int, float]:
        """Rank and alpha of the update whose factors the subspaces lie in."""
        return 8 if self.rank is None else self.rank, 16.0 if self.alpha is None else self.alpha

    def read(self, results: Results, workshop: Workshop) -> Finding:
        """d90 by both definitions, and the curve."""
        names = list(results.arms)
        mine = [n for n in names if results.arms[n].arm.dimension in set(self.dimensions)]
        matrices = matrices_name(self.targets)
        own = (f"{matrices} W itself", f"{matrices} r={self._factors[0]}")
        full = next((n for n in own if n in results.arms), None)
        question = "How many dimensions does the task need?"
        notes = (
            "A random subspace of the parameters (Li et al. 2018); d90 is an upper bound at the dimensions "
            "that were tried, for this training and these matrices.",
            "The accuracy is the share of test tokens that are predicted first.",
            *limits(results, [*mine, *([full] if full else [])]),
        )
        table = arms_table(
            results, [*([full] if full else []), *mine], "All parameters, and random subspaces."
        )
        good = results.conclusive([*mine, *([full] if full else [])])
        if full is None or full not in good:
            answer = "Training all of the parameters is not conclusive, so there is nothing to take 90 % of."
            return Finding(question, answer, (table,), (), notes)
        before, after = results.untouched["task"], _mean_score(results, full)
        if after.loss >= before.loss:
            answer = "Training all of the parameters is no better than the untouched base: 90 % of nothing."
            return Finding(question, answer, (table,), (), notes)
        kept = [name for name in mine if name in good]
        losses = {results.arms[name].arm.dimension or 0: _mean_score(results, name) for name in kept}
        of_gain, of_metric = _d90(before, after, losses)
        by_seed = {
            seed: _d90(before, whole_score, _scores(results, kept, seed))
            for seed, whole_score in _by_seed(results, full).items()
            if whole_score.loss < before.loss
        }
        records = [
            {"dimension": d, "loss": score.loss, "arm": "random subspace"}
            for d, score in sorted(losses.items())
        ]
        records += [
            {"dimension": d, "loss": score.loss, "arm": label}
            for d in (min(losses, default=1), max(losses, default=1))
            for label, score in (("all parameters", after), ("untouched base", before))
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
        return Finding(
            question,
            f"Over the means of {len(results.arms[full].seeds)} seed(s): d90 of the gain in loss over the "
            f"untouched base ({before.loss:.3f} to {after.loss:.3f} nats): {_told(of_gain, losses)}"
            f"{_spread(by_seed, 0)}. d90 of the accuracy of full training ({100 * after.accuracy:.1f} %; the "
            f"untouched base has {100 * before.accuracy:.1f} %): {_told(of_metric, losses)}"
            f"{_spread(by_seed, 1)}.",
            (table,),
            (Figure("intrinsic", "Test loss by the dimension of the subspace.", spec),),
            notes,
            {
                "d90_gain": of_gain,
                "d90_metric": of_metric,
                "d90_gain_by_seed": {str(seed): found[0] for seed, found in by_seed.items()},
                "d90_metric_by_seed": {str(seed): found[1] for seed, found in by_seed.items()},
                "test_loss": {n: as_interval(test_loss(good[n])) for n in good},
            },
        )


def _d90(before: Score, after: Score, losses: Mapping[int, Score]) -> tuple[int | None, int | None]:
    """The smallest dimension with 90 % of the gain in loss, and with 90 % of the accuracy."""
    aim = before.loss - SHARE * (before.loss - after.loss)
    return (
        _smallest(losses, lambda score: score.loss <= aim),
        _smallest(losses, lambda score: score.accuracy >= SHARE * after.accuracy),
    )


def _spread(by_seed: Mapping[int, tuple[int | None, int | None]], which: int) -> str:
    """What single seeds say, where there are several; an interval of a step function would say less."""
    if len(by_seed) < 2:
        return ""
    found = (pair[which] for pair in by_seed.values())
    return " (by seed " + ", ".join("none" if d is None else f"{d:,}" for d in found) + ")"


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


def _smallest(losses: Mapping[int, Score], reached) -> int | None:
    return next((d for d in sorted(losses) if reached(losses[d])), None)


def _told(found: int | None, tried: Sequence[int] | Mapping[int, Score]) -> str:
    if found is None:
        return f"above {max(tried):,}, the largest that is conclusive" if tried else "not known"
    smaller = [d for d in tried if d < found]
    return f"{found:,}" + (f" (more than {max(smaller):,})" if smaller else " or less")
