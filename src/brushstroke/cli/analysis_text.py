"""The results of an analysis as tables on stdout.

It computes nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from brushstroke.cli.console import facts, results, share, table, tell

if TYPE_CHECKING:
    from brushstroke.analysis import Intruders, Overlap, Relation, Spectrum, Truncation

# What a narrow terminal does without: the least important column, or group of columns, first.
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


def print_spectrum(name: str, found: "Spectrum", measure: str) -> None:
    """The spectrum of one adapter: a row for each site, the map, the advice."""
    from brushstroke.analysis.listing import rank_advice, spectrum_listing

    console = results()
    table(console, *spectrum_listing(found), leave_out=WITHOUT["spectrum"])
    _print_map(found, measure)
    tell(console, name, style="bold")
    widest = max(row.rank for row in found.values())
    facts(
        console,
        {
            "sites": f"{len(found)}, rank {widest}",
            "size": f"{found.parameters:,} parameters",
            "norm": f"{found.norm:.4g}",
            "advice": rank_advice(found),
        },
    )


def _print_map(found: "Spectrum", measure: str) -> None:
    from brushstroke.analysis.listing import number

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
    """What truncating did."""
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


def print_overlap(names: tuple[str, str], found: "Overlap") -> None:
    """Two adapters, a row for each site."""
    from brushstroke.analysis.listing import overlap_listing

    console = results()
    table(console, *overlap_listing(found), leave_out=WITHOUT["overlap"])
    tell(console, f"{names[0]} and {names[1]}", style="bold")
    unmatched = found.unmatched
    facts(
        console,
        {
            "sites": f"{len(found)}; φ of as many directions as the smaller rank has",
            "cosine": f"{found.cosine:.4f} over all sites; by chance 0",
            "only in the first": ", ".join(unmatched.only_first),
            "only in the second": ", ".join(unmatched.only_second),
            "zero": ", ".join(unmatched.zero),
            "note": ""
            if found.of == "delta"
            else f"of {found.of} alone, which is no property of ΔW: other factors of the same ΔW differ",
        },
    )


def print_relation(name: str, found: "Relation") -> None:
    """An adapter in its base, a row for each site."""
    from brushstroke.analysis import mean_deciles
    from brushstroke.analysis.listing import number, relation_listing

    console = results()
    table(console, *relation_listing(found), leave_out=WITHOUT["relation"])
    told = found.totals()
    tell(console, name, style="bold")
    deciles = mean_deciles(found)
    whole, ratio = number(told["amplification"]), number(told["ratio_to_chance"])
    facts(
        console,
        {
            "amplification": f"{whole}; {number(told['amplification_random'])} at random",
            "ratio to chance": f"{ratio}, median {number(told['median_ratio_to_chance'])}",
            "energy by tenth of W": ""
            if deciles is None
            else f"inputs {_shares(deciles.left)}; outputs {_shares(deciles.right)} (strongest first)",
            "zero": ", ".join(told["zero"]),
        },
    )


def _shares(parts: tuple[float, ...]) -> str:
    return " ".join(f"{100 * part:.0f}" for part in parts) + " %"


def print_intruders(name: str, found: "Intruders", repaired: Path | None) -> None:
    """The directions that are new or undecided."""
    from brushstroke.analysis.listing import intruder_listing

    console = results()
    listing = intruder_listing(found)
    if listing.rows:
        table(console, *listing, leave_out=WITHOUT["intruders"])
    tell(console, name, style="bold")
    judged = found.totals()["directions"]
    covered = max((row.covered_from for row in found.values()), default=0.0)
    facts(
        console,
        {
            "judged": f"{judged} directions of {len(found)} sites, threshold {found.threshold}",
            "intruders": f"{found.count()} at {sum(row.count() > 0 for row in found.values())} sites",
            "undecided": str(found.count("undecided") or ""),
            "certificates": f"above {share(covered)} of W's largest singular value" if covered else "",
            "repaired": "" if repaired is None else str(repaired),
        },
    )
