"""Groups tokenised prompts into batches and runs them, with a route for each row.

It renders no prompts and decodes no answers: `generate` and `chat` do.
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
from brushstroke.errors import DataError
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
    """Answer requests in batches of similar length; the results have the order of the requests.

    One batch may mix adapters and the base. Requests with different sampling parameters or stops run in
    different batches. If the model does not support left padding, so do requests of different lengths.

    Args:
        base: a causal language model of transformers.
        requests: the prompts, with adapter, stops and sampling parameters.
        batch_size: maximum number of requests in one batch.
        bank: contains the adapters that the requests name.
        streamer: a streamer of transformers, for a single request.
        on_done: called after each batch with the number of answered requests.

    Raises:
        ConfigError: an invalid batch size.
        DataError: a prompt is empty, or prompt and answer together exceed the model's context.
        RouteError: no bank is given, and the model's active route assigns adapters per row.
    """
    check_batch_size(batch_size)
    _check_requests(base.model, requests)
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
    """Group the requests by sampling parameters; each group draws from one random generator."""
    groups: dict[SamplingParams, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.sampling, []).append(index)
    yield from groups.items()


def _may_be_padded(base: Base, requests: Sequence[Request]) -> bool:
    """Whether requests of different lengths can share a padded batch without changing the answers."""
    longest = max(len(request.tokens) + request.sampling.max_new_tokens for request in requests)
    limit = dynamic_rope_limit(base.model)
    return (limit is None or longest <= limit) and supports_left_padding(base.model, pad_id(base))


def _check_requests(model: nn.Module, requests: Sequence[Request]) -> None:
    """Refuse empty prompts, unknown tokens, and requests that exceed the model's context."""
    context = context_length(model)
    for request in requests:
        if not request.tokens:
            raise DataError(f"{request.source} is empty; give at least one token")
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
    """Batches of the requests `indices`, longest prompts first; each batch has one set of stops.

    With `equal`, all prompts of a batch have the same length. Within a batch, rows of one adapter are
    adjacent, so that no rows must be gathered.
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
    """Context manager: ignore the model's generation defaults; put all modules in evaluation mode."""
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
    """Context manager: seed the random draws; the caller's random state does not change."""
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=sampling.temperature > 0):
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
        yield
