"""Block Krylov and the Lanczos bound against dense decompositions."""

import pytest
import torch

from brushstroke.lowrank.krylov import Shifted, dense_svd, frobenius, top_svd
from brushstroke.lowrank.lanczos import FLOOR, largest_cosine_bound

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


def test_the_residual_is_told_truly_where_the_iteration_is_too_short():
    W = torch.randn(300, 300, dtype=torch.float64)
    top, whole = top_svd(Shifted(W), 20, passes=2), dense_svd(W)
    assert top.residual.max() > 1e-2 * top.sigma[0]
    nearest = (top.sigma[:, None] - whole.sigma).abs().min(dim=1).values
    assert bool((nearest <= top.residual + EXACT).all())


def test_a_sum_is_never_formed_but_decomposed():
    W = spiked(50, 40)
    U, V = torch.randn(50, 3, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    top = top_svd(Shifted(W, U, V, -0.7), 5)
    torch.testing.assert_close(top.sigma, torch.linalg.svdvals(W - 0.7 * U @ V)[:5], rtol=SIGMA, atol=EXACT)


def test_a_matrix_of_small_rank_and_one_of_none():
    W = torch.outer(torch.randn(8), torch.randn(9)).double()
    top = top_svd(Shifted(W), 1)
    assert float(top.sigma[0]) == pytest.approx(frobenius(W), rel=EXACT)
    assert top_svd(Shifted(torch.zeros(4, 3)), 2).sigma.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_is_summed_in_float64(dtype):
    W = torch.randn(300, 200).to(dtype)
    assert frobenius(W) == frobenius(W.mT) == pytest.approx(float(W.double().norm()), rel=1e-12)


@pytest.mark.parametrize(("d", "h"), [(120, 120), (150, 100), (100, 150)])
@pytest.mark.parametrize("steps", [4, 12, 32])
def test_the_bound_is_never_below_the_largest_cosine(d, h, steps):
    W = spiked(d, h)
    whole = dense_svd(W)
    q = torch.cat([whole.right[:3], torch.linalg.qr(torch.randn(h, 4, dtype=torch.float64)).Q.mT])
    q[2] = torch.nn.functional.normalize(whole.right[2] + whole.right[5], dim=0)
    bounds, floor = largest_cosine_bound(W, q, steps)
    covered = whole.right[whole.sigma > floor * whole.sigma[0]]
    true = (q @ covered.mT).abs().max(dim=1).values
    assert floor == (FLOOR if h > d else 0)
    assert bool((torch.tensor(bounds) >= true - 1e-6).all())
    assert bounds[0] == pytest.approx(1, abs=1e-6)


def test_the_bound_certifies_random_directions():
    W = spiked(400, 300)
    q = torch.linalg.qr(torch.randn(300, 3, dtype=torch.float64)).Q.mT
    bounds, _ = largest_cosine_bound(W, q)
    assert max(bounds) < 0.5


def test_a_direction_in_the_null_space_lies_on_no_singular_vector():
    W = torch.randn(40, 90, dtype=torch.float64)
    q = dense_svd(torch.eye(90, dtype=torch.float64) - torch.linalg.pinv(W) @ W).right[:1]
    bounds, _ = largest_cosine_bound(W, q)
    assert bounds[0] < 1e-6
