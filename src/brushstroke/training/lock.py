"""One run at a time in a folder: a lock that the system takes back when its process ends, however it ends.

The lock is on the folder itself and leaves nothing in it. It keeps nobody out where the system (Windows) or
the file system (some network drives) has no such locks.
"""

import os
from contextlib import suppress
from pathlib import Path

from brushstroke.errors import OutputError
from brushstroke.files import lock_folder, output_errors, remove_empty

LOCKS = Path("/proc/locks")  # Linux tells here who holds what


class FolderLock:
    """The lock of a folder that one run writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None
        self._made_folder = False
        self.held = False

    def refuse_other(self) -> None:
        """Check that nobody else holds the lock; nothing is made.

        Raises:
            OutputError: another run holds it.
        """
        if self._folder.is_dir():
            with suppress(PermissionError):
                os.close(self._lock())

    def take(self) -> None:
        """Hold the lock from now on; the folder is made if it is not there.

        Raises:
            OutputError: another run holds it, or the folder cannot be made.
        """
        if self.held:
            return
        with output_errors(self._folder):
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._handle = self._lock()
        self.held = True

    def release(self) -> None:
        """Give the lock back; a folder that was made for it and in which nothing is goes too."""
        if self.held and self._made_folder:
            remove_empty(self._folder)
        if self._handle is not None:
            os.close(self._handle)
        self._handle, self.held = None, False

    def _lock(self) -> int:
        """An open handle of the folder that holds the lock."""
        try:
            return lock_folder(self._folder)
        except BlockingIOError:
            holder = _holder(self._folder)
            raise OutputError(
                f"another run is writing {self._folder}{f' (process {holder})' if holder else ''}; wait for "
                "it, or choose another folder"
            ) from None


def _holder(folder: Path) -> str:
    """The number of the process that has locked a folder; empty where the system does not tell."""
    with suppress(OSError):
        found = folder.stat()
        place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        for line in LOCKS.read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE process place 0 EOF
            if words[1] == "FLOCK" and words[5] == place:
                return words[4]
    return ""
