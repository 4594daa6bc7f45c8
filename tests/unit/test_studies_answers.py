"""What the questions claim of given numbers."""

from itertools import combinations

import pytest
import torch

from brushstroke.analysis import SiteOverlap
from brushstroke.studies.rank import _answer, _neighbours
from brushstroke.studies.seeds import _answer as _seeds_answer
from brushstroke.studies.seeds import _block_table, _by_matrix, _tests
from brushstroke.studies.statistics import compare_arms
from brushstroke.studies.targets import _answer as _targets_answer

ROUNDING = 1e-15  # of φ where it is 1 but for float64's rounding


def overlaps(shape: tuple[int, int], left: float, right: float, seeds: int = 4):
    """The same φ at every block of size 2, a little other for each pair of seeds."""
    pairs = {}
    for number, pair in enumerate(combinations(range(seeds), 2)):
        grids = [torch.full((2, 2), side + number * ROUNDING / 10) for side in (left, right)]
        pairs[pair] = {"layers.0.q_proj": SiteOverlap(shape, (2, 2), *grids, 0.0)}
    return pairs


def test_a_block_that_fills_its_side_is_not_tested_and_counts_in_no_correction():
    same, other = overlaps((2, 8), 1 + ROUNDING, 0.9), overlaps((2, 8), 1.0, 0.3)
    other |= {(b, a): rows for (a, b), rows in other.items()}
    left, right = _tests(same, other, ["layers.0.q_proj"], [(2, 2)])
    assert not {"p_chance", "p_chance_holm", "p_other", "p_other_holm"} & left.keys()
    assert right["p_chance_holm"] == right["p_chance"] < 0.05
    assert right["p_other_holm"] < 0.05
    answer = _seeds_answer([left, right], True, 4, same, other, ["layers.0.q_proj"], 2)
    assert "φ(2, 2) input side" not in answer
    assert "φ(2, 2) output side" in answer
    rows = _block_table([left, right]).rows
    assert (rows[0][4], rows[0][7]) == ("–", "–")


def test_where_nothing_can_be_tested_no_block_is_named():
    same = overlaps((2, 2), 1 + ROUNDING, 1 + ROUNDING)
    tests = _tests(same, {}, ["layers.0.q_proj"], [(1, 2), (2, 2)])
    assert not any("p_chance" in row for row in tests)
    answer = _seeds_answer(tests, False, 4, same, {}, ["layers.0.q_proj"], 2)
    assert "above chance at 5 % (Holm): no block" in answer
    assert len(_block_table(tests).rows) == 4


def test_above_the_other_task_alone_is_not_called_shared():
    same, other = overlaps((8, 8), 0.1, 0.1), overlaps((8, 8), 0.01, 0.01)  # chance is 0.25
    other |= {(b, a): rows for (a, b), rows in other.items()}
    tests = _tests(same, other, ["layers.0.q_proj"], [(2, 2)])
    assert tests[0]["p_other_holm"] < 0.05 < tests[0]["p_chance_holm"]
    answer = _seeds_answer(tests, True, 4, same, other, ["layers.0.q_proj"], 2)
    assert "no block. No block is above both" in answer


def test_no_number_is_given_for_a_kind_of_matrix_whose_side_the_directions_fill():
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
    answer = _seeds_answer(_tests(same, {}, sites, [(2, 2)]), False, 4, same, {}, sites, 2)
    assert answer.endswith("Of q more than of v: 0.00 [0.00, 0.00] (input side).")


def test_sets_are_compared_by_the_seeds_that_two_of_them_share():
    losses = {"a": {0: 1.0, 1: 1.01}, "b": {0: 2.0, 2: 2.01}, "c": {0: 3.0, 1: 3.01, 2: 3.02}}
    answer = _targets_answer(list(losses), compare_arms(losses))
    assert "paired t over 1 to 2 seeds" in answer
    assert "one seed" in _targets_answer(["a", "b"], compare_arms({"a": {0: 1.0}, "b": {0: 2.0}}))
    assert "nothing to compare" in _targets_answer(["a"], [])


def test_a_step_that_raises_the_loss_is_told():
    kept, noise = {1: "q r=1", 2: "q r=2"}, [0.0, 0.01, -0.01, 0.005]
    losses = {
        "q r=1": dict(enumerate(2.0 + e for e in noise)),
        "q r=2": dict(enumerate(3.0 + e for e in noise)),
    }
    answer = _answer(kept, losses, None, _neighbours(kept, losses, None))
    assert answer.endswith("(paired t, Holm): none. Steps that raise it: 1 to 2.")


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_the_largest_rank_is_called_too_small_only_where_its_step_is_significant(gain):
    kept = {1: "q r=1", 2: "q r=2", 4: "q r=4"}
    noise = [0.0, 0.01, -0.01, 0.005]
    losses = {
        "q r=1": dict(enumerate(2.0 + e for e in noise)),
        "q r=2": dict(enumerate(2.0 + e for e in reversed(noise))),
        "q r=4": dict(enumerate(1.999 - gain + e for e in noise)),
    }
    answer = _answer(kept, losses, None, _neighbours(kept, losses, None))
    assert "at rank 4" in answer
    assert ("was not reached" in answer) == bool(gain)
