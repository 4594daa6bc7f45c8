"""Prints text for people on stderr and data on stdout.

On a terminal, text fits its width (see `layout`); elsewhere lines are not broken.
It does not decide what is printed.
"""

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from brushstroke.cli.layout import Block, Group, arrange, hang, wrap

if TYPE_CHECKING:
    from rich.console import Console

_MACHINERY = {"warnings", "_py_warnings"}  # the modules of Python's `warn`


def replace_closed_streams() -> None:
    """Replace each stream that the caller closed (`>&-`) by one that discards everything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@functools.cache
def people() -> "Console":
    """The console on stderr. There is one, so that lines can be printed above a live line."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def results() -> "Console":
    """The console on stdout."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, soft_wrap=True)


def room(console: "Console") -> int | None:
    """The width of a console's terminal; None if it does not write to a terminal."""
    return console.width if console.file.isatty() else None


def print_text(console: "Console", text: str, *, style: str = "", indent: int = 0) -> None:
    """Print a text for people; on a terminal, break lines between words."""
    from rich.text import Text

    for line in lines(console, text, indent):
        console.print(Text(" " * indent + line if line else "", style=style))


def lines(console: "Console", text: str, indent: int = 0) -> list[str]:
    """The lines of a text that fit the terminal; the text itself if there is none."""
    width = room(console)
    return [text] if width is None else wrap(text, width - indent)


def say(text: str) -> None:
    """Print one line for people."""
    print_text(people(), text)


def warn(text: str) -> None:
    """Print one warning as a plain line."""
    print_text(people(), f"warning: {text}", style="yellow")


def fail(text: str) -> None:
    """Print the error that stops the command."""
    print_text(people(), f"error: {text}", style="red")


def emit(text: str, *, end: str = "\n") -> None:
    """Print a line of results."""
    print(text, end=end, flush=True)


def emit_json(value: Any, *, lines: bool = False) -> None:
    """Print a JSON value on stdout; `lines` puts it in one line."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") != "utf8"
    emit(json.dumps(value, indent=None if lines else 2, ensure_ascii=ascii_only, default=str))


def facts(console: "Console", rows: Mapping[str, str]) -> None:
    """Print names and values, one pair per line; empty values are left out."""
    from rich.text import Text

    shown = {name: value for name, value in rows.items() if value}
    longest, width = max(map(len, shown), default=0), room(console)
    for name, value in shown.items():
        lead = f"  {name:<{longest}}  "
        for line in [lead + value] if width is None else hang(lead, value, width):
            console.print(Text(line))


def table(
    console: "Console",
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    leave_out: Sequence[Group] = (),
) -> None:
    """Print a table whose first column is text and whose others are numbers.

    Args:
        console: where to print it.
        columns: their headings.
        rows: a cell for each column.
        leave_out: columns, or groups of columns, that a narrow terminal omits, the least important first.
    """
    width = room(console)
    if width is None:
        _print_table(console, Block(list(columns), [list(row) for row in rows]))
        return
    blocks, gone = arrange(columns, rows, width, leave_out)
    for block in blocks:
        _print_table(console, block)
    if gone:
        print_text(console, f"columns left out: {', '.join(gone)}; --json has all", style="dim", indent=2)


def _print_table(console: "Console", block: Block) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=SIMPLE, width=block.width
    )  # not the console's width, to which rich would shrink the table
    for number, head in enumerate(block.heads):
        side = "right" if number else "left"
        made.add_column(Text(head, justify=side), justify=side, no_wrap=True, vertical="bottom")
    for row in block.rows:
        made.add_row(*map(Text, row))
    console.print(made, soft_wrap=False, crop=False)


def size(count: float) -> str:
    """Format a number of bytes.

    >>> size(9_800_000), size(700)
    ('9.3 MiB', '700 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def share(part: float) -> str:
    """Format a share in per cent.

    >>> share(0.0182), share(1.0)
    ('1.82 %', '100 %')
    """
    return f"{100 * part:.3g} %"


@contextmanager
def show_library_warnings() -> Iterator[None]:
    """Context manager: print each warning of brushstroke as one plain line, whatever its class.

    Warnings of other packages are for the caller, brushstroke, and are not printed. The exception is torch's
    warning that it cannot use a GPU, after which a run uses the CPU.
    """

    def show(message: Any, category: type[Warning], *_: Any) -> None:
        if _concerns_users(category.__module__) or _concerns_users(_who_warns()):
            warn(" ".join(str(message).split()))

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("default")
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _concerns_users(module: str) -> bool:
    return any(
        module == package or module.startswith(f"{package}.") for package in ("brushstroke", "torch.cuda")
    )


def _who_warns() -> str:
    """The module that calls `warnings.warn`; with a `stacklevel`, the warning names another file."""
    frames = traceback.walk_stack(sys._getframe())
    names = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    shown = dropwhile(lambda name: name not in _MACHINERY, names)  # the frames that show it come first
    return next(dropwhile(_MACHINERY.__contains__, shown), "")
