"""Reads one version of a folder, even if another process replaces it meanwhile.

It does not write.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from brushstroke.outputs.lock import is_at, lock_shared

_RELATIVE = {os.open, os.stat} <= os.supports_dir_fd
T = TypeVar("T")


@contextmanager
def open_folder(path: Path) -> Iterator["OpenFolder"]:
    """Context manager: one version of a folder, which is not removed before the end of the block.

    Raises:
        OSError: it does not exist, or cannot be opened.
    """
    handle = lock_shared(path)
    try:
        yield OpenFolder(path, handle if _RELATIVE else None)
    finally:
        os.close(handle)


def read_unreplaced(path: Path, read: Callable[[], T]) -> T:
    """The result of `read`, which opens files by path; repeated if the folder is replaced meanwhile.

    Raises:
        OSError: there is no such folder, or it cannot be opened.
    """
    while True:
        handle = lock_shared(path)
        try:
            found = read()
            if is_at(handle, path):
                return found
        except Exception:
            if is_at(handle, path):
                raise
        finally:
            os.close(handle)


class OpenFolder(Traversable):
    """An opened folder, or an entry in it: read relative to the folder's handle, shown by its path.

    Args:
        path: of the opened folder.
        handle: of the folder, or None if the system cannot open files relative to a folder.
        inner: the path of the entry in the folder.
    """

    def __init__(self, path: Path, handle: int | None, inner: str = "") -> None:
        self._path, self._handle, self._inner = path, handle, inner

    def __str__(self) -> str:
        return str(self._path / self._inner)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(str(self)).name

    def joinpath(self, *descendants: Any) -> "OpenFolder":
        """The entry of the folder at a relative path."""
        return OpenFolder(self._path, self._handle, os.path.join(self._inner, *descendants))

    def __truediv__(self, child: Any) -> "OpenFolder":
        return self.joinpath(child)

    def iterdir(self) -> Iterator["OpenFolder"]:
        """All entries of the folder, sorted by name; none if it is not a folder."""
        if self._handle is None:
            names = os.listdir(self._path / self._inner) if self.is_dir() else []
        elif self.is_dir():
            handle = os.open(self._inner or ".", os.O_RDONLY, dir_fd=self._handle)
            try:
                names = os.listdir(handle)
            finally:
                os.close(handle)
        else:
            names = []
        yield from map(self.joinpath, sorted(names))

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self._is(stat.S_ISDIR)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._is(stat.S_ISREG)

    def read_bytes(self) -> bytes:
        """All bytes of the file."""
        with self.open("rb") as file:
            return file.read()

    def read_text(self, encoding: str | None = "utf-8", errors: str | None = None) -> str:
        """All text of the file."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        """Open the file."""
        return open(self._target, mode, *args, opener=self._opener, **kwargs)

    def _opener(self, path: str, flags: int) -> int:
        return os.open(path, flags, dir_fd=self._handle)

    def _is(self, kind: Callable[[int], bool]) -> bool:
        try:
            return kind(os.stat(self._target, dir_fd=self._handle).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    @property
    def _target(self) -> str:
        return str(self) if self._handle is None else self._inner or "."
