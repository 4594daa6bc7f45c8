"""Attention by batched products equals torch's own."""

import pytest
import torch
from torch import Tensor

from brushstroke.lowrank.matmul import choose_kernels
from brushstroke.packed.sdpa import MOST_SCORES, attend, attend_matmul, prefers_matmul


def tensors(dtype: torch.dtype, heads: int, kv: int, n: int, m: int, width: int = 8) -> list[Tensor]:
    """q, k and v; `width` is that of the values."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, heads, n, 8), (2, kv, m, 8), (2, kv, m, width))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 4, 8), (6, 2, 8), (3, 1, 8), (4, 2, 5)])
@pytest.mark.parametrize(("prefix", "window"), [(0, None), (5, None), (5, 4)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_output_and_gradients(
    dtype: torch.dtype,
    limit: float,
    prefix: int,
    window: int | None,
    heads: int,
    kv: int,
    width: int,
    scale: float | None,
) -> None:
    n = 7
    mask = torch.ones(n, prefix + n, dtype=torch.bool).tril(prefix)
    if window:
        mask &= torch.ones_like(mask).triu(prefix - window + 1)
    inputs = tensors(dtype, heads, kv, n, prefix + n, width)
    grad = torch.randn(2, heads, n, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = attend(*exact, mask, scale)
    found = attend_matmul(*inputs, mask, scale)
    ours = [found, *torch.autograd.grad(found, inputs, grad.to(dtype))]
    theirs = [expected, *torch.autograd.grad(expected, exact, grad)]
    for a, b in zip(theirs, ours, strict=True):
        assert float((a - b.double()).detach().norm() / a.detach().norm()) < limit


def test_products_are_for_bf16_on_a_cpu_without_dropout_and_while_the_scores_are_few() -> None:
    q, k, _ = tensors(torch.bfloat16, 4, 4, 7, 7)
    assert prefers_matmul(q, k, 0.0) == (choose_kernels(q.device, q.dtype)[0] == "torch")
    assert not prefers_matmul(q, k, 0.1)
    assert not prefers_matmul(q.float(), k.float(), 0.0)
    long = q[:1, :1].expand(1, 1, 7, 8)[:, :, :1].expand(1, 1, MOST_SCORES // 7 + 1, 8)
    assert not prefers_matmul(long, k[:1], 0.0)


def test_a_second_derivative_is_an_error() -> None:
    inputs = tensors(torch.float64, 2, 2, 3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    found = attend_matmul(*inputs, mask, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found.sum(), inputs[:1], create_graph=True)
