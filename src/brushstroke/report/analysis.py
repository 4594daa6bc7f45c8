"""The pages of the analysis: spectra, overlaps, relations to the base, intruders.

It computes nothing: the results come from `analysis`. Every number is also in a table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brushstroke.analysis import (
    Intruders,
    Overlap,
    Relation,
    SiteTable,
    Spectrum,
    mean_deciles,
)
from brushstroke.analysis.summaries import (
    intruder_summary,
    overlap_summary,
    relation_summary,
    spectrum_summary,
)
from brushstroke.analysis.summary import SPREAD, Summary
from brushstroke.analysis.table import short_names
from brushstroke.analysis.text_tables import (
    intruder_listing,
    overlap_listing,
    rank_advice,
    relation_listing,
    spectrum_listing,
)
from brushstroke.report.charts import lines, overlaps
from brushstroke.report.figures import Panel, heatmap
from brushstroke.report.overlaps import CHOICES, SIDES, overlap_records
from brushstroke.report.page import Page


def spectrum_page(found: Mapping[str, Spectrum]) -> Page:
    """A page of spectra by name: the energy as a function of the rank, maps of the ranks, all numbers."""
    page = Page(
        "Spectrum", "The singular values of every update, including its scale, and the resulting ranks."
    )
    page.chart(
        lines(
            [
                {"adapter": name, "rank": rank, "share": share}
                for name, spectrum in found.items()
                for rank, share in _energy_curve(spectrum)
            ],
            x="rank",
            y="share",
            series="adapter",
            x_title="rank at every site",
            y_title="share of the energy",
        ),
        "Share of ‖ΔW‖² over all sites that the best approximation of each rank keeps.",
    )
    for name, spectrum in found.items():
        page.section(name)
        _begin(page, spectrum_summary(name, spectrum))
        advice = rank_advice(spectrum)
        page.text(f"{spectrum.parameters:,} parameters." + (f" Advice: {advice}." if advice else ""))
        _maps(
            page,
            spectrum,
            Map("rank for 99 % of the energy", lambda row: row.energy_rank(0.99)),
            Map("norm", lambda row: row.norm),
        )
        page.table(*spectrum_listing(spectrum))
    return page


def overlap_page(found: Overlap, names: tuple[str, str], sites: Sequence[str] = ()) -> Page:
    """A page of φ for two adapters: maps of all sites, and grids as in the paper's figures 3 and 4.

    Args:
        found: the comparison.
        names: names of the first adapter (counted by i) and of the second (by j).
        sites: sites whose grids to show; by default those of the middle layer.
    """
    first, second = names
    page = Page(
        f"{first} and {second}",
        "How much the leading directions of two adapters share: 1 if the smaller set lies within the "
        "larger, 0 if they are orthogonal. Chance is max(i, j)/n in n dimensions: d for the inputs, h for "
        "the outputs.",
    )
    if found.of != "delta":
        page.text(
            f"The directions are those of {found.of} alone, as in the paper. They are not a property of ΔW: "
            "other factors of the same ΔW give other numbers."
        )
    _begin(page, overlap_summary(names, found))
    if found:
        _draw_overlap(page, found, names, sites)
    page.section("All sites")
    page.table(*overlap_listing(found))
    return page


def _draw_overlap(page: Page, found: Overlap, names: tuple[str, str], sites: Sequence[str]) -> None:
    (first, second), sides = names, found.sides
    _maps(
        page,
        found,
        *(
            drawn
            for side in sides
            for drawn in (
                Map(f"φ of all directions, {side}", lambda row, side=side: row.block()[side], floor=0.0),
                Map(
                    f"z-score of φ of all directions, {side}",
                    lambda row, side=side: row.block()[f"z_{side}"],
                    middle=0.0,
                ),
            )
        ),
    )
    page.section("Grids")
    page.text(
        "φ(i, j) of the first i directions of the adapter with the smaller rank and the first j of the "
        "other, compared with two random Gaussian matrices of the same shape and ranks. If the ranks "
        "differ, the lower-left corner is drawn again, enlarged: it shows whether the larger subspace "
        "contains the smaller one. Its cells with j > i are grey, because there the subspace of j is the "
        "larger one."
    )
    chosen = {site: found[site] for site in sites or _middle(found)}
    swapped = [site for site, row in chosen.items() if row.ranks[0] > row.ranks[1]]
    down, across, at_equal = first, second, ""
    if swapped and all(row.ranks[0] >= row.ranks[1] for row in chosen.values()):
        swapped, down, across = [*chosen], second, first
    elif swapped:
        down, across, at_equal = "the smaller rank", "the larger rank", f" At equal ranks, i counts {first}."
    for side in sides:
        spec = overlaps(
            overlap_records(chosen, side, swapped=swapped),
            x_title=f"j, {across}",
            y_title=f"i, {down}",
            measure=f"{_whose(found)}, {SIDES[side]}",
            choose=CHOICES,
            corner=any(row.ranks[0] != row.ranks[1] for row in chosen.values()),
        )
        page.chart(spec, f"φ(i, j) of {_whose(found)}, {SIDES[side]}.{at_equal}")


def relation_page(found: Relation, name: str) -> Page:
    """A page of an adapter's relation to its base: projections, amplification and chance, deciles."""
    page = Page(
        f"{name} in its base",
        "‖leftᵀ·W·rightᵀ‖ with the directions of ΔW, of W and of random matrices, and the amplification by "
        "the update. The amplification falls like 1/r almost by construction; the ratio to chance does not.",
    )
    _begin(page, relation_summary(name, found))
    totals = found.totals()
    page.table(
        ["all sites", "value"],
        [
            [key.replace("_", " "), f"{value:.4g}"]
            for key, value in totals.items()
            if isinstance(value, float)
        ],
    )
    _maps(
        page,
        found,
        Map("ratio to chance", lambda row: row.ratio_to_chance, middle=1.0),
        Map("amplification", lambda row: _finite(row.amplification)),
    )
    share = mean_deciles(found)
    if share is not None:
        sides = {
            "inputs": share.left,
            "outputs": share.right,
            "chance, inputs": share.chance_left,
            "chance, outputs": share.chance_right,
        }
        page.chart(
            lines(
                [
                    {"side": side, "tenth": tenth, "share": value}
                    for side, values in sides.items()
                    for tenth, value in enumerate(values, start=1)
                ],
                x="tenth",
                y="share",
                series="side",
                x_title="tenth of W's singular directions, strongest first",
                y_title="share of ‖ΔW‖²",
            ),
            "Energy of ΔW by tenth of W's singular directions, strongest first, over all sites.",
        )
    page.table(*relation_listing(found))
    return page


def intruder_page(found: Intruders, name: str) -> Page:
    """A page of intruders by site, and of every tested direction with its bounds."""
    page = Page(
        f"Intruders of {name}",
        f"The first {found.top} output directions of W + ΔW at each site, and whether their |cosine| is "
        f"below {found.threshold:g} with every singular vector of W.",
    )
    _begin(page, intruder_summary(name, found))
    _maps(page, found, Map("intruders", lambda row: row.count(), floor=0.0))
    listing = intruder_listing(found)
    if listing.rows:
        page.section("Directions that are new or undecided")
        page.table(*listing)
    return page


@dataclass(frozen=True)
class Map:
    """A map by layer and matrix of one number per site.

    Args:
        title: name of the number.
        measure: function from a site's result to the number; None is drawn grey.
        floor: the number with the palest colour; by default the smallest.
        middle: use one colour below this number and another above it.
    """

    title: str
    measure: Callable[[Any], float | None]
    floor: float | None = None
    middle: float | None = None


def _maps(page: Page, found: SiteTable, *maps: Map) -> None:
    """Draw the maps that have more than one number, next to each other if there is room."""
    grid = found.grid()
    names = short_names(grid.matrices)
    figures = []
    for one in maps if len(found) > 1 else ():
        cells = [
            [
                one.measure(found[grid.sites[layer, matrix]]) if (layer, matrix) in grid.sites else None
                for matrix in grid.matrices
            ]
            for layer in grid.layers
        ]
        known = [value for row in cells for value in row if value is not None]
        if not known:
            continue
        top = max(known)
        limits = None if one.floor is None else (one.floor, top if top > one.floor else one.floor + 1)
        panel = Panel(one.title, cells, [layer or "–" for layer in grid.layers], [*names.values()])
        svg = heatmap(panel, y="layer", limits=limits, middle=one.middle)
        figures.append((svg, f"By layer and matrix: {one.title}."))
    if figures:
        page.maps(figures)


def _begin(page: Page, found: Summary) -> None:
    """Begin a page with the one-sentence result and the tables by kind of matrix and by layer."""
    page.text(found.sentence)
    for listing in found.listings().values():
        page.table(*listing, f"{SPREAD[0].upper()}{SPREAD[1:]}.")


def _whose(found: Overlap) -> str:
    """The matrix whose directions are compared, for titles."""
    return "ΔW" if found.of == "delta" else f"{found.of} alone"


def _middle(found: SiteTable) -> list[str]:
    grid = found.grid()
    layer = grid.layers[len(grid.layers) // 2]
    return [site for (of, _), site in grid.sites.items() if of == layer]


def _energy_curve(found: Spectrum) -> list[tuple[int, float]]:
    longest = max(len(row.sigma) for row in found.values())
    total = found.norm**2 or 1.0
    kept = [sum(float(row.sigma[:k].square().sum()) for row in found.values()) for k in range(longest + 1)]
    return [(k, energy / total) for k, energy in enumerate(kept)]


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value
