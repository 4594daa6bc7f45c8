"""Grids of φ(i, j) as records for `charts.overlaps`: for each layer q and v, then o and k, then the rest.

It computes only the pairs of random matrices that are drawn as a control.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from brushstroke.analysis import SiteOverlap, arrange, random_pair
from brushstroke.analysis.table import natural, short_names, side_by_side

SIDES = {"left": "input side (left)", "right": "output side (right)"}
CHOICES = ("layer", "matrices")  # the menus of such a figure


def overlap_records(
    found: Mapping[str, SiteOverlap],
    side: str,
    *,
    swapped: Collection[str] = (),
    controls: Mapping[str, Mapping[str, SiteOverlap]] | None = None,
) -> list[dict[str, Any]]:
    """Panels of two matrices and their random pairs, for every layer and every two matrices.

    Matrices of the same ranks and width on this side share a random pair.

    Args:
        found: site → φ; i counts its first directions.
        side: "left" or "right".
        swapped: sites where i counts the second directions instead.
        controls: further grids of the same sites: name → site → φ.
    """
    grid = arrange(sorted(found, key=natural))
    names = short_names(grid.matrices)
    records: list[dict[str, Any]] = []
    for layer in grid.layers:
        shown = [matrix for matrix in grid.matrices if (layer, matrix) in grid.sites]
        for pair in side_by_side(shown):
            sites = {names[matrix]: grid.sites[layer, matrix] for matrix in pair}
            place = {"layer": layer or "–", "matrices": " and ".join(sites)}

            def add(panel: str, site: str, cells: Tensor, corner: bool, place: Any = place) -> None:
                rows = (cells.mT if site in swapped else cells).tolist()
                n = found[site].shape[side == "right"]
                records.append({**place, "panel": panel, "cells": rows, "n": n, "corner": corner})

            for name, site in sites.items():
                row = found[site]
                add(name, site, getattr(row, side), row.ranks[0] != row.ranks[1])
            for title, site in _random_pairs(sites, found, side).items():
                add(title, site, random_pair(found[site], side), False)
            for control, rows in (controls or {}).items():
                for name, site in sites.items():
                    add(f"{name}, {control}", site, getattr(rows[site], side), False)
    return records


def _random_pairs(sites: Mapping[str, str], found: Mapping[str, SiteOverlap], side: str) -> dict[str, str]:
    """Title → a site whose random pair is drawn; one title if all have the same ranks and width."""
    sizes = {(found[site].ranks, found[site].shape[side == "right"]) for site in sites.values()}
    if len(sizes) == 1:
        return {"random pair": next(iter(sites.values()))}
    return {f"random pair, {name}": site for name, site in sites.items()}
