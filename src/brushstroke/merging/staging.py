"""A folder of large files that appears whole or not at all: written beside its place, then renamed.

Small files that belong into an existing folder are the part of `brushstroke.files`.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from brushstroke.errors import OutputError
from brushstroke.files import output_errors, remove_empty


@contextmanager
def staged_folder(
    out: Path, judge: Callable[[], None], *, is_ours: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Gives an empty folder beside `out` that takes the place of `out` if all goes well, and vanishes if not.

    Files of the new folder replace those of the old one; others stay.

    Args:
        out: the folder to make.
        judge: refuses what `out` must not hold, now and right before the new folder takes its place.
        is_ours: whether a file of the old folder, by its name, goes although no new one replaces it.

    Raises:
        OutputError: of `judge`, or another process has made `out` anew meanwhile, or a file stands where the
            new folder has a folder, or something cannot be written.
    """
    out = out.expanduser().resolve()
    recover(out, is_ours)
    judge()
    before = _identity(out)
    made: list[Path] = []
    staging = _beside(out, "partial", os.getpid())
    with output_errors(out):
        try:
            made = _make_parents(out)
            staging.mkdir()
            yield staging
            _keep_foreign(out, staging, is_ours)
            _sync(staging)
            judge()
            if _identity(out) != before:
                raise OutputError(
                    f"{out} is another folder than when this began, as another process has made it anew; "
                    "look at it, then give the command again or choose another folder"
                )
            _swap(staging, out)
            recover(out, is_ours)
        except BaseException:
            with suppress(OSError):
                recover(out, is_ours)
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
            raise


def recover(out: Path, is_ours: Callable[[str], bool]) -> None:
    """Undo or end what an interrupted `staged_folder` left beside `out`, but not what a living process does.

    The old folder goes back where no new one took its place. Else it goes away, and what it holds of others
    over to the new one.

    Raises:
        OutputError: it cannot be done, or another process seems to be at it.
    """
    out = out.expanduser().resolve()
    with output_errors(out):
        for old in _left(out, "old"):
            remove_empty(out)
            if out.exists():
                _keep_foreign(old, out, is_ours)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, out)
        for partial in _left(out, "partial"):
            shutil.rmtree(partial)
    if not out.exists() and (busy := _left(out, "old", alive=True)):
        raise OutputError(
            f"another process is replacing {out}, whose files are in {busy[0]} now; if it is gone, rename "
            "that back"
        )


def refuse_inside(out: Path, base: Path) -> None:
    """Refuse to write results over, into or around the folder that they are made from.

    Raises:
        OutputError: they are one folder, or one is in the other.
    """
    out, base = out.expanduser().resolve(), base.expanduser().resolve()
    if out == base or out in base.parents or base in out.parents:
        raise OutputError(f"{out} is, holds or lies in the base's own folder; choose a folder of its own")


def _make_parents(out: Path) -> list[Path]:
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _keep_foreign(out: Path, staging: Path, is_ours: Callable[[str], bool]) -> None:
    """Bring over what stands in the old folder and is nobody's business here; links, where links work.

    Raises:
        OutputError: a file, or a link, where the new folder has a folder, or the reverse.
    """
    if not out.is_dir():
        return
    for source in sorted(out.rglob("*")):
        relative = source.relative_to(out)
        target = staging / relative
        there = os.path.lexists(target)
        if there and _is_folder(source) != _is_folder(target):
            what = ("a folder", "a file") if _is_folder(source) else ("a file", "a folder")
            raise OutputError(
                f"{source} is {what[0]}, and {what[1]} of that name would replace it; move it, or choose "
                "another folder"
            )
        if _is_folder(source):
            target.mkdir(exist_ok=True)
        elif not there and not is_ours(str(relative)):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, target, follow_symlinks=False)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _identity(folder: Path) -> tuple[int, int] | None:
    """By what a folder is told from another one in its place; None where there is none."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file, suppress(OSError):
                os.fsync(file.fileno())


def _swap(staging: Path, out: Path) -> None:
    """Put the new folder in the place of the old; cut in two, or at its end, `recover` goes on from there."""
    if out.is_dir():
        os.rename(out, _beside(out, "old", os.getpid()))
    os.rename(staging, out)


def _beside(out: Path, what: str, process: int) -> Path:
    return out.with_name(f".{out.name}.{what}-{process}")


def _left(out: Path, what: str, alive: bool = False) -> list[Path]:
    """The folders beside `out` by such a name whose process is over (this one's count as such), or is not."""
    named = re.compile(rf"{re.escape(f'.{out.name}.{what}-')}(\d+)")
    entries = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    found = [(path, match) for path in entries if path.is_dir() and (match := named.fullmatch(path.name))]
    return [path for path, match in found if _is_alive(int(match[1])) == alive]


def _is_alive(process: int) -> bool:
    """Whether another process of that number lives, as far as can be told."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
