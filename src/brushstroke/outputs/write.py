"""Writing files so that a reader sees all of them or none: a hidden name, fsync, rename.

It replaces no folder that must survive a kill: that is the part of `replace`.
"""

import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from brushstroke.errors import BrushstrokeError, OutputError
from brushstroke.outputs.lock import alone, hold, try_alone

PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{8}")  # of what is being written


@contextmanager
def output_errors(where: Path) -> Iterator[None]:
    """Context manager: an OSError becomes an OutputError that names the place."""
    try:
        yield
    except BrushstrokeError:
        raise
    except OSError as error:
        said = error.strerror or str(error) or type(error).__name__
        raise OutputError(
            f"cannot write {where}: {said}; make room there, or choose another place"
        ) from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write or replace one file, atomically; its folder must exist.

    Raises:
        OutputError: the file cannot be written; what stood there before is untouched.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_file(folder / "a.txt", "one"); (folder / "a.txt").read_text()
    'one'
    """
    with output_errors(path), partial_files({path: content}) as partial:
        os.replace(partial[path], path)
        sync_folder(path.parent)


def write_files(
    folder: Path, files: Mapping[str, bytes | str], *, last: str, owned: Collection[str] = ()
) -> None:
    """Write files that belong together into a folder; one of them appears last, and says that all are there.

    An old file of that name goes first: a kill may leave neither the old files nor the new ones. What must
    survive that is the part of `replace_files`.

    Args:
        folder: made if it is not there.
        files: name → content.
        last: the name of the marker, which a reader looks for before all others.
        owned: every name that this kind of folder may hold; those not written now are removed, no others.

    Raises:
        OutputError: a file cannot be written.
    """
    with output_errors(folder), made_folder(folder):
        placed = {folder / name: content for name, content in files.items()}
        with partial_files(placed) as partial, _unread(folder, last):
            remove_files(folder, [last, *(name for name in owned if name not in files)])
            for path in sorted(partial, key=lambda path: path.name == last):
                os.replace(partial[path], path)
        sync_folder(folder)


def write_synced(path: Path, content: bytes | str) -> None:
    """Write a file that is not there, down to the disk.

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
    """Context manager: a new file or folder under a hidden name beside its place, in use until the end.

    Before it is locked, another process may take it for a leftover and remove it: another one is made.
    """
    while True:
        partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        make(partial)
        with suppress(FileNotFoundError):
            handle = hold(partial)
            break
    try:
        yield partial
    finally:
        os.close(handle)


@contextmanager
def partial_files(files: Mapping[Path, bytes | str]) -> Iterator[dict[Path, Path]]:
    """Context manager: files under hidden names beside their places; those still there at the end go.

    What killed processes left under such names is removed.
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
    """What lies in a folder under the hidden names of files or folders with certain names."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    found = [(entry, PARTIAL.fullmatch(entry.name)) for entry in entries]
    return [entry for entry, match in found if match and is_named(match["name"])]


def remove_partial_files(folder: Path, is_named: Callable[[str], bool]) -> None:
    """Remove what killed processes left of files with certain names, but nothing that is being written."""
    for path in partial_names(folder, is_named):
        if path.is_file() and not path.is_symlink():
            with suppress(FileNotFoundError, PermissionError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    if try_alone(handle, without_locks=False):
                        path.unlink()
                finally:
                    os.close(handle)


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Remove some files of a folder, one after the other."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def remove_empty(*folders: Path) -> None:
    """Remove folders, each of which is left where something is in it, or is not there."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Context manager: a folder is made where it is not there; with an error, what was made goes if empty."""
    made = [level for level in (folder, *folder.parents) if not level.exists()]
    if made:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        remove_empty(*made)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames durable, where the system allows a folder to be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _unread(folder: Path, marker: str) -> Iterator[None]:
    """Context manager: where a marker stands, readers may be in the folder, and are waited for."""
    if not os.path.lexists(folder / marker):
        yield
        return
    handle = hold(folder)
    try:
        with alone(folder, handle):
            yield
    finally:
        os.close(handle)
