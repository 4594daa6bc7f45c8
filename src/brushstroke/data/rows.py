"""The rows of a data set: their order, their places for error messages, and a hash of their content."""

import bisect
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from brushstroke.data.files import Row

Names = tuple[str, ...]


@dataclass(frozen=True)
class RowFacts:
    """What is known about rows after they were read once.

    Args:
        digests: of each row (n×16 bytes), independent of the order of its columns.
        shapes: the different shapes of the rows: the names of the columns, and those with a value.
        shape_ids: the index in `shapes` of each row's shape (int32).
    """

    digests: np.ndarray
    shapes: tuple[tuple[Names, Names], ...]
    shape_ids: np.ndarray

    @property
    def hash(self) -> str:
        """The SHA-256 of all digests, independent of file format and column order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()

    def first_rows(self) -> dict[int, tuple[Names, Names]]:
        """The number of the first row (from 1) of each shape that occurs, in order → the shape."""
        ids, indices = np.unique(self.shape_ids, return_index=True)
        return {int(indices[at]) + 1: self.shapes[ids[at]] for at in np.argsort(indices)}

    def valued(self) -> dict[str, None]:
        """The names of columns in which some row has a value, in the order of their first appearance."""
        return dict.fromkeys(name for _, names in self.first_rows().values() for name in names)

    def of(self, indices: np.ndarray) -> "RowFacts":
        """The facts about some of the rows, by their indices (from 0)."""
        return RowFacts(self.digests[indices], self.shapes, self.shape_ids[indices])


class FactCounter:
    """Collects the facts about rows, one after the other."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._shapes: dict[tuple[Names, Names], int] = {}
        self._ids = array("i")

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, row: Any) -> None:
        """Add the next row; one that is no dict has no names."""
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=repr)
        self._digests += hashlib.sha256(text.encode()).digest()[:16]
        names = tuple(row) if isinstance(row, Mapping) else ()
        shape = names, tuple(name for name in names if row[name] is not None)
        self._ids.append(self._shapes.setdefault(shape, len(self._shapes)))

    def facts(self) -> RowFacts:
        """The facts about the rows so far."""
        digests = np.frombuffer(bytes(self._digests), "u1").reshape(-1, 16)
        return RowFacts(digests, tuple(self._shapes), np.array(self._ids, "i4"))


def facts_of(rows: Iterable[Any]) -> RowFacts:
    """The facts about rows: stored ones, or found by reading all rows."""
    stored = getattr(rows, "facts", None)
    if isinstance(stored, RowFacts):
        return stored
    counter = FactCounter()
    for row in rows:
        counter.add(row)
    return counter.facts()


@dataclass(frozen=True)
class Rows:
    """Rows in order, their name, and a hash of their content.

    Args:
        rows: the rows, in memory or in a file.
        name: the name of the source.
        hash: of the rows as they were read.
        files: the name of each file, and the number of rows before it.
        form: the name of the published form that the rows were converted from, such as "alpaca".
        origins: for converted rows, the number of the row that each comes from (from 1), and its number
            among the rows from there, or 0 if it is the only one (n×2); empty if they were not converted.
        notes: what was not read, as messages for people.
    """

    rows: Sequence[Row]
    name: str
    hash: str
    files: tuple[tuple[str, int], ...] = ()
    form: str = ""
    origins: Sequence[tuple[int, int]] | np.ndarray = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def facts(self) -> RowFacts:
        """What is known about the rows; those in memory are read for it."""
        return facts_of(self.rows)

    def all_origins(self) -> np.ndarray:
        """`origins` of all rows, also of rows that were not converted (n×2, int64)."""
        if len(self.origins):
            return np.array(self.origins, "i8")
        return np.stack([np.arange(1, len(self) + 1), np.zeros(len(self), "i8")], axis=1)

    @property
    def key(self) -> str | None:
        """Identifies the content of rows that stay in a file; None for rows in memory."""
        return getattr(self.rows, "key", None)

    def check_unchanged(self) -> None:
        """Check that the file of rows that stay in a file was not changed.

        Raises:
            DataError: it was.
        """
        _check_unchanged(self.rows)

    def where(self, row: int) -> str:
        """Describe a row (from 1) by its place: `train.jsonl, row 3`; in a folder, counted per file."""
        if len(self.origins):
            row, part = map(int, self.origins[row - 1])
            return self._place(row) + (f", instance {part}" if part else "")
        return self._place(row)

    def number(self, row: int) -> int:
        """The number in the source of a row (from 1) of this data."""
        return int(self.origins[row - 1][0]) if len(self.origins) else row

    def _place(self, row: int) -> str:
        if not self.files:
            return f"{self.name}, row {row}"
        index = bisect.bisect_left([before for _, before in self.files], row) - 1
        file, before = self.files[index]
        return f"{file}, row {row - before}"


def _check_unchanged(rows: Any) -> None:
    if (check := getattr(rows, "check_unchanged", None)) is not None:
        check()


class StoredRows(Sequence[Row], ABC):
    """Rows that are made when they are used."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """The row at an index (from 0)."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no row {index} among {len(self)}")
        return self.row(index % len(self))


class Selected(StoredRows):
    """Some rows of others, which stay where they are.

    Args:
        rows: all rows.
        indices: of the selected ones, in order.
    """

    def __init__(self, rows: Sequence[Row], indices: np.ndarray) -> None:
        self._rows, self._indices = rows, indices

    @cached_property
    def facts(self) -> RowFacts:
        """What is known about the selected rows."""
        return facts_of(self._rows).of(self._indices)

    @property
    def key(self) -> str | None:
        """Identifies the rows if those that they are selected from can be identified."""
        key = getattr(self._rows, "key", None)
        return key and f"{key} {hashlib.sha256(self._indices.tobytes()).hexdigest()}"

    def check_unchanged(self) -> None:
        """See `Rows`."""
        _check_unchanged(self._rows)

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> Row:
        """The row at an index (from 0)."""
        return self._rows[int(self._indices[index])]


class Joined(StoredRows):
    """The rows of several sequences, one after the other.

    Args:
        parts: the sequences.
        convert: (row, place for messages) → the row that is returned; None if it is the same.
    """

    def __init__(
        self, parts: Sequence[Sequence[Row]], convert: Callable[[Row, str], Row] | None = None
    ) -> None:
        self._parts, self._convert = parts, convert
        self._starts = [0, *itertools.accumulate(map(len, parts))]

    @property
    def key(self) -> str | None:
        """Identifies the rows if those of all parts can be identified."""
        keys = [getattr(part, "key", None) for part in self._parts]
        return None if None in keys else f"joined {keys} {self._convert is not None}"

    @cached_property
    def facts(self) -> RowFacts:
        """What is known about the rows."""
        if self._convert is not None:
            return facts_of(iter(self))
        found = [facts_of(part) for part in self._parts]
        shapes = tuple(dict.fromkeys(shape for facts in found for shape in facts.shapes))
        numbers = {shape: number for number, shape in enumerate(shapes)}
        ids = [np.array([numbers[s] for s in facts.shapes], "i4")[facts.shape_ids] for facts in found]
        return RowFacts(np.concatenate([facts.digests for facts in found]), shapes, np.concatenate(ids))

    def check_unchanged(self) -> None:
        """See `Rows`."""
        for part in self._parts:
            _check_unchanged(part)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Row:
        """The row at an index (from 0)."""
        part = bisect.bisect_right(self._starts, index) - 1
        row = self._parts[part][index - self._starts[part]]
        return row if self._convert is None else self._convert(row, f"row {index + 1}")


def hash_rows(rows: Iterable[Any]) -> str:
    """The SHA-256 of rows, independent of file format and column order."""
    return facts_of(rows).hash
