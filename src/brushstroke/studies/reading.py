"""What several readings need: sites by layer and matrix, φ of pairs of runs, losses of arms."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.analysis import SiteOverlap, arrange, subspace
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.studies.findings import Table, bounds
from brushstroke.studies.runner import ArmResult, Results
from brushstroke.studies.statistics import Difference, Interval, interval, over_pairs

SIDES = ("left", "right")


def places(sites: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Site → (layer, matrix), for tables and menus."""
    grid = arrange(sites)
    last = {matrix: matrix.rsplit(".", 1)[-1] for matrix in grid.matrices}
    names = last if len(set(last.values())) == len(last) else {matrix: matrix for matrix in last}
    return {site: (layer or "–", names[matrix]) for (layer, matrix), site in grid.sites.items()}


def test_loss(found: ArmResult) -> Interval | None:
    """Mean test loss over seeds with its interval."""
    values = list(found.losses().values())
    return interval(values) if values else None


def arms_table(results: Results, names: Sequence[str], caption: str) -> Table:
    """Arm, parameters, chosen rate and whether it is inside of its grid, losses, accuracy, the way of U."""
    rows = []
    for name in names:
        found = results.arms.get(name)
        if found is None:
            rows.append((name, "–", "–", "not run: left out by the budget", "–", "–", "–"))
            continue
        first = next(iter(found.outcomes.values()), None)
        loss = test_loss(found)
        scores = [o.test.accuracy for o in found.outcomes.values() if o.test]
        moved = [o.start_change for o in found.outcomes.values() if o.start_change is not None]
        rate = "–" if found.chosen is None else f"{found.chosen:g}"
        if not found.conclusive:
            rate += f" (inconclusive: the {found.edge} of the grid)" if found.edge else " (diverged)"
        rows.append(
            (
                name,
                f"{first.parameters:,}" if first else "–",
                rate,
                bounds(loss) if loss else "–",
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
        "tokens right",
        "U moved by",
        "seeds",
    )
    return Table(caption, columns, tuple(rows))


def pair_overlaps(
    results: Results, first: str, second: str, seeds: Sequence[int]
) -> dict[tuple[int, int], Mapping[str, SiteOverlap]]:
    """(seed, seed) → φ by site, for all pairs of different seeds of two arms (or of one)."""
    found = {}
    for a, b in combinations(seeds, 2):
        found[a, b] = subspace(results.adapter(first, a), results.adapter(second, b))
        if first != second:
            found[b, a] = subspace(results.adapter(first, b), results.adapter(second, a))
    return found


def block(row: SiteOverlap, side: str, i: int, j: int) -> float:
    """φ(i, j) of one side; the largest block there is where an update has fewer directions."""
    grid = getattr(row, side)
    return float(grid[min(i, grid.shape[0]) - 1, min(j, grid.shape[1]) - 1])


def over_seeds(values: Mapping[tuple[int, int], float]) -> Interval:
    """Mean over pairs of seeds, with the interval of the jackknife over seeds."""
    return interval(over_pairs(values))


def diverged_note(results: Results, names: Sequence[str]) -> tuple[str, ...]:
    """Which later seeds diverged; no number includes them."""
    lost = [
        f"{name} (seed {', '.join(str(seed) for seed in found.outcomes if seed not in found.seeds)})"
        for name in names
        if (found := results.arms.get(name)) is not None and len(found.seeds) < len(found.outcomes)
    ]
    return (f"Diverged, and in no number: {'; '.join(lost)}.",) if lost else ()


def limits(results: Results, names: Sequence[str]) -> tuple[str, ...]:
    """What limits a finding about these arms: inconclusive ones, diverged seeds, the budget of time."""
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
    """The smallest rank of its updates."""
    return min(min(update.rank, *update.shape) for update in low_rank_updates(adapter).values())


def inconclusive_note(results: Results, names: Sequence[str]) -> tuple[str, ...]:
    """What to say of arms whose learning rate could not be chosen."""
    open_ones = [name for name in names if name in results.arms and not results.arms[name].conclusive]
    if not open_ones:
        return ()
    return (
        f"Inconclusive, and left out of every comparison: {', '.join(open_ones)}. The best learning rate "
        "lies on the edge of the grid, however often the grid was extended, or all of them diverged; give "
        "others (--learning-rates).",
    )


def left_out_note(results: Results) -> tuple[str, ...]:
    """What the budget of time left out."""
    return tuple(f"Left out by the budget of time: {line}." for line in results.estimate.left_out)


def as_interval(found: Interval | None) -> dict[str, Any] | None:
    """JSON types."""
    return (
        None
        if found is None
        else {"mean": found.mean, "low": found.low, "high": found.high, "n": found.count}
    )


def as_differences(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """JSON types of paired differences."""
    return [
        {
            "first": one.first,
            "second": one.second,
            "difference": as_interval(one.difference),
            "p_holm": one.p_holm,
        }
        for one in found
    ]


def band(found: Interval) -> dict[str, float]:
    """The bounds for a figure; nothing where there are none."""
    return {} if found.low is None or found.high is None else {"low": found.low, "high": found.high}
