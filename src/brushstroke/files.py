"""Writing files so that a reader sees all of them or none: temporary name, fsync, rename, read back.

It knows nothing of what is in the files; only that JSON which cannot be taken is one kind of error.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from brushstroke.errors import BrushstrokeError, OutputError

PARTIAL = ".partial-"  # what a name begins with while its file or folder is being written


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
        staging = None
        try:
            staging = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder))
            for name, content in files.items():
                _write_synced(staging / name, content)
            _sync_folder(staging)
            _exchange(staging, folder, list(files), owned)
        except BaseException:
            _undo(staging, made)
            raise
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, folder: Path, names: list[str], owned: Collection[str]) -> None:
    """Move old files out and new ones in, the last name first out and last in; on failure the old return."""
    replaced, placed = staging / "replaced", []
    replaced.mkdir()
    try:
        for name in dict.fromkeys([names[-1], *owned, *names]):
            if (folder / name).exists():
                os.replace(folder / name, replaced / name)
        for name in names:
            os.replace(staging / name, folder / name)
            placed.append(name)
        _sync_folder(folder)
    except BaseException:
        for name in placed:
            (folder / name).unlink()
        for old in replaced.iterdir():
            os.replace(old, folder / old.name)
        raise


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


def _undo(staging: Path | None, made: list[Path]) -> None:
    if staging is not None and not any((staging / "replaced").glob("*")):
        shutil.rmtree(staging, ignore_errors=True)
    with suppress(OSError):
        for level in made:
            if level.is_dir():
                level.rmdir()
