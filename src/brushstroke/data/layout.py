"""Where the answers of a conversation stand in the text of a chat template, and the proof that nothing is
lost.

Everything is found on outlines, texts with placeholders: each value must stand where it should, spelt so that
it can be read back. It tokenises nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from brushstroke.data.forms import Form
from brushstroke.data.messages import Conversation
from brushstroke.data.outline import SPELLINGS, Outline, Segment, Sketch, read_outline, sketch
from brushstroke.data.template import ChatTemplate, TemplateRefusal, common_start, last_marker

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
    """

    count: int
    outline: Outline
    turns: tuple[Turn, ...]
    trained: frozenset[int]


class LayoutFinder:
    """Finds the layouts of one conversation in one form.

    Args:
        template: renders.
        conversation: the messages; of their values only the placeholders play a part.
        form: how the template is given them.
        known_markers: the tokenizer's special and other added tokens.
        opening: what the template writes before an answer, for conversations that begin with one.
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
        keep_values: bool = False,
    ) -> None:
        self.template, self.conversation, self.form = template, conversation, form
        self.known_markers, self.opening, self.keep_values = known_markers, opening, keep_values
        self.sketch: Sketch = sketch(conversation.messages, keep_values=keep_values)
        self._outlines: dict[tuple[int, bool], Outline] = {}

    def whole_or_each(self, *, split: bool = False, past_reasoning: bool = True) -> tuple[Layout, ...]:
        """One layout where the whole conversation shows every answer as it was generated; else one for each
        answer.

        Args:
            split: one for each answer always.
            past_reasoning: whether the reasoning of earlier answers must be in the text.

        Raises:
            Unproven: the template loses something.
        """
        messages = self.conversation.messages
        turns = [self._turn(index) for index in self.conversation.answers]
        learnt = frozenset(i for i in self.conversation.answers if self.conversation.trained[i])
        whole = Layout(len(messages), self.outline(len(messages)), tuple(turns), learnt)
        fit = self._fitting(whole.outline.text, turns)
        ended = all(turn.end is not None or turn.message not in learnt for turn in turns[:-1])
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

    def question(self, *, past_reasoning: bool = True) -> Layout:
        """The layout of a prompt: all messages, up to where the next answer begins.

        Raises:
            Unproven: the template loses something.
        """
        count = len(self.conversation.messages)
        asked = self.outline(count, ask=True)
        turns = []
        for index in self.conversation.answers:
            try:
                turns.append(self._turn(index))
            except (Unproven, TemplateRefusal):  # a rewritten past needs no boundary
                continue
        layout = Layout(count, asked, tuple(self._fitting(asked.text, turns)), frozenset())
        self.prove(layout, past_reasoning=past_reasoning)
        return layout

    def unused_keys(self) -> tuple[str, ...]:
        """Further keys of messages without which the template writes the same text."""
        messages = self.sketch.messages
        known = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
        further = dict.fromkeys(key for message in messages for key in message if key not in known)
        text = self.outline(len(messages)).text
        unused = []
        for key in further:
            without = [{k: v for k, v in message.items() if k != key} for message in messages]
            try:
                unused += [key] if self.render(without) == text else []
            except TemplateRefusal:
                continue
        return tuple(unused)

    def outline(self, count: int, *, ask: bool = False) -> Outline:
        """The first messages as an outline.

        Raises:
            TemplateRefusal: the template raises an error.
        """
        if (count, ask) not in self._outlines:
            text = self.render(self.sketch.messages[:count], ask=ask)
            self._outlines[count, ask] = read_outline(text, self.sketch.slots, keep_values=self.keep_values)
        return self._outlines[count, ask]

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
                if part == "other" or (
                    part == "name" and self.conversation.messages[index]["role"] != "assistant"
                ):
                    continue
                if part == "reasoning" and past and not past_reasoning:
                    continue
                found = [s for s in places if s.slot == slot and self._readable(s)]
                if self.conversation.messages[index]["role"] != "assistant":
                    found = [s for s in found if not any(a <= s.start < b for a, b in regions.values())]
                if len(found) < self.sketch.uses[index].count(slot):
                    raise Unproven(self._loss(layout, index, slot, part), proven)
                if part == "reasoning" and self.form.thoughts == "tagged":
                    self._prove_tags(layout.outline, found[0], proven)
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

    def _turn(self, index: int) -> Turn:
        alone = self.outline(index + 1)
        start = self._start(index, alone)
        own = [s for s in alone.segments if s.slot in self.sketch.uses[index] and s.start >= start]
        last = max((s.stop for s in own), default=start)
        is_text = not own or self.sketch.slots[own[-1].slot or 0].part in ("content", "reasoning")
        for closing in (self._lasting(index, alone, last), alone.text[last:]):
            answer = alone.text[start : last + len(closing)]
            if marker := last_marker(closing, answer, self.known_markers, is_text=is_text):
                return Turn(index, start, last + marker[0], marker[1])
        return Turn(index, start, len(alone.text), None)

    def _start(self, index: int, alone: Outline) -> int:
        if index == 0:  # no template can be asked for a prompt of no messages
            first = next((s.start for s in alone.segments if s.slot is not None), len(alone.text))
            found = alone.text[:first].rfind(self.opening) if self.opening else -1
            if found >= 0:
                return found + len(self.opening)
        else:
            asked = self.outline(index, ask=True).text
            if alone.text.startswith(asked):
                return len(asked)
        raise Unproven(
            f"its text does not tell where the answer in message {index + 1} begins: what it writes before "
            "an answer is not what it asks with"
        )

    def _lasting(self, index: int, alone: Outline, position: int) -> str:
        """What stands behind an answer also when the conversation goes on."""
        try:
            further = self.outline(index + 1, ask=True).text
        except TemplateRefusal:
            return ""
        return (
            common_start(alone.text[position:], further[position:])
            if further[:position] == alone.text[:position]
            else ""
        )

    def _fitting(self, text: str, turns: Sequence[Turn]) -> list[Turn]:
        """The turns up to which a text is the same as when they were the last one."""
        return [turn for turn in turns if text.startswith(self.outline(turn.message + 1).text[: turn.stop])]

    def _readable(self, segment: Segment) -> bool:
        if self.sketch.slots[segment.slot or 0].part in ("content", "reasoning"):
            return segment.spelling == "plain" or ("json" in segment.spelling and not self.form.parts)
        return True

    def _prove_tags(self, outline: Outline, place: Segment, proven: int) -> None:
        """Check that reasoning that was between <think> tags in a content is between them in the text."""
        before, after = outline.text[: place.start].rstrip(), outline.text[place.stop :].lstrip()
        if not (before.endswith("<think>") and after.startswith("</think>")):
            raise Unproven(
                "it writes reasoning without the tags <think> and </think> that the row has", proven
            )

    def _prove_arguments(self, text: str, index: int, proven: int) -> None:
        """Check the names of arguments, and that an object is not printed as Python writes it."""
        for call in self.conversation.messages[index].get("tool_calls", ()):
            for key in call["function"]["arguments"]:
                if key not in text:
                    raise Unproven(f"it does not print the argument {key!r} of message {index + 1}", proven)
                if f"{{'{key}': " in text or f", '{key}': " in text:
                    raise Unproven(
                        f"it prints the arguments of message {index + 1} as Python writes them", proven
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
