"""Finds the form of a conversation in which a chat template prints all of it, and where each value then
stands.

Shapes of conversations are outlined once; of each row only the true text is rendered and aligned.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from brushstroke.data.forms import Form
from brushstroke.data.layout import MADE_UP_ANSWER, Layout, LayoutFinder, Unproven
from brushstroke.data.messages import Conversation
from brushstroke.data.outline import Sketch, align, is_trimmed, place, sketch
from brushstroke.data.probe_answers import forms_for, opening_of, repeated_header
from brushstroke.data.template import ChatTemplate, TemplateRefusal
from brushstroke.errors import DataError

KEPT = 4096  # shapes of conversations that are remembered: most data has few


class Purpose(NamedTuple):
    """What a conversation is written for.

    Args:
        ask: a question, up to where the next answer begins; else an example.
        split: an example for each answer.
        past_reasoning: whether the reasoning of earlier answers must be in the text.
        as_trained: ask with what answers begin with in training, also where the template asks otherwise.
    """

    ask: bool = False
    split: bool = False
    past_reasoning: bool = True
    as_trained: bool = True


EXAMPLES = (Purpose(),)
SPLIT = (Purpose(split=True), Purpose(split=True, past_reasoning=False))  # templates may drop it by design
QUESTION = (Purpose(ask=True), Purpose(ask=True, past_reasoning=False))
STOCK_QUESTION = tuple(purpose._replace(as_trained=False) for purpose in QUESTION)


@dataclass(frozen=True)
class FittedText:
    """One example of a conversation: its layout, the true text, and where each segment begins in it."""

    layout: Layout
    text: str
    starts: list[int]

    def position(self, outlined: int) -> int:
        """The position in the text of a position in the outline."""
        return place(self.layout.outline, self.starts, outlined)


@dataclass(frozen=True)
class Fit:
    """How a conversation stands in the text of a template.

    Args:
        form: how it was handed to the template.
        told: the conversation that was written, after what the form changed.
        sketch: of its messages.
        texts: for each example.
        unused: keys of messages that the template does not print.
    """

    form: Form
    told: Conversation
    sketch: Sketch
    texts: tuple[FittedText, ...]
    unused: tuple[str, ...]

    @property
    def trimmed(self) -> bool:
        """Whether a value has lost white space at its ends."""
        return any(
            is_trimmed(fitted.layout.outline, self.sketch.slots, fitted.starts) for fitted in self.texts
        )

    def marks(self, fitted: FittedText) -> list[tuple[str, int, int]]:
        """(role, start, stop) of the values of messages in one of the texts."""
        told = zip(self.told.messages, self.sketch.uses, strict=True)
        roles = {slot: message["role"] for message, used in told for slot in used}
        found = zip(fitted.layout.outline.segments, fitted.starts, fitted.starts[1:], strict=False)
        return [(roles[s.slot], start, end) for s, start, end in found if s.slot in roles and end > start]


class Fitter:
    """Fits conversations to the templates of one tokenizer.

    Args:
        known_markers: the tokenizer's special and other added tokens.
    """

    def __init__(self, known_markers: Sequence[str]) -> None:
        self._known_markers = known_markers
        self._kept: dict[tuple, tuple[tuple[Layout, ...], tuple[str, ...]] | Exception] = {}

    def fit(
        self, template: ChatTemplate, conversation: Conversation, purposes: Sequence[Purpose], where: str
    ) -> Fit:
        """The first form in which the template prints all of a conversation, purpose by purpose.

        Raises:
            DataError: in no form it does, or it raises an error in all of them.
        """
        failures: list[tuple[int, Exception]] = []
        for purpose, (form, told) in product(purposes, forms_for(template, conversation)):
            try:
                return _Attempt(template, form, told, purpose, self._known_markers).fit(self._kept)
            except (Unproven, TemplateRefusal) as error:
                failures.append((getattr(error, "proven", -1), error))
        error = max(failures, key=lambda failure: failure[0])[1]
        refuses = isinstance(error, TemplateRefusal)
        said = f"refuses this conversation ({error})" if refuses else f"cannot write this row: {error}"
        raise DataError(
            f"{where}: the chat template {said}; change the row, or use another template (--chat-template)"
        ) from error


@dataclass(frozen=True)
class _Attempt:
    """A conversation, written in one form for one purpose."""

    template: ChatTemplate
    form: Form
    told: Conversation
    purpose: Purpose
    known_markers: Sequence[str]

    def fit(self, kept: dict) -> Fit:
        """The fit; `kept` remembers the layouts of conversations of the same shape.

        Raises:
            Unproven: the template loses something.
            TemplateRefusal: it raises an error.
        """
        shape, told = sketch(self.told.messages), self.told
        outlined = json.dumps([shape.messages, told.tools, dict(told.options), told.trained], default=str)
        key = (self.template.source, self.form, self.purpose, outlined)
        if key not in kept:
            if len(kept) >= KEPT:
                kept.clear()
            try:
                kept[key] = self._layouts()
            except (Unproven, TemplateRefusal) as error:
                kept[key] = error
        if isinstance(kept[key], Exception):
            raise kept[key]
        try:
            return self._aligned(shape, *kept[key])
        except Unproven:  # the template looks into values: outline this conversation with its own
            return self._aligned(shape, *self._layouts(keep_values=True))

    def _layouts(self, *, keep_values: bool = False) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
        """The examples, and the keys of messages that the template does not print."""
        self._refuse_unprinted()
        finder = self._finder(self.told, keep_values)
        ask, split, past_reasoning, as_trained = self.purpose
        if ask:
            return (finder.question(past_reasoning=past_reasoning, as_trained=as_trained),), ()
        return finder.whole_or_each(split=split, past_reasoning=past_reasoning), finder.unused_keys()

    def _finder(self, told: Conversation, keep_values: bool = False) -> LayoutFinder:
        return LayoutFinder(
            self.template,
            told,
            self.form,
            known_markers=self.known_markers,
            opening=opening_of(self.template, self.form),
            repeated=repeated_header(self.template, self.known_markers),
            keep_values=keep_values,
        )

    def _refuse_unprinted(self) -> None:
        """Refuse a form in which contents that are blank here would be lost if they were not.

        Raises:
            Unproven: the form does not print the content of such a message.
        """
        blank = {i for i, m in enumerate(self.told.messages) if not m.get("content", "").strip()}
        blank -= set(self.told.answers)
        if blank:
            filled = [{**m, "content": "x"} if i in blank else m for i, m in enumerate(self.told.messages)]
            finder = self._finder(replace(self.told, messages=tuple(filled)))
            finder.prove_contents(finder.outline(len(filled)))

    def _aligned(self, shape: Sketch, layouts: Sequence[Layout], unused: tuple[str, ...]) -> Fit:
        """The true texts beside their outlines.

        Raises:
            Unproven: a text is not its outline with the values in place of the placeholders.
        """
        texts = []
        for layout in layouts:
            messages = (*self.told.messages, MADE_UP_ANSWER)[: layout.count]
            text = self.template.render(
                self.form.messages(messages),
                tools=self.form.tools(self.told.tools),
                options=self.told.options,
                ask=self.purpose.ask and layout.cut is None,
            )
            slots = shape.slots if layout.cut is None else sketch(messages).slots
            starts = align(layout.outline, slots, text)
            if isinstance(starts, int):
                raise Unproven(_change(layout, shape, starts), 1)
            if layout.cut is not None:
                text = text[: place(layout.outline, starts, layout.cut)]
            fitted = FittedText(layout, text, starts)
            self._refuse_second_thoughts(fitted)
            texts.append(fitted)
        return Fit(self.form, self.told, shape, tuple(texts), unused)

    def _refuse_second_thoughts(self, fitted: FittedText) -> None:
        """Refuse a form in which the template writes a thought of its own beside the row's.

        Raises:
            Unproven: naming the message.
        """
        for turn in fitted.layout.turns:
            message = self.told.messages[turn.message]
            said = message.get("content", "") + message.get("reasoning_content", "")
            written = fitted.text[fitted.position(turn.start) : fitted.position(turn.stop)]
            if any(written.count(tag) > max(1, said.count(tag)) for tag in ("<think>", "</think>")):
                raise Unproven(f"it writes a second thought beside the one in message {turn.message + 1}", 1)


def _change(layout: Layout, shape: Sketch, segment: int) -> str:
    """Near which value a text departs from its outline."""
    segments = layout.outline.segments
    near = [s.slot for s in (*segments[segment::-1], *segments[segment:]) if s.slot is not None]
    message = next((i for i, used in enumerate(shape.uses) if near[:1] and near[0] in used), 0)
    return f"it changes what message {message + 1} says, or writes other text where the message says this"
