import json
import re

import pytest

from brushstroke.errors import OutputError
from brushstroke.report import Page
from brushstroke.report.charts import dots

SVG = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 1 1"><text>loss</text></svg>'
)


def test_everything_but_figures_is_escaped():
    page = Page("A & <b>", "lead <i>")
    page.section("<h>")
    page.text("1 < 2")
    page.code('{"a": "<script>"}', caption="a & b")
    page.table(["<c>"], [["<script>alert(1)</script>"]], "<cap>")
    page.figure(SVG, "<f>")
    document = page.html()
    assert "<script" not in document
    for escaped in (
        "A &amp; &lt;b&gt;",
        "lead &lt;i&gt;",
        "1 &lt; 2",
        "&lt;c&gt;",
        "&lt;cap&gt;",
        "&lt;f&gt;",
    ):
        assert escaped in document


def test_page_needs_no_network_and_fits_a_phone_and_the_dark():
    page = Page("Title")
    page.figure(SVG)
    document = page.html()
    assert "//" not in document
    assert not re.search(r"\b(src|href|@import|url)\b", document)
    assert "prefers-color-scheme: dark" in document
    assert 'name="viewport"' in document
    assert "<?xml" not in document


def test_columns_of_numbers_are_right_aligned():
    page = Page("Title")
    page.table(["name", "count", "share"], [["a", 1, "50 %"], ["b", 2, "–"]])
    document = page.html()
    assert '<th>name</th><th class="number">count</th><th class="number">share</th>' in document
    assert '<td>a</td><td class="number">1</td>' in document


@pytest.mark.parametrize("svg", ["no figure", '<svg onload="x()"></svg>', "<svg><script>x()</script></svg>"])
def test_invalid_or_scripted_svg_is_refused(svg):
    with pytest.raises(ValueError, match="without scripts"):
        Page("Title").figure(svg)


def test_write_replaces_a_page_and_makes_the_folder(tmp_path):
    target = tmp_path / "new" / "page.html"
    Page("First").write(target)
    Page("Second").write(target)
    assert "Second" in target.read_text("utf-8")
    assert [entry.name for entry in target.parent.iterdir()] == ["page.html"]


def test_write_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        Page("Title").write(tmp_path / "file" / "page.html")


def test_page_with_charts_contains_the_drawing_code():
    page = Page("Charts")
    record = {"arm": "</script><b>", "loss": 1.0}
    page.chart(dots([record], name="arm", value="loss", title="loss"), "Below.")
    html = page.html()
    assert 'src="http' not in html
    assert "vegaEmbed" in html
    assert len(html) < 2_000_000
    (spec,) = html.split('type="application/json"')[1:]
    reported = json.loads(spec.split(">", 1)[1].split("</script>")[0])
    assert reported["data"]["values"] == [record]


def test_page_without_charts_contains_no_script():
    assert "<script" not in Page("Plain").html()
