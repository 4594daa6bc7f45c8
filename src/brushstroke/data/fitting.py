"""Finds the form in which a chat template prints a conversation in full, and the place of each value.

Each shape of conversation is outlined once. For each row, only the final text is rendered and aligned.
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

KEPT = 4096  # cached shapes of conversations; most data has few


class Purpose(NamedTuple):
    """The purpose for which a conversation is written.

    Args:
        ask: a prompt, up to where the next answer begins; otherwise an example.
        split: make an example of each answer.
        past_reasoning: whether the text must contain the reasoning of earlier answers.
        as_trained: end the prompt with the beginning that answers have in training, even if the template's
            own differs.
    """

    ask: bool = False
    split: bool = False
    past_reasoning: bool = True
    as_trained: bool = True


EXAMPLES = (Purpose(),)
SPLIT = (Purpose(split=True), Purpose(split=True, past_reasoning=False))  # templates may remove it by design
QUESTION = (Purpose(ask=True), Purpose(ask=True, past_reasoning=False))
STOCK_QUESTION = tuple(purpose._replace(as_trained=False) for purpose in QUESTION)


@dataclass(frozen=True)
class FittedText:
    """One example of a conversation: its layout, its text, and the start of each segment in it."""

    layout: Layout
    text: str
    starts: list[int]

    def position(self, outlined: int) -> int:
        """Convert a position in the outline to the position in the text."""
        return place(self.layout.outline, self.starts, outlined)


@dataclass(frozen=True)
class Fit:
    """A conversation as the template writes it.

    Args:
        form: the form that was passed to the template.
        changed: the conversation after the changes of the form.
        sketch: the sketch of its messages.
        texts: the text of each example.
        unused: keys of messages that the template does not print.
    """

    form: Form
    changed: Conversation
    sketch: Sketch
    texts: tuple[FittedText, ...]
    unused: tuple[str, ...]

    @property
    def trimmed(self) -> bool:
        """Whether a value lost white space at its ends."""
        return any(
            is_trimmed(fitted.layout.outline, self.sketch.slots, fitted.starts) for fitted in self.texts
        )

    def marks(self, fitted: FittedText) -> list[tuple[str, int, int]]:
        """(role, start, stop) of the message values in one of the texts."""
        used_slots = zip(self.changed.messages, self.sketch.uses, strict=True)
        roles = {slot: message["role"] for message, used in used_slots for slot in used}
        found = zip(fitted.layout.outline.segments, fitted.starts, fitted.starts[1:], strict=False)
        return [(roles[s.slot], start, end) for s, start, end in found if s.slot in roles and end > start]


class Fitter:
    """Finds the forms of conversations for the templates of one tokenizer.

    Args:
        known_markers: the tokenizer's special and other added tokens.
    """

    def __init__(self, known_markers: Sequence[str]) -> None:
        self._known_markers = known_markers
        self._kept: dict[tuple, tuple[tuple[Layout, ...], tuple[str, ...]] | Exception] = {}

    def fit(
        self, template: ChatTemplate, conversation: Conversation, purposes: Sequence[Purpose], where: str
    ) -> Fit:
        """Find the first form that prints a conversation in full, trying the purposes in order.

        Raises:
            DataError: there is no such form, or the template raises an error in all forms.
        """
        failures: list[tuple[int, Exception]] = []
        for purpose, (form, changed) in product(purposes, forms_for(template, conversation)):
            try:
                return _Attempt(template, form, changed, purpose, self._known_markers).fit(self._kept)
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
    """One attempt: a conversation in one form for one purpose."""

    template: ChatTemplate
    form: Form
    changed: Conversation
    purpose: Purpose
    known_markers: Sequence[str]

    def fit(self, kept: dict) -> Fit:
        """Write and verify the conversation; `kept` caches the layouts of conversations of the same shape.

        Raises:
            Unproven: the template loses part of the conversation.
            TemplateRefusal: the template raises an error.
        """
        shape, changed = sketch(self.changed.messages), self.changed
        outlined = json.dumps(
            [shape.messages, changed.tools, dict(changed.options), changed.trained], default=str
        )
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
        except Unproven:  # the template inspects values: outline this conversation with its true values
            return self._aligned(shape, *self._layouts(keep_values=True))

    def _layouts(self, *, keep_values: bool = False) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
        """The layouts of the examples, and the keys of messages that the template does not print."""
        self._refuse_unprinted()
        finder = self._finder(self.changed, keep_values)
        ask, split, past_reasoning, as_trained = self.purpose
        if ask:
            return (finder.question(past_reasoning=past_reasoning, as_trained=as_trained),), ()
        return finder.whole_or_each(split=split, past_reasoning=past_reasoning), finder.unused_keys()

    def _finder(self, changed: Conversation, keep_values: bool = False) -> LayoutFinder:
        return LayoutFinder(
            self.template,
            changed,
            self.form,
            known_markers=self.known_markers,
            opening=opening_of(self.template, self.form),
            repeated=repeated_header(self.template, self.known_markers),
            keep_values=keep_values,
        )

    def _refuse_unprinted(self) -> None:
        """Refuse a form in which contents that are blank in this row would be lost in other rows.

        Raises:
            Unproven: the form does not print such a content.
        """
        blank = {i for i, m in enumerate(self.changed.messages) if not m.get("content", "").strip()}
        blank -= set(self.changed.answers)
        if blank:
            filled = [{**m, "content": "x"} if i in blank else m for i, m in enumerate(self.changed.messages)]
            finder = self._finder(replace(self.changed, messages=tuple(filled)))
            finder.prove_contents(finder.outline(len(filled)))

    def _aligned(self, shape: Sketch, layouts: Sequence[Layout], unused: tuple[str, ...]) -> Fit:
        """Align the final texts with their outlines.

        Raises:
            Unproven: a text differs from its outline with the values inserted.
        """
        texts = []
        for layout in layouts:
            messages = (*self.changed.messages, MADE_UP_ANSWER)[: layout.count]
            text = self.template.render(
                self.form.messages(messages),
                tools=self.form.tools(self.changed.tools),
                options=self.changed.options,
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
        return Fit(self.form, self.changed, shape, tuple(texts), unused)

    def _refuse_second_thoughts(self, fitted: FittedText) -> None:
        """Refuse a form in which the template adds its own reasoning to the row's.

        Raises:
            Unproven: a message has a second reasoning.
        """
        for turn in fitted.layout.turns:
            message = self.changed.messages[turn.message]
            said = message.get("content", "") + message.get("reasoning_content", "")
            written = fitted.text[fitted.position(turn.start) : fitted.position(turn.stop)]
            if any(written.count(tag) > max(1, said.count(tag)) for tag in ("<think>", "</think>")):
                raise Unproven(
                    f"it writes a second reasoning in addition to that of message {turn.message + 1}", 1
                )


def _change(layout: Layout, shape: Sketch, segment: int) -> str:
    """The value near which a text differs from its outline."""
    segments = layout.outline.segments
    near = [s.slot for s in (*segments[segment::-1], *segments[segment:]) if s.slot is not None]
    message = next((i for i, used in enumerate(shape.uses) if near[:1] and near[0] in used), 0)
    return f"it changes what message {message + 1} says, or writes other text where the message says this"
