"""A self-contained HTML page: works offline, on a phone, in light and dark themes.

It does not interpret figures: SVGs are inserted unchanged, everything else is escaped.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brushstroke.errors import require
from brushstroke.outputs import output_errors, write_file

FOLDED = 12  # a table with more rows is folded

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2430; --soft: #5b6675; --page: #fdfdfc; --panel: #f2f3f1; --line: #d9dcd8; --accent: #0b6e5f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e6e8ea; --soft: #9aa5b1; --page: #14181d; --panel: #1d232a; --line: #333c46; --accent: #5cc8b2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; overflow-wrap: break-word;
  background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p { margin: 0.6rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: 0.9rem 0; }
table { border-collapse: collapse; min-width: 50%; font-variant-numeric: tabular-nums; }
caption { position: sticky; left: 0; max-width: min(46rem, 100vw - 2rem); }
caption, figcaption { text-align: left; color: var(--soft); font-size: 0.9rem; padding: 0.3rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.8rem 0.35rem 0; }
th, td { border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
@media (max-width: 40rem) {
  table { font-size: 0.75rem; line-height: 1.35; }
  th, td { padding-right: 0.25rem; }
  th { font-size: 0.7rem; }
  th, th.number, td.number, td:first-child { white-space: normal; }
  td:first-child { min-width: 4rem; overflow-wrap: anywhere; }
}
pre {
  margin: 0.6rem 0; padding: 0.7rem 0.9rem; background: var(--panel); border-left: 3px solid var(--accent);
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.88rem/1.45 ui-monospace, "SF Mono", Consolas, monospace;
}
figure { margin: 1rem 0; }
figure svg { display: block; }
figure svg text { fill: var(--text); }
.maps { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.maps figure { min-width: 0; max-width: 100%; }
@media (prefers-color-scheme: dark) {
  .map svg { filter: invert(0.92) hue-rotate(180deg); }
  .map svg text { fill: #1d2430; }
}
details summary { cursor: pointer; color: var(--accent); }
.chart .vega-embed { width: 100%; display: flex; flex-direction: column-reverse; }
.chart .vega-bindings { margin: 0.4rem 0; }
.chart .vega-bind { display: inline-block; margin-right: 1.2rem; color: var(--soft); }
.chart select { font: inherit; color: var(--text); background: var(--panel); border: 1px solid var(--line); }
"""

_DRAW = """
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
for (const place of document.querySelectorAll(".chart [data-spec]")) {
  const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
  if (innerWidth < 700) for (const part of spec.vconcat ?? []) if (part.columns) part.columns = 1;
  const options = { renderer: "svg", actions: false, tooltip: { theme: dark ? "dark" : "light" } };
  vegaEmbed(place, spec, options).then(
    () => { place.dataset.drawn = "yes"; },
    (error) => { console.error(error); place.textContent = "This figure could not be drawn: " + error; },
  );
}
"""


class Page:
    """A page that is built from top to bottom.

    Args:
        title: the heading.
        lead: one or two sentences about the page.

    >>> page = Page("Two adapters", "On one base.")
    >>> page.section("Sizes").table(["adapter", "MB"], [["addresses", 9.8]])
    >>> "<td>addresses</td>" in page.html()
    True
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._charts = 0
        self._parts = [f"<h1>{_escaped(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{_escaped(lead)}</p>')

    def section(self, title: str) -> "Page":
        """Begin a section; returns the page, for chained calls."""
        self._parts.append(f"<h2>{_escaped(title)}</h2>")
        return self

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        self._parts += [f"<p>{_escaped(paragraph)}</p>" for paragraph in paragraphs]

    def code(self, text: str, caption: str = "") -> None:
        """Add text in a fixed-width font."""
        if caption:
            self._parts.append(f"<p>{_escaped(caption)}</p>")
        self._parts.append(f"<pre>{_escaped(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """Add a table; columns of numbers, or of texts that begin with numbers, are right-aligned.

        A table with more than `FOLDED` rows is folded; a click shows it.
        """
        numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
        classes = [' class="number"' if right else "" for right in numeric]
        head = "".join(f"<th{c}>{_escaped(name)}</th>" for name, c in zip(columns, classes, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{c}>{_escaped(cell)}</td>" for cell, c in zip(row, classes, strict=True))
            + "</tr>"
            for row in rows
        )
        above = f"<caption>{_escaped(caption)}</caption>" if caption else ""
        content = f"{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        table = f'<div class="scroll"><table>{content}</table></div>'
        if len(rows) > FOLDED:
            table = f"<details><summary>A table of {len(rows)} rows</summary>{table}</details>"
        self._parts.append(table)

    def figure(self, svg: str, caption: str = "") -> None:
        """Add an SVG with its description below; an SVG that is too wide scrolls.

        Raises:
            ValueError: the text is not an SVG, or contains a script.
        """
        self._parts.append(_figure(svg, caption))

    def maps(self, figures: Sequence[tuple[str, str]]) -> None:
        """Add SVGs of `heatmap` with their descriptions, next to each other as far as they fit.

        Raises:
            ValueError: a text is not an SVG, or contains a script.
        """
        drawn = "".join(_figure(svg, caption, "map") for svg, caption in figures)
        self._parts.append(f'<div class="maps">{drawn}</div>')

    def chart(self, spec: Mapping[str, Any], caption: str = "") -> None:
        """Add a Vega-Lite figure, which the page draws offline, with its description below."""
        self._charts += 1
        name = f"spec-{self._charts}"
        kind = _escaped(f"chart {spec.get('usermeta', {}).get('kind', '')}".rstrip())
        data = json.dumps(spec, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        below = f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
        self._parts.append(
            f'<figure class="{kind}"><div class="scroll"><div data-spec="{name}"></div></div>{below}'
            f'<script type="application/json" id="{name}">{data}</script></figure>'
        )

    def html(self) -> str:
        """The whole document.

        Raises:
            MissingPackageError: the page has charts, and the report extra is not installed.
        """
        script = f"<script>{_drawing_code()}\n{_DRAW}</script>\n" if self._charts else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_escaped(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + f"\n{script}</body>\n</html>\n"
        )

    def write(self, file: str | Path) -> Path:
        """Write the document atomically, replacing an existing file.

        Raises:
            OutputError: the file cannot be written.
        """
        target = Path(file)
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, self.html())
        return target


def _figure(svg: str, caption: str, kind: str = "") -> str:
    start = svg.find("<svg")
    if start < 0 or re.search(r"<script|\son\w+\s*=", svg, re.IGNORECASE):
        raise ValueError("a figure must be an <svg> element without scripts; draw it with curves() or bars()")
    below = f"<figcaption>{_escaped(caption)}</figcaption>" if caption else ""
    inline = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg[start:])  # HTML needs no namespaces
    opening = f'<figure class="{kind}">' if kind else "<figure>"
    return f'{opening}<div class="scroll">{inline}</div>{below}</figure>'


def _drawing_code() -> str:
    """Vega, Vega-Lite and vega-embed in one script, in the versions for altair's specifications."""
    version = require("altair", extra="report").SCHEMA_VERSION.removeprefix("v")
    convert = require("vl_convert", extra="report")
    bundle = convert.javascript_bundle(vl_version=".".join(version.split(".")[:2]))
    return bundle.replace("</script", "<\\/script")


def _escaped(value: object) -> str:
    return html.escape(str(value), quote=True)


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) or bool(re.match(r"^\s*([-+−]?\d|–$)", str(cell)))
