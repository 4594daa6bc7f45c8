"""Checks data with the tokenizer of a base, before its weights are loaded.

It returns nothing; the run reads the data again.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brushstroke.data import Rows, Template

ROWS = 5_000  # checked of each data set, in a second or two; the run checks all rows


def check_data(
    base: str,
    sources: "Iterable[Rows | None]",
    *,
    prompt: str | None = None,
    completion: str | None = None,
    max_length: int | None = None,
    skip_too_long: bool = False,
    split_turns: bool = False,
    chat_template: "Template" = None,
    tools: Sequence[Any] = (),
    trust_remote_code: bool = False,
) -> None:
    """Refuse data that a run with this base would refuse.

    Args:
        base: what `load_base` takes.
        sources: the rows; None for data that was not given.
        prompt: the column to use instead of "prompt".
        completion: the column to use instead of "completion".
        max_length: the longest example in tokens; the model's context by default.
        skip_too_long: leave out rows whose prompt fills that limit.
        split_turns: make an example of every assistant turn.
        chat_template: a template instead of the tokenizer's own.
        tools: function declarations for rows that have none.
        trust_remote_code: run Python code from the base's folder if transformers does not have its class.

    Raises:
        DataError: rows are invalid; the message names them.
        BaseLoadError: there is no such base.
        ConfigError: it is not a language model, or the limit is beyond its context.
    """
    from brushstroke.base import load_tokenizer
    from brushstroke.data import DataWarning, encode

    tokenizer, context = load_tokenizer(base, trust_remote_code=trust_remote_code, max_length=max_length)
    for rows in sources:
        if rows is None:
            continue
        whole = len(rows) <= ROWS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # the run shows them
            encode(
                rows if whole else dataclasses.replace(rows, rows=rows.rows[:ROWS]),
                tokenizer,
                prompt_column=prompt,
                completion_column=completion,
                max_length=max_length or context,
                skip_too_long=skip_too_long,
                split_turns=split_turns,
                chat_template=chat_template,
                tools=tools,
                need_trained=whole,  # later rows may have trained tokens
            )
