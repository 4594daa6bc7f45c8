"""Reads conversations from rows and converts the formats of different tools to one.

It uses no template: `forms` decides how a conversation is passed to one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from brushstroke.data.json_values import as_json, parsed, read_options, read_tools, schema_of, without_nulls
from brushstroke.data.validate import Message, check_encodable, expect
from brushstroke.errors import DataError, did_you_mean

ROLES = ("system", "user", "assistant", "tool", "developer")
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that files and templates use for reasoning
TRAIN_KEYS = (
    "weight",
    "train",
    "training",
    "trainable",
)  # keys by which a message says whether it is trained
ARGUMENTS = ("arguments", "parameters", "input", "args")  # names that files use for arguments
TEXT_PARTS = ("text", "input_text", "output_text", *REASONING)  # types of content parts with text
SPLIT = "thought_was_in_content"  # internal key of messages whose reasoning was split off
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)

NULLS = "keys that are null are removed from messages, tools and arguments"
UNTRAINED = "assistant messages with weight 0 or train false are context and not trained"


@dataclass(frozen=True)
class Conversation:
    """A conversation in brushstroke's form.

    A message has `role`; `content`, a text, absent where there is none; `reasoning_content`, a text;
    `tool_calls`, each as {type, id, function: {name, arguments}} with the arguments as an object; and
    the other keys of the row.

    Args:
        messages: the messages in order.
        trained: for each message, whether it is an answer to train.
        tools: the declarations of functions that the model may call.
        options: additional variables for the template (`chat_template_kwargs`).
        notes: changes and omissions, as messages for people.
    """

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[int, ...]:
        """The indices of the assistant messages."""
        return tuple(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    def until(self, count: int) -> "Conversation":
        """The conversation of the first messages only."""
        return replace(self, messages=self.messages[:count], trained=self.trained[:count])

    def with_thoughts_split(self) -> "Conversation | None":
        """A copy with each answer's leading <think>…</think> as its reasoning; None if no answer has one."""
        split = [_split_thought(message) for message in self.messages]
        if all(new is old for new, old in zip(split, self.messages, strict=True)):
            return None
        return replace(self, messages=tuple(split))


def read_conversation(
    messages: object,
    *,
    tools: object = None,
    options: object = None,
    where: str,
    answers_only_from: int = 0,
) -> Conversation:
    """Read a conversation from a row.

    Args:
        messages: a list of messages, or the same as JSON text.
        tools: a list of function declarations, or the same as JSON text.
        options: an object with additional variables for the template, or the same as JSON text.
        where: the row, for error messages.
        answers_only_from: the index of the first message whose answer is trained.

    Raises:
        DataError: the conversation is invalid; the error names the message.
    """
    wanted = "a list of objects with role and content"
    given = expect(Sequence, parsed(messages), f"{where}: 'messages'", wanted)
    if not given:
        raise DataError(f"{where}: 'messages' is empty; expected at least a user and an assistant turn")
    declared = read_tools(tools, where)
    read, trained, notes = [], [], set()
    for index, message in enumerate(given):
        place = f"{where}: message {index + 1}"
        message = expect(Mapping, message, place, "an object with role and content")
        reader = _MessageReader(message, place, declared)
        read.append(reader.message())
        learnt = reader.is_trained()
        trained.append(learnt and index >= answers_only_from)
        notes |= reader.notes
        if reader.role == "assistant" and not learnt:
            notes.add(UNTRAINED)
    named = _with_tool_names(read)
    return Conversation(
        tuple(named), tuple(trained), declared, read_options(options, where), tuple(sorted(notes))
    )


class _MessageReader:
    """Converts one message of a row to brushstroke's form."""

    def __init__(self, message: Message, place: str, tools: tuple[Any, ...]) -> None:
        self.given = {key: value for key, value in message.items() if value is not None}
        self.tools = tools
        self.has_content = "content" in message
        self.notes: set[str] = (
            {NULLS} if len(self.given) + (message.get("content", "") is None) < len(message) else set()
        )
        role = self.given.pop("role", None)
        role = "tool" if role == "function" else role  # its older name
        if role not in ROLES:
            found = f"has the unknown role {role!r}" if isinstance(role, str) else "has no role"
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            raise DataError(f"{place} {found}{hint}; known roles: {', '.join(ROLES)}")
        self.role: str = role
        self.place = f"{place} ({role})"
        self._trained = self._read_trained()

    def is_trained(self) -> bool:
        """Whether the message is an answer to train."""
        return self.role == "assistant" and self._trained is not False

    def message(self) -> dict[str, Any]:
        """The converted message.

        Raises:
            DataError: the message is empty, or its format is unknown.
        """
        given = dict(self.given)
        content, thoughts = self._texts(given.pop("content", None))
        reasoning = self._reasoning(given, thoughts)
        calls = self._calls(given)
        if content is None and not calls and not reasoning:
            found = "null content" if self.has_content else "no content"
            raise DataError(f"{self.place} has {found}; expected text")
        message: dict[str, Any] = {"role": self.role}
        if content is not None:
            message["content"] = content
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message | given

    def _read_trained(self) -> bool | None:
        """Whether the message asks to be trained; None if it does not say."""
        said = {key: self.given.pop(key) for key in TRAIN_KEYS if key in self.given}
        found = set()
        for key, value in said.items():
            if value not in (0, 1):  # True is 1 and 0.0 is 0
                raise DataError(f"{self.place} has {key} {value!r}; expected 0 or 1, or true or false")
            found.add(bool(value))
        if len(found) > 1:
            raise DataError(f"{self.place} has contradicting weight and train keys; keep one of them")
        learnt = next(iter(found), None)
        if learnt and self.role != "assistant":
            raise DataError(
                f"{self.place} asks to be trained ({next(iter(said))}), but only assistant messages can be; "
                "remove the key"
            )
        return learnt

    def _texts(self, content: object) -> tuple[str | None, str]:
        """The text of a content, and the reasoning among its parts."""
        if content is None or isinstance(content, str):
            check_encodable(content or "", self.place)
            return content, ""
        texts, thoughts = [], []
        for part in expect(Sequence, content, f"{self.place}: 'content'", "text"):
            fields = {"text": part} if isinstance(part, str) else part
            fields = expect(Mapping, fields, f"{self.place}: a part of 'content'", "an object with text")
            fields = {key: value for key, value in fields.items() if value is not None}
            found = [name for name in ("text", *REASONING) if isinstance(fields.get(name), str)]
            kind = fields.get("type", "text" if fields.keys() <= {"text", *REASONING} else None)
            if not found or kind not in TEXT_PARTS:
                raise DataError(f"{self.place} has a part that is not text; only text can be trained on")
            for name in found:
                check_encodable(fields[name], self.place)
                (texts if name == "text" else thoughts).append(fields[name])
        return "".join(texts), "".join(thoughts)

    def _reasoning(self, given: dict[str, Any], thoughts: str) -> str:
        if self.role != "assistant":
            return ""
        found = {thoughts} if thoughts else set()
        for name in REASONING:
            value = expect(str, given.pop(name, ""), f"{self.place}: {name!r}", "text")
            check_encodable(value, self.place)
            found |= {value} if value.strip() else set()
        if len(found) > 1:
            raise DataError(f"{self.place} has different reasoning in two places; keep one of them")
        return next(iter(found), "")

    def _calls(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        if self.role != "assistant":
            if any(given.pop(key, None) for key in ("tool_calls", "function_call")):
                raise DataError(f"{self.place} has tool calls; only assistant messages can have them")
            return []
        calls = parsed(given.pop("tool_calls", None)) or []
        legacy = given.pop("function_call", None)
        if legacy and calls:
            raise DataError(f"{self.place} has tool_calls and function_call; keep one of them")
        calls = [{"function": legacy}] if legacy else calls
        calls = expect(Sequence, calls, f"{self.place}: 'tool_calls'", "a list of calls")
        return [self._call(call, number) for number, call in enumerate(calls, start=1)]

    def _call(self, call: object, number: int) -> dict[str, Any]:
        place = f"{self.place}: tool call {number}"
        call = expect(Mapping, parsed(call), place, "an object with name and arguments")
        fields = {key: value for key, value in call.items() if value is not None}
        function = parsed(fields.pop("function", {}))
        if not isinstance(function, Mapping):
            function = {"name": function}
        function = {key: value for key, value in function.items() if value is not None}
        for key in ("name", *ARGUMENTS):
            if key in fields:
                function.setdefault(key, fields.pop(key))
        name = function.pop("name", None)
        if not isinstance(name, str) or not name:
            raise DataError(f"{place} has no function name; expected an object with name and arguments")
        check_encodable(name, place)
        given = {key: function.pop(key) for key in ARGUMENTS if key in function}
        if len(given) > 1 or function:
            further = ", ".join(map(repr, function or given))
            raise DataError(f"{place} has {further}; expected only a name and arguments")
        arguments = self._arguments(next(iter(given.values()), None), name, place)
        return {"type": "function", **fields, "function": {"name": name, "arguments": arguments}}

    def _arguments(self, given: object, name: str, place: str) -> dict[str, Any]:
        arguments: Any = {} if given is None else given
        if isinstance(given, str):
            try:
                arguments = json.loads(given) if given.strip() else {}
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{place}: the arguments are not valid JSON ({error}); correct them"
                ) from error
        arguments = expect(Mapping, arguments, f"{place}: 'arguments'", "an object")
        arguments = as_json(arguments, f"{place}: the arguments")
        if isinstance(given, str):  # not filled with nulls from a schema
            return arguments
        kept = without_nulls(arguments, schema_of(self.tools, name))
        if kept != arguments:
            self.notes.add(NULLS)
        return kept


def _split_thought(message: Message) -> Message:
    content = message.get("content", "")
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return message
    found = _THOUGHT.fullmatch(content)
    if found is None:
        return message
    split = {**message, "content": found[2].strip(), SPLIT: True}
    return split | {"reasoning_content": found[1].strip()} if found[1].strip() else split


def _with_tool_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the function's name to tool results that name their call."""
    names: dict[Any, str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            if isinstance(call.get("id"), str):
                names[call["id"]] = call["function"]["name"]
        answers = message.get("tool_call_id")
        known = names.get(answers) if isinstance(answers, str) else None
        lacks = message["role"] == "tool" and "name" not in message and known is not None
        named.append({**message, "name": known} if lacks else message)
    return named
