"""Axes, titles and menus of the figures of studies."""

import re

import pytest

from brushstroke.report.charts import lines, site_map
from brushstroke.report.figures import COLD, COOL, HOT
from brushstroke.studies.comparisons import compare_all
from brushstroke.studies.delta import COLUMNS, MEASURES
from brushstroke.studies.findings import Figure
from brushstroke.studies.page import file_name
from brushstroke.studies.tables import difference_figure

pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")


def axis_of_x(spec):
    (layer,) = [layer for layer in spec.get("layer", [spec]) if "x" in layer["encoding"]]
    return layer["encoding"]["x"]["axis"]


def test_few_places_have_a_tick_each():
    drawn = {"x": "tenth", "y": "share", "series": "arm", "x_title": "", "y_title": ""}
    shares = [{"tenth": n, "share": 0.1, "arm": "a"} for n in range(1, 11)]
    assert axis_of_x(lines(shares, **drawn))["values"] == [*range(1, 11)]
    ranks = [{**shares[0], "tenth": n} for n in (64, 1, 4, 1)]
    assert axis_of_x(lines(ranks, log_x=True, **drawn))["values"] == [1, 4, 64]
    many = [{**shares[0], "tenth": n} for n in range(40)]
    assert axis_of_x(lines(many, **drawn)) == {"tickMinStep": 1}
    assert axis_of_x(lines([*many, {**shares[0], "tenth": 0.5}], **drawn)) == {}


def test_differences_are_drawn_around_zero():
    compared = compare_all({"q": {0: 1.4, 1: 1.6, 2: 1.5}, "v": {0: 1.0, 1: 1.0, 2: 1.0}})
    (figure,) = difference_figure([compared], "targets")
    assert figure.name == "targets-differences"
    svg = vl_convert.vegalite_to_svg({**figure.spec, "width": 300})
    words = re.findall(r">([^<>]+)</text>", svg)
    assert "q less v" in words
    assert "0.0" in words  # the axis reaches it
    dashed = re.findall(r"<line[^>]*stroke-dasharray", svg)
    assert len(dashed) == 1
    assert difference_figure([], "targets") == []


def test_a_map_of_zeros_is_pale():
    records = [{"layer": "0", "matrix": name, "count": 0.0, "norm": n} for n, name in enumerate("qvo")]
    drawn = vl_convert.vegalite_to_svg(site_map(records, measures=("count", "norm")))
    assert drawn.count('fill="rgb(232, 241, 239)"') == 3
    other = vl_convert.vegalite_to_svg(site_map(records, measures=("norm", "count")))
    assert other.count('fill="rgb(11, 93, 80)"') == 1


@pytest.mark.parametrize(
    ("shown", "colours"),
    [("ratio", {0.4: COOL, 1.0: COLD, 1.6: HOT}), ("norm", {0.0: COLD, 2.0: HOT})],
)
def test_a_map_of_ratios_has_two_colours_around_one_and_other_maps_have_one(shown, colours):
    records = [{"layer": "0", "matrix": f"m{n}", shown: value} for n, value in enumerate(colours)]
    drawn = vl_convert.vegalite_to_svg(site_map(records, measures=(shown,), ratios=("ratio",)))
    found = re.findall(
        r'<path aria-label="matrix[^"]*; shown: ([\d.]+);[^"]*"[^>]*fill="rgb\(([^)]+)\)"', drawn
    )
    reported = {float(value): [int(part) for part in colour.split(",")] for value, colour in found}
    assert reported == {
        value: [int(colour[at : at + 2], 16) for at in (1, 3, 5)] for value, colour in colours.items()
    }


def test_letters_of_formulas_stay_in_names_of_files():
    assert file_name(Figure("How does ΔW relate to W?", "", {})) == "How-does-DeltaW-relate-to-W"
    assert file_name(Figure("φ(4, 8)", "", {})) == "phi-4-8"


def test_files_are_named_by_layer_matrix_and_measure():
    record = {"rank": "rank 4", "layer": "7", "matrix": "q", **dict.fromkeys(MEASURES, 1.0)}
    spec = site_map([record], measures=[*MEASURES], words=MEASURES, choose=("rank",))
    assert file_name(Figure("relation", "", spec)) == "relation-rank-4-over-chance"
    svg = vl_convert.vegalite_to_svg(spec)
    assert "rank 4" in svg
    assert "over chance" in svg
    curve = [{"arm": "a", "layer": "3", "matrix": "self_attn.q_proj", "i": 1, "sigma": 1.0}]
    drawn = {"x": "i", "y": "sigma", "series": "arm", "x_title": "i", "y_title": "σᵢ/σ₁ of ΔW"}
    spec = lines(curve, choose=("layer", "matrix"), **drawn)
    assert file_name(Figure("spectra", "", spec)) == "spectra-layer-3-self_attn.q_proj"
    words = re.findall(r">([^<>]+)</tspan>", vl_convert.vegalite_to_svg({**spec, "width": 300}))
    assert words == ["layer 3, self_attn.q_proj", "σᵢ/σ₁ of ΔW"]


def test_the_menu_of_measures_has_the_words_of_the_table():
    record = {"layer": "0", "matrix": "q", **dict.fromkeys(MEASURES, 1.0)}
    spec = site_map([record], measures=list(MEASURES), words=MEASURES)
    (menu,) = [param["bind"] for param in spec["params"] if param["name"] == "measure"]
    assert menu["options"] == list(MEASURES)
    assert menu["labels"] == list(MEASURES.values())
    assert {"over chance", "amplification", "‖ΔW‖", "‖W‖"} <= {*menu["labels"]} & {*COLUMNS}
    tips = [tip.get("title") for tip in spec["encoding"]["tooltip"]]
    assert tips[2:] == menu["labels"]
