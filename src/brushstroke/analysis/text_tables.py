"""The results of an analysis as columns and rows of text, for terminals and HTML pages.

Does not compute results.
"""

from typing import NamedTuple

from brushstroke.analysis.intruders import Intruders
from brushstroke.analysis.relate import Relation, Share
from brushstroke.analysis.spectrum import Spectrum
from brushstroke.analysis.subspace import Overlap
from brushstroke.analysis.table import arrange, natural


class Listing(NamedTuple):
    """A table: column heads and rows; the first column contains the name of a site or group."""

    columns: list[str]
    rows: list[list[str]]


def spectrum_listing(found: Spectrum) -> Listing:
    """A row for each site: size, norms, and the ranks that follow from its singular values."""
    based = any(row.relative_norm is not None for row in found.values())
    columns = [
        "site",
        "d×h",
        "rank",
        "norm",
        *["‖ΔW‖/‖W‖"] * based,
        "σ₁",
        "stable",
        "effective",
        "90 %",
        "99 %",
    ]
    return Listing(
        columns,
        [
            [
                site,
                f"{row.shape[0]}×{row.shape[1]}",
                str(row.rank),
                number(row.norm),
                *[number(row.relative_norm, ".3g")] * based,
                number(float(row.sigma[0])),
                f"{row.stable_rank:.2f}",
                f"{row.effective_rank:.2f}",
                str(row.energy_rank(0.90)),
                str(row.energy_rank(0.99)),
            ]
            for site, row in found.ordered()
        ],
    )


def rank_advice(found: Spectrum) -> str:
    """The advised ranks for storing an adapter, by kind of matrix; "" if every update is zero."""
    kinds: dict[int, list[str]] = {}
    for matrix, rank in found.advised_ranks().items():
        kinds.setdefault(rank, []).append(matrix)
    ranks = "; ".join(f"rank {rank} for {', '.join(kinds[rank])}" for rank in sorted(kinds))
    if len(kinds) == 1:
        ranks = f"rank {min(kinds)}"
    return f"{ranks}: keeps 99 % of the energy at 90 % of the sites of a kind of matrix" if kinds else ""


def overlap_listing(found: Overlap) -> Listing:
    """A row for each site: cosine, and for each side φ of all directions with its chance level.

    Sites with a zero update come last, without numbers: φ is undefined there.
    """
    sides = found.sides
    columns = [f"{side} {what}" for side in sides for what in ("φ", "chance", "z", "weighted")]
    rows = []
    for site, row in found.ordered():
        block = row.block()
        cells = [site, f"{row.ranks[0]},{row.ranks[1]}", number(row.cosine, ".3f")]
        for side in sides:
            cells += [
                f"{block[side]:.3f}",
                f"{block[f'chance_{side}']:.3f}",
                number(block[f"z_{side}"], ".1f"),
            ]
            cells.append(f"{getattr(row, f'weighted_{side}'):.3f}")
        rows.append(cells)
    zero = arrange(sorted(found.unmatched.zero, key=natural)).sites.values()
    rows += [[site, "zero", *["–"] * (1 + len(columns))] for site in zero]
    return Listing(["site", "ranks", "cosine", *columns], rows)


def relation_listing(found: Relation) -> Listing:
    """A row for each site: the projections of W, the norms, and the amplification with its chance level."""
    columns = ["site", "r", "‖·‖ ΔW", "‖·‖ W", "‖·‖ random", "sampled", "‖W‖", "‖ΔW‖"]
    columns += ["amplification", "at random", "to chance", "residual"]
    rows = []
    for site, row in found.ordered():
        projections = (
            row.projection_delta,
            row.projection_base,
            row.projection_random,
            row.projection_sampled,
        )
        amplified = (row.amplification, row.amplification_random, row.ratio_to_chance)
        values = (*projections, row.norm_base, row.norm_delta, *amplified)
        rows.append([site, str(row.rank), *map(number, values), f"{row.residual:.1g}"])
    return Listing(columns, rows)


def decile_listing(found: Share) -> Listing:
    """Per cent of ‖ΔW‖² in each tenth of W's directions, strongest first, and the chance levels below."""
    rows = {
        "inputs": found.left,
        "chance, inputs": found.chance_left,
        "outputs": found.right,
        "chance, outputs": found.chance_right,
    }
    cells = [
        [name, *(f"{100 * part:.{1 if part < 0.0995 else 0}f}" for part in parts)]
        for name, parts in rows.items()
    ]
    return Listing(["tenth of W, %", *map(str, range(1, len(found.left) + 1))], cells)


def intruder_listing(found: Intruders) -> Listing:
    """A row for each intruder or undecided direction, with the bounds of its cosine."""
    columns = ["site", "position", "σ", "cosine ≥", "cosine ≤", "outside", "verdict"]
    return Listing(
        columns,
        [
            [
                site,
                str(direction.position + 1),
                number(direction.sigma),
                *(f"{value:.3f}" for value in (direction.lower, direction.upper, direction.outside)),
                direction.verdict,
            ]
            for site, row in found.ordered()
            for direction in row.directions
            if direction.verdict != "known"
        ],
    )


def number(value: float | None, spec: str = ".4g") -> str:
    """A number as the text of a cell; a dash for None."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:z{spec}}"
