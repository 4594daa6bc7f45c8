"""Root-mean-square normalisation that saves only its input and one number per row.

It computes no gradient of the gain.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.autograd import first_order
from brushstroke.packed.compiled import CompiledFunction, pays


@CompiledFunction
def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The normalised rows, and the factor of each row."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    y = wide * inverse
    return y.mul_(_gain(weight, offset)).to(x.dtype) if offset else y.to(x.dtype).mul_(weight), inverse


@CompiledFunction
def _gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    wide = x.float()
    g = grad.float() * _gain(weight, offset)
    along = torch.linalg.vecdot(g, wide).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
    return g.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, inverse = _normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        return _gradient(grad_outputs[0], x, weight, inverse, ctx.offset), None, None, None


def _gain(weight: Tensor, offset: float) -> Tensor:
    return weight.float() + offset if offset else weight.float()


def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], eps: float, offset: float = 0.0
) -> Float[Tensor, "*b d"]:
    """x / √(mean(x²) + eps) · (weight + offset), computed in fp32 (arXiv:1910.07467, equation 4).

    The gradient is (g − x·⟨g, x⟩/(d·m))/√m with g = dy·(weight + offset) and m = mean(x²) + eps. Gemma's gain
    is 1 + weight: an `offset` of 1. On a GPU, torch's kernel is used where possible: one for each direction.
    """
    if x.is_cuda and not offset and x.dtype == weight.dtype != torch.float64 and not pays(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[return-value]
