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

from brushstroke.errors import ConfigError
from brushstroke.lowrank.products import in_onednn, product
from brushstroke.step.scratch import Scratch

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits of the trained positions (m×v, fp32 at least), targets (m), weights (m)) → scalar, their average.

The weights add up to 1 where every trained token counts the same, so that `F.cross_entropy(logits, targets)`
and `(F.cross_entropy(logits, targets, reduction="none") * weights).sum()` are both right.
"""

CHUNK_ELEMENTS = 15 * 1024 * 1024 // 2  # logits at one time: 30 MiB in fp32, which malloc uses again
GPU_CHUNK_ELEMENTS = 128 * 1024 * 1024  # a thousand rows of a large vocabulary: fewer do not fill a GPU
LEAST_ROWS = 128  # of a chunk, whatever the vocabulary: fewer would read the head more often than they use it


class LogitsBuffer:
    """The memory of one chunk of logits, and how positions are cut into chunks.

    Args:
        elements: the largest chunk.
    """

    def __init__(self, elements: int = CHUNK_ELEMENTS) -> None:
        self.elements = elements
        self._scratch = Scratch()

    @classmethod
    def on(cls, device: torch.device) -> "LogitsBuffer":
        """A buffer of the size that suits a device."""
        return cls(CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS)

    def rows(self, m: int, weight: Tensor) -> int:
        """How many of m positions one chunk holds; the chunks are of about equal size."""
        most = max(LEAST_ROWS, self.elements // weight.shape[0])
        return max(1, -(-m // max(1, -(-m // most))))

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits (m×v) of one chunk, good until the next one is asked for."""
        if in_onednn(hidden, weight):
            return product(hidden, weight, bias)
        room = self._scratch.take("logits", hidden.shape[0], weight.shape[0], weight)
        logits = torch.mm(hidden, weight.mT, out=room)
        return logits if bias is None else logits.add_(bias)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ weightᵢ·nllᵢ; the gradient of the hidden states is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        buffer: LogitsBuffer,
    ) -> Tensor:
        m = hidden.shape[0]
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = buffer.rows(m, weight)
        for start in range(0, m, rows):
            span = slice(start, min(start + rows, m))
            logits = buffer.logits(hidden[span], weight, bias).float()
            target, w = targets[span, None], weights[span]
            log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
            total -= (log_probabilities.gather(1, target).squeeze(1) * w).sum()
            if grad is not None:
                probabilities = log_probabilities.exp_()
                probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                grad[span] = product(probabilities.to(weight.dtype), weight.mT).mul_(w[:, None])
        ctx.grad = grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad, ctx.grad = ctx.grad, None
        return (grad.mul_(grad_total.to(grad.dtype)) if grad is not None else None, *[None] * 5)


def chunked_cross_entropy(
    hidden: Float[Tensor, "m d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
    buffer: LogitsBuffer | None = None,
) -> Float[Tensor, ""]:
    """Σ weightᵢ·(−log softmax(hiddenᵢ·Wᵀ + bias)[targetᵢ]) in fp32, for a frozen head.

    Costs 4·d·v FLOP for each position; memory beyond the gradient of `hidden` is one chunk of logits,
    whatever m. A `buffer` keeps that chunk from call to call.
    """
    found = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, weights, buffer or LogitsBuffer())
    return found  # type: ignore[return-value]


def summed_loss(
    logits: Float[Tensor, "m v"],
    targets: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
    loss: LossFunction | None,
) -> Float[Tensor, ""]:
    """The loss of these positions as a sum: cross-entropy, or m times what the user's function gives.

    Raises:
        ConfigError: the user's function gives no scalar that depends on the logits.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if loss is None:
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    m = targets.shape[0]
    if not m:
        return logits.sum()  # of nothing; a mean would be 0/0
    found = loss(logits, targets, weights / m)
    if not isinstance(found, Tensor) or found.ndim or (logits.requires_grad and not found.requires_grad):
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ConfigError(
            "loss= must give a tensor of no dimension that depends on the logits; it gave a "
            f"{type(found).__name__}{shape}"
        )
    return found * m
