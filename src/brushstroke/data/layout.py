"""Where the answers of a conversation stand in the text of a chat template, and the proof that nothing is
lost.

Everything is found on outlines, texts with placeholders: each value must stand where it should, spelt so that
it can be read back. It tokenises nothing.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brushstroke.data.forms import Form
from brushstroke.data.messages import SPLIT, Conversation
from brushstroke.data.outline import SPELLINGS, Outline, Segment, Sketch, read_outline, sketch
from brushstroke.data.template import (
    ChatTemplate,
    TemplateRefusal,
    common_end,
    common_opening,
    common_start,
    last_marker,
    words_behind_marker,
)
from brushstroke.data.validate import Message

KNOWN_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", SPLIT)
MADE_UP_ANSWER: Message = {"role": "assistant", "content": "Yes."}
SPLIT_HINT = (
    "; with --split-turns (split_turns=True) every answer becomes an example of its own, written as the "
    "model will see it"
)


class Unproven(Exception):
    """What a template does with a conversation, so that it cannot be trained.

    Args:
        reason: in words.
        proven: how many values did stand in the text.
    """

    def __init__(self, reason: str, proven: int = 0) -> None:
        super().__init__(reason)
        self.proven = proven


@dataclass(frozen=True)
class Turn:
    """The answer of a message: text[start:stop] of an outline, with `end`, the marker that ends it."""

    message: int
    start: int
    stop: int
    end: str | None


@dataclass(frozen=True)
class Layout:
    """One example: the first `count` messages as an outline, and the answers in it.

    Args:
        count: messages that are rendered.
        outline: of them.
        turns: the answers that stand in it as they were generated.
        trained: the messages whose answers are learnt in this example.
        cut: where a question ends, if its outline has a made-up answer behind it.
    """

    count: int
    outline: Outline
    turns: tuple[Turn, ...]
    trained: frozenset[int]
    cut: int | None = None


class _Outlines:
    """The outlines of the beginnings of one sketch, each rendered once."""

    def __init__(self, finder: "LayoutFinder", drawn: Sketch) -> None:
        self.finder, self.sketch = finder, drawn
        self._made: dict[tuple[int, bool], Outline] = {}

    def __call__(self, count: int, *, ask: bool = False) -> Outline:
        if (count, ask) not in self._made:
            text = self.finder.render(self.sketch.messages[:count], ask=ask)
            slots = self.sketch.slots
            self._made[count, ask] = read_outline(text, slots, keep_values=self.finder.keep_values)
        return self._made[count, ask]


class LayoutFinder:
    """Finds the layouts of one conversation in one form.

    Args:
        template: renders.
        conversation: the messages; of their values only the placeholders play a part.
        form: how the template is given them.
        known_markers: the tokenizer's special and other added tokens.
        opening: what the template writes before an answer.
        repeated: the part of it that the template writes behind every answer too.
        keep_values: see `sketch`.
    """

    def __init__(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        form: Form,
        *,
        known_markers: Sequence[str] = (),
        opening: str = "",
        repeated: str = "",
        keep_values: bool = False,
    ) -> None:
        self.template, self.conversation, self.form = template, conversation, form
        self.known_markers, self.opening, self.repeated = known_markers, opening, repeated
        self.keep_values = keep_values
        self.sketch: Sketch = sketch(conversation.messages, keep_values=keep_values)
        self.outline = _Outlines(self, self.sketch)

    def whole_or_each(self, *, split: bool = False, past_reasoning: bool = True) -> tuple[Layout, ...]:
        """One layout where the whole conversation shows every answer as it was generated; else one for each.

        Args:
            split: one for each answer always.
            past_reasoning: whether the reasoning of earlier answers must be in the text.

        Raises:
            Unproven: the template loses something.
        """
        messages = self.conversation.messages
        self.prove_contents(self.outline(len(messages)))
        turns = self._turns()
        learnt = frozenset(turn.message for turn in turns if self.conversation.trained[turn.message])
        whole = Layout(len(messages), self.outline(len(messages)), tuple(turns), learnt)
        fit = self._fitting(whole.outline.text, turns)
        last = len(messages) - 1  # only there an end can be added to an answer that has none
        ended = all(t.end is not None or t.message not in learnt or t.message == last for t in turns)
        if len(fit) == len(turns) and ended and not (split and turns):
            self.prove(whole)
            return (whole,)
        layouts = []
        for turn in turns:
            if turn.message not in learnt:
                continue
            outline = self.outline(turn.message + 1)
            shown = tuple(self._fitting(outline.text, turns[: turns.index(turn) + 1]))
            layouts.append(Layout(turn.message + 1, outline, shown, frozenset({turn.message})))
        self._prove_each(layouts, past_reasoning)
        return tuple(layouts)

    def question(self, *, past_reasoning: bool = True, as_trained: bool = True) -> Layout:
        """The layout of a prompt: all messages, up to where the next answer begins.

        Args:
            past_reasoning: whether the reasoning of earlier answers must be in the text.
            as_trained: end with what an answer begins with, also where the template asks otherwise.

        Raises:
            Unproven: the template loses something.
        """
        count = len(self.conversation.messages)
        turns = []
        for index in self.conversation.answers:
            try:
                turns.append(self._turn(index))
            except (Unproven, TemplateRefusal):  # a rewritten past needs no boundary
                continue
        asked = self.outline(count, ask=True)
        layout = Layout(count, asked, tuple(self._fitting(asked.text, turns)), frozenset())
        self.prove(layout, past_reasoning=past_reasoning)
        return self._as_answered(layout, turns) if as_trained else layout

    def unused_keys(self) -> tuple[str, ...]:
        """Further keys of messages without which the template writes the same text."""
        messages = self.sketch.messages
        further = dict.fromkeys(
            key
            for message in messages
            for key in message
            if key not in KNOWN_KEYS and not (key == "name" and message["role"] == "tool")
        )
        text = self.outline(len(messages)).text
        unused = []
        for key in further:
            without = [{k: v for k, v in message.items() if k != key} for message in messages]
            try:
                unused += [key] if self.render(without) == text else []
            except TemplateRefusal:
                continue
        return tuple(unused)

    def render(self, messages: Sequence, *, ask: bool = False) -> str:
        """Messages as the template writes them in this form."""
        return self.template.render(
            self.form.messages(tuple(messages)),
            tools=self.form.tools(self.conversation.tools),
            options=self.conversation.options,
            ask=ask,
        )

    def prove(self, layout: Layout, *, past_reasoning: bool = True) -> None:
        """Check that every value stands in the text where it should.

        Raises:
            Unproven: with the first one that does not.
        """
        regions = {turn.message: (turn.start, turn.stop) for turn in layout.turns}
        proven = 0
        for index in range(layout.count):
            past = index not in layout.trained
            start, stop = regions.get(index, (0, len(layout.outline.text)))
            places = layout.outline.between(start, stop)
            for slot in dict.fromkeys(self.sketch.uses[index]):
                part = self.sketch.slots[slot].part
                if part == "other" or (part == "name" and not self._is_answer(index)):
                    continue
                if (
                    part == "reasoning"
                    and past
                    and not past_reasoning
                    and self._printed_at_first(index, slot)
                ):
                    continue
                found = [s for s in places if s.slot == slot and self._readable(s)]
                if not self._is_answer(index):
                    found = [s for s in found if not any(a <= s.start < b for a, b in regions.values())]
                if len(found) < self.sketch.uses[index].count(slot):
                    raise Unproven(self._loss(layout, index, slot, part), proven)
                self._prove_tags(layout.outline, index, part, found[0], proven, past=past)
                proven += 1
            self._prove_arguments(layout.outline.text[start:stop], index, proven)
        self._prove_tools(layout.outline.text, proven)

    def _prove_each(self, layouts: Sequence[Layout], past_reasoning: bool) -> None:
        for layout in layouts:
            self.prove(layout, past_reasoning=False)
        try:
            for layout in layouts if past_reasoning else ():
                self.prove(layout)
        except Unproven as error:
            said = f"{error} once the conversation goes on{SPLIT_HINT}"
            raise Unproven(said, len(self.sketch.slots)) from error

    def prove_contents(self, outline: Outline) -> None:
        """Check that what is no answer is in the text at all, whatever becomes of the answers.

        Raises:
            Unproven: with the first one that is not.
        """
        printed = {segment.slot for segment in outline.segments} | outline.altered
        for index, message in enumerate(self.conversation.messages):
            for slot in self.sketch.uses[index]:
                part = self.sketch.slots[slot].part
                if part == "content" and not self._is_answer(index) and slot not in printed:
                    raise Unproven(
                        f"it does not print the content of message {index + 1} ({message['role']})"
                    )

    def _is_answer(self, index: int) -> bool:
        return self.conversation.messages[index]["role"] == "assistant"

    def _printed_at_first(self, index: int, slot: int) -> bool:
        """Whether a value is in the text as long as its message is the last one."""
        return any(s.slot == slot and self._readable(s) for s in self.outline(index + 1).segments)

    def _turn(self, index: int) -> Turn:
        alone = self.outline(index + 1)
        start = self._start(index, alone)
        filled = self._filled(index)
        stop, end = self._end(index, start, filled)
        behind = filled(index + 1).text[stop:]
        if not alone.text.endswith(behind) or len(alone.text) - len(behind) < start:
            raise Unproven(f"its text does not tell where the answer in message {index + 1} ends")
        return Turn(index, start, len(alone.text) - len(behind), end)

    def _turns(self) -> list[Turn]:
        """The answers; one that opens the conversation is left out where nothing tells where it begins.

        Raises:
            Unproven: the text does not tell where another answer begins or ends.
        """
        turns, learnt = [], [i for i in self.conversation.answers if self.conversation.trained[i]]
        for index in self.conversation.answers:
            try:
                turns.append(self._turn(index))
            except Unproven:
                if index or learnt == [0]:
                    raise
        return turns

    def _filled(self, index: int) -> _Outlines:
        """Outlines in which every part of an answer has a placeholder: what follows it can be told."""
        drawn = sketch(self.conversation.messages, keep_values=self.keep_values, filled=(index,))
        if len(drawn.slots) == len(self.sketch.slots):
            return self.outline
        filled = _Outlines(self, drawn)
        try:
            filled(index + 1)
        except TemplateRefusal:
            return self.outline
        return filled

    def _end(self, index: int, start: int, outline: _Outlines) -> tuple[int, str | None]:
        """Where an answer ends in the outline that ends with it, and with which marker."""
        alone = outline(index + 1)
        own = [s for s in alone.segments if s.slot in outline.sketch.uses[index] and s.start >= start]
        last = max((s.stop for s in own), default=start)
        is_text = not own or outline.sketch.slots[own[-1].slot or 0].part in ("content", "reasoning")
        whole = alone.text[last:].removesuffix(self.repeated) if self.repeated else alone.text[last:]
        self._refuse_words_behind(common_end(outline(index).text, whole) if index else "", alone.text[:last])
        for closing in (self._lasting(index, alone, last, outline)[: len(whole)], whole):
            answer = alone.text[start : last + len(closing)]
            if marker := last_marker(closing, answer, self.known_markers, is_text=is_text):
                return last + marker[0], marker[1]
        return last + len(whole), None

    def _refuse_words_behind(self, ending: str, before: str) -> None:
        """Refuse words at the end of a conversation, whoever spoke last, that do not stand between turns.

        Raises:
            Unproven: naming them.
        """
        words = words_behind_marker(ending, self.known_markers)
        if words and ending not in before:
            raise Unproven(f"it writes {words[:40]!r} behind every conversation, the answer too")

    def _start(self, index: int, alone: Outline) -> int:
        own = [s.start for s in alone.segments if s.slot in self.sketch.uses[index]]
        if index == 0:  # no template can be asked for a prompt of no messages
            first = min(own, default=len(alone.text))
            found = alone.text[:first].rfind(self.opening) if self.opening else -1
            if found >= 0:
                return found + len(self.opening)
        else:
            asked = self.outline(index, ask=True).text
            if alone.text.startswith(asked):
                return len(asked)
            before = max((s.stop for s in self.outline(index).segments if s.slot is not None), default=0)
            first = min((place for place in own if place >= before), default=len(alone.text))
            common = common_opening(asked, alone.text, before, first)
            if common >= before and self.outline(index).text[:before] == alone.text[:before]:
                return self._behind_opening(alone.text, common, first)
        raise Unproven(
            f"its text does not tell where the answer in message {index + 1} begins: what it writes before "
            "an answer is not what it asks with"
        )

    def _behind_opening(self, text: str, start: int, first: int) -> int:
        """Past the words that the template opens an answer with, if they stand before its first value."""
        words = self.opening.strip()
        found = text.find(words, start, first) if words else -1
        if found < 0:
            return start
        rest = self.opening[self.opening.index(words) + len(words) :]
        stop = found + len(words)
        return stop + len(rest) if text.startswith(rest, stop) else stop

    def _as_answered(self, layout: Layout, turns: Sequence[Turn]) -> Layout:
        """A question as it stands before an answer, if that is not how the template asks."""
        longer = replace(
            self.conversation,
            messages=(*self.conversation.messages, MADE_UP_ANSWER),
            trained=(*self.conversation.trained, False),
        )
        finder = LayoutFinder(
            self.template,
            longer,
            self.form,
            known_markers=self.known_markers,
            opening=self.opening,
            keep_values=self.keep_values,
        )
        try:
            outline = finder.outline(layout.count + 1)
            if outline.text.startswith(layout.outline.text):
                return layout
            start = finder._start(layout.count, outline)
        except (Unproven, TemplateRefusal):
            return layout
        shown = tuple(self._fitting(outline.text[:start], turns))
        return Layout(layout.count + 1, outline, shown, frozenset(), cut=start)

    def _lasting(self, index: int, alone: Outline, position: int, outline: _Outlines) -> str:
        """What stands behind an answer also when the conversation goes on."""
        try:
            further = outline(index + 1, ask=True).text
        except TemplateRefusal:
            return ""
        goes_on = further[:position] == alone.text[:position]
        return common_start(alone.text[position:], further[position:]) if goes_on else ""

    def _fitting(self, text: str, turns: Sequence[Turn]) -> list[Turn]:
        """The turns up to which a text is the same as when they were the last one."""
        return [turn for turn in turns if text.startswith(self.outline(turn.message + 1).text[: turn.stop])]

    def _readable(self, segment: Segment) -> bool:
        if self.sketch.slots[segment.slot or 0].part in ("content", "reasoning"):
            return segment.spelling == "plain" or ("json" in segment.spelling and not self.form.parts)
        return True

    def _prove_tags(
        self, outline: Outline, index: int, part: str, place: Segment, proven: int, *, past: bool
    ) -> None:
        """Check that a thought that was between <think> tags in a content is between them in the text.

        An empty one holds nothing that could be lost of an answer that is past.
        """
        message = self.conversation.messages[index]
        if not message.get(SPLIT):
            return
        before, after = outline.text[: place.start].rstrip(), outline.text[place.stop :].lstrip()
        if part == "reasoning" and self.form.thoughts == "tagged":
            kept = before.endswith("<think>") and after.startswith("</think>")
        elif part == "content" and "reasoning_content" not in message and not past:
            kept = re.search(r"<think>\s*</think>\Z", before) is not None
        else:
            return
        if not kept:
            raise Unproven(
                "it writes a thought without the tags <think> and </think> that the row has", proven
            )

    def _prove_arguments(self, text: str, index: int, proven: int) -> None:
        """Check names of arguments, and values without a placeholder; no list or object as Python's repr."""
        for call in self.conversation.messages[index].get("tool_calls", ()):
            for argument in call["function"]["arguments"].items():
                is_keyword = re.search(
                    rf"(?<!\w){re.escape(argument[0])}=[\[{{]", text
                )  # of a call in Python
                for key, value in _leaves(dict([argument])):
                    spelt = {spell(key) for spell in SPELLINGS.values()}
                    if not any(_stands(name, text) for name in spelt):
                        raise Unproven(
                            f"it does not print the argument {key!r} of message {index + 1}", proven
                        )
                    if not is_keyword and _as_python(spelt, value, text):
                        raise Unproven(
                            f"it prints the arguments of message {index + 1} as Python writes them", proven
                        )
                    if (value is None or isinstance(value, bool)) and not _follows(text, spelt, value):
                        raise Unproven(
                            f"it does not print the value of {key!r} in message {index + 1}", proven
                        )

    def _prove_tools(self, text: str, proven: int) -> None:
        """Check that tools are declared in the text: names, descriptions, and names of parameters."""
        for tool in self.conversation.tools:
            function = tool.get("function", tool)
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            told = [function.get("name"), function.get("description"), *(properties or {})]
            for words in (value.strip() for value in told if isinstance(value, str)):
                if not any(spell(words) in text for spell in SPELLINGS.values()):
                    raise Unproven(f"it does not print the tools ({words[:40]!r} is not in its text)", proven)

    def _loss(self, layout: Layout, index: int, slot: int, part: str) -> str:
        what = {
            "content": "the content",
            "reasoning": "the reasoning",
            "name": "the tool call",
            "argument": "an argument of the tool call",
        }[part]
        whose = f"{what} of message {index + 1} ({self.conversation.messages[index]['role']})"
        found = [s for s in layout.outline.segments if s.slot == slot]
        if slot in layout.outline.altered or any(not self._readable(s) for s in found):
            return f"it prints {whose} in another form than the row has"
        return f"it prints {whose} elsewhere than in its turn" if found else f"it does not print {whose}"


def _leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of every argument, at any depth."""
    for key, value in arguments.items():
        yield key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _leaves(inner)


def _stands(name: str, text: str) -> bool:
    """Whether a name stands in a text as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _as_python(names: Collection[str], value: Any, text: str) -> bool:
    """Whether an object with one of these names, or this list, is written as Python's repr."""
    if any(f"{sign}'{name}': " in text for name in names for sign in ("{", ", ")):
        return True
    if not isinstance(value, list):
        return False
    told = repr(value)
    return (told != json.dumps(value) and told in text) or re.search(r"[\[,] ?'Qz", text) is not None


def _follows(text: str, names: Collection[str], value: Any) -> bool:
    """Whether a truth value or null stands behind the name of its argument, as JSON or Python write it."""
    words = (json.dumps(value), str(value))
    return any(
        word in text[text.find(name) + len(name) :] for name in names if name in text for word in words
    )
