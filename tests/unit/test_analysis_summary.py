"""The tables by kind of matrix and by layer, and the sentence of each analysis."""

from statistics import fmean, stdev

import pytest
import torch

from brushstroke.adapter import Adapter
from brushstroke.analysis import intruders, relate, spectrum, subspace
from brushstroke.analysis.summaries import (
    intruder_summary,
    overlap_summary,
    relation_summary,
    spectrum_summary,
)
from brushstroke.analysis.summary import Measure, average, with_deviation
from brushstroke.analysis.text_tables import intruder_listing, number
from brushstroke.lowrank import LowRank
from brushstroke.studies.findings import apart

KINDS = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "kovq"))
IN_ORDER = ["q_proj", "v_proj", "o_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]


def update(d=12, h=9, r=3):
    return LowRank(torch.randn(d, r).double(), torch.randn(r, h).double(), 0.5)


def model(layers, kinds=KINDS):
    return Adapter({f"model.layers.{n}.{kind}": update() for n in range(layers) for kind in kinds})


def weights(adapter):
    return {site: torch.randn(one.shape).double() for site, one in adapter.items()}


def means(parts, name):
    return {part.name: part.averages[name].mean for part in parts}


def test_kinds_and_layers_are_in_reading_order():
    found = spectrum_summary("a", spectrum(model(11)))
    assert [part.name for part in found.matrices] == IN_ORDER
    assert [part.name for part in found.layers] == [str(n) for n in range(11)]
    assert {part.sites for part in found.matrices} == {11}
    assert {part.sites for part in found.layers} == {7}
    assert found.ranges == found.layers


def test_means_and_deviations_are_those_of_the_sites():
    result = spectrum(model(5))
    found = spectrum_summary("a", result)
    norms = [result[f"model.layers.{n}.self_attn.v_proj"].norm for n in range(5)]
    average_of_v = found.matrices[1].averages["norm"]
    assert average_of_v.mean == pytest.approx(fmean(norms))
    assert average_of_v.sd == pytest.approx(stdev(norms))
    assert average_of_v.total == pytest.approx(sum(norms))
    ranks = [result[f"model.layers.2.{kind}"].stable_rank for kind in KINDS]
    assert means(found.layers, "stable_rank")["2"] == pytest.approx(fmean(ranks))


def test_many_layers_are_ranges_for_people_and_all_of_them_for_programs():
    result = spectrum(model(31, ("q", "v")))
    found = spectrum_summary("a", result)
    assert [part.name for part in found.ranges] == ["0–9", "10–20", "21–30"]
    assert [part.sites for part in found.ranges] == [20, 22, 20]
    first = [result[f"model.layers.{n}.{kind}"].norm for n in range(10) for kind in ("q", "v")]
    assert found.ranges[0].averages["norm"].mean == pytest.approx(fmean(first))
    assert [row["layer"] for row in found.as_dict()["layers"]] == [str(n) for n in range(31)]
    assert found.listings()["layers"].columns[0] == "layers"


def test_sites_outside_of_layers_have_a_separate_row():
    adapter = Adapter({"lm_head": update(), **model(2, ("q",))})
    found = spectrum_summary("a", spectrum(adapter))
    assert [part.name for part in found.layers] == ["–", "0", "1"]
    assert {part.name for part in found.matrices} == {"lm_head", "q"}
    plain = spectrum_summary("a", spectrum(Adapter({"fc1": update(), "fc2": update()})))
    assert [part.name for part in plain.matrices] == ["fc1", "fc2"]
    assert list(plain.listings()) == ["matrices"]


def test_experts_are_of_one_kind_and_numbered_modules_too():
    sites = [
        f"layers.{n}.mlp.experts.{e}.{kind}" for n in range(2) for e in range(20) for kind in ("w1", "w2")
    ]
    found = spectrum_summary("a", spectrum(Adapter({site: update() for site in sites})))
    assert [(part.name, part.sites) for part in found.matrices] == [("w1", 40), ("w2", 40)]
    plain = spectrum_summary("a", spectrum(Adapter({"0": update(), "2": update()})))
    assert [(part.name, part.sites) for part in plain.matrices] == [("all", 2)]
    assert [part.name for part in plain.layers] == ["0", "2"]


def test_one_site_has_no_deviation():
    found = spectrum_summary("a", spectrum(Adapter({"fc": update()})))
    assert found.matrices[0].averages["norm"].sd is None
    assert "±" not in " ".join(found.listings()["matrices"].rows[0])
    assert "over 1 site;" in found.sentence


def test_numbers_have_their_chance_level():
    adapter, other = model(3), model(3)
    overlap = subspace(adapter, other)
    found = overlap_summary(("a", "b"), overlap)
    assert {part.averages["left"].chance for part in found.matrices} == {3 / 12}
    assert {part.averages["right"].chance for part in found.matrices} == {3 / 9}
    assert {part.averages["cosine"].chance for part in found.matrices} == {0.0}
    shared = fmean(float(row.left[2, 2]) for row in overlap.values())
    assert f"share {shared:.3f} of their input directions (chance 0.250)" in found.sentence
    assert f"their cosine is {overlap.cosine:.4f} (chance 0)" in found.sentence
    assert "left chance" in found.listings()["matrices"].columns
    W = weights(adapter)
    relation = relate(adapter, W)
    summary = relation_summary("a", relation)
    for part in summary.matrices:
        rows = [row for site, row in relation.items() if site.endswith(part.name)]
        assert part.averages["amplification"].chance == pytest.approx(
            fmean(row.amplification_random for row in rows)
        )
        assert part.averages["ratio_to_chance"].chance == 1
    assert f"{relation.totals()['ratio_to_chance']:.4g} times what it does in random" in summary.sentence


def test_zero_updates_have_no_rank():
    zero = LowRank(torch.randn(12, 2).double(), torch.zeros(2, 9).double())
    adapter = Adapter(
        {"layers.0.q": update(), "layers.0.v": zero, "layers.1.q": update(), "layers.1.v": zero}
    )
    found = spectrum_summary("a", spectrum(adapter))
    assert means(found.matrices, "effective_rank")["v"] is None
    assert means(found.matrices, "norm")["v"] == 0
    assert found.layers[0].averages["energy_rank_99"].sites == 1
    assert "over 2 sites (2 more are zero)" in found.sentence
    W = weights(adapter)
    assert "over 2 sites (2 more are zero)" in relation_summary("a", relate(adapter, W)).sentence
    nothing = Adapter({"layers.0.q": zero, "layers.1.q": zero})
    assert "changes nothing: its update is zero at all 2 sites" in (
        spectrum_summary("a", spectrum(nothing)).sentence
    )
    summary = relation_summary("a", relate(nothing, W))
    assert "amplifies nothing: its update is zero at all 2 sites" in summary.sentence
    assert summary.listings()["matrices"].rows == [["q", "2", "–", "–", "–"]]


def test_infinite_amplification_breaks_no_table():
    W = torch.diag(torch.tensor([3.0, 0, 0, 0]).double())
    outside = LowRank(torch.eye(4)[:, 1:2].double(), torch.eye(4)[2:3].double())
    found = relation_summary(
        "a", relate(Adapter({"l.0.q": outside, "l.1.q": outside}), dict.fromkeys(("l.0.q", "l.1.q"), W))
    )
    (row,) = found.listings()["matrices"].rows
    assert row[2] == "inf"
    assert found.as_dict()["matrices"][0]["amplification"]["mean"] is None


def test_intruders_are_counted_by_kind():
    adapter = model(4, ("q", "v"))
    strong = Adapter(
        {site: 100.0 * one if site.endswith("q") else 0.0 * one for site, one in adapter.items()}
    )
    W = weights(adapter)
    result = intruders(strong, W, top=2, threshold=0.9)
    found = intruder_summary("a", result)
    q, v = (part.averages["intruders"] for part in found.matrices)
    assert (q.total + v.total, v.total) == (result.count(), 0)
    assert found.sentence.startswith(
        f"{result.count()} of the 16 strongest directions of W + a are intruders"
    )
    none = intruder_summary("a", intruders(Adapter({site: 0.0 * one for site, one in adapter.items()}), W))
    assert none.sentence.startswith("None of the")


@pytest.mark.parametrize(
    ("mean", "sd", "expected"),
    [
        (1234.56, 123.4, "1235 ± 123"),
        (1e-8, 2e-9, "1e-08 ± 2e-09"),
        (3e9, 1e8, "3e+09 ± 1e+08"),
        (0.0, 0.0, "0 ± 0"),
        (0.1 + 0.2, 1e-17, "0.3 ± 0"),
    ],
)
def test_a_mean_has_the_digits_of_its_deviation(mean, sd, expected):
    assert with_deviation(mean, sd, ".3g") == expected


def test_a_rounded_zero_has_no_sign():
    assert with_deviation(-0.0004, 0.009, ".3f") == "0.000 ± 0.009"
    assert number(-0.0004, ".3f") == "0.000"
    assert apart([-0.0001, -0.3], 3, "f") == ["0.000", "-0.300"]


def test_missing_values_are_left_out_of_means():
    found = average(Measure("x", "x", lambda row: row, chance=lambda row: row / 2), [None, 2, None, 4])
    assert (found.sites, found.mean, found.chance) == (2, 3, 1.5)
    assert average(Measure("x", "x", lambda row: row), [None]).mean is None


@pytest.mark.parametrize(("d", "h"), [(60, 90), (90, 60)], ids=["wide", "tall"])
def test_verdicts_speak_of_every_singular_vector_of_a_large_weight_too(d, h):
    W, adapter = {"q": torch.randn(d, h)}, Adapter({"q": update(d, h)})
    large = intruder_summary("a", intruders(adapter, W, dense_limit=0)).sentence
    whole = intruder_summary("a", intruders(adapter, W)).sentence
    for sentence in (large, whole):
        assert "with every singular vector of W)" in sentence


def test_weak_directions_of_a_large_weight_that_became_strong_are_undecided():
    left, right = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64)).Q for n in (60, 90))
    W = (left * torch.logspace(0, -4, 60).double()) @ right.mT
    adapter = Adapter({"q": LowRank(left[:, 55:58], right[:, 55:58].mT, 5.0)})
    found = intruders(adapter, {"q": W.float()}, top=3, dense_limit=0)
    reported = intruder_summary("a", found)
    assert reported.sentence.startswith("None of the 3 strongest directions")
    assert reported.sentence.endswith("; 3 undecided.")
    assert reported.matrices[0].averages["undecided"].total == 3
    assert found.as_dict()["undecided"] == 3
    assert [row[-1] for row in intruder_listing(found).rows] == ["undecided"] * 3
