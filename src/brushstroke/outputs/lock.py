"""The lock of an output folder: on the folder itself, without a lock file; it ends with its process.

Readers, runs and writers that build a folder share it. A process that removes a folder, or files that may be
read, holds it exclusively. It has no effect if the system (Windows) or the file system (some network drives)
does not support such locks.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from brushstroke.errors import OutputError

try:
    import fcntl
except ImportError:
    fcntl = None

PATIENCE, PAUSE = 5.0, 0.005  # seconds to wait for readers of a folder, and between two tries
LOCKS = Path("/proc/locks")  # on Linux, the list of locks and the processes that hold them
_NONE = -1  # in place of a handle


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
def unread(folder: Path) -> Iterator[None]:
    """Context manager: exclude readers, and runs of other processes, while files of a folder are removed.

    Raises:
        OutputError: another process still holds the lock after `PATIENCE` seconds.
    """
    run = _run_at(folder)
    handle = lock_shared(folder) if run is None else run.handle
    try:
        with _exclusive(folder, handle):
            yield
    finally:
        if run is None:
            os.close(handle)


@contextmanager
def handed_over(folder: Path, new: Path) -> Iterator[None]:
    """Context manager: `new` replaces a folder, also as the one that a run of this process has locked."""
    run = _run_at(folder)
    if run is None:
        yield
        return
    handle = lock_shared(new)
    try:
        yield
    finally:
        if is_at(handle, folder):
            run.handle, handle = handle, run.handle
        os.close(handle)


def refuse_other_process(folder: Path) -> None:
    """Check that no other process holds the lock of a folder; a run of this process may hold it.

    Raises:
        OutputError: another process holds it.
    """
    if _run_at(folder) is None:
        RunLock(folder).refuse_other()


class RunLock:
    """The lock of a folder while a run writes it: shared with readers, but not with other runs.

    If this process replaces the folder, the lock is then that of the new one (`handed_over`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.handle = _NONE
        self._made_folder = False

    @property
    def is_locked(self) -> bool:
        """Whether this run holds the lock."""
        return self.handle != _NONE

    def refuse_other(self) -> None:
        """Check that nobody else holds the lock; creates nothing.

        Raises:
            OutputError: another run or process holds it.
        """
        if self._folder.is_dir():
            with suppress(FileNotFoundError, PermissionError):
                os.close(self._take())

    def take(self) -> None:
        """Hold the lock from now on; creates the folder if it does not exist.

        Raises:
            OutputError: another run or process holds it.
            OSError: the folder cannot be created.
        """
        if not self.is_locked:
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            self.handle = self._take()
            _HELD.append(self)

    def require_place(self) -> None:
        """Check that the path still names the locked folder, if this run holds the lock.

        Raises:
            OutputError: the folder was moved or removed, or another process has replaced it.
        """
        if self.is_locked and not is_at(self.handle, self._folder):
            raise OutputError(
                f"{self._folder} is no longer the folder of this run: it was moved or removed, or another "
                "process has replaced it. The run stops and writes nothing more; continue it from its last "
                "checkpoint with --resume (resume=True), with the folder that contains its checkpoints"
            )

    def release(self) -> None:
        """Release the lock; removes the folder if `take` created it and it is empty."""
        if not self.is_locked:
            return
        if self._made_folder and is_at(self.handle, self._folder):
            with suppress(OSError):
                self._folder.rmdir()
        with suppress(ValueError):  # in a fork of the process that holds it
            _HELD.remove(self)
        os.close(self.handle)
        self.handle = _NONE

    def _take(self) -> int:
        while True:
            handle = lock_shared(self._folder)
            try:
                with _exclusive(self._folder, handle):
                    pass
            except BaseException:
                os.close(handle)
                raise
            if is_at(handle, self._folder):
                return handle
            os.close(handle)


_HELD: list[RunLock] = []  # the locks of this process's runs
if fcntl is not None:
    os.register_at_fork(after_in_child=_HELD.clear)


def _run_at(folder: Path) -> RunLock | None:
    """The lock that a run of this process holds on a folder."""
    return next((run for run in _HELD if is_at(run.handle, folder)), None)


@contextmanager
def _exclusive(folder: Path, handle: int) -> Iterator[None]:
    """Context manager: hold a folder's lock exclusively; afterwards the handle shares it again.

    Raises:
        OutputError: another process still holds it after `PATIENCE` seconds.
    """
    end = time.monotonic() + PATIENCE
    while not try_exclusive(handle, without_locks=True):
        _share(handle)  # the failed try has released the shared lock
        if time.monotonic() > end:
            raise _in_use(folder, handle)
        time.sleep(PAUSE)
    try:
        yield
    finally:
        _share(handle)


def _share(handle: int) -> None:
    """Share the lock of an opened folder or file."""
    if fcntl is not None:
        with suppress(OSError):  # this file system has no locks
            fcntl.flock(handle, fcntl.LOCK_SH)


def _in_use(folder: Path, handle: int) -> OutputError:
    """The error for a locked folder; names the process that holds the lock if the system lists it."""
    if not is_at(handle, folder):
        return OutputError(
            f"{folder} was moved, removed or replaced while this process waited for its lock; repeat the "
            "command, or choose another folder"
        )
    found, processes = os.fstat(handle), []
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError):
        for line in LOCKS.read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE process place 0 EOF
            if words[1] == "FLOCK" and words[5] == place:
                processes.append(int(words[4]))
    processes.sort(key=lambda process: process != os.getpid())  # this process may share it too
    holder = f" (process {processes[-1]})" if processes else ""
    return OutputError(
        f"another run is writing to {folder}, or another process is reading it{holder}; wait for it, or "
        "choose another folder"
    )
