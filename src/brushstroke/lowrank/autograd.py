"""Backward passes that have no derivative of their own, and say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be part of a graph (`create_graph=True`).

    torch's `once_differentiable` refuses only where the incoming gradient has a graph behind it; a sum has
    none, and the second derivative is wrong without a word.

    Raises:
        RuntimeError: a second derivative is asked for.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "brushstroke's functions have no second derivative; call backward() or autograd.grad() "
                "without create_graph=True"
            )
        return backward(ctx, *gradients)

    return checked
