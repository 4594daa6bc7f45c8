import statistics as reference
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from brushstroke.studies.statistics import exceeds, holm, interval, over_pairs

numbers = st.lists(st.floats(-10, 10), min_size=3, max_size=8)


@given(numbers)
def test_the_interval_is_scipys(values):
    found = interval(values)
    if reference.stdev(values) < 1e-9:
        assert found.low == pytest.approx(found.high, abs=1e-6)
        return
    low, high = stats.t.interval(0.95, len(values) - 1, reference.fmean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_one_value_has_no_interval():
    assert interval([2.0]).low is None
    with pytest.raises(ValueError, match="at least one"):
        interval([])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_and_keeps_the_order(ps):
    corrected = holm(ps)
    assert all(new >= old for new, old in zip(corrected, ps, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))
    assert max(corrected) <= 1


def test_holm_counts_comparisons_without_a_p():
    assert holm([0.01, None]) == [0.02, None]


def test_the_one_sided_p_is_scipys():
    values = [0.3, 0.5, 0.2, 0.6]
    expected = stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    assert exceeds(values, 0.1) == pytest.approx(expected, rel=1e-6)
    assert exceeds([0.3], 0.1) is None
    assert exceeds([0.3, 0.3], 0.1) == 0.0


def test_rounding_differences_are_not_significant():
    """Computed numbers that should be equal differ by some 1e-16, and always to the same side."""
    assert exceeds([1e-15, 1.1e-15, 1e-15], 0.0) == 1.0
    assert exceeds([0.3 + 1e-16, 0.1 + 0.2, 0.3], 0.3) == 1.0
    assert exceeds([1e-6, 1.1e-6, 1e-6], 0.0) < 0.01


def test_the_jackknife_over_pairs_keeps_the_mean_and_covers_it():
    """Values of pairs that share a seed are dependent; the interval must cover the truth as promised."""
    generator = torch.Generator().manual_seed(0)
    covered, rounds, n = 0, 400, 6
    for _ in range(rounds):
        each = torch.randn(n, generator=generator)
        pairs = {(a, b): float(each[a] + each[b]) for a in range(n) for b in range(a + 1, n)}
        pseudo = over_pairs(pairs)
        assert reference.fmean(pseudo) == pytest.approx(reference.fmean(pairs.values()), abs=1e-9)
        found = interval(pseudo)
        covered += found.low <= 0.0 <= found.high
    assert 0.90 <= covered / rounds <= 0.99
