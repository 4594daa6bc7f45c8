"""Which way a model's passes run: packed where probes show that each example gets what it gets alone.

Two kinds of probe. Logits are compared: packed against alone. And gradients are looked at: what an example
gives may depend on no embedding of another one, nor on one behind it, and where it does not, a gradient is
exactly 0, in any dtype and however small the model's numbers are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brushstroke.base import context_length, model_dtype
from brushstroke.packed.attention import UnsupportedAttention
from brushstroke.packed.forward import Forward, PackedForward, PaddedForward, find_head
from brushstroke.packed.pack import Group, Pass, Row, unshared
from brushstroke.packed.probes import (
    LONG,
    SHORT,
    capture_embeddings,
    depends,
    jitter_embeddings,
    perturb_zeros,
    probe_rows,
)

TOLERANCE = {  # relative difference of a probe's logits
    torch.float64: 1e-8,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
ROUNDED_TOLERANCE = 1e-3  # in float32, where products may be rounded to fewer bits (TF32)
# In bfloat16, where it is more, what rounding the embeddings changes is the limit, up to this:
MOST_NOISE = 0.15
MAX_SHARE_OF_LEAK = 0.3  # an exact pass is far nearer to the example alone than to a row that leaks


def select_forward(model: nn.Module, share: bool, trained: Sequence[Tensor] = ()) -> tuple[Forward, str]:
    """The packed pass where it is exact, else padded batches.

    Args:
        model: in evaluation mode; an adapter may be in it.
        share: whether shared prefixes are to be computed once.
        trained: the tensors that training will change; those that are 0 are tried with other numbers.

    Returns:
        The forward, and the reason in one line.
    """
    with perturb_zeros(trained):
        return _choose(model, share)


def _choose(model: nn.Module, share: bool) -> tuple[Forward, str]:
    head = find_head(model)
    padded = PaddedForward(model, head, whole=True)
    try:
        causal = _is_causal(padded, model)
        if not causal:
            raise UnsupportedAttention("tokens behind a prediction change it")
        padded = PaddedForward(model, head, whole=False)
        packed = PackedForward(model, head)
        examples = probe_rows(model, _lengths(model))
        alone = _alone(padded, examples)
        difference = _packed_difference(packed, model, examples, alone, share)
        leak = _plain_leak(padded, model)
        limit = _tolerance(model_dtype(model))
        if difference > limit and model_dtype(model) == torch.bfloat16:
            limit = max(limit, min(MOST_NOISE, _rounding_noise(padded, model, examples, alone)))
        if window := packed.lost_window:
            raise UnsupportedAttention(f"its window of {window} tokens is in its masks alone")
    except Exception as error:  # the model is not ours: whatever it raises means that it cannot run packed
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    else:
        if difference <= limit and difference <= MAX_SHARE_OF_LEAK * leak:
            packed.reuses_prefix = share and _held_difference(packed, examples, alone) <= limit
            return packed, f"a packed pair equals each example alone to {difference:.0e}"
        reason = f"a packed pair is off by {difference:.1e} from each example alone, a leak by {leak:.1e}"
    return padded, f"packing is not shown to be right for this model: {reason}"


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return ROUNDED_TOLERANCE
    return TOLERANCE[dtype]


def _is_causal(whole: PaddedForward, model: nn.Module) -> bool:
    """Whether a prediction in the middle of an example depends on no token behind it."""
    tokens = probe_rows(model, SHORT)[0].tokens
    middle = len(tokens) // 2
    with capture_embeddings(model, len(tokens)) as seen:
        logits = whole.logits(unshared([Row(tokens, (middle - 1,))]))
    return not depends(logits, seen, slice(middle, None))


def _packed_difference(
    packed: PackedForward,
    model: nn.Module,
    examples: tuple[Row, ...],
    alone: Sequence[Tensor],
    share: bool,
) -> float:
    """The largest difference of a packed example's logits from those that it has alone, relative to them.

    Raises:
        UnsupportedAttention: a packed example depends on another one's tokens.
    """
    counts = [len(logits) for logits in alone]
    found = []
    for arranged in [unshared(examples)] + [Pass((Group(_shared(examples), examples),))] * share:
        pair = _kept_apart(packed, model, arranged, counts)
        found += [_difference(one, other) for one, other in zip(alone, pair, strict=True)]
    return _largest(found)


def _held_difference(packed: PackedForward, examples: tuple[Row, ...], alone: Sequence[Tensor]) -> float:
    """As `_packed_difference`, of two examples in passes of their own that continue one held prefix."""
    prefix = _shared(examples)
    passes = [Pass((Group(prefix, (example,), i),)) for i, example in enumerate(examples)]
    try:
        with packed.context(), torch.no_grad():
            found = [outputs.logits() for _, outputs in packed.run(passes)]
    except Exception:  # the model is not ours: whatever it raises means that its prefixes cannot be held
        return math.inf
    return _largest([_difference(one, other) for one, other in zip(alone, found, strict=True)])


def _largest(differences: Sequence[float]) -> float:
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def _shared(examples: Sequence[Row]) -> int:
    """Tokens of the probe's examples before each one's own, the first of which is not trained."""
    return examples[0].shareable


def _lengths(model: nn.Module) -> tuple[int, int, int]:
    context = context_length(model)
    return LONG if context and sum(LONG) <= context else SHORT


def _alone(padded: PaddedForward, examples: Sequence[Row]) -> list[Tensor]:
    with torch.no_grad():
        return [padded.logits(unshared([example])) for example in examples]


def _rounding_noise(
    padded: PaddedForward, model: nn.Module, examples: Sequence[Row], alone: Sequence[Tensor]
) -> float:
    """How far an example's logits move where embeddings are rounded once more; deep models multiply that."""
    with jitter_embeddings(model):
        moved = _alone(padded, examples)
    return max(_difference(one, other) for one, other in zip(alone, moved, strict=True))


def _plain_leak(padded: PaddedForward, model: nn.Module) -> float:
    """How far an example's logits move where it simply goes on from another one: relative to them.

    The examples are short, so that the other one is within every window.
    """
    first, second = probe_rows(model, SHORT)
    joined = Row(first.tokens + second.tokens, tuple(len(first) + position for position in second.wanted))
    with torch.no_grad():
        alone, leaking = (padded.logits(unshared([example])) for example in (second, joined))
    return _difference(alone, leaking)


def _difference(right: Tensor, other: Tensor) -> float:
    return float((other.double() - right.double()).norm() / right.double().norm())


def _kept_apart(packed: PackedForward, model: nn.Module, arranged: Pass, counts: list[int]) -> list[Tensor]:
    """The logits of both examples of a packed pair, of which the second may not depend on the first.

    That the first does not depend on the second is known: nothing depends on later tokens.

    Raises:
        UnsupportedAttention: it does.
    """
    own = slice(arranged.groups[0].prefix, arranged.rows[0].input_length)
    with packed.context(), capture_embeddings(model, arranged.computed_tokens) as seen:
        first, second = packed.logits(arranged).split(counts)
        if depends(second, seen, own):
            raise UnsupportedAttention("a packed example depends on another one's tokens")
    return [first.detach(), second.detach()]
