"""The route of a batch: which slot of a bank each of its rows uses.

It holds no factors and knows no layer; every site of one attachment shares one route.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from brushstroke.errors import RouteError

Rows = slice | Int[Tensor, " n"]
Modules = set[object]


@dataclass(frozen=True)
class Segment:
    """The rows of a batch that share one slot."""

    slot: int
    rows: Rows


class Route:
    """Which slot each row of a batch uses; slot 0 is always "no adapter".

    A route of one row serves a batch of any size. A batch with k times as many rows as the route (beams,
    several samples of one prompt, or rows flattened to tokens) repeats every entry k times.
    """

    def __init__(self, slots: Sequence[int] = (0,)) -> None:
        self._segments: dict[int, tuple[Segment, ...]] = {}
        self._ranks_used: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self._ran: Modules | None = None
        self._switch(tuple(slots))

    @property
    def slots(self) -> tuple[int, ...]:
        """One slot for each row."""
        return self._slots

    @property
    def uniform(self) -> int | None:
        """The one slot of all rows, or None where they differ."""
        first = self._slots[0]
        return first if all(slot == first for slot in self._slots) else None

    def set(self, slots: Sequence[int]) -> Callable[[], None]:
        """Switch to other slots; returns what switches back.

        Raises:
            RouteError: no slot at all.
        """
        if not slots:
            raise RouteError("a route needs at least one row; got none")
        before = self._slots
        self._switch(tuple(slots))
        return lambda: self._switch(before)

    def segments(self, rows: int) -> tuple[Segment, ...]:
        """The rows of a batch of this size, grouped by slot, without those that use no adapter.

        Raises:
            RouteError: the batch is no multiple of the route.
        """
        if rows not in self._segments:
            by_slot: dict[int, list[int]] = {}
            for row, slot in enumerate(self._repeated(rows)):
                by_slot.setdefault(slot, []).append(row)
            by_slot.pop(0, None)
            self._segments[rows] = tuple(Segment(slot, _as_rows(found)) for slot, found in by_slot.items())
        return self._segments[rows]

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
            captured = self._slots
            y.register_hook(lambda grad: self.check(captured))
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

    def check(self, captured: tuple[int, ...]) -> None:
        """Raise unless the route is still the one that was captured when the forward began.

        Raises:
            RouteError: it is another one.
        """
        if captured != self._slots:
            raise RouteError(
                f"the forward pass ran under the route {captured}, the backward pass runs under "
                f"{self._slots}; "
                "call backward() before the route changes"
            )

    def _switch(self, slots: tuple[int, ...]) -> None:
        self._slots = slots
        self._index = torch.tensor(slots)
        self._segments.clear()
        self._ranks_used.clear()

    def _repeated(self, rows: int) -> list[int]:
        times, rest = divmod(rows, len(self._slots))
        if rest or not times:
            raise RouteError(_wrong_rows(len(self._slots), rows))
        return [slot for slot in self._slots for _ in range(times)]


def _wrong_rows(route: int, batch: int) -> str:
    return f"the route has {route} rows, the batch {batch}; give one name (or None) for each row of the batch"


def _as_rows(rows: list[int]) -> Rows:
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
