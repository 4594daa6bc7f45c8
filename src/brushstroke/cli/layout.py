"""Lays out text for a terminal's width: breaks lines between words, fits tables, shortens names.

It prints nothing, and never shortens a number.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

GAP, EDGES = 3, 4  # cells between two columns of a table, and at its sides
LEAST_NAME = 20  # least cells of a shortened name
HEAD_SHARE = 5  # 1/HEAD_SHARE of a shortened name is its beginning; the end is more informative
_WORD = re.compile(r"\S+\s*|^\s+")
_PART_OF_HEAD = re.compile(r".+?(?:[ .](?=[\w(])|$)")  # "90 %" is one part, "self_attn.q_proj" two

Group = str | Sequence[str]


@dataclass(frozen=True)
class Block:
    """A table to print: its headings, which may have several lines, and its rows."""

    heads: list[str]
    rows: list[list[str]]

    @property
    def width(self) -> int:
        """The width in cells, including the gaps."""
        columns = zip(self.heads, *self.rows, strict=True)
        return EDGES + GAP * (len(self.heads) - 1) + sum(max(map(_widest, column)) for column in columns)


def wrap(text: str, width: int) -> list[str]:
    """Break a text between words into lines of at most `width` cells; a longer word gets its own line.

    >>> wrap("one two three", 7)
    ['one two', 'three']
    """
    return [line for part in text.split("\n") for line in _fill(_WORD.findall(part), width) or [""]]


def hang(lead: str, text: str, width: int, shallow: int = 4) -> list[str]:
    """Break a text after its lead with a hanging indent; words too long for the indent start further left.

    >>> hang("  name  ", "some words", 14)
    ['  name  some', '        words']
    """
    room = width - cell_len(lead)
    lines: list[str] = []
    for number, line in enumerate(wrap(text, room)):
        fits = cell_len(line) <= room
        if number == 0:
            lines += [lead + line] if fits else [lead.rstrip(), " " * shallow + line]
        else:
            lines.append(" " * (cell_len(lead) if fits else shallow) + line)
    return lines


def shorten(name: str, width: int) -> str:
    """Shorten a name to at most `width` cells by cutting out its middle.

    >>> shorten("model.layers.0.self_attn.q_proj", 25)
    'mode…s.0.self_attn.q_proj'
    """
    if cell_len(name) <= width:
        return name
    size = (width - 1) // HEAD_SHARE
    head, tail = set_cell_size(name, size), set_cell_size(name[::-1], width - 1 - size)[::-1]
    return f"{head.rstrip()}…{tail.lstrip()}"  # a cut character of two cells becomes a space


def fit(parts: Sequence[tuple[str, str]], width: int, leave_out: Sequence[str]) -> str:
    """Join the texts of (name, text) in one line; omit those that do not fit, in the given order.

    >>> fit([("loss", "loss 1.5"), ("peak", "peak 1 GiB")], 12, ["peak"])
    'loss 1.5'
    """
    line = ""
    for gone in range(len(leave_out) + 1):
        line = "  ".join(text for name, text in parts if name not in leave_out[:gone])
        if cell_len(line) <= width:
            break
    return line


def arrange(
    columns: Sequence[str], rows: Iterable[Sequence[str]], width: int, leave_out: Sequence[Group]
) -> tuple[list[Block], list[str]]:
    """Fit a table into `width` cells.

    Headings get several lines. Names in the first column are shortened as long as they still differ, and
    always to half of the width. If the table is then too wide, columns are omitted in the order of
    `leave_out`; other columns continue in another table below.

    Returns:
        The tables, and the omitted columns.
    """
    cells = [list(row) for row in rows]
    shape = _Shape(columns, cells, width)
    kept, gone = list(range(len(columns))), list[str]()
    for group in leave_out:
        if shape.least(kept) <= width:
            break
        gone += [name for name in ([group] if isinstance(group, str) else group) if name in columns]
        kept = [number for number, name in enumerate(columns) if name not in gone]
    return [shape.block(part, width) for part in shape.parts(kept, width)], gone


class _Shape:
    """The widths of a table's columns."""

    def __init__(self, columns: Sequence[str], rows: list[list[str]], width: int) -> None:
        self._columns, self._rows = columns, rows
        self._cells = [max((cell_len(row[n]) for row in rows), default=0) for n in range(len(columns))]
        least = _least_name({row[0] for row in rows}, min(self._cells[0], width // 2))
        self._name = max(least, _widest(_stacked(columns[0])))

    def least(self, kept: Sequence[int]) -> int:
        """The least width of these columns."""
        return self._name + self._others(kept, stacked=True)

    def parts(self, kept: Sequence[int], width: int) -> list[list[int]]:
        """Split the columns into tables below each other, each with the first column."""
        parts = [[0]]
        for number in kept[1:]:
            if len(parts[-1]) > 1 and self.least([*parts[-1], number]) > width:
                parts.append([0])
            parts[-1].append(number)
        return parts

    def block(self, kept: Sequence[int], width: int) -> Block:
        """The table of these columns; headings have one line and names are complete if there is room."""
        stacked = self._name + self._others(kept, stacked=False) > width
        names = max(self._name, width - self._others(kept, stacked=stacked))
        first = self._columns[0] if cell_len(self._columns[0]) <= names else _stacked(self._columns[0])
        return Block(
            [first, *(self._head(n, stacked) for n in kept[1:])],
            [[shorten(row[0], names), *(row[n] for n in kept[1:])] for row in self._rows],
        )

    def _others(self, kept: Sequence[int], *, stacked: bool) -> int:
        """The width of all columns but the first, including gaps and edges."""
        widths = (max(self._cells[n], _widest(self._head(n, stacked))) for n in kept[1:])
        return EDGES + sum(GAP + width for width in widths)

    def _head(self, number: int, stacked: bool) -> str:
        """The heading of a column; if stacked, in lines as wide as its cells or its longest word."""
        head = self._columns[number]
        least = max(self._cells[number], _widest(_stacked(head)))
        return "\n".join(_fill(_PART_OF_HEAD.findall(head), least)) if stacked else head


def _fill(words: Iterable[str], width: int) -> list[str]:
    """Fill lines with words (each followed by its space); a word longer than `width` gets its own line."""
    lines: list[str] = []
    for word in words:
        if lines and lines[-1].strip() and cell_len(lines[-1] + word.rstrip()) > width:
            lines.append(word)
        else:
            lines[-1:] = ["".join(lines[-1:]) + word]
    return [line.rstrip() for line in lines]


def _stacked(head: str) -> str:
    return "\n".join(part.rstrip() for part in _PART_OF_HEAD.findall(head))


def _widest(lines: str) -> int:
    return max(cell_len(line) for line in lines.split("\n"))


def _least_name(names: set[str], most: int) -> int:
    """The fewest cells in which different names still differ, at most `most`."""
    widths = range(min(LEAST_NAME, most), most)
    return widths.start + bisect_left(
        widths, True, key=lambda width: len({shorten(name, width) for name in names}) == len(names)
    )
