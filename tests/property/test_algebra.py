"""The algebra of updates and adapters against dense float64 matrices, for any shape and rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brushstroke.adapter import Adapter
from brushstroke.lowrank import LowRank

EXACT = 1e-10  # the promise: factor form against dense, float64, relative to the largest operand
FLAT = settings(deadline=None, max_examples=60, derandomize=True)

sizes = st.integers(1, 9)
scales = st.floats(-3, 3).filter(lambda s: s == 0 or abs(s) > 1e-6)
seeds = st.integers(0, 2**31)


def low_rank(d: int, r: int, h: int, seed: int, scale: float = 1.0, lost: int = 0) -> LowRank:
    """Random factors whose last `lost` columns repeat the first, so that the rank is less than r."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((d, r), (r, h)))
    for i in range(min(lost, r - 1)):
        U[:, -1 - i] = U[:, 0]
    return LowRank(U, V, scale)


def close(got: torch.Tensor, expected: torch.Tensor, *operands: torch.Tensor) -> bool:
    size = max((float(t.norm()) for t in (expected, *operands)), default=0.0)
    return float((got - expected).norm()) <= EXACT * size


@FLAT
@given(sizes, sizes, sizes, sizes, seeds, scales, scales, scales, scales)
def test_sums_differences_and_multiples(d, h, r1, r2, seed, s1, s2, p, q):
    a, b = low_rank(d, r1, h, seed, s1), low_rank(d, r2, h, seed + 1, s2)
    A, B = a.dense(), b.dense()
    assert close((p * a + q * b).dense(), p * A + q * B, p * A, q * B)
    assert close((0.5 * a + 2.0 * b).dense(), 0.5 * A + 2.0 * B, A, B)
    assert close((a - b).dense(), A - B, A, B)
    assert torch.equal((-a).dense(), -A)
    assert (a + b).rank == r1 + r2
    assert close((b + a).dense(), (a + b).dense(), A, B)


@FLAT
@given(sizes, sizes, sizes, sizes, seeds, scales, scales)
def test_norms_and_inner_products(d, h, r1, r2, seed, s1, s2):
    a, b = low_rank(d, r1, h, seed, s1), low_rank(d, r2, h, seed + 1, s2)
    A, B = a.dense(), b.dense()
    bound = float(A.norm() * B.norm())
    assert a.delta_norm() == pytest.approx(float(A.norm()), rel=EXACT, abs=1e-300)
    assert abs(a.inner(b) - float((A * B).sum())) <= EXACT * bound
    assert abs(a.inner(b) - b.inner(a)) <= EXACT * bound
    assert a.inner(a) == pytest.approx(a.delta_norm() ** 2, rel=EXACT, abs=1e-300)
    assert abs(a.inner(b)) <= a.delta_norm() * b.delta_norm() * (1 + EXACT)
    total = (a + b).delta_norm() ** 2
    parts = a.delta_norm() ** 2 + b.delta_norm() ** 2 + 2 * a.inner(b)
    assert abs(total - parts) <= 1e-9 * (a.delta_norm() + b.delta_norm()) ** 2


@FLAT
@given(sizes, sizes, st.integers(1, 12), st.integers(1, 12), seeds, scales, st.integers(0, 4))
def test_truncation_is_the_best_and_knows_its_loss(d, h, r, k, seed, scale, lost):
    a = low_rank(d, r, h, seed, scale, lost)
    A = a.dense()
    left, sigma, right = torch.linalg.svd(A, full_matrices=False)
    best = (left[:, :k] * sigma[:k]) @ right[:k]
    cut = a.truncate(k)
    assert cut.rank <= max(k, min(r, k))
    loss = math.sqrt(float(sigma[k:].square().sum()))
    size = float(A.norm())
    real = float((A - cut.dense()).norm())
    assert abs(a.truncation_loss(k) - loss) <= EXACT * size
    assert abs(a.truncation_loss(k) - real) <= EXACT * size
    gap = float(sigma[k - 1] - sigma[k]) if k < len(sigma) else 1.0
    if gap > 1e-3:  # without a gap the best approximation is not unique
        assert close(cut.dense(), best, A)


@FLAT
@given(sizes, sizes, sizes, seeds, scales)
def test_sigma_is_that_of_the_dense_matrix(d, h, r, seed, scale):
    a = low_rank(d, r, h, seed, scale, lost=1)
    k = min(d, r, h)
    assert a.sigma.shape == (k,)
    assert close(a.sigma, torch.linalg.svdvals(a.dense())[:k], a.dense())


@FLAT
@given(sizes, sizes, sizes, seeds)
def test_the_choice_of_factors_does_not_matter(d, h, r, seed):
    a = low_rank(d, r, h, seed, 0.3)
    core = torch.linalg.qr(
        torch.randn(r, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).Q
    b = LowRank(2.0 * a.U @ core, core.mT @ a.V / 2.0, a.scale)
    assert close(a.dense(), b.dense())
    assert close(a.sigma, b.sigma)
    assert (a - b).delta_norm() <= EXACT * a.delta_norm()


@FLAT
@given(sizes, sizes, sizes, seeds, st.sampled_from([(), (0,), (1,), (4,), (2, 3)]))
def test_applying_is_multiplying(d, h, r, seed, leading):
    a = low_rank(d, r, h, seed, 0.3)
    x = torch.randn(*leading, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert close(a.apply(x), x @ a.dense())


@FLAT
@given(sizes, sizes, sizes, st.permutations([0, 1, 2]), seeds)
def test_the_order_of_a_sum_does_not_matter_and_weights_cancel(d, h, r, order, seed):
    parts = [low_rank(d, r, h, seed + i, 1.0 + i) for i in range(3)]
    one = parts[0] + parts[1] + parts[2]
    two = parts[order[0]] + parts[order[1]] + parts[order[2]]
    assert close(one.dense(), two.dense())
    gone = one - two
    assert gone.sigma.max() <= EXACT * one.delta_norm()


@FLAT
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, unique=True),
    st.lists(st.sampled_from("abcd"), min_size=1, unique=True),
    seeds,
    scales,
    scales,
)
def test_adapter_algebra_acts_at_all_sites(first, second, seed, p, q):
    shape = {"a": (3, 4), "b": (5, 2), "c": (1, 1), "d": (6, 6)}

    def make(sites: list[str], s: int) -> Adapter:
        return Adapter({n: low_rank(shape[n][0], 2, shape[n][1], s + ord(n), 0.5) for n in sites})

    a, b = make(first, seed), make(second, seed + 100)
    zero = {n: torch.zeros(*shape[n], dtype=torch.float64) for n in shape}
    A, B = ({n: v[n].dense() if n in v else zero[n] for n in shape} for v in (a, b))
    total = p * a + q * b
    assert set(total) == set(first) | set(second)
    for site in total:
        assert close(total[site].dense(), p * A[site] + q * B[site], p * A[site], q * B[site])
    for site, update in (a - b).items():
        assert close(update.dense(), A[site] - B[site], A[site], B[site])
    inner = sum(float((A[n] * B[n]).sum()) for n in shape)
    assert abs(a.inner(b) - inner) <= EXACT * a.norm() * b.norm()
    assert a.norm() == pytest.approx(math.sqrt(a.inner(a)), rel=EXACT)
    assert a.truncate(1).rank == 1
    assert a.parameters == sum(2 * sum(shape[n]) for n in first)


def test_a_sum_is_not_the_sum_of_the_factors():
    """PEFT's "linear" adds A to A and B to B, which is another matrix."""
    a, b = low_rank(30, 4, 20, 1), low_rank(30, 4, 20, 2)
    dense = a.dense() + b.dense()
    wrong = (a.U + b.U) @ (a.V + b.V)
    assert close((a + b).dense(), dense)
    assert float((wrong - dense).norm() / dense.norm()) > 0.5
    assert int(torch.linalg.matrix_rank((a + b).dense())) == 8
