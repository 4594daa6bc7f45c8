"""Figures as SVG texts, made by altair and rendered by vl-convert (both in the report extra).

The background is transparent and the page colours the texts, so that a figure works in light and dark.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brushstroke.errors import require

Number = int | float

PALETTE = (
    *("#0b8a75", "#d9822b", "#5b7fd6", "#b5527f", "#8a8f3c"),
    *("#7d8791", "#c23b3b", "#7a52c7", "#2e9bc6", "#5f9e3a"),
)
COLD, HOT, GREY = "#e8f1ef", "#0b5d50", "#b9bfc6"
LINE = "#8895a3"
GRID = f"{LINE}33"
FONT = 11  # smallest text size in pixels
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # of the first ten series, the next ten, …
COOL = "#3b5aa8"  # colour below the middle of a diverging scale
WIDTH, HEIGHT = 620, 260
SCALE = 200  # length of a map's colour scale
LETTER = 8  # width of a letter of a map's title


def curves(
    series: Mapping[str, Sequence[tuple[Number, Number]]],
    *,
    x: str,
    y: str,
    log_y: bool = False,
) -> str:
    """Draw lines over a common x axis: name → (x, y) points.

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
            strokeDash=_dash(altair, list(series)),
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
    """Draw bars in groups: group → (name → value).

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
        title: title above the map.
        cells: rows of numbers; None is drawn grey.
        rows: names of the rows; 1, 2, … by default.
        columns: names of the columns; 1, 2, … by default.
    """

    title: str
    cells: Sequence[Sequence[Number | None]]
    rows: Sequence[str] | None = None
    columns: Sequence[str] | None = None


def heatmap(
    panel: Panel,
    *,
    x: str = "",
    y: str = "",
    limits: tuple[Number, Number] | None = None,
    middle: Number | None = None,
) -> str:
    """Draw a map of numbers; the first row is at the top.

    Args:
        panel: the numbers; not empty.
        x: title of the columns.
        y: title of the rows.
        limits: limits of the colours; by default the smallest and the largest number.
        middle: the middle of a diverging colour scale; it extends equally far in both directions.

    Raises:
        MissingPackageError: the report extra is not installed.
    """
    altair = require("altair", extra="report")
    low, high = limits or _limits([value for row in panel.cells for value in row if value is not None])
    columns = list(panel.columns or map(str, range(1, len(panel.cells[0]) + 1)))
    rows = list(panel.rows or map(str, range(1, len(panel.cells) + 1)))
    values = [
        {"x": column, "y": row, "value": float(value or 0), "shown": value is not None}
        for row, cells in zip(rows, panel.cells, strict=True)
        for column, value in zip(columns, cells, strict=True)
    ]
    scale = altair.Scale(range=[COLD, HOT], domain=[low, high], clamp=True)
    if middle is not None:
        scale = altair.Scale(range=[COOL, COLD, HOT], domain=around(middle, low, high), clamp=True)
    counts = all(isinstance(cell, int) for row in panel.cells for cell in row if cell is not None)
    legend = altair.Legend(
        title=None,
        orient="bottom",
        gradientLength=SCALE,
        tickCount=4,
        labelOverlap="greedy",
        labelSeparation=6,
        **({"tickMinStep": 1, "format": ",d"} if counts else {}),
    )
    color = altair.Color("value:Q", scale=scale, legend=legend)

    def axis(title: str, angle: int = 0) -> Any:
        overlap = False if angle else "greedy"
        return altair.Axis(
            title=title or None, labelAngle=angle, labelOverlap=overlap, grid=False, ticks=False
        )

    step = max(16, min(34, 280 / len(columns)))
    title = textwrap.wrap(panel.title, int(max(SCALE, step * len(columns)) / LETTER))
    return _svg(
        altair.Chart(altair.Data(values=values), title=altair.TitleParams(title, anchor="start"))
        .mark_rect()
        .encode(
            x=altair.X("x:N", sort=columns, axis=axis(x, -40 if panel.columns else 0)),
            y=altair.Y("y:N", sort=rows, axis=axis(y)),
            color=altair.condition("datum.shown", color, altair.value(GREY)),
        )
        .properties(width={"step": step}, height={"step": 16})
    )


def around(middle: Number, low: Number, high: Number) -> list[float]:
    """The ends and the middle of a diverging scale; for a ratio (middle 1), no end is below 0.

    >>> around(0, -1, 3), around(1, 0.5, 3)
    ([-3.0, 0.0, 3.0], [0.0, 1.0, 3.0])
    """
    far = max(abs(low - middle), abs(high - middle)) or 1.0
    return [float(max(0.0, middle - far) if middle else -far), float(middle), float(middle + far)]


def _limits(known: Sequence[Number]) -> tuple[Number, Number]:
    """The smallest and the largest number; if all are equal, limits that give them the palest colour."""
    low, high = min(known, default=0), max(known, default=0)
    return low, high if high > low else low + 1


def style_ranges(count: int) -> tuple[list[str], list[list[int]]]:
    """A colour and a dash pattern for each series; no two series have both in common."""
    colors = [PALETTE[i % len(PALETTE)] for i in range(count)]
    return colors, [DASHES[i // len(PALETTE) % len(DASHES)] for i in range(count)]


def configured(chart: Any, **settings: Any) -> Any:
    """The style of every figure: no background, no text smaller than `FONT` pixels, no truncated text."""
    return (
        chart.configure(background="#00000000", font="sans-serif", **settings)
        .configure_view(stroke=None)
        .configure_axis(
            gridColor=GRID,
            domainColor=LINE,
            tickColor=LINE,
            titleFontWeight="normal",
            labelFontSize=FONT,
            titleFontSize=FONT + 1,
            labelLimit=0,
        )
        .configure_legend(labelFontSize=FONT, labelLimit=0, titleFontSize=FONT)
    )


def _color(altair: Any, names: Sequence[str], field: str = "series") -> Any:
    scale = altair.Scale(domain=list(names), range=style_ranges(len(names))[0])
    return altair.Color(f"{field}:N", title=None, scale=scale, legend=_legend(altair, names))


def _dash(altair: Any, names: Sequence[str]) -> Any:
    scale = altair.Scale(domain=list(names), range=style_ranges(len(names))[1])
    return altair.StrokeDash("series:N", title=None, scale=scale, legend=_legend(altair, names))


def _legend(altair: Any, names: Sequence[str]) -> Any:
    return altair.Legend(title=None, orient="top", columns=3) if len(names) > 1 else None


def _svg(chart: Any) -> str:
    convert = require("vl_convert", extra="report")
    return convert.vegalite_to_svg(configured(chart, padding=8, aria=False).to_dict())
