"""`LowRank` as a value: its parts, refusals, and results for edge cases of shapes."""

import dataclasses

import pytest
import torch

from brushstroke.errors import ConfigError, ShapeError
from brushstroke.lowrank import LowRank, Update

EXACT = 1e-10  # float64, relative


def random(
    d: int = 7, r: int = 3, h: int = 5, scale: float = 0.7, dtype: torch.dtype = torch.float64
) -> LowRank:
    return LowRank(torch.randn(d, r, dtype=dtype), torch.randn(r, h, dtype=dtype), scale)


def test_update_has_shape_rank_and_parameters():
    a = random()
    assert isinstance(a, Update)
    assert (a.d, a.h, a.rank, a.shape) == (7, 5, 3, (7, 5))
    assert a.parameters == 3 * (7 + 5)
    assert a.dtype == torch.float64
    assert a.device == torch.device("cpu")
    assert set(a.tensors()) == {"U", "V"}


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random().scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("U", "V", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), "same rank"),
        (torch.zeros(3), torch.zeros(1, 4), "got U"),
        (torch.zeros(2, 3, 2), torch.zeros(2, 4), "got U"),
        (torch.zeros(3, 2), torch.zeros(2, 4).double(), "share one float dtype"),
        (torch.zeros(3, 2).long(), torch.zeros(2, 4).long(), "share one float dtype"),
        (torch.zeros(3, 2), torch.zeros(2, 4, device="meta"), "one device"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mismatched_factors_are_refused(U, V, message):
    with pytest.raises(ShapeError, match=message):
        LowRank(U, V)


def test_updates_of_different_weights_do_not_mix():
    a, b = random(d=7), random(d=6)
    for operation in (lambda: a + b, lambda: a - b, lambda: a.inner(b)):
        with pytest.raises(ShapeError, match=r"\(7, 5\) and \(6, 5\)"):
            operation()


def test_only_updates_are_added():
    with pytest.raises(TypeError):
        random() + 1  # type: ignore[operator]
    with pytest.raises(ShapeError, match="int"):
        random().inner(1)  # type: ignore[arg-type]


def test_operators_do_not_change_operands():
    a, b = random(), random(r=2)
    before = [t.clone() for t in (a.U, a.V, b.U, b.V)]
    _ = 0.5 * a + b * 2.0 - a
    a.truncate(1)
    assert all(torch.equal(x, y) for x, y in zip(before, (a.U, a.V, b.U, b.V), strict=True))


def test_scaling_does_not_change_factors():
    a = random()
    doubled = 2.0 * a
    assert doubled.U is a.U
    assert doubled.V is a.V
    assert doubled.scale == 2.0 * a.scale


def test_sums_of_equal_scale_do_not_change_factors():
    a, b = random(scale=0.3), random(scale=0.3)
    total = a + b
    assert total.scale == 0.3
    assert torch.equal(total.U, torch.cat([a.U, b.U], 1))
    assert torch.equal(total.V, torch.cat([a.V, b.V]))


def test_sums_of_different_dtypes_keep_the_wider_one():
    total = random(dtype=torch.float32) + random(dtype=torch.float64)
    assert total.dtype == torch.float64
    assert (random(dtype=torch.bfloat16) + random(dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ConfigError, match="at least 1"):
        random().truncate(rank)


def test_truncating_to_its_own_rank_or_more_is_the_value_itself():
    a = random()
    assert a.truncate(3) is a
    assert a.truncate(99) is a
    assert a.truncation_loss(99) == 0


@pytest.mark.parametrize("which", ["U", "V", "both", "scale"])
def test_a_zero_update_has_no_nan_anywhere(which):
    a = random()
    zero = LowRank(
        a.U * (which not in ("U", "both")),
        a.V * (which not in ("V", "both")),
        0.0 if which == "scale" else 1.0,
    )
    assert zero.delta_norm() == 0
    assert torch.equal(zero.sigma, torch.zeros(3, dtype=torch.float64))
    assert not zero.dense().any()
    assert zero.inner(a) == 0
    assert zero.truncation_loss(1) == 0
    cut = zero.truncate(1)
    assert torch.isfinite(cut.U).all()
    assert not cut.dense().any()
    assert (zero + a).delta_norm() == pytest.approx(a.delta_norm(), rel=EXACT)


def test_cancelling_updates_have_norm_zero():
    a = random(scale=3.0)
    assert (a - a).delta_norm() < 1e-13 * a.delta_norm()
    near = LowRank(a.U, a.V * (1 + 1e-9), a.scale)
    # Over inner(x, x) the difference would drown at 1e-8 of the norm.
    assert (near - a).delta_norm() == pytest.approx(1e-9 * a.delta_norm(), rel=1e-4)
    assert (a + -a).truncate(1).delta_norm() < 1e-13 * a.delta_norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    a = random(dtype=dtype)
    assert a.truncate(2).dtype == dtype
    assert (2.0 * a).dtype == (-a).dtype == (a + a).dtype == dtype
    assert a.dense().dtype == dtype
    assert a.sigma.dtype == torch.float64
    assert a.to(torch.float32).dtype == torch.float32
    assert a.to(device="cpu").dtype == dtype


def test_apply_is_dense_for_any_leading_shape():
    a = random()
    for shape in [(7,), (0, 7), (4, 7), (2, 0, 7), (2, 3, 7)]:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(a.apply(x), x @ a.dense(), rtol=EXACT, atol=1e-12)


def test_values_are_equal_only_to_themselves():
    a = random()
    assert a == a
    assert a != LowRank(a.U, a.V, a.scale)
