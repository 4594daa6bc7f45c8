"""The chunked loss against torch's cross-entropy on full logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from brushstroke.packed.cross_entropy import chunked_cross_entropy, summed_loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("words", [1, 7, 50, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_loss_and_gradient_equal_full_logits(bias: bool, words: int, dtype: torch.dtype) -> None:
    m, d, v = 37, 8, 50
    hidden = torch.randn(m, d, dtype=dtype, requires_grad=True)
    weight, offset = torch.randn(v, d, dtype=dtype), torch.randn(v, dtype=dtype) if bias else None
    targets, weights = torch.randint(0, v, (m,)), torch.rand(m)
    ours = chunked_cross_entropy(hidden, weight, offset, targets, weights, words)
    (gradient,) = torch.autograd.grad(3 * ours, hidden)
    whole = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="none")
    (expected,) = torch.autograd.grad(3 * (whole * weights).sum(), hidden)
    exact = dtype == torch.float64
    assert ours.item() == pytest.approx((whole * weights).sum().item(), rel=1e-12 if exact else 1e-5)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-10 if exact else 1e-4, atol=1e-12 if exact else 1e-5
    )


def test_a_word_that_a_bias_forbids_changes_nothing() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    targets, bias = torch.arange(6), torch.zeros(50)
    bias[20:] = float("-inf")
    ours = chunked_cross_entropy(hidden, weight, bias, targets, torch.ones(6), 7)
    (gradient,) = torch.autograd.grad(ours, hidden)
    whole = F.cross_entropy(hidden @ weight[:20].mT, targets, reduction="sum")
    (expected,) = torch.autograd.grad(whole, hidden)
    assert ours.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_loss_of_the_only_possible_token_is_zero() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    bias = torch.tensor([float("-inf"), 0.0, float("-inf")])
    for weight, offset, target in ((torch.randn(1, 4), None, 0), (torch.randn(3, 4), bias, 1)):
        loss = chunked_cross_entropy(hidden, weight, offset, torch.full((3,), target), torch.ones(3), words=2)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros(3, 4))


@pytest.mark.parametrize("bias", [[float("inf"), 0.0, 0.0], [0.0, float("nan"), 0.0]])
def test_nan_logit_gives_nan_loss(bias: list[float]) -> None:
    loss = chunked_cross_entropy(
        torch.randn(1, 4), torch.randn(3, 4), torch.tensor(bias), torch.tensor([0]), torch.ones(1), 2
    )
    assert not bool(torch.isfinite(loss))


@pytest.mark.parametrize("offset", [-1e6, -1e30, 1e30])
def test_an_offset_of_all_logits_changes_nothing(offset: float) -> None:
    hidden = torch.zeros(2, 4, requires_grad=True)
    bias = torch.full((2500,), offset)
    loss = chunked_cross_entropy(hidden, torch.randn(2500, 4), bias, torch.tensor([0, 2499]), torch.ones(2))
    assert loss.item() == pytest.approx(2 * math.log(2500), rel=1e-5)


def test_retained_graph_gives_the_same_gradient_twice() -> None:
    hidden = torch.randn(2, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(30, 4), None, torch.tensor([0, 3]), torch.ones(2))
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_in_half_precision_the_gradient_of_a_likely_word_keeps_its_size() -> None:
    """It is (1 − p) times a difference: 1 − p of 5e-4 would be lost in bf16's steps of 4e-3 beside 1."""
    hidden = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(300, 64, dtype=torch.bfloat16) * 0.01
    weight[5] += 0.2
    (gradient,) = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, None, torch.tensor([5]), torch.ones(1), 128), hidden
    )
    double = hidden.detach().double().requires_grad_(True)
    (exact,) = torch.autograd.grad(F.cross_entropy(double @ weight.double().mT, torch.tensor([5])), double)
    assert 0 < exact.abs().max() < 1e-3
    assert (gradient - exact).norm() / exact.norm() < 0.05


def test_custom_loss_may_average_or_use_weights() -> None:
    logits, targets = torch.randn(11, 7), torch.randint(0, 7, (11,))
    ones = torch.ones(11)
    built_in = summed_loss(logits, targets, ones, None)
    mean = summed_loss(logits, targets, ones, lambda x, t, w: F.cross_entropy(x, t))
    weighted = summed_loss(
        logits, targets, ones, lambda x, t, w: (F.cross_entropy(x, t, reduction="none") * w).sum()
    )
    torch.testing.assert_close(mean, built_in)
    torch.testing.assert_close(weighted, built_in)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    value = chunked_cross_entropy(
        hidden, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([0, 1]), torch.ones(2)
    )
    assert value.item() == pytest.approx(2e4)
