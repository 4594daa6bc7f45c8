"""Scores of answers: what counts as right, and where a score is not defined."""

import pytest

from brushstroke.inference.scores import score


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("It is  Paris.", "paris", 1.0),
        ("Berlin", "Paris", 0.0),
        ("anything", "  ", None),
        ('{"a": 1}', '{"a": 1}', None),
    ],
)
def test_contained_texts(answer, gold, expected):
    assert score([(answer, gold)]).contains == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("6 * 7 = 42\n#### 42", "so 42\n#### 42.0", 1.0),
        ("#### 1\n#### $1,000 ", "#### 1000", 1.0),
        ("the answer is 42", "#### 42", 0.0),
        ("#### forty", "#### 42", 0.0),
        ("#### a b", "#### a b", 1.0),
        ("#### nan", "#### nan", 1.0),
        ("#### 34", "#### 3,4", 0.0),
        ("#### 1_0", "#### 10", 0.0),
        ("#### 9007199254740993", "#### 9007199254740992", 0.0),
        ("#### 72\n\nQ: next", "#### 72", 1.0),
        ("#### -$5", "#### -5", 1.0),
        ("#### 42", "42", None),
    ],
)
def test_final_answers(answer, gold, expected):
    assert score([(answer, gold)]).final_answer == expected


def test_scores_are_shares_and_undefined_without_answers():
    found = score([("yes", "yes"), ("no", "yes"), ("yes, sure", "yes")])
    assert (found.exact_match, found.contains) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert score([]).contains is score([]).final_answer is None
