"""Read committed results.json files again with the comparisons of this version; nothing is trained.

A results.json holds the test loss of every arm and seed, but not those of single test rows. The intervals
on new rows, which a bootstrap of the rows gave, are therefore taken from it unchanged. So is the difference
of q and v; its interval is widened if the study stored it for one side alone.

    python benchmarks/reread_results.py > docs/results/reread.md
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

from brushstroke.errors import require
from brushstroke.studies.comparisons import MARGIN, Comparison, compare_all, compare_with
from brushstroke.studies.findings import Table, bounds, describe_pairs, difference_table
from brushstroke.studies.seeds import DIFFERENCE, SIDE_NAMES
from brushstroke.studies.statistics import Interval

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
QUESTIONS = ("Which matrices", "What rank", "Do two seeds")
BOTH_SIDES = "(intervals for both sides at once)"  # what an answer says if its intervals hold together


def losses_of(results: dict[str, Any], names: list[str]) -> dict[str, dict[int, float]]:
    """Arm → seed → test loss, of the runs that did not diverge."""
    outcomes = {name: results["arms"][name]["outcomes"] for name in names}
    return {
        name: {int(seed): one["test"]["loss"] for seed, one in found.items() if one["test"]}
        for name, found in outcomes.items()
    }


def comparisons(results: dict[str, Any]) -> Iterator[tuple[str, Comparison]]:
    """The comparisons of the questions about matrices and ranks, with captions."""
    for finding in results["findings"]:
        if not finding["question"].startswith(QUESTIONS[:2]):
            continue
        names = [name for name in finding["data"]["test_loss"] if results["arms"][name]["conclusive"]]
        losses, data = losses_of(results, names), finding["data"]
        if finding["question"].startswith(QUESTIONS[0]):
            sets = compare_all({name: losses[name] for name in data["order"]})
            yield "All pairs of sets, nats.", with_new_rows(sets, data["comparison"])
            continue
        ranks = {name: losses[name] for name in names if results["arms"][name]["arm"]["rank"] is not None}
        yield "All pairs of ranks, nats.", with_new_rows(compare_all(ranks), data["ranks"])
        for whole in losses.keys() - ranks.keys():
            against = compare_with(whole, losses)
            yield "Ranks against W itself, nats.", with_new_rows(against, data["against_whole"])


def with_new_rows(found: Comparison, stored: dict[str, Any]) -> Comparison:
    """The comparison with the intervals on new rows that the study stored; equality is judged by these."""
    if found.procedure != stored["procedure"] or not isclose(found.level, stored["level"], rel_tol=1e-6):
        raise SystemExit("the intervals on new rows are those of another procedure: run study --reread first")
    intervals = {(one["first"], one["second"]): one["on_new_rows"] for one in stored["differences"]}
    return replace(
        found,
        differences=tuple(
            replace(one, new_rows=interval_of(intervals[one.first, one.second])) for one in found.differences
        ),
    )


def interval_of(stored: dict[str, Any] | None) -> Interval:
    """An interval that a results.json holds."""
    if stored is None:
        raise SystemExit("the study stored no interval on new rows, so that no equality can be shown")
    return Interval(stored["mean"], stored["low"], stored["high"], stored["n"])


def q_less_v(results: dict[str, Any]) -> Table | None:
    """What two seeds share more in q than in v, with intervals for both sides at once (Bonferroni).

    Older versions stored 95 % intervals for each side alone; these are widened.
    """
    finding = next((one for one in results["findings"] if one["question"].startswith(QUESTIONS[2])), None)
    sides = finding["data"]["matrices"].get(DIFFERENCE) if finding else None
    if not finding or not sides:
        return None
    rows = []
    for side, stored in sides.items():
        one, wider = interval_of(stored), 1.0
        if BOTH_SIDES not in finding["answer"]:
            alone, together = (t_quantile(1 - 0.05 / (2 * count), one.count - 1) for count in (1, len(sides)))
            wider = together / alone
        assert one.low is not None
        half = wider * (one.mean - one.low)
        rows.append(
            (SIDE_NAMES[side], bounds(Interval(one.mean, one.mean - half, one.mean + half, one.count), 3))
        )
    caption = (
        "Directions that two seeds share above the other task, q less v. The 95 % intervals hold for both "
        "sides at once."
    )
    return Table(caption, ("side", "q less v"), tuple(rows))


def t_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t."""
    return float(require("scipy.special", extra="study").stdtrit(freedom, share))


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = [f"| {' | '.join(table.columns)} |", "|---" * len(table.columns) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in table.rows]
    return f"{table.caption}\n\n" + "\n".join(lines)


def main(files: list[str]) -> None:
    """Print the page."""
    print("# The committed studies, read again\n")
    print(
        "Written by `benchmarks/reread_results.py` from the test losses of every arm and seed. The losses\n"
        "of single test rows are not in these files: the intervals on new rows are those that each study\n"
        "stored. Two arms are equal only where the interval on new rows lies inside of the margin.\n"
        f"The margin is {MARGIN:g} nats; the page of a study says whether it was stated before the runs."
    )
    for file in files:
        results = json.loads(Path(file).read_text("utf-8"))
        print(f"\n## {Path(file).stem}")
        for caption, found in comparisons(results):
            print(
                f"\n{describe_pairs(found, MARGIN)}\n\n{markdown(difference_table(found, MARGIN, caption))}"
            )
        if table := q_less_v(results):
            print(f"\n{markdown(table)}")


if __name__ == "__main__":
    main(sys.argv[1:] or [str(file) for file in sorted(RESULTS.glob("paper_*.json"))])
