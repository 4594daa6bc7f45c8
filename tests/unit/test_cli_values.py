"""Conversion of command-line words to values, and the defaults in help texts."""

import dataclasses
import inspect
import re

import pytest

import brushstroke as bs
from brushstroke.cli import data, evaluate, generate
from brushstroke.cli.options import AdapterOptions, DataOptions, TrainingOptions, train_config
from brushstroke.cli.values import named_adapters, patterns, split
from brushstroke.errors import ConfigError
from brushstroke.inference import SamplingParams


@dataclasses.dataclass
class EvaluateDefaults:
    """What `bs.evaluate` takes where nothing is said."""

    max_new_tokens: int = inspect.signature(bs.evaluate).parameters["max_new_tokens"].default
    batch_size: int = inspect.signature(bs.evaluate).parameters["batch_size"].default


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        (" q_proj , ,v_proj,", ("q_proj", "v_proj")),
        (r"layers\.\d{1,2}\..*,mlp", (r"layers\.\d{1,2}\..*", "mlp")),
        (r"layers.[0,1,2].*,(q,k)_proj", ("layers.[0,1,2].*", "(q,k)_proj")),
        (r"a[(,]b,c\[,d", ("a[(,]b", r"c\[", "d")),
        ("", ()),
    ],
)
def test_commas_inside_brackets_do_not_split(text, parts):
    assert split(text) == parts


def test_patterns():
    assert patterns("--rank-pattern", r"layers\.\d{1,2}=4,x=y=2", int) == {r"layers\.\d{1,2}": 4, "x=y": 2}
    for text in ("q_proj", "q_proj=", "=4", "q_proj=1.5", "q_proj=a"):
        with pytest.raises(ConfigError, match="PATTERN=VALUE"):
            patterns("--rank-pattern", text, int)
    with pytest.raises(ConfigError, match="--rank-pattern: 'q_proj' appears twice"):
        patterns("--rank-pattern", "q_proj=2, k_proj=2, q_proj =4", int)


def test_names_of_adapters():
    assert named_adapters(["a=x/y", "x/poems/", "./k=v/z"]) == {
        "a": "x/y",
        "poems": "x/poems/",
        "z": "./k=v/z",
    }
    for given in (["=x"], ["a="], ["base=x"], ["x/a", "a=y"]):
        with pytest.raises(ConfigError, match="--adapter"):
            named_adapters(given)


def test_flags_become_configs_with_defaults_for_the_rest():
    assert train_config(None, None) == bs.TrainConfig()
    assert train_config(TrainingOptions(seed=3), DataOptions(max_length=9)) == bs.TrainConfig(
        seed=3, max_length=9
    )
    assert AdapterOptions().config() == bs.LoraConfig()
    assert AdapterOptions(rank=2, targets="a,b", alpha_pattern="a=3").config() == bs.LoraConfig(
        rank=2, targets=("a", "b"), alpha_pattern={"a": 3.0}
    )
    with pytest.raises(ConfigError, match="at least one pattern"):
        AdapterOptions(targets="").config()


def test_every_setting_of_a_run_has_a_flag():
    flags = {
        field.name for options in (TrainingOptions, DataOptions) for field in dataclasses.fields(options)
    }
    assert {field.name for field in dataclasses.fields(bs.TrainConfig)} <= flags
    flags = {field.name for field in dataclasses.fields(AdapterOptions)}
    assert {field.name for field in dataclasses.fields(bs.LoraConfig)} - flags == {"init"}


@pytest.mark.parametrize(
    ("reported", "config"),
    [
        (AdapterOptions.__doc__, bs.LoraConfig()),
        (TrainingOptions.__doc__, bs.TrainConfig()),
        (generate.SamplingOptions.__doc__, SamplingParams()),
        (evaluate.evaluate.__doc__, EvaluateDefaults()),
    ],
)
def test_help_states_the_defaults_of_the_configs(reported, config):
    """They are written out, because reading them from the configs would load torch."""
    lines = re.findall(r"^\s+(\w+): ((?:.|\n\s{12})*?)\[default: ([^\]]+)\]", reported or "", re.MULTILINE)
    settings = {field.name for field in dataclasses.fields(config)}
    checked = 0
    for name, _, default in lines:
        value = getattr(config, name) if name in settings else None
        if value is None:  # a rule in words
            continue
        value = ",".join(value) if isinstance(value, tuple) else value
        assert default == (f"{value:g}" if isinstance(value, int | float) else str(value)), name
        checked += 1
    assert checked >= 2


def test_data_shows_the_number_of_rows_in_its_help():
    assert f"[default: {data.SHOWN}]" in (data.data.__doc__ or "")
