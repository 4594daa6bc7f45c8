"""Runs one batch of prompts with transformers' `generate`; shares prefixes and drops finished rows.

A prefix that all prompts of an adapter share, such as a system message, is computed once, and its keys and
values are copied to the rows. Finished rows are dropped: the others continue as a smaller batch, so that one
long answer does not keep many finished rows in every matrix product. Both need a cache whose rows can be
selected; without one, the batch runs as a whole. It does not group requests: `batching` does.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brushstroke.base import Base, RowCache, has_embedding, row_cache
from brushstroke.data import common_length
from brushstroke.inference.probes import supports_masked_gap
from brushstroke.inference.request import Output, Request, SamplingParams
from brushstroke.inference.stops import Stops
from brushstroke.layers import Bank

COMPACT_SHARE = 0.25  # drop finished rows once this share of the batch has finished
MIN_SAVED = 64  # tokens that a shared prefix must save; below it, computing it separately is not faster


def run_batch(
    base: Base,
    batch: Sequence[Request],
    *,
    bank: Bank | None = None,
    streamer: Any = None,
) -> list[Output]:
    """Answer prompts that share their sampling parameters, stop tokens and stop strings, in one batch.

    Args:
        base: a causal language model of transformers.
        batch: the prompts.
        bank: contains the adapters that the prompts name.
        streamer: a streamer of transformers, for a single prompt.
    """
    sampling, stops, pad = batch[0].sampling, Stops(base.tokenizer, batch[0]), pad_id(base)
    options = _options(sampling, stops.tokens, pad)
    if streamer is not None:
        options["streamer"] = streamer
    can_split = len(batch) > 1 and streamer is None and sampling.num_beams == 1
    cache = row_cache(base.model) if can_split else None
    room = max(len(request.tokens) for request in batch) + sampling.max_new_tokens
    shared = _prefill(base, batch, cache, bank, pad, room) if cache is not None else 0
    ids, mask = _padded(batch, shared, pad, base.device)
    width = ids.shape[1]
    outputs: dict[int, Output] = {}
    rows = list(range(len(batch)))
    while rows:  # each round drops the finished rows
        if cache is not None:
            options |= {**cache.option, "stopping_criteria": [_enough_finished(stops, width)]}
        elif stops.strings:
            options["stopping_criteria"] = [lambda ids, _, **__: stops.reached(ids, width)]
        left = sampling.max_new_tokens - (ids.shape[1] - width)
        with routed(bank, [batch[row].adapter for row in rows]):
            ids = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=left, **options)
        answers = [stops.output(row) for row in ids[:, width:].tolist()]
        budget_left = cache is not None and ids.shape[1] - width < sampling.max_new_tokens
        stay = [i for i, answer in enumerate(answers) if budget_left and answer.finish == "length"]
        outputs.update(zip(rows, answers, strict=True))  # unfinished rows are overwritten by later rounds
        rows = [rows[i] for i in stay]
        if cache is not None and stay:
            cache.pick(stay)
            ids, mask = ids[stay], F.pad(mask[stay], (0, ids.shape[1] - mask.shape[1]), value=1)
    return [outputs[row] for row in range(len(batch))]


def _prefill(
    base: Base, batch: Sequence[Request], cache: RowCache, bank: Bank | None, pad: int, width: int
) -> int:
    """Compute the shared prefix of each adapter's prompts once, into the cache; returns its length in tokens.

    The length is the same for all adapters, and 0 if sharing is not used. `width` is the maximum width of the
    batch, with its answers.
    """
    first = {request.adapter: request.tokens for request in reversed(batch)}
    shared = min(len(request.tokens) for request in batch) - 1
    for request in batch:
        shared = min(shared, common_length(first[request.adapter], request.tokens))
    if shared * (len(batch) - len(first)) < MIN_SAVED:
        return 0
    with routed(bank, [None]):
        if not supports_masked_gap(base.model, pad, width):
            return 0
    ids = torch.tensor([tokens[:shared] for tokens in first.values()], device=base.device)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": pad, **cache.option}
    with routed(bank, list(first)):
        base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    cache.pick([list(first).index(request.adapter) for request in batch])
    return shared


def routed(bank: Bank | None, adapters: Sequence[str | None]) -> AbstractContextManager[Any]:
    """Context manager: assign an adapter to each row of a batch; does nothing without a bank."""
    return nullcontext() if bank is None else bank.rows(adapters)


def _options(sampling: SamplingParams, stops: Sequence[int], pad: int) -> dict[str, Any]:
    """Sampling and stop options for transformers' `generate`."""
    options = {"num_beams": sampling.num_beams, "pad_token_id": pad, "eos_token_id": list(stops) or None}
    if not sampling.temperature:
        return {**options, "do_sample": False}
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {**options, "do_sample": True, **drawn}


def _padded(batch: Sequence[Request], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (b×n) with padding after the shared prefix, and the mask (1 for tokens, 0 for padding)."""
    width = max(len(request.tokens) for request in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        tokens = torch.tensor(request.tokens)
        start = width - len(tokens) + shared
        ids[row, :shared], ids[row, start:] = tokens[:shared], tokens[shared:]
        mask[row, :shared], mask[row, start:] = 1, 1
    return ids.to(device), mask.to(device)


def _enough_finished(stops: Stops, width: int) -> Callable[..., Tensor]:
    """A stopping criterion for transformers: stops all rows once enough of them have finished."""
    finished: Tensor | None = None

    def halt(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal finished
        now = stops.reached(ids, width)
        finished = now if finished is None else finished | now
        return (finished.sum() >= COMPACT_SHARE * len(finished)).expand(len(finished))

    return halt


def pad_id(base: Base) -> int:
    """The padding token. Any token works: padding is masked, and answers are cut by position."""
    known = (getattr(base.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if isinstance(token, int) and has_embedding(base.model, token)), 0)
