"""The claims of the studies for given numbers."""

from itertools import combinations

import pytest
import torch

from brushstroke.adapter import Adapter
from brushstroke.analysis import SiteOverlap, spectrum
from brushstroke.lowrank import LowRank
from brushstroke.studies.comparisons import RowLosses, compare_all, compare_with
from brushstroke.studies.rank import _answer, _deficiency, _spectra_table
from brushstroke.studies.seeds import _answer as _seeds_answer
from brushstroke.studies.seeds import _block_table, _by_matrix, _rank_note, _tests
from brushstroke.studies.statistics import interval, over_pairs
from brushstroke.studies.targets import _answer as _targets_answer

ROUNDING = 1e-15  # of φ where it is 1 but for float64's rounding


def overlaps(shape: tuple[int, int], left: float, right: float, seeds: int = 4):
    """The same φ at every block of size 2, a little other for each pair of seeds."""
    pairs = {}
    for number, pair in enumerate(combinations(range(seeds), 2)):
        grids = [torch.full((2, 2), side + number * ROUNDING / 10) for side in (left, right)]
        pairs[pair] = {"layers.0.q_proj": SiteOverlap(shape, (2, 2), *grids, 0.0)}
    return pairs


def ceiling(other):
    return {(a, b): rows for (a, b), rows in other.items() if a < b}


def test_full_blocks_are_not_tested_and_not_counted_in_corrections():
    same, other = overlaps((2, 8), 1 + ROUNDING, 0.9), overlaps((2, 8), 1.0, 0.3)
    other |= {(b, a): rows for (a, b), rows in other.items()}
    left, right = _tests(same, other, ceiling(other), ["layers.0.q_proj"], [(2, 2)])
    assert not {"p_chance", "p_chance_holm", "p_other", "p_other_holm"} & left.keys()
    assert right["p_chance_holm"] == right["p_chance"] < 0.05
    assert right["p_other_holm"] < 0.05
    answer = _seeds_answer([left, right], True, 4, same, other, ["layers.0.q_proj"], 2)
    assert "φ(2, 2) input side" not in answer
    assert "φ(2, 2) output side" in answer
    rows = _block_table([left, right]).rows
    assert (rows[0][4], rows[0][8]) == ("–", "–")


def test_answer_compares_overlaps_within_and_with_the_other_task():
    same, other, within = overlaps((8, 8), 0.6, 0.7), overlaps((8, 8), 0.3, 0.35), overlaps((8, 8), 0.4, 0.5)
    other |= {(b, a): rows for (a, b), rows in other.items()}
    tests = _tests(same, other, within, ["layers.0.q_proj"], [(2, 2)])
    assert [row["within_other"]["mean"] for row in tests] == pytest.approx([0.4, 0.5])
    table = _block_table(tests)
    assert table.rows[0][table.columns.index("φ within the other task")].startswith("0.400")
    assert "at the same rate" in table.caption
    answer = _seeds_answer(tests, True, 4, same, other, ["layers.0.q_proj"], 2)
    assert "other task 0.350, within it 0.500" in answer
    assert "φ(2, 2) output side. This rests on one other task." in answer


def test_where_nothing_can_be_tested_no_block_is_named():
    same = overlaps((2, 2), 1 + ROUNDING, 1 + ROUNDING)
    tests = _tests(same, {}, {}, ["layers.0.q_proj"], [(1, 2), (2, 2)])
    assert not any("p_chance" in row for row in tests)
    answer = _seeds_answer(tests, False, 4, same, {}, ["layers.0.q_proj"], 2)
    assert "above chance at 5 % (Holm): no block" in answer
    assert len(_block_table(tests).rows) == 4


def test_overlap_not_above_chance_is_not_called_shared():
    same, other = overlaps((8, 8), 0.1, 0.1), overlaps((8, 8), 0.01, 0.01)  # chance is 0.25
    other |= {(b, a): rows for (a, b), rows in other.items()}
    tests = _tests(same, other, ceiling(other), ["layers.0.q_proj"], [(2, 2)])
    assert tests[0]["p_other_holm"] < 0.05 < tests[0]["p_chance_holm"]
    answer = _seeds_answer(tests, True, 4, same, other, ["layers.0.q_proj"], 2)
    assert "no block. No block is above both" in answer


def test_no_number_for_matrices_whose_side_the_directions_fill():
    same = {
        pair: {
            **rows,
            "layers.0.v_proj": SiteOverlap((8, 2), (2, 2), *(torch.full((2, 2), x) for x in (0.9, 1.0)), 0.0),
        }
        for pair, rows in overlaps((8, 8), 0.9, 0.9).items()
    }
    sites = ["layers.0.q_proj", "layers.0.v_proj"]
    kinds = _by_matrix(same, {}, sites, 2)
    assert (list(kinds["q_proj"]), list(kinds["v_proj"])) == (["left", "right"], ["left"])
    assert list(kinds["q more than v"]) == ["left"]
    answer = _seeds_answer(_tests(same, {}, {}, sites, [(2, 2)]), False, 4, same, {}, sites, 2)
    end = "Of q more than of v: 0.00 [0.00, 0.00] (input side) (intervals for both sides at once)."
    assert answer.endswith(end)


def test_the_difference_of_q_and_v_has_wider_intervals_for_two_sides():
    spread = {(0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.62}
    same = {
        pair: {
            f"layers.0.{name}": SiteOverlap(
                (8, 8), (2, 2), *(torch.full((2, 2), phi + more) for _ in "lr"), 0.0
            )
            for name, more in (("q_proj", 0.1 * phi), ("v_proj", 0.0))
        }
        for pair, phi in spread.items()
    }
    found = _by_matrix(same, {}, ["layers.0.q_proj", "layers.0.v_proj"], 2)["q more than v"]
    values = over_pairs({pair: 2 * 0.1 * phi for pair, phi in spread.items()})
    for side in ("left", "right"):
        assert found[side]["low"] == pytest.approx(interval(values, 0.975).low, rel=1e-5)


def test_a_smaller_rank_than_asked_for_is_explained():
    assert _rank_note(8, 8) == ()
    (note,) = _rank_note(12, 8)
    assert note == "Tested up to φ(8, 8), not φ(12, 12): the smallest matrix allows only rank 8."


@pytest.mark.parametrize(("widths", "shown"), [((8, 32), "8 to 32"), ((8, 8), "8")])
def test_the_largest_possible_rank_is_a_size_of_the_matrices(widths, shown):
    updates = [LowRank(torch.eye(32, 2), torch.eye(2, h)) for h in widths]
    found = spectrum(Adapter({f"m{at}": update for at, update in enumerate(updates)}))
    table = _spectra_table({"W itself": found})
    assert table.rows[0][table.columns.index("of at most")] == shown
    assert f" of {shown} directions" in _deficiency([found])


def targets_answer(losses, margin=0.01):
    return _targets_answer(list(losses), compare_all(losses), margin)


def rank_answer(losses, margin=0.01):
    """Losses by rank, and those of W itself under "W"."""
    by_name = {f"q r={rank}" if rank != "W" else "q W itself": seeds for rank, seeds in losses.items()}
    kept = {rank: f"q r={rank}" for rank in losses if rank != "W"}
    against = compare_with("q W itself", by_name) if "W" in losses else None
    return _answer(kept, by_name, compare_all({n: by_name[n] for n in kept.values()}), against, margin)


def over_seeds_of(mean, noise=(0.0, 0.01, -0.01, 0.005)):
    return {seed: mean + e for seed, e in enumerate(noise)}


def test_answer_states_order_of_sets_and_shown_differences():
    losses = {
        "a": over_seeds_of(1.0, (0.0, 0.002, 0.001)),
        "b": over_seeds_of(1.0, (0.001, 0.0, 0.002)),
        "c": over_seeds_of(2.0, (0.002, 0.001, 0.0)),
    }
    answer = targets_answer(losses)
    assert "a < b < c. Of 3 pairs 2 are shown to be apart, and 1 to be equal within ±0.01 nats" in answer
    assert "(Tukey over 3 seeds; residual standard deviation 0.00" in answer
    assert answer.endswith("a is shown to be lower than c on these test rows.")


def test_differences_only_on_these_test_rows_are_labelled():
    """Two sets are far below the best on average, one of them on some rows only."""
    losses = {
        "a": over_seeds_of(1.0, (0.0, 0.002, 0.001)),
        "b": over_seeds_of(2.0, (0.001, 0.0, 0.002)),
        "c": over_seeds_of(2.0, (0.002, 0.001, 0.0)),
    }
    even = {name: {seed: [loss] * 8 for seed, loss in seeds.items()} for name, seeds in losses.items()}
    uneven = {**even, "c": {seed: [8 * loss - 7] + [1.0] * 7 for seed, loss in losses["c"].items()}}
    reported = {}
    for name, rows in (("even", even), ("uneven", uneven)):
        compared = compare_all(losses, RowLosses([1] * 8, rows))
        reported[name] = _targets_answer(list(losses), compared, 0.01)
    assert reported["even"].endswith("a is shown to be lower than every other, on new rows too.")
    expected = "lower than every other on these test rows, on new rows too than b."
    assert reported["uneven"].endswith(expected)


def test_large_p_claims_neither_difference_nor_equality():
    noise = (0.0, 0.2, -0.2), (0.1, -0.1, 0.0)
    answer = targets_answer({"a": over_seeds_of(1.0, noise[0]), "b": over_seeds_of(1.01, noise[1])})
    assert "Of 1 pair 0 are shown to be apart, and 0 to be equal within ±0.01 nats" in answer
    assert answer.endswith("a is not shown to be lower than any other.")


def test_one_seed_of_sets_claims_nothing():
    assert "one seed" in targets_answer({"a": {0: 1.0}, "b": {0: 2.0}})
    assert "nothing to compare" in targets_answer({"a": {0: 1.0}})


def test_rank_step_that_raises_the_loss_is_reported():
    answer = rank_answer({1: over_seeds_of(2.0), 2: over_seeds_of(3.0, (0.01, -0.01, 0.0, 0.0))})
    assert "shown to lower the loss (Tukey over 4 seeds; residual standard deviation" in answer
    assert "): none. Steps that raise it: 1 to 2." in answer
    assert answer.endswith("Ranks shown to be equal within ±0.01 nats: none.")


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_the_largest_rank_is_called_too_small_only_where_its_step_is_significant(gain):
    noise = (0.0, 0.01, -0.01, 0.005)
    answer = rank_answer(
        {1: over_seeds_of(2.0), 2: over_seeds_of(2.0, noise[::-1]), 4: over_seeds_of(1.999 - gain, noise)}
    )
    assert "at rank 4" in answer
    assert ("was not reached" in answer) == bool(gain)


def test_ranks_are_called_equal_only_within_the_margin():
    losses = {4: over_seeds_of(2.0), 8: over_seeds_of(2.0003, (0.0, 0.01, -0.01, 0.006))}
    assert rank_answer(losses).endswith("equal within ±0.01 nats: 4 and 8.")
    assert rank_answer(losses, 1e-4).endswith("equal within ±0.0001 nats: none.")


def test_every_rank_is_compared_with_full_fine_tuning():
    noise = (0.0, 0.01, -0.01, 0.005)
    answer = rank_answer(
        {1: over_seeds_of(2.0), 2: over_seeds_of(1.5, noise[::-1]), "W": over_seeds_of(1.5, (0.01, 0, 0, 0))}
    )
    assert "Ranks shown to differ from W's own training (Dunnett over 4 seeds" in answer
    assert "): 1. Loss at rank 2 less that of W's own training: " in answer
