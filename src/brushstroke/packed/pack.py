"""The examples of a step become packed passes: no padding, shared prefixes once, nothing after a last target.

Pure bookkeeping on token lists; tensors and models come later, in `layout` and `forward`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from brushstroke.data import Example, common_length

MAX_GROUP = 256  # examples; bounds the search for the best grouping
MIN_PREFIX = 8  # tokens; a shorter common beginning is not worth an attention call of its own
HELD_SAVES = 128  # tokens that a prefix must save to be worth a pass of its own,
HELD_SHARE = 0.05  # and as a share of all that its group computes


@dataclass(frozen=True)
class Group:
    """Examples that begin with the same `prefix` tokens, none of which is trained or predicts a target.

    `part` counts the parts of a group that is spread over passes, from 0: their prefix runs once, by itself,
    before the first of them.
    """

    prefix: int
    members: tuple[Example, ...]
    part: int | None = None

    @property
    def computed_tokens(self) -> int:
        """Tokens that run through the layers: the prefix once, then every suffix as far as it matters."""
        return self.own_tokens + (0 if self.part else self.prefix)

    @property
    def own_tokens(self) -> int:
        """Those behind the prefix."""
        return sum(example.reach - self.prefix for example in self.members)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over a packed row."""

    groups: tuple[Group, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """All examples of the pass, in the order of the packed row."""
        return tuple(example for group in self.groups for example in group.members)

    @property
    def computed_tokens(self) -> int:
        """Tokens that run through the layers."""
        return sum(group.computed_tokens for group in self.groups)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose activations exist at one time."""
        return sum(group.prefix + group.own_tokens for group in self.groups)

    @property
    def trained_tokens(self) -> int:
        """Tokens whose prediction is in the loss."""
        return sum(example.trained for example in self.examples)


def plan_passes(
    examples: Sequence[Example], micro_tokens: int, share: bool, hold: bool = False
) -> list[Pass]:
    """Arrange the examples of one step over passes of at most `micro_tokens` computed tokens.

    An example longer than that gets a pass of its own. A prefix whose members fall into several passes is
    computed once in each; with `hold` once for all of them, where that saves enough. Its activations stay
    beside those of each pass, which has half of `micro_tokens` at least. The passes are of about equal size.
    """
    groups = share_prefixes(examples) if share else [Group(0, (example,)) for example in examples]
    whole: list[Group] = []
    held: list[Pass] = []
    for group in groups:
        parts = _parts(group, micro_tokens) if hold and group.prefix else []
        saved = (len(parts) - 1) * group.prefix
        if saved >= max(HELD_SAVES, HELD_SHARE * group.computed_tokens):
            held += [Pass((part,)) for part in parts]
        else:
            whole.append(group)
    return [*_fill(whole, micro_tokens), *held]


def _parts(group: Group, micro_tokens: int) -> list[Group]:
    """A group as parts of about equal size whose prefix is held; its members are sorted by length."""
    room = max(1, micro_tokens - group.prefix, micro_tokens // 2)
    aim = group.own_tokens / max(1, -(-group.own_tokens // room))
    parts: list[list[Example]] = []
    used = room
    for example in group.members:
        own = example.reach - group.prefix
        if used + own > room or used >= aim:
            parts.append([])
            used = 0
        parts[-1].append(example)
        used += own
    return [Group(group.prefix, tuple(members), i) for i, members in enumerate(parts)]


def _fill(groups: Sequence[Group], micro_tokens: int) -> list[Pass]:
    """Groups one after another, each pass full before the next begins."""
    total = sum(group.computed_tokens for group in groups)
    aim = total / max(1, -(-total // micro_tokens))
    passes: list[Pass] = []
    pending: list[Group] = []
    used = 0
    for group in groups:
        members: list[Example] = []
        for example in group.members:
            cost = example.reach - (group.prefix if members else 0)
            if used and (used + cost > micro_tokens or used >= aim):
                if members:
                    pending.append(Group(group.prefix, tuple(members)))
                passes.append(_pass(pending))
                pending, members, used, cost = [], [], 0, example.reach
            members.append(example)
            used += cost
        pending.append(Group(group.prefix, tuple(members)))
    return [*passes, _pass(pending)] if pending else passes


def _pass(groups: Sequence[Group]) -> Pass:
    """A pass of these groups. Examples that share nothing come together: attention takes them at once."""
    shared = [group for group in groups if group.prefix and len(group.members) > 1]
    alone = [example for group in groups if group not in shared for example in group.members]
    return Pass((*shared, Group(0, _by_length(alone)))) if alone else Pass(tuple(shared))


def share_prefixes(examples: Sequence[Example]) -> list[Group]:
    """Group examples by common beginnings so that the fewest tokens are computed.

    In lexicographic order every useful group is a run of neighbours, so the best grouping is found by dynamic
    programming over the cuts: a group of n with the common prefix P saves (n − 1)·P tokens. A group's members
    are sorted by length.
    """
    order = sorted(examples, key=lambda example: example.tokens)
    n = len(order)
    common = [common_length(order[i].tokens, order[i + 1].tokens) for i in range(n - 1)]
    best, cut = [0] * (n + 1), list(range(-1, n))
    for stop in range(1, n + 1):
        prefix = _shareable(order[stop - 1])
        best[stop] = best[stop - 1]
        for start in range(stop - 2, max(-1, stop - 1 - MAX_GROUP), -1):
            prefix = min(prefix, common[start], _shareable(order[start]))
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
        prefix = (
            min([*common[start : stop - 1], *(_shareable(e) for e in members)]) if len(members) > 1 else 0
        )
        groups.append(Group(prefix, _by_length(members)))
        stop = start
    return groups[::-1]


def _shareable(example: Example) -> int:
    """The longest prefix that leaves the example its last prompt token, which predicts its first target."""
    return max(0, example.first_target - 1)


def _by_length(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(sorted(examples, key=lambda example: example.reach))


def unshared(examples: Sequence[Example]) -> Pass:
    """One pass of these examples, each by itself, in this order."""
    return Pass(tuple(Group(0, (example,)) for example in examples))
