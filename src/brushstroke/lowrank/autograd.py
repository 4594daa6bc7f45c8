"""Backward passes that raise an error when a second derivative is computed.

Does not compute second derivatives.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the backward pass raises an error under `create_graph=True`.

    torch's `once_differentiable` raises only if the incoming gradient has a graph; the gradient of a sum has
    none, so that the second derivative is silently wrong.

    Raises:
        RuntimeError: the backward pass runs with gradients enabled.
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
