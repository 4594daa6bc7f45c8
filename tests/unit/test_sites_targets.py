"""Resolution of patterns to sites: no accidental matches, nothing silently skipped."""

import re

import pytest

from brushstroke.adapter import LoraConfig
from brushstroke.errors import TargetError
from brushstroke.sites import Other, Site, resolve_targets
from brushstroke.sites.targets import GROUPS, matches_path, short_names

LLAMA = [
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in (
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
GPT2 = [
    f"transformer.h.{i}.{part}"
    for i in range(2)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
BERT = [
    *(
        f"bert.encoder.layer.0.{part}"
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ),
    "bert.pooler.dense",
]
T5 = [
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.0.layer.0.SelfAttention.o",
    "decoder.block.0.layer.1.EncDecAttention.k",
    "encoder.block.0.layer.1.DenseReluDense.wi",
    "encoder.block.0.layer.1.DenseReluDense.wo",
]
MIXTRAL = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.block_sparse_moe.gate",
    *(f"model.layers.0.block_sparse_moe.experts.{e}.w{k}" for e in range(2) for k in (1, 2, 3)),
]
TORCH = ["layers.0.self_attn.out_proj", "layers.0.linear1", "layers.0.linear2"]


def sites(paths: list[str], d: int = 16, h: int = 12, **extra: Site) -> list[Site]:
    return [Site(p, d, h) for p in paths] + list(extra.values())


def picked(pattern: str, paths: list[str]) -> set[str]:
    return set(resolve_targets(LoraConfig(rank=2, targets=[pattern]), sites(paths)).ranks)


@pytest.mark.parametrize(
    ("paths", "attention", "mlp"),
    [
        (LLAMA, "self_attn", "mlp"),
        (GPT2, r"\.attn\.", r"\.mlp\."),
        (BERT, "attention", r"intermediate|layer\.0\.output"),
        (T5, "Attention", "DenseReluDense"),
        (MIXTRAL, "self_attn", r"experts"),
        (TORCH, "self_attn", "linear"),
    ],
)
def test_groups(paths, attention, mlp):
    assert picked("attention", paths) == {p for p in paths if re.search(attention, p)}
    assert picked("mlp", paths) == {p for p in paths if re.search(mlp, p)}
    assert picked("all-linear", paths) == set(paths)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_that_matches_nothing_is_an_error(name):
    with pytest.raises(TargetError, match=f"'{name}' matches no site"):
        resolve_targets(LoraConfig(targets=[name]), sites([]))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("model.layers.1.self_attn.q_proj", 1),
        (r"model\.layers\.1\..*", 7),
        (r"layers\.[01]\.mlp\.(up|down)_proj", 4),
        (r".*_proj", 14),
        ("[qv]_proj", 4),
    ],
)
def test_names_suffixes_and_expressions(pattern, count):
    assert len(picked(pattern, LLAMA)) == count


@pytest.mark.parametrize(
    "pattern", ["proj", "_proj", "q_pro", "attn.q_proj", "layers.0", "Q_PROJ", "*.q_proj", "("]
)
def test_unmatched_patterns_are_errors(pattern):
    """Neither part of a name nor part of a path is enough, and a glob is no expression."""
    with pytest.raises(TargetError, match="matches no site"):
        picked(pattern, LLAMA)


def test_all_unmatched_patterns_are_listed_with_near_misses():
    config = LoraConfig(targets=["q_proj", "v_porj", "k_prj", "nonsense"])
    with pytest.raises(TargetError) as error:
        resolve_targets(config, sites(LLAMA))
    message = str(error.value)
    assert "'q_proj'" not in message.split("\n")[0]
    assert re.search(r"'v_porj' matches no site; near it: .*v_proj", message)
    assert re.search(r"'k_prj' matches no site; near it: .*k_proj", message)
    assert re.search(r"'nonsense' matches no site; near it: .*down_proj", message)
    assert "14 adaptable sites" in message
    assert "all-linear, attention, mlp" in message


def test_matches_are_reported_by_pattern_in_model_order():
    plan = resolve_targets(LoraConfig(rank=2, targets=["v_proj", "attention"]), sites(LLAMA))
    assert plan.matches["v_proj"] == tuple(p for p in LLAMA if p.endswith("v_proj"))
    assert plan.matches["attention"] == tuple(p for p in LLAMA if "self_attn" in p)
    assert list(plan.ranks) == [p for p in LLAMA if "self_attn" in p]


def test_first_matching_pattern_applies():
    config = LoraConfig(
        rank=8,
        alpha=16,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 4, r".*layers\.1\..*": 3},
        alpha_pattern={"up_proj": 32, "mlp.up_proj": 1},
    )
    plan = resolve_targets(config, sites(LLAMA))
    assert plan.ranks["model.layers.0.self_attn.q_proj"] == 2
    assert plan.ranks["model.layers.1.self_attn.q_proj"] == 4
    assert plan.ranks["model.layers.1.mlp.up_proj"] == 3
    assert plan.ranks["model.layers.0.mlp.up_proj"] == 8
    assert plan.scales["model.layers.0.mlp.up_proj"] == 32 / 8
    assert plan.scales["model.layers.1.mlp.up_proj"] == 32 / 3
    assert plan.scales["model.layers.0.self_attn.q_proj"] == 16 / 2


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_outside_the_targets_is_an_error(kind):
    config = LoraConfig(targets=["q_proj"], **{kind: {"v_proj": 4}})
    with pytest.raises(TargetError, match=f"{kind} 'v_proj' matches no site"):
        resolve_targets(config, sites(LLAMA))


def test_a_rank_too_large_is_refused_by_name_and_lowered_in_groups():
    small = [Site("small", 16, 3), Site("large", 16, 12)]
    with pytest.raises(TargetError, match=r"rank 4 is larger than small allows: its weight is 16×3.*is 3;"):
        resolve_targets(LoraConfig(rank=4, targets=["small"]), small)
    plan = resolve_targets(LoraConfig(rank=4, alpha=8), small)
    assert plan.ranks == {"small": 3, "large": 4}
    assert plan.capped == {"small": 4}
    assert plan.scales == {"small": 8 / 3, "large": 2.0}
    assert resolve_targets(LoraConfig(rank=3, targets=["small"]), small).capped == {}
    assert resolve_targets(LoraConfig(rank=4, targets=["small"], rank_pattern={"small": 2}), small).ranks == {
        "small": 2
    }


def test_heads_and_tied_weights_must_be_named():
    all_sites = sites(
        LLAMA[:1],
        head=Site("lm_head", 16, 12, is_output=True),
        tied=Site("twin", 16, 12, tied_to="embed"),
        bypassed=Site("out", 16, 12, bypassed="never runs"),
    )
    plan = resolve_targets(LoraConfig(rank=2), all_sites)
    assert set(plan.ranks) == {LLAMA[0]}
    assert set(plan.skipped) == {"lm_head", "twin", "out"}
    plan = resolve_targets(LoraConfig(rank=2, targets=["all-linear", "lm_head"]), all_sites)
    assert set(plan.ranks) == {LLAMA[0], "lm_head"}
    assert set(plan.skipped) == {"twin", "out"}
    assert set(resolve_targets(LoraConfig(rank=2, targets=["twin"]), all_sites).ranks) == {"twin"}
    with pytest.raises(TargetError, match="out cannot be adapted: never runs"):
        resolve_targets(LoraConfig(rank=2, targets=["out"]), all_sites)


EXPERTS = [
    Other("model.layers.0.mlp", "MoE", sites_below=("up_proj",)),
    Other("model.layers.0.mlp.gate", "Router", has_weight=True),
    Other("model.layers.0.mlp.experts.w1", "bare 3-D parameter", has_weight=True),
    Other("model.layers.1.mlp.experts.w1", "bare 3-D parameter", has_weight=True),
    Other("model.embed", "Embedding"),
]


@pytest.mark.parametrize(
    ("targets", "skipped"),
    [
        (["all-linear"], {0, 1, 2, 3}),
        (["mlp"], {1, 2, 3}),
        (["attention"], set()),
        (["q_proj"], set()),
        (["q_proj", r"layers\.0\..*"], {1, 2}),
    ],
)
def test_selected_weights_that_are_not_sites_are_named(targets, skipped):
    others = [Other("tower.conv", "Conv2d", has_weight=True), *EXPERTS[1:4], EXPERTS[0], EXPERTS[4]]
    plan = resolve_targets(LoraConfig(rank=2, targets=targets), sites(LLAMA), others)
    assert set(plan.skipped) == {others[i].path for i in skipped}
    assert plan.ranks == resolve_targets(LoraConfig(rank=2, targets=targets), sites(LLAMA)).ranks


def test_error_names_what_a_pattern_without_sites_selects():
    attention = sites(
        [path for path in LLAMA if "attn" in path], gone=Site("mlp.fc1", 8, 8, bypassed="unread")
    )
    with pytest.raises(TargetError) as error:
        resolve_targets(
            LoraConfig(rank=2, targets=["mlp", "experts.w1", "embed", "q_prj"]), attention, EXPERTS
        )
    lines = str(error.value).split("\n")
    assert lines[0] == (
        "target 'mlp' matches no site: model.layers.0.mlp.gate is a Router, which cannot be adapted yet, "
        "model.layers.0.mlp.experts.w1 is a bare 3-D parameter, which cannot be adapted yet, "
        "mlp.fc1 is left out: unread, and 1 more"
    )
    assert lines[1].startswith(
        "target 'experts.w1' matches no site: model.layers.0.mlp.experts.w1 is a bare 3-D"
    )
    assert lines[1].endswith("and 1 more")
    assert lines[2] == (
        "target 'embed' matches no site: model.embed is an Embedding, which cannot be adapted yet"
    )
    assert "near it: q_proj" in lines[3]


def test_aliases_name_the_same_site():
    shared = [Site("a.fc", 8, 8, aliases=("b.fc",)), Site("c", 8, 8)]
    for pattern in ("a.fc", "b.fc", "fc"):
        plan = resolve_targets(LoraConfig(rank=2, targets=[pattern], rank_pattern={"b.fc": 1}), shared)
        assert plan.ranks == {"a.fc": 1}


def test_a_dot_in_a_name_is_a_dot_first():
    assert matches_path("0.fc", "net.0.fc")
    assert not matches_path("0.fc", "net.10.fc")


def test_short_names_select_the_same_sites_by_the_rule_of_peft():
    from peft import LoraConfig as PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    everything = [*LLAMA, *GPT2, *BERT, "lm_head", "fc", "block.fc", "block.other", "h.1.fc", "h.11.fc"]
    selections = [
        LLAMA,
        LLAMA[:7],
        [p for p in LLAMA if p.endswith(("q_proj", "v_proj"))],
        GPT2,
        [p for p in GPT2 if ".attn." in p],
        [BERT[-1]],
        [BERT[3], BERT[-1]],
        ["block.fc"],
        ["h.1.fc", "block.other"],
        ["lm_head"],
    ]
    for chosen in selections:
        names = short_names(chosen, everything)
        config = PeftConfig(target_modules=list(names))
        found = [path for path in everything if check_target_module_exists(config, path)]
        assert found == [path for path in everything if path in set(chosen)], names


def test_short_names_are_short():
    assert short_names(LLAMA, [*LLAMA, "lm_head"]) == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )


def test_hints_name_only_what_can_be_adapted() -> None:
    sites = [
        Site("layers.0.out_proj", 8, 8, bypassed="the mixer reads its weight"),
        Site("layers.0.up_proj", 8, 8, frozen="it runs without gradients"),
        Site("layers.0.self_attn.q_proj", 8, 8),
    ]
    with pytest.raises(TargetError) as unmatched:
        resolve_targets(LoraConfig(targets="oup_proj"), sites)
    assert "near it: q_proj" in str(unmatched.value)
    assert "out_proj" not in str(unmatched.value)
    assert "this model has 1 adaptable sites" in str(unmatched.value)
    with pytest.raises(TargetError, match=r"leave it out, as the groups \(all-linear, attention\) do"):
        resolve_targets(LoraConfig(targets="out_proj"), sites)
    with pytest.raises(TargetError, match=r"leave it out$"):
        resolve_targets(LoraConfig(targets="out_proj"), sites[:2])
    with pytest.raises(TargetError, match=r"did you mean 'all-linear'\?"):
        resolve_targets(LoraConfig(targets="all_linear"), sites)
