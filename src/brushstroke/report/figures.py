"""Figures as SVG texts, drawn by altair and rendered by vl-convert; both come with the report extra.

The background is transparent and the page colours the texts, so that one figure serves light and dark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brushstroke.errors import require

Number = int | float

PALETTE = ("#0b8a75", "#d9822b", "#5b7fd6", "#b5527f", "#8a8f3c", "#7d8791")
COLD, HOT, GREY = "#e8f1ef", "#0b5d50", "#b9bfc6"
LINE = "#8895a3"
GRID = f"{LINE}33"
WIDTH, HEIGHT = 620, 260


def curves(
    series: Mapping[str, Sequence[tuple[Number, Number]]],
    *,
    x: str,
    y: str,
    log_y: bool = False,
) -> str:
    """Lines over a common x axis: name → (x, y) points.

    Raises:
        MissingPackageError: the report extra is not installed.
    """
    altair = require("altair", extra="report")
    rows = [
        {"series": name, "x": float(at), "y": float(value)}
        for name, points in series.items()
        for at, value in points
    ]
    chart = (
        altair.Chart(altair.Data(values=rows))
        .mark_line(strokeWidth=2)
        .encode(
            x=altair.X("x:Q", title=x),
            y=altair.Y("y:Q", title=y, scale=altair.Scale(type="log" if log_y else "linear", zero=False)),
            color=_color(altair, list(series)),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    return _svg(chart)


def bars(
    groups: Mapping[str, Mapping[str, Number]],
    *,
    y: str,
    limits: tuple[Number, Number] | None = None,
) -> str:
    """Bars in groups: group → (name → value).

    Raises:
        MissingPackageError: the report extra is not installed.
    """
    altair = require("altair", extra="report")
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    rows = [
        {"group": group, "name": name, "value": float(value)}
        for group, values in groups.items()
        for name, value in values.items()
    ]
    chart = (
        altair.Chart(altair.Data(values=rows))
        .mark_bar()
        .encode(
            x=altair.X("group:N", title=None, sort=list(groups), axis=altair.Axis(labelAngle=0)),
            xOffset=altair.XOffset("name:N", sort=names),
            y=altair.Y("value:Q", title=y, scale=altair.Scale(domain=limits) if limits else altair.Scale()),
            color=_color(altair, names, field="name"),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    return _svg(chart)


@dataclass(frozen=True)
class Panel:
    """One map of numbers.

    Args:
        title: above it.
        cells: rows of numbers; None is drawn grey.
        rows: names of the rows; 1, 2, … by default.
        columns: names of the columns; 1, 2, … by default.
    """

    title: str
    cells: Sequence[Sequence[Number | None]]
    rows: Sequence[str] | None = None
    columns: Sequence[str] | None = None


def heatmaps(
    panels: Sequence[Panel],
    *,
    x: str = "",
    y: str = "",
    limits: tuple[Number, Number] | None = None,
    width: int = WIDTH,
) -> str:
    """Maps side by side with one scale of colour; the first row is at the top.

    Args:
        panels: at least one, none of them empty.
        x: title of the columns.
        y: title of the rows.
        limits: of the colours; by default from the smallest to the largest number.
        width: of the whole figure in pixels, without axes.

    Raises:
        MissingPackageError: the report extra is not installed.
    """
    altair = require("altair", extra="report")
    each = width / len(panels)
    if limits is None:
        known = [value for panel in panels for row in panel.cells for value in row if value is not None]
        limits = (min(known, default=0), max(known, default=1))
    charts = [_heatmap(altair, panel, x, y, limits, each) for panel in panels]
    return _svg(charts[0] if len(charts) == 1 else altair.hconcat(*charts, spacing=16))


def _heatmap(altair: Any, panel: Panel, x: str, y: str, limits: tuple[Number, Number], width: float) -> Any:
    columns = list(panel.columns or map(str, range(1, len(panel.cells[0]) + 1)))
    rows = list(panel.rows or map(str, range(1, len(panel.cells) + 1)))
    values = [
        {"x": column, "y": row, "value": float(value or 0), "shown": value is not None}
        for row, cells in zip(rows, panel.cells, strict=True)
        for column, value in zip(columns, cells, strict=True)
    ]
    scale = altair.Scale(range=[COLD, HOT], domain=list(limits), clamp=True)
    color = altair.Color("value:Q", scale=scale, legend=altair.Legend(title=None, orient="bottom"))
    named = panel.columns is not None
    across = max(2.0, min(70.0 if named else 34.0, width / len(columns)))
    down = 16.0 if named else across

    def axis(title: str, names: list[str], cell: float, angle: int = 0) -> Any:
        step = 1 if cell >= 14 else -(-18 // int(cell))
        return altair.Axis(
            title=title or None, labelAngle=angle, values=names[::step], grid=False, ticks=False
        )

    return (
        altair.Chart(altair.Data(values=values), title=panel.title)
        .mark_rect()
        .encode(
            x=altair.X("x:N", sort=columns, axis=axis(x, columns, across, -40 if named else 0)),
            y=altair.Y("y:N", sort=rows, axis=axis(y, rows, down)),
            color=altair.condition("datum.shown", color, altair.value(GREY)),
        )
        .properties(width=across * len(columns), height=down * len(rows))
    )


def _color(altair: Any, names: Sequence[str], field: str = "series") -> Any:
    scale = altair.Scale(domain=list(names), range=[PALETTE[i % len(PALETTE)] for i in range(len(names))])
    legend = altair.Legend(title=None, orient="top") if len(names) > 1 else None
    return altair.Color(f"{field}:N", scale=scale, legend=legend)


def _svg(chart: Any) -> str:
    convert = require("vl_convert", extra="report")
    chart = (
        chart.configure(background="#00000000", font="sans-serif", padding=8, aria=False)
        .configure_view(stroke=None)
        .configure_axis(gridColor=GRID, domainColor=LINE, tickColor=LINE, titleFontWeight="normal")
    )
    return convert.vegalite_to_svg(chart.to_dict())
