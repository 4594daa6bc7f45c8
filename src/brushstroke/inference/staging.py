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
from brushstroke.files import output_errors, refuse_existing, remove_empty


@contextmanager
def staged_folder(
    out: Path, *, overwrite: bool = False, is_ours: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Gives an empty folder beside `out` that takes the place of `out` if all goes well, and vanishes if not.

    Args:
        out: the folder to make.
        overwrite: whether it may hold files already. Those of the new folder replace them; others stay.
        is_ours: whether a file of the old folder, by its name, goes although no new one replaces it.

    Raises:
        OutputError: `out` holds files and may not be overwritten, or something cannot be written.
    """
    out = out.expanduser().resolve()
    recover(out, is_ours)
    refuse_existing(out, overwrite)
    made: list[Path] = []
    staging = _beside(out, "partial", os.getpid())
    with output_errors(out):
        try:
            made = _make_parents(out)
            staging.mkdir()
            yield staging
            _keep_foreign(out, staging, is_ours)
            _sync(staging)
            _swap(staging, out)
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
                shutil.rmtree(old)
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
    """Bring over what stands in the old folder and is nobody's business here; links, where links work."""
    if not out.is_dir():
        return
    for source in sorted(out.rglob("*")):
        relative = source.relative_to(out)
        target = staging / relative
        if source.is_dir() and not source.is_symlink():
            target.mkdir(exist_ok=True)
        elif not target.exists() and not is_ours(str(relative)):
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(source, target, follow_symlinks=False)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file, suppress(OSError):
                os.fsync(file.fileno())


def _swap(staging: Path, out: Path) -> None:
    """Put the new folder in the place of the old; cut in two, `recover` goes on from any line of this."""
    old = _beside(out, "old", os.getpid())
    if out.is_dir():
        os.rename(out, old)
    os.rename(staging, out)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


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
