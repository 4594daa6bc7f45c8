"""Writing files so that a reader sees all of them or none: temporary name, fsync, rename, read back.

It knows nothing of what is in the files; only that JSON which cannot be taken is one kind of error.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from brushstroke.errors import BrushstrokeError, OutputError

try:
    import fcntl
except ImportError:
    fcntl = None

PARTIAL = ".partial-"  # what a name begins with while its file or folder is being written
STAGING = re.compile(rf"{re.escape(PARTIAL)}[a-z0-9_]{{8}}")  # a folder of `write_folder`
# In it: old files while they are moved out of its target, and once all of them are; the new files' check sums
LEAVING, REPLACED, SUMS = "leaving", "replaced", "sums.json"


@contextmanager
def output_errors(where: Path) -> Iterator[None]:
    """Turn an OSError inside (no space, no permission, ...) into an OutputError that names the place."""
    try:
        yield
    except BrushstrokeError:
        raise
    except OSError as error:
        said = error.strerror or str(error) or type(error).__name__
        raise OutputError(
            f"cannot write {where}: {said}; make room there, or choose another place"
        ) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file, whoever wrote it.

    Raises:
        ValueError: it is no JSON in UTF-8, or is nested too deeply to be read.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def file_sum(path: Path) -> str:
    """The check sum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Check that results may go into a folder: it is new or empty, or its files may be overwritten.

    Raises:
        OutputError: it holds files and `overwrite` is false, or it, or what it should be in, is no folder.
    """
    there = next((level for level in (folder, *folder.parents) if os.path.lexists(level)), folder)
    if os.path.lexists(there) and not there.is_dir():
        what = "a file" if there.exists() else "a link to something that is not there"
        raise OutputError(f"{there} is {what}; name a folder")
    if overwrite or not folder.is_dir():
        return
    if any(not entry.name.startswith(PARTIAL) for entry in folder.iterdir()):
        raise OutputError(
            f"{folder} holds files already; choose another folder, or pass overwrite=True (--overwrite), "
            f"which replaces only the files that brushstroke writes"
        )


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Check before the work that its results can be written into a folder; it is left as it was.

    Raises:
        OutputError: see `refuse_existing`, or the folder or a file in it cannot be made.
    """
    with output_errors(folder):
        refuse_existing(folder, overwrite)
        made = [level for level in (folder, *folder.parents) if not level.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.NamedTemporaryFile(prefix=PARTIAL, dir=folder).close()
        finally:
            for level in made:
                remove_empty(level)


def remove_partial(folder: Path) -> None:
    """Remove what interrupted writes left in a folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove some files of a folder, one after the other, and then the folder if nothing is left in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Remove a folder in which nothing is left."""
    with suppress(OSError):  # something else is in it, or it is not there
        folder.rmdir()


def write_file(path: Path, content: bytes | str) -> None:
    """Write or replace one file, atomically; its folder must exist.

    Raises:
        OutputError: the file cannot be written; what stood there before is untouched.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write_file(folder / "a.txt", "one"); (folder / "a.txt").read_text()
    'one'
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with output_errors(path):
        try:
            _write_synced(partial, content)
            os.replace(partial, path)
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_folder(
    folder: Path, files: Mapping[str, bytes | str], *, owned: Collection[str], overwrite: bool = False
) -> None:
    """Write several files that belong together; the last one appears last, and only beside all the others.

    Args:
        folder: made if it is not there.
        files: name → content, in the order in which they appear.
        owned: every name that this kind of folder may hold; those not written now are removed, no others.
        overwrite: whether the folder may hold files already.

    Raises:
        OutputError: see `refuse_existing`, or a file cannot be written or reads back differently.
    """
    refuse_existing(folder, overwrite)
    with output_errors(folder):
        made = _make_folder(folder)
        staging, lock = None, None
        try:
            staging, lock = _locked_staging(folder)
            for name, content in files.items():
                _write_synced(staging / name, content)
            sums = {name: file_sum(staging / name) for name in files}
            _write_synced(staging / SUMS, json.dumps(sums))
            _sync_folder(staging)
            _exchange(staging, folder, list(files), owned)
        except BaseException:
            with suppress(OSError):
                if staging is not None:
                    _put_back(staging, folder, list(files)[-1])
                for level in made:
                    level.rmdir()
            raise
        finally:
            if lock is not None:
                os.close(lock)
        _remove_staging(staging)


def put_back(folder: Path, last: str, owned: Collection[str]) -> None:
    """Undo a `write_folder` that was killed before its last file appeared: the old files return.

    What a finished one left goes. Nothing is touched while the process that writes lives, where the system
    cannot tell whether it does, or where something in the way is not as it was written.

    Args:
        folder: into which was written.
        last: the file that appears last.
        owned: see `write_folder`.

    Raises:
        OutputError: files cannot be moved.
    """
    if not folder.is_dir():
        return
    with output_errors(folder):
        for staging in _stagings(folder, owned):
            with suppress(BlockingIOError, FileNotFoundError):  # its process lives, or has just ended
                lock = lock_folder(staging, strict=True)
                try:
                    _put_back(staging, folder, last)
                finally:
                    os.close(lock)


def is_being_written(folder: Path, owned: Collection[str]) -> bool:
    """Whether a `write_folder` of a living process is under way, or may be: another user's cannot be told.

    Raises:
        OSError: the folder cannot be listed.
    """
    for entry in folder.iterdir():
        try:
            if _is_staging(entry, owned):
                os.close(lock_folder(entry))
        except (BlockingIOError, PermissionError):
            return True
        except FileNotFoundError:  # it has gone since
            continue
    return False


def lock_folder(folder: Path, *, strict: bool = False) -> int:
    """An open handle with the lock of a folder, which the system takes back when the process ends, however.

    Where the system (Windows) or the file system (some network drives) has no such locks, it keeps nobody
    out, or is refused if it must.

    Raises:
        BlockingIOError: another handle has it, or `strict` and there are no locks.
    """
    if fcntl is None:
        if strict:
            raise BlockingIOError
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if strict or isinstance(error, BlockingIOError):  # any other: this file system has no locks
            os.close(handle)
            raise BlockingIOError from error
    return handle


def _locked_staging(folder: Path) -> tuple[Path, int]:
    """A new folder for files in the making, and its lock.

    A recovery beside us may take it for a leftover before it is locked, and remove it: another is made then.
    """
    while True:
        staging = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
        try:
            lock = lock_folder(staging)
        except (BlockingIOError, FileNotFoundError):
            continue
        if staging.is_dir():
            return staging, lock
        os.close(lock)


def _exchange(staging: Path, folder: Path, names: list[str], owned: Collection[str]) -> None:
    """Move old files out and new ones in, the last name first out and last in; `_put_back` undoes it."""
    leaving, replaced = staging / LEAVING, staging / REPLACED
    leaving.mkdir()
    for name in dict.fromkeys([names[-1], *owned, *names]):
        if os.path.lexists(folder / name):
            os.replace(folder / name, leaving / name)
    os.rename(leaving, replaced)
    for name in names:
        os.replace(staging / name, folder / name)
    _sync_folder(folder)


def _put_back(staging: Path, folder: Path, last: str) -> None:
    """Undo an exchange from wherever it stopped, unless it was done; cut in two itself, it can go on."""
    leaving, replaced = staging / LEAVING, staging / REPLACED
    sums: dict[str, str] = {}
    with suppress(OSError, ValueError):
        sums = read_json(staging / SUMS)
    waiting = {name for name in sums if (staging / name).exists()}
    if waiting and replaced.is_dir():  # all that was there is in it: what is there now is new
        there = [name for name in sums if name not in waiting and (folder / name).is_file()]
        placed = [name for name in there if file_sum(folder / name) == sums[name]]
        if _in_the_way(replaced, folder, placed):
            return
        for name in placed:
            (folder / name).unlink()
        os.rename(replaced, leaving)
    if _is_filled(leaving):
        if not sums or _in_the_way(leaving, folder, ()):
            return
        for old in sorted(leaving.iterdir(), key=lambda old: old.name == last):
            os.replace(old, folder / old.name)
    elif _is_filled(replaced) and not sums:
        return
    _remove_staging(staging)


def _remove_staging(staging: Path) -> None:
    """Remove what an exchange that is done or undone left: its sums last, without which nothing is judged."""
    for inner in (staging / LEAVING, staging / REPLACED):
        shutil.rmtree(inner, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _in_the_way(old: Path, folder: Path, placed: Collection[str]) -> bool:
    """Whether files that would return find their places taken."""
    return any(os.path.lexists(folder / path.name) and path.name not in placed for path in old.iterdir())


def _stagings(folder: Path, owned: Collection[str]) -> list[Path]:
    found = []
    for entry in folder.iterdir():
        with suppress(FileNotFoundError, PermissionError):  # it has gone since, or is another user's
            if _is_staging(entry, owned):
                found.append(entry)
    return found


def _is_staging(path: Path, owned: Collection[str]) -> bool:
    """Whether a folder is one of `write_folder`, with nothing in it that this would not put there."""
    if not STAGING.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    inner = [path / name for name in (LEAVING, REPLACED) if os.path.lexists(path / name)]
    known = {*owned, SUMS, LEAVING, REPLACED}
    return (
        all(folder.is_dir() and not folder.is_symlink() for folder in inner)
        and all(entry.name in known for entry in path.iterdir())
        and all(entry.name in owned for folder in inner for entry in folder.iterdir())
    )


def _write_synced(path: Path, content: bytes | str) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != data:
        raise OutputError(f"{path} reads back differently from what was written; check the disk")


def _sync_folder(folder: Path) -> None:
    """Make renames durable, where the system allows a folder to be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make_folder(folder: Path) -> list[Path]:
    """The folders that had to be made, innermost first."""
    made = []
    for level in (folder, *folder.parents):
        if level.exists():
            break
        made.append(level)
    folder.mkdir(parents=True, exist_ok=True)
    return made
