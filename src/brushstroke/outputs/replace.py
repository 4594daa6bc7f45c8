"""Replacing a folder in one step, so that a kill leaves the old one or the new one, whole.

The new one is built in a hidden folder beside its place: DIR in .DIR.partial-XXXXXXXX/new. Then the two are
exchanged, and the old one is removed unless a reader is in it; the next write removes what is left. Where
the system cannot exchange folders, the old one is renamed to .DIR.partial-XXXXXXXX/old first. In the window
between the two renames there is no folder; after a kill there, the next write first puts the old one back.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from brushstroke.errors import OutputError
from brushstroke.outputs.exchange import exchange
from brushstroke.outputs.lock import try_alone
from brushstroke.outputs.write import (
    PARTIAL,
    made_folder,
    new_partial,
    output_errors,
    partial_names,
    remove_empty,
    sync_folder,
    write_files,
    write_synced,
)

_NEW, _OLD = "new", "old"


def replace_files(
    folder: Path, files: Mapping[str, bytes | str], *, last: str, owned: Collection[str]
) -> None:
    """Write files that belong together in place of those that a folder holds; other files stay.

    The folder is replaced in one step. It is written by `write_files` where it holds files but no marker, so
    that there is nothing to lose, and where it cannot be renamed: a mount point, the current directory, a
    folder in one that may not be written.

    Args:
        folder: made if it is not there; after `clear_leftovers`.
        files, last, owned: as for `write_files`.

    Raises:
        OutputError: a file cannot be written; what stood there before is untouched.
    """
    nothing_to_lose = folder.is_dir() and any(folder.iterdir()) and not os.path.lexists(folder / last)
    if nothing_to_lose or _is_fixed(folder.resolve()):
        write_files(folder, files, last=last, owned=owned)
        return
    with replace_folder(folder, owned.__contains__) as new:
        for name, content in files.items():
            write_synced(new / name, content)


def remove_own(folder: Path, owned: Collection[str]) -> None:
    """Remove some files of a folder in one step, and the folder where nothing else is in it.

    Raises:
        OutputError: they cannot be removed.
    """
    if folder.is_dir():
        with replace_folder(folder, owned.__contains__):
            pass
        remove_empty(folder)


@contextmanager
def replace_folder(
    folder: Path, is_ours: Callable[[str], bool], *, check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Context manager: an empty folder that takes the place of another at the end, or vanishes with an error.

    Its files replace those of the old folder; others stay.

    Args:
        folder: to replace, or to make; after `clear_leftovers`.
        is_ours: whether a file of the old folder, by its path in it, goes although no new one replaces it.
        check: called right before the exchange; an error that it raises leaves the old folder as it is.

    Raises:
        OutputError: a file stands where the new folder has a folder or the reverse, or something cannot be
            written; the old folder is untouched.
    """
    folder = folder.expanduser().resolve()
    with output_errors(folder), made_folder(folder.parent), new_partial(folder, Path.mkdir) as work:
        new = work / _NEW
        new.mkdir()
        built = new.stat()
        try:
            yield new
            _sync(new)
            _carry_over(folder, new, is_ours)
            check()
            _swap(new, folder, work / _OLD)
        finally:
            if new.is_dir() and not os.path.samestat(new.stat(), built):  # the exchanged one
                _carry_over(new, folder, is_ours)
            _end(work, folder, is_ours, without_locks=True)
            sync_folder(folder.parent)


def clear_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what killed processes left beside a folder; one that has no folder in its place returns there.

    Args:
        folder: that was to be replaced or made.
        is_ours: as for `replace_folder`.

    Raises:
        OutputError: it cannot be done, or another process has the folder moved away right now.
    """
    folder = folder.expanduser().resolve()
    clear_leftovers_in(folder.parent, folder.name.__eq__, is_ours)


def clear_leftovers_in(parent: Path, is_named: Callable[[str], bool], is_ours: Callable[[str], bool]) -> None:
    """Remove what killed processes left beside folders with certain names; see `clear_leftovers`."""
    for work in filter(_is_work, partial_names(parent, is_named)):
        folder = parent / PARTIAL.sub(r"\g<name>", work.name)
        with output_errors(folder), suppress(FileNotFoundError):  # another process has removed it
            handle = os.open(work, os.O_RDONLY)
            try:
                if try_alone(handle, without_locks=False):
                    _end(work, folder, is_ours, without_locks=False)
                elif (work / _OLD).is_dir() and not folder.exists():
                    raise OutputError(
                        f"another process is replacing {folder}, whose files are in {work / _OLD} now; "
                        "wait for it, or if it is gone, rename that back"
                    )
            finally:
                os.close(handle)


def _swap(new: Path, folder: Path, old: Path) -> None:
    if not folder.is_dir():
        os.rename(new, folder)
    elif not exchange(new, folder):
        os.rename(folder, old)
        os.rename(new, folder)


def _end(work: Path, folder: Path, is_ours: Callable[[str], bool], *, without_locks: bool) -> None:
    """Finish what was begun in a work folder, or undo it, and remove all of it that nobody reads."""
    old, new = work / _OLD, work / _NEW
    if old.is_dir():
        remove_empty(folder)
        if not folder.exists():
            os.rename(old, folder)
        elif new.is_dir():  # it was not the new one that came there: somebody else made it
            return
        else:
            _carry_over(old, folder, is_ours)
    for left in (old, new):
        _remove_unread(left, without_locks)
    remove_empty(work)


def _remove_unread(folder: Path, without_locks: bool) -> None:
    with suppress(FileNotFoundError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            if try_alone(handle, without_locks=without_locks):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _is_work(path: Path) -> bool:
    """Whether a folder is one of `replace_folder`: nothing is in it that this would not put there."""
    with suppress(FileNotFoundError, PermissionError):  # it has gone since, or is another user's
        entries = list(path.iterdir()) if _is_folder(path) else None
        return entries is not None and all(
            entry.name in (_NEW, _OLD) and _is_folder(entry) for entry in entries
        )
    return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _carry_over(old: Path, new: Path, is_ours: Callable[[str], bool]) -> None:
    """Bring over what is in the old folder and is not ours to replace, as links where links work.

    Raises:
        OutputError: a file, or a link, where the new folder has a folder, or the reverse.
    """
    for source in sorted(old.rglob("*")) if old.is_dir() else []:
        name = str(source.relative_to(old))
        target, there = new / name, os.path.lexists(new / name)
        if there and _is_folder(source) != _is_folder(target):
            what = ("a folder", "a file") if _is_folder(source) else ("a file", "a folder")
            raise OutputError(
                f"{source} is {what[0]}, and {what[1]} of that name would replace it; move it, or choose "
                "another folder"
            )
        if _is_folder(source):
            target.mkdir(exist_ok=True)
        elif not there and not is_ours(PARTIAL.sub(r"\g<name>", name)):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, target, follow_symlinks=False)
    if old.is_dir():
        shutil.copymode(old, new)


def _sync(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            continue
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _is_fixed(folder: Path) -> bool:
    """Whether a folder cannot be renamed, or must not, as it is the current one."""
    if not folder.is_dir():
        return False
    with suppress(FileNotFoundError):  # the current folder was removed
        if Path.cwd().is_relative_to(folder):
            return True
    return os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)
