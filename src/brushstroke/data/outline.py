"""Renders conversations with placeholders, to separate the template's text from the values.

Placeholders contain characters that JSON, Python's repr and HTML write differently, so that the text shows
how the template prints a value. The final text is then aligned with the outline, value by value. The caller
renders.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from brushstroke.data.validate import Message

PROBE = "é'\"\\\n<&>"  # inside a placeholder: differs in every spelling
NUMBERS = 73_100_000  # placeholders for integers start here

SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "json": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "ascii json": lambda text: json.dumps(text)[1:-1],
    "python": lambda text: repr(f'"{text}')[2:-1],  # between ' and ', as for a text with both quotes
}
_HANDLED = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
_PLACEHOLDER = re.compile(r"Qz(\d+)v(.*?)Qz\1w", re.DOTALL)
_REST = re.compile(r"Qz\d+[vw]")


@dataclass(frozen=True)
class Slot:
    """A value in a conversation.

    Args:
        part: "content", "reasoning", "name" (of a function), "argument", or "other".
        value: a text, or a number in an argument.
    """

    part: str
    value: Any


class Segment(NamedTuple):
    """text[start:stop] of an outline: a slot by its number, or the template's own text (slot None)."""

    start: int
    stop: int
    slot: int | None
    spelling: str


@dataclass(frozen=True)
class Outline:
    """A rendered text with placeholders, as segments without gaps; `altered` slots cannot be read back."""

    text: str
    segments: tuple[Segment, ...]
    altered: frozenset[int]

    def between(self, start: int, stop: int) -> tuple[Segment, ...]:
        """The slots between two positions."""
        return tuple(s for s in self.segments if s.slot is not None and start <= s.start and s.stop <= stop)


@dataclass(frozen=True)
class Sketch:
    """Messages in which placeholders replace the values.

    Args:
        messages: the messages in order.
        slots: the values.
        uses: for each message, its slots, as often as they occur.
    """

    messages: tuple[Message, ...]
    slots: tuple[Slot, ...]
    uses: tuple[tuple[int, ...], ...]


def sketch(messages: Sequence[Message], *, keep_values: bool = False, filled: Collection[int] = ()) -> Sketch:
    """Replace the values of a conversation by placeholders.

    Args:
        messages: the messages of a `Conversation`.
        keep_values: keep each text between the marks of its placeholder, for templates that inspect texts.
        filled: messages in which blank contents, and arguments that are neither texts nor numbers, also get
            placeholders.
    """
    maker = _Maker(keep_values)
    made = tuple(maker.message(message, index in filled) for index, message in enumerate(messages))
    return Sketch(made, tuple(maker.slots), tuple(maker.uses))


class _Maker:
    def __init__(self, keep_values: bool) -> None:
        self.keep_values = keep_values
        self.slots: list[Slot] = []
        self.uses: list[tuple[int, ...]] = []
        self._used: list[int] = []
        self._fill = False
        self._names: dict[str, int] = {}

    def message(self, message: Message, fill: bool) -> Message:
        self._used, self._fill = [], fill
        made = self._made(message)
        self.uses.append(tuple(self._used))
        return made

    def _made(self, message: Message) -> Message:
        made = dict(message)
        if "reasoning_content" in made:
            made["reasoning_content"] = self._text(Slot("reasoning", made["reasoning_content"]))
        content = made.get("content", "")
        if content.strip() or (self._fill and "tool_calls" not in made):
            made["content"] = self._text(Slot("content", content))
        if "tool_calls" in made:
            made["tool_calls"] = [self._call(call) for call in made["tool_calls"]]
        for key in [key for key in made if key not in _HANDLED]:
            if key == "name" and made["role"] == "tool":
                made[key] = self._name(str(made[key]))
            elif isinstance(made[key], str) and made[key]:
                made[key] = self._text(Slot("other", made[key]))
        return made

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._name(function["name"])
        arguments = {key: self._argument(value) for key, value in function["arguments"].items()}
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Mapping) and value:
            return {key: self._argument(inner) for key, inner in value.items()}
        if isinstance(value, list) and value:
            return [self._argument(inner) for inner in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return placeholder_number(self._add(Slot("argument", value)), value)
        if self._fill or (isinstance(value, str) and value.strip()):
            return self._text(Slot("argument", value))
        return value

    def _text(self, slot: Slot) -> str:
        number = self._add(slot)
        return f"Qz{number}v{slot.value if self.keep_values else PROBE}Qz{number}w"

    def _name(self, name: str) -> str:
        """One placeholder for all occurrences of a function's name, because templates compare them."""
        if name in self._names:
            self._used.append(self._names[name])
        else:
            self._names[name] = self._add(Slot("name", name))
        return f"Qz{self._names[name]}vQz{self._names[name]}w"

    def _add(self, slot: Slot) -> int:
        self.slots.append(slot)
        self._used.append(len(self.slots) - 1)
        return len(self.slots) - 1


def placeholder_number(slot: int, value: int | float) -> int | float:
    """A number of the same type as placeholder of a slot."""
    return NUMBERS + slot + (0.5 if isinstance(value, float) else 0)


def read_outline(text: str, slots: Sequence[Slot], *, keep_values: bool = False) -> Outline:
    """Find the placeholders in a rendered text."""
    segments: list[Segment] = []
    altered: set[int] = set()
    position = 0
    for start, stop, number, middle in _places(text, slots):
        slot = slots[number]
        spelling = "plain"
        if middle is not None:
            core = "" if slot.part == "name" else str(slot.value) if keep_values else PROBE
            spelling = next((name for name, spell in SPELLINGS.items() if spell(core) == middle), "")
        if not spelling:
            altered.add(number)
            continue
        segments += [Segment(position, start, None, "")] if start > position else []
        segments.append(Segment(start, stop, number, spelling))
        position = stop
    segments += [Segment(position, len(text), None, "")] if position < len(text) else []
    for segment in segments:
        if segment.slot is None:
            rest = _REST.findall(text[segment.start : segment.stop])
            altered |= {int(re.sub(r"\D", "", mark)) for mark in rest}
    return Outline(text, tuple(segments), frozenset(altered))


def _places(text: str, slots: Sequence[Slot]) -> list[tuple[int, int, int, str | None]]:
    """(start, stop, slot, text between the marks) of every placeholder; numbers have no marks."""
    found: list[tuple[int, int, int, str | None]] = [
        (match.start(), match.end(), int(match[1]), match[2]) for match in _PLACEHOLDER.finditer(text)
    ]
    for number, slot in enumerate(slots):
        if not isinstance(slot.value, str):
            shown = str(placeholder_number(number, slot.value))
            found += [(m.start(), m.end(), number, None) for m in re.finditer(re.escape(shown), text)]
    return sorted(found, key=lambda place: place[:2])


def align(outline: Outline, slots: Sequence[Slot], text: str) -> list[int] | int:
    """Find the start of each segment of an outline in the final text, and the end of the last.

    A value may have lost white space at its ends; the template's own text must be equal. If the texts differ,
    returns the number of the first segment that differs.
    """
    starts, position = [], 0
    for index, segment in enumerate(outline.segments):
        starts.append(position)
        if segment.slot is None:
            written = outline.text[segment.start : segment.stop]
            if not text.startswith(written, position):
                return index
            position += len(written)
            continue
        following = _following(outline, index)
        length = _length(slots[segment.slot].value, segment.spelling, text, position, following)
        if length is None:
            return index
        position += length
    return [*starts, position] if position == len(text) else len(outline.segments) - 1


def _following(outline: Outline, index: int) -> str:
    """The template's text directly after a segment."""
    after = outline.segments[index + 1 : index + 2]
    return outline.text[after[0].start : after[0].stop] if after and after[0].slot is None else ""


def _length(value: Any, spelling: str, text: str, position: int, following: str) -> int | None:
    """The number of characters that a value takes at a position."""
    if isinstance(value, str):
        ways = (value, value.rstrip(), value.lstrip(), value.strip())
        ways += (value.strip("\n"), value.lstrip("\n"), value.rstrip("\n"))
        spelt = [SPELLINGS[spelling](way) for way in ways]
    else:
        spelt = [json.dumps(value), str(value)]
    for way in spelt:
        if text.startswith(way, position) and text.startswith(following, position + len(way)):
            return len(way)
    return None


def is_trimmed(outline: Outline, slots: Sequence[Slot], starts: Sequence[int]) -> bool:
    """Whether a text lost white space at an end in the final text."""
    for segment, start, stop in zip(outline.segments, starts, starts[1:], strict=False):
        value = None if segment.slot is None else slots[segment.slot].value
        if isinstance(value, str) and stop - start < len(SPELLINGS[segment.spelling](value)):
            return True
    return False


def place(outline: Outline, starts: Sequence[int], position: int) -> int:
    """Convert a position in the outline (outside placeholders) to the position in the final text."""
    for segment, start in zip(outline.segments, starts, strict=False):
        if segment.slot is None and segment.start <= position <= segment.stop:
            return start + position - segment.start
        if segment.slot is not None and position == segment.start:
            return start
    return starts[-1]
