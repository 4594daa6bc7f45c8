"""Prints the results of an analysis as tables on stdout.

It computes nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from brushstroke.cli.console import facts, print_text, results, share, table

if TYPE_CHECKING:
    from brushstroke.analysis import Intruders, Overlap, Relation, Spectrum, Truncation
    from brushstroke.cli.analysis_tables import Description

# Columns, or groups of columns, that a narrow terminal omits, the least important first.
WITHOUT = {
    "spectrum": ("d×h", "90 %", "σ₁", "stable", "‖ΔW‖/‖W‖", "effective"),
    "overlap": (
        ("left weighted", "right weighted"),
        "ranks",
        ("left z", "right z"),
        ("left chance", "right chance"),
    ),
    "relation": ("residual", "sampled", "r", "‖·‖ random", "‖·‖ W", "‖·‖ ΔW", "‖W‖", "‖ΔW‖", "at random"),
    "intruders": ("outside", ("cosine ≥", "cosine ≤")),
}

Measure = Literal["rank99", "rank90", "stable", "effective", "norm", "relative"]
MEASURES: dict[str, Callable[[Any], Any]] = {
    "rank99": lambda row: row.energy_rank(0.99),
    "rank90": lambda row: row.energy_rank(0.90),
    "stable": lambda row: row.stable_rank,
    "effective": lambda row: row.effective_rank,
    "norm": lambda row: row.norm,
    "relative": lambda row: row.relative_norm,
}


def print_spectrum(described: "Description", found: "Spectrum", measure: str | None, sites: bool) -> None:
    """Print the spectrum of one adapter, with a map of a measure if one is named, and the advised ranks."""
    from brushstroke.analysis.text_tables import rank_advice

    _print_summary(described, "spectrum", sites)
    if measure is not None:
        _print_map(found, measure)
    advice = rank_advice(found)
    facts(results(), {"size": f"{found.parameters:,} parameters", "advice": advice})


def _print_map(found: "Spectrum", measure: str) -> None:
    from brushstroke.analysis.text_tables import number

    grid = found.grid()
    if len(grid.layers) < 2:
        return
    value = MEASURES[measure]
    rows = [
        [
            layer or "-",
            *(
                number(value(found[grid.sites[layer, matrix]]), ".3g")
                if (layer, matrix) in grid.sites
                else ""
                for matrix in grid.matrices
            ),
        ]
        for layer in grid.layers
    ]
    table(results(), [f"layer, {measure}", *grid.matrices], rows)


def print_cut(out: Path, cut: "Truncation") -> None:
    """Print the effect of a truncation."""
    ranks = sorted(cut.ranks.values())
    facts(
        results(),
        {
            "truncated": str(out),
            "ranks": f"{ranks[0]} to {ranks[-1]}",
            "size after": f"{cut.parameters:,} of {cut.parameters_before:,} parameters",
            "loss": f"{cut.loss:.4g}, {share(cut.relative_loss)} of the norm",
            "left out": ", ".join(cut.left_out),
        },
    )


def print_overlap(described: "Description", found: "Overlap", sites: bool) -> None:
    """Print the comparison of two adapters."""
    _print_summary(described, "overlap", sites)
    unmatched = found.unmatched
    facts(
        results(),
        {
            "φ": "of as many directions as the smaller rank has" if found else "",
            "only in the first": ", ".join(unmatched.only_first),
            "only in the second": ", ".join(unmatched.only_second),
            "φ undefined, an update is zero": ", ".join(unmatched.zero),
            "note": ""
            if found.of == "delta"
            else f"{found.of} alone, which is not a property of ΔW: other factors of the same ΔW have other "
            "directions",
        },
    )


def print_relation(described: "Description", found: "Relation", sites: bool) -> None:
    """Print an adapter's relation to its base, with the energy by tenth of W's directions and chance."""
    from brushstroke.analysis.text_tables import decile_listing, number

    _print_summary(described, "relation", sites)
    console, totals = results(), found.totals()
    if described.deciles is not None:
        print_text(console, "energy of ΔW by tenth of W's directions, strongest first", indent=2)
        table(console, *decile_listing(described.deciles))
    ratio, median = totals["ratio_to_chance"], totals["median_ratio_to_chance"]
    told_ratio = "" if median is None else f"{number(ratio)} in all, {number(median)} at the median site"
    facts(console, {"ratio to chance": told_ratio, "zero": ", ".join(totals["zero"])})


def print_intruders(described: "Description", found: "Intruders", repaired: Path | None, sites: bool) -> None:
    """Print the number of new directions; with `sites`, each one that is new or undecided."""
    _print_summary(described, "intruders", sites)
    facts(results(), {"repaired": "" if repaired is None else str(repaired)})


def _print_summary(described: "Description", kind: str, sites: bool) -> None:
    """Print the one-sentence result, the tables by kind of matrix and by layer, and the rows of all sites."""
    from brushstroke.analysis.summary import SPREAD

    console, listings = results(), described.summary.listings()
    print_text(console, described.summary.sentence, style="bold")
    if listings:
        print_text(console, SPREAD, style="dim", indent=2)
    for listing in listings.values():
        table(console, *listing, leave_out=("sites", "stable"))
    if sites and described.rows.rows:
        table(console, *described.rows, leave_out=WITHOUT[kind])
