"""Conversations as the chat template writes them, and which of their characters are the assistant's.

What is trained comes from positions in the rendered text, never from token ids; stock templates will do.
It does not read rows: it is given messages.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brushstroke.data.checks import Message, check_messages
from brushstroke.data.pieces import Piece, PieceTokenizer
from brushstroke.errors import DataError

_SENTINEL = "Qzxv7"  # an answer that no template contains or changes


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn: its answer is rendered[start:stop], where the conversation ends with this turn."""

    index: int
    rendered: str
    start: int
    stop: int


class ChatFormat:
    """How conversations become text and tokens, for training and for generation alike.

    `template` is the chat template to use (the one that an adapter was trained with); the tokenizer's own by
    default.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template or _own_template(tokenizer)
        self.pieces = PieceTokenizer(tokenizer)
        self._opening, self._closing = self._probe() if self.template else ("", None)
        self._end_text, self._end_id = self._end_of_turn()
        self._bos = _begin_token(tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template at all."""
        return self.template is not None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokenizer's end token, if it has one, as a tuple."""
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the template's end-of-turn token and the tokenizer's end token."""
        turn = () if self._end_id is None else (self._end_id,)
        return tuple(dict.fromkeys(turn + self.end_ids))

    @property
    def stop_token_texts(self) -> tuple[str, ...]:
        """The texts of `stop_token_ids`."""
        return tuple(self.tokenizer.convert_ids_to_tokens(list(self.stop_token_ids)))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping] | None = None,
        where: str = "this conversation",
    ) -> str:
        """The text of a conversation, with the opening of an answer at its end if asked for.

        Raises:
            DataError: there is no chat template, or it refuses the conversation.
        """
        if self.template is None:
            raise DataError(
                f"{where}: the tokenizer has no chat template, so messages cannot be written as text; "
                "use prompt and completion columns or a text column, or pass a chat template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # a template is a program that somebody else wrote
            raise DataError(
                f"{where}: the chat template refuses this conversation ({error}); "
                "change the row or use another chat template"
            ) from error

    def prompt_tokens(
        self,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[Mapping] | None = None,
        where: str = "this conversation",
    ) -> list[int]:
        """The tokens after which the model answers; the same ones that came before the answer in training.

        A text is a user turn where there is a chat template, and the beginning of a text otherwise.
        """
        if isinstance(prompt, str):
            if self.template is None:
                return self.pieces.tokens(self.plain_prompt(prompt))
            prompt = [{"role": "user", "content": prompt}]
        check_messages(prompt, where)
        text = self.render(prompt, True, tools=tools, where=where)
        turns = []
        for index in _assistant_turns(prompt):
            try:
                turns.append(self._turn(prompt, index, tools, where))
            except DataError:  # the rewritten past of a template needs no boundary
                continue
        return self.pieces.tokens(self._cut(prompt, text, turns, trained=()))

    def plain_prompt(self, text: str) -> tuple[Piece, ...]:
        """A prompt without a template, begun as the tokenizer itself begins a text."""
        begin = (Piece("", False, "prompt", ids=self._bos),) if self._bos else ()
        return (*begin, Piece(text, False, "prompt", after=None))

    def conversation(
        self,
        messages: Sequence[Message] | Any,
        *,
        tools: Sequence[Mapping] | None = None,
        where: str = "this conversation",
        need_trained: bool = True,
    ) -> list[tuple[Piece, ...]]:
        """The pieces of a conversation with every assistant turn trained.

        Usually this is one row of pieces. Where the template rewrites earlier turns (as those do that drop
        the thinking of the past), it is one row for each assistant turn, in which only the last is trained.

        Raises:
            DataError: the conversation is malformed, has no assistant turn, or the template's text does not
                tell where an answer begins.
        """
        check_messages(messages, where)
        indices = _assistant_turns(messages)
        if not indices:
            if need_trained:
                raise DataError(
                    f"{where}: the conversation has no assistant turn, so nothing can be trained; "
                    "add the answer or take the row out"
                )
            return [self._cut(messages, self.render(messages, tools=tools, where=where), [], trained=())]
        turns = [self._turn(messages, index, tools, where) for index in indices]
        ends_with_answer = indices[-1] == len(messages) - 1
        whole = turns[-1].rendered if ends_with_answer else self.render(messages, tools=tools, where=where)
        if len(_fitting(whole, turns)) == len(turns):
            return [self._cut(messages, whole, turns, trained=indices, complete=ends_with_answer)]
        return [
            self._cut(messages, turn.rendered, turns[: number + 1], trained=(turn.index,), complete=True)
            for number, turn in enumerate(turns)
        ]

    def _turn(self, messages: Sequence[Message], index: int, tools: Any, where: str) -> _Turn:
        rendered = self.render(messages[: index + 1], tools=tools, where=where)
        start = self._answer_start(messages[:index], rendered, tools, where)
        if start is None:
            raise DataError(
                f"{where}: the chat template's text does not tell where the answer in message {index + 1} "
                "begins (what it writes before an answer changes once the answer is there); "
                "use another chat template, or a text column"
            )
        return _Turn(index, rendered, start, start + self._answer_length(rendered[start:]))

    def _answer_start(self, before: Sequence[Message], rendered: str, tools: Any, where: str) -> int | None:
        if not before:  # no template can be asked for a prompt of no messages
            found = rendered.find(self._opening) if self._opening else -1
            return None if found < 0 else found + len(self._opening)
        prompt = self.render(before, True, tools=tools, where=where)
        if rendered.startswith(prompt):
            return len(prompt)
        prompt = self.render(before, False, tools=tools, where=where)
        for candidate in (prompt + self._opening, prompt):
            if rendered.startswith(candidate):
                return len(candidate)
        return None

    def _answer_length(self, answer: str) -> int:
        """How much of what follows the prompt is the answer, its end-of-turn token included."""
        if self._end_text is None:
            return len(answer)
        if self._closing and answer.endswith(self._closing):
            closing = len(answer) - len(self._closing)
            return answer.index(self._end_text, closing) + len(self._end_text)
        found = answer.rfind(self._end_text)
        return len(answer) if found < 0 else found + len(self._end_text)

    def _cut(
        self,
        messages: Sequence[Message],
        text: str,
        turns: Sequence[_Turn],
        *,
        trained: Sequence[int],
        complete: bool = False,
    ) -> tuple[Piece, ...]:
        """`text` in pieces: the answers of the turns that occur in it unchanged, and what is between."""
        pieces: list[Piece] = []
        position, message = 0, 0
        for turn in _fitting(text, turns):
            pieces += self._template_piece(
                text[position : turn.start], pieces, messages[message : turn.index]
            )
            follows = "" if pieces else None
            answer = text[turn.start : turn.stop]
            pieces.append(Piece(answer, turn.index in trained, "assistant", follows))
            position, message = turn.stop, turn.index + 1
        pieces += self._template_piece(text[position:], pieces, messages[message:])
        if complete and self._end_text is None and self.end_ids:
            # The template ends an answer with no token of its own: without one the model would never stop.
            pieces.append(Piece("", True, "assistant", ids=self.end_ids))
        return tuple(pieces)

    def _template_piece(self, text: str, before: list[Piece], messages: Sequence[Message]) -> list[Piece]:
        if not text:
            return []
        after = None
        if before:
            ended = self._end_text is not None and before[-1].text.endswith(self._end_text)
            after = self._end_text if ended else ""
        return [Piece(text, False, "template", after, tuple(_content_marks(text, messages)))]

    def _probe(self) -> tuple[str, str | None]:
        """What the template writes directly before and after an answer; None where it does not tell."""
        question = [{"role": "user", "content": "x"}]
        try:
            answered = self.render([*question, {"role": "assistant", "content": _SENTINEL}])
            asked = self.render(question)
        except DataError:
            return "", None
        before, found, closing = answered.rpartition(_SENTINEL)
        if not found:
            return "", None
        return (before[len(asked) :] if before.startswith(asked) else ""), closing

    def _end_of_turn(self) -> tuple[str | None, int | None]:
        """The first special token in what the template writes after an answer."""
        if self.template and self._closing is None:
            return self.tokenizer.eos_token, self.tokenizer.eos_token_id
        tokens = self.pieces.tokens([Piece(self._closing, False, "template", None)]) if self._closing else []
        for special in _special_tokens(self.tokenizer):
            for token in tokens:
                if token in special:
                    return special[token], token
        return None, None


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # a model with several templates: by name
        return template.get("default")
    return template or None


def _assistant_turns(messages: Sequence[Message]) -> tuple[int, ...]:
    return tuple(index for index, message in enumerate(messages) if message["role"] == "assistant")


def _fitting(text: str, turns: Sequence[_Turn]) -> list[_Turn]:
    fitting, position = [], 0
    for turn in turns:
        if turn.start >= position and text.startswith(turn.rendered):
            fitting.append(turn)
            position = turn.stop
    return fitting


def _content_marks(text: str, messages: Sequence[Message]) -> Iterator[tuple[str, int, int]]:
    position = 0
    for message in messages:
        content = message.get("content")
        parts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
        for part in filter(None, map(str.strip, parts)):
            found = text.find(part, position)
            if found >= 0:
                position = found + len(part)
                yield message["role"], found, position


def _begin_token(tokenizer: Any) -> tuple[int, ...]:
    """The begin token, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    begun, bare = tokenizer("x")["input_ids"], tokenizer("x", add_special_tokens=False)["input_ids"]
    return (bos,) if bos is not None and begun[:1] == [bos] != bare[:1] else ()


def _special_tokens(tokenizer: Any) -> tuple[dict[int, str], dict[int, str]]:
    """The tokens declared special; the other added tokens, which some models end a turn with."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token: str(entry) for token, entry in added.items() if entry.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return special, {token: str(entry) for token, entry in added.items() if str(entry).strip()}
