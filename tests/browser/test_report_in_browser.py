"""The report of a study in a headless browser: drawn, quiet, offline, with menus that work."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "endtoend"))
from cli_kit import PLAIN, rows, write_base, write_rows

from brushstroke.cli import main
from brushstroke.report import Page
from brushstroke.report.charts import dots, grids, lines, site_map

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


def page_with_all_figures() -> Page:
    page = Page("All figures", "One of each kind.")
    page.section("Figures")
    page.chart(
        dots(
            [{"arm": "q", "loss": 1.0, "low": 0.9, "high": 1.1}, {"arm": "v", "loss": 2.0}],
            name="arm",
            value="loss",
            title="loss",
        ),
        "Dots.",
    )
    curve = [
        {"arm": arm, "layer": layer, "matrix": "q", "i": i, "sigma": 1.0 / (i + int(layer) + len(arm))}
        for arm in ("a", "bb")
        for layer in ("0", "1")
        for i in range(1, 6)
    ]
    page.chart(
        lines(
            curve,
            x="i",
            y="sigma",
            series="arm",
            x_title="i",
            y_title="σ",
            log_x=True,
            log_y=True,
            choose=("layer", "matrix"),
        ),
        "Lines.",
    )
    cells = [
        {
            "layer": layer,
            "matrix": "q",
            "panel": panel,
            "cells": [[0.1 * (i + j + int(layer)) % 1 for j in range(16)] for i in range(4)],
        }
        for layer in ("0", "1")
        for panel in ("one", "two")
    ]
    page.chart(grids(cells, x_title="j", y_title="i", choose=("layer", "matrix")), "Grids.")
    places = [
        {"layer": str(layer), "matrix": matrix, "norm": layer + len(matrix), "ratio": 1.0 / (1 + layer)}
        for layer in range(3)
        for matrix in ("q", "vv")
    ]
    page.chart(site_map(places, measures=("norm", "ratio")), "A map.")
    return page


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def look(browser, file, width, scheme="light"):
    """The opened page, what its console said, what it asked the network for."""
    said, asked = [], []
    size = {"width": WIDTHS[width][0], "height": WIDTHS[width][1]}
    tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    drawn = "[...document.querySelectorAll('[data-spec]')].every(e => e.dataset.drawn === 'yes')"
    tab.wait_for_function(drawn, timeout=20_000)
    return tab, said, asked


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_without_network_or_complaint(browser, tmp_path, width, scheme):
    file = page_with_all_figures().write(tmp_path / "report.html")
    tab, said, asked = look(browser, file, width, scheme)
    assert said == []
    assert asked == [file.as_uri()]
    assert tab.locator(".chart svg").count() == 4
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # only figures scroll
    picture = tmp_path / f"{width}-{scheme}.png"
    tab.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000


def test_menus_redraw_the_figures(browser, tmp_path):
    file = page_with_all_figures().write(tmp_path / "report.html")
    tab, said, _ = look(browser, file, "desktop")
    for index, figure in ((1, "lines"), (2, "grids")):
        chart = tab.locator(".chart").nth(index)
        before = chart.locator("svg").inner_html()
        chart.locator("select").first.select_option("1")
        tab.wait_for_timeout(300)
        assert chart.locator("svg").inner_html() != before, figure
    corner = tab.locator(".chart").nth(2)
    whole = corner.locator("svg").inner_html()
    corner.locator("input[type=checkbox]").check()
    tab.wait_for_timeout(300)
    assert corner.locator("svg").inner_html() != whole
    measure = tab.locator(".chart").nth(3)
    before = measure.locator("svg").inner_html()
    measure.locator("select").select_option("ratio")
    tab.wait_for_timeout(300)
    assert measure.locator("svg").inner_html() != before
    assert said == []


@pytest.mark.slow
def test_the_report_of_a_study(browser, tmp_path):
    base, data = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", rows(40))
    others = write_rows(tmp_path / "others.jsonl", rows(40, "Elm"))
    words = (
        "study",
        "seeds",
        base,
        data,
        "--other",
        others,
        "--out",
        tmp_path / "out",
        *PLAIN,
        "--max-steps",
        "3",
    )
    words += ("--rank", "2", "--targets", "q_proj,v_proj", "--learning-rates", "1e-4,1e-2,1", "--seeds", "2")
    assert main([str(word) for word in words]) == 0
    file = tmp_path / "out" / "report.html"
    assert file.stat().st_size < 5_000_000
    for width in WIDTHS:
        tab, said, asked = look(browser, file, width)
        assert said == []
        assert asked == [file.as_uri()]
        chart = tab.locator(".chart").first
        menus = chart.locator("select")
        assert menus.count() == 2
        before = chart.locator("svg").inner_html()
        menus.nth(0).select_option("1")
        menus.nth(1).select_option("v_proj")
        tab.wait_for_timeout(300)
        assert chart.locator("svg").inner_html() != before
        tab.screenshot(path=tmp_path / f"study-{width}.png", full_page=True)
