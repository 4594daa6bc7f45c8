"""Turns rows into examples: finds the columns, writes pieces, tokenises, marks trained tokens, truncates.

It does not group examples into batches; the training step does.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from brushstroke.data.chat import ChatFormat
from brushstroke.data.columns import doubts, find_columns, key_doubts
from brushstroke.data.encode_rows import encode_rows
from brushstroke.data.encoder import SHOWN, Encoder, Facts
from brushstroke.data.examples import EncodingReport, Example
from brushstroke.data.files import Row
from brushstroke.data.named_templates import Template, find_template
from brushstroke.data.read import Source, read_rows
from brushstroke.data.rows import Rows, hash_rows
from brushstroke.data.token_arrays import EncodedData, TokenArrays
from brushstroke.data.truncate import refuse_untrained
from brushstroke.data.validate import DataWarning, expect
from brushstroke.errors import ConfigError, DataError

NO_END = (
    "the tokenizer has no end token: trained texts have no end, and answers stop only at their length limit"
)


def encode(
    source: Source | Rows | Iterable[Example] | Any,
    tokenizer: Any,
    *,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    max_length: int | None = None,
    skip_too_long: bool = False,
    split_turns: bool = False,
    chat_template: Template | ChatFormat = None,
    tools: Sequence[Any] = (),
    need_trained: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedData:
    """Encode training examples from anything that `read_rows` reads, or from tokenised examples.

    The columns determine how rows are read: `input_ids` and `labels` (at the same positions, -100 is not
    trained; optional `weights`); `messages`, whose assistant turns are trained; `prompt` and `completion`
    (other names with `prompt_column` and `completion_column`), written with the chat template if there is
    one, otherwise joined, with the end token; `text`, trained completely, with the end token.

    Args:
        source: the data.
        tokenizer: the base's tokenizer; may be None for tokenised examples.
        prompt_column: the column to use for `prompt`.
        completion_column: the column to use for `completion`.
        max_length: the maximum length of an example in tokens. Longer examples are cut, counted and reported.
        skip_too_long: leave out and count examples whose prompt fills the limit, instead of refusing them.
        split_turns: make an example of every assistant turn, written as the model will see it.
        chat_template: replaces the tokenizer's own: a template, a file, a name, or an existing chat format.
        tools: function declarations for rows that have none.
        need_trained: refuse rows without a trained token; otherwise they are kept.
        on_progress: called with the number of encoded rows and the number of all rows.

    Raises:
        DataError: rows are invalid; the message names them.
        ConfigError: the limit is below 2 tokens.

    Warns:
        DataWarning: unused columns or keys look like answers or ratings, or there is no end token.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}; an example needs at least 2 tokens: give a larger limit"
        )
    if isinstance(source, EncodedData) and source.fits(max_length, need_trained):
        return source
    rows = _rows(source, prompt_column, completion_column)
    columns = find_columns(rows, prompt_column, completion_column)
    chat = None
    if columns.kind != "tokens":
        if tokenizer is None:
            raise DataError(
                f"{rows.name}: this base has no tokenizer for {columns.kind} rows; pass tokenised examples "
                "(input_ids and labels)"
            )
        given = chat_template
        chat = given if isinstance(given, ChatFormat) else ChatFormat(tokenizer, find_template(given))
    encoder = Encoder(columns, chat, max_length, need_trained, split_turns, tuple(tools))
    examples, facts = encode_rows(rows, encoder, on_progress)
    found = [*doubts(columns, rows), *key_doubts(facts.unused_keys, rows.name)]
    for doubt in found if encoder.ends or chat is None else (*found, NO_END):
        warnings.warn(doubt, DataWarning, stacklevel=2)
    refuse_untrained(rows, facts.untrained, facts.filled, max_length, skip_too_long)
    report = _report(rows, encoder, facts, examples)
    if need_trained and not report.trained_tokens:
        skipped = report.skipped_rows
        raise DataError(
            f"{rows.name}: none of its {len(rows)} rows has a token to train; "
            + ("raise max_length (--max-length)" if skipped else "give rows with an answer or a longer text")
        )
    return EncodedData(examples, report, rows.name, rows.hash)


def _rows(source: Any, prompt: str | None, completion: str | None) -> Rows:
    if isinstance(source, Rows):
        return source
    if isinstance(source, EncodedData):
        return Rows([{"example": example} for example in source], source.name, source.hash)
    if isinstance(source, Iterable) and not isinstance(source, str | Mapping):
        source = source if isinstance(source, Sequence) or hasattr(source, "to_list") else list(source)
        if isinstance(source, Sequence) and any(isinstance(row, Example) for row in source):
            wanted = "a tokenised example as the others are; pass either rows or examples"
            checked = [
                expect(Example, example, f"the given examples, row {number}", wanted)
                for number, example in enumerate(source, start=1)
            ]
            given: list[Row] = [{"example": example} for example in checked]
            content = ({"tokens": example.tokens, "weights": example.weights} for example in checked)
            return Rows(given, "the given examples", hash_rows(content))
    return read_rows(source, prompt=prompt, completion=completion)


def _report(rows: Rows, encoder: Encoder, facts: Facts, examples: TokenArrays) -> EncodingReport:
    arrays, columns = examples.arrays, encoder.columns
    cut = arrays["cut"] > 0
    notes = [*rows.notes, *facts.notes]
    if facts.empty:
        shown = ", ".join(map(str, facts.empty[:SHOWN])) + (", ..." if len(facts.empty) > SHOWN else "")
        notes.append(f"in answers without a text, only the end is trained (rows {shown})")
    return EncodingReport(
        rows=len(rows),
        examples=len(examples),
        kind=columns.kind,
        real_tokens=int(arrays["length"].sum()),
        trained_tokens=int(arrays["trained"].sum()),
        roles=examples.roles,
        skipped_rows=tuple(facts.filled),
        cut_rows=tuple(np.unique(arrays["row"][cut]).tolist()),
        cut_tokens=int(arrays["cut"].sum()),
        begin_tokens=encoder.begins,
        stop_tokens=tuple(dict.fromkeys((*encoder.ends, *facts.ends))),
        read_as=columns.read_as,
        unused_columns=columns.unused,
        unused_keys=tuple(facts.unused_keys),
        notes=tuple(notes),
    )
