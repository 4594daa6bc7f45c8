"""The chunked loss against torch's cross-entropy on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from brushstroke.step.loss import LogitsBuffer, chunked_cross_entropy, summed_loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_chunks_give_loss_and_gradient_of_whole_logits(bias: bool, chunk: int) -> None:
    m, d, v = 37, 8, 50
    hidden = torch.randn(m, d, requires_grad=True)
    weight, offset = torch.randn(v, d), torch.randn(v) if bias else None
    targets, weights = torch.randint(0, v, (m,)), torch.rand(m)
    ours = chunked_cross_entropy(hidden, weight, offset, targets, weights, LogitsBuffer(chunk))
    (gradient,) = torch.autograd.grad(3 * ours, hidden)
    whole = F.cross_entropy(F.linear(hidden, weight, offset), targets, reduction="none")
    (expected,) = torch.autograd.grad(3 * (whole * weights).sum(), hidden)
    assert ours.item() == pytest.approx((whole * weights).sum().item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_of_the_users_own_may_average_or_use_the_weights() -> None:
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
