"""A packed row as consecutive sequences, for varlen attention kernels, which get the bounds (cu_seqlens).

It computes positions only and runs no kernel; `sdpa.attend_segments` uses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from brushstroke.lowrank.autograd import first_order


class Stretch(Protocol):
    """The fields of `layout.Piece` that this module reads."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each of its sequences."""
        ...

    @property
    def prefix(self) -> int | None:
        """The index of the piece that all of them continue, if any."""
        ...


@dataclass(frozen=True)
class Segments:
    """The sequences of a packed row of n tokens: queries in the order of the row, separate keys per sequence.

    The queries of a sequence are aligned with its last keys, like a causal mask aligned at the end. If
    examples share a prefix, its keys are repeated for each of them.

    Args:
        cu_seqlens_q: the start of each sequence's queries, and the end of the last one.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: the largest number of queries of a sequence.
        max_seqlen_k: the largest number of keys of a sequence.
        keys: for each key, the index of its token in the row; None if the keys are the row unchanged.
        own: for each token, its index among the keys of its own sequence; None if `keys` is None.
        copies: for each shared prefix, its first token and the indices of its repetitions (rows×tokens).
    """

    cu_seqlens_q: Int[Tensor, " bounds"]
    cu_seqlens_k: Int[Tensor, " bounds"]
    max_seqlen_q: int
    max_seqlen_k: int
    keys: Int[Tensor, " m"] | None = None
    own: Int[Tensor, " n"] | None = None
    copies: tuple[tuple[int, Int[Tensor, "_ _"]], ...] = ()

    def of_keys(self, x: Float[Tensor, "n heads w"]) -> Float[Tensor, "m heads w"]:
        """Keys or values of the row's tokens in the order of the sequences, with repeated prefixes."""
        return x if self.keys is None else _Repeated.apply(x, self)  # type: ignore[return-value]


class _Repeated(torch.autograd.Function):
    """Select keys, some of them several times. The backward pass adds in a fixed order, in at least fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> Tensor:
        assert segments.keys is not None
        ctx.segments = segments
        return x.index_select(0, segments.keys)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        segments: Segments = ctx.segments
        assert segments.own is not None
        (grad,) = grad_outputs
        total = grad.index_select(0, segments.own)
        for first, places in segments.copies:
            rows, prefix = places.shape
            repeated = grad.index_select(0, places.flatten()).view(rows, prefix, *grad.shape[1:])
            own = total[first : first + prefix]
            wide = repeated.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).add_(own)
            own.copy_(wide)
        return total, None


def segments_of(pieces: Sequence[Stretch], device: torch.device) -> Segments:
    """The sequences of a row that is laid out in these pieces."""
    starts = [0, *accumulate(sum(piece.lengths) for piece in pieces)]
    sequences: list[tuple[range, range]] = []  # for each: the tokens of its prefix, and its own tokens
    for piece, start in zip(pieces, starts, strict=False):
        i = piece.prefix
        shared = range(0) if i is None else range(starts[i], starts[i + 1])
        for length in piece.lengths:
            sequences.append((shared, range(start, start + length)))
            start += length

    keys: list[int] = []
    own: list[int] = []
    copies: dict[int, list[range]] = {}  # by the first token of a prefix
    for shared, tokens in sequences:
        if shared:
            copies.setdefault(shared.start, []).append(range(len(keys), len(keys) + len(shared)))
        keys += shared
        own += range(len(keys), len(keys) + len(tokens))
        keys += tokens

    def tensor(values: Any, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    queries = [len(tokens) for _, tokens in sequences]
    counts = [len(shared) + len(tokens) for shared, tokens in sequences]
    return Segments(
        cu_seqlens_q=tensor([0, *accumulate(queries)], torch.int32),
        cu_seqlens_k=tensor([0, *accumulate(counts)], torch.int32),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(counts),
        keys=tensor(keys) if copies else None,
        own=tensor(own) if copies else None,
        copies=tuple((first, tensor([[*places] for places in found])) for first, found in copies.items()),
    )
