"""‖leftᵀ·W·rightᵀ‖ on constructed models, against chance, and the paper's quotients."""

import json
import math

import pytest
import torch

import brushstroke as bs
from brushstroke.analysis import intruders, mean_deciles, relate
from brushstroke.analysis.overlap import random_directions
from brushstroke.analysis.relate import amplification, random_projection
from brushstroke.errors import BaseLoadError, BaseMismatchError, ConfigError, ShapeError
from brushstroke.lowrank import LowRank

EXACT = 1e-9
KRYLOV = 1e-5  # of a projection where W is float32 and not decomposed whole
DRAWS = 300
OUTLIER = 5.0  # standard errors


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def weight(d: int, h: int, sigma: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, W, right) of a W with these singular values."""
    left, right = (torch.linalg.qr(randn(n, len(sigma))).Q for n in (d, h))
    return left, (left * torch.tensor(sigma).double()) @ right.mT, right.mT


def related(update: LowRank, W: torch.Tensor, **flags):
    return relate(bs.Adapter({"q": update}), {"q": W}, **flags)["q"]


def test_numbers_of_the_paper():
    """arXiv:2106.09685, table 7; the paper prints 21.5, and 0.02 and 0.33 for the random column."""
    assert amplification(6.91, 0.32) == pytest.approx(21.59, abs=0.005)
    assert amplification(3.57, 1.90) == pytest.approx(1.88, abs=0.005)
    assert random_projection(61.95, 4, (12288, 12288)) == pytest.approx(0.0202, abs=5e-5)
    assert random_projection(61.95, 64, (12288, 12288)) == pytest.approx(0.3227, abs=5e-5)


@pytest.mark.parametrize("dense_limit", [1536, 0])
def test_an_update_along_the_first_direction_of_the_weight(dense_limit):
    left, W, right = weight(12, 9, [5.0, 3.0, 2.0, 1.0])
    row = related(LowRank(left[:, :1], 3.5 * right[:1], 2.0), W, dense_limit=dense_limit)
    assert row.projection_delta == pytest.approx(5, rel=EXACT)
    assert row.projection_base == pytest.approx(5, rel=EXACT)
    assert row.norm_delta == pytest.approx(7, rel=EXACT)
    assert row.amplification == pytest.approx(7 / 5, rel=EXACT)
    assert row.norm_base == pytest.approx(math.sqrt(39), rel=EXACT)
    assert row.ratio_to_chance == pytest.approx(5 / (math.sqrt(39) / math.sqrt(108)), rel=EXACT)
    assert row.amplification_random == pytest.approx(7 * math.sqrt(108) / math.sqrt(39), rel=EXACT)


def test_known_values_at_rank_two_and_of_dtype_float32():
    left, W, right = weight(20, 30, [5.0, 3.0, 2.0, 1.0])
    update = LowRank(left[:, [1, 3]].float(), right[[1, 3]].float(), 2.0)
    row = related(update, W.float())
    assert row.rank == 2
    assert row.projection_delta == pytest.approx(math.sqrt(9 + 1), rel=1e-6)
    assert row.projection_base == pytest.approx(math.sqrt(25 + 9), rel=1e-6)
    assert row.norm_delta == pytest.approx(2 * math.sqrt(2), rel=1e-6)


def test_an_update_outside_of_the_weight_is_amplified_without_bound():
    left, W, right = weight(8, 8, [3.0, 2.0])
    outside = torch.linalg.qr(torch.cat([left, randn(8, 1)], 1)).Q[:, 2:]
    row = related(LowRank(outside, right[:1]), W)
    assert row.projection_delta == 0
    assert row.amplification == math.inf
    assert row.ratio_to_chance == 0


def test_scaling_and_gauge():
    W, update, mix = randn(15, 10), LowRank(randn(15, 3), randn(3, 10)), randn(3, 3)
    row = related(update, W)
    assert related(4.0 * update, W).amplification == pytest.approx(4 * row.amplification)
    same = LowRank(update.U @ mix, torch.linalg.solve(mix, update.V))
    assert related(same, W).projection_delta == pytest.approx(row.projection_delta, rel=1e-8)
    assert related(same, W).amplification == pytest.approx(row.amplification, rel=1e-8)


def test_the_random_column_against_sampling():
    _, W, _ = weight(32, 24, [8.0, 3.0, 1.0, 0.5])
    generator = torch.Generator().manual_seed(5)
    squares = torch.stack(
        [
            (random_directions(32, 4, generator).mT @ W @ random_directions(24, 4, generator)).norm() ** 2
            for _ in range(DRAWS)
        ]
    )
    expected = random_projection(float(W.norm()), 4, (32, 24)) ** 2
    assert abs(float(squares.mean()) - expected) < OUTLIER * float(squares.std()) / DRAWS**0.5
    update = LowRank(randn(32, 4), randn(4, 24))
    sampled = torch.tensor([related(update, W, seed=n).projection_sampled for n in range(40)]).square()
    assert abs(float(sampled.mean()) - expected) < OUTLIER * float(sampled.std()) / 40**0.5


def test_large_weight_uses_krylov_and_reports_its_residual():
    left, right = (torch.linalg.qr(randn(n, 40)).Q for n in (120, 90))
    W = ((left * (20 * torch.arange(1, 41).double() ** -0.7)) @ right.mT).float()
    update = LowRank(torch.randn(120, 4), torch.randn(4, 90))
    large, small = related(update, W, dense_limit=16), related(update, W)
    assert small.residual == 0
    assert 0 < large.residual <= 1e-4
    assert large.deciles is None
    for name in ("projection_base", "projection_delta", "projection_sampled", "norm_base"):
        assert getattr(large, name) == pytest.approx(getattr(small, name), rel=KRYLOV), name


@pytest.mark.parametrize(("d", "h"), [(40, 40), (40, 60), (60, 40)])
def test_deciles_hold_the_energy(d, h):
    left, W, right = weight(d, h, torch.linspace(9, 1, 40).tolist())
    update = LowRank(left[:, [0, 39]], torch.diag(torch.tensor([3.0, 1.0]).double()) @ right[[1, 20]])
    share = related(update, W).deciles
    assert share.left == pytest.approx([0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0.1], abs=EXACT)
    assert share.right == pytest.approx([0.9, 0, 0, 0, 0, 0.1, 0, 0, 0, 0], abs=EXACT)
    assert share.chance_left == pytest.approx([4 / d] * 10)
    assert share.chance_right == pytest.approx([4 / h] * 10)


def test_sums_over_sites():
    left, W, right = weight(12, 9, [5.0, 3.0, 2.0, 1.0])
    first = LowRank(left[:, :1], 6.0 * right[:1])
    second = LowRank(left[:, 1:2], 8.0 * right[1:2])
    zero = LowRank(torch.ones(12, 1).double(), torch.zeros(1, 9).double())
    found = relate(bs.Adapter({"a": first, "b": second, "c": zero}), {"a": W, "b": W, "c": W})
    reported = found.as_dict()
    assert reported["norm_delta"] == pytest.approx(10)
    assert reported["projection_delta"] == pytest.approx(math.sqrt(34))
    assert reported["amplification"] == pytest.approx(10 / math.sqrt(34))
    assert reported["zero"] == ["c"]
    assert (found["c"].amplification, found["c"].ratio_to_chance) == (None, None)
    assert json.loads(json.dumps(reported)) == reported
    mean = mean_deciles(found)
    assert sum(mean.left) == pytest.approx(1)


def test_weights_are_read_one_at_a_time_and_once():
    class Lazy(dict):
        read: list[str] = []  # noqa: RUF012

        def __getitem__(self, site):
            self.read.append(site)
            return super().__getitem__(site)

    weights = Lazy(a=randn(5, 4), b=randn(5, 4), unused=randn(3, 3))
    relate(bs.Adapter({s: LowRank(randn(5, 2), randn(2, 4)) for s in "ab"}), weights)
    assert weights.read == ["a", "b"]


def test_a_live_model_and_a_base(gpt2, llama):
    import toys

    for model in (gpt2, llama):
        adapter = toys.random_adapter(model)
        found = relate(adapter, model)
        site, update = next(iter(adapter.items()))
        stored = model.get_submodule(site).weight.detach().double()
        W = stored if model is gpt2 else stored.mT
        left, _, right = torch.linalg.svd(update.dense().double(), full_matrices=False)
        expected = float((left[:, :4].mT @ W @ right[:4].mT).norm())
        assert found[site].projection_delta == pytest.approx(expected, rel=1e-5)
        assert len(found) == len(adapter)
    wrapped = relate(adapter, bs.Base(llama, None, "tiny"))
    assert wrapped.as_dict() == found.as_dict()
    merged = bs.merge(llama, adapter)
    with pytest.raises(BaseMismatchError, match="already merged into the base"):
        relate(adapter, merged)
    with pytest.raises(BaseMismatchError, match="another base"):
        relate(adapter, toys.tiny_llama(seed=5))
    assert len(relate(adapter, toys.tiny_llama(seed=5), allow_different_base=True)) == len(adapter)


@pytest.mark.usefixtures("unchecked")
def test_mismatched_inputs_are_refused():
    adapter = bs.Adapter({"q": LowRank(randn(5, 2), randn(2, 4))})
    with pytest.raises(ShapeError, match="transpose"):
        relate(adapter, {"q": randn(4, 5)})
    with pytest.raises(BaseLoadError, match="mapping"):
        relate(adapter, 3)
    with pytest.raises(ConfigError, match="dense_limit"):
        relate(adapter, {"q": randn(5, 4)}, dense_limit=-1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(value):
    W = randn(5, 4)
    adapter = bs.Adapter({"q": LowRank(randn(5, 2), randn(2, 4))})
    W[1, 2] = value
    for measure in (relate, intruders):
        with pytest.raises(BaseLoadError, match="q: the base's weight contains NaN or infinity"):
            measure(adapter, {"q": W})
    with pytest.raises(ShapeError, match="q: the factors contain NaN or infinity"):
        relate(bs.Adapter({"q": LowRank(randn(5, 2) * value, randn(2, 4))}), {"q": randn(5, 4)})
