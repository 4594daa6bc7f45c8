"""The modules that run fused functions, and their restoration."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from brushstroke.adapter import LoraConfig
from brushstroke.layers import attach
from brushstroke.packed.fused_modules import Fused, fuse
from brushstroke.training import Training
from toys import tiny_gpt2, tiny_llama, tiny_olmo
from training_kit import examples, padded_loss, randomise

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def made(config: type, model: type, **more: object) -> nn.Module:
    torch.manual_seed(0)
    known = {key: value for key, value in SMALL.items() if key != "head_dim" or config is not PhiConfig}
    return model(config(**{**known, "initializer_range": 0.2, "pad_token_id": 0, **more})).eval()


FAMILIES = {  # model, and how many norms, blocks and attentions of two layers are ours
    "llama": (tiny_llama, (5, 2, 2)),
    "gpt2": (tiny_gpt2, (0, 2, 0)),
    "mistral-window": (lambda: made(MistralConfig, MistralForCausalLM, sliding_window=12), (5, 2, 2)),
    "qwen2": (lambda: made(Qwen2Config, Qwen2ForCausalLM), (5, 2, 2)),
    "qwen3": (lambda: made(Qwen3Config, Qwen3ForCausalLM), (9, 2, 2)),
    "gemma": (lambda: made(GemmaConfig, GemmaForCausalLM), (5, 2, 2)),
    "gemma3-window": (lambda: made(Gemma3TextConfig, Gemma3ForCausalLM, sliding_window=12), (13, 2, 2)),
    "phi": (lambda: made(PhiConfig, PhiForCausalLM), (0, 2, 0)),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int, int]]:
    make, counts = FAMILIES[request.param]
    return make(), counts


def test_the_gradients_are_those_of_the_model_itself(family) -> None:
    model, counts = family
    batch, twin = examples(), copy.deepcopy(model)
    with Training(model, LoraConfig(rank=3)) as run:
        randomise(run.parameters)
        assert (
            tuple(run.step.fusion.counts[kind] for kind in ("norms", "feed-forward blocks", "attentions"))
            == counts
        )
        assert run.packed
        result = run.forward_backward(batch)
        with attach(twin, run.adapter(), trainable=True) as plain:
            reference = padded_loss(twin, batch)
            reference.backward()
            assert result.loss == pytest.approx(reference.item(), rel=1e-5)
            for ours, theirs in zip(run.parameters, plain.parameters(), strict=True):
                assert (ours.grad / result.trained_tokens - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


def test_original_forward_is_restored(family) -> None:
    model, _ = family
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    tokens = torch.arange(12)[None] % 64
    before = model(tokens).logits
    with Training(model, LoraConfig(rank=3)) as run:
        run.forward_backward(examples())
        assert any(isinstance(module, Fused) for module in model.modules())
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(tokens).logits, before)


def test_similar_but_different_norm_keeps_its_forward() -> None:
    class CubeRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.abs().pow(3).mean(-1, keepdim=True) + self.eps).pow(1 / 3)

    model = nn.Sequential(CubeRMSNorm(), nn.Linear(8, 8)).requires_grad_(False).eval()
    fusion = fuse(model)
    assert not fusion.counts.total()
    assert type(model[0]) is CubeRMSNorm


def gradients_are_the_models_own(model: nn.Module) -> bool:
    """Whether a step on our functions, where there are any, gives the gradients of the plain model."""
    batch, twin = examples(), copy.deepcopy(model)
    with Training(model, LoraConfig(rank=3)) as run:
        randomise(run.parameters)
        trained = run.forward_backward(batch).trained_tokens
        with attach(twin, run.adapter(), trainable=True) as plain:
            padded_loss(twin, batch).backward()
            pairs = list(zip(run.parameters, plain.parameters(), strict=True))
            return all(torch.allclose(a.grad / trained, b.grad, rtol=1e-3, atol=1e-5) for a, b in pairs)


def test_norm_on_fewer_columns_uses_its_original_forward() -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    assert gradients_are_the_models_own(FalconMambaForCausalLM(FalconMambaConfig(**small)).eval())


def test_model_that_fails_with_fused_functions_trains_without_them() -> None:
    class Watching(nn.Module):
        """A parent that looks at the class of its child, as no probe of the child can tell."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(self.norm) is not LlamaRMSNorm:
                raise ValueError("an unknown norm")
            return self.norm(x)

    model = tiny_llama()
    model.model.norm = Watching(model.model.norm)
    with Training(model, LoraConfig(rank=3)) as run:
        described = run.step.fusion.describe()
        assert described == "none (the model fails with them: ValueError: an unknown norm)"
        assert run.packed
    assert type(model.model.norm.norm) is LlamaRMSNorm
    assert gradients_are_the_models_own(model)


@pytest.mark.parametrize("gain", [0.0, 1.0, 40.0, 200.0])
def test_closer_of_two_passing_formulas_is_used_in_bf16(gain: float) -> None:
    norm = GemmaRMSNorm(64).to(torch.bfloat16).requires_grad_(False).eval()
    norm.weight.fill_(gain)
    fusion = fuse(nn.Sequential(norm))
    assert fusion.counts["norms"] == 1
    assert norm._fusion.offset == 1.0  # 1 + w, which w alone comes near where w is large
    fusion.remove()


def test_soft_capped_attention_is_not_fused() -> None:
    model = made(Gemma2Config, Gemma2ForCausalLM)
    with Training(model, LoraConfig(rank=3)) as run:
        assert run.step.fusion.counts["attentions"] == 0
        assert not run.packed


@pytest.mark.parametrize("inside", ["up_proj", "act_fn"])
def test_module_with_hook_is_not_fused(inside) -> None:
    model = tiny_llama()
    with Training(model, LoraConfig(rank=3)) as run:
        seen = []
        handle = (
            model.model.layers[0]
            .mlp.get_submodule(inside)
            .register_forward_hook(lambda *args: seen.append(1))
        )
        run.forward_backward(examples())
        handle.remove()
        assert seen


def test_low_rank_dropout_uses_the_original_forward() -> None:
    model = tiny_llama()
    with Training(model, LoraConfig(rank=3, dropout=0.5)) as run:
        randomise(run.parameters)
        first, second = (run.forward_backward(examples()).loss for _ in range(2))
        assert first != second


@pytest.mark.parametrize("kind", ["norm", "block"])
def test_unprobed_call_uses_the_original_forward(kind: str) -> None:
    def gated(base: type[nn.Module]) -> type[nn.Module]:
        return type(base)(
            base.__name__, (base,), {"forward": lambda self, x, gate=1.0: base.forward(self, x) * gate}
        )

    module = gated(LlamaRMSNorm)(32) if kind == "norm" else gated(LlamaMLP)(tiny_llama().config)
    module.requires_grad_(False).eval()
    x, gate = torch.randn(2, 5, 32), torch.rand(2, 5, 32)
    expected = module(x, gate)
    fusion = fuse(nn.Sequential(module))
    assert fusion.counts.total() == 1
    assert torch.equal(module(x, gate), expected)
    assert torch.equal(module(x, gate=gate), expected)
    fusion.remove()


def test_a_model_with_gated_norms_trains() -> None:
    model = made(
        Mamba2Config,
        Mamba2ForCausalLM,
        num_heads=8,
        state_size=8,
        n_groups=1,
        chunk_size=16,
        eos_token_id=None,
    )
    twin, batch = copy.deepcopy(model), examples(3)
    with Training(model, LoraConfig(rank=3, targets=("in_proj",))) as run:
        randomise(run.parameters)
        result = run.forward_backward(batch)
        with attach(twin, run.adapter(), trainable=True) as plain:
            padded_loss(twin, batch).backward()
            for ours, theirs in zip(run.parameters, plain.parameters(), strict=True):
                assert (ours.grad / result.trained_tokens - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


class ClampedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class TupleMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class ClampedRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-20, 20))


class OutsideRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class OtherEpsRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, 10 * self.variance_epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ClampedMLP, TupleMLP, ClampedRMSNorm, OutsideRMSNorm, OtherEpsRMSNorm])
def test_probe_detects_differences_in_input_size_and_output_shape(kind, dtype) -> None:
    module = kind(32 if issubclass(kind, LlamaRMSNorm) else tiny_llama().config)
    module = module.to(dtype).requires_grad_(False).eval()
    assert not fuse(nn.Sequential(module)).counts.total()


def test_attention_that_clips_rare_values_is_not_fused() -> None:
    model = tiny_olmo(clip_qkv=8.0).requires_grad_(False)
    assert fuse(model).counts == {"feed-forward blocks": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_modules_are_fused_in_bf16(name: str) -> None:
    make, counts = FAMILIES[name]
    with Training(make().to(torch.bfloat16), LoraConfig(rank=3)) as run:
        found = run.step.fusion.counts
        assert tuple(found[kind] for kind in ("norms", "feed-forward blocks", "attentions")) == counts
        assert run.packed


def test_rotary_angles_of_another_dtype_use_the_original_attention() -> None:
    batch = examples()
    with Training(tiny_olmo(dtype=torch.bfloat16), LoraConfig(rank=3)) as run:
        assert run.packed, run.step.forward_reason
        loss = run.forward_backward(batch).loss
    assert loss == pytest.approx(padded_loss(tiny_olmo(dtype=torch.bfloat16), batch).item(), rel=1e-2)


@torch.no_grad()
def test_an_unknown_block_is_rejected_by_its_output_without_gradients() -> None:
    """Its parameters want gradients, so that under gradients it would run its own code."""
    model = tiny_llama()
    model.model.layers[0].mlp.forward_alpha = 2.0

    class Scaled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward_alpha * super().forward(x)

    model.model.layers[0].mlp.__class__ = Scaled
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    fusion = fuse(model)
    assert fusion.counts["feed-forward blocks"] == 1
    assert not isinstance(model.model.layers[0].mlp, Fused)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    fusion.remove()
