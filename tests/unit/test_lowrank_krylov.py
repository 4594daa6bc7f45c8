"""Block Krylov, the top of sums and bounds of cosines against dense decompositions."""

import pytest
import torch

from brushstroke.lowrank import LowRank, cosines
from brushstroke.lowrank.cosines import FLOOR, CosineBounds, cosine_bounds, proven_floor
from brushstroke.lowrank.krylov import KrylovSpace, Shifted, dense_svd, frobenius, multiply, top_svd
from brushstroke.lowrank.sums import top_of_sum

EXACT = 1e-10
SIGMA = 1e-6  # of sigma₁: an eigenvalue is right to the square of the residual, which is 1e-4


def spiked(d: int, h: int) -> torch.Tensor:
    """A power law in front of a noise bulk, as in trained weights."""
    k = min(d, h) // 2
    left, right = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (d, h))
    bulk = torch.randn(d, h, dtype=torch.float64) / (d + h) ** 0.5
    return (left * (20 * torch.arange(1, k + 1).double() ** -0.7)) @ right.mT + bulk


@pytest.mark.parametrize(("d", "h"), [(90, 60), (60, 90), (7, 5), (1, 4), (4, 1)])
def test_the_top_of_a_dense_matrix(d, h):
    W = spiked(d, h) if min(d, h) > 1 else torch.randn(d, h, dtype=torch.float64)
    top, whole = top_svd(Shifted(W), 6), dense_svd(W)
    k = min(6, d, h)
    assert top.left.shape == (d, k)
    assert top.right.shape == (k, h)
    assert (top.sigma - whole.sigma[:k]).abs().max() < SIGMA * whole.sigma[0]
    assert top.residual.max() <= 1e-4 * whole.sigma[0]
    assert ((top.right @ whole.right[:k].mT).abs().diagonal() - 1).abs().max() < SIGMA
    torch.testing.assert_close(top.right @ top.right.mT, torch.eye(k, dtype=W.dtype), rtol=0, atol=EXACT)


def test_residual_is_correct_for_too_few_iterations():
    W = torch.randn(300, 300, dtype=torch.float64)
    top, whole = top_svd(Shifted(W), 20, passes=2), dense_svd(W)
    assert top.residual.max() > 1e-2 * top.sigma[0]
    nearest = (top.sigma[:, None] - whole.sigma).abs().min(dim=1).values
    assert bool((nearest <= top.residual + EXACT).all())


@pytest.mark.parametrize("k", [0, 1, 2, 11, 16, 20])
def test_products_of_any_width(k):
    W, X = torch.randn(9, 7), torch.randn(7, k)
    for lying in (W, W.mT.contiguous().mT):
        torch.testing.assert_close(multiply(lying, X), W @ X)


def test_a_sum_is_never_formed_but_decomposed():
    W = spiked(50, 40)
    U, V = torch.randn(50, 3, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    top = top_svd(Shifted(W, U, V, -0.7), 5)
    torch.testing.assert_close(top.sigma, torch.linalg.svdvals(W - 0.7 * U @ V)[:5], rtol=SIGMA, atol=EXACT)


def test_matrices_of_small_rank_and_rank_zero():
    W = torch.outer(torch.randn(8), torch.randn(9)).double()
    top = top_svd(Shifted(W), 1)
    assert float(top.sigma[0]) == pytest.approx(frobenius(W), rel=EXACT)
    assert top_svd(Shifted(torch.zeros(4, 3)), 2).sigma.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_is_summed_in_float64(dtype):
    W = torch.randn(300, 200).to(dtype)
    assert frobenius(W) == frobenius(W.mT) == pytest.approx(float(W.double().norm()), rel=1e-12)


def bounded(W: torch.Tensor, q: torch.Tensor, steps: int) -> tuple[list[float], float, CosineBounds]:
    """Bounds for the output directions in the rows of q, as for an intruder: on the smaller side of W."""
    turned = W.shape[1] > W.shape[0]
    space = KrylovSpace(Shifted(W.mT if turned else W))
    block = targets = W @ q.mT if turned else q.mT
    for _ in range(steps):
        block = space.extend(block)
    floor = FLOOR if turned else 0.0
    found = cosine_bounds(space, targets, floor, of_images=turned)
    block = found.left_over
    for _ in range(2):
        block = space.extend(block)
    return found.values.tolist(), floor, cosine_bounds(space, targets, floor, of_images=turned)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("d", "h"), [(120, 120), (150, 100), (100, 150)])
@pytest.mark.parametrize("steps", [4, 12, 32])
def test_the_bound_is_never_below_the_largest_cosine(d, h, steps, dtype):
    W = spiked(d, h).to(dtype)
    whole = dense_svd(W)
    q = torch.cat([whole.right[:3], torch.linalg.qr(torch.randn(h, 4, dtype=torch.float64)).Q.mT])
    q[2] = torch.nn.functional.normalize(whole.right[2] + whole.right[5], dim=0)
    bounds, floor, later = bounded(W, q.to(dtype), steps)
    covered = whole.right[whole.sigma > floor * whole.sigma[0]]
    true = (q @ covered.mT).abs().max(dim=1).values
    assert bool((torch.tensor(bounds) >= true - 1e-6).all())
    assert bool((later.values >= true - 1e-6).all())
    assert bounds[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("largest", [1.0, 1e-3])
def test_the_bound_holds_between_the_points_that_were_tried(largest):
    """Every λ is covered: two singular vectors as near as can be, a direction on both, few steps."""
    left, right = (torch.linalg.qr(torch.randn(n, 80, dtype=torch.float64)).Q for n in (120, 80))
    sigma = torch.linspace(1, 0.2, 80).double()
    sigma[41] = sigma[40] * (1 - 1e-9)
    W = (left * largest * sigma) @ right.mT
    q = torch.nn.functional.normalize(right[:, 40] + right[:, 41] + right[:, 7], dim=0)
    for steps in (1, 3, 9, 30):
        assert bounded(W, q[None], steps)[0][0] >= (2 / 3) ** 0.5 - 1e-6


def test_the_bound_certifies_random_directions():
    W = spiked(400, 300)
    q = torch.linalg.qr(torch.randn(300, 3, dtype=torch.float64)).Q.mT
    assert max(bounded(W, q, 32)[0]) < 0.5
    bounds, _, later = bounded(W, q, 8)
    assert float(later.values.max()) < max(bounds)


@pytest.mark.parametrize("steps", [2, 4])
def test_bound_with_singular_directions_of_w_is_tighter(steps):
    W = spiked(300, 200)
    q = torch.linalg.qr(torch.randn(200, 2, dtype=torch.float64)).Q
    spaces = [KrylovSpace(Shifted(W)) for _ in range(2)]
    spaces[1].extend(dense_svd(W).right[:40].mT)
    for space in spaces:
        block = q
        for _ in range(steps):
            block = space.extend(block)
    alone, helped = (cosine_bounds(space, q).values for space in spaces)
    assert bool((helped < alone - 0.05).all())


def test_a_direction_in_the_null_space_lies_on_no_singular_vector():
    W = torch.randn(40, 90, dtype=torch.float64)
    q = dense_svd(torch.eye(90, dtype=torch.float64) - torch.linalg.pinv(W) @ W).right[:1]
    assert bounded(W, q, 32)[0][0] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("smallest", "expected"), [(0.3, 0.05), (0.04, 0.025), (0.006, 0.003125), (1e-3, 0), (1e-7, 0), (0, 0)]
)
def test_the_proven_floor_is_below_every_singular_value(smallest, expected, dtype):
    left, right = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64)).Q for n in (60, 90))
    sigma = 7e12 * torch.linspace(1, smallest, 60).double()
    assert proven_floor(((left * sigma) @ right.mT).to(dtype), 7e12) == expected


def test_the_floor_of_a_weight_in_several_blocks_of_rows(monkeypatch):
    W = torch.randn(70, 200)
    monkeypatch.setattr(cosines, "_ROWS", 32)
    assert proven_floor(W, float(torch.linalg.svdvals(W)[0])) == FLOOR
    W[69] = W[0]
    assert proven_floor(W, float(torch.linalg.svdvals(W)[0])) == 0


def test_a_weight_that_is_zero_has_no_directions():
    space = KrylovSpace(Shifted(torch.zeros(9, 5)))
    space.extend(torch.randn(5, 2))
    assert cosine_bounds(space, torch.eye(5, 2)).values.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("d", "h", "size"), [(300, 200, 30.0), (260, 260, 3.0), (300, 200, 0.01), (300, 200, 0.0)]
)
def test_the_top_of_a_sum_is_that_of_the_dense_one(d, h, size, dtype):
    W, update = (
        spiked(d, h).to(dtype),
        LowRank(torch.randn(d, 30).double() / d**0.5, torch.randn(30, h).double()),
    )
    parts = (size / h**0.5 * update).svd()
    found = top_of_sum(W, parts, top_svd(Shifted(W), 40).right.mT, 6)
    whole = dense_svd(W.double() + (parts.left * parts.sigma) @ parts.right)
    assert bool(found.settled.all())
    assert (found.top.sigma.double() - whole.sigma[:6]).abs().max() < SIGMA * whole.sigma[0]
    cosines = (found.top.right.double() @ whole.right[:6].mT).abs().diagonal()
    assert (cosines - 1).abs().max() < 1e-4
    left = (found.top.left.double().mT @ whole.left[:, :6]).abs().diagonal()
    assert (left - 1).abs().max() < 1e-4
    torch.testing.assert_close(found.back, W.mT @ found.top.left, rtol=0, atol=1e-4)


def test_unconverged_directions_of_a_sum_are_reported():
    W = torch.randn(400, 400, dtype=torch.float64)
    parts = LowRank(torch.randn(400, 2).double(), torch.randn(2, 400).double(), 1e-3).svd()
    found = top_of_sum(W, parts, top_svd(Shifted(W), 10, passes=2).right.mT, 10, passes=2)
    assert not bool(found.settled.all())
    gap = (
        W + (parts.left * parts.sigma) @ parts.right
    ).mT @ found.top.left - found.top.right.mT * found.top.sigma
    torch.testing.assert_close(found.top.residual, gap.norm(dim=0), rtol=1e-6, atol=1e-8)
