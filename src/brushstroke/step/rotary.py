"""Rotary position embedding that keeps nothing but the angles, which all layers share."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.once import first_order
from brushstroke.step.onekernel import OneKernel


@OneKernel
def _rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos).addcmul_(torch.cat([x[..., half:], x[..., :half]], dim=-1), signed_sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _rotated(x, cos, torch.cat([-first, second], dim=-1))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _rotated(grad_outputs[0], cos, torch.cat([second, -first], dim=-1)), None, None


def rotate(
    x: Float[Tensor, "*n heads w"], cos: Float[Tensor, "*m 1 w"], sin: Float[Tensor, "*m 1 w"]
) -> Float[Tensor, "*n heads w"]:
    """x·cos + (−x₂, x₁)·sin for x = (x₁, x₂) in halves (arXiv:2104.09864, eq. 34, halved order)."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[return-value]
