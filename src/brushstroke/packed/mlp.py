"""Runs a feed-forward block as one autograd function that saves its input and optionally the activation's.

Gated: down(act(gate(x)) · up(x)), plain: down(act(up(x))); each linear may have an update. It computes no
gradients of W or biases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.apply import (
    TENSORS,
    LinearParts,
    backward_products,
    flatten,
    forward_products,
    reshaped,
    saved_activations,
    unflatten,
)
from brushstroke.lowrank.autograd import first_order
from brushstroke.packed.compiled import CompiledFunction, pays
from brushstroke.packed.workspace import Scratch

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its gradient.

    Args:
        name: name of torch's operator; the operator of its gradient is `name_backward`.
        options: keyword arguments of both operators.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    def value(self, x: Tensor, out: Tensor) -> Tensor:
        """out = act(x)."""
        return getattr(_aten, self.name).out(x, out=out, **dict(self.options))

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad = grad·act′(x)."""
        backward = getattr(_aten, f"{self.name}_backward")
        return backward.grad_input(grad, x, grad_input=grad, **dict(self.options))

    @cached_property
    def gated(self) -> CompiledFunction:
        """(gate, up) → act(gate)·up."""
        function, options = getattr(_aten, self.name), dict(self.options)
        return CompiledFunction(lambda gate, up: function(gate, **options) * up)

    @cached_property
    def gated_gradients(self) -> CompiledFunction:
        """(grad, gate, up) → the gradients of gate and up."""
        function, options = getattr(_aten, self.name), dict(self.options)
        backward = getattr(_aten, f"{self.name}_backward")
        return CompiledFunction(
            lambda grad, gate, up: (backward(grad * up, gate, **options), function(gate, **options) * grad)
        )


SILU = Activation("silu")
GELU = Activation("gelu")
GELU_TANH = Activation("gelu", (("approximate", "tanh"),))


class _Middle:
    """act(gate)·up, or act(up): in one compiled kernel if that is faster, else in reused memory."""

    def __init__(self, act: Activation, entering: Sequence[Tensor], scratch: Scratch) -> None:
        self._act, self._entering = act, entering
        first, *self._up = entering
        self._at_once = bool(self._up) and pays(first)
        if self._at_once:
            self.value: Tensor = act.gated(*entering)
            return
        self._activated = act.value(first, scratch.take("activated", *first.shape, like=first))
        self.value = self._activated
        for up in self._up:
            self.value = torch.mul(self._activated, up, out=scratch.take("middle", *up.shape, like=up))

    def gradients(self, grad: Tensor) -> list[Tensor]:
        """Gradients of the inputs from the gradient of the value; overwrites both, so call it only once."""
        if self._at_once:
            return [*self._act.gated_gradients(grad, *self._entering)]
        of_up = [self._activated.mul_(grad) for _ in self._up]
        for up in self._up:
            grad.mul_(up)
        return [self._act.gradient(grad, self._entering[0]), *of_up]


class _MLP(torch.autograd.Function):
    """Parts are (gate, up, down), or (up, down). act(gate)·up is recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        act: Activation,
        keep: bool,
        scratch: Scratch,
        static: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        *inner, down = unflatten(static, tensors)
        entering, saved = forward_products(x, inner)
        (y,), of_down = forward_products(_Middle(act, entering, scratch).value, [down])
        low_rank = [tensor for own in (*saved, *of_down) for tensor in own.tensors]
        ctx.save_for_backward(x, *low_rank, *(entering if keep else ()), *tensors)
        ctx.act, ctx.keep, ctx.scratch, ctx.static = act, keep, scratch, static
        return reshaped(y, x.shape[:-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *kept = ctx.saved_tensors
        saved, of_down = (saved_activations(kept, own) for own in (ctx.static[:-1], ctx.static[-1:]))
        count = len(ctx.static) - 1 if ctx.keep else 0
        *inner, down = unflatten(ctx.static, kept[count:])
        entering = kept[:count] if ctx.keep else forward_products(x, inner)[0]
        need_x, _, _, _, _, *needs = ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        split = TENSORS * len(inner)

        middle = _Middle(ctx.act, entering, ctx.scratch)
        dmiddle, down_gradients = backward_products([dy], middle.value, of_down, [down], True, needs[split:])
        assert dmiddle is not None
        dentering = middle.gradients(dmiddle)
        dx, gradients = backward_products(
            dentering, x.reshape(-1, x.shape[-1]), saved, inner, need_x, needs[:split]
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

    Saves x, x·U, and with `keep` also gate(x) and up(x). Without `keep` these two are recomputed in the
    backward pass, which costs a third more matrix products of the block (a quarter without a gate). W and
    biases get no gradient. `scratch` is memory that blocks reuse one after another.
    """
    parts = [part for part in (gate, up, down) if part is not None]
    static, tensors = flatten(parts)
    return _MLP.apply(x, act, keep, scratch or Scratch(), static, *tensors)  # type: ignore[return-value]
