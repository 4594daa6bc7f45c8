"""Rows that stay in a file: an index of their lines, in the cache, finds each of them.

Large data is read once to build the index; a second run finds it by the content of the files.
"""

import json
import os
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from brushstroke.data import cache
from brushstroke.data.files import Row, ending_of, lines_of, row_of_line, stream_file
from brushstroke.data.rows import FactCounter, RowFacts, Rows, StoredRows
from brushstroke.data.validate import DataWarning
from brushstroke.errors import DataError, OutputError
from brushstroke.files import file_sum, read_json

_LINES, _OFFSETS, _DIGESTS, _SHAPES, _ORIGINS = (
    "rows.jsonl",
    "offsets.npy",
    "digests.npy",
    "shapes.npy",
    "origins.npy",
)


Stamp = tuple[int, int]  # size and time of the last change


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> DataError:
    return DataError(f"{path}: was changed while it was read; repeat the command")


class LineRows(StoredRows):
    """Rows in a JSONL file, parsed when they are used.

    Args:
        path: the file, which must not change.
        offsets: where the line of each row begins, in bytes.
        facts: about the rows.
        key: identifies their content.
        stamp: of the file, from before its content was identified.

    Raises:
        DataError: the file was changed since.
    """

    def __init__(
        self, path: Path, offsets: np.ndarray, facts: RowFacts, key: str, stamp: Stamp | None = None
    ) -> None:
        self.path, self.offsets, self.facts, self.key = path, offsets, facts, key
        self._file = path.open("rb")  # stays open: another process may remove the file from the cache
        weakref.finalize(self, self._file.close)
        self._stamp = stamp or _stamp(os.fstat(self._file.fileno()))
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Check that nobody has written to the file since its content was identified.

        Raises:
            DataError: the file was changed.
        """
        if _stamp(os.fstat(self._file.fileno())) != self._stamp:
            raise _changed(self.path)

    def __len__(self) -> int:
        return len(self.offsets)

    def row(self, index: int) -> Row:
        """The row at an index (from 0)."""
        self._file.seek(int(self.offsets[index]))
        line = self._file.readline().decode("utf-8", "replace")
        return row_of_line(line, self.path, index + 1)


def is_large(paths: Iterable[Path]) -> bool:
    """Whether files are large enough for an index and for tokens on disk."""
    return sum(path.stat().st_size for path in paths) >= cache.LARGE


def read_large(
    paths: Sequence[Path], name: str, notes: tuple[str, ...], convert: "partial[Rows]"
) -> Rows | None:
    """The rows of large files, with an index in the cache; None if they cannot be kept there.

    Args:
        paths: the files, in order.
        name: of the source.
        notes: what was not read.
        convert: (rows, gather=function that puts an iterator of rows in a file) → the rows as they are
            read; its keywords are JSON types.

    Raises:
        DataError: a row is invalid.
    """
    try:
        stamps = [_stamp(path.stat()) for path in paths]
        contents = [(path.suffix.lower() == ".gz", ending_of(path), file_sum(path)) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the file") from error
    key = cache.key_of(contents, convert.keywords)
    if (found := _stored(paths, stamps[0], name, notes, key)) is not None:
        return found
    try:
        with cache.new_entry("rows", key) as new:
            _index(new, paths, name, convert)
            for path, stamp in zip(paths, stamps, strict=True):
                if _stamp(path.stat()) != stamp:
                    raise _changed(path)
    except (OutputError, OSError, _NotJsonError) as error:
        warnings.warn(f"{name}: is read into memory, because {error}", DataWarning, stacklevel=4)
        return None
    return _stored(paths, stamps[0], name, notes, key)


class _NotJsonError(Exception):
    """A row holds values that JSON cannot hold."""

    def __str__(self) -> str:
        return "a row holds values that JSON cannot hold"


def _index(folder: Path, paths: Sequence[Path], name: str, convert: Callable[..., Rows]) -> None:
    """Write the index of some files' rows; and the rows too, unless they are lines of the only file."""
    counter = FactCounter()
    only = paths[0] if len(paths) == 1 else None
    is_indexed = only is not None and only.suffix.lower() in (".jsonl", ".ndjson")
    files: list[tuple[str, int]] = []
    if is_indexed:
        files.append((str(paths[0]), 0))
        offsets = array("q")
        for number, offset, text in lines_of(paths[0]):
            counter.add(row_of_line(text, paths[0], number))
            offsets.append(offset)
        if not offsets:
            raise DataError(f"{paths[0]}: contains no rows; add at least one row")
        rows = LineRows(paths[0], np.array(offsets, "i8"), counter.facts(), "")
    else:

        def all_rows() -> Iterator[Row]:
            for path in paths:
                files.append((str(path), len(counter)))
                yield from stream_file(path)

        rows = _written(folder / "read.jsonl", all_rows(), counter)
    read = Rows(rows, name, rows.facts.hash, files=tuple(files))
    found = convert(read, gather=lambda made: _written(folder / "converted.jsonl", made, FactCounter()))
    assert isinstance(found.rows, LineRows)
    if found.rows.path.parent == folder:
        found.rows.path.rename(folder / _LINES)
    (folder / "read.jsonl").unlink(missing_ok=True)
    np.save(folder / _OFFSETS, found.rows.offsets)
    np.save(folder / _DIGESTS, found.rows.facts.digests)
    np.save(folder / _SHAPES, found.rows.facts.shape_ids)
    if len(found.origins):
        np.save(folder / _ORIGINS, np.array(found.origins, "i8"))
    meta = {
        "hash": found.hash,
        "form": found.form,
        "notes": found.notes,
        "before": [before for _, before in files],
        "shapes": found.rows.facts.shapes,
        "sums": {file.name: file_sum(file) for file in folder.iterdir()},
    }
    (folder / cache.META).write_text(json.dumps(meta), "utf-8")


def _written(path: Path, rows: Iterable[Row], counter: FactCounter) -> LineRows:
    """The rows, written to a file."""
    offsets = array("q")
    with path.open("wb") as file:
        for row in rows:
            counter.add(row)
            offsets.append(file.tell())
            try:
                file.write(json.dumps(row).encode() + b"\n")
            except TypeError:
                raise _NotJsonError from None
    return LineRows(path, np.array(offsets, "i8"), counter.facts(), "")


def _stored(paths: Sequence[Path], stamp: Stamp, name: str, notes: tuple[str, ...], key: str) -> Rows | None:
    """The rows of an entry; None if there is none. A damaged one is removed."""
    folder = cache.find("rows", key)
    if folder is None:
        return None
    try:
        meta = read_json(folder / cache.META)
        if any(file_sum(folder / file) != stored for file, stored in meta["sums"].items()):
            raise ValueError("damaged")
        offsets, digests, ids = (np.load(folder / file) for file in (_OFFSETS, _DIGESTS, _SHAPES))
        shapes = tuple((tuple(names), tuple(valued)) for names, valued in meta["shapes"])
        facts = RowFacts(digests, shapes, ids)
        if _LINES in meta["sums"]:
            rows = LineRows(folder / _LINES, offsets, facts, key)
        else:
            rows = LineRows(paths[0], offsets, facts, key, stamp)
        return Rows(
            rows,
            name,
            meta["hash"],
            files=tuple(zip(map(str, paths), meta["before"], strict=True)),
            form=meta["form"],
            origins=np.load(folder / _ORIGINS) if _ORIGINS in meta["sums"] else (),
            notes=(*notes, *meta["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        cache.remove(folder)
        return None
