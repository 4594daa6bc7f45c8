"""Computes y = x·W + scale·(x·U)·V as one autograd function, also for rows that use different factors.

Does not hold parameters and does not choose routes (`layers` does).

Both factors are contiguous rows, Uᵀ (r×d) and V (r×h): on CPUs the narrow products are up to four times
faster than with U as (d×r).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from brushstroke.lowrank.autograd import first_order
from brushstroke.lowrank.matmul import HALF, in_onednn, product, product_onto, scaled_product
from brushstroke.lowrank.quantised import dense_4bit, is_4bit


class Span(NamedTuple):
    """Rows of the input that share one update, and the ranks of the stacked factors that the update uses."""

    rows: slice
    ranks: slice


EVERYTHING = Span(slice(None), slice(None))


class LinearParts(NamedTuple):
    """One frozen linear layer and its updates, x·W + bias + scale·(x·U)·V, as tensors.

    Args:
        weight: (h×d) as torch stores it, or (d×h), for example in HF's Conv1D, if `weight_is_dxh`; or a
            weight of bitsandbytes in 4 bits.
        bias: (h) or None.
        U_rows, V: Uᵀ (r×d) and V (r×h); both None if the layer has no update.
        scale: the factor of the low-rank term.
        weight_is_dxh: whether `weight` is (d×h).
        spans: which rows use which ranks; spans do not overlap. By default all rows use all ranks.
        base_first: in half precision, whether x·W + bias is rounded as in the base before the low-rank term
            is added: where V is zero, so that the output equals the base's bit for bit, and for weights that
            are no plain tensors. Otherwise the sum is rounded once.
    """

    weight: Tensor
    bias: Tensor | None
    U_rows: Tensor | None = None
    V: Tensor | None = None
    scale: float = 1.0
    weight_is_dxh: bool = False
    spans: tuple[Span, ...] = (EVERYTHING,)
    base_first: bool = False

    def factors(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Uᵀ and V of the update that these rows use; None if they use none."""
        ranks = self.ranks(rows)
        if ranks is None or self.U_rows is None or self.V is None:
            return None
        return self.U_rows[ranks], self.V[ranks]

    def ranks(self, rows: slice) -> slice | None:
        """The ranks of the update that these rows use; None if they use none."""
        return next((span.ranks for span in self.spans if span.rows == rows), None)


TENSORS = 4  # the number of tensors of one LinearParts that an autograd function receives


def flatten(parts: Sequence[LinearParts]) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """Separate settings from tensors, as `torch.autograd.Function.apply` needs them."""
    parts = [part if part.U_rows is not None else part._replace(spans=()) for part in parts]
    return tuple(part[TENSORS:] for part in parts), [tensor for part in parts for tensor in part[:TENSORS]]


def unflatten(static: Sequence[tuple[Any, ...]], tensors: Sequence[Any]) -> list[LinearParts]:
    """The inverse of `flatten`."""
    return [
        LinearParts(*tensors[TENSORS * i : TENSORS * (i + 1)], *settings) for i, settings in enumerate(static)
    ]


class LowRankActivations(NamedTuple):
    """Low-rank activations of one span, saved for backward in the dtype of the input.

    R is the sum of the ranks of all linears.

    Args:
        xu: x·U of all linears, concatenated along the columns (n×R).
        U_rows: Uᵀ of all linears, concatenated along the rows (R×d).
        V: V of each linear; None for a linear without an update.
    """

    xu: Tensor
    U_rows: Tensor
    V: Sequence[Tensor | None]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in one tuple, as `save_for_backward` needs them."""
        return self.xu, self.U_rows, *self.V

    def columns(self) -> Iterator[tuple[int, Tensor, slice]]:
        """For each linear with an update: its index, its V, and its columns in `xu`."""
        start = 0
        for i, V in enumerate(self.V):
            if V is not None:
                yield i, V, slice(start, start + len(V))
                start += len(V)


def saved_activations(saved: list[Any], static: Sequence[tuple[Any, ...]]) -> list[LowRankActivations]:
    """Remove from the start of a list the tensors that `forward_products` saved for these settings."""
    parts = unflatten(static, [None] * (TENSORS * len(static)))
    return [
        LowRankActivations(saved.pop(0), saved.pop(0), [saved.pop(0) for _ in parts])
        for _ in _spanned_rows(parts)
    ]


def _spanned_rows(parts: Sequence[LinearParts]) -> list[slice]:
    """The row ranges in which at least one of the parts has an update."""
    found: list[slice] = []
    for part in parts:
        found += [span.rows for span in part.spans if span.rows not in found]
    return found


def forward_products(
    x: Tensor, parts: Sequence[LinearParts]
) -> tuple[list[Tensor], list[LowRankActivations]]:
    """The outputs (n×h each) of linears that share an input (…×d, n rows), and the activations to save."""
    rows = x.reshape(-1, x.shape[-1])
    saved: list[LowRankActivations] = []
    terms: list[list[_Term]] = [[] for _ in parts]
    for span in _spanned_rows(parts):
        saved.append(_activations(rows, parts, span))
        for i, V, columns in saved[-1].columns():
            terms[i].append(_Term(span, saved[-1].xu[:, columns], V))
    return [_output(x, part, own) for part, own in zip(parts, terms, strict=True)], saved


class _Term(NamedTuple):
    """The low-rank term xu·V of some rows, without the scale."""

    rows: slice
    xu: Tensor
    V: Tensor


def _activations(rows: Tensor, parts: Sequence[LinearParts], span: slice) -> LowRankActivations:
    factors = [part.factors(span) for part in parts]
    stacked = [pair[0] for pair in factors if pair is not None]
    U_rows = (stacked[0] if len(stacked) == 1 else torch.cat(stacked)).to(rows.dtype)
    V = [None if pair is None else pair[1].to(rows.dtype) for pair in factors]
    return LowRankActivations(product(rows[span], U_rows), U_rows, V)


def _output(x: Tensor, part: LinearParts, terms: Sequence[_Term]) -> Float[Tensor, "n h"]:
    """x·W + bias and the low-rank terms; in half precision W's product is added to the terms."""
    if terms and x.dtype in HALF and not part.base_first:
        spans = [term.rows for term in terms]
        scaled = [scaled_product(term.xu, term.V, part.scale, x.dtype) for term in terms]
        if spans == [EVERYTHING.rows]:
            return product_onto(scaled[0], x.reshape(-1, x.shape[-1]), _weight_rows(part), part.bias)
        total = x.new_empty(x.shape[:-1].numel(), len(_weight_rows(part)))
        for rows, term in zip(spans, scaled, strict=True):
            total[rows] = term
        return _onto(total, spans, x, part)
    y = _base_output(x, part)
    for term in terms:
        y[term.rows].addmm_(term.xu, term.V, alpha=part.scale)
    return y


def _base_output(x: Tensor, part: LinearParts) -> Float[Tensor, "n h"]:
    """x·W + bias, as the base computes it: torch rounds differently for other shapes of x."""
    rows = x.reshape(-1, x.shape[-1]) if part.weight_is_dxh else x
    y = product(rows, _weight_rows(part, x.dtype), part.bias).contiguous()
    return y.view(-1, y.shape[-1])


def _onto(
    total: Float[Tensor, "n h"], spans: Sequence[slice], x: Float[Tensor, "*b d"], part: LinearParts
) -> Float[Tensor, "n h"]:
    """x·W + bias, added to `total` in the rows of the spans, and as the base computes it in the other rows.

    Reads W once if the spans cover all rows, else twice.
    """
    rows = x.reshape(-1, x.shape[-1])
    inside = torch.cat([torch.arange(len(rows))[span] for span in spans])
    if len(inside) == len(rows):
        return product_onto(total, rows, _weight_rows(part), part.bias)
    inside = inside.to(rows.device)
    y = _base_output(x, part)
    y[inside] = product_onto(total[inside], rows[inside], _weight_rows(part), part.bias)
    return y


def _weight_rows(part: LinearParts, dtype: torch.dtype | None = None) -> Float[Tensor, "h d"]:
    """Wᵀ; a weight in 4 bits is dequantised whenever it is needed, in this dtype."""
    if is_4bit(part.weight):
        return dense_4bit(part.weight).to(dtype)
    return part.weight.mT if part.weight_is_dxh else part.weight


def reshaped(y: Tensor, leading: Sequence[int]) -> Tensor:
    """An output (n×h) as (*leading, h), for the end of an autograd function; y must not be used afterwards.

    Unlike `y.view`, autograd does not treat the result as a view, so that callers can change it in place.
    """
    return torch.ops.aten._unsafe_view(y, [*leading, y.shape[-1]])


def backward_products(
    dys: Sequence[Tensor],
    rows: Tensor,
    saved: Sequence[LowRankActivations],
    parts: Sequence[LinearParts],
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of the rows (n×d), and four gradients per part; only those of U_rows and V are set.

    Args:
        dys: gradients of the outputs (n×h each).
        rows: the input (n×d).
        saved: the activations that `forward_products` returned.
        parts: the linears.
        need_x: whether the gradient of the rows is needed.
        needs: for each tensor of each part, whether its gradient is needed.
    """
    gradients: list[Tensor | None] = [None] * (TENSORS * len(parts))
    spans = _spanned_rows(parts)
    dxus = [_xu_gradients(dys, parts, span, own) for span, own in zip(spans, saved, strict=True)]
    dx = _input_gradient(dys, rows, parts, list(zip(spans, dxus, saved, strict=True))) if need_x else None
    for span, dxu, activations in zip(spans, dxus, saved, strict=True):
        dU = None
        for i, _, columns in activations.columns():
            part, first = parts[i], TENSORS * i
            if part.U_rows is None or part.V is None:
                continue
            if needs[first + 2]:
                if dU is None:  # one product for all parts
                    dU = scaled_product(dxu.mT, rows[span], 1.0, _widest(parts))
                own_dU = dU[columns].to(part.U_rows.dtype)
                gradients[first + 2] = _add_span(gradients[first + 2], own_dU, part.U_rows, part.ranks(span))
            if needs[first + 3]:
                dV = scaled_product(activations.xu[:, columns].mT, dys[i][span], part.scale, part.V.dtype)
                gradients[first + 3] = _add_span(gradients[first + 3], dV, part.V, part.ranks(span))
    return dx, gradients


def _xu_gradients(
    dys: Sequence[Tensor], parts: Sequence[LinearParts], span: slice, saved: LowRankActivations
) -> Float[Tensor, "n r"]:
    """The gradients of all x·U of a span, in the order of its activations."""
    terms = [_xu_gradient(dys[i][span], V, parts[i].scale) for i, V, _ in saved.columns()]
    return terms[0] if len(terms) == 1 else torch.cat(terms, dim=1)


def _input_gradient(
    dys: Sequence[Tensor],
    rows: Tensor,
    parts: Sequence[LinearParts],
    low_rank: Sequence[tuple[slice, Tensor, LowRankActivations]],
) -> Float[Tensor, "n d"]:
    """Σ dyᵢ·Wᵢᵀ and the low-rank terms; in half precision the products are added to the terms."""
    dx = None
    if low_rank and rows.dtype in HALF:
        terms = [scaled_product(dxu, saved.U_rows, 1.0, rows.dtype) for _, dxu, saved in low_rank]
        spans = [span for span, _, _ in low_rank]
        if spans == [EVERYTHING.rows]:
            (dx,) = terms
        else:
            dx = torch.zeros_like(rows)
            for span, term in zip(spans, terms, strict=True):
                dx[span] += term
    for dy, part in zip(dys, parts, strict=True):
        weight = _weight_rows(part, dy.dtype).mT
        dx = product(dy, weight) if dx is None else product_onto(dx, dy, weight)
    assert dx is not None
    if rows.dtype not in HALF:
        for span, dxu, saved in low_rank:
            dx[span].addmm_(dxu, saved.U_rows)
    return dx


def _add_span(total: Tensor | None, gradient: Tensor, factor: Tensor, ranks: slice | None) -> Tensor:
    """Add the gradient of one span of the rows to the accumulated gradient of a factor."""
    if total is None and gradient.shape == factor.shape:
        return gradient
    total = torch.zeros_like(factor) if total is None else total
    total[ranks] += gradient
    return total


def _widest(parts: Sequence[LinearParts]) -> torch.dtype:
    """The dtype that all factors promote to."""
    dtypes = [part.U_rows.dtype for part in parts if part.U_rows is not None]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _xu_gradient(dy: Tensor, V: Tensor, scale: float) -> Tensor:
    """The gradient of x·U; the kernels apply the scale inside the product if they can."""
    return product(dy, V).mul_(scale) if in_onednn(dy, V) else scaled_product(dy, V.mT, scale, dy.dtype)


class _LowRankLinears(torch.autograd.Function):
    """Saves x and low-rank activations for the backward pass, and never forms the gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, static: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ys, saved = forward_products(x, unflatten(static, tensors))
        ctx.save_for_backward(x, *(tensor for one in saved for tensor in one.tensors), *tensors)
        ctx.static = static
        return tuple(reshaped(y, x.shape[:-1]) for y in ys)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *kept = ctx.saved_tensors
        saved = saved_activations(kept, ctx.static)
        parts = unflatten(ctx.static, kept)
        dys = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        need_x, _, *needs = ctx.needs_input_grad
        dx, gradients = backward_products(dys, x.reshape(-1, x.shape[-1]), saved, parts, need_x, needs)
        return None if dx is None else dx.view(x.shape), None, *gradients


def lowrank_linears(x: Float[Tensor, "*b d"], parts: Sequence[LinearParts]) -> tuple[Tensor, ...]:
    """x·Wᵢ + biasᵢ + scaleᵢ·(x·Uᵢ)·Vᵢ for several linears that share x, in one autograd function.

    x is saved once, one product computes all x·Uᵢ, and the gradients of x accumulate in place. Wᵢ and biasᵢ
    are frozen and never get a gradient. The low-rank products run in x's dtype; gradients have the dtype of
    the factors. Source: arXiv:2106.09685, equation 3.

    Returns:
        One (…×h) tensor for each part.

    Raises:
        RuntimeError: the backward pass would need a second derivative (`create_graph=True`).
    """
    static, tensors = flatten(parts)
    return _LowRankLinears.apply(x, static, *tensors)  # type: ignore[return-value]


class _LinearOnto(torch.autograd.Function):
    """term + x·W + bias."""

    @staticmethod
    def forward(
        ctx: Any, term: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dxh: bool, spans: list[slice]
    ) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.dxh, ctx.dtype = dxh, weight.dtype
        part = LinearParts(weight, bias, weight_is_dxh=dxh)
        total = term.reshape(-1, term.shape[-1]).clone()
        return reshaped(_onto(total, spans, x, part), x.shape[:-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dy,), (x, weight) = grad_outputs, ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None if weight is None else product(dy, weight if ctx.dxh else weight.mT)
        dW = None
        if x is not None:
            sides = rows.mT, x.reshape(-1, x.shape[-1])
            dW = scaled_product(*sides, 1.0, ctx.dtype)
            dW = dW.mT if ctx.dxh else dW
        return dy, dx, dW, rows.sum(0) if ctx.needs_input_grad[3] else None, None, None


def linear_onto(
    term: Float[Tensor, "*b h"],
    x: Float[Tensor, "*b d"],
    weight: Tensor,
    bias: Tensor | None,
    weight_is_dxh: bool,
    spans: Sequence[slice] = (EVERYTHING.rows,),
) -> Float[Tensor, "*b h"]:
    """term + x·W + bias, rounded once, with the gradients of all of them.

    Rows outside of the spans get x·W + bias as the base computes it; their term must be zero.
    """
    inputs = term.to(x.dtype), x, weight, bias
    return _LinearOnto.apply(*inputs, weight_is_dxh, list(spans))  # type: ignore[return-value]


def lowrank_term(
    x: Float[Tensor, "*b d"],
    U_rows: Float[Tensor, "r d"],
    V: Float[Tensor, "r h"],
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Float[Tensor, "*b h"]:
    """scale·(dropout(x)·U)·V from torch operations: for dropout, autocast or a custom forward."""
    xu = F.linear(F.dropout(x, dropout, training), U_rows.to(x.dtype))
    return (scale * xu) @ V.to(x.dtype)


def stacked_term(
    x: Float[Tensor, "b *n d"],
    U_rows: Float[Tensor, "s r d"],
    V: Float[Tensor, "s r h"],
    uses: Bool[Tensor, "b k"],
) -> Float[Tensor, "b *n h"]:
    """The low-rank term if each row of the batch uses some of the stacked ranks; V includes the scales.

    Two products multiply all rows with all factors; between them, the ranks that a row does not use are set
    to zero. This needs more arithmetic than one product per group of rows, but far fewer operations. V must
    be finite.
    """
    xu = F.linear(x, U_rows.flatten(0, 1).to(x.dtype))
    used = uses.view(uses.shape[0], *[1] * (x.ndim - 2), uses.shape[1])
    return torch.where(used, xu, 0.0) @ V.flatten(0, 1).to(x.dtype)


def gathered_term(
    x: Float[Tensor, "b *n d"], U_rows: Float[Tensor, "b r d"], V: Float[Tensor, "b r h"]
) -> Float[Tensor, "b *n h"]:
    """The low-rank term if each row of the batch has its own factors; V includes the scale."""
    rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    y = torch.bmm(torch.bmm(rows, U_rows.mT), V)
    return y.view(*x.shape[:-1], V.shape[-1])
