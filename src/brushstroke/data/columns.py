"""Decides which columns of a data set are read, and warns about unused columns that look important.

It renders no text and uses no tokenizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brushstroke.data.examples import Example, Kind
from brushstroke.data.files import Row
from brushstroke.data.json_values import parsed
from brushstroke.data.messages import Conversation, read_conversation
from brushstroke.data.published import LABELS
from brushstroke.data.rows import Rows
from brushstroke.data.validate import check_encodable, describe_type, expect
from brushstroke.errors import DataError, did_you_mean

SYSTEM, HISTORY, TOOLS, OPTIONS = "system", "history", "tools", "chat_template_kwargs"
FUNCTIONS = "functions"  # an older name of tools
CONTEXT: dict[Kind, tuple[str, ...]] = {  # columns that are used in addition to those that determine the kind
    "messages": (SYSTEM, HISTORY, TOOLS, FUNCTIONS, OPTIONS),
    "prompt/completion": (SYSTEM, HISTORY, TOOLS, FUNCTIONS, OPTIONS),
    "text": (),
    "tokens": ("weights", "attention_mask"),
}
_FALSE, _TRUE = ("false", "0", "no", "bad"), ("true", "1", "yes", "good")
NEAR = 0.75  # required similarity of a column's name to the expected one

_ANSWERS = {  # names of columns that may contain the text to train
    *("answer", "answers", "output", "outputs", "response", "responses", "reply", "target", "targets"),
    *("completion", "solution", "summary", "translation", "gold"),
}
_JUDGEMENTS = {  # names of columns that classify a text or rate an answer
    *("label", "labels", "category", "class", "sentiment", "intent", "score", "scores", "rating", "stars"),
    *("rank", "reward", "preference", "chosen", "rejected", "correct", "is_correct", "accepted", "quality"),
    *("feedback", "verdict", "train", "weight", "loss", "mask", "masked", "train_detail", "refusal"),
    *("loss_weight", "loss_mask", "sample_weight", "is_bad", "skip"),
}
_REJECTED = ("rejected", "non_preferred_output")  # the worse answers of preference pairs
_CONTEXTS = {  # names of columns and keys that may contain a part of the conversation
    *("reasoning", "reasoning_content", "thinking", "thinking_content", "thought", "thoughts", "rationale"),
    *("system_prompt", "system_message", "instruction", "instructions", "input", "context", "documents"),
    *("passage", "paragraph", "article", "document", "story", "prompt of the file"),
}
_QUESTIONS = {"prompt", "question", "query"}  # the same for rows with a text


@dataclass(frozen=True)
class Columns:
    """The columns of a data set and their use.

    Args:
        kind: kind of the rows.
        names: the columns with the conversation, the text or the tokens.
        context: other used columns: system, history, tools, chat_template_kwargs.
        unused: unused columns in which some row has a value.
        form: the published form from which the rows were converted, such as "alpaca"; empty if none.
    """

    kind: Kind
    names: tuple[str, ...]
    context: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    form: str = ""

    @property
    def read_as(self) -> str:
        """A description: the form or the kind, and the other used columns."""
        return (self.form or self.kind) + (f" with {', '.join(self.context)}" if self.context else "")


def find_columns(rows: Rows, prompt: str | None = None, completion: str | None = None) -> Columns:
    """Find the columns of a data set that determine how it is read.

    Args:
        rows: rows of one kind.
        prompt: the column to use for prompts.
        completion: the column to use for completions.

    Raises:
        DataError: there are no known columns, or a row lacks one.
    """
    if not len(rows):
        raise DataError(f"{rows.name}: contains no rows; give at least one")
    pair = (prompt or "prompt", completion or "completion")
    if isinstance(rows.rows[0].get("example"), Example):
        return Columns("tokens", ("example",))
    known: list[tuple[Kind, tuple[str, ...]]] = [("prompt/completion", pair)]
    if prompt is None and completion is None:
        known = [
            ("tokens", ("input_ids", "labels")),
            ("messages", ("messages",)),
            *known,
            ("text", ("text",)),
        ]
    shapes = rows.facts.first_rows()
    kind, names = next(
        (
            entry
            for entry in known
            if any(all(name in shape for name in entry[1]) for shape, _ in shapes.values())
        ),
        (None, ()),
    )
    for number, (shape, _) in shapes.items():
        missing = [name for name in names if name not in shape]
        if kind is None or missing:
            raise DataError(_unknown_columns(rows.rows[number - 1], rows.where(number), missing, known))
    assert kind is not None
    found = rows.facts.valued()
    usable = CONTEXT[kind]
    context = tuple(name for name in found if name in usable and name not in names)
    unused = tuple(name for name in found if name not in (*names, *context))
    return Columns(kind, names, () if kind == "tokens" else context, unused, rows.form)


def doubts(columns: Columns, rows: Rows) -> list[str]:
    """Warnings about unused columns that look like an answer, a label or a preference."""
    warnings = []
    for name in columns.unused:
        is_answer, is_judgement = name.lower() in _ANSWERS, name.lower() in _JUDGEMENTS
        chosen_by_user = name.lower() in _REJECTED if columns.form else False
        is_class = name.lower() in LABELS and (columns.form == "text" or columns.kind != "text")
        if chosen_by_user or (is_class and not _rates(rows, name)):
            continue
        if columns.kind == "text" and (is_answer or is_judgement):
            meaning = (
                "an answer: only the texts are trained; to train the answers, give prompt_column='text' "
                f"and completion_column={name!r} (--prompt text --completion {name})"
            )
        elif is_answer and name not in ("completion", "text"):
            meaning = f"an answer: what is trained is {columns.names[-1]!r}"
        elif is_judgement:
            bad = sum(_is_false(row.get(name)) for row in rows.rows)
            also = f", including {bad} of {len(rows)} rows where it is negative" if bad else ""
            meaning = f"a rating: every row is trained as a good answer{also}; remove the bad ones"
        elif name.lower() in _CONTEXTS or name.lower() in _further_contexts(columns):
            meaning = "a part of the conversation, which is trained without it; add it to the messages"
        else:
            continue
        warnings.append(f"{rows.name}: the column {name!r} is not used, but looks like {meaning}")
    return warnings


def key_doubts(keys: Iterable[str], name: str) -> list[str]:
    """Warnings about unused keys of messages that look like an answer, a label or a preference.

    Args:
        keys: keys of messages that neither brushstroke nor the template uses.
        name: name of the data set.
    """
    warnings = []
    for key in keys:
        if key.lower() in _ANSWERS:
            meaning = "an answer: what is trained is 'content'"
        elif key.lower() in _JUDGEMENTS:
            meaning = (
                "a rating: every assistant turn is trained as a good answer; give bad ones "
                '"weight": 0 or "train": false'
            )
        elif key.lower() in _CONTEXTS:
            meaning = "a part of the conversation, which is trained without it"
        else:
            continue
        warnings.append(f"{name}: the key {key!r} of messages is not used, but looks like {meaning}")
    return warnings


def read_row(
    row: Row, columns: Columns, where: str, *, tools: Sequence[Any] = (), answers: bool = True
) -> Conversation:
    """Read the conversation of a row with `messages`, or with `prompt` (text or messages) and `completion`.

    Args:
        row: a row of the data set.
        columns: the columns of the data set.
        where: the row, for error messages.
        tools: function declarations for rows that have none.
        answers: whether to include the completion; otherwise only the prompt is read.

    Raises:
        DataError: the row is invalid.
    """
    if columns.kind == "messages":
        given = parsed(row[columns.names[0]])
        history = _history(row, where)
        context = [*_system(row, history or given, where), *history]
        whole = [*context, *given] if isinstance(given, list | tuple) else given
        learnt_from = len(context)
    else:
        prompt = read_turns(row, columns.names[0], "user", where)
        answer = read_turns(row, columns.names[1], "assistant", where) if answers else []
        context = [*_system(row, prompt, where), *_history(row, where), *prompt]
        whole, learnt_from = [*context, *answer], len(context)
    if row.get(TOOLS) and row.get(FUNCTIONS):
        raise DataError(f"{where}: has the columns 'tools' and 'functions'; keep one of them")
    declared = row.get(TOOLS) or row.get(FUNCTIONS) or list(tools)
    return read_conversation(
        whole, tools=declared, options=row.get(OPTIONS), where=where, answers_only_from=learnt_from
    )


def read_prompt(row: Row, where: str, *, tools: Sequence[Any] = ()) -> str | Conversation:
    """Read the prompt of a row: a text, or messages without the answer at their end.

    Args:
        row: a row with `prompt` or `messages`, and their optional columns.
        where: the row, for error messages.
        tools: function declarations for rows that have none.

    Raises:
        DataError: there is no prompt, or it is malformed.
    """
    kind: Kind = "prompt/completion" if row.get("messages") is None else "messages"
    names = ("messages",) if kind == "messages" else ("prompt", "completion")
    if row.get(names[0]) is None:
        raise DataError(f"{where}: expected a 'messages' or 'prompt' column")
    context = tuple(name for name in CONTEXT[kind] if row.get(name))
    is_text = kind == "prompt/completion" and parsed(row["prompt"]) is row["prompt"]
    if is_text and isinstance(row["prompt"], str) and not context and not tools:
        return read_text(row, "prompt", where)
    asked = read_row(row, Columns(kind, names, context), where, tools=tools, answers=False)
    ends_answered = len(asked.messages) > 1 and asked.messages[-1]["role"] == "assistant"
    return asked.until(len(asked.messages) - 1) if ends_answered else asked


def read_text(row: Row, column: str, where: str) -> str:
    """Read the text in a column.

    Raises:
        DataError: the value is not a text.
    """
    value = expect(str, row[column], f"{where}: {column!r}", "text")
    check_encodable(value, f"{where}: {column!r}")
    return value


def refuse_context(row: Row, columns: Columns, where: str) -> None:
    """Refuse a row with a system message, a history or tools if there is no chat template.

    Raises:
        DataError: the row has such a column.
    """
    for name in columns.context:
        if row.get(name):
            raise DataError(
                f"{where}: the tokenizer has no chat template, so the column {name!r} cannot be written; "
                "write it into the prompt, or pass a chat template (--chat-template)"
            )


def _further_contexts(columns: Columns) -> set[str]:
    """Names that may contain a part of the conversation in rows of this kind or form only."""
    if columns.kind == "text":
        return _QUESTIONS
    return {"text"} if columns.form.startswith("question") else set()


def _rates(rows: Rows, name: str) -> bool:
    """Whether a column with the name of a label has true and false, or numbers, as a rating does."""
    return all(
        isinstance(value, bool | int | float) or str(value).strip().lower() in (*_FALSE, *_TRUE)
        for row in rows.rows
        if (value := row.get(name)) is not None
    )


def _is_false(value: Any) -> bool:
    return value is not None and str(value).strip().lower() in _FALSE


def read_turns(row: Row, column: str, role: str, where: str) -> list[Any]:
    """Read the messages in a column with a text or messages.

    Args:
        row: a row of the data set.
        column: the column.
        role: of the message that a text becomes.
        where: the row, for error messages.

    Raises:
        DataError: the value is neither.
    """
    value = parsed(row[column])
    keys = {"role"} if isinstance(row[column], str) else set()  # any other JSON is a plain text
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(m, Mapping) and keys <= m.keys() for m in value)
    ):
        return list(value)
    return [{"role": role, "content": read_text(row, column, where)}]


def _system(row: Row, messages: Any, where: str) -> list[dict[str, str]]:
    given = row.get(SYSTEM)
    if not given:
        return []
    text = read_text(row, SYSTEM, where)
    first = messages[0] if isinstance(messages, list | tuple) and messages else None
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        if first.get("content") == text:
            return []
        raise DataError(
            f"{where}: has a system message and another text in the column 'system'; keep one of them"
        )
    return [{"role": "system", "content": text}]


def _history(row: Row, where: str) -> list[Any]:
    """Read earlier turns: messages, or pairs of question and answer; they are context and not trained."""
    given = parsed(row.get(HISTORY))
    if not given:
        return []
    turns: list[Any] = []
    pairs = expect(Sequence, given, f"{where}: 'history'", "a list of [question, answer] pairs")
    for number, turn in enumerate(pairs, start=1):
        if isinstance(turn, Mapping):
            turns.append(turn)
        elif (
            isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        ):
            turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        else:
            raise DataError(
                f"{where}: turn {number} of 'history' is {describe_type(turn)}; expected [question, answer]"
            )
    return turns


def _unknown_columns(
    row: Row, where: str, missing: Sequence[str], known: Iterable[tuple[Kind, tuple[str, ...]]]
) -> str:
    known = [(kind, names) for kind, names in known if kind != "tokens"]
    wanted = list(missing) or list(dict.fromkeys(name for _, names in known for name in names))
    hints = []
    for name, value in row.items():
        if name not in wanted and name.lower() in _ANSWERS and "completion" in missing:
            hints.append(f" (for this column: --completion {name})")
        elif name in wanted:
            continue
        elif near := did_you_mean(name, wanted, count=1, cutoff=NEAR):
            hints.append(f" ({name!r}: {near[2:-1]})")
        elif isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value):
            hints.append(
                f" ({name!r} contains objects: conversations are read from 'messages', with role and content)"
            )
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if not missing and not hints and len(texts) == 2:
        certain = texts[1].lower() in _ANSWERS
        what = "for these" if certain else "if they are a prompt and its answer"
        hints.append(f" ({what}: --prompt {texts[0]} --completion {texts[1]})")
    if len(row) == 1 and (mark := next((m for m in ";\t|" if m in next(iter(row))), None)):
        hints = [f" (its columns seem to be separated by {mark!r}; separate them by commas)"]
    expected = (
        " and ".join(map(repr, missing))
        if missing
        else ", or ".join(" and ".join(map(repr, n)) for _, n in known)
    )
    return (
        f"{where}: found the columns {', '.join(map(repr, row)) or 'none'}, expected "
        f"{expected}{''.join(hints)}; rename the columns, or select the columns for prompt and completion "
        "with prompt_column and completion_column (--prompt, --completion)"
    )
