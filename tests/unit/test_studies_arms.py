import pytest

from brushstroke.base import Base
from brushstroke.cli.study import _study
from brushstroke.errors import ConfigError
from brushstroke.sites import Site
from brushstroke.studies import Grid, Material, Task
from brushstroke.studies.arms import (
    RUN_KEY,
    Arm,
    Run,
    equal_budget,
    low_rank,
    matrix_sets,
    on_other_task,
    rate_grid,
    whole,
)
from brushstroke.studies.targets import TargetsStudy
from brushstroke.training import TrainConfig

GPT3 = [
    Site(f"h.{layer}.attn.{name}_proj", 12288, 12288) for layer in range(96) for name in ("q", "k", "v", "o")
]


def test_the_papers_table_five():
    sets = {
        "q": ("q_proj",),
        "k": ("k_proj",),
        "v": ("v_proj",),
        "o": ("o_proj",),
        "q,k": ("q_proj", "k_proj"),
        "q,v": ("q_proj", "v_proj"),
        "all": ("q_proj", "k_proj", "v_proj", "o_proj"),
    }
    found = equal_budget(sets, GPT3, 18_874_368)
    assert [arm.rank for arm in found.arms] == [8, 8, 8, 8, 4, 4, 2]
    assert not found.left_out


def test_set_that_cannot_meet_the_budget_is_left_out_and_reported():
    sites = [Site("a.q", 4, 4), Site("b.up", 100, 4)]
    found = equal_budget({"q": ("q",), "up": ("up",)}, sites, 16)
    assert [arm.name for arm in found.arms] == ["q r=2"]
    assert "104 parameters at rank 1" in found.left_out["up"]
    with pytest.raises(ConfigError, match="no set of matrices meets"):
        equal_budget({"up": ("up",)}, sites, 16)


def test_a_rank_that_no_matrix_allows_is_left_out():
    found = equal_budget({"q": ("q",), "v": ("v",)}, [Site("a.q", 4, 4), Site("a.v", 2, 6)], 32)
    assert "would need rank 4, its smallest matrix allows 2" in found.left_out["v"]


def test_the_sets_of_a_model():
    names = [
        Site(f"l.0.{part}", 8, 8)
        for part in (
            "attn.q_proj",
            "attn.k_proj",
            "attn.v_proj",
            "attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    found = list(matrix_sets(names))
    assert found == ["q", "k", "v", "o", "q,k", "q,v", "q,k,v,o", "gate,up,down", "up,down", "all"]


def test_runs_have_distinct_keys_and_initial_factors():
    arm = low_rank("q", ("q_proj",), 8)
    runs = [
        Run(arm, 1e-3, 0),
        Run(arm, 1e-3, 1),
        Run(arm, 3e-3, 0),
        Run(on_other_task(arm), 1e-3, 0),
        Run(low_rank("q", ("q_proj",), 16), 1e-3, 0),
        Run(Arm("q r=8", ("q_proj",), 8, alpha=32.0), 1e-3, 0),
    ]
    assert len({run.key for run in runs}) == len(runs)
    assert runs[0].start_seed == runs[2].start_seed  # rates of one arm are compared from one start
    assert len({run.start_seed for run in (runs[0], runs[1], runs[3], runs[4])}) == 4


def test_the_grid_of_rates_is_logarithmic():
    assert rate_grid(1e-3, points=3) == (0.00032, 0.001, 0.0032)


def test_matrices_of_one_name_in_two_places_keep_their_places():
    gpt2 = [
        Site(f"transformer.h.0.{part}", 8, 8)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    found = matrix_sets(gpt2)
    assert found["c_attn,attn.c_proj"] == ("c_attn", "attn.c_proj")
    assert found["c_fc,mlp.c_proj"] == ("c_fc", "mlp.c_proj")


def test_nearly_equal_rates_have_distinct_keys_and_old_keys_stay():
    arm = low_rank("q", ("q_proj",), 8)
    rates = (1e-3, 1.0000001e-3, 1e-5, 1.0, 30.0, 1 / 3, 1e30)
    keys = [Run(arm, rate, 0).key for rate in rates]
    assert len(set(keys)) == len(keys)
    assert all(RUN_KEY.fullmatch(key) for key in keys)
    usual = [key.split("-lr")[1] for key in (keys[0], *keys[2:5])]
    assert usual == ["0.001-seed0", "1e-05-seed0", "1-seed0", "30-seed0"]


def test_full_fine_tuning_rates_stay_distinct():
    assert whole("q", ("q_proj",), (3.2e-3, 1e-2)).rates == (3.2e-4, 1e-3)
    assert len(set(whole("q", ("q_proj",), (1e-3, 1.001e-3)).rates)) == 2


@pytest.mark.parametrize("budget", [0, -8])
def test_budget_of_zero_is_not_the_default(budget):
    with pytest.raises(ConfigError, match="at least 1"):
        TargetsStudy(budget=budget)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"q": ("q",)}, "at least two"),
        ({}, "at least two"),
        ({"q,v": ("q", "v"), "v,q": ("v", "q"), "q": ("q",)}, "the same matrices: q,v and v,q;"),
    ],
)
def test_one_set_or_the_same_set_twice_is_no_comparison(sets, message):
    with pytest.raises(ConfigError, match=message):
        TargetsStudy(sets)


def test_two_patterns_for_the_same_matrices_are_no_comparison(llama):
    task = Task("toy", (), (), ())
    material = Material(Base(llama), {"task": task}, TrainConfig(max_steps=1), Grid((1e-3, 1e-2), (0,)))
    study = TargetsStudy({"q": ("q_proj",), "attn.q": ("self_attn.q_proj",), "v": ("v_proj",)})
    with pytest.raises(ConfigError, match=r"the same matrices: q and attn\.q;"):
        study.arms(material)


def test_patterns_that_share_a_short_name_stay_two_sets():
    assert [*_study("targets", {"sets": [("q",), ("q_proj",)]}).sets] == ["q", "q_proj"]
