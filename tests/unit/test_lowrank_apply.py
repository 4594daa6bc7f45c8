"""The fused low-rank step, compared with plain operations."""

import pytest
import torch
import torch.nn.functional as F

from brushstroke.lowrank.apply import (
    LinearParts,
    Span,
    gathered_term,
    lowrank_linears,
    lowrank_term,
    stacked_term,
)


def lowrank_linear(x, weight, bias, U_rows, V, scale, weight_is_dxh=False):
    return lowrank_linears(x, [LinearParts(weight, bias, U_rows, V, scale, weight_is_dxh)])[0]


@pytest.mark.parametrize("dxh", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (0, 6), (5, 6), (2, 3, 6)])
def test_gradients_agree_with_finite_differences(dxh, bias, shape):
    double = {"dtype": torch.float64}
    W = torch.randn(*((6, 4) if dxh else (4, 6)), **double)
    b = torch.randn(4, **double) if bias else None
    x, U_rows, V = (torch.randn(s, **double, requires_grad=True) for s in (shape, (2, 6), (2, 4)))
    assert torch.autograd.gradcheck(
        lambda *f: lowrank_linear(f[0], W, b, f[1], f[2], 0.7, dxh), (x, U_rows, V)
    )


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_required_gradients_are_computed(needs):
    W = torch.randn(4, 6, requires_grad=True)
    b = torch.randn(4, requires_grad=True)
    tensors = [torch.randn(s, requires_grad=n) for s, n in zip([(5, 6), (2, 6), (2, 4)], needs, strict=True)]
    x, U_rows, V = tensors
    lowrank_linear(x, W, b, U_rows, V, 1.0).sum().backward()
    assert [t.grad is not None for t in tensors] == list(needs)
    assert W.grad is None
    assert b.grad is None


def test_the_fused_step_is_the_plain_one():
    x, W, b = torch.randn(5, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    U_rows, V = torch.randn(2, 6).double(), torch.randn(2, 4).double()
    expected = F.linear(x, W, b) + lowrank_term(x, U_rows, V, 0.3)
    torch.testing.assert_close(lowrank_linear(x, W, b, U_rows, V, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_contiguous():
    x = torch.randn(2, 3, 6).double()
    W, U_rows, V = torch.randn(4, 6).double(), torch.randn(2, 6).double(), torch.randn(2, 4).double()
    V.requires_grad_(True)
    weights = torch.randn(4, 3, 2).double()
    (fused,) = torch.autograd.grad(
        (lowrank_linear(x, W, None, U_rows, V, 0.3).mT.mT.permute(2, 1, 0) * weights).sum(), V
    )
    (plain,) = torch.autograd.grad((lowrank_term(x, U_rows, V, 0.3).permute(2, 1, 0) * weights).sum(), V)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_the_outputs_may_be_changed_in_place(shape, bias):
    x = torch.randn(shape).double().requires_grad_(True)
    parts = [
        LinearParts(
            torch.randn(4, 6).double(),
            torch.randn(4).double() if bias else None,
            *(torch.randn(2, n).double().requires_grad_(True) for n in (6, 4)),
        )
        for _ in range(2)
    ]
    leaves = [x, *(f for part in parts for f in (part.U_rows, part.V))]
    found, expected = (
        torch.autograd.grad(sum((y.clamp_(-1, 1) * 2).sum() for y in ys), leaves)
        for ys in (
            lowrank_linears(x, parts),
            [F.linear(x, p.weight, p.bias) + lowrank_term(x, p.U_rows, p.V, 1.0) for p in parts],
        )
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_gathered_rows_use_their_factors(inner, rows):
    x = torch.randn(rows, *inner, 6).double()
    U_rows, V = torch.randn(rows, 2, 6).double(), torch.randn(rows, 2, 4).double()
    got = gathered_term(x, U_rows, V)
    assert got.shape == (rows, *inner, 4)
    for i in range(rows):
        torch.testing.assert_close(got[i], lowrank_term(x[i], U_rows[i], V[i], 1.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner", [(), (1,), (2, 3)])
def test_stacked_factors_affect_only_their_rows(inner):
    x, slots = torch.randn(4, *inner, 6).double(), torch.tensor([2, 0, 1, 2])
    U_rows, V = torch.randn(3, 2, 6).double(), torch.randn(3, 2, 4).double()
    uses = torch.arange(3).repeat_interleave(2) == slots[:, None]
    expected = gathered_term(x, U_rows[slots], V[slots])
    torch.testing.assert_close(stacked_term(x, U_rows, V, uses), expected, rtol=1e-12, atol=1e-12)
    U_rows[1] = float("inf")  # a product that overflows stays with the rows of its own factors
    found = stacked_term(x, U_rows, V, uses)
    torch.testing.assert_close(found[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-12, atol=1e-12)


def test_dropout_draws_only_in_training():
    x, U_rows, V = torch.randn(5, 6), torch.randn(2, 6), torch.randn(2, 4)
    plain = lowrank_term(x, U_rows, V, 0.3)
    assert torch.equal(lowrank_term(x, U_rows, V, 0.3, dropout=0.5, training=False), plain)
    assert not torch.equal(lowrank_term(x, U_rows, V, 0.3, dropout=0.5, training=True), plain)


@pytest.mark.parametrize("dxh", [True, False])
def test_each_span_uses_only_its_own_ranks(dxh):
    """Gradients too: one linear has an update in both spans, one in the second, one in none."""
    double = {"dtype": torch.float64}
    W = [torch.randn(*((6, h) if dxh else (h, 6)), **double) for h in (4, 3, 2)]
    x = torch.randn(1, 7, 6, **double, requires_grad=True)
    factors = [
        torch.randn(*shape, **double, requires_grad=True) for shape in ((5, 6), (5, 4), (3, 6), (3, 3))
    ]
    spans = [
        (Span(slice(0, 2), slice(0, 1)), Span(slice(3, 7), slice(2, 5))),
        (Span(slice(3, 7), slice(1, 3)),),
    ]

    def run(x: torch.Tensor, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return lowrank_linears(
            x,
            [
                LinearParts(W[0], None, factors[0], factors[1], 0.5, dxh, spans[0]),
                LinearParts(W[1], None, factors[2], factors[3], 2.0, dxh, spans[1]),
                LinearParts(W[2], None, weight_is_dxh=dxh),
            ],
        )

    found = run(x, *factors)
    for i, y in enumerate(found):
        expected = x @ (W[i] if dxh else W[i].mT)
        for span in spans[i] if i < 2 else ():
            U_rows, V = (factors[2 * i + j][span.ranks] for j in range(2))
            expected[:, span.rows] += lowrank_term(x[:, span.rows], U_rows, V, (0.5, 2.0)[i])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(run, (x, *factors))


def test_spans_that_share_ranks_add_up_their_gradients():
    double = {"dtype": torch.float64}
    spans = (Span(slice(0, 2), slice(None)), Span(slice(4, 5), slice(None)))
    x, U_rows, V = (torch.randn(*s, **double, requires_grad=True) for s in ((5, 6), (2, 6), (2, 4)))
    W = torch.randn(4, 6, **double)
    assert torch.autograd.gradcheck(
        lambda *f: lowrank_linears(f[0], [LinearParts(W, None, f[1], f[2], 0.5, spans=spans)])[0],
        (x, U_rows, V),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spans",
    [
        [[slice(None)], [slice(0, 4)]],
        [[slice(0, 6)], [slice(2, 8)]],
        [[slice(None, 4), slice(5, None)], [slice(-3, None)]],
        [[slice(0, 5)], [slice(0, 0), slice(0, 5)]],
        [[slice(6, 9), slice(0, 3)], [slice(3, 6)]],
    ],
)
def test_each_part_has_its_own_spans(spans: list[list[slice]], dtype: torch.dtype) -> None:
    x = torch.randn(9, 6, dtype=dtype, requires_grad=True)
    weights = [torch.randn(5, 6, dtype=dtype), torch.randn(7, 6, dtype=dtype)]
    factors = [(torch.randn(2, 6, requires_grad=True), torch.randn(2, h, requires_grad=True)) for h in (5, 7)]
    parts = [
        LinearParts(W, None, U, V, 0.5, spans=tuple(Span(span, slice(0, 2)) for span in own))
        for W, (U, V), own in zip(weights, factors, spans, strict=True)
    ]
    grads = [torch.randn(9, 5, dtype=dtype), torch.randn(9, 7, dtype=dtype)]
    inputs = [x, *(factor for pair in factors for factor in pair)]
    found = lowrank_linears(x, parts)
    ours = [*found, *torch.autograd.grad(found, inputs, grads)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = []
    for W, U, V, own in zip(weights, wide[1::2], wide[2::2], spans, strict=True):
        used = torch.zeros(9, 1, dtype=torch.float64)
        for span in own:
            used[span] = 1
        expected.append(wide[0] @ W.double().mT + 0.5 * used * (wide[0] @ U.mT @ V))
    theirs = [*expected, *torch.autograd.grad(expected, wide, [grad.double() for grad in grads])]
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.double() - b).detach().norm() / b.detach().norm()) < (
            1e-5 if dtype == torch.float32 else 0.01
        )
