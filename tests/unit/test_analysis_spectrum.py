"""Spectra, ranks and truncation of adapters."""

import math

import pytest
import torch

import brushstroke as bs
from brushstroke.analysis import arrange, fit_budget, keep_energy, relate, spectrum, subspace
from brushstroke.analysis.text_tables import rank_advice, spectrum_listing
from brushstroke.errors import ConfigError, ShapeError
from brushstroke.lowrank import LowRank
from brushstroke.studies.delta import map_records

EXACT = 1e-12
DENSE_FLOAT32 = 2e-6  # relative error of the dense decomposition itself
FROM_FLOAT32 = 1e-6  # relative error of sigma for factors stored in float32


def with_spectrum(d: int, h: int, sigma: list[float], dtype=torch.float64) -> LowRank:
    """An update of this spectrum, hidden by a random invertible core."""
    k = len(sigma)
    left, right = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (d, h))
    core = torch.randn(k, k, dtype=torch.float64) + 3 * torch.eye(k, dtype=torch.float64)
    values = torch.diag(torch.tensor(sigma, dtype=torch.float64))
    return LowRank((left @ core).to(dtype), (torch.linalg.solve(core, values) @ right.mT / 2).to(dtype), 2.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, FROM_FLOAT32)])
def test_the_known_spectrum_and_its_ranks(dtype, tolerance):
    row = spectrum(bs.Adapter({"a": with_spectrum(30, 20, [4.0, 2.0, 1.0], dtype)}))["a"]
    torch.testing.assert_close(
        row.sigma, torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), rtol=tolerance, atol=0
    )
    assert row.shape == (30, 20)
    assert row.norm == pytest.approx(math.sqrt(21), rel=tolerance)
    assert row.stable_rank == pytest.approx(21 / 16, rel=10 * tolerance)
    entropy = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7))
    assert row.effective_rank == pytest.approx(math.exp(entropy), rel=10 * tolerance)
    assert [row.energy_rank(share) for share in (0.5, 0.90, 0.97, 1.0)] == [1, 2, 3, 3]
    assert row.relative_norm is None


@pytest.mark.parametrize("r", [1, 8, 64])
def test_dense_decomposition_in_float32_agrees(r):
    update = LowRank(torch.randn(320, r), torch.randn(r, 256), 0.25)
    dense = torch.linalg.svd(update.dense(), full_matrices=False).S[:r].double()
    sigma = spectrum(bs.Adapter({"a": update}))["a"].sigma
    assert ((sigma - dense) / sigma).abs().max() < DENSE_FLOAT32


@pytest.mark.parametrize(("d", "r", "h"), [(5, 1, 7), (4, 9, 3), (1, 2, 1)])
def test_ranks_of_one_and_above_the_width(d, r, h):
    update = LowRank(torch.randn(d, r), torch.randn(r, h))
    row = spectrum(bs.Adapter({"a": update}))["a"]
    dense = torch.linalg.svdvals(update.U.double() @ update.V.double())[: min(d, r, h)]
    torch.testing.assert_close(row.sigma, dense, rtol=1e-9, atol=1e-12)


def test_a_zero_update_has_no_rank_and_no_nan():
    row = spectrum(bs.Adapter({"a": LowRank(torch.randn(5, 2), torch.zeros(2, 4))}))["a"]
    assert row.sigma.tolist() == [0, 0]
    assert (row.norm, row.stable_rank, row.effective_rank) == (0, 0, 0)
    assert (row.energy_rank(0.99), row.numerical_rank) == (0, 0)


def test_rank_deficient_factors():
    row = spectrum(bs.Adapter({"a": with_spectrum(9, 8, [3.0, 0.0, 0.0])}))["a"]
    assert row.numerical_rank == 1
    assert row.stable_rank == pytest.approx(1)


def test_norms_relative_to_the_base():
    adapter = bs.Adapter({"a": with_spectrum(6, 5, [3.0, 4.0])})
    W = torch.full((6, 5), 2.0)
    found = spectrum(adapter, {"a": W})
    assert found["a"].norm_base == pytest.approx(2 * math.sqrt(30))
    assert found["a"].relative_norm == pytest.approx(5 / (2 * math.sqrt(30)))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 5)})
    assert spectrum(adapter, model)["a"].norm_base == pytest.approx(
        float(model["a"].weight.detach().norm()), rel=1e-6
    )


@pytest.mark.usefixtures("unchecked")
def test_a_base_that_does_not_fit_is_refused():
    adapter = bs.Adapter({"layer.q": with_spectrum(6, 5, [1.0])})
    with pytest.raises(ShapeError, match="transpose"):
        spectrum(adapter, {"layer.q": torch.ones(5, 6)})
    with pytest.raises(ShapeError, match=r"lacks 1 of 1.*\n.*did you mean 'layer\.v'"):
        spectrum(adapter, {"layer.v": torch.ones(6, 5)})


def test_truncation_keeps_the_energy():
    adapter = bs.Adapter(
        {"a": with_spectrum(20, 20, [4.0, 2.0, 1.0]), "b": with_spectrum(20, 20, [5.0, 0.1, 0.1])}
    )
    found = spectrum(adapter)
    cut = keep_energy(found, 0.95)
    assert dict(cut.ranks) == {"a": 2, "b": 1}
    assert cut.loss == pytest.approx(math.sqrt(1 + 0.02), rel=1e-9)
    got = cut.apply(adapter)
    assert (adapter - got).norm() == pytest.approx(cut.loss, rel=1e-6)
    assert cut.relative_loss == pytest.approx(cut.loss / adapter.norm())
    assert cut.relative_loss <= math.sqrt(0.05)
    assert got.parameters == cut.parameters == 3 * 40
    assert cut.parameters_before == adapter.parameters == 6 * 40


def test_the_advice_is_by_kind_of_matrix_and_of_most_sites():
    spectra = [[4.0, 2.0, 1.0], *[[5.0, 0.1, 0.1]] * 9]
    adapter = bs.Adapter(
        {
            **{f"layers.{n}.q": with_spectrum(20, 20, sigma) for n, sigma in enumerate(spectra)},
            **{f"layers.{n}.v": with_spectrum(20, 20, [3.0, 2.0]) for n in range(10)},
        }
    )
    found = spectrum(adapter)
    assert found.advised_ranks() == found.as_dict()["advised_ranks_99"] == {"q": 1, "v": 2}
    assert rank_advice(found).startswith("rank 1 for q; rank 2 for v: keeps 99 %")
    assert found.advised_ranks(quantile=1) == {"q": 3, "v": 2}
    assert found.advised_ranks(0.9, quantile=1) == {"q": 2, "v": 2}
    for quantile in (0, 1.1):
        with pytest.raises(ConfigError, match="quantile"):
            found.advised_ranks(quantile=quantile)


def test_zero_updates_get_no_advice():
    zero = LowRank(torch.randn(9, 2), torch.zeros(2, 9))
    some = bs.Adapter({"layers.0.q": zero, "layers.0.v": with_spectrum(9, 9, [1.0]), "layers.1.v": zero})
    assert spectrum(some).advised_ranks() == {"v": 1}
    assert rank_advice(spectrum(some)).startswith("rank 1: keeps")
    assert spectrum(bs.Adapter({"layers.0.q": zero})).advised_ranks() == {}
    assert rank_advice(spectrum(bs.Adapter({"layers.0.q": zero}))) == ""


def test_all_experts_get_one_advice():
    one = LowRank(torch.eye(4, 1), torch.ones(1, 3))
    two = LowRank(torch.eye(4, 2), torch.eye(2, 3))
    sites = {"layers.0.mlp.experts.0.up": one, "layers.0.mlp.experts.1.up": two, "layers.0.attn.q": one}
    assert spectrum(bs.Adapter(sites)).advised_ranks() == {"q": 1, "up": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_factors_is_not_rank(dtype):
    """Rank 3 in factors of 8 columns; rounding gives them rank 8."""
    generator = torch.Generator().manual_seed(3)
    U, V = (torch.randn(*shape, generator=generator).double() for shape in ((400, 3), (3, 300)))
    mix = torch.randn(3, 8, generator=generator).double()
    true, W = LowRank(U, V), torch.randn(400, 300, generator=generator)
    stored = LowRank(U @ mix, torch.linalg.pinv(mix) @ V).to(dtype)
    row, exact = spectrum(bs.Adapter({"q": stored}))["q"], spectrum(bs.Adapter({"q": true}))["q"]
    assert row.numerical_rank == exact.numerical_rank == 3
    assert row.effective_rank == pytest.approx(exact.effective_rank, rel=0.02)
    relation, known = (relate(bs.Adapter({"q": update}), {"q": W})["q"] for update in (stored, true))
    assert relation.rank == 3
    assert relation.amplification == pytest.approx(known.amplification, rel=0.02)
    pair = subspace(bs.Adapter({"q": stored}), bs.Adapter({"q": true}))["q"]
    assert pair.ranks == (3, 3)
    assert float(pair.left[2, 2]) == pytest.approx(1, abs=1e-3)
    alone = subspace(bs.Adapter({"q": stored}), bs.Adapter({"q": stored}), of="U")["q"]
    assert alone.ranks == (3, 3)


def test_the_budget_buys_the_best_ranks_of_all_sites():
    """Against every other choice of ranks, on sites of one shape."""
    sigmas = {"a": [4.0, 3.0, 0.5], "b": [2.0, 1.9, 1.8], "c": [0.1, 0.05, 0.01]}
    adapter = bs.Adapter({site: with_spectrum(9, 7, sigma) for site, sigma in sigmas.items()})
    found = spectrum(adapter)
    for ranks in range(1, 10):
        cut = fit_budget(found, ranks * 16 + 15)
        assert sum(cut.ranks.values()) == ranks
        pooled = sorted((s for sigma in sigmas.values() for s in sigma), reverse=True)
        assert cut.loss == pytest.approx(math.sqrt(sum(s * s for s in pooled[ranks:])), rel=1e-9, abs=1e-9)
        assert cut.parameters <= ranks * 16 + 15
    small = fit_budget(found, 4 * 16)
    assert small.left_out == ("c",)
    assert set(small.apply(adapter)) == {"a", "b"}


def test_the_budget_weighs_the_cost_of_a_site():
    adapter = bs.Adapter({"wide": with_spectrum(200, 200, [20.0]), "thin": with_spectrum(4, 4, [1.0])})
    assert dict(fit_budget(spectrum(adapter), 400).ranks) == {"wide": 1, "thin": 0}
    dear = spectrum(bs.Adapter({"wide": with_spectrum(200, 200, [2.0]), "thin": with_spectrum(4, 4, [1.0])}))
    assert dict(fit_budget(dear, 400).ranks) == {"wide": 0, "thin": 1}
    assert dict(fit_budget(spectrum(adapter), 399).ranks) == {"wide": 0, "thin": 1}
    assert dict(fit_budget(spectrum(adapter), 408).ranks) == {"wide": 1, "thin": 1}


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, math.nan])
def test_invalid_energy_shares_are_refused(share):
    found = spectrum(bs.Adapter({"a": with_spectrum(4, 4, [1.0])}))
    with pytest.raises(ConfigError, match="share"):
        keep_energy(found, share)


def test_too_small_budgets_are_refused():
    found = spectrum(bs.Adapter({"a": with_spectrum(4, 4, [1.0])}))
    with pytest.raises(ConfigError, match="too small for one rank; give at least 8"):
        fit_budget(found, 7)
    zero = spectrum(bs.Adapter({"a": LowRank(torch.ones(3, 1), torch.zeros(1, 3))}))
    with pytest.raises(ConfigError, match="zero at every site"):
        keep_energy(zero)


def test_sites_as_a_map():
    sites = [f"model.layers.{n}.{m}" for n in (0, 2, 10) for m in ("attn.q", "mlp.0.up")] + ["head"]
    grid = arrange(sites)
    assert grid.layers == ("", "0", "2", "10")
    assert grid.matrices == ("attn.q", "mlp.0.up", "head")
    assert grid.sites["10", "mlp.0.up"] == "model.layers.10.mlp.0.up"
    assert sorted(grid.sites.values()) == sorted(sites)
    assert list(grid.sites.values())[:3] == ["head", "model.layers.0.attn.q", "model.layers.0.mlp.0.up"]
    two = arrange(["encoder.0.q", "decoder.0.q"])
    assert len(two.matrices) == 2
    assert len(two.sites) == 2


def test_tables_of_sites_begin_with_q_and_v():
    kinds = ("mlp.down_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    sites = [f"model.layers.{layer}.{kind}" for layer in (10, 2) for kind in kinds]
    adapter = bs.Adapter({site: with_spectrum(4, 4, [1.0]) for site in sites})
    found, related = spectrum(adapter), relate(adapter, {site: torch.eye(4) for site in sites})
    shown = [
        f"model.layers.{layer}.{kind}"
        for layer in (2, 10)
        for kind in (*(f"self_attn.{name}_proj" for name in "qvok"), "mlp.down_proj")
    ]
    assert [row[0] for row in spectrum_listing(found).rows] == shown
    assert [row["site"] for row in found.as_dict()["sites"]] == shown
    records = map_records("rank 1", related)
    assert [*dict.fromkeys(row["matrix"] for row in records)] == [
        *(f"{name}_proj" for name in "qvok"),
        "down_proj",
    ]
    assert [row["layer"] for row in records[:2]] == ["2", "10"]


def test_results_are_plain_data():
    import json

    reported = spectrum(bs.Adapter({"a": with_spectrum(4, 3, [1.0])}), {"a": torch.zeros(4, 3)}).as_dict()
    assert json.loads(json.dumps(reported)) == reported
    assert reported["sites"][0]["site"] == "a"
    assert reported["sites"][0]["relative_norm"] is None
    with pytest.raises(KeyError, match="did you mean 'abc'"):
        spectrum(bs.Adapter({"abc": with_spectrum(4, 3, [1.0])}))["abd"]
