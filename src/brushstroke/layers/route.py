"""The active route: which slot of a bank each row of a batch uses, or each span of a packed row.

It holds no factors and knows no layer; every site of one attachment shares one route.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from brushstroke.errors import RouteError

Modules = set[object]


@dataclass(frozen=True)
class SlotSpan:
    """Neighbouring tokens that share one slot; a batch counts its tokens row by row."""

    slot: int
    tokens: slice


class Route:
    """Which slot each row of a batch uses; slot 0 is always "no adapter".

    A route of one row serves a batch of any size. A batch with k times as many rows as the route (beams,
    several samples of one prompt, or rows flattened to tokens) repeats every entry k times. With `lengths`
    the entries are spans of one packed row, of so many tokens each.
    """

    def __init__(self, slots: Sequence[int] = (0,)) -> None:
        self._spans: dict[tuple[int, ...], tuple[SlotSpan, ...]] = {}
        self._ranks_used: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self._ran: Modules | None = None
        self._switch(tuple(slots), None)

    @property
    def slots(self) -> tuple[int, ...]:
        """One slot for each row, or for each span of a packed row."""
        return self._slots

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """The tokens of each span of a packed row; None where the entries are rows of a batch."""
        return self._lengths

    @property
    def uniform(self) -> int | None:
        """The one slot of all rows, or None where they differ."""
        first = self._slots[0]
        return first if all(slot == first for slot in self._slots) else None

    def set(self, slots: Sequence[int], lengths: Sequence[int] | None = None) -> Callable[[], None]:
        """Switch to other slots; returns what switches back.

        Args:
            slots: one for each row of a batch; with `lengths` one for each span of a packed row.
            lengths: tokens of each span.

        Raises:
            RouteError: no slot at all.
        """
        if not slots:
            raise RouteError("a route needs at least one row; got none")
        before = self._slots, self._lengths
        self._switch(tuple(slots), None if lengths is None else tuple(lengths))
        return lambda: self._switch(*before)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager: put back in the end what is active now."""
        before = self._slots, self._lengths
        try:
            yield
        finally:
            self._switch(*before)

    def spans(self, shape: Sequence[int]) -> tuple[SlotSpan, ...]:
        """The tokens of an input of this shape (without its width), without those that use no adapter.

        Raises:
            RouteError: the batch is no multiple of the route, or not the packed row that it speaks of.
        """
        key = tuple(shape)
        if key not in self._spans:
            bounds = list(accumulate(self._counts(key), initial=0))
            entries = zip(self._slots, pairwise(bounds), strict=True)
            runs = [(slot, list(run)) for slot, run in groupby(entries, key=lambda entry: entry[0])]
            self._spans[key] = tuple(
                SlotSpan(slot, slice(run[0][1][0], run[-1][1][1])) for slot, run in runs if slot
            )
        return self._spans[key]

    def _counts(self, shape: tuple[int, ...]) -> Sequence[int]:
        """The tokens of each entry."""
        rows, tokens = (shape or (1,))[0], math.prod(shape)
        if self._lengths is not None:
            if tokens != sum(self._lengths):
                raise RouteError(
                    f"the route covers a packed row of {sum(self._lengths)} tokens, this input has {tokens}; "
                    "run rows of one adapter at a time through a model that splits its tokens among modules"
                )
            return self._lengths
        if not rows or rows % len(self._slots):
            raise RouteError(_wrong_rows(len(self._slots), rows))
        return [tokens // len(self._slots)] * len(self._slots)

    def slot_index(self, rows: int, device: torch.device) -> Int[Tensor, " b"]:
        """One slot for each row of a batch of this size, as a tensor: compiled graphs index by it.

        The tensor is read as data, so that one graph serves every route of the same number of rows.

        Raises:
            RouteError: the batch is no multiple of the route.
        """
        entries = self._index.shape[0]
        if rows % entries:  # no divmod: compilers don't know it for sizes that vary
            raise RouteError(_wrong_rows(entries, rows))
        return self._index.to(device).repeat_interleave(rows // entries)

    def ranks_used(self, rows: int, slots: int, rank: int, device: torch.device) -> Bool[Tensor, "b k"]:
        """For each row of a batch of this size, which of the ranks of so many slots are its own.

        Raises:
            RouteError: the batch is no multiple of the route.
        """
        key = (rows, slots, rank, device)
        if key not in self._ranks_used:
            owners = torch.arange(slots, device=device).repeat_interleave(rank)
            self._ranks_used[key] = self.slot_index(rows, device)[:, None] == owners
        return self._ranks_used[key]

    def guard(self, y: Tensor) -> Tensor:
        """Make the backward pass through y raise if the route is another one by then."""
        if isinstance(y, Tensor) and y.requires_grad and not torch.compiler.is_compiling():
            captured = self._slots, self._lengths
            y.register_hook(lambda grad: self.check(*captured))
        return y

    @contextmanager
    def recorded(self) -> Iterator[Modules]:
        """Context manager: collect the modules that run with an adapter."""
        self._ran = Modules()
        try:
            yield self._ran
        finally:
            self._ran = None

    def record(self, module: object) -> None:
        """Note that a module runs with an adapter, where that is asked for."""
        if self._ran is not None:
            self._ran.add(module)

    def check(self, slots: tuple[int, ...], lengths: tuple[int, ...] | None = None) -> None:
        """Raise unless the route is still the one that was captured when the forward began.

        Raises:
            RouteError: it is another one.
        """
        if (slots, lengths) != (self._slots, self._lengths):
            raise RouteError(
                f"the forward pass ran under the route {slots}, the backward pass runs under {self._slots}; "
                "call backward() before the route changes"
            )

    def _switch(self, slots: tuple[int, ...], lengths: tuple[int, ...] | None) -> None:
        if lengths is not None and len(set(slots)) == 1:
            slots, lengths = slots[:1], None  # of an input of any shape
        self._slots, self._lengths = slots, lengths
        self._index = torch.tensor(slots)
        self._spans.clear()
        self._ranks_used.clear()


def _wrong_rows(route: int, batch: int) -> str:
    return f"the route has {route} rows, the batch {batch}; give one name (or None) for each row of the batch"
