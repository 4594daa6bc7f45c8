"""The feed-forward block as one autograd step that keeps its input and, if asked, what enters the activation.

Gated: down(act(gate(x)) · up(x)), plain: down(act(up(x))), each of the linears with an update or without.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from brushstroke.lowrank.apply import (
    TENSORS,
    LinearParts,
    backward_products,
    flatten,
    forward_products,
    reshaped,
    unflatten,
)
from brushstroke.step.scratch import Scratch


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and its gradient from the gradient of its value.

    Args:
        name: of the function.
        value: (x, out) → out = act(x).
        gradient: (grad, x) → grad = grad·act′(x).
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten
SILU = Activation(
    "silu",
    lambda x, out: _aten.silu.out(x, out=out),
    lambda grad, x: _aten.silu_backward.grad_input(grad, x, grad_input=grad),
)
GELU = Activation(
    "gelu",
    lambda x, out: _aten.gelu.out(x, out=out),
    lambda grad, x: _aten.gelu_backward.grad_input(grad, x, grad_input=grad),
)
GELU_TANH = Activation(
    "gelu_tanh",
    lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
    lambda grad, x: _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
)


class _MLP(torch.autograd.Function):
    """Parts are (gate, up, down), or (up, down). act(gate)·up is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        act: Activation,
        keep: bool,
        scratch: Scratch,
        forms: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        *inner, down = unflatten(forms, tensors)
        entering, xu = forward_products(x, inner)
        rows, width = entering[0].shape
        middle = act.value(entering[0], scratch.take("middle", rows, width, x))
        if len(entering) == 2:
            middle.mul_(entering[1])
        (y,), mu = forward_products(middle, [down])
        ctx.save_for_backward(x, xu, mu, *(entering if keep else ()), *tensors)
        ctx.act, ctx.keep, ctx.scratch, ctx.forms = act, keep, scratch, forms
        return reshaped(y, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, xu, mu, *saved = ctx.saved_tensors
        kept = len(ctx.forms) - 1 if ctx.keep else 0
        *inner, down = unflatten(ctx.forms, saved[kept:])
        entering = saved[:kept] if ctx.keep else forward_products(x, inner)[0]
        need_x, _, _, _, _, *needs = ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        split = TENSORS * len(inner)

        room = partial(ctx.scratch.take, rows=dy.shape[0], width=entering[0].shape[1], like=dy)
        activated = middle = ctx.act.value(entering[0], room("activated"))
        if len(inner) == 2:
            middle = torch.mul(activated, entering[1], out=room("middle"))
        dmiddle, down_gradients = backward_products([dy], middle, mu, [down], True, needs[split:])
        assert dmiddle is not None
        dentering = [dmiddle]
        if len(inner) == 2:
            dentering.append(activated.mul_(dmiddle))
            dmiddle.mul_(entering[1])
        ctx.act.gradient(dmiddle, entering[0])
        dx, gradients = backward_products(
            dentering, x.reshape(-1, x.shape[-1]), xu, inner, need_x, needs[:split]
        )
        return None if dx is None else dx.view(x.shape), None, None, None, None, *gradients, *down_gradients


def mlp(
    x: Float[Tensor, "*b d"],
    act: Activation,
    gate: LinearParts | None,
    up: LinearParts,
    down: LinearParts,
    keep: bool = True,
    scratch: Scratch | None = None,
) -> Float[Tensor, "*b d"]:
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate (arXiv:2002.05202, equation 6).

    Keeps x, the narrow x·U, and gate(x) and up(x) where `keep` says so: they are made again in the backward
    pass else, for a quarter more of the block's products. W and biases get no gradient. `scratch` is memory
    that blocks share one after another.
    """
    parts = [part for part in (gate, up, down) if part is not None]
    forms, tensors = flatten(parts)
    return _MLP.apply(x, act, keep, scratch or Scratch(), forms, *tensors)  # type: ignore[return-value]
