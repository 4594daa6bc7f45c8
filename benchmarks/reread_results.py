"""Read committed results.json files again with the comparisons of this version; nothing is trained.

A results.json holds the test loss of every arm and seed, and nothing of single test rows: the differences
speak of the test rows of that study only.

    python benchmarks/reread_results.py > docs/results/reread.md
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brushstroke.studies.comparisons import MARGIN, Comparison, compare_all, compare_with
from brushstroke.studies.findings import Table, describe_pairs, difference_table

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
        losses = losses_of(results, names)
        if finding["question"].startswith(QUESTIONS[0]):
            order = finding["data"]["order"]
            yield "All pairs of sets, nats.", compare_all({name: losses[name] for name in order})
            continue
        ranks = {name: losses[name] for name in names if results["arms"][name]["arm"]["rank"] is not None}
        yield "All pairs of ranks, nats.", compare_all(ranks)
        for whole in losses.keys() - ranks.keys():
            yield "Ranks against W itself, nats.", compare_with(whole, losses)


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
        "of single test rows are not in these files: differences speak of the test rows of each study only.\n"
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
