"""Selects packed or padded passes: packed if probes show that each example gets the same logits as alone.

There are two kinds of probe. One compares logits, packed against alone. The other computes gradients: the
logits of an example must not depend on embeddings of another example or of later tokens; such gradients are
exactly 0, in any dtype and for any scale of the model's numbers. It does not time the two forms.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brushstroke.base import context_length, model_dtype, preserved_rope
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
# In bfloat16 the limit may rise to the effect of rounding the embeddings, but not above:
MOST_NOISE = 0.15
MAX_SHARE_OF_LEAK = 0.3  # largest error as a share of the change that a leak between examples causes


def select_forward(model: nn.Module, share: bool, trained: Sequence[Tensor] = ()) -> tuple[Forward, str]:
    """Packed passes if they are exact, else padded batches.

    Args:
        model: in evaluation mode; it may have an adapter.
        share: whether shared prefixes are computed once.
        trained: the tensors that training changes; those that are 0 get random numbers during the probes.

    Returns:
        The forward, and the reason in one line.
    """
    with preserved_rope(model), perturb_zeros(trained):
        return _choose(model, share)


def _choose(model: nn.Module, share: bool) -> tuple[Forward, str]:
    head = find_head(model)
    padded = PaddedForward(model, head, whole=True)
    try:
        causal = _is_causal(padded, model)
        if not causal:
            raise UnsupportedAttention("later tokens change a prediction")
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
            raise UnsupportedAttention(f"its window of {window} tokens is applied only in its masks")
    except Exception as error:  # a model may raise anything here: it then cannot run packed
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    else:
        if difference <= limit and difference <= MAX_SHARE_OF_LEAK * leak:
            packed.reuses_prefix = share and _cached_difference(packed, examples, alone) <= limit
            return packed, f"a packed pair equals each example alone to {difference:.0e}"
        reason = (
            f"a packed pair differs by {difference:.1e} from each example alone; a leak differs by {leak:.1e}"
        )
    return padded, f"could not verify that packing is exact for this model: {reason}"


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return ROUNDED_TOLERANCE
    return TOLERANCE[dtype]


def _is_causal(whole: PaddedForward, model: nn.Module) -> bool:
    """Whether a prediction in the middle of an example is independent of all later tokens."""
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
    """The largest relative difference between an example's logits in a packed pair and alone.

    Raises:
        UnsupportedAttention: a packed example depends on another one's tokens.
    """
    counts = [len(logits) for logits in alone]
    found = []
    for arranged in [unshared(examples)] + [Pass((Group(_shared(examples), examples),))] * share:
        pair = _independent_logits(packed, model, arranged, counts)
        found += [_difference(one, other) for one, other in zip(alone, pair, strict=True)]
    return _largest(found)


def _cached_difference(packed: PackedForward, examples: tuple[Row, ...], alone: Sequence[Tensor]) -> float:
    """Like `_packed_difference`, for two examples in separate passes that continue one prefix cache."""
    prefix = _shared(examples)
    passes = [Pass((Group(prefix, (example,), i),)) for i, example in enumerate(examples)]
    try:
        with packed.context(), torch.no_grad():
            found = [outputs.logits() for _, outputs in packed.run(passes)]
    except Exception:  # a model may raise anything here: it then cannot use a prefix cache
        return math.inf
    return _largest([_difference(one, other) for one, other in zip(alone, found, strict=True)])


def _largest(differences: Sequence[float]) -> float:
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def _shared(examples: Sequence[Row]) -> int:
    """The shared prefix of the probe's examples; the first token after it is not trained."""
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
    """The change of an example's logits if embeddings are rounded once more; deep models amplify it."""
    with jitter_embeddings(model):
        moved = _alone(padded, examples)
    return max(_difference(one, other) for one, other in zip(alone, moved, strict=True))


def _plain_leak(padded: PaddedForward, model: nn.Module) -> float:
    """The relative change of an example's logits if it follows another one in the same sequence.

    The examples are short, so that the other one is within every window.
    """
    first, second = probe_rows(model, SHORT)
    joined = Row(first.tokens + second.tokens, tuple(len(first) + position for position in second.wanted))
    with torch.no_grad():
        alone, leaking = (padded.logits(unshared([example])) for example in (second, joined))
    return _difference(alone, leaking)


def _difference(right: Tensor, other: Tensor) -> float:
    return float((other.double() - right.double()).norm() / right.double().norm())


def _independent_logits(
    packed: PackedForward, model: nn.Module, arranged: Pass, counts: list[int]
) -> list[Tensor]:
    """The logits of both examples of a packed pair; checks that the second does not depend on the first.

    The first cannot depend on the second, because no prediction depends on later tokens.

    Raises:
        UnsupportedAttention: the second example depends on the first.
    """
    own = slice(arranged.groups[0].prefix, arranged.rows[0].input_length)
    with packed.context(), capture_embeddings(model, arranged.computed_tokens) as seen:
        first, second = packed.logits(arranged).split(counts)
        if depends(second, seen, own):
            raise UnsupportedAttention("a packed example depends on another one's tokens")
    return [first.detach(), second.detach()]
