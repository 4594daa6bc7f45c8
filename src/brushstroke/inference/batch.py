"""One batch of prompts, run through transformers' `generate`; rows that are answered leave it on the way.

A batch costs as long as its slowest answer takes. Where a model's cache can be cut, the rows that are left go
on as a smaller batch, so that one long answer does not keep many finished ones in every product.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brushstroke.base import Base, fresh_cache
from brushstroke.inference.request import Output, Request, Sampling
from brushstroke.layers import Bank

LEAVING_SHARE = 0.25  # of a batch: so many answered rows leave together


def run_batch(
    base: Base,
    batch: Sequence[Request],
    sampling: Sampling,
    *,
    bank: Bank | None = None,
    streamer: Any = None,
) -> list[Output]:
    """Answer prompts that share their stop tokens, in one batch.

    Args:
        base: a causal language model of transformers.
        batch: the prompts.
        sampling: how tokens are chosen; its batch size plays no part here.
        bank: holds the adapters that the prompts name.
        streamer: transformers' streamer, for a single prompt.
    """
    stops, pad = batch[0].stops, _pad_id(base)
    ids, mask = _padded(batch, pad, base.device)
    width = ids.shape[1]
    leaves = bool(stops) and len(batch) > 1 and streamer is None and sampling.num_beams == 1
    cache_name, cache = fresh_cache(base.model) if leaves else ("", None)
    options = _options(sampling, stops, pad)
    if streamer is not None:
        options["streamer"] = streamer
    outputs: dict[int, Output] = {}
    rows = list(range(len(batch)))
    while rows:
        if cache is not None:
            options |= {cache_name: cache, "stopping_criteria": [_some_answered(stops, ids.device)]}
        room = sampling.max_new_tokens - (ids.shape[1] - width)
        with nullcontext() if bank is None else bank.rows([batch[row].adapter for row in rows]):
            ids = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **options)
        answers = [_ended(row, stops) for row in ids[:, width:].tolist()]
        early = cache is not None and ids.shape[1] - width < sampling.max_new_tokens
        stay = [i for i, answer in enumerate(answers) if early and answer.finish == "length"]
        outputs.update(zip(rows, answers, strict=True))  # those that stay get theirs anew
        rows = [rows[i] for i in stay]
        if cache is not None and stay:
            kept = torch.tensor(stay, device=ids.device)
            cache.batch_select_indices(kept)
            ids, mask = ids[kept], F.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
    return [outputs[row] for row in range(len(batch))]


def _options(sampling: Sampling, stops: Sequence[int], pad: int) -> dict[str, Any]:
    """How transformers' `generate` is to choose tokens, and where to end."""
    options = {"num_beams": sampling.num_beams, "pad_token_id": pad, "eos_token_id": list(stops) or None}
    if not sampling.temperature:
        return {**options, "do_sample": False}
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {**options, "do_sample": True, **drawn}


def _padded(batch: Sequence[Request], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (b×n) with padding on the left, and the mask of what is no padding."""
    width = max(len(request.tokens) for request in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
        mask[row, width - len(request.tokens) :] = 1
    return ids.to(device), mask.to(device)


def _some_answered(stops: Sequence[int], device: torch.device) -> Callable[..., Tensor]:
    """What transformers asks after each token: all rows halt once enough of them are answered."""
    ends = torch.tensor(stops, device=device)
    answered: Tensor | None = None

    def halt(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal answered
        now = torch.isin(ids[:, -1], ends)
        answered = now if answered is None else answered | now
        return (answered.sum() >= LEAVING_SHARE * len(answered)).expand(len(answered))

    return halt


def _ended(tokens: list[int], stops: tuple[int, ...]) -> Output:
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    return Output(tuple(tokens), "length") if end is None else Output(tuple(tokens[:end]), "stop")


def _pad_id(base: Base) -> int:
    """Any token will do: padding is masked, and answers are cut by position."""
    known = (getattr(base.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in known if isinstance(token, int)), 0)
