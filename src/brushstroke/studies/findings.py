"""What a study says: a question, an answer, tables and figures. Reports and files are made of these."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brushstroke.studies.statistics import Difference, Interval

MOST_DIGITS = 10  # of a number in a table


@dataclass(frozen=True)
class Table:
    """Numbers for people: a caption, names of the columns, rows of cells."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A Vega-Lite drawing with a name for its file and a caption."""

    name: str
    caption: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One question and what the runs say of it.

    Args:
        question: what was asked.
        answer: in one paragraph, with its uncertainty.
        tables, figures: what the answer rests on.
        notes: what limits it.
        data: every number, as JSON types.
    """

    question: str
    answer: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def bounds(found: Interval, digits: int = 4) -> str:
    """An interval for a table.

    >>> bounds(Interval(1.25, 1.2, 1.3, 5), 3), bounds(Interval(1.678, 1.67796, 1.67804, 5))
    ('1.25 [1.2, 1.3]', '1.678 [1.67796, 1.67804]')
    """
    if found.low is None or found.high is None:
        return f"{found.mean:.{digits}g}"
    mean, low, high = apart([found.mean, found.low, found.high], digits)
    return f"{mean} [{low}, {high}]"


def apart(values: Sequence[float], digits: int, form: str = "g") -> list[str]:
    """Numbers as text with at least so many digits, and as many as tell different numbers apart.

    >>> apart([0.5, 0.50004], 3, "f")
    ['0.50000', '0.50004']
    """
    told = [f"{value:.{digits}{form}}" for value in values]
    if len({*told}) == len({*values}) or digits >= MOST_DIGITS:
        return told
    return apart(values, digits + 1, form)


def seeds_told(counts: Iterable[int]) -> str:
    """How many seeds stand behind some numbers, in words.

    >>> seeds_told([5, 5]), seeds_told([4, 2]), seeds_told([1])
    ('5 seeds', '2 to 4 seeds', 'one seed')
    """
    least, most = min(found := list(counts)), max(found)
    if least < most:
        return f"{least} to {most} seeds"
    return f"{most} seeds" if most > 1 else "one seed"


def difference_table(found: Sequence[Difference], caption: str) -> Table:
    """Paired differences with their intervals and corrected p."""
    rows = tuple(
        (
            one.first,
            one.second,
            bounds(one.difference, 3),
            "–" if one.p_holm is None else f"{one.p_holm:.2g}",
            "yes" if one.significant() else "no",
        )
        for one in found
    )
    told = f"{caption} Intervals are of one difference each, 95 %; p and the last column are corrected."
    return Table(told, ("arm", "against", "difference", "p (Holm)", "apart"), rows)
