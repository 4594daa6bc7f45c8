"""The loss of the trained positions alone, a piece of the vocabulary at a time: logits never exist whole.

It knows no packing and no padding: it is given the outputs that predict trained tokens.
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
"""(logits of the trained positions (m×v, fp32 at least), targets (m), weights (m)) → scalar, their average.

The weights add up to 1 where every trained token counts the same, so that `F.cross_entropy(logits, targets)`
and `(F.cross_entropy(logits, targets, reduction="none") * weights).sum()` are both right.
"""

WORDS = 1024  # of the vocabulary at a time: with their logits they stay in a processor's cache
GPU_LOGITS = 128 * 1024 * 1024  # at a time: fewer do not fill a GPU


def vocab_chunk_size(positions: int, device: torch.device) -> int:
    """How many words' logits of so many positions exist at one time.

    >>> vocab_chunk_size(300, torch.device("cpu"))
    1024
    """
    return WORDS if device.type == "cpu" else max(WORDS, GPU_LOGITS // max(1, positions))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ weightᵢ·nllᵢ; the gradient of the hidden states is made in the forward pass, words by words.

    The target is kept apart from the other words. With their maximum, their sum of exponentials and the
    average of their vectors so far, rescaled where a larger logit comes (arXiv:1805.02867), no logit is
    needed twice; and no probability near 1 is subtracted from 1, which half precision would not survive.
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
        others.clamp_min_(torch.finfo(wide).tiny)  # a vocabulary of one word has no others
        behind = others.log() + (highest - own)  # log of the odds against the target
        behind += 0 * own  # nan where the target's logit is infinite, which no probability may hide
        if pull is not None:
            wrong = torch.sigmoid(behind).mul_(weights[:, None])  # 1 − the target's probability
            pull.div_(others).sub_(weight[targets]).mul_(wrong)
            ctx.save_for_backward(pull.to(hidden.dtype))
        losses = behind.clamp_min(0) + behind.abs().neg_().exp_().log1p_()  # exact, unlike F.softplus
        return (losses.squeeze(1) * weights).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,) = ctx.saved_tensors
        return (grad * grad_total.to(grad.dtype), *[None] * 5)


def _spans(vocabulary: int, words: int) -> list[tuple[int, int]]:
    """The vocabulary in pieces of about equal size, at most `words` each."""
    count = -(-vocabulary // words)
    bounds = [i * vocabulary // count for i in range(count + 1)]
    return list(pairwise(bounds))


def _add_product(total: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """total + x·rows; what half precision makes is added up in full."""
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
    """Σ weightᵢ·(−log softmax(hiddenᵢ·Wᵀ + bias)[targetᵢ]) in fp32 at least, for a frozen head.

    Costs 4·d·v FLOP for each position; memory beyond the gradient of `hidden` is the logits of `words` words
    of the vocabulary (by default `vocab_chunk_size`), whatever v. W must be finite.
    """
    words = words or vocab_chunk_size(hidden.shape[0], hidden.device)
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, weights, words)  # type: ignore[return-value]


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
