"""Builds the tensors of a packed pass: one row of tokens, and the pieces that attention works on.

It runs no model. The row contains group after group: a shared prefix, then its suffixes in blocks of similar
length.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from brushstroke.packed.pack import Group, Pass, Row
from brushstroke.packed.prefix_cache import KeyValueCache
from brushstroke.packed.varlen import Segments, segments_of

PADDING = 0.25  # largest share of padding in one attention call; some padding allows fewer calls


@dataclass(frozen=True)
class Piece:
    """A span of the packed row for one attention call: suffixes of these `lengths`, or one prefix.

    If the suffixes differ in length, `pad` (rows·width entries) is the index of the token at each padded
    position, and `unpad` (one entry per token) is the padded position of each token; both are None if there
    is no padding. `prefix` is the index of the piece that these suffixes continue, if any.
    """

    lengths: tuple[int, ...]
    prefix: int | None = None
    pad: Int[Tensor, " p"] | None = None
    unpad: Int[Tensor, " t"] | None = None

    @cached_property
    def tokens(self) -> int:
        """The number of tokens in the span."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """The number of suffixes in it."""
        return len(self.lengths)

    @cached_property
    def width(self) -> int:
        """The length of the longest suffix."""
        return max(self.lengths)


@dataclass(frozen=True)
class Layout:
    """The tensors of a packed pass of n tokens with m wanted outputs.

    `sources` are the positions in the row whose outputs are wanted, `targets` the tokens that they predict.
    `slots`, `lengths` and `wanted` give the slot and the numbers of tokens and wanted outputs of each span;
    they are empty if the model's active route does not change. `continues` is the cache of tokens that ran
    before this row; `begins` is the cache that records this row as a prefix. `windows` collects the sliding
    windows that the model's attention calls used; None means no window.
    """

    tokens: Int[Tensor, "1 n"]
    positions: Int[Tensor, "1 n"]
    sources: Int[Tensor, " m"]
    targets: Int[Tensor, " m"]
    weights: Float[Tensor, " m"]
    pieces: tuple[Piece, ...]
    slots: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()
    masks: dict[tuple[int, int, int | None], Bool[Tensor, "q k"]] = field(default_factory=dict)
    windows: set[int | None] = field(default_factory=set)
    continues: KeyValueCache | None = None
    begins: KeyValueCache | None = None

    @property
    def sizes(self) -> list[int]:
        """Tokens of each piece."""
        return [piece.tokens for piece in self.pieces]

    @property
    def several(self) -> bool:
        """Whether it is more than one batch of rows of equal length (any kernel can run one such batch)."""
        return len(self.pieces) > 1 or any(piece.pad is not None for piece in self.pieces)

    @cached_property
    def segments(self) -> Segments:
        """The pass as consecutive sequences for varlen kernels."""
        return segments_of(self.pieces, self.tokens.device)

    def mask(self, queries: int, prefix: int, window: int | None) -> Bool[Tensor, "q k"]:
        """Which of `prefix + queries` keys each query sees: its own and earlier ones, within any window."""
        key = (queries, prefix, window)
        if key not in self.masks:
            device = self.tokens.device
            query = torch.arange(prefix, prefix + queries, device=device)[:, None]
            position = torch.arange(prefix + queries, device=device)[None]
            seen = position <= query
            self.masks[key] = seen if window is None else seen & (position > query - window)
        return self.masks[key]


def build_layout(packed: Pass, device: torch.device, cache: KeyValueCache | None = None) -> Layout:
    """Build the tensors of a pass; a part of a group continues the prefix in `cache`."""
    made = _PackedRow()
    for group in packed.groups:
        assert group.part is None or cache is not None, "run the passes of a step with `run`"
        prefix = None
        if group.prefix and group.part is None:
            prefix = len(made.pieces)
            made.add_prefix(group)
        for block in _blocks(group):
            for row in block:
                made.add(row, group.prefix)
            lengths = tuple(row.input_length - group.prefix for row in block)
            made.pieces.append(_piece(lengths, prefix, device))
    return made.layout(device, continues=cache)


def build_prefix_layout(group: Group, device: torch.device, cache: KeyValueCache) -> Layout:
    """Build the tensors of a group's prefix; `cache` records its keys and values."""
    made = _PackedRow()
    made.add_prefix(group)
    return made.layout(device, begins=cache)


class _PackedRow:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.weights: list[float] = []
        self.pieces: list[Piece] = []
        self.slots: list[int] = []
        self.lengths: list[int] = []
        self.wanted: list[int] = []

    def add_prefix(self, group: Group) -> None:
        """Add the common prefix of a group's rows as a piece."""
        self._add_tokens(group.members[0], 0, group.prefix)
        self.pieces.append(Piece((group.prefix,)))

    def add(self, row: Row, prefix: int) -> None:
        """Add the tokens of a row after its prefix."""
        offset = len(self.tokens) - prefix
        self._add_tokens(row, prefix, row.input_length)
        targets, weights = row.loss_terms
        self.sources.extend(offset + position for position in row.wanted)
        self.targets.extend(targets)
        self.weights.extend(weights)

    def _add_tokens(self, row: Row, start: int, stop: int) -> None:
        self.tokens.extend(row.tokens[start:stop])
        self.positions.extend(range(start, stop))
        if row.slot is not None:
            self.slots.append(row.slot)
            self.lengths.append(stop - start)
            self.wanted.append(sum(start <= position < stop for position in row.wanted))

    def layout(
        self,
        device: torch.device,
        continues: KeyValueCache | None = None,
        begins: KeyValueCache | None = None,
    ) -> Layout:
        integers = {"dtype": torch.long, "device": device}
        return Layout(
            tokens=torch.tensor([self.tokens], **integers),
            positions=torch.tensor([self.positions], **integers),
            sources=torch.tensor(self.sources, **integers),
            targets=torch.tensor(self.targets, **integers),
            weights=torch.tensor(self.weights, dtype=torch.float32, device=device),
            pieces=tuple(self.pieces),
            slots=tuple(self.slots),
            lengths=tuple(self.lengths),
            wanted=tuple(self.wanted),
            continues=continues,
            begins=begins,
        )


def _blocks(group: Group) -> list[list[Row]]:
    """Split a group's members into blocks with at most a share `PADDING` of padding in each."""
    blocks: list[list[Row]] = []
    block: list[Row] = []
    tokens = widest = 0
    for row in group.members:
        length = row.input_length - group.prefix
        widest = max(widest, length)
        if block and (len(block) + 1) * widest > (1 + PADDING) * (tokens + length):
            blocks.append(block)
            block, tokens, widest = [], 0, length
        block.append(row)
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
