"""The formats of adapters on disk: `load` reads PEFT's layout and every registered format.

It writes no files; `save` writes PEFT's layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from brushstroke.adapter import Adapter
from brushstroke.errors import AdapterFileError
from brushstroke.fetch import find_adapter
from brushstroke.formats import peft

ENTRY_POINTS = "brushstroke.formats"  # the group in which an installed package names its formats


@dataclass(frozen=True)
class Format:
    """A further format of adapter files.

    Args:
        name: a name for people to read.
        recognises: whether a file or folder is of this format, by its name or its first bytes.
        load: reads it; raises `AdapterFileError` if it is damaged.
    """

    name: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path], Adapter]


_formats: list[Format] = []


def register_format(new: Format) -> Callable[[], None]:
    """Let `load` read another format in this process; returns a function that undoes this.

    For the `brushstroke` command, an installed package declares its `Format` as an entry point in the group
    "brushstroke.formats".
    """
    _formats.append(new)
    return lambda: _formats.remove(new)


def load(name: str | Path) -> Adapter:
    """Read an adapter, on the CPU and in the dtype that it was saved in.

    Args:
        name: a folder or file; or the hub id ("owner/name") of an adapter in PEFT's layout, if there is no
            such folder.

    Raises:
        AdapterFileError: something is missing, unknown, of a wrong shape or not finite; all of it is listed.
            Or it cannot be read.
    """
    path = find_adapter(name)
    for known in (*_formats, *_installed()):
        if known.recognises(path):
            return known.load(path)
    return peft.load(path)


@cache
def _installed() -> tuple[Format, ...]:
    """The formats of installed packages."""
    found: list[Format] = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            found.append(entry.load())
        except Exception as error:  # of another package
            package = entry.dist.name if entry.dist else entry.value
            raise AdapterFileError(
                f"the format {entry.name!r} of the package {package} cannot be loaded ({error}); repair the "
                "package, or remove it"
            ) from error
    return tuple(found)
