"""Read rows: JSONL, JSON, CSV and Parquet files, folders of them, hub data sets, lists of dicts.

It does not look into the rows: which columns they need is the business of `encode`.
"""

import bisect
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brushstroke.errors import DataError, did_you_mean

Row = Mapping[str, Any]
Source = str | Path | Iterable[Row]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in order, what they are called, and a hash of their content.

    `files` holds, for each file read, its name and the number of rows before it.
    """

    rows: list[Row]
    name: str
    hash: str
    files: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """The place of a row (from 1) in words: `train.jsonl, row 3`; in a folder, counted in its file."""
        if not self.files:
            return f"{self.name}, row {row}"
        index = bisect.bisect_left([before for _, before in self.files], row) - 1
        file, before = self.files[index]
        return f"{file}, row {row - before}"


def read_rows(source: Source, *, split: str | None = None) -> Rows:
    """All rows of a data source, in order.

    `source` is a path to a `.jsonl`, `.json` (an array of objects), `.csv` or `.parquet` file, a folder of
    those (in the order of their names), the name of a hub data set (`name` or `name:split`, the train split
    by default), a list of dicts, or a `datasets.Dataset`.

    >>> read_rows([{"text": "a"}, {"text": "b"}]).where(2)
    'the given rows, row 2'

    Raises:
        DataError: the source is missing, empty, damaged, or of a kind that cannot be read.
    """
    if isinstance(source, str | Path):
        return _read_named(source, split)
    if _is_from_datasets(source, "Dataset"):
        rows, name = _dataset_rows(source), "the given data set"
    elif _is_from_datasets(source, "DatasetDict"):
        raise DataError(
            f"this is a dictionary of splits ({', '.join(map(repr, source))}); pass one of them, "
            "such as data['train']"
        )
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        rows, name = list(source), "the given rows"
    else:
        raise DataError(
            f"cannot read examples from a {type(source).__name__}; pass a path, the name of a hub data set, "
            "a list of dicts or a datasets.Dataset"
        )
    _check_rows(rows, name)
    return Rows(rows, name, hash_rows(rows))


def hash_rows(rows: Iterable[Any]) -> str:
    """sha256 over the rows as JSON with sorted keys, so that neither file format nor column order matters."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _read_named(source: str | Path, split: str | None) -> Rows:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        rows = _read_file(path)
        return Rows(rows, path.name, hash_rows(rows), files=((str(path), 0),))
    if isinstance(source, str):
        name, _, named_split = source.partition(":")
        if _may_be_on_the_hub(name):
            return _read_hub(name, named_split or split or "train")
    raise DataError(f"{source}: no such file or folder{_near_names(path)}; check the path")


def _near_names(path: Path) -> str:
    try:
        return did_you_mean(path.name, (near.name for near in path.parent.iterdir()))
    except OSError:
        return ""


def _may_be_on_the_hub(name: str) -> bool:
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in _READERS:
        return False
    folder, slash, _ = name.rpartition("/")
    return not Path(folder).exists() if slash else "." not in name


def _read_folder(folder: Path) -> Rows:
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        import datasets

        rows = _dataset_rows(datasets.load_from_disk(str(folder)))
        _check_rows(rows, str(folder))
        return Rows(rows, folder.name, hash_rows(rows), files=((str(folder), 0),))
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in _READERS and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder}: this folder holds no data file; expected files ending in {_endings()}")
    rows, files = [], []
    for path in paths:
        files.append((str(path), len(rows)))
        rows += _read_file(path)
    return Rows(rows, folder.name, hash_rows(rows), files=tuple(files))


def _read_file(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: the ending {path.suffix!r} is not one that can be read; expected {_endings()}: "
            "convert or rename the file"
        )
    try:
        empty = path.stat().st_size == 0
        rows = [] if empty else reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    if not rows:
        raise DataError(f"{path}: {'the file is empty' if empty else 'holds no rows'}; add at least one row")
    return rows


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        guess = " (it looks like UTF-16)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{path}: line {line} is not UTF-8{guess}; save the file as UTF-8, "
            "for example with: iconv -f LATIN1 -t UTF-8"
        ) from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): it would also split at U+2028 and its like, which JSON allows inside strings.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse_json(line, path, number)
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: line {number} is {kind_of(row)}; expected an object in braces on every line: "
                "correct the line"
            )
        rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    if text.lstrip()[:1] != "[":
        try:
            return _read_jsonl(path)
        except DataError:
            if isinstance(_parse_json(text, path), dict):
                raise DataError(
                    f"{path}: holds one object; expected an array of objects, one for each row: "
                    "put the rows between [ and ]"
                ) from None
            raise
    rows = _parse_json(text, path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: row {number} is {kind_of(row)}; expected an object in braces: correct the row"
            )
    return rows


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


def _read_csv(path: Path) -> list[Row]:
    text = _text(path)
    limit = csv.field_size_limit(max(len(text), 131_072))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            header = next((fields for fields in reader if fields), [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise DataError(
                    f"{path}: line 1 names the column {repeated[0]!r} twice; give every column its own name"
                )
            rows = []
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}: row {len(rows) + 1} (line {reader.line_num}) has {len(fields)} fields and "
                        f"the first line {len(header)}; correct the row (a text with commas needs quotes)"
                    )
                rows.append(dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise DataError(
                f"{path}: line {reader.line_num} is not valid CSV ({error}); correct the line"
            ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: is not a readable Parquet file ({reason}); write it again") from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _endings() -> str:
    return ", ".join(_READERS)


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds, from many libraries
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{name}: neither a file or folder here nor a data set that the hub gives, with the split "
            f"{split!r} ({lines[0]}); check the name, write NAME:SPLIT for another split, or load it with "
            "the datasets package and pass the result"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    rows, place = _dataset_rows(data), f"{name}:{split}"
    _check_rows(rows, place)
    return Rows(rows, place, hash_rows(rows))


def _dataset_rows(data: Any) -> list[Row]:
    return data.with_format(None).to_list()


def _is_from_datasets(source: object, name: str) -> bool:
    module = sys.modules.get("datasets")
    return module is not None and isinstance(source, getattr(module, name))


def _check_rows(rows: Sequence[object], name: str) -> None:
    if not rows:
        raise DataError(f"{name}: holds no rows; give at least one")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise DataError(
                f"{name}, row {number}: is {kind_of(row)}; expected a dict with column names as keys, "
                'such as {"prompt": "...", "completion": "..."}'
            )


def kind_of(value: object) -> str:
    """What a value is, in words that someone who looks at the file understands.

    >>> kind_of(None), kind_of(3), kind_of([1])
    ('null', 'a number (3)', 'a list')
    """
    match value:
        case None:
            return "null"
        case bool():
            return f"a boolean ({str(value).lower()})"
        case int() | float():
            return f"a number ({value})"
        case str():
            return "text"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"
