"""A packed pass as tensors: one row of tokens, and the pieces that attention works on.

No model here. The row is laid out group by group: a shared prefix, then its suffixes in blocks of similar
length.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from brushstroke.data import Example
from brushstroke.packed.pack import Group, Pass
from brushstroke.packed.prefix_cache import PrefixCache
from brushstroke.packed.varlen import Segments, segments_of

PADDING = 0.25  # largest share of padding inside one attention call: fewer calls are worth some padding


@dataclass(frozen=True)
class Piece:
    """A stretch of the packed row for one attention call: suffixes of these `lengths`, or one prefix.

    Where the suffixes differ in length, `pad` (rows·width entries) says which token of the piece stands at
    each padded position, and `unpad` (one entry for each token) where each token stands; None where there
    is no padding. `prefix` is the index of the piece that these suffixes continue, if any.
    """

    lengths: tuple[int, ...]
    prefix: int | None = None
    pad: Int[Tensor, " p"] | None = None
    unpad: Int[Tensor, " t"] | None = None

    @cached_property
    def tokens(self) -> int:
        """Of the stretch."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Suffixes in it."""
        return len(self.lengths)

    @cached_property
    def width(self) -> int:
        """The longest suffix."""
        return max(self.lengths)


@dataclass(frozen=True)
class Layout:
    """The tensors of a packed pass of n tokens, m of whose outputs predict a trained token.

    `sources` are the positions in the row whose outputs are trained, `targets` the tokens that they predict.
    `windows` collects the sliding windows that the model's attentions asked for; None is no window. The
    row `continues` a prefix that ran before it, or `begins` one.
    """

    tokens: Int[Tensor, "1 n"]
    positions: Int[Tensor, "1 n"]
    sources: Int[Tensor, " m"]
    targets: Int[Tensor, " m"]
    weights: Float[Tensor, " m"]
    pieces: tuple[Piece, ...]
    masks: dict[tuple[int, int, int | None], Bool[Tensor, "q k"]] = field(default_factory=dict)
    windows: set[int | None] = field(default_factory=set)
    continues: PrefixCache | None = None
    begins: PrefixCache | None = None

    @property
    def sizes(self) -> list[int]:
        """Tokens of each piece."""
        return [piece.tokens for piece in self.pieces]

    @property
    def several(self) -> bool:
        """Whether it is more than one batch of rows of equal length, which any kernel takes at once."""
        return len(self.pieces) > 1 or any(piece.pad is not None for piece in self.pieces)

    @cached_property
    def segments(self) -> Segments:
        """The pass as sequences behind one another."""
        return segments_of(self.pieces, self.tokens.device)

    def mask(self, queries: int, prefix: int, window: int | None) -> Bool[Tensor, "q k"]:
        """Which of `prefix + queries` keys each query sees: those before it, within the window if any."""
        key = (queries, prefix, window)
        if key not in self.masks:
            device = self.tokens.device
            query = torch.arange(prefix, prefix + queries, device=device)[:, None]
            position = torch.arange(prefix + queries, device=device)[None]
            seen = position <= query
            self.masks[key] = seen if window is None else seen & (position > query - window)
        return self.masks[key]


def lay_out(packed: Pass, device: torch.device, held: PrefixCache | None = None) -> Layout:
    """Build the tensors of a pass; a part of a group continues the `held` prefix.

    Raises:
        ValueError: a part without one.
    """
    row = _Row()
    for group in packed.groups:
        if group.part is not None and held is None:
            raise ValueError("a part of a group needs its prefix; run the passes of a step with `run`")
        prefix = None
        if group.prefix and group.part is None:
            prefix = len(row.pieces)
            row.add(group.members[0], 0, group.prefix)
            row.pieces.append(Piece((group.prefix,)))
        for block in _blocks(group):
            for example in block:
                row.add(example, group.prefix, example.reach)
            lengths = tuple(example.reach - group.prefix for example in block)
            row.pieces.append(_piece(lengths, prefix, device))
    return row.layout(device, continues=held)


def lay_out_prefix(group: Group, device: torch.device, held: PrefixCache) -> Layout:
    """Build the tensors of a group's prefix alone."""
    row = _Row()
    row.add(group.members[0], 0, group.prefix)
    row.pieces.append(Piece((group.prefix,)))
    return row.layout(device, begins=held)


class _Row:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.weights: list[float] = []
        self.pieces: list[Piece] = []

    def add(self, example: Example, start: int, stop: int) -> None:
        offset = len(self.tokens) - start
        self.tokens.extend(example.tokens[start:stop])
        self.positions.extend(range(start, stop))
        for i in range(start + 1, min(stop + 1, len(example))):
            if example.weights[i]:
                self.sources.append(offset + i - 1)
                self.targets.append(example.tokens[i])
                self.weights.append(example.weights[i])

    def layout(
        self,
        device: torch.device,
        continues: PrefixCache | None = None,
        begins: PrefixCache | None = None,
    ) -> Layout:
        integers = {"dtype": torch.long, "device": device}
        return Layout(
            tokens=torch.tensor([self.tokens], **integers),
            positions=torch.tensor([self.positions], **integers),
            sources=torch.tensor(self.sources, **integers),
            targets=torch.tensor(self.targets, **integers),
            weights=torch.tensor(self.weights, dtype=torch.float32, device=device),
            pieces=tuple(self.pieces),
            continues=continues,
            begins=begins,
        )


def _blocks(group: Group) -> list[list[Example]]:
    """Split a group's members, sorted by length, into blocks with at most `PADDING` in each."""
    blocks: list[list[Example]] = []
    block: list[Example] = []
    tokens = 0
    for example in group.members:
        length = example.reach - group.prefix
        if block and (len(block) + 1) * length > (1 + PADDING) * (tokens + length):
            blocks.append(block)
            block, tokens = [], 0
        block.append(example)
        tokens += length
    return [*blocks, block]


def _piece(lengths: tuple[int, ...], prefix: int | None, device: torch.device) -> Piece:
    width = max(lengths)
    if len(lengths) * width == sum(lengths):
        return Piece(lengths, prefix)
    pad, unpad, start = [], [], 0
    for row, length in enumerate(lengths):
        pad += [*range(start, start + length), *[start] * (width - length)]
        unpad += range(row * width, row * width + length)
        start += length
    as_tensor = lambda values: torch.tensor(values, device=device)  # noqa: E731
    return Piece(lengths, prefix, as_tensor(pad), as_tensor(unpad))
