"""Singular values from the factors, against spectra that are known exactly."""

import pytest
import torch

from brushstroke.lowrank import LowRank, svd
from brushstroke.lowrank.spectra import product_rounding, rounding_along, singular_values

FROM_FLOAT32 = 1e-6  # relative error of sigma for factors stored in float32


def known(d: int, h: int, sigma: torch.Tensor, r: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a matrix with this spectrum, hidden by a random invertible core."""
    k = len(sigma)
    left, right = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (d, h))
    core = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64)).Q * torch.linspace(0.5, 2, k).double()
    U, V = left @ core, torch.linalg.solve(core, torch.diag(sigma) @ right.mT)
    if r is None:
        return U, V
    mix = torch.linalg.qr(torch.randn(r, k, dtype=torch.float64)).Q
    return U @ mix.mT, mix @ V


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("d", "h", "k"), [(40, 30, 8), (30, 40, 1), (6, 5, 5), (200, 8, 8)])
def test_the_exactly_known_spectrum(d, h, k, dtype):
    sigma = torch.logspace(0, -1, k, dtype=torch.float64)
    U, V = known(d, h, sigma)
    got = singular_values(U.to(dtype), V.to(dtype), 2.0)
    assert ((got - 2 * sigma).abs() / (2 * sigma)).max() < FROM_FLOAT32
    if dtype == torch.float64:
        torch.testing.assert_close(got, 2 * sigma, rtol=1e-12, atol=0)


def test_small_singular_values_keep_their_digits():
    """The Gram matrix would lose everything below 1e-8 of the largest."""
    sigma = torch.tensor([1.0, 1e-5, 1e-10], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for n in (30, 20))
    got = singular_values(left * sigma, right.mT)
    torch.testing.assert_close(got, sigma, rtol=1e-5, atol=0)


def test_more_columns_than_the_matrix_has_rank():
    sigma = torch.tensor([3.0, 2.0], dtype=torch.float64)
    U, V = known(9, 7, sigma, r=5)
    got = singular_values(U, V)
    torch.testing.assert_close(got[:2], sigma, rtol=1e-12, atol=0)
    assert got[2:].abs().max() < 1e-14


@pytest.mark.parametrize(("d", "r", "h"), [(7, 3, 5), (3, 8, 4), (1, 1, 1), (1, 4, 6), (6, 4, 1)])
def test_the_svd_gives_the_matrix_back(d, r, h):
    U, V = torch.randn(d, r, dtype=torch.float64), torch.randn(r, h, dtype=torch.float64)
    left, sigma, right = svd(U, V, -0.5)
    k = min(d, r, h)
    assert (left.shape, sigma.shape, right.shape) == ((d, k), (k,), (k, h))
    torch.testing.assert_close((left * sigma) @ right, -0.5 * U @ V, rtol=1e-10, atol=1e-12)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(left.mT @ left, eye)
    torch.testing.assert_close(right @ right.mT, eye)
    assert bool((sigma.diff() <= 0).all())
    dense = torch.linalg.svdvals(0.5 * U @ V)[:k]
    torch.testing.assert_close(sigma, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(LowRank(U, V, -0.5).sigma, sigma, rtol=1e-10, atol=1e-12)


def test_a_negative_scale_gives_positive_values():
    U, V = torch.randn(4, 2), torch.randn(2, 3)
    torch.testing.assert_close(singular_values(U, V, -2.0), singular_values(U, V, 2.0))


SHAPES = [(64, 48, 8), (300, 200, 64), (16, 12, 8), (600, 90, 16)]
HALF = [torch.bfloat16, torch.float16]


def of_rank(k: int, d: int, h: int, r: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 factors with r columns whose product has rank k, and a random spectrum from 0.5 to 3.5."""
    left, right = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (d, h))
    sigma, mix = 0.5 + 3 * torch.rand(k, dtype=torch.float64), torch.randn(k, r, dtype=torch.float64)
    if kind == "both factors":
        return left @ mix, torch.linalg.pinv(mix) @ (sigma[:, None] * right.mT)
    if kind == "V alone":
        return torch.randn(d, r, dtype=torch.float64), (mix.mT * sigma) @ right.mT
    return (left * sigma) @ mix, torch.randn(r, h, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["both factors", "V alone", "U alone"])
@pytest.mark.parametrize(("d", "h", "r"), SHAPES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_rounded_factors_have_the_rank_that_they_had(dtype, d, h, r, kind):
    for k in (1, 3, 5):
        U, V = of_rank(k, d, h, r, kind)
        stored = LowRank(U.to(dtype), V.to(dtype), 0.5)
        assert len(stored.directions().sigma) == k
        true, found = singular_values(U, V, 0.5)[:k], stored.directions().sigma
        bound = product_rounding(*stored.factors, svd(*stored.factors))[:k]
        assert bool(((true - found).abs() <= bound).all())


@pytest.mark.parametrize("dtype", HALF)
def test_small_directions_in_separate_columns_are_not_rounding(dtype):
    """In factors that were cut by an SVD each is right to its own size, far below the first's rounding."""
    sigma = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for n in (80, 60))
    stored = LowRank((left * sigma.sqrt()).to(dtype), (sigma.sqrt()[:, None] * right.mT).to(dtype))
    got = stored.directions().sigma
    torch.testing.assert_close(got, sigma, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_factors_that_use_all_their_rank_keep_it():
    for dtype in HALF:
        full = LowRank(torch.randn(64, 8).to(dtype), torch.randn(8, 48).to(dtype))
        assert len(full.directions().sigma) == 8


@pytest.mark.parametrize("dtype", HALF)
def test_subnormal_entries_use_the_smallest_number_of_their_dtype(dtype):
    size = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest one
    factor = torch.full((100, 1), 4 * size, dtype=torch.float64).to(dtype)
    off = float(rounding_along(factor, torch.ones(1, 1, dtype=torch.float64)))
    assert off == pytest.approx(0.5 * size * 10, rel=0.5)
    assert float(rounding_along(torch.zeros(100, 1, dtype=dtype), torch.ones(1, 1).double())) == 0


def test_a_zero_update_has_no_directions():
    assert len(LowRank(torch.randn(5, 2).bfloat16(), torch.zeros(2, 4).bfloat16()).directions().sigma) == 0
