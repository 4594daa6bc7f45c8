"""The divergence of arms from the base on general text, at equal task loss.

Does not measure the divergence of a run (`arm_run` does). An arm with a lower task loss usually has a larger
divergence, and a higher learning rate increases it at the same loss. So every arm is also trained for shares
of its steps, each with a complete schedule at the arm's rate, and arms are compared at equal task loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from statistics import fmean
from typing import Any

from brushstroke.report.charts import lines
from brushstroke.studies.arms import Arm, shortened
from brushstroke.studies.comparisons import Comparison, Difference, compare_with
from brushstroke.studies.findings import Figure, Table, bounds, format_p, rests_on
from brushstroke.studies.runner import Results
from brushstroke.studies.statistics import Interval, interval
from brushstroke.studies.tables import as_interval, band, format_rate
from brushstroke.studies.words import counted

SHARES = (Fraction(1, 4), Fraction(1, 2))  # of the steps
Curve = Sequence[tuple[float, float]]  # (task loss, divergence), from the base to the full number of steps


@dataclass(frozen=True)
class DivergenceComparison:
    """The divergence of a study's arms from the base.

    Args:
        answer: as text.
        tables, figures: the data behind the answer.
        data: the numbers as JSON types.
    """

    answer: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    data: Mapping[str, Any] | None = None


def shortened_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Every arm with fewer steps."""
    return [shortened(arm, share) for arm in arms for share in SHARES]


def compare_divergence(results: Results, names: Sequence[str], reference: str | None) -> DivergenceComparison:
    """Divergence from the base at the task loss that all arms reach.

    Args:
        results: results of the arms and of their shortened forms.
        names: the arms.
        reference: the arm that the others are compared with; None for no comparison.
    """
    if "general" not in results.untouched:
        return DivergenceComparison(
            "How far the model diverges from its base is not known: no general text was given (--general)."
        )
    curves = {name: found for name in names if (found := _curves(results, name))}
    levels = _levels(curves)
    at_level = {
        name: {seed: at_loss(curve, levels[seed]) for seed, curve in found.items() if seed in levels}
        for name, found in curves.items()
    }
    if not levels:
        return DivergenceComparison(
            "How far the arms diverge from the base at equal task loss is not known: see the notes."
        )
    logs = {
        name: {seed: math.log(value) for seed, value in found.items() if value > 0}
        for name, found in at_level.items()
    }
    compared = compare_with(reference, logs) if reference in logs and len(logs) > 1 else None
    level = interval(list(levels.values()))
    again = {
        name: [seed for seed, value in levels.items() if reached(found[seed], value) > 1]
        for name, found in curves.items()
    }
    means = {name: interval(list(found.values())) for name, found in at_level.items()}
    return DivergenceComparison(
        _answer(level, means, compared) + _rises(again),
        (_table(results, level, curves, means, compared),),
        (_figure(curves),),
        {
            "task_loss": as_interval(level),
            "divergence": {
                name: {
                    "at_equal_loss": as_interval(means[name]),
                    "seeds_at_equal_loss_twice": again[name],
                    "of_all_steps": as_interval(interval([curve[-1][1] for curve in found.values()])),
                    "curves": {str(seed): [list(point) for point in curve] for seed, curve in found.items()},
                }
                for name, found in curves.items()
            },
            "ratios": [
                {"first": one.first, "second": one.second, "p": one.p, "apart": one.significant()}
                | {"ratio": as_interval(_ratio(one))}
                for one in (compared.differences if compared else ())
            ],
        },
    )


def at_loss(curve: Curve, level: float) -> float:
    """The divergence at which a curve first reaches a task loss; if it never does, that at its lowest loss.

    Interpolates the square root of the divergence linearly in the loss: near the base, the loss changes
    linearly with the update and the divergence with its square.

    >>> at_loss([(3.0, 0.0), (1.0, 0.04)], 2.0)
    0.01
    """
    for (before, near), (after, far) in pairwise(curve):
        if before >= level >= after:
            share = (before - level) / (before - after) if before > after else 1.0
            return round((math.sqrt(near) + share * (math.sqrt(far) - math.sqrt(near))) ** 2, 12)
    return min(curve)[1]


def reached(curve: Curve, level: float) -> int:
    """How often a curve reaches a task loss: more than once if the loss rose again with more steps.

    >>> reached([(3.0, 0.0), (1.0, 0.04), (2.5, 0.09)], 2.0)
    2
    """
    return sum(
        before != level and min(before, after) <= level <= max(before, after)
        for (before, _), (after, _) in pairwise(curve)
    )


def _curves(results: Results, name: str) -> dict[int, Curve]:
    """Seed → the curve of an arm; empty if the arm is inconclusive or its divergence was not measured."""
    found = results.conclusive([name]).get(name)
    if found is None:
        return {}
    start = (results.untouched[found.arm.task].loss, 0.0)
    lengths = [*(shortened(found.arm, share).name for share in SHARES), name]
    outcomes = [results.arms[length].outcomes for length in lengths if length in results.arms]
    curves = {}
    for seed in found.seeds:
        runs = [runs[seed] for runs in outcomes if seed in runs and not runs[seed].diverged]
        points = [
            (run.test.loss, run.general.divergence)
            for run in runs
            if run.test and run.general and run.general.divergence is not None
        ]
        if len(points) == len(lengths):
            curves[seed] = [start, *points]
    return curves


def _levels(curves: Mapping[str, Mapping[int, Curve]]) -> dict[int, float]:
    """Seed → the lowest task loss that all arms reach, for seeds with which every arm improves."""
    if not curves:
        return {}
    common = set.intersection(*(set(found) for found in curves.values()))
    levels = {seed: max(min(found[seed])[0] for found in curves.values()) for seed in sorted(common)}
    start = {seed: max(found[seed][0][0] for found in curves.values()) for seed in levels}
    return {seed: level for seed, level in levels.items() if level < start[seed]}


def _ratio(one: Difference) -> Interval:
    found = one.difference
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high, found.count)


def _answer(level: Interval, means: Mapping[str, Interval], compared: Comparison | None) -> str:
    levels = "; ".join(f"{name} {bounds(mean, 3)}" for name, mean in means.items())
    text = (
        f"At equal task loss ({level.mean:.4g} nats, which all arms reach), KL from the base on the general "
        f"text, in nats per token: {levels}."
    )
    for one in compared.differences if compared else ():
        verdict = "apart" if one.significant() else "not shown to differ"
        text += f" {one.first} over {one.second}: {bounds(_ratio(one), 3)} times ({verdict})."
    return text


def _rises(again: Mapping[str, Sequence[int]]) -> str:
    """A sentence that names the arms that reach the equal loss more than once; "" if there are none."""
    repeats = "; ".join(
        f"{name} with {counted(len(seeds), 'seed')}" for name, seeds in again.items() if seeds
    )
    if not repeats:
        return ""
    return (
        " The task loss of some arms rose again with more steps, so that they have it more than once "
        f"({repeats}): KL is read where it was first reached."
    )


def _table(
    results: Results,
    level: Interval,
    curves: Mapping[str, Mapping[int, Curve]],
    means: Mapping[str, Interval],
    compared: Comparison | None,
) -> Table:
    rows = []
    for name, found in curves.items():
        one = next((one for one in (compared.differences if compared else ()) if one.first == name), None)
        rows.append(
            (
                name,
                format_rate(results.arms[name]),
                bounds(interval([curve[-1][0] for curve in found.values()])),
                bounds(interval([curve[-1][1] for curve in found.values()]), 3),
                bounds(means[name], 3),
                bounds(_ratio(one), 3) if one else "–",
                "–" if one is None or one.p is None else format_p(one.p),
            )
        )
    against = next((one.second for one in compared.differences), None) if compared else None
    columns = ("arm", "learning rate", "task loss", "KL", "KL at equal task loss")
    rests = ""
    if against and compared:
        columns += (f"times that of {against}", "p")
        rests = f" Ratios are compared by their logarithms. {rests_on(compared)}"
    else:
        rows = [row[:5] for row in rows]
    return Table(
        "KL(base ‖ model) on the general text, nats per token; equal task loss is "
        f"{bounds(level)} nats on the test split.{rests}",
        columns,
        tuple(rows),
    )


def _figure(curves: Mapping[str, Mapping[int, Curve]]) -> Figure:
    records = []
    for name, found in curves.items():
        for points in zip(*found.values(), strict=True):
            divergences = [divergence for _, divergence in points]
            records.append(
                {
                    "arm": name,
                    "loss": fmean(loss for loss, _ in points),
                    "divergence": fmean(divergences),
                    **band(interval(divergences)),
                }
            )
    spec = lines(
        records,
        x="loss",
        y="divergence",
        series="arm",
        x_title="task loss, nats",
        y_title="KL from the base, nats per token",
    )
    shares = ", ".join(map(str, SHARES))
    caption = f"From the untouched base over {shares} of the steps to all of them, means of the seeds."
    return Figure("divergence", f"{caption} Lower means less divergence at the same loss.", spec)
