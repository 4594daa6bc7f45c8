"""Turns a batch of rows into examples: writes them as pieces, tokenises, truncates, and notes what was seen.

An `Encoder` can be pickled, so that several processes can encode batches of one data set. It reads no files.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

from brushstroke.data.chat import ChatFormat
from brushstroke.data.columns import Columns, read_row, read_text, refuse_context
from brushstroke.data.examples import Example
from brushstroke.data.files import Row
from brushstroke.data.pieces import Piece
from brushstroke.data.token_arrays import TokenArrays
from brushstroke.data.tokenised import read_tokenised
from brushstroke.data.truncate import shortened
from brushstroke.errors import DataError

SHOWN = 10  # number of rows that a message lists


@dataclass
class Facts:
    """Facts about written rows, in addition to their tokens.

    Args:
        unused_keys: keys of messages that are not used.
        notes: changes to the rows, as messages for people.
        ends: the texts that end answers.
        empty: the numbers of rows with an answer without a text.
        untrained: the numbers of rows with nothing to train.
        filled: the number of each row whose prompt fills the limit → the limit that it needs.
    """

    unused_keys: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    ends: dict[str, None] = field(default_factory=dict)
    empty: list[int] = field(default_factory=list)
    untrained: list[int] = field(default_factory=list)
    filled: dict[int, int] = field(default_factory=dict)

    def add(self, later: "Facts") -> None:
        """Add the facts about later rows."""
        for name, value in vars(later).items():
            mine = getattr(self, name)
            mine.extend(value) if isinstance(mine, list) else mine.update(value)


@dataclass(frozen=True)
class Batch:
    """Rows of a data set, to be encoded together.

    Args:
        first: the number of the first row (from 1).
        rows: the rows.
        places: the place of each row, for messages.
    """

    first: int
    rows: Sequence[Row]
    places: Sequence[str]


@dataclass(frozen=True)
class Encoded:
    """The examples of a batch.

    Args:
        examples: without those that have nothing to train, if they need it.
        facts: about the rows.
        problems: the number and the error of each row that is invalid.
    """

    examples: TokenArrays
    facts: Facts
    problems: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Encoder:
    """Encodes batches of rows; for the fields see `encode`. Without a chat format, the rows are tokens."""

    columns: Columns
    chat: ChatFormat | None
    max_length: int | None
    need_trained: bool
    split_turns: bool
    tools: tuple[Any, ...]

    def identity(self) -> Any:
        """Everything that the result depends on, as JSON types; None if the tokenizer cannot be described."""
        chat = None if self.chat is None else self.chat.identity()
        if self.chat is not None and chat is None:
            return None
        columns = [self.columns.kind, self.columns.names, self.columns.context, self.columns.form]
        return [columns, chat, self.max_length, self.need_trained, self.split_turns, self.tools]

    def encode(self, batch: Batch) -> Encoded:
        """Encode a batch. Errors of rows are part of the result; after ten, the rest is not encoded."""
        facts, problems = Facts(), []
        written: list[tuple[int, Any]] = []
        for number, (row, where) in enumerate(zip(batch.rows, batch.places, strict=True), start=batch.first):
            try:
                written += [(number, item) for item in self._write(row, number, where, facts)]
            except DataError as error:
                problems.append((number, str(error)))
                if len(problems) > SHOWN:
                    break
        if problems:
            return Encoded(TokenArrays.of(()), facts, problems)
        examples = tokenise(self.chat, written) if self.chat else [example for _, example in written]
        return Encoded(TokenArrays.of(self._kept(examples, facts)), facts)

    @property
    def is_joined(self) -> bool:
        """Whether prompts and completions are joined without a chat template."""
        assert self.chat is not None
        return self.columns.kind == "prompt/completion" and not self.chat.has_template

    @property
    def begins(self) -> tuple[str, ...]:
        """The texts of the tokens at the start of every text."""
        if self.chat is None or not self._ends_in_tokens:
            return ()
        return _texts(self.chat.tokenizer, self.chat.begin_ids)

    @property
    def ends(self) -> tuple[str, ...]:
        """The texts that end answers."""
        if self.chat is None:
            return ()
        return (
            _texts(self.chat.tokenizer, self.chat.end_ids) if self._ends_in_tokens else self.chat.stop_texts
        )

    @property
    def _ends_in_tokens(self) -> bool:
        return self.is_joined or self.columns.kind == "text"

    def _write(self, row: Row, number: int, where: str, facts: Facts) -> Sequence[Any]:
        if self.chat is None:
            return read_tokenised(row, number, where)
        if self.columns.kind == "text":
            begin = Piece("", False, "text", ids=self.chat.begin_ids)
            text = Piece(read_text(row, self.columns.names[0], where), True, "text", after=None)
            return [(begin, text, Piece("", True, "text", ids=self.chat.end_ids))]
        if self.is_joined:
            return self._pair(self.chat, row, number, where, facts)
        return self._conversation(self.chat, row, number, where, facts)

    def _pair(self, chat: ChatFormat, row: Row, number: int, where: str, facts: Facts) -> Sequence[Any]:
        refuse_context(row, self.columns, where)
        prompt, completion = (read_text(row, column, where) for column in self.columns.names)
        if not completion.strip():
            facts.empty.append(number)
        end = Piece("", True, "completion", ids=chat.end_ids)
        return [(*chat.plain_prompt(prompt), Piece(completion, True, "completion"), end)]

    def _conversation(
        self, chat: ChatFormat, row: Row, number: int, where: str, facts: Facts
    ) -> Sequence[Any]:
        conversation = read_row(row, self.columns, where, tools=self.tools)
        if any(starmap(_is_empty, zip(conversation.messages, conversation.trained, strict=True))):
            facts.empty.append(number)
        written = chat.write(
            conversation, where=where, need_trained=self.need_trained, split_turns=self.split_turns
        )
        facts.unused_keys |= dict.fromkeys(written.unused)
        facts.notes |= dict.fromkeys(written.notes)
        facts.ends |= dict.fromkeys(written.ends)
        return written.rows

    def _kept(self, examples: Sequence[Example], facts: Facts) -> list[Example]:
        """The examples within the limit that have something to train; the others are listed in the facts."""
        if self.need_trained:
            facts.untrained += dict.fromkeys(example.row for example in examples if not example.trained)
        kept = []
        for example in examples:
            short = example if self.max_length is None else shortened(example, self.max_length)
            if short.trained or not self.need_trained:
                kept.append(short)
            elif example.trained:
                needed = example.first_target + 1
                facts.filled[example.row] = max(needed, facts.filled.get(example.row, 0))
        return kept


def _is_empty(message: Mapping[str, Any], trained: bool) -> bool:
    """Whether a trained answer has neither text nor reasoning nor tool calls."""
    says = any(message.get(key) for key in ("reasoning_content", "tool_calls"))
    return trained and not says and not message["content"].strip()


def tokenise(chat: ChatFormat, written: Sequence[tuple[int, tuple[Piece, ...]]]) -> list[Example]:
    """The examples of pieces, each with the number of its row."""
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


def _texts(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(tokenizer.convert_ids_to_tokens(list(ids)))
