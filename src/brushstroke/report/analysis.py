"""The pages of the analysis: spectra, overlaps, relations to the base, intruders.

It computes nothing: the results come from `analysis`, and every number stands in a table too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from brushstroke.analysis import (
    Intruders,
    Overlap,
    Relation,
    SiteTable,
    Spectrum,
    mean_deciles,
    random_pair,
)
from brushstroke.analysis.listing import (
    intruder_listing,
    overlap_listing,
    rank_advice,
    relation_listing,
    spectrum_listing,
)
from brushstroke.report.figures import Panel, bars, curves, heatmaps
from brushstroke.report.page import Page

SHOWN = 4  # sites whose whole grids a page shows unless more are asked for


def spectrum_page(found: Mapping[str, Spectrum]) -> Page:
    """Name → spectrum: how the energy grows with the rank, maps of the ranks, all numbers."""
    page = Page(
        "Spectrum", "The singular values of every update, scale included, and the ranks they speak of."
    )
    page.figure(
        curves(
            {name: _energy_curve(spectrum) for name, spectrum in found.items()},
            x="rank kept at every site",
            y="share of the energy",
        ),
        "Share of ‖ΔW‖² over all sites that the best approximation of each rank keeps.",
    )
    for name, spectrum in found.items():
        page.section(name)
        advice = rank_advice(spectrum)
        page.text(
            f"{spectrum.parameters:,} parameters, norm {spectrum.norm:.4g}."
            + (f" {advice}." if advice else " Every update is zero.")
        )
        for title, measure in (
            ("rank for 99 % of the energy", lambda row: row.energy_rank(0.99)),
            ("norm", lambda row: row.norm),
        ):
            _map(page, spectrum, measure, title)
        page.table(*spectrum_listing(spectrum))
    return page


def overlap_page(found: Overlap, names: tuple[str, str], sites: Sequence[str] = ()) -> Page:
    """φ for two adapters: a map of all sites, and whole grids in the four panels of the paper's figure 3.

    Args:
        found: the comparison.
        names: of the first adapter, counted by i, and of the second one, by j.
        sites: whose grids to show; by default those of the middle layer, four at most.
    """
    first, second = names
    page = Page(
        f"{first} and {second}",
        "How much the leading directions of two adapters share: 1 where the smaller set lies within the "
        "other, 0 where they are orthogonal. Chance is max(i, j)/d.",
    )
    sides = found.sides
    if found.of != "delta":
        page.text(
            f"The directions are those of {found.of} alone, as the paper took them. They are no property of "
            "ΔW: other factors of the very same ΔW give other numbers."
        )
    page.text(f"Cosine of the two over all sites: {found.cosine:.4f}; by chance it is 0.")
    if found.same_start:
        page.text(
            "Both grew from one random U, as runs of the same seed do. What their input directions (left) "
            "share is that start: read the output directions and the cosine."
        )
    for side in sides:
        _map(page, found, lambda row, side=side: row.block()[side], f"φ of all directions, {side}", (0, 1))
        _map(page, found, lambda row, side=side: row.block()[f"z_{side}"], f"its z-score, {side}")
    page.section("Grids")
    page.text(
        "Above each other: the whole grid, and its lower-left corner where j is no larger than the number of "
        "rows; cells with j < i are grey, as they say nothing that φ(j, i) does not. Beside them two random "
        "Gaussian matrices of the same shape and ranks."
    )
    for site in sites or _middle(found):
        row = found[site]
        grids = {f"{site.rsplit('.', 1)[-1]}, {side}": getattr(row, side).tolist() for side in sides}
        grids |= {f"random, {side}": random_pair(row, side).tolist() for side in sides}
        figures = [[Panel(title, cells) for title, cells in grids.items()]]
        figures.append([Panel(f"{title}, corner", _corner(cells)) for title, cells in grids.items()])
        for panels in figures:
            page.figure(heatmaps(panels, x=f"j, {second}", y=f"i, {first}", limits=(0, 1), width=840), site)
    page.section("All sites")
    page.table(*overlap_listing(found))
    return page


def relation_page(found: Relation, name: str) -> Page:
    """An adapter in its base: projections, amplification beside chance, deciles."""
    page = Page(
        f"{name} in its base",
        "‖leftᵀ·W·rightᵀ‖ with the directions of ΔW, of W itself and of random matrices, and what the update "
        "amplifies. The amplification falls like 1/r almost by construction: the ratio to chance does not.",
    )
    told = found.totals()
    page.table(
        ["all sites", "value"],
        [[key.replace("_", " "), f"{value:.4g}"] for key, value in told.items() if isinstance(value, float)],
    )
    _map(page, found, lambda row: row.ratio_to_chance, "ratio to chance")
    _map(page, found, lambda row: _finite(row.amplification), "amplification")
    share = mean_deciles(found)
    if share is not None:
        page.figure(
            bars(
                {
                    f"{n + 1}": {
                        "inputs": share.left[n],
                        "outputs": share.right[n],
                        "chance, inputs": share.chance_left[n],
                        "chance, outputs": share.chance_right[n],
                    }
                    for n in range(len(share.left))
                },
                y="share of ‖ΔW‖²",
            ),
            "Energy of ΔW by tenth of W's singular directions, strongest first, over all sites.",
        )
    page.table(*relation_listing(found))
    return page


def intruder_page(found: Intruders, name: str) -> Page:
    """Intruders by site, and every judged direction with its certificate."""
    page = Page(
        f"Intruders of {name}",
        f"The first {found.top} output directions of W + ΔW at each site, and whether any singular vector "
        f"of W has a |cosine| of {found.threshold} with them.",
    )
    page.text(f"{found.count()} intruders, {found.count('undecided')} undecided.")
    _map(page, found, lambda row: row.count(), "intruders")
    listing = intruder_listing(found)
    if listing.rows:
        page.section("Directions that are new or undecided")
        page.table(*listing)
    return page


def _map(
    page: Page,
    found: SiteTable,
    measure: Callable[[Any], float | None],
    title: str,
    limits: tuple[float, float] | None = None,
) -> None:
    grid = found.grid()
    cells = [
        [
            measure(found[grid.sites[layer, matrix]]) if (layer, matrix) in grid.sites else None
            for matrix in grid.matrices
        ]
        for layer in grid.layers
    ]
    if len(found) > 1 and any(value is not None for row in cells for value in row):
        layers = [layer or "–" for layer in grid.layers]
        page.figure(
            heatmaps([Panel(title, cells, layers, list(grid.matrices))], y="layer", limits=limits),
            f"{title[0].upper()}{title[1:]}, by layer and matrix.",
        )


def _corner(cells: Sequence[Sequence[float]]) -> list[list[float | None]]:
    size = min(len(cells), len(cells[0]))
    return [[cells[i][j] if j >= i else None for j in range(size)] for i in range(size)]


def _middle(found: SiteTable) -> list[str]:
    grid = found.grid()
    layer = grid.layers[len(grid.layers) // 2]
    return [grid.sites[layer, matrix] for matrix in grid.matrices if (layer, matrix) in grid.sites][:SHOWN]


def _energy_curve(found: Spectrum) -> list[tuple[int, float]]:
    longest = max(len(row.sigma) for row in found.values())
    total = found.norm**2 or 1.0
    kept = [sum(float(row.sigma[:k].square().sum()) for row in found.values()) for k in range(longest + 1)]
    return [(k, energy / total) for k, energy in enumerate(kept)]


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value
