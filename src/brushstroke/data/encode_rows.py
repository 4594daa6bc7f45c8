"""Encodes all rows of a data set, in batches; large data in several processes, and to files in the cache.

`Encoder` encodes a batch.
"""

import json
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict

from brushstroke.cores import usable_cores
from brushstroke.data import cache
from brushstroke.data.encoder import SHOWN, Batch, Encoded, Encoder, Facts
from brushstroke.data.rows import Rows
from brushstroke.data.token_arrays import ArrayFiles, TokenArrays, read_arrays
from brushstroke.data.validate import DataWarning
from brushstroke.data.workers import map_in_processes
from brushstroke.errors import DataError, OutputError
from brushstroke.files import read_json

PROCESSES = 8  # at most; each needs 70 MB and more
_ROWS = 1024  # of a batch
Progress = Callable[[int, int], None]
_verified: set[str] = set()  # entries that this process has read once: the hash of 1 GB takes a second


def encode_rows(
    rows: Rows, encoder: Encoder, on_progress: Progress | None = None
) -> tuple[TokenArrays, Facts]:
    """The examples of all rows, and facts about the rows.

    Args:
        rows: if their content has a key, the tokens are kept in files, and found there by a later run.
        encoder: encodes their batches.
        on_progress: called with the number of encoded rows and the number of all rows.

    Raises:
        DataError: rows are invalid; the message names the first ones.

    Warns:
        DataWarning: the files cannot be written.
    """
    described = encoder.identity() if rows.key else None
    if described is None:
        return _in_memory(rows, encoder, on_progress)
    key = cache.key_of(rows.key, described)
    if (found := _stored(key)) is not None:
        return found
    try:
        with cache.new_entry("tokens", key) as new:
            with closing(ArrayFiles(new)) as files:
                facts = _encode_all(rows, encoder, files.append, on_progress)
            meta = {"facts": asdict(facts), "hash": read_arrays(new).hash}
            (new / cache.META).write_text(json.dumps(meta), "utf-8")
            rows.check_unchanged()
        found = _stored(key)
    except OutputError as error:
        warnings.warn(f"{rows.name}: its tokens stay in memory, because {error}", DataWarning, stacklevel=4)
    return found or _in_memory(rows, encoder, on_progress)


def _in_memory(rows: Rows, encoder: Encoder, on_progress: Progress | None) -> tuple[TokenArrays, Facts]:
    parts: list[TokenArrays] = []
    facts = _encode_all(rows, encoder, parts.append, on_progress)
    rows.check_unchanged()
    return TokenArrays.joined(parts), facts


def _stored(key: str) -> tuple[TokenArrays, Facts] | None:
    """The stored examples and facts; a damaged entry is removed."""
    folder = cache.find("tokens", key)
    if folder is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta, examples = read_json(folder / cache.META), read_arrays(folder)
        if key in _verified:
            examples.hash = meta["hash"]
        if examples.hash == meta["hash"]:
            _verified.add(key)
            facts = Facts(**meta["facts"])
            facts.filled = {int(number): needed for number, needed in facts.filled.items()}
            return examples, facts
    cache.remove(folder)
    return None


def _batches(rows: Rows) -> Iterator[Batch]:
    for start in range(0, len(rows), _ROWS):
        part = rows.rows[start : start + _ROWS]
        yield Batch(start + 1, part, [rows.where(start + n) for n in range(1, len(part) + 1)])


def _encoded(rows: Rows, encoder: Encoder) -> Generator[Encoded, None, None]:
    """All batches in order; those of rows in a file are encoded on all cores."""
    batches, cores = _batches(rows), usable_cores()
    if cores > 1 and rows.key:
        yield from map_in_processes(encoder.encode, batches, min(cores, PROCESSES))
    else:
        yield from map(encoder.encode, batches)


def _encode_all(
    rows: Rows, encoder: Encoder, keep: Callable[[TokenArrays], object], on_progress: Progress | None
) -> Facts:
    """Encode all rows, pass the examples of each batch to `keep`, and return the facts about the rows.

    Raises:
        DataError: rows are invalid; the message names the first ones.
    """
    facts, done = Facts(), 0
    problems: list[tuple[int, str]] = []
    with closing(_encoded(rows, encoder)) as batches:
        for batch in batches:
            problems += batch.problems
            if len(problems) > SHOWN:
                break
            facts.add(batch.facts)
            if not problems:
                keep(batch.examples)
            done = min(len(rows), done + _ROWS)
            if on_progress:
                on_progress(done, len(rows))
    if problems:
        others = [str(rows.number(number)) for number, _ in problems[1 : SHOWN + 1]]
        if len(problems) > SHOWN:
            others[-1] = "more"
        also = f" (the same in rows {', '.join(others)})" if others else ""
        raise DataError(f"{problems[0][1]}{also}")
    return facts
