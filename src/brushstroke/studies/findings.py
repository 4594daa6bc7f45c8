"""The findings of a study: a question with its answer, tables and figures, and the texts of comparisons.

Does not write reports or files (`page` does).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brushstroke.studies.comparisons import Comparison, Difference
from brushstroke.studies.statistics import Interval
from brushstroke.studies.words import counted

SMALLEST_P = 0.0001  # a smaller p is written as a bound

MOST_DIGITS = 10  # maximum number of digits of a number in a table


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
    """One question and its answer from the runs.

    Args:
        question: the question.
        answer: one paragraph, with the uncertainty.
        tables, figures: the data behind the answer.
        notes: limitations of the answer.
        data: all numbers, as JSON types.
    """

    question: str
    answer: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def bounds(found: Interval, digits: int = 4) -> str:
    """A mean and its interval as text.

    >>> bounds(Interval(1.25, 1.2, 1.3, 5), 3), bounds(Interval(1.678, 1.67796, 1.67804, 5))
    ('1.25 [1.2, 1.3]', '1.678 [1.67796, 1.67804]')
    """
    if found.low is None or found.high is None:
        return f"{found.mean:.{digits}g}"
    mean, low, high = apart([found.mean, found.low, found.high], digits)
    return f"{mean} [{low}, {high}]"


def apart(values: Sequence[float], digits: int, form: str = "g") -> list[str]:
    """Numbers as text with at least this many digits, and more if different numbers would look equal.

    >>> apart([0.5, 0.50004], 3, "f")
    ['0.50000', '0.50004']
    """
    texts = [f"{value:z.{digits}{form}}" for value in values]
    if len({*texts}) == len({*values}) or digits >= MOST_DIGITS:
        return texts
    return apart(values, digits + 1, form)


def format_seeds(counts: Iterable[int]) -> str:
    """The numbers of seeds that several values are based on, as text.

    >>> format_seeds([5, 5]), format_seeds([4, 2]), format_seeds([1])
    ('5 seeds', '2 to 4 seeds', 'one seed')
    """
    least, most = min(found := list(counts)), max(found)
    if least < most:
        return f"{least} to {most} seeds"
    return f"{most} seeds" if most > 1 else "one seed"


def difference_table(found: Comparison, margin: float, caption: str) -> Table:
    """The table of a comparison: differences with simultaneous intervals, adjusted p, and the conclusion."""
    by_row = any(one.new_rows for one in found.differences)
    rows = []
    for one in found.differences:
        cells = [one.first, one.second, bounds(one.difference, 3)]
        if by_row:
            cells.append(bounds(one.new_rows, 3) if one.new_rows else "–")
        cells += ["–" if one.p is None else format_p(one.p), _shown(one, margin)]
        rows.append(tuple(cells))
    columns = ("arm", "against", "difference", *(["on new rows too"] if by_row else []), "p", "shown")
    return Table(f"{caption} {rests_on(found)}", columns, tuple(rows))


def describe_pairs(found: Comparison, margin: float) -> str:
    """A sentence: how many pairs are shown to differ, how many to be equal, and by which procedure."""
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
    """Procedure, seeds and residual spread of a comparison, as part of a sentence."""
    seeds = format_seeds([len(found.seeds)])
    spread = "" if found.spread is None else f"; residual standard deviation {found.spread:.3g}"
    return f"{found.procedure} over {seeds}{spread}"


def rests_on(found: Comparison) -> str:
    """The same as text for a table's caption, with the level and the meaning of the columns."""
    if found.spread is None:
        return "One seed: no interval, no p, and nothing is claimed."
    return (
        f"{basis(found)} with {found.freedom} degrees of freedom, seeds as blocks. The intervals of the "
        f"table hold together, at {100 * (1 - found.level):.4g} %; p is adjusted for all rows of it, and a "
        f"pair is apart where p is below {found.level:.3g}. A large p shows nothing."
    )


def format_p(p: float) -> str:
    """A p for a table: two digits, or an upper bound."""
    return f"{p:.2g}" if p >= SMALLEST_P else f"< {SMALLEST_P:.4f}"


def _shown(one: Difference, margin: float) -> str:
    shown = []
    if one.significant():
        shown.append("apart, on new rows too" if one.significant_on_new_rows() else "apart")
    if one.equal_within(margin):
        shown.append(f"equal within ±{margin:g}")
    return "; ".join(shown) or "neither"
