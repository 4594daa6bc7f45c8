"""Merging in memory: the sum is rounded once, the result is plain, the base does not change."""

import copy
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn

import kinds
import toys
from brushstroke.adapter import Adapter, Card, LoraConfig
from brushstroke.base import text_config
from brushstroke.errors import BaseMismatchError, MergeError
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank
from brushstroke.merging import MergeReport, merge, merge_folder, merge_weight

FLOAT32 = 1e-5  # the promise for merged against adapted, relative
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit: once


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def test_merged_model_equals_adapted_model(language_model):
    model = language_model
    adapter = toys.random_adapter(model)
    tokens = torch.randint(0, toys.VOCABULARY, (3, 11))
    before = toys.snapshot(model)
    with torch.no_grad():
        base = model(tokens).logits
        with attach(model, adapter):
            adapted = model(tokens).logits
        report: list[MergeReport] = []
        merged = merge(model, adapter, report=report)
        assert relative(merged(tokens).logits, adapted) < FLOAT32
    assert relative(base, adapted) > 0.01
    assert toys.snapshot(model) == before
    assert type(merged) is type(model)
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    assert list(merged.state_dict()) == list(model.state_dict())
    assert not any("lora" in name or "brushstroke" in name for name in merged.__dict__)
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert set(report[0].sites) == set(adapter)
    assert report[0].untied == ()
    assert report[0].survived == pytest.approx(1.0, abs=1e-5)
    assert report[0].output < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv1d", [True, False])
def test_the_sum_is_rounded_once(dtype, conv1d):
    net = nn.Sequential(toys.Conv1D(40, 48) if conv1d else nn.Linear(48, 40)).to(dtype)
    U, V = torch.randn(48, 4), torch.randn(4, 40)
    merged = merge(net, Adapter({"0": LowRank(U, V, 0.37)}))

    def dxh(module):
        return module[0].weight.double() if conv1d else module[0].weight.double().mT

    exact = dxh(net) + 0.37 * U.double() @ V.double()
    assert merged[0].weight.dtype == dtype
    error = (dxh(merged) - exact).abs()
    # The sum itself is made in float32 (ranks of 4, so a few more units there).
    bound = ROUNDING[dtype] * exact.abs() + 2e-6 + (2.0**-25 if dtype == torch.float16 else 0)
    assert bool((error <= bound).all())


def test_float64_stays_exact():
    net = toys.Mlp().double()
    adapter = toys.random_adapter(net).to(torch.float64)
    merged = merge(net, adapter)
    for path, update in adapter.items():
        now, then = (m.get_submodule(path).weight.mT for m in (merged, net))
        assert relative(now - then, update.dense()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reported_share_that_survives_equals_the_measured_one(dtype):
    W = torch.randn(64, 48).to(dtype)
    update = LowRank(torch.randn(64, 2), torch.randn(2, 48), 0.01)
    M, drift = merge_weight(W, update, "w")
    arrived, delta = M.double() - W.double(), update.to(torch.float64).dense()
    assert drift.survived == pytest.approx(((arrived * delta).sum() / delta.square().sum()).item(), abs=1e-4)
    assert drift.error == pytest.approx(relative(arrived, delta), rel=0.02, abs=1e-5)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_merging_by_column_blocks_equals_merging_at_once(monkeypatch, layout):
    W = torch.randn(48, 64).mT if layout == "linear" else torch.randn(64, 48)
    W = W.to(torch.bfloat16)
    update = LowRank(torch.randn(64, 2), torch.randn(2, 48), 0.3)
    whole, drift = merge_weight(W, update, "w")
    for name in ("BLOCK_ELEMENTS", "ROWS_BLOCK_ELEMENTS"):
        monkeypatch.setattr(sys.modules[merge.__module__], name, 64 * 7)
    M, blocked = merge_weight(W, update, "w")
    assert torch.equal(M, whole)
    assert M.stride() == W.stride()
    for name in ("survived", "error", "output"):
        assert getattr(blocked, name) == pytest.approx(getattr(drift, name), rel=1e-4)


def test_update_lost_in_rounding_is_refused():
    net = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    faint = Adapter({"0": LowRank(1e-4 * torch.ones(64, 1), torch.ones(1, 64))})
    with pytest.raises(MergeError, match=r"0: only 0% of the update survives.*--rounding.*float32"):
        merge(net, faint, rounding="nearest")
    arrived = merge(net, faint)[0].weight.double().mean().item() - 1.0
    assert arrived == pytest.approx(1e-4, rel=0.5)  # 52 ± 7 of 4096 entries are rounded up
    assert merge(net.float(), faint)[0].weight[0, 0].item() == pytest.approx(1.0001)


@pytest.mark.parametrize(
    ("dtype", "weight", "factor", "said"),
    [
        (torch.float16, 60000.0, 100.0, "too large for torch.float16; merge into float32 or bfloat16"),
        (torch.bfloat16, 1.0, 1e10, "the update is so large"),
        (torch.bfloat16, 1.0, 1e20, "the update is so large"),
        (torch.float32, float("nan"), 1.0, "the base's weight holds non-finite values"),
        (torch.float32, float("-inf"), 0.0, "the base's weight holds non-finite values"),
    ],
)
def test_non_finite_values_are_refused(dtype, weight, factor, said):
    net = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    with torch.no_grad():
        net[0].weight[2, 3] = weight
    adapter = Adapter({"0": LowRank(factor * torch.ones(6, 1), factor * torch.ones(1, 5))})
    with pytest.raises(MergeError, match=f"^0: .*{said}"):
        merge(net, adapter)


def test_a_zero_update_merges_to_the_base():
    net = toys.Mlp()
    with attach(net, LoraConfig(rank=2)) as attachment:
        fresh = attachment.adapter()
    merged = merge(net, fresh)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), merged.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merging_twice_is_refused(dtype):
    net = toys.Mlp(32, 64, 16).to(dtype)
    adapter = toys.random_adapter(net)
    merged = merge(net, adapter)
    with pytest.raises(BaseMismatchError, match="already merged into the base"):
        merge(merged, adapter)
    with pytest.raises(BaseMismatchError, match="already merged into the base"):
        attach(merged, adapter)
    assert merge(merged, adapter, allow_different_base=True) is not merged


def test_merging_the_result_of_two_merges_is_refused(llama):
    adapter = toys.random_adapter(llama)
    twice = merge(merge(llama.bfloat16(), adapter), adapter, allow_different_base=True)
    with pytest.raises(BaseMismatchError):
        merge(twice, adapter)


def test_path_instead_of_adapter_is_refused(tmp_path):
    for attempt in (
        lambda: merge(nn.Sequential(nn.Linear(2, 2)), "adapter"),
        lambda: merge_folder(tmp_path, tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(MergeError, match=r"expected an Adapter; got (str|PosixPath): load one"):
            attempt()


def test_a_model_with_an_adapter_in_it_is_refused():
    net = toys.Mlp()
    adapter = toys.random_adapter(net)
    with attach(net, adapter), pytest.raises(MergeError, match="detach it"):
        merge(net, adapter)


def test_a_weight_that_is_computed_is_refused():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
    adapter = Adapter({"0": LowRank(torch.randn(6, 2), torch.randn(2, 4))})
    with pytest.raises(MergeError, match="0: its weight is not stored as a plain matrix"):
        merge(net, adapter)


def test_a_packed_weight_is_refused():
    net = nn.Sequential(nn.Linear(6, 4))
    net[0].weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    adapter = Adapter({"0": LowRank(torch.randn(6, 2), torch.randn(2, 4))})
    with pytest.raises(
        MergeError, match=r"0: its weight is not stored as a plain matrix, but as torch.uint8"
    ):
        merge(net, adapter)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Ternary(nn.Linear):
    def forward(self, x):
        size = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / size).round().clamp(-1, 1) * size, self.bias)


class Told(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) + 1.0


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_custom_forward_is_tested_before_merging(dtype):
    factors = LowRank(torch.randn(24, 2), torch.randn(2, 16), 0.2).to(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    for kind in (Scaled, Ternary):
        net = nn.Sequential(kind(24, 16)).to(dtype)
        with pytest.raises(MergeError, match=rf"0 \({kind.__name__}\) has a forward .* serve the adapter"):
            merge(net, Adapter({"0": factors}))
    with pytest.raises(MergeError, match=r"0 \(Pair\).* fails in a trial \(AttributeError: 'tuple'"):
        merge(nn.Sequential(Pair(24, 16)).to(dtype), Adapter({"0": factors}))
    net = nn.Sequential(Told(24, 16)).to(dtype)
    with torch.no_grad():
        with attach(net, Adapter({"0": factors})):
            adapted = net(x)
        merged = merge(net, Adapter({"0": factors}))
    assert merged.training
    assert relative(merged(x).double(), adapted.double()) < (FLOAT32 if dtype != torch.bfloat16 else 0.02)


def test_a_plain_module_is_not_run(monkeypatch):
    nets = [nn.Sequential(nn.Linear(6, 4)), nn.Sequential(toys.Conv1D(4, 6))]
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("it was run"))
    for net in nets:
        merge(net, Adapter({"0": LowRank(torch.randn(6, 2), torch.randn(2, 4))}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_head_is_untied_openly_and_stays_so_on_disk(kind, tmp_path, tied_llama, gpt2):
    model = tied_llama if kind == "llama" else gpt2
    adapter = toys.random_adapter(model, LoraConfig(rank=4, targets=["lm_head", "mlp"]))
    assert "lm_head" in adapter
    embedding = model.get_input_embeddings().weight
    kept = embedding.detach().clone()
    tokens = torch.randint(0, toys.VOCABULARY, (2, 7))
    with torch.no_grad():
        with attach(model, adapter):
            adapted = model(tokens).logits
        report: list[MergeReport] = []
        merged = merge(model, adapter, report=report)
        assert report[0].untied == (
            ("lm_head", "model.embed_tokens" if kind == "llama" else "transformer.wte"),
        )
        assert relative(merged(tokens).logits, adapted) < FLOAT32
        assert torch.equal(merged.get_input_embeddings().weight, kept)
        assert torch.equal(embedding, kept)
        assert model.get_output_embeddings().weight is embedding
        assert model.config.tie_word_embeddings
        assert not merged.config.tie_word_embeddings
        merged.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(tokens).logits, merged(tokens).logits)


def test_a_tied_head_is_untied_in_the_config_of_the_text_part_under_any_name():
    sizes = {"vocab_size": 120, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    decoder = transformers.GPT2Config(**sizes, add_cross_attention=True, is_decoder=True)
    parts = (transformers.ViTConfig(**kinds.PIXELS), decoder)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = transformers.VisionEncoderDecoderModel(config).eval()
    merged = merge(model, toys.random_adapter(model, LoraConfig(rank=2, targets=["lm_head"])))
    assert text_config(model).tie_word_embeddings
    assert not text_config(merged).tie_word_embeddings


def test_groups_leave_a_tied_head_alone(tied_llama):
    adapter = toys.random_adapter(tied_llama)
    merged = merge(tied_llama, adapter)
    assert "lm_head" not in adapter
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_two_layers_that_share_a_weight_are_untied():
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    net[1].weight = net[0].weight
    adapter = toys.random_adapter(net, LoraConfig(rank=2, targets=["0", "1"]))
    x = torch.randn(3, 6)
    with attach(net, adapter):
        adapted = net(x)
    report: list[MergeReport] = []
    merged = merge(net, adapter, report=report)
    assert relative(merged(x), adapted) < FLOAT32
    assert report[0].untied
    assert net[1].weight is net[0].weight


def test_a_shared_module_is_merged_once_by_any_of_its_names():
    net = nn.Sequential(nn.Linear(6, 6))
    net.append(net[0])
    adapter = Adapter({"1": LowRank(torch.randn(6, 2), torch.randn(2, 6))})
    x = torch.randn(3, 6)
    with attach(net, adapter):
        adapted = net(x)
    merged = merge(net, adapter)
    assert merged[0] is merged[1]
    assert relative(merged(x), adapted) < FLOAT32


def test_merging_a_base_gives_a_base():
    @dataclass(frozen=True)
    class Holder:
        model: nn.Module
        tokenizer: str
        name: str | None = None

    holder = Holder(toys.Mlp(), "tokenizer", "mlp")
    adapter = toys.random_adapter(holder)
    assert adapter.card.base_name == "mlp"
    merged = merge(holder, adapter)
    assert isinstance(merged, Holder)
    assert merged.tokenizer == "tokenizer"
    assert merged.model is not holder.model
    assert type(merged.model) is toys.Mlp


def test_sums_merge_as_one():
    net = toys.Mlp().double()
    a, b = (toys.random_adapter(net, seed=s).to(torch.float64) for s in (1, 2))
    together = merge(net, 0.5 * a + 2.0 * b)
    dense = copy.deepcopy(net)
    with torch.no_grad():
        for path in a:
            delta = 0.5 * a[path].dense() + 2.0 * b[path].dense()
            dense.get_submodule(path).weight += delta.mT
    for p, q in zip(together.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_an_adapter_of_another_base_is_refused():
    adapter = toys.random_adapter(toys.tiny_llama(seed=0)).with_card(None)
    first = toys.random_adapter(toys.tiny_llama(seed=0))
    with pytest.raises(BaseMismatchError, match="another base"):
        merge(toys.tiny_llama(seed=1), first)
    assert merge(toys.tiny_llama(seed=1), adapter) is not None
    assert merge(toys.tiny_llama(seed=1), adapter.with_card(Card())) is not None
