"""Conversations as the chat template writes them, and which of their characters are the assistant's.

A conversation is brought into the form that the template takes, rendered, and proven: every value of the row
stands in the text where it should, and what is trained is the assistant's part with its end. It does not read
rows.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

TRIMMED = "the chat template takes white space off the ends of contents"
OPENING = "an answer that opens a conversation is context and not trained: the chat template asks for none"
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates, as transformers chooses between them


@dataclass(frozen=True)
class Written:
    """A conversation in pieces.

    Args:
        rows: the pieces of each example.
        ends: the texts that end its trained answers.
        unused: keys of messages that the template does not print.
        notes: what was changed on the way, for people.
    """

    rows: tuple[tuple[Piece, ...], ...]
    ends: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class ChatFormat:
    """How conversations become text and tokens, for training and for generation alike.

    Args:
        tokenizer: of transformers.
        template: the chat template to use (the one that an adapter was trained with), or several by name; the
            tokenizer's own by default.
        date: what the template takes for today, as YYYY-MM-DD; by default the date that it has been given
            already, or today.
        as_trained: ask with what answers begin with in training, also where the template's own generation
            prompt goes on with something else, such as <think>.
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
        self.pieces = PieceTokenizer(tokenizer)
        self._bos = _begin_token(tokenizer)
        self._known_markers = _added_tokens(tokenizer)
        given = template or getattr(tokenizer, "chat_template", None) or {}
        sources = {DEFAULT: given} if isinstance(given, str) else dict(given)
        self._templates = {
            name: self._made(with_date(source, date), as_trained) for name, source in sources.items()
        }
        if date is not None and self.date is None:
            warnings.warn(
                f"the date {date} is not used: the chat template prints none that can be given",
                DataWarning,
                stacklevel=2,
            )
        self._question = QUESTION if as_trained else STOCK_QUESTION
        self._fitter = Fitter(self._known_markers)
        self._readers: dict[str, ReplyReader] = {}

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template at all."""
        return bool(self._templates)

    @property
    def template(self) -> str | None:
        """The chat template; where there are several, one that chooses between them; None for none."""
        return one_template({name: template.source for name, template in self._templates.items()})

    @property
    def date(self) -> str | None:
        """The date that the template prints; None where it prints none."""
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
        """The tokens that end an answer: the template's end of a turn and the tokenizer's end token."""
        turn = [self._added[end] for end in self._closings if end in self._added]
        return tuple(dict.fromkeys((*turn, *self.end_ids)))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What ends an answer in the template and is no token of its own in this tokenizer."""
        return tuple(end for end in self._closings if end not in self._added)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of all that ends an answer."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(self.stop_token_ids))
        return tuple(dict.fromkeys((*self.stop_strings, *tokens)))

    def stops(self, texts: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Tokens and strings that end an answer, out of their texts, as a card has them."""
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
        """A conversation with its answers trained, in pieces.

        Usually this is one example. Where the template writes an answer otherwise once the conversation goes
        on, it is one for each answer.

        Args:
            conversation: what a row holds.
            where: the row, for messages of errors.
            need_trained: refuse a conversation without an answer to learn.
            split_turns: one example for each answer, always.

        Raises:
            DataError: there is no answer to learn, or the template does not print all that the row holds.
        """
        if need_trained and not any(conversation.trained):
            if conversation.answers:
                raise DataError(
                    f"{where}: every assistant turn has weight 0; train one of them, or take the row out"
                )
            raise DataError(
                f"{where}: the conversation has no assistant turn, so nothing can be trained; add the answer "
                "or take the row out"
            )
        split = split_turns and any(conversation.trained)
        fit = self._fit(conversation, SPLIT if split else EXAMPLES, where)
        rows = tuple(self._cut(fit, fitted) for fitted in fit.texts)
        layouts = [fitted.layout for fitted in fit.texts]
        learnt = [turn for layout in layouts for turn in layout.turns if turn.message in layout.trained]
        ends = tuple(dict.fromkeys(turn.end for turn in learnt if turn.end is not None))
        opens = conversation.trained[:1] == (True,) and not any(0 in layout.trained for layout in layouts)
        told = ((TRIMMED,) if fit.trimmed else ()) + ((OPENING,) if opens else ())
        notes = (*conversation.notes, *fit.form.notes, *told)
        return Written(rows, ends, fit.unused, notes)

    def prompt_tokens(
        self,
        prompt: str | Sequence[Message] | Conversation,
        *,
        tools: Sequence[Mapping] | None = None,
        options: Mapping[str, Any] | None = None,
        where: str = "this conversation",
    ) -> list[int]:
        """The tokens after which the model answers; the same ones that came before the answer in training.

        A text is a user turn where there is a chat template, and the beginning of a text otherwise.

        Raises:
            DataError: there is no chat template for messages, or it does not print all of them.
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
        """What a model answered, in its parts.

        Args:
            text: its answer with special tokens, without what ended it.
            tools: the functions that it could call.
        """
        name = self._name_for(tools)
        if name not in self._readers:
            self._readers[name] = ReplyReader(self._templates.get(name), self.tokenizer.all_special_tokens)
        return self._readers[name].read(text, tools)

    def last_answer(self, conversation: Conversation, *, where: str) -> tuple[Reply, str]:
        """The answer at the end of a conversation: in its parts, and as the template writes it.

        Raises:
            DataError: the template does not print all of the conversation.
        """
        fit = self._fit(conversation, (*EXAMPLES, *SPLIT), where)
        fitted, message = fit.texts[-1], fit.told.messages[-1]
        turn = fitted.layout.turns[-1]
        written = fitted.text[fitted.position(turn.start) : fitted.position(turn.stop)]
        calls = tuple(call["function"] for call in message.get("tool_calls", ()))
        reply = Reply(message.get("content") or "", message.get("reasoning_content", ""), calls)
        return reply, written.removesuffix(turn.end or "")

    def plain_prompt(self, text: str) -> tuple[Piece, ...]:
        """A prompt without a template, begun as the tokenizer itself begins a text."""
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
                f"{where}: the tokenizer has the chat templates {', '.join(self._templates)} and none is "
                "called default; name one (--chat-template)"
            )
        raise DataError(
            f"{where}: the tokenizer has no chat template, so messages cannot be written as text; "
            "use prompt and completion columns or a text column, or pass a chat template (--chat-template)"
        )

    def _fit(self, conversation: Conversation, purposes: Sequence[Purpose], where: str) -> Fit:
        return self._fitter.fit(self._template_for(conversation, where), conversation, purposes, where)

    def _cut(self, fit: Fit, fitted: FittedText) -> tuple[Piece, ...]:
        """A text in pieces: the answers that stand in it as they were generated, and what is between."""
        layout, text, marks = fitted.layout, fitted.text, fit.marks(fitted)
        pieces: list[Piece] = []
        position, ended = 0, None
        for turn in layout.turns:
            start, stop = fitted.position(turn.start), fitted.position(turn.stop)
            pieces += _template_piece(text, position, start, marks, ended)
            trained = turn.message in layout.trained
            pieces.append(Piece(text[start:stop], trained, "assistant", "" if pieces else None))
            if turn.end is None and trained and turn.message == layout.count - 1 and self.end_ids:
                # Without a token behind an answer that the template ends with nothing the model would not
                # stop.
                pieces.append(Piece("", trained, "assistant", ids=self.end_ids))
            position, ended = stop, turn.end or ""
        return (*pieces, *_template_piece(text, position, len(text), marks, ended))

    @cached_property
    def _closings(self) -> tuple[str, ...]:
        """What ends the answers of made-up conversations."""
        found = (closing_markers(template, self._known_markers) for template in self._templates.values())
        return tuple(dict.fromkeys(marker for markers in found for marker in markers))

    @cached_property
    def _added(self) -> dict[str, int]:
        """The added tokens by their texts: text that spells one always becomes it."""
        vocabulary = self._vocabulary
        return {text: vocabulary[text] for text in self._known_markers if text in vocabulary}

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        return self.tokenizer.get_vocab()


def _template_piece(
    text: str, start: int, stop: int, marks: Sequence[tuple[str, int, int]], ended: str | None
) -> list[Piece]:
    """What stands between two answers; `ended` is what the answer before it ends with."""
    if start >= stop:
        return []
    inside = tuple((role, a - start, b - start) for role, a, b in marks if start <= a and b <= stop)
    return [Piece(text[start:stop], False, "template", ended, inside)]


def _begin_token(tokenizer: Any) -> tuple[int, ...]:
    """The begin token, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    begun, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    return (bos,) if bos is not None and begun[:1] == [bos] != bare[:1] else ()


def _added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the special tokens and of all others that were added to the vocabulary."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(dict.fromkeys((*map(str, added.values()), *map(str, tokenizer.all_special_tokens))))
