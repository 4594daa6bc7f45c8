"""Answers prompts with transformers' `generate`, each with the adapter that is assigned to it.

It stores no conversation: `chat` does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from brushstroke.adapter import Adapter, Card
from brushstroke.base import Base, require_base
from brushstroke.data import ChatFormat, Conversation, Reply, Template, find_template
from brushstroke.errors import ConfigError, DataError, RouteError
from brushstroke.inference.batching import run_requests
from brushstroke.inference.request import Finish, Output, Request, SamplingParams
from brushstroke.layers import Bank, bank
from brushstroke.sites import unwrap

ONLY = "adapter"  # the name of an adapter that is given without one

Prompt = str | Sequence[Mapping[str, Any]] | Conversation
Adapters = Bank | Mapping[str, Adapter] | Adapter | None


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one prompt.

    Args:
        text: the answer, without special tokens, reasoning and tool calls.
        tokens: its tokens, without the stop token.
        adapter: the name of the adapter that answered; None is the model in its current state.
        finish: "stop" if a stop token or stop string ended the answer, "length" if `max_new_tokens` did.
        reasoning: the text at the place that the chat template defines for reasoning.
        tool_calls: calls as {"name": ..., "arguments": {...}}, parsed by the format of the chat template.
    """

    text: str
    tokens: tuple[int, ...]
    adapter: str | None
    finish: Finish
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()


def generate(
    base: Base,
    prompts: Sequence[Prompt] | str,
    *,
    adapters: Adapters = None,
    rows: Sequence[str | None] | str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    num_beams: int = 1,
    batch_size: int = 16,
    tools: Sequence[Any] = (),
    chat_template: Template = None,
    date: str | None = None,
    allow_different_base: bool = False,
) -> list[Answer]:
    """Answer prompts, in their order; one batch may mix several adapters and the base.

    With a chat template, a text prompt is a user turn; without one, the model continues the text. Every
    prompt is written with the chat template of its adapter's training, otherwise with the tokenizer's own.
    The sampling defaults of the model are ignored.

    Args:
        base: the model and its tokenizer.
        prompts: texts, or conversations as lists of messages (or `Conversation`s, each with its own tools).
        adapters: one adapter (named "adapter"), several by name, or a bank that is attached to the base.
            Without it the model answers in its current state, with the adapter that is active in it.
        rows: the adapter name of each prompt; None in the list is the base; a single name applies to all
            prompts. Without it: the only adapter, or the bank's active route.
        max_new_tokens: maximum number of tokens of an answer, including its stop token.
        temperature: 0 always takes the most probable token (greedy).
        top_p: with a temperature, sample only from the most probable tokens with this total probability.
        seed: of the random draws.
        num_beams: width of a beam search.
        batch_size: maximum number of prompts in one batch.
        tools: declarations of functions that the model may call, for prompts without their own.
        chat_template: used for every prompt and adapter: a template, a file, or the name of a template.
        date: today's date for chat templates (YYYY-MM-DD); by default the day of the adapter's training, and
            without one the current date.
        allow_different_base: use adapters although their fingerprints belong to another base.

    Raises:
        DataError: a prompt cannot be written, is empty, or does not fit the model's context.
        ConfigError, RouteError: invalid settings or names.
        BaseMismatchError, ShapeError: an adapter that does not fit the base.
    """
    require_base(base)
    sampling = SamplingParams(max_new_tokens, temperature, top_p, seed, num_beams)
    given = _check_prompts(prompts)
    with open_bank(base, adapters, allow_different_base=allow_different_base) as bank:
        names = assign_rows(len(given), bank, adapters, rows)
        encoder = PromptEncoder(base, bank, chat_template, date)
        assigned = list(zip(given, names, strict=True))
        requests = [
            encoder.request(prompt, name, tools=tools, source=f"prompt {number}", sampling=sampling)
            for number, (prompt, name) in enumerate(assigned, start=1)
        ]
        outputs = run_requests(base, requests, batch_size=batch_size, bank=bank)
        return [
            encoder.answer(output, name, tools_of(prompt) or tools)
            for output, (prompt, name) in zip(outputs, assigned, strict=True)
        ]


def tools_of(prompt: Prompt) -> Sequence[Any]:
    """The functions that a prompt itself declares."""
    return prompt.tools if isinstance(prompt, Conversation) else ()


def shown_prompt(prompt: Prompt) -> Any:
    """A prompt as JSON: a text, or messages."""
    return [dict(m) for m in prompt.messages] if isinstance(prompt, Conversation) else prompt


@contextmanager
def open_bank(base: Base, adapters: Adapters, *, allow_different_base: bool = False) -> Iterator[Bank | None]:
    """Context manager: attach the adapters as a bank; a bank that is passed in is used and stays attached.

    Raises:
        ConfigError: `adapters` has another type.
        RouteError: the bank belongs to another model.
    """
    if isinstance(adapters, Bank):
        if adapters.model is not unwrap(base):
            raise RouteError(
                "this bank is attached to another model; create one with bank(base, ...) for this base"
            )
        yield adapters
    elif adapters is None:
        yield None
    elif not isinstance(adapters, Mapping):
        raise ConfigError(
            f"adapters must be an Adapter, a dict of adapters by name, or a Bank; got "
            f"{type(adapters).__name__}: load a folder with load(folder)"
        )
    elif not isinstance(adapters, Adapter) and not adapters:
        yield None
    else:
        # An Adapter is a mapping itself, from sites to updates.
        named = {ONLY: adapters} if isinstance(adapters, Adapter) else adapters
        with bank(base, named, allow_different_base=allow_different_base) as made:
            yield made


def assign_rows(
    count: int, bank: Bank | None, adapters: Adapters, rows: Sequence[str | None] | str | None
) -> list[str | None]:
    """The adapter of each prompt.

    Raises:
        RouteError: the numbers of rows and prompts differ, or rows is missing although there are several
            adapters.
    """
    if rows is None:
        if bank is None:
            return [None] * count
        if isinstance(adapters, Bank):
            rows = bank.active * count if len(bank.active) == 1 else bank.active
        elif len(bank.names) == 1:
            rows = bank.names * count
        else:
            raise RouteError(
                f"there are {len(bank.names)} adapters ({', '.join(bank.names)}); say with rows= which "
                "adapter answers each prompt"
            )
    names: list[str | None] = [rows] * count if isinstance(rows, str) else list(rows)
    if len(names) != count:
        raise RouteError(
            f"there are {count} prompts and {len(names)} rows; give an adapter name (or None) for each prompt"
        )
    if bank is None and any(name is not None for name in names):
        raise RouteError("rows names adapters, but none were given; pass them as adapters=")
    return names


class PromptEncoder:
    """Encodes prompts and decodes answers, with the chat format and the stops of each adapter and the base.

    Args:
        base: the model and its tokenizer.
        bank: the bank with the adapters.
        chat_template: used for all instead of the templates that adapters were trained with.
        date: used for all instead of the day of an adapter's training.
    """

    def __init__(
        self, base: Base, bank: Bank | None, chat_template: Template = None, date: str | None = None
    ) -> None:
        if base.tokenizer is None:
            raise DataError(
                "this base has no tokenizer, so prompts cannot be encoded; pass Base(model, tokenizer)"
            )
        self.base, self.bank, self._date = base, bank, date
        self._template = find_template(chat_template)
        self._formats: dict[str, ChatFormat] = {}
        self._model_stops = _generation_stops(base)

    def format(self, name: str | None, *, as_trained: bool = True) -> ChatFormat:
        """The chat format that an adapter was trained with, otherwise the tokenizer's own.

        Args:
            name: of the adapter; None is the base.
            as_trained: see `ChatFormat`.
        """
        card = self._card(name)
        template = self._template or (card.chat_template if card else None)
        key = repr((template, as_trained))
        if key not in self._formats:
            self._formats[key] = ChatFormat(
                self.base.tokenizer, template, date=self._date, as_trained=as_trained
            )
        return self._formats[key]

    def request(
        self,
        prompt: Prompt,
        name: str | None,
        *,
        tools: Sequence[Any] = (),
        source: str,
        sampling: SamplingParams | None = None,
    ) -> Request:
        """A tokenised prompt for one adapter; for the base, with the template's own generation prompt."""
        chat = self.format(name, as_trained=name is not None)
        tokens = chat.prompt_tokens(prompt, tools=tools or None, where=source)
        stops, strings = self._stops(name)
        return Request(tuple(tokens), name, stops, source, strings, sampling or SamplingParams())

    def answer(self, output: Output, name: str | None, tools: Sequence[Any] = ()) -> Answer:
        """An output as an `Answer`: content, reasoning and tool calls."""
        reply = self.reply(output, name, tools)
        return Answer(
            reply.content, output.tokens, name, output.finish, reply.reasoning, tuple(reply.tool_calls)
        )

    def reply(self, output: Output, name: str | None, tools: Sequence[Any] = ()) -> Reply:
        """An output as a `Reply`, parsed by the format of the chat template."""
        chat = self.format(name, as_trained=name is not None)
        return chat.read_reply(self.raw(output), tools)

    def raw(self, output: Output) -> str:
        """The text of an output with special tokens, up to its stop string."""
        text = self._decode(output.tokens, skip_special_tokens=False)
        return text if output.stop_string is None else text[: text.find(output.stop_string)]

    def written(self, output: Output) -> str:
        """The complete text of an output without special tokens, up to its stop string."""
        text = self.text(output.tokens)
        return text if output.stop_string is None else text[: text.find(output.stop_string)]

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special tokens."""
        return self._decode(tokens, skip_special_tokens=True)

    def _decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.base.tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _stops(self, name: str | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Stop tokens and stop strings of the tokenizer, the template, the card and the generation config."""
        chat, card = self.format(name), self._card(name)
        tokens, strings = chat.stops(card.stop_tokens if card else ())
        return (
            tuple(dict.fromkeys((*chat.stop_token_ids, *tokens, *self._model_stops))),
            tuple(dict.fromkeys((*chat.stop_strings, *strings))),
        )

    def _card(self, name: str | None) -> Card | None:
        return self.bank.card(name) if self.bank is not None and name is not None else None


def _generation_stops(base: Base) -> tuple[int, ...]:
    """The stop tokens in a model's generation config."""
    stops = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    return (stops,) if isinstance(stops, int) else tuple(stops or ())


def _check_prompts(prompts: Sequence[Prompt] | str) -> list[Prompt]:
    one = isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable)
    given: list[Any] = [prompts] if one else list(prompts)
    for number, prompt in enumerate(given, start=1):
        if isinstance(prompt, Mapping):
            raise ConfigError(
                f"prompt {number} is a single message; a conversation is a list of messages, and "
                "prompts a list of conversations: write [[{...}]]"
            )
        if not isinstance(prompt, str | Sequence | Conversation):
            raise DataError(
                f"prompt {number} has type {type(prompt).__name__}; give a text or a list of messages"
            )
    return given
