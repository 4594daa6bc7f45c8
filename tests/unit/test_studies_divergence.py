"""Divergence of arms from the base at equal task loss, for invented runs."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from brushstroke.studies.arm_run import Outcome, Score
from brushstroke.studies.arms import low_rank, shortened, whole
from brushstroke.studies.divergence import SHARES, at_loss, compare_divergence, reached, shortened_arms
from brushstroke.studies.runner import ArmResult, Estimate, Results

QV = ("q_proj", "v_proj")
FEW, FULL = low_rank("q,v", QV, 4), whole("q,v", QV, (1e-3, 1e-2))
START = 3.0


def outcome(arm, seed, loss, divergence):
    score = Score(loss, 0.5, 10)
    return Outcome(arm.name, 1e-2, seed, 1, 1, 1, 1.0, loss, score, score, Score(2.0, 0.5, 10, divergence))


def results(curves, seeds=3, general=True):
    """Of arm → (loss, divergence) for a quarter, half and all of the steps; seeds differ a little."""
    arms = {}
    for arm, points in curves.items():
        lengths = [*(shortened(arm, share) for share in SHARES), arm]
        for length, (loss, divergence) in zip(lengths, points, strict=True):
            found = {s: outcome(length, s, loss, divergence * 1.01**s) for s in range(seeds)}
            arms[length.name] = ArmResult(length, {}, 1e-2, None, found)
    untouched = {"task": Score(START, 0.5, 10)}
    if general:
        untouched["general"] = Score(2.0, 0.5, 10)
    plan = Estimate(1.0, 1, tuple(arms), tuple(range(seeds)))
    return Results(SimpleNamespace(), arms, untouched, plan, tuple(arms))


def quadratic(size, losses):
    """Arms whose divergence is the square of what they learnt: the interpolation is exact."""
    return [(loss, size * (START - loss) ** 2) for loss in losses]


def test_arms_are_compared_where_their_losses_are_equal_and_not_where_they_end():
    """W itself learns twice as much and so diverges more in the end, but less at the loss of the other."""
    curves = {FEW: quadratic(0.2, (2.8, 2.6, 2.0)), FULL: quadratic(0.1, (2.5, 2.0, 1.0))}
    found = compare_divergence(results(curves), [FEW.name, FULL.name], FULL.name)
    few, full = (found.data["divergence"][arm.name] for arm in (FEW, FULL))
    assert found.data["task_loss"]["mean"] == pytest.approx(2.0)
    assert few["of_all_steps"]["mean"] < full["of_all_steps"]["mean"]
    assert few["at_equal_loss"]["mean"] == pytest.approx(2 * full["at_equal_loss"]["mean"], rel=1e-6)
    (ratio,) = found.data["ratios"]
    assert ratio["ratio"]["mean"] == pytest.approx(2.0)
    assert ratio["ratio"]["low"] <= 2.0 <= ratio["ratio"]["high"]
    assert ratio["apart"]
    assert "2 [2, 2] times (apart)" in found.answer or "q,v r=4 over q,v W itself: 2" in found.answer
    row = dict(zip(found.tables[0].columns, found.tables[0].rows[0], strict=True))
    assert row["times that of q,v W itself"].startswith("2")


@pytest.mark.parametrize(
    ("level", "expected"), [(2.5, 0.025), (2.0, 0.1), (1.5, 0.225), (1.0, 0.4)], ids=lambda value: str(value)
)
def test_between_two_points_the_root_is_linear(level, expected):
    assert at_loss([(3.0, 0.0), *quadratic(0.1, (2.0, 1.0))], level) == pytest.approx(expected)


def test_equal_loss_is_taken_where_it_is_first_reached():
    assert at_loss([(3.0, 0.0), (1.0, 0.04), (1.5, 0.09), (0.5, 0.16)], 1.0) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("losses", "level", "expected"),
    [
        ((2.5, 2.0, 1.0), 2.2, 1),
        ((2.5, 2.0, 1.0), 2.0, 1),  # at a point of two pieces
        ((2.5, 1.0, 2.0), 1.0, 1),  # at the lowest loss
        ((2.5, 1.0, 2.0), 1.5, 2),
        ((1.0, 2.0, 0.5), 1.5, 3),
        ((1.0, 2.0, 0.5), 1.0, 2),
        ((2.5, 2.0, 2.0), 2.0, 1),
        ((2.5, 2.0, 1.9), 1.0, 0),
    ],
)
def test_how_often_a_curve_has_a_loss(losses, level, expected):
    assert reached([(3.0, 0.0), *quadratic(0.1, losses)], level) == expected


def test_a_loss_reached_more_than_once_is_reported():
    falling, rising = quadratic(0.2, (2.8, 2.6, 2.0)), [(1.5, 0.2), (1.4, 0.3), (2.2, 0.5)]
    found = compare_divergence(results({FEW: falling, FULL: rising}), [FEW.name, FULL.name], FULL.name)
    assert "rose again with more steps" in found.answer
    assert f"({FULL.name} with 3 seeds): KL is read where it was first reached." in found.answer
    assert found.data["divergence"][FULL.name]["seeds_at_equal_loss_twice"] == [0, 1, 2]
    assert found.data["divergence"][FEW.name]["seeds_at_equal_loss_twice"] == []
    straight = compare_divergence(results({FEW: falling, FULL: falling}), [FEW.name, FULL.name], FULL.name)
    assert "rose again" not in straight.answer


def test_arms_without_reference_are_not_compared():
    curves = {FEW: quadratic(0.2, (2.8, 2.6, 2.0))}
    found = compare_divergence(results(curves), [FEW.name], None)
    assert found.data["ratios"] == []
    assert len(found.tables[0].columns) == len(found.tables[0].rows[0]) == 5


def test_arm_that_learnt_nothing_sets_no_common_level():
    curves = {FEW: [(3.1, 0.1), (3.2, 0.2), (3.3, 0.3)], FULL: quadratic(0.1, (2.5, 2.0, 1.0))}
    found = compare_divergence(results(curves), [FEW.name, FULL.name], FULL.name)
    assert "not known" in found.answer
    assert not found.tables


def test_no_divergence_without_general_text():
    curves = {FEW: quadratic(0.2, (2.8, 2.6, 2.0))}
    assert "--general" in compare_divergence(results(curves, general=False), [FEW.name], None).answer


def test_shortened_arms_use_the_rate_of_the_full_arm():
    made = shortened_arms([FEW])
    assert [arm.name for arm in made] == ["q,v r=4, 1/4 of the steps", "q,v r=4, 1/2 of the steps"]
    assert {arm.rate_of for arm in made} == {FEW.name}
    assert [arm.steps_share for arm in made] == [0.25, 0.5]
    assert Fraction(1, 2) in SHARES
