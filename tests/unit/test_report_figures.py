import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from brushstroke.errors import MissingPackageError
from brushstroke.report import Page, bars, curves, heatmap
from brushstroke.report.figures import GREY, LETTER, Panel, style_ranges


@pytest.fixture
def drawing():
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")


def texts(svg: str) -> list[str]:
    return [
        element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")
    ]


@pytest.mark.usefixtures("drawing")
def test_curves_have_their_titles_and_a_line_for_each_series():
    svg = curves({"addresses": [(1, 2.0), (2, 1.0)], "people": [(1, 1.5)]}, x="step", y="loss")
    assert {"step", "loss", "addresses", "people"} <= set(texts(svg))
    assert svg.count("mark-line") >= 1


@pytest.mark.usefixtures("drawing")
def test_bars_keep_the_order_of_groups_and_names():
    svg = bars(
        {"zeta": {"f1": 0.1, "exact": 0.2}, "alpha": {"f1": 0.3, "exact": 0.4}}, y="share", limits=(0, 1)
    )
    found = texts(svg)
    assert found.index("zeta") < found.index("alpha")
    assert {"f1", "exact", "share"} <= set(found)


@pytest.mark.usefixtures("drawing")
def test_page_accepts_a_figure():
    page = Page("Title")
    page.figure(curves({"one": [(0, 1), (1, 0.1)]}, x="x", y="y", log_y=True), "caption")
    assert "<svg" in page.html()


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingPackageError, match=r"-m pip install 'altair>=.*' 'vl-convert-python>="):
        curves({"one": [(0, 1)]}, x="x", y="y")


HOTTEST, COLDEST = "rgb(11, 93, 80)", "rgb(232, 241, 239)"


@pytest.mark.usefixtures("drawing")
def test_a_map_shows_missing_sites_in_grey():
    panel = Panel("one", [[0.0, None], [0.5, 3.0]], ["first", "second"], ["q", "v"])
    svg = heatmap(panel, x="matrix", y="layer", limits=(0, 1))
    assert {"one", "first", "second", "q", "v", "matrix", "layer"} <= set(texts(svg))
    assert svg.count(f'fill="{GREY}"') == 1
    assert svg.count(f'fill="{HOTTEST}"') == 1  # what is above the limit
    assert svg.count(f'fill="{COLDEST}"') == 1
    alone = heatmap(Panel("one", [[5.0, None], [5.5, 6.0]]))
    assert alone.count(f'fill="{HOTTEST}"') == 1
    assert alone.count(f'fill="{COLDEST}"') == 1


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("value", [0, 7.5])
def test_map_of_equal_numbers_is_pale(value):
    svg = heatmap(Panel("intruders", [[value] * 3] * 2))
    assert svg.count(f'fill="{COLDEST}"') == 6


@pytest.mark.usefixtures("drawing")
def test_a_diverging_map_is_pale_at_zero_and_of_two_colours_around_it():
    svg = heatmap(Panel("z", [[-2.0, 0.0, 4.0, -4.0]]), middle=0)
    fills = re.findall(r'<path d="[^"]*" fill="(rgb[^"]*)"', svg)
    assert fills[1:] == [COLDEST, HOTTEST, "rgb(59, 90, 168)"]
    assert fills[0] not in fills[1:]


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("columns", [1, 2, 30])
def test_title_of_a_map_fits_its_width(columns):
    title = "z-score of φ of all directions, right"
    svg = heatmap(Panel(title, [[1.0] * columns], ["0"], [f"m{n}" for n in range(columns)]))
    root = ElementTree.fromstring(svg)
    (line,) = [e for e in root.iter() if e.get("font-weight") == "bold" and e.tag.endswith("text")]
    lines = [part for part in line.itertext() if part.strip()]
    assert " ".join(lines) == title
    assert max(map(len, lines)) * LETTER <= float(root.get("width"))


def test_no_two_series_share_colour_and_dashes():
    colors, dashes = style_ranges(25)
    assert len({(color, *dash) for color, dash in zip(colors, dashes, strict=True)}) == 25
    assert len({*colors[:8]}) == 8


@pytest.mark.usefixtures("drawing")
def test_no_text_is_smaller_than_11_pixels():
    series = {f"adapter {n}": [(0, 0.1 * n), (1, 1.0)] for n in range(4)}
    drawn = [
        curves(series, x="rank", y="share"),
        bars({"1": {"inputs": 0.1, "outputs": 0.2}}, y="share"),
        heatmap(Panel("norm", [[1.0, 2.0]], ["0"], ["q_proj", "v_proj"]), y="layer"),
    ]
    sizes = [int(size) for svg in drawn for size in re.findall(r'font-size="(\d+)px"', svg)]
    assert len(sizes) > 20
    assert min(sizes) == 11
