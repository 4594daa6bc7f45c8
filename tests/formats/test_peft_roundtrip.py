"""Folders of brushstroke in PEFT and the reverse: the same ΔW, logits and bits."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from torch import nn

import toys
from brushstroke import attach, load, save
from brushstroke.adapter import Adapter, Card, LoraConfig
from brushstroke.formats.model_card import model_card
from brushstroke.formats.peft_config import read_rule, selects_exactly, write_config
from brushstroke.formats.peft_forms import Form
from brushstroke.layers.dora import DoRA
from brushstroke.lowrank import LowRank

LOGITS = 1e-5  # fp32: the two sides add up in another order
TOKENS = torch.arange(24).reshape(2, 12) % toys.VOCABULARY
MODELS = {"llama": toys.tiny_llama, "gpt2": toys.tiny_gpt2}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj|h.1.attn.c_attn": 3}},
    "alpha_pattern": {"alpha_pattern": {"down_proj|c_fc": 5}, "rank_pattern": {r".*\.0\..*": 2}},
    "rslora_patterns": {"use_rslora": True, "alpha_pattern": {".*0.*": 7}, "rank_pattern": {".*1.*": 3}},
}


def peft_model(name: str, rule: str) -> tuple[nn.Module, peft.PeftModel]:
    """A base and PEFT's model over a copy of it, with factors that are not zero."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2", **RULES[rule]
    )
    model = peft.get_peft_model(MODELS[name](), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    return MODELS[name](), model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_written_by_peft_give_the_same_logits(name: str, rule: str, tmp_path: Path) -> None:
    base, model = peft_model(name, rule)
    model.save_pretrained(tmp_path)
    untouched = logits(base)
    adapter = load(tmp_path)
    with attach(base, adapter):
        ours = logits(base)
    assert (ours - logits(model)).abs().max() < LOGITS
    assert (ours - untouched).abs().max() > 100 * LOGITS
    for site, update in adapter.items():
        layer = model.get_submodule(f"base_model.model.{site}")
        delta = layer.get_delta_weight("default")
        assert torch.allclose(update.dense(), delta if name == "gpt2" else delta.mT, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_read_by_peft_give_the_same_logits(name: str, rule: str, tmp_path: Path) -> None:
    given_rule = {key: value for key, value in RULES[rule].items() if key != "use_rslora"}
    scale_rule = "rslora" if "use_rslora" in RULES[rule] else "standard"
    config = LoraConfig(rank=4, alpha=6, targets=tuple(TARGETS[name]), scale_rule=scale_rule, **given_rule)
    base = MODELS[name]()
    adapter = toys.random_adapter(base, config)
    save(adapter, tmp_path / "out")
    with attach(base, adapter):
        ours = logits(base)
    model = peft.PeftModel.from_pretrained(MODELS[name](), str(tmp_path / "out")).eval()
    assert (ours - logits(model)).abs().max() < LOGITS
    for site, update in adapter.items():
        assert model.get_submodule(f"base_model.model.{site}").scaling["default"] == update.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_saving_and_loading_keeps_every_bit(dtype: torch.dtype, llama: nn.Module, tmp_path: Path) -> None:
    adapter = toys.random_adapter(llama).to(dtype)
    again = load(save(adapter, tmp_path / "out"))
    assert dict(again.items()).keys() == dict(adapter.items()).keys()
    for site, update in adapter.items():
        assert isinstance(update, LowRank)
        twin = again[site]
        assert isinstance(twin, LowRank)
        assert torch.equal(twin.U, update.U)
        assert torch.equal(twin.V, update.V)
        assert (twin.dtype, twin.scale) == (dtype, update.scale)
        assert twin.U.mT.is_contiguous()
        assert twin.V.is_contiguous()


def test_the_card_comes_back(llama: nn.Module, tmp_path: Path) -> None:
    adapter = toys.random_adapter(llama)
    assert adapter.card is not None
    card = adapter.card.with_changes(
        base_name="somebody/model",
        chat_template="{{ 'a' }}\n{% x %}",
        stop_tokens=("<|end|>",),
        task="CAUSAL_LM",
    )
    again = load(save(adapter.with_card(card), tmp_path / "out")).card
    assert again is not None
    assert again.as_dict() == card.as_dict()
    assert again.chat_template == card.chat_template
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "somebody/model"
    assert stored["task_type"] == "CAUSAL_LM"
    assert stored["inference_mode"] is True
    page = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "somebody/model"' in page
    assert "library_name: peft" in page


def low_rank(*rank_and_scale: tuple[int, float]) -> Adapter:
    sites = (f"layers.{layer}.q" for layer in range(len(rank_and_scale)))
    updates = (LowRank(torch.ones(600, rank), torch.ones(rank, 600), scale) for rank, scale in rank_and_scale)
    return Adapter(dict(zip(sites, updates, strict=True)))


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (low_rank((4, 2.0), (4, 2.0)), "--enable-lora --max-lora-rank 8 "),
        (low_rank((33, 2.0), (4, 2.0)), "--enable-lora --max-lora-rank 64 "),
        (low_rank((4, 2.0), (4, 1.0)), "vLLM cannot load it (it uses one scale for all sites, and here they"),
        (low_rank((513, 1.0)), "vLLM cannot load it (its largest rank is 512)"),
    ],
)
def test_the_model_card_says_whether_vllm_can_load_it(adapter: Adapter, expected: str) -> None:
    page = model_card(adapter, Card(), "a")
    assert expected in page
    assert ("vllm serve" in page) == expected.startswith("--enable-lora")
    assert "- lora\n" in page
    assert "LoRA adapter (`W' = W + scale·U·V`)" in page


def test_the_model_card_of_dora_names_it_and_its_formula() -> None:
    dora = DoRA(torch.ones(6, 2), torch.ones(2, 6), torch.ones(6))
    page = model_card(Adapter({"q": dora}), Card(), "a")
    assert "A DoRA adapter (`W' = m·(W + scale·U·V)/‖W + scale·U·V‖`" in page
    assert "vLLM cannot load it (it does not support DoRA): merge it" in page
    assert "- dora\n" in page
    assert "LoRA" not in page
    assert "vllm serve" not in page


def test_a_folder_of_peft_gets_a_card_from_its_config(tmp_path: Path) -> None:
    _, model = peft_model("gpt2", "rslora")
    model.save_pretrained(tmp_path)
    card = load(tmp_path).card
    assert card is not None
    assert card.lora is not None
    assert LoraConfig.from_dict(card.lora).scale_rule == "rslora"
    assert set(card.target_modules) == {"c_attn", "c_fc"}
    assert card.conv1d


def test_a_sum_of_adapters_of_unlike_ranks_survives_peft(llama: nn.Module, tmp_path: Path) -> None:
    a = toys.random_adapter(llama, LoraConfig(rank=4, targets=("q_proj", "v_proj")))
    b = toys.random_adapter(llama, LoraConfig(rank=3, targets=("q_proj", "o_proj")), seed=5)
    mix = 0.5 * a - b
    save(mix, tmp_path / "mix")
    model: Any = peft.PeftModel.from_pretrained(toys.tiny_llama(), str(tmp_path / "mix")).eval()
    with attach(llama, mix):
        assert (logits(llama) - logits(model)).abs().max() < LOGITS


PATHS = st.lists(st.sampled_from(["a", "b", "fc", "fc1", "h.0", "h.1", "h.10"]), min_size=1, max_size=3)
SITES = st.dictionaries(
    PATHS.map(".".join),
    st.tuples(st.integers(1, 9), st.one_of(st.sampled_from([0.0, 0.5, 2.0, 1 / 3, -1.5]), st.floats(-9, 9))),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=200)
@given(sites=SITES, rslora=st.booleans())
def test_patterns_give_every_site_its_own_rank_and_scale(
    sites: dict[str, tuple[int, float]], rslora: bool
) -> None:
    card = Card(lora={"scale_rule": "rslora" if rslora else "standard"})
    config = json.loads(json.dumps(write_config(sites, card)))
    rule = read_rule(config, "it")
    for path, (rank, scale) in sites.items():
        key = get_pattern_key(config["rank_pattern"], path)
        assert config["rank_pattern"].get(key, config["r"]) == rank == rule.rank_of(path)
        key = get_pattern_key(config["alpha_pattern"], path)
        assert config["alpha_pattern"].get(key, config["lora_alpha"]) == rule.alpha_of(path)
        assert rule.scale_of(path) == pytest.approx(scale, rel=3e-16, abs=1e-300)


def test_scales_that_training_makes_are_exact() -> None:
    for rslora in (False, True):
        for rank in range(1, 257):
            for alpha in (1, 8, 16, 0.3, 12.5, 32, 7):
                scale = alpha / (rank**0.5 if rslora else rank)
                card = Card(lora={"scale_rule": "rslora" if rslora else "standard"})
                config = write_config({"fc": (rank, scale)}, card)
                assert read_rule(config, "it").scale_of("fc") == scale


def test_target_modules_are_short_only_where_they_are_exact() -> None:
    paths = ["h.0.q", "h.1.q", "h.0.k"]
    assert selects_exactly(["q", "k"], paths)
    assert not selects_exactly(["q"], paths)
    assert not selects_exactly(["q", "k", "v"], paths)
    sites = dict.fromkeys(paths, (4, 2.0))
    assert write_config(sites, Card(target_modules=("q", "h.0.k")))["target_modules"] == ["h.0.k", "q"]
    assert write_config(sites, Card(target_modules=("q",)))["target_modules"] == sorted(paths)


def test_any_module_by_its_path(tmp_path: Path) -> None:
    net = toys.Mlp()
    adapter = Adapter({"fc1": LowRank(torch.randn(6, 2), torch.randn(2, 10), 0.7)})
    save(adapter, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(net, str(tmp_path / "out"))
    delta = model.get_submodule("base_model.model.fc1").get_delta_weight("default")  # pyright: ignore
    assert torch.allclose(delta.mT, adapter["fc1"].dense(), atol=1e-6)


class Held:
    """An update of one tensor, as far as a form needs it."""

    def __init__(self, T: torch.Tensor) -> None:
        self.T = T

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"T": self.T}


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.permutations("rdhk"), st.integers(1, 4), st.lists(st.integers(0, 4), max_size=3), st.data())
def test_tensors_of_any_axes_are_stored_in_reverse_order_and_come_back(letters, count, ones, data):
    named = letters[:count]
    axes = list(named)
    for place in ones:
        axes.insert(place, "1")
    sizes = [data.draw(st.integers(1, 4)) for _ in named]
    T = torch.arange(math.prod(sizes)).reshape(sizes)
    form: Any = Form(Held, {"T": ("lora_T", " ".join(axes))})  # type: ignore[arg-type]
    stored = form.stored(Held(T))["lora_T"]
    assert [axis for axis, size in zip(axes, stored.shape, strict=True) if axis == "1" and size > 1] == []
    assert torch.equal(
        stored.squeeze(), torch.einsum(T, [*range(count)], [*reversed(range(count))]).squeeze()
    )
    assert torch.equal(form.read({"lora_T": stored}, 1.0).T, T)
