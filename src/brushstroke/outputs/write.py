"""Writes files so that a reader sees all of them or none: a hidden name, fsync, rename.

It does not replace a folder so that the old files survive a killed process; `replace` does.
"""

import errno
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from brushstroke.errors import BrushstrokeError, OutputError
from brushstroke.outputs.lock import lock_shared, try_exclusive, unread

PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{8}")  # a file or folder that is being written
_FREE_SPACE = "free disk space there, or choose another folder"
_CHANGE_RIGHTS = "choose a folder in which you may write, or change its permissions"
_ADVICE = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise the limit for the size of a file (ulimit -f), or choose another file system",
    errno.EACCES: _CHANGE_RIGHTS,
    errno.EPERM: _CHANGE_RIGHTS,
    errno.EROFS: "choose a folder on a file system that is not mounted read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk, or choose a folder on another one",
}


@contextmanager
def output_errors(where: Path) -> Iterator[None]:
    """Context manager: an OSError becomes an OutputError that names the place."""
    try:
        yield
    except BrushstrokeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        in_text = re.search(r"\(os error (\d+)\)", reason)  # as safetensors reports it
        number = error.errno or (int(in_text[1]) if in_text else 0)
        advice = _ADVICE.get(number, "check the path, or choose another folder")
        raise OutputError(f"cannot write {where}: {reason}; {advice}") from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write or replace one file, atomically; its folder must exist.

    Raises:
        OutputError: the file cannot be written; the old file is unchanged.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_file(folder / "a.txt", "one"); (folder / "a.txt").read_text()
    'one'
    """
    with output_errors(path), partial_files({path: content}) as partial:
        os.replace(partial[path], path)
        sync_folder(path.parent)


def write_files(
    folder: Path,
    files: Mapping[str, bytes | str],
    *,
    last: str,
    owned: Collection[str] = (),
) -> None:
    """Write files that belong together to a folder; one of them, the marker, appears last.

    The marker shows that all files are complete. An old marker is removed first, so a killed process may
    leave neither the old files nor the new ones; `replace_files` avoids that.

    Args:
        folder: created if it does not exist.
        files: name → content.
        last: the name of the marker, for which a reader looks first.
        owned: every name that this kind of folder may hold; those that are not written now are removed.

    Raises:
        OutputError: a file cannot be written.
    """
    with output_errors(folder), made_folder(folder):
        placed = {folder / name: content for name, content in files.items()}
        with partial_files(placed) as partial, _without_readers(folder, last):
            remove_files(folder, [last, *(name for name in owned if name not in files)])
            for path in sorted(partial, key=lambda path: path.name == last):
                os.replace(partial[path], path)
        sync_folder(folder)


def write_synced(path: Path, content: bytes | str) -> None:
    """Write a new file, sync it to the disk, and read it back.

    Raises:
        OutputError: it reads back differently.
        OSError: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != data:
        raise OutputError(f"{path} reads back differently from what was written; check the disk")


@contextmanager
def new_partial(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Context manager: a new file or folder with a hidden name next to its target, locked until the end.

    Before it is locked, another process may remove it as a leftover; then another one is created.
    """
    while True:
        partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        make(partial)
        with suppress(FileNotFoundError):
            handle = lock_shared(partial)
            break
    try:
        yield partial
    finally:
        os.close(handle)


@contextmanager
def partial_files(files: Mapping[Path, bytes | str]) -> Iterator[dict[Path, Path]]:
    """Context manager: files with hidden names next to their targets; the end removes those not renamed.

    Leftovers of killed processes with such names are removed.
    """
    partial: dict[Path, Path] = {}
    with ExitStack() as stack:
        for path, content in files.items():
            remove_partial_files(path.parent, path.name.__eq__)
            partial[path] = stack.enter_context(new_partial(path, Path.touch))
            stack.callback(partial[path].unlink, missing_ok=True)
            write_synced(partial[path], content)
        yield partial


def partial_names(folder: Path, is_named: Callable[[str], bool]) -> list[Path]:
    """The hidden partial files and folders in a folder whose targets have certain names."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    found = [(entry, PARTIAL.fullmatch(entry.name)) for entry in entries]
    return [entry for entry, match in found if match and is_named(match["name"])]


def remove_partial_files(folder: Path, is_named: Callable[[str], bool]) -> None:
    """Remove partial files of killed processes with certain names, but none that is being written."""
    for path in partial_names(folder, is_named):
        if path.is_file() and not path.is_symlink():
            with suppress(FileNotFoundError, PermissionError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    if try_exclusive(handle, without_locks=False):
                        path.unlink()
                finally:
                    os.close(handle)


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Remove some files of a folder, one after the other."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def remove_empty(*folders: Path) -> None:
    """Remove each of the folders that exists and is empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Context manager: create a folder if it is missing; after an error, remove created folders if empty."""
    made = [level for level in (folder, *folder.parents) if not level.exists()]
    if made:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        remove_empty(*made)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames durable, if the system allows a folder to be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _without_readers(folder: Path, marker: str) -> Iterator[None]:
    """Context manager: if the folder has a marker, it may be read; wait for its readers and exclude them."""
    if not os.path.lexists(folder / marker):
        yield
        return
    with unread(folder):
        yield
