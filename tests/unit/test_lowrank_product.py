"""U·V: accurate, and the same bits for any threads, blocks of columns and order of the ranks."""

from collections.abc import Iterator

import pytest
import torch

from brushstroke.lowrank import LowRank
from brushstroke.lowrank.product import RANKS, reproducible_product

THREADS = (1, 2, 3)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def factors(d: int, r: int, h: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(d, r).to(dtype), torch.randn(r, h).to(dtype)


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 64, 257])
def test_it_is_as_accurate_as_a_product_in_float32(rank):
    U, V = factors(67, rank, 45)
    exact = U.double() @ V.double()
    error = float((reproducible_product(U, V).double() - exact).norm())
    assert error <= 1.1 * float(((U @ V).double() - exact).norm()) + 2.0**-24 * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_columns_have_the_bits_of_the_whole(dtype):
    update = LowRank(*factors(64, 5, 48, dtype), 0.3)
    parts = [update.columns(start, min(start + 7, 48)).dense() for start in range(0, 48, 7)]
    assert torch.equal(torch.cat(parts, 1), update.dense())
    assert update.dense().dtype == dtype


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [8, 100])
def test_the_number_of_threads_does_not_matter(dtype, rank):
    U, V = factors(501, rank, 403, dtype)
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(reproducible_product(U, V))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("rank", [3, 8, 100, 512])
def test_the_order_of_the_sums_does_not_matter(rank):
    """So no library's order does: every sum is exact."""
    U, V = factors(31, rank, 29)
    U[:, 0] *= 1e6
    V[1] *= 1e-5
    order = torch.cat([torch.randperm(min(rank, RANKS)), torch.arange(rank)[RANKS:]])
    assert torch.equal(reproducible_product(U, V), reproducible_product(U[:, order], V[order]))


def test_a_component_is_kept_however_its_size_is_split_between_the_factors():
    U, V = factors(40, 2, 30)
    split = torch.tensor([1e-12, 1e12])
    exact = U.double() @ V.double()
    found = reproducible_product(U * split, V / split[:, None]).double()
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_zeros_and_no_ranks_give_zeros():
    U, V = factors(4, 3, 5)
    assert not reproducible_product(U, torch.zeros_like(V)).any()
    assert not reproducible_product(torch.zeros_like(U), V).any()
    assert not reproducible_product(U[:, :0], V[:0]).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_factors_give_non_finite_products(bad):
    U, V = factors(4, 3, 5)
    U[1, 1] = bad
    assert not reproducible_product(U, V)[1].isfinite().any()
