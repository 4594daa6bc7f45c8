"""The lock of an output folder: on the folder itself, without a lock file; it ends with its process.

Readers, runs and writers that build a folder share it. A process that removes a folder, or files that may be
read, holds it exclusively. It has no effect if the system (Windows) or the file system (some network drives)
does not support such locks.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from brushstroke.errors import OutputError

try:
    import fcntl
except ImportError:
    fcntl = None

PATIENCE, PAUSE = 5.0, 0.005  # seconds to wait for readers of a folder, and between two tries
LOCKS = Path("/proc/locks")  # on Linux, the list of locks and the processes that hold them


def lock_shared(path: Path) -> int:
    """Open a folder or file and share its lock: until the handle is closed, it is not removed.

    Raises:
        OSError: it does not exist, or cannot be opened.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    while True:
        handle = os.open(path, os.O_RDONLY)
        try:
            _share(handle)
            if is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def is_at(handle: int, path: Path) -> bool:
    """Whether a path still names the opened file or folder; True if the system cannot check it."""
    if fcntl is None:
        return True
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def try_exclusive(handle: int, *, without_locks: bool) -> bool:
    """Try to lock exclusively; returns whether it worked, or `without_locks` if there are no locks."""
    if fcntl is None:
        return without_locks
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return without_locks and not isinstance(error, BlockingIOError)
    return True


@contextmanager
def exclusive(folder: Path, handle: int) -> Iterator[None]:
    """Context manager: hold a folder's lock exclusively; afterwards the handle shares it again.

    Raises:
        OutputError: another process still holds it after `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    while not try_exclusive(handle, without_locks=True):
        _share(handle)  # the failed try has released the shared lock
        if time.monotonic() > end:
            raise _in_use(folder)
        time.sleep(PAUSE)
    try:
        yield
    finally:
        _share(handle)


class RunLock:
    """The lock of a folder while a run writes it: shared with readers, but not with other runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None
        self._made_folder = False

    @property
    def is_locked(self) -> bool:
        """Whether this run holds the lock."""
        return self._handle is not None

    def refuse_other(self) -> None:
        """Check that no other process holds the lock; creates nothing.

        Raises:
            OutputError: another process holds it.
        """
        if self._folder.is_dir():
            with suppress(PermissionError):
                os.close(self._take())

    def take(self) -> None:
        """Hold the lock from now on; creates the folder if it does not exist.

        Raises:
            OutputError: another process holds it.
            OSError: the folder cannot be created.
        """
        if self._handle is None:
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._handle = self._take()

    def follow(self) -> None:
        """If the locked folder was replaced, lock the folder that has its path now.

        Raises:
            OutputError: another run has locked that folder.
        """
        if self._handle is None or is_at(self._handle, self._folder) or not self._folder.exists():
            return
        replaced, self._handle = self._handle, self._take()
        os.close(replaced)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Context manager: exclude readers while files are removed, if this run holds the lock."""
        with nullcontext() if self._handle is None else exclusive(self._folder, self._handle):
            yield

    @contextmanager
    def moved(self, new: Path) -> Iterator[None]:
        """Context manager: the folder `new` takes the place of the locked one, and so does its lock."""
        handle = None if self._handle is None else lock_shared(new)
        try:
            yield
            self._handle, handle = handle, self._handle
        finally:
            if handle is not None:
                os.close(handle)

    def release(self) -> None:
        """Release the lock; removes the folder if `take` created it and it is empty."""
        if self._handle is None:
            return
        if self._made_folder:
            with suppress(OSError):
                self._folder.rmdir()
        os.close(self._handle)
        self._handle = None

    def _take(self) -> int:
        while True:
            handle = lock_shared(self._folder)
            try:
                with exclusive(self._folder, handle):
                    pass
            except BaseException:
                os.close(handle)
                raise
            if is_at(handle, self._folder):
                return handle
            os.close(handle)


def _share(handle: int) -> None:
    """Share the lock of an opened folder or file."""
    if fcntl is not None:
        with suppress(OSError):  # this file system has no locks
            fcntl.flock(handle, fcntl.LOCK_SH)


def _in_use(folder: Path) -> OutputError:
    """The error for a locked folder; names the process that holds the lock if the system lists it."""
    found, processes = folder.stat(), []
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError):
        for line in LOCKS.read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE process place 0 EOF
            if words[1] == "FLOCK" and words[5] == place:
                processes.append(int(words[4]))
    processes.sort(key=lambda process: process != os.getpid())  # this process may share it too
    holder = f" (process {processes[-1]})" if processes else ""
    return OutputError(
        f"another process writes or reads {folder}{holder}; wait for it, or choose another folder"
    )
