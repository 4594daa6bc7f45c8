"""The route: the slot of a bank that each row of a batch uses, or each span of a packed row.

It holds no factors and no layers; all sites of one attachment share one route.
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
    """Consecutive tokens that share one slot; the tokens of a batch are counted row by row."""

    slot: int
    tokens: slice


class Route:
    """The slot that each row of a batch uses; slot 0 always means "no adapter".

    A route of one row fits a batch of any size. If a batch has k times as many rows as the route (beams,
    several samples of one prompt, or rows flattened to tokens), every entry is repeated k times. With
    `lengths`, the entries are spans of one packed row with these numbers of tokens. With `wanted`, a layer
    such as the head may also run on the wanted outputs alone: this many of each entry, in the same order.
    """

    def __init__(self, slots: Sequence[int] = (0,)) -> None:
        self._spans: dict[tuple[int, ...], tuple[SlotSpan, ...]] = {}
        self._ranks_used: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self._ran: Modules | None = None
        self._switch(tuple(slots), None, None)

    @property
    def slots(self) -> tuple[int, ...]:
        """One slot for each row, or for each span of a packed row."""
        return self._slots

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """The tokens of each span of a packed row; None if the entries are rows of a batch."""
        return self._lengths

    @property
    def rows_only(self) -> bool:
        """Whether the entries are rows of a batch at every site: no spans, and no wanted outputs."""
        return self._lengths is None and self._wanted is None

    @property
    def uniform(self) -> int | None:
        """The slot of all rows, or None if they differ."""
        return self._uniform

    def set(
        self,
        slots: Sequence[int],
        lengths: Sequence[int] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> Callable[[], None]:
        """Switch to other slots; returns a function that switches back.

        Args:
            slots: one for each row of a batch; with `lengths` one for each span of a packed row.
            lengths: tokens of each span.
            wanted: wanted outputs of each row or span.

        Raises:
            RouteError: slots is empty.
        """
        if not slots:
            raise RouteError("a route needs at least one row; got none")
        before = self._slots, self._lengths, self._wanted
        self._switch(tuple(slots), *(None if part is None else tuple(part) for part in (lengths, wanted)))
        return lambda: self._switch(*before)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager: restore the current slots at the end."""
        before = self._slots, self._lengths, self._wanted
        try:
            yield
        finally:
            self._switch(*before)

    def spans(self, shape: Sequence[int]) -> tuple[SlotSpan, ...]:
        """The spans that use an adapter, for an input of this shape (without its width).

        Raises:
            RouteError: the rows are not a multiple of the route's, or the tokens do not add up to `lengths`.
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
        """The number of tokens of each entry."""
        rows, tokens = (shape or (1,))[0], math.prod(shape)
        if self._wanted is not None and shape == (sum(self._wanted),):
            return self._wanted
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
        """The slot of each row of a batch of this size, as an index tensor for compiled graphs.

        The tensor is data, so that one graph works for all routes of the same number of rows.

        Raises:
            RouteError: the number of rows is not a multiple of the route's.
        """
        entries = self._index.shape[0]
        if rows % entries:  # no divmod: torch.compile does not support it for dynamic sizes
            raise RouteError(_wrong_rows(entries, rows))
        return self._index.to(device).repeat_interleave(rows // entries)

    def ranks_used(self, rows: int, slots: int, rank: int, device: torch.device) -> Bool[Tensor, "b k"]:
        """For each row of a batch of this size, which of the slots·rank stacked ranks belong to its slot.

        Raises:
            RouteError: the number of rows is not a multiple of the route's.
        """
        key = (rows, slots, rank, device)
        if key not in self._ranks_used:
            owners = torch.arange(slots, device=device).repeat_interleave(rank)
            self._ranks_used[key] = self.slot_index(rows, device)[:, None] == owners
        return self._ranks_used[key]

    def guard(self, y: Tensor) -> Tensor:
        """Make the backward pass through y raise RouteError if the route has changed by then."""
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
        """Record that a module runs with an adapter, inside `recorded`."""
        if self._ran is not None:
            self._ran.add(module)

    def check(self, slots: tuple[int, ...], lengths: tuple[int, ...] | None = None) -> None:
        """Check that the route is still the one of the forward pass.

        Raises:
            RouteError: it has changed.
        """
        if (slots, lengths) != (self._slots, self._lengths):
            raise RouteError(
                f"the forward pass used the route {slots}, but the active route is now {self._slots}; "
                "call backward() before the route changes"
            )

    def _switch(
        self, slots: tuple[int, ...], lengths: tuple[int, ...] | None, wanted: tuple[int, ...] | None
    ) -> None:
        if lengths is not None and len(set(slots)) == 1:
            slots, lengths, wanted = slots[:1], None, None  # for an input of any shape
        self._slots, self._lengths, self._wanted = slots, lengths, wanted
        self._uniform = slots[0] if len(set(slots)) == 1 else None
        self._index = torch.tensor(slots)
        self._spans.clear()
        self._ranks_used.clear()


def _wrong_rows(route: int, batch: int) -> str:
    hint = "give one name (or None) for each row of the batch"
    if batch == 1:  # such as the positions of a position embedding
        hint += ", or run one adapter at a time if all rows share the input of this layer"
    return f"the route has {route} rows, the batch {batch}; {hint}"
