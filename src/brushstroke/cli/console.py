"""What reaches people and programs: text on stderr, data on stdout.

On a terminal what people read keeps within its width (see `layout`); elsewhere a line is as long as it is.
It decides nothing about what is said.
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

_MACHINERY = {"warnings", "_py_warnings"}  # the modules of Python's own `warn`


def replace_closed_streams() -> None:
    """In place of a stream that the caller closed (`>&-`) stands one that holds and keeps nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@functools.cache
def people() -> "Console":
    """The console on stderr: one for all, so that a line may be printed while another is kept up to date."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def results() -> "Console":
    """The console on stdout."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, soft_wrap=True)


def room(console: "Console") -> int | None:
    """The width of the terminal that a console writes to; None where it writes to none."""
    return console.width if console.file.isatty() else None


def tell(console: "Console", text: str, *, style: str = "", indent: int = 0) -> None:
    """A text for people, as it is; on a terminal in lines that are broken between words."""
    from rich.text import Text

    for line in lines(console, text, indent):
        console.print(Text(" " * indent + line if line else "", style=style))


def lines(console: "Console", text: str, indent: int = 0) -> list[str]:
    """A text as it is, or the lines of it that fit a terminal."""
    width = room(console)
    return [text] if width is None else wrap(text, width - indent)


def say(text: str) -> None:
    """One line for people."""
    tell(people(), text)


def warn(text: str) -> None:
    """One warning, as a plain line."""
    tell(people(), f"warning: {text}", style="yellow")


def fail(text: str) -> None:
    """Why the command stops."""
    tell(people(), f"error: {text}", style="red")


def emit(text: str, *, end: str = "\n") -> None:
    """A line of results."""
    print(text, end=end, flush=True)


def emit_json(value: Any, *, lines: bool = False) -> None:
    """A JSON value on stdout; `lines` writes it in one line."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") != "utf8"
    emit(json.dumps(value, indent=None if lines else 2, ensure_ascii=ascii_only, default=str))


def facts(console: "Console", rows: Mapping[str, str]) -> None:
    """Names and values, one pair a line; an empty value is left out."""
    from rich.text import Text

    told = {name: value for name, value in rows.items() if value}
    longest, width = max(map(len, told), default=0), room(console)
    for name, value in told.items():
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
    """A table whose first column is text and whose others are numbers.

    Args:
        console: where to print it.
        columns: their heads.
        rows: a cell for each column.
        leave_out: columns, or groups of them, that a narrow terminal does without; the least important first.
    """
    width = room(console)
    if width is None:
        _print_table(console, Block(list(columns), [list(row) for row in rows]))
        return
    blocks, gone = arrange(columns, rows, width, leave_out)
    for block in blocks:
        _print_table(console, block)
    if gone:
        tell(console, f"left out for the width: {', '.join(gone)}; --json has all", style="dim", indent=2)


def _print_table(console: "Console", block: Block) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE, width=block.width)  # not the console's, into which rich would squeeze it
    for number, head in enumerate(block.heads):
        side = "right" if number else "left"
        made.add_column(Text(head, justify=side), justify=side, no_wrap=True, vertical="bottom")
    for row in block.rows:
        made.add_row(*map(Text, row))
    console.print(made, soft_wrap=False, crop=False)


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
    """Context manager: what our code warns of is one plain line each, whatever the class of the warning.

    Other packages stay quiet: they warn whoever calls them, which is us, of what a user cannot change. An
    exception is torch's word on a GPU that it cannot use, for which a run goes to the CPU.
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
    return any(module == ours or module.startswith(f"{ours}.") for ours in ("brushstroke", "torch.cuda"))


def _who_warns() -> str:
    """The module whose code calls `warnings.warn`; with a `stacklevel` the file in the warning is another."""
    frames = traceback.walk_stack(sys._getframe())
    names = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    shown = dropwhile(lambda name: name not in _MACHINERY, names)  # what shows it comes first
    return next(dropwhile(_MACHINERY.__contains__, shown), "")
