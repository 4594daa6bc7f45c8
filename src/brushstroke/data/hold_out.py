"""Holds out a share of the rows of a data set for evaluation."""

import re
from dataclasses import replace

import numpy as np

from brushstroke.data.rows import Rows, Selected
from brushstroke.errors import DataError
from brushstroke.philox import order_of

_SHARE = re.compile(r"(?P<number>\d*\.?\d+)(?P<percent>%?)")


def read_share(value: str) -> float | None:
    """The share that a text such as "0.1" or "10%" names; None if it is not of that form, or not below 1.

    >>> read_share("10%"), read_share("0.25"), read_share("rows.jsonl"), read_share("3")
    (0.1, 0.25, None, None)
    """
    found = _SHARE.fullmatch(value.strip())
    share = float(found["number"]) / (100 if found["percent"] else 1) if found else 0.0
    return share if 0 < share < 1 else None


def hold_out(rows: Rows, share: float, seed: int = 0) -> tuple[Rows, Rows]:
    """Divide rows into those to train on and those to evaluate on, each in the order of the source.

    Rows that are equal, and all rows that come from one row of the source, are on the same side.

    Args:
        rows: at least two different rows.
        share: of the different rows to hold out, above 0 and below 1; at least one row is on each side.
        seed: decides which rows.

    Raises:
        DataError: the share is not between 0 and 1, or there are fewer than two different rows.
    """
    if not 0 < share < 1:
        raise DataError(f"the share of rows for evaluation is {share:g}; give a number above 0 and below 1")
    groups = _groups(rows)
    different = int(groups.max()) + 1
    if different < 2:
        raise DataError(
            f"{rows.name}: has {different} different row, which cannot be divided into rows for "
            "training and for evaluation; give more rows, or a file of its own (--eval FILE)"
        )
    count = min(different - 1, max(1, round(share * different)))
    held = np.isin(groups, order_of(different, seed, 0)[:count])
    sides = np.flatnonzero(~held), np.flatnonzero(held)
    origins = rows.all_origins()
    note = f"{len(sides[1])} of {len(rows)} rows are held out for evaluation (seed {seed})"
    parts = []
    for indices, name in zip(sides, ("", "held-out rows of "), strict=True):
        kept = Selected(rows.rows, indices)
        part = replace(
            rows,
            rows=kept,
            name=f"{name}{rows.name}",
            hash=rows.facts.of(indices).hash,
            origins=origins[indices],
            notes=() if name else (*rows.notes, note),
        )
        parts.append(part)
    return parts[0], parts[1]


def _groups(rows: Rows) -> np.ndarray:
    """A number for each row; equal for equal rows of the source, counted in the order of the first ones."""
    if len(rows.origins):  # all rows from one row of the source count as one
        numbers = np.array(rows.origins, "i8")[:, 0]
        digests: dict[int, dict[bytes, None]] = {}  # a repeated row counts once
        for number, digest in zip(numbers.tolist(), rows.facts.digests, strict=True):
            digests.setdefault(number, {})[digest.tobytes()] = None
        contents: dict[tuple[bytes, ...], int] = {}
        found = {number: contents.setdefault(tuple(own), len(contents)) for number, own in digests.items()}
        return np.array([found[number] for number in numbers.tolist()])
    words = np.ascontiguousarray(rows.facts.digests).view("V16").reshape(-1)
    _, first, inverse = np.unique(words, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
