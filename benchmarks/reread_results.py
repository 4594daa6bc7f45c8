"""Read committed results.json files again with the comparisons of this version; nothing is trained.

A results.json holds the test loss of every arm and seed, but not those of single test rows. The intervals
on new rows, which a bootstrap of the rows gave, are therefore taken from it unchanged.

    python benchmarks/reread_results.py > docs/results/reread.md
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

from brushstroke.studies.comparisons import MARGIN, Comparison, compare_all, compare_with
from brushstroke.studies.findings import Table, describe_pairs, difference_table
from brushstroke.studies.statistics import Interval

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
QUESTIONS = ("Which matrices", "What rank")


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
        if not finding["question"].startswith(QUESTIONS):
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


if __name__ == "__main__":
    main(sys.argv[1:] or [str(file) for file in sorted(RESULTS.glob("paper_*.json"))])
