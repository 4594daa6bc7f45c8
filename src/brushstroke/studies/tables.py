"""Tables, figures and notes that several studies use: sites by layer and matrix, φ of pairs of runs, losses.

Does not compute comparisons or overlaps (`comparisons` and `analysis` do).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.analysis import SiteOverlap, arrange, subspace
from brushstroke.analysis.table import short_names
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.errors import ShapeError
from brushstroke.report.charts import dots, overlaps
from brushstroke.report.overlaps import CHOICES, overlap_records
from brushstroke.studies.comparisons import Comparison, mean_on_new_rows
from brushstroke.studies.findings import Figure, Table, bounds
from brushstroke.studies.runner import ArmResult, Results
from brushstroke.studies.statistics import Interval, interval, over_pairs
from brushstroke.studies.words import listed

SIDES = ("left", "right")
QUANTITIES = {  # overlap figures: name of the file → whose directions, the side, the title
    "dW-input": ("delta", "left", "ΔW, input side"),
    "A": ("U", "left", "the right-singular vectors of A (our U), as in the paper"),
    "dW-output": ("delta", "right", "ΔW, output side"),
}
ABOUT_A = (
    "The paper took A alone. It is no property of ΔW, and in a short run A is still near its random start, "
    "so that two seeds share little of it, whatever ΔW learnt: see how far U moved."
)


def places(sites: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Site → (layer, matrix), for tables and menus; layer by layer, in each q and v first."""
    grid = arrange(sites)
    names = short_names(grid.matrices)
    return {site: (layer or "–", names[matrix]) for (layer, matrix), site in grid.sites.items()}


def test_loss(found: ArmResult) -> Interval | None:
    """Mean test loss over seeds with its interval."""
    values = list(found.losses().values())
    return interval(values) if values else None


def format_rate(found: ArmResult) -> str:
    """The chosen learning rate for a table."""
    return "–" if found.chosen is None else f"{found.chosen:g}"


def arms_table(results: Results, names: Sequence[str], caption: str) -> Table:
    """The table of arms: parameters, chosen rate and whether it is conclusive, losses, change of U."""
    rows = []
    for name in names:
        found = results.arms.get(name)
        if found is None:
            rows.append((name, "–", "–", "not run: left out by the budget", "–", "–", "–", "–"))
            continue
        first = next(iter(found.outcomes.values()), None)
        loss = test_loss(found)
        scores = [o.test.accuracy for o in found.outcomes.values() if o.test]
        moved = [o.start_change for o in found.outcomes.values() if o.start_change is not None]
        rate = format_rate(found)
        if not found.conclusive:
            rate += f" (inconclusive: the {found.edge} of the grid)" if found.edge else " (diverged)"
        rows.append(
            (
                name,
                f"{first.parameters:,}" if first else "–",
                rate,
                bounds(loss) if loss else "–",
                bounds(wider) if loss and (wider := _on_new_rows(results, name, loss)) else "–",
                f"{100 * fmean(scores):.1f} %" if scores else "–",
                f"{100 * fmean(moved):.3g} %" if moved else "–",
                len(found.seeds),
            )
        )
    columns = (
        "arm",
        "parameters",
        "learning rate",
        "test loss [95 %]",
        "on new rows too",
        "tokens right",
        "U moved by",
        "seeds",
    )
    return Table(caption, columns, tuple(rows))


def _on_new_rows(results: Results, name: str, loss: Interval) -> Interval | None:
    return mean_on_new_rows(loss, results.row_losses([name]), name, results.arms[name].seeds)


def pair_overlaps(
    results: Results, first: str, second: str, seeds: Sequence[int]
) -> dict[tuple[int, int], Mapping[str, SiteOverlap]]:
    """(seed, seed) → φ by site, for all pairs of different seeds of two arms (or of one)."""
    found = {}
    for a, b in combinations(seeds, 2):
        found[a, b] = subspace(results.adapter(first, a), results.adapter(second, b))
        if first != second:
            found[b, a] = subspace(results.adapter(first, b), results.adapter(second, a))
    if not all(found.values()):
        raise ShapeError(f"runs of {first} or {second} changed nothing: there are no directions to compare")
    return found


def overlap_figures(
    found: Mapping[str, Mapping[str, SiteOverlap]],
    name: str,
    *,
    i: str,
    j: str,
    controls: Mapping[str, Mapping[str, Mapping[str, SiteOverlap]]] | None = None,
    corner: bool = False,
) -> list[Figure]:
    """φ of ΔW on both sides and of A, with q next to v and random pairs.

    Args:
        found: "delta" and "U" → site → φ.
        name: prefix of the file names.
        i, j: titles of rows and columns.
        controls: name → the same as `found` for another pair of runs.
        corner: also draw the lower-left corners.
    """
    figures = []
    for file, (of, side, title) in QUANTITIES.items():
        others = {label: rows[of] for label, rows in (controls or {}).items()}
        spec = overlaps(
            overlap_records(found[of], side, controls=others),
            x_title=j,
            y_title=i,
            measure=title,
            choose=CHOICES,
            corner=corner,
        )
        grey = " In the corners, cells with j > i are grey." if corner else ""
        about = f" {ABOUT_A}" if of == "U" else ""
        caption = f"φ(i, j) of {title}, and of random pairs of the same ranks and width.{grey}{about}"
        figures.append(Figure(f"{name}-{file}", caption, spec))
    return figures


def difference_figure(compared: Sequence[Comparison], study: str) -> list[Figure]:
    """Differences with their intervals and a line at 0; no figure if there are no differences."""
    records = [
        {"pair": f"{one.first} less {one.second}", "difference": one.difference.mean, **band(one.difference)}
        for comparison in compared
        for one in comparison.differences
    ]
    if not records:
        return []
    spec = dots(records, name="pair", value="difference", title="difference in test loss, nats", zero=True)
    caption = "Differences with their intervals; those of one table hold together."
    return [Figure(f"{study}-differences", caption, spec)]


def block(row: SiteOverlap, side: str, i: int, j: int) -> float:
    """φ(i, j) of one side; if an update has fewer directions, that of the largest block."""
    grid = getattr(row, side)
    return float(grid[min(i, grid.shape[0]) - 1, min(j, grid.shape[1]) - 1])


def over_seeds(values: Mapping[tuple[int, int], float], level: float = 0.95) -> Interval:
    """Mean over pairs of seeds, with the interval of the jackknife over seeds."""
    return interval(over_pairs(values), level)


def diverged_note(results: Results, names: Sequence[str]) -> tuple[str, ...]:
    """A note on seeds that diverged; no result includes them."""
    lost = [
        f"{name} ({listed('seed', [seed for seed in found.outcomes if seed not in found.seeds])})"
        for name in names
        if (found := results.arms.get(name)) is not None and len(found.seeds) < len(found.outcomes)
    ]
    return (f"Diverged, and in no number: {'; '.join(lost)}.",) if lost else ()


def limits(results: Results, names: Sequence[str]) -> tuple[str, ...]:
    """Notes that limit a finding about these arms: inconclusive arms, diverged seeds, the time budget."""
    return (
        *inconclusive_note(results, names),
        *diverged_note(results, names),
        *left_out_note(results),
    )


def smallest_side_of(results: Results, arm: str) -> int:
    """min(d, h) of the smallest matrix that an arm adapts."""
    adapter = results.adapter(arm, results.arms[arm].seeds[0])
    return min(min(update.shape) for update in low_rank_updates(adapter).values())


def own_ranks(adapter: Adapter) -> int:
    """The smallest rank of an adapter's updates."""
    return min(min(update.rank, *update.shape) for update in low_rank_updates(adapter).values())


def inconclusive_note(results: Results, names: Sequence[str]) -> tuple[str, ...]:
    """A note on arms whose learning rate could not be chosen."""
    open_ones = [name for name in names if name in results.arms and not results.arms[name].conclusive]
    if not open_ones:
        return ()
    return (
        f"Inconclusive, and left out of every comparison: {', '.join(open_ones)}. The best learning rate "
        "lies on the edge of the grid, however often the grid was extended, or all of them diverged; give "
        "others (--learning-rates).",
    )


def left_out_note(results: Results) -> tuple[str, ...]:
    """Notes on arms and seeds that the time budget left out."""
    return tuple(
        f"Left out by the budget of time (--budget-minutes): {line}." for line in results.estimate.left_out
    )


def as_interval(found: Interval | None) -> dict[str, Any] | None:
    """An interval as JSON types."""
    return (
        None
        if found is None
        else {"mean": found.mean, "low": found.low, "high": found.high, "n": found.count}
    )


def as_comparison(found: Comparison, margin: float) -> dict[str, Any]:
    """A comparison as JSON types."""
    return {
        "procedure": found.procedure,
        "level": found.level,
        "seeds": list(found.seeds),
        "residual_deviation": found.spread,
        "degrees_of_freedom": found.freedom,
        "margin": margin,
        "differences": [
            {
                "first": one.first,
                "second": one.second,
                "difference": as_interval(one.difference),
                "on_new_rows": as_interval(one.new_rows),
                "p": one.p,
                "apart": one.significant(),
                "apart_on_new_rows": one.significant_on_new_rows(),
                "equal_within_margin": one.equal_within(margin),
            }
            for one in found.differences
        ],
    }


def comparison_notes(found: Comparison, results: Results, study: str, margin: float) -> tuple[str, ...]:
    """Notes that limit a comparison: exclusions, the rows it is valid for, when the margin was set."""
    if found.spread is None:
        return found.notes
    rows = "The losses of single test rows were not kept: all differences speak of these test rows only."
    if any(one.new_rows for one in found.differences):
        rows = "Intervals on new rows add the spread over test rows (bootstrap) to the spread over seeds."
    return (
        *found.notes,
        rows,
        "Equal means: two one-sided tests show a difference of less than "
        f"{margin:g} nats of test loss per trained token, a margin stated "
        + ("before the runs." if _is_early(results, study, margin) else "after the runs."),
    )


def late_margin(results: Results, study: str, margin: float) -> str:
    """A sentence that ends an answer, if the margin of equality was not stored before the runs."""
    return "" if _is_early(results, study, margin) else " The margin of equality was stated after the runs."


def _is_early(results: Results, study: str, margin: float) -> bool:
    return results.margins.get(study) == margin


def band(found: Interval) -> dict[str, float]:
    """The bounds of an interval for a figure; empty if it has none."""
    return {} if found.low is None or found.high is None else {"low": found.low, "high": found.high}
