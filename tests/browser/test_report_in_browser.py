"""The report of a study in a headless browser: figures are drawn offline, without errors, and menus work."""

import base64
import functools
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "endtoend"))
from cli_kit import PLAIN, rows, write_base, write_rows

from brushstroke.adapter import Adapter
from brushstroke.analysis import intruders, relate, spectrum, subspace
from brushstroke.cli import main
from brushstroke.lowrank import LowRank
from brushstroke.report import Page, heatmap
from brushstroke.report.analysis import intruder_page, overlap_page, relation_page, spectrum_page
from brushstroke.report.charts import dots, lines, overlaps, site_map
from brushstroke.report.figures import Panel

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

RED = """async png => {  // the red channel of a picture's middle
    const image = new Image();
    image.src = "data:image/png;base64," + png;
    await image.decode();
    const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
    context.drawImage(image, 0, 0);
    return context.getImageData(image.width / 2, image.height / 2, 1, 1).data[0];
}"""

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
            "matrices": "q and v",
            "panel": panel,
            "cells": [[0.1 * (i + j + int(layer)) % 1 for j in range(64)] for i in range(8)],
            "n": 100,
            "corner": panel != "random pair",
        }
        for layer in ("0", "1")
        for panel in ("q", "v", "random pair")
    ]
    spec = overlaps(cells, x_title="j", y_title="i", measure="ΔW", choose=("layer", "matrices"), corner=True)
    page.chart(spec, "Grids.")
    places = [
        {"layer": str(layer), "matrix": matrix, "norm": layer + len(matrix), "ratio": 1.0 / (1 + layer)}
        for layer in range(3)
        for matrix in ("q", "vv")
    ]
    page.chart(site_map(places, measures=("norm", "ratio")), "A map.")
    zeros = Panel("intruders", [[0, 0]] * 3, ["0", "1", "2"], ["q_proj", "v_proj"])
    scores = Panel("z", [[-1.0, 2.0]] * 3, ["0", "1", "2"], ["q_proj", "v_proj"])
    drawn = [heatmap(zeros, y="layer"), heatmap(scores, y="layer", middle=0)]
    page.maps([(svg, "Maps beside each other.") for svg in drawn])
    page.table(["site", "norm"], [[f"site {n}", n] for n in range(30)], "Many rows.")
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


@pytest.fixture(scope="module")
def all_figures(tmp_path_factory):
    """The file of the page."""
    return page_with_all_figures().write(tmp_path_factory.mktemp("figures") / "report.html")


@pytest.fixture(scope="module")
def opened(browser, all_figures):
    """The page, opened once at each width and in each theme, for the tests that change nothing in it."""
    return functools.cache(lambda width, scheme: look(browser, all_figures, width, scheme))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_without_network_or_error(opened, all_figures, tmp_path, width, scheme):
    tab, said, asked = opened(width, scheme)
    assert said == []
    assert asked == [all_figures.as_uri()]
    assert tab.locator(".chart svg").count() == 4
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # only figures scroll
    picture = tmp_path / f"{width}-{scheme}.png"
    tab.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000


def summary_pages() -> dict[str, Page]:
    """Pages of an adapter with long names and numbers of many digits."""
    d, h = 48, 64
    places = [
        f"model.language_model.layers.{layer}.{place}"
        for layer in range(3)
        for place in ("self_attn.q_proj", "mlp.a_projection_with_a_very_long_name_of_its_own_in_proj_qkvz")
    ]
    base = {site: torch.randn(d, h) for site in places}
    one, two = (
        Adapter({site: LowRank(12345.678 * torch.randn(d, 4), torch.randn(4, h), 0.5) for site in places})
        for _ in range(2)
    )
    names = ("an-adapter-with-a-long-name", "another-adapter-with-a-long-name")
    return {
        "spectrum": spectrum_page({names[0]: spectrum(one, base)}),
        "compare": overlap_page(subspace(one, two), names),
        "relate": relation_page(relate(one, base), names[0]),
        "intruders": intruder_page(intruders(one, base), names[0]),
    }


def test_summary_tables_fit_a_phone(browser, tmp_path):
    for name, page in summary_pages().items():
        file = page.write(tmp_path / f"{name}.html")
        tab, _, _ = look(browser, file, "phone")
        tab.set_viewport_size({"width": 375, "height": 800})
        tables = tab.locator(".scroll:has(caption:has-text('standard deviation'))")
        assert tables.count() == 2
        for table in tables.all():
            assert table.evaluate("e => e.scrollWidth <= e.clientWidth"), name
            assert table.locator("td").first.evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 11
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        tab.screenshot(path=tmp_path / f"{name}.png", full_page=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_maps_are_side_by_side_on_wide_pages(opened, width):
    tab, _, _ = opened(width, "light")
    maps = [box.bounding_box() for box in tab.locator(".maps svg").all()]
    grids = tab.locator(".chart").nth(2)
    titles = [grids.get_by_text(name, exact=True).bounding_box() for name in ("q", "v")]
    for first, second in (maps, titles):
        beside = abs(first["y"] - second["y"]) < 2 and second["x"] > first["x"] + 100
        assert beside is (width == "desktop")
    for svg in tab.locator(".map svg").all():
        assert svg.bounding_box()["width"] <= tab.locator("body").bounding_box()["width"]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_label_is_smaller_than_11_pixels(opened, width):
    tab, _, _ = opened(width, "light")
    sizes = tab.locator("svg text").evaluate_all("""all => all.filter(e => e.textContent).map(e => {
        const m = e.getScreenCTM();
        return Math.hypot(m.a, m.b) * parseFloat(getComputedStyle(e).fontSize);
    })""")
    assert len(sizes) > 100
    assert min(sizes) >= 11 - 1e-3


def test_maps_are_dark_in_the_dark_theme(opened):
    """The weakest colour is near the page's own in either theme: it is what most cells have."""
    for scheme, dark in (("light", False), ("dark", True)):
        tab, _, _ = opened("desktop", scheme)
        cell = tab.locator(".maps svg").first.locator("path[fill^='rgb(232']").first
        red = tab.evaluate(RED, base64.b64encode(cell.screenshot()).decode())
        assert (red < 70) is dark
        assert (red > 200) is not dark


def test_long_tables_are_folded(browser, all_figures):
    tab, _, _ = look(browser, all_figures, "phone")
    last = tab.get_by_text("site 29")
    assert not last.is_visible()
    tab.locator("summary").click()
    assert last.is_visible()


def test_menus_redraw_the_figures(browser, all_figures):
    tab, said, _ = look(browser, all_figures, "desktop")
    for index, figure in ((1, "lines"), (2, "grids")):
        chart = tab.locator(".chart").nth(index)
        before = chart.locator("svg").inner_html()
        chart.locator("select").first.select_option("1")
        tab.wait_for_timeout(300)
        assert chart.locator("svg").inner_html() != before, figure
    measure = tab.locator(".chart").nth(3)
    before = measure.locator("svg").inner_html()
    measure.locator("select").select_option("ratio")
    tab.wait_for_timeout(300)
    assert measure.locator("svg").inner_html() != before
    assert said == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_two_adapters_asks_no_network(browser, tmp_path, width):
    generator = torch.Generator().manual_seed(0)
    ones, twos = (
        Adapter(
            {
                f"layers.{layer}.self_attn.{name}_proj": LowRank(
                    torch.randn(24, rank, generator=generator), torch.randn(rank, 24, generator=generator)
                )
                for layer in range(2)
                for name in "kqv"
            }
        )
        for rank in (2, 5)
    )
    file = overlap_page(subspace(ones, twos), ("small", "large")).write(tmp_path / "page.html")
    tab, said, asked = look(browser, file, width)
    assert said == []
    assert asked == [file.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    chart = tab.locator(".chart").first
    assert chart.get_by_text("q_proj, lower-left corner").is_visible()
    chart.locator("select").nth(1).select_option("k_proj")
    assert chart.get_by_text("k_proj, lower-left corner").is_visible()


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
        assert menus.nth(1).locator("option").all_text_contents() == ["q_proj and v_proj"]
        tab.wait_for_timeout(300)
        assert chart.locator("svg").inner_html() != before
        tab.screenshot(path=tmp_path / f"study-{width}.png", full_page=True)
