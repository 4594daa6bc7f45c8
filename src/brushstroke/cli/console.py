"""What reaches people and programs: text on stderr, data on stdout.

It decides nothing about what is said.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


PLAIN_WIDTH = 1000  # of tables that no terminal shows: nothing is cut


def replace_closed_streams() -> None:
    """In place of a stream that the caller closed (`>&-`) stands one that holds and keeps nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def people() -> "Console":
    """The console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def results() -> "Console":
    """The console on stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def say(text: str) -> None:
    """One line for people."""
    people().print(text, markup=False)


def warn(text: str) -> None:
    """One warning, as a plain line."""
    people().print(f"warning: {text}", markup=False, style="yellow")


def fail(text: str) -> None:
    """Why the command stops."""
    people().print(f"error: {text}", markup=False, style="red")


def emit(text: str, *, end: str = "\n") -> None:
    """A line of results."""
    print(text, end=end, flush=True)


def emit_json(value: Any, *, lines: bool = False) -> None:
    """A JSON value on stdout; `lines` writes it in one line."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") != "utf8"
    emit(json.dumps(value, indent=None if lines else 2, ensure_ascii=ascii_only, default=str))


def facts(console: "Console", rows: Mapping[str, str]) -> None:
    """Names and values, one pair a line; an empty value is left out."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        if value:
            console.print(f"  {name:<{width}}  {value}", markup=False)


def table(console: "Console", columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    console.print(made, soft_wrap=False)


def size(count: float) -> str:
    """Bytes in words.

    >>> size(9_800_000), size(700)
    ('9.3 MiB', '700 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def share(part: float) -> str:
    """A share in per cent.

    >>> share(0.0182), share(1.0)
    ('1.82 %', '100 %')
    """
    return f"{100 * part:.3g} %"


@contextmanager
def show_library_warnings() -> Iterator[None]:
    """Within it our own warnings are one plain line each, and those of other packages are not shown."""

    def show(message: Any, category: type[Warning], *_: Any) -> None:
        if category.__module__.split(".")[0] == "brushstroke":
            warn(" ".join(str(message).split()))

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("default")
        warnings.showwarning = show  # type: ignore[assignment]
        yield
