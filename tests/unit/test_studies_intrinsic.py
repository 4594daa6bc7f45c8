"""d90: the smallest dimension that reaches 90 %, by both definitions."""

from brushstroke.studies.intrinsic import _d90, _spread
from brushstroke.studies.workshop import Score

BEFORE, AFTER = Score(3.0, 0.30, 10), Score(1.0, 0.60, 10)


def test_both_definitions():
    tried = {10: Score(2.5, 0.53, 10), 100: Score(1.3, 0.54, 10), 1000: Score(1.19, 0.58, 10)}
    assert _d90(BEFORE, AFTER, tried) == (1000, 100)  # the aims are 1.2 nats and 54 %
    assert _d90(BEFORE, AFTER, {10: tried[10]}) == (None, None)


def test_what_single_seeds_say_is_told_where_there_are_several():
    assert _spread({0: (100, 10)}, 0) == ""
    assert _spread({0: (1000, 10), 1: (None, 30)}, 0) == " (by seed 1,000, none)"
