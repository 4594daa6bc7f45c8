"""Joins several sources of data, each with a weight: how often its rows occur in one epoch.

It reads no files.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from brushstroke.data.columns import read_turns
from brushstroke.data.files import Row
from brushstroke.data.rows import Joined, Rows, Selected
from brushstroke.errors import DataError
from brushstroke.philox import order_of

_WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>\d*\.?\d+)")
_PORT = re.compile(r"\w+://[^/]*")  # a URL without a path may end with a number
_PAIR, _MESSAGES = {"prompt", "completion"}, "messages"


def read_weight(source: str | Path) -> tuple[str | Path, float]:
    """The name and the weight of a source such as "rows.jsonl:2"; a file of that name has precedence.

    Raises:
        DataError: the weight is 0.

    >>> read_weight("rows.jsonl:2"), read_weight("rows.jsonl"), read_weight("owner/name:train")
    (('rows.jsonl', 2.0), ('rows.jsonl', 1.0), ('owner/name:train', 1.0))
    """
    found = _WEIGHTED.fullmatch(str(source))
    if found is None or _PORT.fullmatch(str(source)) or Path(source).expanduser().exists():
        return source, 1.0
    weight = float(found["weight"])
    if not weight or not math.isfinite(weight):
        raise DataError(
            f"{source}: the weight is {found['weight']}; give a number above 0, or leave the file out"
        )
    return found["source"], weight


def join(sources: Sequence[Rows], weights: Sequence[float]) -> Rows:
    """The rows of all sources, in order; each source as often as its weight says.

    A weight of 2 repeats every row; 0.5 takes half of the rows, chosen by a fixed seed. If some sources have
    messages and others prompts and completions, all become messages.

    Args:
        sources: at least one.
        weights: of each source.
    """
    kinds = {
        kind for rows in sources for shape, _ in rows.facts.first_rows().values() if (kind := _kind(shape))
    }
    rows: Sequence[Row] = Joined([rows.rows for rows in sources], _as_messages if len(kinds) > 1 else None)
    files, notes, chosen, before = [], [], [], 0
    for source, weight in zip(sources, weights, strict=True):
        files += [(file, before + start) for file, start in source.files or ((source.name, 0),)]
        notes += [f"{source.name}: {note}" for note in source.notes]
        chosen.append(before + _chosen(len(source), weight))
        before += len(source)
        if not len(chosen[-1]):
            raise DataError(
                f"{source.name}: the weight {weight:g} takes none of its {len(source)} rows; give a larger "
                "one, or leave the file out"
            )
        if weight != 1:
            notes.append(
                f"{source.name}: {len(chosen[-1])} examples of {len(source)} rows (weight {weight:g})"
            )
    indices = np.concatenate(chosen)
    is_all = len(indices) == before and bool((indices == np.arange(before)).all())
    if not is_all:
        rows = Selected(rows, indices)
    first = sources[0]
    forms = dict.fromkeys(source.form for source in sources if source.form)
    return replace(
        first,
        rows=rows,
        name=" + ".join(source.name for source in sources),
        hash=rows.facts.hash,
        files=tuple(files),
        form=", ".join(forms),
        origins=_origins(sources, indices),
        notes=tuple(notes),
    )


def _origins(sources: Sequence[Rows], indices: np.ndarray) -> np.ndarray:
    """See `Rows`; row numbers count the rows of all sources before."""
    found, before = [], 0
    for source in sources:
        found.append(source.all_origins() + np.array([before, 0]))
        before += len(source)
    return np.concatenate(found)[indices]


def _chosen(count: int, weight: float) -> np.ndarray:
    """The indices of the rows of a source, repeated as its weight says."""
    whole, part = divmod(weight, 1)
    some = sorted(order_of(count, 0, 0)[: round(part * count)])
    return np.concatenate([np.tile(np.arange(count), int(whole)), np.array(some, "i8")]).astype("i8")


def _kind(names: Sequence[str]) -> str:
    return _MESSAGES if _MESSAGES in names else "pair" if set(names) >= _PAIR else ""


def _as_messages(row: Row, where: str) -> Row:
    """A row with messages instead of a prompt and a completion; only the completion is trained."""
    if _MESSAGES in row or not row.keys() >= _PAIR:
        return row
    asked = read_turns(row, "prompt", "user", where)
    context = [{**turn, "weight": 0} if turn.get("role") == "assistant" else turn for turn in asked]
    rest = {name: value for name, value in row.items() if name not in _PAIR}
    return {**rest, _MESSAGES: [*context, *read_turns(row, "completion", "assistant", where)]}
