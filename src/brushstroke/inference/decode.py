"""Prompts that are tokens already, run through transformers' `generate` in batches with a route for each row.

It renders no prompt and decodes no answer: `generate` and `chat` do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from brushstroke.base import Base, quiet_transformers
from brushstroke.errors import ConfigError, DataError
from brushstroke.layers import Bank, refuse_rows

Finish = Literal["stop", "length"]

MIN_TEMPERATURE = 1e-4  # below it logits overflow when they are divided


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many prompts run at once.

    Args:
        max_new_tokens: most tokens of an answer, its stop token included.
        temperature: 0 takes the likeliest token each time (greedy).
        top_p: with a temperature, the share of the probability that is drawn from.
        seed: of the draws.
        num_beams: width of a beam search; 1 is none.
        batch_size: prompts in one batch.

    Raises:
        ConfigError: a value that cannot work, named.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number; got {value!r}")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}; got {self.temperature!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a whole number from 0 to {2**63 - 1}; got {self.seed!r}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1; got {self.top_p!r}")


@dataclass(frozen=True)
class Request:
    """One prompt: its tokens, the adapter that answers (None is the base), the tokens that end an answer.

    `where` names the prompt in messages.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    stops: tuple[int, ...] = ()
    where: str = "the prompt"


@dataclass(frozen=True)
class Output:
    """The tokens of an answer without its stop token, and how it ended."""

    tokens: tuple[int, ...]
    finish: Finish


def context_length(model: nn.Module) -> int | None:
    """The most tokens that a model has positions for, where its config says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def run_requests(
    base: Base,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    bank: Bank | None = None,
    streamer: Any = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Output]:
    """Answer requests in batches of similar length; the results come in the order of the requests.

    One batch may mix adapters and the base. Requests with different stop tokens run in different batches.

    Args:
        base: a causal language model of transformers.
        requests: the prompts.
        sampling: how tokens are chosen.
        bank: holds the adapters that the requests name.
        streamer: transformers' streamer, for a single request.
        on_done: called after each batch with the number of requests that are answered.

    Raises:
        DataError: a prompt is empty, or with its answer longer than the model's context.
        RouteError: without a bank, a route in force in the model tells rows apart.
    """
    if not hasattr(base.model, "generate"):
        raise ConfigError(
            f"{type(base.model).__name__} has no generate(); pass a causal language model of transformers"
        )
    _refuse_misfits(requests, sampling, context_length(base.model))
    if bank is None:
        refuse_rows(base)
    outputs: dict[int, Output] = {}
    with torch.no_grad(), quiet_transformers(), _ready(base.model), _seeded(base, sampling):
        for batch in _batches(requests, sampling.batch_size):
            chosen = [requests[index] for index in batch]
            with ExitStack() as stack:
                if bank is not None:
                    stack.enter_context(bank.rows([request.adapter for request in chosen]))
                rows = _run_batch(base, chosen, sampling, streamer)
            outputs.update(zip(batch, rows, strict=True))
            if on_done is not None:
                on_done(len(outputs))
    return [outputs[index] for index in range(len(requests))]


def _refuse_misfits(requests: Sequence[Request], sampling: Sampling, context: int | None) -> None:
    for request in requests:
        if not request.tokens:
            raise DataError(f"{request.where} is empty; give at least one token to go on from")
        if context is not None and len(request.tokens) + sampling.max_new_tokens > context:
            raise DataError(
                f"{request.where} has {len(request.tokens)} tokens; with room for {sampling.max_new_tokens} "
                f"new ones that is more than the model's context of {context}: shorten it, or lower "
                "max_new_tokens (--max-new-tokens)"
            )


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """Indices in batches of one set of stop tokens each, longest prompts first.

    Within a batch the rows of one adapter stand together, so that no row has to be gathered.
    """
    order = sorted(
        range(len(requests)), key=lambda i: (sorted(requests[i].stops), -len(requests[i].tokens), i)
    )
    for _, group in groupby(order, key=lambda i: sorted(requests[i].stops)):
        indices = list(group)
        for start in range(0, len(indices), size):
            yield sorted(indices[start : start + size], key=lambda i: requests[i].adapter or "")


def _run_batch(base: Base, batch: Sequence[Request], sampling: Sampling, streamer: Any) -> list[Output]:
    stops, pad = batch[0].stops, _pad_id(base)
    width = max(len(request.tokens) for request in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
        mask[row, width - len(request.tokens) :] = 1
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    generated = base.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        pad_token_id=pad,
        eos_token_id=list(stops) or None,
        **choice,
        **({"streamer": streamer} if streamer is not None else {}),
    )
    return [_ended(row, stops) for row in generated[:, width:].tolist()]


def _ended(tokens: list[int], stops: tuple[int, ...]) -> Output:
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    return Output(tuple(tokens), "length") if end is None else Output(tuple(tokens[:end]), "stop")


def _pad_id(base: Base) -> int:
    """Any token will do: padding is masked, and answers are cut by position."""
    known = (getattr(base.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if isinstance(token, int)), 0)


@contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of the model's own generation defaults holds, and no module is in training mode."""
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    holder: Any = model
    defaults = holder.generation_config
    try:
        for module in training:
            module.training = False
        holder.generation_config = GenerationConfig()
        yield
    finally:
        holder.generation_config = defaults
        for module in training:
            module.training = True


@contextmanager
def _seeded(base: Base, sampling: Sampling) -> Iterator[None]:
    """Inside, draws come from the seed; the caller's random state is untouched."""
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=sampling.temperature > 0):
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
        yield
