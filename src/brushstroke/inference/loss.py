"""The loss of examples, in packed passes, or in padded batches if packing is not exact for the model.

`weights[i]` of an example belongs to predicting `tokens[i]` from the tokens before it. It computes no
gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from brushstroke.data import Example
from brushstroke.layers import require_uniform_route
from brushstroke.packed.forward import Forward
from brushstroke.packed.pack import Row
from brushstroke.packed.select import select_forward
from brushstroke.sites import unwrap

# Computed per pass. On a CPU, the activations of more tokens do not fit into the caches.
PASS_TOKENS, CPU_PASS_TOKENS = 2048, 1024


@dataclass(frozen=True)
class Loss:
    """Σ weight·nll over the trained tokens, in nats, and their number."""

    total: float
    trained_tokens: int

    @property
    def mean(self) -> float | None:
        """Nats per trained token; None if there is no trained token."""
        return self.total / self.trained_tokens if self.trained_tokens else None


def evaluate_loss(
    model: Any,
    examples: Sequence[Example],
    *,
    slot: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Loss:
    """The loss of examples under a causal language model, including its attached adapters.

    Args:
        model: an nn.Module or a Base.
        examples: tokenised examples; those without a trained token are ignored.
        slot: a slot of the bank in the model, 0 for the base; None uses the active route.
        on_done: called after each pass with the number of finished examples.

    Raises:
        RouteError: the active route assigns adapters per row.
    """
    with loss_forward(model) as forward:
        return total_loss(forward, examples, slot, on_done)


def pass_tokens(forward: Forward) -> int:
    """The maximum number of computed tokens of one pass."""
    return CPU_PASS_TOKENS if forward.device.type == "cpu" else PASS_TOKENS


@contextmanager
def loss_forward(model: Any) -> Iterator[Forward]:
    """Context manager: disables gradients and training mode; yields the forward that is exact for a model.

    Raises:
        RouteError: the active route assigns adapters per row, but evaluation reorders rows.
    """
    require_uniform_route(model)
    root = unwrap(model)
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        # Not inference_mode: tensors that a model caches under it cannot be used in training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            forward, _ = select_forward(root, share=True)
            with forward.context():
                yield forward
    finally:
        for module in training:
            module.training = True


def total_loss(
    forward: Forward,
    examples: Sequence[Example],
    slot: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Loss:
    """The same as `evaluate_loss`, for use inside `loss_forward`."""
    rows = [Row.of(example, slot) for example in examples if example.trained]
    total, done = 0.0, 0
    for packed, outputs in forward.run(forward.passes(rows, pass_tokens(forward), share=True)):
        total += outputs.summed_loss(None).item()
        done += len(packed.rows)
        if on_done is not None:
            on_done(done)
    return Loss(total, sum(len(row.wanted) for row in rows))
