"""Rows become examples: find the columns, write pieces, tokenise, mark what is trained, keep the limit.

It does not group examples into batches: that is the training step's business.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from brushstroke.data.chat import ChatFormat
from brushstroke.data.checks import check_encodable, kind_of
from brushstroke.data.examples import EncodedData, EncodingReport, Example, Kind
from brushstroke.data.files import Row
from brushstroke.data.limit import keep_within
from brushstroke.data.pieces import Piece
from brushstroke.data.read import Rows, Source, hash_rows, read_rows
from brushstroke.data.tokenised import read_tokenised
from brushstroke.errors import ConfigError, DataError, did_you_mean

_SHOWN = 10  # rows named in a message


def encode(
    source: Source | Rows | Iterable[Example] | Any,
    tokenizer: Any,
    *,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    max_length: int | None = None,
    skip_too_long: bool = False,
    chat_template: str | None = None,
    need_trained: bool = True,
) -> EncodedData:
    """Examples to learn from, out of anything that `read_rows` reads, or out of examples tokenised already.

    The columns decide: `input_ids` and `labels` (aligned with each other, -100 is not trained, optional
    `weights`); `messages`, whose assistant turns are trained; `prompt` and `completion` (other names with
    `prompt_column` and `completion_column`), a user and an assistant turn where there is a chat template,
    else joined and ended with the end token; `text`, trained whole and ended with the end token.

    Args:
        source: what to read.
        tokenizer: the base's tokenizer; None is enough for examples tokenised already.
        prompt_column: another name for `prompt`.
        completion_column: another name for `completion`.
        max_length: the limit of an example in tokens. What is beyond it is cut, counted and reported.
        skip_too_long: leave out and count examples whose prompt fills the limit, instead of refusing them.
        chat_template: used in place of the tokenizer's own.
        need_trained: refuse rows without a trained token. Without it they are kept.

    Raises:
        DataError: naming the rows and what is wrong with them.
        ConfigError: the limit is below 2 tokens.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}; an example needs at least 2 tokens: give a larger limit"
        )
    rows = _rows(source)
    kind, columns = _detect(rows, prompt_column, completion_column)
    if kind == "tokens":
        examples = [example for _, example in _collect(rows, read_tokenised)]
        stop_tokens: tuple[str, ...] = ()
    elif tokenizer is None:
        raise DataError(
            f"{rows.name}: this base has no tokenizer to read {kind} with; pass examples tokenised already "
            "(input_ids and labels)"
        )
    else:
        chat = ChatFormat(tokenizer, chat_template)
        writer = _Writer(chat, columns, need_trained)
        write = {"messages": writer.messages, "prompt/completion": writer.pair, "text": writer.text}[kind]
        examples = _tokenise(chat, _collect(rows, write))
        uses_template = kind == "messages" or (kind == "prompt/completion" and chat.has_template)
        stop_tokens = chat.stop_token_texts if uses_template else _texts(tokenizer, chat.end_ids)
    kept, skipped = keep_within(rows, examples, max_length, skip_too_long, need_trained)
    report = _report(rows, kind, kept, skipped, stop_tokens)
    if need_trained and not report.trained_tokens:
        raise DataError(
            f"{rows.name}: no token of its {len(rows)} rows can be trained on; "
            + ("raise max_length (--max-length)" if skipped else "give rows with an answer or a longer text")
        )
    return EncodedData(tuple(kept), report, rows.name, rows.hash)


def _rows(source: Any) -> Rows:
    if isinstance(source, Rows):
        return source
    if isinstance(source, EncodedData):
        return Rows([{"example": example} for example in source], source.name, source.hash)
    if isinstance(source, Iterable) and not isinstance(source, str | Mapping):
        source = source if isinstance(source, Sequence) or hasattr(source, "to_list") else list(source)
        if isinstance(source, Sequence) and any(isinstance(row, Example) for row in source):
            given: list[Row] = []
            for number, example in enumerate(source, start=1):
                if not isinstance(example, Example):
                    raise DataError(
                        f"the given examples, row {number}: is {kind_of(example)} among tokenised examples; "
                        "pass either rows or examples"
                    )
                given.append({"example": example})
            content = ({"tokens": row["example"].tokens, "weights": row["example"].weights} for row in given)
            return Rows(given, "the given examples", hash_rows(content))
    return read_rows(source)


def _detect(rows: Rows, prompt: str | None, completion: str | None) -> tuple[Kind, tuple[str, ...]]:
    if not rows.rows:
        raise DataError(f"{rows.name}: holds no rows; give at least one")
    pair = (prompt or "prompt", completion or "completion")
    if isinstance(rows.rows[0].get("example"), Example):
        return "tokens", ("example",)
    known: list[tuple[Kind, tuple[str, ...]]] = [("prompt/completion", pair)]
    if prompt is None and completion is None:
        known = [
            ("tokens", ("input_ids", "labels")),
            ("messages", ("messages",)),
            *known,
            ("text", ("text",)),
        ]
    kind, columns = next(
        (
            candidate
            for candidate in known
            if any(all(name in row for name in candidate[1]) for row in rows.rows)
        ),
        (None, ()),
    )
    for number, row in enumerate(rows.rows, start=1):
        missing = [name for name in columns if name not in row]
        if kind is None or missing:
            wanted = [name for _, names in known for name in names if name not in row]
            hints = {hint for name in missing or wanted if (hint := did_you_mean(name, row, count=1))}
            expected = " and ".join(map(repr, missing)) if missing else _names(known)
            if len(row) == 1 and (mark := next((m for m in ";\t|" if m in next(iter(row))), None)):
                hints = {f" (its columns seem to be separated by {mark!r}; separate them by commas)"}
            raise DataError(
                f"{rows.where(number)}: found the columns {', '.join(map(repr, row)) or 'none'}, expected "
                f"{expected}{''.join(sorted(hints))}; rename the columns, or name the two of a "
                "prompt and a completion with prompt_column and completion_column (--prompt, --completion)"
            )
    assert kind is not None
    return kind, columns


def _names(known: Iterable[tuple[Kind, tuple[str, ...]]]) -> str:
    return ", or ".join(" and ".join(map(repr, names)) for kind, names in known if kind != "tokens")


def _collect(rows: Rows, make: Any) -> list[tuple[int, Any]]:
    """(row, what `make` makes of it) for every row; all bad rows in one error."""
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
        others = [str(number) for number, _ in problems[1:]]
        if len(problems) > _SHOWN:
            others[-1] = "more"
        also = f" (and so for the rows {', '.join(others)})" if others else ""
        raise DataError(f"{problems[0][1]}{also}") from problems[0][1]
    return made


class _Writer:
    """Writes a row as pieces, by its kind."""

    def __init__(self, chat: ChatFormat, columns: tuple[str, ...], need_trained: bool) -> None:
        self.chat, self.columns, self.need_trained = chat, columns, need_trained

    def messages(self, row: Row, number: int, where: str) -> list[tuple[Piece, ...]]:
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list | tuple):
            raise DataError(f"{where}: 'tools' is {kind_of(tools)}; expected a list of JSON schemas")
        return self.chat.conversation(
            row[self.columns[0]], tools=tools, where=where, need_trained=self.need_trained
        )

    def pair(self, row: Row, number: int, where: str) -> list[tuple[Piece, ...]]:
        prompt, completion = (_text(row, column, where) for column in self.columns)
        if self.chat.has_template:
            turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
            return self.chat.conversation(turns, where=where)
        end = Piece("", True, "completion", ids=self.chat.end_ids)
        return [(*self.chat.plain_prompt(prompt), Piece(completion, True, "completion"), end)]

    def text(self, row: Row, number: int, where: str) -> list[tuple[Piece, ...]]:
        text = Piece(_text(row, self.columns[0], where), True, "text", after=None)
        return [(text, Piece("", True, "text", ids=self.chat.end_ids))]


def _text(row: Row, column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} is {kind_of(value)}; expected text")
    check_encodable(value, f"{where}: {column!r}")
    return value


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


def _report(
    rows: Rows, kind: Kind, kept: Sequence[Example], skipped: Sequence[int], stop_tokens: tuple[str, ...]
) -> EncodingReport:
    roles: Counter[str] = Counter()
    for example in kept:
        roles.update(example.roles)
    return EncodingReport(
        rows=len(rows),
        examples=len(kept),
        kind=kind,
        real_tokens=sum(len(example.tokens) for example in kept),
        trained_tokens=sum(example.trained for example in kept),
        roles=dict(roles),
        skipped_rows=tuple(skipped),
        cut_rows=tuple(sorted({example.row for example in kept if example.cut})),
        cut_tokens=sum(example.cut for example in kept),
        stop_tokens=stop_tokens,
    )


def _texts(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(tokenizer.convert_ids_to_tokens(list(ids)))
