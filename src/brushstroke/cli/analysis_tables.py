"""The tables of an analysis as files: a folder with one for each, as CSV or as LaTeX.

It computes nothing; what a table holds comes from `analysis`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from brushstroke.cli.console import say
from brushstroke.errors import ConfigError

if TYPE_CHECKING:
    from brushstroke.analysis import Intruders, Overlap, Relation, Share, SiteTable, Spectrum
    from brushstroke.analysis.listing import Listing
    from brushstroke.analysis.summary import Summary

NAMES = ("matrices", "layers", "sites", "directions", "deciles")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which tables are printed, and which are written.

    Args:
        sites: Print the rows of all sites too.
        csv: Write every table as CSV into this folder, unrounded: matrices.csv, layers.csv, sites.csv.
        latex: Write every table as LaTeX into this folder, as printed: matrices.tex, layers.tex, sites.tex.
    """

    sites: bool = False
    csv: Path | None = None
    latex: Path | None = None

    def check(self, overwrite: bool, adapter: Path | None = None) -> None:
        """Refuse folders that cannot be written, or that an adapter is written into, before all work.

        Raises:
            ConfigError: a file is named, or the folder of the adapter.
            OutputError: a folder cannot be made, or holds files, and they may not be replaced.
        """
        from brushstroke.files import check_output_folder

        for flag, folder, ending in (("--csv", self.csv, ".csv"), ("--latex", self.latex, ".tex")):
            if folder is None:
                continue
            if folder.suffix.lower() == ending:
                raise ConfigError(
                    f"{flag} takes a folder, for matrices{ending}, layers{ending} and sites{ending}; "
                    f"got {folder}; name it {folder.with_suffix('')}, say"
                )
            if adapter is not None and folder.expanduser().resolve() == adapter.expanduser().resolve():
                raise ConfigError(
                    f"{flag} names the folder of the new adapter, {folder}; choose another folder"
                )
            check_output_folder(folder.expanduser(), overwrite)

    def write(self, found: Mapping[str, "Told"], overwrite: bool) -> None:
        """Write the tables of one or several results: a column names the result where there are several."""
        from brushstroke.files import write_folder

        folders: dict[Path, dict[str, str]] = {}
        if self.csv is not None:
            folders.setdefault(self.csv.expanduser(), {}).update(_csv_files(found))
        if self.latex is not None:
            folders.setdefault(self.latex.expanduser(), {}).update(_latex_files(found))
        for folder, files in folders.items():
            kinds = {name.rpartition(".")[2] for name in files}
            owned = [f"{name}.{kind}" for name in NAMES for kind in kinds]
            write_folder(folder, files, owned=owned, overwrite=overwrite)
            say(f"wrote {', '.join(files)} into {folder}")


@dataclass(frozen=True)
class Told:
    """One result with what is told of it.

    Args:
        found: the result.
        summary: of it.
        rows: of all sites, for people.
        kind: what these rows are: sites, or the directions of sites.
        deciles: the energy by tenth of W's directions, where it is known.
    """

    found: "SiteTable[Any]"
    summary: "Summary"
    rows: "Listing"
    kind: str = "sites"
    deciles: "Share | None" = None


def told_spectrum(name: str, found: "Spectrum") -> Told:
    """What is told of an adapter's spectrum."""
    from brushstroke.analysis.listing import spectrum_listing
    from brushstroke.analysis.summaries import spectrum_summary

    return Told(found, spectrum_summary(name, found), spectrum_listing(found))


def told_overlap(names: tuple[str, str], found: "Overlap") -> Told:
    """What is told of two adapters."""
    from brushstroke.analysis.listing import overlap_listing
    from brushstroke.analysis.summaries import overlap_summary

    return Told(found, overlap_summary(names, found), overlap_listing(found))


def told_relation(name: str, found: "Relation") -> Told:
    """What is told of an adapter in its base."""
    from brushstroke.analysis import mean_deciles
    from brushstroke.analysis.listing import relation_listing
    from brushstroke.analysis.summaries import relation_summary

    listing = relation_listing(found)
    return Told(found, relation_summary(name, found), listing, deciles=mean_deciles(found))


def told_intruders(name: str, found: "Intruders") -> Told:
    """What is told of an adapter's intruders."""
    from brushstroke.analysis.listing import intruder_listing
    from brushstroke.analysis.summaries import intruder_summary

    return Told(found, intruder_summary(name, found), intruder_listing(found), "directions")


def as_json(told: Told) -> dict[str, Any]:
    """The summary first, then all that the result holds."""
    return {"summary": told.summary.as_dict(), **told.found.as_dict()}


def _csv_files(found: Mapping[str, Told]) -> dict[str, str]:
    from brushstroke.report.tables import csv_of_records

    tables: dict[str, list[dict[str, Any]]] = {}
    for name, told in found.items():
        lead = {"adapter": name} if len(found) > 1 else {}
        for kind, records in _records(told).items():
            if not records:
                continue
            tables.setdefault(kind, []).extend({**lead, **record} for record in records)
    return {f"{kind}.csv": csv_of_records(records) for kind, records in tables.items()}


def _records(told: Told) -> dict[str, list[dict[str, Any]]]:
    """Every table as JSON objects; sites with layer, matrix, d and h."""
    from brushstroke.analysis.table import kind_names

    plain, summary, grid = told.found.as_dict(), told.summary.as_dict(), told.found.grid()
    names = kind_names(grid.matrices)
    places = {site: (layer, names[matrix]) for (layer, matrix), site in grid.sites.items()}
    tables = {"matrices": summary["matrices"], "layers": summary["layers"], "sites": []}
    for row in plain["sites"]:
        layer, matrix = places[row["site"]]
        d, h = row["shape"]
        place = {"site": row.pop("site"), "layer": layer, "matrix": matrix}
        tables["sites"].append({**place, "d": d, "h": h, **{k: v for k, v in row.items() if k != "shape"}})
        for direction in row.get("directions", ()):
            tables.setdefault("directions", []).append({**place, **direction})
    zero = plain.get("unmatched", {}).get("zero", [])  # of `compare`: sites without a number
    tables["sites"] += [{"site": site} for site in zero]
    if told.deciles is not None:
        parts = vars(told.deciles)
        tables["deciles"] = [
            {"tenth": n + 1, **{name: part[n] for name, part in parts.items()}}
            for n in range(len(told.deciles.left))
        ]
    return tables


def _latex_files(found: Mapping[str, Told]) -> dict[str, str]:
    from brushstroke.analysis.listing import decile_listing
    from brushstroke.analysis.summary import SPREAD
    from brushstroke.report.tables import latex_text

    columns: dict[str, list[str]] = {}
    rows: dict[str, list[list[str]]] = {}
    for name, told in found.items():
        lead = [name] if len(found) > 1 else []
        listings = {**told.summary.listings(), told.kind: told.rows}
        if told.deciles is not None:
            listings["deciles"] = decile_listing(told.deciles)
        for kind, listing in listings.items():
            columns[kind] = [*(["adapter"] if lead else []), *listing.columns]
            rows.setdefault(kind, []).extend([*lead, *row] for row in listing.rows)
    sentences = [told.summary.sentence for told in found.values()]
    captions = {kind: "\n".join([*sentences, SPREAD]) for kind in ("matrices", "layers")}
    return {
        f"{kind}.tex": latex_text(columns[kind], rows[kind], captions.get(kind, "\n".join(sentences)))
        for kind in rows
    }
