"""The rows of a data set: their order, their places for error messages, and a hash of their content."""

import bisect
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from brushstroke.data.files import Row


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in order, their name, and a hash of their content.

    Args:
        rows: the rows.
        name: the name of the source.
        hash: of the rows as they were read.
        files: the name of each file, and the number of rows before it.
        form: the name of the published form that the rows were converted from, such as "alpaca".
        origins: for converted rows, the number of the row that each comes from (from 1), and its number
            among the rows from there, or 0 if it is the only one.
        notes: what was not read, as messages for people.
    """

    rows: list[Row]
    name: str
    hash: str
    files: tuple[tuple[str, int], ...] = ()
    form: str = ""
    origins: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """Describe a row (from 1) by its place: `train.jsonl, row 3`; in a folder, counted per file."""
        if self.origins:
            row, part = self.origins[row - 1]
            return self._place(row) + (f", instance {part}" if part else "")
        return self._place(row)

    def number(self, row: int) -> int:
        """The number in the source of a row (from 1) of this data."""
        return self.origins[row - 1][0] if self.origins else row

    def _place(self, row: int) -> str:
        if not self.files:
            return f"{self.name}, row {row}"
        index = bisect.bisect_left([before for _, before in self.files], row) - 1
        file, before = self.files[index]
        return f"{file}, row {row - before}"


def hash_rows(rows: Iterable[Any]) -> str:
    """The SHA-256 of the rows as JSON with sorted keys, independent of file format and column order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()
