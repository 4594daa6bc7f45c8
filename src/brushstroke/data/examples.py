"""Training examples: tokens, and the weight of each token in the loss.

It reads no files and uses no tokenizer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from brushstroke.errors import DataError

Kind = Literal["messages", "prompt/completion", "text", "tokens"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a row of tokens.

    `weights[i]` is the weight of the prediction of `tokens[i]` from the tokens before it; 0 means not
    trained. Nothing predicts the first token, so `weights[0]` is always 0. `row` is the number of its row in
    the data (from 1; 0 if there is none), `roles` counts its tokens by role, `cut` is the number of tokens
    removed by the limit.

    >>> Example(tokens=(5, 6, 7), weights=(0.0, 0.0, 1.0)).trained
    1
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    row: int = 0
    roles: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0

    def __post_init__(self) -> None:
        place = f"row {self.row}: " if self.row else ""
        if len(self.tokens) != len(self.weights):
            raise DataError(
                f"{place}an example has {len(self.tokens)} tokens and {len(self.weights)} weights; give one "
                "weight per token (0 for a token that is not trained)"
            )
        if self.weights and self.weights[0] != 0:
            raise DataError(
                f"{place}the first token of an example has the weight {self.weights[0]}; nothing predicts "
                "it, so give it the weight 0"
            )
        if not math.isfinite(sum(self.weights)):
            raise DataError(f"{place}an example has a non-finite weight; give finite weights")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """The number of tokens whose prediction is in the loss."""
        return len(self.weights) - self.weights.count(0.0)

    @property
    def first_target(self) -> int:
        """The index of the first trained token; the number of tokens if none is trained."""
        return next((i for i, weight in enumerate(self.weights) if weight != 0), len(self.tokens))

    @property
    def reach(self) -> int:
        """The number of input tokens that the loss needs (all before the last trained token); at least 1.

        >>> Example(tokens=(5, 6, 7, 8), weights=(0.0, 0.0, 1.0, 0.0)).reach
        2
        """
        count = len(self.weights)
        return max(1, next((i for i in range(count - 1, 0, -1) if self.weights[i] != 0), count))


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """The result of encoding: counts of rows and tokens, and what was left out or cut.

    `skipped_rows` and `cut_rows` are row numbers from 1. A text begins with `begin_tokens`; an answer ends
    with one of the `stop_tokens` (texts of one or more tokens). `read_as` names the used columns,
    `unused_columns` and `unused_keys` (of messages) the others; `notes` describe changes to the rows.
    """

    rows: int
    examples: int
    kind: Kind
    real_tokens: int
    trained_tokens: int
    roles: Mapping[str, int]
    skipped_rows: tuple[int, ...] = ()
    cut_rows: tuple[int, ...] = ()
    cut_tokens: int = 0
    begin_tokens: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    read_as: str = ""
    unused_columns: tuple[str, ...] = ()
    unused_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reading(self) -> str:
        """One line that names the used and the unused columns and keys."""
        unused = [*self.unused_columns, *(f"{key} (of messages)" for key in self.unused_keys)]
        return self.read_as + (f"; not used: {', '.join(unused)}" if unused else "")


def segments(example: Example) -> list[tuple[int, int, bool]]:
    """The trained and untrained spans of an example as (start, stop, trained), in order, without gaps.

    >>> segments(Example(tokens=(5, 6, 7, 8), weights=(0.0, 0.0, 1.0, 1.0)))
    [(0, 2, False), (2, 4, True)]
    """
    stretches, start = [], 0
    for trained, group in groupby(example.weights, key=lambda weight: weight != 0):
        stop = start + sum(1 for _ in group)
        stretches.append((start, stop, trained))
        start = stop
    return stretches


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences.

    >>> common_length((1, 2, 3), (1, 2, 4, 5)), common_length((1, 2), (1, 2, 3)), common_length((), (1,))
    (2, 2, 0)
    """
    limit = min(len(one), len(other))
    x, y = one[:limit], other[:limit]
    if x == y:
        return limit
    low, high = 0, limit  # x[:low] == y[:low], x[:high] != y[:high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if x[:middle] == y[:middle] else (low, middle)
    return low
