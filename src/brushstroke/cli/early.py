"""Checks data with the tokenizer of a base, before its weights are loaded.

It returns nothing; the run reads the data again, or finds the tokens of large data in the cache.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from brushstroke.cli.console import say
from brushstroke.cli.progress import RowsProgress

if TYPE_CHECKING:
    from brushstroke.data import Rows

ROWS = 5_000  # checked of data in memory, in a second or two; the run checks all rows


def check_data(
    base: str,
    sources: "Iterable[Rows | None]",
    *,
    max_length: int | None = None,
    chat_template: Any = None,
    date: str | None = None,
    trust_remote_code: bool = False,
    **reading: Any,
) -> None:
    """Refuse data that a run with this base would refuse.

    Args:
        base: what `load_base` takes.
        sources: the rows; None for data that was not given.
        max_length: the longest example in tokens; the model's context by default.
        chat_template: replaces the tokenizer's own.
        date: the date of "today" in the chat template.
        trust_remote_code: run Python code from the base's folder if transformers does not have its class.
        reading: how to read the rows: more arguments of `encode`.

    Raises:
        DataError: rows are invalid; the message names them.
        BaseLoadError: there is no such base.
        ConfigError: it is not a language model, or the limit is beyond its context.
    """
    from brushstroke.base import load_tokenizer
    from brushstroke.data import ChatFormat, DataWarning, encode, find_template

    tokenizer, context = load_tokenizer(base, trust_remote_code=trust_remote_code, max_length=max_length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the run shows them
        chat = None if tokenizer is None else ChatFormat(tokenizer, find_template(chat_template), date=date)
    for rows in sources:
        if rows is None:
            continue
        is_kept = rows.key is not None and (chat is None or chat.identity() is not None)
        whole = len(rows) <= ROWS or is_kept
        with warnings.catch_warnings(), RowsProgress(rows.name) as progress:
            warnings.simplefilter("ignore", DataWarning)
            encode(
                rows if whole else dataclasses.replace(rows, rows=rows.rows[:ROWS]),
                tokenizer,
                max_length=max_length or context,
                chat_template=chat,
                on_progress=progress.update,
                **reading,
                need_trained=whole,  # later rows may have trained tokens
            )


def say_what_was_read(*sources: "Rows | None") -> None:
    """Say what was not read of the data, for commands that print no report on it."""
    for rows in filter(None, sources):
        for note in rows.notes:
            say(f"{rows.name}: {note}")
