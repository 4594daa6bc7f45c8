"""Computes the loss of the trained positions in chunks of the vocabulary, without storing the full logits.

It does not handle packing or padding: its inputs are the hidden states that predict trained tokens.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from brushstroke.errors import ConfigError
from brushstroke.lowrank.autograd import first_order
from brushstroke.lowrank.matmul import product, product_onto

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits of the trained positions (m×v, at least fp32), targets (m), weights (m)) → the average, a scalar.

If every trained token has the same weight, the weights add up to 1. Then `F.cross_entropy(logits, targets)`
and `(F.cross_entropy(logits, targets, reduction="none") * weights).sum()` are both correct.
"""

WORDS = 1024  # words of the vocabulary per chunk: with their logits they fit into a processor's cache
GPU_LOGITS = 128 * 1024 * 1024  # logits per chunk: fewer do not fill a GPU


def vocab_chunk_size(positions: int, device: torch.device) -> int:
    """The number of words in one chunk of the vocabulary, for this number of positions.

    >>> vocab_chunk_size(300, torch.device("cpu"))
    1024
    """
    return WORDS if device.type == "cpu" else max(WORDS, GPU_LOGITS // max(1, positions))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ weightᵢ·nllᵢ; the forward pass also computes the gradient of the hidden states, chunk by chunk.

    The target is handled separately from the other words. The maximum, the sum of exponentials and the
    weighted sum of the other words' vectors are updated per chunk and rescaled when a larger logit appears
    (arXiv:1805.02867), so each logit is used only once. No probability near 1 is subtracted from 1, which
    would lose all precision in half precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        words: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lowest = torch.finfo(wide).min
        target = targets[:, None]
        highest, others, own = (hidden.new_full(target.shape, x, dtype=wide) for x in (lowest, 0.0, lowest))
        pull = torch.zeros_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None
        for start, stop in _spans(weight.shape[0], words):
            rows = weight[start:stop]
            logits = product(hidden, rows, None if bias is None else bias[start:stop]).to(wide)
            column = target - start
            here = (column >= 0) & (column < stop - start)
            column = column.clamp_(0, stop - start - 1)
            found = logits.gather(1, column)
            own = torch.where(here, found, own)
            logits.scatter_(1, column, found.masked_fill_(here, lowest))

            before, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
            shrinking = before.sub_(highest).exp_()
            exponentials = logits.sub_(highest).exp_()
            others.mul_(shrinking).add_(exponentials.sum(1, keepdim=True))
            if pull is not None:
                pull = _add_product(pull.mul_(shrinking), exponentials, rows)
        others.clamp_min_(torch.finfo(wide).tiny)  # 0 if the vocabulary has only one word
        log_odds = others.log() + (highest - own)  # log of the odds against the target
        log_odds += 0 * own  # nan if the target's logit is infinite, so that the loss shows it
        if pull is not None:
            wrong = torch.sigmoid(log_odds).mul_(weights[:, None])  # 1 − the target's probability
            pull.div_(others).sub_(weight[targets]).mul_(wrong)
            ctx.save_for_backward(pull.to(hidden.dtype))
        losses = log_odds.clamp_min(0) + log_odds.abs().neg_().exp_().log1p_()  # exact, unlike F.softplus
        return (losses.squeeze(1) * weights).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,) = ctx.saved_tensors
        return (grad * grad_total.to(grad.dtype), *[None] * 5)


def _spans(vocabulary: int, words: int) -> list[tuple[int, int]]:
    """The bounds of chunks of about equal size, of at most `words` words each."""
    count = -(-vocabulary // words)
    bounds = [i * vocabulary // count for i in range(count + 1)]
    return list(pairwise(bounds))


def _add_product(total: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """total + x·rows; half-precision products are added in the dtype of `total`."""
    if total.dtype == rows.dtype:
        return product_onto(total, x, rows.mT)
    return total.add_(product(x.to(rows.dtype), rows.mT))


def chunked_cross_entropy(
    hidden: Float[Tensor, "m d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    targets: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
    words: int | None = None,
) -> Float[Tensor, ""]:
    """Σ weightᵢ·(−log softmax(hiddenᵢ·Wᵀ + bias)[targetᵢ]) in at least fp32, for a frozen head.

    Costs 4·d·v FLOP for each position. Memory beyond the gradient of `hidden` is the logits of `words` words
    (by default `vocab_chunk_size`), for any v. W must be finite.
    """
    words = words or vocab_chunk_size(hidden.shape[0], hidden.device)
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, weights, words)  # type: ignore[return-value]


def summed_loss(
    logits: Float[Tensor, "m v"],
    targets: Int[Tensor, " m"],
    weights: Float[Tensor, " m"],
    loss: LossFunction | None,
) -> Float[Tensor, ""]:
    """The loss of these positions as a sum: cross-entropy, or m times the value of the user's function.

    Raises:
        ConfigError: the user's function does not return a scalar that depends on the logits.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if loss is None:
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    m = targets.shape[0]
    if not m:
        return logits.sum()  # 0, the sum of no logits; a mean would be 0/0
    found = loss(logits, targets, weights / m)
    if not isinstance(found, Tensor) or found.ndim or (logits.requires_grad and not found.requires_grad):
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ConfigError(
            "loss= must return a tensor of no dimension that depends on the logits; it returned a "
            f"{type(found).__name__}{shape}"
        )
    return found * m
