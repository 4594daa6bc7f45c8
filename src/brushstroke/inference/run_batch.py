"""One batch of prompts, run through transformers' `generate`; nothing is computed twice or for too long.

What all prompts of an adapter begin with, a system message or an instruction, is computed once and its keys
and values copied to the rows. Rows that are answered leave: the others go on as a smaller batch, so that one
long answer does not keep many finished ones in every product. Both need a cache whose rows can be picked.
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

LEAVING_SHARE = 0.25  # of a batch: so many answered rows leave together
LEAST_SAVED = 64  # tokens: below it computing a shared beginning by itself does not pay


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
        bank: holds the adapters that the prompts name.
        streamer: transformers' streamer, for a single prompt.
    """
    sampling, stops, pad = batch[0].sampling, Stops(base.tokenizer, batch[0]), pad_id(base)
    options = _options(sampling, stops.tokens, pad)
    if streamer is not None:
        options["streamer"] = streamer
    apart = len(batch) > 1 and streamer is None and sampling.num_beams == 1
    cache = row_cache(base.model) if apart else None
    room = max(len(request.tokens) for request in batch) + sampling.max_new_tokens
    shared = _prefill(base, batch, cache, bank, pad, room) if cache is not None else 0
    ids, mask = _padded(batch, shared, pad, base.device)
    width = ids.shape[1]
    outputs: dict[int, Output] = {}
    rows = list(range(len(batch)))
    while rows:
        if cache is not None:
            options |= {**cache.option, "stopping_criteria": [_some_answered(stops, width)]}
        elif stops.strings:
            options["stopping_criteria"] = [lambda ids, _, **__: stops.reached(ids, width)]
        left = sampling.max_new_tokens - (ids.shape[1] - width)
        with routed(bank, [batch[row].adapter for row in rows]):
            ids = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=left, **options)
        answers = [stops.output(row) for row in ids[:, width:].tolist()]
        budget_left = cache is not None and ids.shape[1] - width < sampling.max_new_tokens
        stay = [i for i, answer in enumerate(answers) if budget_left and answer.finish == "length"]
        outputs.update(zip(rows, answers, strict=True))  # those that stay get theirs anew
        rows = [rows[i] for i in stay]
        if cache is not None and stay:
            cache.pick(stay)
            ids, mask = ids[stay], F.pad(mask[stay], (0, ids.shape[1] - mask.shape[1]), value=1)
    return [outputs[row] for row in range(len(batch))]


def _prefill(
    base: Base, batch: Sequence[Request], cache: RowCache, bank: Bank | None, pad: int, width: int
) -> int:
    """Compute once what the prompts of each adapter begin with; returns how many tokens of each that is.

    `width` is what the batch's rows grow to.
    """
    first = {request.adapter: request.tokens for request in reversed(batch)}
    shared = min(len(request.tokens) for request in batch) - 1
    for request in batch:
        shared = min(shared, common_length(first[request.adapter], request.tokens))
    if shared * (len(batch) - len(first)) < LEAST_SAVED:
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
    """Inside, each row of a batch has its adapter; nothing without a bank."""
    return nullcontext() if bank is None else bank.rows(adapters)


def _options(sampling: SamplingParams, stops: Sequence[int], pad: int) -> dict[str, Any]:
    """How transformers' `generate` is to choose tokens, and where to end."""
    options = {"num_beams": sampling.num_beams, "pad_token_id": pad, "eos_token_id": list(stops) or None}
    if not sampling.temperature:
        return {**options, "do_sample": False}
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {**options, "do_sample": True, **drawn}


def _padded(batch: Sequence[Request], shared: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (b×n) with padding behind the shared ones, and the mask of what is no padding."""
    width = max(len(request.tokens) for request in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        tokens = torch.tensor(request.tokens)
        behind = width - len(tokens) + shared
        ids[row, :shared], ids[row, behind:] = tokens[:shared], tokens[shared:]
        mask[row, :shared], mask[row, behind:] = 1, 1
    return ids.to(device), mask.to(device)


def _some_answered(stops: Stops, width: int) -> Callable[..., Tensor]:
    """What transformers asks after each token: all rows halt once enough of them are answered."""
    answered: Tensor | None = None

    def halt(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal answered
        now = stops.reached(ids, width)
        answered = now if answered is None else answered | now
        return (answered.sum() >= LEAVING_SHARE * len(answered)).expand(len(answered))

    return halt


def pad_id(base: Base) -> int:
    """Any token will do: padding is masked, and answers are cut by position."""
    known = (getattr(base.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if isinstance(token, int) and has_embedding(base.model, token)), 0)
