"""Writes a finished study: results.json, a self-contained HTML page, optional figure and table files.

Does not compute findings (each study does).
"""

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brushstroke.errors import require
from brushstroke.outputs import write_file, write_files
from brushstroke.report import Page
from brushstroke.report.charts import choices
from brushstroke.report.figures import WIDTH
from brushstroke.report.tables import csv_text, latex_text
from brushstroke.studies.arms import exact
from brushstroke.studies.findings import Figure, Table
from brushstroke.studies.runner import ArmResult
from brushstroke.studies.study import Report
from brushstroke.studies.words import counted
from brushstroke.study_folder import FIGURES, REPORT, RESULTS, TABLES
from brushstroke.training.summary import versions

PNG_SCALE = 2.0


def write_report(
    report: Report,
    folder: str | Path,
    *,
    title: str,
    command: str = "",
    png: bool = False,
    csv: bool = False,
    latex: bool = False,
) -> Path:
    """Write results.json, report.html, and optional files of figures and tables.

    Args:
        report: the finished study.
        folder: the folder of the study.
        title: the heading of the page.
        command: the command that runs the study again.
        png: also draw every figure as PNG and SVG.
        csv: also write every table as CSV.
        latex: also write every table as LaTeX.

    Returns:
        The path of the page.

    Raises:
        OutputError: a file cannot be written.
        MissingPackageError: the report extra is not installed.
    """
    folder = Path(folder).expanduser()
    write_file(folder / RESULTS, json.dumps({**report.as_dict(), "command": command}, indent=1) + "\n")
    file = report_page(report, title=title, command=command).write(folder / REPORT)
    if png:
        _write_figures(report, folder)
    if csv or latex:
        _write_tables(report, folder, csv=csv, latex=latex)
    return file


def _write_tables(report: Report, folder: Path, *, csv: bool, latex: bool) -> None:
    """Write every table of the page except its settings; the file names come from the questions."""
    tables = {"learning-rates": _rate_table(report)}
    for finding in report.findings:
        for number, table in enumerate(finding.tables, 1):
            tables[f"{_slug(finding.question)}-{number}"] = table
    files = {f"{name}.csv": csv_text(table.columns, table.rows) for name, table in tables.items() if csv}
    files |= {
        f"{name}.tex": latex_text(table.columns, table.rows, table.caption)
        for name, table in tables.items()
        if latex
    }
    noted = report.results.store.note(TABLES)
    report.results.store.keep_note(TABLES, sorted({*(noted if isinstance(noted, list) else ()), *files}))
    write_files(folder / TABLES, files, last=next(iter(files)))


def _write_figures(report: Report, folder: Path) -> None:
    """Write every figure as PNG and SVG, in the state in which the page shows it at first."""
    convert = require("vl_convert", extra="report")
    drawn = {file_name(one): _standalone(one) for finding in report.findings for one in finding.figures}
    files = {f"{name}.png": convert.vegalite_to_png(spec, scale=PNG_SCALE) for name, spec in drawn.items()}
    files |= {f"{name}.svg": convert.vegalite_to_svg(spec) for name, spec in drawn.items()}
    report.results.store.keep_note(FIGURES, list(files))
    if files:
        write_files(folder / FIGURES, files, last=next(iter(files)))


def file_name(figure: Figure) -> str:
    """The name of a figure's file without its extension: the figure, the layer, the matrices, the measure.

    >>> file_name(Figure("spectra", "", {}))
    'spectra'
    """
    chosen = (f"{key} {value}" if key == "layer" else value for key, value in choices(figure.spec).items())
    return "-".join(_slug(str(part)) for part in (figure.name, *chosen))


def _slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text.replace("Δ", "Delta").replace("φ", "phi")).strip("-")


def report_page(report: Report, *, title: str, command: str = "") -> Page:
    """The page: each question with its answer, figures and tables; then learning rates and settings."""
    page = Page(title, _lead(report))
    for finding in report.findings:
        page.section(finding.question)
        page.text(finding.answer)
        for figure in finding.figures:
            page.chart(figure.spec, figure.caption)
        for table in finding.tables:
            page.table(table.columns, table.rows, table.caption)
        page.text(*finding.notes)
    page.section("Learning rates")
    page.text(
        "Each arm's rate was chosen on the validation split with the first seed; everything above is "
        "measured on the test split, at the end of training."
    )
    rates = _rate_table(report)
    page.table(rates.columns, rates.rows, rates.caption)
    page.section("Settings")
    page.text(*report.notes)
    page.table(["setting", "value"], [[name, _brief(value)] for name, value in _settings(report).items()])
    if command:
        page.code(command, "To run it again:")
    return page


def _rate_table(report: Report) -> Table:
    """Every arm's validation loss at every rate that was tried, and the rate that was chosen."""
    arms = report.results.arms
    rates = sorted({rate for found in arms.values() for rate in found.tried})
    rows = [
        (
            name,
            *(_loss(found.tried, rate) for rate in rates),
            "–" if found.chosen is None else f"{exact(found.chosen)}{' (edge)' if found.edge else ''}",
        )
        for name, found in arms.items()
    ]
    columns = ("arm", *(exact(rate) for rate in rates), "chosen")
    return Table("Validation loss by learning rate; × diverged.", columns, tuple(rows))


def _lead(report: Report) -> str:
    model = report.settings["model"]
    runs = sum(map(_run_count, report.results.arms.values()))
    description = "; ".join(f"{name}: {text}" for name, text in model.items())
    return f"{counted(runs, 'run')} of {counted(len(report.results.arms), 'arm')}. {description}" + (
        "." if description else ""
    )


def _run_count(found: ArmResult) -> int:
    """The number of runs of an arm: at every rate with the first seed, then at the chosen one."""
    return len(found.tried) + max(0, len(found.outcomes) - bool(found.tried))


def _settings(report: Report) -> dict[str, Any]:
    settings = dict(report.settings)
    training = settings.pop("training")
    settings.pop("arms")
    settings.pop("model")
    return {
        **settings,
        **{f"training: {key}": value for key, value in training.items() if value is not None},
        "estimated minutes": f"{report.results.estimate.seconds / 60:.1f}",
        "left out": "; ".join(report.results.estimate.left_out) or "nothing",
        "versions": versions(),
    }


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(part) for part in value)
    return str(value)


def _loss(tried: Mapping[float, float | None], rate: float) -> str:
    if rate not in tried:
        return ""
    loss = tried[rate]
    return "×" if loss is None else f"{loss:.4f}"


def _standalone(figure: Figure) -> dict[str, Any]:
    """A figure for a separate file: with its own width, background and title."""
    spec = {**figure.spec, "config": {**figure.spec.get("config", {}), "background": "white"}}
    if spec.get("width") == "container":
        spec["width"] = WIDTH
    return {"title": {"text": textwrap.wrap(figure.caption, 90), "anchor": "start"}, **spec}
