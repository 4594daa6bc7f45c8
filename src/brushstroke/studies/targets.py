"""Question 1 of the paper: which matrices should be trained with a limited budget of parameters?

Does not implement the comparison (`comparisons` does).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brushstroke.checks import check_integer, check_number, check_sets
from brushstroke.report.charts import dots
from brushstroke.studies.arm_run import ArmRunner
from brushstroke.studies.arms import (
    Arm,
    Budget,
    chosen_sites,
    equal_budget,
    equal_rank,
    matrix_sets,
    parameters_per_rank,
)
from brushstroke.studies.comparisons import MARGIN, Comparison, Difference, compare_all
from brushstroke.studies.findings import Figure, Finding, describe_pairs, difference_table
from brushstroke.studies.runner import Results
from brushstroke.studies.study import Material
from brushstroke.studies.tables import (
    arms_table,
    as_comparison,
    as_interval,
    band,
    comparison_notes,
    difference_figure,
    late_margin,
    limits,
    test_loss,
)

BUDGET_RANK = 8  # the budget is the parameters of the first set at this rank, as in the paper's table 5


@dataclass
class TargetsStudy:
    """Sets of matrices at an equal number of parameters, or at one rank.

    Args:
        sets: at least two, name → patterns; by default those of the paper's table 5 and the feed-forward
            block.
        budget: parameters of each arm; by default those of the first set at rank 8.
        rank: one rank for all sets instead of a budget; larger sets then have more parameters.
        alpha: of all arms.
        margin: the margin of equality, in nats of test loss per trained token; stored before the runs.

    Raises:
        ConfigError: the rank or the budget is below 1, the margin is not a finite number above 0, there is
            only one set, or two sets have the same members.
    """

    sets: Mapping[str, tuple[str, ...]] | None = None
    budget: int | None = None
    rank: int | None = None
    alpha: float = 16.0
    margin: float = MARGIN
    name: str = "targets"
    _found: Budget | None = None

    def __post_init__(self) -> None:
        check_number("the margin of equality (--margin)", self.margin, above=0)
        if self.sets is not None:
            check_sets(self.sets.items())
        if self.rank is not None:
            check_integer("rank", self.rank)
        if self.budget is not None:
            check_integer("the number of parameters (--budget)", self.budget)

    def arms(self, material: Material) -> list[Arm]:
        """One arm for each set of matrices; two given sets may not select the same ones."""
        sites = material.sites
        if self.sets is not None:
            check_sets(
                (name, [site.path for site in chosen_sites(targets, sites)])
                for name, targets in self.sets.items()
            )
        sets = dict(self.sets or matrix_sets(sites))
        if self.rank is not None:
            arms = equal_rank(sets, self.rank, self.alpha)
            self._found = Budget(0, arms, {})
        else:
            first = next(iter(sets.values()))
            usual = BUDGET_RANK * parameters_per_rank(first, sites)
            self._found = equal_budget(sets, sites, self.budget or usual, self.alpha)
        return list(self._found.arms)

    def read(self, results: Results, arm_runner: ArmRunner) -> Finding:
        """The order of the sets by test loss, and the pairs that are shown to differ."""
        assert self._found is not None
        names = [arm.name for arm in self._found.arms]
        good = results.conclusive(names)
        losses = {name: found.losses() for name, found in good.items()}
        ordered = sorted(losses, key=lambda name: sum(losses[name].values()) / len(losses[name]))
        compared = compare_all({name: losses[name] for name in ordered}, results.row_losses(ordered))
        records = []
        for name in ordered:
            loss = test_loss(good[name])
            assert loss is not None
            records.append({"arm": name, "loss": loss.mean, **band(loss)})
        figures = ()
        if records:
            spec = dots(records, name="arm", value="loss", title="test loss, nats")
            figures = (Figure("targets", "Test loss with 95 % intervals over seeds, best first.", spec),)
        limit = (
            f"Every arm has rank {self.rank}: bigger sets have more parameters."
            if self.rank is not None
            else f"Every arm has {self._found.parameters:,} trained parameters, to 5 %. Equal parameters are "
            "not equal time."
        )
        notes = (
            limit,
            *(f"Left out: {name} {reason}." for name, reason in self._found.left_out.items()),
            *comparison_notes(compared, results, self.name, self.margin),
            *limits(results, names),
        )
        return Finding(
            "Which matrices deserve the parameters?",
            _answer(ordered, compared, self.margin) + late_margin(results, self.name, self.margin),
            (
                arms_table(results, [*ordered, *(n for n in names if n not in ordered)], "Sets, best first."),
                *(
                    [difference_table(compared, self.margin, "All pairs, nats.")]
                    if compared.differences
                    else []
                ),
            ),
            (*figures, *difference_figure([compared], self.name)),
            notes,
            {
                "order": ordered,
                "test_loss": {name: as_interval(test_loss(found)) for name, found in good.items()},
                "comparison": as_comparison(compared, self.margin),
            },
        )


def _answer(ordered: list[str], compared: Comparison, margin: float) -> str:
    if not ordered:
        return "No set that was run has a learning rate that could be chosen: the study is inconclusive."
    best = ordered[0]
    if len(ordered) == 1:
        return f"{best} is the only set with a conclusive result: there is nothing to compare."
    order = " < ".join(ordered)
    if compared.spread is None:
        return f"By test loss, from one seed and so without any claim: {order}."
    text = f"By test loss, lowest first: {order}. {describe_pairs(compared, margin)} "
    lower = [one for one in compared.differences if one.first == best and one.lower()]
    if not lower:
        return text + f"{best} is not shown to be lower than any other."
    every = len(lower) == len(ordered) - 1
    others = "every other" if every else ", ".join(one.second for one in lower)
    return text + f"{best} is shown to be lower than {others}{_on_new_rows(lower)}."


def _on_new_rows(lower: Sequence[Difference]) -> str:
    """A phrase: for which of these differences the best set is also lower on new test rows."""
    if not any(one.new_rows for one in lower):
        return " on these test rows"
    kept = [one.second for one in lower if one.significant_on_new_rows()]
    if len(kept) == len(lower):
        return ", on new rows too"
    on_new = f"on new rows too than {', '.join(kept)}" if kept else "but not on new rows"
    return f" on these test rows, {on_new}"
