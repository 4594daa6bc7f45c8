"""The page of a study on a phone: captions within the screen, whole ticks, words in the menus."""

import shutil

import pytest

from brushstroke.report import Page
from brushstroke.report.charts import lines, site_map
from brushstroke.studies.delta import MEASURES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = 390

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture
def tab(tmp_path):
    page = Page("A study")
    page.table([f"column {i}" for i in range(12)], [[f"cell {i}" for i in range(12)]], "Long words. " * 30)
    shares = [{"tenth": n, "share": 0.1 * (n % 3), "arm": "a"} for n in range(1, 11)]
    page.chart(lines(shares, x="tenth", y="share", series="arm", x_title="tenth", y_title="share"))
    records = [{"layer": str(n), "matrix": "q", **dict.fromkeys(MEASURES, n)} for n in range(3)]
    page.chart(site_map(records, measures=list(MEASURES), words=MEASURES))
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": PHONE, "height": 844}).new_page()
        tab.goto(page.write(tmp_path / "report.html").as_uri())
        drawn = "[...document.querySelectorAll('[data-spec]')].every(e => e.dataset.drawn === 'yes')"
        tab.wait_for_function(drawn, timeout=20_000)
        yield tab
        browser.close()


def test_a_page_on_a_phone(tab):
    box = tab.locator("caption").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE
    assert tab.locator("table").bounding_box()["width"] > PHONE  # so that it is not the table that is narrow
    ticks = tab.locator(".chart").nth(0).locator(".mark-text.role-axis-label").first.locator("text")
    assert all(text.isdigit() for text in ticks.all_text_contents())
    assert ticks.count() > 2
    menu = tab.locator(".chart").nth(1).locator("select")
    assert menu.locator("option").all_text_contents() == list(MEASURES.values())
