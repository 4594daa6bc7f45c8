"""Adapted embeddings against PEFT's: logits, gradients, files both ways; merging with tied weights."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import brushstroke as bs
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.layers import attach, bank
from brushstroke.layers.embedding import EmbeddingLowRank
from brushstroke.lowrank import LowRank
from brushstroke.merging import merge

GRADIENT = 1e-4  # each tensor's difference to its own norm, float32
LOGITS = 1e-5  # relative

peft = pytest.importorskip("peft")


def embedding_of(model: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if isinstance(module, nn.Embedding))


def config(model: nn.Module, rank: int = 4) -> LoraConfig:
    return LoraConfig(rank=rank, alpha=8, targets=["attention", embedding_of(model)])


def random_adapter(model: nn.Module, rank: int = 4, seed: int = 0) -> Adapter:
    """Random U and V at the attention and the embedding, with the card of a fresh adapter."""
    with attach(model, config(model, rank)) as attachment:
        fresh = attachment.adapter()
    torch.manual_seed(seed)
    updates = {
        path: type(update)(torch.randn(update.d, rank) * 0.3, torch.randn(rank, update.h) * 0.3, update.scale)
        for path, update in fresh.items()
        if isinstance(update, LowRank)
    }
    return Adapter(updates, fresh.card)


def peft_model(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(request.param)


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).logits


def tokens_for(model: nn.Module) -> torch.Tensor:
    return torch.randint(0, model.get_input_embeddings().num_embeddings, (2, 7))  # type: ignore[operator]


def test_groups_leave_embeddings_out_silently(model):
    with attach(model, LoraConfig(rank=1)) as attachment:
        assert embedding_of(model) not in attachment.sites
        assert embedding_of(model) not in attachment.plan.skipped  # type: ignore[union-attr]


def test_a_fresh_adapter_changes_nothing_and_detaching_restores_the_base(model):
    tokens = tokens_for(model)
    expected, before = logits(model, tokens), copy.deepcopy(model.state_dict())
    with attach(model, config(model), trainable=True) as attachment:
        assert embedding_of(model) in attachment.sites
        assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(logits(model, tokens), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_files_logits_and_gradients_are_those_of_peft(model, tmp_path):
    adapter, tokens = random_adapter(model), tokens_for(model)
    bs.save(adapter, tmp_path / "ours")
    theirs = peft_model(model, tmp_path / "ours")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    expected = logits(theirs, tokens)
    expected.square().mean().backward()
    with attach(model, adapter, trainable=True) as attachment:
        got = logits(model, tokens)
        got.square().mean().backward()
        assert (got - expected).norm() < LOGITS * expected.norm()
        own = dict(attachment.named_parameters())
        site = embedding_of(model)
        layer = theirs.base_model.model.get_submodule(site)  # type: ignore[union-attr]
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        for name, reference in (("lora_U_rows", A.grad), ("lora_V", B.grad.mT)):
            gradient = own[f"{site}.{name}"].grad
            assert gradient is not None
            assert (gradient - reference).norm() < GRADIENT * reference.norm()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)  # type: ignore[operator]
    again = bs.load(tmp_path / "theirs")
    assert type(again[site]) is EmbeddingLowRank
    for path, update in adapter.items():
        assert torch.equal(again[path].dense(), update.dense())


@pytest.mark.parametrize("fixture", ["llama", "tied_llama", "gpt2"])
def test_merged_models_give_the_logits_of_the_adapted_one(request, fixture):
    model = request.getfixturevalue(fixture)
    adapter, tokens = random_adapter(model), tokens_for(model)
    with attach(model, adapter):
        expected = logits(model, tokens)
    report: list[bs.MergeReport] = []
    merged = merge(model, adapter, report=report)
    assert (logits(merged, tokens) - expected).norm() < LOGITS * expected.norm()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert bool(report[0].untied) is tied
    assert merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight


def test_a_merge_from_folder_to_folder_unties_the_output_layer(tied_llama, tmp_path):
    tied_llama.save_pretrained(tmp_path / "base")
    adapter, tokens = random_adapter(tied_llama), tokens_for(tied_llama)
    with attach(tied_llama, adapter):
        expected = logits(tied_llama, tokens)
    bs.merge_folder(str(tmp_path / "base"), adapter, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, tokens) - expected).norm() < LOGITS * expected.norm()


def test_each_row_of_a_bank_gets_its_own_embedding(model):
    first, second, tokens = random_adapter(model, 4, 1), random_adapter(model, 3, 2), tokens_for(model)
    rows = torch.cat([tokens[:1]] * 3)
    alone = []
    for adapter in (first, second, None):
        if adapter is None:
            alone.append(logits(model, tokens[:1]))
            continue
        with attach(model, adapter):
            alone.append(logits(model, tokens[:1]))
    with bank(model, {"first": first, "second": second}) as adapters:
        with adapters.rows(["first", "second", None]):
            got = logits(model, rows)
        with adapters.rows("second"):
            assert torch.allclose(logits(model, tokens[:1]), alone[1], rtol=LOGITS, atol=LOGITS)
    expected = torch.cat(alone)
    assert (got - expected).norm() < LOGITS * expected.norm()


def tiny_gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    small = Gemma3TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(small).eval()


def test_a_scaled_embedding_scales_its_update_too(tmp_path):
    model = tiny_gemma()
    adapter, tokens = random_adapter(model), tokens_for(model)
    bs.save(adapter, tmp_path / "gemma")
    expected = logits(peft_model(model, tmp_path / "gemma"), tokens)
    with attach(model, adapter):
        got = logits(model, tokens)
    assert (got - expected).norm() < LOGITS * expected.norm()
    merged = logits(merge(model, adapter), tokens)
    assert (merged - expected).norm() < LOGITS * expected.norm()


def test_a_scaled_embedding_is_merged_from_folder_to_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_gemma()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter, tokens = random_adapter(model), tokens_for(model)
    with attach(model, adapter):
        expected = logits(model, tokens)
    report = bs.merge_folder(str(tmp_path / "base"), adapter, tmp_path / "merged", verify=True)
    assert report.streamed
    assert report.logit_drift is not None
    assert report.logit_drift < LOGITS
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, tokens) - expected).norm() < LOGITS * expected.norm()


def test_an_embedding_that_renormalises_its_rows_is_refused_with_the_reason():
    net = nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.raises(bs.errors.TargetError, match="0 cannot be adapted: its max_norm rewrites its weight"):
        attach(net, LoraConfig(rank=1, targets=["0"]))
    adapter = Adapter({"0": EmbeddingLowRank(torch.ones(4, 1), torch.ones(1, 4))})
    for use in (attach, merge, lambda net, adapter: bank(net, {"a": adapter})):
        with pytest.raises(bs.errors.ShapeError, match="0: its max_norm rewrites its weight"):
            use(net, adapter)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_gradients_follow_the_options_of_the_embedding(options):
    net = nn.Sequential(nn.Embedding(9, 5, **options), nn.Linear(5, 3))
    tokens = torch.tensor([[0, 1, 2, 0], [3, 4, 5, 5]])
    U, V = torch.randn(9, 2), torch.randn(2, 5)
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.lora_embedding_A["default"].data.copy_(U.mT)
    layer.lora_embedding_B["default"].data.copy_(V.mT)
    theirs(tokens).square().sum().backward()
    ours = Adapter({"0": EmbeddingLowRank(U, V)})
    with attach(net, ours, trainable=True) as attachment:
        net(tokens).square().sum().backward()
        gradients = {tuple(p.shape): p.grad for p in attachment.parameters()}
    for expected in (layer.lora_embedding_A["default"].grad, layer.lora_embedding_B["default"].grad):
        found = gradients.get(tuple(expected.shape), gradients.get(tuple(expected.mT.shape)))
        found = found if found.shape == expected.shape else found.mT
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
