"""The results of an analysis as tables on stdout.

It computes nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from brushstroke.cli.console import facts, results, share, table

SAME_START = (
    "both grew from one random U (the same seed): left φ shows that start; read right φ and the cosine"
)

if TYPE_CHECKING:
    from brushstroke.analysis import Intruders, Overlap, Relation, Spectrum, Truncation

Measure = Literal["rank99", "rank90", "stable", "effective", "norm", "relative"]
MEASURES: dict[str, Callable[[Any], Any]] = {
    "rank99": lambda row: row.energy_rank(0.99),
    "rank90": lambda row: row.energy_rank(0.90),
    "stable": lambda row: row.stable_rank,
    "effective": lambda row: row.effective_rank,
    "norm": lambda row: row.norm,
    "relative": lambda row: row.relative_norm,
}


def _cell(value: float | None, spec: str = ".4g") -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:{spec}}"


def print_spectrum(name: str, found: "Spectrum", measure: str) -> None:
    """The spectrum of one adapter: a row for each site, the map, the advice."""
    console = results()
    columns = ["site", "d×h", "rank", "norm", "‖ΔW‖/‖W‖", "sigma 1", "stable", "effective", "90 %", "99 %"]
    rows = [
        [
            site,
            f"{row.shape[0]}×{row.shape[1]}",
            str(row.rank),
            _cell(row.norm),
            _cell(row.relative_norm, ".3g"),
            _cell(float(row.sigma[0])),
            f"{row.stable_rank:.2f}",
            f"{row.effective_rank:.2f}",
            str(row.energy_rank(0.90)),
            str(row.energy_rank(0.99)),
        ]
        for site, row in found.ordered()
    ]
    table(console, columns, rows)
    _print_map(found, measure)
    console.print(name, style="bold", markup=False)
    used = found.advised_rank()
    widest = max(row.rank for row in found.values())
    facts(
        console,
        {
            "sites": f"{len(found)}, rank {widest}",
            "size": f"{found.parameters:,} parameters",
            "norm": f"{found.norm:.4g}",
            "advice": f"rank {used} keeps 99 % of the energy at every site"
            + (" (--truncate OUT writes it)" if used < widest else "; none of the rank is spare"),
        },
    )


def _print_map(found: "Spectrum", measure: str) -> None:
    grid = found.grid()
    if len(grid.layers) < 2:
        return
    value = MEASURES[measure]
    rows = [
        [
            layer or "-",
            *(
                _cell(value(found[grid.sites[layer, matrix]]), ".3g") if (layer, matrix) in grid.sites else ""
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
    console = results()
    _, first = next(iter(found.items()))
    sides = [side for side in ("left", "right") if getattr(first, side) is not None]
    columns = ["site", "ranks", "cosine"]
    columns += [f"{side} {what}" for side in sides for what in ("φ", "chance", "z", "weighted")]
    rows = []
    for site, row in found.ordered():
        block = row.block()
        cells = [site, f"{row.ranks[0]},{row.ranks[1]}", f"{row.cosine:.3f}"]
        for side in sides:
            cells += [f"{block[side]:.3f}", f"{block[f'chance_{side}']:.3f}", f"{block[f'z_{side}']:.1f}"]
            cells.append(f"{getattr(row, f'weighted_{side}'):.3f}")
        rows.append(cells)
    table(console, columns, rows)
    console.print(f"{names[0]} and {names[1]}", style="bold", markup=False)
    unmatched = found.unmatched
    facts(
        console,
        {
            "sites": f"{len(found)}; φ of as many directions as the smaller rank has",
            "cosine": f"{found.cosine:.4f} over all sites; by chance 0",
            "only in the first": ", ".join(unmatched.only_first),
            "only in the second": ", ".join(unmatched.only_second),
            "zero": ", ".join(unmatched.zero),
            "same start": SAME_START if found.same_start else "",
            "note": ""
            if found.of == "delta"
            else f"of {found.of} alone, which is no property of ΔW: other factors of the same ΔW differ",
        },
    )


def print_relation(name: str, found: "Relation") -> None:
    """An adapter in its base, a row for each site."""
    console = results()
    columns = ["site", "r", "‖·‖ ΔW", "‖·‖ W", "‖·‖ random", "sampled", "‖W‖", "‖ΔW‖"]
    columns += ["amplification", "at random", "to chance", "residual"]
    rows = [
        [
            site,
            str(row.rank),
            *map(
                _cell,
                (
                    row.projection_delta,
                    row.projection_base,
                    row.projection_random,
                    row.projection_sampled,
                    row.norm_base,
                    row.norm_delta,
                    row.amplification,
                    row.amplification_random,
                    row.ratio_to_chance,
                ),
            ),
            f"{row.residual:.1g}",
        ]
        for site, row in found.ordered()
    ]
    table(console, columns, rows)
    told = found.totals()
    console.print(name, style="bold", markup=False)
    from brushstroke.analysis import mean_deciles

    deciles = mean_deciles(found)
    whole, ratio = _cell(told["amplification"]), _cell(told["ratio_to_chance"])
    facts(
        console,
        {
            "amplification": f"{whole}; {_cell(told['amplification_random'])} at random",
            "ratio to chance": f"{ratio}, median {_cell(told['median_ratio_to_chance'])}",
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
    console = results()
    rows = [
        [
            site,
            str(direction.position + 1),
            _cell(direction.sigma),
            f"{direction.lower:.3f}",
            f"{direction.upper:.3f}",
            f"{direction.outside:.3f}",
            direction.verdict,
        ]
        for site, row in found.ordered()
        for direction in row.directions
        if direction.verdict != "known"
    ]
    if rows:
        table(console, ["site", "position", "sigma", "cosine ≥", "cosine ≤", "outside", "verdict"], rows)
    console.print(name, style="bold", markup=False)
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
