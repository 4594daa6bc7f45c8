"""A conversation with a base and its adapters.

It does not print: it returns text, or passes it to a callback in pieces.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from brushstroke.base import Base, require_base
from brushstroke.data import Template
from brushstroke.errors import DataError
from brushstroke.inference.batching import run_requests
from brushstroke.inference.generate import Adapters, Prompt, PromptEncoder, assign_rows, open_bank
from brushstroke.inference.request import Request, SamplingParams


class ChatSession:
    """A conversation that stores its turns; a context manager that detaches the adapters on exit.

    Switching the adapter keeps the turns. Without a chat template, the conversation is one text to which each
    turn is appended.

    Args:
        base: the model and its tokenizer.
        adapters: one adapter, several by name, or a bank that is attached to the base. A single adapter
            answers from the start; with several, the base answers until `use` selects one.
        system: a system message at the start of every conversation.
        sampling: the sampling parameters.
        tools: declarations of functions that the model may call.
        chat_template: used for every adapter: a template, a file, or the name of a template.
        date: today's date for chat templates (YYYY-MM-DD); by default the day of an adapter's training.
        allow_different_base: use adapters although their fingerprints belong to another base.

    Raises:
        BaseMismatchError, ShapeError: an adapter that does not fit the base.
        ConfigError: the base is not a language model.
    """

    def __init__(
        self,
        base: Base,
        adapters: Adapters = None,
        *,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        tools: Sequence[Any] = (),
        chat_template: Template = None,
        date: str | None = None,
        allow_different_base: bool = False,
    ) -> None:
        require_base(base)
        self._base, self._sampling = base, sampling or SamplingParams()
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self._turns: list[dict[str, Any]] = []
        self._tools = tools
        self._stack = ExitStack()
        self._bank = self._stack.enter_context(
            open_bank(base, adapters, allow_different_base=allow_different_base)
        )
        with ExitStack() as undo:
            undo.push(self._stack)
            self._encoder = PromptEncoder(base, self._bank, chat_template, date)
            undo.pop_all()
        self._name = self.names[0] if len(self.names) == 1 else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self._bank.names if self._bank is not None else ()

    @property
    def adapter(self) -> str | None:
        """The adapter that answers; None is the base."""
        return self._name

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """The conversation so far, with the system message."""
        return tuple(dict(message) for message in (*self._system, *self._turns))

    @property
    def tools(self) -> tuple[Any, ...]:
        """The declarations of functions that the model may call."""
        return tuple(self._tools)

    def use(self, name: str | None) -> None:
        """Select the adapter that answers from now on; None is the base.

        Raises:
            RouteError: there is no such adapter.
        """
        if name is not None:
            assign_rows(1, self._bank, None, name)
            self._encoder.format(name)
        self._name = name

    def reset(self) -> None:
        """Delete all turns; the system message and the selected adapter stay."""
        self._turns.clear()

    def set_system(self, text: str | None) -> None:
        """Replace or remove the system message, and delete all turns."""
        self._system = [{"role": "system", "content": text}] if text else []
        self._turns.clear()

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """Send a user message and return the answer. After an error or interrupt neither is stored.

        Tool calls are stored with the answer, in the last entry of `messages`.

        Args:
            text: the user's message.
            on_text: called with each new piece of text as the model generates it, including reasoning and
                tool calls. With beam search, called once at the end with the whole text.

        Raises:
            DataError: the message is empty, or the conversation exceeds the model's context; `reset` it.
        """
        turn = {"role": "user", "content": text}
        request = self._request(turn)
        streamer = (
            _Streamer(self._encoder, on_text, request)
            if on_text is not None and request.sampling.num_beams == 1
            else None
        )
        (output,) = run_requests(self._base, [request], bank=self._bank, streamer=streamer)
        answer = self._encoder.answer(output, self._name, self._tools)
        if on_text is not None:
            _emit_rest(self._encoder.written(output), streamer, on_text)
        reply: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            reply["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            reply["tool_calls"] = [
                {"id": f"call{number:05}", "type": "function", "function": dict(call)}
                for number, call in enumerate(answer.tool_calls, start=len(self._turns))
            ]
        self._turns += [turn, reply]
        return answer.text

    def close(self) -> None:
        """Detach the adapters from the base; a bank that was passed in stays attached."""
        self._stack.close()

    def __enter__(self) -> "ChatSession":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _request(self, turn: dict[str, Any]) -> Request:
        prompt: Prompt = [*self._system, *self._turns, turn]
        if not self._encoder.format(self._name).has_template:
            prompt = "".join(message["content"] for message in prompt)
        if not turn["content"]:
            raise DataError("the message is empty; give a text")
        return self._encoder.request(
            prompt, self._name, tools=self._tools, source="the conversation", sampling=self._sampling
        )


class _Streamer:
    """A streamer for transformers; passes on only text that later tokens cannot change."""

    def __init__(self, encoder: PromptEncoder, on_text: Callable[[str], None], request: Request) -> None:
        self._encoder, self._on_text, self._request = encoder, on_text, request
        self._tokens: list[int] = []
        self._prompt = True
        self.emitted = ""

    def put(self, value: Any) -> None:
        """Receive the prompt (the first call) or the next token."""
        if self._prompt:
            self._prompt = False
            return
        self._tokens += [
            token for token in value.reshape(-1).tolist() if token not in self._request.stop_token_ids
        ]
        text = _before_stop(self._encoder.text(self._tokens), self._request.stop_strings)
        # A character of several tokens decodes to the replacement character until it is complete.
        if not text.endswith("\ufffd") and text.startswith(self.emitted) and text != self.emitted:
            self._on_text(text[len(self.emitted) :])
            self.emitted = text

    def end(self) -> None:
        """Do nothing: the caller passes on the remaining text."""


def _before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before a stop string, and before a possible beginning of a stop string at its end."""
    for string in stop_strings:
        text = text.partition(string)[0]
        begun = next((n for n in range(len(string) - 1, 0, -1) if text.endswith(string[:n])), 0)
        text = text[: len(text) - begun]
    return text


def _emit_rest(answer: str, streamer: _Streamer | None, on_text: Callable[[str], None]) -> None:
    emitted = streamer.emitted if streamer is not None else ""
    if answer.startswith(emitted) and answer != emitted:
        on_text(answer[len(emitted) :])
