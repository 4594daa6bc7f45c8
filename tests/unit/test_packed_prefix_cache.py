"""A prefix of several passes runs once, with the losses and gradients of separate rows."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference_kit import answered
from torch import nn

from brushstroke.adapter import LoraConfig
from brushstroke.base import Base, preserved_rope, reset_dynamic_rope
from brushstroke.data import Example
from brushstroke.errors import NonFiniteError
from brushstroke.inference.loss import evaluate_loss
from brushstroke.inference.request import Request, SamplingParams
from brushstroke.layers import attach
from brushstroke.packed.pack import REUSE_SAVES, Row, plan_passes
from brushstroke.training import Training
from toys import tiny_gpt2, tiny_llama, tiny_olmo
from training_kit import examples, padded_loss, peft_twin, randomise

BATCH = {"count": 18, "shared": 60}  # 12 of them begin with the same 60 tokens
MICRO = 90
LONG = Example(tuple(range(3, 63)) + (7,) * 40, (0.0,) * 50 + (1.0,) * 50)  # moves frequencies from 60 on


def tiny_of(family: str, **options) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    kind = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "initializer_range": 0.2, "eos_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, kind)(**{**sizes, **options})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


MODELS = {
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "olmo-clipped": lambda: tiny_olmo(clip_qkv=0.5),
    "mistral-window": lambda: tiny_of("Mistral", sliding_window=20),
    "qwen3": lambda: tiny_of("Qwen3"),
    "gemma3-windows": lambda: tiny_of(
        "Gemma3", sliding_window=30, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "form", [{}, {"memory": "low"}, {"gradient_checkpointing": True}], ids=["fast", "low", "checkpointed"]
)
def test_gradients_are_those_of_peft(model: str, form: dict) -> None:
    base, batch = MODELS[model](), examples(**BATCH)
    untouched = copy.deepcopy(base)
    with Training(base, LoraConfig(rank=4), micro_tokens=MICRO, **form) as run:
        randomise(run.parameters)
        parts = [part.groups[0].part for part in run.passes(batch)]
        assert run.packed
        assert max(part or 0 for part in parts) >= 3
        twin, factors = peft_twin(untouched, run.adapter())
        reference = padded_loss(twin, batch)
        reference.backward()
        result = run.forward_backward(batch)
        assert result.loss == pytest.approx(reference.item(), rel=1e-5)
        assert result.computed_tokens == sum(example.reach for example in batch) - 11 * 60
        for path, module in run.attachment.modules.items():
            a, b = factors[path]
            for ours, theirs in ((module.lora_U_rows.grad, a.grad), (module.lora_V.grad, b.grad.mT)):
                assert (ours / result.trained_tokens - theirs).norm() <= 1e-4 * theirs.norm(), path
        assert run.loss(batch).loss == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize("targets", [("down_proj",), ("q_proj",), (r".*layers\.1\..*",)])
def test_keys_that_no_trained_factor_reaches_need_no_gradient(targets: tuple[str, ...]) -> None:
    gradients = []
    for options in ({"micro_tokens": MICRO}, {"share_prefixes": False}):
        with Training(tiny_llama(), LoraConfig(rank=4, targets=targets), **options) as run:
            randomise(run.parameters)
            run.forward_backward(examples(**BATCH))
            gradients.append([parameter.grad for parameter in run.parameters])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def moving_model(kind: str, limit: int) -> nn.Module:
    """A model whose rotary frequencies move with rows of more than `limit` tokens."""
    rope = {
        "longrope": {
            "original_max_position_embeddings": limit,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0, 3.0, 2.0, 2.0],
        },
        "dynamic": {"factor": 2.0},
        "by kind": {},
    }[kind]
    if kind == "by kind":
        sets = (
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            {"rope_type": "default", "rope_theta": 1e4},
        )
        parameters = dict(zip(("full_attention", "sliding_attention"), sets, strict=True))
        kinds = ["full_attention", "sliding_attention"]
        return tiny_of("Gemma3", rope_parameters=parameters, max_position_embeddings=limit, layer_types=kinds)
    own = {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **rope}}
    if kind == "longrope":
        return tiny_of("Phi3", original_max_position_embeddings=limit, pad_token_id=0, **own)
    return tiny_of("Llama", max_position_embeddings=limit, **own)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["longrope", "dynamic", "by kind"])
def test_dynamic_rope_is_restored_after_each_use(kind: str, moved: bool) -> None:
    def state() -> list[tuple[str, object]]:
        tensors = [(name, x.tolist()) for name, x in model.named_buffers()]
        numbers = (int, float, type(None))
        return tensors + [
            (n, v) for m in model.modules() for n, v in vars(m).items() if isinstance(v, numbers)
        ]

    model = moving_model(kind, 60)
    if moved:  # by their owner
        model(input_ids=torch.tensor([LONG.tokens]))
    before = state()
    evaluate_loss(model, [LONG])
    assert state() == before
    requests = [Request((5, 6, 7)), Request((5, 6, 7, 8, 9))]
    answered(Base(model), requests, SamplingParams(max_new_tokens=2))
    assert state() == before
    with Training(model, LoraConfig(rank=2), max_length=128) as run:
        during = state()
        run.loss([LONG])
        assert state() == during
        run.forward_backward([LONG])
        run.optim_step()
        assert state() == during
    assert state() == before


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "by kind"])
def test_dynamic_rope_frequencies_stay_in_their_tensors(kind: str) -> None:
    model = moving_model(kind, 60)
    before = dict(model.named_buffers())
    evaluate_loss(model, [LONG])
    with Training(model, LoraConfig(rank=2), max_length=128) as run:
        run.forward_backward([LONG])
    assert all(buffer is before[name] for name, buffer in model.named_buffers())


def test_interrupt_during_rope_reset_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moving_model("dynamic", 60)
    model(input_ids=torch.tensor([LONG.tokens]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def stopped(*args: object, **kwargs: object) -> None:
        register(*args, **kwargs)
        raise KeyboardInterrupt

    register = nn.Module.register_buffer
    monkeypatch.setattr(nn.Module, "register_buffer", stopped)
    with pytest.raises(KeyboardInterrupt), preserved_rope(model):
        pass
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "by kind"])
def test_dynamic_rope_works_after_a_pass_in_inference_mode(kind: str) -> None:
    model = moving_model(kind, 60)
    tokens = torch.tensor([LONG.tokens])
    expected = moving_model(kind, 60)(input_ids=tokens).logits
    with torch.inference_mode():
        evaluate_loss(model, [LONG])
        answered(Base(model), [Request((5, 6, 7))], SamplingParams(max_new_tokens=2))
    assert not any(buffer.is_inference() for buffer in model.buffers())
    with Training(model, LoraConfig(rank=2), max_length=128) as run:
        run.forward_backward([LONG])
    assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_loss_does_not_depend_on_tokens_after_the_last_target(kind: str) -> None:
    limit = 60
    tokens = tuple(range(3, 63)) * 2
    with Training(moving_model(kind, limit), LoraConfig(rank=2), max_length=128) as run:
        randomise(run.parameters)
        for trained, tail in ((limit + 1, 0), (50, 70), (limit + 2, 3)):
            weights = [0.0] * 40 + [1.0] * (trained - 40) + [0.0] * tail
            row = Example(tokens[: len(weights)], tuple(weights))
            assert evaluate_loss(run.model, [row]).mean == pytest.approx(run.loss([row]).loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("micro_tokens", [MICRO, 4096])
def test_rows_that_change_rope_frequencies_run_alone(kind: str, micro_tokens: int) -> None:
    """The prefix alone, and shorter rows, would turn their keys by other frequencies than long rows do."""
    limit = 75
    model = partial(moving_model, kind, limit)
    batch = examples(**BATCH)
    far = [example for example in batch if example.reach > limit]
    assert 2 <= len(far) < 12
    reference = model()
    attachment = attach(reference, LoraConfig(rank=4), trainable=True)
    ours = Training(model(), LoraConfig(rank=4), micro_tokens=micro_tokens, max_length=128)
    with ours as run:
        for parameters in (attachment.parameters(), run.parameters):
            randomise(list(parameters))
        alone = {part.rows[0] for part in run.passes(batch) if len(part.rows) == 1}
        assert {Row.of(example) for example in far} <= alone
        for example in batch:
            reset_dynamic_rope(reference)
            tokens = torch.tensor(example.tokens)
            logits = reference(input_ids=tokens[None, : example.reach], use_cache=False).logits[0]
            targets = tokens[1 : example.reach + 1]
            losses = nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none")
            (losses * torch.tensor(example.weights[1 : example.reach + 1])).sum().backward()
        before = run.loss(batch).loss
        result = run.forward_backward(batch)
        assert run.loss(batch).loss == before == pytest.approx(result.loss, rel=1e-6)
        rows = [Example(e.tokens[: e.reach + 1], e.weights[: e.reach + 1]) for e in batch]
        assert any(len(row) == limit + 1 for row in rows)
        assert evaluate_loss(run.model, rows).mean == pytest.approx(run.loss(rows).loss, rel=1e-5)
        for mine, theirs in zip(run.parameters, attachment.parameters(), strict=True):
            assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


class Twice(nn.Module):
    """A decoder layer that runs the one after another, with the same weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.layer(self.layer(hidden_states, **kwargs), **kwargs)


def test_a_layer_that_runs_twice_computes_its_prefix_in_each_pass() -> None:
    model, batch = tiny_llama(), examples(**BATCH)
    model.model.layers[0] = Twice(model.model.layers[0])
    losses = []
    for options in ({"micro_tokens": MICRO}, {"share_prefixes": False}):
        with Training(model, LoraConfig(rank=4), **options) as run:
            randomise(run.parameters)
            assert run.packed
            assert {part.groups[0].part for part in run.passes(batch)} == {None}
            losses.append(run.forward_backward(batch).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_prefix_cache_is_freed_when_a_pass_fails() -> None:
    batch = examples(**BATCH)
    with Training(tiny_llama(), LoraConfig(rank=4), micro_tokens=MICRO) as run:
        randomise(run.parameters)
        run.forward_backward(batch)
        expected = [parameter.grad.clone() for parameter in run.parameters]
        run.zero_grad()
        calls = iter([1.0, 1.0, float("nan")] + [1.0] * 99)
        with pytest.raises(NonFiniteError):
            run.forward_backward(batch, lambda x, t, w: next(calls) * nn.functional.cross_entropy(x, t))
        assert all(parameter.grad is None for parameter in run.parameters)
        run.forward_backward(batch)
        for parameter, gradient in zip(run.parameters, expected, strict=True):
            assert torch.equal(parameter.grad, gradient)


@given(st.integers(1, 400), st.integers(8, 300), st.lists(st.integers(1, 60), min_size=2, max_size=24))
def test_cached_prefix_is_computed_once_and_leaves_room_for_passes(
    micro: int, prefix: int, suffixes: list[int]
) -> None:
    rows = [
        Row.of(
            Example(
                (*range(prefix), 1000 + i, *range(2000, 2000 + own)), (0.0,) * (prefix + 1) + (1.0,) * own
            )
        )
        for i, own in enumerate(suffixes)
    ]
    passes = plan_passes(rows, micro, share=True, reuse_prefix=True)
    found = [row for part in passes for row in part.rows]
    assert sorted(map(id, found)) == sorted(map(id, rows))
    computed = sum(part.computed_tokens for part in passes)
    plain = plan_passes(rows, micro, share=True)
    held = [part for part in passes if part.groups[0].part is not None]
    assert [part.groups[0].part for part in held] == list(range(len(held)))
    if held:
        assert held == passes
        assert computed == prefix + sum(suffixes)
        assert (len(held) - 1) * prefix >= REUSE_SAVES
        for part in held:
            assert part.kept_tokens <= max(micro, prefix + micro // 2) or len(part.rows) == 1
    else:
        assert passes == plain
