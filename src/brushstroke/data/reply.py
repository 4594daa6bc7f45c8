"""Parses a model's answers into content, reasoning and tool calls, according to its chat template.

The template's format is found with test conversations; there is no list of formats.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonpath
from typing import Any, NamedTuple

from brushstroke.data.layout import LayoutFinder, Unproven
from brushstroke.data.messages import Conversation, read_conversation
from brushstroke.data.outline import Slot
from brushstroke.data.probe_answers import CALL, QUESTION, forms_for
from brushstroke.data.template import ChatTemplate, TemplateRefusal, common_end

_KEY, _SECOND_KEY = "where", "whom"  # in alphabetical order, because some templates sort
_RESULT = {"role": "tool", "name": "look", "tool_call_id": CALL["id"], "content": "x"}


@dataclass(frozen=True)
class Reply:
    """The parts of an answer.

    Args:
        content: the text for the user.
    reasoning: the text before it, if the template has a place for reasoning.
    tool_calls: calls as {"name": ..., "arguments": {...}}.
    typed: whether the template distinguishes texts from numbers in arguments.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    typed: bool = True

    def calls_like(self, other: "Reply") -> bool:
        """Whether the calls are equal: names, and arguments as JSON values."""
        typed = self.typed and other.typed
        own, others = ([_comparable(call, typed) for call in reply.tool_calls] for reply in (self, other))
        return own == others


@dataclass(frozen=True)
class _Frame:
    """The pattern of one kind of answer without calls, and the amount of the template's text in it."""

    pattern: re.Pattern[str]
    opening: str
    weight: int

    @property
    def has_reasoning(self) -> bool:
        """Whether it contains reasoning."""
        return "reasoning" in self.pattern.groupindex


@dataclass(frozen=True)
class _CallFrame:
    """A template's format of a call: `before`, name, `middle`, then arguments as JSON or as pairs.

    Args:
        lead: other text before the first call.
        before: directly before the name of every call.
        middle: between the name and the arguments.
        bare: after the name of a call without arguments.
        key_end: for pairs, between the name of an argument and its value.
        between: for pairs, between a value and the next name.
        after: after the arguments of the last call.
        is_json: whether the arguments are a JSON object.
        spelling: for pairs, the spelling of texts.
        with_content: whether an answer with calls also has content.
        many: whether `before` separates several calls.
    """

    lead: str
    before: str
    middle: str
    bare: str
    key_end: str
    between: str
    after: str
    is_json: bool
    spelling: str
    with_content: bool
    many: bool


class ReplyReader:
    """Parses answers in the format of one chat template.

    Args:
        template: the template of the answers; None for plain texts.
        special: texts of tokens that are not part of an answer.
    """

    def __init__(self, template: ChatTemplate | None, special: Sequence[str]) -> None:
        self.template = template
        tokens = sorted((text for text in special if text), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def read(self, text: str, tools: Sequence[Any] = ()) -> Reply:
        """Parse an answer into its parts.

        Args:
            text: the model's output with special tokens, without its end.
            tools: function declarations, which give the types of arguments.
        """
        frame = self._call_frame
        found = _find_calls(text, frame, tools) if frame is not None else None
        if frame is None or found is None:
            return self._without_calls(text)
        before, calls, after = found
        reply = self._with_reasoning(before) or self._without_calls(before.removesuffix(frame.lead.strip()))
        content = reply.content + self._plain(after) if frame.with_content else ""
        return replace(reply, content=content, tool_calls=tuple(calls), typed=frame.is_json)

    def _matched(self, text: str, frames: Iterable[_Frame]) -> Reply | None:
        for frame in frames:
            if found := frame.pattern.fullmatch(text):
                parts = found.groupdict()
                return Reply(
                    self._plain(parts.get("content") or ""), self._plain(parts.get("reasoning") or "").strip()
                )
        return None

    def _with_reasoning(self, text: str) -> Reply | None:
        return self._matched(text, (frame for frame in self._frames if frame.has_reasoning))

    def _without_calls(self, text: str) -> Reply:
        if (matched := self._with_reasoning(text)) is not None:
            return matched
        unfinished = next((f for f in self._frames if f.has_reasoning and f.opening.strip()), None)
        if unfinished is not None and text.lstrip().startswith(unfinished.opening.strip()):
            return Reply("", self._plain(text.lstrip().removeprefix(unfinished.opening.strip())).strip())
        return self._matched(text, self._frames) or Reply(self._plain(text))

    def _plain(self, text: str) -> str:
        return self._special.sub("", text)

    @cached_property
    def _frames(self) -> list[_Frame]:
        frames = []
        if self.template is None:
            return []
        text = {"role": "assistant", "content": "x"}
        for messages in ([{**text, "reasoning_content": "y"}], [text], [_calling(), _RESULT, text]):
            outlined = _outlined(self.template, [QUESTION, *messages])
            if outlined is None:
                continue
            pattern, weight = "", 0
            for literal, part, _ in outlined:
                pattern += f"(?P<{part}>.*?)" if part else _flexible(literal)
                weight += len(literal.strip())
            frames.append(_Frame(re.compile(pattern, re.DOTALL), outlined[0].text, weight))
        return sorted(frames, key=lambda frame: -frame.weight)

    @cached_property
    def _call_frame(self) -> _CallFrame | None:
        if self.template is None:
            return None
        one = _outlined(self.template, [QUESTION, _calling()])
        pairs = _outlined(self.template, [QUESTION, _calling(keys=(_KEY, _SECOND_KEY))])
        if one is None or pairs is None:
            return None
        two = _outlined(self.template, [QUESTION, _calling(count=2)])
        with_text = _outlined(self.template, [QUESTION, {**_calling(), "content": "x"}])
        name = _last_name(one)
        lead, middle = one[name - 1].text if name else "", one[name + 1].text
        if two is not None:
            middle = _with_numbers(middle, two[_last_name(two) + 1].text)
        before = lead if with_text is None else common_end(lead, with_text[_last_name(with_text) - 1].text)
        last = two[_last_name(two) - 1].text if two is not None else before
        many = two is not None and bool(common_end(before, last).strip())
        before = common_end(before, last) if many else before
        after = "".join(part.text for part in one[name + 3 :])
        shape = {"lead": lead.removesuffix(before), "before": before, "after": after, "many": many}
        shape["spelling"] = one[name + 2].spelling if len(one) > name + 2 else ""
        shape["with_content"] = with_text is not None
        shape["bare"] = self._without_arguments(before)
        if not before.strip():
            return None
        if (found := _json_place(middle, after)) is not None:
            start, stop = found
            shape["after"] = after[stop:]
            return _CallFrame(middle=middle[:start], key_end="", between="", is_json=True, **shape)
        further = pairs[_last_name(pairs) + 3].text
        if (
            middle.count(_KEY) != 1
            or further.count(_SECOND_KEY) != 1
            or not further.split(_SECOND_KEY)[0].strip()
        ):
            return None
        opened, key_end = middle.split(_KEY)
        between = further.split(_SECOND_KEY)[0]
        return _CallFrame(middle=opened, key_end=key_end, between=between, is_json=False, **shape)

    def _without_arguments(self, before: str) -> str:
        """The text after the name of a call without arguments, whether another call follows or not."""
        assert self.template is not None
        one, two = (_outlined(self.template, [QUESTION, _calling(keys=(), count=count)]) for count in (1, 2))
        if one is None:
            return ""
        last = "".join(part.text for part in one[_last_name(one) + 1 :])
        names = [place for place, part in enumerate(two or ()) if part.part == "name"]
        if two is None or len(names) < 2:
            return last
        return commonpath([last, two[names[0] + 1].text.removesuffix(before)])


def _calling(*, keys: Sequence[str] = (_KEY,), count: int = 1) -> dict[str, Any]:
    """A message with several calls of one function."""
    function = {"name": "look", "arguments": dict.fromkeys(keys, "there")}
    calls = [{**CALL, "id": f"call0000{number}", "function": function} for number in range(1, count + 1)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


class _Part(NamedTuple):
    """The template's own text, or the kind of a value with its spelling."""

    text: str = ""
    part: str = ""
    spelling: str = ""


def _outlined(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> list[_Part] | None:
    """The outline of the last answer, without its end; None if the template cannot write it."""
    conversation: Conversation = read_conversation(messages, where="a probe")
    for form, changed in forms_for(template, conversation):
        finder = LayoutFinder(template, changed, form)
        try:
            layout = finder.whole_or_each()[-1]
        except (Unproven, TemplateRefusal):
            continue
        turn, outline = layout.turns[-1], layout.outline
        stop = turn.stop - len(turn.end or "")
        parts = []
        for segment in outline.segments:
            if segment.stop <= turn.start or segment.start >= stop:
                continue
            text = outline.text[max(segment.start, turn.start) : min(segment.stop, stop)]
            own = segment.slot is None
            slot = Slot("", "") if segment.slot is None else finder.sketch.slots[segment.slot]
            parts.append(_Part(text) if own else _Part("", slot.part, segment.spelling))
        return parts
    return None


def _last_name(parts: Sequence[_Part]) -> int:
    """The last position of a function's name."""
    return max(i for i, part in enumerate(parts) if part.part == "name")


def _json_place(middle: str, after: str) -> tuple[int, int] | None:
    """Where JSON arguments begin in the text after a name, and end in the text after a value."""
    for match in re.finditer(r"\{", middle):
        opened = f"{middle[match.start() :]}x"
        try:
            found, stop = json.JSONDecoder().raw_decode(opened + after)
        except ValueError:
            continue
        if found == {_KEY: "x"}:
            return match.start(), stop - len(opened)
    return None


def _with_numbers(one: str, other: str) -> str:
    """A pattern in which a number that differs between two calls matches any number, such as an id."""
    one, other = (_ID.sub(CALL["id"], text) for text in (one, other))
    same = re.sub(r"\d+", _NUMBER, one) == re.sub(r"\d+", _NUMBER, other)
    return re.sub(r"\d+", _NUMBER, one) if one != other and same else one


def _find_calls(
    text: str, frame: _CallFrame, tools: Sequence[Any]
) -> tuple[str, list[dict[str, Any]], str] | None:
    """The text before the calls, the calls, and the text after them; None if a call is incomplete."""
    opener = re.compile(_flexible(frame.before))
    first = opener.search(text)
    if first is None:
        return None
    calls, position = [], first.start()
    while opened := opener.search(text, position):
        read = (_json_call if frame.is_json else _pairs_call)(text, opened.end(), frame, tools)
        if read is None:
            return None
        call, position = read
        calls.append(call)
    if closing := re.compile(_flexible(frame.after)).match(text, position):
        position = closing.end()
    after = text[position:].strip()
    if after and not frame.many:  # it may be another call
        return None
    return text[: first.start()].rstrip(), calls, after


def _json_call(
    text: str, start: int, frame: _CallFrame, _: Sequence[Any]
) -> tuple[dict[str, Any], int] | None:
    name = _NAME.match(text, start)
    middle = name and re.compile(_flexible(frame.middle)).match(text, name.end())
    if name is None or middle is None:
        return None
    try:
        arguments, stop = json.JSONDecoder().raw_decode(text, middle.end())
    except ValueError:
        return None
    return ({"name": name[0], "arguments": arguments}, stop) if isinstance(arguments, dict) else None


def _pairs_call(
    text: str, start: int, frame: _CallFrame, tools: Sequence[Any]
) -> tuple[dict[str, Any], int] | None:
    name = _NAME.match(text, start)
    if name is None:
        return None
    if frame.bare.strip() and (bare := re.compile(_flexible(frame.bare)).match(text, name.end())):
        return {"name": name[0], "arguments": {}}, bare.end()
    opened = re.compile(_flexible(frame.middle)).match(text, name.end())
    if opened is None:
        return None
    arguments, position = {}, opened.end()
    types = dict(_types(tools, name[0]))
    closing = _flexible(frame.after) if frame.after.strip() else r"\s*$"
    ending = re.compile(f"(?P<more>{_flexible(frame.between)})|{closing}")
    while True:
        key_end = re.compile(_flexible(frame.key_end)).search(text, position)
        end = key_end and ending.search(text, key_end.end())
        if key_end is None or end is None:
            return None
        key, value = text[position : key_end.start()].strip(), text[key_end.end() : end.start()]
        markers = (frame.before, *(() if frame.many else (frame.key_end,)))
        if not _NAME.fullmatch(key) or any(marker.strip() in value for marker in markers):
            return None  # a value contains the frame's own text: its end cannot be found
        arguments[key] = _value(value, types.get(key), frame.spelling)
        position = end.end()
        if end["more"] is None:
            return {"name": name[0], "arguments": arguments}, position


def _types(tools: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
    """(argument, type) from a function's declaration."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            for key, schema in ((function.get("parameters") or {}).get("properties") or {}).items():
                yield key, schema.get("type") if isinstance(schema, Mapping) else None


_NAME = re.compile(r"[\w.$-]+")
_NUMBER, _ID = "\0", re.compile(r"call0000\d")


def _value(text: str, kind: Any, spelling: str = "plain") -> Any:
    said = text
    if "json" in spelling:
        with suppress(ValueError):
            said = json.loads(f'"{text}"')
    if kind == "string":
        return said
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return said


def _comparable(call: Mapping[str, Any], typed: bool) -> str:
    arguments = call["arguments"]
    if not typed:
        arguments = {k: _value(v.strip(), None) if isinstance(v, str) else v for k, v in arguments.items()}
    return json.dumps([call["name"], arguments], sort_keys=True, ensure_ascii=False, default=str)


def _flexible(literal: str) -> str:
    """A pattern for a template's own text that allows differences in white space."""
    pattern = r"\s*".join(re.escape(word) for word in re.split(r"\s+", literal))
    return _ID.sub(r"[\\w-]+", pattern).replace(re.escape(_NUMBER), r"\d+")
