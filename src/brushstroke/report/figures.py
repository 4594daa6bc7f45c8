"""Figures as SVG texts, drawn by altair and rendered by vl-convert; both come with the report extra.

The background is transparent and the page colours the texts, so that one figure serves light and dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from brushstroke.errors import require

Number = int | float

PALETTE = ("#0b8a75", "#d9822b", "#5b7fd6", "#b5527f", "#8a8f3c", "#7d8791")
GRID = "#8895a333"
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


def _color(altair: Any, names: Sequence[str], field: str = "series") -> Any:
    scale = altair.Scale(domain=list(names), range=[PALETTE[i % len(PALETTE)] for i in range(len(names))])
    legend = altair.Legend(title=None, orient="top") if len(names) > 1 else None
    return altair.Color(f"{field}:N", scale=scale, legend=legend)


def _svg(chart: Any) -> str:
    convert = require("vl_convert", extra="report")
    chart = (
        chart.configure(background="#00000000", font="sans-serif", padding=8)
        .configure_view(stroke=None)
        .configure_axis(gridColor=GRID, domainColor="#8895a3", tickColor="#8895a3", titleFontWeight="normal")
    )
    return convert.vegalite_to_svg(chart.to_dict())
