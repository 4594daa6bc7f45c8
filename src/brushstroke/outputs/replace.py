"""Replaces a folder in one step, so that a killed process leaves the complete old or the complete new folder.

The new folder is built in a hidden folder next to it: DIR in .DIR.partial-XXXXXXXX/new. Then the two are
exchanged, and the old one is removed unless it is being read; the next write removes leftovers. If the system
cannot exchange folders, the old one is first renamed to .DIR.partial-XXXXXXXX/old. Between the two renames
there is no folder; if the process is killed then, the next write first restores the old one.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from brushstroke.errors import OutputError
from brushstroke.outputs.exchange import exchange
from brushstroke.outputs.lock import handed_over, try_exclusive
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
    folder: Path,
    files: Mapping[str, bytes | str],
    *,
    last: str,
    owned: Collection[str],
) -> None:
    """Replace the files of a folder that belong together; other files stay.

    The folder is replaced in one step. `write_files` is used instead if the folder holds files but no marker
    (so that no complete output can be lost), or if it cannot be replaced: a mount point, the current
    directory, a folder whose parent is not writable, or one with a subfolder that is a mount point or
    cannot be read.

    Args:
        folder: created if it does not exist; call `clear_leftovers` first.
        files, last, owned: as for `write_files`.

    Raises:
        OutputError: a file cannot be written; the old files are unchanged, unless `write_files` was used.
    """
    nothing_to_lose = folder.is_dir() and any(folder.iterdir()) and not os.path.lexists(folder / last)
    if nothing_to_lose or _is_fixed(folder.resolve()):
        write_files(folder, files, last=last, owned=owned)
        return
    with replace_folder(folder, owned.__contains__) as new:
        for name, content in files.items():
            write_synced(new / name, content)


def remove_own(folder: Path, owned: Collection[str]) -> None:
    """Remove some files of a folder in one step, and the folder if it is then empty.

    Raises:
        OutputError: they cannot be removed.
    """
    if folder.is_dir():
        with replace_folder(folder, owned.__contains__):
            pass
        remove_empty(folder)


@contextmanager
def replace_folder(
    folder: Path,
    is_owned: Callable[[str], bool],
    *,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Context manager: an empty folder that replaces another at the end, or is removed after an error.

    Its files replace those of the old folder; other files stay. If a run of this process has
    locked the old folder, it has then locked the new one.

    Args:
        folder: to replace or to create; call `clear_leftovers` first.
        is_owned: whether to remove a file of the old folder (by its relative path) that no new one replaces.
        check: called right before the exchange; if it raises, the old folder does not change.

    Raises:
        OutputError: the old folder has a file where the new one has a folder or the reverse, or a subfolder
            that is a mount point or cannot be read, or a file cannot be written; the old folder is unchanged.
    """
    folder = folder.expanduser().resolve()
    _refuse_immovable(folder)
    with output_errors(folder), made_folder(folder.parent), new_partial(folder, Path.mkdir) as work:
        new = work / _NEW
        new.mkdir(0o700 if folder.is_dir() else 0o777)  # private until it gets the mode of the old one
        built = new.stat()
        try:
            yield new
            _sync(new)
            _carry_over(folder, new, is_owned)
            check()
            with handed_over(folder, new):
                _swap(new, folder, work / _OLD)
        finally:
            if new.is_dir() and not os.path.samestat(new.stat(), built):  # the exchanged one
                _carry_over(new, folder, is_owned)
            _finish(work, folder, is_owned, without_locks=True)
            sync_folder(folder.parent)


def clear_leftovers(folder: Path, is_owned: Callable[[str], bool]) -> None:
    """Remove leftovers of killed processes next to a folder; restores the old folder if there is no other.

    Args:
        folder: the folder that was to be replaced or created.
        is_owned: as for `replace_folder`.

    Raises:
        OutputError: this is not possible, or another process is replacing the folder now.
    """
    folder = folder.expanduser().resolve()
    clear_leftovers_in(folder.parent, folder.name.__eq__, is_owned)


def clear_leftovers_in(
    parent: Path, is_named: Callable[[str], bool], is_owned: Callable[[str], bool]
) -> None:
    """Remove leftovers of killed processes next to folders with certain names; see `clear_leftovers`."""
    for work in filter(_is_work, partial_names(parent, is_named)):
        folder = parent / PARTIAL.sub(r"\g<name>", work.name)
        with output_errors(folder), suppress(FileNotFoundError):  # another process has removed it
            handle = os.open(work, os.O_RDONLY)
            try:
                if try_exclusive(handle, without_locks=False):
                    _finish(work, folder, is_owned, without_locks=False)
                elif (work / _OLD).is_dir() and not folder.exists():
                    raise OutputError(
                        f"another process is replacing {folder}, whose files are now in {work / _OLD}; "
                        f"wait for it, or if it has ended, rename {work / _OLD} to {folder}"
                    )
            finally:
                os.close(handle)


def _swap(new: Path, folder: Path, old: Path) -> None:
    if not folder.is_dir():
        os.rename(new, folder)
    elif not exchange(new, folder):
        os.rename(folder, old)
        os.rename(new, folder)


def _finish(work: Path, folder: Path, is_owned: Callable[[str], bool], *, without_locks: bool) -> None:
    """Finish or undo the replacement in a work folder, and remove all of it that is not being read."""
    old, new = work / _OLD, work / _NEW
    if old.is_dir():
        remove_empty(folder)
        if not folder.exists():
            os.rename(old, folder)
        elif new.is_dir():  # another process created this folder
            return
        else:
            _carry_over(old, folder, is_owned)
    for left in (old, new):
        _remove_unread(left, without_locks)
    remove_empty(work)


def _remove_unread(folder: Path, without_locks: bool) -> None:
    with suppress(FileNotFoundError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            if try_exclusive(handle, without_locks=without_locks):
                for inner in filter(_is_folder, folder.rglob("*")):  # the user may have made it read-only
                    with suppress(OSError):
                        inner.chmod(0o700)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _is_work(path: Path) -> bool:
    """Whether `replace_folder` made this folder: it contains nothing but the two expected folders."""
    with suppress(FileNotFoundError, PermissionError):  # it was removed meanwhile, or belongs to another user
        entries = list(path.iterdir()) if _is_folder(path) else None
        return entries is not None and all(
            entry.name in (_NEW, _OLD) and _is_folder(entry) for entry in entries
        )
    return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _carry_over(old: Path, new: Path, is_owned: Callable[[str], bool]) -> None:
    """Copy files of the old folder that `is_owned` does not select and no file replaces, as hard links.

    Folders keep their owner, mode, times and extended attributes; only the times of `new` itself are new.

    Raises:
        OutputError: the old folder has a file or a link where the new one has a folder, or the reverse; or
            `_refuse_immovable` refuses it.
    """
    if not old.is_dir():
        return
    _refuse_immovable(old)
    folders = [(old, new)]
    for source in sorted(old.rglob("*")):
        name = str(source.relative_to(old))
        target, there = new / name, os.path.lexists(new / name)
        if there and _is_folder(source) != _is_folder(target):
            what = ("a folder", "a file") if _is_folder(source) else ("a file", "a folder")
            raise OutputError(
                f"{source} is {what[0]}, and {what[1]} of that name would replace it; move it, or choose "
                "another folder"
            )
        if _is_folder(source):
            target.mkdir(0o700, exist_ok=True)
            folders.append((source, target))
        elif not there and not is_owned(PARTIAL.sub(r"\g<name>", name)):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copyfile(source, target, follow_symlinks=False)
                _copy_attributes(source, target)
    for source, target in reversed(folders):  # a folder after its content, which would change its times
        _copy_attributes(source, target)
    os.utime(new)


def _copy_attributes(source: Path, target: Path) -> None:
    """Copy mode, times, extended attributes and, where the system permits it, group and owner."""
    status = source.lstat()
    for owner, group in ((-1, status.st_gid), (status.st_uid, -1)):
        with suppress(OSError, AttributeError):  # not permitted, or Windows
            os.chown(target, owner, group, follow_symlinks=False)
    shutil.copystat(source, target, follow_symlinks=False)


def _refuse_immovable(folder: Path) -> None:
    """Refuse a folder with a subfolder whose content would be lost.

    Raises:
        OutputError: the subfolder is a mount point or cannot be read.
    """
    for inner in folder.rglob("*"):
        is_mount = os.path.ismount(inner)
        if is_mount or (_is_folder(inner) and not os.access(inner, os.R_OK | os.X_OK)):
            what = "is a mount point" if is_mount else "cannot be read"
            raise OutputError(
                f"{inner} {what}, so {folder} cannot be replaced; move or unmount it, or choose another "
                "folder"
            )


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
    """Whether a folder cannot be replaced, or must not because it contains the current directory."""
    if not folder.is_dir():
        return False
    with suppress(FileNotFoundError):  # the current folder was removed
        if Path.cwd().is_relative_to(folder):
            return True
    try:
        _refuse_immovable(folder)
    except OutputError:
        return True
    return os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)
