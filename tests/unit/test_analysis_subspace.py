"""φ(i, j): identities, closed forms against sampling, and refusals."""

import json
from statistics import fmean

import pytest
import torch

import brushstroke as bs
from brushstroke.analysis import overlap, random_pair, subspace
from brushstroke.errors import ConfigError, ShapeError
from brushstroke.lowrank import LowRank

EXACT = 1e-12
DRAWS = 400
OUTLIER = 5.0  # standard errors: among 512 cells chance exceeds it once in 4,000 runs
SPREAD = 0.25  # of a standard deviation estimated from 400 draws, about seven of its errors


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def update(d: int = 24, h: int = 17, r: int = 6) -> LowRank:
    return LowRank(randn(d, r), randn(r, h), 0.5)


def adapter(*updates: LowRank) -> bs.Adapter:
    return bs.Adapter({f"layers.{n}.q": value for n, value in enumerate(updates)})


def loop(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The definition, one norm at a time."""
    grid = torch.zeros(first.shape[1], second.shape[1], dtype=first.dtype)
    for i in range(1, first.shape[1] + 1):
        for j in range(1, second.shape[1] + 1):
            grid[i - 1, j - 1] = (first[:, :i].mT @ second[:, :j]).norm() ** 2 / min(i, j)
    return grid


def test_the_grid_is_the_definition_on_both_sides_of_the_update():
    one, two = update(r=3), update(r=6)
    row = subspace(adapter(one), adapter(two))["layers.0.q"]
    for grid, side in ((row.left, 0), (row.right, 2)):
        first, second = (
            torch.linalg.svd(x.dense(), full_matrices=False)[side][: 24 if side == 0 else None]
            for x in (one, two)
        )
        if side == 2:
            first, second = first.mT, second.mT
        torch.testing.assert_close(grid, loop(first[:, :3], second[:, :6]), rtol=1e-9, atol=EXACT)
    assert row.left.shape == row.right.shape == row.chance_left.shape == (3, 6)
    assert float(row.chance_left[1, 4]) == pytest.approx(5 / 24)
    assert float(row.chance_right[2, 1]) == pytest.approx(3 / 17)


def test_an_update_against_itself_and_its_mirror():
    one, two = adapter(update()), adapter(update())
    row = subspace(one, one)["layers.0.q"]
    for grid in (row.left, row.right):
        torch.testing.assert_close(grid, torch.ones(6, 6, dtype=torch.float64), rtol=0, atol=EXACT)
    assert row.cosine == pytest.approx(1)
    assert row.weighted_left == pytest.approx(1)
    there, back = subspace(one, two)["layers.0.q"], subspace(two, one)["layers.0.q"]
    torch.testing.assert_close(there.left, back.left.mT, rtol=0, atol=EXACT)
    torch.testing.assert_close(there.right, back.right.mT, rtol=0, atol=EXACT)
    assert subspace(one, -2.0 * one)["layers.0.q"].cosine == pytest.approx(-1)


def test_phi_is_the_mean_squared_cosine_of_principal_angles():
    """1 − D²/p with D of Ham and Lee; the paper prints (1 − D²)/p."""
    first, second = (torch.linalg.qr(randn(15, n)).Q for n in (4, 6))
    grid = overlap.overlap_grid(first, second)
    cosines = torch.linalg.svdvals(first.mT @ second)
    distance = (4 - cosines.square().sum()).sqrt()
    assert float(grid[3, 5]) == pytest.approx(float(cosines.square().mean()))
    assert float(grid[3, 5]) == pytest.approx(float(1 - distance**2 / 4))
    assert float(grid[3, 5]) != pytest.approx(float((1 - distance**2) / 4))


def test_identities_of_the_grid():
    first, second = (torch.linalg.qr(randn(20, 5)).Q for _ in range(2))
    grid = overlap.overlap_grid(first, second)
    assert bool(((grid >= 0) & (grid <= 1 + EXACT)).all())
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(overlap.overlap_grid(first * signs, second), grid)
    turn = torch.linalg.qr(randn(3, 3)).Q
    turned = torch.cat([first[:, :3] @ turn, first[:, 3:]], dim=1)
    torch.testing.assert_close(overlap.overlap_grid(turned, second)[2:], grid[2:], rtol=0, atol=EXACT)
    smaller = torch.minimum(torch.arange(1, 6)[:, None], torch.arange(1, 6))
    assert bool(((grid * smaller).diff(dim=0) >= -EXACT).all())
    basis = torch.linalg.qr(randn(20, 10)).Q
    apart = overlap.overlap_grid(basis[:, :5], basis[:, 5:])
    torch.testing.assert_close(apart, torch.zeros_like(apart), rtol=0, atol=EXACT)


def test_the_updates_directions_do_not_depend_on_the_gauge_but_a_factors_do():
    one, two = update(), update()
    mix = randn(6, 6)
    same = LowRank(one.U @ mix, torch.linalg.solve(mix, one.V), one.scale)
    plain, gauged = (subspace(adapter(x), adapter(two))["layers.0.q"] for x in (one, same))
    torch.testing.assert_close(plain.left, gauged.left, rtol=1e-6, atol=1e-8)
    alone, mixed = (subspace(adapter(x), adapter(two), of="U")["layers.0.q"] for x in (one, same))
    assert alone.right is None
    assert float((alone.left - mixed.left).abs().max()) > 0.01
    torch.testing.assert_close(alone.left[-1, -1], plain.left[-1, -1])  # the whole space is the same


def test_of_u_uses_the_right_singular_vectors_of_a():
    one, two = update(r=3), update(r=5)
    A = [torch.linalg.svd(x.U.mT, full_matrices=False).Vh.mT for x in (one, two)]
    row = subspace(adapter(one), adapter(two), of="U")["layers.0.q"]
    torch.testing.assert_close(row.left, loop(*A), rtol=1e-9, atol=EXACT)
    B = [torch.linalg.svd(x.V.mT, full_matrices=False).U for x in (one, two)]
    row = subspace(adapter(one), adapter(two), of="V")["layers.0.q"]
    assert row.left is None
    torch.testing.assert_close(row.right, loop(*B), rtol=1e-9, atol=EXACT)


def test_chance_and_its_deviation_against_sampling():
    i, j, n = 8, 64, 96
    generator = torch.Generator().manual_seed(7)
    drawn = torch.stack(
        [
            overlap.overlap_grid(
                overlap.random_directions(n, i, generator), overlap.random_directions(n, j, generator)
            )
            for _ in range(DRAWS)
        ]
    )
    mean, deviation = overlap.chance(i, j, n), overlap.chance_deviation(i, j, n)
    assert ((drawn.mean(0) - mean) / (deviation / DRAWS**0.5)).abs().max() < OUTLIER
    assert ((drawn.std(0) / deviation) - 1).abs().max() < SPREAD
    z = overlap.z_scores(drawn[0], n)
    torch.testing.assert_close(z, (drawn[0] - mean) / deviation)


def test_full_space_has_z_score_zero():
    grid = overlap.overlap_grid(torch.eye(3).double(), torch.linalg.qr(randn(3, 3)).Q)
    z = overlap.z_scores(grid, 3)
    assert float(z[2, 2]) == 0
    assert bool(torch.isfinite(z).all())
    assert bool(torch.isfinite(overlap.z_scores(torch.ones(1, 1).double(), 1)).all())


def test_the_weighted_overlap_survives_a_swap_of_near_equal_values():
    basis = torch.linalg.qr(randn(30, 4)).Q
    right = torch.linalg.qr(randn(20, 2)).Q.mT
    one = LowRank(basis[:, :2], torch.diag(torch.tensor([1.001, 1.0]).double()) @ right)
    two = LowRank(basis[:, :2], torch.diag(torch.tensor([1.0, 1.001]).double()) @ right)
    row = subspace(adapter(one), adapter(two))["layers.0.q"]
    assert float(row.left[0, 0]) < 1e-9
    assert row.weighted_left == pytest.approx(1, abs=1e-5)
    assert row.block()["left"] == pytest.approx(1)
    assert row.block(1)["left"] < 1e-9


def test_the_weighted_chance_is_the_mean_of_random_directions():
    generator = torch.Generator().manual_seed(3)
    sigma, other = torch.tensor([3.0, 1.0, 0.5]).double(), torch.tensor([2.0, 1.5]).double()
    drawn = torch.tensor(
        [
            overlap.weighted_overlap(
                overlap.random_directions(40, 3, generator),
                sigma,
                overlap.random_directions(40, 2, generator),
                other,
            )
            for _ in range(DRAWS)
        ]
    )
    error = float(drawn.std()) / DRAWS**0.5
    assert abs(float(drawn.mean()) - overlap.weighted_chance(sigma, other, 40)) < OUTLIER * error


@pytest.mark.parametrize(("side", "size"), [("left", 400), ("right", 40)])
def test_random_pair_has_the_chance_level_of_its_side(side, size):
    row = subspace(adapter(update(400, 40, 16)), adapter(update(400, 40, 16)))["layers.0.q"]
    drawn = fmean(float(random_pair(row, side, seed)[-1, -1]) for seed in range(20))
    assert drawn == pytest.approx(16 / size, rel=0.05)


def test_cosines_against_dense():
    one, two = adapter(update(), update()), adapter(update(), update())
    found = subspace(one, two)
    flat = [torch.cat([x.dense().reshape(-1) for x in a.values()]) for a in (one, two)]
    expected = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert found.cosine == pytest.approx(float(expected))
    a, b = one["layers.1.q"].dense().reshape(-1), two["layers.1.q"].dense().reshape(-1)
    expected = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert found["layers.1.q"].cosine == pytest.approx(expected)


def test_a_common_start_shows_in_the_input_side_however_the_factors_are_written():
    one, two = update(r=4), update(r=4)
    moved = adapter(LowRank(one.U + 0.3 * randn(24, 4), two.V))
    for second in (moved, moved.truncate(4)):
        row = subspace(adapter(one), second)["layers.0.q"]
        assert row.block()["left"] > 0.8
        assert row.block()["right"] < 0.5


def test_rounding_noise_has_no_directions():
    one = update(r=4)
    padded = LowRank(torch.cat([one.U, one.U], 1), torch.cat([one.V, one.V]), one.scale)
    row = subspace(adapter(padded), adapter(update()))["layers.0.q"]
    assert row.ranks == (4, 6)
    assert row.left.shape == (4, 6)


def test_a_zero_update_has_no_directions_to_compare():
    zero = LowRank(randn(24, 2), torch.zeros(2, 17).double())
    found = subspace(adapter(update(), zero), adapter(update(), update()))
    assert found.unmatched.zero == ("layers.1.q",)
    with pytest.raises(KeyError, match="is zero in one"):
        found["layers.1.q"]
    assert found.cosine is not None


@pytest.mark.parametrize("of", ["delta", "U", "V"])
def test_adapters_that_are_zero_everywhere_are_a_result_without_numbers(of):
    zero = LowRank(torch.zeros(24, 2).double(), torch.zeros(2, 17).double())
    for pair in ((zero, zero), (zero, update()), (update(), zero)):
        found = subspace(*map(adapter, pair), of=of)
        assert len(found) == 0
        assert found.unmatched.zero == ("layers.0.q",)
        assert found.cosine is None
        assert found.as_dict()["cosine"] is None
        assert found.sides == {"delta": ["left", "right"], "U": ["left"], "V": ["right"]}[of]
        with pytest.raises(KeyError, match="is zero in one"):
            found["layers.0.q"]


def test_sites_of_only_one_adapter_are_named():
    found = subspace(adapter(update(), update()), adapter(update()))
    assert found.unmatched.only_first == ("layers.1.q",)
    with pytest.raises(KeyError, match="only one of the adapters"):
        found["layers.1.q"]


def test_incomparable_adapters_are_refused():
    with pytest.raises(ShapeError, match=r"no site in common.*did you mean 'layers\.0\.q'"):
        subspace(bs.Adapter({"layers.0.k": update()}), adapter(update()))
    with pytest.raises(ShapeError, match=r"different shapes at 1 sites:\n  layers\.0\.q: \(24, 17\) and"):
        subspace(adapter(update()), adapter(update(d=9)))
    with pytest.raises(ConfigError, match="'delta', 'U' or 'V'"):
        subspace(adapter(update()), adapter(update()), of="A")


def test_random_pair_and_plain_data():
    found = subspace(adapter(update()), adapter(update(r=3)))
    row = found["layers.0.q"]
    for side in ("left", "right"):
        assert random_pair(row, side).shape == getattr(row, side).shape
        torch.testing.assert_close(random_pair(row, side), random_pair(row, side), rtol=0, atol=0)
    reported = json.loads(json.dumps(found.as_dict()))
    assert reported["of"] == "delta"
    assert reported["sites"][0]["left"][2][1] == float(row.left[2, 1])
    assert reported["sites"][0]["block"]["size"] == 3
