"""Finds the answers of a conversation in the text of a chat template, and verifies that nothing is lost.

It works on outlines, which are texts with placeholders: each value must be in its place and must be readable
back. It tokenises nothing.
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
    words_after_marker,
)
from brushstroke.data.validate import Message

KNOWN_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", SPLIT)
MADE_UP_ANSWER: Message = {"role": "assistant", "content": "Yes."}
SPLIT_HINT = (
    "; with --split-turns (split_turns=True) every answer becomes a separate example, written as the model "
    "will see it"
)


class Unproven(Exception):
    """A template changes a conversation, so that it cannot be trained.

    Args:
        reason: the reason, for a message.
        proven: how many values were found in the text.
    """

    def __init__(self, reason: str, proven: int = 0) -> None:
        super().__init__(reason)
        self.proven = proven


@dataclass(frozen=True)
class Turn:
    """The answer in a message: text[start:stop] of an outline, and its end marker `end`."""

    message: int
    start: int
    stop: int
    end: str | None


@dataclass(frozen=True)
class Layout:
    """The layout of one example: the outline of the first `count` messages, and the answers in it.

    Args:
        count: number of rendered messages.
        outline: their outline.
        turns: the answers that appear in it as they are generated.
        trained: the messages whose answers are trained in this example.
        cut: the end of a prompt, if its outline contains a test answer after it.
    """

    count: int
    outline: Outline
    turns: tuple[Turn, ...]
    trained: frozenset[int]
    cut: int | None = None


class _Outlines:
    """The outlines of the first messages of a sketch, for each number of messages, rendered once."""

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
        template: the template that renders.
        conversation: the messages; only the placeholders of their values are used.
        form: the form in which the template gets them.
        known_markers: the tokenizer's special and other added tokens.
        opening: the text that the template writes before an answer.
        repeated: the part of it that the template also writes after every answer.
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
        """One layout if the conversation contains every answer as generated; otherwise one per answer.

        Args:
            split: always one per answer.
            past_reasoning: whether the text must contain the reasoning of earlier answers.

        Raises:
            Unproven: the template loses part of the conversation.
        """
        messages = self.conversation.messages
        self.prove_contents(self.outline(len(messages)))
        turns = self._turns()
        learnt = frozenset(turn.message for turn in turns if self.conversation.trained[turn.message])
        whole = Layout(len(messages), self.outline(len(messages)), tuple(turns), learnt)
        fit = self._fitting(whole.outline.text, turns)
        last = len(messages) - 1  # only the last answer can get an end if it has none
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
        """The layout of a prompt: all messages, up to the beginning of the next answer.

        Args:
            past_reasoning: whether the text must contain the reasoning of earlier answers.
            as_trained: end with the beginning that answers have, even if the template's generation prompt
                differs.

        Raises:
            Unproven: the template loses part of the conversation.
        """
        count = len(self.conversation.messages)
        turns = []
        for index in self.conversation.answers:
            try:
                turns.append(self._turn(index))
            except (Unproven, TemplateRefusal):  # rewritten earlier answers need no boundary
                continue
        asked = self.outline(count, ask=True)
        layout = Layout(count, asked, tuple(self._fitting(asked.text, turns)), frozenset())
        self.prove(layout, past_reasoning=past_reasoning)
        return self._as_answered(layout, turns) if as_trained else layout

    def unused_keys(self) -> tuple[str, ...]:
        """Other keys of messages that do not change the template's text."""
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
        """Render messages in this form."""
        return self.template.render(
            self.form.messages(tuple(messages)),
            tools=self.form.tools(self.conversation.tools),
            options=self.conversation.options,
            ask=ask,
        )

    def prove(self, layout: Layout, *, past_reasoning: bool = True) -> None:
        """Check that every value is in its place in the text.

        Raises:
            Unproven: a value is not in its place; names the first.
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
            said = f"{error} once the conversation continues{SPLIT_HINT}"
            raise Unproven(said, len(self.sketch.slots)) from error

    def prove_contents(self, outline: Outline) -> None:
        """Check that everything except answers is in the text.

        Raises:
            Unproven: a value is missing; names the first.
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
        """Whether a value is in the text while its message is the last one."""
        return any(s.slot == slot and self._readable(s) for s in self.outline(index + 1).segments)

    def _turn(self, index: int) -> Turn:
        upto = self.outline(index + 1)
        start = self._start(index, upto)
        filled = self._filled(index)
        stop, end = self._answer_end(index, start, filled)
        after = filled(index + 1).text[stop:]
        if not upto.text.endswith(after) or len(upto.text) - len(after) < start:
            raise Unproven(f"the end of the answer in message {index + 1} cannot be found in its text")
        return Turn(index, start, len(upto.text) - len(after), end)

    def _turns(self) -> list[Turn]:
        """Find the answers; leave out one at the start of the conversation if its beginning cannot be found.

        Raises:
            Unproven: the beginning or end of another answer cannot be found.
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
        """Outlines with placeholders for every part of an answer, so that the text after it can be found."""
        drawn = sketch(self.conversation.messages, keep_values=self.keep_values, filled=(index,))
        if len(drawn.slots) == len(self.sketch.slots):
            return self.outline
        filled = _Outlines(self, drawn)
        try:
            filled(index + 1)
        except TemplateRefusal:
            return self.outline
        return filled

    def _answer_end(self, index: int, start: int, outline: _Outlines) -> tuple[int, str | None]:
        """The end position and end marker of an answer, from the outline in which it is last."""
        upto = outline(index + 1)
        own = [s for s in upto.segments if s.slot in outline.sketch.uses[index] and s.start >= start]
        last = max((s.stop for s in own), default=start)
        is_text = not own or outline.sketch.slots[own[-1].slot or 0].part in ("content", "reasoning")
        whole = upto.text[last:].removesuffix(self.repeated) if self.repeated else upto.text[last:]
        self._refuse_words_after(common_end(outline(index).text, whole) if index else "", upto.text[:last])
        for closing in (self._lasting(index, upto, last, outline)[: len(whole)], whole):
            answer = upto.text[start : last + len(closing)]
            if marker := last_marker(closing, answer, self.known_markers, is_text=is_text):
                return last + marker[0], marker[1]
        return last + len(whole), None

    def _refuse_words_after(self, ending: str, before: str) -> None:
        """Refuse words that the template writes at the end of every conversation, but not between turns.

        Raises:
            Unproven: there are such words.
        """
        words = words_after_marker(ending, self.known_markers)
        if words and ending not in before:
            raise Unproven(f"it writes {words[:40]!r} after every conversation, also after an answer")

    def _start(self, index: int, upto: Outline) -> int:
        own = [s.start for s in upto.segments if s.slot in self.sketch.uses[index]]
        if index == 0:  # templates cannot render a prompt without messages
            first = min(own, default=len(upto.text))
            found = upto.text[:first].rfind(self.opening) if self.opening else -1
            if found >= 0:
                return found + len(self.opening)
        else:
            asked = self.outline(index, ask=True).text
            if upto.text.startswith(asked):
                return len(asked)
            before = max((s.stop for s in self.outline(index).segments if s.slot is not None), default=0)
            first = min((place for place in own if place >= before), default=len(upto.text))
            common = common_opening(asked, upto.text, before, first)
            if common >= before and self.outline(index).text[:before] == upto.text[:before]:
                return self._after_opening(upto.text, common, first)
        raise Unproven(
            f"the beginning of the answer in message {index + 1} cannot be found in its text: it differs "
            "from the generation prompt"
        )

    def _after_opening(self, text: str, start: int, first: int) -> int:
        """The position after the template's opening of an answer, if that precedes the first value."""
        words = self.opening.strip()
        found = text.find(words, start, first) if words else -1
        if found < 0:
            return start
        rest = self.opening[self.opening.index(words) + len(words) :]
        stop = found + len(words)
        return stop + len(rest) if text.startswith(rest, stop) else stop

    def _as_answered(self, layout: Layout, turns: Sequence[Turn]) -> Layout:
        """The prompt as it precedes an answer, if it differs from the template's generation prompt."""
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

    def _lasting(self, index: int, upto: Outline, position: int, outline: _Outlines) -> str:
        """The text after an answer that remains when the conversation continues."""
        try:
            further = outline(index + 1, ask=True).text
        except TemplateRefusal:
            return ""
        goes_on = further[:position] == upto.text[:position]
        return common_start(upto.text[position:], further[position:]) if goes_on else ""

    def _fitting(self, text: str, turns: Sequence[Turn]) -> list[Turn]:
        """The turns up to which the text equals the text in which they were the last."""
        return [turn for turn in turns if text.startswith(self.outline(turn.message + 1).text[: turn.stop])]

    def _readable(self, segment: Segment) -> bool:
        if self.sketch.slots[segment.slot or 0].part in ("content", "reasoning"):
            return segment.spelling == "plain" or ("json" in segment.spelling and not self.form.parts)
        return True

    def _prove_tags(
        self, outline: Outline, index: int, part: str, place: Segment, proven: int, *, past: bool
    ) -> None:
        """Check that reasoning between <think> tags in a content is also between them in the text.

        Empty reasoning of an earlier answer contains nothing that could be lost.
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
            raise Unproven("it writes reasoning without the tags <think> and </think> of the row", proven)

    def _prove_arguments(self, text: str, index: int, proven: int) -> None:
        """Check argument names and values without placeholders; refuse Python's repr of lists."""
        for call in self.conversation.messages[index].get("tool_calls", ()):
            for argument in call["function"]["arguments"].items():
                is_keyword = re.search(
                    rf"(?<!\w){re.escape(argument[0])}=[\[{{]", text
                )  # of a call in Python syntax
                for key, value in _leaves(dict([argument])):
                    spelt = {spell(key) for spell in SPELLINGS.values()}
                    if not any(_stands(name, text) for name in spelt):
                        raise Unproven(
                            f"it does not print the argument {key!r} of message {index + 1}", proven
                        )
                    if not is_keyword and _as_python(spelt, value, text):
                        raise Unproven(
                            f"it prints the arguments of message {index + 1} in Python's repr, not as JSON",
                            proven,
                        )
                    if (value is None or isinstance(value, bool)) and not _follows(text, spelt, value):
                        raise Unproven(
                            f"it does not print the value of {key!r} in message {index + 1}", proven
                        )

    def _prove_tools(self, text: str, proven: int) -> None:
        """Check that the text declares the tools: names, descriptions, and parameter names."""
        for tool in self.conversation.tools:
            function = tool.get("function", tool)
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            declared = [function.get("name"), function.get("description"), *(properties or {})]
            for words in (value.strip() for value in declared if isinstance(value, str)):
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
            return f"it prints {whose} differently than the row has it"
        return f"it prints {whose} outside of its turn" if found else f"it does not print {whose}"


def _leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of every argument, at any depth."""
    for key, value in arguments.items():
        yield key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _leaves(inner)


def _stands(name: str, text: str) -> bool:
    """Whether a text contains a name as a separate word."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _as_python(names: Collection[str], value: Any, text: str) -> bool:
    """Whether an object with one of these names, or this list, is written in Python's repr."""
    if any(f"{sign}'{name}': " in text for name in names for sign in ("{", ", ")):
        return True
    if not isinstance(value, list):
        return False
    spelled = repr(value)
    return (spelled != json.dumps(value) and spelled in text) or re.search(r"[\[,] ?'Qz", text) is not None


def _follows(text: str, names: Collection[str], value: Any) -> bool:
    """Whether a boolean or null follows the name of its argument, in JSON's or Python's spelling."""
    words = (json.dumps(value), str(value))
    return any(
        word in text[text.find(name) + len(name) :] for name in names if name in text for word in words
    )
