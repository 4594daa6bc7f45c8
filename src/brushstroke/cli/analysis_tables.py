"""Writes the tables of an analysis into a folder, one file per table, as CSV or as LaTeX.

It computes nothing; the contents come from `analysis`.
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
    from brushstroke.analysis.summary import Summary
    from brushstroke.analysis.text_tables import Listing

NAMES = ("matrices", "layers", "sites", "directions", "deciles")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Which tables are printed and written.

    Args:
        sites: Also print the rows of all sites.
        csv: Write every table as CSV into this folder, unrounded: matrices.csv, layers.csv, sites.csv.
        latex: Write every table as LaTeX into this folder, as printed: matrices.tex, layers.tex, sites.tex.
    """

    sites: bool = False
    csv: Path | None = None
    latex: Path | None = None

    def check(self, overwrite: bool, adapter: Path | None = None) -> None:
        """Refuse folders that cannot be written, and the folder of a new adapter, before any work.

        Raises:
            ConfigError: a path is a file, or the folder of the adapter.
            OutputError: a folder cannot be made, or is not empty, and its files may not be replaced.
        """
        from brushstroke.outputs import check_output_folder

        for flag, folder, ending in (("--csv", self.csv, ".csv"), ("--latex", self.latex, ".tex")):
            if folder is None:
                continue
            if folder.suffix.lower() == ending:
                raise ConfigError(
                    f"{flag} takes a folder for matrices{ending}, layers{ending} and sites{ending}; got "
                    f"{folder}; use for example {folder.with_suffix('')}"
                )
            if adapter is not None and folder.expanduser().resolve() == adapter.expanduser().resolve():
                raise ConfigError(
                    f"{flag} and the new adapter have the same folder, {folder}; choose another folder"
                )
            check_output_folder(folder.expanduser(), overwrite)

    def write(self, found: Mapping[str, "Description"], overwrite: bool) -> None:
        """Write the tables of one or several results; if there are several, a column names the result."""
        from brushstroke.outputs import refuse_existing, write_files

        folders: dict[Path, dict[str, str]] = {}
        if self.csv is not None:
            folders.setdefault(self.csv.expanduser(), {}).update(_csv_files(found))
        if self.latex is not None:
            folders.setdefault(self.latex.expanduser(), {}).update(_latex_files(found))
        for folder, files in folders.items():
            kinds = {name.rpartition(".")[2] for name in files}
            owned = [f"{name}.{kind}" for name in NAMES for kind in kinds]
            refuse_existing(folder, overwrite)
            write_files(folder, files, last=next(iter(files)), owned=owned)
            say(f"wrote {', '.join(files)} into {folder}")


@dataclass(frozen=True)
class Description:
    """One result, with the tables and texts that describe it.

    Args:
        found: the result.
        summary: of it.
        rows: of all sites, for people.
        kind: the kind of these rows: sites, or directions of sites.
        deciles: the energy by tenth of W's directions, if it is known.
    """

    found: "SiteTable[Any]"
    summary: "Summary"
    rows: "Listing"
    kind: str = "sites"
    deciles: "Share | None" = None


def describe_spectrum(name: str, found: "Spectrum") -> Description:
    """The description of an adapter's spectrum."""
    from brushstroke.analysis.summaries import spectrum_summary
    from brushstroke.analysis.text_tables import spectrum_listing

    return Description(found, spectrum_summary(name, found), spectrum_listing(found))


def describe_overlap(names: tuple[str, str], found: "Overlap") -> Description:
    """The description of a comparison of two adapters."""
    from brushstroke.analysis.summaries import overlap_summary
    from brushstroke.analysis.text_tables import overlap_listing

    return Description(found, overlap_summary(names, found), overlap_listing(found))


def describe_relation(name: str, found: "Relation") -> Description:
    """The description of an adapter relative to its base."""
    from brushstroke.analysis import mean_deciles
    from brushstroke.analysis.summaries import relation_summary
    from brushstroke.analysis.text_tables import relation_listing

    listing = relation_listing(found)
    return Description(found, relation_summary(name, found), listing, deciles=mean_deciles(found))


def describe_intruders(name: str, found: "Intruders") -> Description:
    """The description of an adapter's intruders."""
    from brushstroke.analysis.summaries import intruder_summary
    from brushstroke.analysis.text_tables import intruder_listing

    return Description(found, intruder_summary(name, found), intruder_listing(found), "directions")


def as_json(described: Description) -> dict[str, Any]:
    """The summary, then all contents of the result."""
    return {"summary": described.summary.as_dict(), **described.found.as_dict()}


def _csv_files(found: Mapping[str, Description]) -> dict[str, str]:
    from brushstroke.report.tables import csv_of_records

    tables: dict[str, list[dict[str, Any]]] = {}
    for name, described in found.items():
        lead = {"adapter": name} if len(found) > 1 else {}
        for kind, records in _records(described).items():
            if not records:
                continue
            tables.setdefault(kind, []).extend({**lead, **record} for record in records)
    return {f"{kind}.csv": csv_of_records(records) for kind, records in tables.items()}


def _records(described: Description) -> dict[str, list[dict[str, Any]]]:
    """Every table as JSON objects; sites with layer, matrix, d and h."""
    from brushstroke.analysis.table import kind_names

    plain, summary, grid = described.found.as_dict(), described.summary.as_dict(), described.found.grid()
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
    if described.deciles is not None:
        parts = vars(described.deciles)
        tables["deciles"] = [
            {"tenth": n + 1, **{name: part[n] for name, part in parts.items()}}
            for n in range(len(described.deciles.left))
        ]
    return tables


def _latex_files(found: Mapping[str, Description]) -> dict[str, str]:
    from brushstroke.analysis.summary import SPREAD
    from brushstroke.analysis.text_tables import decile_listing
    from brushstroke.report.tables import latex_text

    columns: dict[str, list[str]] = {}
    rows: dict[str, list[list[str]]] = {}
    for name, described in found.items():
        lead = [name] if len(found) > 1 else []
        listings = {**described.summary.listings(), described.kind: described.rows}
        if described.deciles is not None:
            listings["deciles"] = decile_listing(described.deciles)
        for kind, listing in listings.items():
            columns[kind] = [*(["adapter"] if lead else []), *listing.columns]
            rows.setdefault(kind, []).extend([*lead, *row] for row in listing.rows)
    sentences = [described.summary.sentence for described in found.values()]
    captions = {kind: "\n".join([*sentences, SPREAD]) for kind in ("matrices", "layers")}
    return {
        f"{kind}.tex": latex_text(columns[kind], rows[kind], captions.get(kind, "\n".join(sentences)))
        for kind in rows
    }
