"""Plans packed passes from rows: no padding, shared prefixes once, no tokens after the last wanted position.

It works on lists of tokens only; `layout` builds tensors, and `forward` runs models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from brushstroke.data import Example, common_length

MAX_GROUP = 256  # rows; bounds the search for the best grouping
MIN_PREFIX = 8  # tokens; a shorter common prefix does not justify a separate attention call
REUSE_SAVES = 128  # tokens that a prefix cache must save to justify a separate pass,
REUSE_SHARE = 0.05  # and as a share of the computed tokens of its group


@dataclass(frozen=True)
class Row:
    """Tokens to run, and the positions whose outputs are wanted.

    Args:
        tokens: of the whole row; those after the last wanted position run only if a model looks ahead.
        wanted: positions in ascending order; if there are none, the whole row runs.
        targets: the token that follows each wanted position, for a loss.
        weights: of each target in the loss.
        slot: a slot of the model's bank, 0 for the base; None does not change the model's active route.
    """

    tokens: tuple[int, ...]
    wanted: tuple[int, ...]
    targets: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    slot: int | None = None

    @classmethod
    def of(cls, example: Example, slot: int | None = None) -> "Row":
        """The row of a training example; the positions that predict its trained tokens are wanted.

        >>> Row.of(Example(tokens=(5, 6, 7), weights=(0.0, 0.0, 1.0)))
        Row(tokens=(5, 6, 7), wanted=(1,), targets=(7,), weights=(1.0,), slot=None)
        """
        trained = [i for i, weight in enumerate(example.weights) if weight]
        return cls(
            example.tokens,
            tuple(i - 1 for i in trained),
            tuple(example.tokens[i] for i in trained),
            tuple(example.weights[i] for i in trained),
            slot,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def input_length(self) -> int:
        """The number of tokens that run: those up to the last wanted position."""
        return self.wanted[-1] + 1 if self.wanted else len(self.tokens)

    @property
    def loss_terms(self) -> tuple[Sequence[int], Sequence[float]]:
        """Targets and weights of the wanted positions; without targets, token 0 with weight 0."""
        none = [0] * len(self.wanted)
        return self.targets or none, self.weights or none

    @property
    def shareable(self) -> int:
        """The longest prefix that has no wanted position and leaves at least one token after it."""
        return self.wanted[0] if self.wanted else max(0, len(self.tokens) - 1)


@dataclass(frozen=True)
class Group:
    """Rows of one slot that begin with the same `prefix` tokens, none of which is a wanted position.

    If a group is split over several passes, `part` is the number of the part, from 0. The prefix then runs
    once, in a separate pass before part 0.
    """

    prefix: int
    members: tuple[Row, ...]
    part: int | None = None

    @property
    def computed_tokens(self) -> int:
        """Tokens that run through the layers: the prefix once, each suffix up to its last wanted position."""
        return self.own_tokens + (0 if self.part else self.prefix)

    @property
    def own_tokens(self) -> int:
        """The computed tokens after the prefix."""
        return sum(row.input_length - self.prefix for row in self.members)


@dataclass(frozen=True)
class Pass:
    """One forward pass over a packed row, and its backward pass in training."""

    groups: tuple[Group, ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows of the pass, in the order of the packed row."""
        return tuple(row for group in self.groups for row in group.members)

    @property
    def computed_tokens(self) -> int:
        """Tokens that run through the layers."""
        return sum(group.computed_tokens for group in self.groups)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose activations exist at the same time."""
        return sum(group.prefix + group.own_tokens for group in self.groups)


def plan_passes(
    rows: Sequence[Row], micro_tokens: int, share: bool, reuse_prefix: bool = False
) -> list[Pass]:
    """Arrange rows over passes of at most `micro_tokens` computed tokens.

    A longer row gets a separate pass. If the members of a prefix fall into several passes, the prefix is
    computed once in each; with `reuse_prefix`, once for all of them if that saves enough. Its activations
    then stay in memory together with those of each pass, which gets at least half of `micro_tokens`. The
    passes have about equal size.
    """
    groups = share_prefixes(rows) if share else [Group(0, (row,)) for row in rows]
    whole: list[Group] = []
    reusing: list[Pass] = []
    for group in groups:
        parts = _parts(group, micro_tokens) if reuse_prefix and group.prefix else []
        saved = (len(parts) - 1) * group.prefix
        if saved >= max(REUSE_SAVES, REUSE_SHARE * group.computed_tokens):
            reusing += [Pass((part,)) for part in parts]
        else:
            whole.append(group)
    return [*_fill(whole, micro_tokens), *reusing]


def _parts(group: Group, micro_tokens: int) -> list[Group]:
    """Split a group into parts of about equal size with one prefix cache; members are sorted by length."""
    room = max(1, micro_tokens - group.prefix, micro_tokens // 2)
    aim = group.own_tokens / max(1, -(-group.own_tokens // room))
    parts: list[list[Row]] = []
    used = room
    for row in group.members:
        own = row.input_length - group.prefix
        if used + own > room or used >= aim:
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += own
    return [Group(group.prefix, tuple(members), i) for i, members in enumerate(parts)]


def _fill(groups: Sequence[Group], micro_tokens: int) -> list[Pass]:
    """Fill passes with groups in order; a pass is full before the next one begins."""
    total = sum(group.computed_tokens for group in groups)
    aim = total / max(1, -(-total // micro_tokens))
    passes: list[Pass] = []
    pending: list[Group] = []
    used = 0
    for group in groups:
        members: list[Row] = []
        for row in group.members:
            cost = row.input_length - (group.prefix if members else 0)
            if used and (used + cost > micro_tokens or used >= aim):
                if members:
                    pending.append(Group(group.prefix, tuple(members)))
                passes.append(_pass(pending))
                pending, members, used, cost = [], [], 0, row.input_length
            members.append(row)
            used += cost
        pending.append(Group(group.prefix, tuple(members)))
    return [*passes, _pass(pending)] if pending else passes


def _pass(groups: Sequence[Group]) -> Pass:
    """A pass of these groups. Rows without a shared prefix form one group, so that attention batches them."""
    shared = [group for group in groups if group.prefix and len(group.members) > 1]
    without_prefix = [row for group in groups if group not in shared for row in group.members]
    return Pass((*shared, Group(0, _ordered(without_prefix)))) if without_prefix else Pass(tuple(shared))


def share_prefixes(rows: Sequence[Row]) -> list[Group]:
    """Group rows of one slot by common prefixes so that the number of computed tokens is smallest.

    In lexicographic order, every useful group is a sequence of neighbours. Dynamic programming over the cuts
    therefore finds the best grouping: a group of n rows with a common prefix of P tokens saves (n − 1)·P
    tokens. A group's members are sorted by length.
    """
    order = sorted(rows, key=lambda row: (_slot(row), row.tokens))
    n = len(order)
    common = [_common(one, other) for one, other in pairwise(order)]
    best, cut = [0] * (n + 1), list(range(-1, n))
    for stop in range(1, n + 1):
        prefix = order[stop - 1].shareable
        best[stop] = best[stop - 1]
        for start in range(stop - 2, max(-1, stop - 1 - MAX_GROUP), -1):
            prefix = min(prefix, common[start], order[start].shareable)
            if prefix < MIN_PREFIX:
                break
            saved = best[start] + (stop - start - 1) * prefix
            if saved > best[stop]:
                best[stop], cut[stop] = saved, start
    groups = []
    stop = n
    while stop:
        start = cut[stop]
        members = order[start:stop]
        prefix = min([*common[start : stop - 1], *(r.shareable for r in members)]) if len(members) > 1 else 0
        groups.append(Group(prefix, _ordered(members)))
        stop = start
    return groups[::-1]


def _common(one: Row, other: Row) -> int:
    return common_length(one.tokens, other.tokens) if one.slot == other.slot else 0


def _ordered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Sort by slot, then by length, so that each slot is one span."""
    return tuple(sorted(rows, key=lambda row: (_slot(row), row.input_length)))


def _slot(row: Row) -> int:
    return -1 if row.slot is None else row.slot


def unshared(rows: Sequence[Row]) -> Pass:
    """One pass of these rows in this order, without shared prefixes."""
    return Pass(tuple(Group(0, (row,)) for row in rows))
