"""Recognises the forms in which training data is published, and converts rows to the columns of this package.

To read another form, write a function from a row to rows with `messages` or with `prompt` and `completion`,
and add a line to `FORMS`. A form is recognised by its columns; all rows of a source must have the same form.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from brushstroke.data.files import Row
from brushstroke.data.json_values import parsed
from brushstroke.data.rows import Rows
from brushstroke.data.validate import expect
from brushstroke.errors import DataError, did_you_mean

CHOSEN, TEXT = "chosen", "text"  # what `use` may be
LABELS = ("label", "labels", "label_text", "category", "class", "sentiment", "intent", "topic")
_OURS = ("messages", "prompt", "completion", "input_ids", "labels")
_EXAMPLES = 3  # number of rows that a message lists
_TURNS = "a list of objects with from and value"
_ROLES = {  # ShareGPT's names of roles → ours
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
    "function_call": "assistant",
    "system": "system",
}
_ASKED = ("prompt", "question", "instruction", "conversations")  # prompts of preference pairs
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Form:
    """One form of rows.

    Args:
        name: the name in messages, such as "alpaca".
        needs: the columns by which it is recognised.
        convert: (row, place for messages) → rows with our columns instead of its own; None if it has ours.
    """

    name: str
    needs: tuple[str, ...]
    convert: Callable[[Row, str], Iterable[Row]] | None = None


def as_read(
    rows: Rows,
    prompt: str | None = None,
    completion: str | None = None,
    use: str | None = None,
    *,
    gather: Callable[[Iterator[Row]], Sequence[Row]] = list,
) -> Rows:
    """The rows in the form that `find_columns` expects; rows that have it already are returned as they are.

    Args:
        rows: rows of one form.
        prompt, completion: columns that the user selected; no form is recognised then.
        use: "chosen" trains the better answers of preference pairs, "text" texts that have a label.
        gather: keeps converted rows.

    Raises:
        DataError: the rows have several forms, a row of a known form is invalid, or `use` is missing or
            wrong.
    """
    if use not in (None, CHOSEN, TEXT):
        raise DataError(
            f"cannot use {use!r}{did_you_mean(str(use), (CHOSEN, TEXT))}; known: {CHOSEN}, {TEXT}"
        )
    if use is not None and (prompt is not None or completion is not None):
        raise DataError(
            f"use={use!r} (--use) cannot be combined with selected columns; leave out one of them"
        )
    if prompt is not None or completion is not None or rows.form or not len(rows):
        return rows
    forms = [_form_of(*shape) for shape in rows.facts.first_rows().values()]
    first = next((form for form in forms if form is not None), None)
    if first is None:
        return rows
    if len({form.name for form in forms if form is not None}) > 1:
        raise _mixture(rows)
    if use == CHOSEN and first not in PREFERENCES:
        raise DataError(
            f"{rows.name}: is read as {first.name}, which has no chosen answers; leave out use='chosen' "
            "(--use chosen)"
        )
    if first in PREFERENCES and use != CHOSEN:
        raise DataError(
            f"{rows.name}: contains pairs of a chosen and a rejected answer; to train the chosen answers "
            "like any other, and ignore the rejected ones, give use='chosen' (--use chosen)"
        )
    if use == TEXT and first.name != TEXT:
        raise DataError(
            f"{rows.name}: is read as {first.name}, not as texts; leave out use='text' (--use text)"
        )
    if first.name == TEXT:
        if use != TEXT:
            _refuse_labels(rows)
        return rows if use is None else replace(rows, form=TEXT)
    if first.convert is None:  # `find_columns` tells which columns are missing
        return rows
    origins: list[tuple[int, int]] = []
    converted = gather(_converted(rows, first, origins))
    notes = rows.notes
    if len(converted) != len(rows):
        instances = f"{len(rows)} rows contain {len(converted)} instances; row numbers count instances"
        notes = (*notes, instances)
    return replace(rows, rows=converted, form=first.name, origins=tuple(origins), notes=notes)


def _converted(rows: Rows, first: Form, origins: list[tuple[int, int]]) -> Iterator[Row]:
    """The converted rows, one after the other; also lists their origins (see `Rows`)."""
    forms = [_form_of(*shape) or first for shape in rows.facts.shapes]
    for number, (row, shape) in enumerate(zip(rows.rows, rows.facts.shape_ids, strict=True), start=1):
        form = forms[shape]
        if missing := [name for name in form.needs if row.get(name) is None]:
            raise DataError(
                f"{rows.where(number)}: has no {' and no '.join(map(repr, missing))}, which rows of the form "
                f"{form.name} have; complete the row, or remove it"
            )
        assert form.convert is not None
        made = list(form.convert(row, rows.where(number)))
        origins += [(number, part if len(made) > 1 else 0) for part in range(1, len(made) + 1)]
        yield from made


def _form_of(names: Sequence[str], valued: Sequence[str]) -> Form | None:
    """The first form whose columns have values in a row, or else whose columns the row has."""
    return _known(frozenset(valued)) or _known(frozenset(names))


@lru_cache(1024)
def _known(columns: frozenset[str]) -> Form | None:
    return next((form for form in FORMS if columns.issuperset(form.needs)), None)


def _mixture(rows: Rows) -> DataError:
    """The error for rows of several forms: it names some rows of each."""
    of_shapes = [_form_of(*shape) for shape in rows.facts.shapes]
    places: dict[str, list[int]] = {}
    for number, shape in enumerate(rows.facts.shape_ids.tolist(), start=1):
        if (form := of_shapes[shape]) is not None:
            places.setdefault(form.name, []).append(number)
    parts = []
    for name, numbers in places.items():
        shown = [rows.where(number) for number in numbers[:_EXAMPLES]]
        further = f" and {len(numbers) - _EXAMPLES} more" if len(numbers) > _EXAMPLES else ""
        parts.append(f"{name} ({'; '.join(shown)}{further})")
    return DataError(
        f"{rows.name}: mixes rows of several forms: {', '.join(parts)}; give each form a file of its own, or "
        "convert the rows to one form"
    )


def _refuse_labels(rows: Rows) -> None:
    label = next((name for name in rows.facts.valued() if name.lower() in LABELS), None)
    if label is not None and any(row.get(label) not in (None, "") for row in rows.rows):
        raise DataError(
            f"{rows.name}: has texts with a column {label!r}; to train it as the answer to each text, give "
            f"prompt='text' and completion={label!r} (--prompt text --completion {label}); to train the "
            "texts alone, give use='text' (--use text)"
        )


def _instead(row: Row, taken: Sequence[str], **columns: Any) -> Row:
    """The row with these columns in place of those that were taken; others of their names are renamed."""
    kept = {name: value for name, value in row.items() if name not in taken and value is not None}
    renamed = {f"{name} of the file" if name in _OURS else name: value for name, value in kept.items()}
    return {**renamed, **columns}


def _pair(question: str, answer: str, context: str | None = None) -> Callable[[Row, str], list[Row]]:
    """A conversion of rows with a question, an optional context, and an answer."""

    def convert(row: Row, where: str) -> list[Row]:
        asked: Any = row[question]
        taken = [question, answer]
        if context is not None and context in row:
            taken.append(context)
            further = expect((str, type(None)), row[context], f"{where}: {context!r}", "text") or ""
            if further.strip():
                asked = expect(str, asked, f"{where}: {question!r}", "text") + f"\n\n{further}"
        return [_instead(row, taken, prompt=asked, completion=row[answer])]

    return convert


def _instances(row: Row, where: str) -> list[Row]:
    """An example of each instance of an instruction."""
    instances = expect(Sequence, parsed(row["instances"]), f"{where}: 'instances'", "a list of objects")
    if not instances:
        raise DataError(f"{where}: 'instances' is empty; remove the row")
    made = []
    for number, instance in enumerate(instances, start=1):
        place = f"{where}: instance {number}"
        instance = expect(Mapping, instance, place, "an object with input and output")
        if "output" not in instance:
            raise DataError(f"{place} has no 'output'; expected an object with input and output")
        of_instance = {**{name: row[name] for name in row if name != "instances"}, **instance}
        made += _pair("instruction", "output", "input")(of_instance, place)
    return made


def _sharegpt(row: Row, where: str) -> list[Row]:
    """Turns with from and value, or with role and content under ShareGPT's column."""
    column = next(name for name in ("conversations", "conversation") if row.get(name) is not None)
    turns = expect(Sequence, parsed(row[column]), f"{where}: {column!r}", _TURNS)
    messages = [_message(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, start=1)]
    return [_instead(row, (column,), messages=messages)]


def _message(turn: Any, place: str) -> Mapping[str, Any]:
    """A message of ours from a turn with from and value."""
    turn = expect(Mapping, turn, place, "an object with from and value")
    if "from" not in turn or "role" in turn:
        return turn  # read like any message; errors name what it lacks
    name, value = turn["from"], turn.get("value")
    role = _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{place} is from {name!r}; known: {', '.join(_ROLES)}")
    message = {key: kept for key, kept in turn.items() if key not in ("from", "value")}
    if value is None:
        raise DataError(f"{place} ({name}) has no value; expected text")
    if name.lower() != "function_call":
        return {"role": role, "content": value, **message}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{place}: the function call is not valid JSON ({error}); correct it") from error
    return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls], **message}


def _chosen(row: Row, where: str) -> list[Row]:
    """The conversation that ends with the better answer; only this answer is trained."""
    named = [name for name in _ASKED if row.get(name) is not None][:1]
    asked = row[named[0]] if named else None
    if named == ["instruction"] and isinstance(row.get("input"), str):
        named.append("input")
        asked = "\n\n".join(text for text in (str(asked), row["input"]) if text.strip())
    turns = _turns_of(row[CHOSEN], "assistant", f"{where}: 'chosen'")
    before = [] if asked is None else _turns_of(asked, "user", f"{where}: the prompt")
    if before and before[-1].get("role") == "assistant" and not str(before[-1].get("content")).strip():
        before = before[:-1]  # a transcript that ends with "Assistant:"
    repeated = _repeated(before, turns)
    if before and not repeated and any(turn.get("role") == "user" for turn in turns):
        raise DataError(
            f"{where}: 'chosen' is a conversation that does not begin with the prompt; remove one of the two"
        )
    whole = [*before, *turns[repeated:]]
    if len(whole) < 2 or whole[-1].get("role") != "assistant":
        raise DataError(
            f"{where}: 'chosen' is not an answer to a prompt; expected a column 'prompt', or a conversation "
            "that ends with an assistant message"
        )
    return [_instead(row, [CHOSEN, *named], prompt=whole[:-1], completion=whole[-1:])]


def _repeated(before: Sequence[Mapping[str, Any]], turns: Sequence[Mapping[str, Any]]) -> int:
    """How many of the turns repeat the end of the prompt."""

    def said(some: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
        return [(turn.get("role"), str(turn.get("content")).strip()) for turn in some]

    most = min(len(before), len(turns))
    return next((n for n in range(most, 0, -1) if said(before[-n:]) == said(turns[:n])), 0)


def _turns_of(value: Any, role: str, place: str) -> list[Mapping[str, Any]]:
    value = parsed(value)
    if isinstance(value, str):
        parts = _TRANSCRIPT.split(value)  # "\n\nHuman: ...\n\nAssistant: ..."
        if len(parts) < 3 or parts[0].strip():
            return [{"role": role, "content": value}]
        names = {"Human": "user", "Assistant": "assistant"}
        return [{"role": names[n], "content": t} for n, t in zip(parts[1::2], parts[2::2], strict=True)]
    turns = [value] if isinstance(value, Mapping) else expect(Sequence, value, place, "text or messages")
    return [_message(turn, place) for turn in turns]


def _preferred(row: Row, where: str) -> list[Row]:
    """OpenAI's preference pairs."""
    given = expect(Mapping, parsed(row["input"]), f"{where}: 'input'", "an object with messages")
    kept = {name: value for name, value in given.items() if name in ("messages", "tools")}
    prompt = expect(Sequence, kept.pop("messages", None), f"{where}: 'messages' of 'input'", "messages")
    answer = expect(Sequence, parsed(row["preferred_output"]), f"{where}: 'preferred_output'", "messages")
    taken = ("input", "preferred_output")
    return [_instead(row, taken, prompt=list(prompt), completion=list(answer), **kept)]


PREFERENCES = (
    Form("preference pairs", (CHOSEN, "rejected"), _chosen),
    Form("preference pairs", ("input", "preferred_output", "non_preferred_output"), _preferred),
)
FORMS = (  # the first that fits counts
    Form("tokens", ("input_ids", "labels")),
    *PREFERENCES,
    Form("messages", ("messages",)),
    Form("prompt/completion", ("prompt", "completion")),
    Form("sharegpt", ("conversations",), _sharegpt),
    Form("sharegpt", ("conversation",), _sharegpt),
    Form("instructions with instances", ("instruction", "instances"), _instances),
    Form("alpaca", ("instruction", "output"), _pair("instruction", "output", "input")),
    Form("dolly", ("instruction", "response"), _pair("instruction", "response", "context")),
    Form("question/answer", ("question", "answer"), _pair("question", "answer")),
    Form("question/response", ("question", "response"), _pair("question", "response")),
    Form("query/response", ("query", "response"), _pair("query", "response")),
    Form("prompt/response", ("prompt", "response"), _pair("prompt", "response")),
    Form("input/output", ("input", "output"), _pair("input", "output")),
    Form("text", ("text",)),
)
