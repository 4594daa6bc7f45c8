"""Packing: every example once, prefixes contain only shared tokens, none of them trained."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brushstroke.data import Example
from brushstroke.packed.layout import build_layout
from brushstroke.packed.pack import MIN_PREFIX, Group, Pass, Row, plan_passes, share_prefixes
from training_kit import examples


def made(prompt: list[int], answer: list[int], tail: list[int] | None = None, slot: int | None = None) -> Row:
    weights = (0.0,) * len(prompt) + (1.0,) * len(answer) + (0.0,) * len(tail or [])
    return Row.of(Example(tuple(prompt + answer + (tail or [])), weights), slot)


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    stems = draw(st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=20), min_size=1, max_size=3))
    slots = st.just(None) if draw(st.booleans()) else st.integers(0, 2)
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
        answer = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
        rows.append(made(prompt, answer, draw(st.lists(st.integers(0, 3), max_size=3)), draw(slots)))
    return rows


@given(batches(), st.integers(1, 200), st.booleans())
def test_passes_hold_every_example_once_and_share_only_what_is_common(
    rows: list[Row], micro_tokens: int, share: bool
) -> None:
    passes = plan_passes(rows, micro_tokens, share)
    held = [row for part in passes for row in part.rows]
    assert sorted(map(id, held)) == sorted(map(id, rows))
    for part in passes:
        assert part.computed_tokens <= micro_tokens or len(part.rows) == 1
        for group in part.groups:
            assert len({row.tokens[: group.prefix] for row in group.members}) == 1
            assert len({row.slot for row in group.members}) == 1 or not group.prefix
            assert all(group.prefix <= row.wanted[0] for row in group.members)
            assert not group.prefix or group.prefix >= MIN_PREFIX
            assert share or not group.prefix


@given(batches())
def test_sharing_never_computes_more(rows: list[Row]) -> None:
    computed = sum(group.computed_tokens for group in share_prefixes(rows))
    assert computed <= sum(row.input_length for row in rows)


def test_two_clusters_each_share_their_own_prefix() -> None:
    a, b = list(range(20)), list(range(100, 130))
    rows = [made([*stem, 50 + i], [60 + i]) for i in range(3) for stem in (a, b)]
    groups = share_prefixes(rows)
    assert sorted((group.prefix, len(group.members)) for group in groups) == [(20, 3), (30, 3)]
    assert sum(group.computed_tokens for group in groups) == 20 + 30 + 6 * 1


def test_the_last_prompt_token_stays_with_each_example() -> None:
    rows = [made(list(range(12)), [40]), made(list(range(12)), [41])]
    (group,) = share_prefixes(rows)
    assert group.prefix == 11  # token 11 predicts each one's own target


def test_texts_trained_whole_share_nothing() -> None:
    row = Row.of(Example(tuple(range(30)), (0.0, *(1.0,) * 29)))
    assert all(group.prefix == 0 for group in share_prefixes([row, row]))


def test_passes_of_a_step_have_similar_sizes() -> None:
    rows = [made([i] * 50, [1] * 10) for i in range(20)]
    sizes = [part.computed_tokens for part in plan_passes(rows, 1024, share=False)]
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) <= 60


@given(batches(), st.booleans())
def test_every_target_follows_the_position_that_predicts_it(rows: list[Row], share: bool) -> None:
    groups = tuple(share_prefixes(rows)) if share else tuple(Group(0, (row,)) for row in rows)
    layout = build_layout(Pass(groups), torch.device("cpu"))
    assert layout.tokens.shape[1] == sum(layout.sizes) == Pass(groups).computed_tokens
    assert len(layout.targets) == sum(len(row.wanted) for row in rows)
    expected = sorted((i, row.tokens[i], row.tokens[i + 1]) for row in rows for i in row.wanted)
    positions, tokens = layout.positions[0, layout.sources], layout.tokens[0, layout.sources]
    found = sorted(zip(positions.tolist(), tokens.tolist(), layout.targets.tolist(), strict=True))
    assert found == expected


def test_an_example_longer_than_a_pass_gets_its_own() -> None:
    rows = [Row.of(example) for example in examples(5)]
    assert all(len(part.rows) == 1 for part in plan_passes(rows, 1, share=True))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_lengths_need_no_padding(count: int) -> None:
    rows = [made([i] * 5, [1, 2]) for i in range(count)]
    layout = build_layout(Pass((Group(0, tuple(rows)),)), torch.device("cpu"))
    assert [piece.pad for piece in layout.pieces] == [None]


def test_examples_of_one_length_that_share_nothing_are_one_call_of_attention() -> None:
    rows = [made([100 * i + j for j in range(12)], [9, 9, 9]) for i in range(6)]
    (packed,) = plan_passes(rows, 1024, share=True)
    layout = build_layout(packed, torch.device("cpu"))
    assert [(piece.rows, piece.width, piece.pad) for piece in layout.pieces] == [(6, 14, None)]


def test_tokens_after_the_last_target_are_not_computed() -> None:
    row = made([1, 2, 3], [4, 5], tail=[6, 7, 8])
    layout = build_layout(Pass((Group(0, (row,)),)), torch.device("cpu"))
    assert layout.tokens.tolist() == [[1, 2, 3, 4]]
    assert layout.targets.tolist() == [4, 5]


@given(batches(), st.integers(20, 200), st.booleans())
def test_the_spans_of_a_layout_are_the_tokens_of_each_slot(rows: list[Row], micro: int, share: bool) -> None:
    for packed in plan_passes(rows, micro, share):
        layout = build_layout(packed, torch.device("cpu"))
        if packed.rows[0].slot is None:
            assert (layout.slots, layout.lengths) == ((), ())
            continue
        assert sum(layout.lengths) == layout.tokens.shape[1]
        of_slot = {
            slot: sum(g.computed_tokens for g in packed.groups if g.prefix and g.members[0].slot == slot)
            + sum(r.input_length for g in packed.groups if not g.prefix for r in g.members if r.slot == slot)
            for slot in {row.slot for row in packed.rows}
        }
        found = dict.fromkeys(of_slot, 0)
        for slot, length in zip(layout.slots, layout.lengths, strict=True):
            found[slot] += length
        assert found == of_slot


def test_rows_of_one_slot_are_adjacent() -> None:
    rows = [made([i] * (3 + i % 4), [1], slot=i % 3) for i in range(12)]
    (packed,) = plan_passes(rows, 1024, share=True)
    slots = [row.slot for row in packed.rows]
    assert slots == sorted(slots)


def test_only_rows_of_one_slot_share_a_prefix() -> None:
    rows = [made([*range(20), 50 + i], [60 + i], slot=i % 2) for i in range(6)]
    found = [(group.prefix, {row.slot for row in group.members}) for group in share_prefixes(rows)]
    assert found == [(20, {0}), (20, {1})]


def test_a_row_may_want_any_positions_and_have_no_targets() -> None:
    layout = build_layout(Pass((Group(0, (Row((5, 6, 7, 8), (0, 2)),)),)), torch.device("cpu"))
    assert layout.tokens.tolist() == [[5, 6, 7]]
    assert (layout.sources.tolist(), layout.weights.tolist()) == ([0, 2], [0.0, 0.0])
