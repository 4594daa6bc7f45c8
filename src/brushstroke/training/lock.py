"""One run at a time in a folder: a lock that the system takes back when its process ends, however it ends.

It keeps nobody out where the system (Windows) or the file system (some network drives) has no such locks.
"""

import os
from contextlib import suppress
from pathlib import Path

from brushstroke.errors import OutputError
from brushstroke.files import PARTIAL, output_errors, remove_empty

try:
    import fcntl
except ImportError:
    fcntl = None

LOCK = f"{PARTIAL}lock"  # a killed run leaves it behind, unlocked; the next one takes it over


class FolderLock:
    """A lock on a folder, held through a file in it that is there as long as the lock is held."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / LOCK
        self._handle: int | None = None
        self._made_folder = False
        self.held = False

    def refuse_other(self) -> None:
        """Check that nobody else holds the lock; nothing is made.

        Raises:
            OutputError: another run holds it.
        """
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            handle = os.open(self._file, os.O_RDONLY)
            try:
                self._lock(handle)
            finally:
                os.close(handle)

    def take(self) -> None:
        """Hold the lock from now on; the folder is made if it is not there.

        Raises:
            OutputError: another run holds it, or its file cannot be written.
        """
        if self.held:
            return
        with output_errors(self._folder):
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            while fcntl is not None:
                handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    self._lock(handle)
                    if self._is_file(handle):  # not one that its holder has removed meanwhile
                        os.ftruncate(handle, 0)
                        os.write(handle, str(os.getpid()).encode())
                        self._handle = handle
                        break
                finally:
                    if self._handle is None:
                        os.close(handle)
        self.held = True

    def release(self) -> None:
        """Give the lock back; a folder that was made for it and in which nothing is left goes too."""
        if self._handle is not None:
            with suppress(OSError):
                self._file.unlink()  # while it is locked: nobody else's is removed
            os.close(self._handle)
            self._handle = None
        if self.held and self._made_folder:
            remove_empty(self._folder)
        self.held = False

    def _lock(self, handle: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace")
            raise OutputError(
                f"another run is writing {self._folder}{f' (process {holder})' if holder else ''}; wait for "
                "it, or choose another folder"
            ) from None
        except OSError:
            pass  # this file system has no locks

    def _is_file(self, handle: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(handle), self._file.stat())
        return False
