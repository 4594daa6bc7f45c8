"""Finds the form of a conversation in which a chat template prints all of it, and where each value then
stands.

Shapes of conversations are outlined once; of each row only the true text is rendered and aligned.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from brushstroke.data.forms import Form
from brushstroke.data.layout import Layout, LayoutFinder, Unproven
from brushstroke.data.messages import Conversation
from brushstroke.data.outline import Sketch, align, is_trimmed, place, sketch
from brushstroke.data.probe_answers import forms_for, opening_of
from brushstroke.data.template import ChatTemplate, TemplateRefusal
from brushstroke.errors import DataError

KEPT = 4096  # shapes of conversations that are remembered: most data has few


class Purpose(NamedTuple):
    """What a conversation is written for.

    Args:
        ask: a question, up to where the next answer begins; else an example.
        split: an example for each answer.
        past_reasoning: whether the reasoning of earlier answers must be in the text.
    """

    ask: bool = False
    split: bool = False
    past_reasoning: bool = True


EXAMPLES = (Purpose(),)
SPLIT = (Purpose(split=True), Purpose(split=True, past_reasoning=False))  # templates may drop it by design
QUESTION = (Purpose(ask=True), Purpose(ask=True, past_reasoning=False))


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
        return [(roles[s.slot], start, end) for s, start, end in found if s.slot is not None and end > start]


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
        begins_answered = self.told.messages[0]["role"] == "assistant"
        finder = LayoutFinder(
            self.template,
            self.told,
            self.form,
            known_markers=self.known_markers,
            opening=opening_of(self.template, self.form) if begins_answered else "",
            keep_values=keep_values,
        )
        _, split, past_reasoning = self.purpose
        if self.purpose.ask:
            return (finder.question(past_reasoning=past_reasoning),), ()
        return finder.whole_or_each(split=split, past_reasoning=past_reasoning), finder.unused_keys()

    def _aligned(self, shape: Sketch, layouts: Sequence[Layout], unused: tuple[str, ...]) -> Fit:
        """The true texts beside their outlines.

        Raises:
            Unproven: a text is not its outline with the values in place of the placeholders.
        """
        texts = []
        for layout in layouts:
            text = self.template.render(
                self.form.messages(self.told.messages[: layout.count]),
                tools=self.form.tools(self.told.tools),
                options=self.told.options,
                ask=self.purpose.ask,
            )
            starts = align(layout.outline, shape.slots, text)
            if isinstance(starts, int):
                raise Unproven(_change(layout, shape, starts), 1)
            texts.append(FittedText(layout, text, starts))
        return Fit(self.form, self.told, shape, tuple(texts), unused)


def _change(layout: Layout, shape: Sketch, segment: int) -> str:
    """Near which value a text departs from its outline."""
    segments = layout.outline.segments
    near = [s.slot for s in (*segments[segment::-1], *segments[segment:]) if s.slot is not None]
    message = next((i for i, used in enumerate(shape.uses) if near[:1] and near[0] in used), 0)
    return f"it changes what message {message + 1} says, or writes other text where the message says this"
