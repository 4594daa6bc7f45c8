"""Turns rows into examples: finds the columns, writes pieces, tokenises, marks trained tokens, truncates.

It does not group examples into batches; the training step does.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from typing import Any

from brushstroke.data.chat import ChatFormat
from brushstroke.data.columns import (
    Columns,
    doubts,
    find_columns,
    key_doubts,
    read_row,
    read_text,
    refuse_context,
)
from brushstroke.data.examples import EncodedData, EncodingReport, Example
from brushstroke.data.files import Row
from brushstroke.data.named_templates import Template, find_template
from brushstroke.data.pieces import Piece
from brushstroke.data.read import Source, read_rows
from brushstroke.data.rows import Rows, hash_rows
from brushstroke.data.tokenised import read_tokenised
from brushstroke.data.truncate import truncate_examples
from brushstroke.data.validate import DataWarning, expect
from brushstroke.errors import ConfigError, DataError

_SHOWN = 10  # number of rows that a message lists
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
    rows = _rows(source, prompt_column, completion_column)
    columns = find_columns(rows, prompt_column, completion_column)
    if columns.kind == "tokens":
        written = _Written(columns)
        examples = [example for _, example in _collect(rows, read_tokenised)]
    elif tokenizer is None:
        raise DataError(
            f"{rows.name}: this base has no tokenizer for {columns.kind} rows; pass tokenised examples "
            "(input_ids and labels)"
        )
    else:
        given = chat_template
        chat = given if isinstance(given, ChatFormat) else ChatFormat(tokenizer, find_template(given))
        written = _Writer(chat, columns, need_trained, split_turns, tools)
        examples = _tokenise(chat, _collect(rows, written.write))
    for doubt in (*doubts(columns, rows), *written.doubts(rows)):
        warnings.warn(doubt, DataWarning, stacklevel=2)
    kept, skipped = truncate_examples(rows, examples, max_length, skip_too_long, need_trained)
    report = _report(rows, written, kept, skipped)
    if need_trained and not report.trained_tokens:
        raise DataError(
            f"{rows.name}: none of its {len(rows)} rows has a token to train; "
            + ("raise max_length (--max-length)" if skipped else "give rows with an answer or a longer text")
        )
    return EncodedData(tuple(kept), report, rows.name, rows.hash)


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


def _collect(rows: Rows, make: Any) -> list[tuple[int, Any]]:
    """Apply `make` to every row, as (row, result); one error lists all bad rows."""
    made: list[tuple[int, Any]] = []
    problems: list[tuple[int, DataError]] = []
    for number, row in enumerate(rows.rows, start=1):
        try:
            made += [(number, item) for item in make(row, number, rows.where(number))]
        except DataError as error:
            problems.append((number, error))
            if len(problems) > _SHOWN:
                break
    if problems:
        others = [str(rows.number(number)) for number, _ in problems[1:]]
        if len(problems) > _SHOWN:
            others[-1] = "more"
        also = f" (the same in rows {', '.join(others)})" if others else ""
        raise DataError(f"{problems[0][1]}{also}") from problems[0][1]
    return made


class _Written:
    """Facts about the written rows, in addition to their tokens."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.unused_keys: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.ends: dict[str, None] = {}
        self.begins: tuple[str, ...] = ()
        self.endless = False
        self.empty: list[int] = []

    def doubts(self, rows: Rows) -> list[str]:
        """Warnings about the rows."""
        found = key_doubts(self.unused_keys, rows.name)
        return [*found, NO_END] if self.endless else found

    def said(self) -> tuple[str, ...]:
        """Notes about the rows."""
        if not self.empty:
            return tuple(self.notes)
        shown = ", ".join(map(str, self.empty[:_SHOWN])) + (", ..." if len(self.empty) > _SHOWN else "")
        return (*self.notes, f"in answers without a text, only the end is trained (rows {shown})")


class _Writer(_Written):
    """Writes a row as pieces, according to its kind."""

    def __init__(
        self, chat: ChatFormat, columns: Columns, need_trained: bool, split_turns: bool, tools: Sequence[Any]
    ) -> None:
        super().__init__(columns)
        self.chat, self.need_trained, self.split_turns, self.tools = chat, need_trained, split_turns, tools
        joined = columns.kind == "prompt/completion" and not chat.has_template
        ways = {"messages": self._conversation, "text": self._text}
        self.write = self._pair if joined else ways.get(columns.kind, self._conversation)
        if joined or columns.kind == "text":
            self.ends = dict.fromkeys(_texts(chat.tokenizer, chat.end_ids))
            self.begins = _texts(chat.tokenizer, chat.begin_ids)
            self.endless = not chat.end_ids
        else:
            self.ends = dict.fromkeys(chat.stop_texts)
            self.endless = not chat.stop_texts

    def _conversation(self, row: Row, number: int, where: str) -> tuple[tuple[Piece, ...], ...]:
        conversation = read_row(row, self.columns, where, tools=self.tools)
        if any(starmap(_is_empty, zip(conversation.messages, conversation.trained, strict=True))):
            self.empty.append(number)
        written = self.chat.write(
            conversation, where=where, need_trained=self.need_trained, split_turns=self.split_turns
        )
        self.unused_keys |= dict.fromkeys(written.unused)
        self.notes |= dict.fromkeys(written.notes)
        self.ends |= dict.fromkeys(written.ends)
        return written.rows

    def _pair(self, row: Row, number: int, where: str) -> list[tuple[Piece, ...]]:
        refuse_context(row, self.columns, where)
        prompt, completion = (read_text(row, column, where) for column in self.columns.names)
        if not completion.strip():
            self.empty.append(number)
        end = Piece("", True, "completion", ids=self.chat.end_ids)
        return [(*self.chat.plain_prompt(prompt), Piece(completion, True, "completion"), end)]

    def _text(self, row: Row, number: int, where: str) -> list[tuple[Piece, ...]]:
        begin = Piece("", False, "text", ids=self.chat.begin_ids)
        text = Piece(read_text(row, self.columns.names[0], where), True, "text", after=None)
        return [(begin, text, Piece("", True, "text", ids=self.chat.end_ids))]


def _is_empty(message: Mapping[str, Any], trained: bool) -> bool:
    """Whether a trained answer has neither text nor reasoning nor tool calls."""
    says = any(message.get(key) for key in ("reasoning_content", "tool_calls"))
    return trained and not says and not message["content"].strip()


def _tokenise(chat: ChatFormat, written: list[tuple[int, tuple[Piece, ...]]]) -> list[Example]:
    examples = []
    encoded = chat.pieces.batch([pieces for _, pieces in written])
    for (number, pieces), parts in zip(written, encoded, strict=True):
        tokens: tuple[int, ...] = ()
        weights: tuple[float, ...] = ()
        roles: Counter[str] = Counter()
        for piece, (ids, counts) in zip(pieces, parts, strict=True):
            tokens += ids
            weights += ((1.0 if piece.trained else 0.0),) * len(ids)
            roles += counts
        examples.append(Example(tokens, (0.0, *weights[1:]) if weights else (), number, dict(roles)))
    return examples


def _report(rows: Rows, written: _Written, kept: Sequence[Example], skipped: Sequence[int]) -> EncodingReport:
    roles: Counter[str] = Counter()
    for example in kept:
        roles.update(example.roles)
    columns = written.columns
    return EncodingReport(
        rows=len(rows),
        examples=len(kept),
        kind=columns.kind,
        real_tokens=sum(len(example.tokens) for example in kept),
        trained_tokens=sum(example.trained for example in kept),
        roles=dict(roles),
        skipped_rows=tuple(skipped),
        cut_rows=tuple(sorted({example.row for example in kept if example.cut})),
        cut_tokens=sum(example.cut for example in kept),
        begin_tokens=written.begins,
        stop_tokens=tuple(written.ends),
        read_as=columns.read_as,
        unused_columns=columns.unused,
        unused_keys=tuple(written.unused_keys),
        notes=(*rows.notes, *written.said()),
    )


def _texts(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(tokenizer.convert_ids_to_tokens(list(ids)))
