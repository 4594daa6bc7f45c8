"""The study of rounding: what it measures in bfloat16, and what it claims."""

import copy
from dataclasses import replace

import pytest
import torch

import toys
from brushstroke.base import Base
from brushstroke.data import Example
from brushstroke.errors import ConfigError
from brushstroke.layers import attach
from brushstroke.studies import Grid, Material, RoundingStudy, Task
from brushstroke.studies.arms import Arm
from brushstroke.studies.rounding import (
    ATTACHED,
    FORMS,
    NEAREST,
    STOCHASTIC,
    TWICE,
    _answer,
    _Row,
    two_roundings,
)
from brushstroke.training import TrainConfig


@pytest.fixture
def material():
    def make(max_steps: int) -> Material:
        example = Example((5, 6, 7), (0.0, 1.0, 1.0))
        task = Task("task", (example,), (example,), (example,))
        config = TrainConfig(max_steps=max_steps)
        return Material(Base(toys.tiny_llama()), {"task": task}, config, Grid((1e-3, 1e-2), (0, 1)))

    return make


def row(gains=(0.4, 0.5), **kept) -> _Row:
    values = {form: list(gains) for form in FORMS} | kept
    return _Row(Arm("all r=8, rate 0.001, 5 steps", ("all-linear",), rate=1e-3), 5, tuple(gains), values)


def test_shares_are_means_over_seeds_of_ratios():
    found = row(**{TWICE: [0.2, 0.5]}).share(TWICE)
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert row().text(ATTACHED) == "100.0 % [100.0, 100.0]"


def test_small_gains_are_compared_by_their_difference():
    small = row((0.01, 0.02), **{TWICE: [0.0, 0.01]})
    assert small.text(TWICE).startswith("-0.0100 [")
    assert "no share of a gain is known" in _answer([small])


def test_a_refused_merge_is_reported_as_refused():
    refused = row(**{NEAREST: [None, 0.5]})
    assert refused.text(NEAREST) == "refused"
    answer = _answer([row(), refused])
    assert "merged to nearest: 100.0 % on average, at worst 100.0 %" in answer
    assert "refused in 1 arm" in answer
    assert f"{STOCHASTIC}: 100.0 % on average" in answer


def test_two_roundings_are_those_of_a_hook_and_leave_no_trace():
    model = toys.Mlp().bfloat16()
    x, adapter = torch.randn(64, 6).bfloat16(), toys.random_adapter(model)
    base = model(x)
    with two_roundings(model, adapter):
        assert not torch.equal(model(x), base)
    assert torch.equal(model(x), base)
    wide = copy.deepcopy(model).float()
    with two_roundings(wide, adapter):
        found = wide(x.float())
    with attach(wide, adapter):
        torch.testing.assert_close(found, wide(x.float()))


@pytest.mark.parametrize("make", [lambda: RoundingStudy(ranks=(0,)), lambda: RoundingStudy(steps=(5, 0))])
def test_numbers_below_one_are_refused(make):
    with pytest.raises(ConfigError, match="must be a whole number of at least 1; got 0"):
        make()


def test_arms_have_one_rate_each_and_share_the_steps(material):
    arms = RoundingStudy(("q_proj",), (2,), steps=(1, 4)).arms(material(max_steps=4))
    assert [(arm.rate, arm.steps_share) for arm in arms] == [(1e-3, 0.25), (1e-3, 1), (1e-2, 0.25), (1e-2, 1)]
    assert all(Grid((1e-3, 1e-2), (0, 1)).of(arm) == () for arm in arms)
    assert len({arm.name for arm in arms}) == 4


def test_other_lengths_and_a_half_precision_base_are_refused(material):
    with pytest.raises(ConfigError, match="the longest run of this study has 4 steps"):
        RoundingStudy(steps=(1, 4)).arms(material(max_steps=3))
    half = material(max_steps=4)
    base = replace(half.base, model=half.base.model.bfloat16())
    with pytest.raises(ConfigError, match="needs the base in float32"):
        RoundingStudy(steps=(1, 4)).arms(replace(half, base=base))
