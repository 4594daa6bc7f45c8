"""The operations of `Training` on models that can and cannot run packed."""

import collections
import copy
import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from brushstroke.adapter import LoraConfig
from brushstroke.base import Base, context_length, learnt_positions
from brushstroke.data import Example
from brushstroke.errors import ConfigError, DataError, NonFiniteError, TargetError, TrainingError
from brushstroke.layers import attach
from brushstroke.layers.adapted import Adapted
from brushstroke.merging import merge
from brushstroke.packed import select as choose
from brushstroke.packed.attention import NAME
from brushstroke.training import PlanWarning, TrainConfig, Training, train
from toys import random_adapter, snapshot, tiny_gpt2, tiny_llama
from training_kit import examples, padded_loss, randomise


class Bare(nn.Module):
    """A language model of nobody's, with an attention of its own and the barest of signatures."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.out = nn.Embedding(64, 16), nn.Linear(16, 48), nn.Linear(16, 64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = self.q(x).chunk(3, dim=-1)
        return self.out(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Swallowing(Bare):
    """The same, ignoring every keyword that it is given: its attention leaks over a packed row."""

    def forward(self, input_ids: torch.Tensor, **extra: object) -> torch.Tensor:
        return super().forward(input_ids)


class Dropping(nn.Module):
    """A Llama whose wrapper drops keywords that it does not know: the plan never reaches the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.config = self.inner.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **extra: object
    ) -> object:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def gradients(run: Training) -> list[torch.Tensor]:
    return [p.grad.clone() for p in run.parameters if p.grad is not None]


@pytest.mark.parametrize("make", [Bare, Swallowing, Dropping])
def test_model_that_ignores_the_layout_uses_padded_batches(make: type[nn.Module]) -> None:
    model = make()
    batch = examples()
    targets = "q" if isinstance(model, Bare) else "all-linear"
    for micro_tokens in (1024, 60):
        with Training(model, LoraConfig(rank=2, targets=targets), micro_tokens=micro_tokens) as run:
            assert not run.packed
            assert "could not verify that packing is exact" in run.step.forward_reason
            randomise(run.parameters)
            run.forward_backward(batch)
            ours = gradients(run)
            run.zero_grad()
            total = 0.0
            for example in batch:  # each alone: no padding, no neighbours
                logits = model(torch.tensor([example.tokens]))
                logits = logits if isinstance(logits, torch.Tensor) else logits.logits
                loss = F.cross_entropy(logits[0, :-1], torch.tensor(example.tokens[1:]), reduction="none")
                total = total + (loss * torch.tensor(example.weights[1:])).sum()
            total.backward()
            for mine, theirs in zip(ours, gradients(run), strict=True):
                assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


class Shifting(nn.Module):
    """A Llama in which each token sees a thousandth of its neighbour: packing leaks a little."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.config = self.inner.config
        self.inner.model.layers[0].mlp.register_forward_pre_hook(
            lambda _, args: (args[0] + 0.001 * F.pad(args[0], (0, 0, 1, 0))[:, :-1],)
        )

    def forward(self, input_ids: torch.Tensor, **extra: object) -> object:
        return self.inner(input_ids=input_ids, **extra)


class Looking(Bare):
    """Every token sees all others, also those behind it."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        q, k, v = self.q(x).chunk(3, dim=-1)
        mask = None if attention_mask is None else attention_mask.bool()[:, None]
        return self.out(x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_even_a_small_leak_between_packed_examples_is_detected(dtype: torch.dtype) -> None:
    with Training(Shifting().to(dtype), LoraConfig(rank=2)) as run:
        assert not run.packed
        assert "depends on another one's tokens" in run.step.forward_reason


@pytest.mark.parametrize("size", [1.0, 0.0])  # of its last matrix: blocks that are put in later begin at 0
def test_short_convolution_is_not_packed_for_any_weight_size(size: float) -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"layer_types": ["conv", "full_attention"], "pad_token_id": 0}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, **layers)).double().eval()  # weights of size 0.02
    with torch.no_grad():
        model.model.layers[0].conv.out_proj.weight.mul_(size)
    twin = copy.deepcopy(model)
    with Training(model, LoraConfig(rank=2), seed=0) as run:
        assert not run.packed
        assert not any(module.lora_V.any() for module in run.attachment.modules.values())
        randomise(run.parameters)
        run.forward_backward(examples())
        ours = [gradient / sum(example.trained for example in examples()) for gradient in gradients(run)]
    with attach(twin, LoraConfig(rank=2), trainable=True, seed=0) as attached:
        randomise(attached.parameters())
        padded_loss(twin, examples()).backward()
        for mine, parameter in zip(ours, attached.parameters(), strict=True):
            assert (mine - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


class Grown(LlamaForCausalLM):
    """A Llama with a block of its own between decoder and head, which begins at 0."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.grown = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.zeros_(self.grown.weight)

    def forward(self, input_ids: torch.Tensor, **extra: object) -> CausalLMOutput:
        x = self.model(input_ids=input_ids, **extra)[0]
        return CausalLMOutput(logits=self.lm_head(x + self.grown(x.tanh())))


def test_zero_initialised_block_after_the_decoder_is_run() -> None:
    model = Grown(tiny_llama().config).eval()
    with Training(model, LoraConfig(rank=2, targets="grown")) as run:
        randomise(run.parameters)
        run.forward_backward(examples())
        ours = [gradient / sum(example.trained for example in examples()) for gradient in gradients(run)]
        run.zero_grad()
        padded_loss(model, examples()).backward()
        for mine, theirs in zip(ours, gradients(run), strict=True):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


@dataclasses.dataclass
class Wrapped:
    """An output class of nobody's."""

    logits: torch.Tensor


Tupled = collections.namedtuple("Tupled", ["loss", "logits"])


@pytest.mark.parametrize(
    "wrap", [Wrapped, lambda y: {"logits": y}, lambda y: (y,), lambda y: Tupled(None, y)]
)
def test_logits_in_any_output_type_are_read(wrap: Callable[[torch.Tensor], object]) -> None:
    class Own(Bare):
        def forward(self, input_ids: torch.Tensor) -> object:  # type: ignore[override]
            return wrap(super().forward(input_ids))

    with Training(Own(), LoraConfig(rank=2, targets="q")) as run:
        assert math.isfinite(run.forward_backward(examples()).loss)


def test_non_finite_logits_are_not_packed() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(float("inf"))
    with Training(model, LoraConfig(rank=2)) as run:
        assert not run.packed


@pytest.mark.parametrize("context", [3, 8, 16, 47])
def test_short_context_can_be_packed(context: int) -> None:
    model = tiny_gpt2(context=context)
    short = [Example((3, 4, 5), (0.0, 1.0, 1.0))]
    with Training(model, LoraConfig(rank=2)) as run:
        assert math.isfinite(run.forward_backward(short).loss)


def test_mixed_dtype_model_error_suggests_float32() -> None:
    class InFloat32(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.float())

    model = tiny_llama()
    model.lm_head = InFloat32(model.lm_head)
    with Training(model, LoraConfig(rank=2, targets="q_proj")) as run:
        assert run.forward_backward(examples()).loss > 0
    with pytest.raises(ConfigError, match=r"load it with --dtype float32") as raised:
        Training(model.bfloat16(), LoraConfig(rank=2, targets="q_proj"))
    assert "loop of your own" not in str(raised.value)


def test_a_model_without_a_language_head_is_refused() -> None:
    config = tiny_llama().config
    for made in (LlamaModel(config), LlamaForSequenceClassification(config)):
        with pytest.raises(ConfigError, match=rf"{type(made).__name__}, and this needs a causal language"):
            Training(made, LoraConfig(rank=2))

    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.q = nn.Embedding(64, 8), nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": self.q(self.words(input_ids))}

    with pytest.raises(ConfigError, match=r"returns no logits for each token \(it returns hidden\)"):
        Training(Headless(), LoraConfig(rank=2, targets="q"))
    with pytest.raises(ConfigError, match="cannot be run on tokens"):
        Training(nn.Sequential(nn.Linear(8, 8)), LoraConfig(rank=2, targets="0"))
    with pytest.raises(ConfigError, match=r"expected a Base or an nn\.Module; got NoneType"):
        Training(None)


def test_non_causal_model_keeps_tokens_after_the_last_target() -> None:
    torch.manual_seed(0)
    model = Looking()
    assert any(example.reach < len(example) - 1 for example in examples())
    with Training(model, LoraConfig(rank=2, targets="q"), micro_tokens=60) as run:
        assert not run.packed
        assert "later tokens change a prediction" in run.step.forward_reason
        randomise(run.parameters)
        run.forward_backward(examples())
        ours = gradients(run)
        run.zero_grad()
        for example in examples():
            logits = model(torch.tensor([example.tokens]))
            loss = F.cross_entropy(logits[0, :-1], torch.tensor(example.tokens[1:]), reduction="none")
            (loss * torch.tensor(example.weights[1:])).sum().backward()
        for mine, theirs in zip(ours, gradients(run), strict=True):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_two_calls_and_one_step_equal_one_call() -> None:
    batch, model = examples(), tiny_llama()
    after = []
    for parts in ([batch], [batch[:2], batch[2:]]):
        with Training(model, LoraConfig(rank=4), learning_rate=1e-2) as run:
            randomise(run.parameters)
            for part in parts:
                run.forward_backward(part)
            run.optim_step()
            after.append([p.detach().clone() for p in run.parameters])
    for whole, split in zip(*after, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_tokens", [1024, 50])
def test_cross_entropy_as_the_users_loss_equals_the_built_in(micro_tokens: int) -> None:
    found = []
    for loss in (None, lambda logits, targets, weights: F.cross_entropy(logits, targets)):
        with Training(tiny_llama(), LoraConfig(rank=4), micro_tokens=micro_tokens) as run:
            randomise(run.parameters)
            result = run.forward_backward(examples(), loss)
            found.append((result.loss, gradients(run)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_base_is_restored_bit_for_bit(make: object) -> None:
    model = make().train()  # type: ignore[operator]
    before = snapshot(model)
    modes = [module.training for module in model.modules()]
    name = model.config._attn_implementation
    with Training(
        model, LoraConfig(rank=4, dropout=0.1), learning_rate=1e-2, gradient_checkpointing=True
    ) as run:
        for _ in range(3):
            run.forward_backward(examples())
            run.optim_step()
            assert model.config._attn_implementation == name != NAME
    assert snapshot(model) == before
    assert [module.training for module in model.modules()] == modes


def test_left_padded_generation_after_training_equals_the_merged_model() -> None:
    model = tiny_llama()
    with Training(model, LoraConfig(rank=4), learning_rate=3e-2) as run:
        for step in range(5):
            run.forward_backward(examples(seed=step))
            run.optim_step()
        adapter = run.adapter()
        tokens = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4]])
        mask = (tokens != 0).long()
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        while_training = model.generate(tokens, **options)
    fresh = merge(tiny_llama(), adapter).generate(tokens, **options)
    assert torch.equal(while_training, fresh)
    alone = merge(tiny_llama(), adapter).generate(tokens[:1, 3:], max_new_tokens=8, do_sample=False)
    assert torch.equal(fresh[0, 3:], alone[0])


def test_the_loss_of_an_evaluation_is_that_of_padded_batches() -> None:
    model = tiny_llama()
    with Training(model, LoraConfig(rank=4)) as run:
        randomise(run.parameters)
        expected = padded_loss(model, examples()).item()
        assert run.loss(examples()).loss == pytest.approx(expected, rel=1e-5)


def test_dropout_switches_sharing_off_and_is_drawn_from_the_step() -> None:
    losses = []
    for _ in range(2):
        with Training(tiny_llama(), LoraConfig(rank=4, dropout=0.5), seed=3) as run:
            assert not run.share_prefixes
            randomise(run.parameters, size=0.5)
            torch.rand(7)  # the global generator is somebody else's
            losses.append(run.forward_backward(examples()).loss)
            assert run.loss(examples()).loss != losses[-1]
    assert losses[0] == losses[1]


def test_a_window_of_attention_is_kept() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=6, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    for share in (True, False):
        with Training(model, LoraConfig(rank=4), share_prefixes=share) as run:
            assert run.packed
            randomise(run.parameters)
            result = run.forward_backward(examples())
            assert result.loss == pytest.approx(padded_loss(model, examples()).item(), rel=1e-5)


def test_a_model_with_soft_capped_logits_uses_its_own_head() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, final_logit_softcapping=2.0,
        attn_logit_softcapping=None, initializer_range=0.3,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with Training(model, LoraConfig(rank=4)) as run:
        randomise(run.parameters)
        result = run.forward_backward(examples())
        assert result.loss == pytest.approx(padded_loss(model, examples()).item(), rel=1e-4)


def test_adapted_head_is_trained() -> None:
    model = tiny_llama()
    with Training(model, LoraConfig(rank=4, targets=["lm_head", "q_proj"])) as run:
        randomise(run.parameters)
        reference = padded_loss(model, examples())
        expected = torch.autograd.grad(reference, run.parameters)
        result = run.forward_backward(examples())
        for parameter, gradient in zip(run.parameters, expected, strict=True):
            ours = parameter.grad / result.trained_tokens  # type: ignore[operator]
            assert (ours - gradient).norm() <= 1e-4 * gradient.norm()


def test_non_finite_loss_stops_and_keeps_the_factors() -> None:
    with Training(tiny_llama(), LoraConfig(rank=4)) as run:
        before = [p.detach().clone() for p in run.parameters]
        with pytest.raises(NonFiniteError, match="step 1; lower the learning rate"):
            run.forward_backward(examples(), lambda logits, targets, weights: logits.sum() * math.nan)
        with pytest.raises(TrainingError, match="no gradient"):
            run.optim_step()
        assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_invalid_arguments_do_not_change_the_model() -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(TargetError):
        Training(model, LoraConfig(targets="q_porj"))
    with pytest.raises(ConfigError, match="micro_tokens"):
        Training(model, LoraConfig(), micro_tokens=0)
    assert snapshot(model) == before
    run = Training(model, LoraConfig())
    run.close()
    with pytest.raises(TrainingError, match="closed"):
        run.forward_backward(examples())
    assert snapshot(model) == before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loaded_session_continues_to_the_same_bits(tmp_path: object, dropout: float) -> None:
    config = LoraConfig(rank=4, dropout=dropout)
    batches = [examples(6, seed=step) for step in range(6)]

    def steps(run: Training, part: list[object]) -> None:
        for batch in part:
            run.forward_backward(batch)
            run.optim_step()

    with Training(tiny_llama(), config, learning_rate=1e-2) as run:
        steps(run, batches)
        whole = [p.detach().clone() for p in run.parameters]
    with Training(tiny_llama(), config, learning_rate=1e-2) as run:
        steps(run, batches[:2])
        run.save(tmp_path / "state")  # type: ignore[operator]
    with Training(tiny_llama(), config, learning_rate=1e-2).load(tmp_path / "state") as run:  # type: ignore[operator]
        assert run.steps == 2
        steps(run, batches[2:])
        assert all(torch.equal(a, b) for a, b in zip(whole, run.parameters, strict=True))


def test_settings_of_a_session_can_be_overridden_one_by_one() -> None:
    config = TrainConfig(learning_rate=1e-2, clip=0.5, micro_tokens=64, seed=3, epochs=5)
    with Training(tiny_llama(), LoraConfig(rank=4), config, clip=2.0) as run:
        assert (run.learning_rate, run.micro_tokens, run.config.clip, run.config.seed) == (1e-2, 64, 2.0, 3)
    with pytest.raises(TypeError, match="epochs"):  # a setting of the loop, which a session has none of
        Training(tiny_llama(), LoraConfig(rank=4), epochs=5)


def test_a_bf16_base_has_fp32_factors() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    with Training(Base(model), LoraConfig(rank=4)) as run:
        assert {p.dtype for p in run.parameters} == {torch.float32}
        randomise(run.parameters)
        result = run.forward_backward(examples())
        assert result.loss == pytest.approx(padded_loss(model, examples()).item(), rel=2e-2)
        run.optim_step()


def test_continuing_with_dropout_stays_packed() -> None:
    model = tiny_llama()
    adapter = random_adapter(model)
    with Training(model, adapter, dropout=0.3) as run:
        assert run.packed
        assert run.has_dropout


def test_failing_custom_loss_leaves_no_gradients() -> None:
    calls = []

    def failing(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("mine")
        return F.cross_entropy(logits, targets)

    with Training(tiny_llama(), LoraConfig(rank=4), micro_tokens=40) as run:
        with pytest.raises(RuntimeError, match="mine"):
            run.forward_backward(examples(), failing)
        assert all(p.grad is None for p in run.parameters)


def test_window_defined_only_by_masks_is_not_packed() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2,
        use_sliding_window=True, sliding_window=100, max_window_layers=2, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    with Training(model, LoraConfig(rank=4, targets=("attention",))) as run:
        assert not run.packed
        assert "its window of 100 tokens is applied only in its masks" in run.step.forward_reason


@pytest.mark.parametrize(
    "values",
    [{"clip": -1.0}, {"learning_rate": -1.0}, {"seed": 2**64}, {"clip": None}, {"memory": "x"}],
)
def test_invalid_values_are_refused_before_attaching(values) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=next(iter(values))):
        Training(model, LoraConfig(rank=4), **values)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_cross_entropy_as_the_users_loss_equals_the_built_in_in_bf16() -> None:
    with Training(tiny_llama(dtype=torch.bfloat16), LoraConfig(rank=4)) as run:
        randomise(run.parameters)
        built_in = run.forward_backward(examples()).loss
        expected = gradients(run)
        run.zero_grad()
        own = run.forward_backward(
            examples(), lambda logits, targets, _: F.cross_entropy(logits, targets)
        ).loss
        assert own == pytest.approx(built_in, rel=1e-5)
        for mine, theirs in zip(gradients(run), expected, strict=True):
            assert (mine - theirs).norm() <= 2e-2 * theirs.norm()  # each is 1e-2 from the exact one


@pytest.mark.parametrize(
    "own",
    [
        lambda logits, targets, weights: 1.0,
        lambda logits, targets, weights: torch.tensor(1.0),
        lambda logits, targets, weights: logits.sum(1),
    ],
)
def test_custom_loss_without_scalar_result_is_refused(own) -> None:
    with (
        Training(tiny_llama(), LoraConfig(rank=4)) as run,
        pytest.raises(ConfigError, match="loss= must return"),
    ):
        run.forward_backward(examples(), own)


def test_pending_gradients_block_save_and_load(tmp_path: Path) -> None:
    with Training(tiny_llama(), LoraConfig(rank=4)) as run:
        run.save(tmp_path / "state")
        run.forward_backward(examples())
        with pytest.raises(TrainingError, match="gradients are pending"):
            run.save(tmp_path / "other")
        run.load(tmp_path / "state")
        with pytest.raises(TrainingError, match="no gradient"):
            run.optim_step()


def test_closing_restores_a_model_whose_adapter_was_detached_before() -> None:
    model = tiny_llama().train()
    classes = [type(module) for module in model.modules()]
    with Training(model, LoraConfig(rank=2)) as run:
        run.attachment.detach()
    assert [type(module) for module in model.modules()] == classes
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_does_not_depend_on_the_callers_mode(mode: Callable[[], AbstractContextManager]) -> None:
    with Training(tiny_llama(), LoraConfig(rank=2)) as run:
        run.forward_backward(examples())
        expected = run.optim_step()
    model = tiny_llama()
    with mode(), Training(model, LoraConfig(rank=2)) as run:
        run.loss(examples())
        run.forward_backward(examples())
        assert run.optim_step() == expected
    with Training(tiny_llama(), LoraConfig(rank=2)) as run:
        with mode():
            run.loss(examples())
        run.forward_backward(examples())
        assert run.optim_step() == expected


def test_examples_longer_than_the_context_are_named() -> None:
    context = tiny_gpt2().config.max_position_embeddings
    long = Example((5,) * (context + 2), (0.0,) * (context + 1) + (1.0,), row=7)
    with Training(tiny_gpt2(), LoraConfig(rank=2)) as run, pytest.raises(DataError, match="row 7 needs"):
        run.forward_backward([long])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_limit_beyond_the_context_is_refused(make: Callable[[], nn.Module]) -> None:
    before = snapshot(model := make())
    with pytest.raises(ConfigError, match=r"\(--max-length\) is 129, and .* context has 128 tokens"):
        Training(model, LoraConfig(rank=2), max_length=129)
    assert snapshot(model).keys() == before.keys()
    Training(model, LoraConfig(rank=2), max_length=128).close()


def test_position_tables_are_found_by_their_length() -> None:
    sizes = {
        "vocab_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 66,
    }
    roberta = RobertaConfig(**sizes, hidden_size=16, intermediate_size=16, is_decoder=True, pad_token_id=1)
    gptj = GPTJConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=16, n_positions=66, rotary_dim=4)
    opt = OPTConfig(**sizes, hidden_size=16, ffn_dim=16, word_embed_proj_dim=16)
    for model, most in (
        (RobertaForCausalLM(roberta), 64),
        (GPTJForCausalLM(gptj), 66),
        (OPTForCausalLM(opt), 66),
        (tiny_llama(), None),
    ):
        assert learnt_positions(model) == most
        assert context_length(model) == (most or 128)
        if most:
            with torch.no_grad():
                model(input_ids=torch.full((1, most), 5))
                with pytest.raises((IndexError, RuntimeError)):
                    model(input_ids=torch.full((1, most + 3), 5))


def test_a_pass_of_the_caller_in_inference_mode_changes_nothing() -> None:
    found = []
    for used in (False, True):
        with Training(tiny_llama(), LoraConfig(rank=2)) as run:
            randomise(run.parameters)
            if used:
                with torch.inference_mode():
                    run.model(input_ids=torch.full((1, 500), 5))
            found.append(run.forward_backward(examples()).loss)
            run.optim_step()
    assert found[0] == found[1]


def test_gradient_checkpointing_keeps_base_dropout_off() -> None:
    """OPT's layers drop by their own training flag, which is the flag that checkpointing asks for."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.3,
    )
    model, found = OPTForCausalLM(config).eval(), []
    for recompute in (False, True):
        with Training(model, LoraConfig(rank=2), gradient_checkpointing=recompute) as run:
            randomise(run.parameters)
            loss = run.forward_backward(examples()).loss
            assert loss == pytest.approx(run.loss(examples()).loss, rel=1e-6)
            found.append([parameter.grad for parameter in run.parameters])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_model_that_does_not_predict_the_next_token_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration, and this needs a causal language"):
        Training(T5ForConditionalGeneration(config), LoraConfig(rank=2))


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = tiny_llama()
    with pytest.raises(ConfigError, match="inference_mode"):
        Training(model, LoraConfig(rank=2))


def test_adapter_instead_of_config_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(Exception, match=r"pass it as start=|type-check"):
        train(Base(model), examples(), random_adapter(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["cross-entropy", lambda logits, targets: logits.sum()])
def test_a_loss_that_cannot_be_called_is_refused(loss: object) -> None:
    with (
        Training(tiny_llama(), LoraConfig(rank=2)) as run,
        pytest.raises(Exception, match=r"loss must be a function of|type-check"),
    ):
        run.forward_backward(examples(), loss)  # type: ignore[arg-type]


def test_custom_loss_is_skipped_for_batches_without_targets() -> None:
    batch = [*examples(), Example((1, 2, 3, 4, 5), (0.0,) * 5)]

    def own(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets)

    with Training(tiny_llama(), LoraConfig(rank=4), micro_tokens=5) as run:
        randomise(run.parameters)
        expected = run.forward_backward(batch).loss
    with Training(tiny_llama(), LoraConfig(rank=4), micro_tokens=5) as run:
        randomise(run.parameters)
        assert run.forward_backward(batch, own).loss == pytest.approx(expected, rel=1e-5)


def test_attention_in_chunks_is_not_packed() -> None:
    model = tiny_llama()
    model.config.attention_chunk_size = 16
    with Training(model, LoraConfig(rank=4)) as run:
        assert not run.packed
        assert "chunks of 16 tokens" in run.step.forward_reason


@pytest.mark.parametrize("form", [lambda empty: empty, lambda empty: [*examples(2), empty]])
def test_an_example_without_tokens_is_refused_in_one_line(form) -> None:
    with Training(tiny_llama(), LoraConfig(rank=2)) as run:
        for verb in (run.forward_backward, run.loss):
            with pytest.raises(DataError, match="row 3 has no tokens"):
                verb(form(Example(tokens=(), weights=(), row=3)))
        with pytest.raises(DataError, match="an example has no tokens"):
            run.forward_backward(Example(tokens=(), weights=()))


def test_deep_half_precision_model_is_packed_despite_rounding() -> None:
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # each layer enlarges what comes in
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with Training(model, LoraConfig(rank=2)) as run:
        assert run.packed, run.step.forward_reason
        difference = float(run.step.forward_reason.rsplit(" ", 1)[1])
        assert difference > choose.TOLERANCE[torch.bfloat16]


def test_compiling_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match="torch_compile makes kernels for a GPU, but the model is on cpu"):
        Training(tiny_llama(), LoraConfig(rank=2), torch_compile=True)


class Around(nn.Module):
    """A block of a model with something done to what it gives."""

    def __init__(self, inner: nn.Module, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.then = inner, then
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.skips else self.then(self.inner(x))


def around(then: Callable[[torch.Tensor], torch.Tensor]) -> tuple[nn.Module, Around]:
    model = tiny_llama()
    layer: Any = model.model.layers[1]  # type: ignore[union-attr,index]
    layer.mlp = Around(layer.mlp, then)
    return model, layer.mlp


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_site_that_ran_and_got_no_gradient_is_an_error_at_that_step(
    calls: int, gradient_checkpointing: bool
) -> None:
    model, _ = around(torch.detach)
    with Training(model, LoraConfig(rank=2), gradient_checkpointing=gradient_checkpointing) as run:
        before = [p.detach().clone() for p in run.parameters]
        for _ in range(calls):
            run.forward_backward(examples())
        with pytest.raises(TrainingError) as error:
            run.optim_step()
        assert "model.layers.1.mlp.inner.gate_proj" in str(error.value)
        assert "step 1" in str(error.value)
        assert "3 of 14 sites" in str(error.value)
        assert "layers.1.self_attn" not in str(error.value)
        flags = str(error.value).split("(--targets ")[1].removesuffix(")").split(",")
        assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
        assert not gradients(run)
        assert run.steps == 0
        with pytest.raises(TrainingError, match="no gradients are pending"):
            run.optim_step()
    with Training(model, LoraConfig(rank=2, targets=flags)) as run:  # the advice works
        assert len(run.attachment.sites) == 11
        run.forward_backward(examples())
        run.optim_step()


def test_a_detached_site_ends_a_run_by_name() -> None:
    model, _ = around(torch.detach)
    gate = r"model\.layers\.1\.mlp\.inner\.gate_proj"
    with (
        pytest.warns(PlanWarning, match=f"gives no gradient to {gate}"),
        pytest.raises(TrainingError, match=gate),
    ):
        train(Base(model), examples(), LoraConfig(rank=2), TrainConfig(max_steps=1))


def test_site_that_did_not_run_is_accepted() -> None:
    """As experts that no token chose, and layers that were dropped."""
    model, block = around(lambda y: y)
    block.skips = True
    with Training(model, LoraConfig(rank=2)) as run:
        run.forward_backward(examples())
        run.optim_step()
        own = run.attachment.modules["model.layers.1.mlp.inner.up_proj"]
        assert not own.lora_V.any()
        block.skips = False
        run.forward_backward(examples())
        run.optim_step()
        assert own.lora_V.any()
        run.loss(examples())
        block.skips = True
        run.forward_backward(examples())  # what ran in earlier steps and in evaluations does not count
        run.optim_step()


def test_site_reached_in_only_one_pass_is_accepted() -> None:
    model, block = around(lambda y: y)
    with Training(model, LoraConfig(rank=2)) as run:
        run.forward_backward(examples())
        block.then = torch.detach
        run.forward_backward(examples())
        run.optim_step()
        run.forward_backward(examples())
        with pytest.raises(TrainingError, match="step 2"):
            run.optim_step()


def test_experts_without_a_token_are_fine() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4)
            self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, chosen = self.gate(x).softmax(-1).max(-1)
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                rows = (chosen == i).nonzero(as_tuple=True)
                if i < 3 or len(rows[0]):  # three of them run on no rows too
                    y[rows] = y[rows] + expert(x[rows]) * weights[rows][:, None]
            return y

    model = tiny_llama()
    layer: Any = model.model.layers[1]  # type: ignore[union-attr,index]
    layer.mlp = Experts()
    with torch.no_grad():
        layer.mlp.gate.bias.copy_(torch.tensor([100.0, 0.0, -100.0, -100.0]))
    with Training(model, LoraConfig(rank=2)) as run:
        run.forward_backward(examples())
        run.optim_step()


def test_custom_loop_has_no_gradient_check() -> None:
    model, _ = around(torch.detach)
    with attach(model, LoraConfig(rank=2), trainable=True) as attachment:
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert sum(p.grad is None for p in attachment.parameters()) == 6
