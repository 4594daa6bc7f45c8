import sys
import xml.etree.ElementTree as ElementTree

import pytest

from brushstroke.errors import MissingPackageError
from brushstroke.report import Page, bars, curves, heatmaps
from brushstroke.report.figures import GREY, Panel


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
def test_a_figure_goes_into_a_page():
    page = Page("Title")
    page.figure(curves({"one": [(0, 1), (1, 0.1)]}, x="x", y="y", log_y=True), "caption")
    assert "<svg" in page.html()


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingPackageError, match=r"-m pip install 'altair>=.*' 'vl-convert-python>="):
        curves({"one": [(0, 1)]}, x="x", y="y")


@pytest.mark.usefixtures("drawing")
def test_maps_share_a_scale_and_show_what_is_missing_in_grey():
    svg = heatmaps(
        [
            Panel("one", [[0.0, None], [0.5, 1.0]], ["first", "second"], ["q", "v"]),
            Panel("two", [[0.25, 0.5], [None, 2.0]]),
        ],
        x="matrix",
        y="layer",
        limits=(0, 1),
    )
    assert {"one", "two", "first", "second", "q", "v", "matrix", "layer", "1", "2"} <= set(texts(svg))
    assert svg.count(f'fill="{GREY}"') == 2
    hottest = "rgb(11, 93, 80)"
    assert svg.count(f'fill="{hottest}"') == 2  # 1.0 and what is above the limit
    alone = heatmaps([Panel("one", [[5.0, None], [5.5, 6.0]])])
    assert alone.count(f'fill="{hottest}"') == 1
    assert alone.count(f'fill="{GREY}"') == 1
