"""Interactive figures as Vega-Lite specifications, made by altair: hover for values, choose layer and matrix.

They contain their data, so that a page draws them offline. `figures` makes static figures.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from brushstroke.analysis.table import natural
from brushstroke.errors import require
from brushstroke.report.figures import (
    COLD,
    COOL,
    FONT,
    GREY,
    HOT,
    LINE,
    PALETTE,
    around,
    configured,
    style_ranges,
)

Record = Mapping[str, Any]
HEIGHT = 260
PANEL = 256  # maximum width of a map in pixels: with its axis it fits a phone
CELL, CORNER_CELL = 24, 30  # maximum size of a map's cell in pixels
CORNER = ", lower-left corner"  # added to the titles of such panels
MARK = "#c8553d"  # one level of a colour scale
LEGEND_COLUMNS = {"expr": "max(1, floor(width / 200))"}  # so that the whole legend fits a phone
CHOSEN = "chosen_"  # prefix of the parameters whose menus choose a field's value
TICKS = 12  # with at most this many different x values, each gets a tick
TITLE = 44  # maximum characters in a line of a title, so that it fits a phone


def dots(
    records: Sequence[Record],
    *,
    name: str,
    value: str,
    title: str,
    low: str = "low",
    high: str = "high",
    zero: bool = False,
) -> dict[str, Any]:
    """Draw one dot with its interval for each name, in the given order.

    Args:
        records: each with `name`, `value` and, if known, `low` and `high`.
        name, value, low, high: fields.
        title: title of the value's axis.
        zero: whether the values are differences; then a line marks 0, as in a forest plot.
    """
    altair = _altair()
    order = list(dict.fromkeys(record[name] for record in records))
    y = altair.Y(f"{name}:N", sort=order, title=None)
    x = altair.X(f"{value}:Q", title=_wrapped(title), scale=altair.Scale(zero=zero))
    tips = [f"{name}:N", *(altair.Tooltip(f"{part}:Q", format=".4g") for part in (value, low, high))]
    whole = altair.Chart(_data(altair, records))
    bars = whole.transform_filter(f"isValid(datum['{low}'])").mark_rule(strokeWidth=2)
    bars = bars.encode(
        y=y, x=altair.X(f"{low}:Q", title=_wrapped(title)), x2=f"{high}:Q", color=altair.value(PALETTE[0])
    )
    points = whole.mark_point(filled=True, size=70, opacity=1).encode(
        y=y, x=x, tooltip=tips, color=altair.value(PALETTE[0])
    )
    known = any(low in record for record in records)
    layers = [bars, points] if known else [points]
    if zero:
        origin = altair.Chart(altair.Data(values=[{value: 0}]))
        layers.insert(0, origin.mark_rule(color=LINE, strokeDash=[4, 3]).encode(x=x))
    return _finished(altair.layer(*layers).properties(width="container", height=24 * len(order) + 10))


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
    """Draw lines with points, a band for known intervals, and menus for the fields of `choose`.

    If there are few different x, each has a tick; otherwise ticks are integers if all x are. No two series
    have both the same colour and the same dashes.
    """
    altair = _altair()
    menus, chosen = _menus(altair, records, choose)
    names = list(dict.fromkeys(record[series] for record in records))
    places = sorted({record[x] for record in records})
    if len(places) <= TICKS:
        axis = altair.Axis(values=places, labelOverlap="greedy")
    else:
        whole_x = all(float(at).is_integer() for at in places) and not log_x
        axis = altair.Axis(tickMinStep=1) if whole_x else altair.Axis()
    across = altair.X(
        f"{x}:Q",
        title=_wrapped(x_title),
        scale=altair.Scale(type="log" if log_x else "linear", nice=False),
        axis=axis,
    )
    up = altair.Y(
        f"{y}:Q", title=y_title, scale=altair.Scale(type="log") if log_y else altair.Scale(zero=False)
    )
    colors, dashes = style_ranges(len(names))
    legend = None
    if len(names) > 1:
        legend = altair.Legend(
            orient="top",
            columns=LEGEND_COLUMNS,
            symbolType="stroke",
            symbolSize=300,
            symbolStrokeWidth=2.5,
            symbolOpacity=1,
        )
    shared = {"sort": names, "title": None, "legend": legend}
    color = altair.Color(f"{series}:N", scale=altair.Scale(domain=names, range=colors), **shared)
    dash = altair.StrokeDash(f"{series}:N", scale=altair.Scale(domain=names, range=dashes), **shared)
    whole = altair.Chart(_data(altair, records))
    for condition in chosen:
        whole = whole.transform_filter(condition)
    known = [key for key in (series, x, y, low, high) if any(key in record for record in records)]
    layers = whole.mark_line(point=altair.OverlayMarkDef(size=45)).encode(
        x=across,
        y=up,
        color=color,
        strokeDash=dash,
        tooltip=[f"{key}:N" if key == series else f"{key}:Q" for key in known],
    )
    if any(low in record for record in records):
        band = whole.transform_filter(f"isValid(datum['{low}'])").mark_area(opacity=0.15)
        layers = (
            band.encode(x=across, y=altair.Y(f"{low}:Q", title=y_title), y2=f"{high}:Q", color=color) + layers
        )
    title = {"title": _title(altair, choose, y_title)} if choose else {}
    return _finished(layers.add_params(*menus).properties(width="container", height=HEIGHT, **title))


def overlaps(
    records: Sequence[Record],
    *,
    x_title: str,
    y_title: str,
    measure: str,
    choose: Sequence[str] = (),
    corner: bool = False,
) -> dict[str, Any]:
    """Draw maps of φ(i, j) next to each other, as in the LoRA paper's figures 3 and 4; i = 1 is at the top.

    Colours range from 0 to the largest number shown, and the scale marks the chance level. Corners have a
    separate scale, because their numbers are smaller.

    Args:
        records: each with the fields of `choose`, a `panel` (its title), `cells` (rows of numbers), `n` (the
            dimensions of the space, for the chance level) and, unless it is a control, `corner`, True.
        x_title, y_title: titles of the columns j and the rows i.
        measure: name of the quantity, for the title.
        choose: fields that get a menu each.
        corner: also draw the enlarged lower-left corners of these panels, cells with j > i grey.
    """
    altair = _altair()
    menus, chosen = _menus(altair, records, choose)
    whole = altair.Chart(_data(altair, _flattened(records, choose)))
    for condition in chosen:
        whole = whole.transform_filter(condition)
    cells = (
        whole.transform_flatten(["phi"])
        .transform_window(n_cell="row_number()", groupby=["panel"])
        .transform_calculate(
            i="1 + floor((datum.n_cell - 1) / datum.columns)",
            j="1 + (datum.n_cell - 1) % datum.columns",
            shade="datum.phi / datum.top",
        )
        .transform_calculate(chance="max(datum.i, datum.j) / datum.n")
    )
    order = list(dict.fromkeys(record["panel"] for record in records))
    rows, columns = (
        max(sizes) for sizes in zip(*((len(r["cells"]), len(r["cells"][0])) for r in records), strict=True)
    )
    drawn = [
        _overlap_panels(altair, cells, (rows, columns), (x_title, y_title), order),
        _overlap_scale(altair, whole),
    ]
    if corner:
        inside = cells.transform_filter("datum.corner && datum.j <= datum.rows").transform_calculate(
            panel=f"datum.panel + {json.dumps(CORNER)}", shade="datum.phi / datum.corner_top"
        )
        order = [name + CORNER for name in order]
        drawn += [
            _overlap_panels(altair, inside, (rows, rows), (x_title, y_title), order, grey=True),
            _overlap_scale(altair, whole.transform_filter("datum.corner"), "corner_"),
        ]
    title = _title(altair, choose, f"φ(i, j), {measure}")
    return _finished(altair.vconcat(*drawn, spacing=14, title=title).add_params(*menus), kind="map")


def _flattened(records: Sequence[Record], choose: Sequence[str]) -> list[dict[str, Any]]:
    """The records of `overlaps` with their cells in one list, and the largest number shown.

    Both for the whole grids and, with names that begin with "corner_", for the corners.
    """
    tops: dict[tuple[Any, ...], float] = {}
    corner_tops: dict[tuple[Any, ...], float] = {}
    spaces: dict[tuple[Any, ...], set[int]] = {}
    for record in records:
        key = tuple(record[name] for name in choose)
        spaces.setdefault(key, set()).add(record["n"])
        tops[key] = max(tops.get(key, 0.0), *(float(max(row)) for row in record["cells"]))
        if record.get("corner"):
            shown = (float(max(row[: i + 1])) for i, row in enumerate(record["cells"]))
            corner_tops[key] = max(corner_tops.get(key, 0.0), *shown)
    flat = []
    for record in records:
        rows, columns = len(record["cells"]), len(record["cells"][0])
        key = tuple(record[name] for name in choose)
        where = f" of {record['n']}" if len(spaces[key]) > 1 else ""
        levels = [
            [{"at": max(size) / record["n"], "of": f"φ{size}{where}"}]
            for size in ((rows, columns), (rows, rows))
        ]
        flat.append(
            {
                **{name: record[name] for name in (*choose, "panel", "n")},
                "corner": bool(record.get("corner")),
                "rows": rows,
                "columns": columns,
                "phi": [round(float(value), 3) for row in record["cells"] for value in row],
                "top": round(tops[key], 3) or 1.0,
                "levels": levels[0],
                "corner_top": round(corner_tops.get(key, 0.0), 3) or 1.0,
                "corner_levels": levels[1],
            }
        )
    return flat


def _overlap_panels(
    altair: Any,
    cells: Any,
    size: tuple[int, int],
    titles: tuple[str, str],
    order: Sequence[str],
    *,
    grey: bool = False,
) -> Any:
    """One panel for each value of `panel`; cells are as large as the page, or a phone, allows."""
    rows, columns = size
    across = min(CORNER_CELL if grey else CELL, max(1, PANEL // columns))
    down = max(across, min(CELL, PANEL // 2 // rows))
    color = altair.Color("shade:Q", scale=_shades(altair), legend=None)
    shown = altair.condition("datum.j > datum.i", altair.value(GREY), color) if grey else color
    tips = [altair.Tooltip(f"{name}:Q", format=".3f") for name in ("phi", "chance")]
    panel = cells.mark_rect().encode(
        x=altair.X("j:O", title=titles[0], axis=_counted(altair, columns, across, 2 * FONT)),
        y=altair.Y("i:O", title=titles[1], axis=_counted(altair, rows, down, FONT + 3)),
        color=shown,
        tooltip=["panel:N", "i:O", "j:O", *tips],
    )
    header = altair.Header(title=None, labelFontSize=FONT + 1, labelLimit=0)
    return (
        panel.properties(name="panel", width={"step": across}, height={"step": down})
        .facet(
            altair.Facet("panel:N", title=None, sort=list(order), header=header),
            columns=2 if len(order) == 4 else 3,  # two matrices above their random pairs
            spacing=12,
        )
        .resolve_scale(x="independent", y="independent")
    )


def _counted(altair: Any, count: int, cell: float, room: float) -> Any:
    """An axis of the numbers from 1, with as many labels as fit."""
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, count) if step * cell >= room or step >= count)
    shown = [1, *range(every, count + 1, every)] if every > 1 else [*range(1, count + 1)]
    return altair.Axis(values=shown, labelAngle=0, labelOverlap="greedy", grid=False, ticks=False)


def _overlap_scale(altair: Any, whole: Any, of: str = "") -> Any:
    """The colour scale from 0 to the largest φ shown, with a mark at the chance level of the last cell.

    Args:
        altair: the package.
        whole: the records.
        of: what their fields begin with.
    """
    steps, title = 40, "φ in the corners" if of else "φ"
    x = altair.X(
        "low:Q", title=title, scale=altair.Scale(nice=False, zero=True), axis=altair.Axis(grid=False)
    )
    row = altair.Y("row:O", axis=None)
    bar = (
        whole.transform_aggregate(top=f"max({of}top)")
        .transform_calculate(step=f"sequence({steps})", row="0")
        .transform_flatten(["step"])
        .transform_calculate(
            shade=f"datum.step / {steps - 1}",
            low=f"datum.top * datum.step / {steps}",
            high=f"datum.top * (datum.step + 1) / {steps}",
        )
        .mark_rect()
        .encode(x=x, x2="high:Q", y=row, color=altair.Color("shade:Q", scale=_shades(altair), legend=None))
    )
    levels = (
        whole.transform_flatten([f"{of}levels"], ["level"])
        .transform_calculate(low="datum.level.at", of="datum.level.of")
        .transform_aggregate(top=f"max({of}top)", groupby=["low", "of"])
        .transform_window(row="row_number()", sort=[altair.SortField("low")])
        .transform_calculate(words="'chance, ' + datum.of + ': ' + format(datum.low, '.3f')")
    )
    tick = levels.mark_tick(thickness=2, size=FONT + 5, color=MARK)
    marks = [tick.transform_calculate(row="0").encode(x=x, y=row), tick.encode(x=x, y=row)]
    right = "datum.low > datum.top / 2"  # of the middle: put the words to its left
    words = levels.mark_text(
        align=altair.ExprRef(f"{right} ? 'right' : 'left'"),
        dx=altair.ExprRef(f"{right} ? -5 : 5"),
        fontSize=FONT,
    ).encode(x=x, y=row, text="words:N")
    return altair.layer(bar, *marks, words).properties(width=PANEL, height={"step": FONT + 5})


def site_map(
    records: Sequence[Record],
    *,
    measures: Sequence[str],
    words: Mapping[str, str] | None = None,
    choose: Sequence[str] = (),
    ratios: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw a map by layer and matrix, with a menu for the measure.

    Args:
        records: each with `layer`, `matrix`, the fields of `choose`, and a number for each measure. Matrices
            are drawn in this order, layers by number.
        measures: fields to choose from.
        words: their names in the menu; by default unchanged.
        choose: further fields that get a menu each.
        ratios: measures with one colour below 1 and another above.
    """
    altair = _altair()
    menus, chosen = _menus(altair, records, choose)
    called = {name: (words or {}).get(name, name) for name in measures}
    menu = altair.binding_select(options=list(called), labels=list(called.values()), name="shown: ")
    measure = altair.param(name="measure", value=measures[0], bind=menu)
    domains, colours = {}, {}
    for name in called:
        least, most = _least(records, name), _most(records, name)
        ratio = name in ratios
        domains[name] = around(1, least, most) if ratio else [least, (least + most) / 2, most]
        colours[name] = [COOL, COLD, HOT] if ratio else [COLD, _between(COLD, HOT), HOT]
    layers = sorted({record["layer"] for record in records}, key=natural)
    matrices = list(dict.fromkeys(record["matrix"] for record in records))
    whole = altair.Chart(_data(altair, records))
    for condition in chosen:
        whole = whole.transform_filter(condition)
    scale = altair.Scale(
        range=[altair.ExprRef(f"{json.dumps(colours)}[measure][{end}]") for end in range(3)],
        domain=[altair.ExprRef(f"{json.dumps(domains)}[measure][{end}]") for end in range(3)],
    )
    numbers = [altair.Tooltip(f"{name}:Q", title=word, format=".4g") for name, word in called.items()]
    chart = (
        whole.transform_calculate(shown="datum[measure]")
        .mark_rect()
        .encode(
            x=altair.X("matrix:N", sort=matrices, title=None, axis=altair.Axis(labelAngle=-40)),
            y=altair.Y("layer:N", sort=layers, title="layer"),
            color=altair.Color("shown:Q", title=None, scale=scale, legend=altair.Legend(orient="bottom")),
            tooltip=["layer:N", "matrix:N", *numbers],
        )
        .add_params(*menus, measure)
    )
    title = _title(altair, choose, words=called)
    return _finished(
        chart.properties(
            width={"step": max(16, min(56, PANEL // len(matrices)))}, height={"step": 22}, title=title
        ),
        kind="map",
    )


def _between(one: str, other: str) -> str:
    """The colour halfway between two."""
    parts = [(int(one[at : at + 2], 16) + int(other[at : at + 2], 16)) // 2 for at in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def _least(records: Sequence[Record], name: str) -> float:
    return min((record[name] for record in records if record[name] is not None), default=0.0)


def _most(records: Sequence[Record], name: str) -> float:
    """The largest number; if all are equal, one more, so that they get the palest colour."""
    most = max((record[name] for record in records if record[name] is not None), default=0.0)
    return most if most > _least(records, name) else most + 1.0


def choices(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The initial choices of a figure's menus: field → value, including the measure."""
    named = {param["name"]: param for param in spec.get("params", ()) if "bind" in param}
    found = {name.removeprefix(CHOSEN): param["value"] for name, param in named.items()}
    if "measure" in named:
        bind = named["measure"]["bind"]
        found["measure"] = dict(zip(bind["options"], bind["labels"], strict=True))[found["measure"]]
    return found


def _altair() -> Any:
    return require("altair", extra="report")


def _data(altair: Any, records: Sequence[Record]) -> Any:
    return altair.Data(values=[dict(record) for record in records])


def _menus(altair: Any, records: Sequence[Record], fields: Sequence[str]) -> tuple[list[Any], list[str]]:
    """A menu for each field, and the filters of the menus."""
    menus, conditions = [], []
    for name in fields:
        options = list(dict.fromkeys(record[name] for record in records))
        bound = altair.binding_select(options=options, name=f"{name}: ")
        menus.append(altair.param(name=f"{CHOSEN}{name}", value=options[0], bind=bound))
        conditions.append(f"datum['{name}'] == {CHOSEN}{name}")
    return menus, conditions


def _title(
    altair: Any, choose: Sequence[str], measure: str = "", *, words: Mapping[str, str] | None = None
) -> Any:
    """The title of a figure: the choices of its menus and the measure. Files of the figure contain it too."""
    said = [
        f"{json.dumps('layer ') if name == 'layer' else ''} + {CHOSEN}{name}".lstrip(" +") for name in choose
    ]
    lines = [json.dumps(line, ensure_ascii=False) for line in textwrap.wrap(measure, TITLE)]
    shown = [f"{json.dumps(words, ensure_ascii=False)}[measure]"] if words else lines
    place = [" + ', ' + ".join(said)] if said else []
    text = altair.ExprRef(f"[{', '.join([*place, *shown])}]")
    return altair.TitleParams(text=text, anchor="start", fontSize=FONT + 2, limit=0, offset=8)


def _wrapped(title: str) -> Any:
    lines = textwrap.wrap(title, TITLE)
    return lines if len(lines) > 1 else title


def _shades(altair: Any) -> Any:
    return altair.Scale(range=[COLD, HOT], domain=[0, 1], clamp=True)


def _finished(chart: Any, kind: str = "") -> dict[str, Any]:
    """The final specification; `kind` is the CSS class of the figure in a page."""
    spec = configured(chart, padding=6).to_dict()
    return {**spec, "usermeta": {"kind": kind}} if kind else spec
