"""y = x·W + scale·(x·U)·V as one step, for training and for rows that use different factors.

It holds no parameters and decides nothing about routes: layers do.

Both factors come as contiguous rows, Uᵀ (r×d) and V (r×h): on CPUs the skinny products are up to four times
faster that way than with U as (d×r).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def base_product(
    x: Float[Tensor, "*b d"], weight: Tensor, bias: Float[Tensor, " h"] | None, weight_is_dxh: bool
) -> Float[Tensor, "*b h"]:
    """x·W + bias, for a weight stored as (h×d), as torch does, or as (d×h), as HF's Conv1D does."""
    return F.linear(x, weight.mT if weight_is_dxh else weight, bias)


class _LowRankLinear(torch.autograd.Function):
    """The fused step: keeps x and x·U for the backward pass, never makes a gradient of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        U_rows: Tensor,
        V: Tensor,
        scale: float,
        weight_is_dxh: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # x as it came: torch rounds otherwise for other shapes, and the base's own output must not change.
        y = base_product(rows if weight_is_dxh else x, weight, bias, weight_is_dxh).contiguous()
        y = y.view(-1, y.shape[-1])
        xu = F.linear(rows, U_rows.to(x.dtype))
        y.addmm_(xu, V.to(x.dtype), alpha=scale)
        ctx.save_for_backward(rows, weight, U_rows, V, xu)
        ctx.scale, ctx.weight_is_dxh, ctx.x_shape = scale, weight_is_dxh, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, U_rows, V, xu = ctx.saved_tensors
        need_x, _, _, need_U, need_V, _, _ = ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        dxu = ctx.scale * F.linear(dy, V.to(dy.dtype))
        dx = dU_rows = dV = None
        if need_x:
            dx = dy @ (weight.mT if ctx.weight_is_dxh else weight)
            dx = dx.addmm_(dxu, U_rows.to(dy.dtype)).view(ctx.x_shape)
        if need_U:
            dU_rows = (dxu.mT @ rows).to(U_rows.dtype)
        if need_V:
            dV = (ctx.scale * (xu.mT @ dy)).to(V.dtype)
        return dx, None, None, dU_rows, dV, None, None


def lowrank_linear(
    x: Float[Tensor, "*b d"],
    weight: Tensor,
    bias: Float[Tensor, " h"] | None,
    U_rows: Float[Tensor, "r d"],
    V: Float[Tensor, "r h"],
    scale: float,
    weight_is_dxh: bool = False,
) -> Float[Tensor, "*b h"]:
    """x·W + bias + scale·(x·U)·V with W frozen, in one autograd step (arXiv:2106.09685, equation 3).

    The low-rank products run in x's dtype; gradients come back in the dtype of the factors. W and bias get no
    gradient, ever. A second derivative raises torch's once-differentiable error.
    """
    return _LowRankLinear.apply(x, weight, bias, U_rows, V, scale, weight_is_dxh)  # type: ignore[return-value]


def lowrank_term(
    x: Float[Tensor, "*b d"],
    U_rows: Float[Tensor, "r d"],
    V: Float[Tensor, "r h"],
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Float[Tensor, "*b h"]:
    """scale·(dropout(x)·U)·V by plain operations: for dropout, autocast, layers with their own forward."""
    xu = F.linear(F.dropout(x, dropout, training), U_rows.to(x.dtype))
    return scale * (xu @ V.to(x.dtype))


def gathered_term(
    x: Float[Tensor, "b *n d"], U_rows: Float[Tensor, "b r d"], V: Float[Tensor, "b r h"]
) -> Float[Tensor, "b *n h"]:
    """The low-rank term where each row of the batch brings its own factors, with the scale folded into V."""
    rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    y = torch.bmm(torch.bmm(rows, U_rows.mT), V)
    return y.view(*x.shape[:-1], V.shape[-1])
