"""Interactive figures as Vega-Lite specifications, by altair: hover for values, choose layer and matrix.

They carry their data; a page draws them without a network. Static figures are the part of `figures`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from brushstroke.errors import require
from brushstroke.report.figures import COLD, GREY, GRID, HOT, LINE, PALETTE

Record = Mapping[str, Any]
HEIGHT = 260
CELL = 9  # pixels of a map's cell


def dots(
    records: Sequence[Record], *, name: str, value: str, title: str, low: str = "low", high: str = "high"
) -> dict[str, Any]:
    """One dot with its interval for each name, in the order given.

    Args:
        records: each with `name`, `value`, and where they are known `low` and `high`.
        name, value, low, high: fields.
        title: of the value's axis.
    """
    altair = _altair()
    order = list(dict.fromkeys(record[name] for record in records))
    y = altair.Y(f"{name}:N", sort=order, title=None)
    x = altair.X(f"{value}:Q", title=title, scale=altair.Scale(zero=False))
    tips = [f"{name}:N", *(altair.Tooltip(f"{part}:Q", format=".4g") for part in (value, low, high))]
    whole = altair.Chart(_data(altair, records))
    bars = whole.transform_filter(f"isValid(datum['{low}'])").mark_rule(strokeWidth=2)
    bars = bars.encode(
        y=y, x=altair.X(f"{low}:Q", title=title), x2=f"{high}:Q", color=altair.value(PALETTE[0])
    )
    points = whole.mark_point(filled=True, size=70, opacity=1).encode(
        y=y, x=x, tooltip=tips, color=altair.value(PALETTE[0])
    )
    known = any(low in record for record in records)
    chart = bars + points if known else points
    return _finished(chart.properties(width="container", height=24 * len(order) + 10))


def lines(
    records: Sequence[Record],
    *,
    x: str,
    y: str,
    series: str,
    x_title: str,
    y_title: str,
    log_x: bool = False,
    log_y: bool = False,
    low: str = "low",
    high: str = "high",
    choose: Sequence[str] = (),
) -> dict[str, Any]:
    """Lines with points, a band where intervals are known, and menus for the fields of `choose`.

    Where every x is a whole number, so is every tick.
    """
    altair = _altair()
    menus, chosen = _menus(altair, records, choose)
    names = list(dict.fromkeys(record[series] for record in records))
    whole_x = all(float(record[x]).is_integer() for record in records)
    across = altair.X(
        f"{x}:Q",
        title=x_title,
        scale=altair.Scale(type="log" if log_x else "linear", nice=False),
        axis=altair.Axis(tickMinStep=1) if whole_x and not log_x else altair.Axis(),
    )
    up = altair.Y(
        f"{y}:Q", title=y_title, scale=altair.Scale(type="log") if log_y else altair.Scale(zero=False)
    )
    color = altair.Color(
        f"{series}:N",
        sort=names,
        title=None,
        scale=altair.Scale(domain=names, range=[PALETTE[i % len(PALETTE)] for i in range(len(names))]),
        legend=altair.Legend(orient="top", columns=4) if len(names) > 1 else None,
    )
    whole = altair.Chart(_data(altair, records))
    for condition in chosen:
        whole = whole.transform_filter(condition)
    known = [key for key in (series, x, y, low, high) if any(key in record for record in records)]
    layers = whole.mark_line(point=altair.OverlayMarkDef(size=45)).encode(
        x=across, y=up, color=color, tooltip=[f"{key}:N" if key == series else f"{key}:Q" for key in known]
    )
    if any(low in record for record in records):
        band = whole.transform_filter(f"isValid(datum['{low}'])").mark_area(opacity=0.15)
        layers = (
            band.encode(x=across, y=altair.Y(f"{low}:Q", title=y_title), y2=f"{high}:Q", color=color) + layers
        )
    return _finished(layers.add_params(*menus).properties(width="container", height=HEIGHT))


def grids(
    records: Sequence[Record], *, x_title: str, y_title: str, choose: Sequence[str], top: float = 1.0
) -> dict[str, Any]:
    """Maps of φ(i, j) side by side, with menus for the fields of `choose` and a switch for the corner.

    Args:
        records: each with the fields of `choose`, a `panel`, and `cells`, rows of numbers.
        x_title, y_title: of the columns j and the rows i.
        choose: fields with a menu each.
        top: the number that has the strongest colour.
    """
    altair = _altair()
    flat = [
        {
            **{key: record[key] for key in (*choose, "panel")},
            "rows": len(record["cells"]),
            "columns": len(record["cells"][0]),
            "phi": [round(float(value), 3) for row in record["cells"] for value in row],
        }
        for record in records
    ]
    menus, chosen = _menus(altair, records, choose)
    corner = altair.param(
        name="corner", value=False, bind=altair.binding_checkbox(name="lower-left corner only ")
    )
    widest = max(record["columns"] for record in flat)
    whole = altair.Chart(_data(altair, flat))
    for condition in chosen:
        whole = whole.transform_filter(condition)
    cells = (
        whole.transform_flatten(["phi"])
        .transform_window(n="row_number()", groupby=["panel"])
        .transform_calculate(
            i="1 + floor((datum.n - 1) / datum.columns)", j="1 + (datum.n - 1) % datum.columns"
        )
        .transform_filter("!corner || datum.j <= datum.rows")
    )
    ticks = altair.Axis(labelOverlap="greedy", labelAngle=0, grid=False, ticks=False)
    color = altair.Color(
        "phi:Q",
        title="φ",
        scale=altair.Scale(range=[COLD, HOT], domain=[0, top], clamp=True),
        legend=altair.Legend(orient="bottom", gradientLength=160),  # its default fails where axes differ
    )
    panel = cells.mark_rect().encode(
        x=altair.X("j:O", title=x_title, axis=ticks),
        y=altair.Y("i:O", title=y_title, axis=ticks),
        color=altair.condition("corner && datum.j < datum.i", altair.value(GREY), color),
        tooltip=["panel:N", "i:O", "j:O", "phi:Q"],
    )
    size = max(4, min(2 * CELL, 320 // widest))
    order = list(dict.fromkeys(record["panel"] for record in flat))
    return _finished(
        panel.properties(width={"step": size}, height={"step": size})
        .facet(altair.Facet("panel:N", title=None, sort=order), columns=2)
        .resolve_scale(x="independent", y="independent")
        .add_params(*menus, corner)
    )


def site_map(
    records: Sequence[Record],
    *,
    measures: Sequence[str],
    words: Mapping[str, str] | None = None,
    choose: Sequence[str] = (),
) -> dict[str, Any]:
    """A map of layers and matrices, with a menu for the measure.

    Args:
        records: each with `layer`, `matrix`, the fields of `choose`, and a number for each measure.
        measures: fields to choose from.
        words: how the menu calls them; by default as they are.
        choose: further fields with a menu each.
    """
    altair = _altair()
    menus, chosen = _menus(altair, records, choose)
    called = {name: (words or {}).get(name, name) for name in measures}
    menu = altair.binding_select(options=list(called), labels=list(called.values()), name="shown: ")
    measure = altair.param(name="measure", value=measures[0], bind=menu)
    layers = list(dict.fromkeys(record["layer"] for record in records))
    matrices = list(dict.fromkeys(record["matrix"] for record in records))
    whole = altair.Chart(_data(altair, records))
    for condition in chosen:
        whole = whole.transform_filter(condition)
    scale = altair.Scale(range=[COLD, HOT], zero=False)
    numbers = [altair.Tooltip(f"{name}:Q", title=word, format=".4g") for name, word in called.items()]
    chart = (
        whole.transform_calculate(shown="datum[measure]")
        .mark_rect()
        .encode(
            x=altair.X("matrix:N", sort=matrices, title=None, axis=altair.Axis(labelAngle=-30)),
            y=altair.Y("layer:N", sort=layers, title="layer"),
            color=altair.Color("shown:Q", title=None, scale=scale, legend=altair.Legend()),
            tooltip=["layer:N", "matrix:N", *numbers],
        )
        .add_params(*menus, measure)
    )
    return _finished(chart.properties(width={"step": 56}, height={"step": 22}))


def _altair() -> Any:
    return require("altair", extra="report")


def _data(altair: Any, records: Sequence[Record]) -> Any:
    return altair.Data(values=[dict(record) for record in records])


def _menus(altair: Any, records: Sequence[Record], fields: Sequence[str]) -> tuple[list[Any], list[str]]:
    """A menu for each field, and the filters that they make."""
    menus, conditions = [], []
    for name in fields:
        options = list(dict.fromkeys(record[name] for record in records))
        bound = altair.binding_select(options=options, name=f"{name}: ")
        menus.append(altair.param(name=f"chosen_{name}", value=options[0], bind=bound))
        conditions.append(f"datum['{name}'] == chosen_{name}")
    return menus, conditions


def _finished(chart: Any) -> dict[str, Any]:
    chart = (
        chart.configure(background="#00000000", font="sans-serif", padding=6)
        .configure_view(stroke=None)
        .configure_axis(gridColor=GRID, domainColor=LINE, tickColor=LINE, titleFontWeight="normal")
    )
    return chart.to_dict()
