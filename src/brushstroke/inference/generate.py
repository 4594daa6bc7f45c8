"""Answers to prompts, each by the adapter that its row names, over transformers' `generate`.

It holds no conversation: `chat` does.
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

ONLY = "adapter"  # the name of an adapter that is given alone

Prompt = str | Sequence[Mapping[str, Any]] | Conversation
Adapters = Bank | Mapping[str, Adapter] | Adapter | None


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt.

    Args:
        text: the answer, without special tokens, reasoning and tool calls.
        tokens: its tokens, without the one that ended it.
        adapter: the adapter that answered, by its name; None is the model as it stands.
        finish: "stop" where a stop token or string ended it, "length" where `max_new_tokens` did.
        reasoning: what the model wrote in the place that its chat template has for reasoning.
        tool_calls: calls as {"name": ..., "arguments": {...}}, read back as the chat template writes them.
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
    """Answer prompts, in their order; one batch may mix several adapters and the untouched base.

    A text is a user turn where there is a chat template, else the beginning of a text. Every prompt is
    written with the chat template that its adapter was trained with, else the tokenizer's own. The sampling
    defaults of the model never apply.

    Args:
        base: the model and its tokenizer.
        prompts: texts, or conversations as lists of messages (or `Conversation`s, each with its own tools).
        adapters: one adapter (named "adapter"), several by name, or a bank that is in the base already.
            Without it the model answers as it stands, with the one adapter that is in force in it.
        rows: the adapter of each prompt by name; None in the list is the base; one name serves all. Without
            it: the only adapter, or the bank's route in force.
        max_new_tokens: most tokens of an answer, its stop token included.
        temperature: 0 takes the likeliest token each time.
        top_p: with a temperature, the share of the probability that is drawn from.
        seed: of the draws.
        num_beams: width of a beam search.
        batch_size: prompts in one batch.
        tools: declarations of functions that the model may call, for prompts that bring none.
        chat_template: used for every prompt, whatever its adapter: a template, a file, or the name of one.
        date: what chat templates take for today (YYYY-MM-DD); by default the day of the adapter's training,
            and today for others.
        allow_different_base: use adapters although their fingerprints say that they belong to another base.

    Raises:
        DataError: a prompt that cannot be written, is empty, or does not fit the model's context.
        ConfigError, RouteError: settings or names that cannot work.
        BaseMismatchError, ShapeError: an adapter that does not fit the base.
    """
    require_base(base)
    sampling = SamplingParams(max_new_tokens, temperature, top_p, seed, num_beams)
    given = _check_prompts(prompts)
    with open_bank(base, adapters, allow_different_base=allow_different_base) as held:
        names = assign_rows(len(given), held, adapters, rows)
        encoder = PromptEncoder(base, held, chat_template, date)
        asked = list(zip(given, names, strict=True))
        requests = [
            encoder.request(prompt, name, tools=tools, source=f"prompt {number}", sampling=sampling)
            for number, (prompt, name) in enumerate(asked, start=1)
        ]
        outputs = run_requests(base, requests, batch_size=batch_size, bank=held)
        return [
            encoder.answer(output, name, tools_of(prompt) or tools)
            for output, (prompt, name) in zip(outputs, asked, strict=True)
        ]


def tools_of(prompt: Prompt) -> Sequence[Any]:
    """The functions that a prompt declares by itself."""
    return prompt.tools if isinstance(prompt, Conversation) else ()


def shown_prompt(prompt: Prompt) -> Any:
    """A prompt as JSON: a text, or messages."""
    return [dict(m) for m in prompt.messages] if isinstance(prompt, Conversation) else prompt


@contextmanager
def open_bank(base: Base, adapters: Adapters, *, allow_different_base: bool = False) -> Iterator[Bank | None]:
    """Inside, the adapters sit in the base; a bank that is given is used as it is and stays.

    Raises:
        ConfigError: something else than adapters.
        RouteError: a bank of another model.
    """
    if isinstance(adapters, Bank):
        if adapters.model is not unwrap(base):
            raise RouteError("this bank is in another model; make one with bank(base, ...) for this base")
        yield adapters
    elif adapters is None:
        yield None
    elif not isinstance(adapters, Mapping):
        raise ConfigError(
            f"adapters must be an Adapter, several by name, or a Bank; got {type(adapters).__name__}: load a "
            "folder with load(folder), and name several in a dict"
        )
    elif not isinstance(adapters, Adapter) and not adapters:
        yield None
    else:
        # An Adapter is a mapping itself, from sites to updates.
        named = {ONLY: adapters} if isinstance(adapters, Adapter) else adapters
        with bank(base, named, allow_different_base=allow_different_base) as made:
            yield made


def assign_rows(
    count: int, held: Bank | None, adapters: Adapters, rows: Sequence[str | None] | str | None
) -> list[str | None]:
    """The adapter of each prompt.

    Raises:
        RouteError: another number of rows than prompts, or no rows where the adapters leave a choice.
    """
    if rows is None:
        if held is None:
            return [None] * count
        if isinstance(adapters, Bank):
            rows = held.active * count if len(held.active) == 1 else held.active
        elif len(held.names) == 1:
            rows = held.names * count
        else:
            raise RouteError(
                f"there are {len(held.names)} adapters ({', '.join(held.names)}); say with rows= which of "
                "them answers each prompt"
            )
    names: list[str | None] = [rows] * count if isinstance(rows, str) else list(rows)
    if len(names) != count:
        raise RouteError(
            f"there are {count} prompts and {len(names)} rows; give an adapter name (or None) for each prompt"
        )
    if held is None and any(name is not None for name in names):
        raise RouteError("rows name adapters, but none were given; pass them as adapters=")
    return names


class PromptEncoder:
    """For each adapter in a bank, and the base: its chat format and what ends its answers.

    Args:
        base: the model and its tokenizer.
        held: the adapters.
        chat_template: for all, in place of the templates that adapters were trained with.
        date: for all, in place of the day of an adapter's training.
    """

    def __init__(
        self, base: Base, held: Bank | None, chat_template: Template = None, date: str | None = None
    ) -> None:
        if base.tokenizer is None:
            raise DataError(
                "this base has no tokenizer, so prompts cannot be read; pass Base(model, tokenizer)"
            )
        self.base, self.bank, self._date = base, held, date
        self._template = find_template(chat_template)
        self._formats: dict[str, ChatFormat] = {}
        self._model_stops = _generation_stops(base)

    def format(self, name: str | None, *, as_trained: bool = True) -> ChatFormat:
        """The chat format that an adapter was trained with, else the tokenizer's own.

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
        """A prompt as tokens, for one adapter; the base alone is asked as its template asks."""
        asked = self.format(name, as_trained=name is not None)
        tokens = asked.prompt_tokens(prompt, tools=tools or None, where=source)
        stops, strings = self._stops(name)
        return Request(tuple(tokens), name, stops, source, strings, sampling or SamplingParams())

    def answer(self, output: Output, name: str | None, tools: Sequence[Any] = ()) -> Answer:
        """What a model said, in its parts."""
        reply = self.reply(output, name, tools)
        return Answer(
            reply.content, output.tokens, name, output.finish, reply.reasoning, tuple(reply.tool_calls)
        )

    def reply(self, output: Output, name: str | None, tools: Sequence[Any] = ()) -> Reply:
        """An output in its parts, read as the chat template writes them."""
        asked = self.format(name, as_trained=name is not None)
        return asked.read_reply(self.raw(output), tools)

    def raw(self, output: Output) -> str:
        """The text of an output with its special tokens, up to the string that ended it."""
        text = self._decode(output.tokens, skip_special_tokens=False)
        return text if output.stop_string is None else text[: text.find(output.stop_string)]

    def written(self, output: Output) -> str:
        """The whole text of an output without special tokens, up to the string that ended it."""
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
        """What ends an answer: of the tokenizer, the template, the card, and the model's own settings."""
        chat, card = self.format(name), self._card(name)
        tokens, strings = chat.stops(card.stop_tokens if card else ())
        return (
            tuple(dict.fromkeys((*chat.stop_token_ids, *tokens, *self._model_stops))),
            tuple(dict.fromkeys((*chat.stop_strings, *strings))),
        )

    def _card(self, name: str | None) -> Card | None:
        return self.bank.card(name) if self.bank is not None and name is not None else None


def _generation_stops(base: Base) -> tuple[int, ...]:
    """The stop tokens in a model's own settings for generation."""
    stops = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    return (stops,) if isinstance(stops, int) else tuple(stops or ())


def _check_prompts(prompts: Sequence[Prompt] | str) -> list[Prompt]:
    if not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts must be texts or conversations; got {prompts!r}")
    if isinstance(prompts, Mapping):
        raise ConfigError("prompts is a single message; a conversation is a list of messages: [[{...}]]")
    given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
    for number, prompt in enumerate(given, start=1):
        if isinstance(prompt, Mapping):
            raise ConfigError(
                f"prompt {number} is a single message; a conversation is a list of messages, and "
                "prompts a list of conversations: write [[{...}]]"
            )
        if not isinstance(prompt, str | Sequence | Conversation):
            raise DataError(
                f"prompt {number} is a {type(prompt).__name__}; give a text or a list of messages"
            )
    return given
