"""What a study says: a question, an answer, tables and figures. Reports and files are made of these."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brushstroke.studies.comparisons import Comparison, Difference
from brushstroke.studies.statistics import Interval
from brushstroke.studies.words import counted

SMALLEST_P = 0.0001  # below it p is told as a bound

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


def difference_table(found: Comparison, margin: float, caption: str) -> Table:
    """Differences with the intervals that hold together, adjusted p, and what is shown of each pair."""
    by_row = any(one.new_rows for one in found.differences)
    rows = []
    for one in found.differences:
        told = [one.first, one.second, bounds(one.difference, 3)]
        if by_row:
            told.append(bounds(one.new_rows, 3) if one.new_rows else "–")
        told += ["–" if one.p is None else p_told(one.p), _shown(one, margin)]
        rows.append(tuple(told))
    columns = ("arm", "against", "difference", *(["on new rows too"] if by_row else []), "p", "shown")
    return Table(f"{caption} {rests_on(found)}", columns, tuple(rows))


def pairs_told(found: Comparison, margin: float) -> str:
    """How many of the pairs are shown to be apart, how many to be equal, and what that rests on."""
    apart = [one for one in found.differences if one.significant()]
    equal = sum(one.equal_within(margin) for one in found.differences)
    on_new = ""
    if apart and any(one.new_rows for one in found.differences):
        on_new = f", {sum(one.significant_on_new_rows() for one in apart)} of them on new rows too"
    count = len(found.differences)
    return (
        f"Of {counted(count, 'pair')} {len(apart)} {'is' if len(apart) == 1 else 'are'} shown to be "
        f"apart{on_new}, and {equal} "
        f"to be equal within ±{margin:g} nats ({basis(found)})."
    )


def basis(found: Comparison) -> str:
    """Procedure, seeds and residual spread of a comparison, for a sentence."""
    seeds = seeds_told([len(found.seeds)])
    spread = "" if found.spread is None else f"; residual standard deviation {found.spread:.3g}"
    return f"{found.procedure} over {seeds}{spread}"


def rests_on(found: Comparison) -> str:
    """The same under a table, with the level and what the columns mean."""
    if found.spread is None:
        return "One seed: no interval, no p, and nothing is claimed."
    return (
        f"{basis(found)} with {found.freedom} degrees of freedom, seeds as blocks. The intervals of the "
        f"table hold together, at {100 * (1 - found.level):.4g} %; p is adjusted for all rows of it, and a "
        f"pair is apart where p is below {found.level:g}. A large p shows nothing."
    )


def p_told(p: float) -> str:
    """A p for a table: two digits, or the bound that it is below."""
    return f"{p:.2g}" if p >= SMALLEST_P else f"< {SMALLEST_P:.4f}"


def _shown(one: Difference, margin: float) -> str:
    told = []
    if one.significant():
        told.append("apart, on new rows too" if one.significant_on_new_rows() else "apart")
    if one.equal_within(margin):
        told.append(f"equal within ±{margin:g}")
    return "; ".join(told) or "neither"
