"""The loss of the trained positions alone, so that logits never exist whole.

It knows no packing and no padding: it is given the outputs that predict trained tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits of the trained positions (m×v), targets (m), weights (m)) → scalar, averaged over the positions.

The weights add up to 1 where every trained token counts the same, so that `F.cross_entropy(logits, targets)`
and `(F.cross_entropy(logits, targets, reduction="none") * weights).sum()` are both right.
"""

CHUNK_ELEMENTS = 16 * 1024 * 1024  # logits that exist at one time; 64 MiB in fp32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ weightᵢ·nllᵢ; the gradient of the hidden states is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
    ) -> Tensor:
        m, vocabulary = hidden.shape[0], weight.shape[0]
        chunk = max(16, CHUNK_ELEMENTS // vocabulary)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, m, chunk):
            part = slice(start, min(start + chunk, m))
            logits = F.linear(hidden[part], weight, bias).float()
            target, w = targets[part, None], weights[part]
            lse = torch.logsumexp(logits, dim=-1)
            total += ((lse - logits.gather(1, target).squeeze(1)) * w).sum()
            if grad is not None:
                probabilities = logits.sub_(lse[:, None]).exp_()
                probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
                grad[part] = (probabilities.mul_(w[:, None])).to(weight.dtype) @ weight
        ctx.grad = grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grad_total.to(grad.dtype)) if grad is not None else None, None, None, None, None


def chunked_cross_entropy(
    hidden: Float[Tensor, "m d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Σ weightᵢ·(−log softmax(hiddenᵢ·Wᵀ + bias)[targetᵢ]) in fp32, for a frozen head.

    Costs 4·d·v FLOP for each position; memory beyond the gradient of `hidden` is one chunk of logits,
    whatever m.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, weights)  # type: ignore[return-value]


def summed_loss(
    logits: Float[Tensor, "m v"],
    targets: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
    loss: LossFunction | None,
) -> Float[Tensor, ""]:
    """The loss of these positions as a sum: cross-entropy, or m times what the user's function gives."""
    if loss is None:
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
    m = targets.shape[0]
    return loss(logits, targets, weights / m) * m
