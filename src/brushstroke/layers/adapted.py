"""The forward passes of adapted modules: mixins that a module's class is swapped for.

No hooks, no wrapper modules and no merging here; `attach` and `bank` do the swapping.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from brushstroke.errors import AttachError
from brushstroke.layers.route import Route, SlotSpan
from brushstroke.layers.walk import has_plain_forward
from brushstroke.lowrank.apply import (
    EVERYTHING,
    LinearParts,
    Span,
    gathered_term,
    lowrank_linears,
    lowrank_term,
    stacked_term,
)

STACKED_ROWS, STACKED_RANKS = 256, 256  # up to here all factors meet all rows: fewer operations count more


class Adapted(nn.Module):
    """What every adapted module has: the class that it had, and the route that all sites share."""

    weight: Tensor
    bias: Tensor | None
    _route: Route
    _base_class: ClassVar[type[nn.Module]]
    _added: ClassVar[tuple[str, ...]]  # the attributes that an adapter adds besides the route
    _fused: ClassVar[bool] = False
    _weight_is_dxh: ClassVar[bool] = False

    @property
    def _widths(self) -> tuple[int, int]:
        """(d, h) of the factors that are installed."""
        raise NotImplementedError

    def _trial(self, U_rows: Tensor, V: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and settings with which slot 1 would be U·V, for a probe."""
        raise NotImplementedError

    def _spans(self, x: Tensor) -> tuple[SlotSpan, ...]:
        """The tokens of an input that use an adapter, by slot."""
        slot = self._route.uniform
        if slot is None:
            return self._route.spans(x.shape[:-1])
        return (SlotSpan(slot, EVERYTHING.rows),) if slot else ()

    def _may_fuse(self, x: Tensor) -> bool:
        """Whether the fused step computes what this module's own forward and its updates would."""
        return self._fused and _is_frozen(self) and not torch.is_autocast_enabled(x.device.type)

    def parts(self, x: Tensor) -> LinearParts | None:
        """What the fused step needs for this input, or None where it would not be the same computation.

        Whoever asks is about to run the module, so that it counts as run.
        """
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapted":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AttachError(
            "a model with an adapter in it cannot be pickled; save the adapter by itself with "
            "brushstroke.save(), "
            "or detach it first"
        )


class AdaptedLinear(Adapted):
    """y = x·W + scale·(x·U)·V for modules that map the last axis (…, d) → (…, h), with one adapter.

    Parameters `lora_U_rows` (r×d, Uᵀ) and `lora_V` (r×h). Slot 1 of the route is the adapter, slot 0 the
    base.
    """

    lora_U_rows: nn.Parameter
    lora_V: nn.Parameter
    lora_scale: float
    lora_dropout: float
    _added = ("lora_U_rows", "lora_V", "lora_scale", "lora_dropout")

    @property
    def _widths(self) -> tuple[int, int]:
        """(d, h) of the factors that are installed."""
        return self.lora_U_rows.shape[1], self.lora_V.shape[1]

    def _trial(self, U_rows: Tensor, V: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and settings with which slot 1 would be U·V, for a probe."""
        return {"lora_U_rows": U_rows, "lora_V": V}, {"lora_scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, plus the low-rank term where the route asks for it."""
        route = self._route
        if route.uniform == 0:
            return route.guard(super().forward(x))
        if (parts := self.parts(x)) is not None:
            return route.guard(lowrank_linears(x, [parts])[0])
        factors = {1: (self.lora_U_rows, self.lora_V, self.lora_scale)}
        return route.guard(_add_terms(super().forward(x), x, self._spans(x), factors, self._drop))

    @property
    def _drop(self) -> float:
        """The dropout that is on."""
        return self.lora_dropout if self.training else 0.0

    def parts(self, x: Tensor) -> LinearParts | None:
        """The update in each span that uses it; None with dropout, or where the whole input is the base's."""
        self._route.record(self)
        if self._route.uniform == 0 or self._drop or not self._may_fuse(x):
            return None
        spans = tuple(Span(span.tokens, EVERYTHING.ranks) for span in self._spans(x))
        return LinearParts(
            *(self.weight, self.bias, self.lora_U_rows, self.lora_V, self.lora_scale, self._weight_is_dxh),
            spans,
        )


class BankedLinear(Adapted):
    """y = x·W + (x·U_s)·V_s with the slot s chosen for each row; scales are folded into V.

    Buffers `bank_U_rows` (s×r×d) and `bank_V` (s×r×h); a slot of smaller rank is padded with zeros, its true
    rank stands in `bank_ranks`. Slot 0 is all zero.
    """

    bank_U_rows: Tensor
    bank_V: Tensor
    bank_ranks: list[int]
    _added = ("bank_U_rows", "bank_V", "bank_ranks")

    @property
    def _widths(self) -> tuple[int, int]:
        """(d, h) of the factors that are installed."""
        return self.bank_U_rows.shape[2], self.bank_V.shape[2]

    def _trial(self, U_rows: Tensor, V: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and settings with which slot 1 would be U·V, for a probe."""
        stacks = {"bank_U_rows": U_rows, "bank_V": V}
        return {name: torch.stack([t * 0, t]) for name, t in stacks.items()}, {"bank_ranks": [0, 1]}

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, plus the low-rank term of each row, or of each span of a packed row."""
        route = self._route
        if torch.compiler.is_compiling():
            slots = route.slot_index(x.shape[0], x.device)
            y = super().forward(x)
            return y + gathered_term(x, self.bank_U_rows[slots], self.bank_V[slots]).to(y.dtype)
        slots, rank, _ = self.bank_V.shape
        mixed = route.uniform is None and route.lengths is None and x.ndim > 1
        if mixed and x.shape[:-1].numel() <= STACKED_ROWS and slots * rank <= STACKED_RANKS:
            y = super().forward(x)
            uses = route.ranks_used(x.shape[0], slots, rank, x.device)
            return route.guard(y + stacked_term(x, self.bank_U_rows, self.bank_V, uses).to(y.dtype))
        spans = self._spans(x)
        if spans and (parts := self.parts(x)) is not None:
            return route.guard(lowrank_linears(x, [parts])[0])
        factors = {span.slot: self._factors(span.slot) for span in spans}
        return route.guard(_add_terms(super().forward(x), x, spans, factors))

    def parts(self, x: Tensor) -> LinearParts | None:
        """The stacks, of which each span uses the ranks of its slot."""
        if not self._may_fuse(x):
            return None
        rank = self.bank_V.shape[1]  # ranks of one slot, with its padding
        spans = tuple(
            Span(span.tokens, slice(rank * span.slot, rank * span.slot + self.bank_ranks[span.slot]))
            for span in self._spans(x)
        )
        stacks = (self.bank_U_rows.flatten(0, 1), self.bank_V.flatten(0, 1)) if spans else (None, None)
        return LinearParts(self.weight, self.bias, *stacks, 1.0, self._weight_is_dxh, spans)

    def _spans(self, x: Tensor) -> tuple[SlotSpan, ...]:
        """Without those whose slot has no update here."""
        return tuple(span for span in super()._spans(x) if self.bank_ranks[span.slot])

    def _factors(self, slot: int) -> tuple[Tensor, Tensor, float]:
        rank = self.bank_ranks[slot]
        return self.bank_U_rows[slot, :rank], self.bank_V[slot, :rank], 1.0


def shared_parts(x: Tensor, modules: Sequence[nn.Module]) -> list[LinearParts] | None:
    """The parts of linears that one fused function may run together; None where one of them must run itself.

    A plain linear takes part where it is frozen; hooks are never passed over.
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


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches this module, so that it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _plain_parts(module: nn.Module, x: Tensor) -> LinearParts | None:
    if not has_plain_forward(module):
        return None
    if not _is_frozen(module) or torch.is_autocast_enabled(x.device.type):
        return None
    weight, bias = cast(Tensor, module.weight), cast(Tensor | None, module.bias)
    return LinearParts(weight, bias, weight_is_dxh=not isinstance(module, nn.Linear))


def _is_frozen(module: nn.Module) -> bool:
    """Whether nobody wants a gradient of W and the bias."""
    own = (module.weight, module.bias)
    return not torch.is_grad_enabled() or not any(p.requires_grad for p in own if isinstance(p, Tensor))


def _add_terms(
    y: Tensor,
    x: Tensor,
    spans: Sequence[SlotSpan],
    factors: Mapping[int, tuple[Tensor, Tensor, float]],
    dropout: float = 0.0,
) -> Tensor:
    """Add the low-rank term of each span's slot to the base's output, by plain operations."""
    if [span.tokens for span in spans] == [EVERYTHING.rows]:
        return y + lowrank_term(x, *factors[spans[0].slot], dropout, dropout > 0).to(y.dtype)
    tokens, out = (t.reshape(-1, t.shape[-1]) for t in (x, y.clone() if torch.is_grad_enabled() else y))
    for span in spans:
        term = lowrank_term(tokens[span.tokens], *factors[span.slot], dropout, dropout > 0)
        out[span.tokens] += term.to(y.dtype)
    return out.view(y.shape)


@cache
def adapted_class(base: type[nn.Module], mixin: type[Adapted]) -> type[Adapted]:
    """The subclass `mixin + base`, made once for each pair."""
    plain_linear = base.forward is nn.Linear.forward
    conv1d = base.__name__ == "Conv1D"
    return type(
        f"{mixin.__name__}{base.__name__}",
        (mixin, base),
        {
            "_base_class": base,
            "_fused": plain_linear or conv1d,
            "_weight_is_dxh": conv1d,
            "__module__": __name__,
        },
    )


MixinT = TypeVar("MixinT", bound=Adapted)


def swap_class(module: nn.Module, path: str, mixin: type[MixinT], route: Route) -> MixinT:
    """Turn a module into its adapted self, in place, and return it.

    Raises:
        AttachError: an object's own forward would bypass the new class.
    """
    if "forward" in module.__dict__:
        raise AttachError(
            f"{path} carries a forward of its own (offload and device-map hooks do this), which would "
            "bypass the "
            "adapter without a word; load the model without device_map offloading, or remove the hooks first"
        )
    module.__class__ = adapted_class(type(module), mixin)
    module.__dict__["_route"] = route
    return cast(MixinT, module)


def restore_classes(modules: Mapping[str, Adapted]) -> None:
    """Give modules the classes back that `swap_class` found, and take out what an adapter has added.

    Raises:
        AttachError: something else changed a class since; nothing is changed then.
    """
    changed = [path for path, module in modules.items() if not _is_ours(module)]
    if changed:
        found = type(modules[changed[0]]).__name__
        raise AttachError(
            f"the class of {', '.join(changed)} was changed by something else since the adapter was attached "
            f"(it is {found}); undo that first"
        )
    for module in modules.values():
        for name in module._added:
            if hasattr(module, name):
                delattr(module, name)
        del module.__dict__["_route"]
        plain = cast(nn.Module, module)
        plain.__class__ = module._base_class


def _is_ours(module: nn.Module) -> bool:
    if not isinstance(module, Adapted):
        return False
    return any(type(module) is adapted_class(module._base_class, m) for m in (AdaptedLinear, BankedLinear))
