"""Reads rows from JSONL, JSON, CSV, TSV and Parquet files, folders of them, hub data sets and lists of dicts.

It does not check the columns of the rows; `encode` does.
"""

import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from brushstroke.data.files import Row, endings, is_readable, read_file
from brushstroke.data.mixture import join, read_weight
from brushstroke.data.published import as_read
from brushstroke.data.remote import is_url, local_copy
from brushstroke.data.row_files import is_large, read_large
from brushstroke.data.rows import Rows, hash_rows
from brushstroke.data.validate import describe_type
from brushstroke.errors import DataError, did_you_mean
from brushstroke.hub import hub_or_cache

Source = str | Path | Iterable[Row]

_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing)?)|test(?:ing)?|val(?:id(?:ation)?)?|dev(?:el)?|eval(?:uation)?|"
    r"hold[-_]?out|held[-_]?out)(?:set|s)?(?![a-z])"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(
    source: Source | Any,
    *,
    split: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    use: str | None = None,
) -> Rows:
    """Read all rows of a data source, in order, and convert published forms to our columns.

    `source` is a path to a `.jsonl`, `.json` (an array of objects, or {"data": [...]}), `.csv`, `.tsv` or
    `.parquet` file (all but the last also as `.gz`), the URL of one, a folder of such files (sorted by name;
    if some are named as a train split, the other splits are left out), a hub data set (`owner/name` or
    `name:split`, by default the train split), a list of dicts, or a `datasets.Dataset`. A list of names joins
    their rows; a name may end with a weight ("rows.jsonl:2" repeats every row, ":0.5" takes half of them).

    Args:
        source: the data.
        split: the split of a hub data set.
        prompt, completion: columns that the user selected; the rows are not converted then.
        use: "chosen" trains the better answers of preference pairs, "text" texts that have a label.

    >>> read_rows([{"text": "a"}, {"text": "b"}]).where(2)
    'the given rows, row 2'

    Raises:
        DataError: the source is missing, empty, damaged, or of an unknown kind; its rows have several forms,
            or contain preferences or labels and `use` does not say what to train.
    """
    weighted = [read_weight(name) for name in _names(source)]
    if len(weighted) > 1 or any(weight != 1 for _, weight in weighted):
        parts = [_read_one(name, split, prompt, completion, use) for name, _ in weighted]
        return join(parts, [weight for _, weight in weighted])
    return _read_one(weighted[0][0] if weighted else source, split, prompt, completion, use)


def _read_one(
    source: Any, split: str | None, prompt: str | None, completion: str | None, use: str | None
) -> Rows:
    """The rows of one source without a weight."""
    convert = partial(as_read, prompt=prompt, completion=completion, use=use)
    return convert(_read(source, split, convert))


def _names(source: Any) -> list[str | Path]:
    """The names of sources; empty for rows in memory."""
    names = list(source) if isinstance(source, list | tuple) else [source]
    return names if all(isinstance(name, str | Path) for name in names) else []


def _read(source: Any, split: str | None, convert: "partial[Rows]") -> Rows:
    """The rows of a source; large files are converted too, since this needs another file."""
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | Path):
        return _read_named(source, split, convert)
    if _is_from_datasets(source, "Dataset"):
        rows, name = _dataset_rows(source), "the given data set"
    elif _is_from_datasets(source, "DatasetDict"):
        raise DataError(
            f"got a dictionary of splits ({', '.join(map(repr, source))}); pass one of them, such as "
            "data['train']"
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


def _read_named(source: str | Path, split: str | None, convert: "partial[Rows]") -> Rows:
    if not str(source).strip():
        raise DataError("the name of the data is empty; give a file, a folder or a hub data set")
    if is_url(source):
        path = local_copy(str(source))
        found = _read_files([path], path.name, (), convert)
        return replace(found, files=((str(source), 0),))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, convert)
    if path.is_file():
        return _read_files([path], path.name, (), convert)
    if isinstance(source, str):
        name, _, named_split = source.partition(":")
        if ("/" in name or named_split) and _may_be_on_the_hub(name):
            return _read_hub(name, named_split or split or "train")
    raise DataError(f"{source}: no such file or folder{_near_names(path)}; check the path")


def _near_names(path: Path) -> str:
    try:
        return did_you_mean(path.name, (near.name for near in path.parent.iterdir() if near.exists()))
    except OSError:
        return ""


def _may_be_on_the_hub(name: str) -> bool:
    if not _HUB_ID.fullmatch(name) or is_readable(Path(name)):
        return False
    folder, slash, _ = name.rpartition("/")
    return not (slash and Path(folder).exists())


def _read_files(paths: list[Path], name: str, notes: tuple[str, ...], convert: "partial[Rows]") -> Rows:
    if is_large(paths) and (found := read_large(paths, name, notes, convert)):
        return found
    rows, files = [], []
    for path in paths:
        files.append((str(path), len(rows)))
        rows += read_file(path)
    return Rows(rows, name, hash_rows(rows), files=tuple(files), notes=notes)


def _read_folder(folder: Path, convert: "partial[Rows]") -> Rows:
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        import datasets

        rows = _dataset_rows(datasets.load_from_disk(str(folder)))
        _check_rows(rows, str(folder))
        return Rows(rows, folder.name, hash_rows(rows), files=((str(folder), 0),))
    paths = _data_files(folder) or (_data_files(folder / "data") if (folder / "data").is_dir() else [])
    if not paths:
        raise DataError(f"{folder}: this folder contains no data file; expected files ending in {endings()}")
    splits = {path: _split_of(path) for path in paths}
    if "train" in splits.values():
        paths = [path for path in paths if splits[path] in ("train", "")]
    left = [path.name for path in splits if path not in paths]
    kept = ", ".join(path.name for path in paths)
    notes = (f"read {kept}; not read, because they are other splits: {', '.join(left)}",) if left else ()
    return _read_files(paths, folder.name, notes, convert)


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_readable(path) and not path.name.startswith("."))


def _split_of(path: Path) -> str:
    """ "train" or "other" if a file's name has the name of a split, else an empty text."""
    found = _SPLIT.search(path.name.lower())
    return "" if found is None else "train" if found["train"] else "other"


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # its log of retries would hide the one message
    datasets.disable_progress_bars()
    unreachable = ""
    try:
        with hub_or_cache() as unreachable:
            data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        said = f"the Hugging Face hub cannot be reached: {unreachable}" if unreachable else str(error)
        lines = said.strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{name}: there is no such file or folder, and no hub data set with the split {split!r} "
            f"({lines[0]}); check the name, write NAME:SPLIT for another split, or load it with the "
            "datasets package and pass the result"
        ) from error
    finally:
        client.setLevel(level)
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
        raise DataError(f"{name}: contains no rows; give at least one")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise DataError(
                f"{name}, row {number}: is {describe_type(row)}; expected a dict with column names as keys, "
                'such as {"prompt": "...", "completion": "..."}'
            )
