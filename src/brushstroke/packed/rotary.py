"""Rotary position embedding that saves only the angles, which all layers share.

It does not compute the angles.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.autograd import first_order
from brushstroke.packed.compiled import CompiledFunction


@CompiledFunction
def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, way: int) -> Tensor:
    """The halves (x₁, x₂) as (x₁·cos − way·x₂·first, x₂·cos + way·x₁·second)."""
    y = x * cos
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y1.addcmul_(x2, first, value=-way)
    y2.addcmul_(x1, second, value=way)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second, 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(grad_outputs[0], cos, second, first, -1), None, None


def rotate(
    x: Float[Tensor, "*n heads w"], cos: Float[Tensor, "*m 1 w"], sin: Float[Tensor, "*m 1 w"]
) -> Float[Tensor, "*n heads w"]:
    """x·cos + (−x₂, x₁)·sin for x = (x₁, x₂) in halves (arXiv:2104.09864, eq. 34, halved order)."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[return-value]
