"""Prompts that are tokens already, in batches with a route for each row.

It renders no prompt and decodes no answer: `generate` and `chat` do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from brushstroke.base import (
    Base,
    context_length,
    dynamic_rope_limit,
    preserved_rope,
    quiet_transformers,
    refuse_unknown_tokens,
)
from brushstroke.errors import ConfigError, DataError
from brushstroke.inference.probes import supports_left_padding
from brushstroke.inference.request import Output, Request, SamplingParams, check_batch_size
from brushstroke.inference.run_batch import pad_id, routed, run_batch
from brushstroke.layers import Bank, require_uniform_route


def run_requests(
    base: Base,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    bank: Bank | None = None,
    streamer: Any = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Output]:
    """Answer requests in batches of similar length; the results come in the order of the requests.

    One batch may mix adapters and the base. Requests with other sampling parameters or stops run in different
    batches, and those of different lengths where the model does not answer a padded row as it does alone.

    Args:
        base: a causal language model of transformers.
        requests: the prompts, and how each is answered.
        batch_size: most requests in one batch.
        bank: holds the adapters that the requests name.
        streamer: transformers' streamer, for a single request.
        on_done: called after each batch with the number of requests that are answered.

    Raises:
        ConfigError: a model that cannot generate, or a batch of no requests.
        DataError: a prompt is empty, or with its answer longer than the model's context.
        RouteError: without a bank, a route in force in the model tells rows apart.
    """
    if not hasattr(base.model, "generate"):
        raise ConfigError(
            f"{type(base.model).__name__} has no generate(); pass a causal language model of transformers"
        )
    check_batch_size(batch_size)
    _refuse_misfits(base.model, requests)
    if bank is None:
        require_uniform_route(base)
    outputs: dict[int, Output] = {}
    with torch.no_grad(), quiet_transformers(), _ready(base.model):
        uneven = batch_size > 1 and len({len(request.tokens) for request in requests}) > 1
        with routed(bank, [None]), preserved_rope(base.model):
            equal = uneven and not _may_be_padded(base, requests)
        for sampling, indices in _by_sampling(requests):
            with _seeded(base, sampling):
                for batch in _batches(requests, indices, batch_size, equal):
                    chosen = [requests[index] for index in batch]
                    with preserved_rope(base.model):
                        answers = run_batch(base, chosen, bank=bank, streamer=streamer)
                    outputs.update(zip(batch, answers, strict=True))
                    if on_done is not None:
                        on_done(len(outputs))
    return [outputs[index] for index in range(len(requests))]


def _by_sampling(requests: Sequence[Request]) -> Iterator[tuple[SamplingParams, list[int]]]:
    """The requests with the same sampling parameters, which draw from one generator."""
    found: dict[SamplingParams, list[int]] = {}
    for index, request in enumerate(requests):
        found.setdefault(request.sampling, []).append(index)
    yield from found.items()


def _may_be_padded(base: Base, requests: Sequence[Request]) -> bool:
    """Whether rows of different lengths are answered together as each one alone."""
    longest = max(len(request.tokens) + request.sampling.max_new_tokens for request in requests)
    moving = dynamic_rope_limit(base.model)
    return (moving is None or longest <= moving) and supports_left_padding(base.model, pad_id(base))


def _refuse_misfits(model: nn.Module, requests: Sequence[Request]) -> None:
    context = context_length(model)
    for request in requests:
        if not request.tokens:
            raise DataError(f"{request.source} is empty; give at least one token to go on from")
        refuse_unknown_tokens(model, request.tokens, request.source)
        room = request.sampling.max_new_tokens
        if context is not None and len(request.tokens) + room > context:
            raise DataError(
                f"{request.source} has {len(request.tokens)} tokens; with room for {room} "
                f"new ones that is more than the model's context of {context}: shorten it, or lower "
                "max_new_tokens (--max-new-tokens)"
            )


def _batches(
    requests: Sequence[Request], indices: Sequence[int], size: int, equal: bool
) -> Iterator[list[int]]:
    """Some requests in batches of one set of stops each, and of one length if asked; longest prompts first.

    Within a batch the rows of one adapter stand together, so that no row has to be gathered.
    """
    ends = [(sorted(request.stop_token_ids), sorted(request.stop_strings)) for request in requests]
    order = sorted(indices, key=lambda i: (ends[i], -len(requests[i].tokens), i))
    kind = lambda i: (ends[i], len(requests[i].tokens) if equal else None)  # noqa: E731
    for _, group in groupby(order, key=kind):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield sorted(alike[start : start + size], key=lambda i: requests[i].adapter or "")


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
def _seeded(base: Base, sampling: SamplingParams) -> Iterator[None]:
    """Inside, draws come from the seed; the caller's random state is untouched."""
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=sampling.temperature > 0):
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
        yield
