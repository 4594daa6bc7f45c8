"""Tests, once per model, whether left padding or a masked gap changes its logits.

Many models count positions or windows by a token's index, or have a recurrent state that padding changes, and
their configs do not say so. The tests run transformers' `generate` on generated tokens. They do not test the
rotary frequencies of longer rows (`dynamic_rope_limit`).
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brushstroke.base import RowCache, context_length, model_dtype, row_cache, vocabulary_size

BEGIN, REST, PADDING = 8, 5, 6  # tokens of a test row (beginning, rest), and padding before it
MIN_GAP = 1024  # padding tokens inside a row; detects sliding windows of up to this many tokens
TOLERANCE = {  # relative difference of the next token's logits
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# Maximum difference, as a share of the difference that unmasked padding or a missing prefix makes (SmolLM2 in
# bf16: 0.03). Deep models whose rounding exceeds it fail the test; they get batches of prompts of one length.
MAX_ERROR_SHARE = 0.1

_results: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def supports_left_padding(model: nn.Module, pad: int) -> bool:
    """Whether a row with masked padding before it has the same logits as without padding."""
    return _cached(model, "padding", 0, lambda: _padding_is_ignored(model, pad))


def supports_masked_gap(model: nn.Module, pad: int, width: int) -> bool:
    """Whether masked padding may follow a row's beginning, whose keys and values are in the cache.

    Args:
        model: a causal language model of transformers.
        pad: the padding token.
        width: width of the batch in tokens; the test detects sliding windows narrower than this.
    """
    gap = MIN_GAP
    while gap < width:
        gap *= 2
    return _cached(model, "gap", gap, lambda: _gap_is_ignored(model, pad, gap))


def _cached(model: nn.Module, what: str, size: int, test: Callable[[], bool]) -> bool:
    """The cached result of a test, for the model with its current config and dtype."""
    key = (what, size, model_dtype(model), repr(getattr(model, "config", None)))
    known = _results.setdefault(model, {})
    if key not in known:
        try:
            with torch.random.fork_rng(devices=[]):
                known[key] = test()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # any error of the model means: not supported
            known[key] = False
    return known[key]


def _padding_is_ignored(model: nn.Module, pad: int) -> bool:
    row, other = _tokens(model, pad, REST), _tokens(model, pad, PADDING + REST)
    hidden = [0] * PADDING + [1] * REST
    ids = [[pad] * PADDING + row, other]
    alone = _next_logits(model, pad, [row], [[1] * REST])
    padded = _next_logits(model, pad, ids, [hidden, [1] * len(other)])
    unmasked = _next_logits(model, pad, ids, [[1] * len(other)] * 2)
    return _near(model_dtype(model), alone[0], padded[0], unmasked[0])


def _gap_is_ignored(model: nn.Module, pad: int, gap: int) -> bool:
    cache = row_cache(model)
    if cache is None or not cache.gaps:
        return False
    tokens = _tokens(model, pad, BEGIN + REST)
    gap = max(1, min(gap, (context_length(model) or 2 * gap) - len(tokens) - 1))
    alone = _next_logits(model, pad, [tokens], [[1] * len(tokens)])
    without_prefix = _next_logits(model, pad, [tokens[BEGIN:]], [[1] * REST])
    _next_logits(model, pad, [tokens[:BEGIN]], [[1] * BEGIN], cache)
    for layer in cache.cache.layers:
        layer.keys, layer.values = (F.pad(x, (0, 0, 0, gap)) for x in (layer.keys, layer.values))
    ids = tokens[:BEGIN] + [pad] * gap + tokens[BEGIN:]
    with_gap = _next_logits(model, pad, [ids], [[1] * BEGIN + [0] * gap + [1] * REST], cache)
    return _near(model_dtype(model), alone, with_gap, without_prefix)


def _near(dtype: torch.dtype, right: Tensor, found: Tensor, wrong: Tensor) -> bool:
    """Whether `found` equals the logits `right` up to rounding in the dtype; `wrong` gives the scale."""
    difference, scale = (float((x - right).norm() / right.norm()) for x in (found.double(), wrong.double()))
    return difference <= min(TOLERANCE[dtype], MAX_ERROR_SHARE * scale)


def _next_logits(
    model: Any,
    pad: int,
    ids: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]],
    cache: RowCache | None = None,
) -> Tensor:
    """The next-token logits (b×v) of each row; the cache is extended by tokens that it lacks."""
    device = next(model.parameters()).device
    found = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
        **(cache.option if cache is not None else {}),
    )
    return found.logits[0]


def _tokens(model: nn.Module, pad: int, count: int) -> list[int]:
    """Random tokens other than the padding token, which some models ignore."""
    vocabulary = vocabulary_size(model) or 1
    drawn = torch.randint(0, vocabulary, (2 * count + 8,), generator=torch.Generator().manual_seed(count))
    return [token for token in drawn.tolist() if token != pad][:count]
