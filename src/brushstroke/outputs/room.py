"""Makes room in a folder of files that only save time: those that were not used for longest are deleted.

It does not decide what is kept.
"""

import re
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 if it does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    sizes = 0
    for file in files:
        with suppress(FileNotFoundError):
            sizes += 0 if file.is_dir() else file.lstat().st_size
    return sizes


def kept_in(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """The folders in a cache folder, which may be missing, whose names match; sorted by name."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if name.fullmatch(path.name) and path.is_dir())


def make_room(entries: Iterable[Path], size: int, limit: int, *, spared: Collection[Path] = ()) -> bool:
    """Delete files or folders, by the times of their last use, until one of this size fits.

    Args:
        entries: all files and folders that count; their modification time is that of their last use.
        size: of the new one, in bytes.
        limit: of all together, in bytes; nothing is deleted for one that is larger.
        spared: entries that are not deleted.

    Returns:
        Whether it fits.
    """
    if size > limit:
        return False
    times = {}
    for path in entries:
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime
    sizes = {path: size_of(path) for path in times}
    total = size + sum(sizes.values())
    for path in sorted(times.keys() - set(spared), key=times.__getitem__):
        if total <= limit:
            break
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        total -= sizes[path]
    return total <= limit
