"""Turns conversations into text with the chat template, and marks the assistant's parts.

A conversation is converted to the form that the template expects, rendered and verified: every value of the
row must be in its place in the text. Only the assistant's parts and their ends are trained. It does not read
rows.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from brushstroke.data.fitting import (
    EXAMPLES,
    QUESTION,
    SPLIT,
    STOCK_QUESTION,
    Fit,
    FittedText,
    Fitter,
    Purpose,
)
from brushstroke.data.messages import Conversation, read_conversation
from brushstroke.data.pieces import Piece, PieceTokenizer
from brushstroke.data.probe_answers import asked_as_answered, closing_markers
from brushstroke.data.reply import Reply, ReplyReader
from brushstroke.data.template import ChatTemplate, date_of, with_date
from brushstroke.data.validate import DataWarning, Message
from brushstroke.errors import DataError
from brushstroke.templates import one_template

TRIMMED = "the chat template removes white space at the ends of contents"
OPENING = (
    "an answer at the start of a conversation is context and not trained: the chat template has no prompt "
    "for it"
)
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates between which transformers chooses


@dataclass(frozen=True)
class Written:
    """A conversation as pieces.

    Args:
        rows: the pieces of each example.
        ends: the end texts of its trained answers.
        unused: keys of messages that the template does not print.
        notes: changes made to the row, as messages for people.
    """

    rows: tuple[tuple[Piece, ...], ...]
    ends: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ChatFormat:
    """Converts conversations to text and tokens, in the same way for training and generation.

    Args:
        tokenizer: a tokenizer of transformers.
        template: the chat template (for example the one used in an adapter's training), or several by name;
            by default the tokenizer's.
        date: the date of "today" in the template, as YYYY-MM-DD; by default the date stored in the template,
            or today.
        as_trained: end prompts with the beginning that answers have in training, even if the template's
            generation prompt continues differently, for example with <think>.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | Mapping[str, str] | None = None,
        *,
        date: str | None = None,
        as_trained: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self._as_trained = as_trained
        self.pieces = PieceTokenizer(tokenizer)
        self._bos = _begin_token(tokenizer)
        self._known_markers = _added_tokens(tokenizer)
        given = template or getattr(tokenizer, "chat_template", None) or {}
        sources = {DEFAULT: given} if isinstance(given, str) else dict(given)
        self._given = {name: with_date(source, date) for name, source in sources.items()}
        self._templates = {name: self._made(source, as_trained) for name, source in self._given.items()}
        if date is not None and self.date is None:
            warnings.warn(
                f"the date {date} is not used: the chat template prints no date that can be set",
                DataWarning,
                stacklevel=2,
            )
        self._question = QUESTION if as_trained else STOCK_QUESTION
        self._fitter = Fitter(self._known_markers)
        self._readers: dict[str, ReplyReader] = {}

    def __reduce__(self) -> Any:
        return partial(ChatFormat, as_trained=self._as_trained), (self.tokenizer, self._given)

    def identity(self) -> Any:
        """Everything that its texts and tokens depend on, as JSON types.

        None if that cannot be known: a tokenizer in Python, a class or a method of the user's own.
        """
        kind, own = type(self.tokenizer), vars(self.tokenizer)
        is_changed = any(callable(value) and hasattr(kind, name) for name, value in own.items())
        if is_changed or not kind.__module__.startswith("transformers."):
            return None
        try:
            backend = self.tokenizer.backend_tokenizer.to_str()
        except Exception:  # no backend, or one with parts in Python
            return None
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        splits = getattr(self.tokenizer, "split_special_tokens", False)
        tokens = [kind.__name__, backend, special, splits, self.begin_ids, self.end_ids]
        return [tokens, self._given, self._as_trained]

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._templates)

    @property
    def template(self) -> str | None:
        """The chat template, or one that chooses between several; None if there is none."""
        return one_template({name: template.source for name, template in self._templates.items()})

    @property
    def date(self) -> str | None:
        """The date that the template prints; None if it prints none."""
        return next((day for t in self._templates.values() if (day := date_of(t.source))), None)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The begin token, if the tokenizer puts one before every text."""
        return self._bos

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokenizer's end token, if it has one, as a tuple."""
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the template's end-of-turn token and the tokenizer's end token."""
        turn = [self._added[end] for end in self._closings if end in self._added]
        return tuple(dict.fromkeys((*turn, *self.end_ids)))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """End markers of the template that are not tokens of this tokenizer."""
        return tuple(end for end in self._closings if end not in self._added)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of all end tokens and stop strings."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(self.stop_token_ids))
        return tuple(dict.fromkeys((*self.stop_strings, *tokens)))

    def stops(self, texts: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Split the stop texts of a card into token ids and strings."""
        vocabulary = self._vocabulary
        tokens = tuple(vocabulary[text] for text in texts if text in vocabulary)
        return tokens, tuple(text for text in texts if text not in vocabulary)

    def write(
        self,
        conversation: Conversation,
        *,
        where: str = "this conversation",
        need_trained: bool = True,
        split_turns: bool = False,
    ) -> Written:
        """Write a conversation as pieces with trained answers.

        Usually this is one example. If the template writes an answer differently once the conversation
        continues, each answer becomes an example.

        Args:
            conversation: the conversation of a row.
            where: the row, for error messages.
            need_trained: refuse a conversation without an answer to train.
            split_turns: always make one example for each answer.

        Raises:
            DataError: there is no answer to train, or the template does not print the complete row.
        """
        if need_trained and not any(conversation.trained):
            if conversation.answers:
                raise DataError(
                    f"{where}: every assistant turn has weight 0; train one of them, or remove the row"
                )
            raise DataError(
                f"{where}: the conversation has no assistant turn, so nothing can be trained; add the "
                "answer or remove the row"
            )
        split = split_turns and any(conversation.trained)
        fit = self._fit(conversation, SPLIT if split else EXAMPLES, where)
        rows = tuple(self._cut(fit, fitted) for fitted in fit.texts)
        layouts = [fitted.layout for fitted in fit.texts]
        learnt = [turn for layout in layouts for turn in layout.turns if turn.message in layout.trained]
        ends = tuple(dict.fromkeys(turn.end for turn in learnt if turn.end is not None))
        opens = conversation.trained[:1] == (True,) and not any(0 in layout.trained for layout in layouts)
        added = ((TRIMMED,) if fit.trimmed else ()) + ((OPENING,) if opens else ())
        notes = (*conversation.notes, *fit.form.notes, *added)
        return Written(rows, ends, fit.unused, notes)

    def prompt_tokens(
        self,
        prompt: str | Sequence[Message] | Conversation,
        *,
        tools: Sequence[Mapping] | None = None,
        options: Mapping[str, Any] | None = None,
        where: str = "this conversation",
    ) -> list[int]:
        """The tokens of a prompt; the same ones that precede the answer in training.

        A text is a user turn if there is a chat template, otherwise the beginning of a text.

        Raises:
            DataError: there is no chat template for messages, or it does not print them in full.
        """
        if isinstance(prompt, str):
            if not self.has_template:
                return self.pieces.tokens(self.plain_prompt(prompt))
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, Conversation):
            prompt = read_conversation(prompt, tools=tools, options=options, where=where)
        fit = self._fit(prompt, self._question, where)
        return self.pieces.tokens(self._cut(fit, fit.texts[0]))

    def read_reply(self, text: str, tools: Sequence[Any] = ()) -> Reply:
        """Parse a model's answer into its parts.

        Args:
            text: the answer with special tokens, without its end token.
            tools: the functions that the model could call.
        """
        name = self._name_for(tools)
        if name not in self._readers:
            self._readers[name] = ReplyReader(self._templates.get(name), self.tokenizer.all_special_tokens)
        return self._readers[name].read(text, tools)

    def last_answer(self, conversation: Conversation, *, where: str) -> tuple[Reply, str]:
        """The answer at the end of a conversation, as parts and as the template writes it.

        Raises:
            DataError: the template does not print the conversation in full.
        """
        fit = self._fit(conversation, (*EXAMPLES, *SPLIT), where)
        fitted, message = fit.texts[-1], fit.changed.messages[-1]
        turn = fitted.layout.turns[-1]
        written = fitted.text[fitted.position(turn.start) : fitted.position(turn.stop)]
        calls = tuple(call["function"] for call in message.get("tool_calls", ()))
        reply = Reply(message.get("content") or "", message.get("reasoning_content", ""), calls)
        return reply, written.removesuffix(turn.end or "")

    def plain_prompt(self, text: str) -> tuple[Piece, ...]:
        """The tokens of a prompt without a template, with the tokenizer's begin token if it has one."""
        begin = (Piece("", False, "prompt", ids=self._bos),) if self._bos else ()
        return (*begin, Piece(text, False, "prompt", after=None))

    def _made(self, source: str, as_trained: bool) -> ChatTemplate:
        stock = ChatTemplate(self.tokenizer, source)
        return asked_as_answered(stock) if as_trained else stock

    def _name_for(self, tools: Sequence[Any]) -> str:
        return TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT

    def _template_for(self, conversation: Conversation, where: str) -> ChatTemplate:
        name = self._name_for(conversation.tools)
        if name in self._templates:
            return self._templates[name]
        if self._templates:
            raise DataError(
                f"{where}: the tokenizer has the chat templates {', '.join(self._templates)} and none has "
                "the name default; choose one (--chat-template)"
            )
        raise DataError(
            f"{where}: the tokenizer has no chat template, so messages cannot be written as text; "
            "use prompt and completion columns or a text column, or pass a chat template (--chat-template)"
        )

    def _fit(self, conversation: Conversation, purposes: Sequence[Purpose], where: str) -> Fit:
        return self._fitter.fit(self._template_for(conversation, where), conversation, purposes, where)

    def _cut(self, fit: Fit, fitted: FittedText) -> tuple[Piece, ...]:
        """Split a text into pieces: answers as they are generated, and the text between them."""
        layout, text, marks = fitted.layout, fitted.text, fit.marks(fitted)
        pieces: list[Piece] = []
        position, ended = 0, None
        for turn in layout.turns:
            start, stop = fitted.position(turn.start), fitted.position(turn.stop)
            pieces += _template_piece(text, position, start, marks, ended)
            trained = turn.message in layout.trained
            pieces.append(Piece(text[start:stop], trained, "assistant", "" if pieces else None))
            if turn.end is None and trained and turn.message == layout.count - 1 and self.end_ids:
                # If the template ends an answer with nothing, the model stops only at the end token.
                pieces.append(Piece("", trained, "assistant", ids=self.end_ids))
            position, ended = stop, turn.end or ""
        return (*pieces, *_template_piece(text, position, len(text), marks, ended))

    @cached_property
    def _closings(self) -> tuple[str, ...]:
        """The end markers of answers, found with test conversations."""
        found = (closing_markers(template, self._known_markers) for template in self._templates.values())
        return tuple(dict.fromkeys(marker for markers in found for marker in markers))

    @cached_property
    def _added(self) -> dict[str, int]:
        """The added tokens by their texts; a text that spells one is always tokenised as it."""
        vocabulary = self._vocabulary
        return {text: vocabulary[text] for text in self._known_markers if text in vocabulary}

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        return self.tokenizer.get_vocab()


def _template_piece(
    text: str, start: int, stop: int, marks: Sequence[tuple[str, int, int]], ended: str | None
) -> list[Piece]:
    """The piece between two answers; `ended` is the end of the previous answer."""
    if start >= stop:
        return []
    inside = tuple((role, a - start, b - start) for role, a, b in marks if start <= a and b <= stop)
    return [Piece(text[start:stop], False, "template", ended, inside)]


def _begin_token(tokenizer: Any) -> tuple[int, ...]:
    """The begin token, if the tokenizer adds one to every text."""
    bos = tokenizer.bos_token_id
    begun, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    return (bos,) if bos is not None and begun[:1] == [bos] != bare[:1] else ()


def _added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the special tokens and all other added tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(dict.fromkeys((*map(str, added.values()), *map(str, tokenizer.all_special_tokens))))
