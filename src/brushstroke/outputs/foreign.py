"""Refuses to overwrite files that brushstroke did not write.

It decides by the contents of the files, not only by their names.
"""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brushstroke.errors import OutputError
from brushstroke.outputs.write import PARTIAL, output_errors, remove_empty


@dataclass(frozen=True)
class OwnFiles:
    """The files of one kind of output, and how to recognise that brushstroke wrote them.

    Args:
        names: the names of all files.
        keys: name → whether the JSON object in that file (for .jsonl: in its first line) has the form that
            brushstroke writes.
        marks: names in `keys`; if one of these files is recognised, files that cannot be checked, and damaged
            ones, count as written by brushstroke.
        recognised_with: name → names of files, one of which must be recognised for that file.
        texts: name → a text that also identifies the file.
        otherwise: the reason in the error for a file that is not recognised.
    """

    names: tuple[str, ...]
    keys: Mapping[str, Callable[[Mapping[str, Any]], bool]] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    recognised_with: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = "was not written by brushstroke"

    def is_own(self, path: Path) -> bool:
        """Whether a file holds JSON of the form that brushstroke writes."""
        found = read_first(path)
        return isinstance(found, dict) and self.keys[path.name](found)

    def refuse_foreign(self, folder: Path, *, is_own_folder: bool = False) -> None:
        """Check that everything in a folder under one of the names is of this kind.

        Args:
            folder: the folder, which may be missing.
            is_own_folder: whether the caller knows that brushstroke wrote the folder.

        Raises:
            OutputError: a file may belong to the user or another program, or is a folder.
        """
        own = {name for name in self.keys if self.is_own(folder / name)}
        sure = is_own_folder or bool(own.intersection(self.marks))
        for name in self.names:
            path = folder / name
            if not os.path.lexists(path):
                continue
            known = name in own or name not in self.keys or not read_first(path)
            if name in self.recognised_with:
                known = bool(own.intersection(self.recognised_with[name])) or self._has_text(path)
            if not (known and sure and path.is_file()):
                raise foreign(path, self.otherwise)

    def _has_text(self, path: Path) -> bool:
        text = self.texts.get(path.name)
        return text is not None and path.is_file() and text.encode() in path.read_bytes()


def has_keys(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether an object has all of these keys."""
    return lambda found: set(names) <= found.keys()


def read_first(path: Path) -> Any:
    """The JSON value of a file (for .jsonl: of its first line); None if it cannot be read."""
    try:
        text = path.read_text("utf-8")
        return json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except (OSError, ValueError, RecursionError):
        return None


def foreign(path: Path, what: str) -> OutputError:
    """The error for a file that may belong to the user."""
    what = "is a link" if path.is_symlink() else what
    return OutputError(f"{path} {what} and would be overwritten; move it, or choose another folder")


def refuse_existing(folder: Path, overwrite: bool, *, ignoring: Collection[str] = ()) -> None:
    """Check that results may be written to a folder: it is new or empty, or its files may be overwritten.

    Args:
        folder: the output folder.
        overwrite: whether the folder may already hold files.
        ignoring: names of files that are ignored.

    Raises:
        OutputError: it holds files and `overwrite` is false, or it or one of its parents is not a folder.
    """
    there = next((level for level in (folder, *folder.parents) if os.path.lexists(level)), folder)
    if os.path.lexists(there) and not there.is_dir():
        what = "a file" if there.exists() else "a broken link"
        raise OutputError(f"{there} is {what}; name a folder")
    if overwrite or not folder.is_dir():
        return
    names = {entry.name for entry in folder.iterdir()}.difference(ignoring)
    if not all(map(PARTIAL.fullmatch, names)):
        raise OutputError(
            f"{folder} is not empty; choose another folder, or pass overwrite=True (--overwrite), "
            f"which replaces only the files that brushstroke writes"
        )


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Check before any work that results can be written to a folder; the folder is not changed.

    Raises:
        OutputError: see `refuse_existing`, or the folder or a file in it cannot be made.
    """
    with output_errors(folder):
        refuse_existing(folder, overwrite)
        made = [level for level in (folder, *folder.parents) if not level.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        finally:
            remove_empty(*made)
