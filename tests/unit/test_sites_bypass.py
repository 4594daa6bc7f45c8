"""Facts from the source of a class: weights read without their layer, and layers without gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from brushstroke import attach
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.errors import TargetError
from brushstroke.lowrank import LowRank
from brushstroke.sites import find_sites
from brushstroke.sites.bypass import run_without_gradients_by, weights_read_by

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}
NEMOTRON = {"layers_block_type": ["mamba", "attention"], "head_dim": 8, "ssm_state_size": 4, "n_groups": 1}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1}
FAMILIES = {  # class of the config, its settings, and the projections that are read directly
    "mamba": ("MambaConfig", {**MAMBA, "time_step_rank": 4}, {"x_proj", "dt_proj", "out_proj"}),
    "falcon_mamba": ("FalconMambaConfig", {**MAMBA, "time_step_rank": 4}, {"x_proj", "dt_proj", "out_proj"}),
    "mamba2": ("Mamba2Config", {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1}, {"out_proj"}),
    "jamba": ("JambaConfig", {**SMALL, **HEADS, "mamba_d_state": 4, "num_experts": 2}, {"dt_proj"}),
    "bamba": ("BambaConfig", {**SMALL, **HEADS, **MIXER, "attn_layer_indices": [1]}, {"out_proj"}),
    "falcon_h1": ("FalconH1Config", {**SMALL, **HEADS, **MIXER, "mamba_d_ssm": 64}, {"out_proj"}),
    "granite": (
        "GraniteMoeHybridConfig",
        {**SMALL, **HEADS, **MIXER, "layer_types": ["mamba", "attention"], "num_local_experts": 2},
        {"out_proj"},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {**SMALL, **HEADS, **NEMOTRON, "num_hidden_layers": None, "mamba_num_heads": 4, "mamba_head_dim": 16},
        {"out_proj"},
    ),
    "zamba2": (
        "Zamba2Config",
        {**SMALL, **ZAMBA, "num_attention_heads": 4, "mamba_headdim": 16},
        {"out_proj"},
    ),
    "bloom": ("BloomConfig", BLOOM, set()),
    "bloom, exact": (
        "BloomConfig",
        {**BLOOM, "pretraining_tp": 2, "slow_but_exact": True},
        {"dense", "dense_4h_to_h"},
    ),
    "llama": ("LlamaConfig", {**SMALL, **HEADS}, set()),
}


def family(name: str) -> nn.Module:
    import transformers

    config, settings, _ = FAMILIES[name]
    given = {key: value for key, value in settings.items() if value is not None}
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**given))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projections_that_a_mixer_reads_itself_are_left_out_of_groups_and_refused_by_name(name):
    model, expected = family(name), FAMILIES[name][2]
    bypassed = {site.name for site in find_sites(model) if site.bypassed}
    assert bypassed == expected
    with attach(model, LoraConfig(rank=1)) as attachment:
        assert not expected & {path.rpartition(".")[2] for path in attachment.sites if ".mixer." in path}
        assert expected <= {path.rpartition(".")[2] for path in attachment.plan.skipped}
    for target in expected:
        with pytest.raises(TargetError, match=rf"{target} cannot be adapted: \w+ reads its weight directly"):
            attach(model, LoraConfig(rank=1, targets=(target,)))


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "falcon_h1", "nemotron_h"])
def test_bypassed_weights_that_peft_refuses_are_refused(name):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(family(name), PeftConfig(target_modules=["out_proj"]))
    with pytest.raises(TargetError, match="out_proj cannot be adapted"):
        attach(family(name), LoraConfig(rank=1, targets=("out_proj",)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.fused = False
        self.config = {"fused": False}

    def forward(self, x):
        return self.b(self.a(x))


class Direct(Two):
    def forward(self, x):
        return self.a(x) @ self.b.weight.T


class InAMethod(Two):
    def forward(self, x):
        return self._inner(x)

    def _inner(self, x):
        return F.linear(x, weight=self.b.weight)


class InAProperty(Two):
    @property
    def columns(self):
        return self.b.weight.chunk(2)

    def forward(self, x):
        return x @ self.columns[0].T


class UnderAnotherName(Two):
    def forward(self, x):
        layer = self.b
        return F.linear(x, layer.weight)


class Cast(Two):
    def forward(self, x):
        return F.linear(x, self.b.weight.to(x.dtype))


class UnderANameOfItsOwn(Two):
    def forward(self, x):
        layer = self.b
        layer = nn.Linear(4, 4)
        return F.linear(self.b(x), layer.weight)


class InAList(Two):
    def forward(self, x):
        return F.linear(self.a(x), self.list[1].weight)


class OfTheBase(Direct):
    def forward(self, x):
        return super().forward(x) + 1


class OfNoBase(Direct):
    def forward(self, x):
        return self.b(x)


class WhileTraining(Two):
    def forward(self, x):
        return F.linear(x, self.b.weight) if self.training else self.b(x)


class ByAnArgument(Two):
    def forward(self, x, fast=False):
        if fast and not self.fused:
            return F.linear(x, self.b.weight)
        return self.b(x)


class ByACache(Two):
    def forward(self, x, cache_params=None):
        return self.b(x) if cache_params is None else F.linear(x, self.b.weight)


class ByAnOptionalInput(Two):
    def forward(self, x, states=None):
        if states is None:
            return self.b(x)
        return F.linear(states, self.b.weight)


class ByARequiredInput(Two):
    def forward(self, x=None):
        if x is None:
            raise ValueError
        return self.a(x) if x is None else F.linear(x, self.b.weight)


class SwitchedOff(Two):
    def forward(self, x):
        if self.fused or self.config["fused"]:
            return F.linear(x, self.b.weight)
        return self.b(x)


class Facts(Two):
    def forward(self, x):
        if isinstance(self.b.weight, torch.Tensor) and self.b.weight.shape[0] == 4:
            x = x.to(self.b.weight.dtype).to(self.b.weight.device).to(self.b.weight).type_as(self.b.weight)
        return self.b(x)


class Unreached(Two):
    def reset(self):
        self.b.weight.data.zero_()


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Direct, {"b"}),
        (InAMethod, {"b"}),
        (Cast, {"b"}),
        (InAProperty, {"b"}),
        (UnderAnotherName, {"b"}),
        (InAList, {"list.1"}),
        (OfTheBase, {"b"}),
        (WhileTraining, {"b"}),
        (ByAnArgument, {"b"}),
        (ByACache, {"b"}),
        (ByARequiredInput, {"b"}),
        (ByAnOptionalInput, set()),
        (Two, set()),
        (OfNoBase, set()),
        (SwitchedOff, set()),
        (Facts, set()),
        (Unreached, set()),
        (UnderANameOfItsOwn, set()),
    ],
)
def test_weight_reads_are_found_only_where_forward_can_reach(cls, expected):
    assert set(weights_read_by(cls())) == expected
    assert {site.path for site in find_sites(nn.Sequential(cls())) if site.bypassed} == {
        f"0.{path}" for path in expected
    }


def test_branch_of_an_enabled_setting_counts():
    net = SwitchedOff()
    net.config = {"fused": True}
    assert set(weights_read_by(net)) == {"b"}


def test_class_without_source_is_accepted():
    space: dict[str, type] = {}
    exec("class Made(Two):\n    def forward(self, x):\n        return x @ self.b.weight", {"Two": Two}, space)
    assert weights_read_by(space["Made"]()) == {}


class Quiet(Two):
    @torch.no_grad()
    def forward(self, x):
        return self.a(x)


class QuietPart(Two):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class QuietMethod(Two):
    def forward(self, x):
        return self.b(self._features(x))

    @torch.inference_mode()
    def _features(self, x):
        return self.a(x)


class QuietBySetting(Two):
    def forward(self, x):
        if self.fused:
            with torch.no_grad():
                return self.a(x)
        else:
            return self.a(x)


class Reversible(Two):
    def forward(self, x):
        with torch.no_grad():
            return self.a(x)

    def backward_pass(self, x):
        with torch.enable_grad():
            return self.a(x)


class BackInside(Two):
    @torch.no_grad()
    def forward(self, x):
        x = self.a(x)
        with torch.enable_grad():
            return self.b(x)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Quiet, {"a", "b", "list.0", "list.1"}),
        (QuietPart, {"a"}),
        (QuietMethod, {"a"}),
        (QuietBySetting, set()),
        (Reversible, set()),
        (Two, set()),
    ],
)
def test_layers_that_the_model_runs_without_gradients_are_left_out(cls, expected):
    net = nn.Sequential(cls(), nn.Linear(4, 4))
    assert {site.path for site in find_sites(net) if site.frozen} == {f"0.{path}" for path in expected}
    with attach(net, LoraConfig(rank=1), trainable=True) as attachment:
        assert set(attachment.plan.skipped) == {f"0.{path}" for path in expected}
    for path in expected:
        with pytest.raises(TargetError, match=rf"0.{path} cannot be adapted: {cls.__name__} runs it without"):
            attach(net, LoraConfig(rank=1, targets=(f"0.{path}",)))
    update = LowRank(torch.ones(4, 1), torch.ones(1, 4))
    with attach(net, Adapter({"0.a": update})):  # one that was trained elsewhere has its effect
        pass


def test_gradients_that_are_switched_on_again_count():
    assert set(run_without_gradients_by(BackInside())) == {"a"}
    net = QuietBySetting()
    net.fused = True
    assert set(run_without_gradients_by(net)) == {"a"}


def test_a_reversible_layer_and_an_indexer_of_transformers():
    from transformers import ReformerConfig, ReformerModelWithLMHead
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

    shape = {"axial_pos_shape": (4, 8), "axial_pos_embds_dim": (8, 24), "attn_layers": ["local"]}
    config = ReformerConfig(
        **shape, is_decoder=True, hidden_size=32, attention_head_size=8, num_attention_heads=4, vocab_size=64
    )
    reformer = ReformerModelWithLMHead(config)
    assert not [site for site in find_sites(reformer) if site.frozen or site.bypassed]
    indexer = DeepseekV32Indexer.__new__(DeepseekV32Indexer)
    nn.Module.__init__(indexer)
    indexer.wk = nn.Linear(4, 4)
    assert [site.frozen for site in find_sites(nn.Sequential(indexer))] == [
        "DeepseekV32Indexer runs it without gradients (in forward)"
    ]
