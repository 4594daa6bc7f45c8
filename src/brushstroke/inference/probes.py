"""What a model bears in a batch of unequal prompts, found out by trying: padding before a row, a gap in it.

Many models count positions or windows by a token's place, or keep a state that padding runs through, and say
so nowhere. Each is tried once, by transformers' `generate` on made-up tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brushstroke.base import RowCache, context_length, model_dtype, row_cache, vocabulary_size

BEGIN, OWN, PADDING = 8, 5, 6  # tokens of a trial's row, and padding before it
LEAST_GAP = 1024  # of padding inside a row: windows of up to this many tokens show
TOLERANCE = {  # relative difference of the next token's logits
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# A right answer is far nearer to the row alone than to one where padding is seen (SmolLM2 in bf16: 0.03 of
# it). Deep models whose rounding is beyond that answer prompts of one length together.
MOST_OF_A_FAULT = 0.1

_found: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def supports_left_padding(model: nn.Module, pad: int) -> bool:
    """Whether a row with masked padding before it is answered as it is alone."""
    return _once(model, "padding", 0, lambda: _padding_is_unseen(model, pad))


def supports_masked_gap(model: nn.Module, pad: int, width: int) -> bool:
    """Whether masked padding may stand behind a row's beginning, whose keys and values are there already.

    Args:
        model: a causal language model of transformers.
        pad: the padding's token.
        width: of the batch, in tokens: a window that is narrower shows.
    """
    gap = LEAST_GAP
    while gap < width:
        gap *= 2
    return _once(model, "gap", gap, lambda: _gap_is_unseen(model, pad, gap))


def _once(model: nn.Module, what: str, size: int, trial: Callable[[], bool]) -> bool:
    """The outcome of a trial, kept for the model as its config and dtype are now."""
    key = (what, size, model_dtype(model), repr(getattr(model, "config", None)))
    known = _found.setdefault(model, {})
    if key not in known:
        try:
            with torch.random.fork_rng(devices=[]):
                known[key] = trial()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # the model is not ours: whatever it raises means that it does not bear this
            known[key] = False
    return known[key]


def _padding_is_unseen(model: nn.Module, pad: int) -> bool:
    row, other = _tokens(model, pad, OWN), _tokens(model, pad, PADDING + OWN)
    hidden = [0] * PADDING + [1] * OWN
    ids = [[pad] * PADDING + row, other]
    alone = _next_logits(model, pad, [row], [[1] * OWN])
    padded = _next_logits(model, pad, ids, [hidden, [1] * len(other)])
    seen = _next_logits(model, pad, ids, [[1] * len(other)] * 2)
    return _near(model_dtype(model), alone[0], padded[0], seen[0])


def _gap_is_unseen(model: nn.Module, pad: int, gap: int) -> bool:
    cache = row_cache(model)
    if cache is None or not cache.gaps:
        return False
    tokens = _tokens(model, pad, BEGIN + OWN)
    gap = max(1, min(gap, (context_length(model) or 2 * gap) - len(tokens) - 1))
    alone = _next_logits(model, pad, [tokens], [[1] * len(tokens)])
    blind = _next_logits(model, pad, [tokens[BEGIN:]], [[1] * OWN])
    _next_logits(model, pad, [tokens[:BEGIN]], [[1] * BEGIN], cache)
    for layer in cache.cache.layers:
        layer.keys, layer.values = (F.pad(x, (0, 0, 0, gap)) for x in (layer.keys, layer.values))
    ids = tokens[:BEGIN] + [pad] * gap + tokens[BEGIN:]
    parted = _next_logits(model, pad, [ids], [[1] * BEGIN + [0] * gap + [1] * OWN], cache)
    return _near(model_dtype(model), alone, parted, blind)


def _near(dtype: torch.dtype, right: Tensor, found: Tensor, wrong: Tensor) -> bool:
    """Whether logits are the right ones, up to the rounding of the model's dtype; theirs is always wide."""
    difference, fault = (float((x - right).norm() / right.norm()) for x in (found.double(), wrong.double()))
    return difference <= min(TOLERANCE[dtype], MOST_OF_A_FAULT * fault)


def _next_logits(
    model: Any,
    pad: int,
    ids: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]],
    cache: RowCache | None = None,
) -> Tensor:
    """The logits (b×v) behind each row; a cache is filled with what it does not hold yet."""
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
    """Any tokens but the padding, which some models never look at."""
    vocabulary = vocabulary_size(model) or 1
    drawn = torch.randint(0, vocabulary, (2 * count + 8,), generator=torch.Generator().manual_seed(count))
    return [token for token in drawn.tolist() if token != pad][:count]
