"""What the figures of the studies say beside their marks."""

import pytest

from brushstroke.report.charts import lines, site_map
from brushstroke.studies.delta import COLUMNS, MEASURES

pytest.importorskip("altair")


def axis_of_x(spec):
    (layer,) = [layer for layer in spec.get("layer", [spec]) if "x" in layer["encoding"]]
    return layer["encoding"]["x"]["axis"]


def test_the_tenths_have_whole_ticks():
    shares = [{"tenth": n, "share": 0.1, "arm": "a"} for n in range(1, 11)]
    drawn = {"x": "tenth", "y": "share", "series": "arm", "x_title": "", "y_title": ""}
    assert axis_of_x(lines(shares, **drawn)) == {"tickMinStep": 1}
    assert axis_of_x(lines([{**shares[0], "tenth": 0.5}], **drawn)) == {}
    assert axis_of_x(lines(shares, log_x=True, **drawn)) == {}


def test_the_menu_of_measures_has_the_words_of_the_table():
    record = {"layer": "0", "matrix": "q", **dict.fromkeys(MEASURES, 1.0)}
    spec = site_map([record], measures=list(MEASURES), words=MEASURES)
    (menu,) = [param["bind"] for param in spec["params"] if param["name"] == "measure"]
    assert menu["options"] == list(MEASURES)
    assert menu["labels"] == list(MEASURES.values())
    assert {"over chance", "amplification", "‖ΔW‖", "‖W‖"} <= {*menu["labels"]} & {*COLUMNS}
    tips = [tip.get("title") for tip in spec["encoding"]["tooltip"]]
    assert tips[2:] == menu["labels"]
