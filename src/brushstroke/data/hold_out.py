"""Holds out a share of the rows of a data set for evaluation."""

import re
from dataclasses import replace

from brushstroke.data.rows import Rows, hash_rows
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
    origins = rows.origins or tuple((number, 0) for number in range(1, len(rows) + 1))
    contents: dict[int, str] = {}
    for (number, _), row in zip(origins, rows.rows, strict=True):
        contents[number] = contents.get(number, "") + hash_rows([row])
    different = list(dict.fromkeys(contents.values()))
    if len(different) < 2:
        raise DataError(
            f"{rows.name}: has {len(different)} different row, which cannot be divided into rows for "
            "training and for evaluation; give more rows, or a file of its own (--eval FILE)"
        )
    count = min(len(different) - 1, max(1, round(share * len(different))))
    held = {different[index] for index in order_of(len(different), seed, 0)[:count]}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, (number, _) in enumerate(origins):
        sides[contents[number] in held].append(index)
    note = f"{len(sides[1])} of {len(rows)} rows are held out for evaluation (seed {seed})"
    parts = []
    for indices, name in zip(sides, ("", "held-out rows of "), strict=True):
        kept = [rows.rows[index] for index in indices]
        part = replace(
            rows,
            rows=kept,
            name=f"{name}{rows.name}",
            hash=hash_rows(kept),
            origins=tuple(origins[index] for index in indices),
            notes=() if name else (*rows.notes, note),
        )
        parts.append(part)
    return parts[0], parts[1]
