"""Reads one file of rows (JSONL, JSON, CSV, TSV, each also as .gz, or Parquet); errors name the line or row.

It does not look for files, and does not use the datasets package: local files need no network and no cache.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from brushstroke.data.validate import expect
from brushstroke.errors import DataError

Row = Mapping[str, Any]
_BATCH = 1024  # rows of a Parquet file that are in memory together
_LONGEST_FIELD = 2**31 - 1  # characters in a field of a CSV file
_OBJECT = "an object in braces on every line"
_RETURN = re.compile(r"(?<=\r)(?!\n)")
_ROWS = ("data", "rows", "examples")  # keys of an object under which files have their rows
_SPLITS = ("train", "validation", "valid", "dev", "test")
_OF_ROWS = {
    "messages",
    "prompt",
    "completion",
    "text",
    "conversations",
    "instruction",
    "question",
    "input_ids",
}


def read_file(path: Path) -> list[Row]:
    """Read the rows of one file, according to its ending.

    Raises:
        DataError: the file is empty, damaged, or of an unknown format.
    """
    return list(stream_file(path))


def stream_file(path: Path) -> Iterator[Row]:
    """The rows of one file, one after the other; those of a .json or .tsv file are read together.

    Raises:
        DataError: the file is empty, damaged, or of an unknown format.
    """
    reader = READERS.get(ending_of(path))
    if reader is None:
        raise DataError(
            f"{path}: files with the ending {ending_of(path)!r} cannot be read; expected {endings()}: "
            "convert or rename the file"
        )
    empty = has_rows = False
    try:
        empty = path.stat().st_size == 0
        for row in () if empty else reader(path):
            has_rows = True
            yield row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); check the file") from error
    if not has_rows:
        raise DataError(
            f"{path}: {'the file is empty' if empty else 'contains no rows'}; add at least one row"
        )


def ending_of(path: Path) -> str:
    """The ending that determines how a file is read, in lower case; without .gz if it is compressed."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_readable(path: Path) -> bool:
    """Whether the name of a file has an ending that can be read."""
    return ending_of(path) in READERS and (path.suffix.lower() != ".gz" or ending_of(path) != ".parquet")


def lines_of(path: Path) -> Iterator[tuple[int, int, str]]:
    """Each line of a text file that is not blank: its number (from 1), its offset in bytes, and its text.

    Lines end at "\\n" only: splitlines() would also split at U+2028 and similar, which JSON strings may have.

    Raises:
        DataError: a line is not UTF-8.
    """
    offset = 0
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            start = codecs.BOM_UTF8 if number == 1 and raw.startswith(codecs.BOM_UTF8) else b""
            try:
                text = raw[len(start) :].decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, raw) from error
            if text.strip():
                yield number, offset + len(start), text.removesuffix("\n")
            offset += len(raw)


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _not_utf8(path: Path, line: int, raw: bytes) -> DataError:
    wide = line == 1 and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    guess, encoding = (" (it looks like UTF-16)", "UTF-16") if wide else ("", "LATIN1")
    return DataError(
        f"{path}: line {line} is not UTF-8{guess}; save the file as UTF-8, "
        f"for example with: iconv -f {encoding} -t UTF-8"
    )


def _text(path: Path) -> str:
    with _opened(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0)
        raise _not_utf8(path, raw.count(b"\n", 0, start) + 1, raw) from error


def _stream_jsonl(path: Path) -> Iterator[Row]:
    return (row_of_line(text, path, number) for number, _, text in lines_of(path))


def row_of_line(text: str, path: Path, number: int) -> Row:
    """The row in a line of a JSONL file.

    Raises:
        DataError: it is not a JSON object.
    """
    return expect(dict, _parse_json(text, path, number), f"{path}: line {number}", _OBJECT)


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    if text.lstrip()[:1] != "[":
        try:
            lines = list(_stream_jsonl(path))
        except DataError as error:
            if (found := _whole_json(text, path, error)) is None:
                raise
            if (inside := _rows_of_object(found, path)) is None:
                raise DataError(
                    f"{path}: contains one object; expected an array with one object per row: put the rows "
                    "between [ and ]"
                ) from None
            return inside
        only = dict(lines[0]) if len(lines) == 1 else {}
        return lines if only.keys() & _OF_ROWS else _rows_of_object(only, path) or lines
    rows = enumerate(_parse_json(text, path), start=1)
    return [expect(dict, row, f"{path}: row {number}", "an object in braces") for number, row in rows]


def _whole_json(text: str, path: Path, of_lines: DataError) -> dict[str, Any] | None:
    """The one object of a file that is not JSONL; None if it has something else.

    Raises:
        DataError: it is not JSON; the error is that of the lines if the first of them is complete.
    """
    try:
        found = _parse_json(text, path)
    except DataError as error:
        with suppress(ValueError):
            json.loads(text.lstrip().partition("\n")[0])
            raise of_lines from None
        raise error from None
    return found if isinstance(found, dict) else None


def _rows_of_object(found: dict[str, Any], path: Path) -> list[Row] | None:
    """The rows of {"data": [...]}, beside other keys; None if the object is not of this form."""
    tables = [
        name
        for name, value in found.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    ]
    named = [name for name in tables if name in _ROWS]
    splits = [name for name in tables if name in _SPLITS]
    if len(named) == 1 and not splits:
        return found[named[0]]
    if splits:
        raise DataError(
            f"{path}: contains the splits {', '.join(map(repr, splits))}; write the one to read to a "
            "file of its own"
        )
    return None


def _parse_json(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {line or error.lineno} is not valid JSON ({error.msg}, column {error.colno}); "
            "correct the line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: line {line or 1} cannot be read as JSON ({error}); correct the line"
        ) from error


def _stream_csv(path: Path) -> Iterator[Row]:
    return _stream_table(path, _csv_lines(path))


def _csv_lines(path: Path) -> Iterator[str]:
    """All lines, with their ends; a carriage return ends a line too."""
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, raw) from error
            yield from _RETURN.split(text) if "\r" in text else (text,)


def _read_tsv(path: Path) -> list[Row]:
    """A file of columns separated by tabs, without quotes, or with quotes around some fields."""
    text = _text(path)
    lines = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line]
    if len({len(fields) for fields in lines}) > 1:  # tabs or ends of lines within quotes
        return list(_stream_table(path, io.StringIO(text, newline=""), delimiter="\t"))
    header, *records = [[_unquoted(field) for field in fields] for fields in lines] or [[]]
    _refuse_repeated(path, header)
    return [dict(zip(header, fields, strict=True)) for fields in records]


def _unquoted(field: str) -> str:
    """The field without its quotes, if it is quoted as a whole."""
    found = re.fullmatch(r'"((?:[^"]|"")*)"', field)
    return found[1].replace('""', '"') if found else field


def _stream_table(path: Path, lines: Iterable[str], **form: Any) -> Iterator[Row]:
    limit = csv.field_size_limit()
    reader = csv.reader(lines, strict=True, **form)
    header: list[str] = []
    for count in itertools.count():
        csv.field_size_limit(_LONGEST_FIELD)
        try:
            fields = next((fields for fields in reader if fields), None)
        except csv.Error as error:
            raise DataError(
                f"{path}: line {reader.line_num} is not valid CSV ({error}); correct the line"
            ) from error
        finally:
            csv.field_size_limit(limit)  # a setting of the process
        if fields is None:
            return
        if not count:
            header = fields
            _refuse_repeated(path, header)
        elif len(fields) != len(header):
            raise DataError(
                f"{path}: row {count} (line {reader.line_num}) has {len(fields)} fields and "
                f"the first line {len(header)}; correct the row (a text with commas needs quotes)"
            )
        else:
            yield dict(zip(header, fields, strict=True))


def _refuse_repeated(path: Path, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(
            f"{path}: line 1 contains the column {repeated[0]!r} twice; give every column a different name"
        )


def _stream_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: is not a readable Parquet file ({reason}); create it again") from error


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _stream_jsonl,
    ".ndjson": _stream_jsonl,
    ".json": _read_json,
    ".csv": _stream_csv,
    ".tsv": _read_tsv,
    ".parquet": _stream_parquet,
}


def endings() -> str:
    """The endings of readable files, for a message."""
    return f"{', '.join(READERS)} (all but .parquet also as .gz)"
