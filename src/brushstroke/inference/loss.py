"""The loss of examples under a model, in padded batches and without gradients.

It is independent of the packed step of training, and agrees with it: `weights[i]` belongs to predicting
`tokens[i]` from the tokens before it.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from brushstroke.base import dynamic_rope_limit, preserved_rope
from brushstroke.data import Example
from brushstroke.layers import require_uniform_route
from brushstroke.sites import unwrap

PADDED_TOKENS = 2048  # of one batch: bounds the logits, which are the largest thing here
ROWS_AT_ONCE = 512  # predictions whose logits are held in fp32


@dataclass(frozen=True)
class Loss:
    """Σ weight·nll over the trained tokens, in nats, and their number."""

    total: float
    trained_tokens: int

    @property
    def mean(self) -> float | None:
        """Nats per trained token; None where none is trained."""
        return self.total / self.trained_tokens if self.trained_tokens else None


def evaluate_loss(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> Loss:
    """The loss of examples under a causal language model, with whatever is attached to it.

    Args:
        model: an nn.Module or a Base.
        examples: tokenised; those without a trained token count for nothing.
        batch_size: most examples in one batch.
        on_done: called after each batch with the number of examples that are done.

    Raises:
        RouteError: a route in force in the model tells rows apart.
    """
    require_uniform_route(model)
    root = unwrap(model)
    select = "logits_to_keep" in inspect.signature(root.forward).parameters
    total, trained, done = 0.0, 0, 0
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        # Not inference_mode: what a model caches under it could not be used in training afterwards.
        with torch.no_grad():
            trained_on = [example for example in examples if example.trained]
            moving = dynamic_rope_limit(root)
            # Frequencies move by the tokens that run: as in training none does behind the last prediction.
            ends = len if moving is None else attrgetter("reach")
            for batch in _batches(trained_on, batch_size, ends, moving):
                with preserved_rope(root):
                    total += _batch_loss(root, batch, max(map(ends, batch)), select)
                trained += sum(example.trained for example in batch)
                done += len(batch)
                if on_done is not None:
                    on_done(done)
    finally:
        for module in training:
            module.training = True
    return Loss(total, trained)


def _batches(
    examples: Sequence[Example], size: int, ends: Callable[[Example], int], moving: int | None
) -> Iterator[list[Example]]:
    """Longest first, so that the first batch shows whether the memory is enough.

    Examples of more than `moving` tokens, which move the rotary frequencies of others, are alone.
    """
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: -ends(example)):
        width = ends(batch[0]) if batch else 0
        moves = moving is not None and width > moving
        if batch and (moves or len(batch) == size or (len(batch) + 1) * width > PADDED_TOKENS):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _batch_loss(model: nn.Module, batch: Sequence[Example], width: int, select: bool) -> float:
    """Of examples whose first `width` tokens run."""
    device = next(model.parameters()).device
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    weights = torch.zeros(len(batch), longest, dtype=torch.float64)
    for row, example in enumerate(batch):
        ids[row, : len(example)] = torch.tensor(example.tokens)
        mask[row, : len(example)] = 1
        weights[row, : len(example)] = torch.tensor(example.weights, dtype=torch.float64)
    rows, targets_at = weights.nonzero(as_tuple=True)
    predicted_from = targets_at - 1
    inputs: dict[str, Any] = {
        "input_ids": ids[:, :width].to(device),
        "attention_mask": mask[:, :width].to(device),
        "use_cache": False,
    }
    if select:
        kept, predicted_from = predicted_from.unique(return_inverse=True)
        inputs["logits_to_keep"] = kept.to(device)
    output = model(**inputs)
    logits = output.logits if hasattr(output, "logits") else output[0]
    nll = _nll(logits, rows.to(device), predicted_from.to(device), ids[rows, targets_at].to(device))
    return float((nll.cpu() * weights[rows, targets_at]).sum())


def _nll(
    logits: Float[Tensor, "b n v"],
    rows: Int[Tensor, " t"],
    columns: Int[Tensor, " t"],
    targets: Int[Tensor, " t"],
) -> Float[Tensor, " t"]:
    parts = [
        F.cross_entropy(logits[row, column].float(), target, reduction="none").double()
        for row, column, target in zip(
            *(x.split(ROWS_AT_ONCE) for x in (rows, columns, targets)), strict=True
        )
    ]
    return torch.cat(parts)
