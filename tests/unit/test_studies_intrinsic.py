"""d90: the dimension that reaches 90 %, by both definitions, with its interval over seeds."""

import math

import pytest

from brushstroke.errors import ConfigError
from brushstroke.studies import DeltaStudy, IntrinsicStudy, RankStudy, SeedsStudy, TargetsStudy
from brushstroke.studies.arm_run import Score
from brushstroke.studies.intrinsic import _accuracy, _crossing, _d90, _gain, _spread

BEFORE, AFTER = Score(3.0, 0.30, 10), Score(1.0, 0.60, 10)
TRIED = {10: Score(2.5, 0.53, 10), 100: Score(1.3, 0.54, 10), 1000: Score(1.19, 0.58, 10)}


def test_d90_by_both_definitions():  # the aims are 1.2 nats and 54 %
    found = {share: _d90(share, BEFORE, AFTER, TRIED, {0: AFTER}, {0: TRIED}) for share in (_gain, _accuracy)}
    assert (found[_gain].smallest, found[_accuracy].smallest) == (1000, 100)
    assert str(found[_gain]) == "1,000 (more than 100)"
    few = {10: TRIED[10]}
    assert _d90(_gain, BEFORE, AFTER, few, {0: AFTER}, {0: few}).smallest is None


def test_between_two_dimensions_the_share_is_linear_in_log_d():
    assert _crossing({10: 0.8, 1000: 1.0}) == pytest.approx(100)
    assert _crossing({10: 0.5, 100: 0.9, 1000: 0.95}) == pytest.approx(100)
    assert _crossing({10: 0.95, 100: 0.99}) is None
    assert _crossing({10: 0.5, 100: 0.6}) is None


def test_the_interval_is_over_seeds_and_by_ratio():
    assert _spread({0: 100.0}) == ""
    tried = "passed between two dimensions that were tried"
    assert _spread({0: 1000.0, 1: None}) == (
        f", by interpolation 1,000 with 1 of 2 seeds; with the other 90 % is not {tried}"
    )
    assert "1,000, 50 with 2 of 4 seeds; with the others" in _spread({0: 1e3, 1: None, 2: 50.0, 3: None})
    assert _spread({0: None, 1: None}) == f"; with no seed is 90 % {tried}"
    assert _spread({0: 100.0, 1: 100.0, 2: 100.0}) == ", by interpolation 100 [100, 100]"
    reported = _spread({0: 50.0, 1: 100.0, 2: 200.0})
    low, high = (float(part.strip("[],").replace(",", "")) for part in reported.split()[-2:])
    assert math.sqrt(low * high) == pytest.approx(100, rel=0.1)
    assert low < 50
    assert high > 200


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntrinsicStudy(dimensions=(10, 0)),
        lambda: IntrinsicStudy(rank=-1),
        lambda: RankStudy(ranks=(0, 4)),
        lambda: DeltaStudy(ranks=(-4,)),
        lambda: SeedsStudy(rank=0),
        lambda: TargetsStudy(rank=0),
    ],
)
def test_numbers_below_one_are_refused_when_a_study_is_made(make):
    with pytest.raises(ConfigError, match="must be a whole number of at least 1; got"):
        make()
