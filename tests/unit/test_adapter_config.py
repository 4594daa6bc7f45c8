"""Settings of a new adapter: every invalid value is refused by name."""

import json

import pytest

from brushstroke.adapter import LoraConfig
from brushstroke.errors import ConfigError


def test_target_string_is_one_name_not_letters():
    assert LoraConfig().targets == ("all-linear",)
    assert LoraConfig(targets="q_proj").targets == ("q_proj",)
    assert LoraConfig(targets=["q", "v"]).targets == ("q", "v")
    assert LoraConfig(targets=("q",)).targets == ("q",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": -3}, "rank must be"),
        ({"rank": 2.5}, "rank must be"),
        ({"rank": 8.0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"rank": "8"}, "rank must be"),
        ({"rank": None}, "rank must be"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern 'q' must be a whole number of at least 1; got 0"),
        ({"rank_pattern": {"q": False}}, "rank_pattern 'q'"),
        ({"rank_pattern": ["q"]}, "rank_pattern must map patterns to numbers"),
        ({"alpha_pattern": "q"}, "alpha_pattern must map patterns to numbers"),
        ({"alpha": 0}, r"alpha must be a finite number above 0 and of at most 3\.4e\+38; got 0"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"alpha": True}, "alpha must be"),
        ({"alpha": "16"}, "alpha must be"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern 'q' must be"),
        ({"dropout": 1.0}, "dropout must be a finite number of at least 0 and below 1; got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": float("nan")}, "dropout must be"),
        ({"dropout": "0"}, "dropout must be"),
        ({"targets": []}, "targets must name at least one pattern"),
        ({"targets": ""}, "targets must name"),
        ({"targets": ["q", ""]}, "targets must name"),
        ({"targets": [1]}, "targets must name"),
        ({"targets": None}, "targets must name"),
        ({"targets": 5}, "targets must name"),
        (
            {"scale_rule": "rslra"},
            r"scale_rule must be one of standard, rslora; got 'rslra'.*did you mean 'rslora'",
        ),
        ({"init": "gausian"}, r"init must be one of .*did you mean 'gaussian'"),
    ],
)
def test_invalid_values_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_the_two_scale_rules():
    assert LoraConfig(alpha=16).scale(8, 16) == 2.0
    assert LoraConfig(scale_rule="rslora").scale(16, 8) == 2.0


def test_json_round_trip():
    config = LoraConfig(4, 8.0, ("q", "v"), "rslora", 0.1, {"q": 2}, {"v": 3.0}, "gaussian")
    assert LoraConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert LoraConfig.from_dict({}) == LoraConfig()


def test_an_unknown_key_is_an_error_with_a_hint():
    with pytest.raises(ConfigError, match=r"unknown setting 'dropuot'.*did you mean 'dropout'"):
        LoraConfig.from_dict({"dropuot": 0.1})


def test_the_patterns_are_copies():
    ranks = {"q": 2}
    config = LoraConfig(rank_pattern=ranks)
    ranks["v"] = 3
    assert config.rank_pattern == {"q": 2}
