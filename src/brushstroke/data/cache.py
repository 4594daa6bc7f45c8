"""Keeps data on disk: indices of the rows and tokens of large data, copies of remote files.

`brushstroke cache` lists it.

An entry is a folder, named by its kind and by a hash of everything that its content depends on. When all are
larger than `LIMIT` together, those that were not used for longest are deleted.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from brushstroke.outputs import clear_leftovers_in, kept_in, make_room, replace_folder, size_of
from brushstroke.samples.assets import cache_folder

LIMIT = 16 * 2**30  # bytes of all entries; one that is larger is kept alone
LARGE = 16 * 2**20  # bytes of files; smaller data is read again each time, in memory
META = "meta.json"
Kind = Literal["rows", "tokens", "copies"]
_ENTRY = re.compile(r"(rows|tokens|copies)-[0-9a-f]{32}")


def folder() -> Path:
    """`data` in the cache folder (`BRUSHSTROKE_CACHE`, or ~/.cache/brushstroke)."""
    return cache_folder() / "data"


def key_of(*parts: Any) -> str:
    """A hash of everything that an entry depends on, of this package's code, and of the tokenizing packages.

    Args:
        parts: values that JSON can hold.
    """
    said = json.dumps([_code(), *parts], default=repr)  # templates print the keys of tools in their order
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def find(kind: Kind, key: str) -> Path | None:
    """The folder of an entry, if it is kept; it then counts as used now."""
    found = folder() / f"{kind}-{key}"
    if not (found / META).is_file():
        return None
    with suppress(OSError):
        os.utime(found)
    return found


@contextmanager
def new_entry(kind: Kind, key: str) -> Iterator[Path]:
    """Context manager: an empty folder that becomes the entry at the end, or is removed after an error.

    Raises:
        OutputError, OSError: it cannot be written.
    """
    where = folder()
    where.mkdir(parents=True, exist_ok=True)
    clear_leftovers()
    target = where / f"{kind}-{key}"
    with replace_folder(target, lambda _: True) as new:
        yield new
        make_room((path for path in entries() if path != target), min(size_of(new), LIMIT), LIMIT)


def clear_leftovers() -> None:
    """Remove what killed processes have left in the folder."""
    clear_leftovers_in(folder(), lambda name: bool(_ENTRY.fullmatch(name)), lambda _: True)


def remove(found: Path) -> None:
    """Remove a damaged entry."""
    shutil.rmtree(found, ignore_errors=True)


def entries() -> list[Path]:
    """The folders that are kept."""
    return kept_in(folder(), _ENTRY)


@cache
def _code() -> str:
    """A hash of this package's files, and the versions of the packages that render and tokenise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    packages = (f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2"))
    return f"{digest.hexdigest()}; {'; '.join(packages)}"
