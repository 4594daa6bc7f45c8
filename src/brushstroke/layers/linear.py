"""Low-rank updates in linear layers: y = x·W + scale·(x·U)·V, for one adapter or a bank of them.

Layers of other kinds derive from these classes and change how x is multiplied by U; it contains none of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from brushstroke.errors import RouteError
from brushstroke.layers.adapted import Adapted, Attached, Banked, Trial, hooked
from brushstroke.layers.route import SlotSpan
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.apply import (
    EVERYTHING,
    LinearParts,
    Span,
    gathered_term,
    linear_onto,
    lowrank_linears,
    lowrank_term,
    stacked_term,
)
from brushstroke.lowrank.matmul import HALF
from brushstroke.sites import has_plain_forward, require_kind
from brushstroke.sites.kinds import compute_dtype
from brushstroke.sites.quantised import is_packed, is_product

STACKED_ROWS, STACKED_RANKS = 256, 256  # up to this size, one product of all factors and rows is faster

Factors = tuple[Tensor, Tensor, Any]  # Uᵀ (r×d), V (r×h), scale; a subclass may need more than one number


class _LowRankLayer(Adapted):
    """Base class of layers with one update U·V and of layers with several."""

    def leading(self, x: Tensor) -> torch.Size:
        """The shape of an input without its width: the tokens to which a route assigns slots."""
        return x.shape[:-1]

    def spans(self, x: Tensor) -> tuple[SlotSpan, ...]:
        """The tokens of an input that use an update, by slot.

        Raises:
            RouteError: the rows use different slots, and the layer gets tokens in another order or number.
        """
        slot = self._route.uniform
        if slot is None:
            if "experts" in self._site.split("."):
                raise RouteError(
                    f"{self._site} is an expert: it gets the tokens that a router chose for it, so they "
                    "cannot be assigned to rows; run one adapter at a time"
                )
            return self._route.spans(self.leading(x))
        return (SlotSpan(slot, EVERYTHING.rows),) if slot else ()

    def term(self, x: Tensor, factors: Factors, dropout: float = 0.0) -> Tensor:
        """The low-rank term of the output, scale·(x·U)·V."""
        return lowrank_term(x, *factors, dropout, dropout > 0)

    def plain_term(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """x·U·V by the product of the layer's kind, without forming U·V."""
        return self._kind.product(self, x, U) @ V

    def add_update(self, y: Tensor, x: Tensor, factors: Factors, dropout: float) -> Tensor:
        """The output with an update: the base's output y, and the low-rank term."""
        return y + self.term(x, factors, dropout).to(y.dtype)

    def add_updates(
        self,
        y: Tensor,
        x: Tensor,
        spans: Sequence[SlotSpan],
        factors: Mapping[int, Factors],
        dropout: float = 0.0,
    ) -> Tensor:
        """The output y with the low-rank terms of all spans."""
        if [span.tokens for span in spans] == [EVERYTHING.rows]:
            return self.add_update(y, x, factors[spans[0].slot], dropout)
        axes = len(self.leading(x))
        tokens, base = (t.reshape(t.shape[:axes].numel(), *t.shape[axes:]) for t in (x, y))
        out = base.clone() if torch.is_grad_enabled() else base
        for span in spans:
            rows = span.tokens
            out[rows] = self.add_update(base[rows], tokens[rows], factors[span.slot], dropout)
        return out.view(y.shape)

    def may_fuse(self, x: Tensor) -> bool:
        """Whether the fused functions equal this layer's forward with its updates."""
        return self.is_plain(x) and _is_frozen(self)

    def is_plain(self, x: Tensor) -> bool:
        """Whether the base's output is the matrix product x·W, plus the bias, in the dtype of x."""
        return (
            (self._plain or is_product(self, x.dtype))
            and self.weight.ndim == 2
            and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        )

    def with_updates(self, x: Tensor, factors: Mapping[int, Factors], dropout: float = 0.0) -> Tensor:
        """The output with the update of each span's slot, without fused functions."""
        spans = self.spans(x)
        if spans and self.rounds_once(x):
            zeros = x.new_zeros(*self.leading(x), self.widths[1])
            return self.onto(self.add_updates(zeros, x, spans, factors, dropout), x)
        return self.add_updates(super().forward(x), x, spans, factors, dropout)

    def rounds_once(self, x: Tensor) -> bool:
        """Whether the base's product is added to the low-rank term, in half precision, by `onto`."""
        return x.dtype in HALF and type(self.weight) in (Tensor, nn.Parameter) and self.is_plain(x)

    def onto(self, term: Tensor, x: Tensor) -> Tensor:
        """The base's output plus a low-rank term, rounded once in the rows that use an update."""
        spans = [span.tokens for span in self.spans(x)]
        return linear_onto(term, x, self.weight, self.bias, self._kind.stores_dxh, spans)

    def random_factors(self, x: Tensor, base: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Uᵀ (1×d) and V (1×h) for a trial, and the expected output (float64) with them."""
        d, h = self.widths
        dtype = compute_dtype(self)
        U_rows = torch.randn(1, d, generator=generator).to(base.device, dtype) / d**0.5
        V = torch.full((1, h), max(1.0, float(base.abs().mean())), dtype=dtype, device=base.device)
        wide = x.double() if x.is_floating_point() else x
        return U_rows, V, base.double() + self.plain_term(wide, U_rows.double().mT, V.double())


class AttachedLinear(_LowRankLayer, Attached):
    """y = x·W + scale·(x·U)·V for modules that map the last axis (…, d) → (…, h), with one adapter.

    Parameters `lora_U_rows` (r×d, Uᵀ) and `lora_V` (r×h). Slot 1 of the route is the adapter, slot 0 the
    base.
    """

    lora_U_rows: nn.Parameter
    lora_V: nn.Parameter
    lora_scale: float
    _nonzero: tuple[Any, ...]  # identifies a V that was found to be other than zero
    _added = ("lora_U_rows", "lora_V", "lora_scale", "_nonzero", "dropout")

    def install(self, update: LowRank, *, trainable: bool, dropout: float) -> None:
        """Store U and V in the update's dtype; if they train, in fp32 or float64."""
        dtype = update.dtype
        if trainable:
            dtype = torch.float64 if torch.float64 in (self.weight.dtype, dtype) else torch.float32
        for name, tensor in (("lora_U_rows", update.U.mT), ("lora_V", update.V)):
            value = tensor.detach().to(self.weight.device, dtype).clone(memory_format=torch.contiguous_format)
            self.register_parameter(name, nn.Parameter(value, requires_grad=trainable))
        self.lora_scale, self.dropout, self._nonzero = update.scale, dropout, ()

    def factors(self) -> Mapping[str, nn.Parameter]:
        """Uᵀ (r×d), then V (r×h)."""
        return {"lora_U_rows": self.lora_U_rows, "lora_V": self.lora_V}

    def update(self) -> LowRank:
        """Copies of the current U and V."""
        U, V = self.lora_U_rows.detach().clone().mT, self.lora_V.detach().clone()
        return LowRank(U, V, self.lora_scale)

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        """One random U·V."""
        U_rows, V, expected = self.random_factors(x, base, generator)
        return Trial({"lora_U_rows": U_rows, "lora_V": V}, {"lora_scale": 1.0}, expected)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, plus the low-rank term where the route selects the adapter."""
        route = self._route
        if route.uniform == 0:
            return route.guard(super().forward(x))
        if (parts := self.parts(x)) is not None:
            return route.guard(lowrank_linears(x, [parts])[0])
        factors = {1: (self.lora_U_rows, self.lora_V, self.lora_scale)}
        return route.guard(self.with_updates(x, factors, self._active_dropout))

    @property
    def _active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def parts(self, x: Tensor) -> LinearParts | None:
        """The update in each span that uses it; None with dropout, or if no token uses the adapter."""
        self._route.record(self)
        if self._route.uniform == 0 or self._active_dropout or not self.may_fuse(x):
            return None
        spans = tuple(Span(span.tokens, EVERYTHING.ranks) for span in self.spans(x))
        factors = self.lora_U_rows, self.lora_V, self.lora_scale
        base_first = not self.rounds_once(x)
        return LinearParts(self.weight, self.bias, *factors, self._kind.stores_dxh, spans, base_first)

    def rounds_once(self, x: Tensor) -> bool:
        """Also whether V is not zero; if it is, the base's own product gives the output."""
        return super().rounds_once(x) and not self._is_zero()

    def _is_zero(self) -> bool:
        """Whether V is zero, if that can be known.

        On a GPU, where reading V would wait for the device, it is not read again once it was not zero.
        """
        V = self.lora_V
        if V.is_meta or torch.compiler.is_compiling():
            return False
        found = (V.data_ptr(),) if V.is_cuda else (V.data_ptr(), None if V.is_inference() else V._version)
        if found != self._nonzero or None in found:
            if not V.any():
                return True
            self._nonzero = found
        return False


class BankedLinear(_LowRankLayer, Banked):
    """y = x·W + (x·U_s)·V_s, where s is the slot of each row; V includes the scale.

    Buffers `bank_U_rows` (s×r×d) and `bank_V` (s×r×h). A slot of smaller rank is padded with zeros; its rank
    is in `slot_ranks`. Slot 0 is all zeros.
    """

    bank_U_rows: Tensor
    bank_V: Tensor
    slot_ranks: list[int]
    _added = ("bank_U_rows", "bank_V", "slot_ranks")

    @classmethod
    def fits(cls, update: LowRank, module: nn.Module) -> bool:
        """Whether U and scale·V are finite; nan would spread, because several adapters share products."""
        dtype = compute_dtype(module)
        return all(bool(torch.isfinite(t.to(dtype)).all()) for t in (update.U, _scaled_V(update)))

    def prepare(self) -> None:
        """One slot, of rank 0."""
        d, h = self.widths
        self._set_stacks(torch.zeros(1, 0, d), torch.zeros(1, 0, h))
        self.slot_ranks = [0]

    def write(self, slot: int, update: LowRank | None) -> None:
        """Write a slot; an update with V = 0 leaves it empty, so that its rows get the base's own output."""
        self.store(slot, update if update is not None and update.V.any() else None)

    def store(self, slot: int, update: LowRank | None) -> None:
        """Copy U and V to a slot; the stacks grow if they have too few slots or too small a rank."""
        U_rows, V = self.bank_U_rows, self.bank_V
        rank = update.rank if update else 0
        slots, width = U_rows.shape[0], max(U_rows.shape[1], rank)
        while slots <= slot:
            slots *= 2  # spare slots: new shapes would need a new compiled graph
        if (slots, width) != U_rows.shape[:2]:
            grown = [stack.new_zeros(slots, width, stack.shape[2]) for stack in (U_rows, V)]
            for new, old in zip(grown, (U_rows, V), strict=True):
                new[: old.shape[0], : old.shape[1]] = old
            U_rows, V = grown
            self._set_stacks(U_rows, V)
        U_rows[slot].zero_()
        V[slot].zero_()
        if update:
            U_rows[slot, :rank] = update.U.mT
            V[slot, :rank] = _scaled_V(update).to(V.dtype)
        ranks = list(self.slot_ranks) + [0] * (slots - len(self.slot_ranks))
        ranks[slot] = rank
        self.slot_ranks = ranks

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        """One random U·V in slot 1."""
        U_rows, V, expected = self.random_factors(x, base, generator)
        stacks = {"bank_U_rows": U_rows, "bank_V": V}
        tensors = {name: torch.stack([t * 0, t]) for name, t in stacks.items()}
        return Trial(tensors, {"slot_ranks": [0, 1]}, expected)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, plus the low-rank term of each row, or of each span of a packed row."""
        route = self._route
        if torch.compiler.is_compiling():
            return self.add_gathered(super().forward(x), x, route.slot_index(x.shape[0], x.device))
        if not self.spans(x):
            return route.guard(super().forward(x))
        if self.may_stack(x):
            slots, rank, _ = self.bank_V.shape
            uses = route.ranks_used(x.shape[0], slots, rank, x.device)
            term = stacked_term(x, self.bank_U_rows, self.bank_V, uses)
            if self.rounds_once(x):
                return route.guard(self.onto(term, x))
            y = super().forward(x)
            return route.guard(y + term.to(y.dtype))
        if (parts := self.parts(x)) is not None:
            return route.guard(lowrank_linears(x, [parts])[0])
        factors = {span.slot: self._factors(span.slot) for span in self.spans(x)}
        return route.guard(self.with_updates(x, factors))

    def parts(self, x: Tensor) -> LinearParts | None:
        """The stacked factors; each span uses the ranks of its slot."""
        if not self.may_fuse(x):
            return None
        rank = self.bank_V.shape[1]  # ranks of one slot, with its padding
        spans = tuple(
            Span(span.tokens, slice(rank * span.slot, rank * span.slot + self.slot_ranks[span.slot]))
            for span in self.spans(x)
        )
        stacks = (self.bank_U_rows.flatten(0, 1), self.bank_V.flatten(0, 1)) if spans else (None, None)
        settings = 1.0, self._kind.stores_dxh, spans, not self.rounds_once(x)
        return LinearParts(self.weight, self.bias, *stacks, *settings)

    def spans(self, x: Tensor) -> tuple[SlotSpan, ...]:
        """The spans whose slot has an update at this site."""
        return tuple(span for span in super().spans(x) if self.slot_ranks[span.slot])

    def may_stack(self, x: Tensor) -> bool:
        """Whether to multiply all rows by all factors: for small batches with several adapters."""
        mixed = self._route.uniform is None and self._route.rows_only and x.ndim > 1
        slots, rank, _ = self.bank_V.shape
        return mixed and x.shape[:-1].numel() <= STACKED_ROWS and slots * rank <= STACKED_RANKS

    def add_gathered(self, y: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """The output of rows with these slots, for compiled graphs."""
        return y + self.gathered(x, slots).to(y.dtype)

    def gathered(self, x: Tensor, slots: Tensor) -> Tensor:
        """The low-rank term of rows with these slots, for compiled graphs."""
        return gathered_term(x, self.bank_U_rows[slots], self.bank_V[slots])

    def _factors(self, slot: int) -> Factors:
        rank = self.slot_ranks[slot]
        return self.bank_U_rows[slot, :rank], self.bank_V[slot, :rank], 1.0

    def _set_stacks(self, U_rows: Tensor, V: Tensor) -> None:
        place: dict[str, Any] = {"device": self.weight.device, "dtype": compute_dtype(self)}
        self.register_buffer("bank_U_rows", U_rows.to(**place), persistent=False)
        self.register_buffer("bank_V", V.to(**place), persistent=False)


def shared_parts(x: Tensor, modules: Sequence[nn.Module]) -> list[LinearParts] | None:
    """The parts of linears that one fused function can run together; None if one of them must be called.

    A plain linear must be frozen. A module with hooks must always be called.
    """
    found = []
    for module in modules:
        if hooked(module):
            return None
        parts = module.parts(x) if isinstance(module, Adapted) else _plain_parts(module, x)
        if parts is None:
            return None
        found.append(parts)
    return found


def _plain_parts(module: nn.Module, x: Tensor) -> LinearParts | None:
    is_plain = has_plain_forward(module) or (is_packed(module) and is_product(module, x.dtype))
    if not is_plain or not _is_frozen(module) or torch.is_autocast_enabled(x.device.type):
        return None
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    return LinearParts(weight, bias, weight_is_dxh=require_kind(module).stores_dxh)


def _is_frozen(module: nn.Module) -> bool:
    """Whether no gradient of W or the bias is needed."""
    own = (module.weight, module.bias)
    return not torch.is_grad_enabled() or not any(p.requires_grad for p in own if isinstance(p, Tensor))


def _scaled_V(update: LowRank) -> Tensor:
    return update.V.double() * update.scale
